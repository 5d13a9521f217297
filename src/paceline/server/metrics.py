"""Figures for Prometheus, under the names that vLLM gives them where it has such a figure (prefix `paceline:`).

https://docs.vllm.ai/en/latest/design/metrics.html
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.engine.engine import Engine
from paceline.engine.sequence import Sequence
from paceline.types import Event

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """What happened since the server began.

    Args:
        engine: whose state is told, too.
        model: the name it is served under.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._last: dict[int, float] = {}  # when a running sequence's last token came
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self._generated = self._counter("generation_tokens", "Tokens written.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up among those read before.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens that had been read before.")
        self._rounds = self._counter("spec_decode_num_drafts", "Rounds in which tokens were drafted.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._at_depth = Counter(
            "paceline:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by their place in the line, from 0.",
            ["model_name", "position"],
            registry=self._registry,
        )
        self._finished = Counter(
            "paceline:request_success",
            "Texts that came to their end.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between tokens; a round's tokens share its time."
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Until a request had a cache slot.")
        self._lengths = self._histogram("request_generation_tokens", "Tokens of a text.", LENGTHS)
        self._registry.register(_EngineState(engine, model))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe(self, sequence: Sequence, event: Event) -> None:
        """Count a round."""
        now = time.monotonic()
        if last := self._last.get(id(sequence)):
            for _ in event.pieces:
                self._between.observe((now - last) / len(event.pieces))
        else:
            statistics = sequence.statistics
            self._prompt.inc(statistics.prompt_tokens)
            self._queries.inc(statistics.prompt_tokens)
            self._hits.inc(statistics.cached_tokens)
            self._first.observe(statistics.prompt_seconds)
            self._queue.observe(statistics.queue_seconds)
        self._last[id(sequence)] = now
        self._generated.inc(len(event.pieces))
        if event.drafted:
            self._rounds.inc()
            self._drafted.inc(event.drafted)
            self._accepted.inc(event.accepted)
            for position in range(event.accepted):
                self._at_depth.labels(self._model, str(position)).inc()
        if event.finish:
            statistics = sequence.statistics
            self._whole.observe(statistics.prompt_seconds + statistics.seconds)
            self._lengths.observe(statistics.tokens)
            self._finished.labels(self._model, event.finish).inc()

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended, or was left."""
        self._last.pop(id(sequence), None)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"paceline:{name}", text, ["model_name"], registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = LATENCIES) -> Histogram:
        histogram = Histogram(f"paceline:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)


class _EngineState(Collector):
    """Figures that are read when they are asked for."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> list[Metric]:
        engine, scheduler = self._engine, self._engine.scheduler
        running = list(scheduler.running)
        held = sum(sequence.cached for sequence in running)
        figures = {
            "num_requests_running": ("Texts being written or prompts being read.", len(running)),
            "num_requests_waiting": ("Requests without a cache slot.", scheduler.waiting),
            "kv_cache_usage_perc": (
                "Share of the cache in use.",
                held / (engine.backend.info.slots * engine.backend.info.context),
            ),
            "prefix_cache_bytes": (
                "Memory that beginnings of prompts take.",
                scheduler.prefix_cache.nbytes if scheduler.prefix_cache else 0,
            ),
            "acceptance_recent": (
                "Share of first drafts accepted lately.",
                engine.recent_acceptance,
            ),
        }
        metrics: list[Metric] = []
        for name, (text, value) in figures.items():
            gauge = GaugeMetricFamily(f"paceline:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            metrics.append(gauge)
        return metrics
