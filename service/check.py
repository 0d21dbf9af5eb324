"""`diffuspec check` and `diffuspec compile`: look at the models, or load them once, without serving."""

from dataclasses import dataclass
from typing import TextIO

from drafters.diffusion.vocabulary_map import VocabularyMap
from drafters.search.ngram import NgramError
from service.drafter_loading import PATHS, drafter_window
from service.folders import FolderFacts, relate
from service.footprint import PairFootprint, device_bytes, measure_bandwidth, model_footprint
from service.preflight import check_models
from service.settings import Settings
from service.text.tokenizer import TokenizerError
from service.wiring import MAX_DEFAULT_CONTEXT, build_tokenizer, load_parts
from transformer.config import CheckpointError

DEAR_PASS = 0.33  # of the target's step: a drafter that costs more needs uncommon acceptance
SHORT_BLOCK = 8  # tokens


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What the arithmetic is to assume."""

    context: int | None = None  # tokens per request; None: the service's
    batch: int = 1  # requests at a time
    bandwidth: float | None = None  # of the device's memory in GB/s; None: measured


def check(settings: Settings, output: TextIO, options: CheckOptions | None = None) -> int:
    """Print tables; returns 0 if the server could load this and it fits into memory, else 1."""
    options = options or CheckOptions()
    try:
        target, drafter = check_models(settings)
        free = device_bytes(settings.model.device)
    except (CheckpointError, ValueError) as error:
        print(f"diffuspec: {error}", file=output)
        return 1
    vocabularies = None if drafter is None else relate(target, drafter)
    left = _column(target)
    right = {"folder": settings.model.drafter_choice} if drafter is None else _column(drafter)
    _print_rows([("", "target", "drafter"), *((name, left[name], right.get(name, "")) for name in left)], output)
    if vocabularies is not None:
        print(f"\n{_vocabulary_sentence(vocabularies)}", file=output)
    context = options.context or settings.model.context_length
    context = context or min(target.config.max_positions, MAX_DEFAULT_CONTEXT)
    cost = _cost(settings, target, drafter, context, options)
    print(f"\nAs {settings.model.dtype} on {settings.model.device}, {options.batch} x {context} tokens:", file=output)
    _print_rows(_cost_rows(cost), output)
    fits = cost.num_bytes <= free
    words = "fits into" if fits else "does NOT fit into"
    print(f"\n{_gigabytes(cost.num_bytes)} in all {words} the {_gigabytes(free)} that are free.", file=output)
    for remark in _remarks(settings, drafter, vocabularies, context, cost):
        print(f"- {remark}", file=output)
    return 0 if fits else 1


def compile_kernels(settings: Settings, output: TextIO) -> int:
    """Load everything as `serve` would, which compiles what is not compiled yet, and let go of it."""
    try:
        load_parts(settings, build_tokenizer(settings.model.target).size, lambda what, done: None)
    except (CheckpointError, NgramError, TokenizerError, ValueError) as error:
        print(f"diffuspec: {error}", file=output)
        return 1
    return 0


def _column(facts: FolderFacts) -> dict[str, str]:
    config = facts.config
    masks = config.mask_token_ids
    return {
        "folder": str(facts.folder),
        "family": facts.family,
        "architecture": config.architecture,
        "layers": str(config.num_layers),
        "hidden size": str(config.hidden_size),
        "heads": f"{config.num_heads} over {config.num_key_value_heads}, {config.head_dim} wide",
        "parameters": f"{facts.num_parameters / 1e6:.2f}M",
        "weights": f"{facts.num_bytes / 1e6:.1f} MB ({', '.join(facts.dtypes)})",
        "trained context": f"{config.max_trained_tokens} tokens",
        "token ids": str(config.vocabulary_size),
        "tokenizer": "none" if facts.vocabulary is None else f"{len(facts.vocabulary)} tokens",
        "end tokens": ", ".join(map(str, config.end_token_ids)) or "none",
        "attention": config.attention + (f", block of {config.block_size}" if config.block_size else ""),
        "logits": "of the next position (shifted)" if _is_shifted(facts) else "of their own position",
        "mask tokens": "none" if not masks else str(masks[0]) if len(masks) == 1 else f"{len(masks)}, from {masks[0]}",
    }


def _is_shifted(facts: FolderFacts) -> bool:
    return facts.config.logits_shifted or facts.config.attention == "causal"


def _vocabulary_sentence(vocabularies: VocabularyMap) -> str:
    share = f"{vocabularies.num_shared} of the target's {vocabularies.num_target} tokens ({vocabularies.overlap:.1%})"
    same = f"{share} are the drafter's too, {vocabularies.num_same_id} under the same id"
    return f"The vocabularies are {vocabularies.relation}: {same}. The drafter {PATHS[vocabularies.relation]}."


def _cost(
    settings: Settings, target: FolderFacts, drafter: FolderFacts | None, context: int, options: CheckOptions
) -> PairFootprint:
    model = settings.model
    on_cpu = not model.device.startswith("cuda")
    bandwidth = options.bandwidth * 1e9 if options.bandwidth else measure_bandwidth(model.device)
    drafting = None
    if drafter is not None:
        window = min(drafter_window(settings, drafter.config), context)
        drafting = model_footprint(drafter.config, model.dtype, on_cpu, options.batch * window)
    return PairFootprint(
        target=model_footprint(target.config, model.dtype, on_cpu, options.batch * context),
        drafter=drafting,
        bandwidth=bandwidth,
        passes=settings.speculation.refinement_steps,
    )


def _cost_rows(cost: PairFootprint) -> list[tuple[str, str, str]]:
    target, drafter = cost.target, cost.drafter
    rows = [
        ("", "target", "drafter"),
        ("weights", _gigabytes(target.weight_bytes), "" if drafter is None else _gigabytes(drafter.weight_bytes)),
        (
            "keys and values",
            _gigabytes(target.cache_bytes),
            "" if drafter is None else _gigabytes(drafter.cache_bytes),
        ),
        (
            f"least time at {cost.bandwidth / 1e9:.0f} GB/s",
            f"{_milliseconds(cost.plain_seconds)} a step",
            "" if drafter is None else f"{_milliseconds(cost.draft_seconds)} a draft",
        ),
    ]
    if drafter is not None:
        rows.append(("break-even acceptance length", f"{cost.break_even:.2f} tokens per step", ""))
    return rows


def _remarks(
    settings: Settings,
    drafter: FolderFacts | None,
    vocabularies: VocabularyMap | None,
    context: int,
    cost: PairFootprint,
) -> list[str]:
    """What would be slow, or of little use."""
    if drafter is None or vocabularies is None:
        return []
    config, speculation = drafter.config, settings.speculation
    remarks = []
    if cost.draft_seconds > DEAR_PASS * cost.plain_seconds:
        share = cost.draft_seconds / cost.plain_seconds
        remarks.append(f"A draft costs {share:.0%} of a step: a smaller drafter, or a larger target, would pay sooner.")
    if vocabularies.relation == "overlapping":
        remarks.append("A draft ends where the drafter would write a token that the target lacks.")
    if vocabularies.relation == "disjoint":
        remarks.append("Text is tokenized twice at every draft, and no searched path crosses from one to the other.")
    if config.attention == "full":
        remarks.append(
            f"It sees in both directions: its cached context is an approximation, and read anew every "
            f"{speculation.refresh_passes} passes (speculation.refresh_passes)."
        )
    if 0 < config.block_size < SHORT_BLOCK:
        remarks.append(f"It drafts at most {config.block_size} tokens in a pass.")
    window = drafter_window(settings, config)
    if window < context:
        remarks.append(f"It reads at most the latest {window} tokens of a longer context (speculation.window_tokens).")
    if not settings.model.device.startswith("cuda") and drafter.num_parameters > 1e9:
        remarks.append("A model of more than a billion parameters on a CPU drafts slower than most targets decode.")
    return remarks


def _print_rows(rows: list[tuple[str, str, str]], output: TextIO) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=output)


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
