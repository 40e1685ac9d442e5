#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""One stage cannot work for 30 % of the steps: go on without it, or wait for it?

    tools/setup
    experiments/outage/run.py

Trains the default job (4 stages of 16, 6, 5 and 5 layers, 130 steps) over 4 ranks under mpiexec, real kernels, three times:
undisturbed; with --outage continue while the third stage cannot work (--fault absent); and the same with as many steps more
as were missed, which takes as long as waiting would. Waiting is not run but computed: the undisturbed run, whose time stands
still at the outage's first step for as long as the run that went on took for the steps without the stage. The bits of
what a run computes do not depend on when it does so, so nothing else differs.

Duration: about 15 minutes on two idle cores; --quick: seconds, on a busy machine a minute; one tiny model, whose figures mean nothing.

Writes into --out (default runs/outage): outage.md (the table, also on standard output), outage.json, outage.png: BPB of every
prefix over time. Time is that of training steps alone, without evaluations and checkpoints.

What to expect: the stages before the absent one learn on, and at the end of the outage are better than if they had waited.
The absent stage and those behind it come back to embeddings and inputs that have moved on without them, and catch up.
"""
import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

STEPS, STAGE, SHARE = 130, 2, 0.3
QUICK = ["--stages", "1,1,1,1", "--n-embd", 32, "--n-head", 2, "--sequence-len", 32, "--vocab-size", 300, "--device-batch-size", 2,
         "--total-batch-size", 128, "--warmup-steps", 2, "--eval-tokens", 2048, "--threads", 1]


# --- runs -------------------------------------------------------------------------------------------------------------

def train(args, steps, outage):
    """Times of the steps, and [updates made, seconds of training until then, BPB of every prefix (None: there is none)]."""
    words = [args.program, "--ranks", 4, *(QUICK if args.quick else ["--eval-tokens", args.eval_tokens]), "--seed", args.seed,
             "--num-iterations", steps, "--eval-every", args.every]
    if outage:
        words += ["--outage", "continue", "--fault", f"absent rank={STAGE} step={args.first} steps={args.missed}"]
    lines = common.metrics(words, timeout=3600)
    seconds = [line["dt"] for line in lines if "dt" in line]
    courses = [[line["step"], sum(seconds[:line["step"]]), line["bpb"]["prefix"]] for line in lines if "bpb" in line]
    return dict(command=common.command(words[1:]), seconds=seconds, evaluations=courses)


def waiting(args, whole, pause):
    """The undisturbed run, with its time standing still before the outage's first step."""
    moved = []
    for step, at, bpb in whole["evaluations"]:
        moved += [[step, at, bpb]] if step <= args.first else []
        moved += [[step, at + pause, bpb]] if step >= args.first else []
    return dict(command="computed from the undisturbed run", seconds=whole["seconds"], evaluations=moved)


def measure(args):
    whole = train(args, args.steps, False)
    print("undisturbed: done", file=sys.stderr, flush=True)
    short = train(args, args.steps, True)
    print("continue: done", file=sys.stderr, flush=True)
    long = train(args, args.steps + args.missed, True)
    print("continue, as long: done", file=sys.stderr, flush=True)
    pause = sum(short["seconds"][args.first:args.first + args.missed])
    return {"wait": waiting(args, whole, pause), "continue": short, "continue, as long": long}


# --- results ----------------------------------------------------------------------------------------------------------

def at_step(run, step):
    """The last evaluation after at most so many updates."""
    return [e for e in run["evaluations"] if e[0] <= step][-1][2]


def decimals(values):
    return " | ".join("-" if value is None else f"{value:.4f}" for value in values)


def table(args, runs):
    names = " | ".join("stage 0" if k == 0 else f"stages 0 to {k}" for k in range(4))
    lines = [f"| BPB of | {names} | seconds |", "|---" * 6 + "|"]
    back = args.first + args.missed
    for name, run in runs.items():
        stands = args.first if name == "wait" else back
        took = sum(run["seconds"][:stands]) + (pause_of(runs, args) if name == "wait" else 0)
        lines.append(f"| {name}: when the stage is back | {decimals(at_step(run, stands))} | {took:.1f} |")
    for name, run in runs.items():
        step, seconds, bpb = run["evaluations"][-1]
        lines.append(f"| {name}: at the end, {step} steps | {decimals(bpb)} | {seconds:.1f} |")
    return "\n".join(lines)


def pause_of(runs, args):
    return sum(runs["continue"]["seconds"][args.first:args.first + args.missed])


def draw(args, runs, path):
    """A panel for each prefix; the outage is grey."""
    colours = {"wait": "#7f8c8d", "continue": "#1e8449", "continue, as long": "#ca6f1e"}
    script = ["set terminal pngcairo size 1400,900 font 'sans,11'", f"set output '{path}'", "set grid ytics", "set key top right",
              "set datafile missing '?'", "set xlabel 'seconds of training'", "set ylabel 'held-out bits per byte'"]
    for i, run in enumerate(runs.values()):
        rows = (" ".join([f"{at:.3f}", *("NaN" if x is None else f"{x:.6f}" for x in bpb)]) for _, at, bpb in run["evaluations"])
        script += [f"$run{i} << EOD", *rows, "EOD"]
    begin = sum(runs["continue"]["seconds"][:args.first])
    script += [f"set object 1 rectangle from {begin},graph 0 to {begin + pause_of(runs, args)},graph 1 fc rgb '#eeeeee' behind",
               "set multiplot layout 2,2"]
    for k in range(4):
        curves = ", ".join(f"$run{i} using 1:{k + 2} with linespoints lw 2 pt 7 ps 0.5 lc rgb '{colours[name]}' title '{name}'"
                           for i, name in enumerate(runs))
        script += [f"set title '{'stage 0' if k == 0 else f'stages 0 to {k}'}'", f"plot {curves}"]
    common.plot(script)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "outage")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--eval-tokens", type=int, default=16384, help="held-out tokens of each evaluation")
    parser.add_argument("--quick", action="store_true", help="one tiny model: does it work?")
    args = parser.parse_args()
    args.steps, args.every = (40, 4) if args.quick else (STEPS, 5)
    args.first = args.steps * 3 // 10 // args.every * args.every  # an evaluation's step
    args.missed = round(SHARE * args.steps / args.every) * args.every
    if not args.program.is_file():
        parser.error(f"there is no {args.program}: run tools/setup, or give --program")
    return args


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    runs = measure(args)
    median = statistics.median(runs["wait"]["seconds"])
    text = "\n".join([f"{common.machine()}, load {load:.1f} at the start; experiments/outage/run.py {' '.join(sys.argv[1:])}; 4 ranks "
                      f"time-shared; stage {STAGE} absent in steps {args.first} to {args.first + args.missed - 1}; "
                      f"{median:.2f} s a step undisturbed; seed {args.seed}", "", table(args, runs)])
    (args.out / "outage.json").write_text(json.dumps(runs, indent=1) + "\n")
    (args.out / "outage.md").write_text(text + "\n")
    draw(args, runs, args.out / "outage.png")
    print(text)


if __name__ == "__main__":
    main()
