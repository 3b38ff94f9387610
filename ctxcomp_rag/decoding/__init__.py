"""Reading spliced prompts with a frozen decoder."""

from ctxcomp_rag.decoding.decoder import FrozenDecoder
from ctxcomp_rag.decoding.generation import Generation, GenerationSettings, RequestLimits
from ctxcomp_rag.decoding.preroll import PrerolledSpans, blend_rolled, preroll
from ctxcomp_rag.decoding.prompt import (
    Blended,
    Delimiter,
    Message,
    Part,
    Text,
    TokenIds,
    enclosed,
    question_prompt,
    reconstruction_prompt,
    render_chat,
)
from ctxcomp_rag.decoding.scheduler import RequestScheduler, Ticket
from ctxcomp_rag.decoding.splice import PromptUsage, SplicedPrompt, splice

__all__ = ["Blended", "Delimiter", "FrozenDecoder", "Generation", "GenerationSettings", "Message", "Part",
           "PrerolledSpans", "PromptUsage", "RequestLimits", "RequestScheduler", "SplicedPrompt", "Text", "Ticket",
           "TokenIds", "blend_rolled", "enclosed", "preroll", "question_prompt", "reconstruction_prompt", "render_chat",
           "splice"]
