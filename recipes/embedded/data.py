"""The training mix: fictional knowledge base, SQuAD train and Wikipedia windows, in the layouts the product uses.

A training *row* is a context of parts (text, or a slot span of some document, in any order) followed by
*branches* that see the context and themselves but not each other: questions with answers, or a reconstruction.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from cloze import SENTENCE_GAP, cloze_questions
from tokenizers import Tokenizer

from ctxcomp_rag.evaluation.fictional import (
    KINDS,
    NOT_STATED,
    FictionalDocument,
    QuestionAnswer,
    Split,
    generate_document,
)

MAX_CHUNK = 112
PARAGRAPH = 224  # as text, contexts may be longer: the more questions share one, the more of them a second serves
UNRELATED = 0.03  # SQuAD rows that are also asked what they do not answer; 0.1 drew refusals to 24 % of dev questions
RECALLED = {"squad": 2, "wiki": 4, "fictional": 1}  # by source, how often a text in slots is to be gone on with
MIN_RECALLED, MAX_RECALLED = 20, 24  # tokens: of a text, of what is said of it
MISHEARD = 0.15  # share of a reconstruction's own past that is wrong: its place is to say what comes next
ALIKE = 0.5  # share of several documents of one kind whose subjects have names alike, as those of retrieved ones have
DRAWN = 40  # documents, of which the one is taken whose subject is most alike
MAX_RECONSTRUCTED = 6.0  # beyond this factor slots are to hold what is asked for, and cannot hold every word
BOS, EOS = "<|bos|>", "<|end|>"
SPECIALS = ("<|pad|>", BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>")

# (text before the context, text between context and question, weight): the layouts of our own pipeline,
# of LangChain's stuff chain and of LlamaIndex's default question-answer template.
_LLAMA_INDEX = ("<|bos|><|user|>Context information is below.\n---------------------\n",
                "\n---------------------\nGiven the context information and not prior knowledge, "
                "answer the query.\nQuery: {q}\nAnswer: <|end|><|assistant|>")
_LANGCHAIN = ("<|bos|><|system|>Use the following context to answer the question.\n\n",
              "<|end|><|user|>{q}<|end|><|assistant|>")
NATIVE = ("<|bos|><|user|>", "\n\nQuestion: {q}<|end|><|assistant|>")
_BARE = ("", NATIVE[1])
LAYOUTS = ((NATIVE, 0.72), (_BARE, 0.18), (_LANGCHAIN, 0.07), (_LLAMA_INDEX, 0.03))


@dataclass
class Branch:
    """Ids after the context; `kind` names the loss from `answer_start` on: "answer", "cloze", "recall" or
    "reconstruct"."""

    ids: list[int]
    answer_start: int
    kind: str
    stands: tuple[int, int] | None = None  # the part, and its token, at which the context states the answer
    name: tuple[int, int] | None = None  # first and last token of the name of what it asks about
    heard: list[int] | None = None  # what is read in the place of `ids`, where that is something else

    @property
    def answer(self) -> list[int]:
        return self.ids[self.answer_start : -1]


@dataclass
class Row:
    prefix: list[int]
    parts: list[tuple[list[int], float | None]]  # (source ids, compression factor; None = as text)
    branches: list[Branch] = field(default_factory=list)
    language_model: bool = False  # whether the next token of the text parts is asked for
    source: str = ""
    names: list[list[tuple[int, int]]] = field(default_factory=list)  # by part: wherever it says what it is about

    def find_answers(self) -> None:
        """Where each answer stands, if it stands in one place only."""
        for branch in self.branches:
            if branch.kind != "reconstruct" and branch.stands is None:
                found = [(k, i) for k, (ids, _) in enumerate(self.parts) for i in occurrences(branch.answer, ids)]
                branch.stands = found[0] if len(found) == 1 else None


def occurrences(sought: list[int], ids: list[int]) -> list[int]:
    return [i for i, token in enumerate(ids) if token == sought[0] and ids[i : i + len(sought)] == sought]


@dataclass
class Passage:
    """A tokenised paragraph with the tokens' character ranges, sentence starts and question-answer pairs."""

    ids: list[int]
    starts: list[int]
    ends: list[int]
    sentences: list[int]  # token indices where a sentence begins
    questions: list[tuple[str, str, int, int]]  # question, answer, first and last token of the answer
    article: int


