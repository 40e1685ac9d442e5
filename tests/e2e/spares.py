# SPDX-License-Identifier: MIT
"""Spare agents: a stage moves to one when its own is asked to go, and the run goes on, to the same bits."""
import os
import re
import signal

import poe

LONG = {'num_iterations': 150, 'head': 'ps', 'snapshot_every': 7, 'save_every': 60, 'eval_every': 50,
        'eval_tokens': 512, 'val_data': None}


def settings(out, data, spares=1, **changes):
    return poe.flags(data=data, out=out, spares=spares or None,
                     **{'export': f'{out}/final.safetensors', **LONG, **changes})


def undisturbed(out, data, **changes):
    poe.succeed(settings(out, data, 0, **changes))
    return out


def ask_to_leave(run, rank, size=3):
    os.kill(run.named('poe-agent', size)[rank], signal.SIGTERM)


def arrived(run, rank):
    said = f'rank {rank}: here after'
    poe.wait_until(said, lambda: said in run.said() or run.process.poll() is not None, 60)
    poe.check(run.process.poll() is None, f'ended too soon: {run.said()}')


def check_same(out, whole):
    poe.check_equal(poe.steps(out), poe.steps(whole), 'losses')
    poe.check_equal(poe.evaluations(out), poe.evaluations(whole), 'evaluations')
    poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')
    poe.check_equal(poe.checkpoints(out), poe.checkpoints(whole), 'checkpoints')
    poe.check(not poe.leftovers(out), f'left over: {poe.leftovers(out)}')


def idle(folder):
    """A spare that nobody needs changes nothing, and says nothing."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    changes = {'num_iterations': 30, 'save_every': 10, 'eval_every': 10}
    whole = undisturbed(f'{folder}/whole', data, **changes)
    for launch in (poe.RANKS, poe.MPIEXEC):
        out = f'{folder}/{launch}'
        poe.succeed(settings(out, data, **changes), launch, 4)
        check_same(out, whole)


def one_moves(folder):
    """Every rank in turn: a line for the leave, a line for the arrival, and the same weights."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = undisturbed(f'{folder}/whole', data)
    for rank in range(3):
        out = f'{folder}/rank-{rank}'
        with poe.Background(settings(out, data), poe.MPIEXEC if rank == 1 else poe.RANKS, 4) as run:
            poe.wait_for_lines(run, out, 20 + 10 * rank)
            keeper = run.named('poe-keeper', 3)[rank]
            ask_to_leave(run, rank)
            arrived(run, rank)
            poe.wait_until('the end of what has moved', lambda: not poe.alive(keeper))
            poe.check(run.find('poe-left', 3)[rank], 'the agent that left')
            result = run.wait(120)
        poe.check_equal(result.code, 0, result)
        poe.check_equal(len(result.lines), 2, result)
        poe.check(f'rank {rank}: leaves: its stage moves to spare agent 3' in result.lines[0], result)
        poe.check(re.search(rf'rank {rank}: here after [0-9.]+ s: its stage goes on with step', result.lines[1]), result)
        check_same(out, whole)


def rules(folder):
    """Sums under way, late and held; gradients that flow back; rounded messages."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for number, rule in enumerate(({'sync': 'stale:3', 'wire': 'bf16'}, {'objective': 'bp', 'head': 'sh', 'schedule': '1f1b'},
                                   {'recover': 'skip', 'sync': 'every:4'})):
        out, whole = f'{folder}/{number}', undisturbed(f'{folder}/whole-{number}', data, **rule)
        with poe.Background(settings(out, data, **rule), poe.RANKS, 4) as run:
            poe.wait_for_lines(run, out, 20)
            ask_to_leave(run, number)
            result = run.wait(120)
        poe.check_equal(result.code, 0, result)
        poe.check('here after' in result.err, result)
        check_same(out, whole)


def all_move(folder):
    """All stages at once, one after the other, to as many spares; what has moved dies, and recovers; then one of them
    moves again."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole, out = undisturbed(f'{folder}/whole', data, num_iterations=300), f'{folder}/out'
    with poe.Background(settings(out, data, 4, num_iterations=300), poe.RANKS, 7) as run:
        poe.wait_for_lines(run, out, 20)
        for agent in run.named('poe-agent', 3):
            os.kill(agent, signal.SIGTERM)
        for rank in range(3):
            arrived(run, rank)
        for rank, stage in enumerate(run.named('poe-stage', 3)):
            poe.wait_for_lines(run, out, poe.lines(out) + 5)
            poe.kill(stage, signal.SIGKILL)
        poe.wait_until('three to be back', lambda: run.said().count('back after') == 3 or run.process.poll() is not None, 60)
        ask_to_leave(run, 1)
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    poe.check_equal(result.err.count('leaves: its stage moves'), 4, result)
    poe.check_equal(result.err.count('here after'), 4, result)
    check_same(out, whole)


