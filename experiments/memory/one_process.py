#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What autograd keeps for the backward pass when all stages are in one process, three ways: prints one JSON object of
bytes at the worst moment.

    one_process.py FOLDER LAYERS STAGES     FOLDER: where poe_ref.py is, the PyTorch statement of the model

bp: one loss. total: PoE as a trainer for backpropagation runs it, one backward pass of the sum of all losses. by_stage:
PoE with the backward pass of each stage behind its forward pass, before the next stage begins.
"""
import json
import sys
import weakref

import torch

ROWS, T, CHANNELS, VOCABULARY = 8, 128, 128, 2048  # vocabulary / channels is 16; 21 in the 1.3B model


class Kept:
    """Counts the storages that graphs hold, each once, those of parameters left out."""

    def __init__(self, parameters):
        self.outside = {p.untyped_storage().data_ptr() for p in parameters}
        self.held, self.bytes, self.peak = {}, 0, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        box = [tensor]
        holder = Holder(box)
        if where not in self.outside:
            if self.held.setdefault(where, 0) == 0:
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
            self.held[where] += 1
            weakref.finalize(holder, self.drop, where, size)
        return holder

    def drop(self, where, size):
        self.held[where] -= 1
        if self.held[where] == 0:
            self.bytes -= size


class Holder:
    def __init__(self, box):
        self.box = box


def make(ref, layers, stages, objective):
    split = [layers // stages] * stages
    s = ref.Shape(dict(ref.DEFAULTS, stages=split, objective=objective, backout=False, n_embd=CHANNELS, n_head=2,
                       n_kv_head=2, sequence_len=T, vocab_size=VOCABULARY, device_batch_size=ROWS))
    torch.manual_seed(1)
    p = {name: (0.02 * torch.randn(shape)).requires_grad_() for name, shape in ref.tensor_shapes(s).items()}
    idx = torch.randint(VOCABULARY, (ROWS, T + 1))
    return p, s, idx[:, :-1], idx[:, 1:]


def whole(ref, p, s, idx, targets):
    sum(w * loss for w, loss in zip(ref.stage_weights(s), ref.losses(p, s, idx, targets))).backward()


def by_stage(ref, p, s, idx, targets):
    """The same gradients: what every stage sends to x0 is summed up and goes through the embedding at the end."""
    inv = 100000.0 ** (-torch.arange(0, s.hs, 2, dtype=torch.float32) / s.hs)
    angles = torch.outer(torch.arange(T, dtype=torch.float32), inv)[None, :, None, :]
    cos, sin = angles.cos(), angles.sin()
    e = ref.norm(p["transformer.wte.weight"][idx])
    gate = p["smear_lambda"] * torch.sigmoid(e[:, 1:, :24] @ p["smear_gate.weight"].T)
    x0 = torch.cat([e[:, :1], e[:, 1:] + gate * e[:, :-1]], 1)
    source = x0.detach().requires_grad_()
    x, i = source, 0
    for k, depth in enumerate(s.stages):
        for _ in range(depth):
            x = ref.block(p, s, i, p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * source, idx, cos, sin)
            i += 1
        z = ref.stage_logits(p, s, k, x)
        loss = torch.nn.functional.cross_entropy(z.reshape(-1, s.vocab_size), targets.reshape(-1))
        (ref.stage_weights(s)[k] * loss).backward()
        x = x.detach()
        del z, loss
    x0.backward(source.grad)


def measure(ref, layers, stages, objective, step):
    p, s, idx, targets = make(ref, layers, stages, objective)
    kept = Kept(p.values())
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda holder: holder.box[0]):
        step(ref, p, s, idx, targets)
    return kept.peak, {name: w.grad for name, w in p.items() if w.grad is not None}


def main():
    folder, layers, stages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, folder)
    import poe_ref as ref
    bp, _ = measure(ref, layers, 1, "bp", whole)
    total, expected = measure(ref, layers, stages, "poe", whole)
    freed, got = measure(ref, layers, stages, "poe", by_stage)
    worst = max(float((got[name] - g).abs().max() / g.abs().max().clamp_min(1e-30)) for name, g in expected.items())
    if worst > 1e-3:
        sys.exit(f"stage by stage gives other gradients: they differ by {worst}")
    print(json.dumps(dict(bp=bp, total=total, by_stage=freed)))


main()
