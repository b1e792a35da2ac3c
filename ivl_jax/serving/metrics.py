"""What Prometheus is told: requests, tokens, the queue, and how long clients wait.

In: events of the front and of the engine's thread. Out: the text of `/metrics`. Every server has
its own registry, so that several can live in one process.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Up to --queue-seconds by default, after which a request without a token is refused.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# From small models on an accelerator to large ones on a CPU.
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The figures of one server; every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ivl_requests",
            "HTTP requests that have ended, by path and status; 499: the client left first.",
            ["path", "status"],
            registry=self._registry,
        )
        self.disconnects = Counter(
            "ivl_disconnects",
            "Requests whose client left before its answer began.",
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "ivl_prompt_tokens",
            "Tokens of the prompts that went to the engine, once per choice.",
            registry=self._registry,
        )
        self.generated_tokens = Counter(
            "ivl_generated_tokens",
            "Tokens generated, those of cancelled and lost choices included.",
            registry=self._registry,
        )
        self.failed_steps = Counter(
            "ivl_failed_steps",
            "Steps of the engine that failed and lost their requests.",
            registry=self._registry,
        )
        self.waiting = Gauge(
            "ivl_waiting",
            "Choices that the engine has and that wait for a row.",
            registry=self._registry,
        )
        self.running = Gauge(
            "ivl_running", "Choices that have a row of the batch.", registry=self._registry
        )
        self.rows = Gauge(
            "ivl_rows",
            "Rows of the batch on device, 0 where nothing is decoded.",
            registry=self._registry,
        )
        self.occupancy = Histogram(
            "ivl_batch_occupancy",
            "Share of the batch's rows that run, one observation per step of the engine.",
            buckets=[i / 8 for i in range(1, 9)],
            registry=self._registry,
        )
        self.first_token = Histogram(
            "ivl_time_to_first_token_seconds",
            "Seconds from a request's admission, before its prompt is encoded, to its first token; "
            "one observation per request.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.per_token = Histogram(
            "ivl_time_per_token_seconds",
            "Seconds per token of a choice after its first one, one observation per choice.",
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)
