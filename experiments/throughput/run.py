#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""PoE's extra arithmetic against the bubble that it saves: who trains more tokens per second, PoE or 1f1b?

    tools/setup
    experiments/throughput/run.py

Three parts. Arithmetic: what the heads add to backpropagation's work, for the sizes 286m, 897m and 1.3b with 32768
tokens of vocabulary, counted, and for one layer per stage. Prediction: the net ratio over M micro-batches and P stages,
from this arithmetic by the schedules' graphs (poe-pipe plan). Measurement: the same ratios of a small model with real
kernels, one thread per rank, as many ranks as there are processors at most, beside plan's prediction for this machine.

Duration on two idle cores: about 15 minutes; --quick: under 2 minutes, figures worth little. On a busy machine the
measured part means nothing: the load is printed with it.

Writes into --out (default runs/throughput): throughput.md (the tables, also on standard output), throughput.json
(everything), throughput.png (net ratio over M).

What to expect: heads cost 1.2 to 1.3 times backpropagation's arithmetic in 4 stages; PoE is ahead where 1f1b's bubble is
larger than that, which is below a break-even M if 1f1b's stages are laid out around its one head, and at every M if
they have equal numbers of layers.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

VOCABULARY = 32768
SIZES = {  # layers, channels, sequence, stages (spec: 24 and 20 layers in 4 stages)
    "286m": dict(layers=12, c=768, t=1024, stages=3),
    "897m": dict(layers=20, c=1280, t=2048, stages=4),
    "1.3b": dict(layers=24, c=1536, t=2048, stages=4),
}
MICRO = [1, 2, 4, 8, 16, 32, 64]
PUBLISHED = {16: 0.93, 32: 0.99}  # P1, 48 layers in 4 stages
PUBLISHED_COST = 1.33             # its step time against backpropagation's, without a pipeline


# --- arithmetic ----------------------------------------------------------------------------------------------------------

def layer_cost(size, whole):
    """Operations of one token's forward through a layer: products, and attention over half of what its window shows."""
    c, t = size["c"], size["t"]
    window = t if whole else t / 4
    visible = window - window * window / (2 * t)
    return 2 * 12 * c * c + 4 * c * visible


def costs(size):
    """Forward operations per token of every layer (SSSL, the last one whole), and of a head."""
    n = size["layers"]
    return [layer_cost(size, i % 4 == 3 or i == n - 1) for i in range(n)], 2 * size["c"] * VOCABULARY


def overhead(size, stages, recomputed):
    """PoE's arithmetic over backpropagation's: a head per stage against one. recomputed: logits twice."""
    layers, head = costs(size)
    work, one = 3 * sum(layers), (4 if recomputed else 3) * head
    return (work + stages * one) / (work + one)


