"""A training run from its settings: decoder, compressor, examples, stages, and the finished compressor on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctxcomp_rag.backbone import Backbone, load_frozen
from ctxcomp_rag.compressors import Compressor, load_trained_compressor
from ctxcomp_rag.compressors.icae import ICAECompressor, ICAEConfig
from ctxcomp_rag.compressors.pcc import PCCCompressor, PCCConfig, load_encoder
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.training.checkpointing import checkpoint_gradients
from ctxcomp_rag.training.config import CompressorConfig, StageConfig, TrainConfig
from ctxcomp_rag.training.data import load_examples
from ctxcomp_rag.training.examples import Example
from ctxcomp_rag.training.monitor import HeldOut, PlateauMonitor
from ctxcomp_rag.training.optimizers import OPTIMIZERS
from ctxcomp_rag.training.overlap import HeldOutTexts
from ctxcomp_rag.training.sampling import SampledSource
from ctxcomp_rag.training.spliced import OBJECTIVES, Repeating, Trainable, summed_spliced_loss
from ctxcomp_rag.training.trainer import Stage, Trainer, make_accelerator

COMPRESSOR = "compressor"
_TRACKED = ("loss", "held_out", "gradient_norm", "learning_rate")
_DECIDING = ("model", "compressor", "held_out", "optimizer", "mixed_precision")
"""Settings that a run is only resumed with; the stages describe themselves, the rest changes no weight."""


def train(config: TrainConfig, progress: Callable[[dict[str, Any]], None] | None = None,
          advise: Callable[[str], None] | None = None, note: Callable[[str], None] | None = None) -> Path:
    """Train to the end, from the last checkpoint if there is one; returns the folder of the finished compressor.

    Args:
        progress: called with the log's record of every step.
        advise: called where a loss stands on a plateau, with what to do.
        note: called with what of the data is not trained on.

    Raises:
        InputError: data, settings and decoder do not fit each other, or the folder holds another run.
    """
    out = Path(config.out)
    occupied = next((p for p in (out, *out.parents) if p.exists() and not p.is_dir()), None)
    if occupied is not None:
        raise InputError(f"expected a folder in `out`, but {str(occupied)!r} is a file; choose another, such as "
                         "--set out=runs/mine")
    accelerator = make_accelerator(mixed_precision=config.mixed_precision,
                                   log_with="tensorboard" if config.tensorboard else None, project_dir=str(out))
    backbone = load_frozen(config.model, device=accelerator.device)
    compressor = new_compressor(config.compressor, backbone, config.seed)
    trainable = Trainable(compressor)
    loaded = {name: load_examples(data, _encoder_tokenizer(compressor), compressor.max_chunk_tokens)
              for name, data in config.data.items()}
    examples, kept = hold_out(config, {name: found for name, (found, _) in loaded.items()})
    loss = partial(summed_spliced_loss, trainable)
    repeating = Repeating(trainable)
    held_out = None if config.held_out is None else HeldOut(
        loss, [repeating.sample(e, [e.context], None) for e in kept], config.held_out.every, config.held_out.patience)
    stages = [_stage(stage, examples, trainable) for stage in config.stages]
    counts = {name: {"left_out": left_out, "share_held_out": len(found) - len(examples[name])}
              for name, (found, left_out) in loaded.items()}
    if note and accelerator.is_main_process:
        for text in _notes(config, stages, examples, counts):
            note(text)
    if config.gradient_checkpointing:
        checkpoint_gradients(backbone.model)
        own = trainable.compressor
        checkpoint_gradients(own.encoder_model if isinstance(own, PCCCompressor) else own.encoder)
    if config.tensorboard:
        _require_tensorboard()
        accelerator.init_trackers("tensorboard")
    monitor = PlateauMonitor()
    step = 0

    def watch(record: dict[str, Any]) -> None:
        nonlocal step
        step += 1
        values: dict[str, Any] = {k: record[k] for k in _TRACKED if k in record}
        accelerator.log(values | {f"loss/{k}": v for k, v in record["losses"].items()}, step=step)
        advice = monitor.advice(record)
        if advice and advise:
            advise(advice)
        if progress:
            progress(record)

    trainer = Trainer(trainable.compressor, loss, stages, out, seed=config.seed, max_grad_norm=config.max_grad_norm,
                      optimizers=OPTIMIZERS[config.optimizer], save_every=config.save_every, accelerator=accelerator,
                      held_out=held_out, settings={k: v for k, v in asdict(config).items() if k in _DECIDING},
                      notes={"data": counts})
    trainer.run(watch)
    accelerator.end_training()
    if accelerator.is_main_process:
        compressor.save_pretrained(out / COMPRESSOR)
    return out / COMPRESSOR


def new_compressor(config: CompressorConfig, backbone: Backbone, seed: int) -> Compressor:
    """The compressor that a run begins with; its random weights depend on the seed alone.

    Raises:
        InputError: its segments do not fit the decoder's window, or the decoder has no such LoRA targets.
    """
    torch.manual_seed(seed)
    if config.start is not None:
        started = load_trained_compressor(config.start, backbone)
        return nested_from(started, config.nested) if config.nested else started
    slots = round(config.segment_tokens / config.factor)
    if config.segment_tokens + slots > backbone.max_positions:
        raise InputError(f"segments of {config.segment_tokens} tokens with {slots} slots do not fit the "
                         f"{backbone.max_positions} positions of {backbone.model_id!r}; use a smaller segment_tokens")
    if config.method == "pcc":
        assert config.encoder is not None
        rank = config.lora_rank
        encoder = load_encoder(config.encoder, large=rank is not None, lora_rank=rank or 0,
                               lora_alpha=config.lora_alpha or rank or 0)
        return PCCCompressor(backbone, encoder, PCCConfig(config.segment_tokens, slots, encoder=config.encoder))
    _check_targets(config.lora_targets, backbone.model)
    rank = config.lora_rank or 128
    return ICAECompressor(backbone, ICAEConfig(
        num_memory_tokens=config.memory_tokens or slots, segment_tokens=config.segment_tokens,
        compression_factor=config.factor, slots=config.slots, slot_positions=config.slot_positions, lora_rank=rank,
        lora_alpha=config.lora_alpha or rank, lora_targets=tuple(config.lora_targets),
        nested=tuple(config.nested) or None))


def _check_targets(targets: Sequence[str], model: nn.Module) -> None:
    """Raises InputError for a LoRA target that the decoder has not, by the rule of peft: a name, or the end of one."""
    names = [n for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            there = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(f"the decoder has no module {target!r} for lora_targets; it has {', '.join(there)}")


def nested_from(compressor: Compressor, factors: Sequence[float]) -> ICAECompressor:
    """A nested compressor that begins with the weights of another; it has to be trained before it is one.

    Raises:
        InputError: the compressor is not ICAE, or its slots cannot be nested (see ICAEConfig).
    """
    if not isinstance(compressor, ICAECompressor):
        raise InputError(f"nested spans are made by icae, not by {compressor.name}; leave `nested` out")
    config = replace(compressor.config, compression_factor=factors[0], nested=tuple(factors))
    return ICAECompressor(compressor.backbone, config, encoder=compressor.encoder,
                          memory_tokens=compressor.memory_tokens.detach())


def _stage(config: StageConfig, examples: Mapping[str, list[Example]], trainable: Trainable) -> Stage:
    sources = []
    for source in config.sources:
        objective = OBJECTIVES[source.objective](trainable)
        usable = [e for e in examples[source.data] if all(getattr(e, name) for name in objective.needs)]
        if not usable:
            raise InputError(f"the objective {source.objective!r} needs {' and '.join(objective.needs)}, which the "
                             f"data set {source.data!r} has not; use data of kind "
                             + ("texts, of which some are longer than one piece (a smaller context_tokens cuts them)"
                                if "continuation" in objective.needs else "questions or squad"))
        factors = tuple(source.factors) or trainable.spec.nested
        for factor in factors:
            trainable.compressor.num_slots(trainable.compressor.max_chunk_tokens, factor)
        sources.append(SampledSource(objective, usable, source.weight, factors, source.max_spans))
    return Stage(config.name, tuple(sources), config.steps, config.batch_size, config.learning_rate,
                 config.warmup_steps, tuple(config.frozen),
                 may_end_early=any(s.objective == Repeating.name and s.weight for s in config.sources))


def hold_out(config: TrainConfig,
             examples: Mapping[str, list[Example]]) -> tuple[dict[str, list[Example]], list[Example]]:
    """(what every data set has left to train on, what is held out): no example that shares text with one held out.

    Raises:
        InputError: a data set that a stage uses has nothing left.
    """
    if config.held_out is None:
        return dict(examples), []
    kept = examples[config.held_out.data][-config.held_out.examples :]
    texts = HeldOutTexts(kept)
    left = {name: [e for e in some if not texts.shared_by(e)] for name, some in examples.items()}
    for name in (s.data for stage in config.stages for s in stage.sources):
        if not left[name]:
            raise InputError(f"nothing of the data set {name!r} is left to train on after {len(kept)} examples were "
                             "held out; give more data, or fewer held_out.examples")
    return left, kept


def _notes(config: TrainConfig, stages: Sequence[Stage], examples: Mapping[str, Sequence[Example]],
           counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Sentences on what is not trained on."""
    notes = []
    for name, count in counts.items():
        texts = config.data[name].kind == "texts"
        if count["left_out"]:
            notes.append(f"data {name!r}: " + (
                f"texts left out as they are empty: {count['left_out']}" if texts else
                f"questions left out as no piece of the context holds the answer: {count['left_out']}"))
        if count["share_held_out"]:
            notes.append(f"data {name!r}: examples left out as they share text with those held out: "
                         f"{count['share_held_out']}")
    notes += [f"stage {stage.name!r}: {asked.objective} has {len(source.examples)} of the {len(examples[asked.data])} "
              f"examples of {asked.data!r}; the others lack what it needs"
              for planned, stage in zip(config.stages, stages, strict=True)
              for asked, source in zip(planned.sources, stage.sources, strict=True)
              if len(source.examples) < len(examples[asked.data])]
    return notes


def _encoder_tokenizer(compressor: Compressor) -> Any:
    return compressor.encoder.tokenizer if isinstance(compressor, PCCCompressor) else compressor.backbone.tokenizer


def _require_tensorboard() -> None:
    if find_spec("tensorboard") is None:
        raise InputError("tensorboard: true takes the package tensorboard, which is not installed; "
                         "pip install 'ctxcomp-rag[tensorboard]'")
