#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""How fast is a training step on this machine's processor, beside a good PyTorch trainer of the same model?

    tools/setup
    experiments/speed/run.py --python /path/to/python-with-torch --torch-speed ../shared/reference/torch_speed.py

Runs both trainers in turns, on the same processors, at 1 and at 2 threads, and keeps the best of all rounds of each:
the step engine in one process (bench_step) and compiled PyTorch (torch_speed.py, in a process of its own). Without a
Python that has torch, or without torch_speed.py, only the engine is measured, and a sentence says so.

Duration on two idle cores: about 40 minutes with PyTorch (its compiler takes a minute per configuration the first
time), 10 minutes without, 5 seconds with --quick (two tiny configurations, once). On a busy machine the figures mean
nothing: the load is printed with them.

Writes into --out (default runs/speed; files of an earlier run are replaced), after every configuration:
    speed.md    the tables, also on standard output: the goals, optimiser, memory, and the time of every operation
    speed.json  everything measured, every round
    speed.png   where the time of a step goes, as stacked bars beside PyTorch's

What to expect: the whole step at least 1.25 times as fast as PyTorch, 1.6 times at 32768 tokens of vocabulary; forward
and backward at 0.8 of the speed of a large matrix product. The goals stand in the table in parentheses.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

GROUPS = ["products", "attention", "head", "optimiser", "elements"]
STACK = GROUPS + ["waiting", "rest"]
TITLES = dict(elements="element passes", waiting="waiting", rest="outside of operations")
COLOURS = dict(products="#3b6fb6", attention="#e08214", head="#3f9b4f", optimiser="#b2352b", elements="#8e6bb0",
               waiting="#d9d9d9", rest="#7f7f7f", torch="#c7b78f", torch_optimiser="#8f7f57")


def configuration(title, step, share, stages="2,2,2", c=384, v=4096, batch=4, micro=4, **more):
    flags = dict({"stages": stages, "n-embd": c, "n-head": c // 64, "sequence-len": 512, "vocab-size": v,
                  "batch": batch, "micro": micro}, **{k.replace("_", "-"): value for k, value in more.items()})
    return dict(title=title, flags=flags, goal_step=step, goal_share=share)


# T = 512 and every window full unless said.
CONFIGURATIONS = [
    configuration("poe 2,2,2 C384 V4096", 1.25, 0.8),
    configuration("poe 2,2,2 C384 V32768", 1.6, 0.8, v=32768, batch=2),
    configuration("poe 4,4,4 C768 V8192", 1.25, 0.8, stages="4,4,4", c=768, v=8192, batch=2, micro=2),
    configuration("bp 6 C384 V4096", 1.25, 0.8, stages="6", objective="bp"),
    configuration("poe 2,2,2 ps SSSL T1024 GQA 6/2", 1.25, 0.75, head="ps", window_pattern="SSSL", sequence_len=1024,
                  n_kv_head=2),
]
QUICK = [
    configuration("quick poe", 1, 0, stages="2,2", c=128, v=250, batch=1, micro=2, sequence_len=64, n_kv_head=1,
                  head="ps", window_pattern="SSSL"),
    configuration("quick bp", 1, 0, stages="2", c=64, v=256, batch=1, micro=2, sequence_len=64, objective="bp"),
]


# --- measuring -------------------------------------------------------------------------------------------------------

def run_child(command, cpus, **environment):
    """The JSON object that a command prints last, with the peak of its resident memory. OSError: it failed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err,
                                 env=dict(os.environ, **environment), preexec_fn=lambda: os.sched_setaffinity(0, cpus))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines = [line for line in out.read().decode().splitlines() if line.startswith("{")]
        if child.returncode or not lines:
            said = err.read().decode()[-2000:].strip()
            raise ChildProcessError(f"{Path(command[0]).name} ended with status {child.returncode}: {said}")
    return dict(json.loads(lines[-1]), process_peak_mib=usage.ru_maxrss / 1024)


def flag_words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def run_engine(args, config, threads, *more):
    program = args.build / "experiments" / "bench_step"
    command = [program, *flag_words(config["flags"]), "--threads", threads, "--reps", args.reps, *more]
    return run_child(command, args.cpus[:threads])


def run_torch(args, config, threads):
    """PyTorch's trainer knows no objective: one stage is the same arithmetic."""
    flags = {name: value for name, value in config["flags"].items() if name != "objective"}
    command = [args.python, args.torch_speed, *flag_words(flags), "--threads", threads, "--reps", args.reps,
               "--compile"]
    return run_child(command, args.cpus[:threads], PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS=str(threads))


