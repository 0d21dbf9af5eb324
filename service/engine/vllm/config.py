"""From this service's settings to vLLM's: environment, memory and engine arguments, worked out before anything loads.

Imports nothing heavy.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.drafter_loading import drafter_window
from service.engine.vllm.records import KEY
from service.folders import read_folder
from service.preflight import wants_drafter
from service.settings import Settings
from transformer.config import CheckpointError
from transformer.folder import read_json
from transformer.weights import StoredTensor, read_headers

MAX_DEFAULT_CONTEXT = 8192
OURS = "diffuspec"
PROPOSER = "service.engine.vllm.worker.PipelineProposer"
WORKER = "service.engine.vllm.worker.DraftingWorker"
SCHEDULER = "service.engine.vllm.worker.ReportingScheduler"

GIB = 1 << 30
BLOCK_TOKENS = 128  # vLLM rounds a sequence up to whole blocks; this is its largest usual block
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOATS = ("F64", "F32", "F16", "BF16")  # in the words of safetensors; weights of other types stay as they are


class MemoryBudgetError(CheckpointError):
    """Target, KV cache and drafter don't fit; the message names all three."""


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """The facts of a target that budget and engine need, of any architecture that vLLM knows."""

    vocabulary_size: int
    max_positions: int
    weight_bytes: int  # as loaded
    kv_bytes_per_token: int
    hidden_size: int

    @classmethod
    def from_folder(cls, folder: Path, dtype: str) -> "TargetFacts":
        """Read config.json and the headers of the weights. Raises CheckpointError."""
        raw = read_json(folder / "config.json")
        raw = raw.get("text_config") or raw
        size = DTYPE_BYTES[dtype]
        try:
            heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            head_dim = int(raw.get("head_dim") or hidden // heads)
            kv_heads = int(raw.get("num_key_value_heads") or heads)
            return cls(
                vocabulary_size=int(raw["vocab_size"]),
                max_positions=int(raw["max_position_embeddings"]),
                weight_bytes=sum(_loaded_bytes(tensor, size) for tensor in read_headers(folder).values()),
                kv_bytes_per_token=2 * int(raw["num_hidden_layers"]) * kv_heads * head_dim * size,
                hidden_size=hidden,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/config.json lacks a field or has a wrong one ({error!r}).") from None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device."""

    target: int
    kv_cache: int
    drafter: int
    activations: int
    device: int  # the whole device
    available: int  # the part of it that this server may use

    @property
    def utilization(self) -> float:
        """vLLM's `gpu_memory_utilization`: the share of the device that target, KV cache, drafter and activations
        take."""
        return min((self.target + self.kv_cache + self.drafter + self.activations) / self.device, 1.0)


def plan_memory(
    *,
    device: int,
    available: int,
    target: int,
    drafter: int,
    activations: int,
    kv_wanted: int,
    kv_least: int,
) -> MemoryPlan:
    """Give the KV cache the bytes that it wants, or all that are left. Raises MemoryBudgetError below `kv_least`.

    All in bytes; `kv_least` holds one full context.
    """
    left = available - target - drafter - activations
    if left < kv_least:
        raise MemoryBudgetError(
            f"The models don't fit: the target needs {_gib(target)}, the KV cache at least {_gib(kv_least)} "
            f"(one full context), the drafter {_gib(drafter)}, and activations {_gib(activations)}; "
            f"{_gib(available)} are available. Use a smaller drafter or a shorter model.context_length, or raise "
            f"vllm.memory_fraction."
        )
    return MemoryPlan(target, min(kv_wanted, left), drafter, activations, device, available)


def prepare_environment(settings: Settings) -> None:
    """Set vLLM's environment variables. Call it before vLLM is imported; its processes inherit them.

    Keeps what an operator has set already.
    """
    environment = {
        "VLLM_NO_USAGE_STATS": "1",  # vLLM reports to nobody
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": {"debug": "INFO"}.get(settings.logging.level, "WARNING"),
    }
    if settings.model.device == "cpu" and settings.model.num_threads is not None:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.model.num_threads)}
    if os.access(sys.prefix, os.W_OK):  # two environments with different versions of numba spoil a shared cache
        environment["NUMBA_CACHE_DIR"] = os.path.join(sys.prefix, "numba-cache")
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def max_draft_tokens(settings: Settings) -> int:
    """Return the service's largest draft on this engine; 0: no speculation at all."""
    if settings.vllm.method == "none":
        return 0
    if settings.vllm.method != OURS:
        return settings.vllm.method_tokens
    drafts = wants_drafter(settings) or settings.drafts_freely
    return settings.speculation.max_draft_tokens if drafts else 0


