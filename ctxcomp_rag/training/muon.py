"""Muon in float32, batched over matrices of one shape.

`torch.optim.Muon` runs its Newton-Schulz iteration in bfloat16, which a CPU without such instructions executes about a
hundred times slower than float32; the update is otherwise the same (`adjust_lr_fn="match_rms_adamw"`, Moonshot's
scaling, arXiv 2502.16982).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: pushes the singular values of each matrix of (n, rows, columns) to about 1."""
    size: Tensor = torch.linalg.matrix_norm(update, keepdim=True)
    x = update / (size + 1e-7)
    transposed = x.shape[1] > x.shape[2]
    x = x.mT if transposed else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if transposed else x


def _alone(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    return function(stack)


class Muon(torch.optim.Optimizer):
    """For matrices between hidden states; see the module.

    Args:
        spread: applies a function to the items (n, rows, columns) of a stack, for instance over several processes.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95,
                 weight_decay: float = 0.0,
                 spread: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = _alone) -> None:
        self.spread = spread
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append((p, p.grad))
            for shape, moved in by_shape.items():
                buffers = []
                for p, gradient in moved:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    buffers.append(torch.lerp(gradient, state["momentum"], group["momentum"]))
                update = self.spread(orthogonalise, torch.stack(buffers))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for (p, _), u in zip(moved, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-rate)
