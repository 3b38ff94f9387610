"""The optimisers that a configuration can name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ctxcomp_rag.training.muon import Muon
from ctxcomp_rag.training.trainer import MakeOptimizers, adamw

_NOT_BETWEEN_STATES = ("embed", "memory_tokens", "special_rows", "lm_head")


def muon(parameters: Mapping[str, nn.Parameter], learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW at the same rate for the rest."""
    matrices, rest = _between_states(parameters)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(matrices, lr=learning_rate))
    if rest:
        made.append(torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0))
    return made


def _between_states(parameters: Mapping[str, nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(the matrices between hidden states, the rest: embeddings, head, trained rows, norms, biases)."""
    matrices = {n for n, p in parameters.items() if p.ndim == 2 and not any(k in n for k in _NOT_BETWEEN_STATES)}
    return [parameters[n] for n in parameters if n in matrices], [p for n, p in parameters.items() if n not in matrices]


OPTIMIZERS: dict[str, MakeOptimizers] = {"adamw": adamw, "muon": muon}
