"""Presses of kvpress (NVIDIA, Apache-2.0) as scoring rules.

A `ScorerPress` is one method, `score(module, hidden_states, keys, values, attentions, kwargs)`, see
kvpress/presses/scorer_press.py (0.5.5). The rest of kvpress, which prunes inside the forward pass, is not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.kv.scores import Entries, ScoringRule

_PACKAGE = "kvpress"
_FAILURES = (AssertionError, IndexError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class KVPress(ScoringRule):
    """What a press of kvpress scores highest, in every layer and kv head; its compression ratio plays no part.

        KVPress(ExpectedAttentionPress(use_vnorm=False))        an object, of kvpress or of your own
        make_rule("kvpress", {"press": "KnormPress"})           a press of the package, by its name

    From the second pot on the entries kept earlier have no hidden states any more: `score` gets the keys and values of
    all n entries, and the hidden states of the last r that were read since. Presses that look at the last tokens
    (SnapKV, TOVA) or at keys and values only (Knorm, KeyDiff, LagKV) do not mind; others may refuse, which is reported.
    No attention weights are passed: a press that needs them (ObservedAttention) refuses.

    Importing kvpress, which happens only where a press is named by a string, replaces the attention functions of
    transformers with ones that do the same unless a press of kvpress masks keys itself. kvpress 0.5.5 asks for
    transformers below 5.3, and this package for 5.20 or later: pip installs the two side by side with `--no-deps` only.

    Attributes:
        press: an object with the method `score`; or the name of a class of kvpress, made with `settings`.
        settings: fields of the press.

    Raises:
        InputError: no such press, or kvpress is not installed; or settings that cannot be stored as JSON.
    """

    name: ClassVar[str] = _PACKAGE
    reading: ClassVar[bool] = True
    press: Any = "KnormPress"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        press = _made(self.press, self.settings) if isinstance(self.press, str) else self.press
        if not callable(getattr(press, "score", None)):
            raise InputError(f"expected a press with a method `score` (a ScorerPress), got {type(press).__name__}, "
                             "which prunes on its own")
        # kvpress presses are dataclasses; these fields are what tells two of them apart
        known = fields(press) if is_dataclass(press) else ()
        settings = {f.name: getattr(press, f.name) for f in known if f.init} or dict(self.settings)
        try:
            json.dumps(settings)
        except TypeError as error:
            raise InputError(f"the settings of {type(press).__name__} cannot be stored: {error}") from error
        object.__setattr__(self, "press", press)
        object.__setattr__(self, "settings", settings)

    def to_dict(self) -> dict[str, Any]:
        cls = type(self.press)
        inside = cls.__module__.split(".")[0] == _PACKAGE
        named = cls.__qualname__ if inside else f"{cls.__module__}:{cls.__qualname__}"
        return {"name": self.name, "press": named, "settings": dict(self.settings)}

    def prepare(self, model: PreTrainedModel) -> None:
        if hasattr(self.press, "post_init_from_model"):
            self.press.post_init_from_model(model)

    def score(self, entries: Entries) -> Tensor:
        reading = entries.reading
        assert reading is not None
        shape, r = entries.keys.shape[:2], reading.hidden_states.shape[1]
        # kvpress puts the rotary embedding there, and some presses expect it
        had = hasattr(reading.module, "rotary_emb")
        if not had:
            reading.module.rotary_emb = reading.rotary
        try:
            scores: Tensor = self.press.score(
                reading.module, reading.hidden_states, entries.keys[None], entries.values[None], None,
                {"hidden_states": reading.hidden_states, "position_embeddings": reading.position_embeddings})
        except _FAILURES as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"the press {type(self.press).__name__} cannot score {shape[1]} entries of which the last "
                             f"{r} were read since the last distillation: {reason}. A press "
                             "that needs the whole text at once needs a pot that holds it: raise pot_tokens"
                             ) from error
        finally:
            if not had:
                del reading.module.rotary_emb
        if tuple(scores.shape) != (1, *shape):
            raise InputError(f"the press {type(self.press).__name__} gave scores of shape {tuple(scores.shape)}, "
                             f"expected {(1, *shape)} (batch, kv heads, entries)")
        return scores[0]


def _made(name: str, settings: Mapping[str, Any]) -> Any:
    if not name.isidentifier():
        raise InputError(f"the press {name!r} is not part of kvpress, and settings on disk may import nothing else; "
                         "make the compressor with KVPress(press) in Python")
    try:
        package = import_module(_PACKAGE)
    except ImportError as error:
        raise InputError(f"the press {name!r} needs kvpress, which cannot be imported here ({error}); install it with "
                         "pip install --no-deps kvpress, and what it asks for") from error
    found = getattr(package, name, None)
    if not isinstance(found, type):
        raise InputError(f"there is no press {name!r} in kvpress")
    try:
        return found(**settings)
    except (TypeError, AssertionError) as error:
        raise InputError(f"the press {name!r} cannot be made with {dict(settings)}: {error}") from error


__all__ = ["KVPress"]
