# SPDX-License-Identifier: MIT
"""A run that stops and goes on is the run that never stopped."""
import os
import re
import shutil

import poe

N = 6


def train(folder, name, data, launch=poe.THREADS, ranks=3, **changes):
    out = f'{folder}/{name}'
    poe.succeed(poe.flags(data=data, out=out, num_iterations=N, export=f'{out}/final.safetensors', **changes), launch,
                ranks)
    return out


def resume(checkpoint, out, *more, launch=poe.THREADS, ranks=3):
    return poe.succeed(['--resume', checkpoint, '--out', out, '--export', f'{out}/final.safetensors', *more], launch,
                       ranks)


def check_same(a, b):
    poe.check_equal(poe.metrics(b), poe.metrics(a), f'metrics of {b}')
    poe.check_same_file(f'{a}/final.safetensors', f'{b}/final.safetensors')


def step_name(step):
    return f'step-{step:08d}'


def every_step(folder, data, **changes):
    whole = train(folder, 'whole', data, save_every=1, **changes)
    poe.check_equal(poe.checkpoints(whole), [step_name(s) for s in range(1, N + 1)], 'checkpoints')
    for step in range(1, N + 1):
        out = f'{folder}/from-{step}'
        resume(f'{whole}/checkpoints/{step_name(step)}', out)
        check_same(whole, out)
    return whole


def rule_test(rule, head):
    def test(folder):
        every_step(folder, poe.write_tokens(f'{folder}/tokens.bin'), sync=rule, head=head)
    test.__name__ = 'every_step_' + rule.replace(':', '_')
    return test


def text(folder):
    """Text too short for the run: epochs, the packing buffer and the evaluations go on where they were."""
    data = poe.write_text(f'{folder}/text.txt', documents=20)
    whole = every_step(folder, data, vocab_size=290, eval_every=2)
    poe.check_equal([e['step'] for e in poe.evaluations(whole)], [2, 4, 6], 'evaluations')


