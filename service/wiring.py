"""The composition root: builds engine, pipeline and metrics from the settings. Only this module chooses between kinds.

Heavy imports wait: `load_parts` imports torch in the engine's own thread, so the server can answer meanwhile.
"""

import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client import CollectorRegistry

from drafters.base import DraftRequest, Pipeline, PolicyName
from service.drafter_loading import BuiltDrafter, build_drafter
from service.engine.audit import AuditedEngine, AuditOptions
from service.engine.base import Engine
from service.engine.embedded import EmbeddedEngine
from service.engine.scheduler import SchedulerLimits
from service.folders import find_mismatch, read_folder
from service.metrics import ServiceMetrics
from service.preflight import wants_drafter
from service.setting_groups import NO_DRAFTER
from service.settings import Settings
from service.text.tokenizer import TextTokenizer
from transformer.config import CheckpointError, TransformerConfig
from verifiers.base import SamplingRules, Verifier, VerifyRequest

if TYPE_CHECKING:
    from drafters.pipeline import DraftPipeline
    from drafters.search.causal_model import CausalModel
    from transformer.model import Transformer

Progress = Callable[[str, float], None]

MAX_DEFAULT_CONTEXT = 8192  # the full context of a hub model, times the slots, would not fit into memory


def build_metrics(settings: Settings) -> ServiceMetrics:
    speculation = settings.speculation
    return ServiceMetrics(
        CollectorRegistry(),
        settings.model.public_name,
        speculation.policy,
        speculation.max_draft_tokens,
        own_names_only=settings.model.engine == "vllm",  # vLLM counts under its own names
    )


def build_engine(settings: Settings, metrics: ServiceMetrics) -> tuple[Engine, Callable[[], TextTokenizer]]:
    """Build the engine, not yet started, and a function that loads its tokenizer."""
    load_tokenizer = functools.cache(lambda: build_tokenizer(settings.model.target))
    if settings.model.engine == "vllm":
        return build_vllm_engine(settings, metrics), load_tokenizer

    def load(progress: Progress) -> tuple[Verifier, Pipeline]:
        return load_parts(
            settings,
            load_tokenizer().size,
            progress,
            lambda built: metrics.show_vocabulary(built.vocabularies.relation, built.vocabularies.overlap),
        )

    limits = SchedulerLimits(
        max_running=settings.scheduler.max_running,
        max_waiting=settings.scheduler.max_waiting,
        max_waiting_tokens=settings.scheduler.max_waiting_tokens,
        prefill_chunk_tokens=settings.scheduler.prefill_chunk_tokens,
        kv_cache_tokens=settings.scheduler.kv_cache_tokens,
        reuse_prefixes=settings.scheduler.prefix_cache,
    )
    hang_seconds = settings.scheduler.hang_seconds
    engine = EmbeddedEngine(load, limits, (metrics.observe,), hung_after_seconds=hang_seconds)
    return audited(engine, settings, metrics), load_tokenizer


def audited(engine: Engine, settings: Settings, metrics: ServiceMetrics, *, greedy_only: bool = False) -> Engine:
    """Wrap the engine in the runtime audit if the settings want one. greedy_only: its draws have no position keys."""
    audit = settings.audit
    if audit.fraction == 0:
        return engine
    options = AuditOptions(audit.fraction, audit.idle_seconds, audit.max_pending, greedy_only)
    return AuditedEngine(
        engine,
        options,
        report=lambda audit: metrics.observe_audit(audit.is_failed),
        report_error=metrics.observe_audit_error,
        draw=random.random,
    )


def build_vllm_engine(settings: Settings, metrics: ServiceMetrics) -> Engine:
    """Build the vLLM engine. Its worker runs the pipeline of `load_vllm_pipeline`."""
    from service.engine.vllm.engine import VllmEngine

    engine = VllmEngine(settings, (metrics.observe,), metrics.observe_drafter_failures)
    metrics.pass_through()
    return audited(engine, settings, metrics, greedy_only=True)


def load_vllm_pipeline(content: Mapping[str, Any], device: str) -> "DraftPipeline":
    """Load the drafting pipeline in vLLM's worker process, from the settings sent there, on the target's device."""
    import torch

    from transformer.model import Transformer

    settings = Settings(**content)
    target = TransformerConfig.read(settings.model.target)
    dtype: torch.dtype = getattr(torch, settings.model.dtype)
    drafter = _load_drafter(settings, lambda folder: Transformer.load(folder, device, dtype))
    pipeline = build_pipeline(settings, target, drafter)
    pipeline.reads_hidden_states = drafter is not None and drafter.config.target_hidden_size > 0
    warm_up(pipeline)
    return pipeline


def build_tokenizer(target: Path) -> TextTokenizer:
    """Load the target's tokenizer. Raises CheckpointError or TokenizerError."""
    return TextTokenizer.read(target, TransformerConfig.read(target).end_token_ids)


