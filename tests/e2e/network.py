# SPDX-License-Identifier: MIT
"""Runs over an emulated network: the same numbers, later; and what a broken one makes of a run."""
import poe

SLOW = '*:rtt=20ms,jitter=10ms,bw=100Mbit,loss=1%'
FAILURE = 1


def train(folder, name, launch=poe.THREADS, ranks=1, **changes):
    out = f'{folder}/{name}'
    data = poe.write_tokens(f'{folder}/tokens.bin')
    result = poe.succeed(poe.flags(data=data, out=out, export=f'{out}/final.safetensors', **changes), launch, ranks)
    return out, result


def check_same(a, b):
    poe.check_equal([{**m, 'emulated': None} for m in poe.metrics(b)], [{**m, 'emulated': None} for m in poe.metrics(a)],
                    f'metrics of {b}')
    poe.check_same_file(f'{b}/final.safetensors', f'{a}/final.safetensors')


def same_numbers(folder):
    """Bit for bit, whatever the network does in between; and whatever such a run shows says what it is."""
    for launch, ranks, sync, net in ((poe.THREADS, 1, 'exact', SLOW),
                                     (poe.RANKS, 3, 'stale:2', SLOW + ';0-1:down,from=0.3s,to=0.8s;seed=5')):
        real, result = train(folder, f'real-{sync}', sync=sync, head='ps')
        poe.check('emulated' not in result.out, result)
        poe.check(all('emulated' not in m for m in poe.metrics(real)), 'a real run is marked')
        emulated, result = train(folder, f'emulated-{sync}', launch, ranks, net=net, sync=sync, head='ps')
        check_same(real, emulated)
        for words in ('network   emulated: ', ', emulated network', ' (emulated network) | '):
            poe.check(words in result.out, f'"{words}" in {result.out}')
        poe.check(all(m['emulated'] == 'network' for m in poe.metrics(emulated)), 'a line is not marked')


def resumed(folder):
    """The network belongs to the run; a resumed one may change it."""
    options = {'num_iterations': 8, 'save_every': 4}
    whole, _ = train(folder, 'whole', **options)
    first, _ = train(folder, 'first', net='0-1:rtt=2ms', **options)
    for words, marked in (([], True), (['--net', 'none'], False)):
        poe.succeed(['--resume', f'{first}/checkpoints/step-00000004', '--out', f'{folder}/{marked}', *words,
                     '--export', f'{folder}/{marked}.safetensors'])
        poe.check_same_file(f'{folder}/{marked}.safetensors', f'{whole}/final.safetensors')
        poe.check_equal(['emulated' in m for m in poe.steps(f'{folder}/{marked}')], [True] * 4 + [marked] * 4, 'marks')


def cut_off(folder):
    """A partition that outlasts the deadline ends the run with the sentence of the rank that hears nothing any more. What
    it waits for then depends on how far the run has come. Under mpiexec, which takes a while to end the others, these
    may lose patience too."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in (poe.THREADS, poe.RANKS):
        result = poe.run(poe.flags(data=data, out=f'{folder}/{launch}', num_iterations=1000000, deadline=3,
                                   net='0>1:down,from=1s,to=600s'), launch, 3)
        lines = 1 if launch == poe.THREADS else max(1, len(result.lines))
        poe.check_refused(result, FAILURE, 'rank 1: rank 0 has given no sign of life for ', '--deadline 3',
                          'rank 1 waits for ', lines=lines)
        poe.check('rank 1: rank 0 has given no sign' in result.lines[0], result)


def outlived(folder):
    """One that ends before the deadline is a pause."""
    real, _ = train(folder, 'real')
    paused, _ = train(folder, 'paused', poe.RANKS, 3, net='*:down,from=0.2s,to=1.2s', deadline=30)
    check_same(real, paused)


def damaged(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for launch in (poe.THREADS, poe.RANKS):
        result = poe.run(poe.flags(data=data, out=f'{folder}/{launch}', net='1>2:corrupt=6'), launch, 3)
        poe.check_refused(result, FAILURE, 'rank 2', 'refuses', 'from rank 1')


poe.main(same_numbers, resumed, cut_off, outlived, damaged)
