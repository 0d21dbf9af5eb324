"""Prometheus metrics: vLLM's names where dashboards and autoscalers expect them, `diffuspec_*` for everything else.

`observe` takes the same step record that the policy learns from, so a dashboard shows what the policy acted on. Labels
are bounded: never a request, a user or a prompt.
"""

from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.registry import Collector

from drafters.base import BypassReason, Outcome, PolicyName, SourceName, StepRecord
from service.engine.base import Engine, EnginePhase

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 10.0)
REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)
PHASE_BUCKETS = (0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 5.0)
LENGTH_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 30, 40, 64, 128)
WIDTH_BUCKETS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 40, 64)
GAIN_BUCKETS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0)
FINISH_REASONS = ("stop", "length", "abort", "error")
SOURCES = get_args(SourceName)
POLICIES = get_args(PolicyName)
PHASES = get_args(EnginePhase)
BATCHES = ((1, "1"), (2, "2"), (4, "3-4"), (8, "5-8"), (16, "9-16"), (32, "17-32"))  # max sequences of a step, label
LARGEST_BATCH = "33+"
BYPASS_REASONS = tuple(reason for reason in get_args(BypassReason) if reason)
VLLM_PREFIX = "vllm:"


class VllmCollector(Collector):
    """Collects the metrics that vLLM keeps in the process's default registry."""

    def collect(self) -> Iterator[Metric]:
        for family in REGISTRY.collect():
            if family.name.startswith(VLLM_PREFIX):
                yield family


