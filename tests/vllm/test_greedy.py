"""Greedy output is vLLM's own, token by token, with every drafter and any neighbours in the batch."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm import pipelines
from tests.vllm.conftest import InProcess, Run

KEY = "diffuspec"


def params(num_tokens: int, temperature: float = 0.0, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        max_tokens=num_tokens,
        ignore_eos=True,
        detokenize=False,
        seed=7 if temperature else None,
        extra_args={KEY: options},
    )


@pytest.fixture(scope="module")
def num_tokens(full: bool) -> int:
    return 200 if full else 40


@pytest.fixture(scope="module")
def expected(plain: InProcess, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    return [run.tokens for run in plain.run(prompts, params(num_tokens), batch=16)]


def drafted(runs: list[Run]) -> tuple[int, int]:
    """Drafted and accepted tokens, by vLLM's own count."""
    metrics = [run.output.outputs[0].spec_decode_metrics for run in runs]
    accepted = sum(number * steps for metric in metrics for number, steps in enumerate(metric.histogram))
    return sum(metric.num_draft_tokens for metric in metrics), accepted


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("drafter", ["ours", "garbage", "oracle"])
def test_greedy_tokens_are_those_of_plain_decoding(
    speculative: InProcess,
    prompts: list[list[int]],
    expected: list[tuple[int, ...]],
    num_tokens: int,
    drafter: str,
    batch: int,
) -> None:
    """In batches, every second request is a sampled neighbour, whose output is not compared."""
    ours = getattr(speculative, "ours", None) or speculative.proposer._pipeline.inner
    speculative.ours = ours  # type: ignore[attr-defined]
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, expected, strict=True)]
    speculative.use(
        {"ours": ours, "garbage": pipelines.garbage(speculative.vocabulary_size), "oracle": pipelines.oracle(texts)}[
            drafter
        ]
    )
    if batch == 1:
        runs = speculative.run(prompts, params(num_tokens), batch=1)
    else:
        mixed = [prompt for prompt in prompts for _ in range(2)]
        wanted = [params(num_tokens), params(num_tokens, temperature=1.0)] * len(prompts)
        runs = speculative.run(mixed, wanted, batch)[::2]
    different = [i for i, run in enumerate(runs) if run.tokens != expected[i]]
    assert different == []
    count, accepted = drafted(runs)
    assert count > 0
    if drafter == "oracle":
        assert accepted > 0.7 * count
    assert speculative.guard.num_failures == 0


def test_a_request_may_switch_speculation_off_or_bound_it(speculative: InProcess, prompts: list[list[int]]) -> None:
    speculative.use(pipelines.garbage(speculative.vocabulary_size))
    wanted = [params(24, enabled=False), params(24, max_draft_tokens=2), params(24)]
    off, bounded, free = speculative.run(prompts[:3], wanted)
    assert drafted([off]) == (0, 0)
    histogram = bounded.output.outputs[0].spec_decode_metrics.histogram
    assert 0 < drafted([bounded])[0] <= 2 * sum(histogram)
    assert drafted([free])[0] > drafted([bounded])[0]


def test_what_the_pipeline_learns_is_what_vllm_counted(speculative: InProcess, prompts: list[list[int]]) -> None:
    scripted = pipelines.garbage(speculative.vocabulary_size)
    speculative.use(scripted)
    runs = speculative.run(prompts[:4], params(32))
    outcomes = [outcome for record in scripted.observed for outcome in record.outcomes]
    assert sum(len(outcome.draft.tokens) for outcome in outcomes) == drafted(runs)[0]
    assert sum(outcome.num_accepted for outcome in outcomes) == drafted(runs)[1]
    assert sum(outcome.num_accepted + 1 for outcome in outcomes) >= 4 * 32
    speculative.run(prompts[:1], params(2))  # a later step tells that the first four are gone
    assert len(scripted.released) >= 4


def test_the_pipeline_sees_what_each_token_was_predicted_from(tiny: InProcess, tiny_folders: tuple[Path, Path]) -> None:
    """The target's hidden states after its final norm, in a batch with chunked prompts and rejected drafts."""
    import torch
    from transformers import LlamaForCausalLM

    seen: list[tuple[list[int], torch.Tensor]] = []
    scripted = pipelines.garbage(tiny.vocabulary_size)
    scripted.reads_hidden_states = True
    draft_anything = scripted._propose

    def propose(requests: Any) -> Any:
        for request in requests:
            seen.append((request.tokens.tolist(), request.hidden_states.clone()))
        return draft_anything(requests)

    scripted._propose = propose
    tiny.use(scripted)
    tiny.run([[7, 8, 9] * 110, list(range(30)), [5]], params(12))
    assert tiny.guard.num_failures == 0
    assert {len(tokens) for tokens, _ in seen} >= {331, 31, 2}
    model = LlamaForCausalLM.from_pretrained(tiny_folders[0]).model.eval()
    for tokens, states in seen[:: max(len(seen) // 12, 1)]:
        with torch.inference_mode():
            expected = model(torch.tensor([tokens])).last_hidden_state[0]
        assert states.shape == expected.shape
        assert torch.allclose(states[1:], expected[:-1], atol=1e-3)
