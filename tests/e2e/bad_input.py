# SPDX-License-Identifier: MIT
"""Each wrong input: one sentence that names it, from one rank, an exit status, and nothing left behind."""
import json
import math
import os
import shutil
import socket
import stat
import struct
import subprocess

import poe

USAGE, FAILURE = 2, 1


def refuse(args, *words, ranks=3, launches=(poe.THREADS, poe.MPIEXEC), code=USAGE, lines=1):
    for launch in launches:
        poe.check_refused(poe.run(args, launch, ranks), code, *words, lines=lines)


def tiny(folder, **changes):
    data = f'{folder}/tokens.bin'
    if not os.path.exists(data):
        poe.write_tokens(data)
    return poe.flags(**{'data': data, 'out': f'{folder}/out', **changes})


def check_untouched(folder):
    poe.check(not os.path.exists(f'{folder}/out'), f'left behind: {folder}/out')


def stages(folder):
    for value in ('0', '2,0,1', '-1,2', 'two', '1,,2', '1,2,', '', '1.5', '99999999999999999999', '1 2',
                  ','.join(['1'] * 1000)):
        refuse(tiny(folder, stages=value), '--stages', launches=(poe.THREADS,))
    refuse(tiny(folder, stages='1,0,1'), '--stages', launches=(poe.RANKS, poe.MPIEXEC))
    check_untouched(folder)


def ranks_and_stages(folder):
    refuse(tiny(folder), '--ranks', '3', ranks=2, launches=(poe.RANKS,))
    refuse(tiny(folder), '3 stages', '2 ranks', ranks=2, launches=(poe.MPIEXEC,))
    refuse(tiny(folder), '3 stages', '4 ranks', ranks=4, launches=(poe.MPIEXEC,))
    for transport in ('mpi', 'fabric'):
        refuse(tiny(folder, transport=transport), f'--transport {transport}', launches=(poe.THREADS,))
    check_untouched(folder)


def sizes(folder):
    for changes, words in (({'n_embd': 33}, ('--n-embd', '33', '--n-head')),
                           ({'n_head': 4, 'n_kv_head': 3}, ('--n-kv-head', '3')),
                           ({'total_batch_size': 100}, ('--total-batch-size', '100', '64', '128')),
                           ({'window_pattern': 'SXL'}, ('--window-pattern', 'SXL')),
                           ({'objective': 'local'}, ('--objective', 'local', 'hierarchical')),
                           ({'n_embd': 30, 'n_head': 2}, ('head',)),
                           ({'vocab_size': 10}, ('tokens.bin', '10'))):
        refuse(tiny(folder, **changes), *words, launches=(poe.THREADS, poe.RANKS))
    check_untouched(folder)


def flag_values(folder):
    for changes, words in (({'num_iterations': 'six'}, ('--num-iterations', 'six')),
                           ({'num_iterations': '-6'}, ('--num-iterations', '-6')),
                           ({'num_iterations': '6x'}, ('--num-iterations', '6x')),
                           ({'matrix_lr': 'nan'}, ('--matrix-lr', 'nan')),
                           ({'matrix_lr': '1e999'}, ('--matrix-lr',)),
                           ({'sync': 'stale:0'}, ('--sync', 'stale:0', 'every:N')),
                           ({'sync': 'often'}, ('--sync', 'often')),
                           ({'head': 'px'}, ('--head', 'px', 'sh', 'ps')),
                           ({'wire': 'fp4'}, ('--wire', 'fp4', 'bf16', 'int8')),
                           ({'wire_shared': 'fp8'}, ('--wire-shared', 'fp8', 'bf16')),
                           ({'objective': 'bp', 'wire_shared': 'bf16'}, ('--wire-shared bf16', '--objective bp')),
                           ({'kernels': 'sse'}, ('--kernels', 'sse', 'avx2')),
                           ({'seed': '99999999999999999999'}, ('--seed',)),
                           ({'deadline': '0'}, ('--deadline', '0.1'))):
        refuse(tiny(folder, **changes), *words, launches=(poe.THREADS,))
    for words, hint in ((['--num-iteration', '3'], '--num-iterations'), (['--stage', '1,1'], '--stages'),
                        (['--learning-rate', '1'], '--learning-rate'), (['trian'], 'trian'), (['--data'], '--data'),
                        (['-n', '4'], '-n'), (['generat', '--prompt', 'x'], 'generate')):
        refuse(words, hint, launches=(poe.THREADS,))
    refuse(tiny(folder) + ['--num-iteration', '3'], 'did you mean --num-iterations?')
    check_untouched(folder)


