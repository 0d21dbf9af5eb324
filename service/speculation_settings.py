"""The settings of drafting and path search."""

from pydantic import Field

from drafters.base import CausalModelName, PolicyName
from service.setting_groups import SettingsGroup


class SpeculationSettings(SettingsGroup):
    policy: PolicyName = Field(
        default="goodput",
        description="Who decides how much is drafted: `goodput` (most committed tokens per second, from what is "
        "measured while serving), `paper` (DiffuSpec's rule) or `fixed` (always `fixed_draft_tokens`).",
    )
    max_draft_tokens: int = Field(
        default=32, ge=0, le=128, description="Most tokens drafted for one request in one step."
    )
    fixed_draft_tokens: int = Field(default=8, ge=0, le=128, description="`fixed` policy: tokens of a draft.")
    diffusion_draft_tokens: int = Field(
        default=6, ge=1, le=128, description="`goodput` policy: most tokens of a draft of the diffusion model."
    )
    search: bool = Field(
        default=True, description="Search the lattice for the best path; off: each position's best token."
    )
    diffusion: bool = Field(default=True, description="Let the diffusion model draft.")
    causal_model: CausalModelName = Field(
        default="mixed",
        description="What judges a path from left to right: n-grams fitted offline (`ngram`), the request's own text "
        "(`text`), both (`mixed`) or nothing (`uniform`).",
    )
    free_drafts: bool = Field(
        default=True,
        description="Draft without a model, too: copies of the request's own text, and n-grams. Off: the causal model "
        "only judges what the diffusion model proposes.",
    )
    beam_width: int = Field(default=2, ge=1, le=64, description="Paths kept while searching (the paper's B, 3 there).")
    candidate_mass: float = Field(
        default=0.8, gt=0, le=1, description="Probability mass of a position's candidates (τ)."
    )
    max_candidates: int = Field(default=15, ge=1, le=64, description="Most candidates of a position (M_max).")
    lattice_weight: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the diffusion model's score against the causal model's (λ)."
    )
    lattice_weight_decay: float = Field(
        default=0.5, ge=0, le=1, description="Factor on λ from one position of a draft to the next; the paper's is 1."
    )
    window_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Most tokens of context that the drafter reads; never more than it was trained on. Unset: 256, or "
        "32 for a drafter that is given the target's hidden states, which say what stood before; its window begins "
        "with the latest 12 and grows to 32.",
    )
    refresh_passes: int = Field(
        default=16,
        ge=0,
        description="Drafters that see in both directions: passes until the cached context is read anew, which happens "
        "too when acceptance falls; 1 reads it at every pass, 0 only then.",
    )
    refinement_steps: int = Field(
        default=1, ge=1, le=64, description="Passes per diffusion draft; each fills in the surest tokens for the next."
    )
    draft_part_tokens: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Draft so many tokens in a pass, and go on after them in another one if they are sure enough; "
        "0: all in one pass.",
    )
    draft_part_confidence: float = Field(
        default=0.9, ge=0, le=1, description="Least probability of every token of a part for the next to be drafted."
    )
    paper_min_draft_tokens: int = Field(default=20, ge=1, le=128, description="`paper` policy: shortest draft (k_min).")
    paper_max_draft_tokens: int = Field(
        default=30, ge=1, le=128, description="`paper` policy: longest draft (k_max); `max_draft_tokens` bounds it too."
    )
    paper_growth_tokens: int = Field(default=10, ge=0, le=128, description="`paper` policy: growth step (δ).")
    paper_ema_rate: float = Field(
        default=0.5, gt=0, le=1, description="`paper` policy: rate of the moving averages (ρ)."
    )

    @property
    def reads_text(self) -> bool:
        """Whether the causal model knows the request's own text."""
        return self.causal_model in ("mixed", "text")

    @property
    def reads_ngrams(self) -> bool:
        """Whether the causal model knows n-grams, where there are any."""
        return self.causal_model in ("mixed", "ngram")