def other_transport(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    threads = train(folder, 'threads', data, save_every=2, sync='stale:2', head='ps')
    ranks = train(folder, 'ranks', data, poe.RANKS, save_every=2, sync='stale:2', head='ps')
    resume(f'{threads}/checkpoints/{step_name(2)}', f'{folder}/a', launch=poe.RANKS)
    resume(f'{ranks}/checkpoints/{step_name(4)}', f'{folder}/b', launch=poe.THREADS)
    resume(f'{ranks}/checkpoints/{step_name(2)}', f'{folder}/c', launch=poe.MPIEXEC)
    for out in (ranks, f'{folder}/a', f'{folder}/b', f'{folder}/c'):
        check_same(threads, out)


def in_its_folder(folder):
    """Resumed where it was: the folder itself, `latest`, and a middle checkpoint, whose followers make way."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data, save_every=2)
    for what in ('folder', 'latest', step_name(2)):
        out = f'{folder}/{what}'
        poe.succeed(poe.flags(data=data, out=out, num_iterations=N, save_every=2))
        shutil.rmtree(f'{out}/checkpoints/{step_name(6)}')
        word = {'folder': out, 'latest': 'latest'}.get(what, f'{out}/checkpoints/{what}')
        result = poe.run(['--resume', word, '--out', out, '--export', f'{out}/final.safetensors'])
        poe.check_equal(result.code, 0, result)
        poe.check(f'at step {2 if what == step_name(2) else 4}' in result.out, result)
        check_same(whole, out)
        names = [name for name in poe.checkpoints(out) if not name.endswith('.abandoned')]
        poe.check_equal(names, [step_name(s) for s in (2, 4, 6)], 'checkpoints')


def abandoned_checkpoints(folder):
    """Going back to a middle checkpoint abandons the later ones: `latest` never picks them up again."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    out = train(folder, 'out', data, save_every=2)
    aside = [f'{step_name(s)}.abandoned' for s in (4, 6)]
    result = poe.run(['--resume', f'{out}/checkpoints/{step_name(2)}', '--num-iterations', '3'], poe.RANKS, 3)
    poe.check(result.code == 0 and len(result.lines) == 2 and all(name in result.err for name in aside), result)
    poe.check_equal(poe.checkpoints(out), [step_name(2), step_name(3)] + aside, 'checkpoints')
    poe.check_equal([m['step'] for m in poe.steps(out)], [0, 1, 2], 'steps')
    result = resume('latest', out)
    poe.check('at step 3' in result.out, result)


def keep(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data)
    kept = train(folder, 'kept', data, save_every=1, keep=2)
    poe.check_equal(poe.checkpoints(kept), [step_name(s) for s in (5, 6)], 'checkpoints')
    resume(f'{kept}/checkpoints/{step_name(5)}', f'{folder}/again')
    check_same(whole, f'{folder}/again')


def finished(folder):
    """Nothing to train: the weights are exported, the metrics stay, and no step is done."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data)
    for launch in (poe.THREADS, poe.RANKS):
        before = poe.metrics(whole)
        poe.succeed(['--resume', whole, '--export', f'{folder}/{launch}.safetensors'], launch, 3)
        poe.check_same_file(f'{whole}/final.safetensors', f'{folder}/{launch}.safetensors')
        poe.check_equal(poe.metrics(whole), before, 'metrics')


def changes_said(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    other = poe.write_tokens(f'{folder}/other.bin', seed=2)
    whole = train(folder, 'whole', data, save_every=3)
    checkpoint = f'{whole}/checkpoints/{step_name(3)}'
    result = resume(checkpoint, f'{folder}/longer', '--num-iterations', '8')
    poe.check('--num-iterations 8 instead of 6' in result.out, result)
    poe.check_equal([m['step'] for m in poe.steps(f'{folder}/longer')], list(range(8)), 'steps')
    result = resume(checkpoint, f'{folder}/other', '--data', other)
    poe.check('new data' in result.out, result)
    poe.check_equal([m['step'] for m in poe.steps(f'{folder}/other')], list(range(6)), 'steps')
    same = f'{folder}/same.bin'
    shutil.copy(data, same)
    result = resume(checkpoint, f'{folder}/moved', '--data', same)
    poe.check('new data' not in result.out, result)
    check_same(whole, f'{folder}/moved')


def other_kernels_said(folder):
    """Other kernels round otherwise: resuming says so, and only then."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    train(folder, 'whole', data, save_every=3, kernels='generic')
    checkpoint = f'{folder}/whole/checkpoints/{step_name(3)}'
    for kernels in ('generic', 'auto'):
        result = resume(checkpoint, f'{folder}/{kernels}', '--kernels', kernels)
        same = re.search('^ranks .* kernels generic,', result.out, re.MULTILINE)
        poe.check(('not bit for bit' in result.out) == (not same), result)
    check_same(f'{folder}/whole', f'{folder}/generic')


def changes_refused(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data, save_every=3)
    before = poe.metrics(whole), poe.checkpoints(whole)
    for flag, value in (('n-embd', '64'), ('sync', 'stale'), ('matrix-lr', '0.5'), ('stages', '1,2'), ('head', 'ps'),
                        ('seed', '7'), ('total-batch-size', '256')):
        result = poe.run(['--resume', whole, f'--{flag}', value])
        poe.check_refused(result, 2, f'--{flag}', 'resum')
    result = poe.run(['--resume', whole, '--n-embd', '64'], poe.RANKS, 3)
    poe.check_refused(result, 2, '--n-embd')
    poe.succeed(['--resume', whole, '--n-embd', '32'])  # its own value is no change
    poe.write_tokens(data, seed=3)
    for launch in (poe.THREADS, poe.RANKS):
        poe.check_refused(poe.run(['--resume', whole], launch, 3), 2, data, '--data')
    os.unlink(data)
    poe.check_refused(poe.run(['--resume', whole]), 2, data)
    poe.check_equal((poe.metrics(whole), poe.checkpoints(whole)), before, 'the run')


def flip(path, where):
    with open(path, 'r+b') as file:
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 1]))


def damaged(folder):
    """The newest checkpoint is damaged in each of its files in turn, cut short, or lacks one."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data, save_every=3)
    launches = [poe.THREADS, poe.RANKS]
    for name in ('manifest.json', 'shared.h5', 'stage-000.h5', 'stage-002.h5'):
        for damage in ('flip', 'cut', 'remove'):
            out, launch = f'{folder}/{name}-{damage}', launches[0]
            launches.reverse()
            shutil.copytree(whole, out)
            path = f'{out}/checkpoints/{step_name(6)}/{name}'
            if damage == 'flip':
                flip(path, os.path.getsize(path) // 2)
            elif damage == 'cut':
                os.truncate(path, os.path.getsize(path) - 1)
            else:
                os.unlink(path)
            before = poe.metrics(out)
            result = poe.run(['--resume', 'latest', '--out', out], launch, 3)
            poe.check_refused(result, 2, step_name(6), '--resume-older', lines=2)
            poe.check_equal(poe.metrics(out), before, 'metrics')
            if damage == 'flip':
                result = poe.run(['--resume', 'latest', '--out', out, '--resume-older', '--export',
                                  f'{out}/final.safetensors'], launch, 3)
                poe.check(result.code == 0 and step_name(6) in result.err and 'at step 3' in result.out, result)
                check_same(whole, out)


def half_written(folder):
    """What a kill in mid-save leaves is no checkpoint, and goes away."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data, save_every=3)
    shutil.move(f'{whole}/checkpoints/{step_name(6)}', f'{whole}/checkpoints/.{step_name(6)}.tmp')
    result = resume('latest', whole)
    poe.check('at step 3' in result.out, result)
    poe.check_equal(poe.leftovers(whole), [], 'temporary files')


