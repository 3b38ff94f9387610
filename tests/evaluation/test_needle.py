"""Haystacks hold the needle where they say, and readers are given what their names say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ctxcomp_rag.decoding.splice import lay_out
from ctxcomp_rag.errors import InputError
from ctxcomp_rag.evaluation.needle import READERS, NeedleTest, haystack
from tests.tiny_models import MAX_POSITIONS, tiny_backbone

BACKBONE = tiny_backbone("llama")
BY_NAME = {r.name: r for r in READERS}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_lies_at_its_depth_among_other_documents_of_the_length_asked_for(depth: float) -> None:
    hay = haystack(BACKBONE, 3000, depth, seed=4)
    others = len(hay.texts) - 1
    assert others >= 4
    assert [hay.answer in t for t in hay.texts].index(True) == round(depth * others)
    length = len(BACKBONE.tokenizer.encode("\n\n".join(hay.texts)))
    assert 2400 < length <= 3000
    # the depth moves the needle and changes nothing else
    assert sorted(hay.texts) == sorted(haystack(BACKBONE, 3000, 0.25, seed=4).texts)
    assert hay != haystack(BACKBONE, 3000, depth, seed=5)


def test_a_full_cache_has_no_figure_where_it_does_not_fit_and_every_other_reader_has_one() -> None:
    hay = haystack(BACKBONE, 2 * MAX_POSITIONS, 0.5, seed=1)
    found = {r.name: NeedleTest(BACKBONE, r, 256).found(hay) for r in READERS}
    assert found.pop("full_cache") is None
    assert found == dict.fromkeys(found, 0.0)  # a random decoder knows nothing


def test_a_cut_prompt_keeps_both_ends_and_leaves_room_for_the_answer() -> None:
    hay = haystack(BACKBONE, 1000, 0.5, seed=1)
    prompt = NeedleTest(BACKBONE, BY_NAME["truncation"], 200).prompt(hay)
    ids = BACKBONE.tokenizer.encode("\n\n".join(hay.texts))
    layout = lay_out(prompt, BACKBONE)
    assert layout.num_positions + 24 == 200
    [piece] = layout.pieces
    spelled = BACKBONE.tokenizer.decode(piece.ids)  # type: ignore[union-attr]
    assert BACKBONE.tokenizer.decode(ids[:20]) in spelled
    assert BACKBONE.tokenizer.decode(ids[-20:]) in spelled
    with pytest.raises(InputError, match=r"a cache of 40 entries has no room for context.*expected at least"):
        NeedleTest(BACKBONE, BY_NAME["truncation"], 40).prompt(hay)


def test_a_heat_map_has_a_panel_for_each_reader_and_the_same_figures_draw_the_same_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import needle

    rows = [{"reader": name, "tokens": n, "depth": d, "found": None if name == "full_cache" else 50.0}
            for name in ("full_cache", "snapkv") for n in (576, 1152) for d in (0.0, 1.0)]
    for name in ("a.svg", "b.svg"):
        needle.draw(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").count("<!-- full_cache -->") == 1
    sys.modules.pop("needle")
