#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How much of its time does a run that keeps losing processes still train? PoE beside 1f1b with checkpoints.

    tools/setup
    experiments/goodput/run.py

Four ranks under mpiexec whose computing is emulated (--emulate-compute: they sleep), so that many runs fit on a small machine;
all else is real: processes, SIGKILLs, messages, snapshots and checkpoints of the default run's size (8.65 M parameters, 74 MiB).
At mean times between failures of 10 min, 1 min and 20 s, side by side in the same stretch of time: PoE whose agents replay, PoE
whose agents skip, 1f1b whose job this script starts again from its last checkpoint, and both without failures, with and without
what they do against them.

Duration: about 28 minutes on two cores, most of it asleep; finished points are kept, and a second call goes on. --quick: about
two minutes, at 20 s only. Writes into --out (default runs/goodput): goodput.md (the table, also on standard output),
goodput.json, goodput.png.

What to expect: PoE at least 0.99 at a failure every 10 minutes.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

COMPUTE = ["--emulate-compute", "forward=60ms,backward=120ms,optimizer=20ms", "--threads", 1]
BP = ["--objective", "bp", "--backout", "off", "--schedule", "1f1b", "--agents", "off"]
FOREVER = ["--num-iterations", 1000000]
HOST_LOSS = ["--save-every", 300]  # PoE's own checkpoints, for what snapshots do not survive
METHODS = ("PoE, replay", "PoE, skip", "1f1b, checkpoints")
BARE = {"PoE, replay": "PoE, bare", "PoE, skip": "PoE, bare", "1f1b, checkpoints": "1f1b, bare"}  # without precautions
CAREFUL = {"PoE, replay": "PoE, careful", "PoE, skip": "PoE, careful", "1f1b, checkpoints": "1f1b, careful"}  # with them
PUBLISHED = "Oobleck 0.955, Varuna 0.544, Bamboo 0.150"
FORMS = {"full": {600: 1500, 60: 900, 20: 600}, "quick": {20: 60}}  # mean time between failures: seconds of the stretch
COST = {"full": 60, "quick": 12}  # seconds in which a precaution's cost is measured
SKIPPED = re.compile(r"goes on without its own updates of steps (\d+) to (\d+)")


def drawn(mtbf, seconds):
    """Failures (time, rank) in that stretch; the first seed with as many as the mean asks for, rounded up."""
    for seed in range(1, 10000):
        rng, at, failures = random.Random(f"{mtbf} {seed}"), 0, []
        while True:
            at += rng.expovariate(1 / mtbf)
            if at >= seconds:
                break
            failures.append((at, rng.randrange(4)))
        if len(failures) == math.ceil(seconds / mtbf):
            return seed, failures
    raise SystemExit("no such seed")


def young(cost, mtbf, step):
    """Steps between precautions that cost so many seconds (Young 1974): sqrt(2 cost mtbf)."""
    return max(1, round(math.sqrt(2 * max(cost, 0) * mtbf) / step))


# --- a job ------------------------------------------------------------------------------------------------------------

class Job:
    """poe-pipe in the background, until the end of the block."""

    def __init__(self, program, words, out):
        self.program, self.words, self.out, self.starts = program, words, out, 0
        self.log = open(f"{out}.log", "w+")
        self.start([*words, *FOREVER, "--out", out])

    def start(self, words):
        self.starts += 1
        words = ["setpriv", "--pdeathsig", "KILL", self.program, "--ranks", 4, *words]  # it does not outlive this script
        self.process = subprocess.Popen([str(w) for w in words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=self.log, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})

    def start_again(self):
        checkpoints = self.checkpoint() is not None
        if not checkpoints:
            shutil.rmtree(self.out, ignore_errors=True)
        self.start([*(["--agents", "off", "--resume", self.out] if checkpoints else [*self.words, "--out", self.out]), *FOREVER])

    def ended(self):
        return self.process.poll() is not None

    def said(self):
        return Path(f"{self.out}.log").read_text()

    def steps(self):
        try:
            with open(f"{self.out}/metrics.jsonl") as file:
                return sum('"dt"' in line for line in file)
        except OSError:
            return 0

    def checkpoint(self):
        """The step of the newest one, or None."""
        return max((int(p.parent.name[5:]) for p in Path(self.out).glob("checkpoints/step-*/manifest.json")), default=None)

    def kept(self):
        """What will not have to be done again."""
        return (self.checkpoint() or 0) if self.ended() and not self.agents() else self.steps()

    def agents(self):
        return "off" not in self.words

    def victim(self, rank):
        """The process that computes as that rank, or None while there is none."""
        found = [self.process.pid]
        for pid in found:
            try:
                found += [int(c) for c in open(f"/proc/{pid}/task/{pid}/children").read().split()]
                name = open(f"/proc/{pid}/comm").read().strip()
                if name == f"poe-stage {rank}":
                    return pid
                if name == "poe-pipe" and not self.agents() and \
                        f"OMPI_COMM_WORLD_RANK={rank}".encode() in open(f"/proc/{pid}/environ", "rb").read().split(b"\0"):
                    return pid
            except OSError:
                pass
        return None

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if not self.ended():
            self.process.send_signal(signal.SIGTERM)  # with a second one it ends at once
            time.sleep(0.2)
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def wait_first_step(job):
    end = time.monotonic() + 180
    while job.steps() < 2:
        if job.ended() or time.monotonic() > end:
            raise SystemExit(f"{common.command(job.words)}: no first step:\n{job.said()}")
        time.sleep(0.05)


