"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.compressors.contract")

# Before transformers is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference numbers from the official implementations (see its README.md).

    CTXCOMP_GOLDEN names another folder of the same form, with other sizes and seeds.
    """
    return Path(os.environ.get("CTXCOMP_GOLDEN") or Path(__file__).parent / "golden")