def networks(folder):
    rules = f'{folder}/rules'
    with open(rules, 'w') as file:
        file.write('# all\n*:rtt=5ms\n0-1:rtt=5\n')
    for value, words in (('0-9:rtt=5ms', ("'0-9:rtt=5ms'", 'no rank 9', 'ranks are 0 to 2')),
                         ('*:rtt=5ms;0-1:speed=5ms', ("'0-1:speed=5ms'", 'speed', 'rtt')),
                         ('0-1:cut=5s', ('0>1', 'cut')),
                         (rules, (rules, 'line 3', "'0-1:rtt=5'", 'allowed')), ('nothing', ('nothing', 'file'))):
        refuse(tiny(folder, net=value), '--net', *words, launches=(poe.THREADS,))
        refuse(tiny(folder, net=value, transport='mpi'), '--net', *words, launches=(poe.RANKS,))
    for value, words in (('kill rank=9 step=1', ("'kill rank=9 step=1'", 'rank from 0 to 2')),
                         ('burn rank=1 step=1', ('burn', 'segfault')), ('nothing', ('nothing', 'file'))):
        refuse(tiny(folder, fault=value), '--fault', *words, launches=(poe.THREADS,))
        refuse(tiny(folder, fault=value, transport='mpi'), '--fault', *words, launches=(poe.RANKS,))
    refuse(tiny(folder, fault='cut rank=0 to=1 step=1'), '--fault', 'agent', launches=(poe.THREADS,))
    refuse(tiny(folder, net='0-9:rtt=5ms', dry_run=True), 'no rank 9', launches=(poe.THREADS,))
    check_untouched(folder)


def fabrics(folder):
    for value in ('7000', '7000-6999', '0-10', '7000-70000', '7000-8000x', 'any'):
        refuse(tiny(folder, port_range=value), '--port-range', value, 'A-B', launches=(poe.THREADS,))
    with socket.create_server(('127.0.0.1', 0)) as busy:
        port = busy.getsockname()[1]
        for changes, words in (({'fabric_provider': 'nonsense'}, ('--fabric-provider', 'nonsense', 'tcp')),
                               ({'interface': 'nonsense0'}, ('--interface', 'nonsense0', 'lo')),
                               ({'port_range': f'{port}-{port}'}, ('--port-range', f'{port}-{port}', 'no free port'))):
            refuse(tiny(folder, transport='fabric', **changes), *words, launches=(poe.RANKS, poe.MPIEXEC))
    check_untouched(folder)


def files(folder):
    nothing = f'{folder}/nothing'
    empty = f'{folder}/empty'
    open(empty, 'w').close()
    for name in ('data', 'config', 'init-from', 'tokenizer', 'val-data'):
        for path in (nothing, folder):
            refuse(tiny(folder) + [f'--{name}', path], path, launches=(poe.THREADS,))
        refuse(tiny(folder) + [f'--{name}', nothing], nothing, launches=(poe.RANKS,))
        refuse(tiny(folder) + [f'--{name}', empty], empty, launches=(poe.THREADS,))
    check_untouched(folder)


def unreadable(folder):
    path = poe.write_tokens(f'{folder}/tokens.bin')
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        raise poe.Skip('root reads every file')
    refuse(tiny(folder), path)


def shards(folder):
    whole = poe.read_bytes(poe.write_tokens(f'{folder}/tokens.bin'))

    def shard(name, content):
        with open(f'{folder}/{name}.bin', 'wb') as file:
            file.write(content)
        return f'{folder}/{name}.bin'
    for path in (shard('short', whole[:-1]), shard('long', whole + b'\0\0'), shard('header', whole[:1000]),
                 shard('magic', b'\1' + whole[1:]), shard('version', whole[:4] + b'\7' + whole[5:]),
                 shard('count', whole[:8] + struct.pack('<i', -5) + whole[12:]),
                 shard('few', whole[:8] + struct.pack('<i', 10) + whole[12:1024 + 20])):
        refuse(tiny(folder, data=path), path, launches=(poe.THREADS,))
    refuse(tiny(folder, data=shard('id', whole[:1024 + 70] + b'\xff\xff' + whole[1024 + 72:])), 'id.bin', '65535', '80')
    check_untouched(folder)


def texts(folder):
    for name, content in (('utf8.txt', b'good words\n\nbad \xff byte\n'), ('empty.txt', b'\n\n\n'),
                          ('broken.jsonl', b'{"text": "a"}\n{"text": \n'), ('none.jsonl', b'{"words": "a"}\n'),
                          ('foreign.parquet', b'PAR1')):
        with open(f'{folder}/{name}', 'wb') as file:
            file.write(content)
        refuse(tiny(folder, data=f'{folder}/{name}', vocab_size=300), name, launches=(poe.THREADS, poe.RANKS))
    check_untouched(folder)