def moved(folder):
    """A checkpoint out of its run, by its own path alone."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    whole = train(folder, 'whole', data, save_every=3)
    shutil.copytree(f'{whole}/checkpoints/{step_name(3)}', f'{folder}/elsewhere')
    resume(f'{folder}/elsewhere', f'{folder}/out')
    poe.check_equal(poe.steps(f'{folder}/out'), poe.steps(whole)[3:], 'steps')
    poe.check_same_file(f'{whole}/final.safetensors', f'{folder}/out/final.safetensors')


# --- a folder for each rank, as on hosts without a common disk ---------------------------------------------------------

def apart(folder, args, ranks=3):
    """A run whose rank r works in FOLDER/r, where its --out is run/."""
    words = ['mpiexec']
    for r in range(ranks):
        os.makedirs(f'{folder}/{r}', exist_ok=True)
        words += [*([':'] if r else []), '-n', '1', '-wdir', f'{folder}/{r}', poe.PROGRAM, *[str(a) for a in args], '--out', 'run']
    return poe.run_command(words, poe.MPIEXEC)


def stage_files(folder, step, r):
    found = os.listdir(f'{folder}/{r}/run/checkpoints/{step_name(step)}')
    return sorted(name for name in found if name.startswith('stage'))


def lost_hosts(folder):
    """Whichever host is lost, with its disk, the folder of a rank after it has all that is needed to go on elsewhere."""
    data = poe.write_text(f'{folder}/text.txt')
    flags = poe.flags(data=data, vocab_size=290, save_every=2, sync='stale:2', save_to='peer', eval_every=2)
    whole = apart(f'{folder}/whole', flags)
    poe.check(whole.code == 0 and not whole.err, whole)
    for r in range(3):
        poe.check_equal(stage_files(f'{folder}/whole', N, r), sorted({f'stage-{k:03d}.h5' for k in (r, (r + 2) % 3)}), 'files')
    for lost, holder in ((0, 1), (1, 2), (2, 0)):
        at = f'{folder}/lost-{lost}'
        killed = apart(at, [*flags, '--fault', f'kill-agent rank={lost} step=4 phase=forward'])
        poe.check(killed.code != 0, killed)
        shutil.rmtree(f'{at}/{lost}')
        refused = apart(at, ['--resume', 'latest'])
        poe.check_refused(refused, 2, 'run/config.json', 'copy')
        shutil.copytree(f'{at}/{holder}/run', f'{at}/{lost}/run', dirs_exist_ok=True)
        result = apart(at, ['--resume', 'latest'])
        poe.check(result.code == 0 and 'at step 4' in result.out, result)
        for r in range(3):
            for name in stage_files(f'{folder}/whole', N, r):
                poe.check_same_file(*(f'{run}/{r}/run/checkpoints/{step_name(N)}/{name}' for run in (f'{folder}/whole', at)))
        poe.check_equal(poe.metrics(f'{at}/2/run'), poe.metrics(f'{folder}/whole/2/run'), 'metrics')


def killed_while_copying(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    flags = poe.flags(data=data, save_every=3, save_to='peer')
    whole = apart(f'{folder}/whole', flags)
    poe.check(whole.code == 0 and not whole.err, whole)
    for part in range(5):
        at = f'{folder}/part-{part}'
        rules = ';'.join(f'kill rank={r} step=3 phase=checkpoint micro={part}' for r in range(part % 3 + 1))
        result = apart(at, [*flags, '--fault', rules])
        poe.check(result.code == 0 and result.err.count('killed') + result.err.count('Killed') == part % 3 + 1, result)
        for r in range(3):
            poe.check_equal(poe.leftovers(f'{at}/{r}/run'), [], 'temporary files')
            for step in (3, N):
                for name in stage_files(f'{folder}/whole', step, r):
                    poe.check_same_file(*(f'{run}/{r}/run/checkpoints/{step_name(step)}/{name}' for run in (f'{folder}/whole', at)))


def nothing_there(folder):
    for what, word in (('latest', folder), (f'{folder}/none', 'none'), (folder, folder)):
        for launch in (poe.THREADS, poe.RANKS):
            poe.check_refused(poe.run(['--resume', what, '--out', folder], launch, 3), 2, word)
    poe.check_refused(poe.run(['--resume', 'latest']), 2, '--out')


poe.main(*[rule_test(r, h) for r, h in (('exact', 'sh'), ('stale', 'ps'), ('stale:2', 'sh'), ('every:3', 'ps'))], text,
         other_transport, in_its_folder, abandoned_checkpoints, keep, finished, changes_said, other_kernels_said, changes_refused, damaged,
         half_written, moved, lost_hosts, killed_while_copying, nothing_there)
