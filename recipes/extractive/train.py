"""Train a small extractor in the form of LLMLingua-2: a token classifier that says which words of a text to keep.

    PYTHONPATH=. python recipes/extractive/train.py --data DATA --out runs/extractor
    ctxcomp eval --task squad --data DATA --llmlingua runs/extractor/bert-base-multilingual-cased-squad

A peer to measure against where the published classifiers cannot be had. Theirs learn from texts that GPT-4 shortened
(Pan et al., ACL 2024, section 3); this one learns which words people asked about: those of the answers, and those that
questions share with the text unless they are among the commonest. It is trained from scratch on SQuAD train and on
generated documents, DATA/squad-train-v1.1.json.xz and `ctxcomp_rag.evaluation.fictional`. The command is resumable.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertTokenizerFast,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from ctxcomp_rag.evaluation.fictional import generate_corpus
from ctxcomp_rag.records import read_json

NAME = "bert-base-multilingual-cased-squad"  # the package tells by the first part how words begin
WORD = re.compile(r"\w+")
COMMON = 200  # so many of the commonest words say nothing about what is asked
MAX_TOKENS = 256

Asked = tuple[str, list[tuple[str, str]]]  # a text, and questions about it with their answers


def squad(path: Path) -> list[Asked]:
    """Every paragraph with its questions."""
    return [(p["context"], [(q["question"], q["answers"][0]["text"]) for q in p["qas"]])
            for article in read_json(path)["data"] for p in article["paragraphs"]]


def fictional(count: int, seed: int) -> list[Asked]:
    """Generated documents of the training split with their questions."""
    return [(d.text, [(q.question, q.answer) for q in d.questions]) for d in generate_corpus(count, seed, "train")]


def commonest(texts: Iterable[str]) -> set[str]:
    """The words, in lower case, that stand most often in these texts."""
    return {word for word, _ in Counter(w.lower() for t in texts for w in WORD.findall(t)).most_common(COMMON)}


def kept_ranges(asked: Asked, common: set[str]) -> list[tuple[int, int]]:
    """Character ranges of a text that matter: its answers, and words that a question has too."""
    text, questions = asked
    shared = {w.lower() for question, _ in questions for w in WORD.findall(question)} - common
    answers = {answer for _, answer in questions if answer}
    return [found.span() for found in chain(
        (w for w in WORD.finditer(text) if w[0].lower() in shared),
        (w for answer in sorted(answers) for w in re.finditer(re.escape(answer), text)))]


def labels(offsets: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> list[int]:
    """By token 1 where it is to be kept, 0 where not, -100 where it is none of the text's."""
    return [-100 if begin == end else int(any(begin < last and first < end for first, last in ranges))
            for begin, end in offsets]


def make_examples(asked: list[Asked], tokenizer: BertTokenizerFast, common: set[str]) -> list[dict[str, list[int]]]:
    """Ids and labels of every text, cut at `MAX_TOKENS`."""
    encoded = tokenizer([text for text, _ in asked], truncation=True, max_length=MAX_TOKENS,
                        return_offsets_mapping=True)
    return [{"input_ids": ids, "labels": labels(offsets, kept_ranges(one, common))}
            for one, ids, offsets in zip(asked, encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def make_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int) -> BertTokenizerFast:
    """WordPiece that keeps upper and lower case; that of the folder, if it has one, since checkpoints depend on it."""
    vocabulary = folder / "vocab.txt"
    if not vocabulary.exists():
        learned = BertWordPieceTokenizer(lowercase=False)
        learned.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        folder.mkdir(parents=True, exist_ok=True)
        learned.save_model(str(folder))
    return BertTokenizerFast(vocab=str(vocabulary), do_lower_case=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6000, help="generated documents")
    parser.add_argument("--data", type=Path, required=True, help="folder with squad-train-v1.1.json.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and, at the end, the extractor")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    asked = squad(args.data / "squad-train-v1.1.json.xz") + fictional(args.documents, args.seed)
    texts = [text for text, _ in asked]
    extractor = args.out / NAME
    tokenizer = make_tokenizer(texts, extractor, args.vocab_size)
    torch.manual_seed(args.seed)
    model = BertForTokenClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden_size // 64), intermediate_size=4 * args.hidden_size, num_labels=2))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(asked):,} texts", flush=True)
    trainer = Trainer(
        model,
        TrainingArguments(str(args.out), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
                          learning_rate=args.rate, warmup_steps=min(60, args.steps // 10),
                          lr_scheduler_type="cosine", weight_decay=0.01, logging_steps=20, save_steps=100,
                          save_total_limit=1, seed=args.seed, report_to=[]),
        train_dataset=make_examples(asked, tokenizer, commonest(texts)),
        data_collator=DataCollatorForTokenClassification(tokenizer))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.out)))
    trainer.save_model(str(extractor))
    tokenizer.save_pretrained(extractor)
    print(f"written to {extractor}")


if __name__ == "__main__":
    main()
