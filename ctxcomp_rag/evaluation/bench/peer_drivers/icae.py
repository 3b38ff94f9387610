"""The official ICAE code (getao/icae, v2) out of a checkout: it compresses while the question waits, as its scripts do.

Nothing in it is changed. Its constructor asks for a decoder by name, in half precision and for flash attention, and for
a tokenizer; here it is given a decoder that is in memory already, and none of the tokenizer it does not use.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, ClassVar

from .checkout import commit_of, load_code
from .online import Reader
from .peer import package

REPOSITORY = "getao/icae"
CODE = "code/icae_v2/modeling_icae_multi_span.py"
SCRIPT_RANK = 512  # LoRA rank of its inference script


def official_icae(checkout: str | os.PathLike[str], decoder: Any, slots: int, factor: int, rank: int) -> Any:
    """Its `ICAE` for inference around a decoder of transformers, which it extends by rows for its tokens.

    Args:
        slots: of a segment, which holds up to `slots * factor` tokens.
        rank: of its LoRA.

    Raises:
        FileNotFoundError: this is no checkout of it.
    """
    code = load_code(checkout, CODE, REPOSITORY)
    code.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda name, **half_precision: decoder)
    code.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name, **slow: None)
    lora = package("peft").LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.05, bias="none",
                                      task_type="CAUSAL_LM")
    settings = SimpleNamespace(bf16=False, fixed_mem_size=slots, mean_compression_rate=factor)
    made = code.ICAE(code.ModelArguments(model_name_or_path="", train=False), settings, lora).eval()
    made.append_sequence = made.append_sequence.to(decoder.device)  # on the GPU where there is one
    return made


class OfficialICAE(Reader):
    """Random weights and memory tokens; the layout of its fine-tuned inference: slots, [FT], question."""

    packages: tuple[str, ...] = ("torch", "transformers", "peft")
    rows: ClassVar[tuple[str, ...]] = ("icae-official",)

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        longest = max(map(len, task["chunks"]))
        self.icae = official_icae(task["checkout"], self.model, -(-longest // task["factor"]), task["factor"],
                                  SCRIPT_RANK)

    def versions(self) -> dict[str, str]:
        return {**super().versions(), REPOSITORY: commit_of(self.task["checkout"])}

    def first(self, row: str) -> int:
        torch, icae = self.torch, self.icae
        slots = icae._compress(torch.tensor([self.text]))
        after = icae.tokens_to_embeddings(torch.tensor([[icae.ft_token_id, *self.question]]))
        embeds = torch.cat([slots[None], after], dim=1)
        self.cache = package("transformers").DynamicCache()
        self._step(embeds)
        return int(embeds.shape[1])

    def following(self) -> None:
        self._step(self.icae.tokens_to_embeddings(self.torch.tensor([[self.token]])))

    def _step(self, embeds: Any) -> None:
        with self.icae.icae.disable_adapter():
            logits = self.icae.icae(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True).logits
        self.token = int(logits[0, -1, : self.icae.vocab_size - 1].argmax())
