"""Runs in an interpreter that has vLLM: greedy answers of the real engine and of our decoder, side by side, as JSON.

    python tests/serving/vllm_driver.py MODEL_DIR INDEX_DIR OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from ctxcomp_rag import CompressedRAG, GenerationSettings
from ctxcomp_rag.serving.vllm import VLLMEngine, prompt_embeds
from tests.serving.soft import QUESTIONS
from tests.tiny_models import LetterCounts


def main(model: str, index: str, out: str) -> None:
    llm = LLM(model, dtype="float32", enforce_eager=True, enable_prompt_embeds=True, max_model_len=512,
              enable_prefix_caching=True, block_size=32)
    with CompressedRAG.open(index, encoder=LetterCounts()) as rag:
        engine = VLLMEngine(llm, rag.decoder)
        prompts = [rag.prompt(q, rag.retrieve(q)) for q in QUESTIONS]
        found = {}
        for name, settings in (("greedy", GenerationSettings(24)), ("stop", GenerationSettings(24, stop=(" the",)))):
            ours = [rag.decoder.generate(p, settings) for p in prompts]
            theirs = engine.generate(prompts, settings)
            found[name] = [[(g.text, g.token_ids, g.finish_reason, g.completion_tokens, g.usage.positions)
                            for g in made] for made in (ours, theirs)]
        found["cached"] = _cached(llm, rag)
    Path(out).write_text(json.dumps(found))


def _cached(llm: LLM, rag: CompressedRAG) -> dict[str, list[int]]:
    """Positions that vLLM's prefix cache gave a second question about the same three chunks, by their order."""
    found: dict[str, list[int]] = {}
    chunks = rag.retrieve(QUESTIONS[0])
    for name, second in (("same order", chunks), ("reordered", chunks[::-1])):
        llm.reset_prefix_cache()
        for question, sources in ((QUESTIONS[0], chunks), (QUESTIONS[1], second)):
            embeds, _ = prompt_embeds(rag.prompt(question, sources), rag.backbone)
            [made] = llm.generate([{"prompt_embeds": embeds}], SamplingParams(max_tokens=1), use_tqdm=False)
        found[name] = [made.num_cached_tokens or 0, len(embeds)]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
