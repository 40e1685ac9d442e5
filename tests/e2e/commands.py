# SPDX-License-Identifier: MIT
"""The commands beside training: generate, export, inspect, data, --dry-run, --help; and what a user reads at the end."""
import json
import os
import resource
import shlex

import poe


def trained(folder, **changes):
    text = poe.write_text(f'{folder}/text.txt')
    out = f'{folder}/run'
    result = poe.succeed(poe.flags(data=text, out=out, vocab_size=300, head='ps',
                                   export=f'{folder}/final.safetensors', **changes))
    return out, result


def generation(folder):
    out, _ = trained(folder)
    args = ['generate', '--checkpoint', out, '--prompt', 'the stage', '--max-tokens', 12]

    def text(*more):
        result = poe.succeed(args + list(more))
        poe.check(result.out.startswith('the stage') and result.out.endswith('\n'), result)
        return result.out
    greedy = text('--temperature', 0)
    poe.check_equal(text('--temperature', 0, '--seed', 5), greedy, 'the likeliest tokens need no seed')
    poe.check_equal(text('--seed', 3), text('--seed', 3), 'one seed')
    poe.check(len({text('--seed', s, '--temperature', 2, '--top-k', 0) for s in range(4)}) > 1, 'seeds make no difference')
    for view in (('--stage', 0), ('--stage', 2), ('--prefix', 1)):
        poe.check_equal(text('--temperature', 0, *view), text('--temperature', 0, *view), 'greedy')
    poe.check_equal(text('--temperature', 0, '--stage', 0), text('--temperature', 0, '--prefix', 0), 'prefix 0')
    poe.check_equal(text('--temperature', 0, '--prefix', 2), greedy, 'all stages')
    checkpoint = f'{out}/checkpoints/{poe.checkpoints(out)[0]}'
    args[2] = checkpoint
    poe.check_equal(text('--temperature', 0), greedy, 'the checkpoint itself')


def export(folder):
    out, _ = trained(folder)
    poe.succeed(['export', '--checkpoint', out, '--export', f'{folder}/again.safetensors'])
    poe.check_same_file(f'{folder}/again.safetensors', f'{folder}/final.safetensors')
    tensors = poe.read_safetensors(f'{folder}/final.safetensors')
    for name in ('transformer.wte.weight', 'transformer.h.2.attn.c_proj.weight', 'lm_head_stages.2.weight',
                 'smear_gate.weight', 'smear_lambda', 'resid_lambdas', 'x0_lambdas', 'backout_lambda'):
        poe.check(name in tensors, f'{name} is missing')
    short = f'{folder}/short.safetensors'
    poe.succeed(['export', '--checkpoint', out, '--export', short, '--export-dtype', 'bf16'])
    header = poe.safetensors_header(short)[0]
    poe.check_equal({e['dtype'] for e in header.values()}, {'BF16'}, 'types')
    poe.check_tensors(short, f'{folder}/final.safetensors', 2.0 ** -8)
    poe.check(not poe.leftovers(folder), poe.leftovers(folder))


def imported(folder):
    """Exported weights, evaluated, are the model that was trained."""
    out, _ = trained(folder)
    text = f'{folder}/text.txt'
    expected = poe.evaluations(out)[-1]
    for source in (['--resume', out], ['--config', f'{out}/config.json', '--init-from', f'{folder}/final.safetensors']):
        poe.succeed(source + ['--eval-only', '--data', text, '--out', f'{folder}/evaluation'])
        got = poe.read_json(f'{folder}/evaluation/evaluation.json')
        for key in ('bpb', 'accuracy'):
            for kind in ('stage', 'prefix'):
                for k in range(3):
                    poe.check_near(got[key][kind][k], expected[key][kind][k], 1e-8, f'{key} of {kind} {k}')


def aggregates(folder):
    out, _ = trained(folder, num_iterations=20, matrix_lr=0.5, unembedding_lr=0.5)  # so that stages differ
    bpb = {}
    for rule in ('mean', 'sum', 'mean-raw'):
        poe.succeed(['--resume', out, '--eval-only', '--aggregate', rule, '--out', f'{folder}/{rule}'], poe.RANKS, 3)
        bpb[rule] = poe.read_json(f'{folder}/{rule}/evaluation.json')['bpb']
    poe.check_equal(len({b['aggregate'] for b in bpb.values()}), 3, 'aggregates')
    poe.check_near(bpb['mean-raw']['aggregate'], sum(bpb['mean']['stage']) / 3, 1e-6, 'mean-raw is the mean of the stages')


