# SPDX-License-Identifier: MIT
"""Backpropagation over several ranks: the weights of one process, bit for bit, whatever the schedule and the partition;
replicas that sum their gradients; what resumes, predicts and is refused under each."""
import math
import os
import signal

import poe

SCHEDULES = ('gpipe', '1f1b', 'zb-h1', 'zb-h2')
TOKENS = 64  # of a micro-batch of the tiny run


def train(folder, name, data, launch=poe.THREADS, count=1, **changes):
    out = f'{folder}/{name}'
    poe.succeed(poe.flags(**{'data': data, 'out': out, 'export': f'{out}/final.safetensors', **changes}), launch, count)
    return out


def check_same(a, b):
    poe.check_equal(poe.metrics(b), poe.metrics(a), f'metrics of {b}')
    poe.check_same_file(f'{b}/final.safetensors', f'{a}/final.safetensors')


def check_near(a, b, tolerance):
    """The whole vector of weights: one tensor that starts at zero would show Muon's amplified rounding alone."""
    got, expected = (poe.read_safetensors(f'{out}/final.safetensors') for out in (a, b))
    pairs = [(x, y) for name, (_, values) in expected.items() for x, y in zip(got[name][1], values)]
    difference, norm = (math.sqrt(sum(v * v for v in values)) for values in ([x - y for x, y in pairs], [y for _, y in pairs]))
    poe.check(difference <= tolerance * norm, f'{a}: relative difference {difference / norm:.2e} > {tolerance}')


def backpropagation(folder):
    """4 layers on 1, 2 and 4 ranks, fewer and more micro-batches than ranks."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for micro in (1, 2, 4, 8):
        options = {'objective': 'bp', 'head': ('sh', 'ps')[micro > 2], 'total_batch_size': TOKENS * micro,
                   'num_iterations': 3}
        one = train(folder, f'one-{micro}', data, stages='4', **options)
        for stages in ('4', '2,2', '1,1,1,1'):
            for schedule in SCHEDULES:
                name = f'{stages}-{schedule}-{micro}'
                check_same(one, train(folder, name, data, stages=stages, schedule=schedule, **options))


def processes(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'objective': 'bp', 'total_batch_size': 4 * TOKENS, 'num_iterations': 3}
    one = train(folder, 'one', data, stages='4', **options)
    for schedule in ('1f1b', 'zb-h2'):
        check_same(one, train(folder, f'four-{schedule}', data, poe.RANKS, 4, stages='1,1,1,1', schedule=schedule, **options))
    check_same(one, train(folder, 'mpiexec', data, poe.MPIEXEC, 2, stages='2,2', schedule='gpipe', **options))


def interleaved(folder):
    """Processors that several ranks share: the same weights, and one rank at a time on each of them."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for micro in (1, 2, 3, 8):
        options = {'objective': 'bp', 'total_batch_size': TOKENS * micro, 'num_iterations': 3}
        one = train(folder, f'one-{micro}', data, stages='6', **options)
        for stages, virtual in (('3,3', 2), ('2,1,1,2', 2), ('1,1,1,1,1,1', 2), ('1,1,1,1,1,1', 3)):
            name = f'{stages}-{virtual}-{micro}'
            check_same(one, train(folder, name, data, stages=stages, schedule='interleaved', virtual_stages=virtual, **options))
    shared = {'stages': '2,1,1,2', 'schedule': 'interleaved', **options}
    check_same(one, train(folder, 'ranks', data, poe.RANKS, 4, **shared))
    check_same(one, train(folder, 'mpiexec', data, poe.MPIEXEC, 4, **shared))
    emulated = f'{folder}/emulated'
    poe.succeed(poe.flags(data=data, out=emulated, emulate_compute='forward=4ms,backward=8ms,optimizer=2ms', **shared))
    for step in poe.steps(emulated)[1:-1]:
        for processor in (0, 1):
            ranks = [step['accounts'][r] for r in (processor, processor + 2)]
            busy = sum(rank[name] for rank in ranks for name in ('forward', 'backward', 'optimizer'))
            poe.check(busy <= max(rank['wall'] for rank in ranks), f'processor {processor}: {busy} s in {ranks}')
            poe.check(all(rank['turn'] > 0 for rank in ranks), f'processor {processor}: no turns waited for')