def stopped_after(folder):
    """Without a free spare SIGTERM stops the run as ever; it is resumed to the same weights, without spares."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole, out = undisturbed(f'{folder}/whole', data, num_iterations=800), f'{folder}/out'
    with poe.Background(settings(out, data, num_iterations=800), poe.RANKS, 4) as run:
        poe.wait_for_lines(run, out, 20)
        ask_to_leave(run, 0)
        arrived(run, 0)
        poe.wait_until('the agent that left', lambda: run.has('poe-left', 1))
        os.kill(run.named('poe-left', 1)[0], signal.SIGTERM)
        poe.wait_until('a word', lambda: 'no stage that could move' in run.said() or run.process.poll() is not None)
        ask_to_leave(run, 2)
        result = run.wait()
    poe.check(result.code in (130, 143), result)
    poe.check(poe.checkpoints(out), 'no checkpoint')
    result = poe.run(['--resume', 'latest', '--out', out, '--export', f'{out}/final.safetensors'], poe.RANKS, 3)
    poe.check_equal(result.code, 0, result)
    poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')


def interrupted_after(folder):
    """Ctrl-C after a move: the run stops as ever."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    out = f'{folder}/out'
    with poe.Background(settings(out, data, num_iterations=800), poe.RANKS, 4) as run:
        poe.wait_for_lines(run, out, 20)
        ask_to_leave(run, 0)
        arrived(run, 0)
        run.process.send_signal(signal.SIGINT)
        result = run.wait()
    poe.check_equal(result.code, 130, result)
    poe.check(poe.checkpoints(out), 'no checkpoint')


def given_up(folder):
    """An agent that does not answer, the spare itself, keeps the stage where it is; once it does, the stage moves."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole, out = undisturbed(f'{folder}/whole', data, num_iterations=600), f'{folder}/out'
    with poe.Background(settings(out, data, num_iterations=600, deadline=20), poe.RANKS, 4) as run:
        poe.wait_for_lines(run, out, 10)
        spare = next(pid for pid in run.family() if poe.process_name(pid) == 'poe-spare 3')
        os.kill(spare, signal.SIGSTOP)
        ask_to_leave(run, 1)
        poe.wait_until('a word', lambda: 'stays: an agent does not answer' in run.said())
        poe.wait_for_lines(run, out, poe.lines(out) + 10)
        os.kill(spare, signal.SIGCONT)
        ask_to_leave(run, 1)
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    poe.check_equal(len(result.lines), 4, result)
    poe.check('here after' in result.lines[3], result)
    check_same(out, whole)


def lost(folder):
    """What is not planned ends the job, be it a spare, an agent that has taken over, or one that has left."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for name in ('poe-spare 3', 'poe-agent 1', 'poe-left 1'):
        out = f'{folder}/{name[4:].replace(" ", "-")}'
        with poe.Background(settings(out, data, num_iterations=2000), poe.RANKS, 4) as run:
            poe.wait_for_lines(run, out, 10)
            if name != 'poe-spare 3':
                ask_to_leave(run, 1)
                arrived(run, 1)
            poe.wait_until(name, lambda: any(poe.process_name(pid) == name for pid in run.family()))
            pids = run.family()
            os.kill(next(pid for pid in pids if poe.process_name(pid) == name), signal.SIGKILL)
            result = run.wait()
            poe.wait_until('all gone', lambda: not any(poe.alive(pid) for pid in pids if pid != run.pid))
        poe.check_equal(result.code, 137, result)


def refused(folder):
    for args, launch, ranks, words in (
            (['--agents', 'off'], poe.RANKS, 4, ('--spares', '--agents off')),
            (['--transport', 'mpi'], poe.RANKS, 4, ('--spares', '--transport mpi')),
            (['--trace', f'{folder}/t.json'], poe.RANKS, 4, ('--spares', '--trace')),
            (['--net', '0-1:rtt=10ms'], poe.RANKS, 4, ('--spares and --net',)),
            ([], poe.RANKS, 3, ('--ranks: found 3', '--spares 1', '(4)')),
            ([], poe.RANKS, 5, ('--ranks: found 5', '--spares 1', '(4)')),
            ([], poe.MPIEXEC, 3, ('--spares is 1', '3 ranks were started', 'mpiexec -n 4')),
            ([], poe.THREADS, 1, ('--spares', 'this is the only one'))):
        poe.check_refused(poe.run(poe.flags(spares=1) + args, launch, ranks), 2, *words)
    ddp = poe.flags(spares=1, stages='3', objective='bp', schedule='ddp')
    poe.check_refused(poe.run(ddp, poe.RANKS, 2), 2, '--spares', '--schedule ddp')
    poe.check_refused(poe.run(poe.flags(spares=-1), poe.RANKS, 4), 2, '--spares')


poe.main(idle, one_moves, rules, all_move, stopped_after, interrupted_after, given_up, lost, refused)
