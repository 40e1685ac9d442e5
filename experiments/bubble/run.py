#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How much of its time does a pipeline wait? Every schedule, P ranks, M micro-batches: measured beside theory.

    tools/setup
    experiments/bubble/run.py

Emulated compute: P equal stages sleep instead of computing (backward = 2 forward), everything else is the real program,
with ranks as threads of one process (--launch ranks: as processes under mpiexec). Theory is the schedule's dependency
graph, solved (poe-pipe plan), and the closed form where one holds. Then stages of 16,6,5,5 layers, the ranks of P1's
table, and real kernels at P = 2 and 4.

Duration: about an hour, most of it asleep, with 4 configurations at a time (--workers); --quick: under two minutes,
figures worth little. On a machine that does other things too --realtime lets emulated ranks, which need a few percent of a
processor, wake up in time (chrt; needs root); real kernels, measured one by one at the end, want it quiet. What was measured before, by the same
command line, is taken from points.json: so it can be interrupted and started again (--fresh: everything anew). A
configuration that would take longer than --limit seconds is left out, and the table says so.

Writes into --out (default runs/bubble): bubble.md (the tables, also on standard output), bubble.json (everything),
bubble.png (idle share over M), points.json (what is finished).

What to expect: poe with --sync stale:D idles for less than 1 % after the fill at every M; everything else is within 2
points of its theory: (P-1)/(3M+P-1) for poe exact, (P-1)/(M+P-1) for gpipe and 1f1b, (P-1)/(2M+P-1) for interleaved.
"""
import argparse
import concurrent.futures
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

SCHEDULES = ["poe exact", "poe stale", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "ddp"]
COLOURS = ["#8e44ad", "#1e8449", "#aed6f1", "#ca6f1e", "#c0392b", "#7b7d7d", "#1f3a93"]
RANKS, MICRO = [2, 4, 8, 16, 32, 64, 96], [1, 2, 4, 8, 16, 32]
PUBLISHED = {6: (83, 14), 12: (92, 8), 24: (96, 4), 96: (99, 1)}  # P1: P -> backpropagation, PoE
UNEQUAL = [16, 6, 5, 5]
PARTS = ["grid", "unequal", "published", "kernels"]
VIRTUAL = 2      # ranks of a processor under interleaved; each takes as long as a whole stage elsewhere: shares are the same
MOST_RANKS = 128 # of a run
TOKENS = 16  # of a micro-batch under emulated compute
STREAMED = 400  # micro-batches of a streaming run, in 12 to 100 steps


# --- configurations ------------------------------------------------------------------------------------------------------

def forward_ms(args, p, micro):
    """Long enough for waking so many to be late by less than half a percent, and for what a step costs once."""
    if args.quick:
        return 5
    if p <= 16:
        return max(20, 80 // micro)
    return max(50, (100 if p <= 32 else 200) // micro)


def stage_times(args, layers, schedule, micro):
    """--emulate-compute of stages with so many layers each; under ddp a rank has all of them."""
    f = forward_ms(args, len(layers), micro)
    if schedule == "ddp":
        return f"forward={f * sum(layers)}ms,backward={2 * f * sum(layers)}ms"
    mean = sum(layers) / len(layers)
    if len(set(layers)) == 1:
        return f"forward={f}ms,backward={2 * f}ms"
    return ";".join(f"{k}:forward={f * n / mean:.3f}ms,backward={2 * f * n / mean:.3f}ms" for k, n in enumerate(layers))


def schedule_flags(schedule, delay):
    if schedule == "poe exact":
        return []
    if schedule == "poe stale":
        return ["--sync", f"stale:{delay}"]
    return ["--objective", "bp", "--backout", "off", "--schedule", schedule]


def emulated_flags(args, layers, schedule, micro, delay):
    stages = {"ddp": [sum(layers)], "interleaved": layers * VIRTUAL}.get(schedule, layers)
    return ["--stages", ",".join(map(str, stages)), "--n-embd", 24, "--n-head", 1, "--sequence-len", TOKENS, "--vocab-size",
            64, "--device-batch-size", 1, "--total-batch-size", TOKENS * micro, "--threads", 1, "--emulate-compute",
            stage_times(args, layers, schedule, micro), "--net", "none", *schedule_flags(schedule, delay)]


# --- theory ---------------------------------------------------------------------------------------------------------------

def plan(args, flags, p):
    result = common.plan([args.build / "poe-pipe", *flags])
    asked = result["cases"][0]
    busy = sum(rank["busy"] for rank in result["ranks"])
    return dict(step=asked["step"], idle=asked["idle"], fill=asked["fill"], delay=min(max(result["smallest_delay"], 1), 128),
                formula=None if asked["formula"] is None else 1 - busy / (p * asked["formula"]))


def replicas(args, p, micro):
    """ddp by formula: nothing but the ring's messages is waited for, and they take no time here."""
    return dict(step=3e-3 * forward_ms(args, p, micro) * micro, idle=0.0, fill=0.0, formula=0.0)


