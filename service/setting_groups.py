"""The settings of each part of the service: names, allowed values and descriptions.

`--help`, `docs/settings.md` and `.env.example` are made from the descriptions here and in
`service.speculation_settings`: run `make settings` after a change.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

BUNDLED_MODELS = Path(__file__).resolve().parent.parent / "models"
PROMPT_LOOKUP = "prompt-lookup"
NO_DRAFTER = "none"


class SettingsGroup(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ServerSettings(SettingsGroup):
    """The address, the bounds on what clients send, and HTTPS."""

    host: str = Field(default="127.0.0.1", description="Address to listen on. `0.0.0.0`: every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on. 0: any free one.")
    drain_seconds: float = Field(
        default=30.0, ge=0, description="Seconds that running requests may still take after SIGTERM."
    )
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="Largest request body, in bytes.")
    body_seconds: float = Field(
        default=30.0, gt=0, description="Seconds that a client may take to send a request body."
    )
    unread_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="A client that reads nothing for this many seconds is cut off. It can take up to twice as long.",
    )
    request_seconds: float | None = Field(
        default=None, gt=0, description="Maximum seconds for one request. Unset: no limit."
    )
    max_header_bytes: int = Field(default=32768, ge=1024, description="Largest head of a request, in bytes.")
    max_connections: int = Field(
        default=1024,
        ge=1,
        description="Maximum number of open connections. Requests on further ones get 503, except probes and metrics.",
    )
    tls_certificate: Path | None = Field(
        default=None, description="File with the certificate chain (PEM), to serve HTTPS. Needs `tls_key`."
    )
    tls_key: Path | None = Field(default=None, description="File with the certificate's private key (PEM).")
    keep_alive_seconds: int = Field(default=75, ge=1, description="Seconds that an idle connection is kept open.")

    @model_validator(mode="after")
    def _check_tls(self) -> "ServerSettings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self


class ModelSettings(SettingsGroup):
    """Target, drafter, number format and device."""

    engine: Literal["embedded", "vllm"] = Field(
        default="embedded",
        description="Engine that runs the target: `embedded` (this project's torch engine) or `vllm` (`make "
        "setup-vllm`).",
    )
    target: Path = Field(
        default=BUNDLED_MODELS / "target",
        description="Folder (safetensors) or GGUF file of the target, the model whose text is served. Or its name on "
        "the hub, after `diffuspec pull`.",
    )
    drafter: str | None = Field(
        default=None,
        description="Folder or hub name of the diffusion drafter, or `prompt-lookup` (free drafts only), or "
        "`none`. Unset: the bundled drafter for the bundled target, else `prompt-lookup`.",
    )
    ngram: Path | None = Field(
        default=None,
        description="Folder of an n-gram model over the target's token ids. Unset: the bundled one for the bundled "
        "target, else none.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name in `/v1/models`. Unset: `diffuspec-python` for the bundled pair, else the folder's or "
        "file's name.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "none"] = Field(
        default="auto",
        description="Format in which the target writes tool calls: `hermes` (Qwen2.5, Qwen3), `llama3_json`, or "
        "`auto` (the chat template tells). `none`: the target's text is not searched for calls; only "
        "forced calls work.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of weights and arithmetic."
    )
    device: str = Field(default="cpu", description="Torch device, such as `cpu` or `cuda:0`.")
    context_length: int | None = Field(
        default=None,
        ge=2,
        description="Maximum tokens of prompt and output together. Unset: the target's own maximum.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads for torch. Unset: one for the bundled pair, which is too small to use more; else "
        "torch decides.",
    )

    @property
    def is_bundled(self) -> bool:
        return self.target.resolve() == (BUNDLED_MODELS / "target").resolve()

    @property
    def threads_choice(self) -> int | None:
        """CPU threads for torch, defaults resolved. None: torch decides."""
        return 1 if self.num_threads is None and self.is_bundled else self.num_threads

    @property
    def drafter_choice(self) -> str:
        """A folder, `prompt-lookup` or `none`, defaults resolved."""
        if self.drafter is not None:
            return self.drafter
        return str(BUNDLED_MODELS / "drafter") if self.is_bundled else PROMPT_LOOKUP

    @property
    def ngram_folder(self) -> Path | None:
        return BUNDLED_MODELS / "ngram" if self.ngram is None and self.is_bundled else self.ngram

    @property
    def public_name(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        if self.is_bundled:
            return "diffuspec-python"
        return self.target.name.removesuffix(".gguf") if self.target.is_file() else self.target.resolve().name


class SchedulerSettings(SettingsGroup):
    """Limits on running and waiting requests, and the size of the KV cache."""

    max_running: int = Field(
        default=32, ge=1, le=1024, description="Maximum number of sequences generated at the same time."
    )
    max_waiting: int = Field(
        default=256, ge=0, description="Maximum number of sequences in the queue. Beyond it requests get 429."
    )
    max_waiting_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of prompt and output tokens in the queue. Unset: only the sequences are counted.",
    )
    prefill_chunk_tokens: int = Field(
        default=256, ge=1, description="Maximum number of prompt tokens read in one step."
    )
    kv_cache_tokens: int | None = Field(
        default=None, ge=1, description="Size of the KV cache in tokens. Unset: `max_running` full contexts."
    )
    prefix_cache: bool = Field(default=True, description="Reuse the keys and values of prompts that share a beginning.")
    hang_seconds: float = Field(
        default=60.0, gt=0, description="A step that takes more seconds than this counts as hung, and the probes fail."
    )


class VllmSettings(SettingsGroup):
    """Only used with `model.engine = vllm`."""

    method: str = Field(
        default="diffuspec",
        min_length=1,
        description="Drafting method: `diffuspec` (this project's pipeline), `none`, or one of vLLM's own methods: "
        "`ngram`, `suffix`, `draft_model`, `eagle3`, `dflash`, ...",
    )
    method_tokens: int = Field(default=8, ge=1, le=128, description="vLLM's own methods: tokens of a draft.")
    method_model: str | None = Field(
        default=None, description="vLLM's own methods: folder of the draft model, if the method has one."
    )
    speculative_config: dict[str, Any] = Field(
        default={}, description="vLLM's own methods: more keys of vLLM's `speculative_config`, as JSON."
    )
    pipeline: str = Field(
        default="service.wiring:load_vllm_pipeline",
        pattern=r"[\w.]+:\w+",
        description="`diffuspec` method: `module:function` that makes the pipeline in vLLM's worker. Name your own "
        "to plug in a drafter.",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="Number of devices that share each layer of the target."
    )
    pipeline_parallel_size: int = Field(
        default=1, ge=1, description="Number of groups of devices that share the layers."
    )
    distributed_executor: Literal["mp", "ray"] | None = Field(
        default=None,
        description="Way to start workers: `mp` on one machine, `ray` across machines. Unset: vLLM decides by the "
        "number of devices.",
    )
    quantization: str | None = Field(
        default=None, description="vLLM's name of a quantisation. Unset: the checkpoint's own."
    )
    enforce_eager: bool | None = Field(
        default=None, description="Run the target without compiling it. Unset: only on a CPU."
    )
    memory_fraction: float = Field(
        default=0.9, gt=0, le=1, description="Share of the device's memory for target, drafter and KV cache together."
    )
    slow_draft_seconds: float = Field(
        default=2.0,
        gt=0,
        description="A drafting call that takes more seconds counts as a failure: requests are decoded plainly for "
        "a while.",
    )


class LimitSettings(SettingsGroup):
    """Bounds on the fields of one request, and on compiling its structures."""

    max_choices: int = Field(default=16, ge=1, le=128, description="Largest `n`.")
    max_prompts: int = Field(default=64, ge=1, description="Maximum number of prompts in one completion request.")
    max_sequences: int = Field(default=128, ge=1, description="Maximum number of prompts times `n` in one request.")
    max_logit_bias: int = Field(default=1024, ge=0, description="Maximum number of entries of `logit_bias`.")
    max_bad_words: int = Field(default=128, ge=0, description="Maximum number of entries of `bad_words`.")
    max_structure_characters: int = Field(
        default=65536,
        ge=1,
        description="Maximum length of a JSON schema, regular expression or grammar, in characters.",
    )
    structure_seconds: float = Field(
        default=5.0, gt=0, description="Seconds that a request may wait until its structure is compiled."
    )
    structure_cache_size: int = Field(default=64, ge=0, description="Number of compiled structures kept for reuse.")
    max_tools: int = Field(default=128, ge=1, description="Maximum number of tools in a chat request.")
    max_messages: int = Field(default=1024, ge=1, description="Maximum number of messages in a chat request.")


class AuditSettings(SettingsGroup):
    """Checks losslessness on live requests: decodes some again without speculation and compares."""

    fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the requests that are audited, in idle time.",
    )
    idle_seconds: float = Field(
        default=1.0, ge=0, description="Seconds that the engine must have been idle before it audits."
    )
    max_pending: int = Field(default=64, ge=1, description="Maximum number of requests that wait for their audit.")


class AuthSettings(SettingsGroup):
    """Keys that clients need. Without any, the API is open."""

    api_keys: tuple[SecretStr, ...] = Field(
        default=(),
        description="Keys that clients may send as `Authorization: Bearer KEY`, each in plain text or as `sha256:` "
        "and its hash. Without any keys, here or in a file, the API is open.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="TOML file with a `[[keys]]` table per key: its hash, limits and expiry. `diffuspec key` "
        "prints an entry.",
    )
    open_metrics: bool = Field(default=False, description="Answer `/metrics` without a key, for Prometheus.")
    api_keys_file: Path | None = Field(
        default=None,
        description="File with more keys in the form of `api_keys`, one per line, without limits. Lines that begin "
        "with # are comments.",
    )

    @model_validator(mode="before")
    @classmethod
    def _add_keys_of_file(cls, given: Any) -> Any:
        """Refuse a file without a key: someone who names a file does not want an open server."""
        if not isinstance(given, dict) or given.get("api_keys_file") is None:
            return given
        try:
            lines = Path(given["api_keys_file"]).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            raise ValueError("the file of API keys cannot be read") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ValueError("the file of API keys has no key in it")
        return {**given, "api_keys": (*given.get("api_keys", ()), *keys)}


class LoggingSettings(SettingsGroup):
    """One line per request, on stderr; prompts are never logged."""

    format: Literal["text", "json"] = Field(default="text", description="Format of the log: `text` or `json`.")
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged."
    )