class ServiceMetrics:
    """All metrics of one server. Methods may be called from any thread."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        policy: str = "goodput",
        max_draft_tokens: int = 16,
        own_names_only: bool = False,
    ) -> None:
        """`max_draft_tokens` bounds the `position` label.

        own_names_only: hide our counts under vLLM's names; `pass_through` shows vLLM's own instead.
        """
        self.registry = registry
        self._vllm_registry = CollectorRegistry() if own_names_only else registry
        self._num_positions = max_draft_tokens
        self._model_name = model_name
        self._policy = policy
        ProcessCollector(registry=registry)
        self._build_request_metrics()
        self._build_step_metrics()
        self._build_audit_metrics()
        self._gauge("diffuspec_policy_info", "The policy of requests that name none.", "policy").labels(
            model_name, policy
        ).set(1)

    def _registry_of(self, name: str) -> CollectorRegistry:
        return self._vllm_registry if name.startswith(VLLM_PREFIX) else self.registry

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self._registry_of(name))

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, ("model_name", *labels), registry=self._registry_of(name))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, ("model_name", *labels), registry=self._registry_of(name), buckets=buckets)

    def _build_request_metrics(self) -> None:
        name = self._model_name
        self._running = self._gauge("vllm:num_requests_running", "Sequences being generated.").labels(name)
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences in the queue.").labels(name)
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1.").labels(
            name
        )
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS
        ).labels(name)
        self._token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between tokens; tokens of one step share its time.", TOKEN_BUCKETS
        ).labels(name)
        self._request = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_BUCKETS
        ).labels(name)
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", FIRST_TOKEN_BUCKETS
        ).labels(name)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of started sequences.").labels(name)
        self._generation_tokens = self._counter("vllm:generation_tokens", "Generated tokens.").labels(name)
        finished = self._counter("vllm:request_success", "Ended sequences by finish reason.", "finished_reason")
        self._finished = {reason: finished.labels(name, reason) for reason in FINISH_REASONS}
        self._responses = self._counter("diffuspec_http_responses", "HTTP responses.", "route", "status")
        phases = self._gauge("diffuspec_engine_phase", "1 for the engine's current phase.", "phase")
        self._engine_phases = {phase: phases.labels(name, phase) for phase in PHASES}

    def _build_step_metrics(self) -> None:
        name = self._model_name
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Verified drafts.").labels(name)
        self._draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Verified draft tokens.").labels(name)
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens.").labels(name)
        per_position = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted draft tokens by position from 0.", "position"
        )
        self._accepted_at = [per_position.labels(name, str(position)) for position in range(self._num_positions)]
        per_position = self._counter(
            "diffuspec_draft_tokens_per_pos", "Verified draft tokens by position from 0.", "position"
        )
        self._drafted_at = [per_position.labels(name, str(position)) for position in range(self._num_positions)]
        self._steps = self._counter("diffuspec_steps", "Engine steps.").labels(name)
        rows = self._counter("diffuspec_rows", "Rows of the models' passes.", "kind")
        self._rows = {kind: rows.labels(name, kind) for kind in ("prefill", "decode", "diffusion")}
        phases = self._histogram(
            "diffuspec_step_seconds",
            "Seconds of a step by phase; draft excludes lattice and search.",
            PHASE_BUCKETS,
            "phase",
        )
        self._phases = {phase: phases.labels(name, phase) for phase in ("draft", "search", "verify", "commit")}
        lengths = self._histogram(
            "diffuspec_draft_length", "Tokens drafted for one step.", LENGTH_BUCKETS, "source", "policy"
        )
        self._lengths = {
            (source, policy): lengths.labels(name, source, policy) for source in SOURCES for policy in POLICIES
        }
        self._build_decode_metrics()
        self._width = self._histogram(
            "diffuspec_lattice_width", "Mean candidates per position of a lattice.", WIDTH_BUCKETS
        ).labels(name)
        self._gain = self._histogram(
            "diffuspec_path_gain_nats", "Score of the chosen path minus the argmax path's, per token.", GAIN_BUCKETS
        ).labels(name)
        self._expected = self._counter(
            "diffuspec_expected_committed_tokens", "Tokens that the policy expected verified drafts to commit."
        ).labels(name)
        self._committed = self._counter(
            "diffuspec_realised_committed_tokens",
            "Tokens that verified drafts committed, including the next token and tokens after a stop token.",
        ).labels(name)
        bypassed = self._counter("diffuspec_speculation_bypassed", "Steps of a request without a draft.", "reason")
        self._bypassed = {reason: bypassed.labels(name, reason) for reason in BYPASS_REASONS}
        self._drafter_failures = self._counter(
            "diffuspec_drafter_failures", "Failures of the drafter; decoding went on without it."
        ).labels(name)
        self._drafter_up = self._gauge("diffuspec_drafter_up", "1 while the drafter works, 0 after a failure.").labels(
            name
        )

    def _build_decode_metrics(self) -> None:
        """Count seconds and tokens of steps without prompt tokens, drafted or not, to compute the speed-up.

        Summed over the batch sizes, `tokens{drafted="yes"} * seconds{drafted="no"} / tokens{drafted="no"}` is the time
        that plain decoding would have needed for the drafted steps' tokens. Plain decoding includes no drafting, so the
        seconds of drafting that found nothing count as `yes`.
        """
        name, labels = self._model_name, ("drafted", "batch")
        steps = self._counter("diffuspec_decode_steps", "Steps without prompt tokens.", *labels)
        seconds = self._counter(
            "diffuspec_decode_step_seconds",
            "Seconds of steps without prompt tokens; all drafting counts as yes.",
            *labels,
        )
        tokens = self._counter("diffuspec_decode_step_tokens", "Tokens from steps without prompt tokens.", *labels)
        self._decode = {
            (drafted, batch): tuple(counter.labels(name, drafted, batch) for counter in (steps, seconds, tokens))
            for drafted in ("yes", "no")
            for batch in (*(label for _, label in BATCHES), LARGEST_BATCH)
        }

    def watch_phase(self, phase: Callable[[], EnginePhase]) -> None:
        """Read the engine's phase at every scrape."""
        for name, gauge in self._engine_phases.items():
            gauge.set_function(lambda name=name: float(phase() == name))  # type: ignore[misc]  # bound here and now

    def _build_audit_metrics(self) -> None:
        name = self._model_name
        self._audits_run = self._counter("diffuspec_audits_run", "Live requests decoded again, plainly.").labels(name)
        self._audits_failed = self._counter(
            "diffuspec_audits_failed", "Audits that found other tokens, by more than rounding."
        ).labels(name)
        self._audit_errors = self._counter("diffuspec_audit_errors", "Audits given up because of an error.").labels(
            name
        )

    def observe_audit_error(self) -> None:
        """Count an audit that was given up."""
        self._audit_errors.inc()

    def observe_audit(self, is_failed: bool) -> None:
        """Count a live request that was decoded again."""
        self._audits_run.inc()
        if is_failed:
            self._audits_failed.inc()

    def show_vocabulary(self, relation: str, overlap: float) -> None:
        """Show how the vocabularies of target and drafter relate, and the share of the target's tokens in both."""
        self._gauge(
            "diffuspec_vocabulary_info", "How the drafter's vocabulary relates to the target's.", "relation"
        ).labels(self._model_name, relation).set(1)
        self._gauge(
            "diffuspec_vocabulary_overlap_ratio", "Share of the target's tokens that the drafter also has."
        ).labels(self._model_name).set(overlap)

    def watch(self, engine: Engine) -> None:
        """Read running, waiting, cache use and the drafter's state from the engine at every scrape."""
        self._running.set_function(lambda: engine.status().num_running)
        self._waiting.set_function(lambda: engine.status().num_waiting)
        self._usage.set_function(lambda: engine.status().kv_cache_usage)
        self._drafter_up.set_function(lambda: float(engine.status().drafter_up))

    def observe_drafter_failures(self, count: int) -> None:
        """Count `count` more failures of the drafter."""
        self._drafter_failures.inc(count)

    def pass_through(self) -> None:
        """Also show the metrics that vLLM keeps in this process."""
        self.registry.register(VllmCollector())

    def observe(self, step: StepRecord) -> None:
        """Count one engine step."""
        self._steps.inc()
        phases = step.seconds
        for phase, histogram in self._phases.items():
            seconds: float = getattr(phases, phase)
            if seconds > 0:
                histogram.observe(seconds)
        self._rows["prefill"].inc(step.num_prefill_rows)
        self._rows["decode"].inc(step.num_rows - step.num_prefill_rows)
        self._rows["diffusion"].inc(step.drafting.num_diffusion_rows)
        self._drafter_failures.inc(step.num_drafter_failures)
        for outcome in step.outcomes:
            self._observe_outcome(outcome)
        if step.outcomes and not step.num_prefill_rows:
            self._observe_decode_step(step)

    def _observe_decode_step(self, step: StepRecord) -> None:
        num_sequences = len(step.outcomes)
        drafted = "yes" if any(outcome.draft.tokens for outcome in step.outcomes) else "no"
        batch = next((label for max_size, label in BATCHES if num_sequences <= max_size), LARGEST_BATCH)
        steps, seconds, tokens = self._decode[drafted, batch]
        _, drafting_seconds, _ = self._decode["yes", batch]
        steps.inc()
        seconds.inc(step.verify_seconds + step.commit_seconds)
        drafting_seconds.inc(step.drafting.draft_seconds + step.drafting.search_seconds)
        tokens.inc(num_sequences + sum(outcome.num_accepted for outcome in step.outcomes))

    def _observe_outcome(self, outcome: Outcome) -> None:
        draft = outcome.draft
        self._lengths[draft.source, outcome.policy or self._policy].observe(len(draft.tokens))
        if draft.search is not None and draft.search.lattice_width > 0:
            self._width.observe(draft.search.lattice_width)
            self._gain.observe(draft.search.path_gain)
        if not draft.tokens:
            self._bypassed.get(draft.bypass_reason, self._bypassed["other"]).inc()
            return
        self._drafts.inc()
        self._draft_tokens.inc(len(draft.tokens))
        self._accepted.inc(outcome.num_kept)
        for counter in self._accepted_at[: outcome.num_kept]:
            counter.inc()
        for counter in self._drafted_at[: len(draft.tokens)]:
            counter.inc()
        self._expected.inc(draft.expected_accepted + 1)
        self._committed.inc(outcome.num_accepted + 1)

    def observe_response(self, route: str, status: int) -> None:
        """Count an HTTP response. `route` is the route's pattern, never a path that a client made up."""
        self._responses.labels(self._model_name, route, str(status)).inc()

    def observe_prompt(self, num_tokens: int, queue_seconds: float) -> None:
        """Count the prompt of one sequence, which has been read now."""
        self._prompt_tokens.inc(num_tokens)
        self._queue.observe(queue_seconds)

    def observe_first_token(self, seconds: float) -> None:
        """Count that one sequence has its first token, `seconds` after it arrived."""
        self._first_token.observe(seconds)

    def observe_tokens(self, count: int, seconds: float | None) -> None:
        """Record that `count` tokens came, `seconds` after the tokens before them; None: they are the first."""
        self._generation_tokens.inc(count)
        if seconds is not None:
            for _ in range(count):
                self._token.observe(seconds / count)

    def observe_end(self, reason: str, seconds: float) -> None:
        """Record that a sequence ended, `seconds` after it arrived."""
        self._finished[reason].inc()
        self._request.observe(seconds)