def configurations(folder):
    for text, words in (('{"n_embed": 32}', ('n_embed', 'n_embd')), ('{"n_embd": "wide"}', ('n_embd', 'wide')),
                        ('{"n_embd": true}', ('n_embd',)), ('{"n_embd": [1]}', ('n_embd',)), ('[1]', ()),
                        ('{"stages": [1, "x"]}', ('stages',)), ('{"stages": [1, 0]}', ('stages',)),
                        ('{"n_embd": 32,}', ('line 1',)), ('{"n_embd": 3.5}', ('n_embd',)), ('{"head": 1}', ('head',)),
                        ('{"n_embd": 32, "n_embd": 64}', ('n_embd',)), ('{"data": 3}', ('data',))):
        path = f'{folder}/config.json'
        with open(path, 'w') as file:
            file.write(text)
        refuse(tiny(folder, n_embd=None, stages=None) + ['--config', path], path, *words, launches=(poe.THREADS,))
    refuse(tiny(folder, n_embd=None) + ['--config', path], path, 'data')
    check_untouched(folder)


def weights(folder):
    """Missing, superfluous and misshapen tensors are named."""
    poe.succeed(tiny(folder, out=f'{folder}/first', num_iterations=1, export=f'{folder}/good.safetensors'))
    for name, change in (('missing', lambda t: t.pop('transformer.h.1.attn.c_q.weight')),
                         ('superfluous', lambda t: t.update({'transformer.h.7.attn.c_q.weight': t['lm_head.weight']})),
                         ('misshapen', lambda t: t.update({'transformer.h.1.attn.c_q.weight': t['lm_head.weight']}))):
        tensors = poe.read_safetensors(f'{folder}/good.safetensors')
        change(tensors)
        path = poe.write_safetensors(f'{folder}/{name}.safetensors', tensors)
        word = 'transformer.h.7.attn.c_q' if name == 'superfluous' else 'transformer.h.1.attn.c_q'
        refuse(tiny(folder, init_from=path), path, word)
    path = f'{folder}/cut.safetensors'
    shutil.copy(f'{folder}/good.safetensors', path)
    os.truncate(path, os.path.getsize(path) - 10)
    refuse(tiny(folder, init_from=path), path)
    check_untouched(folder)


def folders(folder):
    poe.write_tokens(f'{folder}/tokens.bin')
    for out in (f'{folder}/tokens.bin', f'{folder}/tokens.bin/run', '/proc/run'):
        refuse(tiny(folder, out=out), out)
    first = f'{folder}/first'
    poe.succeed(tiny(folder, out=first))
    before = poe.metrics(first), poe.checkpoints(first)
    refuse(tiny(folder, out=first), '--out', first, '--resume')
    poe.succeed(tiny(folder, out=f'{folder}/second'))
    refuse(['--resume', f'{folder}/second', '--out', first], '--out', first)
    poe.check_equal((poe.metrics(first), poe.checkpoints(first)), before, 'the first run')


def no_export(folder):
    """Said before the training, not after it."""
    refuse(tiny(folder, export=f'{folder}/nowhere/x.safetensors'), '--export', 'nowhere')
    refuse(tiny(folder, export=folder), '--export', folder)
    check_untouched(folder)


def tmpfs(folder, size):
    os.mkdir(folder)
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], capture_output=True)
    if done.returncode != 0:
        raise poe.Skip(f'cannot mount a tmpfs: {done.stderr.decode().strip()}')


def full_disk(folder):
    """The disk fills during a checkpoint: the one before stays whole, and nothing half-written is left."""
    disk = f'{folder}/disk'
    for launch in (poe.THREADS, poe.RANKS):
        tmpfs(disk, '2800k')
        try:
            result = poe.run(tiny(folder, out=f'{disk}/out', num_iterations=40, save_every=1), launch, 3)
            poe.check_refused(result, FAILURE, disk)
            names = poe.checkpoints(f'{disk}/out')
            poe.check(names, 'no checkpoint at all')
            poe.check(not poe.leftovers(disk), poe.leftovers(disk))
            for name in names:
                poe.succeed(['inspect', f'{disk}/out/checkpoints/{name}'])
            poe.check_equal(len(poe.steps(f'{disk}/out')), int(names[-1][5:]) + 1, 'steps')
        finally:
            subprocess.run(['umount', disk], check=True)
        os.rmdir(disk)


