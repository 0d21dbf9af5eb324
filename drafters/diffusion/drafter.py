"""The diffusion drafter: one forward pass proposes a distribution for every masked position of every request.

A request's clean tokens run once and stay in the key-value cache (`clean_prefix`). Each draft runs the tokens committed
since the last draft, followed by a block of masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.diffusion.clean_prefix import CleanPrefix, CleanPrefixes
from drafters.diffusion.masked import MaskedRequest, split_rows
from transformer.model import RowBatch, Transformer

MAX_WITHOUT_BLOCK = 32  # tokens to propose in a pass, for models that were trained on whole sequences


@dataclass(frozen=True, slots=True)
class DiffusionOptions:
    """Options of the drafter's passes."""

    window: int = 256  # clean tokens that are read, at most; the latest ones
    first_tokens: int | None = None  # tokens that a new window begins with (`clean_prefix`); None: all that fit
    reuse_prefix: bool = True  # False: read everything in every pass, for comparison
    refresh_interval: int = 16  # `full` only: passes until the prefix is read again; 0: never
    refinement_steps: int = 1  # passes per draft; each fills in the most confident tokens for the next pass
    part_tokens: int = 0  # draft in parts of this many tokens, each given the parts before; 0: all at once
    part_confidence: float = 0.9  # draft the next part only if every token of the last has at least this probability