def live(job, failures, seconds, begin):
    """Until `seconds` after begin; failures strike at their times, or as soon after as their rank is there. Steps made."""
    before, pending, killed = job.steps(), list(failures), 0
    while time.monotonic() < begin + seconds:
        if job.ended():
            if job.agents() or not failures:
                raise SystemExit(f"{common.command(job.words)}: ended:\n{job.said()}")
            job.start_again()
        if pending and time.monotonic() >= begin + pending[0][0]:
            pid = job.victim(pending[0][1])
            if pid:
                os.kill(pid, signal.SIGKILL)
                pending.pop(0)
                killed += 1
        time.sleep(0.02)
    return dict(steps=job.kept() - before, killed=killed, starts=job.starts)


def pace(out):
    """Seconds per step of the rank that takes longest, without the first two."""
    steps = [json.loads(line) for line in open(f"{out}/metrics.jsonl") if '"dt"' in line][2:]
    return max(sum(s["accounts"][rank]["wall"] for s in steps) for rank in range(4)) / max(1, len(steps))


def together(options, runs, seconds):
    """Runs {name: (words, failures)} side by side; what each did in the stretch of time that begins when all are training."""
    results, errors, barrier = {}, [], threading.Barrier(len(runs))

    def one(name, words, failures, folder):
        try:
            with Job(options.program, words, f"{folder}/{name.replace(' ', '-')}") as job:
                wait_first_step(job)
                barrier.wait(240)
                results[name] = live(job, failures, seconds, time.monotonic())
                results[name]["pace"] = pace(job.out)
                results[name]["skipped"] = sum(int(b) - int(a) + 1 for a, b in SKIPPED.findall(job.said()))
        except BaseException as error:
            barrier.abort()
            errors.append(f"{name}: {error!r}")

    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        threads = [threading.Thread(target=one, args=(name, *run, folder)) for name, run in runs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise SystemExit("\n".join(errors))
    return results


# --- points -----------------------------------------------------------------------------------------------------------

def bare():
    return {"PoE, bare": ([*COMPUTE, "--agents", "off"], []), "1f1b, bare": ([*COMPUTE, *BP], [])}


def measure_cost(options, point):
    """Seconds that a snapshot and a checkpoint of the job cost it, from runs with one in every step and every third; beside the
    same runs without."""
    runs = {**bare(), "agents": ([*COMPUTE, "--snapshot-every", 100000], []), "snapshots": ([*COMPUTE, "--snapshot-every", 1], []),
            "saves": ([*COMPUTE, *BP, "--save-every", 3, "--keep", 2], [])}
    step = {name: r["pace"] for name, r in together(options, runs, point["seconds"]).items()}
    result = dict(poe_step=step["agents"], bp_step=step["1f1b, bare"], agents=step["agents"] / step["PoE, bare"] - 1,
                  snapshot=max(0.01, step["snapshots"] - step["agents"]),
                  checkpoint=max(0.05, 3 * (step["saves"] - step["1f1b, bare"])))
    result["summary"] = ", ".join(f"{k} {v:.3f}" for k, v in result.items())
    return result


def shares(runs, bases):
    return {m: runs[m]["steps"] / runs[bases[m]]["steps"] for m in METHODS}


def measure_mtbf(options, p):
    seed, failures = drawn(p["mtbf"], p["seconds"])
    poe = [*COMPUTE, "--snapshot-every", p["snapshot_every"], *HOST_LOSS, "--keep", 2]
    bp = [*COMPUTE, *BP, "--save-every", p["save_every"], "--keep", 2]
    r = together(options, {**bare(), "PoE, careful": (poe, []), "1f1b, careful": (bp, []), "PoE, replay": (poe, failures),
                           "PoE, skip": ([*poe, "--recover", "skip"], failures), "1f1b, checkpoints": (bp, failures)}, p["seconds"])
    result = dict(runs=r, seed=seed, failures=failures, share=shares(r, BARE), careful=shares(r, CAREFUL), load=os.getloadavg()[2])
    result["lost"] = {m: (1 - result["careful"][m]) * p["seconds"] / max(1, r[m]["killed"]) for m in METHODS}
    result["summary"] = ", ".join(f"{m} {s:.3f} ({result['careful'][m]:.3f})" for m, s in result["share"].items())
    return result


def points_of(options, cost):
    return [dict(name=f"a failure every {mtbf} s", mtbf=mtbf, seconds=seconds,
                 snapshot_every=young(cost["snapshot"], mtbf, cost["poe_step"]),
                 save_every=young(cost["checkpoint"], mtbf, cost["bp_step"])) for mtbf, seconds in FORMS[options.form].items()]


# --- results ----------------------------------------------------------------------------------------------------------

def name_of(mtbf):
    return f"{mtbf // 60} min" if mtbf >= 60 else f"{mtbf} s"


def table(points, wanted):
    lines = ["| mean time between failures | failures in | " + " | ".join(METHODS) + " | seconds lost per failure | "
             "snapshots, checkpoints every | steps whose updates one stage skipped | published |", "|---" * (len(METHODS) + 6) + "|"]
    for p in wanted:
        r = points[p["name"]]
        lost = " / ".join(f"{r['lost'][m]:.1f}" for m in METHODS)
        lines.append(f"| {name_of(p['mtbf'])} | {len(r['failures'])} in {p['seconds']} s (seed {r['seed']}) | " +
                     " | ".join(f"{r['share'][m]:.3f} ({r['careful'][m]:.3f})" for m in METHODS) +
                     f" | {lost} | {p['snapshot_every']}, {p['save_every']} steps | "
                     f"{r['runs']['PoE, skip']['skipped']} | {PUBLISHED if p['mtbf'] == 600 else ''} |")
    return lines


def markdown(points, wanted, cost, options, load):
    return "\n".join([f"{common.machine()}, load {load}; experiments/goodput/run.py {' '.join(sys.argv[1:])}".rstrip(), "",
                      "Effective training time; compute emulated. Steps kept, beside those of an undisturbed run in the same time that "
                      "takes no precautions (in brackets: beside one that takes the same). Seconds lost per failure are beside the latter.", "",
                      *table(points, wanted), "",
                      f"Undisturbed steps take {cost['poe_step']:.2f} s (PoE, of which agents cost {100 * cost['agents']:.1f} %) and "
                      f"{cost['bp_step']:.2f} s (1f1b); a snapshot costs "
                      f"{1e3 * cost['snapshot']:.0f} ms, a checkpoint {1e3 * cost['checkpoint']:.0f} ms; intervals by Young's formula."]) + "\n"


def draw(options, points, wanted):
    rows = [" ".join([f'"{name_of(p["mtbf"])}"', *(str(points[p["name"]]["share"][m]) for m in METHODS),
                      *(("0.955", "0.544", "0.150") if p["mtbf"] == 600 else ("NaN",) * 3)]) for p in wanted]
    bars = [*zip(METHODS, ("#1e8449", "#a9dfbf", "#3b6fb6"))]
    if any(p["mtbf"] == 600 for p in wanted):
        bars += [("Oobleck (published)", "#888888"), ("Varuna (published)", "#aaaaaa"), ("Bamboo (published)", "#cccccc")]
    plots = ", ".join(f"$data using {i + 2}{':xtic(1)' if i == 0 else ''} title '{name}' lc rgb '{colour}'"
                      for i, (name, colour) in enumerate(bars))
    script = ["set terminal pngcairo size 1000,520 font 'Sans,11' noenhanced", f"set output '{options.out}/goodput.png'",
              "set title 'Effective training time under failures (4 ranks, compute emulated, kills real)'",
              "set style data histograms", "set style histogram clustered gap 1", "set style fill solid 0.9 border -1",
              "set grid ytics", "set yrange [0:1.05]", "set ylabel 'share of the undisturbed rate'",
              "set xlabel 'mean time between failures'", "set key outside right", "$data << EOD", *rows, "EOD",
              f"plot {plots}, 0.99 lc rgb '#000000' dt 2 title '0.99'"]
    common.plot(script)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "goodput")
    parser.add_argument("--workers", type=int, default=3, help="failure rates that are tried at once")
    parser.add_argument("--quick", dest="form", action="store_const", const="quick", default="full", help="one rate, a minute")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not options.program.is_file():
        parser.error(f"there is no {options.program}: run tools/setup, or give --program")
    return options


def main():
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    points = common.Points(options.out / f"{options.form}.json")
    points.measure([dict(name="cost", seconds=COST[options.form])], lambda p: measure_cost(options, p), 1)
    wanted = points_of(options, points["cost"])
    points.measure(wanted, lambda p: measure_mtbf(options, p), options.workers)
    text = markdown(points, wanted, points["cost"], options, f"{load:.1f} to {os.getloadavg()[0]:.1f}")
    (options.out / "goodput.md").write_text(text)
    draw(options, points, wanted)
    print(text)


if __name__ == "__main__":
    main()