def inspection(folder):
    out, _ = trained(folder, save_every=3)
    checkpoint = f'{out}/checkpoints/{poe.checkpoints(out)[0]}'
    for path, words in ((out, ('3 6', 'lm_head')), (checkpoint, ('transformer.h.1.attn.c_q.weight', 'step')),
                        (f'{checkpoint}/stage-001.h5', ('transformer.h.1.attn.c_q.weight',)),
                        (f'{folder}/final.safetensors', ('transformer.wte.weight', 'tensors'))):
        result = poe.succeed(['inspect', path])
        for word in words:
            poe.check(word in result.out, f'"{word}" is missing: {result}')
    with open(f'{checkpoint}/stage-001.h5', 'r+b') as file:
        file.seek(900)
        file.write(b'\xff' * 10)
    result = poe.run(['inspect', checkpoint])
    poe.check_refused(result, 2, 'stage-001.h5')


def data(folder):
    """A tokenizer and shards from text; training on them."""
    text = poe.write_text(f'{folder}/text.txt')
    poe.succeed(['data', '--data', text, '--vocab-size', 300, '--out', f'{folder}/data'])
    names = sorted(os.listdir(f'{folder}/data'))
    poe.check('tokenizer.json' in names and any(n.endswith('.bin') for n in names), names)
    shard = [n for n in names if n.endswith('.bin')][0]
    poe.succeed(poe.flags(data=f'{folder}/data/{shard}', tokenizer=f'{folder}/data/tokenizer.json', vocab_size=None,
                          out=f'{folder}/run'))
    poe.succeed(['generate', '--checkpoint', f'{folder}/run', '--prompt', 'each', '--max-tokens', 3])
    poe.succeed(['data', '--data', text, '--tokenizer', f'{folder}/data/tokenizer.json', '--out', f'{folder}/more'])
    poe.check_same_file(f'{folder}/more/{shard}', f'{folder}/data/{shard}')


def presets(folder):
    """The parameters of the model cards; and nothing of them is allocated."""
    for size, count in (('tiny', None), ('286m', None), ('897m', None), ('1.3b', '1384.122 M'), ('3b', '3019.901 M')):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result = poe.succeed(['--size', size, '--dry-run'], cwd=folder)
        poe.check(not count or count in result.out, result)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        poe.check(peak == before or peak < 200 * 1024, f'{size}: {peak} KiB')
    poe.succeed(['--size', '3b', '--dry-run'], poe.MPIEXEC, 4, cwd=folder)
    poe.check_equal(os.listdir(folder), [], 'files of a dry run')


def closing_lines(folder):
    """The commands that the last lines offer work as they stand, in a folder whose name needs quotes."""
    folder = f'{folder}/it is a "name"'
    os.mkdir(folder)
    text = poe.write_text(f'{folder}/text.txt')
    for launch in (poe.THREADS, poe.RANKS):
        out = f'{folder}/{launch} run'
        result = poe.succeed(poe.flags(data=text, out=out, vocab_size=300), launch, 3, cwd=folder)
        lines = result.out.splitlines()
        offered = dict(line.split(None, 1) for line in lines if line.split(None, 1)[:1] in (['go'], ['export'], ['generate']))
        poe.check_equal(len(offered), 3, offered)
        for name, line in offered.items():
            words = shlex.split(line.removeprefix('on'))
            poe.check_equal('--ranks' in words, launch == poe.RANKS and '--resume' in words, line)
            again = poe.run_command(words, cwd=folder)
            poe.check(again.code == 0 and not again.err, again)
        poe.check(os.path.exists(f'{folder}/model.safetensors') and len(poe.steps(out)) == 12, offered)


def runs_folder(folder):
    """Without --out a run makes a folder by itself."""
    text = poe.write_text(f'{folder}/text.txt')
    poe.succeed(poe.flags(data=text, vocab_size=300), cwd=folder)
    runs = os.listdir(f'{folder}/runs')
    poe.check_equal(len(runs), 1, runs)
    names = set(os.listdir(f'{folder}/runs/{runs[0]}'))
    poe.check({'config.json', 'metrics.jsonl', 'checkpoints', 'tokenizer.json'} <= names, names)


def metrics(folder):
    out, _ = trained(folder, eval_every=3)
    with open(f'{out}/metrics.jsonl') as file:
        lines = [json.loads(line) for line in file]
    for m in (m for m in lines if 'loss' in m):
        poe.check({'step', 'loss', 'stage_loss', 'lrm', 'tokens', 'dt'} <= set(m), m)
        poe.check_equal(m['tokens'], (m['step'] + 1) * 128, 'tokens')
        poe.check_near(m['loss'], sum(m['stage_loss']) / 3, 1e-7, 'loss')
    for e in (m for m in lines if 'bpb' in m):
        for key in ('bpb', 'accuracy'):
            poe.check(len(e[key]['stage']) == 3 and len(e[key]['prefix']) == 3 and 'aggregate' in e[key], e)
    poe.check_equal([e['step'] for e in lines if 'bpb' in e], [3, 6], 'evaluations')