def load_parts(
    settings: Settings, num_tokens: int, progress: Progress, on_drafter: Callable[[BuiltDrafter], None] | None = None
) -> "tuple[Verifier, DraftPipeline]":
    """Load the target and its drafting pipeline. `num_tokens`: the tokenizer's length.

    on_drafter: is called with the diffusion drafter once it is built, if there is one.

    Raises CheckpointError, NgramError or ValueError.
    """
    progress("importing torch", 0.0)
    import torch

    from transformer.model import Transformer
    from verifiers.torch_lm import TorchVerifier

    model = settings.model
    if model.threads_choice is not None:
        torch.set_num_threads(model.threads_choice)  # holds for this thread, which is the engine's
    dtype: torch.dtype = getattr(torch, model.dtype)

    def load_model(folder: Path, name: str, begin: float, end: float) -> Transformer:
        def report(done: float) -> None:
            progress(f"reading the {name}", begin + (end - begin) * done)

        report(0.0)
        return Transformer.load(folder, model.device, dtype, report)

    target = load_model(model.target, "target", 0.1, 0.6)
    context = model.context_length or min(target.config.max_positions, MAX_DEFAULT_CONTEXT)
    if context > target.config.max_positions:
        raise CheckpointError(
            f"model.context_length is {context}, but the target supports at most {target.config.max_positions} tokens."
        )
    drafter = _load_drafter(settings, lambda folder: load_model(folder, "drafter", 0.6, 0.9))
    is_conditioned = drafter is not None and drafter.config.target_hidden_size > 0
    verifier = TorchVerifier(target, settings.scheduler.max_running, context, num_tokens, is_conditioned)
    progress("compiling the drafting kernels (kept for the next start)", 0.9)
    pipeline = build_pipeline(settings, target.config, drafter, on_drafter)
    warm_up(pipeline)
    warm_up_verifier(verifier)
    return verifier, pipeline


def warm_up_verifier(verifier: Verifier) -> None:
    """Draw once in every way, so that no request waits for numba's compiler."""
    for rules in (SamplingRules(0, temperature=0.0), SamplingRules(0), SamplingRules(0, top_p=0.5)):
        verifier.verify([VerifyRequest(0, [0, 0], 2, 0, 2, (0, 0), rules)])


def warm_up(pipeline: "DraftPipeline") -> None:
    """Draft once by every policy, so that no request waits for numba's compiler."""
    import numpy as np

    tokens = np.arange(32, dtype=np.int32) % 8  # a repeating text, so that there is something to copy
    for policy in get_args(PolicyName):
        request_id = f"warm-up-{policy}"
        for length in (len(tokens) - 2, len(tokens)):  # the second call learns from the first
            pipeline.propose([DraftRequest(request_id, tokens[:length], pipeline.max_draft_tokens, policy)])
        pipeline.release(request_id)


def _load_drafter(settings: Settings, load_model: "Callable[[Path], Transformer]") -> "Transformer | None":
    if not wants_drafter(settings):
        return None
    choice = settings.model.drafter_choice
    mismatch = find_mismatch(read_folder(settings.model.target), read_folder(Path(choice)))
    if mismatch is not None:
        raise CheckpointError(mismatch)
    return load_model(Path(choice))


def build_pipeline(
    settings: Settings,
    target: TransformerConfig,
    drafter: "Transformer | None",
    on_drafter: Callable[[BuiltDrafter], None] | None = None,
) -> "DraftPipeline":
    """Build the drafting pipeline: a diffusion model, the request's own text, n-grams, some of them, or nothing."""
    from drafters.pipeline import DraftPipeline
    from drafters.policy import PaperOptions, PolicyOptions
    from drafters.search.lattice import LatticeOptions
    from drafters.search.path_search import PathSearch

    speculation = settings.speculation
    max_draft_tokens = speculation.max_draft_tokens if drafter is not None or settings.drafts_freely else 0
    causal = _build_causal(settings, target) if max_draft_tokens else None
    diffusion, search, names = None, None, []
    if drafter is not None and causal is not None:
        built = build_drafter(settings, target, drafter)
        diffusion = built.drafter
        if on_drafter is not None:
            on_drafter(built)
        search = PathSearch(
            causal,
            target.end_token_ids,
            speculation.beam_width,
            speculation.lattice_weight,
            speculation.lattice_weight_decay,
            mode="search" if speculation.search else "argmax",
            use_proposals=speculation.free_drafts,
        )
        names.append(built.description)
    if causal is not None and settings.drafts_freely:
        if causal.use_copy:
            names.append("own text")
        if causal.has_ngrams:
            names.append("n-grams")
    options = PolicyOptions(
        policy=speculation.policy,
        max_draft_tokens=max_draft_tokens,
        fixed_length=speculation.fixed_draft_tokens,
        diffusion_length=speculation.diffusion_draft_tokens,
        paper=PaperOptions(
            min_length=speculation.paper_min_draft_tokens,
            max_length=speculation.paper_max_draft_tokens,
            increment=speculation.paper_growth_tokens,
            ema_rate=speculation.paper_ema_rate,
        ),
    )
    lattice = LatticeOptions(speculation.candidate_mass, speculation.max_candidates, target.end_token_ids)
    description = " + ".join(names) or NO_DRAFTER
    return DraftPipeline(causal, search, diffusion, options, description, lattice, free_drafts=settings.drafts_freely)


def _build_causal(settings: Settings, target: TransformerConfig) -> "CausalModel":
    from drafters.search.causal_model import CausalModel
    from drafters.search.ngram import NgramModel

    folder, speculation = settings.model.ngram_folder, settings.speculation
    return CausalModel(
        target.vocabulary_size,
        NgramModel.load(folder) if folder is not None and speculation.reads_ngrams else None,
        end_tokens=target.end_token_ids,
        use_copy=speculation.reads_text,
    )
