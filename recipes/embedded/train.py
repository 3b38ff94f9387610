"""Train the embedded decoder and its ICAE compressor from scratch. Resumable: run the same command again.

Stages: `text` (language model + questions) -> `joint` (the same weights also read slots) -> `compressor` (decoder
frozen, LoRA + memory token + [AE] go on). The learning rate of the last two falls to nothing; checkpoints carry
weights, optimizer state and the step, and data depend on (seed, step) only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from cooccurrence import embeddings_from_counts
from data import SPECIALS, Corpus, Row, read_lines, read_squad
from model import Model, Shape
from packed import Packing
from parallel import share, spread, start, sum_gradients, total
from positional import set_positional_heads
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ctxcomp_rag.evaluation.fictional import generate_document
from ctxcomp_rag.training.muon import Muon

STAGES = ("text", "joint", "compressor")
COMPRESSOR_RATE = 0.2  # learning rate of a compressor that only has to settle on the frozen decoder
EMBEDDING_NORM = 0.32
COPYING = 400  # steps until copying has formed
# Once the curriculum is over: how often a factor is drawn. English at 8x and beyond is out of this model's reach.
FACTORS = {"fictional": {1: 5, 2: 10, 3: 5, 4: 40, 6: 5, 8: 25, 12: 3, 16: 7},
           "english": {1: 10, 2: 20, 3: 10, 4: 45, 6: 5, 8: 10}}


@dataclass
class Schedule:
    """Steps of each stage and where its learning rate starts to fall (share of the stage)."""

    text: int = 2600
    joint: int = 3000
    compressor: int = 600
    decay_from: float = 0.5
    muon_lr: float = 2e-3
    adam_lr: float = 3e-3
    warmup: int = 60
    max_factor: float = 16.0
    curriculum: float = 0.4

    def learning_rate(self, stage: str, step: int) -> float:
        total = getattr(self, stage)
        share = step / total
        scale = min(1.0, (step + 1) / self.warmup)
        if stage != "text" and share > self.decay_from:
            scale *= 1 - 0.97 * (share - self.decay_from) / (1 - self.decay_from)
        return scale * (COMPRESSOR_RATE if stage == "compressor" and self.joint else 1.0)

    def progress(self, stage: str, step: int) -> float:
        """How far the factor curriculum is, from 0 to 1: it takes a share (`curriculum`) of the first stage with slots
        (a control has no joint stage); none where the weights already read slots."""
        if stage == "text" or not self.curriculum or stage != ("joint" if self.joint else "compressor"):
            return 1.0
        return min(1.0, step / (getattr(self, stage) * self.curriculum))

    def naming(self, stage: str, step: int) -> float:
        """Weight of the naming loss: 1 when slots begin, nothing from two thirds of the curriculum on."""
        return max(0.0, 1 - self.progress(stage, step) * 1.5) if stage != "text" else 0.0


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


def num_slots(length: int, factor: float) -> int:
    return max(1, math.ceil(length / factor))


def slot_places(length: int, slots: int) -> list[int]:
    """Slot j sits on the last token of the j-th of `slots` equal pieces of the text."""
    return [max(1, (j + 1) * length // slots) - 1 for j in range(slots)]


def slot_of(token: int, length: int, slots: int) -> int:
    """The slot in whose piece of the text a token lies."""
    return -(-(token + 1) * slots // length) - 1


def encode_spans(model: Model, spans: list[tuple[list[int], float]]) -> tuple[Tensor, list[int]]:
    """Slots of all spans, in order, and where each span begins among them."""
    counts = [num_slots(len(ids), f) for ids, f in spans]
    packing = Packing([(len(ids) + n, ()) for (ids, _), n in zip(spans, counts, strict=True)])
    ids, places, where = [], [], []
    for (text, _), n, begin in zip(spans, counts, packing.begins, strict=False):
        ids += text + [model.shape.vocab_size] * n
        places += [*range(len(text)), *slot_places(len(text), n)]
        where += range(begin + len(text), begin + len(text) + n)
    slots = model.encode(torch.tensor(ids), torch.tensor(places), packing, torch.tensor(where))
    return slots, [0, *accumulate(counts)]


@dataclass
class Flat:
    """One row laid out for the decoder."""

    ids: list[int]
    places: list[int]
    context: int
    branches: list[int]  # their lengths
    slot: list[int]  # index into the slot table, -1 for text
    targets: list[tuple[int, int, str, int]]  # (column, label, loss kind, branch)
    source: str
    points: list[tuple[int, tuple[int, ...], str]] = field(default_factory=list)  # a column, where to look, loss kind


def lay_out(row: Row, separator: list[int], span_starts: dict[int, int]) -> Flat:
    flat = Flat([], [], 0, [], [], [], row.source)
    place = 0
    held: list[list[int]] = []  # by part, the column of each of its tokens, or of the slot that holds it
    text_columns: list[tuple[int, int]] = []

    def add_text(ids: list[int], labelled: bool = False) -> None:
        nonlocal place
        for i, token in enumerate(ids):
            if labelled and i:
                text_columns.append((len(flat.ids) - 1, token))
            flat.ids.append(token)
            flat.places.append(place)
            flat.slot.append(-1)
            place += 1

    add_text(row.prefix)
    for k, (ids, factor) in enumerate(row.parts):
        if k:
            add_text(separator)
        count = num_slots(len(ids), factor or 1)
        held.append([len(flat.ids) + (slot_of(n, len(ids), count) if factor else n) for n in range(len(ids))])
        if factor is None:
            add_text(ids, labelled=row.language_model)
            continue
        for j, p in enumerate(slot_places(len(ids), count)):
            flat.ids.append(0)
            flat.places.append(place + p)
            flat.slot.append(span_starts[k] + j)
        place += len(ids)
    flat.context = len(flat.ids)
    columns: dict[int, list[int]] = {}
    for (ids, _), there in zip(row.parts, held, strict=True):
        for token, column in zip(ids, there, strict=True):
            columns.setdefault(token, []).append(column)
    kind = "lm-home" if row.source.startswith("fictional") else "lm"
    flat.targets += [(c, t, kind, 0) for c, t in text_columns]
    for number, branch in enumerate(row.branches, 1):
        base = len(flat.ids)
        flat.ids += branch.ids
        flat.places += range(place, place + len(branch.ids))
        flat.branches.append(len(branch.ids))
        flat.slot += [-1] * len(branch.ids)
        for i in range(1, len(branch.ids)):
            loss = branch.kind if i >= branch.answer_start else "question"
            if loss == "question" and branch.kind == "cloze":
                continue
            if loss == "answer" and row.source.startswith("fictional"):
                loss = {"fictional-several": "answer-several", "fictional-short": "answer-short"}.get(
                    row.source, "answer-home")
            flat.targets.append((base + i - 1, branch.ids[i], loss, number))
        asked = branch.ids[: branch.answer_start] if branch.kind != "reconstruct" else []
        flat.points += [(base + i, tuple(columns[token]), "match") for i, token in enumerate(asked)
                        if 0 < len(columns.get(token, ())) <= FEW]
        if branch.stands is not None:
            part, first = branch.stands
            ids, there = row.parts[part][0], held[part]
            begin = base + branch.answer_start - 1
            for n, token in enumerate(branch.answer):
                if n and ids[first + n : first + n + 1] != [token]:
                    break
                kind = "follow" if n or branch.kind == "reconstruct" else "point"
                flat.points.append((begin + n, (there[first + n],), kind))
    return flat


# The losses that tell the first head of a block where to look, and that block: a token of a question, where the context
# has the same one; the first token of an answer, where the context states it; further tokens, each in its turn.
POINTING = {"match": 0.2, "point": 0.7, "follow": 0.3}
HEADS = {"match": 1, "point": -2, "follow": -2}
FEW = 2  # a token that the context has more often says little
WEIGHTS = {"answer-home": 1.0, "answer-several": 1.0, "answer-short": 1.0, "answer": 1.5, "cloze": 0.5,
           "reconstruct": 1.0, "question": 0.2, "lm": 0.3, "lm-home": 0.3, **POINTING}


def pointing_loss(tapped: tuple[Tensor, Tensor], flats: list[Flat], kind: str) -> Tensor:
    """Sum over the points of a kind of -log of what one head's attention lays on the targets: a column that predicts
    a token which the context states has to look at where it stands, or at the slot that holds it.

    A guide for the heads that match and copy: an answer says which token comes next, and not where it was to be read.
    """
    loss = torch.zeros(())
    for flat, queries, keys in zip(flats, *(x.split([len(f.ids) for f in flats]) for x in tapped), strict=True):
        points = [(column, targets) for column, targets, k in flat.points if k == kind]
        if not points:
            continue
        column = torch.tensor([c for c, _ in points])
        scores = queries.index_select(0, column) @ keys.T * queries.shape[-1] ** -0.5
        begins = accumulate(flat.branches, initial=flat.context)
        begin = torch.tensor([0] * flat.context
                             + [b for b, n in zip(begins, flat.branches, strict=False) for _ in range(n)])
        every = torch.arange(len(flat.ids))
        hidden = (every > column[:, None]) | ((every >= flat.context) & (every < begin[column][:, None]))
        elsewhere = torch.ones(scores.shape, dtype=torch.bool)
        elsewhere[[n for n, (_, targets) in enumerate(points) for _ in targets],
                  [t for _, targets in points for t in targets]] = False
        loss = loss + (scores.masked_fill(hidden, -1e9).logsumexp(1)
                       - scores.masked_fill(elsewhere, -1e9).logsumexp(1)).sum()
    return loss


def naming_loss(model: Model, spans: list[tuple[list[int], float]], slots: Tensor) -> Tensor:
    """Sum over slots of the cross-entropy of a slot, read by the tied head, against the tokens of its piece of text.

    A scaffold for the first part of the joint stage: at 1x it asks a slot to look like its token's embedding, which
    the decoder can read already; without it, slots carry nothing for thousands of steps.
    """
    slot_of: list[int] = []
    token: list[int] = []
    weight: list[float] = []
    first = 0
    for ids, factor in spans:
        count = num_slots(len(ids), factor)
        for j in range(count):
            piece = ids[j * len(ids) // count : max(j * len(ids) // count + 1, (j + 1) * len(ids) // count)]
            slot_of += [first + j] * len(piece)
            token += piece
            weight += [1 / len(piece)] * len(piece)
        first += count
    log_p = F.log_softmax(F.linear(slots, model.embed), dim=-1)
    return -(log_p[torch.tensor(slot_of), torch.tensor(token)] * torch.tensor(weight)).sum()


@dataclass
class Outcome:
    """Sums of the loss by kind, counts, and per answer branch whether every token was right."""

    loss: Tensor
    sums: dict[str, float]
    counts: dict[str, int]
    exact: list[tuple[str, str, bool]]


def forward(model: Model, rows: list[Row], separator: list[int], naming: float = 0.0) -> Outcome:
    """Loss of these rows. With several processes, means are over the rows of all of them."""
    spans = [(ids, f) for row in rows for ids, f in row.parts if f is not None]
    slots, starts = encode_spans(model, spans) if spans else (torch.zeros(0, model.shape.hidden_size), [0])
    flats, begin = [], iter(starts)
    for row in rows:
        flats.append(lay_out(row, separator, {k: next(begin) for k, (_, f) in enumerate(row.parts) if f is not None}))
    flats = [f for f in flats if f.targets]
    kinds = sorted(WEIGHTS)
    kind_counts = Counter(t[2] for f in flats for t in (*f.targets, *f.points))
    counted = total(torch.tensor([float(kind_counts[k]) for k in kinds] + [float(len(slots))]))
    totals = dict(zip(kinds, map(int, counted.tolist()), strict=False))
    loss = torch.zeros(())
    if naming and len(slots):
        loss = loss + naming_loss(model, spans, slots) * (naming / float(counted[-1]))
    packing = Packing([(f.context, f.branches) for f in flats])
    targets = [(begin + t[0], *t[1:], n) for n, (f, begin) in enumerate(zip(flats, packing.begins, strict=False))
               for t in f.targets]
    where, labels = (torch.tensor([t[i] for t in targets]) for i in (0, 1))
    kind_of = torch.tensor([kinds.index(t[2]) for t in targets])
    ids, places, slot = (torch.tensor([x for f in flats for x in part(f)])
                         for part in (attrgetter("ids"), attrgetter("places"), attrgetter("slot")))
    tap: list[tuple[Tensor, Tensor]] = []
    logits = model.decode(ids, slots, slot, places, packing, where, tap)
    sums = dict.fromkeys(kinds, 0.0)
    for kind, block in HEADS.items():
        pointed = pointing_loss(tap[block], flats, kind)
        loss = loss + pointed * (WEIGHTS[kind] / max(1, totals[kind]))
        sums[kind] = float(pointed.detach())
    each = F.cross_entropy(logits, labels, reduction="none")
    weight = torch.tensor([WEIGHTS[k] / max(1, totals[k]) for k in kinds])[kind_of]
    loss = loss + (each * weight).sum()
    with torch.no_grad():
        for i, k in enumerate(kinds):
            if k not in POINTING:
                sums[k] = float(each[kind_of == i].sum())
        right = logits.argmax(-1) == labels
    flags: dict[tuple[int, int], bool] = {}
    for (_, _, kind, branch, n), ok in zip(targets, right.tolist(), strict=True):
        if kind.startswith(("answer", "reconstruct")):
            flags[(n, branch)] = flags.get((n, branch), True) and ok
    exact = [(flats[n].source, "", ok) for (n, _), ok in flags.items()]
    sums = dict(zip(kinds, total(torch.tensor([sums[k] for k in kinds])).tolist(), strict=True))
    return Outcome(loss, sums, totals, exact)


def draw_factor(rng: random.Random, source: str, progress: float, limit: float) -> float:
    """1x at first; the largest factor grows to 8x over two thirds of the curriculum and to the limit at its end."""
    if progress >= 1:
        table = FACTORS["fictional" if source == "fictional" else "english"]
        return min(limit, float(rng.choices(list(table), list(table.values()))[0]))
    top = 8 ** min(1.0, progress * 1.5)
    if progress > 2 / 3:
        top = min(limit, 8 * 2 ** (progress * 3 - 2))
    return float(top ** rng.betavariate(2.0, 1.2)) if top > 1 else 1.0


# Rows of one step by stage: one document as text, one as slots, several documents as text, as slots or as both.
MIX = {"text": ({"fictional": 1, "squad": 12, "wiki": 1}, {}, {"fictional": 1, "squad": 1}),
       "joint": ({"fictional": 1, "squad": 5}, {"fictional": 4, "squad": 4, "wiki": 1},
                 {"fictional": 2, "squad": 1}),
       "compressor": ({}, {"fictional": 5, "squad": 3, "wiki": 2}, {"fictional": 3, "squad": 1})}


def step_rows(corpus: Corpus, stage: str, rng: random.Random, progress: float, scale: float, vocab: int,
              max_factor: float, english: float, copies: int) -> list[Row]:
    """The rows of one step. `english` is the share of steps that take each of the English rows in; `copies` is how many
    random strings the text stage repeats."""
    ae = vocab + 1

    def drawn(mix: dict[str, int]) -> list[str]:
        return [source for source, n in mix.items() for _ in range(max(1, round(n * scale)))
                if source == "fictional" or rng.random() < english]

    def several(source: str) -> Row:
        factor = draw_factor(rng, source, progress, max_factor)
        as_text = 1.0 if stage == "text" else rng.choice((0.0, 0.0, 0.3, 1.0))
        short = source == "fictional" and rng.random() < 0.4
        size = rng.randint(2, 6) if short else rng.choice((2, 3, 3, 4)) if source == "fictional" else rng.choice((2, 3))
        return corpus.several_row(rng, source, [None if rng.random() < as_text else factor for _ in range(size)], short)

    text, slots, together = MIX[stage]
    rows = [corpus.single_row(rng, source, None, ae) for source in drawn(text)]
    rows += [corpus.single_row(rng, source, draw_factor(rng, source, progress, max_factor), ae)
             for source in drawn(slots)]
    if stage == "text" or progress > 0.15:
        rows += [several(source) for source in drawn(together)]
    if stage == "text":
        rows += [corpus.random_row(rng, None, ae, 24) for _ in range(max(1, round(copies * scale)))]
    elif progress < 0.5:
        rows += [corpus.random_row(rng, rng.uniform(1, 2), ae) for _ in range(max(1, round(2 * scale)))]
    return rows


def cost(row: Row) -> int:
    """About the number of tokens that a row sends through the blocks."""
    parts = sum(len(ids) if f is None else len(ids) + 2 * num_slots(len(ids), f) for ids, f in row.parts)
    return parts + sum(len(b.ids) for b in row.branches)


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


@torch.no_grad()
def evaluate(model: Model, corpus: Corpus, vocab: int, seed: int = 7) -> dict[str, float]:
    """Exact match of teacher-forced greedy answers (equal to greedy decoding) and reconstruction loss by factor."""
    result: dict[str, float] = {}

    def score(name: str, rows: list[Row]) -> None:
        out = forward(model, rows, corpus.separator)
        answers = [k for k in WEIGHTS if k.startswith("answer")]
        tokens = max(1, sum(out.counts[k] for k in answers))
        result[name + ".answer"] = round(sum(out.sums[k] for k in answers) / tokens, 4)
        only = [Row(r.prefix, r.parts, [b for b in r.branches if b.kind == "answer"], source=r.source) for r in rows]
        got = forward(model, only, corpus.separator).exact
        result[name + ".em"] = round(100 * sum(e[2] for e in got) / max(1, len(got)), 1)
        if out.counts["reconstruct"]:
            result[name + ".rec"] = round(out.sums["reconstruct"] / out.counts["reconstruct"], 4)

    for source in ("fictional", "squad"):
        for factor in (None, 1.0, 2.0, 4.0, 8.0, 16.0):
            name, rng = "text" if factor is None else f"{factor:g}x", random.Random(seed)
            score(f"{source}.{name}", [corpus.single_row(rng, source, factor, vocab + 1) for _ in range(24)])
            if source == "fictional" and factor in (None, 4.0, 8.0):
                score(f"several.{name}", [corpus.several_row(rng, source, [factor] * 3) for _ in range(16)])
    return result


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
    for name, value in asdict(Schedule()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=50)
    args = parser.parse_args()
    rank, world = start()
    schedule = Schedule(**{name: getattr(args, name) for name in asdict(Schedule())})
    args.out.mkdir(parents=True, exist_ok=True)
    shape = Shape()
    tokenizer_path = args.out / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(args.data, shape.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    corpus = Corpus(tokenizer, args.data, args.wiki_files)
    held_out = Corpus(tokenizer, args.data, 0, squad="dev")
    torch.manual_seed(args.seed)
    model = Model(shape)
    checkpoint = args.out / "checkpoint.safetensors"
    if not checkpoint.exists():
        model.embed.data.copy_(embeddings_from_counts(corpus.texts(random.Random(args.seed)), shape.vocab_size,
                                                      shape.hidden_size, EMBEDDING_NORM))
        set_positional_heads(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(p.numel() for p in model.compressor_parameters()):,} of them in the compressor", flush=True)
    start_stage, start_step = STAGES[0], 0
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
            rows = step_rows(corpus, stage, rng, schedule.progress(stage, step), args.scale,
                             shape.vocab_size, schedule.max_factor, args.english, 8 if step < COPYING else 2)
            scale = schedule.learning_rate(stage, step)
            for optimizer, rate in zip(optimizers, (schedule.muon_lr, schedule.adam_lr), strict=True):
                optimizer.param_groups[0]["lr"] = rate * scale
            mine = share(rows, [cost(r) for r in rows], rank, world)
            out = forward(model, mine, corpus.separator, naming=schedule.naming(stage, step))
            out.loss.backward()
            sum_gradients(model.parameters())
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            recent.append({k: out.sums[k] / out.counts[k] for k in out.sums if out.counts[k]})
            if (step + 1) % 10 == 0:
                mean = {k: round(sum(r.get(k, 0) for r in recent) / max(1, sum(k in r for r in recent)), 3)
                        for k in WEIGHTS}
                seconds = round((time.time() - began) / len(recent), 2)
                record(args.out, rank, {"stage": stage, "step": step + 1, "seconds_per_step": seconds, **mean})
                began, recent = time.time(), []
            if (step + 1) % args.evaluate_every == 0 or step + 1 == steps:
                record(args.out, rank, {"stage": stage, "step": step + 1,
                                  "evaluation": evaluate(model, held_out, shape.vocab_size)})
                began = time.time()
            if not rank and ((step + 1) % args.save_every == 0 or step + 1 == steps):
                done = step + 1 == steps
                following = STAGES[min(STAGES.index(stage) + 1, len(STAGES) - 1)]
                where = {"stage": following, "step": 0} if done and stage != "compressor" else {
                    "stage": stage, "step": step + 1}
                if done:
                    save(model, [], args.out / f"after-{stage}.safetensors", where)
                save(model, [] if done and stage != "compressor" else optimizers, checkpoint, where)


if __name__ == "__main__":
    main()
