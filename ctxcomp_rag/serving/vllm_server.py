"""A vLLM server as the backend of ours: prompts go to its completions endpoint as rows of embeddings.

Its `--enable-prompt-embeds` is for trusted callers only (vLLM's own words): rows of a wrong shape may crash it, and it
unpickles tensors, if only with `weights_only`. Let nobody but this server reach it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import httpx
from anyio import to_thread

from ctxcomp_rag.decoding import FrozenDecoder, Generation, GenerationSettings, Part, PromptUsage, RequestLimits
from ctxcomp_rag.serving.protocol import RefusalError
from ctxcomp_rag.serving.vllm import finished, prompt_embeds, sampling, wire_form

_KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own name for the key that its server asks for
_CONNECT_SECONDS = 5.0


class VLLMBackend:
    """Decodes in a vLLM server of the same model.

    Args:
        decoder: ours; its tokenizer, embeddings and end ids are used, its layers are not.
        url: of the server, such as "http://127.0.0.1:8001".
    """

    def __init__(self, decoder: FrozenDecoder, url: str, *, limits: RequestLimits | None = None) -> None:
        self.decoder, self.url, self.limits = decoder, url.rstrip("/"), limits or RequestLimits()
        key = os.environ.get(_KEY_VARIABLE)
        self._client = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS), limits=httpx.Limits(max_connections=None))
        self._model: str | None = None
        self._running: set[_Running] = set()

    @property
    def waiting(self) -> int:
        return 0  # vLLM queues; its own metrics say how long

    @property
    def decoding(self) -> int:
        return len(self._running)

    async def start(self, parts: Sequence[Part], settings: GenerationSettings) -> _Running:
        self.limits.check_answer(settings.max_new_tokens)
        backbone = self.decoder.backbone

        def rows() -> tuple[str, int, PromptUsage]:
            embeds, usage = prompt_embeds(parts, backbone)
            self.limits.check_prompt(usage.positions)
            return wire_form(embeds), len(embeds), usage

        wire, length, usage = await to_thread.run_sync(rows)
        body = {"model": await self._served(), "prompt_embeds": wire, "stream": True, "return_token_ids": True,
                **sampling(settings, self.decoder.end_ids, backbone.max_positions - length)}
        response = await self._send(self._client.build_request("POST", "/v1/completions", json=body))
        running = _Running(response, usage, self.decoder.end_ids, self._running.discard)
        self._running.add(running)
        return running

    async def ready(self) -> bool:
        try:
            return (await self._client.get("/health", timeout=_CONNECT_SECONDS)).status_code == 200
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        for running in list(self._running):
            await running.aclose()
        await self._client.aclose()

    async def _served(self) -> str:
        """The name that the server gave its model."""
        if self._model is None:
            response = await self._send(self._client.build_request("GET", "/v1/models"))
            self._model = str(json.loads(await response.aread())["data"][0]["id"])
        return self._model

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await self._client.send(request, stream=True)
            if response.is_success:
                return response
            said = (await response.aread()).decode(errors="replace")[:500]
        except httpx.HTTPError as error:
            raise RefusalError(503, f"the vLLM server cannot be reached ({type(error).__name__}); retry later",
                               kind="server_error", code="backend_unavailable") from error
        if response.status_code in (400, 413, 422):
            raise RefusalError(400, f"vLLM refused the prompt: {said}")
        raise RefusalError(503, f"the vLLM server answered {response.status_code}; retry later", kind="server_error",
                           code="backend_unavailable")


class _Running:
    """One streamed completion; closing its connection makes vLLM drop the request."""

    def __init__(self, response: httpx.Response, usage: PromptUsage, end_ids: frozenset[int],
                 left: Callable[[_Running], None]) -> None:
        self._response, self._usage, self._end_ids, self._left = response, usage, end_ids, left
        self._text, self._ids, self._finish_reason = "", list[int](), "stop"
        self._over = False
        self._closing: asyncio.Task[None] | None = None  # kept: the loop holds tasks weakly

    async def apieces(self) -> AsyncIterator[str]:
        try:
            async for line in self._response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                piece = self._take(json.loads(line.removeprefix("data: ")))
                if piece:
                    yield piece
            self._over = True
        except (httpx.HTTPError, httpx.StreamError) as error:
            if self._closing is not None:  # by us
                raise CancelledError from error
            raise RefusalError(503, "the vLLM server broke off in the middle of an answer", kind="server_error",
                               code="backend_unavailable") from error
        finally:
            await self.aclose()

    def _take(self, event: dict[str, Any]) -> str:
        if "error" in event:
            raise RefusalError(503, "the vLLM server failed in the middle of an answer", kind="server_error",
                               code="backend_unavailable")
        for choice in event["choices"]:
            self._ids += choice.get("token_ids") or []
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            self._text += choice["text"]
            return str(choice["text"])
        return ""

    async def aresult(self) -> Generation:
        if not self._over:
            async for _ in self.apieces():
                pass
        return finished(self._text, self._ids, self._finish_reason, self._usage, self._end_ids)

    def cancel(self) -> None:
        self._closing = asyncio.get_running_loop().create_task(self.aclose())

    async def aclose(self) -> None:
        self._left(self)
        await self._response.aclose()
