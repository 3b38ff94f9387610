"""Catalyst prompts: read after a full pot, so that their attention says what the pot has to keep (InfiniPot's CaP).

A catalyst ends where the decoder would begin to answer: with the turn that its chat template opens after a user's
message. Small chat decoders look up a fact in that place and not before.

    generic    what matters in general: no question is known, and any length of text costs the same (CaP-G)
    repeat     the text that was read since the last distillation once more, after an order to repeat it: no question
               is known, and every token of the text is looked up once (KVzip, arXiv 2505.23416)
    question   the question, and the answer that the decoder gives from the full pot: a question's last token looks up
               the answer's first token only, and the rest would be lost (CaP-Q; drafts as in arXiv 2505.20334)
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from ctxcomp_rag.tokenization import TextTokenizer

GENERIC_CATALYST = "\n\nThe facts, names and numbers above that matter most are:"
REPEAT_CATALYST = "\n\nQuestion: Repeat the text."
QUESTION_CATALYST = "\n\nQuestion: {question}"

DRAFT_TOKENS = 12
"""Longest draft of an answer."""


@dataclass(frozen=True)
class Catalyst:
    """A catalyst prompt as token ids; none of its entries ever stays in a pot.

    Attributes:
        ids: the prompt.
        repeats: whether the tokens read since the last distillation follow it. Entries kept before keep the attention
            that they once had.
        draft_tokens: how many tokens the decoder may go on by itself, greedily; it stops before one of `end_ids`.
    """

    ids: tuple[int, ...] = ()
    repeats: bool = False
    draft_tokens: int = 0
    end_ids: frozenset[int] = frozenset()

    @property
    def length(self) -> int:
        """Entries that it takes beside the text, at most; those of a repeated text come on top."""
        return len(self.ids) + self.draft_tokens


def catalyst(tokenizer: TextTokenizer, prompt: str, *, repeats: bool = False, draft_tokens: int = 0) -> Catalyst:
    """A prompt (untrusted text) and the decoder's turn after it."""
    ids = (*tokenizer.encode(prompt), *answer_turn(tokenizer))
    return Catalyst(ids, repeats, draft_tokens, tokenizer.control_ids)


def question_catalyst(tokenizer: TextTokenizer, question: str) -> Catalyst:
    """The question and a draft of its answer."""
    return catalyst(tokenizer, QUESTION_CATALYST.format(question=question), draft_tokens=DRAFT_TOKENS)


def answer_turn(tokenizer: TextTokenizer) -> list[int]:
    """What the chat template writes between a user's message and the answer; nothing without a template."""
    if not tokenizer.hf.chat_template:
        return []
    mark = uuid4().hex
    rendered = str(tokenizer.hf.apply_chat_template([{"role": "user", "content": mark}], tokenize=False,
                                                    add_generation_prompt=True))
    return tokenizer.encode_template(rendered.partition(mark)[2])


__all__ = ["DRAFT_TOKENS", "GENERIC_CATALYST", "QUESTION_CATALYST", "REPEAT_CATALYST", "Catalyst", "answer_turn",
           "catalyst", "question_catalyst"]