def not_a_number(folder):
    """Stops before the update of the stage that sees it; no checkpoint holds that step."""
    poe.succeed(tiny(folder, out=f'{folder}/first', num_iterations=1, export=f'{folder}/good.safetensors'))
    for value, stage, launch in ((math.nan, 1, poe.RANKS), (math.inf, 1, poe.THREADS), (math.nan, 0, poe.MPIEXEC)):
        tensors = poe.read_safetensors(f'{folder}/good.safetensors')
        tensors[f'transformer.h.{stage}.mlp.c_fc.weight'][1][5] = value
        path = poe.write_safetensors(f'{folder}/bad.safetensors', tensors)
        out = f'{folder}/{launch}'
        result = poe.run(tiny(folder, out=out, init_from=path, save_every=1), launch, 3)
        poe.check_refused(result, FAILURE, 'step 0', f'stage {stage} ')
        poe.check_equal(poe.checkpoints(out), [], 'checkpoints')


def late_infinity(folder):
    """A rate that blows the weights up after some steps: the checkpoints before it stay."""
    args = tiny(folder, num_iterations=60, matrix_lr=1e6, embedding_lr=1e6, unembedding_lr=1e6, warmup_steps=0,
                save_every=1)
    result = poe.run(args, poe.RANKS, 3)
    if result.code == 0:
        raise poe.Skip('the losses stayed finite')
    poe.check_refused(result, FAILURE, 'step ', 'stage ')
    step = int(result.err.split('step ')[1].split(':')[0])
    poe.check_equal(len(poe.checkpoints(f'{folder}/out')), step, 'checkpoints')


def other_configuration(folder):
    """One rank gets other flags than the rest."""
    words = [poe.command(tiny(folder, **change)) for change in ({}, {'seed': 5}, {})]
    line = ['mpiexec']
    for part in words:
        line += [*(':' if len(line) > 1 else ''), '-n', '1', *part]
    poe.check_refused(poe.run_command(line, poe.MPIEXEC), USAGE, 'rank 1', 'seed', '5')
    line[line.index('--seed')] = '--sedd'
    poe.check_refused(poe.run_command(line, poe.MPIEXEC), USAGE, 'rank 1', '--sedd', '--seed')
    check_untouched(folder)


def commands(folder):
    poe.succeed(tiny(folder, out=f'{folder}/run'))
    run = f'{folder}/run'
    for args, words in ((['generate', '--checkpoint', run, '--prompt', 'x'], ('tokenizer',)),
                        (['generate', '--checkpoint', run], ('--prompt',)),
                        (['generate', '--prompt', 'x'], ('--checkpoint',)),
                        (['generate', '--checkpoint', run, '--prompt', 'x', '--stage', '3'], ('--stage', '3')),
                        (['generate', '--checkpoint', run, '--prompt', 'x', '--stage', '0', '--prefix', '1'], ('--prefix',)),
                        (['generate', '--checkpoint', f'{folder}/none', '--prompt', 'x'], ('none',)),
                        (['export', '--checkpoint', run], ('--export',)),
                        (['export', '--checkpoint', run, '--export', f'{folder}/no/where'], ('no/where',)),
                        (['inspect'], ('path',)), (['inspect', f'{folder}/none'], ('none',)),
                        (['inspect', f'{folder}/tokens.bin'], ('tokens.bin',)),
                        (['data', '--data', f'{folder}/none.txt', '--out', f'{folder}/x'], ('none.txt',)),
                        (['data', '--out', f'{folder}/x'], ('--data',)),
                        (['--eval-only'], ('--resume',)), (['--eval-only', '--resume', run], ('--val-data',))):
        result = poe.run(args)
        poe.check(result.code in (1, 2), result)
        poe.check_refused(result, result.code, *words)
    poe.check(not os.path.exists(f'{folder}/x'), 'data left a folder')


def plans(folder):
    times = ['--emulate-compute', 'forward=20ms,backward=40ms']
    for args, words in ((['--stages', '2,2', '--ranks', 5], ('--ranks', '5', '4')),
                        (['--stages', '2,2', '--ranks', 3] + times, ('--ranks', '3', '2')),
                        (['--stages', '2,2', '--emulate-compute', 'forward=20'], ('--emulate-compute', 'forward=20')),
                        (['--stages', '2,2', '--net', '0-7:rtt=80ms'] + times, ('--net', '7')),
                        (['--stages', '2,2', '--schedule', 'zb-h1'], ('--schedule', 'zb-h1')),
                        (['--stages', '2,2', '--sync', 'late'], ('--sync', 'late')),
                        (['--jsn'], ('--json',))):
        refuse(['plan'] + args, *words, launches=(poe.THREADS,))
    refuse(['--json'], '--json', launches=(poe.THREADS,))
    poe.check(not os.listdir(folder), os.listdir(folder))


poe.main(stages, ranks_and_stages, sizes, flag_values, networks, fabrics, files, unreadable, shards, texts, configurations, weights,
         folders, no_export, full_disk, not_a_number, late_infinity, other_configuration, commands, plans)
