"""Make a trained model wider and deeper without changing what it computes, to go on from there.

    python recipes/embedded/grow.py runs/next/released.safetensors runs/wide/grown.safetensors --from small --to wide
    torchrun ... recipes/embedded/train.py --preset wide --out runs/wide --init-from runs/wide/grown.safetensors ...

New channels of the residual stream carry nothing at first, new heads and units of the MLP write nothing, new layers
write nothing; what reads them is random, so that all of them learn from the first step. (Net2Net, arXiv 1511.05641,
for a decoder with RMSNorm.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from model import PRESETS, PROJECTIONS, Block, Model, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

_READS_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def places_of_layers(old: int, new: int) -> list[int]:
    """Which layers of the larger model are the old ones, in order: the new ones lie between them, evenly."""
    return [i * new // old for i in range(old)]


def grow(small: Model, shape: Shape) -> Model:
    """The larger model, whose logits and slots are those of `small`.

    Raises:
        ValueError: `shape` is smaller somewhere, or its heads are of another width.
    """
    old = small.shape
    sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size")
    if any(getattr(shape, s) < getattr(old, s) for s in sizes) or shape.head_dim != old.head_dim:
        raise ValueError(f"expected sizes of at least {old} and as wide heads, got {shape}")
    if (shape.vocab_size, shape.lora_rank, shape.lora_alpha) != (old.vocab_size, old.lora_rank, old.lora_alpha):
        raise ValueError("vocabulary and LoRA stay as they are")
    made, d = Model(shape), old.hidden_size
    # the mean square of more channels, of which the new ones are zero, is smaller
    norm_scale = (d / shape.hidden_size) ** 0.5
    with torch.no_grad():
        for name in ("embed", "special"):
            table: Tensor = getattr(made, name)
            table.zero_()
            table[:, :d] = getattr(small, name)
        _norm(made.final_norm, small.final_norm, norm_scale)
        for i, place in enumerate(places_of_layers(old.num_layers, shape.num_layers)):
            _grow_block(made.blocks[place], small.blocks[i], norm_scale)  # type: ignore[arg-type]
    return made


def _norm(new: Tensor, old: Tensor, scale: float) -> None:
    new.fill_(scale)
    new[: len(old)] = scale * old


def _grow_block(new: Block, old: Block, norm_scale: float) -> None:
    _norm(new.input_norm, old.input_norm, norm_scale)
    _norm(new.post_norm, old.post_norm, norm_scale)
    for name in PROJECTIONS:
        was, rank = old.weight[name], old.lora_a[name].shape[0]
        rows, columns = was.shape
        if name not in _READS_STREAM:  # new heads and units write nothing, and nothing is written to new channels
            new.weight[name].zero_()
        new.weight[name][:rows, :columns] = was
        new.lora_a[name][:, :columns] = old.lora_a[name]
        if name not in _READS_STREAM:  # of new heads and units, which are random
            new.lora_a[name][:, columns:] = 0
        new.lora_b[name].zero_()
        new.lora_b[name][:rows, :rank] = old.lora_b[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="old", choices=sorted(PRESETS), default="small")
    parser.add_argument("--to", dest="new", choices=sorted(PRESETS), default="wide")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    small = Model(PRESETS[args.old])
    small.load_state_dict({k.removeprefix("model."): v for k, v in load_file(args.checkpoint).items()
                           if k.startswith("model.")})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"model.{k}": v.contiguous() for k, v in grow(small, PRESETS[args.new]).state_dict().items()}, args.out)


if __name__ == "__main__":
    main()
