"""What vLLM's scheduler says of its work, as plain numbers."""

import time
from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger


class Counters(PrometheusStatLogger):
    """Adds up what vLLM reports after each iteration of its scheduler.

    It is a PrometheusStatLogger so that vLLM does not add its own, which keeps histograms of every
    token that nobody here reads.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        # Not the base's, which registers all of those.
        self._iterations = self._tokens = self._prompt_tokens = self._prefix_hits = 0
        self._running = self._waiting = 0
        self._kv_use = 0.0
        self.sampled_at = 0.0  # time.perf_counter() when the last token was there

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx=0
    ) -> None:
        if scheduler_stats is not None:
            self._iterations += 1
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._running, self._waiting = scheduler_stats.num_running_reqs, waiting
            self._kv_use = scheduler_stats.kv_cache_usage
            self._prompt_tokens += scheduler_stats.prefix_cache_stats.queries
            self._prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._tokens += iteration_stats.num_generation_tokens
            if iteration_stats.num_generation_tokens:
                self.sampled_at = time.perf_counter()

    def log_engine_initialized(self) -> None:
        pass

    def report(self) -> dict[str, Any]:
        """As `VllmEngine.poll` has them."""
        return {
            "progress": self._iterations + self._tokens,
            "running": self._running,
            "waiting": self._waiting,
            "tokens": self._tokens,
            "kv_use": self._kv_use,
            "prompt_tokens": self._prompt_tokens,
            "prefix_hits": self._prefix_hits,
        }
