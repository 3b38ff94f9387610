"""Flipped bits in every kind of file are found or harmless. `make kill-tests` flips a thousand."""

from __future__ import annotations

from pathlib import Path

from tests.index.flips import files_by_kind, flip_bits, make_index_of_every_file_kind


def test_no_flipped_bit_in_any_file_gives_a_wrong_span(path: Path) -> None:
    make_index_of_every_file_kind(path)
    kinds = files_by_kind(path)
    assert set(kinds) == {"CURRENT.json", "delimiters.safetensors", "faiss", "index.json", "writer.lock",
                          "_deletions/*.arrow", "_transactions/*.txn", "_versions/*.json", "_versions/*.manifest",
                          "data/*.blob", "data/*.lance"}
    report = flip_bits(path, 4 * len(kinds), seed=5)
    assert report.complaints == []
    assert report.flips == 4 * len(kinds)
    assert report.outcomes["data/*.blob"] == {"named": 4}
