# SPDX-License-Identifier: MIT
"""Runs that are interrupted, killed or stopped."""
import os
import signal
import time

import poe

# Long enough to be caught in the middle; the same run, undisturbed, is what an interrupted one must come to.
LONG = {'num_iterations': 200, 'sync': 'stale:2', 'head': 'ps', 'stages': '2,1'}


def start(out, data, launch, wanted=20, ranks=2, **changes):
    """A run in the background that has done some steps."""
    run = poe.Background(poe.flags(data=data, out=out, **{**LONG, **changes}), launch, ranks)
    try:
        poe.wait_until(f'{wanted} steps', lambda: poe.lines(out) >= wanted or run.process.poll() is not None)
        poe.check(run.process.poll() is None, f'ended too soon: {run.said()}')
    except AssertionError:
        run.__exit__()
        raise
    return run


def without_tcp(result):
    """A rank that outlives its neighbour may make Open MPI's TCP say that a pipe broke; nothing keeps it from that."""
    result.lines = [line for line in result.lines if 'btl_tcp' not in line]
    return result


def all_gone(pids, within):
    end = time.monotonic() + within
    while any(poe.alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.02)
    left = [p for p in pids if poe.alive(p)]
    poe.check(not left, f'processes left after {within} s: {left}')


def check_resumed(out, whole, launch=poe.THREADS):
    result = poe.run(['--resume', out, '--save-every', 0, '--export', f'{out}/final.safetensors'], launch, 2)
    poe.check_equal(result.code, 0, result)
    poe.check_equal(poe.steps(out), poe.steps(whole), 'metrics')
    poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')


def undisturbed(folder):
    data, out = poe.write_tokens(f'{folder}/tokens.bin'), f'{folder}/whole'
    poe.succeed(poe.flags(data=data, out=out, export=f'{out}/final.safetensors', **LONG))
    return data, out


def interrupted(folder):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint, and the resumed run ends as the undisturbed one."""
    data, whole = undisturbed(folder)
    for launch in (poe.RANKS, poe.THREADS):
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            out = f'{folder}/{launch}-{code}'
            with start(out, data, launch) as run:
                pids = run.family()
                run.process.send_signal(number)
                result = run.wait()
                all_gone(pids, 1)
            poe.check_refused(result, code, lines=0)
            done = len(poe.steps(out))
            poe.check_equal(poe.checkpoints(out), [f'step-{done:08d}'], 'checkpoints')
            poe.check(done < LONG['num_iterations'] and not poe.leftovers(out), f'{done} steps, {poe.leftovers(out)}')
            check_resumed(out, whole, poe.THREADS if launch == poe.RANKS else poe.RANKS)


def second_interrupt(folder):
    """Ends at once, and what was saved before is whole."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in (poe.RANKS, poe.THREADS):
        out = f'{folder}/{launch}'
        with start(out, data, launch, save_every=10, num_iterations=100000) as run:
            pids = run.family()
            run.process.send_signal(signal.SIGINT)
            run.process.send_signal(signal.SIGTERM)
            poe.check(run.wait().code in (130, 143), 'exit status')
            all_gone(pids, 1)
        poe.check(not poe.leftovers(out), poe.leftovers(out))
        for name in poe.checkpoints(out):
            poe.succeed(['inspect', f'{out}/checkpoints/{name}'])


def bare_mpiexec(folder):
    """mpiexec gives its ranks two seconds: no temporary file or process stays, the last checkpoint is whole."""
    data, whole = undisturbed(folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        out = f'{folder}/{number}'
        with start(out, data, poe.MPIEXEC, save_every=1) as run:
            pids = run.family()
            run.process.send_signal(number)
            result = run.wait()
            all_gone(pids, 1)
        poe.check(result.code != 0 and len(result.lines) <= 1, result)
        poe.check(not poe.leftovers(out), poe.leftovers(out))
        poe.succeed(['inspect', f'{out}/checkpoints/{poe.checkpoints(out)[-1]}'])
        check_resumed(out, whole)


def killed_launcher(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    before = set(os.listdir('/dev/shm'))
    for launch in (poe.MPIEXEC, poe.RANKS):
        with start(f'{folder}/{launch}', data, launch, num_iterations=100000) as run:
            pids = run.family()
            run.process.send_signal(signal.SIGKILL)
            run.wait()
            all_gone(pids, 3 if launch == poe.RANKS else 1)
    left = [n for n in set(os.listdir('/dev/shm')) - before if 'vader' in n]
    poe.check(not left, f'left in /dev/shm: {left}')


def killed_rank(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in (poe.MPIEXEC, poe.RANKS):
        out = f'{folder}/{launch}'
        with start(out, data, launch, num_iterations=100000, save_every=10) as run:
            pids = run.family()
            os.kill(run.rank_pids(2)[1], signal.SIGKILL)
            result = run.wait()
            all_gone(pids, 1)
        said = ['a rank was ended by signal 9'] if launch == poe.RANKS else []
        poe.check_refused(without_tcp(result), 137, *said, lines=len(said))
        name = poe.checkpoints(out)[-1]
        poe.succeed(['inspect', f'{out}/checkpoints/{name}'])
        poe.succeed(['--resume', 'latest', '--out', out, '--num-iterations', int(name[5:]) + 1])
        poe.check(not poe.leftovers(out), poe.leftovers(out))


def exited_rank(folder):
    """A rank that ends by itself, as no rank of ours does."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    result = poe.run(poe.flags(data=data, out=f'{folder}/out', agents='off', fault='exit rank=1 step=2 code=3'), poe.RANKS, 3)
    poe.check_refused(without_tcp(result), 3, 'a rank has ended with exit status 3', lines=2)


def stopped_rank(folder):
    """A rank without a sign of life: the sentence says which rank, which link, which step."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch, stopped in ((poe.RANKS, 0), (poe.MPIEXEC, 1)):
        with start(f'{folder}/{launch}', data, launch, num_iterations=100000, deadline=2) as run:
            pids = run.family()
            for pid in reversed(poe.descendants(run.rank_pids(2)[stopped])):
                os.kill(pid, signal.SIGSTOP)
            begin = time.monotonic()
            result = run.wait()
            took = time.monotonic() - begin
            all_gone(pids, 1)
        poe.check_refused(without_tcp(result), 1, f'rank {stopped}', 'step', f'rank {1 - stopped}', '2')
        poe.check(1.5 < took < 6, f'it took {took:.1f} s')


def report(folder):
    """SIGUSR2: every rank says what it does."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in poe.LAUNCHES:
        with start(f'{folder}/{launch}', data, launch, num_iterations=100000) as run:
            run.process.send_signal(signal.SIGUSR2)
            poe.wait_until('two lines', lambda: len(run.said().splitlines()) >= 2, 5)
            for rank in range(2):
                poe.check(f'rank {rank}: ' in run.said() and 'step' in run.said(), run.said())


poe.main(interrupted, second_interrupt, bare_mpiexec, killed_launcher, killed_rank, exited_rank, stopped_rank, report)
