# SPDX-License-Identifier: MIT
"""Accounts of time, traces, and emulated compute: what must hold of them on any machine, however busy."""
import os
import signal

import poe

ACCOUNTS = ['forward', 'backward', 'optimizer', 'receive', 'credit', 'shared', 'turn', 'send', 'data', 'checkpoint', 'other']
BUSY = ACCOUNTS[:3]


def train(folder, name, launch=poe.THREADS, ranks=1, **changes):
    data = f'{folder}/tokens.bin'
    if not os.path.exists(data):
        poe.write_tokens(data)
    out = f'{folder}/{name}'
    result = poe.succeed(poe.flags(data=data, out=out, **changes), launch, ranks)
    return out, result.out


def step_lines(out):
    return [line for line in poe.all_metrics(out) if 'dt' in line]


def check_accounts(out, ranks, steps):
    """The ten accounts are the wall time; the last object has their sums and what follows from them."""
    lines = step_lines(out)
    poe.check_equal([line['step'] for line in lines], list(range(steps)), 'steps')
    last = poe.all_metrics(out)[-1]
    for line in lines + [last]:
        poe.check_equal([list(a) for a in line['accounts']], [ACCOUNTS + ['wall']] * ranks, 'accounts')
        for a in line['accounts']:
            poe.check(all(a[name] >= 0 for name in a), a)
            poe.check_near(sum(a[name] for name in ACCOUNTS), a['wall'], 0.01 * a['wall'], 'sum of the accounts')
    for k in range(ranks):
        own = last['accounts'][k]
        for name in own:
            poe.check_near(own[name], sum(line['accounts'][k][name] for line in lines), 1e-6, f'rank {k}: {name}')
        trained = own['wall'] - own['checkpoint']
        busy = sum(own[name] for name in BUSY)
        poe.check(0 < busy <= own['wall'] and 0 < last['fill'][k] < trained, f'rank {k}: {own}')
        poe.check(last['memory'][k]['arenas'] > 0 and last['memory'][k]['peak'] > 0, f'rank {k}: {last["memory"]}')
        poe.check_near(last['idle'][k], 1 - busy / trained, 1e-6, f'rank {k}: idle')
        poe.check_near(last['idle_after_fill'][k], 1 - busy / (trained - last['fill'][k]), 1e-6, f'rank {k}: idle')
    return lines, last


def accounts(folder):
    for launch, ranks in ((poe.THREADS, 1), (poe.RANKS, 3)):
        out, shown = train(folder, launch, launch, ranks, save_every=2, keep=1)
        lines, last = check_accounts(out, 3, 6)
        for k in range(3):
            saved = [line['accounts'][k]['checkpoint'] for line in lines]
            poe.check(all((s > 0) == (step in (2, 4)) for step, s in enumerate(saved)), f'checkpoints: {saved}')
        dt = [line['dt'] for line in lines]
        own = [line['accounts'][2]['wall'] - line['accounts'][2]['checkpoint'] for line in lines]
        poe.check(all(abs(a - b) < 1e-6 for a, b in zip(dt, own)), f'{dt}, {own}')
        for name in ACCOUNTS + ['longest wait', 'idle', 'fill']:
            poe.check(f' {name}' in shown, f'no {name} in: {shown}')


def resumed(folder):
    """The sums of a run that was cut in two are each part's own; every step is there once."""
    data = poe.write_tokens(f'{folder}/tokens.bin')
    out = f'{folder}/out'
    poe.succeed(poe.flags(data=data, out=out, num_iterations=3))
    poe.succeed(poe.flags(data=data, resume=out, num_iterations=5))
    lines = poe.all_metrics(out)
    poe.check_equal([line['step'] for line in lines if 'dt' in line], list(range(5)), 'steps')
    poe.check_equal([i for i, line in enumerate(lines) if 'idle' in line], [len(lines) - 1], 'lines with idle shares')


# --- traces -----------------------------------------------------------------------------------------------------------

def read_trace(path):
    trace = poe.read_json(path)
    events = trace['traceEvents']
    for e in events:
        poe.check(e['ph'] in 'XsfM' and e['pid'] == 1 and isinstance(e['tid'], int) and isinstance(e['name'], str), e)
        poe.check(e['ph'] == 'M' or (e['ts'] >= 0 and e['cat'] and e['args']['step'] >= 0), e)
    return trace, events


def rows(events):
    """tid -> its slices in order of time."""
    found = {}
    for e in events:
        if e['ph'] == 'X':
            found.setdefault(e['tid'], []).append(e)
    for slices in found.values():
        slices.sort(key=lambda e: e['ts'])
    return found


