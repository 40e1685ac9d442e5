# SPDX-License-Identifier: MIT
"""What the end-to-end tests share: starting poe-pipe in its three forms, reading what it leaves, checking.

A test script defines functions that take a fresh folder, and ends in `poe.main(function, ...)`. They run one by one;
names given on the command line choose among them."""
import array
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = os.environ.get('POE_PIPE', os.path.join(ROOT, 'build', 'poe-pipe'))
SHARED = os.path.realpath(os.environ.get('POE_SHARED', os.path.join(ROOT, '..', 'shared')))
GOLDEN = os.path.join(SHARED, 'golden')
SKIPPED = 77

# The ways to start a run: one process whose stages are threads, `--ranks K`, and mpiexec by hand.
THREADS, RANKS, MPIEXEC = 'threads', '--ranks', 'mpiexec'
LAUNCHES = (THREADS, RANKS, MPIEXEC)


class Skip(Exception):
    """A test that cannot run here; its text says why."""


# --- starting ---------------------------------------------------------------------------------------------------------

def environment(launch):
    """mpiexec by hand needs what mpi.env exports; the other forms must do without."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMPI_', 'PMIX_', 'HWLOC_', 'PMI_', 'SLURM_'))}
    env['OPENBLAS_NUM_THREADS'] = '1'
    if launch == MPIEXEC:
        for line in open(os.path.join(ROOT, 'mpi.env')):
            if line.startswith('export ') and '=' in line:
                name, value = line[len('export '):].strip().split('=', 1)
                env[name] = value
    return env


def command(args, launch=THREADS, ranks=1):
    args = [str(a) for a in args]
    if launch == RANKS:
        return [PROGRAM, '--ranks', str(ranks)] + args
    if launch == MPIEXEC:
        return ['mpiexec', '-n', str(ranks), PROGRAM] + args
    return [PROGRAM] + args


class Result:
    def __init__(self, code, out, err, text):
        self.code, self.out, self.err, self.command = code, out, err, text
        self.lines = err.splitlines()

    def __str__(self):
        return f'{self.command}\nexit status {self.code}\n{self.out[-1500:]}{self.err[-3000:]}'


def run_command(words, launch=THREADS, timeout=120, cwd=None):
    done = subprocess.run(words, env=environment(launch), stdin=subprocess.DEVNULL, capture_output=True,
                          timeout=timeout, cwd=cwd)
    return Result(done.returncode, done.stdout.decode(errors='replace'), done.stderr.decode(errors='replace'),
                  ' '.join(words))


def run(args, launch=THREADS, ranks=1, timeout=120, cwd=None):
    return run_command(command(args, launch, ranks), launch, timeout, cwd)


def succeed(args, launch=THREADS, ranks=1, **kw):
    """Runs what has to succeed without a word on standard error."""
    result = run(args, launch, ranks, **kw)
    check(result.code == 0 and not result.err, result)
    return result


class Background:
    """A run that goes on while the test looks and signals."""

    def __init__(self, args, launch=THREADS, ranks=1):
        self.words = command(args, launch, ranks)
        self.err = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.words, env=environment(launch), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=self.err, start_new_session=True)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for pid in self.family():
            kill(pid, signal.SIGKILL)
        self.process.wait()
        self.err.close()

    def family(self):
        return descendants(self.pid)

    def rank_pids(self, size):
        """Processes of poe-pipe that mpiexec started, in order of rank: agents, where there are agents."""
        ranks = {}
        for pid in self.family():
            env = process_environment(pid)
            if env.get('OMPI_COMM_WORLD_RANK') and os.path.realpath(PROGRAM) == process_program(pid):
                ranks.setdefault(int(env['OMPI_COMM_WORLD_RANK']), pid)
        check(sorted(ranks) == list(range(size)), f'ranks found: {ranks}')
        return [ranks[r] for r in range(size)]

    def find(self, name, size):
        """Processes by name ("poe-stage"), in order of rank; None where one is missing."""
        pids = {process_name(pid): pid for pid in self.family()}
        return [pids.get(f'{name} {rank}') for rank in range(size)]

    def has(self, name, size):
        return None not in self.find(name, size)

    def named(self, name, size):
        found = self.find(name, size)
        check(None not in found, f'{name}: {found}')
        return found

    def wait(self, timeout=60):
        code = self.process.wait(timeout)
        return Result(code, '', self.said(), ' '.join(self.words))

    def said(self):
        # Not read(): the processes share this file's position, and write there.
        return os.pread(self.err.fileno(), os.fstat(self.err.fileno()).st_size, 0).decode(errors='replace')


def kill(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def children(pid):
    try:
        return [int(p) for p in open(f'/proc/{pid}/task/{pid}/children').read().split()]
    except OSError:
        return []


def descendants(pid):
    """A process and all that descend from it, parents first."""
    found = [pid]
    for each in found:
        found += children(each)
    return found


def process_environment(pid):
    try:
        words = open(f'/proc/{pid}/environ', 'rb').read().decode(errors='replace').split('\0')
    except OSError:
        return {}
    return dict(w.split('=', 1) for w in words if '=' in w)


def process_name(pid):
    try:
        return open(f'/proc/{pid}/comm').read().strip()
    except OSError:
        return ''


def process_program(pid):
    try:
        return os.readlink(f'/proc/{pid}/exe')
    except OSError:
        return ''


def alive(pid):
    try:
        return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def wait_until(what, holds, timeout=30):
    end = time.monotonic() + timeout
    while not holds():
        check(time.monotonic() < end, f'waited {timeout} s in vain for: {what}')
        time.sleep(0.01)


# --- small cases ------------------------------------------------------------------------------------------------------

TINY = {'stages': '1,1,1', 'n_embd': 32, 'n_head': 2, 'sequence_len': 32, 'vocab_size': 80, 'device_batch_size': 2,
        'total_batch_size': 128, 'num_iterations': 6, 'warmup_steps': 2, 'threads': 1}


def flags(**changes):
    """The flags of the tiny run, changed: a value None leaves its flag out, True gives it without a value."""
    words = []
    for name, value in {**TINY, **changes}.items():
        if value is None:
            continue
        words.append('--' + name.replace('_', '-'))
        if value is not True:
            words.append(str(value))
    return words


def write_tokens(path, count=4000, vocab=80, seed=1):
    """An llm.c shard of tokens that a model can learn something from: a noisy cycle."""
    rng = random.Random(seed)
    tokens = array.array('H')
    for i in range(count):
        tokens.append(rng.randrange(vocab) if rng.random() < 0.3 else i * 7 % vocab)
    with open(path, 'wb') as file:
        file.write(struct.pack('<256i', 20240520, 1, count, *[0] * 253))
        file.write(tokens.tobytes())
    return path


def write_text(path, documents=60, seed=1):
    rng = random.Random(seed)
    words = 'the stage sends its activation forward and keeps a loss of own; each rank reads what came before'.split()
    with open(path, 'w') as file:
        for _ in range(documents):
            file.write(' '.join(rng.choice(words) for _ in range(rng.randrange(5, 60))) + '.\n\n')
    return path


# --- what a run leaves -------------------------------------------------------------------------------------------------

def read_json(path):
    with open(path) as file:
        return json.load(file)


def all_metrics(out):
    with open(os.path.join(out, 'metrics.jsonl')) as file:
        return [json.loads(line) for line in file]


def metrics(out):
    """The lines of metrics.jsonl without their times."""
    lines = [line for line in all_metrics(out) if 'idle' not in line]
    for line in lines:
        line.pop('dt', None)
        line.pop('accounts', None)
    return lines


def lines(out):
    """Of metrics.jsonl so far."""
    try:
        with open(f'{out}/metrics.jsonl') as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def wait_for_lines(run, out, wanted):
    wait_until(f'{wanted} lines of metrics', lambda: lines(out) >= wanted or run.process.poll() is not None, 60)
    check(run.process.poll() is None, f'ended too soon: {run.said()}')


def steps(out):
    return [m for m in metrics(out) if 'loss' in m]


def evaluations(out):
    return [m for m in metrics(out) if 'bpb' in m]


def checkpoints(out):
    folder = os.path.join(out, 'checkpoints')
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def leftovers(folder):
    """Temporary files anywhere below."""
    return [os.path.join(d, n) for d, names, files in os.walk(folder) for n in names + files
            if '.tmp' in n or n.startswith('.')]


def read_bytes(path):
    with open(path, 'rb') as file:
        return file.read()


def safetensors_header(path):
    data = read_bytes(path)
    length = struct.unpack_from('<Q', data)[0]
    header = json.loads(data[8:8 + length])
    header.pop('__metadata__', None)
    return header, data, 8 + length


def read_safetensors(path):
    """name -> (shape, array of float), of fp32 and bf16."""
    header, data, start = safetensors_header(path)
    tensors = {}
    for name, entry in header.items():
        raw = data[start + entry['data_offsets'][0]:start + entry['data_offsets'][1]]
        if entry['dtype'] == 'BF16':
            raw = b''.join(b'\0\0' + raw[i:i + 2] for i in range(0, len(raw), 2))
        tensors[name] = (entry['shape'], array.array('f', raw))
    return tensors


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, (shape, values) in tensors.items():
        header[name] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [offset, offset + 4 * len(values)]}
        offset += 4 * len(values)
    text = json.dumps(header).encode()
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for _, values in tensors.values():
            file.write(array.array('f', values).tobytes())
    return path


# --- checking ---------------------------------------------------------------------------------------------------------

def check(condition, what):
    if not condition:
        raise AssertionError(str(what))


def check_equal(got, expected, what=''):
    check(got == expected, f'{what}: got {str(got)[:700]}, expected {str(expected)[:700]}')


def check_near(got, expected, tolerance, what):
    check(abs(got - expected) <= tolerance * max(1.0, abs(expected)),
          f'{what}: got {got!r}, expected {expected!r} within {tolerance}')


def check_same_file(a, b):
    check(read_bytes(a) == read_bytes(b), f'{a} and {b} differ')


def check_tensors(path, expected_path, tolerance):
    """The norm of each tensor's difference, relative to the tensor's (a tensor of zeros: absolute)."""
    got, expected = read_safetensors(path), read_safetensors(expected_path)
    check_equal(sorted(got), sorted(expected), 'names of tensors')
    for name, (shape, values) in expected.items():
        check_equal(got[name][0], shape, name)
        difference = math.sqrt(sum((x - y) ** 2 for x, y in zip(got[name][1], values)))
        norm = math.sqrt(sum(y * y for y in values)) or 1.0
        check(difference <= tolerance * norm, f'{name}: relative difference {difference / norm:.2e} > {tolerance}')


def check_refused(result, code, *words, lines=1):
    """Exit status `code`, and nothing on standard error but `lines` lines, which contain the words."""
    check(result.code == code, f'expected exit status {code}: {result}')
    check(len(result.lines) == lines, f'expected {lines} line(s) on standard error: {result}')
    for word in words:
        check(str(word) in result.err, f'expected "{word}" in: {result}')


def golden(name):
    folder = os.path.join(GOLDEN, name)
    if not os.path.isdir(folder):
        raise Skip(f'{folder} is absent')
    return folder


def main(*tests):
    chosen = [t for t in tests if t.__name__ in sys.argv[1:]] or tests
    failed, skipped = 0, 0
    for test in chosen:
        folder, start, verdict, why = tempfile.mkdtemp(prefix='poe-e2e-'), time.monotonic(), 'ok', ''
        try:
            test(folder)
        except Skip as reason:
            verdict, why, skipped = 'skipped', f': {reason}', skipped + 1
        except (AssertionError, subprocess.TimeoutExpired, OSError, KeyError, ValueError) as error:
            verdict, why, failed = 'FAILED', f': {type(error).__name__}: {error}', failed + 1
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f'{verdict:7} {time.monotonic() - start:5.1f} s  {test.__name__}{why}', flush=True)
    sys.exit(1 if failed else SKIPPED if skipped == len(chosen) else 0)
