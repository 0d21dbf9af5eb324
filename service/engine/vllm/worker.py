"""Drafting inside vLLM's engine and worker processes (vLLM 0.32).

`DraftingWorker` gives the proposer what vLLM's interface for custom proposers does not: which requests are in the
batch, which left it, and which draft tokens were verified. `ReportingScheduler` sends each request's counts with its
tokens.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler

from drafters.base import StepRecord
from service.engine.vllm.guard import DraftGuard
from service.engine.vllm.patches import hold_lifeline, mend_cpu_sampling
from service.engine.vllm.proposer import Row, VllmProposer
from service.engine.vllm.records import KEY, NO_DRAFTS_HERE, RequestOptions, Trace, pack_record

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

_ANY_LENGTH = 1 << 40
_NO_OPTIONS = RequestOptions()


class PipelineProposer:
    """vLLM's custom proposer, named in `speculative_config`. The model runner makes it, `DraftingWorker` feeds it."""

    def __init__(self, vllm_config: Any) -> None:
        self._config = vllm_config
        self._proposer: VllmProposer | None = None  # only on the rank whose drafts vLLM takes
        self._pipeline: Any = None
        self._runner: Any = None
        self._verified: dict[str, list[int]] = {}  # by request: draft tokens of the running step
        self._rows: dict[str, int] = {}  # by request: scheduled tokens of the running step
        self._states: dict[str, Tensor] = {}  # by request: [max tokens, hidden] what each token was predicted from

    def load_model(self, target_model: Any) -> None:
        """Load the pipeline that `additional_config` names, on the target's device."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        if not (get_tp_group().is_first_rank and get_pp_group().is_last_rank):
            return
        options = self._config.additional_config[KEY]
        module, _, name = options["pipeline"].partition(":")
        make: Callable[[Any, str], Any] = getattr(importlib.import_module(module), name)
        self._pipeline = make(options["settings"], str(next(target_model.parameters()).device))
        vocabulary_size = self._config.model_config.get_vocab_size()
        self._proposer = VllmProposer(self._pipeline, vocabulary_size, time.perf_counter)

    def attach(self, runner: Any) -> None:
        """Take the model runner, which knows the batch."""
        self._runner = runner

    @property
    def is_up(self) -> bool:
        return bool(getattr(self._pipeline, "drafter_up", True))

    @property
    def num_failures(self) -> int:
        """Failures that the pipeline contained itself."""
        return int(getattr(self._pipeline, "num_failures", 0))

    @property
    def description(self) -> str:
        return str(getattr(self._pipeline, "description", NO_DRAFTS_HERE))

    def begin(self, scheduler_output: Any) -> None:
        """Note that a step starts."""
        if self._proposer is None:
            return
        self._verified = scheduler_output.scheduled_spec_decode_tokens
        self._rows = scheduler_output.num_scheduled_tokens
        gone = [*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())]
        for request_id in gone:
            self._states.pop(request_id, None)
        self._proposer.begin(gone, self._rows)

    def keep_states(self, hidden_states: Tensor) -> None:
        """Keep a step's hidden states `[rows, hidden]` (after the final norm), for a drafter that reads them.

        The next step overwrites those of rejected drafts. Those of a cached prefix are unknown and stay zero.
        """
        if self._proposer is None or not getattr(self._pipeline, "reads_hidden_states", False):
            return
        begin = 0
        for request_id in self._runner.input_batch.req_ids:
            count, state = self._rows[request_id], self._runner.requests[request_id]
            kept = self._states.get(request_id)
            if kept is None:
                size = state.num_prompt_tokens + state.sampling_params.max_tokens + self._pipeline.max_draft_tokens + 2
                kept = self._states[request_id] = hidden_states.new_zeros(size, hidden_states.shape[1])
            first = state.num_computed_tokens + 1
            kept[first : first + count] = hidden_states[begin : begin + count]
            begin += count

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """See `service.engine.vllm.guard.Proposer.propose`."""
        if self._proposer is None:
            return [[] for _ in sampled_token_ids]
        return self._proposer.propose(self._batch(sampled_token_ids, num_tokens_no_spec, token_ids_cpu))

    def skip(self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any) -> None:
        """Note the same step while the pipeline is paused."""
        if self._proposer is not None:
            self._proposer.skip(self._batch(sampled_token_ids, num_tokens_no_spec, token_ids_cpu))

    def take_records(self) -> list[StepRecord]:
        return [] if self._proposer is None else self._proposer.take_records()

    def trace_of(self, name: str) -> Trace:
        return [] if self._proposer is None else self._proposer.trace_of(name)

    def calibrate(self) -> dict[int, float]:
        return {} if self._proposer is None else self._proposer.calibrate()

    def _batch(self, sampled: list[list[int]], num_tokens: Any, token_ids: Any) -> list[Row]:
        """Return the batch as rows of `VllmProposer`; their tokens are views."""
        requests = self._runner.requests
        rows = []
        for i, (request_id, drawn) in enumerate(zip(self._runner.input_batch.req_ids, sampled, strict=True)):
            state = requests[request_id]
            params = state.sampling_params
            num_prompt, length = state.num_prompt_tokens, int(num_tokens[i])
            num_rows, num_verified = self._rows.get(request_id, 0), len(self._verified.get(request_id, ()))
            options = (params.extra_args or {}).get(KEY)
            rows.append(
                Row(
                    request_id=request_id,
                    tokens=token_ids[i, :length],
                    num_sampled=len(drawn),
                    num_verified=num_verified,
                    num_rows=num_rows,
                    is_prefill=state.num_computed_tokens < num_prompt or num_rows > 1 + num_verified,
                    num_left=num_prompt + params.max_tokens - length,
                    temperature=params.temperature,
                    options=_NO_OPTIONS if options is None else RequestOptions.from_dict(options),
                    hidden_states=self._states[request_id][:length] if request_id in self._states else None,
                )
            )
        return rows


class DraftingWorker(PlatformWorker):
    """vLLM's worker, with our proposer, or any other custom proposer, behind a guard."""

    _guard: DraftGuard | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        hold_lifeline()
        mend_cpu_sampling()
        super().load_model(load_dummy_weights=load_dummy_weights)
        speculation = self.vllm_config.speculative_config
        if speculation is None or speculation.method != "custom_class" or not hasattr(self.model_runner, "drafter"):
            return
        runner = self.model_runner
        # vLLM drafts for no request at all once one is near the context's end. The guard bounds each draft by itself.
        runner.effective_drafter_max_model_len = _ANY_LENGTH
        options = self.vllm_config.additional_config.get(KEY, {})
        self._guard = DraftGuard(
            runner.drafter,
            self.model_config.get_vocab_size(),
            speculation.num_speculative_tokens,
            self.model_config.max_model_len,
            options.get("slow_seconds", 2.0),
            time.perf_counter,
        )
        runner.drafter = self._guard
        if self._ours is not None:
            self._ours.attach(runner)
            self._watch_hidden_states(self._guard, self._ours)

    def _watch_hidden_states(self, guard: DraftGuard, ours: PipelineProposer) -> None:
        """Show the proposer each step's hidden states, which vLLM shows to its own proposers only."""
        propose = self.model_runner.propose_draft_token_ids

        def keep_and_propose(
            scheduler_output: Any, sampled: Any, metadata: Any, hidden_states: Tensor, *arguments: Any, **named: Any
        ) -> Any:
            guard.contain(lambda: ours.keep_states(hidden_states))
            return propose(scheduler_output, sampled, metadata, hidden_states, *arguments, **named)

        self.model_runner.propose_draft_token_ids = keep_and_propose

    @property
    def _ours(self) -> PipelineProposer | None:
        """This project's proposer, if the guard guards one."""
        proposer: Any = None if self._guard is None else self._guard.proposer
        return proposer if isinstance(proposer, PipelineProposer) else None

    def execute_model(self, scheduler_output: Any) -> Any:
        guard, ours = self._guard, self._ours
        if guard is not None and ours is not None:
            guard.contain(lambda: ours.begin(scheduler_output))
        return super().execute_model(scheduler_output)

    # The service calls the following by name (`collective_rpc`); every rank answers.

    def diffuspec_report(self) -> dict[str, Any]:
        """Return the steps since the last call, and the drafter's health."""
        guard = self._guard
        if guard is None:
            return {"up": True, "failures": 0, "failure": "", "records": []}
        ours = self._ours
        return {
            "up": guard.is_up and (ours is None or ours.is_up),
            "failures": guard.num_failures + (0 if ours is None else ours.num_failures),
            "failure": guard.last_failure,
            "records": [] if ours is None else [pack_record(record) for record in ours.take_records()],
        }

    def diffuspec_describe(self) -> str:
        """Name what drafts here."""
        if self._guard is None:
            return ""
        return type(self._guard.proposer).__name__ if self._ours is None else self._ours.description

    def diffuspec_trace(self, name: str) -> list[list[Any]]:
        """Return the steps of one request."""
        return [] if self._ours is None else [list(step) for step in self._ours.trace_of(name)]

    def diffuspec_calibrate(self) -> list[list[float]]:
        """Set the pipeline's costs from the probe requests. Returns pairs of rows and seconds."""
        measured = {} if self._ours is None else self._ours.calibrate()
        return [[rows, seconds] for rows, seconds in measured.items()]


class ReportingScheduler(Scheduler):
    """vLLM's scheduler, which sends a request's counts with every output instead of only the last."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for batch in outputs.values():
            for output in batch.outputs:
                request = self.requests.get(output.request_id)
                metrics = output.spec_decode_metrics or (request and request.spec_decode_metrics)
                if metrics:
                    counts = {KEY: [metrics.num_draft_tokens, list(metrics.histogram)]}
                    output.kv_transfer_params = (output.kv_transfer_params or {}) | counts
        return outputs
