"""Documents and questions as training examples: from files, folders and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ctxcomp_rag.chunking import Chunk, Document
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.readers import read_documents
from ctxcomp_rag.records import field, open_dataset, read_json, read_lines, readable_dataset
from ctxcomp_rag.tokenization import TextTokenizer
from ctxcomp_rag.training.config import DataConfig
from ctxcomp_rag.training.examples import Example, passages, pieces_of, text_digest


def load_examples(config: DataConfig, tokenizer: TextTokenizer, max_tokens: int) -> tuple[list[Example], int]:
    """(the examples of a data set, how many of its texts or questions gave none); in the order of the file.

    Contexts have at most `max_tokens` tokens. Texts become passages, each with the one that follows, if one does; a
    text without characters is left out. Of a context with a question that is too long, the piece that holds the answer
    is kept; a question whose answer stands in no piece is left out.

    Raises:
        InputError: the data cannot be read, a field is missing or empty, or nothing is left; names the record.
    """
    limit = min(max_tokens, config.context_tokens or max_tokens)
    examples: list[Example] = []
    left_out = 0
    if config.kind == "texts":
        texts = list(islice(_texts(config), config.limit))
        examples, left_out = passages(texts, tokenizer, limit), sum(not text.strip() for text in texts)
    else:
        asked = _squad(_path(config)) if config.kind == "squad" else _questions(config)
        for example in _with_answers(asked, tokenizer, limit):
            if example is None:
                left_out += 1
                continue
            examples.append(example)
            if len(examples) == config.limit:
                break
    if not examples:
        raise InputError(f"the data in {config.source!r} gives no example of at most {limit} tokens; expected "
                         + ("texts that are not empty" if config.kind == "texts" else
                            "answers that stand in their contexts"))
    return examples, left_out


def _texts(config: DataConfig) -> Iterator[str]:
    column = config.columns.get("text", "text")
    if config.id is None:
        yield from (d.text for d in read_documents([_path(config)], text_column=column))
        return
    for place, record in _hub(config):
        yield _text(record, column, place)


def _questions(config: DataConfig) -> Iterator[tuple[str, str, str, str]]:
    """(place, context, question, answer) of JSON lines or of a data set."""
    names = {n: config.columns.get(n, n) for n in ("context", "question", "answer")}
    records = _hub(config) if config.id is not None else read_lines(_path(config))
    for place, record in records:
        answer: Any = record.get(names["answer"], record.get("answers"))
        if isinstance(answer, Mapping):  # {"text": [...]}, as SQuAD has it on the hub
            answer = answer.get("text")
        if isinstance(answer, list):
            answer = answer[0] if answer else ""
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(f"{place}: expected a non-empty answer in {names['answer']!r} or 'answers', got "
                             f"{answer!r}; leave unanswerable questions out, or give them the answer that you want")
        yield place, _text(record, names["context"], place), _text(record, names["question"], place), answer


def _squad(path: Path) -> Iterator[tuple[str, str, str, str]]:
    content = read_json(path)
    if not isinstance(content, dict) or "data" not in content:
        raise InputError(f"{str(path)!r} is not SQuAD: expected an object with 'data', a list of articles with "
                         "'paragraphs'; for JSON lines use kind: questions")
    for article_place, article in _objects(content, "data", path.name, "article"):
        for place, paragraph in _objects(article, "paragraphs", article_place, "paragraph"):
            for question_place, asked in _objects(paragraph, "qas", place, "question") if "qas" in paragraph else ():
                if asked.get("answers"):  # the unanswerable ones of version 2 have none
                    answer_place, answer = next(_objects(asked, "answers", question_place, "answer"))
                    yield (place, _text(paragraph, "context", place), _text(asked, "question", question_place),
                           _text(answer, "text", answer_place))


def _objects(record: dict[str, Any], name: str, place: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a list of objects; raises InputError for anything else."""
    for number, item in enumerate(field(record, name, list, place)):
        if not isinstance(item, dict):
            raise InputError(f"{place}, {what} {number}: expected an object, got {type(item).__name__}")
        yield f"{place}, {what} {number}", item


def _with_answers(asked: Iterable[tuple[str, str, str, str]], tokenizer: TextTokenizer,
                  limit: int) -> Iterator[Example | None]:
    """None for a question whose answer stands in no piece of its context."""
    whole, digest = "", ""
    pieces: list[Chunk] = []
    for place, context, question, answer in asked:
        if whole != context:
            whole, digest, pieces = context, text_digest(context), pieces_of(Document(place, context), tokenizer, limit)
        holding = pieces if len(pieces) == 1 else [p for p in pieces if answer in p.text]
        # the space keeps the tokens of the answer those of the text that it is copied from
        yield Example(holding[0].text, question=question.strip(), answer=f" {answer.strip()}",
                      cut_from=(digest, holding[0].start)) if holding else None


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if name not in record:
        raise InputError(f"{place}: expected a field {name!r}, found {', '.join(map(repr, record)) or 'none'}; "
                         "`columns` in the configuration says what the fields are called")
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: expected text in {name!r}, got {value!r}")
    return value


def _path(config: DataConfig) -> Path:
    path = Path(config.path or "")
    if not path.exists():
        raise InputError(f"there is no file or folder {config.path!r}; `path` is read from where you are")
    return path


def _hub(config: DataConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    assert config.id is not None
    records = open_dataset(config.id, config.subset, config.split, "give a path")
    with readable_dataset(config.id, "give a path"):
        yield from ((f"{config.id} record {i}", record) for i, record in enumerate(records))
