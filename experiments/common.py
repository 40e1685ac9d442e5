# SPDX-License-Identifier: MIT
"""What experiments share: starting a run and reading its accounts, asking `poe-pipe plan` what it should be, drawing, and
keeping finished points, so that an experiment that was cut off goes on where it was."""
import array
import concurrent.futures
import json
import os
import platform
import random
import shlex
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUSY = ("forward", "backward", "optimizer")


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} processors"


def mpi_environment():
    """This process's, with what mpi.env exports: for what is started by mpiexec itself."""
    exported = [line[len("export "):].strip() for line in (ROOT / "mpi.env").read_text().splitlines() if line.startswith("export ")]
    return {**os.environ, **dict(line.split("=", 1) for line in exported if "=" in line)}


def write_tokens(path, vocabulary, count=60000):
    rng = random.Random(1)
    tokens = array.array("H", (rng.randrange(vocabulary) for _ in range(count)))
    path.write_bytes(struct.pack("<256i", 20240520, 1, count, *[0] * 253) + tokens.tobytes())


def command(words):
    return " ".join(shlex.quote(str(word)) for word in words)


def call(words, timeout):
    """Standard output; SystemExit with the command and what it said when it fails. One thread per rank's products."""
    done = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, errors="replace", timeout=timeout,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{command(words)}\nended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def metrics(words, timeout=600, realtime=False):
    """Runs poe-pipe with these words and a folder of its own; every object of its metrics. realtime: before everything else
    on the machine, for ranks that only sleep (needs root)."""
    with tempfile.TemporaryDirectory() as folder:
        call([*(["chrt", "--rr", "1"] if realtime else []), *words, "--out", f"{folder}/run"], timeout)
        return [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]


def run(words, timeout=600, realtime=False):
    """The steps of such a run, each with its accounts."""
    return [step for step in metrics(words, timeout, realtime) if "dt" in step]


def plan(words):
    """What `poe-pipe plan --json` says of a run with these words after the program's name."""
    return json.loads(call([words[0], "plan", "--json", *words[1:]], 120))


def planned_case(plan, name):
    """The case of that name; "streaming" is left out of a plan that was asked with that very rule."""
    found = [case for case in plan["cases"] if case["name"] == name]
    return found[0] if found else plan["cases"][0]


def steady(steps):
    """Of these steps together: seconds per step of the rank that takes longest, the share of time in which ranks did not
    compute, every account's share, and per rank the seconds per step in each account."""
    ranks = range(len(steps[0]["accounts"]))
    names = [name for name in steps[0]["accounts"][0] if name != "wall"]
    each = [{name: sum(step["accounts"][r][name] for step in steps) / len(steps) for name in [*names, "wall"]} for r in ranks]
    wall = sum(rank["wall"] for rank in each)
    shares = {name: sum(rank[name] for rank in each) / wall for name in names}
    return dict(step=max(rank["wall"] for rank in each), idle=1 - sum(shares[name] for name in BUSY), shares=shares, ranks=each)


def plot(script):
    """These lines by gnuplot; an experiment without it has no picture, and all else."""
    try:
        subprocess.run(["gnuplot"], input="\n".join(script) + "\n", text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no picture: {error}", file=sys.stderr)


class Points:
    """Measured points by name, kept in a JSON file from the moment each is finished."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        self.results = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, name):
        return self.results[name]

    def put(self, name, result):
        with self.lock:
            self.results[name] = result
            aside = self.path.with_suffix(".tmp")
            aside.write_text(json.dumps(self.results, indent=1) + "\n")
            aside.replace(self.path)

    def measure(self, points, function, workers):
        """Calls function(point), which returns a dictionary, for each point {name, ...} that is not there, several at
        once. Points that were measured otherwise (their dictionaries differ) are measured again."""
        wanted = json.loads(json.dumps(points))
        missing = [p for p in wanted if self.results.get(p["name"], {}).get("point") != p]
        print(f"{len(points)} points, {len(points) - len(missing)} of them there already", file=sys.stderr, flush=True)

        def finish(point):
            result = function(point)
            self.put(point["name"], dict(result, point=point))
            return point["name"], result

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(finish, point) for point in missing]
            try:
                for done in concurrent.futures.as_completed(waiting):
                    name, result = done.result()
                    print(f"{name}: {result['summary']}", file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