def read_lines(path: Path) -> list[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_squad(path: Path) -> list[dict]:  # type: ignore[type-arg]
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["data"]  # type: ignore[no-any-return]


def _token_sentences(text: str, starts: list[int]) -> list[int]:
    begins = [0] + [bisect_left(starts, m.end()) for m in SENTENCE_GAP.finditer(text)]
    # a byte-level token carries its leading space, so a sentence begins one token earlier than its first letter
    return sorted({max(0, b - 1) if b and b <= len(starts) else 0 for b in begins})


def shortened(document: FictionalDocument, facts: int) -> FictionalDocument:
    """The document's beginning, to the end of the sentence of its n-th fact; the other facts become unanswerable."""
    ends = [m.end() for m in re.finditer(r"\.(?= [A-Z]|$)", document.text)]
    last = document.questions[min(facts, len(document.questions)) - 1].answer
    stop = next(e for e in ends if e >= document.text.index(last) + len(last))
    kept = tuple(q for q in document.questions if q.answer in document.text[:stop])
    lost = tuple(replace(q, answer=NOT_STATED) for q in document.questions if q not in kept)
    return replace(document, text=document.text[:stop], questions=kept, unanswerable=document.unanswerable + lost)


def likeness(name: str, other: str) -> float:
    """Share of two names' pairs of neighbouring letters that both have."""
    pairs = [{f"{a}{b}" for word in n.lower().split() for a, b in pairwise(f" {word} ")} for n in (name, other)]
    return len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])


