"""What compressors are called in the rows of `ctxcomp eval`."""

from __future__ import annotations

from ctxcomp_rag.cli_measure import short_names


def test_a_folder_goes_by_its_last_part() -> None:
    assert short_names(["icae", "runs/a/pcc"]) == {"icae": "icae", "pcc": "runs/a/pcc"}


def test_two_of_one_name_go_by_their_paths_and_none_is_lost() -> None:
    assert short_names(["a/pcc", "b/pcc", "a/pcc"]) == {"a/pcc": "a/pcc", "b/pcc": "b/pcc"}
