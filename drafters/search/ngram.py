"""The static n-gram model over the target's token ids: compact arrays on disk, mapped into memory.

A context's successors are stored together, each with its discounted share on a scale of 256 levels. The rest of the
probability goes to the context that is one token shorter (interpolation), down to the unigram. So one walk over the
successors of at most `order - 1` contexts gives the whole distribution, which always sums to one.
Contexts are found by hash, a bucket and then a fingerprint of 16 bits, from the shortest to the first that is absent.
About one absent context in 15,000 is mistaken for another one. That costs a draft and never an output.
"""

import json
import math
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from drafters.base import Tokens
from drafters.search.kernels.ngram import MAX_ORDER, NgramArrays, enter_context, new_workspace

MAX_SUCCESSORS = 255  # per context
LEVELS_PER_NAT = 25.0
LEVEL_PROBABILITIES = (0.9995 * np.exp(-np.arange(256) / LEVELS_PER_NAT)).astype(np.float32)  # down to 4e-5, 4% apart
FORMAT = 1

_FILES: dict[str, tuple[np.dtype[Any], ...]] = {
    "bucket_contexts": (np.dtype(np.uint32),),
    "fingerprints": (np.dtype(np.uint16),),
    "successor_counts": (np.dtype(np.uint8),),
    "tokens": (np.dtype(np.uint16), np.dtype(np.uint32)),
    "levels": (np.dtype(np.uint8),),
    "unigram": (np.dtype(np.float32),),
}


class NgramError(ValueError):
    """The folder holds no usable n-gram model. The message says which file and why."""


class NgramModel:
    """A fitted n-gram model. Read-only: one instance serves every request and thread."""

    def __init__(self, arrays: NgramArrays, source: str = "n-gram model") -> None:
        """Check that the arrays fit together, because the kernels don't. Raises NgramError, which names `source`."""
        _check(arrays, source)
        self.arrays = arrays

    @property
    def vocabulary_size(self) -> int:
        return len(self.arrays.unigram)

    @property
    def order(self) -> int:
        return self.arrays.order

    @property
    def num_bytes(self) -> int:
        """Size of the stored arrays."""
        return sum(getattr(self.arrays, name).nbytes for name in _FILES)

    @classmethod
    def uniform(cls, vocabulary_size: int) -> Self:
        """Return a model that knows nothing: every token is equally likely in every context."""
        return cls(
            assemble(
                order=1,
                bucket_contexts=np.zeros(2, np.uint32),
                fingerprints=np.zeros(0, np.uint16),
                successor_counts=np.zeros(0, np.uint8),
                tokens=np.zeros(0, np.uint16),
                levels=np.zeros(0, np.uint8),
                unigram=np.full(vocabulary_size, 1.0 / vocabulary_size, np.float32),
            )
        )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Map the arrays that `save` wrote. Raises NgramError if a file is missing, damaged or of another format."""
        description = folder / "ngram.json"
        try:
            stated = json.loads(description.read_text())
            order, version = int(stated["order"]), int(stated["format"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NgramError(f"{description} cannot be read: {error}") from error
        if version != FORMAT:
            raise NgramError(f"{description} has format {version}; this version reads format {FORMAT}: fit it again")
        arrays: dict[str, NDArray[Any]] = {}
        for name in _FILES:
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise NgramError(f"{path} cannot be read: {error}") from error
            if arrays[name].dtype not in _FILES[name] or arrays[name].ndim != 1:
                raise NgramError(f"{path} holds {arrays[name].dtype} of {arrays[name].ndim} dimensions: damaged")
        if int(arrays["successor_counts"].sum(dtype=np.int64)) != len(arrays["tokens"]):
            raise NgramError(f"{folder}: successor_counts.npy and tokens.npy do not fit together: damaged")
        return cls(assemble(order=order, **arrays), str(folder))

    def save(self, folder: Path) -> None:
        """Write `ngram.json` and one .npy file per array."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", getattr(self.arrays, name))
        stated = {"format": FORMAT, "order": self.order, "vocabulary_size": self.vocabulary_size}
        (folder / "ngram.json").write_text(json.dumps(stated, indent=2) + "\n")

    def distribution(self, context: Tokens) -> NDArray[np.float32]:
        """Return the probability of every token after `context`: [vocabulary], sums to one. For evaluation."""
        work = new_workspace(self.vocabulary_size, 0)
        text = np.ascontiguousarray(context, np.int32)
        _, rest = enter_context(self.arrays, text, text[:0], 0, work)
        return (work.sums + np.float32(rest) * self.arrays.unigram).astype(np.float32)

    def log_probability(self, token: int, context: Tokens) -> float:
        """Return the natural log of `p(token | context)`."""
        return math.log(max(float(self.distribution(context)[token]), 1e-30))


def assemble(
    *,
    order: int,
    bucket_contexts: NDArray[Any],
    fingerprints: NDArray[Any],
    successor_counts: NDArray[Any],
    tokens: NDArray[Any],
    levels: NDArray[Any],
    unigram: NDArray[Any],
) -> NgramArrays:
    """Join the stored arrays with those derived from them. All are read-only, so that one compiled kernel fits all."""
    before = np.zeros(len(successor_counts) + 1, np.uint32)
    np.cumsum(successor_counts, dtype=np.uint32, out=before[1:])
    first = np.minimum(bucket_contexts[:-1], len(successor_counts))
    arrays = NgramArrays(
        order, bucket_contexts, before[first], fingerprints, successor_counts, tokens, levels,
        LEVEL_PROBABILITIES.copy(), unigram,
    )  # fmt: skip
    for array in arrays[1:]:
        array.setflags(write=False)
    return arrays


def _check(arrays: NgramArrays, source: str) -> None:
    contexts, successors = len(arrays.fingerprints), len(arrays.tokens)
    starts = arrays.bucket_contexts.astype(np.int64)
    problems = {
        f"order {arrays.order} is not in 1..{MAX_ORDER}": not 1 <= arrays.order <= MAX_ORDER,
        "the unigram is empty": len(arrays.unigram) == 0,
        "the unigram does not sum to one": abs(float(arrays.unigram.sum(dtype=np.float64)) - 1.0) > 1e-3,
        "there are no buckets": len(starts) < 2,
        "the buckets do not cover the contexts": len(starts) > 0
        and (starts[0] != 0 or starts[-1] != contexts or bool((np.diff(starts) < 0).any())),
        "each context needs one count": len(arrays.successor_counts) != contexts,
        "each successor needs one level": len(arrays.levels) != successors,
        "the counts do not add up to the successors": int(arrays.successor_counts.sum(dtype=np.int64)) != successors,
        "a successor is outside the vocabulary": successors > 0 and int(arrays.tokens.max()) >= len(arrays.unigram),
    }
    for problem, present in problems.items():
        if present:
            raise NgramError(f"{source}: {problem}; the files are damaged or not of one model: fit it again")
