#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How much memory do activations take: backpropagation in one process, with checkpointing, under 1f1b, and PoE?

    tools/setup
    experiments/memory/run.py

Four parts. Depth: the same width with 4 to 64 layers, in one process and in 4 stages. Stages: 32 layers in 1, 2, 4 and
8 stages. Both as bytes that are sized before the start and as resident maximum of short real runs. Published size: the
1.3B model's memory per rank, by parts, not run. One process: what autograd keeps under backpropagation and under PoE,
if --torch is a Python with PyTorch and --reference has poe_ref.py; otherwise left out.

Duration on two cores: about 5 minutes; --quick: under one. A busy machine changes nothing but the duration.

Writes into --out (default runs/memory): memory.md (the tables, also on standard output), memory.json, memory.png.

What to expect: backpropagation grows with the depth, in one process and on rank 0 of 1f1b alike, whatever the number of
stages; PoE with the depth of a stage. Over all ranks together PoE has no less than backpropagation in one process.
"""
import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

HERE = Path(__file__).resolve().parent
MIB, GIB = 2 ** 20, 2 ** 30
CHANNELS, T, ROWS, VOCABULARY = 128, 256, 8, 512
MICRO = 8                          # micro-batches of a pipeline's step: as many as the most stages
UNIT = ROWS * T * CHANNELS * 4     # one activation (B,T,C) in fp32
BP = ["--objective", "bp", "--backout", "off"]
WAYS = {  # flags; None: predicted
    "bp": [*BP, "--recompute", "none"],
    "bp sqrt(L)": None,
    "bp block": [*BP, "--recompute", "block"],
    "1f1b": [*BP, "--schedule", "1f1b", "--recompute", "none"],
    "poe": ["--recompute", "none"],
}
ALONE = ("bp", "bp block")  # in one process, whatever the number of stages
PARTS = {"weights": ["parameters"], "gradients": ["gradients", "pending"], "optimiser": ["optimizer"],
         "activations": ["activations"], "messages": ["messages"], "scratch": ["scratch"]}


# --- figures ---------------------------------------------------------------------------------------------------------

def sized(args, stages, flags):
    """Bytes of every rank by parts, as they are sized before the start."""
    emulated = ["--emulate-compute", "forward=1ms,backward=2ms"]  # no need to time anything
    plan = common.plan([args.program, "--stages", ",".join(map(str, stages)), *emulated, *flags])
    return [rank["memory_parts"] for rank in plan["ranks"]]


def kept(parts):
    """What a rank keeps of micro-batches: activations, and the messages that they came in or wait to leave in."""
    return parts["activations"] + parts["messages"]


def total(parts):
    return sum(value for name, value in parts.items() if name != "recompute")


def model_flags(way):
    micro = 1 if way in ALONE else MICRO  # alone, each goes before the next comes
    return ["--n-embd", CHANNELS, "--n-head", 2, "--sequence-len", T, "--device-batch-size", ROWS, "--total-batch-size",
            ROWS * T * micro, "--vocab-size", VOCABULARY, "--threads", 1, *WAYS[way]]


def measured(args, folder, stages, flags):
    """Every rank's resident maximum, and the sizes that it was told, of a short real run."""
    ranks = ["--ranks", len(stages)] if len(stages) > 1 else []
    lines = common.metrics([args.program, *ranks, "--stages", ",".join(map(str, stages)), *flags, "--data",
                            f"{folder}/tokens.bin", "--num-iterations", args.steps], timeout=3600)
    return lines[-1]["memory"]


