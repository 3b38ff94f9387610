"""Muon in float32: the update of torch's own, which computes in bfloat16."""

from __future__ import annotations

import torch
from torch import nn

from ctxcomp_rag.training.muon import Muon, orthogonalise


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 10)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_three_steps_are_those_of_torch_but_for_its_rounding() -> None:
    torch.manual_seed(0)
    start = [torch.randn(12, 8), torch.randn(12, 8), torch.randn(5, 16)]
    gradients = [[torch.randn_like(w) for w in start] for _ in range(3)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizers = (Muon(ours, lr=0.02),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for step in gradients:
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            for w, g in zip(weights, step, strict=True):
                w.grad = g.clone()
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - w).norm() > 0.01
        assert (a - b).norm() < 0.03 * (b - w).norm()
