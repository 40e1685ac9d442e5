#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Does --net slow a run down as a real network with that delay and bandwidth does?

    tools/setup
    experiments/netlab/run.py --netlab ../shared/netlab/netlab

Runs the same pipeline of 4 ranks over networks of several delays and bandwidths, three times each: between four network
namespaces whose packets a router really delays (netlab; needs root and /dev/net/tun), with TCP and MPI as they come and
again without what they add on their own, and on one machine with --net. Computing is emulated (--emulate-compute), so
that other work on the machine does not decide; everything that is sent is real. At the end a real training on one of the
networks, both ways: the weights must be the same bit for bit.

On a busy machine `nice -n -10` in front keeps other work out of the figures.

Duration: about 15 minutes, most of it spent waiting for packets; about a minute with --quick (two networks, --sync
exact, no untuned TCP). Writes into --out (default runs/netlab; earlier files are replaced): netlab.md, the table, also on
standard output; netlab.json; netlab.png.

What to expect: the emulated step within about 10 % of the tuned real one, but for loss (TCP slows down, --net does not)
and jitter; TCP as it comes slower than both, the more so the longer the round trip.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

RANKS = 4
HOSTS = [f"fh{i}" for i in range(RANKS)]
GOODPUT = 1448 / 1538  # payload in a full frame: netlab's rate counts frames, --net's messages

# One-way milliseconds, their jitter, Mbit/s, loss in percent: netlab's order.
NETWORKS = [(1, 0, 1000, 0), (10, 0, 1000, 0), (40, 0, 1000, 0), (10, 0, 100, 0), (10, 0, 20, 0),
            (20, 10, 1000, 0), (10, 0, 1000, 0.1)]
QUICK = [(10, 0, 1000, 0), (10, 0, 20, 0)]
STEPS = {"exact": 52, "stale:8": 84}
SKIPPED = 20  # steps before the steady state: TCP's windows open, the pipeline fills
BLOCK = 4     # the figure is the median of blocks of steps: other work on the machine disturbs some of them
COMPUTE = ["--emulate-compute", "forward=2ms,backward=4ms"]
UNTUNED, TUNED, EMULATED = "real, TCP and MPI as they come", "real, tuned", "emulated"
TUNING = {"tcp_slow_start_after_idle": "0", "tcp_congestion_control": "reno"}
EAGER = {"btl_tcp_eager_limit": "1048576", "btl_tcp_rndv_eager_limit": "1048576"}  # MPI sends without asking first


def flags(options, sync, out):
    return ["--stages", "1,1,1,1", "--n-embd", "64", "--n-head", "2", "--sequence-len", "64", "--vocab-size", "256",
            "--device-batch-size", "4", "--total-batch-size", "1024", "--warmup-steps", "2", "--threads", "1",
            "--sync", sync, "--transport", options.transport, "--data", str(options.out / "tokens.bin"), "--out", str(out)]


def environment(options):
    return {**common.mpi_environment(), "OPENBLAS_NUM_THREADS": "1", "NETLAB_DIR": str(options.out / "lab")}


