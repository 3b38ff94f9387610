"""The commands that serve: `ctxcomp serve` and `ctxcomp api-key`."""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctxcomp_rag.cli_output import IndexDir, Json, print_json, quiet, to_err
from ctxcomp_rag.errors import InputError

if TYPE_CHECKING:
    from ctxcomp_rag.decoding import RequestLimits
    from ctxcomp_rag.pipeline import CompressedRAG
    from ctxcomp_rag.serving.backends import Backend

_KEYS_VARIABLE = "CTXCOMP_API_KEYS"


class BackendName(StrEnum):
    """Who decodes."""

    local = "local"
    vllm = "vllm"


def serve(
    index: IndexDir,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --keys.")
                    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help=f"File of API keys, lines of 'NAME sha256:HEX' (ctxcomp api-key "
                                              f"makes them) [default: the lines in {_KEYS_VARIABLE}].")] = None,
    model: Annotated[str | None, typer.Option(help="Where the decoder is [default: the one the index names, or for "
                                              "latent spans the compressor].")] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model [default: the decoder's name].")
                    ] = None,
    compressor: Annotated[Path | None, typer.Option(help="Folder of the saved compressor that converts latent "
                                                    "spans.")] = None,
    backend: Annotated[BackendName, typer.Option(help="Decode here, or in a vLLM server of the same model.")
                       ] = BackendName.local,
    backend_url: Annotated[str | None, typer.Option(help="vllm: address of its server, such as "
                                                    "http://127.0.0.1:8001.")] = None,
    canonical_order: Annotated[bool, typer.Option("--canonical-order", help="Splice retrieved spans in document order "
                                                  "instead of by score, so that a prefix cache hits.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that decode together.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; one more is answered 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 1024,
    max_prompt_positions: Annotated[int | None, typer.Option(min=1, help="Longest prompt, text tokens and slots "
                                                             "[default: the decoder's window].")] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 2**20,
    max_messages: Annotated[int, typer.Option(min=1, help="Most messages of a request.")] = 256,
    shutdown_seconds: Annotated[int, typer.Option(min=1, help="Time that running requests get when the server is "
                                                  "stopped.")] = 30,
) -> None:
    """Serve an index over HTTP, as OpenAI's chat completions do. SIGINT or SIGTERM stops it gracefully."""
    try:
        from ctxcomp_rag.serving.app import create_app
        from ctxcomp_rag.serving.server import listening, make_server, require_keys_outside
    except ModuleNotFoundError as error:
        raise InputError(f"ctxcomp serve needs {error.name}; run pip install 'ctxcomp-rag[serve]'") from error
    from ctxcomp_rag.decoding import RequestLimits
    from ctxcomp_rag.pipeline import CompressedRAG
    from ctxcomp_rag.serving.gate import GateLimits
    from ctxcomp_rag.serving.service import SpanService
    from ctxcomp_rag.serving.tenants import Tenants

    if (backend is BackendName.vllm) != (backend_url is not None):
        raise InputError("--backend vllm and --backend-url URL go together; give both or neither")
    tenants = Tenants.from_file(keys) if keys is not None else Tenants(os.environ.get(_KEYS_VARIABLE, "").splitlines())
    require_keys_outside(host, tenants)
    quiet()
    with listening(host, port) as listener, CompressedRAG.open(index, model=model, compressor=compressor) as rag:
        limits = RequestLimits(max_prompt_positions, max_new_tokens)
        model_id = rag.backbone.model_id
        served = name or (Path(model_id).name if Path(model_id).is_dir() else model_id)  # callers see no path of ours
        app = create_app(SpanService(rag, canonical_order=canonical_order),
                         _backend(rag, limits, backend_url, max_batch, max_waiting), model=served, tenants=tenants,
                         limits=GateLimits(max_batch + max_waiting, max_body_bytes, max_messages),
                         default_max_tokens=min(64, max_new_tokens))
        for stop in (signal.SIGINT, signal.SIGTERM):  # the server raises them again when it has stopped
            signal.signal(stop, lambda *_: None)
        to_err.print(f"serving {index} as {served!r} on http://{host}:{port}/v1")
        make_server(app, shutdown_seconds=shutdown_seconds).run(sockets=[listener])


def _backend(rag: CompressedRAG, limits: RequestLimits, url: str | None, max_batch: int, max_waiting: int) -> Backend:
    from ctxcomp_rag.decoding import FrozenDecoder, RequestScheduler
    from ctxcomp_rag.serving.backends import LocalBackend

    decoder = FrozenDecoder(rag.backbone, end_ids=rag.spec.end_ids)
    if url is None:
        return LocalBackend(RequestScheduler(decoder, max_batch=max_batch, max_waiting=max_waiting, limits=limits))
    from ctxcomp_rag.serving.vllm import require_consecutive
    from ctxcomp_rag.serving.vllm_server import VLLMBackend

    require_consecutive(rag.spec)
    rag.backbone.release_layers()
    return VLLMBackend(decoder, url, limits=limits)


def api_key(
    name: Annotated[str, typer.Argument(help="Name of the tenant.")],
    as_json: Json = False,
) -> None:
    """Make an API key. The line for the keys file goes to standard output, the key itself to standard error."""
    from ctxcomp_rag.serving.tenants import new_key

    key, line = new_key(name)
    if as_json:
        print_json({"key": key, "line": line})
        return
    to_err.print(f"key of {name}, shown once: {key}")
    print(line)
