"""Data parallelism over processes of one machine: `torchrun --nproc-per-node N train.py ...`.

On a CPU, two processes of one thread finish 1.4 times the steps of one process of two threads. Every process
draws the same rows and takes its share; gradients are summed, so a step equals the one of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


def start() -> tuple[int, int]:
    """(rank, number of processes); joins the others when torchrun started us."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def share(rows: list[Item], costs: list[int], rank: int, world: int) -> list[Item]:
    """The rows of this process: the costliest first, each to the process with the least so far."""
    loads = [0] * world
    mine = []
    for i in sorted(range(len(rows)), key=lambda i: -costs[i]):
        target = loads.index(min(loads))
        loads[target] += costs[i]
        if target == rank:
            mine.append(rows[i])
    return mine


def total(values: Tensor) -> Tensor:
    """Sum over the processes, in place; the tensor itself when there is one process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def spread(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """`function` over the items of `stack`, each process doing its share."""
    if not dist.is_initialized():
        return function(stack)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    result = torch.zeros_like(stack)
    if len(stack[mine]):
        result[mine] = function(stack[mine])
    return total(result)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes in one message."""
    if not dist.is_initialized():
        return
    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained])
    dist.all_reduce(flat)
    for p, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        p.grad = gradient.view_as(p)
