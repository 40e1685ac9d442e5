#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Two availability zones whose link is cut for 30 s, more than once: what does a run lose?

    tools/setup
    experiments/zones/run.py --netlab ../shared/netlab/netlab

Four ranks in four network namespaces whose packets a router really delays (netlab; needs root and /dev/net/tun, exit status 77
without): ranks 0 and 1 in one zone, 2 and 3 in the other, 0.1 ms one way within a zone and 10 ms between them, 1 Gbit/s. Real
kernels, a small model. PoE with --sync exact and with stale:2, each three times: undisturbed; with the link between the zones
cut at random times, when the router drops every packet between them; and with the cuts and a stage process killed in each
zone, one of them while the link is cut. The final weights must be the same, bit for bit.

Duration: about 8 minutes; --quick: about a minute and a half, one cut of 3 s, no kills. Writes into --out (default runs/zones):
zones.md (the table, also on standard output), zones.json, zones.png (steps over time).

What to expect: nothing lost, and a time longer by the cuts and about a second each.
"""
import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

HOSTS = [f"fh{i}" for i in range(4)]
ACROSS = [(a, b) for a in range(4) for b in range(4) if a // 2 != b // 2]
MODEL = ["--stages", "1,1,1,1", "--n-embd", 64, "--n-head", 2, "--sequence-len", 64, "--vocab-size", 256, "--device-batch-size", 4,
         "--total-batch-size", 1024, "--threads", 1]
RULES = ("exact", "stale:2")
DEADLINE = 300
FORMS = {"full": dict(steps=300, cuts=2, cut=30, gap=(30, 90)), "quick": dict(steps=100, cuts=1, cut=3, gap=(20, 60))}


def environment(options):
    return {**common.mpi_environment(), "OPENBLAS_NUM_THREADS": "1", "NETLAB_DIR": str(options.out / "lab")}


# --- the network ------------------------------------------------------------------------------------------------------

def lab(options, *words):
    with open(options.out / "lab.log", "a") as log:  # the router keeps it open
        subprocess.run([str(w) for w in (options.netlab, *words)], env=environment(options), stdin=subprocess.DEVNULL,
                       stdout=log, stderr=log, check=True, timeout=30)


def lab_up(options):
    lab(options, "up", 0.1, 0, 1000, 0)
    for a, b in ACROSS:
        lab(options, "set", a, b, 10, 0, 1000, 0)


def set_link(options, word):
    with open(options.out / "lab" / "ctl", "w") as control:
        control.write("".join(f"{word} {a} {b}\n" for a, b in ACROSS))


# --- a run ------------------------------------------------------------------------------------------------------------

def steps_done(out):
    try:
        return sum('"dt"' in line for line in open(f"{out}/metrics.jsonl"))
    except OSError:
        return 0


def stage_process(options, rank):
    """netlab's processes are in other namespaces, but not of process ids."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if open(f"/proc/{pid}/comm").read().strip() == f"poe-stage {rank}" and \
                    f"NETLAB_DIR={options.out}/lab" in open(f"/proc/{pid}/environ").read().split("\0"):
                return int(pid)
        except OSError:
            pass
    return None


def cuts_of(options, way):
    """Steps before each cut, counted anew from the first step after the cut before."""
    rng = random.Random(7)
    return [] if way == "undisturbed" else [rng.randint(*options.sizes["gap"]) for _ in range(options.sizes["cuts"])]


def kill(options, rank):
    os.kill(stage_process(options, rank), signal.SIGKILL)


class Watch:
    """A run's steps over time, from its first ones."""

    def __init__(self, process, out):
        self.process, self.out, self.begin, self.curve = process, out, None, []
        self.limit = time.monotonic() + 1500

    def look(self):
        """Seconds since the first steps."""
        time.sleep(0.02)
        now, steps = time.monotonic(), steps_done(self.out)
        if now > self.limit:
            raise SystemExit("the run does not end")
        if self.begin is None and steps >= 2:
            self.begin = now
        if self.begin is None:
            return 0
        if not self.curve or self.curve[-1][1] != steps:
            self.curve.append((now - self.begin, steps))
        return now - self.begin

    def ended(self):
        return self.process.poll() is not None

    def until(self, seconds=0, step=0):
        while not self.ended() and (self.look() < seconds or self.curve[-1][1] < step):
            pass
        if self.ended():
            raise SystemExit("the run ended before it was disturbed as often as it was to be")

    def next_step(self):
        """The moment of the next one: what was under way when the link was cut is there after a while."""
        steps = self.curve[-1][1]
        while not self.ended() and self.curve[-1][1] == steps:
            self.look()
        return self.curve[-1][0]


def disturb(watch, options, p):
    """Cuts the link at its times and, in the third way, kills a stage process during the first cut and one after it. The moments:
    (cut, joined, first step after that)."""
    cut, moments, kills = options.sizes["cut"], [], p["way"] == "cuts and kills"
    while not watch.ended() and not watch.curve:
        watch.look()
    for i, gap in enumerate(p["cuts"]):
        watch.until(step=watch.curve[-1][1] + gap)
        down = watch.look()
        set_link(options, "down")
        if kills and i == 0:
            watch.until(down + cut / 3)
            kill(options, 1)
        watch.until(down + cut)
        set_link(options, "up")
        up = watch.look()
        moments.append((down, up, watch.next_step()))
        if kills and i == 0:
            watch.until(step=watch.curve[-1][1] + 10)
            kill(options, 2)
    while not watch.ended():
        watch.look()
    return moments


