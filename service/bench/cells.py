"""The configurations that are compared: settings of the service, and the two that no setting gives."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from drafters.base import CausalModelName, Draft, DraftingCost, DraftRequest, Pipeline, PolicyName, StepRecord
from drafters.search import prompt_lookup
from service.bench.records import Role
from service.setting_groups import PROMPT_LOOKUP
from service.settings import Settings
from service.speculation_settings import SpeculationSettings
from service.wiring import build_pipeline
from transformer.config import TransformerConfig
from transformer.model import Transformer

Kind = Literal["service", "prompt-lookup"]
DrafterUse = Literal["none", "real", "garbage"]


PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration; what it does not override is as the settings say."""

    name: str
    meaning: str
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the speculation settings
    drafter: DrafterUse = "none"
    kind: Kind = "service"
    is_usual: bool = False  # measured if nothing else is asked for

    @property
    def role(self) -> Role:
        if self.name == PLAIN:
            return "reference"
        return "free" if self.drafter == "none" else "other"


def _diffusion_cell(mode: Literal["cps", "argmax"], policy: PolicyName) -> Cell:
    """The diffusion drafter by itself: nothing else drafts, and what the search knows only judges its candidates."""
    path = "the searched path (CPS)" if mode == "cps" else "each position's best token"
    overrides: dict[str, Any] = {"free_drafts": False, "search": mode == "cps", "policy": policy}
    overrides["lattice_weight_decay"] = 1.0  # the paper's search
    if policy == "paper":
        overrides["max_draft_tokens"] = 32  # the paper drafts 20 to 30 tokens
    meaning = f"diffusion alone, {path}, length policy {policy}"
    return Cell(f"{mode}-{policy}", meaning, overrides, drafter="real", is_usual=policy == "goodput")


def _free_cell(name: str, causal_model: CausalModelName, meaning: str, is_usual: bool = False) -> Cell:
    """What is drafted without a model."""
    return Cell(
        name, meaning, {"policy": "goodput", "free_drafts": True, "causal_model": causal_model}, is_usual=is_usual
    )


CELLS = (
    Cell(PLAIN, "no drafts", {"max_draft_tokens": 0}, is_usual=True),
    Cell("prompt-lookup", "published prompt lookup, always the same length", kind="prompt-lookup", is_usual=True),
    _free_cell("own-text", "text", "the request's own text, length policy goodput"),
    _free_cell("ngram", "ngram", "the n-gram model alone, length policy goodput"),
    _free_cell("free", "mixed", "both of them, length policy goodput: the best draft without a model", is_usual=True),
    *(_diffusion_cell("argmax", policy) for policy in ("fixed", "paper", "goodput")),
    *(_diffusion_cell("cps", policy) for policy in ("fixed", "paper", "goodput")),
    Cell(
        "default", "the settings as they are: all sources joined, length policy goodput", drafter="real", is_usual=True
    ),
    Cell(
        "garbage",
        "a drafter as costly and as sure as the real one, and wrong; length policy goodput",
        {"free_drafts": False, "search": False, "policy": "goodput"},
        drafter="garbage",
    ),
)


class UnknownCellError(Exception):
    """A name that is no cell's, or a cell that needs a drafter where there is none."""


def choose_cells(names: Sequence[str] | None, everything: bool, has_drafter: bool) -> list[Cell]:
    """The cells to measure, `plain` always first: by name, all, or the usual ones.

    A name may go on with speculation settings of its own: `cps-fixed+refinement_steps=2`. Raises UnknownCellError.
    """
    if names is None:
        return [cell for cell in CELLS if (everything or cell.is_usual) and (has_drafter or cell.drafter == "none")]
    chosen = [find_cell(name) for name in dict.fromkeys([PLAIN, *names])]
    for cell in chosen:
        if cell.drafter != "none" and not has_drafter:
            raise UnknownCellError(f"the cell {cell.name!r} needs a diffusion drafter: name its folder with --drafter")
    return chosen


def find_cell(name: str) -> Cell:
    """The cell of that name, with the settings that are added to it. Raises UnknownCellError."""
    known = {cell.name: cell for cell in CELLS}
    base, *added = name.split("+")
    if base not in known:
        raise UnknownCellError(f"unknown cell {base!r}; there are {', '.join(known)}")
    cell = known[base]
    if not added:
        return cell
    if base == PLAIN or cell.kind != "service":
        raise UnknownCellError(f"the cell {base!r} takes no settings")
    overrides = dict(cell.overrides)
    for assignment in added:
        setting, _, value = assignment.partition("=")
        overrides[setting] = value
    try:
        checked = SpeculationSettings.model_validate(overrides)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UnknownCellError(f"{name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    overrides = {setting: getattr(checked, setting) for setting in overrides}
    return replace(cell, name=name, meaning=f"{cell.meaning}; {', '.join(added)}", overrides=overrides)


@dataclass(frozen=True, slots=True)
class Models:
    """Loaded once, shared by all cells."""

    target: TransformerConfig
    drafters: Mapping[DrafterUse, Transformer]


def build(cell: Cell, settings: Settings, models: Models) -> Pipeline:
    """The cell's own pipeline, over shared weights."""
    speculation = settings.speculation.model_copy(update=dict(cell.overrides))
    if cell.kind == "prompt-lookup":
        return PromptLookupDrafting(speculation.fixed_draft_tokens)
    changed = settings.model_copy(update={"speculation": speculation})
    if cell.drafter == "none":  # without a model, whatever the settings say of one: what drafts freely is measured
        changed = changed.model_copy(update={"model": settings.model.model_copy(update={"drafter": PROMPT_LOOKUP})})
    drafter = models.drafters.get(cell.drafter) if speculation.diffusion else None
    return build_pipeline(changed, models.target, drafter)


class ShiftedTransformer(Transformer):
    """A drafter's weights made useless: every logit is given to the next token id."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor, num_tokens: int | None = None) -> Tensor:
        return super().logits(hidden, num_tokens).roll(1, dims=1)


class PromptLookupDrafting:
    """Published prompt lookup: the baseline that knows nothing of costs."""

    description = "prompt lookup"
    drafter_up = True
    num_failures = 0

    def __init__(self, num_tokens: int) -> None:
        """Always drafts `num_tokens`, where the text has something to copy."""
        self.max_draft_tokens = num_tokens
        self.last_cost = DraftingCost()

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int = 0) -> list[Draft]:
        started = time.perf_counter()
        drafts = []
        for request in requests:
            length = min(request.max_draft_tokens, self.max_draft_tokens)
            tokens = prompt_lookup.propose(request.tokens, length)
            drafts.append(Draft(tokens, "free") if tokens else Draft(bypass_reason="no_candidates"))
        self.last_cost = DraftingCost(time.perf_counter() - started)
        return drafts

    def observe(self, step: StepRecord) -> None: ...

    def release(self, request_id: str) -> None: ...

    def calibrate(
        self, verify_seconds: Mapping[int, float], plain_seconds: Mapping[int, float] | None = None
    ) -> None: ...
