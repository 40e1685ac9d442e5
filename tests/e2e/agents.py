# SPDX-License-Identifier: MIT
"""Ranks as agents with keepers and stage processes: undisturbed, interrupted, and losing one of the three."""
import os
import signal
import time

import poe

RUN = {'stages': '1,1,1', 'sync': 'stale:2', 'num_iterations': 100000}


def start(out, data, launch=poe.RANKS, **changes):
    """A run in the background that trains."""
    run = poe.Background(poe.flags(data=data, out=out, **{**RUN, **changes}), launch, 3)
    try:
        poe.wait_until('20 steps', lambda: poe.lines(out) >= 20 or run.process.poll() is not None)
        poe.check(run.process.poll() is None, f'ended too soon: {run.said()}')
    except AssertionError:
        run.__exit__()
        raise
    return run


def all_gone(pids, within=1):
    poe.wait_until('the end of all processes', lambda: not any(poe.alive(p) for p in pids), within)


def files_below(folder):
    return sorted(os.path.relpath(os.path.join(d, f), folder) for d, _, files in os.walk(folder) for f in files)


def undisturbed(folder):
    """The same files as without agents, byte for byte."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in (poe.RANKS, poe.MPIEXEC):
        outs = {agents: f'{folder}/{launch}-{agents}' for agents in ('on', 'off')}
        for agents, out in outs.items():
            poe.succeed(poe.flags(data=data, out=out, agents=agents, save_every=3, export=f'{out}/final.safetensors'),
                        launch, 3)
        poe.check_equal(poe.steps(outs['on']), poe.steps(outs['off']), 'metrics')
        poe.check_same_file(*(f'{out}/final.safetensors' for out in outs.values()))
        names = [f for f in files_below(f'{outs["on"]}/checkpoints') if f.endswith('.h5')]
        poe.check(len(names) >= 6, names)
        for name in names:
            poe.check_same_file(*(f'{out}/checkpoints/{name}' for out in outs.values()))


def processes(folder):
    """Three processes a rank, and only the stage process holds the model."""
    with start(f'{folder}/out', poe.write_tokens(f'{folder}/tokens.bin')) as run:
        agents, keepers, stages = run.rank_pids(3), run.named('poe-keeper', 3), run.named('poe-stage', 3)
        for rank in range(3):
            poe.check_equal(poe.children(agents[rank]), [keepers[rank]], 'children of an agent')
            poe.check_equal(poe.children(keepers[rank]), [stages[rank]], 'children of a keeper')


def interrupted(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = f'{folder}/{code}'
        with start(out, data) as run:
            pids = run.family()
            run.process.send_signal(number)
            result = run.wait()
            all_gone(pids)
        poe.check_refused(result, code, lines=0)
        poe.check_equal(poe.checkpoints(out), [f'step-{len(poe.steps(out)):08d}'], 'checkpoints')
        poe.check(not poe.leftovers(out), poe.leftovers(out))


def at_once(folder):
    """A second signal, and the SIGTERM of a bare mpiexec: a stage process has the time to tidy up, and no more."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in (poe.RANKS, poe.MPIEXEC):
        out = f'{folder}/{launch}'
        with start(out, data, launch, save_every=1) as run:
            pids = run.family()
            run.process.send_signal(signal.SIGINT)
            if launch == poe.RANKS:
                run.process.send_signal(signal.SIGTERM)
            result = run.wait()
            all_gone(pids)
        poe.check(result.code != 0 and len(result.lines) <= 1, result)
        poe.check(not poe.leftovers(out), poe.leftovers(out))
        poe.succeed(['inspect', f'{out}/checkpoints/{poe.checkpoints(out)[-1]}'])


def killed(folder):
    """mpiexec, an agent or a keeper is gone: so is the job, all of it."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    with start(f'{folder}/mpiexec', data, poe.MPIEXEC) as run:
        pids = run.family()
        run.process.send_signal(signal.SIGKILL)
        run.wait()
        all_gone(pids)
    with start(f'{folder}/agent', data) as run:
        pids = run.family()
        os.kill(run.rank_pids(3)[1], signal.SIGKILL)
        poe.check_refused(run.wait(), 137, 'a rank was ended by signal 9')
        all_gone(pids)
    with start(f'{folder}/keeper', data) as run:
        pids = run.family()
        os.kill(run.named('poe-keeper', 3)[2], signal.SIGKILL)
        poe.check_refused(run.wait(), 1, 'rank 2: its keeper', 'signal 9 (Killed)')
        all_gone(pids)


def killed_before_training(folder):
    """A stage process without a snapshot cannot be started again."""
    text = f'{folder}/text.txt'
    poe.write_text(text, documents=20000)
    with poe.Background(poe.flags(data=text, out=f'{folder}/out', vocab_size=2000, stages='1,1,1'), poe.RANKS, 3) as run:
        poe.wait_until('stage processes', lambda: run.has('poe-stage', 3) or run.process.poll() is not None)
        pids = run.family()
        os.kill(run.named('poe-stage', 3)[1], signal.SIGKILL)
        result = run.wait()
        all_gone(pids)
    poe.check_refused(result, 1, 'rank 1: its stage process was ended by signal 9 (Killed) before training began')


def report(folder):
    with start(f'{folder}/out', poe.write_tokens(f'{folder}/tokens.bin')) as run:
        run.process.send_signal(signal.SIGUSR2)
        poe.wait_until('three lines', lambda: len(run.said().splitlines()) >= 3, 5)
        for rank in range(3):
            poe.check(f'rank {rank}: ' in run.said() and 'step' in run.said(), run.said())


def killed_while_saving(folder):
    """Nobody is left of the rank but its keeper, which removes what was being written."""
    data, out = poe.write_tokens(f'{folder}/tokens.bin'), f'{folder}/out'
    for part in range(4):
        result = poe.run(poe.flags(data=data, out=f'{out}-{part}', save_every=3,
                                   fault=f'kill-agent rank=0 step=3 phase=checkpoint micro={part}'), poe.RANKS, 3)
        poe.check(result.code == 137, result)
        poe.wait_until('an empty folder', lambda: not poe.leftovers(f'{out}-{part}'), 3)


def silent(folder):
    """A rank whose host gives no sign for longer than connections are kept without one: they are made anew, and nothing is lost."""
    data, export = poe.write_tokens(f'{folder}/tokens.bin'), f'{folder}/final.safetensors'
    changes = {'num_iterations': 300, 'deadline': 60, 'export': export}
    poe.succeed(poe.flags(data=data, **{**RUN, **changes, 'export': f'{folder}/whole.safetensors', 'out': f'{folder}/whole'}), poe.RANKS, 3)
    with start(f'{folder}/out', data, **changes) as run:
        agent = run.rank_pids(3)[1]
        poe.kill(agent, signal.SIGSTOP)
        time.sleep(12)
        poe.kill(agent, signal.SIGCONT)
        result = run.wait()
        poe.check(result.code == 0 and 'broke and was made anew' in result.err, result)
    poe.check_same_file(f'{folder}/whole.safetensors', export)


def refused(folder):
    for args, launch, word in ((['--transport', 'mpi'], poe.RANKS, '--transport mpi'),
                               (['--transport', 'inproc'], poe.THREADS, '--transport inproc'),
                               (['--trace', f'{folder}/t.json'], poe.RANKS, '--trace'),
                               ([], poe.THREADS, 'this is the only one')):
        poe.check_refused(poe.run(poe.flags(agents='on') + args, launch, 3), 2, '--agents on', word)


poe.main(undisturbed, processes, interrupted, at_once, killed, killed_before_training, killed_while_saving, report, silent, refused)
