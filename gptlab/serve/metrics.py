"""Counts and times of a server, as the text that Prometheus reads."""

import time
from collections import Counter
from collections.abc import Callable

from gptlab.machine import rss_mb

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    def __init__(self, name: str, help_: str):
        self.name, self.help = name, help_
        self.counts, self.sum = [0] * (len(BUCKETS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[next((i for i, limit in enumerate(BUCKETS_S) if seconds <= limit), len(BUCKETS_S))] += 1
        self.sum += seconds

    def lines(self) -> list[str]:
        lines, total = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} histogram"], 0
        for limit, count in zip((*BUCKETS_S, "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{self.name}_bucket{{le="{limit}"}} {total}')
        return [*lines, f"{self.name}_sum {self.sum:.6f}", f"{self.name}_count {total}"]


class Metrics:
    """All of it is counted on the event loop's thread."""

    def __init__(self) -> None:
        self.started = time.time()
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status; 0: there was none
        self.counts = Counter(dict.fromkeys(COUNTERS, 0))
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self.request_s = Histogram("gptlab_request_seconds", "From a request's head to the end of its answer.")
        self.first_token_s = Histogram("gptlab_first_token_seconds", "From a request's body to its first token.")

    def request(self, path: str, status: int, seconds: float) -> None:
        known = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self.requests[known, status] += 1
        self.request_s.add(seconds)

    def text(self) -> str:
        lines = ["# HELP gptlab_requests_total Requests, by path and status.", "# TYPE gptlab_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'gptlab_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, help_ in COUNTERS.items():
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} counter", f"{name} {self.counts[name]}"]
        gauges = self.gauges | {
            "process_resident_memory_bytes": ("Memory held.", lambda: rss_mb() * 2**20),
            "process_start_time_seconds": ("Start, in seconds since 1970.", lambda: self.started),
        }
        for name, (help_, read) in gauges.items():
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} gauge", f"{name} {read():.3f}"]
        return "\n".join([*lines, *self.request_s.lines(), *self.first_token_s.lines(), ""])


COUNTERS = {
    "gptlab_prompt_tokens_total": "Tokens of prompts that were accepted.",
    "gptlab_completion_tokens_total": "Tokens of texts that came to their end.",
    "gptlab_cancelled_total": "Requests whose client left before the end.",
    "gptlab_timeouts_total": "Requests whose time was up.",
    "gptlab_failures_total": "Requests that an error ended.",
}
