"""Turn the folders that the package ships back into a training checkpoint, to go on from the released model.

    python recipes/embedded/resume.py ctxcomp_rag/assets runs/next --preset small
    torchrun ... recipes/embedded/train.py --out runs/next --init-from runs/next/released.safetensors ...

Weights were rounded to bfloat16 when they were released, and the optimizer's state is not kept: warm up again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from export import owner
from model import PRESETS, PROJECTIONS, Model
from safetensors.torch import load_file, save_file


def read_released(model: Model, folder: Path) -> None:
    """Load `folder/decoder` and `folder/icae` into the training model."""
    decoder = {k: v.float() for k, v in load_file(folder / "decoder" / "model.safetensors").items()}
    adapter = load_file(folder / "icae" / "adapter_model.safetensors")
    memory = load_file(folder / "icae" / "memory_tokens.safetensors")["memory_tokens"]
    state = {"embed": decoder["model.embed_tokens.weight"], "final_norm": decoder["model.norm.weight"],
             "special": memory[:2].float()}
    for i in range(model.shape.num_layers):
        layer, block = f"model.layers.{i}.", f"blocks.{i}."
        state[block + "input_norm"] = decoder[layer + "input_layernorm.weight"]
        state[block + "post_norm"] = decoder[layer + "post_attention_layernorm.weight"]
        for name in PROJECTIONS:
            place = f"{layer}{owner(name)}.{name}."
            state[f"{block}weight.{name}"] = decoder[place + "weight"]
            for half in ("a", "b"):
                state[f"{block}lora_{half}.{name}"] = adapter[f"base_model.model.{place}lora_{half.upper()}.weight"]
    model.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", type=Path, help="folder with decoder/ and icae/")
    parser.add_argument("out", type=Path, help="folder of the next run; gets tokenizer.json and released.safetensors")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    args = parser.parse_args()
    model = Model(PRESETS[args.preset])
    read_released(model, args.released)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.released / "decoder" / "tokenizer.json", args.out / "tokenizer.json")
    save_file({f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}, args.out / "released.safetensors")


if __name__ == "__main__":
    main()
