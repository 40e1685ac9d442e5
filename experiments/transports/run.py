#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What does a link cost over each transport: threads (inproc), Open MPI over TCP (mpi), libfabric (fabric)?

    tools/setup
    experiments/transports/run.py

Two ranks, messages of 4 B to 64 MiB over the links that training uses (credits and checksums included). Three rounds,
the transports in turns; every figure is the median of the rounds.

Duration on two idle cores: about 6 minutes, half a minute with --quick (one short round: does everything work?). On a
busy machine the figures mean nothing: the load is printed with them.

Writes into --out (default runs/transports; files of an earlier run are replaced):
    transports.md    the table, also on standard output
    transports.json  everything measured, every round
    transports.png   latency, bandwidth, processor time and hidden share over the length of a message

What to expect: fabric below mpi in processor time at every length and above it in bandwidth from 16 KiB on.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

TRANSPORTS = ("inproc", "mpi", "fabric")
COLOURS = dict(inproc="#7f7f7f", mpi="#e08214", fabric="#3b6fb6")
# figure -> heading, unit, how to print it, logarithmic axis
FIGURES = dict(latency_us=("latency", "us", "{:.1f}", True), gbs=("bandwidth", "GB/s", "{:.3g}", True),
               cpu_us=("processor time of both ranks per message", "us", "{:.4g}", True),
               hidden=("hidden while computing", "%", "{:.0f}", False))


# --- measuring -------------------------------------------------------------------------------------------------------

def measure(build, transport, quick):
    """The rows that the bench prints, and its last line."""
    words = [str(build / "experiments" / "bench_transports"), transport] + ["quick"] * quick
    if transport != "inproc":
        words = ["mpiexec", "-n", "2"] + words
    done = subprocess.run(words, env=common.mpi_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        raise ChildProcessError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return rows[:-1], rows[-1]


def median_rows(rounds):
    """Per length, each figure's median over the rounds."""
    lengths = [row["bytes"] for row in rounds[0][0]]
    keys = [key for key in rounds[0][0][0] if key not in ("transport", "bytes")]
    rows = {n: {key: statistics.median(r[0][i][key] for r in rounds) for key in keys} for i, n in enumerate(lengths)}
    rest = {key: statistics.median(r[1][key] for r in rounds) for key in ("idle_percent", "sum_s")}
    return rows, rest


# --- table -----------------------------------------------------------------------------------------------------------

def text_of(figure, row):
    value = row[figure] * (100 if figure == "hidden" else 1)
    return FIGURES[figure][2].format(value)


def size(n):
    for unit in ("B", "KiB", "MiB"):
        if n < 1024 or unit == "MiB":
            return f"{n} {unit}"
        n //= 1024


def table(header, rows):
    lines = [header, ["---:"] * len(header)] + rows
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(result):
    medians = {t: median_rows(result["rounds"][t]) for t in TRANSPORTS}
    header = ["message"] + [f"{t} {FIGURES[f][1]}" for f in FIGURES for t in TRANSPORTS]
    rows = [[size(n)] + [text_of(f, medians[t][0][n]) for f in FIGURES for t in TRANSPORTS]
            for n in medians["inproc"][0]]
    rest = [[t, f"{medians[t][1]['idle_percent']:.2f}", f"{medians[t][1]['sum_s'] * 1e3:.0f}"] for t in TRANSPORTS]
    return "\n".join([
        f"{result['machine']}; `{result['command']}`; load {result['load']} (start, end; it includes this run).\n",
        "Columns from left to right: latency (half a round trip, median), bandwidth (one direction, window 4), "
        "processor time of both ranks together per message of that stream, share of the stream's time that is hidden "
        "behind computing.\n", table(header, rows),
        "A rank that waits, and one shared sum of 16 Mi floats along two ranks:\n",
        table(["transport", "% of a core", "sum, ms"], rest)])


# --- picture ---------------------------------------------------------------------------------------------------------

def draw(result, path):
    medians = {t: median_rows(result["rounds"][t])[0] for t in TRANSPORTS}
    script = ['set terminal pngcairo size 1400,1000 font "sans,11"', f'set output "{path}"', "set logscale x 2",
              'set format x "%.0b %BB"', "set xtics 16", "set grid", "set border 3", "set tics nomirror",
              "set multiplot layout 2,2"]
    for transport in TRANSPORTS:
        script += [f"${transport} << EOD"]
        script += [" ".join([str(n)] + [str(row[f]) for f in FIGURES]) for n, row in medians[transport].items()]
        script += ["EOD"]
    for column, (title, unit, _, logarithmic) in enumerate(FIGURES.values(), 2):
        script += [f'set title "{title}"', f'set ylabel "{unit}"',
                   "set logscale y" if logarithmic else "unset logscale y",
                   "set key top left" if logarithmic else "set key bottom right"]
        scale = "" if logarithmic else "100*"
        script += ["plot " + ", ".join(f'${t} using 1:({scale}${column}) with linespoints pt 7 lc rgb "{COLOURS[t]}" '
                                       f'title "{t}"' for t in TRANSPORTS)]
    common.plot(script)


# --- main ------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--build", type=Path, default=common.ROOT / "build", help="build folder (default: build)")
    add("--out", type=Path, default=common.ROOT / "runs" / "transports", help="where results go (default: runs/transports)")
    add("--rounds", type=int, default=3, help="default 3")
    add("--quick", action="store_true", help="one short round")
    args = parser.parse_args()
    if not (args.build / "experiments" / "bench_transports").is_file():
        parser.error(f"there is no {args.build / 'experiments' / 'bench_transports'}: run tools/setup, or give --build")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    start = os.getloadavg()[0]
    rounds = {t: [] for t in TRANSPORTS}
    for _ in range(1 if args.quick else args.rounds):
        for transport in TRANSPORTS:
            rounds[transport].append(measure(args.build, transport, args.quick))
    command = "experiments/transports/run.py" + (" --quick" if args.quick else f" --rounds {args.rounds}")
    result = dict(machine=common.machine(), command=command, load=f"{start:.1f}, {os.getloadavg()[0]:.1f}", rounds=rounds)
    (args.out / "transports.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "transports.md").write_text(markdown(result))
    draw(result, args.out / "transports.png")
    print(markdown(result))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error}")