@dataclass(slots=True)
class _Block:
    """One request's rows in a pass, by position in its slot: clean tokens that are not cached yet, then masks."""

    prefix: CleanPrefix
    tokens: list[int]  # one per row: clean tokens, drafted tokens, masks
    start: int  # position of the first row
    clean_end: int  # position after the last clean token; drafted tokens of earlier parts count as clean
    length: int  # tokens to propose from `clean_end` on
    hints: Mapping[int, int]  # tokens of the free draft by position
    states: Tensor | None = None  # [clean rows, target hidden] the target's hidden states at the first rows

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class DiffusionDrafter:
    """A masked diffusion language model with cached prefixes, one slot per request.

    Not thread-safe: only the engine's thread uses it.
    """

    def __init__(
        self,
        model: Transformer,
        num_slots: int,
        vocabulary_size: int,
        options: DiffusionOptions | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """Prepare `num_slots` slots. Logits get the width `vocabulary_size`, cut or padded with -inf.

        num_tokens: ids from here on are padding that no tokenizer writes; their logits are -inf. None: no padding.
        The window is no longer than the model's training allows. Raises ValueError if the model has no mask token.
        """
        config = model.config
        if not config.mask_token_ids:
            raise ValueError("the drafter's config.json names no mask token: it is not a diffusion language model")
        self._model = model
        self._options = options or DiffusionOptions()
        self._masks = config.mask_token_ids
        self._leading = 1 if config.logits_shifted else 0  # shifted: the last clean row predicts, too
        self._pattern = config.attention
        self._grid = config.block_size if config.attention == "block_causal" else 1
        self._vocabulary_size = vocabulary_size
        self._first_padding = min(vocabulary_size, vocabulary_size if num_tokens is None else num_tokens)
        self._excluded = [mask for mask in self._masks if mask < self._first_padding]
        max_window = config.max_trained_tokens - self.max_tokens - self._grid
        window = max(self._grid, min(self._options.window, max_window) // self._grid * self._grid)
        self._cache = model.new_cache(num_slots, window + self.max_tokens + 2 * self._grid)
        self._prefixes = CleanPrefixes(
            num_slots,
            window,
            self._grid,
            is_approximate=self._pattern == "full",
            refresh_interval=self._options.refresh_interval,
            reuse=self._options.reuse_prefix,
            first_tokens=self._options.first_tokens,
        )

    @property
    def max_tokens(self) -> int:
        """Maximum tokens per call: the block length that the model was trained for, or four parts."""
        block = self._model.config.block_size or MAX_WITHOUT_BLOCK
        return max(block, 4 * self._options.part_tokens)

    @property
    def window(self) -> int:
        """Maximum number of clean tokens that are read."""
        return self._prefixes.window

    @property
    def temperature(self) -> float:
        """Temperature of the target's distribution that the logits approximate."""
        return self._model.config.logits_temperature

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        """Return the clean rows that a pass for this request must run before its masks."""
        return self._prefixes.pending_rows(request_id, num_tokens)

    @torch.inference_mode()
    def propose(self, requests: Sequence[MaskedRequest]) -> Tensor:
        """Return the logits `[sum of lengths, vocabulary]` (float32) of every proposed position.

        Mask tokens, padding and ids that only the target has are -inf. So are whole rows after a part of the draft that
        was not confident enough. Raises RuntimeError without a free slot.
        """
        part = self._options.part_tokens
        lengths = [request.length for request in requests]
        blocks = [self._first_block(request, min(request.length, part or request.length)) for request in requests]
        logits = self._denoise(blocks)
        if [block.length for block in blocks] == lengths:
            return logits
        answer = logits.new_full((sum(lengths), self._vocabulary_size), -torch.inf)
        nexts = [rows.start for rows in split_rows(lengths)]  # next row of each request in the answer
        left = lengths
        going = list(range(len(requests)))
        while True:
            found = dict(zip(going, split_rows([blocks[i].length for i in going]), strict=True))
            for i, rows in found.items():
                answer[nexts[i] : nexts[i] + blocks[i].length] = logits[rows]
                nexts[i] += blocks[i].length
                left[i] -= blocks[i].length
            going = [i for i in going if left[i] and self._is_confident(logits[found[i]])]
            if not going:
                return answer
            for i in going:
                self._extend(blocks[i], logits[found[i]].argmax(-1).tolist(), min(left[i], part))
            logits = self._denoise([blocks[i] for i in going])

    def note(self, request_id: str, num_accepted: int) -> None:
        """Learn how much of the request's last draft was accepted: a stale prefix may need to be read again."""
        self._prefixes.note(request_id, num_accepted)

    def keep(self, request_id: str, num_tokens: int) -> None:
        """Drop cached tokens of a request after its first `num_tokens`: they have changed."""
        self._prefixes.keep(request_id, num_tokens)

    def release(self, request_id: str) -> None:
        """Free the request's slot; harmless if it has none."""
        slot = self._prefixes.release(request_id)
        if slot is not None:
            self._cache.clear_slot(slot)  # a NaN must not outlive its request

    def _first_block(self, request: MaskedRequest, length: int) -> _Block:
        """Return the request's rows for a first pass, and count the clean tokens that become final in it as cached."""
        prefix = self._prefixes.place(request.request_id, len(request.tokens))
        clean_end = len(request.tokens) - prefix.offset
        start = min(prefix.length, clean_end - self._leading)
        clean = request.tokens[prefix.offset + start :].tolist()
        prefix.length = clean_end // self._grid * self._grid
        prefix.num_stale += 1
        states = None
        if self._model.config.target_hidden_size and request.hidden_states is not None:
            states = request.hidden_states[prefix.offset + start : len(request.tokens)]
        hints = dict(enumerate(request.hints, start=clean_end))
        return _Block(prefix, clean + self._new_masks(clean_end, length), start, clean_end, length, hints, states)

    def _new_masks(self, clean_end: int, length: int) -> list[int]:
        """Return the masks of a draft. On a grid they fill the last block, as in training."""
        end = clean_end + length - self._leading
        count = -(-end // self._grid) * self._grid - clean_end
        return [self._masks[min(i, len(self._masks) - 1)] for i in range(count)]

    def _extend(self, block: _Block, drafted: list[int], length: int) -> None:
        """Accept the last part as drafted, and put masks for `length` more tokens after it."""
        self._forget_cached_rows(block)
        block.tokens[block.clean_end - block.start :] = drafted
        block.clean_end += len(drafted)
        block.tokens += self._new_masks(block.clean_end, length)
        block.length = length

    def _forget_cached_rows(self, block: _Block) -> None:
        """Remove the rows that are cached by now: a further pass need not run them."""
        start = min(block.clean_end // self._grid * self._grid, block.clean_end - self._leading)
        if start > block.start:
            block.tokens = block.tokens[start - block.start :]
            block.states = None if block.states is None else block.states[start - block.start :]
            block.start = start

    def _denoise(self, blocks: Sequence[_Block]) -> Tensor:
        """Return the logits of all proposed positions after the refinement steps.

        A position that is filled in keeps the logits that its token was chosen by.
        """
        logits = self._run(blocks)
        steps = self._options.refinement_steps
        filled = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for step in range(1, steps):
            confidences, tokens = logits.softmax(-1).max(-1)
            confidences[filled] = -1.0
            rows = split_rows([block.length for block in blocks])
            for block, own in zip(blocks, rows, strict=True):
                self._forget_cached_rows(block)
                count = -(-int((~filled[own]).sum()) // (steps - step + 1))
                chosen = (own.start + confidences[own].topk(count).indices).tolist()
                for row in chosen:
                    at = block.clean_end - block.start + row - own.start
                    if at < len(block.tokens):  # the last token of a shifted draft has no row of its own
                        block.tokens[at] = int(tokens[row])
                filled[chosen] = True
            logits = torch.where(filled.unsqueeze(-1), logits, self._run(blocks))
        return logits

    def _run(self, blocks: Sequence[_Block]) -> Tensor:
        """Run one pass of all rows; return the logits of the proposed positions, by the target's ids."""
        tokens: list[int] = []
        limits: list[int] = []
        predicting: list[int] = []
        for block in blocks:
            first = len(tokens) + block.clean_end - block.start - self._leading
            predicting += range(first, first + block.length)
            tokens += block.tokens
            limits += self._limits(block)
        device = self._model.device
        rows = RowBatch(
            tokens=torch.tensor(tokens, device=device),
            slots=[block.prefix.slot for block in blocks],
            starts=[block.start for block in blocks],
            counts=[len(block.tokens) for block in blocks],
            limits=torch.tensor(limits, device=device),
            bounds_padding=True,
        )
        hidden = self._model.forward(rows, self._cache, self._target_states(blocks), self._hints(blocks))
        if len(blocks) == 1:  # a slice is no copy
            predicted = hidden[predicting[0] : predicting[-1] + 1]
        else:
            predicted = hidden[torch.tensor(predicting, device=device)]
        width = min(self._vocabulary_size, self._model.config.vocabulary_size)  # logits of later ids are never used
        return self._for_target(self._model.logits(predicted, width))

    def _target_states(self, blocks: Sequence[_Block]) -> Tensor | None:
        """Return the target's hidden states: `[rows, target hidden]`, zero for masks and where they are unknown."""
        if all(block.states is None for block in blocks):
            return None
        if len(blocks) == 1 and blocks[0].states is not None:  # needs no copy: the masks come after them
            return blocks[0].states.to(self._model.device, self._model.dtype)
        width, num_rows = self._model.config.target_hidden_size, sum(len(block.tokens) for block in blocks)
        states = torch.zeros(num_rows, width, device=self._model.device, dtype=self._model.dtype)
        first = 0
        for block in blocks:
            if block.states is not None:
                states[first : first + len(block.states)] = block.states
            first += len(block.tokens)
        return states

    def _hints(self, blocks: Sequence[_Block]) -> tuple[Tensor, Tensor] | None:
        """Return the free draft's token at the place of every mask, and at the next place."""
        if not self._model.config.takes_hints or not any(block.hints for block in blocks):
            return None
        none, own, following = self._model.config.vocabulary_size, [], []
        for block in blocks:
            for position, token in enumerate(block.tokens, start=block.start):
                is_mask = position >= block.clean_end and token in self._masks
                own.append(block.hints.get(position, none) if is_mask else none)
                following.append(block.hints.get(position + 1, none) if is_mask else none)
        device = self._model.device
        return torch.tensor(own, device=device), torch.tensor(following, device=device)

    def _limits(self, block: _Block) -> list[int]:
        """Return for every row the (exclusive) end of the positions that it sees."""
        if self._pattern == "full":
            return [block.end] * len(block.tokens)
        if self._pattern == "block_causal":
            ends = (position // self._grid * self._grid + self._grid for position in range(block.start, block.end))
            return [min(end, block.end) for end in ends]
        num_clean = block.clean_end - block.start
        return [*range(block.start + 1, block.clean_end + 1), *[block.end] * (len(block.tokens) - num_clean)]

    def _for_target(self, logits: Tensor) -> Tensor:
        """Pad the logits to the target's width, with -inf where target or drafter has no token."""
        missing = self._vocabulary_size - logits.shape[1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        if self._first_padding < self._vocabulary_size:
            logits[:, self._first_padding :] = -torch.inf
        if self._excluded:
            logits[:, self._excluded] = -torch.inf
        return logits

    def _is_confident(self, logits: Tensor) -> bool:
        """Return whether every row's best token is probable enough to draft the next part."""
        return bool(logits.softmax(-1).amax(-1).min() >= self._options.part_confidence)