EQUAL = ['--stages', '2,2,2,2', '--device-batch-size', 1, '--sequence-len', 32, '--n-embd', 32, '--total-batch-size', 128,
         '--emulate-compute', 'forward=20ms,backward=40ms']


def planned(args):
    return json.loads(poe.succeed(['plan', '--json'] + args).out)


def plan_of_given_times(folder):
    """Nothing is measured: the answers are those of the formulas."""
    plan = planned(EQUAL)
    step = {c['name']: c for c in plan['cases']}
    poe.check_near(step['asked']['step'], 0.30, 1e-9, 'M t + (P-1) f')
    poe.check_near(step['asked']['formula'], 0.30, 1e-9, 'formula')
    poe.check_near(step['streaming']['step'], 0.24, 1e-9, 'M t')
    poe.check_near(step['1f1b']['step'], 0.42, 1e-9, '(M + P - 1) t')
    poe.check_near(step['asked']['idle'], 3 / 15, 1e-9, 'idle')
    poe.check_equal((plan['smallest_delay'], len(plan['ranks']), len(plan['links'])), (1, 4, 3), 'plan')
    far = planned(EQUAL + ['--net', '*:rtt=100ms,bw=800Mbit'])
    poe.check_near(far['links'][0]['down_latency'], 0.05, 1e-9, 'one way')
    poe.check_near(far['links'][0]['up_bandwidth'], 1e8, 1e-9, 'bytes per second')
    poe.check(far['cases'][0]['step'] > 0.6 and far['smallest_delay'] == 2, far)
    for schedule, expected in (('gpipe', 0.42), ('zb-h1', 0.30)):
        plan = planned(EQUAL + ['--objective', 'bp', '--schedule', schedule])
        poe.check_near(plan['cases'][0]['step'], expected, 1e-9, schedule)
    replicas = planned(['--stages', 8, '--ranks', 4] + EQUAL[2:] + ['--objective', 'bp', '--schedule', 'ddp'])
    poe.check_near(replicas['cases'][0]['step'], 0.06, 1e-9, '(M / P) t')
    poe.check_equal(os.listdir(folder), [], 'files of a plan')


def plan_of_this_machine(folder):
    """Speeds are whatever they are; everything that is promised is there."""
    args = ['--stages', '3,1', '--n-embd', 32, '--n-head', 2, '--sequence-len', 32, '--device-batch-size', 1,
            '--total-batch-size', 128, '--threads', 1]
    plan = planned(args)
    for rank in plan['ranks']:
        poe.check(rank['forward'] > 0 and rank['backward'] > 0 and rank['memory'] > 0 and 0 <= rank['idle'] < 1, rank)
        parts = {k: v for k, v in rank['memory_parts'].items() if k != 'recompute'}.values()
        poe.check(sum(parts) == rank['memory'], rank)
    poe.check({'asked', '1f1b'} <= {c['name'] for c in plan['cases']}, plan['cases'])
    poe.check(plan['forward_bytes'] >= 32 * 32 * 4 and plan['down_bytes'] > 4 * plan['forward_bytes'], plan)
    poe.check([b['ranks'] for b in plan['balance']] == [2, 4] and plan['rates'].startswith('measured'), plan)
    text = poe.succeed(['plan', '--ranks', 4] + args, cwd=folder).out
    for word in ('4 ranks, stages 1x4', 'idle', 'memory', 'tokens/s', 'poe beside 1f1b', 'per step from a rank to the next'):
        poe.check(word in text, f'"{word}" is missing: {text}')


def help_and_version(folder):
    for args in (['--help'], ['--version'], ['generate', '--help'], ['data', '--help'], ['plan', '--help']):
        result = poe.succeed(args, cwd=folder)
        poe.check('poe-pipe' in result.out, result)
    listed = poe.succeed(['--help']).out
    for flag in ('stages head objective alpha backout schedule link-window sync n-embd n-head n-kv-head mlp-dim sequence-len vocab-size '
                 'window-pattern device-batch-size total-batch-size num-iterations warmup-steps warmdown-ratio '
                 'final-lr-frac matrix-lr embedding-lr unembedding-lr scalar-lr weight-decay seed data val-data tokenizer '
                 'init-from export config out resume save-every eval-every transport threads deadline size dry-run '
                 'eval-tokens eval-only ranks kernels keep net version').split():
        poe.check(f'--{flag} ' in listed.replace('\n', ' '), f'--help lacks --{flag}')


poe.main(generation, export, imported, aggregates, inspection, data, presets, closing_lines, runs_folder, metrics,
         plan_of_given_times, plan_of_this_machine, help_and_version)