def hierarchical(folder):
    """A loss per stage: the same over schedules, ranks as threads or processes, and another model than poe and bp."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for sync in ('exact', 'stale:2'):
        options = {'objective': 'hierarchical', 'stages': '2,1,1', 'head': 'ps', 'sync': sync, 'total_batch_size': 4 * TOKENS}
        first = train(folder, f'gpipe-{sync}', data, schedule='gpipe', **options)
        for schedule in SCHEDULES[1:]:
            check_same(first, train(folder, f'{schedule}-{sync}', data, schedule=schedule, **options))
        check_same(first, train(folder, f'many-{sync}', data, poe.RANKS, 3, **options))
        poe.check_equal(len(poe.steps(first)[0]['stage_loss']), 3, 'losses')
        local = train(folder, f'poe-{sync}', data, **{**options, 'objective': 'poe'})
        poe.check(poe.read_bytes(f'{local}/final.safetensors') != poe.read_bytes(f'{first}/final.safetensors'),
                  'hierarchical trains as poe does')


def recompute(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'objective': 'bp', 'stages': '2,2', 'total_batch_size': 4 * TOKENS, 'num_iterations': 3}
    one = train(folder, 'none', data, recompute='none', **options)
    for choice in ('norms', 'block'):
        check_same(one, train(folder, choice, data, recompute=choice, **options))
    refused = poe.run(poe.flags(data=data, out=f'{folder}/refused', recompute='block', schedule='zb-h1', **options))
    poe.check_refused(refused, 2, 'recompute')


def replicas(folder):
    """ddp: within rounding what one process does, and the same bits every time, over threads and processes."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'objective': 'bp', 'stages': '3', 'total_batch_size': 6 * TOKENS, 'val_data': data, 'eval_every': 3}
    one = train(folder, 'one', data, **options)
    for ranks in (1, 2, 3):
        outs = [train(folder, f'{launch}-{ranks}', data, launch, ranks, schedule='ddp', **options, **more)
                for launch, more in ((poe.THREADS, {'transport': 'inproc', 'ranks': ranks}), (poe.RANKS, {}),
                                     (poe.MPIEXEC, {}))]
        for out in outs[1:]:
            check_same(outs[0], out)
        check_near(outs[0], one, 1e-6)
        for got, expected in zip(poe.steps(outs[0]), poe.steps(one)):
            poe.check_near(got['loss'], expected['loss'], 1e-6, f'loss of step {got["step"]} on {ranks} ranks')
        poe.check_equal(os.listdir(f'{outs[0]}/checkpoints'), os.listdir(f'{one}/checkpoints'), 'checkpoints')
    for launch, more in ((poe.THREADS, {'transport': 'inproc', 'ranks': 2}), (poe.RANKS, {}), (poe.MPIEXEC, {})):
        out = train(folder, f'{launch}-net', data, launch, 2, schedule='ddp', net='0-1:rtt=2ms', **options, **more)
        poe.check_same_file(f'{out}/final.safetensors', f'{folder}/{launch}-2/final.safetensors')


