# SPDX-License-Identifier: MIT
"""Stage processes die, at any instant, and the run ends with the weights of one that nothing happened to."""
import os
import random
import signal
import time

import poe

LONG = {'num_iterations': 150, 'head': 'ps', 'snapshot_every': 7, 'save_every': 60, 'eval_every': 50,
        'eval_tokens': 512, 'val_data': None}


def settings(out, data, **changes):
    return poe.flags(data=data, out=out, **{'export': f'{out}/final.safetensors', **LONG, **changes})


def undisturbed(out, data, **changes):
    poe.succeed(settings(out, data, **changes))
    return out


def stage_process(run, rank):
    """The process of a rank's stage, or None while there is none."""
    for pid in run.family():
        try:
            if open(f'/proc/{pid}/comm').read().strip() == f'poe-stage {rank}' and poe.alive(pid):
                return pid
        except OSError:
            pass
    return None


def lines(out):
    try:
        with open(f'{out}/metrics.jsonl') as file:
            return sum(1 for _ in file)
    except OSError:
        return 0


def wait_for(run, out, wanted):
    poe.wait_until(f'{wanted} lines of metrics', lambda: lines(out) >= wanted or run.process.poll() is not None)
    poe.check(run.process.poll() is None, f'ended too soon: {run.said()}')


def check_same(out, whole):
    poe.check_equal(poe.steps(out), poe.steps(whole), 'losses')
    poe.check_equal(poe.evaluations(out), poe.evaluations(whole), 'evaluations')
    poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')
    poe.check_equal(poe.checkpoints(out), poe.checkpoints(whole), 'checkpoints')
    poe.check(not poe.leftovers(out), f'left over: {poe.leftovers(out)}')


def kill_and_compare(folder, name, whole, data, kills, launch=poe.RANKS, number=signal.SIGKILL, **changes):
    """`kills`: (lines of metrics, ranks that die then)."""
    out = f'{folder}/{name}'
    with poe.Background(settings(out, data, **changes), launch, 3) as run:
        for wanted, ranks in kills:
            wait_for(run, out, wanted)
            for rank in ranks:
                poe.wait_until(f'a stage process of rank {rank}', lambda: stage_process(run, rank))
                poe.kill(stage_process(run, rank), number)
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    for rank in {r for _, ranks in kills for r in ranks}:
        poe.check(f'rank {rank}' in result.err, f'no word of rank {rank}: {result}')
    check_same(out, whole)
    return result


def one_dies(folder):
    """Every rank in turn, under both launchers: a line for the death, a line for the return, and the same weights."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = undisturbed(f'{folder}/whole', data)
    for rank in range(3):
        launch = poe.MPIEXEC if rank == 1 else poe.RANKS
        result = kill_and_compare(folder, f'rank-{rank}', whole, data, [(20 + 10 * rank, [rank])], launch)
        poe.check_equal(len(result.lines), 2, result)
        poe.check('Killed' in result.lines[0] and 'back' in result.lines[1], result)


def rules(folder):
    """Late shared parameters, with sums under way, and held ones; rounded messages; all with several deaths."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for rule in ({'sync': 'stale:3'}, {'sync': 'every:4'}, {'sync': 'stale:2', 'wire': 'bf16', 'wire_shared': 'bf16'},
                 {'objective': 'bp', 'head': 'sh', 'schedule': '1f1b'}, {'objective': 'hierarchical', 'schedule': 'zb-h1'}):
        name = '-'.join(rule.values()).replace(':', '')
        whole = undisturbed(f'{folder}/whole-{name}', data, **rule)
        kill_and_compare(folder, name, whole, data, [(15, [1]), (40, [0, 2]), (90, [0, 1, 2])], **rule)


def at_random(folder):
    """At instants of no choice of ours, again and again."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = undisturbed(f'{folder}/whole', data, sync='stale:2')
    out, rng = f'{folder}/random', random.Random(int(os.environ.get('POE_SEED', '1')))
    with poe.Background(settings(out, data, sync='stale:2'), poe.RANKS, 3) as run:
        wait_for(run, out, 3)
        for _ in range(12):
            time.sleep(rng.uniform(0, 0.25))
            pid = stage_process(run, rng.randrange(3))
            if pid and lines(out) < 140:
                poe.kill(pid, rng.choice((signal.SIGKILL, signal.SIGSEGV)))
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    check_same(out, whole)


def skipping(folder):
    """--recover skip: the run goes on without what one stage had done since its snapshot, and says so; the shared
    parameters stay one."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    out = f'{folder}/out'
    with poe.Background(settings(out, data, recover='skip', snapshot_every=40), poe.RANKS, 3) as run:
        wait_for(run, out, 30)
        poe.kill(stage_process(run, 1), signal.SIGKILL)
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    poe.check('without its own updates of steps 0 to' in result.err, result)
    poe.check_equal(len(poe.steps(out)), LONG['num_iterations'], 'steps')
    losses = [s['loss'] for s in poe.steps(out) if s['loss'] is not None]
    poe.check(min(losses) < losses[0] - 0.5, f'does not learn: {losses}')


def not_finite(folder):
    """--on-nan skip: what does not happen again costs nothing; what does costs one micro-batch, and is named."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = undisturbed(f'{folder}/whole', data)
    for times, same in ((1, True), (3, False)):
        out = f'{folder}/{times}'
        result = poe.run(settings(out, data, on_nan='skip', fault=f'nan rank=1 step=30 micro=1 times={times}'), poe.RANKS, 3)
        poe.check_equal(result.code, 0, result)
        poe.check(('micro-batch 1: a gradient of stage 1 is not finite' in result.err) != same, result)
        poe.check_equal(poe.steps(out)[:30], poe.steps(whole)[:30], 'steps before')
        poe.check_equal(poe.read_bytes(f'{out}/final.safetensors') == poe.read_bytes(f'{whole}/final.safetensors'), same,
                        'the same weights')
    result = poe.run(settings(f'{folder}/stop', data, fault='nan rank=1 step=30'), poe.RANKS, 3)
    poe.check_equal(result.code, 1, result)
    poe.check('a gradient of stage 1 is not finite; stopped' in result.err, result)


def interrupted_after(folder):
    """A run that lost a process and is then interrupted is resumed to the same weights."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole, out = undisturbed(f'{folder}/whole', data), f'{folder}/out'
    with poe.Background(settings(out, data), poe.RANKS, 3) as run:
        wait_for(run, out, 20)
        poe.kill(stage_process(run, 0), signal.SIGKILL)
        run.process.send_signal(signal.SIGINT)
        result = run.wait()
    poe.check_equal(result.code, 130, result)
    result = poe.run(['--resume', out, '--export', f'{out}/final.safetensors'], poe.RANKS, 3)
    poe.check_equal(result.code, 0, result)
    poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')


poe.main(one_dies, rules, at_random, skipping, not_finite, interrupted_after)
