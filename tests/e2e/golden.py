# SPDX-License-Identifier: MIT
"""The golden runs and the golden evaluation through the program, in all three forms."""
import poe

RUNS = ('ps-2,1,1', 'sh-1,3,1', 'bp-4', 'stale-2,2', 'delay2-1,1,1', 'every3-1,2', 'bp-2,1', 'hier-1,2,1')
LOSS, WEIGHTS = 1e-5, 5e-4  # what single precision meets, by the golden runs' README


def command_of(source, out):
    return ['--config', f'{source}/config.json', '--init-from', f'{source}/init.safetensors', '--data',
            f'{source}/tokens.bin', '--out', out, '--export', f'{out}/final.safetensors']


def check_run(source, out):
    expected = poe.read_json(f'{source}/expected.json')
    got = poe.steps(out)
    poe.check_equal([m['step'] for m in got], [e['step'] for e in expected], 'steps')
    for m, e in zip(got, expected):
        poe.check_near(m['loss'], e['loss'], LOSS, f'loss of step {e["step"]}')
        poe.check_near(m['lrm'], e['lrm'], 1e-7, f'lrm of step {e["step"]}')
        poe.check_equal(len(m['stage_loss']), len(e['stage_loss']), 'stages')
        for k, (a, b) in enumerate(zip(m['stage_loss'], e['stage_loss'])):
            poe.check_near(a, b, LOSS, f'loss of step {e["step"]}, stage {k}')
    poe.check_tensors(f'{out}/final.safetensors', f'{source}/final.safetensors', WEIGHTS)


def run_golden(name, folder):
    source = poe.golden(name)
    ranks = len(poe.read_json(f'{source}/config.json')['stages'])
    outs = []
    for launch in poe.LAUNCHES:
        out = f'{folder}/{launch}'
        poe.succeed(command_of(source, out), launch, ranks)
        outs.append(out)
    check_run(source, outs[0])
    for out in outs[1:]:
        poe.check_equal(poe.metrics(out), poe.metrics(outs[0]), f'metrics of {out}')
        poe.check_same_file(f'{out}/final.safetensors', f'{outs[0]}/final.safetensors')


def make_test(name):
    def test(folder):
        run_golden(name, folder)
    test.__name__ = 'run_' + name
    return test


def evaluation(folder):
    source = poe.golden('eval')
    expected = poe.read_json(f'{source}/eval.json')
    for launch in (poe.THREADS, poe.RANKS):
        out = f'{folder}/{launch}'
        poe.succeed(['--config', f'{source}/config.json', '--eval-only', '--init-from', f'{source}/init.safetensors',
                     '--tokenizer', f'{poe.GOLDEN}/tokenizer/tokenizer.json', '--val-data',
                     f'{poe.GOLDEN}/packing/docs.jsonl', '--out', out], launch, 3)
        got = poe.read_json(f'{out}/evaluation.json')
        for key, tolerance in (('bpb', LOSS), ('accuracy', 1e-12)):
            for k in range(3):
                for kind in ('stage', 'prefix'):
                    poe.check_near(got[key][kind][k], expected[key][f'{kind} {k}'], tolerance, f'{key} of {kind} {k}')
            poe.check_equal(got[key]['aggregate'], got[key]['prefix'][-1], f'{key} of the aggregate')


poe.main(*[make_test(name) for name in RUNS], evaluation)