def resumed(folder):
    """Interrupted in the middle and gone on with, under another schedule too."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for name, options in (('bp', {'objective': 'bp', 'stages': '1,1,1', 'schedule': 'zb-h2'}),
                          ('interleaved', {'objective': 'bp', 'stages': '1,1,1,1', 'schedule': 'interleaved'}),
                          ('hierarchical', {'objective': 'hierarchical', 'stages': '1,1,1', 'schedule': '1f1b'}),
                          ('ddp', {'objective': 'bp', 'stages': '3', 'schedule': 'ddp', 'transport': 'inproc', 'ranks': 2})):
        options.update(total_batch_size=4 * TOKENS, save_every=3)
        whole = train(folder, f'{name}-whole', data, **options)
        out = f'{folder}/{name}-resumed'
        again = ['--schedule', 'gpipe'] if name == 'bp' else ['--ranks', '2'] if name == 'ddp' else []
        poe.succeed(['--resume', f'{whole}/checkpoints/step-00000003', '--out', out, '--export', f'{out}/final.safetensors',
                     *again])
        poe.check_same_file(f'{out}/final.safetensors', f'{whole}/final.safetensors')
        poe.check_equal(poe.steps(out)[-3:], poe.steps(whole)[-3:], f'steps of {out}')


def configured(folder):
    """The configuration that a run leaves, with another schedule beside it."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for schedule, others in (('gpipe', ('1f1b', 'zb-h1', 'interleaved')), ('interleaved', ('1f1b',))):
        first = train(folder, schedule, data, objective='bp', stages='1,1,1,1', schedule=schedule, total_batch_size=4 * TOKENS)
        for other in others:
            out = f'{folder}/{schedule}-{other}'
            poe.succeed(['--config', f'{first}/config.json', '--schedule', other, '--out', out, '--export',
                         f'{out}/final.safetensors'])
            check_same(first, out)


def interrupted(folder):
    """A wish to stop takes effect after the same step on every rank."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    long = {'objective': 'bp', 'total_batch_size': 4 * TOKENS, 'num_iterations': 2000}
    for schedule, stages, ranks in (('zb-h1', '1,1,1', 3), ('interleaved', '1,1,1,1', 4), ('ddp', '3', 2)):
        out = f'{folder}/{schedule}'
        with poe.Background(poe.flags(data=data, out=out, schedule=schedule, stages=stages, **long), poe.RANKS, ranks) as run:
            poe.wait_until('some steps', lambda: os.path.exists(f'{out}/metrics.jsonl') and len(poe.steps(out)) > 5)
            run.process.send_signal(signal.SIGINT)
            poe.check_refused(run.wait(), 130, lines=0)
        done = len(poe.steps(out))
        poe.check(5 < done < 2000, f'{done} steps')
        poe.check_equal(poe.checkpoints(out), [f'step-{done:08d}'], 'checkpoints')
        more = [out, '--num-iterations', done + 2, '--export', f'{out}/final.safetensors']
        poe.succeed(['--resume', *more], poe.RANKS, ranks)
        poe.check_equal([m['step'] for m in poe.steps(out)], list(range(done + 2)), 'steps')


def not_a_number(folder):
    """Whichever rank sees it first names it; no checkpoint holds that step."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'data': data, 'objective': 'bp', 'num_iterations': 1}
    poe.succeed(poe.flags(**options, stages='3', export=f'{folder}/good.safetensors', out=f'{folder}/first'))
    tensors = poe.read_safetensors(f'{folder}/good.safetensors')
    tensors['transformer.h.0.mlp.c_fc.weight'][1][5] = math.nan
    path = poe.write_safetensors(f'{folder}/bad.safetensors', tensors)
    for schedule, stages, ranks in (('1f1b', '2,1', 2), ('ddp', '3', 2)):
        out = f'{folder}/{schedule}'
        result = poe.run(poe.flags(**options, stages=stages, schedule=schedule, init_from=path, out=out, save_every=1),
                         poe.RANKS, ranks)
        poe.check_refused(result, 1, 'step 0', 'loss of stage')
        poe.check_equal(poe.checkpoints(out), [], 'checkpoints')


