"""What the server counts, in Prometheus' text form; no label grows with the number of variants."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.server.batching import BatchSeen

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own.

    Labels are a route and a status: a few dozen series, however many variants there are.
    """

    def __init__(
        self,
        *,
        variants: Callable[[], int],
        waiting: Callable[[], int],
        statistics: Callable[[], Any],
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        into = self._registry
        self._requests = Counter(
            "fleet_requests", "Requests by route and status.", ["route", "status"], registry=into
        )
        self._seconds = Histogram(
            "fleet_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=into,
        )
        self._batch_rows = Histogram(
            "fleet_batch_inputs", "Inputs of a batch.", buckets=_ROWS, registry=into
        )
        self._batch_variants = Histogram(
            "fleet_batch_variants", "Variants of a batch.", buckets=_ROWS, registry=into
        )
        self._batch_wait = Histogram(
            "fleet_batch_wait_seconds",
            "Seconds that the oldest input of a batch waited.",
            buckets=_SECONDS,
            registry=into,
        )
        self._batch_seconds = Histogram(
            "fleet_batch_seconds", "Seconds of computing a batch.", buckets=_SECONDS, registry=into
        )
        self._failed = Counter(
            "fleet_failed_inputs", "Inputs that the server failed on.", registry=into
        )
        self._refreshes = Counter(
            "fleet_failed_refreshes", "Looks at the store or the tokens that failed.", registry=into
        )
        Gauge("fleet_variants", "Variants served now.", registry=into).set_function(variants)
        Gauge("fleet_waiting_inputs", "Inputs in the queue.", registry=into).set_function(waiting)
        self._registry.register(_OfEngine(statistics))

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is one of the server's own, never what a client sent."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, batch: BatchSeen) -> None:
        """Count one batch."""
        self._batch_rows.observe(batch.rows)
        self._batch_variants.observe(batch.variants)
        self._batch_wait.observe(batch.waited_s)
        self._batch_seconds.observe(batch.seconds)
        if batch.failed:
            self._failed.inc(batch.failed)

    def refresh_failed(self) -> None:
        """Count a look at the store or the tokens that failed."""
        self._refreshes.inc()

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """The numbers among the engine's statistics, read when asked for."""

    def __init__(self, statistics: Callable[[], Any]) -> None:
        self._statistics = statistics

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or the registry would ask the engine before it serves

    def collect(self) -> Iterator[Metric]:
        found = self._statistics()
        for field in dataclasses.fields(found):
            value = getattr(found, field.name)
            if isinstance(value, int | float):
                name = re.sub(r"\W", "_", field.name)
                yield GaugeMetricFamily(f"fleet_tenants_{name}", f"Tenants: {name}.", value=value)