def context_length(settings: Settings, target: TargetFacts) -> int:
    """Return the most tokens of a sequence. Raises CheckpointError if the target was not made for so many."""
    length = settings.model.context_length or min(target.max_positions, MAX_DEFAULT_CONTEXT)
    if length > target.max_positions:
        raise CheckpointError(
            f"model.context_length is {length}, but the target was made for {target.max_positions} tokens."
        )
    return length


def batched_tokens(settings: Settings) -> int:
    """Return the rows of the largest step: every request's draft, and a piece of a prompt."""
    scheduler = settings.scheduler
    return scheduler.prefill_chunk_tokens + scheduler.max_running * (1 + max_draft_tokens(settings))


def budget(settings: Settings, target: TargetFacts, device_memory: tuple[int, int] | None = None) -> MemoryPlan:
    """Divide the memory of one device. Raises MemoryBudgetError.

    device_memory: (all, free) bytes; None: ask the device.
    """
    total, free = device_memory or _device_memory(settings.model.device)
    shards = settings.vllm.tensor_parallel_size
    share = shards * settings.vllm.pipeline_parallel_size
    max_running = settings.scheduler.max_running
    per_token = -(-target.kv_bytes_per_token // share)
    one_context = -(-context_length(settings, target) // BLOCK_TOKENS) * BLOCK_TOKENS
    wanted = settings.scheduler.kv_cache_tokens or max_running * one_context
    least = one_context + BLOCK_TOKENS  # vLLM keeps one block empty
    rows = max_running * (1 + max_draft_tokens(settings))
    logits = 3 * rows * target.vocabulary_size * 4  # as computed, in float32, and their probabilities
    return plan_memory(
        device=total,
        available=min(int(total * settings.vllm.memory_fraction), free),
        target=-(-target.weight_bytes // share),
        drafter=_drafter_bytes(settings),
        activations=logits + 8 * batched_tokens(settings) * target.hidden_size * 4,
        kv_wanted=max(wanted + BLOCK_TOKENS, least) * per_token,
        kv_least=least * per_token,
    )


def speculative_config(settings: Settings) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config`; None: no speculation."""
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


def engine_arguments(settings: Settings, target: TargetFacts, plan: MemoryPlan) -> dict[str, Any]:
    """Return keyword arguments for vLLM's `AsyncEngineArgs`."""
    model, vllm, scheduler = settings.model, settings.vllm, settings.scheduler
    speculation = speculative_config(settings)
    is_cpu = model.device == "cpu"
    arguments: dict[str, Any] = {
        "model": str(model.target),
        "served_model_name": model.public_name,
        "dtype": model.dtype,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "generation_config": "vllm",  # the request alone says how to sample, not the checkpoint
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
        # The same library has checked the structure before. With free whitespace, a weak model never stops indenting.
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
        if speculation["method"] == "custom_class":
            arguments["scheduler_cls"] = SCHEDULER
    return arguments


def _drafter_bytes(settings: Settings) -> int:
    """Weights, cached prefixes and the logits of one pass of the diffusion drafter. Raises CheckpointError."""
    if settings.vllm.method != OURS or not wants_drafter(settings):
        return 0
    folder, num_slots = Path(settings.model.drafter_choice), settings.scheduler.max_running
    facts, size = read_folder(folder), DTYPE_BYTES[settings.model.dtype]
    config = facts.config
    block, window = config.block_size or 32, drafter_window(settings, config)
    per_token = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * size
    cache = num_slots * (window + block + 1) * per_token
    return facts.num_parameters * size + cache + num_slots * block * config.vocabulary_size * 4


def _device_memory(device: str) -> tuple[int, int]:
    """Return (all, free) bytes."""
    if device == "cpu":
        return _host_memory()
    # In a process of its own: the question initialises CUDA, which takes some hundred MB and forbids forking later.
    question = f"import torch; print(*torch.cuda.mem_get_info({device!r}))"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise CheckpointError(f"The memory of {device} cannot be asked for: {answer.stderr.strip().splitlines()[-1]}")
    free, total = map(int, answer.stdout.split())
    return total, free


def _host_memory() -> tuple[int, int]:
    """Return (all, free) bytes of this machine, or of the container's limit if that is lower."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit_path, used_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = int(Path(limit_path).read_text()), int(Path(used_path).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        total, free = min(total, limit), min(free, limit - used)
    return total, free


def _loaded_bytes(tensor: StoredTensor, size: int) -> int:
    is_quantised = tensor.dtype not in FLOATS
    return tensor.num_bytes if is_quantised else tensor.num_entries * size


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
