# SPDX-License-Identifier: Apache-2.0
"""Metrics of a server for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from t5x_lite.serving.models import ServedModel

# Seconds: from a word of a small model to a page of a large one.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Numbers of an engine (`EngineGauges`) by the name of their metric.
GAUGES = {
    "rows": "texts that can be written at the same time",
    "rows_used": "texts that are being written",
    "queued": "texts that wait for a row",
    "prefix_bytes": "bytes of the prefix cache",
}
COUNTERS = {
    "prompt_tokens": "tokens of inputs that were read",
    "cached_tokens": "tokens among them whose keys and values were in the prefix cache",
    "tokens": "tokens that were written",
    "accepted": "tokens among them that a drafter had proposed",
    "passes": "forward passes of the decoder",
}


class EngineCollector(Collector):
    """Numbers of the engines, read when they are asked for."""

    def __init__(self, served: Mapping[str, ServedModel]):
        self.served = served

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics, labeled by model."""
        served = self.served.items()
        # Models with adapters share the engine of theirs.
        gauges = {name: each.engine.gauges() for name, each in served if not each.adapter}
        for kind, families in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for field, text in families.items():
                family = kind(f"t5x_lite_{field}", text, labels=["model"])
                for name, numbers in gauges.items():
                    family.add_metric([name], getattr(numbers, field))
                yield family
        finished = CounterMetricFamily(
            "t5x_lite_finished", "texts by the reason of their end", labels=["model", "reason"]
        )
        for name, numbers in gauges.items():
            for reason, count in numbers.finished.items():
                finished.add_metric([name, reason], count)
        yield finished


class Metrics:
    """Metrics of the requests of a server, and of its engines.

    Attributes:
      registry: all metrics.
      requests: requests by route and status.
      seconds: their durations by route, streams to their last event.
      first: seconds to the first part of a text, by model.
    """

    def __init__(self, served: Mapping[str, ServedModel]):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(served))
        self.requests = Counter(
            "t5x_lite_requests",
            "requests by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "t5x_lite_request_seconds",
            "duration of requests, of streams to their last event",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.first = Histogram(
            "t5x_lite_first_token_seconds",
            "from a request's arrival to the first part of a text",
            ["model"],
            buckets=BUCKETS,
            registry=self.registry,
        )

    def write(self) -> bytes:
        """The metrics as text."""
        return generate_latest(self.registry)
