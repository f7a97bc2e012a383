"""Counters and times for Prometheus, under our own names and under those of vLLM, which dashboards know."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mm_gpt.inference.batcher import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Of the batcher's Stats: our name, vLLM's name, what it is.
GAUGES = {
    "running": ("mm_gpt_prompts_running", "vllm:num_requests_running", "Prompts that are being answered."),
    "waiting": ("mm_gpt_prompts_waiting", "vllm:num_requests_waiting", "Prompts that wait for a row."),
    "sequence_bytes": ("mm_gpt_sequence_bytes", "", "Memory of the rows that are running."),
    "kept_bytes": ("mm_gpt_kept_bytes", "", "Memory of prompts and images that are kept for the next ones."),
}
COUNTERS = {
    "prompt_tokens_asked": ("mm_gpt_prefix_cache_queries", "vllm:prefix_cache_queries", "Tokens of prompts looked up."),
    "prompt_tokens_found": ("mm_gpt_prefix_cache_hits", "vllm:prefix_cache_hits", "Those that had been read before."),
    "images_asked": ("mm_gpt_image_cache_queries", "", "Images that were to be encoded."),
    "images_found": ("mm_gpt_image_cache_hits", "", "Those that had been encoded before."),
}


class Metrics:
    """All numbers of one server. `stats` gives those of the batcher when they are asked for."""

    def __init__(self, model: str, stats: Callable[[], Stats]):
        self.registry = CollectorRegistry()
        self.registry.register(_FromBatcher(model, stats))
        self._requests = Counter(
            "mm_gpt_requests",
            "Requests by HTTP status.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self._aborts = Counter("mm_gpt_aborts", "Requests whose client left before the end.", registry=self.registry)
        self._images = Counter("mm_gpt_images", "Images in requests.", registry=self.registry)
        self._labels = {"model_name": model}
        self._tokens = {
            name: [
                self._twin(Counter, f"mm_gpt_{name}_tokens", about, {}),
                self._twin(Counter, f"vllm:{name}_tokens", about, self._labels),
            ]
            for name, about in (("prompt", "Tokens of prompts."), ("generation", "Tokens of answers."))
        }
        self._times = {
            name: [
                self._twin(Histogram, f"mm_gpt_{name}_seconds", about, {}, buckets=_SECONDS),
                self._twin(Histogram, f"vllm:{name}_seconds", about, self._labels, buckets=_SECONDS),
            ]
            for name, about in (
                ("time_to_first_token", "From a request's last byte to the first token of its answer."),
                ("e2e_request_latency", "From a request's last byte to the last of its answer."),
            )
        }

    def _twin(self, kind: Any, name: str, about: str, labels: Mapping[str, str], **options: Any) -> Any:
        metric = kind(name, about, list(labels), registry=self.registry, **options)
        return metric.labels(**labels) if labels else metric

    def request(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint=endpoint, status=status).inc()

    def abort(self) -> None:
        self._aborts.inc()

    def images(self, count: int) -> None:
        self._images.inc(count)

    def tokens(self, kind: str, count: int) -> None:
        """`kind`: prompt or generation."""
        for counter in self._tokens[kind]:
            counter.inc(count)

    def time(self, kind: str, seconds: float) -> None:
        """`kind`: time_to_first_token or e2e_request_latency."""
        for histogram in self._times[kind]:
            histogram.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _FromBatcher(Collector):
    def __init__(self, model: str, stats: Callable[[], Stats]):
        self.model, self.stats = model, stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for kind, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for field, (own, alias, about) in names.items():
                yield kind(own, about, value=getattr(stats, field))
                if alias:
                    yield self._labelled(kind, alias, about, getattr(stats, field))

    def _labelled(self, kind: Any, name: str, about: str, value: float) -> Metric:
        family: Metric = kind(name, about, labels=["model_name"])
        family.add_metric([self.model], value)  # type: ignore[attr-defined]
        return family
