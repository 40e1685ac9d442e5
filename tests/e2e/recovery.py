# SPDX-License-Identifier: MIT
"""Stage processes die, at any instant, and the run ends with the weights of one that nothing happened to."""
import os
import random
import re
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
            poe.wait_for_lines(run, out, wanted)
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
                 {'objective': 'bp', 'head': 'sh', 'schedule': '1f1b'}, {'objective': 'hierarchical', 'schedule': 'zb-h1'},
                 {'objective': 'bp', 'schedule': 'interleaved', 'virtual_stages': '3'}):
        name = '-'.join(rule.values()).replace(':', '')
        whole = undisturbed(f'{folder}/whole-{name}', data, **rule)
        kill_and_compare(folder, name, whole, data, [(15, [1]), (40, [0, 2]), (90, [0, 1, 2])], **rule)


def at_random(folder):
    """At instants of no choice of ours, again and again."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = undisturbed(f'{folder}/whole', data, sync='stale:2')
    out, rng = f'{folder}/random', random.Random(int(os.environ.get('POE_SEED', '1')))
    with poe.Background(settings(out, data, sync='stale:2'), poe.RANKS, 3) as run:
        poe.wait_for_lines(run, out, 3)
        for _ in range(12):
            time.sleep(rng.uniform(0, 0.25))
            pid = stage_process(run, rng.randrange(3))
            if pid and poe.lines(out) < 140:
                poe.kill(pid, rng.choice((signal.SIGKILL, signal.SIGSEGV)))
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    check_same(out, whole)


def skipping(folder):
    """--recover skip: the run goes on without what one stage had done since its snapshot, and says so; the shared
    parameters stay one."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    out = f'{folder}/out'
    result = poe.run(settings(out, data, recover='skip', snapshot_every=40, fault='kill rank=1 step=33'), poe.RANKS, 3)
    poe.check_equal(result.code, 0, result)
    poe.check('without its own updates of steps 0 to' in result.err, result)
    poe.check_equal(len(poe.steps(out)), LONG['num_iterations'], 'steps')
    check_one_model(skipped_by_last(f'{folder}/last', data))
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


def shared_memory(pid):
    try:
        return next(int(line.split()[1]) for line in open(f'/proc/{pid}/status') if line.startswith('RssShmem'))
    except (OSError, StopIteration):
        return 0


def evaluating(folder):
    """A long evaluation: the agents keep no more of its messages than --log-limit and a micro-batch's, and stage processes
    that die within it go on within it."""
    data = poe.write_tokens(f'{folder}/tokens.bin', count=40000, vocab=2000)
    long = {'vocab_size': 2000, 'num_iterations': 8, 'eval_every': 4, 'eval_tokens': 8192, 'val_data': data, 'save_every': 4}
    whole, out, most = undisturbed(f'{folder}/whole', data, **long), f'{folder}/out', 0
    with poe.Background(settings(out, data, log_limit='4MiB', **long), poe.RANKS, 3) as run:
        poe.wait_for_lines(run, out, 4)
        kills = [1, 2, 0, 2, 1]
        while run.process.poll() is None:
            time.sleep(0.1)
            most = max([most, *map(shared_memory, run.family())])
            if kills and most > 5000 and (pid := stage_process(run, kills[0])):
                poe.kill(pid, signal.SIGKILL)
                kills.pop(0)
        result = run.wait(120)
    poe.check_equal(result.code, 0, result)
    check_same(out, whole)
    poe.check(most < 50000, f'an agent or a stage process shared {most} KiB')  # of 64 MiB that pass


def resumed(folder):
    """A process of a run that was resumed is started again when the checkpoint that it was resumed from is gone."""
    data, whole, export = poe.write_tokens(f'{folder}/tokens.bin'), f'{folder}/whole', f'{folder}/final.safetensors'
    short = {'num_iterations': 100, 'save_every': 10, 'eval_every': 0, 'keep': 1}
    undisturbed(whole, data, **short)
    words = settings(None, data, export=export, fault='kill-agent rank=1 step=25', **short)  # into runs/, by the time
    poe.check(poe.run(words, poe.RANKS, 3, cwd=folder).code != 0, 'goes on')
    out = f'runs/{os.listdir(f"{folder}/runs")[0]}'
    first = poe.checkpoints(f'{folder}/{out}')
    again = ['--resume', out, '--fault', 'kill rank=0 step=45; kill rank=2 step=46', '--export', export]
    result = poe.run(again, poe.RANKS, 3, cwd=folder)
    poe.check_equal(result.code, 0, result)
    poe.check_equal(result.err.count('back after'), 2, result)
    out = f'{folder}/{out}'
    poe.check(first[0] not in poe.checkpoints(out), first)
    poe.check_equal(poe.steps(out), poe.steps(whole), 'losses')
    poe.check_equal(poe.checkpoints(out), poe.checkpoints(whole), 'checkpoints')
    poe.check_same_file(export, f'{whole}/final.safetensors')