def check_gaps(slices):
    """Slices of a row follow one another: none inside another, next to nothing between two."""
    nanosecond, gaps = 0.0025, 0.0
    for a, b in zip(slices, slices[1:]):
        poe.check(b['ts'] >= a['ts'] + a['dur'] - nanosecond, f'{b} begins inside {a}')
        gaps += max(0.0, b['ts'] - a['ts'] - a['dur'])
    wall = slices[-1]['ts'] + slices[-1]['dur'] - slices[0]['ts']
    poe.check(gaps <= 0.01 * wall, f'gaps of {gaps} us in {wall} us')


def check_arrows(events, errors):
    """Each has two ends inside slices of two rows; none arrives before it left, but for the clocks' error."""
    by_row = rows(events)
    sent = {e['id']: e for e in events if e['ph'] == 's'}
    received = {e['id']: e for e in events if e['ph'] == 'f'}
    poe.check_equal(len(sent), sum(e['ph'] == 's' for e in events), 'different ids')
    poe.check_equal(sorted(sent), sorted(received), 'ends of arrows')
    for number, s in sent.items():
        f = received[number]
        poe.check((s['name'], s['args'], f['bp']) == (f['name'], f['args'], 'e') and s['tid'] != f['tid'], f'{s}, {f}')
        poe.check(f['ts'] >= s['ts'] - errors[s['tid'] - 1] - errors[f['tid'] - 1], f'{f} before {s}')
        for e in (s, f):
            poe.check(any(x['ts'] - 0.002 <= e['ts'] <= x['ts'] + x['dur'] + 0.002 for x in by_row[e['tid']]), e)
    return sent


def check_trace(path, out, ranks, steps, micro):
    trace, events = read_trace(path)
    named = {e['tid']: e['args']['name'] for e in events if e['ph'] == 'M' and e['name'] == 'thread_name'}
    poe.check(sorted(named) == list(range(1, ranks + 1)) and all(named[k + 1].startswith(f'rank {k} ') for k in range(ranks)),
              named)
    sent = check_arrows(events, trace['otherData']['clock_error_us'])
    for k in range(ranks - 1):
        own = [s['args'] for s in sent.values() if s['tid'] == k + 1 and s['name'] == 'activations']
        places = {(a['step'], a['micro_batch']) for a in own}
        poe.check({(s, m) for s in range(steps) for m in range(micro)} <= places, f'arrows from rank {k}: {places}')
    total = poe.all_metrics(out)[-1]['accounts']
    for tid, slices in rows(events).items():
        check_gaps(slices)
        forward = [s for s in slices if s['name'] == 'forward']
        poe.check_equal([(s['args']['step'], s['args']['micro_batch']) for s in forward],
                        [(s, m) for s in range(steps) for m in range(micro)], 'forward slices')
        # Before the last step's end nothing but evaluation is left out of the steps' accounts.
        poe.check_near(sum(s['dur'] for s in forward) * 1e-6, total[tid - 1]['forward'], 1e-5, f'forward of row {tid}')


def trace(folder):
    for launch, ranks in ((poe.THREADS, 1), (poe.RANKS, 4)):
        path = f'{folder}/{launch}.json'
        out, shown = train(folder, launch, launch, ranks, stages='1,1,1,1', trace=path, sync='stale', save_every=3)
        check_trace(path, out, 4, 6, 2)
        poe.check(path in shown and 'perfetto' in shown, shown)
        poe.check_equal(poe.leftovers(folder), [], 'temporary files')


# --- emulated compute ---------------------------------------------------------------------------------------------------

FORWARD, BACKWARD = 0.02, 0.04
TIMES = 'forward=20ms,backward=40ms'


def emulate(folder, name, launch=poe.THREADS, ranks=1, **changes):
    changes = {'stages': '1x4', 'total_batch_size': 256, 'num_iterations': 4, 'emulate_compute': TIMES, **changes}
    return train(folder, name, launch, ranks, **changes)


def emulated(folder):
    """P = 4, M = 4 under exact: the pipe fills in every step. Nobody can be faster than theory, or busy for longer."""
    step, busy = 3 * FORWARD + 4 * (FORWARD + BACKWARD), 4 * (FORWARD + BACKWARD)
    for launch, ranks in ((poe.THREADS, 1), (poe.RANKS, 4)):
        out, shown = emulate(folder, launch, launch, ranks, trace=f'{folder}/{launch}.json')
        lines, last = check_accounts(out, 4, 4)
        for line in lines:
            poe.check(line['emulated'] == 'compute' and 'loss' not in line and 'stage_loss' not in line, line)
            for a in line['accounts']:
                poe.check_near(a['forward'], 4 * FORWARD, 1e-6, 'forward')
                poe.check_near(a['backward'], 4 * BACKWARD, 1e-6, 'backward')
        poe.check_equal(last['emulated'], 'compute', 'the last object')
        wall = last['accounts'][0]['wall']
        poe.check(4 * step <= wall <= 40 * step, f'{wall} s in 4 steps of {step} s')
        poe.check(last['idle'][0] >= 1 - busy / step - 0.01, f'idle: {last["idle"]}')
        check_trace(f'{folder}/{launch}.json', out, 4, 4, 4)
        poe.check_equal(poe.read_json(f'{folder}/{launch}.json')['otherData']['emulated'], 'compute', 'trace')
        poe.check(shown.count('emulated') >= 3 and TIMES in shown, shown)
        poe.check(not poe.checkpoints(out) and 'loss.png' not in os.listdir(out), os.listdir(out))