def equal(layers, n):
    """As equal as whole layers allow."""
    return [len(layers) * (k + 1) // n - len(layers) * k // n for k in range(n)]


def even(layers, n, last):
    """Greedy for the least bottleneck; the last stage has `last` beside its layers."""
    def fill(limit):
        stages, i = [], 0
        for k in range(n):
            load, first = (last if k == n - 1 else 0), i
            while i < len(layers) - (n - 1 - k) and load + layers[i] <= limit:
                load += layers[i]
                i += 1
            stages.append(i - first)
        return stages if i == len(layers) and min(stages) else None
    low, high = 0, sum(layers) + last
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fill(middle) else (middle, high)
    return fill(high * (1 + 1e-9))


# --- prediction ------------------------------------------------------------------------------------------------------------

def times(layers, stages, heads, unit):
    """--emulate-compute of these stages: forward and backward in ms; head k costs `heads[k]` forwards, all in backward."""
    text, i = [], 0
    for k, n in enumerate(stages):
        work = sum(layers[i:i + n])
        i += n
        text.append(f"{k}:forward={work * unit:.6f}ms,backward={(2 * work + 3 * heads[k]) * unit:.6f}ms")
    return ";".join(text)


def planned_step(args, stages, given, micro, *flags):
    """Seconds, and the smallest D, by plan for stages of the times `given`."""
    plan = common.plan([args.build / "poe-pipe", "--stages", ",".join(map(str, stages)), "--n-embd", 32, "--sequence-len", 32,
                          "--device-batch-size", 1, "--total-batch-size", 32 * micro, "--emulate-compute", given, *flags])
    return plan["cases"][0]["step"], plan["smallest_delay"]


def predict(args, name, p):
    """Ratios of tokens per second over M: PoE exact and streaming over 1f1b with even and with equal stages."""
    layers, head = costs(SIZES[name])
    unit = 1e3 / (sum(layers) + head)  # ms; only ratios matter
    split = equal(layers, p)
    poe = times(layers, split, [head] * p, unit)
    bp = {kind: (stages, times(layers, stages, [0] * (p - 1) + [head], unit))
          for kind, stages in (("even", even(layers, p, head)), ("equal", split))}
    rows = []
    for m in args.micro:
        exact, delay = planned_step(args, split, poe, m)
        streaming, _ = planned_step(args, split, poe, m, "--sync", f"stale:{min(max(delay, 1), 128)}")
        row = dict(m=m)
        for kind, (stages, given) in bp.items():
            base, _ = planned_step(args, stages, given, m, "--objective", "bp", "--schedule", "1f1b")
            row.update({f"exact_{kind}": base / exact, f"stale_{kind}": base / streaming})
        rows.append(row)
    return dict(size=name, ranks=p, poe_stages=split, bp_stages=bp["even"][0], rows=rows)


def break_even(rows, key):
    """Largest M of those tried at which PoE is ahead."""
    ahead = [row["m"] for row in rows if row[key] >= 1]
    return "never" if not ahead else "always" if len(ahead) == len(rows) else f"M <= {max(ahead)}"


# --- measurement ----------------------------------------------------------------------------------------------------------

def model_flags(args, stages, micro):
    return ["--stages", ",".join(map(str, stages)), "--n-embd", args.channels, "--n-head", args.channels // 64,
            "--sequence-len", 256, "--device-batch-size", 2, "--total-batch-size", 512 * micro, "--vocab-size",
            args.vocabulary, "--threads", 1]


METHODS = {"1f1b": ["--objective", "bp", "--backout", "off", "--schedule", "1f1b"], "exact": [], "stale": ["--sync", "stale:2"]}


def measured_step(args, folder, stages, micro, flags):
    """Median seconds of a run's steps after the first two."""
    lines = common.metrics([args.build / "poe-pipe", "--ranks", len(stages), *model_flags(args, stages, micro), "--data",
                              f"{folder}/tokens.bin", "--num-iterations", args.steps, *flags], timeout=3600)
    return statistics.median([line["dt"] for line in lines if "dt" in line][2:])


def calibrated(args, stages):
    """By method, each rank's times as plan finds them, in --emulate-compute's words: of a few plans the fastest."""
    found = {method: [] for method in METHODS}
    for _ in range(args.rounds):
        for method, flags in METHODS.items():
            ranks = common.plan([args.build / "poe-pipe", *model_flags(args, stages, 1), *flags])["ranks"]
            found[method].append([(r["forward"], r["backward"], r["update_own"] + r["update_shared"]) for r in ranks])
    return {method: ";".join(f"{k}:forward={1e3 * f:.6f}ms,backward={1e3 * b:.6f}ms,optimizer={1e3 * u:.6f}ms"
                             for k, (f, b, u) in enumerate(min(plans, key=lambda ranks: sum(map(sum, ranks)))))
            for method, plans in found.items()}


def measure(args, folder, p):
    """The methods by turns, round after round, so that a machine whose speed changes does so for all of them."""
    stages, rows = [args.layers // p] * p, []
    times = calibrated(args, stages)
    for m in args.measured_micro:
        rounds = [{method: measured_step(args, folder, stages, m, flags) for method, flags in METHODS.items()}
                  for _ in range(args.rounds)]
        row = dict(ranks=p, m=m, rounds=rounds)
        for method, flags in METHODS.items():
            row[method] = statistics.median(r[method] for r in rounds)
            row["planned_" + method], _ = planned_step(args, stages, times[method], m, *flags)
        for method in ("exact", "stale"):
            row["ratios_" + method] = sorted(r["1f1b"] / r[method] for r in rounds)
        rows.append(row)
        print(f"measured: {row}", file=sys.stderr, flush=True)
    return rows


def engine_speed(args, stages, objective):
    """Tokens per second of all stages one after the other in one process: arithmetic alone, no ranks, no bubble."""
    text = common.call([args.build / "experiments" / "bench_step", "--stages", stages, "--objective", objective, "--n-embd",
                          args.channels, "--n-head", args.channels // 64, "--sequence-len", 256, "--vocab-size",
                          args.vocabulary, "--batch", 2, "--micro", 2, "--threads", 1, "--reps", args.reps, "--head", "sh",
                          "--window-pattern", "L"], timeout=3600)
    return json.loads(text)["tok_s"]


def measure_heads(args):
    bp = engine_speed(args, str(args.layers), "bp")
    quarter = engine_speed(args, ",".join([str(args.layers // 4)] * 4), "poe")
    single = engine_speed(args, ",".join(["1"] * args.layers), "poe")
    small = dict(layers=args.layers, c=args.channels, t=256)
    layers, head = 3 * args.layers * layer_cost(small, True), 3 * 2 * args.channels * args.vocabulary
    return dict(four=bp / quarter, single=bp / single, counted_four=(layers + 4 * head) / (layers + head),
                counted_single=(layers + args.layers * head) / (layers + head))


# --- results --------------------------------------------------------------------------------------------------------------

def arithmetic_table(result):
    lines = ["| size | stages | PoE / bp | logits recomputed | one layer per stage | recomputed |", "|---|---|---|---|---|---|"]
    for name, size in SIZES.items():
        n = size["layers"]
        lines.append(f"| {name} | {size['stages']} | {overhead(size, size['stages'], False):.2f} | "
                     f"{overhead(size, size['stages'], True):.2f} | {overhead(size, n, False):.2f} | {overhead(size, n, True):.2f} |")
    heads = result["heads"]
    if heads:
        lines.append(f"| measured here, small model | 4 | {heads['four']:.2f} (counted {heads['counted_four']:.2f}) | | "
                     f"{heads['single']:.2f} (counted {heads['counted_single']:.2f}) | |")
    return lines


def prediction_table(result):
    micro = [row["m"] for row in result["predicted"][0]["rows"]]
    lines = ["| size | P | PoE | 1f1b's stages | " + " | ".join(f"M {m}" for m in micro) + " | PoE is ahead |",
             "|---" * (5 + len(micro)) + "|"]
    for p in result["predicted"]:
        for rule in ("exact", "stale"):
            for kind in ("even", "equal"):
                stages = "even, " + ",".join(map(str, p["bp_stages"])) if kind == "even" else "equal"
                key = f"{rule}_{kind}"
                lines.append(f"| {p['size']} | {p['ranks']} | {rule} | {stages if p['ranks'] <= 4 else kind} | " +
                             " | ".join(f"{row[key]:.2f}" for row in p["rows"]) + f" | {break_even(p['rows'], key)} |")
    return lines


def published_table():
    """What formulas give where P1 reports its net ratio: P = 4, its own cost of 1.33."""
    bubbles = [("its own: 2(P-1)/(M+2(P-1)) against (P-1)/(M+P-1)", lambda m: (m + 6) / m, lambda m: (m + 3) / m),
               ("1f1b (P-1)/(M+P-1) against PoE exact (P-1)/(3M+P-1)", lambda m: (m + 3) / m, lambda m: (3 * m + 3) / (3 * m)),
               ("1f1b against PoE that streams", lambda m: (m + 3) / m, lambda m: 1)]
    lines = ["| formula | M 16 | M 32 | M -> infinity |", "|---|---|---|---|",
             "| P1's figures | 0.93 | 0.99 | |"]
    for name, bp, poe in bubbles:
        lines.append(f"| {name}, at {PUBLISHED_COST} | " +
                     " | ".join(f"{bp(m) / poe(m) / PUBLISHED_COST:.2f}" for m in (16, 32, 10 ** 9)) + " |")
    # r M / (M + c) through both points
    a, b = PUBLISHED[16], PUBLISHED[32]
    c = (b - a) / (a / 16 - b / 32)
    r = a * (16 + c) / 16
    lines.append(f"| r M / (M + c) through both: r = {r:.2f}, c = {c:.1f} micro-batches | {a} | {b} | {r:.2f} |")
    return lines


def measured_table(result):
    """Step times are medians of the rounds; ratios, of the two runs of one round: the median, lowest and highest."""
    lines = ["| P | M | 1f1b | PoE exact | PoE stale | exact / 1f1b | planned | stale / 1f1b | planned |", "|---" * 9 + "|"]
    for row in result["measured"]:
        cells = [f"{row[method] * 1e3:.0f} ms ({row['planned_' + method] * 1e3:.0f})" for method in METHODS]
        for method in ("exact", "stale"):
            ratios = row["ratios_" + method]
            cells += [f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})",
                      f"{row['planned_1f1b'] / row['planned_' + method]:.2f}"]
        lines.append(f"| {row['ranks']} | {row['m']} | " + " | ".join(cells) + " |")
    return lines


def markdown(result):
    sections = [("Arithmetic of a step, counted", arithmetic_table(result)),
                ("Predicted: tokens per second of PoE over 1f1b, from this arithmetic", prediction_table(result)),
                ("P1's net throughput against backpropagation, 48 layers in 4 stages", published_table()),
                ("Measured (and planned) here: seconds per step, and PoE's tokens per second over 1f1b's", measured_table(result))]
    head = f"{result['machine']}, load {result['load']}; {result['command']}"
    return "\n\n".join([head] + [f"{title}\n\n" + "\n".join(table) for title, table in sections if len(table) > 2])


def draw(result, path):
    lines, curves = [], []

    def add(points, look, title):
        lines.extend([f"{m} {ratio}" for m, ratio in points] + ["e"])
        curves.append(f"'-' with {look} title '{title}'")

    for p in [p for p in result["predicted"] if p["size"] == "1.3b"]:
        for key, title in (("exact_even", "exact"), ("stale_even", "streaming")):
            add([(row["m"], row[key]) for row in p["rows"]], "linespoints linewidth 2", f"1.3b, P = {p['ranks']}, {title}, predicted")
    for ranks in sorted({row["ranks"] for row in result["measured"]}):
        rows = [row for row in result["measured"] if row["ranks"] == ranks]
        for method, colour in (("exact", "#c0392b"), ("stale", "#000000")):
            name, look = f"small model, P = {ranks}, {method}", f"linecolor rgb '{colour}'"
            add([(row["m"], statistics.median(row["ratios_" + method])) for row in rows], f"points pointtype 9 pointsize 2 {look}",
                f"{name}, measured")
            add([(row["m"], row["planned_1f1b"] / row["planned_" + method]) for row in rows], f"lines dashtype 2 {look}",
                f"{name}, planned")
    add(PUBLISHED.items(), "points pointtype 7 pointsize 1.5", "P1, P = 4, published")
    common.plot(["set terminal pngcairo size 1200,675 font 'sans,11'", f"set output '{path}'", "set logscale xy 2", "set grid",
                   "set xlabel 'micro-batches of a step'", "set ylabel 'tokens per second of PoE over those of 1f1b'",
                   "set key outside right top", "set arrow from graph 0,first 1 to graph 1,first 1 nohead",
                   "plot " + ", ".join(curves), *lines])


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=common.ROOT / "build", help="build folder (default: build)")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "throughput", help="where results go")
    parser.add_argument("--quick", action="store_true", help="few and small: does everything work?")
    args = parser.parse_args()
    args.micro, args.ranks = ([1, 8], {"1.3b": [4]}) if args.quick else (MICRO, {"286m": [3, 6, 12], "897m": [4, 10, 20],
                                                                             "1.3b": [4, 12, 24]})
    args.channels, args.vocabulary, args.layers = (64, 512, 4) if args.quick else (256, 8192, 8)
    args.steps, args.rounds, args.reps = (5, 1, 1) if args.quick else (8, 3, 3)
    args.measured_micro = [2] if args.quick else [1, 2, 4, 8, 16]
    for name in ("poe-pipe", "experiments/bench_step"):
        if not (args.build / name).is_file():
            parser.error(f"there is no {args.build / name}: run tools/setup, or give --build")
    return args


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    result = dict(machine=common.machine(), command=" ".join(["experiments/throughput/run.py"] + sys.argv[1:]), measured=[])
    result["predicted"] = [predict(args, name, p) for name, counts in args.ranks.items() for p in counts]
    result["heads"] = measure_heads(args)
    with tempfile.TemporaryDirectory() as folder:
        common.write_tokens(Path(f"{folder}/tokens.bin"), args.vocabulary)
        for p in [p for p in (2, 4) if p <= len(os.sched_getaffinity(0))]:
            result["measured"] += measure(args, folder, p)
    result["load"] = f"{load:.1f}, {os.getloadavg()[0]:.1f}"
    text = markdown(result)
    (args.out / "throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "throughput.md").write_text(text + "\n")
    draw(result, args.out / "throughput.png")
    print(text)


if __name__ == "__main__":
    main()