def point(args, folder, way, layers, stages):
    split = [layers] if way in ALONE else [layers // stages] * stages
    flags = model_flags(way)
    parts = sized(args, split, flags)
    memory = measured(args, folder, split, flags)
    print(f"{way}, {layers} layers, {len(split)} ranks: measured", file=sys.stderr, flush=True)
    return dict(way=way, layers=layers, stages=len(split), kept=[kept(p) for p in parts],
                arenas=[total(p) for p in parts], peak=[m["peak"] for m in memory])


def growth(args):
    """Activations of backpropagation without checkpoints: bytes whatever the depth, and those of a layer."""
    low, high = (sized(args, [n], model_flags("bp"))[0]["activations"] for n in (8, 16))
    layer = (high - low) / 8
    return low - 8 * layer, layer


def checkpointed(layers, segment, fixed, layer):
    """In segments of `segment` layers: the inputs of all segments but the first, and the inside of one."""
    return fixed + segment * layer + (math.ceil(layers / segment) - 1) * UNIT


def predicted(layers, grown):
    root = round(math.sqrt(layers))
    best = min(range(1, layers + 1), key=lambda s: checkpointed(layers, s, *grown))
    return dict(way="bp sqrt(L)", layers=layers, stages=1, segment=root, kept=[checkpointed(layers, root, *grown)],
                best_segment=best, best=checkpointed(layers, best, *grown))


def sweep(args, folder, depths, stage_counts):
    rows, grown = {}, growth(args)
    for layers, stages in [(n, args.stages) for n in depths] + [(args.deepest, k) for k in stage_counts]:
        for way, flags in WAYS.items():
            key = (way, layers, 1 if way in ALONE or flags is None else stages)
            if key not in rows:
                rows[key] = predicted(layers, grown) if flags is None else point(args, folder, way, layers, stages)
    return rows


def published(args):
    """The 1.3B model: bytes of all its ranks by parts. In turn: one process that lets a stage's activations go before
    the next stage's come, which poe-pipe, where stages are ranks, does not have."""
    size = ["--size", "1.3b", "--threads", 1, "--recompute", "none"]
    alone = sized(args, [24], [*size, *BP])
    stages = sized(args, [6] * 4, size)
    in_turn = dict(alone[0], activations=max(parts["activations"] for parts in stages))
    return {"bp, 1 rank": alone, "bp 1f1b, 4 ranks": sized(args, [6] * 4, [*size, *BP, "--schedule", "1f1b"]),
            "PoE, 4 ranks": stages, "PoE, 1 rank, stages in turn (computed)": [in_turn]}


def autograd(args, layers):
    if not args.torch or not (args.reference / "poe_ref.py").exists():
        return None
    return json.loads(common.call([args.torch, HERE / "one_process.py", args.reference, layers, args.stages], timeout=3600))


# --- tables ----------------------------------------------------------------------------------------------------------

def both(row):
    """Kept by micro-batches on the rank with most, and that rank's resident maximum."""
    worst = max(range(len(row["kept"])), key=lambda k: row["kept"][k])
    return f"{row['kept'][worst] / MIB:.0f} ({row['peak'][worst] / MIB:.0f})"


def find(result, way, layers, stages):
    found = [r for r in result["sweep"] if (r["way"], r["layers"], r["stages"]) == (way, layers, stages)]
    return found[0] if found else None


def depth_table(result):
    k = result["stages"]
    lines = [f"| layers | bp | bp, checkpoints every sqrt(L) layers, or best | bp, every layer (block) | 1f1b, {k} "
             f"ranks, rank 0 | PoE, {k} ranks |", "|---" * 6 + "|"]
    for layers in result["depths"]:
        check = find(result, "bp sqrt(L)", layers, 1)
        cells = [both(find(result, way, layers, n)) for way, n in (("bp", 1), ("bp block", 1), ("1f1b", k), ("poe", k))]
        cells.insert(1, f"{check['kept'][0] / MIB:.0f}, {check['best'] / MIB:.0f} every {check['best_segment']}")
        lines.append(f"| {layers} | " + " | ".join(cells) + " |")
    return lines


def stage_table(result):
    lines = ["| ranks | layers per rank | 1f1b, rank 0 | 1f1b, all ranks | PoE, fullest rank | PoE, all ranks |",
             "|---" * 6 + "|"]
    for k in result["stage_counts"]:
        cells = []
        for way in ("1f1b", "poe"):
            row = find(result, way, result["deepest"], k)
            cells += [both(row), f"{sum(row['kept']) / MIB:.0f} ({sum(row['peak']) / MIB:.0f})"]
        lines.append(f"| {k} | {result['deepest'] // k} | " + " | ".join(cells) + " |")
    return lines


def table_row(name, values):
    return f"| {name} | " + " | ".join(f"{value / GIB:.1f}" for value in values) + " |"


def published_table(result):
    columns, ranks = [], []
    for name, parts in result["published"].items():
        if len(parts) == 1:
            columns.append((name, parts))
        else:
            columns += [(f"{name}, largest", [max(parts, key=total)]), (f"{name}, all", parts)]
    lines = ["| GiB | " + " | ".join(name for name, _ in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, keys in PARTS.items():
        lines.append(table_row(name, [sum(p[k] for p in parts for k in keys) for _, parts in columns]))
    lines.append(table_row("total", [sum(map(total, parts)) for _, parts in columns]))
    return lines


def autograd_table(result):
    a = result["autograd"]
    if not a:
        return []
    names = (("bp", "backpropagation"), ("total", "PoE, one backward pass of the summed losses"),
             ("by_stage", "PoE, each stage's backward pass before the next stage"))
    return ["| in one process | kept for backward | beside bp |", "|---|---|---|",
            *[f"| {text} | {a[key] / MIB:.0f} MiB | {a[key] / a['bp']:.2f} |" for key, text in names]]


def markdown(result):
    outside = [peak - arenas for r in result["sweep"] if "peak" in r for peak, arenas in zip(r["peak"], r["arenas"])]
    sections = [
        ("Depth: MiB that micro-batches keep on the fullest rank (its resident maximum)", depth_table(result)),
        (f"Stages: {result['deepest']} layers, {MICRO} micro-batches, MiB kept (resident maxima)", stage_table(result)),
        ("The 1.3B model, micro-batches of 4 x 2048, sized and not run", published_table(result)),
        (f"All stages in one process of PyTorch, {result['autograd_layers']} layers in {result['stages']} stages",
         autograd_table(result))]
    head = (f"{result['machine']}; {result['command']}\n\n{CHANNELS} channels, {ROWS} x {T} tokens, fp32: one "
            f"activation (B,T,C) has {UNIT / MIB:.0f} MiB. Resident beside what is sized before the start: "
            f"{min(outside) / MIB:.0f} to {max(outside) / MIB:.0f} MiB per process.")
    return "\n\n".join([head] + [f"{title}\n\n" + "\n".join(table) for title, table in sections if table])


# --- picture ---------------------------------------------------------------------------------------------------------

COLOURS = {"bp": "#d73027", "bp sqrt(L)": "#fdae61", "bp block": "#999999", "1f1b": "#7b3294", "poe": "#2166ac"}


def series(result, way, axis, value, keep):
    """Rows of one way along `axis` as gnuplot's data."""
    points = sorted((r[axis], value(r)) for r in result["sweep"] if r["way"] == way and keep(r))
    return "\n".join(f"{x} {y / MIB}" for x, y in points)


def fullest(row):
    return max(row["kept"])


def fullest_peak(row):
    return max(row["peak"])


def everywhere(row):
    return sum(row["kept"])


def panel(out, name, curves, titles):
    """`curves`: title, way, its points, how they are drawn. Each goes into a file of its own."""
    words = []
    for i, (title, way, points, style) in enumerate(curves):
        path = out / f"{name}-{i}.dat"
        path.write_text(points + "\n")
        words.append(f"'{path}' with {style} linecolor rgb '{COLOURS[way]}' title '{title}'")
    return [f"set title '{titles[0]}'", f"set xlabel '{titles[1]}'", "plot " + ", ".join(words)]


def draw(result, out):
    k, deepest = result["stages"], result["deepest"]
    line, dashed = "linespoints linewidth 2 pointtype 7", "lines linewidth 2 dashtype 2"
    dots = "points pointtype 6 pointsize 1.5"
    names = {"bp": "bp, one process", "bp sqrt(L)": "bp, checkpoints every sqrt(L) layers (predicted)",
             "bp block": "bp, checkpoints every layer", "1f1b": f"1f1b, {k} ranks, rank 0",
             "poe": f"PoE, {k} ranks, fullest"}
    depth, stages = [], []
    for way, name in names.items():
        def at_depth(r, way=way):
            return r["layers"] in result["depths"] and (r["stages"] == k or way.startswith("bp"))
        depth.append((name, way, series(result, way, "layers", fullest, at_depth), line))
        if WAYS[way]:
            depth.append(("", way, series(result, way, "layers", fullest_peak, at_depth), dots))
    for way, name, which in (("1f1b", "1f1b", "rank 0"), ("poe", "PoE", "fullest rank")):
        for title, value, style in ((f"{name}, {which}", fullest, line), ("", fullest_peak, dots),
                                    (f"{name}, all ranks together", everywhere, dashed)):
            points = series(result, way, "stages", value, lambda r: r["layers"] == deepest)
            stages.append((title, way, points, style))
    script = ["set terminal pngcairo size 1300,560 font 'Sans,11' noenhanced", f"set output '{out / 'memory.png'}'",
              "set multiplot layout 1,2", "set logscale xy 2", "set grid", "set key top left", "set yrange [16:8192]",
              "set ylabel 'MiB kept by micro-batches (circles: resident maximum)'",
              *panel(out, "depth", depth, ("against depth", "layers")),
              *panel(out, "stages", stages, (f"{deepest} layers cut into stages", "ranks (stages)"))]
    common.plot(script)


# --- the whole -------------------------------------------------------------------------------------------------------

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--torch", metavar="PYTHON", help="a Python that has PyTorch")
    parser.add_argument("--reference", type=Path, default=common.ROOT.parent / "shared" / "reference",
                        help="where poe_ref.py is")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "memory")
    parser.add_argument("--quick", action="store_true", help="few and small: does everything work?")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.depths, args.stage_counts, args.stages, args.deepest = (
        ([4, 8], [1, 2], 2, 8) if args.quick else ([4, 8, 16, 32, 64], [1, 2, 4, 8], 4, 32))
    args.steps, args.autograd_layers = (1, 8) if args.quick else (2, 24)
    if not args.program.is_file():
        parser.error(f"there is no {args.program}: run tools/setup, or give --program")
    return args


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        common.write_tokens(Path(f"{folder}/tokens.bin"), VOCABULARY, 200000)
        rows = sweep(args, folder, args.depths, args.stage_counts)
    result = dict(machine=common.machine(), command=" ".join(["experiments/memory/run.py", *sys.argv[1:]]), depths=args.depths,
                  stage_counts=args.stage_counts, stages=args.stages, deepest=args.deepest, sweep=list(rows.values()),
                  published=published(args), autograd_layers=args.autograd_layers,
                  autograd=autograd(args, args.autograd_layers))
    text = markdown(result)
    (args.out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "memory.md").write_text(text + "\n")
    draw(result, args.out)
    print(text)


if __name__ == "__main__":
    main()