def own_tokenizer(folder):
    """A tokenizer that the run has trained stays the run's own, whoever is started again."""
    data = poe.write_text(f'{folder}/text.txt')
    text = {'vocab_size': 300, 'num_iterations': 60, 'save_every': 20, 'eval_every': 0}
    whole = undisturbed(f'{folder}/whole', data, **text)
    out = f'{folder}/out'
    with poe.Background(settings(out, data, **text), poe.RANKS, 3) as run:
        poe.wait_for_lines(run, out, 10)
        poe.kill(stage_process(run, 0), signal.SIGKILL)
        poe.check_equal(run.wait(120).code, 0, run.said())
    check_same(out, whole)
    for checkpoint in poe.checkpoints(out):
        config = poe.read_json(f'{out}/checkpoints/{checkpoint}/manifest.json')['config']
        poe.check_equal(config.get('tokenizer'), f'{out}/tokenizer.json', checkpoint)


def skipped_by_last(out, data):
    """The last stage, which has told the others the totals of all steps but the one that it dies in."""
    val = poe.write_tokens(f'{out}.bin', 1500, seed=5)
    result = poe.run(settings(out, data, val_data=val, num_iterations=70, save_every=0, recover='skip', fault=
                              'kill rank=2 step=65 micro=1 phase=receive'), poe.RANKS, 3)
    poe.check_equal(result.code, 0, result)
    poe.check('without its own updates of steps 65 to 65' in result.err, result)
    return out


# --- outages ------------------------------------------------------------------------------------------------------------

OUTAGE = {'num_iterations': 75, 'save_every': 15, 'eval_every': 15, 'outage': 'continue'}
ABSENT = 'absent rank=1 step=25 steps=30'


def check_one_model(out, stages=3):
    """The last evaluation, by the replicas that ranks have, is that of the checkpoint, which has one replica for all."""
    poe.succeed(['--eval-only', '--resume', out, '--out', f'{out}-again'], poe.RANKS, 3)
    again = poe.read_json(f'{out}-again/evaluation.json')
    for of in 'stage', 'prefix':
        for got, expected in zip(evaluations(out)[-1]['nats'][of][:stages], again['nats'][of]):
            poe.check_near(got, expected, 1e-8, f'{of} of the checkpoint')  # nine digits are written


def evaluations(out):
    return [m for m in poe.metrics(out) if 'nats' in m]


def exported(out, step):
    path = f'{out}/{step}.safetensors'
    checkpoint = f'{out}/checkpoints/step-{step:08d}'
    poe.check_equal(poe.run_command([poe.PROGRAM, 'export', '--checkpoint', checkpoint, '--export', path]).code, 0, path)
    return poe.read_safetensors(path)


def check_weights(out):
    """Between two checkpoints within the outage stages 1 and 2 keep what is theirs, of one layer each; the rest learns."""
    before, after = exported(out, 30), exported(out, 45)
    changed = set()
    for name, (_, values) in before.items():
        differ = [k for k, value in enumerate(values) if value != after[name][1][k]]
        number = re.search(r'\b(?:h|lm_head_stages|value_embeds)\.(\d+)\b', name)
        if name in ('resid_lambdas', 'x0_lambdas'):
            changed.update(differ)
        elif differ:
            changed.add(int(number[1]) if number else name)
    poe.check_equal(changed & {0, 1, 2, 'transformer.wte.weight', 'lm_head.weight'},
                    {0, 'transformer.wte.weight', 'lm_head.weight'}, 'changed')


def check_outage(out):
    """Who has a loss, and a score, when; and what stage 0 and the replicas have learnt meanwhile."""
    for step in poe.steps(out):
        there = not 25 <= step['step'] < 55
        poe.check_equal([loss is not None for loss in step['stage_loss']], [True, there, there], step)
        poe.check(step['loss'] is not None, step)
    poe.check_equal([e['nats']['aggregate'] is not None for e in evaluations(out)], [True, False, False, True, True],
                    'aggregates')
    for e in evaluations(out):
        there = not 25 < e['step'] <= 55
        poe.check_equal([x is not None for x in e['nats']['stage'] + e['nats']['prefix']], [True, there, there] * 2, e)
        poe.check_equal([x is not None for x in e['accuracy']['stage']], [True, there, there], e)
    first = [e['nats']['prefix'][0] for e in evaluations(out)[1:3]]
    poe.check(first[1] < first[0], f'stage 0 does not learn: {first}')


