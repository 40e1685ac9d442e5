#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A stage process is killed: how long until its pipeline streams again? Beside 1f1b, where everybody starts again.

    tools/setup
    experiments/recovery/run.py

Four ranks under mpiexec, real kernels, real SIGKILLs, for models of several sizes. PoE: agents start the killed stage process
again, which goes back to its snapshot and repeats what came since. 1f1b, without agents, whose rank is killed, and PoE whose agent is: the
job ends, and is started again from its last checkpoint.

Duration: about 20 minutes on two cores; --quick: about a minute, one small model. Ranks share the processors, so steps take
as long as four ranks on this machine do.

Writes into --out (default runs/recovery): recovery.md (the table, also on standard output), recovery.png, and the sizes that are
finished, so that a second call goes on.

What to expect: the death is noticed within milliseconds, and less than a second passes before the stage process is back at its
snapshot, at the default run's size; what it repeats is its own part of the steps since then. 1f1b loses every rank's steps
since the last checkpoint, and starts all processes.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

SIZES = {
    "default, 8.7 M": [],
    "22 M": ["--stages", "2,2,2,2", "--n-embd", 384, "--n-head", 6, "--vocab-size", 4096, "--sequence-len", 256,
             "--device-batch-size", 1, "--total-batch-size", 1024],
    "76 M": ["--stages", "3,3,3,3", "--n-embd", 640, "--n-head", 10, "--vocab-size", 8192, "--sequence-len", 256,
             "--device-batch-size", 1, "--total-batch-size", 1024],
}
QUICK = {"0.2 M": ["--stages", "1,1,1,1", "--n-embd", 32, "--n-head", 2, "--sequence-len", 32, "--vocab-size", 300,
                   "--device-batch-size", 2, "--total-batch-size", 512]}
BACK = re.compile(r"rank (\d+): back after ([\d.]+) s: started after ([\d.]+), at its snapshot of step (\d+) after ([\d.]+), "
                  r"then (\d+) step")
EVERY = 4  # steps between snapshots and between checkpoints


