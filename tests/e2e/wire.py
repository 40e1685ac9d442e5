# SPDX-License-Identifier: MIT
"""Wire formats: whatever carries the rounded values, and wherever a run is resumed, the weights are the same bits; what
travels is less; and what is evaluated and generated goes the same way as what was trained."""
import poe

FORMATS = ('bf16', 'fp8', 'int8')


def train(folder, name, data, launch=poe.THREADS, ranks=1, **changes):
    out = f'{folder}/{name}'
    poe.succeed(poe.flags(**{'data': data, 'out': out, 'export': f'{out}/final.safetensors', **changes}), launch, ranks)
    return out


def check_same(a, b):
    poe.check_equal(poe.metrics(b), poe.metrics(a), f'metrics of {b}')
    poe.check_same_file(f'{b}/final.safetensors', f'{a}/final.safetensors')


def loss(out):
    return poe.steps(out)[-1]['loss']


def sent(out):
    """Bytes of a step by rank: as they were, and as they would be in fp32 with nothing left out."""
    last = [m for m in poe.all_metrics(out) if 'step_bytes' in m][-1]
    return last['step_bytes'], last['step_bytes_fp32']


def activations(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    fp32 = train(folder, 'fp32', data)
    poe.check_same_file(f'{train(folder, "named", data, wire="fp32")}/final.safetensors', f'{fp32}/final.safetensors')
    weights = {poe.read_bytes(f'{fp32}/final.safetensors')}
    for wire in FORMATS:
        one = train(folder, wire, data, wire=wire, threads=2)
        check_same(one, train(folder, f'{wire}-ranks', data, poe.RANKS, 3, wire=wire))
        weights.add(poe.read_bytes(f'{one}/final.safetensors'))
        poe.check(abs(loss(one) - loss(fp32)) < 0.05, f'{wire}: loss {loss(one)}, fp32 {loss(fp32)}')
        less, more = sent(one)
        poe.check(all(a < b for a, b in zip(less[:2], more[:2])), f'{wire}: bytes {less} and {more}')
        for first, second in zip(poe.steps(fp32)[:1], poe.steps(one)[:1]):  # nobody but the receivers sees a difference
            poe.check_equal(second['stage_loss'][0], first['stage_loss'][0], 'first loss of stage 0')
    poe.check_equal(len(weights), 1 + len(FORMATS), 'different weights')


def shared(folder):
    """Sums in bf16 under every rule: all ranks apply the same bits, or losses would part."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for sync, head, stages in (('exact', 'sh', '2,1'), ('exact', 'ps', '1,1,1'), ('stale:2', 'ps', '1,2,1,1'),
                               ('every:3', 'sh', '1,1,1')):
        ranks, options = stages.count(',') + 1, {'stages': stages, 'sync': sync, 'head': head}
        one = train(folder, f'{sync}-{head}', data, wire_shared='bf16', **options)
        check_same(one, train(folder, f'{sync}-{head}-ranks', data, poe.RANKS, ranks, wire_shared='bf16', **options))
        fp32 = train(folder, f'{sync}-{head}-fp32', data, **options)
        poe.check(poe.read_bytes(f'{one}/final.safetensors') != poe.read_bytes(f'{fp32}/final.safetensors'), 'rounded')
        poe.check(abs(loss(one) - loss(fp32)) < 0.05, f'loss {loss(one)}, fp32 {loss(fp32)}')


def rows(folder):
    """A vocabulary of which a step sees little: most of the embedding's gradient never travels."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    out = train(folder, 'out', data, vocab_size=2000, num_iterations=2)
    less, more = sent(out)
    # head and embedding have 256 KB each: the head's goes both ways in the middle, the embedding's hardly at all
    poe.check(more[1] - less[1] > 0.8 * 2 * 2048 * 32 * 4, f'bytes of a step {less}, in fp32 {more}')


def gradients(folder):
    """Where gradients flow back they travel in the same format."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for objective, schedule, wire in (('bp', 'zb-h1', 'fp8'), ('hierarchical', '1f1b', 'bf16')):
        options = {'objective': objective, 'wire': wire, 'total_batch_size': 256, 'num_iterations': 4}
        one = train(folder, f'{objective}-{wire}', data, schedule=schedule, **options)
        check_same(one, train(folder, f'{objective}-{wire}-ranks', data, poe.RANKS, 3, schedule=schedule, **options))
        check_same(one, train(folder, f'{objective}-{wire}-zb', data, schedule='zb-h2', **options))


def resumed(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'wire': 'int8', 'wire_shared': 'bf16', 'sync': 'stale:2', 'head': 'ps'}
    whole = train(folder, 'whole', data, save_every=3, **options)
    checkpoint = f'{whole}/checkpoints/step-00000003'
    for launch in (poe.THREADS, poe.RANKS):
        out = f'{folder}/{launch}'
        poe.succeed(['--resume', checkpoint, '--out', out, '--export', f'{out}/final.safetensors'], launch, 3)
        check_same(whole, out)
    for flag, value in (('--wire', 'fp8'), ('--wire-shared', 'fp32')):
        refused = poe.run(['--resume', checkpoint, '--out', f'{folder}/other', flag, value])
        poe.check_refused(refused, 2, flag, value, 'resuming cannot change it')


def evaluated(folder):
    """Evaluation and generation read what came over the links in the run's format."""
    data = poe.write_text(f'{folder}/text.txt')
    out = train(folder, 'out', data, vocab_size=300, wire='fp8')
    again = poe.succeed(['--resume', out, '--eval-only'])
    bpb = poe.evaluations(out)[-1]['bpb']['aggregate']
    poe.check(f'{bpb:.6f}' in again.out, f'{bpb} in {again.out}')
    words = ['generate', '--checkpoint', out, '--prompt', 'the', '--temperature', '0', '--max-tokens', '8']
    poe.check_equal(poe.succeed(words).out, poe.succeed(words).out, 'text')


poe.main(activations, shared, rows, gradients, resumed, evaluated)
