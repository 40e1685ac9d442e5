#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Does anything that can be killed, stopped, cut or damaged cost a run more than time? Random fault plans over small runs.

    tests/campaign.py --plans 1000 --workers 2      # the long form: about an hour and a half on two cores
    tests/campaign.py --seconds 150                 # as many as fit
    tests/campaign.py --seed 4711                   # one plan again, and what it printed

Every plan is drawn from its seed: a configuration (2 to 5 ranks; exact, stale, every; heads; wire formats; networks), and 1 to 4
faults at random steps, phases and ranks, some of them during a recovery, a snapshot or a checkpoint, all at once or one after
the other. Two outcomes are allowed: `same`, the run ends well with the weights, bit for bit, of the undisturbed run; `stopped`, it
ends with exit status 1 and a sentence, and resuming from what it left whole, or starting anew where that is nothing, gives
those weights. Also, it must end within --deadline seconds, and leave no process, no temporary file, and nothing in /dev/shm.

A seed that fails is printed with the command that repeats it. Writes into --out: campaign.md (fault kind x outcome, also on
standard output), campaign.json (every plan), and every 50 plans what there is so far.
"""
import argparse
import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "e2e"))
import poe  # noqa: E402

STEPS = 40
PHASES = ["receive", "forward", "backward", "reduce", "optimizer", "snapshot", "checkpoint", "recovery"]
PROCESS = ["kill", "segfault", "exit", "stop", "memory"]  # of a stage process
LINK = ["cut", "corrupt", "partition"]
FATAL = ["kill-agent", "kill-keeper", "disk"]          # a run may stop after these, and must not lose anything
HARMLESS = ["slow", "corrupt-checkpoint"]              # while the run goes on
CONFIGURATIONS = [
    dict(stages="1,1,1"),
    dict(stages="1,1", sync="stale:2", head="ps"),
    dict(stages="2,1,1", sync="stale:3"),
    dict(stages="1,1,1", sync="every:4"),
    dict(stages="1,1", wire="bf16", sync="stale:1", wire_shared="bf16"),
    dict(stages="1,1,1,1", sync="stale:4"),
    dict(stages="1,1,1,1,1"),
    dict(stages="1,1", objective="bp", schedule="1f1b"),
    dict(stages="1,1,1", net="*:rtt=2ms,jitter=1ms"),
]
BASE = dict(num_iterations=STEPS, snapshot_every=5, save_every=16, eval_every=20, eval_tokens=512, deadline=30)


# --- plans ------------------------------------------------------------------------------------------------------------

def draw_fault(rng, ranks, step):
    kind = rng.choices(PROCESS + LINK + FATAL + HARMLESS, [30, 8, 8, 5, 2, 8, 5, 3, 3, 2, 2, 4, 2])[0]
    rank = rng.randrange(ranks)
    words = [kind, f"rank={rank}", f"step={step}"]
    if kind in ("cut", "corrupt"):
        words.append(f"to={rng.choice([r for r in range(ranks) if r != rank])}")
    elif kind == "partition":
        words = [kind, f"ranks={rank}", f"step={step}", f"for={rng.uniform(0.1, 1):.2f}s"]
    elif kind == "slow":
        words += ["duty=0.3", "for=0.5s"]
    elif kind == "stop":
        words.append(f"for={rng.uniform(0.1, 1):.2f}s")
    elif kind == "memory":
        words.append("cap=32MiB")
    elif kind == "exit":
        words.append("code=3")
    elif kind == "disk":
        words.append("for=1s")
    if kind in PROCESS + FATAL[:2] and rng.random() < 0.8:
        phase = rng.choice(PHASES)
        words.append(f"phase={phase}")
        if phase in ("forward", "backward") and rng.random() < 0.5:
            words.append(f"micro={rng.randrange(2)}")
        if phase == "snapshot":
            words[2] = f"step={step // 5 * 5}"
        if phase == "checkpoint":
            words[2] = f"step={rng.choice([16, 32])}"
        if phase == "recovery":  # something must have happened before it, and it returns to a snapshot's step
            return [f"kill rank={rank} step={step}", f"{kind} rank={rank} step={step // 5 * 5} phase=recovery" +
                    "".join(f" {w}" for w in words[3:] if not w.startswith("phase="))]
    return [" ".join(words)]


def draw(seed):
    rng = random.Random(seed)
    configuration = rng.choice(CONFIGURATIONS)
    ranks = len(configuration["stages"].split(","))
    together = rng.random() < 0.3
    step = rng.randrange(1, STEPS)
    faults = []
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        faults += draw_fault(rng, ranks, step if together else rng.randrange(1, STEPS))
    return configuration, ranks, faults


# --- one plan ---------------------------------------------------------------------------------------------------------

class Failed(Exception):
    pass


def words_of(configuration, out, data, **more):
    return poe.flags(**{**BASE, **configuration, "data": data, "out": out, "export": f"{out}/final.safetensors", **more})


def left_processes(tag):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and poe.process_environment(int(entry)).get("POE_CAMPAIGN") == tag and poe.alive(int(entry)):
            found.append(int(entry))
    return found


def call(words, ranks, tag, deadline):
    """Exit status and standard error; Failed when it does not end."""
    env = {**poe.environment(poe.RANKS), "POE_CAMPAIGN": tag}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(poe.command(words, poe.RANKS, ranks), env=env, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try:
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None:
            end = time.monotonic() + 3
            while left_processes(tag) and time.monotonic() < end:
                time.sleep(0.02)
        left = left_processes(tag)
        for pid in left:
            poe.kill(pid, signal.SIGKILL)
        process.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    if code is None:
        raise Failed(f"did not end within {deadline} s:\n{text[-3000:]}")
    if left:
        raise Failed(f"left processes {left}:\n{text[-3000:]}")
    return code, text


def losses(out):
    """An emulated network is marked as such."""
    return [{k: v for k, v in step.items() if k != "emulated"} for step in poe.steps(out)]


def same_weights(a, b):
    return poe.read_bytes(f"{a}/final.safetensors") == poe.read_bytes(f"{b}/final.safetensors")


def judge(seed, whole, data, folder, deadline):
    """`same` or `stopped`; Failed otherwise."""
    configuration, ranks, faults = draw(seed)
    out, tag = f"{folder}/run", f"{os.getpid()}-{seed}"
    code, text = call(words_of(configuration, out, data, fault="; ".join(faults)), ranks, tag, deadline)
    if code == 0:
        if not same_weights(out, whole):
            raise Failed(f"other weights than the undisturbed run:\n{text[-3000:]}")
        if losses(out) != losses(whole):
            raise Failed(f"other losses in metrics.jsonl than the undisturbed run:\n{text[-3000:]}")
        if poe.leftovers(out):
            raise Failed(f"left over: {poe.leftovers(out)}\n{text[-3000:]}")
        return "same", text
    if not text.strip():
        raise Failed(f"exit status {code} without a sentence")
    again = f"{folder}/again"
    resumes, second = bool(poe.checkpoints(out)), 2
    if resumes:
        second, more = call(["--resume", out, "--resume-older", "--export", f"{out}/final.safetensors"], ranks, tag, deadline)
        resumes = second != 2  # refused: of what there is nothing is whole
    if not resumes:
        second, more = call(words_of(configuration, again, data), ranks, tag, deadline)
    if second != 0 or not same_weights(out if resumes else again, whole):
        raise Failed(f"exit status {code}, and then {'resuming' if resumes else 'starting anew'} gave status {second} or other "
                     f"weights:\n{text[-2000:]}\n{more[-2000:]}")
    if poe.leftovers(out):
        raise Failed(f"left over: {poe.leftovers(out)}\n{text[-3000:]}")
    return "stopped", text


class Campaign:
    def __init__(self, folder, deadline):
        self.folder, self.deadline, self.lock, self.whole = folder, deadline, threading.Lock(), {}
        self.data = poe.write_tokens(f"{folder}/tokens.bin")

    def undisturbed(self, configuration):
        key = json.dumps(configuration)
        with self.lock:
            if key not in self.whole:
                out = f"{self.folder}/whole-{len(self.whole)}"
                plain = {k: v for k, v in configuration.items() if k != "net"}
                poe.succeed(words_of(plain, out, self.data))
                self.whole[key] = out
        return self.whole[key]

    def run(self, seed):
        configuration, ranks, faults = draw(seed)
        whole, started = self.undisturbed(configuration), time.monotonic()
        folder = tempfile.mkdtemp(dir=self.folder)
        try:
            outcome, said = judge(seed, whole, self.data, folder, self.deadline)
        except (Failed, OSError, KeyError, ValueError) as error:
            outcome, said = "FAILED", f"{type(error).__name__}: {error}"
        shutil.rmtree(folder, ignore_errors=True)
        return dict(seed=seed, configuration=configuration, ranks=ranks, faults=faults, outcome=outcome, said=said,
                    struck=said.count("fault: "), seconds=round(time.monotonic() - started, 2))


# --- results ----------------------------------------------------------------------------------------------------------

OUTCOMES = ["same", "stopped", "FAILED"]


def table(results):
    kinds = {}
    for r in results:
        for kind in {f.split()[0] + (" in recovery" if "recovery" in f else "") for f in r["faults"]}:
            kinds.setdefault(kind, []).append(r["outcome"])
    lines = ["| fault in the plan | plans | " + " | ".join(OUTCOMES) + " |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for name, outcomes in [*sorted(kinds.items()), ("all plans", [r["outcome"] for r in results])]:
        lines.append(f"| {name} | {len(outcomes)} | " + " | ".join(str(outcomes.count(o)) for o in OUTCOMES) + " |")
    several = sum(len(r["faults"]) > 1 for r in results)
    lines += ["", f"{len(results)} plans, {several} of them with several faults; {sum(r['struck'] for r in results)} faults struck; "
                  f"seconds per plan: median {sorted(r['seconds'] for r in results)[len(results) // 2]}, longest "
                  f"{max(r['seconds'] for r in results)}"]
    return "\n".join(lines)


def shared_memory():
    return set(os.listdir("/dev/shm"))


def write(args, results, text):
    if not args.out:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "campaign.md").write_text(text + "\n")
    (args.out / "campaign.json").write_text(json.dumps(results, indent=1) + "\n")


def run_all(args, campaign):
    results, begun = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        waiting, seed = set(), args.first
        while True:
            late = args.seconds and time.monotonic() - begun > args.seconds
            while len(waiting) < args.workers and not late and (args.seconds or seed < args.first + args.plans):
                waiting.add(pool.submit(campaign.run, seed))
                seed += 1
            if not waiting:
                return results
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for result in (d.result() for d in done):
                results.append(result)
                if result["outcome"] == "FAILED":
                    print(f"seed {result['seed']} FAILED ({'; '.join(result['faults'])}): {result['said']}\n"
                          f"again: tests/campaign.py --seed {result['seed']}", flush=True)
            if len(results) % 50 == 0:
                print(f"{len(results)} plans", file=sys.stderr, flush=True)
                write(args, results, table(results))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seconds", type=float, help="instead: begin plans for so long")
    parser.add_argument("--workers", type=int, default=1, help="plans at once")
    parser.add_argument("--deadline", type=float, default=90, help="seconds that a run may take (default 90)")
    parser.add_argument("--seed", type=int, help="this plan alone")
    parser.add_argument("--out", type=Path, help="where campaign.md and campaign.json go (default: nowhere)")
    return parser.parse_args()


def main():
    args = parse()
    before = shared_memory()
    with tempfile.TemporaryDirectory(prefix="poe-campaign-") as folder:
        campaign = Campaign(folder, args.deadline)
        if args.seed is not None:
            result = campaign.run(args.seed)
            print(json.dumps({k: v for k, v in result.items() if k != "said"}), result["said"], sep="\n")
            sys.exit(result["outcome"] == "FAILED")
        results = run_all(args, campaign)
    text = table(results)
    left = shared_memory() - before
    if left:
        text += f"\n\nleft in /dev/shm: {sorted(left)}"
    print(text)
    write(args, results, text)
    sys.exit(bool(left) or any(r["outcome"] == "FAILED" for r in results))


if __name__ == "__main__":
    main()
