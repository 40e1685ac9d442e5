#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Experiments run from start to end and leave what they promise; what they measure does not matter here."""
import json
import os
import subprocess
import sys

import poe


def run_experiment(name, *words):
    command = [sys.executable, os.path.join(poe.ROOT, 'experiments', name, 'run.py'), '--program', poe.PROGRAM, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    poe.check_equal(done.returncode, 0, done.stderr)
    return done


def latency(folder):
    """Every point says how it was made and what was planned, is in the table and is not measured twice."""
    first = run_experiment('latency', '--test', '--out', f'{folder}/out')
    points = json.load(open(f'{folder}/out/test.json'))
    poe.check_equal(len(points), 5, 'points')
    for name, p in points.items():
        poe.check(p['step'] > 0 and p['planned'] > 0 and '--net' in p['command'], (name, p))
        poe.check_equal(p['emulated'], 'network' if 'real kernels' in name else 'compute, network', name)
        poe.check(0 <= p['idle'] < 1 and abs(sum(p['shares'].values()) - 1) < 0.01, (name, p['shares']))
        poe.check_equal(len(p['ranks']), 2 if 'real kernels' in name else 4, name)
    stale = points['round trip, 20 ms, 10000 Mbit, poe stale']
    poe.check(stale['delay'] >= 2 and f"--sync stale:{stale['delay']} " in stale['command'], stale)
    for word in ('emulated', 'D 1: ', '| real kernels | 0 ms, 10 Gbit |', 'time-shared'):
        poe.check(word in first.stdout, f'"{word}" is missing: {first.stdout}')
    poe.check(os.path.getsize(f'{folder}/out/test.png') > 1000, 'picture')
    stamps = os.stat(f'{folder}/out/test.json').st_mtime_ns
    again = run_experiment('latency', '--test', '--out', f'{folder}/out')
    poe.check('4 points, 4 of them there already' in again.stderr, again.stderr)
    poe.check_equal(os.stat(f'{folder}/out/test.json').st_mtime_ns, stamps, 'results of the second time')


poe.main(latency)