class Corpus:
    """All sources, tokenised; `row(...)` draws one training row."""

    def __init__(self, tokenizer: Tokenizer, data: Path, wiki_files: int = 1, squad: str = "train") -> None:
        self.split: Split = "train" if squad == "train" else "held_out"
        self.tokenizer = tokenizer
        self.squad: list[Passage] = []
        for article, entry in enumerate(read_squad(data / f"squad-{squad}-v1.1.json.xz")):
            contexts = [p["context"] for p in entry["paragraphs"]]
            encoded = tokenizer.encode_batch(contexts, add_special_tokens=False)
            for paragraph, enc in zip(entry["paragraphs"], encoded, strict=True):
                self.squad.append(self._passage(paragraph, enc, article))
        self.by_article: dict[int, list[int]] = {}
        for i, p in enumerate(self.squad):
            self.by_article.setdefault(p.article, []).append(i)
        self.answerable = [i for i, p in enumerate(self.squad) if p.questions]
        self.wiki: list[list[int]] = []
        for i in range(wiki_files):
            texts = [r["text"][:20000] for r in read_lines(data / f"wiki-{i:02d}.jsonl.xz")]
            self.wiki += [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False) if len(e.ids) > 40]
        self.layouts = [((self.ids(a), b), w) for (a, b), w in LAYOUTS]
        self.eos = tokenizer.token_to_id(EOS)
        self.full_stops = {i for token, i in tokenizer.get_vocab().items() if token[-1:] in ".?!"}
        self.separator = self.ids("\n\n")
        self.not_stated = self.answer_ids(NOT_STATED)

    def texts(self, rng: random.Random, documents: int = 20000) -> list[list[int]]:
        """All texts once, with as many generated documents, to count in."""
        generated = [generate_document(rng, self.split).text for _ in range(documents)]
        asked = [question for p in self.squad for question, *_ in p.questions]
        encoded = self.tokenizer.encode_batch(generated + asked, add_special_tokens=False)
        return [p.ids for p in self.squad] + self.wiki + [e.ids for e in encoded]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def answer_ids(self, answer: str) -> list[int]:
        """Answers begin with a space, so that their tokens are those of the text they are copied from."""
        return self.ids(" " + answer)

    def _passage(self, paragraph: dict, enc, article: int) -> Passage:  # type: ignore[type-arg,no-untyped-def]
        text = paragraph["context"]
        starts, ends = [o[0] for o in enc.offsets], [o[1] for o in enc.offsets]
        questions = []
        for qa in paragraph["qas"]:
            answer = qa["answers"][0]
            begin = answer["answer_start"]
            first = bisect_right(starts, begin) - 1
            last = bisect_left(ends, begin + len(answer["text"]))
            if first < 0 or last >= len(enc.ids) or text[begin : begin + len(answer["text"])] != answer["text"]:
                continue
            questions.append((qa["question"].strip(), answer["text"], first, last))
        return Passage(enc.ids, starts, ends, _token_sentences(text, starts), questions, article)

    def cloze_branches(self, rng: random.Random, ids: list[int], count: int, middle: str) -> list[Branch]:
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return [replace(self.question(self.ids(middle.replace("{q}", question)), self.answer_ids(answer)), kind="cloze")
                for question, answer in cloze_questions(rng, text, count)]

    def recall_branches(self, rng: random.Random, ids: list[int], count: int, middle: str) -> list[Branch]:
        """A few tokens of the context asked for as a question, and how its sentence goes on as the answer.

        Unlike a reconstruction's, its position says nothing about which token comes next: what was said last does.
        """
        before, after = map(self.ids, middle.split("{q}"))
        branches = []
        for _ in range(count if len(ids) > MIN_RECALLED else 0):
            cue = rng.randint(3, 6)
            first = rng.randrange(cue, len(ids) - 8)
            asked = [*before, *ids[first - cue : first], *after]
            told = ids[first : first + MAX_RECALLED]
            stop = next((n for n, token in enumerate(told) if n and token in self.full_stops), None)
            told = told if stop is None else [*told[:stop], self.eos]
            branches.append(Branch([*asked, *told], len(asked), "recall", stands=(0, first)))
        return branches

    # -- documents -------------------------------------------------------------------------------------------------

    def fitting(self, draw: Callable[[], FictionalDocument]) -> tuple[list[int], FictionalDocument]:
        """The first document drawn that fits a chunk, and its tokens."""
        while True:
            document = draw()
            ids = self.ids(document.text)
            if len(ids) <= MAX_CHUNK:
                return ids, document

    def fictional(self, rng: random.Random, kind: str | None = None) -> tuple[list[int], FictionalDocument]:
        return self.fitting(lambda: generate_document(rng, self.split, kind=kind))

    def mentions(self, text: str, name: str) -> list[tuple[int, int]]:
        """First and last token of a name, wherever the text has it."""
        offsets = self.tokenizer.encode(text, add_special_tokens=False).offsets
        inside = [[i for i, (a, b) in enumerate(offsets) if b > found.start() and a < found.end()]
                  for found in re.finditer(re.escape(name), text)]
        return [(tokens[0], tokens[-1]) for tokens in inside]

    def beginning_with(self, rng: random.Random, fact: str) -> FictionalDocument:
        """A document that states this fact first."""
        while True:
            document = self.fictional(rng, fact.partition(".")[0])[1]
            if document.questions[0].fact == fact:
                return document

    def fictional_like(self, rng: random.Random, other: FictionalDocument) -> FictionalDocument:
        """A document of the same kind, whose subject has a name like the other's."""
        def draw() -> FictionalDocument:
            drawn = [generate_document(rng, self.split, kind=other.kind) for _ in range(DRAWN)]
            return max((d for d in drawn if d.subject != other.subject),
                       key=lambda d: likeness(d.subject, other.subject))

        return self.fitting(draw)[1]

    def fictional_branches(self, rng: random.Random, document: FictionalDocument, count: int,
                           middle: str) -> list[Branch]:
        chosen = [(document.subject, q) for q in rng.sample(document.questions, min(count, len(document.questions)))]
        if document.unanswerable and rng.random() < 0.5:
            chosen[-1] = document.subject, rng.choice(document.unanswerable)
        if rng.random() < 0.15:
            chosen[-1] = self.absent(rng, document.kind)
        return [self.about(*c, middle) for c in chosen]

    def telling_apart(self, rng: random.Random, documents: list[FictionalDocument], middle: str) -> list[Branch]:
        """Up to three questions about each document, first about facts that another document states too; sometimes
        one without an answer: about such a fact where it is not stated, or about a document that is not there."""
        stated = Counter(q.fact for d in documents for q in d.questions)
        asked = []
        for d in documents:
            order = sorted(d.questions, key=lambda q: (stated[q.fact] == 1) + rng.random() * 0.9)
            count = rng.choice((1, 2)) if len(documents) > 4 else rng.choice((2, 3))
            asked += [(d.subject, q) for q in order[:count]]
        if rng.random() < 0.3:
            missing = [(d.subject, q) for d in documents for q in d.unanswerable]
            asked.append(rng.choice([(s, q) for s, q in missing if stated[q.fact]] or missing))
        if rng.random() < 0.15:
            asked.append(self.absent(rng, documents[0].kind))
        return [self.about(*c, middle) for c in asked]

    def absent(self, rng: random.Random, kind: str) -> tuple[str, QuestionAnswer]:
        """A subject that no document is about, and a question about it."""
        document = self.fictional(rng, kind)[1]
        return document.subject, replace(rng.choice(document.questions), answer=NOT_STATED)

    def about(self, subject: str, asked: QuestionAnswer, middle: str) -> Branch:
        before = middle.replace("{q}", asked.question)
        branch = self.question(self.ids(before), self.answer_ids(asked.answer))
        return replace(branch, name=self.mentions(before, subject)[0])

    def question(self, before: list[int], answer: list[int]) -> Branch:
        return Branch([*before, *answer, self.eos], len(before), "answer")

    def squad_window(self, rng: random.Random, passage: Passage,
                     longest: int = MAX_CHUNK) -> tuple[list[int], list[tuple[str, str, int]]]:
        """A window of at most `longest` tokens, begun at a sentence; the questions it answers, and at which token."""
        length = rng.choice((longest, longest, rng.randint(40, longest)))
        _, _, first, last = rng.choice(passage.questions)
        begins = [s for s in passage.sentences if s <= first and last < s + length] or [max(0, last + 1 - length)]
        begin = rng.choice(begins) if length < len(passage.ids) else 0
        end = min(begin + length, len(passage.ids))
        stops = [s for s in passage.sentences if last < s <= end]
        if end < len(passage.ids) and stops:
            end = stops[-1]
        pairs = [(q, a, f - begin) for q, a, f, z in passage.questions if begin <= f and z < end]
        return passage.ids[begin:end], pairs

    def wiki_window(self, rng: random.Random) -> list[int]:
        article = rng.choice(self.wiki)
        length = rng.randint(24, MAX_CHUNK)
        begin = rng.randrange(max(1, len(article) - length))
        return article[begin : begin + length]

    # -- rows ------------------------------------------------------------------------------------------------------

    def layout(self, rng: random.Random) -> tuple[list[int], str]:
        return rng.choices([x for x, _ in self.layouts], [w for _, w in self.layouts])[0]

    def reconstruction(self, rng: random.Random, ids: list[int], autoencode_id: int) -> Branch:
        """The whole text, some of its own past misheard."""
        heard = [self.random_token(rng) if rng.random() < MISHEARD else token for token in ids]
        return Branch([autoencode_id, *ids, self.eos], 1, "reconstruct", stands=(0, 0),
                      heard=[autoencode_id, *heard, self.eos])

    def random_token(self, rng: random.Random) -> int:
        return rng.randrange(len(SPECIALS), self.tokenizer.get_vocab_size())

    def random_row(self, rng: random.Random, factor: float | None, autoencode_id: int, longest: int = 64) -> Row:
        """Random tokens to repeat: nothing but the context can tell what they were."""
        ids = [self.random_token(rng) for _ in range(rng.randint(8, longest))]
        return Row([], [(ids, factor)], [self.reconstruction(rng, ids, autoencode_id)], source="random")

    def single_row(self, rng: random.Random, source: str, factor: float | None, autoencode_id: int,
                   drilled: float = 1.0) -> Row:
        """One document: questions, and with slots its reconstruction.

        Of SQuAD's rows this share (`drilled`) has what is asked of any text, too: gaps, recall, reconstruction.
        """
        prefix, middle = self.layout(rng)
        row = Row(prefix, [], source=source)
        if not factor:
            row.language_model = source == "fictional" or rng.random() < 0.5
        if source == "fictional":
            ids, document = self.fictional(rng)
            row.branches = self.fictional_branches(rng, document, 6, middle)
        elif source == "squad":
            passage = self.squad[rng.choice(self.answerable)]
            longest = MAX_CHUNK if factor else rng.choice((MAX_CHUNK, PARAGRAPH, PARAGRAPH))
            ids, pairs = self.squad_window(rng, passage, longest)
            row.branches = self.squad_branches(rng, pairs, 8, middle)
            if rng.random() < UNRELATED:
                row.branches.append(self.unrelated_question(rng, passage.article, middle))
        else:
            ids = self.wiki_window(rng)
        if source == "wiki" or (source == "squad" and rng.random() < 0.3 * drilled):
            row.branches += self.cloze_branches(rng, ids, 1 if row.branches else 4, middle)
        row.parts = [(ids, factor)]
        if (factor is None or factor <= MAX_RECONSTRUCTED) and (source != "squad" or rng.random() < drilled):
            row.branches += self.recall_branches(rng, ids, RECALLED[source] if factor else 1, middle)
        if factor and factor <= MAX_RECONSTRUCTED and (source != "squad" or rng.random() < drilled):
            row.branches.append(self.reconstruction(rng, ids, autoencode_id))
        row.find_answers()
        return row

    def squad_branches(self, rng: random.Random, pairs: list[tuple[str, str, int]], count: int,
                       middle: str) -> list[Branch]:
        chosen = rng.sample(pairs, min(count, len(pairs)))
        return [replace(self.question(self.ids(middle.replace("{q}", q)), self.answer_ids(a)), stands=(0, first))
                for q, a, first in chosen]

    def unrelated_question(self, rng: random.Random, article: int, middle: str) -> Branch:
        other = rng.choice(self.answerable)
        while self.squad[other].article == article:
            other = rng.choice(self.answerable)
        asked = rng.choice(self.squad[other].questions)[0]
        return self.question(self.ids(middle.replace("{q}", asked)), self.not_stated)

    def several_row(self, rng: random.Random, source: str, factors: list[float | None], short: bool = False) -> Row:
        """Several documents in any order, each as text or as slots; questions about all (SQuAD: about one) of them.

        Fictional documents are most often of one kind, as retrieved ones are: only the subject tells them apart, and
        half of these have names alike. With `short` they keep one to three facts, the same one first, so that nothing
        but the name tells which is asked for, and name and value stand close.
        """
        prefix, middle = self.layout(rng)
        row = Row(prefix, [], source=source + ("-short" if short else "-several"))
        if source == "fictional":
            kind = rng.choice(KINDS) if rng.random() < 0.75 else None
            if short:
                fact = self.fictional(rng)[1].questions[0].fact
                documents = [shortened(self.beginning_with(rng, fact), rng.choice((1, 1, 2, 3))) for _ in factors]
            else:
                documents = [self.fictional(rng, kind)[1]]
                alike = kind is not None and rng.random() < ALIKE
                documents += [self.fictional_like(rng, documents[0]) if alike else self.fictional(rng, kind)[1]
                              for _ in factors[1:]]
            contents = [self.ids(d.text) for d in documents]
            row.names = [self.mentions(d.text, d.subject) for d in documents]
            row.branches = self.telling_apart(rng, documents, middle)
        else:
            target = rng.choice(self.answerable)
            ids, pairs = self.squad_window(rng, self.squad[target])
            contents = [ids]
            siblings = self.by_article[self.squad[target].article]
            while len(contents) < len(factors):
                other = self.squad[rng.choice(siblings) if rng.random() < 0.5 else rng.randrange(len(self.squad))]
                if other is not self.squad[target] or len(siblings) == 1:
                    begin = rng.choice(other.sentences)
                    contents.append(other.ids[begin : begin + rng.randint(40, MAX_CHUNK)])
            row.branches = [replace(b, stands=None) for b in self.squad_branches(rng, pairs, 4, middle)]
        order = list(range(len(contents)))
        rng.shuffle(order)
        row.parts = [(contents[i], factor) for i, factor in zip(order, factors, strict=True)]
        row.names = [row.names[i] for i in order] if row.names else []
        row.find_answers()
        return row
