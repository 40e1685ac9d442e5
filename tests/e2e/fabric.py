# SPDX-License-Identifier: MIT
"""Runs over libfabric: the same numbers as over MPI, also when connections break under way, and how such runs end."""
import os
import re
import signal
import time

import poe

FAILURE = 1
LONG = 1000000


def train(folder, name, launch=poe.RANKS, ranks=3, **changes):
    out = f'{folder}/{name}'
    data = poe.write_tokens(f'{folder}/tokens.bin')
    result = poe.run(poe.flags(data=data, out=out, export=f'{out}/final.safetensors', **changes), launch, ranks)
    poe.check(result.code == 0, result)
    return out, result


def check_same(a, b):
    unmarked = [[{k: v for k, v in m.items() if k != 'emulated'} for m in poe.metrics(out)] for out in (a, b)]
    poe.check_equal(unmarked[1], unmarked[0], f'metrics of {b}')
    poe.check_same_file(f'{b}/final.safetensors', f'{a}/final.safetensors')


def same_numbers(folder):
    for number, changes in enumerate(({}, {'sync': 'stale:2', 'head': 'ps'})):
        expected, _ = train(folder, f'mpi{number}', transport='mpi', **changes)
        for launch in (poe.RANKS, poe.MPIEXEC):
            out, result = train(folder, f'{launch}{number}', launch, transport='fabric', interface='lo', **changes)
            poe.check(not result.err and 'over fabric' in result.out, result)
            check_same(expected, out)


def golden(folder):
    """A golden run, its weights byte for byte."""
    source = poe.golden('ps-2,1,1')
    for transport in ('mpi', 'fabric'):
        poe.succeed(['--config', f'{source}/config.json', '--data', f'{source}/tokens.bin', '--init-from',
                     f'{source}/init.safetensors', '--out', f'{folder}/{transport}', '--export',
                     f'{folder}/{transport}/final.safetensors', '--transport', transport], poe.RANKS, 3)
    check_same(f'{folder}/mpi', f'{folder}/fabric')


def cut_under_traffic(folder):
    """Every connection breaks, some several times, while messages are on their way: nothing changes but the time."""
    steps = {'num_iterations': 300, 'sync': 'stale:2'}
    expected, _ = train(folder, 'whole', transport='mpi', **steps)
    cuts = ';'.join(f'{link}:cut={when}s' for link, when in (('0-1', 0.15), ('1-2', 0.2)))
    out, result = train(folder, 'cut', transport='fabric', net=cuts, **steps)
    for pair in ('rank 0: the connection to rank 1', 'rank 1: the connection to rank 2'):
        poe.check(f'{pair} broke and was made anew after' in result.err, result)
    poe.check_equal(len(result.lines), 2, result)
    check_same(expected, out)


def start(folder, **changes):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    return poe.Background(poe.flags(data=data, out=f'{folder}/out', num_iterations=LONG, transport='fabric', **changes),
                          poe.RANKS, 3)


def is_training(folder):
    path = f'{folder}/out/metrics.jsonl'
    return os.path.exists(path) and os.path.getsize(path) > 2000


def stopped(folder):
    """Stopped for less than the deadline, a rank goes on as if nothing had been; for longer, and it ends the run."""
    with start(folder, deadline=4) as run:
        poe.wait_until('training', lambda: is_training(folder))
        rank = run.rank_pids(3)[1]
        os.kill(rank, signal.SIGSTOP)
        time.sleep(2)
        os.kill(rank, signal.SIGCONT)
        before = os.path.getsize(f'{folder}/out/metrics.jsonl')
        poe.wait_until('training again', lambda: os.path.getsize(f'{folder}/out/metrics.jsonl') > before + 2000)
        os.kill(rank, signal.SIGSTOP)
        result = run.wait()
        poe.check(result.code == FAILURE, result)
        poe.check(re.search(r'rank 1 has given no sign of life for 4', result.err), result)


def killed(folder):
    with start(folder) as run:
        poe.wait_until('training', lambda: is_training(folder))
        os.kill(run.rank_pids(3)[1], signal.SIGKILL)
        result = run.wait(20)
        poe.check(result.code not in (0, None), result)


def late_link(folder):
    """Ranks that first have to do with each other at the export, longer after the start than the deadline: neither was silent."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    args = poe.flags(data=data, out=f'{folder}/out', stages='1,1,1,1', num_iterations=50, net='*:delay=20ms', deadline=3,
                     export=f'{folder}/final.safetensors')
    result = poe.run(args, poe.RANKS, 4)
    poe.check_equal(result.code, 0, result)
    poe.check(sum(s['dt'] for s in poe.all_metrics(f'{folder}/out') if 'dt' in s) > 3, 'the run is shorter than its deadline')


poe.main(same_numbers, golden, cut_under_traffic, stopped, killed, late_link)
