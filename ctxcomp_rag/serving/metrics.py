"""What a server counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from ctxcomp_rag.decoding import Generation

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server.

    Args:
        waiting, decoding: how many requests wait and are decoded now.
        refused: references refused so far, by reason.
    """

    def __init__(self, waiting: Callable[[], int], decoding: Callable[[], int],
                 refused: Callable[[], Mapping[str, int]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("ctxcomp_requests", "Requests by path and HTTP status.", ["path", "status"],
                                registry=registry)
        self.seconds = Histogram("ctxcomp_request_seconds", "Seconds from a request to the end of its answer.",
                                 ["path"], buckets=_SECONDS, registry=registry)
        self.first_piece = Histogram("ctxcomp_first_piece_seconds", "Seconds from a request to the first of its text.",
                                     buckets=_SECONDS, registry=registry)
        self._prompt = Counter("ctxcomp_prompt_positions", "Prompt positions read, text tokens and slots.", ["kind"],
                               registry=registry)
        self._source = Counter("ctxcomp_source_tokens", "Tokens of text that the slots stood for.", registry=registry)
        self._made = Counter("ctxcomp_completion_tokens", "Tokens generated.", registry=registry)
        self.cancelled = Counter("ctxcomp_cancelled", "Answers broken off because the caller went away.",
                                 registry=registry)
        for name, text, count in (("waiting", "Requests that wait to be decoded.", waiting),
                                  ("decoding", "Requests that are being decoded.", decoding)):
            Gauge(f"ctxcomp_requests_{name}", text, registry=registry).set_function(count)
        registry.register(_Refused(refused))

    def count(self, generation: Generation) -> None:
        """Take a finished answer in."""
        usage = generation.usage
        self._prompt.labels("text").inc(usage.text_tokens)
        self._prompt.labels("slot").inc(usage.slots)
        self._source.inc(usage.source_tokens)
        self._made.inc(generation.completion_tokens)

    def page(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _Refused(Collector):
    def __init__(self, refused: Callable[[], Mapping[str, int]]) -> None:
        self._refused = refused

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("ctxcomp_references_refused", "References refused, by reason.", labels=["reason"])
        for reason, count in dict(self._refused()).items():
            family.add_metric([reason], count)
        yield family