def best(runs):
    """Of several runs: the highest rates, the lowest times; operations of the fastest step."""
    result = dict(min(runs, key=lambda run: run.get("step_ms", 0)))
    for key in "tok_s", "tok_s_forward_backward", "model_gflops", "sgemm_gflops", "triad_gbs":
        if key in result:
            result[key] = max(run[key] for run in runs)
    result["optimizer_ms"] = min(run["optimizer_ms"] for run in runs)
    result["process_peak_mib"] = max(run["process_peak_mib"] for run in runs)
    return result


def measure(args, config, threads):
    ours, theirs = [], []
    for number in range(args.rounds):
        print(f"{config['title']}, {threads} threads, round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        ours.append(run_engine(args, config, threads, "--profile"))
        if args.torch_speed:
            theirs.append(run_torch(args, config, threads))
    return dict(config, threads=threads, ours=best(ours), torch=best(theirs) if theirs else None,
                rounds=dict(ours=ours, torch=theirs))


def measure_ranks(args, config):
    """Peak memory of each stage alone in a process; one micro-batch is enough, all use the same memory."""
    n_stages = len(str(config["flags"]["stages"]).split(","))
    alone = dict(config, flags=dict(config["flags"], micro=1))
    return [run_engine(args, alone, max(args.threads), "--stage", k)["peak_mib"] for k in range(n_stages)]


def measure_bf16(args):
    """Our own step in bf16 beside fp32, in turns, or why not: without AMX rounding only costs time."""
    if "amx_bf16" not in machine()["flags"]:
        return "not measured: this processor has no AMX, and products of bf16 operands are computed in fp32"
    config, threads = args.configurations[0], max(args.threads)
    runs = {dtype: [] for dtype in ("fp32", "bf16")}
    for _ in range(args.rounds):
        for dtype in runs:
            runs[dtype].append(run_engine(args, config, threads, "--dtype", dtype))
    fp32, bf16 = (best(runs[dtype])["tok_s"] for dtype in ("fp32", "bf16"))
    return f"{config['title']}, {threads} threads: {bf16:.0f} against {fp32:.0f} tokens/s, {ratio(bf16, fp32, 1.5)}"


def machine():
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [f for f in fields.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    return dict(cpu=fields.get("model name", "unknown"), flags=flags, processors=os.cpu_count())


# --- what follows from it --------------------------------------------------------------------------------------------

def sgemm(row):
    """PyTorch's figure where there is one: the goals are shares of it."""
    return (row["torch"] or row["ours"])["sgemm_gflops"]


def operation_rows(row):
    """Per operation: share of the step, rate, and its time at the attainable rates over its time as it is."""
    ours = row["ours"]
    for op in sorted(ours["operations"], key=lambda o: -o["seconds"]):
        attainable = max(op["flops"] / sgemm(row), op["bytes"] / ours["triad_gbs"]) / 1e9
        yield dict(op, share=op["seconds"] * 1e3 / ours["step_ms"], attainable=attainable / op["seconds"],
                   gflops=op["flops"] / op["seconds"] / 1e9, gbs=op["bytes"] / op["seconds"] / 1e9)


def stack(row):
    """Milliseconds of the step per group of operations while computing; waiting: threads without work, or not on a
    processor; rest: outside of operations."""
    ours, threads = row["ours"], row["threads"]
    parts = dict.fromkeys(STACK, 0.0)
    for op in ours["operations"]:
        busy = min(op["cpu_seconds"] / threads, op["seconds"])
        parts[op["group"]] += busy * 1e3
        parts["waiting"] += (op["seconds"] - busy) * 1e3
    parts["rest"] = ours["step_ms"] - sum(parts.values())
    return parts


def check_profile(row):
    """The products' FLOPs are known: nothing may bypass the stopwatch, and nothing be counted twice."""
    flags = row["flags"]
    c, tokens = flags["n-embd"], flags["batch"] * flags["micro"] * flags["sequence-len"]
    stages = [int(n) for n in str(flags["stages"]).split(",")]
    kv = c * flags.get("n-kv-head", flags["n-head"]) // flags["n-head"]
    expected = dict(products=6 * tokens * sum(stages) * c * (2 * c + 2 * kv + 8 * c),
                    head=6 * tokens * len(stages) * c * flags["vocab-size"])
    for group, flops in expected.items():
        counted = sum(op["flops"] for op in row["ours"]["operations"] if op["group"] == group)
        if abs(counted / flops - 1) > 1e-6:
            sys.exit(f"{row['title']}: the profile counts {counted:g} FLOPs of {group}, the model has {flops:g}")
    if stack(row)["rest"] < -1e-3 * row["ours"]["step_ms"]:
        sys.exit(f"{row['title']}: the operations took longer than the step")


# --- tables ----------------------------------------------------------------------------------------------------------

def table(head, rows):
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def ratio(ours, theirs, goal):
    return f"{ours / theirs:.2f}x ({goal}x)" if theirs else "-"


def goal_table(rows):
    lines = []
    for row in rows:
        ours, torch = row["ours"], row["torch"] or {}
        lines.append([row["title"], row["threads"], f"{ours['tok_s']:.0f}", torch.get("tok_s", "-"),
                      ratio(ours["tok_s"], torch.get("tok_s"), row["goal_step"]),
                      f"{ours['model_gflops'] / sgemm(row):.2f} ({row['goal_share']})",
                      f"{torch['model_gflops'] / sgemm(row):.2f}" if torch else "-", f"{sgemm(row):.0f}",
                      f"{ours['optimizer_ms']:.0f}", f"{torch['optimizer_ms']:.0f}" if torch else "-"])
    return table(["configuration", "threads", "tokens/s", "PyTorch", "whole step (goal)",
                  "forward + backward of sgemm (goal)", "PyTorch", "sgemm GFLOP/s", "optimiser ms", "PyTorch"], lines)


def scaling_table(rows):
    """From the fewest threads to the most."""
    lines = []
    for title in dict.fromkeys(row["title"] for row in rows):
        mine = sorted((row for row in rows if row["title"] == title), key=lambda row: row["threads"])
        few, many = mine[0], mine[-1]
        speedup = lambda side: f"{many[side]['tok_s'] / few[side]['tok_s']:.2f}x" if few[side] else "-"
        if few is not many:
            lines.append([title, f"{few['threads']} to {many['threads']}", speedup("ours"), speedup("torch")])
    return table(["configuration", "threads", "speed-up (1 to 2: 1.9x)", "PyTorch"], lines)


def optimizer_table(rows):
    lines = []
    for row in rows:
        ops = {op["name"]: op for op in operation_rows(row)}
        muon, adamw = ops["muon"], ops["adamw"]
        lines.append([row["title"], row["threads"], f"{muon['seconds'] * 1e3:.1f}", f"{muon['gflops']:.0f}",
                      f"{muon['gflops'] / sgemm(row):.2f} (0.7)", f"{adamw['seconds'] * 1e3:.1f}",
                      f"{adamw['gbs']:.1f}", f"{adamw['gbs'] / row['ours']['triad_gbs']:.2f} (1)"])
    return table(["configuration", "threads", "Muon ms", "GFLOP/s", "of sgemm (goal)", "AdamW ms", "GB/s",
                  "of triad (goal)"], lines)


def memory_table(rows, ranks, torch_import):
    """`torch_import`: MiB of a process that has only imported torch."""
    lines = []
    for title, stages in ranks.items():
        last = [row for row in rows if row["title"] == title][-1]
        torch = last["torch"]["process_peak_mib"] if last["torch"] else None
        lines.append([title, f"{max(stages):.0f}", f"{last['ours']['peak_mib']:.0f}", f"{torch:.0f}" if torch else "-",
                      f"{max(stages) / torch:.2f} (0.6)" if torch else "-",
                      f"{max(stages) / (torch - torch_import):.2f}" if torch else "-"])
    return table(["configuration", "largest rank MiB", "all stages MiB", "PyTorch MiB",
                  "largest rank / PyTorch (goal)", "less its import"], lines)


def operation_table(row):
    lines = [[op["name"], op["group"], op["calls"], f"{op['seconds'] * 1e3:.2f}", f"{100 * op['share']:.1f}",
              f"{op['gflops']:.0f}" if op["flops"] else "-", f"{op['gbs']:.1f}", f"{op['attainable']:.2f}"]
             for op in operation_rows(row)]
    return table(["operation", "group", "calls", "ms", "% of step", "GFLOP/s", "GB/s", "of attainable"], lines)


def markdown(result):
    rows, here = result["rows"], result["machine"]
    ours = rows[0]["ours"]
    text = [
        "# Speed of a training step\n",
        f"{here['cpu']}, {here['processors']} processors ({' '.join(here['flags'])}); kernels {ours['kernels']}, "
        f"products by {ours['blas']}; load {result['load']} (start, now; it includes this run).",
        f"PyTorch: {result['torch']}. Best of {result['rounds']} rounds of {result['reps']} steps each, in turns. "
        "sgemm is the rate of a 1024^3 product, PyTorch's where it ran.\n", goal_table(rows),
        "## Threads\n", scaling_table(rows),
        "## bf16\n", f"bf16 on AMX beside our own fp32 (goal): {result['bf16']}.\n",
        "## Optimiser\n",
        "Muon by the FLOPs that its iteration needs, symmetric products counted half, AdamW by 28 bytes per parameter; "
        "triad is y += x on arrays of 128 MiB.\n", optimizer_table(rows),
        "## Memory\n",
        "Most resident memory of a process, by the kernel's count. Largest rank: a process that trains this one stage "
        "alone, without transport and data (a rank's buffers for those come on top). All stages: bench_step with every "
        "stage, as it was timed. PyTorch: the whole process as it was timed, its compiler included; the last column "
        "leaves out what a process takes that only imports torch.\n",
        memory_table(rows, result["ranks"], result["torch_import_mib"]),
        "## Where the time goes\n",
        "The fastest step. GB/s counts every operand once; of attainable is the time at sgemm's or triad's rate, "
        "whichever is longer, over the time taken: above 1 the operands came from a cache. Waiting: threads without "
        "work, or work without a processor.\n"]
    for row in rows:
        parts = ", ".join(f"{TITLES.get(name, name)} {ms:.1f}" for name, ms in stack(row).items())
        text += [f"### {row['title']}, {row['threads']} threads\n",
                 f"A step of {row['ours']['step_ms']:.1f} ms: {parts}; triad {row['ours']['triad_gbs']:.1f} GB/s.\n",
                 operation_table(row)]
    return "\n".join(text)


# --- picture ---------------------------------------------------------------------------------------------------------

def bars(rows):
    """(x, [(colour key, bottom, top)], label above): two per configuration, percent of PyTorch's step or our own."""
    for number, row in enumerate(rows):
        torch, tokens = row["torch"], row["flags"]["batch"] * row["flags"]["micro"] * row["flags"]["sequence-len"]
        full = 1e3 * tokens / torch["tok_s"] if torch else row["ours"]["step_ms"]
        theirs = dict(torch=full - torch["optimizer_ms"], torch_optimiser=torch["optimizer_ms"]) if torch else {}
        for shift, parts in (-0.2, stack(row)), (0.2, theirs):
            bottom, pieces = 0.0, []
            for key, ms in parts.items():
                pieces.append((key, bottom, bottom + 100 * ms / full))
                bottom = pieces[-1][2]
            yield number + (shift if torch else 0), pieces, f"{sum(parts.values()):.0f} ms" if parts else ""


def panel(rows, threads):
    """gnuplot's commands for one thread count."""
    mine = [row for row in rows if row["threads"] == threads]
    of = "PyTorch's step" if mine[0]["torch"] else "the step"
    lines = [f'set title "{threads} thread{"s" * (threads > 1)}"', f'set ylabel "% of {of}"', "unset label",
             "set xtics (" + ", ".join(f'"{row["title"]}" {i}' for i, row in enumerate(mine)) + ")",
             f"set xrange [-0.6:{len(mine) - 0.4}]"]
    boxes, top = {}, 0
    for x, pieces, label in bars(mine):
        if label:
            lines.append(f'set label "{label}" at {x},{pieces[-1][2] + 4} center')
        for key, low, high in pieces:
            boxes.setdefault(key, []).append(f"{x} {(low + high) / 2} {x - 0.18} {x + 0.18} {low} {high}")
            top = max(top, high)
    lines.append(f"set yrange [0:{1.15 * top}]")
    names = {"torch": "PyTorch: forward and backward", "torch_optimiser": "PyTorch: optimiser", **TITLES}
    for key, data in boxes.items():
        lines += [f"${key} << EOD", *data, "EOD"]
    style = "using 1:2:3:4:5:6 with boxxyerror fillcolor rgb"
    plots = [f'${key} {style} "{COLOURS[key]}" title "{names.get(key, key)}"' for key in boxes]
    return "\n".join(lines + ["plot " + ", ".join(plots)])


def draw(rows, path):
    counts = list(dict.fromkeys(row["threads"] for row in rows))
    script = [f'set terminal pngcairo size 1600,{480 * len(counts)} font "sans,11"', f'set output "{path}"',
              "set style fill solid 1.0 noborder", "set key outside right top", "set grid ytics", "set xtics scale 0",
              "set border 3", "set tics nomirror", f"set multiplot layout {len(counts)},1"]
    script += [panel(rows, threads) for threads in counts] + ["unset multiplot"]
    common.plot(script)


# --- main ------------------------------------------------------------------------------------------------------------

def find_torch(args):
    """What PyTorch is, and MiB of a process that imports it; or why it is left out: then args.torch_speed is None."""
    if args.quick:
        reason = "by --quick"
    elif not args.torch_speed.is_file():
        reason = f"there is no file {args.torch_speed}"
    else:
        program = "import json, torch; print(json.dumps(dict(version=torch.__version__)))"
        try:
            probe = run_child([args.python, "-c", program], args.cpus)
            return f"{probe['version']}, compiled", probe["process_peak_mib"]
        except OSError:
            reason = f"{args.python} has no torch"
    args.torch_speed = None
    return f"not measured, {reason}", 0


def save(result, out):
    for name, text in ("speed.json", json.dumps(result, indent=1)), ("speed.md", markdown(result)):
        aside = out / (name + ".tmp")
        aside.write_text(text + "\n")
        aside.replace(out / name)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--build", type=Path, default=common.ROOT / "build", help="build folder (default: build)")
    add("--out", type=Path, default=common.ROOT / "runs" / "speed", help="where results go (default: runs/speed)")
    add("--python", default=sys.executable, help="a Python with torch (default: the one that runs this)")
    add("--torch-speed", type=Path, default=common.ROOT.parent / "shared" / "reference" / "torch_speed.py",
        help="PyTorch's trainer (default: ../shared/reference/torch_speed.py beside the repository)")
    add("--rounds", type=int, default=3, help="runs of each trainer (default 3)")
    add("--reps", type=int, default=3, help="steps per run, after one that warms up (default 3)")
    add("--threads", default="1,2", help="thread counts (default 1,2)")
    add("--only", default="", help="configurations whose name contains this")
    add("--quick", action="store_true", help="two tiny configurations, once, without PyTorch: does everything work?")
    args = parser.parse_args()
    args.threads = [int(word) for word in args.threads.split(",")]
    args.cpus = sorted(os.sched_getaffinity(0))
    args.configurations = [c for c in (QUICK if args.quick else CONFIGURATIONS) if args.only in c["title"]]
    if args.quick:
        args.rounds = args.reps = 1
    if not (args.build / "experiments" / "bench_step").is_file():
        parser.error(f"there is no {args.build / 'experiments' / 'bench_step'}: run tools/setup, or give --build")
    if not args.configurations:
        parser.error("--only \"%s\" names none of: %s" % (args.only, "; ".join(c["title"] for c in CONFIGURATIONS)))
    args.threads = [n for n in args.threads if n <= len(args.cpus)]
    if not args.threads or args.rounds < 1 or args.reps < 1:
        parser.error(f"--threads must name a count of at most {len(args.cpus)}, --rounds and --reps at least 1")
    return args


def main():
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    torch, torch_import = find_torch(args)
    print(f"PyTorch: {torch}", file=sys.stderr)
    start = os.getloadavg()[0]
    result = dict(machine=machine(), torch=torch, torch_import_mib=torch_import, rounds=args.rounds, reps=args.reps,
                  rows=[], ranks={}, bf16=measure_bf16(args))
    for config in args.configurations:
        for threads in args.threads:
            row = measure(args, config, threads)
            check_profile(row)
            row.update(stack_ms=stack(row), roofline=list(operation_rows(row)))
            result["rows"].append(row)
        result["ranks"][config["title"]] = measure_ranks(args, config)
        result["load"] = f"{start:.1f}, {os.getloadavg()[0]:.1f}"
        save(result, args.out)
    draw(result["rows"], args.out / "speed.png")
    print(markdown(result))


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error}")