def outage(folder):
    """A stage is absent for a while, under early and late totals: the same again whatever else happens meanwhile."""
    data, val = poe.write_tokens(f'{folder}/tokens.bin'), poe.write_tokens(f'{folder}/val.bin', 1500, seed=5)
    kills = '; kill rank=1 step=40 micro=1; kill rank=2 step=33 phase=receive; kill rank=1 step=57 phase=backward; ' \
            'kill rank=0 step=26'
    for sync in 'exact', 'stale:2':
        once, again = (f'{folder}/{name}-{sync.replace(":", "")}' for name in ('once', 'again'))
        for out, rules in (once, ABSENT), (again, ABSENT + kills):
            result = poe.run(settings(out, data, **{**OUTAGE, 'val_data': val, 'sync': sync, 'fault': rules}), poe.RANKS, 3)
            poe.check_equal(result.code, 0, result)
            for words in 'goes on without its stage from step 25 on, as the model of stage 0', 'back in step 55: it has missed 30':
                poe.check(words in result.err, f'"{words}": {result}')
        poe.check_equal(poe.steps(again), poe.steps(once), 'losses')
        poe.check_equal(evaluations(again), evaluations(once), 'evaluations')
        poe.check_same_file(f'{once}/final.safetensors', f'{again}/final.safetensors')
        check_outage(once)
        check_weights(once)
        check_one_model(once)


def outage_by_death(folder):
    """Stage processes that die again and again: the run goes on without, also without the last one, which has told the others
    what it must repeat; or ends, as it does unless asked."""
    data, val = poe.write_tokens(f'{folder}/tokens.bin'), poe.write_tokens(f'{folder}/val.bin', 1500, seed=5)
    short = {**OUTAGE, 'val_data': val, 'num_iterations': 40}
    for rank, rule in (1, 'times=6 phase=receive'), (2, 'micro=1 times=1000 phase=backward'):
        out = f'{folder}/{rank}'
        result = poe.run(settings(out, data, **{**short, 'fault': f'kill rank={rank} step=25 {rule}'}), poe.RANKS, 3)
        poe.check_equal(result.code, 0, result)
        poe.check('the run goes on without its stage, as the model of stage' in result.err, result)
        poe.check_equal([x is not None for x in evaluations(out)[-1]['nats']['prefix']], [k < rank for k in range(3)], 'prefixes')
        check_one_model(out, rank)
    result = poe.run(settings(f'{folder}/stops', data, **{**short, 'outage': 'stop', 'fault':
                                                          'kill rank=1 step=25 times=6 phase=receive'}), poe.RANKS, 3)
    poe.check_equal(result.code, 1, result)
    poe.check('is not started again: it dies again and again, and gets no further' in result.err, result)


def outage_refused(folder):
    """Where nobody could go on."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch, words, changes in (
            (poe.THREADS, '--outage continue needs agents', {'outage': 'continue'}),
            (poe.RANKS, '--outage continue needs agents', {'outage': 'continue', 'agents': 'off'}),
            (poe.RANKS, '--outage continue lets a stage go on without the others: found --objective bp',
             {'outage': 'continue', 'objective': 'bp', 'head': 'sh'}),
            (poe.RANKS, 'give --outage continue', {'fault': ABSENT}),
            (poe.RANKS, 'without the first stage there is nothing to train on', {'outage': 'continue', 'fault':
                                                                                'absent rank=0 step=2 steps=1'})):
        result = poe.run(settings(f'{folder}/out', data, **changes), launch, 3)
        poe.check_refused(result, 2, words)


def interrupted_after(folder):
    """A run that lost a process and is then interrupted is resumed to the same weights."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole, out = undisturbed(f'{folder}/whole', data), f'{folder}/out'
    with poe.Background(settings(out, data), poe.RANKS, 3) as run:
        poe.wait_for_lines(run, out, 20)
        poe.kill(stage_process(run, 0), signal.SIGKILL)
        run.process.send_signal(signal.SIGINT)
        result = run.wait()
    poe.check_equal(result.code, 130, result)
    result = poe.run(['--resume', out, '--export', f'{out}/final.safetensors'], poe.RANKS, 3)
    poe.check_equal(result.code, 0, result)
    poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')


poe.main(one_dies, rules, at_random, skipping, not_finite, evaluating, own_tokenizer, interrupted_after, outage, outage_by_death, outage_refused, resumed)
