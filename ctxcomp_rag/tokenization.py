"""Text to ids with a wall between trusted template text and untrusted text.

A chat template's own pieces may name control tokens; a user's or a document's text may not, whatever it spells.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ctxcomp_rag.errors import InputError, UnsupportedModelError


class TextTokenizer:
    """A Hugging Face fast tokenizer, split into two.

    `encode` takes untrusted text; `encode_template` allows control tokens. Neither adds BOS or EOS: templates spell
    them out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to tokenizer.json first"
            )
        self.hf = tokenizer
        definition = json.loads(backend.to_str())
        self.control_ids = frozenset(t["id"] for t in definition["added_tokens"]) | frozenset(tokenizer.all_special_ids)
        definition["added_tokens"] = []
        definition["truncation"] = definition["padding"] = definition["post_processor"] = None
        self._plain: Tokenizer = Tokenizer.from_str(json.dumps(definition))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special or added token, even where the text spells one."""
        try:
            encoding = self._plain.encode(text, add_special_tokens=False)
        except TypeError as error:
            lone = [i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"]
            if not lone:
                raise
            raise InputError(f"the text is not valid Unicode: character {lone[0]} is the lone surrogate "
                             f"{text[lone[0]]!a}; repair it where it was decoded") from error
        ids: list[int] = encoding.ids
        hits = [i for i, token in enumerate(ids) if token in self.control_ids]
        if not hits:
            return ids
        begin, end = encoding.offsets[hits[0]]
        if end - begin < 2:
            raise UnsupportedModelError(
                f"the tokenizer maps the plain character {text[begin:end]!r} to the control token id {ids[hits[0]]}"
            )
        # A unigram vocabulary can hold the control token as an ordinary piece: cut inside it and encode both sides.
        return self.encode(text[: begin + 1]) + self.encode(text[begin + 1 :])

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted template text; control tokens are recognised."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; spaces are kept as the tokens spell them."""
        text: Any = self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    @property
    def digest(self) -> str:
        """sha256 of the tokenizer's definition and chat template."""
        template = self.hf.chat_template or ""
        definition = self.hf.backend_tokenizer.to_str()
        return hashlib.sha256((definition + json.dumps(template, sort_keys=True)).encode()).hexdigest()
