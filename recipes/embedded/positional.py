"""Heads that look a few tokens back, from the first step on.

A head learns late to look by distance alone, and in a model this small in its middle layers; what builds on it
(copying; which sentence shares words with the question) then has no layers left. Here a direction that all embeddings
have in common feeds queries and keys, whose rotary frequencies make a bump at a distance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model import Block, Model
from torch import Tensor

COMMON = 0.2  # share of an embedding's squared length in the common direction
# block, head, distance at the top of the bump, its width, height in nats
HEADS = ((0, 1, 0, 5, 6.0), (0, 2, 0, 14, 6.0), (0, 3, 1, 1, 20.0), (1, 2, 0, 10, 6.0), (1, 3, 1, 1, 20.0))
ALIKE = ((1, 0), (2, 0))  # heads that begin by looking at what is like the column itself,
SHARPNESS = 2.5  # with larger weights than the others


def with_common(rows: Tensor, direction: Tensor) -> Tensor:
    """Rows of the same length, `COMMON` of its square along the unit vector `direction`."""
    length = rows.norm(dim=1, keepdim=True)
    apart = rows - (rows @ direction)[:, None] * direction
    return length * ((1 - COMMON) ** 0.5 * F.normalize(apart) + COMMON**0.5 * direction)


def bump(frequencies: Tensor, width: float, height: float) -> Tensor:
    """Height of each frequency's cosine, so that their sum falls off over `width` tokens."""
    weight = torch.exp(-((frequencies * width) ** 2) / 2) * (frequencies * width > 0.25)
    return height * weight / weight.sum()


def look_back(block: Block, head: int, direction: Tensor, distance: int, width: float, height: float) -> None:
    shape = block.shape
    size = shape.head_dim
    rows = slice(head * size, (head + 1) * size)
    frequencies = shape.rotary_frequencies()
    reach = (bump(frequencies, width, height) * size**0.5).sqrt() / (COMMON * shape.hidden_size) ** 0.5
    turned = torch.cat([reach * torch.cos(frequencies * distance), reach * torch.sin(frequencies * distance)])
    for name, towards in (("q_proj", torch.cat([reach, torch.zeros_like(reach)])), ("k_proj", turned)):
        weight = block.weight[name].data
        weight[rows] = weight[rows] * 0.25 + torch.outer(towards, direction)


def set_positional_heads(model: Model) -> None:
    """Rewrite the embeddings and some heads of an untrained model."""
    direction = F.normalize(torch.randn(model.shape.hidden_size), dim=0)
    model.embed.data = with_common(model.embed.data, direction)
    model.special.data = with_common(model.special.data, direction)
    for block, head, distance, width, height in HEADS:
        look_back(model.blocks[block], head, direction, distance, width, height)
    size = model.shape.head_dim
    for block, head in ALIKE:
        rows = slice(head * size, (head + 1) * size)
        weight = model.blocks[block].weight
        weight["q_proj"].data[rows] *= SHARPNESS
        weight["k_proj"].data[rows] = weight["q_proj"].data[rows]
