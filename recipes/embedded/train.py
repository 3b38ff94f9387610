"""Train the embedded decoder and its ICAE compressor from scratch. Resumable: run the same command again.

Stages: `text` (language model + questions) -> `joint` (the same weights also read slots; the rate falls several times,
and the mean of what the falls end with goes on) -> `compressor` (decoder frozen, LoRA + memory token + [AE] go on; no
steps of it unless asked for). Checkpoints carry weights, optimizer state and the step, and data depend on (seed, step)
only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from cooccurrence import embeddings_from_counts
from data import SPECIALS, Corpus, read_lines, read_squad
from kept import MEMORIES, without_wording
from measure import evaluate
from mix import ONWARD, cost, step_rows
from model import Model, Shape
from objective import KINDS, forward
from parallel import share, spread, start, sum_gradients
from positional import set_positional_heads
from released import RELEASED, load_released
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from schedule import Schedule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ctxcomp_rag.evaluation.fictional import generate_document
from ctxcomp_rag.training.muon import Muon

STAGES = ("text", "joint", "compressor")
# Weight of what the documents as text teach those that read slots.
TAUGHT = {"text": 0.0, "joint": 1.0, "compressor": 1.0}
BEGUN = 0.15  # share of the released weights that training went on from, in the mean with what it ends with
EMBEDDING_NORM = 0.32
COPYING = 400  # steps until copying has formed


def train_tokenizer(data: Path, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, digits apart, trained on all three sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = [generate_document(rng, "train").text for _ in range(20000)]
    texts += [p["context"] for a in read_squad(data / "squad-train-v1.1.json.xz") for p in a["paragraphs"]][::6]
    texts += [q["question"] for a in read_squad(data / "squad-train-v1.1.json.xz")
              for p in a["paragraphs"] for q in p["qas"]][::20]
    texts += [r["text"][:4000] for r in read_lines(data / "wiki-00.jsonl.xz")[:700]]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def save(model: Model, optimizers: list[torch.optim.Optimizer], path: Path, state: dict[str, object]) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for key, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}.{n}": torch.as_tensor(v) for n, v in entry.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    os.replace(temporary, path)


def load(model: Model, optimizers: list[torch.optim.Optimizer] | None, path: Path) -> None:
    tensors = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for number, optimizer in enumerate(optimizers or []):
        packed = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, key, field_name = name.split(".")
                entries.setdefault(int(key), {})[field_name] = value
        optimizer.load_state_dict({"state": entries, "param_groups": packed["param_groups"]})


def average(model: Model, paths: list[Path], own: float | None = None) -> None:
    """Let the model's weights be the mean of them and those of these checkpoints; `own` is the share of the model's
    own [default: as much as of each checkpoint]."""
    own = 1 / (len(paths) + 1) if own is None else own
    shares = torch.tensor([own, *[(1 - own) / len(paths)] * len(paths)])
    ends = [{f"model.{k}": v for k, v in model.state_dict().items()}, *map(load_file, paths)]
    model.load_state_dict({k[6:]: torch.einsum("n,n...->...", shares, torch.stack([end[k] for end in ends]))
                           for k in ends[0]})


def make_optimizers(model: Model, stage: str, schedule: Schedule) -> list[torch.optim.Optimizer]:
    trained = model.compressor_parameters() if stage == "compressor" else list(model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    matrices = {id(p) for b in model.blocks for d in (b.weight, b.lora_a, b.lora_b) for p in d.values()}
    return [Muon([p for p in trained if id(p) in matrices], lr=schedule.muon_lr, spread=spread),
            torch.optim.AdamW([p for p in trained if id(p) not in matrices], lr=schedule.adam_lr, betas=(0.9, 0.95),
                              weight_decay=0.0)]


def record(folder: Path, rank: int, line: dict[str, object]) -> None:
    """Print a line of the log and keep it (the first process does)."""
    if rank:
        return
    print(json.dumps(line), flush=True)
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with squad-*.json.xz and wiki-*.jsonl.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoints and log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="rows per step, relative to the default")
    parser.add_argument("--english", type=float, default=1.0, help="share of steps with each of the English rows")
    parser.add_argument("--wiki-files", type=int, default=1)
    parser.add_argument("--begin", type=Path, help="go on from released weights: a folder with decoder/ and icae/")
    parser.add_argument("--rows", choices=ONWARD, default=ONWARD[0], help="with --begin, what it is shown: see mix.py")
    parser.add_argument("--memory", choices=tuple(MEMORIES), default="slots", help="what spans are: see kept.py")
    for name, value in asdict(Schedule()).items():
        if name != "begun":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=50)
    args = parser.parse_args()
    if args.begin and (missing := [name for name in RELEASED if not (args.begin / name).exists()]):
        parser.error(f"expected released weights in {args.begin}, and there is no {missing[0]}; give the folder that "
                     "export.py wrote")
    rank, world = start()
    args.begun = args.begin is not None
    schedule = Schedule(**{name: getattr(args, name) for name in asdict(Schedule())})
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    tokenizer_path = args.out / "tokenizer.json"
    if args.begin and not rank:
        shutil.copy(args.begin / "decoder" / "tokenizer.json", tokenizer_path)
    elif not args.begin and not tokenizer_path.exists():
        train_tokenizer(args.data, shape.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(args.begin / "decoder" / "tokenizer.json" if args.begin else tokenizer_path))
    corpus = Corpus(tokenizer, args.data, args.wiki_files)
    held_out = Corpus(tokenizer, args.data, 0, squad="dev")
    torch.manual_seed(args.seed)
    kind, encode = MEMORIES[args.memory]
    model = kind(shape)
    checkpoint = args.out / "checkpoint.safetensors"
    if args.begin and not checkpoint.exists():
        load_released(model, args.begin)
        if not rank:
            save(model, [], args.out / "joint-0.safetensors", {"stage": "joint", "step": 0})
    elif not checkpoint.exists():
        model.embed.data.copy_(embeddings_from_counts(corpus.texts(random.Random(args.seed)), shape.vocab_size,
                                                      shape.hidden_size, EMBEDDING_NORM))
        set_positional_heads(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(p.numel() for p in model.compressor_parameters()):,} of them in the compressor", flush=True)
    start_stage, start_step = STAGES[args.begun], 0
    optimizers = None
    if checkpoint.exists():
        with safe_open(checkpoint, "pt") as file:
            state = json.loads(file.metadata()["state"])
        start_stage, start_step = state["stage"], state["step"]
        optimizers = make_optimizers(model, start_stage, schedule)
        load(model, optimizers, checkpoint)
    for stage in STAGES[STAGES.index(start_stage):]:
        if stage != start_stage or optimizers is None:
            optimizers = make_optimizers(model, stage, schedule)
        steps = getattr(schedule, stage)
        began, recent = time.time(), []
        for step in range(start_step if stage == start_stage else 0, steps):
            rng = random.Random(f"{args.seed}/{stage}/{step}")
            rows = step_rows(corpus, args.rows if args.begun else stage, rng,
                             schedule.progress(stage, step), args.scale, shape.vocab_size, schedule.max_factor,
                             args.english, 8 if step < COPYING else 2)
            if args.memory == "kept":
                rows = [r for r in map(without_wording, rows) if r.branches]
            scale = schedule.learning_rate(stage, step)
            for optimizer, rate in zip(optimizers, (schedule.muon_lr, schedule.adam_lr), strict=True):
                optimizer.param_groups[0]["lr"] = rate * scale
            mine = share(rows, [cost(r) for r in rows], rank, world)
            out = forward(model, mine, corpus.separator, schedule.naming(stage, step), TAUGHT[stage],
                          stage != "compressor", encode, not args.begun)
            out.loss.backward()
            sum_gradients(model.parameters())
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recent.append({k: out.sums[k] / out.counts[k] for k in out.sums if out.counts[k]})
            if (step + 1) % 10 == 0:
                mean = {k: round(sum(r.get(k, 0) for r in recent) / max(1, sum(k in r for r in recent)), 3)
                        for k in KINDS}
                seconds = round((time.time() - began) / len(recent), 2)
                record(args.out, rank, {"stage": stage, "step": step + 1, "seconds_per_step": seconds, **mean})
                began, recent = time.time(), []
            done = step + 1 == steps
            if stage == "joint" and step + 1 in schedule.ends():
                ends = [args.out / f"joint-{end}.safetensors" for end in [0] * args.begun + schedule.ends()
                        if end <= step + 1]
                if not rank:
                    save(model, [], ends[-1], {"stage": stage, "step": step + 1})
                if done:
                    average(model, ends[:-1], 1 - BEGUN if args.begun else None)
            if (step + 1) % args.evaluate_every == 0 or done:
                record(args.out, rank, {"stage": stage, "step": step + 1,
                                  "evaluation": evaluate(model, held_out, encode)})
                began = time.time()
            if not rank and ((step + 1) % args.save_every == 0 or done):
                following = STAGES[min(STAGES.index(stage) + 1, len(STAGES) - 1)]
                where = {"stage": following, "step": 0} if done and stage != "compressor" else {
                    "stage": stage, "step": step + 1}
                if done:
                    save(model, [], args.out / f"after-{stage}.safetensors", where)
                save(model, [] if done and stage != "compressor" else optimizers, checkpoint, where)


if __name__ == "__main__":
    main()