def call(words, options, more={}, timeout=600):
    done = subprocess.run([str(w) for w in words], env={**environment(options), **more}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(w) for w in words)}\nended with status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def lab_up(options, network, tuned):
    words = [str(w) for w in (options.netlab, "up", *network)]
    with open(options.out / "lab.log", "w") as log:  # the router keeps it open
        subprocess.run(words, env=environment(options), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    for host in HOSTS if tuned else []:
        for name, value in TUNING.items():
            call(["ip", "netns", "exec", host, "sysctl", "-qw", f"net.ipv4.{name}={value}"], options)


def run_in_lab(options, network, words, tuned):
    eager = [word for name, value in EAGER.items() if tuned for word in ("--mca", name, value)]
    lab_up(options, network, tuned)
    try:
        call([options.netlab, "mpirun", *eager, "-x", "OPENBLAS_NUM_THREADS", "--host",
              ",".join(HOSTS), "-n", RANKS, options.program, *words], options)
    finally:
        call([options.netlab, "down"], options)


def rules(network):
    delay, jitter, rate, loss = network
    text = f"*:delay={delay}ms,bw={rate * GOODPUT:.6g}Mbit"
    return text + (f",jitter={jitter}ms" if jitter else "") + (f",loss={loss}%" if loss else "")


def run(options, network, how, words):
    shutil.rmtree(options.out / "run", ignore_errors=True)
    if how == EMULATED:
        call([options.program, "--ranks", RANKS, "--net", rules(network), *words], options,
             {f"OMPI_MCA_{name}": value for name, value in EAGER.items()})
    else:
        run_in_lab(options, network, words, how == TUNED)


def measure(options, network, sync, how):
    """Seconds of a step, by rank 0's clock."""
    out = options.out / "run"
    count = 32 if options.quick else STEPS[sync]
    run(options, network, how, [*flags(options, sync, out), "--num-iterations", count, *COMPUTE])
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    walls = [step["accounts"][0]["wall"] for step in steps if "step" in step][SKIPPED:]
    blocks = [sum(walls[i:i + BLOCK]) / BLOCK for i in range(0, len(walls), BLOCK)]
    return dict(network=network, sync=sync, how=how, step=statistics.median(blocks), walls=walls)


def check_weights(options):
    out, weights = options.out / "run", set()
    for how in (TUNED, EMULATED):
        run(options, QUICK[0], how, [*flags(options, "exact", out), "--num-iterations", 6, "--export", out / "final"])
        weights.add((out / "final").read_bytes())
    if len(weights) != 1:
        sys.exit("the weights differ between the real network and the emulated one")


def name_of(network):
    delay, jitter, rate, loss = network
    speed = f"{rate // 1000} Gbit" if rate >= 1000 else f"{rate} Mbit"
    return f"{delay} ms" + (f" +- {jitter}" if jitter else "") + f", {speed}" + (f", loss {loss} %" if loss else "")


def rows_of(results):
    rows = {}
    for r in results:
        rows.setdefault((r["sync"], tuple(r["network"])), {})[r["how"]] = 1e3 * r["step"]
    return rows


def write_table(options, results):
    lines = ["| --sync | one way | real, TCP and MPI as they come | real, tuned | emulated | emulated / tuned |",
             "|---|---|---|---|---|---|"]
    for (sync, network), t in rows_of(results).items():
        cells = [f"{t[how]:.1f} ms" if how in t else "" for how in (UNTUNED, TUNED, EMULATED)]
        ratio = f"{t[EMULATED] / t[TUNED]:.3f}" if TUNED in t and EMULATED in t else ""
        lines.append(f"| {sync} | {name_of(network)} | {' | '.join(cells)} | {ratio} |")
    text = "\n".join(lines) + "\n"
    (options.out / "netlab.md").write_text(text)
    return text


def draw(options, results):
    rows = rows_of(results)
    columns = [f'using 2:xtic(1) title "{UNTUNED}" linecolor "#d9d9d9"', f'using 3:xtic(1) title "{TUNED}" linecolor "#3b6fb6"',
               f'using 4:xtic(1) title "{EMULATED} (--net)" linecolor "#e08214"']
    shown = ", ".join(f'"{options.out}/netlab.dat" {c}' for c in columns[1 if options.quick else 0:])
    data = options.out / "netlab.dat"
    data.write_text("".join(f'"{sync}, {name_of(network)}" {t.get(UNTUNED, "NaN")} {t.get(TUNED, "NaN")} '
                            f'{t.get(EMULATED, "NaN")}\n' for (sync, network), t in rows.items()))
    script = f"""
set terminal pngcairo size 1300,750 font "Sans,11" noenhanced
set output "{options.out}/netlab.png"
set title "Time of a training step on 4 ranks: really delayed packets and --net"
set style data histogram
set style histogram clustered gap 1
set style fill solid 0.9 border -1
set logscale y
set yrange [1:]
set ylabel "milliseconds per step (compute emulated)"
set xtics rotate by -40
set grid y
set key top left
set rmargin 14
set bmargin 12
plot {shown}
"""
    common.plot([script])


def check_lab(options):
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists() or not options.netlab or not options.netlab.exists():
        print("netlab needs root, /dev/net/tun and --netlab FILE, its script")
        sys.exit(77)
    if Path("/run/netns/fh0").exists():
        sys.exit(f"the namespace fh0 is there already: somebody else's, or left over ({options.netlab} down)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--netlab", type=Path, default=common.ROOT.parent / "shared" / "netlab" / "netlab")
    parser.add_argument("--program", type=Path, default=common.ROOT / "build" / "poe-pipe")
    parser.add_argument("--transport", default="mpi")
    parser.add_argument("--out", type=Path, default=common.ROOT / "runs" / "netlab")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    check_lab(options)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    common.write_tokens(options.out / "tokens.bin", 256)
    results = []
    for sync in ["exact"] if options.quick else STEPS:
        for network in QUICK if options.quick else NETWORKS:
            for how in (TUNED, EMULATED) if options.quick else (UNTUNED, TUNED, EMULATED):
                results.append(measure(options, network, sync, how))
                print(f"{sync}, {name_of(network)}, {how}: {1e3 * results[-1]['step']:.1f} ms", flush=True)
    check_weights(options)
    (options.out / "netlab.json").write_text(json.dumps(results))
    print("\n" + write_table(options, results))
    draw(options, results)
    print(f"a real training has the same weights both ways, bit for bit\npicture  {options.out}/netlab.png")


if __name__ == "__main__":
    main()
