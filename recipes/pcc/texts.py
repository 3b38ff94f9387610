"""Texts and questions for the PCC recipe: the fictional knowledge base and SQuAD train."""

from __future__ import annotations

import json
import lzma
from itertools import islice
from pathlib import Path

from ctxcomp_rag.chunking import Document, split_document
from ctxcomp_rag.evaluation.fictional import generate_corpus, training_questions
from ctxcomp_rag.tokenization import TextTokenizer
from ctxcomp_rag.training import Example


def fictional(count: int, seed: int) -> tuple[list[str], list[Example]]:
    """(texts, questions about them) of the training split."""
    documents = generate_corpus(count, seed, "train")
    return ([d.text for d in documents],
            [_question(text, q.question, q.answer) for text, q in training_questions(documents)])


def squad(path: Path, tokenizer: TextTokenizer, max_tokens: int, count: int) -> tuple[list[str], list[Example]]:
    """(the first `count` paragraphs, questions about the piece of a paragraph that holds the answer)."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    texts, asked = [], []
    for paragraph in islice((p for article in articles for p in article["paragraphs"]), count):
        text = paragraph["context"]
        texts.append(text)
        pieces = [c.text for c in split_document(Document(str(len(texts)), text), tokenizer, max_tokens=max_tokens)]
        for entry in paragraph["qas"]:
            answer = entry["answers"][0]["text"]
            piece = next((p for p in pieces if answer in p), None)
            if piece is not None:
                asked.append(_question(piece, entry["question"].strip(), answer))
    return texts, asked


def _question(context: str, question: str, answer: str) -> Example:
    # the decoder begins its answers with a space, so that their tokens are those of the text they are copied from
    return Example(context, question=question, answer=f" {answer}")
