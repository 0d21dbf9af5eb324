"""Sampled tokens follow the target's exact distribution under speculation, and vLLM's CPU defect is mended.

The first generated token never shows a fault: only from the second on are drafts verified.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from drafters.base import Draft, DraftRequest
from tests.vllm.conftest import InProcess
from tests.vllm.pipelines import Scripted, draft

PROMPT = [100, 101, 102]
MIN_P = 1e-4
FEWEST_EXPECTED = 5.0
CASES = {
    "temperature 1": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 6},
    "top-p": {"temperature": 0.8, "top_p": 0.85},
    "top-k and top-p": {"temperature": 1.3, "top_k": 9, "top_p": 0.9},
}


class Exact:
    """The tiny target's own distributions."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaForCausalLM

        self._model = LlamaForCausalLM.from_pretrained(folder).eval()

    @torch.inference_mode()
    def next_probs(self, contexts: Sequence[Sequence[int]], rules: dict[str, Any]) -> NDArray[np.float64]:
        """`[contexts, vocabulary]`; the contexts are equally long."""
        rows = []
        for begin in range(0, len(contexts), 4096):
            logits = self._model(torch.tensor(contexts[begin : begin + 4096])).logits[:, -1].double()
            rows.append(_restrict(logits / rules["temperature"], rules))
        return torch.cat(rows).numpy()


def _restrict(logits: torch.Tensor, rules: dict[str, Any]) -> torch.Tensor:
    """Top-k, then top-p over what is left: the smallest set of best tokens that reaches the mass."""
    if top_k := rules.get("top_k"):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(-1)
    if (top_p := rules.get("top_p", 1.0)) < 1.0:
        ordered, places = probs.sort(dim=-1, descending=True)
        is_beyond = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.masked_fill(torch.zeros_like(is_beyond).scatter(1, places, is_beyond), 0.0)
    return probs / probs.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def exact(tiny_folders: tuple[Path, Path]) -> Exact:
    return Exact(tiny_folders[0])


