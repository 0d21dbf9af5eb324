"""From this service's settings to vLLM's: environment and engine arguments. Imports nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from service.drafter_loading import drafter_window
from service.engine.vllm.memory import (
    BLOCK_TOKENS,
    MemoryPlan,
    TargetFacts,
    drafter_bytes,
    host_memory,
    plan_memory,
)
from service.engine.vllm.step_packing import KEY
from service.preflight import wants_drafter
from service.settings import Settings
from transformer.config import CheckpointError, TransformerConfig

MAX_DEFAULT_CONTEXT = 8192
OURS = "diffuspec"
PROPOSER = "service.engine.vllm.worker.PipelineProposer"
WORKER = "service.engine.vllm.worker.DraftingWorker"
SCHEDULER = "service.engine.vllm.worker.ReportingScheduler"


def prepare_environment(settings: Settings) -> None:
    """Set what vLLM reads from the environment; before it is imported, and inherited by its processes.

    What an operator has set already stays.
    """
    environment = {
        "VLLM_NO_USAGE_STATS": "1",  # no reports to anybody
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": {"debug": "INFO"}.get(settings.logging.level, "WARNING"),
    }
    if settings.model.device == "cpu" and settings.model.num_threads is not None:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.model.num_threads)}
    if os.access(sys.prefix, os.W_OK):  # beside another environment's numba each would undo what the other compiled
        environment["NUMBA_CACHE_DIR"] = os.path.join(sys.prefix, "numba-cache")
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def max_draft_tokens(settings: Settings) -> int:
    """The service's largest draft on this engine; 0: no speculation at all."""
    if settings.vllm.method == "none":
        return 0
    if settings.vllm.method != OURS:
        return settings.vllm.method_tokens
    drafts = wants_drafter(settings) or settings.drafts_freely
    return settings.speculation.max_draft_tokens if drafts else 0


def context_length(settings: Settings, target: TargetFacts) -> int:
    """Raises CheckpointError if the target was not made for the length that is asked for."""
    length = settings.model.context_length or min(target.max_positions, MAX_DEFAULT_CONTEXT)
    if length > target.max_positions:
        raise CheckpointError(
            f"model.context_length is {length}, but the target was made for {target.max_positions} tokens."
        )
    return length


def speculative_config(settings: Settings) -> dict[str, Any] | None:
    """vLLM's `speculative_config`."""
    count, method = max_draft_tokens(settings), settings.vllm.method
    if count == 0:
        return None
    if method == OURS:
        return {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": count}
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": count}
    if settings.vllm.method_model is not None:
        config["model"] = settings.vllm.method_model
    if method == "ngram":
        config |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    return config | settings.vllm.speculative_config


def budget(settings: Settings, target: TargetFacts, device_memory: tuple[int, int] | None = None) -> MemoryPlan:
    """Memory of one device. `device_memory`: (all, free) bytes; None: asked of the device. Raises MemoryBudgetError."""
    total, free = device_memory or _device_memory(settings.model.device)
    shards = settings.vllm.tensor_parallel_size
    share = shards * settings.vllm.pipeline_parallel_size
    length, running = context_length(settings, target), settings.scheduler.max_running
    per_token = -(-target.kv_bytes_per_token // share)
    full = running * -(-length // BLOCK_TOKENS) * BLOCK_TOKENS
    wanted = settings.scheduler.kv_cache_tokens or full
    least = -(-length // BLOCK_TOKENS) * BLOCK_TOKENS + BLOCK_TOKENS  # and vLLM's empty block
    rows = running * (1 + max_draft_tokens(settings))
    logits = 3 * rows * target.vocabulary_size * 4  # as they come, in float32, and their probabilities
    return plan_memory(
        device=total,
        available=min(int(total * settings.vllm.memory_fraction), free),
        target=-(-target.weight_bytes // share),
        drafter=_drafter_bytes(settings),
        activations=logits + 8 * batched_tokens(settings) * target.hidden_size * 4,
        kv_wanted=max(wanted + BLOCK_TOKENS, least) * per_token,
        kv_least=least * per_token,
    )


def batched_tokens(settings: Settings) -> int:
    """Rows of the largest step: everyone's draft, and a piece of a prompt."""
    scheduler = settings.scheduler
    return scheduler.prefill_chunk_tokens + scheduler.max_running * (1 + max_draft_tokens(settings))


def engine_arguments(settings: Settings, target: TargetFacts, plan: MemoryPlan) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs`."""
    model, vllm, scheduler = settings.model, settings.vllm, settings.scheduler
    speculation = speculative_config(settings)
    is_cpu = model.device == "cpu"
    is_ours = speculation is not None and speculation["method"] == "custom_class"
    arguments: dict[str, Any] = {
        "model": str(model.target),
        "served_model_name": model.public_name,
        "dtype": model.dtype,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "generation_config": "vllm",  # sampling is what a request says
        "max_model_len": context_length(settings, target),
        "max_num_seqs": scheduler.max_running,
        "max_num_batched_tokens": batched_tokens(settings),
        "long_prefill_token_threshold": scheduler.prefill_chunk_tokens,
        "enable_prefix_caching": scheduler.prefix_cache,
        "scheduling_policy": "priority",
        "gpu_memory_utilization": round(plan.utilization, 4),
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "pipeline_parallel_size": vllm.pipeline_parallel_size,
        "distributed_executor_backend": vllm.distributed_executor,
        "quantization": vllm.quantization,
        "enforce_eager": is_cpu if vllm.enforce_eager is None else vllm.enforce_eager,
        "max_logprobs": 20,
        # By the library that checked the structure before; with free whitespace a weak model never stops indenting.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "seed": 0,
        "enable_log_requests": False,
        "speculative_config": speculation,
        "worker_cls": WORKER,
        "additional_config": {
            KEY: {
                "pipeline": vllm.pipeline,
                "settings": settings.model_dump(mode="json", exclude={"auth", "server"}),
                "slow_seconds": vllm.slow_draft_seconds,
            }
        },
    }
    if is_cpu:
        arguments["kv_cache_memory_bytes"] = plan.kv_cache
    if speculation is not None:
        arguments["per_request_spec_decode_metrics"] = "summary"
    if is_ours:
        arguments["scheduler_cls"] = SCHEDULER
    return arguments


def _drafter_bytes(settings: Settings) -> int:
    if settings.vllm.method != OURS or not wants_drafter(settings):
        return 0
    folder = Path(settings.model.drafter_choice)
    window = drafter_window(settings, TransformerConfig.from_folder(folder))
    return drafter_bytes(folder, settings.model.dtype, settings.scheduler.max_running, window)


def _device_memory(device: str) -> tuple[int, int]:
    if device == "cpu":
        return host_memory()
    # In a process of its own: asking initialises CUDA, which holds some hundred MB and forbids forking ever after.
    question = f"import torch; print(*torch.cuda.mem_get_info({device!r}))"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise CheckpointError(f"The memory of {device} cannot be asked for: {answer.stderr.strip().splitlines()[-1]}")
    free, total = map(int, answer.stdout.split())
    return total, free
