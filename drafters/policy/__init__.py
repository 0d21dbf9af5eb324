"""How much to draft: what tokens are accepted, what steps cost, and the lengths that pay (ADR 12)."""

from drafters.policy.paper import PaperOptions
from drafters.policy.policy import Policy, PolicyOptions

__all__ = ["PaperOptions", "Policy", "PolicyOptions"]
