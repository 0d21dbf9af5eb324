"""Token arrays: the corpus encoded once and cached, and seeded windows of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from models.training.corpus import standard_library
from models.training.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer

TARGET_CONTEXT = 1024  # tokens


class Corpus:
    """The tokenizer and the two token arrays, `train` and `held_out` (int32, documents joined by end-of-text)."""

    def __init__(self, work: Path) -> None:
        """Load the corpus from `work`; build it there from the standard library if it is missing."""
        arrays = work / "corpus.npz"
        if not arrays.exists():
            _build(work, arrays)
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
        with np.load(arrays) as stored:
            self.train, self.held_out = stored["train"], stored["held_out"]
            self.held_out_bytes = int(stored["held_out_bytes"])

    @property
    def separator(self) -> int:
        return _id_of(self.tokenizer, END_OF_TEXT)


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return int(found)


def _build(work: Path, arrays: Path) -> None:
    documents = list(standard_library())
    tokenizer = train_tokenizer(document.text for document in documents if not document.held_out)
    save_tokenizer(tokenizer, work / "tokenizer", TARGET_CONTEXT)
    separator = _id_of(tokenizer, END_OF_TEXT)
    tokens: dict[bool, list[int]] = {False: [], True: []}  # by held_out
    order = np.random.default_rng(0).permutation(len(documents))
    for index in order:
        document = documents[index]
        tokens[document.held_out] += [separator, *tokenizer.encode(document.text).ids]
    np.savez(
        arrays,
        train=np.array(tokens[False], dtype=np.int32),
        held_out=np.array(tokens[True], dtype=np.int32),
        held_out_bytes=sum(len(document.text.encode()) for document in documents if document.held_out),
    )


def windows(tokens: np.ndarray, length: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield `[batch, length + 1]` int64 windows forever. Each epoch has a new phase and order, both from `seed`."""
    epoch = 0
    while True:
        random = np.random.default_rng([seed, epoch])
        phase = int(random.integers(length))
        starts = random.permutation(np.arange(phase, len(tokens) - length - 1, length))
        for at in range(0, len(starts) - batch + 1, batch):
            rows = [tokens[start : start + length + 1] for start in starts[at : at + batch]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
        epoch += 1
