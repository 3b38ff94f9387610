"""Gradient checkpointing of an encoder and of the frozen decoder that its gradients go through."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ctxcomp_rag.errors import UnsupportedModelError


def checkpoint_gradients(model: nn.Module) -> int:
    """Recompute each layer's activations in the backward pass; returns how many layers do so.

    A layer does it in training mode only, so the layers are put there themselves, not what is in them: dropout in a
    frozen decoder stays off.

    Raises:
        UnsupportedModelError: the architecture has no layers that can.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    enable = next((getattr(m, "gradient_checkpointing_enable", None) for m in model.modules()
                   if hasattr(m, "gradient_checkpointing_enable")), None)
    if not layers or enable is None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot recompute its activations; leave "
                                    "gradient_checkpointing off")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.training = True
    return len(layers)
