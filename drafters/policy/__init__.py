"""Decides how much to draft, from what is accepted and what steps cost (docs/decisions/0012)."""

from drafters.policy.paper import PaperOptions
from drafters.policy.policy import Policy, PolicyOptions

__all__ = ["PaperOptions", "Policy", "PolicyOptions"]
