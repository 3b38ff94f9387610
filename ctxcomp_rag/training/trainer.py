"""The training loop of every compressor: stages of objectives over examples, resumable to the bit.

What a step draws, and what dropout drops, depends on (seed, stage, step) alone. A checkpoint therefore holds the
trained weights and the optimisers' state and where they were; a run that was killed gives the same weights as one that
was not. Everything is written as safetensors and JSON.

Processes (`accelerate launch`, torchrun): every process draws the whole batch and takes its share; the loss is the mean
over the labelled tokens of the whole batch, so a step is that of one process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctxcomp_rag.errors import InputError
from ctxcomp_rag.training.examples import Example, examples_digest
from ctxcomp_rag.training.monitor import HeldOut
from ctxcomp_rag.training.objectives import IGNORED

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


class Objective(Protocol):
    """Turns an example into a training sample, which has `labels` and is otherwise known to the loss only."""

    def from_example(self, example: Example, rng: random.Random) -> Any: ...


SummedLoss = Callable[[Sequence[Any]], Tensor]
"""Cross-entropy of samples, summed over their labelled tokens."""

MakeOptimizers = Callable[[Mapping[str, nn.Parameter], float], Sequence[torch.optim.Optimizer]]
"""(trained parameters by name, learning rate) -> optimisers, one group each or several."""


@dataclass(frozen=True)
class Source:
    """Examples as one objective shows them, drawn with `weight` against the other sources of the stage."""

    objective: Objective
    examples: Sequence[Example]
    weight: float = 1.0

    def draw(self, rng: random.Random) -> Any:
        """A training sample."""
        return self.objective.from_example(rng.choice(self.examples), rng)

    def described(self) -> dict[str, Any]:
        """What decides the samples, JSON-ready, the data as a digest."""
        return {"objective": type(self.objective).__name__, "weight": self.weight, "examples": len(self.examples),
                "data": examples_digest(self.examples)}


@dataclass(frozen=True)
class Stage:
    """A part of a training run.

    Attributes:
        steps: optimiser steps; the rate rises over `warmup_steps` and then falls along a cosine to 0 at the end.
        batch_size: samples of a step, over all processes.
        frozen: beginnings of the names of parameters that this stage leaves as they are.
        may_end_early: whether the held-out loss may end it; not where what it trains is another thing.
    """

    name: str
    sources: tuple[Source, ...]
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    frozen: tuple[str, ...] = ()
    may_end_early: bool = True

    def rate(self, step: int) -> float:
        """Learning rate of a step, as a fraction of the largest."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * done))

    def described(self) -> dict[str, Any]:
        """Everything that decides what the stage does, JSON-ready, the data as digests."""
        return {"name": self.name, "steps": self.steps, "batch_size": self.batch_size,
                "learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps, "frozen": list(self.frozen),
                "sources": [s.described() for s in self.sources]}


def adamw(parameters: Mapping[str, nn.Parameter], learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW without weight decay: the optimiser of both papers."""
    return [torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)]


def make_accelerator(**options: Any) -> Accelerator:
    """What knows the processes and devices of a run; `options` are those of `accelerate.Accelerator`."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # an encoder's head gives no slots
    # without a device of its own it must be told so, or every process of several takes itself for the only one
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[unused], **options)


class _Losses(nn.Module):
    """The compressor's loss as a module, so that its gradients can be averaged over processes."""

    def __init__(self, compressor: nn.Module, loss: SummedLoss) -> None:
        super().__init__()
        self.compressor, self.loss = compressor, loss

    def forward(self, groups: Sequence[Sequence[Any]]) -> Tensor:
        """(number of groups,) summed losses; 0 for an empty group."""
        zero = next(p for p in self.compressor.parameters() if p.requires_grad).new_zeros(())
        return torch.stack([self.loss(group) if group else zero for group in groups])


