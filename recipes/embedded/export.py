"""Write a training checkpoint as the folders that the package loads: a Hugging Face Llama and a PEFT-style ICAE.

    python recipes/embedded/export.py CHECKPOINT TOKENIZER.json OUT      ->  OUT/decoder, OUT/icae
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from data import BOS, EOS, MAX_CHUNK
from model import PROJECTIONS, Model, Shape, owner
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ctxcomp_rag.backbone import load_frozen
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig

CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_decoder(model: Model, shape: Shape, ids: dict[str, int]) -> LlamaForCausalLM:
    """The trained weights as a Hugging Face Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads, head_dim=shape.head_dim, max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.rms_norm_eps, rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True, bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"],
    )
    decoder = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": model.embed, "lm_head.weight": model.embed,
             "model.norm.weight": model.final_norm}
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}."
        state[prefix + "input_layernorm.weight"] = block.input_norm
        state[prefix + "post_attention_layernorm.weight"] = block.post_norm
        for name in PROJECTIONS:
            state[f"{prefix}{owner(name)}.{name}.weight"] = block.weight[name]
    decoder.load_state_dict({k: v.detach() for k, v in state.items()})
    decoder.generation_config = GenerationConfig(bos_token_id=ids["bos"], eos_token_id=ids["eos"],
                                                 pad_token_id=ids["pad"])
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--nested", type=float, nargs="+", help="factors at which one span can be read")
    args = parser.parse_args()
    shape = Shape()
    model = Model(shape)
    tensors = load_file(args.checkpoint)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(args.tokenizer), bos_token=BOS, eos_token=EOS,
                                        pad_token="<|pad|>", clean_up_tokenization_spaces=False,
                                        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {n: tokenizer.convert_tokens_to_ids(t) for n, t in (("bos", BOS), ("eos", EOS), ("pad", "<|pad|>"))}
    # bf16 on disk (half the size); every later step sees exactly these rounded weights
    decoder = build_decoder(model, shape, ids).to(torch.bfloat16)
    decoder.save_pretrained(args.out / "decoder")
    tokenizer.save_pretrained(args.out / "decoder")
    backbone = load_frozen(args.out / "decoder")
    backbone.model_id = "embedded"
    memory = torch.zeros(4, shape.hidden_size)
    memory[0], memory[1] = model.special[0].detach(), model.special[1].detach()
    config = ICAEConfig(num_memory_tokens=1, segment_tokens=MAX_CHUNK, compression_factor=4.0,
                        slots="proportional", slot_positions="spread", delimiters=("reconstruct",),
                        lora_rank=shape.lora_rank, lora_alpha=shape.lora_alpha, lora_targets=PROJECTIONS,
                        nested=tuple(args.nested) if args.nested else None)
    compressor = ICAECompressor(backbone, config, memory_tokens=memory)
    adapter = compressor.encoder.state_dict()
    for i, block in enumerate(model.blocks):
        for name in PROJECTIONS:
            prefix = f"base_model.model.model.layers.{i}.{owner(name)}.{name}."
            adapter[prefix + "lora_A.default.weight"].copy_(block.lora_a[name].detach())
            adapter[prefix + "lora_B.default.weight"].copy_(block.lora_b[name].detach())
    for weight in compressor.encoder.parameters():
        if weight.requires_grad:  # LoRA, in bf16 too
            weight.data = weight.data.to(torch.bfloat16)
    compressor.save_pretrained(args.out / "icae")


if __name__ == "__main__":
    main()
