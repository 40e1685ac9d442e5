# SPDX-License-Identifier: MIT
"""The same weights bit for bit, whatever carries the messages and however many ranks and threads compute."""
import itertools
import os

import poe

SYNC = ('exact', 'stale', 'stale:2', 'every:3')
STAGES = {1: '3', 2: '2,1', 4: '1,2,1,1'}


def train(folder, name, data, launch=poe.THREADS, ranks=1, **changes):
    out = f'{folder}/{name}'
    poe.succeed(poe.flags(data=data, out=out, export=f'{out}/final.safetensors', **changes), launch, ranks)
    return out


def check_same(a, b):
    poe.check_equal(poe.metrics(b), poe.metrics(a), f'metrics of {b}')
    poe.check_same_file(f'{b}/final.safetensors', f'{a}/final.safetensors')


def compare_forms(folder, ranks, sync, head):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'stages': STAGES[ranks], 'sync': sync, 'head': head}
    one = train(folder, f'one-{ranks}-{sync}', data, **options)
    many = train(folder, f'many-{ranks}-{sync}', data, poe.RANKS, ranks, **options)
    check_same(one, many)


def ranks_and_rules(folder):
    for (ranks, sync), head in zip(itertools.product((2, 4), SYNC), itertools.cycle(('sh', 'ps', 'ps'))):
        compare_forms(folder, ranks, sync, head)


def one_rank(folder):
    compare_forms(folder, 1, 'exact', 'sh')
    compare_forms(folder, 1, 'stale', 'ps')


def threads(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    check_same(train(folder, 'one', data, threads=1), train(folder, 'three', data, threads=3))
    check_same(f'{folder}/one', train(folder, 'mpi', data, poe.RANKS, 3, threads=2))


def inproc_under_mpiexec(folder):
    """One rank of mpiexec holds all stages as threads."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    check_same(train(folder, 'one', data), train(folder, 'alone', data, poe.MPIEXEC, 1))
    check_same(f'{folder}/one', train(folder, 'inproc', data, transport='inproc'))


def sync_rules_differ(folder):
    """What the comparisons above compare is really something else for each rule."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    weights = {poe.read_bytes(f'{train(folder, sync, data, sync=sync)}/final.safetensors') for sync in SYNC}
    poe.check_equal(len(weights), len(SYNC), 'different weights')


def config_repeats(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    first = train(folder, 'first', data, sync='stale:2', head='ps')
    out = f'{folder}/again'
    poe.succeed(['--config', f'{first}/config.json', '--out', out, '--export', f'{out}/final.safetensors'])
    check_same(first, out)


def text(folder):
    """Text, its tokenizer and evaluations; and the configuration that the run leaves repeats it."""
    data = poe.write_text(f'{folder}/text.txt')
    options = {'vocab_size': 300, 'eval_every': 2}
    one = train(folder, 'one', data, **options)
    check_same(one, train(folder, 'many', data, poe.RANKS, 3, **options))
    poe.check_equal([e['step'] for e in poe.evaluations(one)], [2, 4, 6], 'evaluations')
    out = f'{folder}/again'
    poe.succeed(['--config', f'{one}/config.json', '--out', out, '--export', f'{out}/final.safetensors'])
    check_same(one, out)
    poe.check_same_file(f'{one}/tokenizer.json', f'{out}/tokenizer.json')


def recompute(folder):
    """Whatever backward makes again, by choice or because memory is short at one stage."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    options = {'stages': '3,2,1', 'head': 'ps'}
    one = train(folder, 'none', data, recompute='none', **options)
    for choice in ('norms', 'block'):
        check_same(one, train(folder, choice, data, recompute=choice, **options))
    totals = {}
    for choice in ('none', 'norms', 'block'):
        totals[choice] = stage_totals(poe.flags(data=data, dry_run=True, vocab_size=80, recompute=choice, **options))
    short = int(sum(totals['none'][:2]) / 2 * 2**20)  # between what stages 0 and 1 would like to have
    limited = poe.succeed(poe.flags(data=data, out=f'{folder}/short', export=f'{folder}/short/final.safetensors',
                                    memory_limit=short, agents='off', **options), poe.RANKS, 3)
    choices = [line.split()[-1] for line in stage_lines(limited.out)]
    poe.check(choices[0] != 'none' and choices[1:] == ['none', 'none'], f'what stages chose: {choices}')
    check_same(one, f'{folder}/short')
    for launch, ranks in ((poe.THREADS, 1), (poe.RANKS, 3)):
        refused = poe.run(poe.flags(data=data, out=f'{folder}/refused', memory_limit='1KiB', **options), launch, ranks)
        poe.check_refused(refused, 2, '--memory-limit', 'needs', 'allowed are')
    poe.check(not os.path.exists(f'{folder}/refused'), 'a refused run leaves no folder')


def stage_lines(text):
    """The stages' rows of the start-up table."""
    rows = text.split('recompute\n', 1)[1].split('shared', 1)[0]
    return rows.strip().splitlines()


def stage_totals(words):
    """MiB of every stage."""
    return [float(line.split()[-3]) for line in stage_lines(poe.succeed(words).out)]


def memory(folder):
    """Hundreds of steps need no more memory than tens."""
    peak = {}
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for i, n in enumerate((50, 400, 50, 400)):
        words = poe.command(poe.flags(data=data, out=f'{folder}/{i}', num_iterations=n, save_every=n // 2, sync='stale'))
        with open(os.devnull, 'w') as null:
            pid = os.posix_spawn(words[0], words, poe.environment(poe.THREADS),
                                 file_actions=[(os.POSIX_SPAWN_DUP2, null.fileno(), 1)])
        _, status, usage = os.wait4(pid, 0)
        poe.check_equal(status, 0, 'exit status')
        peak[n] = min(usage.ru_maxrss, peak.get(n, usage.ru_maxrss))
    # The allocator's arenas differ from run to run, at times by more than 1 MiB on a busy machine, so the smaller of two
    # peaks counts; a leak of 3 KiB a step would be seen.
    poe.check(peak[400] - peak[50] < 1024, f'peak in KiB after 50 and 400 steps: {peak}')


poe.main(ranks_and_rules, one_rank, threads, inproc_under_mpiexec, sync_rules_differ, config_repeats, text, recompute,
         memory)