def predictions(folder):
    """Evaluation, generation and export of what was trained over several ranks are those of the same weights whole."""
    data = poe.write_text(f'{folder}/text.txt')
    options = {'objective': 'bp', 'vocab_size': 300, 'num_iterations': 4, 'eval_every': 2}
    one = train(folder, 'one', data, stages='3', **options)
    three = train(folder, 'three', data, poe.RANKS, 3, stages='1,1,1', **options)
    check_same(one, three)
    poe.check_equal(poe.evaluations(three), poe.evaluations(one), 'evaluations')
    texts = [poe.succeed(['generate', '--checkpoint', out, '--prompt', 'the', '--max-tokens', '8', '--seed', '5']).out
             for out in (one, three)]
    poe.check_equal(texts[1], texts[0], 'generated')
    poe.succeed(['export', '--checkpoint', three, '--export', f'{folder}/again.safetensors'])
    poe.check_same_file(f'{folder}/again.safetensors', f'{one}/final.safetensors')
    for flag in ('--stage', '--prefix'):
        poe.check_refused(poe.run(['generate', '--checkpoint', three, '--prompt', 'the', flag, '1']), 2, flag, 'bp')
    two = train(folder, 'two', data, poe.RANKS, 2, **{**options, 'stages': '3', 'schedule': 'ddp', 'total_batch_size': 2 * TOKENS})
    poe.check_equal([len(e['bpb']['stage']) for e in poe.evaluations(two)], [1, 1], 'evaluations of replicas')
    poe.succeed(['generate', '--checkpoint', two, '--prompt', 'the', '--max-tokens', '4'])
    each = train(folder, 'each', data, **{**options, 'objective': 'hierarchical', 'stages': '1,1,1'})
    poe.check_equal(len(poe.evaluations(each)[0]['bpb']['stage']), 3, 'stages that predict')
    for view in (['--stage', '0'], ['--prefix', '1'], []):
        poe.succeed(['generate', '--checkpoint', each, '--prompt', 'the', '--max-tokens', '4'] + view)


def refused(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for changes, words in (({'schedule': '1f1b'}, ('--schedule', '1f1b', 'poe')),
                           ({'schedule': 'ddp'}, ('--schedule', 'ddp', 'poe')),
                           ({'schedule': 'poe', 'objective': 'bp'}, ('--schedule', 'bp', 'zb-h2', 'ddp')),
                           ({'schedule': 'poe', 'objective': 'hierarchical'}, ('--schedule', 'hierarchical', 'gpipe')),
                           ({'schedule': 'ddp', 'objective': 'hierarchical'}, ('--schedule', 'ddp', 'hierarchical')),
                           ({'schedule': 'ddp', 'objective': 'bp'}, ('--stages', '3 stages')),
                           ({'schedule': 'zb', 'objective': 'bp'}, ('--schedule', 'zb', 'zb-h1')),
                           ({'schedule': 'interleaved'}, ('--schedule', 'interleaved', 'poe')),
                           ({'schedule': 'interleaved', 'objective': 'hierarchical'}, ('interleaved', 'bp', 'hierarchical')),
                           ({'schedule': 'interleaved', 'objective': 'bp'}, ('--virtual-stages 2', '--stages', 'found 3')),
                           ({'virtual_stages': '3', 'objective': 'bp'}, ('--virtual-stages 3', 'interleaved', 'auto')),
                           ({'virtual_stages': '2'}, ('--virtual-stages 2', 'interleaved', 'auto')),
                           ({'virtual_stages': '1', 'schedule': 'interleaved', 'objective': 'bp'},
                            ('--virtual-stages', 'found 1', '2 to')),
                           ({'schedule': 'interleaved', 'objective': 'bp', 'stages': '1,1,1,1', 'net': '*:bw=1Gbit'},
                            ('--net', '0>1', 'bandwidth')),
                           ({'sync': 'stale:2', 'objective': 'bp'}, ('--sync', 'stale:2', 'bp', 'exact')),
                           ({'link_window': '-1'}, ('--link-window', '-1')),
                           ({'schedule': 'ddp', 'objective': 'bp', 'stages': '3', 'ranks': 3, 'transport': 'inproc'},
                            ('--schedule ddp', '2 micro-batches', '3 ranks'))):
        poe.check_refused(poe.run(poe.flags(data=data, out=f'{folder}/out', **changes)), 2, *words)
    uneven = poe.flags(data=data, out=f'{folder}/out', schedule='ddp', objective='bp', stages='3')
    for launch in (poe.RANKS, poe.MPIEXEC):
        poe.check_refused(poe.run(uneven, launch, 3), 2, '--schedule ddp', '2 micro-batches', '3 ranks')
    poe.check(not os.path.exists(f'{folder}/out'), 'a refused run leaves no folder')


poe.main(backpropagation, processes, interleaved, hierarchical, recompute, replicas, resumed, configured, interrupted,
         not_a_number, predictions, refused)
