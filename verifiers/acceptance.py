"""Accept the draft tokens that the target would have drawn itself.

The draft counts as a point mass. A draft from a search is no sample of any distribution, so the ratio test of
speculative sampling (DiffuSpec, Eq. 6) would not be exact. Comparing with the target's own draw always is.
"""

from collections.abc import Sequence

from verifiers.base import Verification


def num_matching(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """Return the length of the common prefix of the draft and the target's own draws."""
    for index, token in enumerate(draft):
        if token != drawn[index]:
            return index
    return len(draft)


def accept(draft: Sequence[int], drawn: Sequence[int]) -> Verification:
    """Accept the draft up to its first difference from `drawn` [len(draft) + 1]; the token drawn there comes next."""
    num_accepted = num_matching(draft, drawn)
    return Verification(num_accepted, drawn[num_accepted])
