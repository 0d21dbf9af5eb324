"""The settings of drafting and path search."""

from pydantic import Field

from drafters.base import CausalModelName, PolicyName
from service.setting_groups import SettingsGroup


class SpeculationSettings(SettingsGroup):
    """The making and the length of drafts. These settings change speed, never the text's distribution."""

    policy: PolicyName = Field(
        default="goodput",
        description="Policy that decides how much is drafted: `goodput` (maximises committed tokens per second, as "
        "measured while serving), `paper` (DiffuSpec's rule) or `fixed` (always `fixed_draft_tokens`).",
    )
    max_draft_tokens: int = Field(
        default=32,
        ge=0,
        le=128,
        description="Maximum number of tokens drafted for one request in one step. 0: plain decoding.",
    )
    fixed_draft_tokens: int = Field(default=8, ge=0, le=128, description="`fixed` policy: tokens of a draft.")
    diffusion_draft_tokens: int = Field(
        default=6, ge=1, le=128, description="`goodput` policy: maximum tokens of a diffusion draft."
    )
    search: bool = Field(
        default=True, description="Search the lattice for the best path. Off: take the best token of each position."
    )
    diffusion: bool = Field(default=True, description="Let the diffusion model draft.")
    causal_model: CausalModelName = Field(
        default="mixed",
        description="Knowledge of the causal model, which scores a path from left to right: n-grams fitted offline "
        "(`ngram`), the request's own text (`text`), both (`mixed`) or nothing (`uniform`).",
    )
    free_drafts: bool = Field(
        default=True,
        description="Draft without a model too, from copies of the request's own text and from n-grams. Off: the "
        "causal model only scores what the diffusion model proposes.",
    )
    beam_width: int = Field(
        default=2, ge=1, le=64, description="Number of paths kept during the search (B; 3 in the paper)."
    )
    candidate_mass: float = Field(
        default=0.8, gt=0, le=1, description="Probability mass that the candidates of a position cover (τ)."
    )
    max_candidates: int = Field(
        default=15, ge=1, le=64, description="Maximum number of candidates per position (M_max)."
    )
    lattice_weight: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the diffusion model's score against the causal model's (λ)."
    )
    lattice_weight_decay: float = Field(
        default=0.5, ge=0, le=1, description="Factor on λ from one position of a draft to the next; 1 in the paper."
    )
    window_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Maximum number of context tokens that the drafter reads, at most as many as it was trained "
        "on. Unset: 256, or 32 for a drafter that reads the target's hidden states, which already "
        "summarise the earlier text; that window starts with the latest 12 tokens and grows to 32.",
    )
    refresh_passes: int = Field(
        default=16,
        ge=0,
        description="Drafters that see in both directions: number of passes after which the cached context is read "
        "again. It is also read again when acceptance falls. 1: at every pass. 0: only when acceptance "
        "falls.",
    )
    refinement_steps: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Passes per diffusion draft. Each fills in the most certain tokens for the next.",
    )
    draft_part_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Draft this many tokens per pass, and continue with another pass while they are certain "
        "enough. 0: the whole draft in one pass.",
    )
    draft_part_confidence: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Minimum probability that every token of one part must have before the next part is drafted.",
    )
    paper_min_draft_tokens: int = Field(default=20, ge=1, le=128, description="`paper` policy: shortest draft (k_min).")
    paper_max_draft_tokens: int = Field(
        default=30, ge=1, le=128, description="`paper` policy: longest draft (k_max). `max_draft_tokens` bounds it too."
    )
    paper_growth_tokens: int = Field(default=10, ge=0, le=128, description="`paper` policy: growth step (δ).")
    paper_ema_rate: float = Field(
        default=0.5, gt=0, le=1, description="`paper` policy: rate of the moving averages (ρ)."
    )

    @property
    def reads_text(self) -> bool:
        """True if the causal model knows the request's own text."""
        return self.causal_model in ("mixed", "text")

    @property
    def reads_ngrams(self) -> bool:
        """True if the causal model knows n-grams, where there are any."""
        return self.causal_model in ("mixed", "ngram")
