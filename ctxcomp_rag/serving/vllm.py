"""Prompts for vLLM: the rows that our splice would read, handed over as `prompt_embeds`.

vLLM numbers the rows of a prompt one after the other and fills its cache itself. So it reads soft spans whose slots are
consecutive (official ICAE, PCC); slots that are spread over the positions of their text would be read at wrong ones,
and KV spans not at all: both are refused.

The whole prompt goes over as rows, the chat template's own tokens included. vLLM's tokenizer sees none of it: text from
users and documents can name no control token there either.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxcomp_rag.backbone import Backbone
from ctxcomp_rag.decoding import (
    Blended,
    FrozenDecoder,
    Generation,
    GenerationSettings,
    Part,
    PromptUsage,
    Text,
    splice,
)
from ctxcomp_rag.decoding.splice import EmbeddedRun
from ctxcomp_rag.errors import InputError, UnsupportedModelError
from ctxcomp_rag.spans import KVSpan, SpanSpec

RESERVED = "<prompt_embeds>"
"""What vLLM's chat endpoint puts where rows are to stand. We use another endpoint; whoever quotes our text there, or
types this here, would move the rows, so text that holds it goes no further."""


def require_consecutive(spec: SpanSpec) -> None:
    """Raises UnsupportedModelError where vLLM would not read spans of this specification as they were made."""
    if spec.kind == "kv":
        raise UnsupportedModelError("vLLM takes rows of embeddings and fills its cache itself, so it cannot read KV "
                                    "spans; serve this index with --backend local, or precompress with icae or pcc")
    if spec.slot_positions != "consecutive":
        raise UnsupportedModelError(
            "vLLM numbers positions one after the other, but the slots of these spans are spread over the positions of "
            "their text and would be read at wrong ones; serve this index with --backend local, or precompress with a "
            "compressor of consecutive slots (pcc, or icae trained with slot_positions='consecutive')")


@torch.inference_mode()
def prompt_embeds(parts: Sequence[Part], backbone: Backbone) -> tuple[Tensor, PromptUsage]:
    """A prompt as rows (positions, hidden_size) in the decoder's dtype, and what they are; no layer is run.

    Raises:
        UnsupportedModelError: a KV span, or a span whose slots are not consecutive.
        InputError: text holds `RESERVED`; or what `splice` raises.
    """
    parts = [parts] if isinstance(parts, str) else parts
    for part in parts:
        text = part.text if isinstance(part, Text) else part
        if isinstance(text, str) and RESERVED in text:
            raise InputError(f"the text holds {RESERVED!r}, which vLLM reserves for rows of embeddings; write it "
                             "differently")
        if isinstance(part, KVSpan | Blended):
            raise UnsupportedModelError("vLLM fills its cache itself and cannot read KV spans; use soft spans")
    prompt = splice(parts, backbone)
    run, *_ = prompt.runs
    assert isinstance(run, EmbeddedRun)
    rows = run.embeds.shape[0]
    if prompt.next_position != rows or bool((run.positions.cpu() != torch.arange(rows)).any()):
        raise UnsupportedModelError(
            f"vLLM would read the {rows} rows of this prompt at positions 0 to {rows - 1}, but a span in it spreads "
            f"its slots over more ({prompt.next_position} in all); use spans of consecutive slots")
    return run.embeds, prompt.usage


def wire_form(embeds: Tensor) -> str:
    """Rows as vLLM's HTTP endpoints take them: base64 of what `torch.save` writes, which they read `weights_only`."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)  # a view would take all of its storage along
    return base64.b64encode(buffer.getvalue()).decode()


def sampling(settings: GenerationSettings, end_ids: Collection[int], room: int) -> dict[str, Any]:
    """Our settings in vLLM's names; answers end where ours do and nowhere else.

    Args:
        room: positions that the decoder's window leaves for the answer.

    Raises:
        UnsupportedModelError: the answer is to quote.
    """
    if settings.quote_from:
        raise UnsupportedModelError("vLLM does not hold answers to what their sources say; leave quote_from out, or "
                                    "use our own decoder")
    return {"max_tokens": min(settings.max_new_tokens, room), "temperature": settings.temperature,
            "top_p": settings.top_p, "seed": settings.seed, "stop": list(settings.stop),
            "stop_token_ids": sorted(end_ids), "ignore_eos": True}


class VLLMEngine:
    """A vLLM engine in this process.

    Args:
        llm: a `vllm.LLM` of the same model, made with `enable_prompt_embeds=True`.
        decoder: ours; its tokenizer, embeddings and end ids are used, its layers are not.
    """

    def __init__(self, llm: Any, decoder: FrozenDecoder) -> None:
        self.llm, self.decoder = llm, decoder

    def generate(self, prompts: Sequence[Sequence[Part]], settings: GenerationSettings | None = None
                 ) -> list[Generation]:
        """One answer for each prompt, in order; raises what `prompt_embeds` raises."""
        from vllm import SamplingParams

        settings = settings or GenerationSettings()
        backbone, end_ids = self.decoder.backbone, self.decoder.end_ids
        rows = [prompt_embeds(parts, backbone) for parts in prompts]
        params = [SamplingParams(**sampling(settings, end_ids, backbone.max_positions - len(embeds)))
                  for embeds, _ in rows]
        made = self.llm.generate([{"prompt_embeds": embeds} for embeds, _ in rows], params, use_tqdm=False)
        return [finished(o.outputs[0].text, o.outputs[0].token_ids, o.outputs[0].finish_reason, usage, end_ids)
                for o, (_, usage) in zip(made, rows, strict=True)]


def finished(text: str, token_ids: Sequence[int], finish_reason: str, usage: PromptUsage, end_ids: Collection[int]
             ) -> Generation:
    """vLLM's answer as one of ours: the stop token is counted and not shown."""
    shown = tuple(token_ids[:-1] if token_ids and token_ids[-1] in end_ids else token_ids)
    return Generation(text, shown, "length" if finish_reason == "length" else "stop", usage, len(token_ids))