def marginals(exact: Exact, rules: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distributions of the second and the third generated token."""
    first = exact.next_probs([PROMPT], rules)[0]
    ones = np.flatnonzero(first)
    second_given = exact.next_probs([[*PROMPT, int(a)] for a in ones], rules)
    second = first[ones] @ second_given
    pairs = [(a, int(b)) for a in range(len(ones)) for b in np.flatnonzero(second_given[a])]
    weights = np.array([first[ones[a]] * second_given[a, b] for a, b in pairs])
    third = weights @ exact.next_probs([[*PROMPT, int(ones[a]), b] for a, b in pairs], rules)
    return second, third


def likely(exact: Exact) -> Scripted:
    """Drafts the two most probable next tokens, so that about every second draft is rejected somewhere."""
    known: dict[tuple[int, ...], int] = {}

    def best(context: tuple[int, ...]) -> int:
        if context not in known:
            known[context] = int(exact.next_probs([context], {"temperature": 1.0})[0].argmax())
        return known[context]

    def propose(requests: Sequence[DraftRequest]) -> list[Draft]:
        drafts = []
        for request in requests:
            context = tuple(map(int, request.tokens))
            ahead: list[int] = []
            while len(ahead) < min(2, request.max_draft_tokens):
                ahead.append(best((*context, *ahead)))
            drafts.append(draft(ahead))
        return drafts

    return Scripted(propose, 4)


def p_value(tokens: Sequence[int], probs: NDArray[np.float64]) -> float:
    """Of a chi-square test, tokens that are too rare for it pooled; 0 for a token that cannot occur."""
    counts = Counter(tokens)
    if any(probs[token] == 0 for token in counts):
        return 0.0
    expected = probs * len(tokens)
    common = np.flatnonzero(expected >= FEWEST_EXPECTED)
    observed = np.array([counts[int(token)] for token in common] + [0.0])
    wanted = np.append(expected[common], 0.0)
    observed[-1], wanted[-1] = len(tokens) - observed.sum(), len(tokens) - wanted.sum()
    if wanted[-1] < FEWEST_EXPECTED:  # too little is left over: it goes with the rarest
        observed[-2] += observed[-1]
        wanted[-2] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("case", CASES)
def test_second_and_third_token_follow_the_exact_distribution(
    tiny: InProcess, exact: Exact, full: bool, case: str
) -> None:
    """Speculation and, as the noise of the test itself, the same requests without."""
    from vllm import SamplingParams

    rules = CASES[case]
    second, third = marginals(exact, rules)
    scripted = likely(exact)
    tiny.use(scripted)
    count = 20_000 if full else 1500
    results = {}
    for enabled in (True, False):
        options = {"diffuspec": {"enabled": enabled}}
        params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, extra_args=options, **rules)
        runs = tiny.run([PROMPT] * count, params)
        results[enabled] = (
            p_value([run.tokens[1] for run in runs], second),
            p_value([run.tokens[2] for run in runs], third),
        )
    outcomes = [outcome for record in scripted.observed for outcome in record.outcomes if outcome.draft.tokens]
    accepted = sum(outcome.num_accepted for outcome in outcomes)
    assert 0.05 < accepted / sum(len(outcome.draft.tokens) for outcome in outcomes) < 0.95
    print(f"\n{case}: p = {results[True]} with drafts, {results[False]} without, N = {count}")
    assert min(results[False]) > MIN_P
    assert min(results[True]) > MIN_P


def test_seeded_requests_are_exact_too(tiny: InProcess, exact: Exact, full: bool) -> None:
    from vllm import SamplingParams

    rules = CASES["top-k"]
    second, third = marginals(exact, rules)
    tiny.use(likely(exact))
    count = 20_000 if full else 1000
    params = [SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, seed=i, **rules) for i in range(count)]
    runs = tiny.run([PROMPT] * count, params)
    assert p_value([run.tokens[1] for run in runs], second) > MIN_P
    assert p_value([run.tokens[2] for run in runs], third) > MIN_P


def test_vllms_cpu_sampling_is_mended() -> None:
    """Without `mend_cpu_sampling` both calls go wrong: the first reads uninitialised memory, the last raises."""
    from vllm.v1.sample import rejection_sampler

    from service.engine.vllm.patches import mend_cpu_sampling

    assert mend_cpu_sampling()
    counts = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = torch.tensor([0.7, 1.3, 0.0])
    expanded = rejection_sampler.expand_batch_to_tokens(temperature, counts, 5, replace_from=0, replace_to=1)
    assert expanded.tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0, 1.0])
    top_k = torch.tensor([5, 6, 7], dtype=torch.int32)
    assert rejection_sampler.expand_batch_to_tokens(top_k, counts, 5).tolist() == [5, 5, 7, 7, 7]


def test_a_seeded_prompt_is_read_in_parts(speculative: InProcess, prompts: list[list[int]]) -> None:
    """Without `mend_cpu_sampling` it ends vLLM's engine."""
    from vllm import SamplingParams

    chunk = speculative.settings.scheduler.prefill_chunk_tokens
    text = [token for prompt in prompts for token in prompt]
    long = (text * 3)[: 2 * chunk + 5]
    params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, seed=3)
    once, again = (speculative.run([long], params)[0] for _ in range(2))
    assert len(once.tokens) == 4
    assert once.tokens[0] == again.tokens[0]  # later ones depend on what was drafted


def test_a_token_drawn_in_vain_leaves_no_trace() -> None:
    from service.engine.vllm.patches import hiding_generators, keeping_generators

    generators = {row: torch.Generator().manual_seed(row) for row in range(3)}
    batch = SimpleNamespace(num_reqs=4, generators=generators)
    mask = SimpleNamespace(np=np.array([False, True, False, True, True]))
    runner = SimpleNamespace(input_batch=batch, discard_request_mask=mask)

    def draw(_: object) -> list[float]:
        return [float(torch.rand(1, generator=generator)) for generator in batch.generators.values()]

    first = keeping_generators(draw)(runner)
    second = keeping_generators(draw)(runner)
    assert [a == b for a, b in zip(first, second, strict=True)] == [False, True, False]
    assert hiding_generators(lambda _: sorted(batch.generators))(runner) == [0, 2]
    assert sorted(batch.generators) == [0, 1, 2]


def test_vllms_own_kernel_still_needs_mending() -> None:
    """Fails once vLLM has mended it: then that part of `service.engine.vllm.patches` can go."""
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    output = torch.full((5,), -1.0)
    _expand_kernel_impl(output, torch.tensor([0.7, 1.3]), torch.tensor([2, 5], dtype=torch.int32), 0, 1)
    assert output.tolist() == [-1.0] * 5


def test_other_versions_of_vllm_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from service.engine.vllm.patches import mend_cpu_sampling

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    assert not mend_cpu_sampling()
