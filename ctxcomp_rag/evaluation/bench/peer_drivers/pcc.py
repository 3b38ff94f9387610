"""The official PCC code out of a checkout: it compresses while the question waits, as its inference script does.

Nothing in it is changed. Its constructor asks for a compressor and a decoder by name, in half precision, each with a
tokenizer; here it is given models that are in memory already and tokenizers of as many words. Where its code says
bfloat16 it finds float32, and no automatic casts, like every other peer.

Of the two official variants it is Large: the compressor has the decoder's own shape, with LoRA. Lite's compressor is
GPT-2-large whatever the decoder, a tenth of the Llama-3-8B it was made for but 1.6 times the 0.5B shape and 5.7 times
the 135M one: it would be GPT-2 that is measured.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

from .checkout import commit_of, load_code
from .online import Reader
from .peer import package, random_decoder

REPOSITORY = "broalantaps/The-most-influential-graduation-project"
CODE = "pretraining/model/model.py"
SEGMENT = 256  # compressor tokens, of its inference script
MEMORY_TOKENS = 64  # that its code adds to the compressor
LORA = {"lora_r": 64, "lora_alpha": 32, "lora_dropout": 0.1}  # its defaults, as for Large


def official_pcc(checkout: str | os.PathLike[str], decoder: Any, compressor: Any, factor: int) -> Any:
    """Its `PCC` for inference around two models of transformers, which are extended by rows for its tokens.

    Args:
        factor: a full segment of 256 tokens becomes `256 / factor` slots.

    Raises:
        ValueError: its compressor has not so many memory tokens.
        FileNotFoundError: this is no checkout of it.
    """
    if SEGMENT // factor > MEMORY_TOKENS:
        raise ValueError(f"official PCC has {MEMORY_TOKENS} memory tokens for a segment of {SEGMENT}: expected a "
                         f"factor of {SEGMENT // MEMORY_TOKENS} or more, got {factor}")
    code = load_code(checkout, CODE, REPOSITORY)
    torch = package("torch")
    models = {"compressor": compressor, "decoder": decoder}
    tokenizers = {name: _words(model.config.vocab_size) for name, model in models.items()}
    # the published decoder has these rows; its code would read them for Llama-3-8B-Instruct only
    tokenizers["decoder"].add_special_tokens({"additional_special_tokens": ["<mem>", "<ae>", "</mem>"]})
    decoder.resize_token_embeddings(len(tokenizers["decoder"]))
    code.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda name, **half_precision: models[name])
    code.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizers[name])
    code.torch = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
    code.autocast = lambda **half_precision: nullcontext()
    settings = SimpleNamespace(stage=2, device=decoder.device, segment_length=SEGMENT, embed_len=SEGMENT // factor,
                               compress_model="compressor", decoder_model="decoder", converter_model=None,
                               adapter_model=None, use_lora=True, compressor_gradient_checkpoint=False,
                               decoder_gradient_checkpoint=False, **LORA)
    return code.PCC(settings).eval().to(decoder.device)


def _words(number: int) -> Any:
    """A tokenizer of `w0 w1 w2 ...`; the first one begins and ends a text."""
    made = package("tokenizers").Tokenizer(package("tokenizers.models").WordLevel({f"w{n}": n for n in range(number)}))
    made.pre_tokenizer = package("tokenizers.pre_tokenizers").WhitespaceSplit()
    return package("transformers").PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w0", eos_token="w0",
                                                           pad_token="w0")


class OfficialPCC(Reader):
    """Random weights and tokens; the layout of its inference: bos, each segment's slots in brackets, question."""

    packages: tuple[str, ...] = ("torch", "transformers", "peft")
    rows: ClassVar[tuple[str, ...]] = ("pcc-official",)

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task)
        self.pcc = official_pcc(task["checkout"], self.model, random_decoder(task["config"]), task["factor"])

    def versions(self) -> dict[str, str]:
        return {**super().versions(), REPOSITORY: commit_of(self.task["checkout"])}

    def first(self, row: str) -> int:
        slots = self.pcc(self.text, None, get_embedding=True)  # its `generate` does the same, but gives back words
        embeds = self.torch.cat([self.pcc.decoder._get_segment_mem(slots), self._embed(self.question)], dim=1)
        self.cache = None
        self._step(embeds)
        return int(embeds.shape[1])

    def following(self) -> None:
        self._step(self._embed([self.token]))

    def _embed(self, ids: list[int]) -> Any:
        return self.model.get_input_embeddings()(self.torch.tensor([ids]))

    def _step(self, embeds: Any) -> None:
        """As in the loop of its decoder's `generate`, which cannot be halted after the first token."""
        made = self.model(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True)
        self.cache = made.past_key_values
        self.token = int(made.logits[0, -1, : len(self.pcc.decoder.tokenizer)].argmax())
