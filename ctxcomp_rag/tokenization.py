"""Text to ids with a wall between trusted template text and untrusted text.

A chat template's own pieces may name control tokens; a user's or a document's text may not, whatever it spells.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ctxcomp_rag.errors import InputError, UnsupportedModelError

_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""What the letters of byte-level tokens stand for."""


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
        named = {t["id"] for t in definition["added_tokens"]} | set(tokenizer.all_special_ids)
        self.control_ids = frozenset(named - {tokenizer.unk_token_id})  # an unknown character controls nothing
        definition["truncation"] = definition["padding"] = None  # settings of past calls, not of the tokenizer
        self._of_bytes = '"ByteLevel"' in json.dumps(definition["decoder"])
        self._definition = json.dumps(definition, sort_keys=True)
        definition["added_tokens"] = []
        definition["post_processor"] = None
        self._plain: Tokenizer = Tokenizer.from_str(json.dumps(definition))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special or added token, even where the text spells one."""
        ids: list[int] = []
        while True:
            encoding = self._encode(text)
            hit = next((i for i, token in enumerate(encoding.ids) if token in self.control_ids), None)
            if hit is None:
                return ids + encoding.ids
            # A unigram vocabulary can hold the control token as an ordinary piece: cut inside it, go on behind.
            begin, end = encoding.offsets[hit]
            if end - begin < 2:
                raise UnsupportedModelError(f"the tokenizer maps the plain character {text[begin:end]!r} to the "
                                            f"control token id {encoding.ids[hit]}")
            ids += self._encode(text[: begin + 1]).ids
            text = text[begin + 1 :]

    def _encode(self, text: str) -> Encoding:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except TypeError as error:
            lone = [i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"]
            if not lone:
                raise
            raise InputError(f"the text is not valid Unicode: character {lone[0]} is the lone surrogate "
                             f"{text[lone[0]]!a}; repair it where it was decoded") from error

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted template text; control tokens are recognised."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; spaces are kept as the tokens spell them."""
        text: Any = self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def token_bytes(self, token: int) -> bytes:
        """What a token spells; several may spell one character together."""
        piece = str(self.hf.convert_ids_to_tokens(token))
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(fallback[1])
        return bytes(_BYTES[c] for c in piece) if self._of_bytes else piece.replace("\u2581", " ").encode()

    @property
    def digest(self) -> str:
        """sha256 of the tokenizer's definition and chat template."""
        template = self.hf.chat_template or ""
        return hashlib.sha256((self._definition + json.dumps(template, sort_keys=True)).encode()).hexdigest()
