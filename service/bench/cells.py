"""The configurations that are compared, each with a drafting pipeline of its own over shared weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafters import prompt_lookup
from drafters.base import Draft, DraftRequest, PolicyName, StepRecord
from drafters.causal_scorer import CausalModel
from drafters.diffusion import DiffusionDrafter, MaskedRequest
from drafters.lattice import LatticeOptions
from drafters.length import PaperLengthOptions
from drafters.ngram import NgramModel
from drafters.path_search import PathSearch
from drafters.pipeline import DraftPipeline, PipelineOptions
from service.engine.drafting import Drafting
from service.settings import SpeculationSettings
from transformer.model import Transformer

FIXED_LENGTH = 8  # tokens


@dataclass(frozen=True, slots=True)
class Parts:
    """What the pipelines are made of; loaded once, shared by all."""

    drafter: Transformer | None
    ngram: NgramModel | None
    vocabulary_size: int
    end_tokens: tuple[int, ...]
    num_slots: int
    speculation: SpeculationSettings

    def pipeline(
        self,
        policy: PolicyName,
        causal: CausalModel | None,
        drafter: DiffusionDrafter | None = None,
        search: PathSearch | None = None,
    ) -> DraftPipeline:
        options = self.speculation
        paper = PaperLengthOptions(
            options.paper_min_draft_tokens,
            options.paper_max_draft_tokens,
            options.paper_growth_tokens,
            options.paper_ema_rate,
        )
        longest = max(options.max_draft_tokens, paper.longest) if policy == "paper" else options.max_draft_tokens
        lattice = LatticeOptions(options.candidate_mass, options.max_candidates, self.end_tokens)
        pipeline_options = PipelineOptions(
            policy=policy, max_draft_tokens=longest, fixed_length=FIXED_LENGTH, paper=paper, lattice=lattice
        )
        return DraftPipeline(causal, search, drafter, pipeline_options, description=policy)

    def causal(self, copying: bool, ngram: bool = True) -> CausalModel:
        model = self.ngram if ngram else None
        return CausalModel(self.vocabulary_size, model, end_tokens=self.end_tokens, use_copy=copying)

    def search(self, causal: CausalModel, mode: Literal["search", "argmax"] = "search") -> PathSearch:
        options = self.speculation
        return PathSearch(causal, self.end_tokens, options.beam_width, options.lattice_weight, mode=mode)

    def diffusion(self, kind: type[DiffusionDrafter] = DiffusionDrafter) -> DiffusionDrafter:
        assert self.drafter is not None  # cells that need one are left out without it
        window = self.speculation.window_tokens
        if window is None:
            return kind(self.drafter, self.num_slots, self.vocabulary_size)
        return kind(self.drafter, self.num_slots, self.vocabulary_size, window)


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration."""

    name: str
    meaning: str
    build: Callable[[Parts], Drafting]
    needs_drafter: bool = False
    is_usual: bool = False  # measured if nothing else is asked for


def _diffusion_cell(mode: Literal["search", "argmax"], policy: PolicyName, is_usual: bool = False) -> Cell:
    """The diffusion drafter by itself: no draft is copied, and the search knows n-grams alone."""
    path = "the searched path (CPS)" if mode == "search" else "each position's best token"

    def build(parts: Parts) -> Drafting:
        return parts.pipeline(policy, None, parts.diffusion(), parts.search(parts.causal(copying=False), mode))

    name = f"{'cps' if mode == 'search' else 'argmax'}-{policy}"
    return Cell(name, f"diffusion alone, {path}, length policy {policy}", build, needs_drafter=True, is_usual=is_usual)


def _default(parts: Parts) -> Drafting:
    causal = parts.causal(copying=True)
    return parts.pipeline("goodput", causal, parts.diffusion(), parts.search(causal))


def _garbage(parts: Parts) -> Drafting:
    causal = parts.causal(copying=False, ngram=False)
    return parts.pipeline("goodput", None, parts.diffusion(ShuffledDrafter), parts.search(causal, "argmax"))


class ShuffledDrafter(DiffusionDrafter):
    """Costs what the real drafter costs, is as sure of itself, and is wrong: its vocabulary is shuffled."""

    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        logits = super().propose(requests)
        order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(0))
        return logits[:, order.to(logits.device)]


class PromptLookupDrafting:
    """Published prompt lookup at a fixed length: the baseline that knows nothing of costs."""

    description = "prompt lookup"
    last_draft_seconds = last_search_seconds = 0.0
    last_diffusion_rows = 0

    def __init__(self, max_draft_tokens: int) -> None:
        self.max_draft_tokens = max_draft_tokens

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
        drafts = []
        for request in requests:
            length = min(request.max_draft_tokens, self.max_draft_tokens)
            tokens = prompt_lookup.propose(request.tokens, length)
            drafts.append(Draft(tokens, "copy") if tokens else Draft(bypass_reason="no_candidates"))
        return drafts

    def observe(self, step: StepRecord) -> None: ...

    def release(self, request_id: str) -> None: ...

    def calibrate(self, verify_seconds: Mapping[int, float]) -> None: ...


PLAIN = "plain"
CELLS = (
    Cell(PLAIN, "no drafts", lambda parts: PromptLookupDrafting(0), is_usual=True),
    Cell(
        "prompt-lookup",
        f"published prompt lookup, always {FIXED_LENGTH} tokens",
        lambda parts: PromptLookupDrafting(FIXED_LENGTH),
        is_usual=True,
    ),
    Cell(
        "copy",
        "the request's own text, length policy goodput",
        lambda parts: parts.pipeline("goodput", parts.causal(copying=True, ngram=False)),
    ),
    Cell(
        "free",
        "the request's own text and n-grams, length policy goodput: the best draft without a model",
        lambda parts: parts.pipeline("goodput", parts.causal(copying=True)),
        is_usual=True,
    ),
    _diffusion_cell("argmax", "fixed"),
    _diffusion_cell("argmax", "paper"),
    _diffusion_cell("argmax", "goodput", is_usual=True),
    _diffusion_cell("search", "fixed"),
    _diffusion_cell("search", "paper"),
    _diffusion_cell("search", "goodput", is_usual=True),
    Cell("default", "everything joined, length policy goodput", _default, needs_drafter=True, is_usual=True),
    Cell("garbage", "a drafter that is always sure and wrong, length policy goodput", _garbage, needs_drafter=True),
)


class UnknownCellError(Exception):
    """A name that is no cell's, or a cell that needs a drafter where there is none."""


def choose_cells(names: Sequence[str] | None, everything: bool, has_drafter: bool) -> list[Cell]:
    """The cells to measure, `plain` always first: by name, all, or the usual ones. Raises UnknownCellError."""
    known = {cell.name: cell for cell in CELLS}
    if names is None:
        return [cell for cell in CELLS if (everything or cell.is_usual) and (has_drafter or not cell.needs_drafter)]
    for name in names:
        if name not in known:
            raise UnknownCellError(f"unknown cell {name!r}; there are {', '.join(known)}")
        if known[name].needs_drafter and not has_drafter:
            raise UnknownCellError(f"the cell {name!r} needs a diffusion drafter: name its folder with --drafter")
    return [known[name] for name in dict.fromkeys([PLAIN, *names])]