def run(options, p):
    out = options.out / "run"
    shutil.rmtree(out, ignore_errors=True)
    lab_up(options)
    try:
        with tempfile.TemporaryFile("w+") as err:
            words = [options.netlab, "mpirun", "-x", "OPENBLAS_NUM_THREADS", "-x", "NETLAB_DIR", "--host", ",".join(HOSTS), "-n", 4,
                     options.program, *MODEL, "--sync", p["sync"], "--transport", "fabric", "--interface", "lan0",
                     "--deadline", DEADLINE, "--data", options.out / "tokens.bin", "--num-iterations", p["steps"], "--export", out / "final", "--out", out]
            process = subprocess.Popen([str(w) for w in words], env=environment(options), stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=err)
            watch = Watch(process, out)
            try:
                moments = disturb(watch, options, p)
            finally:
                if process.poll() is None:
                    process.terminate()
                process.wait(30)
                err.seek(0)
                said = err.read()
                (options.out / "said.log").write_text(said)
    finally:
        lab(options, "down")
    if process.returncode != 0:
        raise SystemExit(f"{common.command(words)}\nended with status {process.returncode}:\n{said[-3000:]}")
    said = [re.sub(r"\d+\.\d+\.\d+\.\d+", "ADDRESS", line) for line in said.splitlines() if "poe-pipe" in line]
    seconds = watch.curve[-1][0]
    return dict(seconds=seconds, curve=watch.curve, moments=moments, said=said,
                weights=hashlib.sha256((out / "final").read_bytes()).hexdigest(), load=os.getloadavg()[0], summary=f"{seconds:.1f} s, {len(said)} lines said")


# --- results ----------------------------------------------------------------------------------------------------------

def points_of(options):
    ways = ["undisturbed", "cuts"] + ([] if options.form == "quick" else ["cuts and kills"])
    sizes = options.sizes
    return [dict(name=f"{sync}, {way}", sync=sync, way=way, steps=sizes["steps"], cuts=cuts_of(options, way), cut=sizes["cut"])
            for sync in RULES for way in ways]


def table(points, wanted):
    lines = ["| --sync | disturbance | cut for | the run took | longer by | from each cut to the next step | "
             "from the link's return to the next step | weights |", "|---" * 8 + "|"]
    for p in wanted:
        r, base = points[p["name"]], points[f"{p['sync']}, undisturbed"]
        longer, cut = r["seconds"] - base["seconds"], sum(up - down for down, up, _ in r["moments"])
        same = "the same bits" if r["weights"] == base["weights"] else "**differ**"
        again = ", ".join(f"{seconds:.1f} s" for seconds in (step - up for _, up, step in r["moments"]))
        stood = ", ".join(f"{step - down:.1f} s" for down, _, step in r["moments"])
        lines.append(f"| {p['sync']} | {p['way']} | " + (f"{cut:.0f} s | {r['seconds']:.1f} s | {longer:.1f} s | {stood} | {again} | {same} |"
                                                       if cut else f"| {r['seconds']:.1f} s | | | | |"))
    return lines


def draw(options, points, wanted):
    plots, data = [], []
    for i, p in enumerate(wanted):
        colour = ("#1e8449", "#3b6fb6")[RULES.index(p["sync"])]
        plots.append(f"$d{i} using 1:2 with lines lw 2 dt {1 + i % 3} lc rgb '{colour}' title '{p['name']}'")
        data += [f"$d{i} << EOD", *(f"{t:.2f} {s}" for t, s in points[p["name"]]["curve"]), "EOD"]
    script = ["set terminal pngcairo size 1000,500 font 'Sans,11' noenhanced", f"set output '{options.out}/zones.png'",
              "set title 'Steps of 4 ranks in two zones (netlab, 20 ms round trip) whose link is cut'", "set key outside right",
              "set grid", "set xlabel 'seconds'", "set ylabel 'steps done'", *data, "plot " + ", ".join(plots)]
    common.plot(script)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--netlab", type=Path, default=common.ROOT.parent / "shared" / "netlab" / "netlab")
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "zones")
    parser.add_argument("--quick", dest="form", action="store_const", const="quick", default="full", help="one short cut")
    options = parser.parse_args()
    options.out, options.sizes = options.out.resolve(), FORMS[options.form]
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists() or not options.netlab.exists():
        print("netlab needs root, /dev/net/tun and --netlab FILE, its script")
        sys.exit(77)
    if Path("/run/netns/fh0").exists():
        sys.exit(f"the namespace fh0 is there already: somebody else's, or left over ({options.netlab} down)")
    return options


def main():
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    common.write_tokens(options.out / "tokens.bin", 256)
    load, points, wanted = os.getloadavg()[0], common.Points(options.out / f"{options.form}.json"), points_of(options)
    points.measure(wanted, lambda p: run(options, p), 1)
    text = "\n".join([f"{common.machine()}, load {load:.1f} to {os.getloadavg()[0]:.1f}; experiments/zones/run.py "
                      f"{' '.join(sys.argv[1:])}".rstrip(), "", *table(points, wanted)]) + "\n"
    (options.out / "zones.md").write_text(text)
    draw(options, points, wanted)
    print(text)
    if any(points[p["name"]]["weights"] != points[f"{p['sync']}, undisturbed"]["weights"] for p in wanted):
        sys.exit("the weights differ")


if __name__ == "__main__":
    main()