class Run:
    """poe-pipe in the background; lines of standard error with the time at which they came."""

    def __init__(self, words):
        self.process = subprocess.Popen([str(w) for w in words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.lines, self.lock = [], threading.Lock()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            with self.lock:
                self.lines.append((time.monotonic(), line.rstrip()))

    def find(self, text, after, timeout):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with self.lock:
                for at, line in self.lines:
                    if at >= after and text in line:
                        return at, line
            time.sleep(0.001)
        raise SystemExit(f"no line with \"{text}\" within {timeout} s:\n" + "\n".join(line for _, line in self.lines))

    def end(self):
        pids = descendants(self.process.pid)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the end of all processes", 20)


def descendants(pid):
    found = [pid]
    for p in found:
        try:
            found += [int(c) for c in open(f"/proc/{p}/task/{p}/children").read().split()]
        except OSError:
            pass
    return found


def named(root, name):
    for pid in descendants(root):
        try:
            if open(f"/proc/{pid}/comm").read().strip() == name:
                return pid
        except OSError:
            pass
    return None


def steps_done(out):
    try:
        return sum('"dt"' in line for line in open(f"{out}/metrics.jsonl"))
    except OSError:
        return 0


def wait_for(condition, what, timeout=300):
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {timeout} s in vain for {what}")
        time.sleep(0.005)


def step_seconds(out):
    lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    return statistics.median(line["dt"] for line in lines if "dt" in line)


# --- PoE --------------------------------------------------------------------------------------------------------------

def measure_poe(args, flags, folder):
    out, rng, results = f"{folder}/poe", random.Random(1), []
    run = Run([args.program, "--ranks", 4, *flags, "--num-iterations", 100000, "--snapshot-every", EVERY, "--out", out])
    try:
        wait_for(lambda: steps_done(out) >= 2 or run.process.poll() is not None, "the first steps")
        for i in range(args.kills):
            time.sleep(rng.uniform(0.5, 1.5) * args.pause)
            rank = i % 4
            killed = time.monotonic()
            os.kill(named(run.process.pid, f"poe-stage {rank}"), signal.SIGKILL)
            noticed, _ = run.find(f"rank {rank}: warning: its stage process was ended", killed, 60)
            _, line = run.find(f"rank {rank}: back after", killed, 300)
            back = BACK.search(line)
            if not back:
                raise SystemExit(f"not understood: {line}")
            whole, started, restored, steps = (float(back.group(i)) for i in (2, 3, 5, 6))
            results.append(dict(rank=rank, noticed=noticed - killed, started=started, restored=restored, whole=whole, steps=steps))
        return results, step_seconds(out)
    finally:
        run.end()


# --- the whole job again ----------------------------------------------------------------------------------------------

BP = ["--objective", "bp", "--backout", "off", "--schedule", "1f1b", "--agents", "off"]


def any_rank(root):
    return next(p for p in descendants(root) if p != root and os.path.basename(os.readlink(f"/proc/{p}/exe")) == "poe-pipe")


def an_agent(root):
    return named(root, "poe-agent 1")


def measure_restarts(args, flags, folder, more, victim):
    """From the kill to the job's end, from the second start to the first step that the first job had not done yet."""
    out, results = f"{folder}/again", []
    words = [args.program, "--ranks", 4, *flags, *more, "--save-every", EVERY]
    for i in range(args.restarts):
        shutil.rmtree(out, ignore_errors=True)
        run = Run([*words, "--num-iterations", 100000, "--out", out])
        wait_for(lambda: steps_done(out) >= EVERY + 2 + i, "the first checkpoint")
        killed = time.monotonic()
        done = steps_done(out)
        os.kill(victim(run.process.pid), signal.SIGKILL)
        run.process.wait()
        ended = time.monotonic()
        run.end()
        again = Run([args.program, "--ranks", 4, "--resume", out, "--num-iterations", 100000])
        wait_for(lambda: steps_done(out) < done, "the second start")  # metrics are cut back to the checkpoint
        started, kept = time.monotonic(), steps_done(out)
        wait_for(lambda: steps_done(out) >= done, "what was lost")
        results.append(dict(ended=ended - killed, started=started - ended, whole=time.monotonic() - killed, steps=done - kept))
        again.end()
    return results


# --- results ----------------------------------------------------------------------------------------------------------

def median(results, key):
    return statistics.median(r[key] for r in results)


def table(sizes):
    lines = ["| model | step | noticed after | started | at its snapshot again | back (what it repeated) | longest to snapshot |",
             "|---" * 7 + "|"]
    for name, s in sizes.items():
        poe = s["poe"]
        lines.append(f"| {name} | {s['step']:.2f} s | {1e3 * median(poe, 'noticed'):.0f} ms | {1e3 * median(poe, 'started'):.0f} ms | "
                     f"{1e3 * median(poe, 'restored'):.0f} ms | {median(poe, 'whole'):.2f} s ({median(poe, 'steps'):.0f} steps) | "
                     f"{1e3 * max(r['restored'] for r in poe):.0f} ms |")
    lines += ["", "| model | what is killed | job ended after | started again | caught up (steps lost by all) |", "|---" * 5 + "|"]
    for name, s in sizes.items():
        for what in ("1f1b", "agent"):
            again, words = s[what], {"1f1b": "1f1b: a rank", "agent": "PoE: an agent"}[what]
            lines.append(f"| {name} | {words} | {median(again, 'ended'):.2f} s | {median(again, 'started'):.2f} s | "
                         f"{median(again, 'whole'):.2f} s ({median(again, 'steps'):.0f} steps) |")
    return "\n".join(lines)


def draw(sizes, path):
    rows = [f'"{name}" {median(s["poe"], "restored")} {median(s["poe"], "whole") - median(s["poe"], "restored")} '
            f'{median(s["1f1b"], "ended") + median(s["1f1b"], "started")} '
            f'{median(s["1f1b"], "whole") - median(s["1f1b"], "ended") - median(s["1f1b"], "started")}' for name, s in sizes.items()]
    script = ["set terminal pngcairo size 1100,500 font 'sans,11'", f"set output '{path}'", "set style data histograms",
              "set style histogram rowstacked", "set style fill solid 0.9 border -1", "set boxwidth 0.7", "set grid ytics",
              "set ylabel 'seconds after the kill'", "set key top left", "set offsets 0, 0, graph 0.25, 0", "set yrange [0:*]",
              "set multiplot layout 1,2 title 'A stage process is killed (mind the scales)'", "$data << EOD", *rows, "EOD",
              "set title 'PoE: one stage process is started again'",
              "plot $data using 2:xtic(1) title 'until back at its snapshot' lc rgb '#1e8449', '' using 3 title 'repeating' lc rgb '#a9dfbf'",
              "set title '1f1b: the job is started again'",
              "plot $data using 4:xtic(1) title 'until started again' lc rgb '#ca6f1e', '' using 5 title 'repeating, all ranks' lc rgb '#f5cba7'"]
    common.plot(script)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "recovery")
    parser.add_argument("--quick", action="store_true", help="one tiny model, few kills: does it work?")
    args = parser.parse_args()
    args.kills, args.restarts, args.pause = (4, 1, 0.5) if args.quick else (12, 3, 4)
    if not args.program.is_file():
        parser.error(f"there is no {args.program}: run tools/setup, or give --program")
    return args


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    load, results = os.getloadavg()[0], args.out / f"{'quick' if args.quick else 'full'}.json"
    sizes = json.loads(results.read_text()) if results.exists() and not args.quick else {}
    for name, flags in (QUICK if args.quick else SIZES).items():
        if name in sizes:
            continue
        with tempfile.TemporaryDirectory() as folder:
            poe, step = measure_poe(args, flags, folder)
            again = measure_restarts(args, flags, folder, BP, any_rank)
            lost = measure_restarts(args, flags, folder, [], an_agent)
        sizes[name] = dict(poe=poe, step=step, agent=lost, **{"1f1b": again})
        results.write_text(json.dumps(sizes, indent=1) + "\n")
        print(f"{name}: done", file=sys.stderr, flush=True)
    text = "\n".join([f"{common.machine()}, load {load:.1f} at the start; experiments/recovery/run.py {' '.join(sys.argv[1:])}; 4 ranks "
                      f"time-shared; snapshots and checkpoints every {EVERY} steps; medians of {args.kills} and {args.restarts} kills",
                      "", table(sizes)])
    (args.out / "recovery.md").write_text(text + "\n")
    draw(sizes, args.out / "recovery.png")
    print(text)


if __name__ == "__main__":
    main()
