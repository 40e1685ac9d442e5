#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How does throughput depend on the network: PoE, which sends nothing back, beside schedules that wait for gradients?

    tools/setup
    experiments/latency/run.py

Four ranks with one stage each (ddp: four with the whole model), 4 micro-batches a step, over networks from --net of
several round trips and bandwidths, with jitter, and split over two zones. Computing is emulated (forward 50 ms, backward
100 ms a micro-batch and stage), so that many ranks fit a small machine; messages, credits, sums and schedules are the
real ones. `poe-pipe plan` says beside each point what it should be, and which D `--sync stale:D` needs there. At the end
two ranks with real kernels on a few networks.

Duration: about 15 minutes with little else running, most of it sleeping: emulated points run 4 at once (--workers), the
real kernels one by one. --quick: a minute and a half, a few points, short. Cut off, it goes on where it was when started
again: finished points stay in --out. On a busy machine --realtime lets emulated ranks, which need a few percent of a
processor, wake up in time (chrt; needs root); real kernels want a quiet one.

Writes into --out (default runs/latency): latency.json (every point: its command, its plan, every rank's accounts),
latency.md (the table, also on standard output), latency.png; with --quick these are named quick.

What to expect: PoE with stale:D keeps its rate, whatever the round trip, while a message's bytes fit the bandwidth within
a micro-batch's time; PoE exact loses a round trip per boundary and step, the others more. Measured and planned steps
agree within 1 %. The column `other`, the time that sleeping took too long, says whether the machine was too busy: below 0.5 %.
"""
import argparse
import math
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

RANKS, MICRO = 4, 4
POSITIONS, ROWS, VOCABULARY = 256, 4, 512
METHODS = ["poe exact", "poe stale", "1f1b", "zb-h1", "ddp"]
ROUND_TRIPS = [0, 1, 5, 20, 80, 200, 500]  # milliseconds
BANDWIDTHS = [10000, 1000, 100, 10]        # Mbit per second
SERIES = {
    "round trip": "emulated; all links alike",
    "bandwidth": "emulated; all links alike",
    "both": "emulated; all links alike",
    "jitter": "emulated; each delay uniform in -+ 50 %",
    "two zones": "emulated; ranks 0, 1 and 2, 3 together, the round trip between them",
    "real kernels": "2 ranks, network emulated, kernels time-shared with whatever else runs",
}
FORMS = {  # milliseconds of an emulated forward, half a backward; seconds of a point, at least 4 steps; messages of 1 MiB
    "latency": dict(forward=50, seconds=12, channels=256),
    "quick": dict(forward=50, seconds=4, channels=256),
    "test": dict(forward=5, seconds=0, channels=64),
}
WITHIN = 0.02     # what stale:D may lose of its rate at round trip 0
OVERSHOOT = 0.005 # of the time: above that a point is measured once more


# --- points -----------------------------------------------------------------------------------------------------------

def network(series, rtt, mbit):
    link = f"bw={mbit}Mbit,rtt="
    far = f"{link}{rtt}ms" + (f",jitter={rtt / 4}ms" if series == "jitter" else "")
    return f"*:{far};0-1:{link}0ms;2-3:{link}0ms" if series == "two zones" else f"*:{far}"


def method_flags(method, ranks):
    """ddp's links have room for all that a step sends, so that no rank waits for a credit."""
    stages = ["--stages", ",".join([str(RANKS // ranks)] * ranks)]
    backpropagation = ["--objective", "bp", "--backout", "off", "--schedule", method]
    if method == "ddp":
        return ["--stages", str(RANKS), *backpropagation, "--link-window", str(2 * (ranks - 1))]
    return stages if method.startswith("poe") else [*stages, *backpropagation]


def name_of(series, method, rtt, mbit):
    return f"{series}, {rtt} ms, {mbit} Mbit, {method}"


def point(series, method, rtt, mbit):
    ranks = 2 if series == "real kernels" else RANKS
    return dict(name=name_of(series, method, rtt, mbit), series=series, method=method, rtt=rtt, mbit=mbit, ranks=ranks,
                flags=[*method_flags(method, ranks), "--net", network(series, rtt, mbit)])


def grid(series, methods, round_trips, bandwidths):
    return [point(series, m, rtt, mbit) for mbit in bandwidths for rtt in round_trips for m in methods]


def emulated_points(form):
    if form == "test":
        return grid("round trip", ["poe stale", "ddp"], [0, 20], [10000])
    if form == "quick":
        return (grid("round trip", METHODS, [0, 80], [10000]) + grid("bandwidth", ["poe stale"], [1], [100]) +
                grid("jitter", ["poe stale"], [200], [10000]))
    return (grid("bandwidth", METHODS, [1], BANDWIDTHS[:0:-1]) +  # the longest first
            grid("round trip", METHODS, ROUND_TRIPS, [10000]) +
            grid("both", ["poe stale"], [0, 5, 20, 80, 200, 500], [1000, 100]) +
            grid("jitter", METHODS, ROUND_TRIPS[1:], [10000]) +
            grid("two zones", METHODS, [20, 200], [10000]))


def real_points(form):
    methods = {"latency": METHODS, "quick": ["poe exact", "poe stale", "1f1b"], "test": ["poe stale"]}
    round_trips = {"latency": [0, 20, 80, 200], "quick": [0, 200], "test": [0]}
    return grid("real kernels", methods[form], round_trips[form], [10000])


def flags(options, p):
    """Of the run and of its plan alike; --emulate-compute, if any, and the rule come after them."""
    return [options.program, *p["flags"], "--ranks", p["ranks"], "--transport", options.transport,
            "--n-embd", FORMS[options.form]["channels"], "--n-head", 4, "--sequence-len", POSITIONS, "--vocab-size", VOCABULARY,
            "--device-batch-size", ROWS, "--total-batch-size", MICRO * ROWS * POSITIONS, "--threads", 1]


def emulation(options, method):
    """A replica has the layers of all stages."""
    forward = FORMS[options.form]["forward"] * (RANKS if method == "ddp" else 1)
    return ["--emulate-compute", f"forward={forward}ms,backward={2 * forward}ms"]


def is_real(p):
    return p["series"] == "real kernels"


def real_times(base, method):
    """What the kernels took in a run, as --emulate-compute has it, stage by stage."""
    replicas = method == "ddp"
    each = MICRO / 2 if replicas else MICRO
    text = [f"{k}:forward={1e3 * rank['forward'] / each:.6f}ms,backward={1e3 * rank['backward'] / each:.6f}ms,"
            f"optimizer={1e3 * rank['optimizer']:.6f}ms" for k, rank in enumerate(base["ranks"][:1 if replicas else None])]
    return ["--emulate-compute", ";".join(text)]


# --- measuring --------------------------------------------------------------------------------------------------------

def planned(words, method):
    """The case of the plan that is to be run, and its rule."""
    plan = common.plan(words)
    if method != "poe stale":
        return plan, plan["cases"][0], ["--sync", "exact"]
    window = ["--link-window", plan["link_window"]] if plan["link_window"] else []
    return plan, common.planned_case(plan, "streaming"), ["--sync", f"stale:{plan['smallest_delay']}", *window]


def counts(options, case, real):
    """Steps before those that are measured, and these: whole turns of the rule. One more ends the run: it waits for its own
    sums, which else the step after does."""
    turn = case["delay"] + 1
    before = max(3, 2 * turn)
    wanted = max(4, FORMS[options.form]["seconds"] / case["step"])
    return before, turn * math.ceil(max(wanted, 8 if real and options.form != "test" else 0) / turn)


def measure(options, p, times):
    """One run, and its plan with these times."""
    words = flags(options, p)
    plan, case, rule = planned([*words, *times], p["method"])
    case["delay"] = plan["smallest_delay"] if p["method"] == "poe stale" else 0
    before, measured = counts(options, case, is_real(p))
    run = [*words, *rule, "--data", options.out / "tokens.bin", "--num-iterations", before + measured + 1,
           *([] if is_real(p) else times)]
    steps = common.run(run, realtime=options.realtime and not is_real(p))[before:-1]
    result = common.steady(steps)
    if is_real(p):
        result["step"] = max(statistics.median(s["accounts"][r]["wall"] for s in steps) for r in range(p["ranks"]))
    result.update(planned=case["step"], error=result["step"] / case["step"] - 1, delay=case["delay"],
                  forward_bytes=plan["forward_bytes"], command=common.command(run), steps=measured,
                  emulated="network" if is_real(p) else "compute, network",
                  tokens_per_second=plan["tokens"] / result["step"])
    result["summary"] = (f"{1e3 * result['step']:.1f} ms a step, planned {1e3 * case['step']:.1f} ({100 * result['error']:+.2f} %), "
                         f"other {100 * result['shares']['other']:.2f} %")
    return result


def measure_emulated(options, p):
    """Once more when the machine had no time to wake ranks up; the quieter of the two counts."""
    times = emulation(options, p["method"])
    first = measure(options, p, times)
    if first["shares"]["other"] < OVERSHOOT or options.form == "test":
        return first
    return min(first, measure(options, p, times), key=lambda result: result["shares"]["other"])


def measure_real(options, p, points):
    """The plan has the kernels' times from the run of the same schedule at round trip 0; there, from a first such run."""
    base = points.results.get(name_of("real kernels", p["method"], 0, 10000))
    if not base or p["rtt"] == 0:
        base = measure(options, point("real kernels", p["method"], 0, 10000), emulation(options, p["method"]))
    return measure(options, p, real_times(base, p["method"]))


# --- results ----------------------------------------------------------------------------------------------------------

def own_rate(points, p):
    """Beside the rate of the same series and method without latency, at 10 Gbit. With real kernels, whose speed changes from
    run to run, at equal speed: by the share of the time in which ranks compute."""
    base = points.results.get(name_of(p["series"] if is_real(p) else "round trip", p["method"], 0, 10000))
    if not base:
        return None
    result = points[p["name"]]
    return (1 - result["idle"]) / (1 - base["idle"]) if is_real(p) else base["step"] / result["step"]


def fits(points, p):
    """A message's bytes within a micro-batch's time."""
    result = points[p["name"]]
    computing = sum(result["ranks"][0][name] for name in ("forward", "backward")) / MICRO
    return 8e-6 * result["forward_bytes"] / p["mbit"] <= computing


def verdict(points, p):
    rate = own_rate(points, p)
    if rate is None:
        return ""
    held = rate >= 1 - WITHIN
    return f"{100 * rate:.1f} % | " + (("held" if held else "**not held**") if fits(points, p) else "does not fit")


def cell(points, p):
    result = points[p["name"]]
    rule = f"D {result['delay']}: " if result["delay"] else ""
    idle = f", idle {100 * result['idle']:.1f} %" if is_real(p) else ""
    return f"{rule}{1e3 * result['step']:.0f} ({100 * result['error']:+.1f} %){idle}"


def network_name(p):
    speed = f"{p['mbit'] // 1000} Gbit" if p["mbit"] >= 1000 else f"{p['mbit']} Mbit"
    return f"{p['rtt']} ms, {speed}"


def table(points, wanted):
    lines = ["| series | round trip, bandwidth | " + " | ".join(METHODS) + " | stale: of its own rate at 0 ms | within 2 % |",
             "|---" * (len(METHODS) + 4) + "|"]
    rows = {}
    for p in wanted:
        rows.setdefault((list(SERIES).index(p["series"]), -p["mbit"], p["rtt"]), {})[p["method"]] = p
    for (series, _, _), row in sorted(rows.items()):
        cells = [cell(points, row[m]) if m in row else "" for m in METHODS]
        stale = verdict(points, row["poe stale"]) if "poe stale" in row else ""
        lines.append(f"| {list(SERIES)[series]} | {network_name(next(iter(row.values())))} | " + " | ".join(cells) +
                     f" | {stale or ' | '} |")
    return lines


def spread(points, wanted):
    """The greatest deviation from the plan and the greatest overshoot, in words."""
    lines = []
    for series in SERIES:
        results = [points[p["name"]] for p in wanted if p["series"] == series]
        if not results:
            continue
        worst = max(results, key=lambda r: abs(r["error"]))
        late = max(results, key=lambda r: r["shares"]["other"])
        lines.append(f"- {series} ({SERIES[series]}): {len(results)} points, furthest from the plan {100 * worst['error']:+.1f} % "
                     f"({worst['point']['name']}), most time slept too long {100 * late['shares']['other']:.2f} %")
    return lines


def broken(points, wanted):
    return [p["name"] for p in wanted if p["method"] == "poe stale" and fits(points, p) and
            (own_rate(points, p) or 1) < 1 - WITHIN]


def markdown(points, wanted, options, load):
    failed = broken(points, wanted)
    target = ("stale:D stayed within 2 % of its own zero-latency rate at every point where a message fits" if not failed else
              "stale:D lost more than 2 % where a message fits: " + "; ".join(failed))
    return "\n".join([f"{common.machine()}, load {load}; experiments/latency/run.py {' '.join(sys.argv[1:])}".rstrip(), "",
                      "Milliseconds per step, emulated (and their deviation from `poe-pipe plan`; with real kernels also the share of time in "
                      "which a rank waits):", "",
                      *table(points, wanted), "", *spread(points, wanted), "", target]) + "\n"


# --- picture ----------------------------------------------------------------------------------------------------------

COLOURS = {"poe exact": "#e08214", "poe stale": "#3f9b4f", "1f1b": "#3b6fb6", "zb-h1": "#8e6bb0", "ddp": "#7f7f7f"}


def curve(points, chosen, key):
    """Lines of x (a place on the axis), measured and planned tokens per second."""
    lines = []
    for p in sorted(chosen, key=key):
        result = points[p["name"]]
        lines.append(f"{key(p)} {result['tokens_per_second']} {result['tokens_per_second'] * result['step'] / result['planned']}")
    return lines


def panel(points, wanted, places, key, choose, jitter):
    """gnuplot's plot command with its data: measured as points, planned as lines, with jitter as crosses."""
    plots, data = [], []
    for method in METHODS:
        chosen = [p for p in wanted if p["method"] == method and choose(p)]
        if not chosen:
            continue
        lines = curve(points, chosen, lambda p: places.index(key(p)))
        plots += [f"'-' using 1:3 with lines linewidth 2 linecolor '{COLOURS[method]}' notitle",
                  f"'-' using 1:2 with points pointtype 7 pointsize 1.3 linecolor '{COLOURS[method]}' title '{method}'"]
        data += [*lines, "e", *lines, "e"]
        shaken = [p for p in wanted if jitter and p["series"] == "jitter" and p["method"] == method]
        if shaken:
            plots.append(f"'-' using 1:2 with points pointtype 2 pointsize 1.5 linecolor '{COLOURS[method]}' notitle")
            data += [*curve(points, shaken, lambda p: places.index(key(p))), "e"]
    return "plot " + ", ".join(plots) + "\n" + "\n".join(data) + "\n"


def axis(places, unit):
    return "set xtics (" + ", ".join(f"'{name} {unit}' {i}" for i, name in enumerate(places)) + f")\nset xrange [-0.3:{len(places) - 0.7}]\n"


def draw(options, points, wanted):
    mbits = [f"{m // 1000} Gbit" if m >= 1000 else f"{m} Mbit" for m in BANDWIDTHS]
    script = f"""
set terminal pngcairo size 1300,600 font "Sans,11" noenhanced
set output "{options.out}/{options.form}.png"
set multiplot layout 1,2 title "Tokens per second of 4 emulated ranks on emulated networks: points measured, lines planned, crosses with 50 % jitter"
set ylabel "tokens per second (emulated)"
set yrange [0:*]
set grid
set key bottom left
set xlabel "round trip at 10 Gbit"
"""
    script += axis(ROUND_TRIPS, "ms") + panel(points, wanted, ROUND_TRIPS, lambda p: p["rtt"],
                                              lambda p: p["series"] == "round trip", True)
    at_one = [p for p in wanted if not is_real(p) and p["rtt"] == 1 and p["series"] in ("round trip", "bandwidth")]
    if at_one:
        script += "unset key\nset xlabel 'bandwidth at a round trip of 1 ms'\n"
        script += axis(mbits, "") + panel(points, wanted, BANDWIDTHS, lambda p: p["mbit"], lambda p: p in at_one, False)
    common.plot([script + "unset multiplot"])


# --- the whole --------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--transport", default="inproc", help="between the ranks, below the emulated network")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "latency")
    parser.add_argument("--workers", type=int, default=4, help="emulated points that run at once")
    parser.add_argument("--realtime", action="store_true", help="emulated points before all else on the machine (root)")
    parser.add_argument("--quick", dest="form", action="store_const", const="quick", default="latency", help="few points, short")
    parser.add_argument("--test", dest="form", action="store_const", const="test", help="hardly any, of seconds: does it work?")
    options = parser.parse_args()
    options.out = options.out.resolve()
    if not options.program.is_file():
        parser.error(f"there is no {options.program}: run tools/setup, or give --program")
    return options


def main():
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    common.write_tokens(options.out / "tokens.bin", VOCABULARY)
    load = os.getloadavg()[0]
    points = common.Points(options.out / f"{options.form}.json")
    wanted, real = emulated_points(options.form), real_points(options.form)
    points.measure(wanted, lambda p: measure_emulated(options, p), options.workers)
    points.measure(real, lambda p: measure_real(options, p, points), 1)
    text = markdown(points, wanted + real, options, f"{load:.1f} to {os.getloadavg()[0]:.1f}")
    (options.out / f"{options.form}.md").write_text(text)
    draw(options, points, wanted)
    print(text + f"picture  {options.out}/{options.form}.png")


if __name__ == "__main__":
    main()
