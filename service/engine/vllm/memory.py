"""The memory budget of the vLLM engine: target, KV cache and drafter together, worked out before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

from service.folders import read_folder
from transformer.config import CheckpointError
from transformer.folder import read_json
from transformer.weights import StoredTensor, read_headers

GIB = 1 << 30
BLOCK_TOKENS = 128  # what vLLM's largest usual block rounds a sequence up to
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them; weights of other types stay as they are


class MemoryBudgetError(CheckpointError):
    """Target, KV cache and drafter don't fit; the message names all three."""


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What the budget and the engine need to know of the target; any architecture that vLLM knows."""

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
    device: int  # all there is
    available: int  # of it, for this server

    @property
    def utilization(self) -> float:
        """vLLM's `gpu_memory_utilization`: the share of the device that target, KV cache and activations take."""
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
    """Give the KV cache what it wants or what is left. Raises MemoryBudgetError if that is less than `kv_least`.

    All in bytes; `kv_least` is one full context.
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


def drafter_bytes(folder: Path, dtype: str, num_slots: int, window: int) -> int:
    """Weights, cached prefixes and the logits of one pass of a diffusion drafter. Raises CheckpointError."""
    facts = read_folder(folder)
    config, size = facts.config, DTYPE_BYTES[dtype]
    block = config.block_size or 32
    per_token = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * size
    cache = num_slots * (window + block + 1) * per_token
    return facts.num_parameters * size + cache + num_slots * block * config.vocabulary_size * 4


def host_memory() -> tuple[int, int]:
    """(all, free) bytes of this machine, or of the container's limit if that is lower."""
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