def jitter(folder):
    """Is the same for the same seed, differs from rank to rank, and stays within its bounds."""
    times, got = TIMES + ',optimizer=10ms,jitter=5ms;1:forward=30ms', []
    for name, seed in (('one', 1), ('two', 1), ('three', 2)):
        out, _ = emulate(folder, name, stages='1,1', num_iterations=3, emulate_compute=times, seed=seed, total_batch_size=128)
        got.append([[a[n] for n in ('forward', 'backward')] for line in step_lines(out) for a in line['accounts']])
    flat = [[x for pair in run for x in pair] for run in got]
    poe.check(all(abs(a - b) < 1e-6 for a, b in zip(flat[0], flat[1])), f'{flat[0]}, {flat[1]}')
    poe.check(any(abs(a - b) > 1e-4 for a, b in zip(flat[0], flat[2])), f'{flat[0]}, {flat[2]}')
    poe.check(abs(got[0][0][1] - got[0][1][1]) > 1e-5, got[0])
    for i, (forward, backward) in enumerate(got[0]):
        poe.check(abs(forward - 2 * (0.03 if i % 2 else 0.02)) <= 0.01 and abs(backward - 2 * 0.04) <= 0.01, got[0])


def many(folder):
    """More ranks than this machine has cores, as threads."""
    out, _ = emulate(folder, 'many', stages='1x48', sync='stale:16', num_iterations=5, n_embd=24, n_head=1, sequence_len=16,
                     device_batch_size=1, total_batch_size=16, emulate_compute='forward=2ms,backward=4ms')
    _, last = check_accounts(out, 48, 5)
    fill = last['fill']
    # a rank counts from its own beginning, so part of the wait may be over by then
    poe.check(all(fill[k] >= 0.001 * k for k in (10, 47)), f"fill: {fill}")


def interrupted(folder):
    """Ctrl-C ends an emulated run too, with its metrics whole."""
    data, out = poe.write_tokens(f'{folder}/tokens.bin'), f'{folder}/out'
    with poe.Background(poe.flags(data=data, out=out, num_iterations=100000, emulate_compute='forward=1ms,backward=2ms',
                                  trace=f'{folder}/trace.json')) as run:
        poe.wait_until('steps', lambda: os.path.exists(f'{out}/metrics.jsonl') and len(step_lines(out)) >= 2)
        run.process.send_signal(signal.SIGINT)
        poe.check_refused(run.wait(), 130, lines=0)
    lines = poe.all_metrics(out)
    poe.check(len(lines[-1]['idle']) == 3 and not poe.checkpoints(out), lines[-1])
    read_trace(f'{folder}/trace.json')


def saved(folder):
    """Checkpoints where they are asked for, and a run that goes on from one."""
    out, _ = emulate(folder, 'saved', save_every=2, num_iterations=3)
    poe.check_equal(poe.checkpoints(out), ['step-00000002', 'step-00000003'], 'checkpoints')
    result = poe.run(['--resume', out, '--num-iterations', 5])
    poe.check_equal(result.code, 0, result)
    poe.check_equal(len(step_lines(out)), 5, 'steps')


def refused(folder):
    data = poe.write_tokens(f'{folder}/tokens.bin')
    for changes, words in (({'emulate_compute': 'forward=20,backward=1ms'}, ('--emulate-compute', 'forward=20"', 'ms')),
                           ({'emulate_compute': TIMES, 'eval_every': 2}, ('--emulate-compute', '--eval-every')),
                           ({'trace': f'{folder}/none/trace.json'}, ('--trace', f'{folder}/none')),
                           ({'trace': folder}, ('--trace', folder, 'directory'))):
        for launch in (poe.THREADS, poe.MPIEXEC):
            result = poe.run(poe.flags(data=data, out=f'{folder}/out', **changes), launch, 3)
            poe.check_refused(result, 2, *words)
            poe.check(not os.path.exists(f'{folder}/out'), 'left behind: a folder')


poe.main(accounts, resumed, trace, emulated, jitter, many, interrupted, saved, refused)
