"""`PYTHON -m peer_drivers NAME`: the peer's end of the protocol."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from .icae import OfficialICAE
from .llama_cpp import LlamaCpp
from .online import KVPress, LLMLingua2
from .openvino import OpenVINO
from .pcc import OfficialPCC
from .peer import Peer
from .vllm import VLLM

PEERS: dict[str, type[Peer]] = {"kvpress": KVPress, "llmlingua": LLMLingua2, "llama.cpp": LlamaCpp,
                                "openvino": OpenVINO, "vllm": VLLM, "icae": OfficialICAE,
                                "pcc": OfficialPCC}


def main() -> None:
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
                      TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")  # before packages are loaded
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what the peer prints must not come between
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    try:
        peer = PEERS[sys.argv[1]](json.loads(sys.stdin.readline()))
        say({"versions": peer.versions(), "rows": peer.rows})
        for line in sys.stdin:
            say(peer.answer(json.loads(line)["row"]))
    except Exception as error:
        say({"skip": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


if __name__ == "__main__":
    main()
