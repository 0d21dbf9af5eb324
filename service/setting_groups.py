"""The settings of each part of the service: what they are called, what they may be, and what they mean.

`--help`, the README's table and `.env.example` are made from the descriptions here and in
`service.speculation_settings` (see `service.settings`).
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
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    drain_seconds: float = Field(
        default=30.0, ge=0, description="After SIGTERM, how long running requests may still take."
    )
    max_body_bytes: int = Field(default=1 << 20, ge=1024, description="Largest request body, in bytes.")
    body_seconds: float = Field(default=30.0, gt=0, description="How long a client may take to send a request body.")
    unread_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="How long a client may read nothing of what it is sent, up to twice as long, until it is cut off.",
    )
    request_seconds: float | None = Field(
        default=None, gt=0, description="Longest time for one request; unset: no limit."
    )
    max_header_bytes: int = Field(default=32768, ge=1024, description="Longest head of a request, in bytes.")
    max_connections: int = Field(
        default=1024, ge=1, description="Most open connections; beyond it requests get 503, but for probes and metrics."
    )
    tls_certificate: Path | None = Field(
        default=None, description="File with the certificate chain (PEM), to serve HTTPS. Needs `tls_key`."
    )
    tls_key: Path | None = Field(default=None, description="File with the certificate's private key (PEM).")
    keep_alive_seconds: int = Field(default=75, ge=1, description="How long an idle connection is kept open.")

    @model_validator(mode="after")
    def _check_tls(self) -> "ServerSettings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self


class ModelSettings(SettingsGroup):
    engine: Literal["embedded", "vllm"] = Field(
        default="embedded",
        description="What runs the target: `embedded` (this project's torch engine) or `vllm` (`make setup-vllm`).",
    )
    target: Path = Field(
        default=BUNDLED_MODELS / "target",
        description="Folder of the target, the model whose text is served (safetensors), or its name on the hub if "
        "`diffuspec pull` has fetched it.",
    )
    drafter: str | None = Field(
        default=None,
        description="Folder or name of the diffusion drafter, or `prompt-lookup`, or `none`. "
        "Unset: the bundled drafter for the bundled target, else `prompt-lookup`.",
    )
    ngram: Path | None = Field(
        default=None,
        description="Folder of an n-gram model over the target's token ids. "
        "Unset: the bundled one for the bundled target, else only what a request's own text teaches.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name in `/v1/models`. Unset: `diffuspec-python` for the bundled pair, else the folder's name.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "none"] = Field(
        default="auto",
        description="How the target writes tool calls: `hermes` (Qwen2.5, Qwen3), `llama3_json`, or `auto`: by its "
        "chat template. `none`: calls are not looked for, only required ones are to be had.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of weights and arithmetic."
    )
    device: str = Field(default="cpu", description="torch device, such as `cpu` or `cuda:0`.")
    context_length: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of prompt and output together. Unset: what the target was made for.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads for torch. Unset: one for the bundled pair, which is too small for more; else torch "
        "decides.",
    )

    @property
    def is_bundled(self) -> bool:
        return self.target.resolve() == (BUNDLED_MODELS / "target").resolve()

    @property
    def threads_choice(self) -> int | None:
        """CPU threads for torch, with the default worked out; None: torch decides."""
        return 1 if self.num_threads is None and self.is_bundled else self.num_threads

    @property
    def drafter_choice(self) -> str:
        """A folder, `prompt-lookup` or `none`, with the default worked out."""
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
        return "diffuspec-python" if self.is_bundled else self.target.resolve().name


class SchedulerSettings(SettingsGroup):
    max_running: int = Field(default=32, ge=1, le=1024, description="Most sequences generated at the same time.")
    max_waiting: int = Field(default=256, ge=0, description="Most sequences in the queue; beyond it requests get 429.")
    max_waiting_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of prompts and outputs in the queue. Unset: no bound of their own."
    )
    prefill_chunk_tokens: int = Field(default=256, ge=1, description="Most prompt tokens read in one step.")
    kv_cache_tokens: int | None = Field(
        default=None, ge=1, description="Tokens whose keys and values are held. Unset: `max_running` full contexts."
    )
    prefix_cache: bool = Field(default=True, description="Reuse the keys and values of prompts that share a beginning.")
    hang_seconds: float = Field(default=60.0, gt=0, description="A step that takes longer counts as hung: probes fail.")


class VllmSettings(SettingsGroup):
    """Only read with `model.engine = vllm`."""

    method: str = Field(
        default="diffuspec",
        min_length=1,
        description="Who drafts: `diffuspec` (this project's pipeline), `none`, or one of vLLM's own methods: `ngram`, "
        "`suffix`, `draft_model`, `eagle3`, `dflash`, ...",
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
        description="`diffuspec` method: `module:function` that makes the pipeline in vLLM's worker; for drafters of "
        "your own.",
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="Devices that share each layer of the target.")
    pipeline_parallel_size: int = Field(default=1, ge=1, description="Groups of devices that share the layers.")
    distributed_executor: Literal["mp", "ray"] | None = Field(
        default=None, description="How workers are started: `mp` on one machine, `ray` across machines. Unset: by size."
    )
    quantization: str | None = Field(
        default=None, description="vLLM's name of a quantisation. Unset: the checkpoint's."
    )
    enforce_eager: bool | None = Field(
        default=None, description="Run the target without compiling it. Unset: only on a CPU."
    )
    memory_fraction: float = Field(
        default=0.9, gt=0, le=1, description="Share of the device's memory for target, drafter and KV cache together."
    )
    slow_draft_seconds: float = Field(
        default=2.0, gt=0, description="A drafting call that takes longer counts as failed: plain decoding for a while."
    )


class LimitSettings(SettingsGroup):
    max_choices: int = Field(default=16, ge=1, le=128, description="Largest `n`.")
    max_prompts: int = Field(default=64, ge=1, description="Most prompts in one completion request.")
    max_sequences: int = Field(default=128, ge=1, description="Most prompts times `n` of one request.")
    max_logit_bias: int = Field(default=1024, ge=0, description="Most entries of `logit_bias`.")
    max_bad_words: int = Field(default=128, ge=0, description="Most entries of `bad_words`.")
    max_structure_characters: int = Field(
        default=65536, ge=1, description="Longest JSON schema, regular expression or grammar."
    )
    structure_seconds: float = Field(
        default=5.0, gt=0, description="How long a request may wait for its structure to be compiled."
    )
    structure_cache_size: int = Field(default=64, ge=0, description="Compiled structures that are kept.")
    max_tools: int = Field(default=128, ge=1, description="Most tools of a chat request.")
    max_messages: int = Field(default=1024, ge=1, description="Most messages of a chat request.")


class AuditSettings(SettingsGroup):
    fraction: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of the requests that are decoded again without speculation, in idle time, and compared.",
    )
    idle_seconds: float = Field(
        default=1.0, ge=0, description="How long the engine must have been idle before it audits."
    )
    max_pending: int = Field(default=64, ge=1, description="Most requests that wait for their audit.")


class AuthSettings(SettingsGroup):
    api_keys: tuple[SecretStr, ...] = Field(
        default=(),
        description="Keys that clients may send as `Authorization: Bearer KEY`, each as it is or as `sha256:` and its "
        "hash. Without these and a file of keys none is asked for.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="TOML file with a `[[keys]]` table for each key: its hash, limits and expiry (`diffuspec key`).",
    )
    open_metrics: bool = Field(default=False, description="Answer `/metrics` without a key, for Prometheus.")
    api_keys_file: Path | None = Field(
        default=None,
        description="File with more such keys, one a line, without limits; lines that begin with # are comments.",
    )

    @model_validator(mode="before")
    @classmethod
    def _add_keys_of_file(cls, given: Any) -> Any:
        """A file without a key is refused: whoever names one does not want an open server."""
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
    format: Literal["text", "json"] = Field(
        default="text", description="One line of text or of JSON per request, on stderr."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )
