"""An independent baseline: plain decoding with transformers' `generate` on the same checkpoint."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from service.bench.prompts import Prompt
from service.bench.records import Generation, Mismatch, Pass, Role, Workload
from service.convert import convert

NEAR_TIE_NATS = 1e-4  # rounding of another implementation may decide such a tie differently


class TransformersContestant:
    """transformers' `generate`. Greedy only, because its random draws differ from ours."""

    name = "transformers"
    role: Role = "other"
    tolerated_margin: float | None = NEAR_TIE_NATS

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, clock: Callable[[], float] = time.perf_counter):
        """Load the target's folder or GGUF file. Raises ImportError if transformers can't load its model classes."""
        from transformers import AutoModelForCausalLM

        with TemporaryDirectory() as converted:
            if folder.is_file():
                convert(folder, Path(converted), dtype)
                folder = Path(converted)
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        self._model = model.to(device).eval()
        self._model.generation_config.eos_token_id = None  # end tokens don't end a continuation
        self._device, self._clock = device, clock

    def takes(self, workload: Workload) -> bool:
        return workload.temperature == 0

    async def run(self, prompts: Sequence[Prompt], workload: Workload, pair: int, seed: int) -> Pass:
        return await asyncio.to_thread(self._generate, prompts, workload, pair)

    async def margin(self, prompt: Prompt, mismatch: Mismatch, max_tokens: int) -> float | None:
        return None

    def _generate(self, prompts: Sequence[Prompt], workload: Workload, pair: int) -> Pass:
        """Continue all prompts as one batch, padded on the left."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        padding = [longest - len(prompt.tokens) for prompt in prompts]
        tokens = torch.tensor(
            [[0] * missing + list(prompt.tokens) for missing, prompt in zip(padding, prompts, strict=True)],
            device=self._device,
        )
        mask = torch.tensor([[0] * missing + [1] * (longest - missing) for missing in padding], device=self._device)
        arrivals = _Arrivals(self._clock)
        started = self._clock()
        with torch.inference_mode():
            output = self._model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=workload.max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                logits_processor=[arrivals],
            )
        ended = self._clock() - started
        first = min(arrivals.first - started, ended)
        generations = tuple(
            Generation(prompt.name, tuple(row), (first, ended))
            for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True)
        )
        return Pass(self.name, pair, ended, generations)


class _Arrivals:
    """A logits processor that notes when the first logits came, and changes nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.first = float("inf")

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = min(self.first, self._clock())
        return scores