# --- measurement ----------------------------------------------------------------------------------------------------------

def launch_flags(args, p, schedule):
    if args.launch == "ranks":
        return ["--ranks", p]
    return ["--transport", "inproc", "--ranks", p] if schedule == "ddp" else []


def run(args, words, realtime):
    lines = common.metrics([args.build / "poe-pipe", *words], timeout=3600, realtime=realtime)
    return [line["accounts"] for line in lines if "dt" in line], lines[-1]


def shares(steps, last, streaming, virtual=1):
    """Idle share over all processors, of `virtual` ranks each: of the steps between the first and the last, which waits for its
    own sums beside those of the step before, or with streaming of all of them after the fill."""
    inner = steps[1:-1]
    chosen = steps if streaming else inner
    ranks = [rank for step in chosen for rank in step]
    fill = sum(last["fill"]) if streaming else 0
    time_all = sum(rank["wall"] - rank["checkpoint"] for rank in ranks) / virtual - fill
    busy = sum(rank[name] for rank in ranks for name in ("forward", "backward", "optimizer"))
    return dict(idle=1 - busy / time_all, late=sum(rank["other"] for rank in ranks) / time_all, fill=max(last["fill"]),
                step=max(sum(step[k]["wall"] for step in inner) for k in range(len(steps[0]))) / len(inner))


