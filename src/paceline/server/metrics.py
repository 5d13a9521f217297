"""Prometheus metrics, with vLLM's names where it has the same metric (prefix `paceline:`).

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
    """Metrics since the server started.

    Args:
        engine: for gauges of its state.
        model: label `model_name` of all metrics.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._last: dict[int, float] = {}  # time of a running sequence's last token
        self._prompt = self._counter("prompt_tokens", "Prompt tokens.")
        self._generated = self._counter("generation_tokens", "Generated tokens.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._rounds = self._counter("spec_decode_num_drafts", "Rounds with drafted tokens.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Accepted draft tokens.")
        self._at_depth = Counter(
            "paceline:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by position in the draft, from 0.",
            ["model_name", "position"],
            registry=self._registry,
        )
        self._by_proposer = {
            kind: Counter(
                f"paceline:spec_decode_num_{kind}_tokens_by_proposer",
                f"{kind.capitalize()} tokens: of the drafter, or of the engine (a grammar, prompt lookup).",
                ["model_name", "proposer"],
                registry=self._registry,
            )
            for kind in ("draft", "accepted")
        }
        self._finished = Counter(
            "paceline:request_success", "Finished requests.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._first = self._histogram("time_to_first_token_seconds", "Time to first token.")
        self._between = self._histogram(
            "inter_token_latency_seconds", "Time between tokens; the tokens of a round share its time evenly."
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "End-to-end latency of a request.")
        self._queue = self._histogram("request_queue_time_seconds", "Time in the queue.")
        self._lengths = self._histogram("request_generation_tokens", "Generated tokens per sequence.", LENGTHS)
        self._registry.register(_EngineState(engine, model))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def observe(self, sequence: Sequence, event: Event) -> None:
        """Count an event."""
        now = time.monotonic()
        if last := self._last.get(id(sequence)):
            for _ in event.deltas:
                self._between.observe((now - last) / len(event.deltas))
        else:
            statistics = sequence.statistics
            self._prompt.inc(statistics.prompt_tokens)
            self._queries.inc(statistics.prompt_tokens)
            self._hits.inc(statistics.cached_tokens)
            self._first.observe(statistics.prompt_seconds)
            self._queue.observe(statistics.queue_seconds)
        self._last[id(sequence)] = now
        self._generated.inc(len(event.deltas))
        if event.drafted:
            self._rounds.inc()
            self._drafted.inc(event.drafted)
            self._accepted.inc(event.accepted)
            proposer = "drafter" if event.by_drafter else "engine"
            self._by_proposer["draft"].labels(self._model, proposer).inc(event.drafted)
            self._by_proposer["accepted"].labels(self._model, proposer).inc(event.accepted)
            for position in range(event.accepted):
                self._at_depth.labels(self._model, str(position)).inc()
        if event.finish:
            statistics = sequence.statistics
            self._whole.observe(statistics.prompt_seconds + statistics.seconds)
            self._lengths.observe(statistics.tokens)
            self._finished.labels(self._model, event.finish).inc()

    def forget(self, sequence: Sequence) -> None:
        """A sequence has finished or was cancelled."""
        self._last.pop(id(sequence), None)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"paceline:{name}", text, ["model_name"], registry=self._registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = LATENCIES) -> Histogram:
        histogram = Histogram(f"paceline:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)


class _EngineState(Collector):
    """Gauges, computed on request."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._model = engine, model

    def collect(self) -> list[Metric]:
        engine, scheduler, monitor = self._engine, self._engine.scheduler, self._engine.acceptance
        running = list(scheduler.running)
        cached = sum(sequence.cached for sequence in running)
        gauges = {
            "num_requests_running": ("Sequences in prefill or decode.", len(running)),
            "num_requests_waiting": ("Sequences in the queue.", scheduler.waiting),
            "kv_cache_usage_perc": (
                "Share of the KV cache in use.",
                cached / (engine.backend.info.slots * engine.backend.info.context),
            ),
            "prefix_cache_bytes": (
                "Memory of the prefix cache.",
                scheduler.prefix_cache.nbytes if scheduler.prefix_cache else 0,
            ),
            "acceptance_recent": (
                "Recent acceptance rate of the first draft token.",
                monitor.rate if monitor else 0.0,
            ),
        }
        metrics: list[Metric] = []
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"paceline:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            metrics.append(gauge)
        low = GaugeMetricFamily(
            "paceline:acceptance_low",
            "1 while few first drafts are accepted, with the likely cause: a situation, or text or pair.",
            labels=["model_name", "cause"],
        )
        if monitor and monitor.cause:
            low.add_metric([self._model, monitor.cause], 1)
        return [*metrics, low]