class Trainer:
    """Trains a compressor through its frozen decoder; `run` again after an interruption goes on where it was.

    Args:
        compressor: only its parameters that require a gradient are trained and stored.
        loss: of the compressor's samples, summed over labelled tokens.
        folder: for the checkpoint and `log.jsonl`, whose first line records seed, data digests and settings.
        max_grad_norm: gradients are scaled down to this norm.
        save_every: steps between checkpoints; the end of a stage always gets one.
        held_out: evaluated in every stage; ends early those that it may.
        settings: what else decides the weights, JSON-ready; recorded, and required to be the same on resuming.
        notes: what else the first line of the log says, JSON-ready.

    Raises:
        InputError: a stage has nothing to train on or nothing to train, or freezes what there is not.
    """

    def __init__(self, compressor: nn.Module, loss: SummedLoss, stages: Sequence[Stage], folder: str | Path, *,
                 seed: int = 0, max_grad_norm: float = 1.0, optimizers: MakeOptimizers = adamw, save_every: int = 50,
                 accelerator: Accelerator | None = None, held_out: HeldOut | None = None,
                 settings: Mapping[str, Any] | None = None, notes: Mapping[str, Any] | None = None) -> None:
        self.accelerator = accelerator or make_accelerator()
        self.compressor, self.loss, self.stages, self.folder = compressor, loss, tuple(stages), Path(folder)
        self.seed, self.max_grad_norm = seed, max_grad_norm
        self.make_optimizers, self.save_every, self.held_out = optimizers, save_every, held_out
        self.notes = dict(notes or {})
        self.trained = {n: p for n, p in compressor.named_parameters() if p.requires_grad}
        for stage in self.stages:
            if not stage.sources or any(not s.examples for s in stage.sources):
                raise InputError(f"the stage {stage.name!r} has a source without examples; give it some, or leave the "
                                 "stage out")
            if stage.batch_size % self.accelerator.num_processes:
                raise InputError(f"expected a batch size that {self.accelerator.num_processes} processes can share, "
                                 f"got {stage.batch_size} in the stage {stage.name!r}")
            _check_frozen(stage, list(self.trained))
        self.described = {"seed": seed, "max_grad_norm": max_grad_norm, "stages": [s.described() for s in self.stages],
                          **(settings or {})}

    def run(self, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train to the end.

        Args:
            progress: called with the log's record of every step.

        Raises:
            InputError: the folder holds a run with another seed, other data or other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        at, first, saved = self._resume()
        kept = self._begin_log(at, first)
        for number in range(at, len(self.stages)):
            stage = self.stages[number]
            optimizers = self._enter(stage)
            if saved is not None:
                _restore(optimizers, saved)
            losses = self.accelerator.prepare_model(_Losses(self.compressor, self.loss))
            self.compressor.train()
            history = [line["held_out"] for line in kept if line["stage"] == number and "held_out" in line]
            for step in range(first if number == at else 0, stage.steps):
                record = self._step(stage, step, losses, optimizers)
                if self.held_out and (step + 1) % self.held_out.every == 0:
                    record["held_out"] = round(self.held_out.evaluate(self.compressor), 6)
                    history.append(record["held_out"])
                self._log({"stage": number, "name": stage.name, "step": step, **record})
                ended = (self.held_out is not None and "held_out" in record and stage.may_end_early
                         and self.held_out.stops(history))
                if step + 1 == stage.steps or ended:
                    self._save(number + 1, 0, [])
                elif (step + 1) % self.save_every == 0:
                    self._save(number, step + 1, optimizers)
                if progress:
                    progress({"stage": stage.name, "step": step + 1, "steps": stage.steps, "ended": ended, **record})
                if ended:
                    break
            saved = None
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.compressor.eval()

    # -- one step --------------------------------------------------------------------------------------------------

    def _enter(self, stage: Stage) -> list[torch.optim.Optimizer]:
        for name, parameter in self.trained.items():
            parameter.requires_grad_(not name.startswith(stage.frozen))
            parameter.grad = None
        chosen = {n: p for n, p in self.trained.items() if p.requires_grad}
        optimizers = list(self.make_optimizers(chosen, stage.learning_rate))
        for group in (g for o in optimizers for g in o.param_groups):
            group["initial_lr"] = group["lr"]
        return optimizers

    def _step(self, stage: Stage, step: int, losses: nn.Module,
              optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        began = time.perf_counter()
        groups = self._draw(stage, step)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(_seed(self.seed, stage.name, step, rank))  # for dropout
        counts = [sum(label != IGNORED for s in group for label in s.labels) for group in groups]
        flat = [(i, s) for i, group in enumerate(groups) for s in group][rank::world]
        sums = losses([[s for j, s in flat if j == i] for i in range(len(groups))])
        self.accelerator.backward(sums.sum() * (world / max(1, sum(counts))))
        trained = [p for p in self.trained.values() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, self.max_grad_norm)
        assert norm is not None
        if not math.isfinite(float(norm)):
            raise InputError(f"the gradients of step {step} of the stage {stage.name!r} are not numbers; lower its "
                             f"learning rate ({stage.learning_rate:g}) and train again from the last checkpoint")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * stage.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        every: Any = self.accelerator.reduce(sums.detach(), "sum")
        names = [type(s.objective).__name__ for s in stage.sources]
        by_objective = {f"{i}.{n}": round(float(v) / c, 6) for i, (n, v, c) in enumerate(zip(names, every, counts,
                                                                                          strict=True)) if c}
        return {"loss": round(float(every.sum()) / max(1, sum(counts)), 6), "losses": by_objective,
                "gradient_norm": round(float(norm), 6), "learning_rate": stage.learning_rate * stage.rate(step),
                "labels": sum(counts), "seconds": round(time.perf_counter() - began, 3)}

    def _draw(self, stage: Stage, step: int) -> list[list[Any]]:
        """The batch of a step, samples by source."""
        rng = random.Random(_seed(self.seed, stage.name, step))
        groups: list[list[Any]] = [[] for _ in stage.sources]
        for i in rng.choices(range(len(stage.sources)), [s.weight for s in stage.sources], k=stage.batch_size):
            groups[i].append(stage.sources[i].draw(rng))
        return groups

    # -- what is kept ----------------------------------------------------------------------------------------------

    def _save(self, stage: int, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if self.accelerator.is_main_process:
            tensors = {f"model.{n}": p.detach().cpu().contiguous() for n, p in self.trained.items()}
            for number, optimizer in enumerate(optimizers):
                for key, entry in optimizer.state_dict()["state"].items():
                    tensors |= {f"optimizer.{number}.{key}.{n}": torch.as_tensor(v).cpu().contiguous()
                                for n, v in entry.items()}
            temporary = self.folder / f"{CHECKPOINT}.tmp"
            state = {"stage": stage, "step": step, "run": self.described}
            save_file(tensors, temporary, metadata={"state": json.dumps(state)})
            os.replace(temporary, self.folder / CHECKPOINT)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> tuple[int, int, dict[str, Tensor] | None]:
        """(stage, step, optimiser state) to go on with; loads the weights."""
        file = self.folder / CHECKPOINT
        if not file.exists():
            return 0, 0, None
        with safe_open(file, "pt") as opened:
            state = json.loads(opened.metadata()["state"])
        tensors = load_file(file)
        weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        different = [k for k, v in self.described.items() if v != state["run"].get(k)]
        different += ["parameters"] if weights.keys() != self.trained.keys() else []
        if different:
            raise InputError(f"the run in {str(self.folder)!r} was begun with another {', '.join(different)}; give it "
                             "the same again to go on, or choose another folder")
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        return state["stage"], state["step"], {k: v for k, v in tensors.items() if k.startswith("optimizer.")}

    def _begin_log(self, stage: int, step: int) -> list[dict[str, Any]]:
        """Cut the log after the checkpoint and return it: what came later will be done, and written, again."""
        file = self.folder / LOG
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()[1:]] if file.exists() else []
        kept = [line for line in lines if (line["stage"], line["step"]) < (stage, step)]
        self.accelerator.wait_for_everyone()  # every process has read it
        if not self.accelerator.is_main_process:
            return kept
        parameters = sum(p.numel() for p in self.trained.values())
        head = {**self.described, "parameters": parameters, **self.notes}
        file.write_text("".join(json.dumps(line) + "\n" for line in [head, *kept]), encoding="utf-8")
        return kept

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _check_frozen(stage: Stage, names: Sequence[str]) -> None:
    """Raises InputError for what a stage freezes without effect, and for a stage that freezes everything."""
    for beginning in stage.frozen:
        if not any(name.startswith(beginning) for name in names):
            parts = [name.split(".") for name in names]
            beginnings = dict.fromkeys(".".join(p[:n]) for p in parts for n in range(1, len(p) + 1))
            near = get_close_matches(beginning, beginnings, n=3) or list(dict.fromkeys(p[0] for p in parts))
            raise InputError(f"the stage {stage.name!r} freezes {beginning!r}, with which no trained parameter begins; "
                             f"the nearest are {', '.join(near)}")
    if names and all(name.startswith(stage.frozen) for name in names):
        raise InputError(f"the stage {stage.name!r} freezes every trained parameter; leave one out of its `frozen`")


def _restore(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    for number, optimizer in enumerate(optimizers):
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            _, which, key, field = name.split(".")
            if int(which) == number:
                entries.setdefault(int(key), {})[field] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")
