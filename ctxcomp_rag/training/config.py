"""What a training run is, as typed settings; one YAML file holds them (recipes/*.yaml)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import dacite
import yaml

from ctxcomp_rag.errors import InputError


def _at_least(least: int, where: str, **settings: float | None) -> None:
    """Raises InputError for a setting that is below `least` or not finite; None stands for a default."""
    for name, value in settings.items():
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{where}: expected {name} to be a number of at least {least}, got {value:g}; give it one")


def _positive(where: str, **settings: float) -> None:
    """Raises InputError for a setting that is not above 0, or not finite."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise InputError(f"{where}: expected {name} to be a number above 0, got {value:g}; give it one")


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from: `path` or `id`.

    Attributes:
        kind: "texts" (txt, md, html, jsonl, csv, parquet, pdf, folders; cut into passages), "questions" (JSON lines of
            context, question and answer or answers) or "squad" (its official JSON); JSON plain or .xz.
        id, subset, split: of the Hugging Face hub, read with `datasets`; texts or questions.
        columns: what the fields text, context, question, answer are called.
        limit: texts or questions to read at most.
        context_tokens: longest context, in the encoder's tokens [default: the compressor's segment].
    """

    kind: Literal["texts", "questions", "squad"] = "texts"
    path: str | None = None
    id: str | None = None
    subset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.id is None):
            raise InputError("a data set has either a path or an id of the Hugging Face hub; give one of them")
        if self.kind == "squad" and self.id is not None:
            raise InputError("kind 'squad' is the official JSON file; for a data set by id use kind 'questions'")
        _at_least(1, f"the data of {self.source!r}", limit=self.limit, context_tokens=self.context_tokens)

    @property
    def source(self) -> str:
        return self.path or self.id or ""


@dataclass(frozen=True)
class CompressorConfig:
    """What is trained.

    Attributes:
        start: what to go on with: folder of a saved compressor, or the method of one that came with the decoder; the
            other settings, `nested` apart, are then its own.
        factor: source tokens per slot.
        memory_tokens: rows of ICAE's memory table [default: segment_tokens / factor].
        slots, slot_positions: see ICAEConfig; "proportional" makes every factor of one compressor.
        nested: factors, ascending from `factor`, at which one ICAE span can be read; sources draw from them.
        encoder: of PCC, a folder, hub id or "embedded"; trained whole, or by LoRA where `lora_rank` is given.
    """

    method: Literal["icae", "pcc"] = "icae"
    start: str | None = None
    segment_tokens: int = 512
    factor: float = 4.0
    memory_tokens: int | None = None
    slots: Literal["fixed", "proportional"] = "proportional"
    slot_positions: Literal["consecutive", "spread"] = "spread"
    encoder: str | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    nested: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.method == "pcc" and self.nested:
            raise InputError("nested spans are made by icae; leave `nested` out, or use method: icae")
        if self.method == "pcc" and self.start is None and self.encoder is None:
            raise InputError("a pcc compressor needs an encoder: a folder, a hub id, or 'embedded'")
        _at_least(1, "compressor", segment_tokens=self.segment_tokens, factor=self.factor,
                  memory_tokens=self.memory_tokens, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
        for factor in self.nested:
            _at_least(1, "compressor", nested=factor)
        if self.factor > self.segment_tokens:
            raise InputError(f"compressor: a segment of {self.segment_tokens} tokens has no slot at factor "
                             f"{self.factor:g}; use a smaller factor or a larger segment_tokens")
        if not self.lora_targets:
            raise InputError("compressor: lora_targets names no module, so nothing would be trained; name some, or "
                             "leave it out for q_proj and v_proj")


@dataclass(frozen=True)
class SourceConfig:
    """One objective over one data set.

    Attributes:
        objective: "autoencoding", "continuation", "question" or "distillation".
        data: a name under `data`.
        weight: share of the stage's samples, against the other sources.
        factors: drawn anew for every sample [default: those of a nested compressor, else the compressor's own].
        max_spans: for questions, up to so many spans in a prompt, the right one anywhere.
    """

    objective: Literal["autoencoding", "continuation", "question", "distillation"]
    data: str
    weight: float = 1.0
    factors: list[float] = field(default_factory=list)
    max_spans: int = 1

    def __post_init__(self) -> None:
        where = f"the source {self.objective!r} of {self.data!r}"
        _at_least(0, where, weight=self.weight)
        _at_least(1, where, max_spans=self.max_spans)
        for factor in self.factors:
            _at_least(1, where, factors=factor)


@dataclass(frozen=True)
class StageConfig:
    """A part of the run: a curriculum is stages whose factors grow."""

    name: str
    steps: int
    sources: list[SourceConfig]
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    frozen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        where = f"the stage {self.name!r}"
        _at_least(1, where, steps=self.steps, batch_size=self.batch_size)
        _at_least(0, where, warmup_steps=self.warmup_steps)
        _positive(where, learning_rate=self.learning_rate)
        if self.sources and not any(s.weight for s in self.sources):
            raise InputError(f"{where}: every source has the weight 0, so none would be drawn from; give one a weight "
                             "above 0")


@dataclass(frozen=True)
class HeldOutConfig:
    """Reconstruction of examples that are never trained on.

    Attributes:
        data: a name under `data`; the last `examples` of it are kept from every source.
        patience: evaluations without a new best after which a stage that has an autoencoding source ends; 0: never.
    """

    data: str
    examples: int = 64
    every: int = 200
    patience: int = 5

    def __post_init__(self) -> None:
        _at_least(1, "held_out", examples=self.examples, every=self.every)
        _at_least(0, "held_out", patience=self.patience)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        out: folder for the checkpoint, log.jsonl and the finished compressor (OUT/compressor).
        model: the decoder: "embedded", a folder or a hub id.
        mixed_precision: "bf16" computes in bfloat16 and keeps the trained weights in float32.
        tensorboard: also write TensorBoard event files under OUT.
    """

    out: str
    data: dict[str, DataConfig]
    stages: list[StageConfig]
    model: str = "embedded"
    compressor: CompressorConfig = field(default_factory=CompressorConfig)
    held_out: HeldOutConfig | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    max_grad_norm: float = 1.0
    save_every: int = 100
    seed: int = 0
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _at_least(1, "the run", save_every=self.save_every)
        _positive("the run", max_grad_norm=self.max_grad_norm)
        used = [s.data for stage in self.stages for s in stage.sources] + (
            [self.held_out.data] if self.held_out else [])
        for name in used:
            if name not in self.data:
                near = get_close_matches(name, self.data, n=1)
                raise InputError(f"there is no data set {name!r} under `data`; "
                                 + (f"did you mean {near[0]!r}?" if near else f"it has {', '.join(self.data)}"))
        if not self.stages or any(not s.sources for s in self.stages):
            raise InputError("a run has at least one stage, and every stage at least one source")
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise InputError(f"stages need names of their own, got {', '.join(names)}")


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file; `overrides` are `stages.0.steps=200`, values as in YAML.

    Raises:
        InputError: the file or a setting is not usable; a misspelt setting is answered with the nearest one.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{str(path)!r} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds no settings; expected out, data and stages")
    for override in overrides:
        _set(content, override)
    _check_names(content, TrainConfig, "")
    try:
        return dacite.from_dict(TrainConfig, content, dacite.Config(strict=True, cast=[float], check_types=True))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r}: {error}") from error


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"expected NAME=VALUE such as stages.0.steps=200, got {override!r}")
    *parents, last = key.split(".")
    at: Any = content
    try:
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else at.setdefault(name, {})
        at[int(last) if isinstance(at, list) else last] = yaml.safe_load(text)
    except (IndexError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{override!r} names nothing in the configuration ({error}); lists are numbered from 0"
                         ) from error


def _check_names(value: Any, kind: Any, where: str) -> None:
    """Raises InputError for a setting or a choice that there is not, before dacite does without a hint."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            near = get_close_matches(str(value), choices, n=1)
            raise InputError(f"expected {' or '.join(map(repr, choices))} in {where.rstrip('.')}, got {value!r}"
                             + (f"; did you mean {near[0]!r}?" if near else "; choose one of them"))
        return
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        known = [f.name for f in fields(kind)]
        for name, inner in value.items():
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                raise InputError(f"there is no setting {where}{name!s}; "
                                 + (f"did you mean {where}{near[0]}?" if near else f"expected {', '.join(known)}"))
            _check_names(inner, hints[name], f"{where}{name}.")
        return
    inner_kind = next((a for a in reversed(get_args(kind)) if is_dataclass(a)), None)
    if inner_kind is None:
        return
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, Mapping) and \
        getattr(kind, "__origin__", None) is dict else [("", value)]
    for name, item in items:
        _check_names(item, inner_kind, f"{where}{name}." if name != "" else where)