def n_steps(args, schedule, micro, delay):
    if schedule != "poe stale":
        return 4 if args.quick else 6
    return max(12, 4 * delay + 4, min(20 if args.quick else 100, STREAMED // micro))


def measure(args, folder, known, layers, schedule, micro):
    p, delay = len(layers), 0
    if schedule == "poe stale":
        delay = plan(args, emulated_flags(args, layers, "poe exact", micro, 0), p)["delay"]
    flags = emulated_flags(args, layers, schedule, micro, delay)
    steps = n_steps(args, schedule, micro, delay)
    words = [*launch_flags(args, p, schedule), *flags, "--num-iterations", steps]
    key = " ".join(map(str, words))
    if key in known.results:
        return known[key]
    theory = replicas(args, p, micro) if schedule == "ddp" else plan(args, flags, p)
    row = dict(ranks=p, layers=layers, micro=micro, schedule=schedule, delay=delay, steps=steps, theory=theory, measured=None)
    if theory["step"] * steps + theory["fill"] <= args.limit:
        started = time.monotonic()
        row["measured"] = shares(*run(args, [*words, "--data", f"{folder}/tokens.bin"], args.realtime), schedule == "poe stale",
                                 VIRTUAL if schedule == "interleaved" else 1)
        row["seconds"] = time.monotonic() - started
        known.put(key, row)
    print(f"P {p}, M {micro}, {schedule}: {cell(row)}", file=sys.stderr, flush=True)
    return row


def schedules_of(p, micro):
    return [s for s in SCHEDULES if (s != "ddp" or micro % p == 0) and (s != "interleaved" or VIRTUAL * p <= MOST_RANKS)]


def measure_kernels(args, folder, p, micro):
    """Real kernels, one thread per rank; with more ranks than processors these are time-shared."""
    c, layers, vocabulary = (64, 4, 512) if args.quick else (256, 8, 8192)
    rows = []
    for schedule in ("poe exact", "poe stale", "1f1b"):
        flags = ["--stages", ",".join([str(layers // p)] * p), "--n-embd", c, "--n-head", c // 64, "--sequence-len", 256,
                 "--device-batch-size", 2, "--total-batch-size", 512 * micro, "--vocab-size", vocabulary, "--threads", 1,
                 *schedule_flags(schedule, p)]
        steps = 4 if args.quick else 16
        theory = plan(args, flags, p)
        measured = shares(*run(args, ["--ranks", p, *flags, "--num-iterations", steps, "--data", f"{folder}/words.bin"],
                               False), schedule == "poe stale")
        rows.append(dict(ranks=p, micro=micro, schedule=schedule, delay=p, steps=steps, theory=theory, measured=measured))
        print(f"real kernels, P {p}, M {micro}, {schedule}: {cell(rows[-1])}", file=sys.stderr, flush=True)
    return rows


# --- results --------------------------------------------------------------------------------------------------------------

def percent(x):
    return "-" if x is None else f"{100 * x:.1f}"


def cell(row):
    """Measured (theory), in percent."""
    if not row:
        return ""
    if not row["measured"]:
        return f"left out ({percent(row['theory']['idle'])})"
    return f"{percent(row['measured']['idle'])} ({percent(row['theory']['idle'])})"


def pick(rows, p, m, schedule):
    return next((r for r in rows if (r["ranks"], r["micro"], r["schedule"]) == (p, m, schedule)), None)


def grid_table(rows):
    lines = ["| P | M | " + " | ".join(SCHEDULES) + " | D | fill of stale |", "|---" * (4 + len(SCHEDULES)) + "|"]
    for p, m in sorted({(r["ranks"], r["micro"]) for r in rows}):
        stale = pick(rows, p, m, "poe stale")
        fill = f"{stale['measured']['fill']:.2f} s ({stale['theory']['fill']:.2f})" if stale["measured"] else ""
        lines.append(f"| {p} | {m} | " + " | ".join(cell(pick(rows, p, m, s)) for s in SCHEDULES) + f" | {stale['delay']} | {fill} |")
    return lines


def formula_table(rows):
    """Where the graph and the closed form differ, or only one of them says anything."""
    lines = ["| schedule | graph and formula agree | formula does not hold |", "|---|---|---|"]
    for schedule in SCHEDULES:
        own = [r for r in rows if r["schedule"] == schedule]
        held = [r for r in own if r["theory"]["formula"] is not None]
        worst = max((abs(r["theory"]["formula"] - r["theory"]["idle"]) for r in held), default=None)
        if own:
            lines.append(f"| {schedule} | {len(held)} cases, within {100 * worst:.2g} points | {len(own) - len(held)} cases |"
                         if held else f"| {schedule} | | {len(own)} cases |")
    return lines


def target_table(rows):
    lines = ["| schedule | largest distance from theory | at P, M | woken late, at most |", "|---|---|---|---|"]
    for schedule in SCHEDULES:
        own = [r for r in rows if r["schedule"] == schedule and r["measured"]]
        if own:
            far = max(own, key=lambda r: abs(r["measured"]["idle"] - r["theory"]["idle"]))
            difference = far["measured"]["idle"] - far["theory"]["idle"]
            lines.append(f"| {schedule} | {100 * difference:+.2f} points | {far['ranks']}, {far['micro']} | "
                         f"{100 * max(r['measured']['late'] for r in own):.2f} % of the time |")
    return lines


def published_table(rows):
    lines = ["| P | P1: bp | 2(P-1)/(M+2(P-1)), M = 2 | 1f1b, M = 2 | P1: PoE | (P-1)/(M+P-1), M = P(P-1) | poe exact, M = 2 | poe stale, M = 2 |",
             "|---" * 8 + "|"]
    for p, (bp, poe) in PUBLISHED.items():
        if pick(rows, p, 2, "1f1b"):
            lines.append(f"| {p} | {bp} | {200 * (p - 1) / (2 + 2 * (p - 1)):.0f} | {cell(pick(rows, p, 2, '1f1b'))} | {poe} | "
                         f"{100 * (p - 1) / (p * (p - 1) + p - 1):.0f} | {cell(pick(rows, p, 2, 'poe exact'))} | "
                         f"{cell(pick(rows, p, 2, 'poe stale'))} |")
    return lines


def kernel_table(result):
    lines = ["| P | M | poe exact | poe stale | 1f1b | |", "|---|---|---|---|---|---|"]
    for p, m in sorted({(r["ranks"], r["micro"]) for r in result["kernels"]}):
        note = "time-shared" if p > result["processors"] else ""
        lines.append(f"| {p} | {m} | " + " | ".join(cell(pick(result["kernels"], p, m, s)) for s in ("poe exact", "poe stale", "1f1b")) +
                     f" | {note} |")
    return lines


def markdown(result):
    sections = [("Idle share in percent, measured (theory): emulated compute, equal stages, backward = 2 forward", grid_table(result["grid"])),
                ("Distance from theory, emulated", target_table(result["grid"])),
                ("Theory: the solved graph against closed forms", formula_table(result["grid"])),
                ("Stages of 16,6,5,5 layers, emulated", grid_table(result["unequal"])),
                ("P1's table, its formulas, and what is measured (theory), emulated", published_table(result["published"])),
                ("Real kernels, one thread per rank: measured (planned)", kernel_table(result))]
    head = f"{result['machine']}, load {result['load']}; {result['command']}; ranks are {result['ranks']}"
    return "\n\n".join([head] + [f"{title}\n\n" + "\n".join(table) for title, table in sections if len(table) > 2])


def draw(result, path):
    counts = sorted({r["ranks"] for r in result["grid"]})
    shown = counts if len(counts) <= 3 else [4, 16, counts[-1]]
    script = [f"set terminal pngcairo size {500 * len(shown)},500 font 'sans,11'", f"set output '{path}'", "set logscale x 2",
              "set grid", "set yrange [0:100]", "set xlabel 'micro-batches of a step'", "set ylabel 'idle, %'",
              f"set xrange [{0.8 * min(r['micro'] for r in result['grid'])}:{1.25 * max(r['micro'] for r in result['grid'])}]",
              f"set multiplot layout 1,{len(shown)} title 'lines: theory; points: measured with emulated compute'"]
    for p in shown:
        curves, data = [], []
        for i, schedule in enumerate(SCHEDULES[:-1]):
            own = sorted((r for r in result["grid"] if (r["ranks"], r["schedule"]) == (p, schedule)), key=lambda r: r["micro"])
            if not own:
                continue
            data += [f"{r['micro']} {100 * r['theory']['idle']}" for r in own] + ["e"]
            look = f"linecolor rgb '{COLOURS[i]}'"
            curves.append(f"'-' with lines linewidth {1.5 + (i == 2) * 3} {look} title '{schedule}'")
            data += [f"{r['micro']} {100 * r['measured']['idle']}" for r in own if r["measured"]] + ["e"]
            curves.append(f"'-' with points pointtype 7 {look} notitle")
        script += [f"set title 'P = {p}'", f"set key {'left center' if p > 32 else 'right top'}", "plot " + ", ".join(curves), *data]
    common.plot(script)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=common.ROOT / "build", help="build folder (default: build)")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "bubble", help="where results go")
    parser.add_argument("--launch", choices=["threads", "ranks"], default="threads", help="ranks as threads or processes")
    parser.add_argument("--workers", type=int, default=4, help="emulated configurations that run at once (default 4)")
    parser.add_argument("--realtime", action="store_true", help="emulated ranks before all else on the machine (root)")
    parser.add_argument("--limit", type=float, default=900, help="seconds that one configuration may take (default 900)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few and short: does everything work?")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if not set(args.parts) <= set(PARTS):
        parser.error(f"--parts: found {','.join(args.parts)}, allowed are some of {','.join(PARTS)}")
    args.ranks, args.micro = ([2, 4], [1, 4]) if args.quick else (RANKS, MICRO)
    args.published = [6] if args.quick else list(PUBLISHED)
    args.kernel_micro = [2] if args.quick else [1, 4, 16]
    if not (args.build / "poe-pipe").is_file():
        parser.error(f"there is no {args.build / 'poe-pipe'}: run tools/setup, or give --build")
    return args


def open_known(args):
    """Rows of an earlier run, by their command lines."""
    path = args.out / "points.json"
    if args.fresh:
        path.unlink(missing_ok=True)
    return common.Points(path)


def emulated_cases(args):
    """Of the parts that are wanted: part, stages' layers, micro-batches, schedule."""
    cases = [("grid", [1] * p, m, s) for p in args.ranks for m in args.micro for s in schedules_of(p, m)]
    cases += [("unequal", UNEQUAL, m, s) for m in args.micro for s in SCHEDULES if s not in ("interleaved", "ddp")]
    cases += [("published", [1] * p, 2, s) for p in args.published for s in ("1f1b", "poe exact", "poe stale")]
    return [case for case in cases if case[0] in args.parts]


def kernel_cases(args):
    return [(p, m) for p in ((2,) if args.quick else (2, 4)) for m in args.kernel_micro if "kernels" in args.parts]


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    load, known = os.getloadavg()[0], open_known(args)
    result = dict(machine=common.machine(), processors=len(os.sched_getaffinity(0)), grid=[], unequal=[], published=[], kernels=[],
                  load="", command=" ".join(["experiments/bubble/run.py"] + sys.argv[1:]),
                  ranks="threads of one process" if args.launch == "threads" else "processes")
    cases = emulated_cases(args)
    with tempfile.TemporaryDirectory() as folder:
        common.write_tokens(Path(f"{folder}/tokens.bin"), 64)
        common.write_tokens(Path(f"{folder}/words.bin"), 512 if args.quick else 8192)
        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            rows = pool.map(lambda case: measure(args, folder, known, case[1], case[3], case[2]), cases)
            for case, row in zip(cases, rows):
                result[case[0]].append(row)
        for p, m in kernel_cases(args):
            result["kernels"] += measure_kernels(args, folder, p, m)
    result["load"] = f"{load:.1f}, {os.getloadavg()[0]:.1f}"
    text = markdown(result)
    (args.out / "bubble.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "bubble.md").write_text(text + "\n")
    if result["grid"]:
        draw(result, args.out / "bubble.png")
    print(text)


if __name__ == "__main__":
    main()
