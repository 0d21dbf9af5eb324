"""What vLLM says of itself after every step."""

from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class StepWatch(StatLoggerBase):
    """Counts the engine's steps, and keeps its newest gauges."""

    def __init__(self, note_progress: Callable[[], None]) -> None:
        self._note_progress = note_progress
        self.num_steps = 0
        self.num_running = 0
        self.num_waiting = 0
        self.kv_cache_usage = 0.0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None:
            return
        self.num_steps += 1
        self.num_running = scheduler_stats.num_running_reqs
        self.num_waiting = scheduler_stats.num_waiting_reqs
        self.kv_cache_usage = scheduler_stats.kv_cache_usage
        self._note_progress()

    def log_engine_initialized(self) -> None: ...
