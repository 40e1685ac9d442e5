#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What do late shared parameters, and rounded messages, cost in bits per byte?

    experiments/sync/run.py            # 39 runs of the default job (130 steps, 532480 tokens), 3 seeds each case
    experiments/sync/run.py --quick    # a tiny model, some cases, always anew: seconds; its figures mean nothing

Trains the default job once per case and seed, in one process (the bits are those of any number of ranks), and compares
the held-out BPB of all stages together after the last step with that of --sync exact, fp32, under the same seed.

Duration: 5 to 9 minutes a run, so 3 hours on two idle cores with --workers 2. Runs that are finished
stay: started again, the script goes on where it was, seed by seed. A run that was made with other flags is made anew.

Writes into --out (default runs/sync):
    points.json   every run's figures, as soon as it is finished
    sync.md       the table, also on standard output
    sync.png      BPB of every case: the mean over seeds, bars from the lowest to the highest
"""
import argparse
import os
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

BASE = "exact, fp32"
RULES = {BASE: [], **{rule: ["--sync", rule] for rule in
                      ("stale:1", "stale:2", "stale:4", "stale:8", "stale:32", "every:4", "every:16")}}
FORMATS = {"wire bf16": ["--wire", "bf16"], "wire fp8": ["--wire", "fp8"], "wire int8": ["--wire", "int8"],
           "shared bf16": ["--wire-shared", "bf16"],
           "wire fp8, shared bf16": ["--wire", "fp8", "--wire-shared", "bf16"]}
TINY = ["--stages", "1,1,1", "--n-embd", "32", "--n-head", "2", "--sequence-len", "32", "--vocab-size", "300",
        "--device-batch-size", "2", "--total-batch-size", "128", "--num-iterations", "8", "--warmup-steps", "2",
        "--eval-tokens", "2048", "--threads", "1"]
QUICK = (BASE, "stale:2", "every:4", "wire fp8", "shared bf16")


# --- runs ------------------------------------------------------------------------------------------------------------

def point(case, seed, base, flags):
    return dict(name=f"{case}, seed {seed}", case=case, seed=seed, flags=[*base, *flags, "--seed", str(seed)])


def train(program, flags):
    lines = common.metrics([program, *flags], timeout=24 * 3600)
    bpb = [line["bpb"] for line in lines if "bpb" in line][-1]
    end = [line for line in lines if "step_bytes" in line][-1]
    tokens = [line["tokens"] for line in lines if "loss" in line][-1]
    return dict(tokens=tokens, bpb=bpb["aggregate"], stages=bpb["stage"], sent=sum(end["step_bytes"]),
                sent_fp32=sum(end["step_bytes_fp32"]), summary=f"{bpb['aggregate']:.4f} BPB")


def by_case(points, wanted):
    """Each case's results, in the order of seeds."""
    results = {}
    for p in wanted:
        results.setdefault(p["case"], []).append(points[p["name"]])
    return results


# --- table and picture -----------------------------------------------------------------------------------------------

def row(case, results, base):
    bpb = [r["bpb"] for r in results]
    against = [100 * (r["bpb"] / b["bpb"] - 1) for r, b in zip(results, base)]
    spread = f" ± {stdev(against):.3f}" if len(against) > 1 else ""
    change = "" if results is base else f"{mean(against):+.3f} %{spread}"
    sent, full = mean(r["sent"] for r in results), mean(r["sent_fp32"] for r in results)
    figures = (f"{mean(bpb):.4f}", f"{min(bpb):.4f} .. {max(bpb):.4f}", change, f"{sent / 2**20:.2f}", f"{sent / full:.2f}")
    return f"| {case} | {' | '.join(figures)} |"


def table(results, seeds):
    base = results[BASE]
    lines = [f"{base[0]['tokens']} tokens, seeds {', '.join(map(str, seeds))}; {common.machine()}", "",
             "| case | BPB, mean | lowest .. highest | against exact, fp32, same seed | MiB a step, all | of fp32 |",
             "|---|---|---|---|---|---|"]
    return "\n".join(lines + [row(case, r, base) for case, r in results.items()]) + "\n"


def plot(results, path):
    """Rules and formats side by side."""
    data = [f'{i} {mean(r["bpb"] for r in rs)} {min(r["bpb"] for r in rs)} {max(r["bpb"] for r in rs)}'
            for i, rs in enumerate(results.values())]
    ticks = ", ".join(f'"{case}" {i}' for i, case in enumerate(results))
    base = mean(r["bpb"] for r in results[BASE])
    rules = sum(case in RULES for case in results) - 0.5
    script = ['set terminal pngcairo size 1200,675 font "Sans,12" noenhanced', f'set output "{path}"',
              'set title "Held-out BPB of all stages: mean, lowest and highest of the seeds"', 'set grid ytics',
              'set ylabel "bits per byte"', 'set key off', f'set xrange [-0.5:{len(results) - 0.5}]',
              f'set xtics rotate by -30 ({ticks})',
              f'set arrow from -0.5,{base} to {len(results) - 0.5},{base} nohead dt 2 lc rgb "#7f7f7f"',
              f'set arrow from {rules}, graph 0 to {rules}, graph 1 nohead lc rgb "#d9d9d9"',
              '$data << EOD', *data, 'EOD',
              'plot $data using 1:2:3:4 with yerrorbars pt 7 lw 2 lc rgb "#3b6fb6"']
    common.plot(script)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does the script work?")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each with its share of the processors")
    parser.add_argument("--seeds", default="0,1,2", help="of the initial weights, one after the other (default 0,1,2)")
    parser.add_argument("--build", default=common.ROOT / "build", type=Path, help="where poe-pipe was built")
    parser.add_argument("--out", type=Path, help="folder of runs, table and picture")
    args = parser.parse_args()
    out = args.out or common.ROOT / "runs" / ("sync-quick" if args.quick else "sync")
    out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        (out / "points.json").unlink(missing_ok=True)
    cases = {case: flags for case, flags in {**RULES, **FORMATS}.items() if case in QUICK or not args.quick}
    seeds = [0, 1] if args.quick else [int(seed) for seed in args.seeds.split(",")]
    base = TINY if args.quick else ["--threads", str(max(1, len(os.sched_getaffinity(0)) // args.workers))]
    wanted = [point(case, seed, base, flags) for seed in seeds for case, flags in cases.items()]
    points = common.Points(out / "points.json")
    points.measure(wanted, lambda p: train(args.build / "poe-pipe", p["flags"]), args.workers)
    results = by_case(points, wanted)
    text = table(results, seeds)
    (out / "sync.md").write_text(text)
    print(text, end="")
    plot(results, out / "sync.png")


if __name__ == "__main__":
    main()
