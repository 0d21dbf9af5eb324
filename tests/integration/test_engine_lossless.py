"""The engine's tokens are those of plain decoding, whatever is drafted and whatever else is in the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from drafters.base import Pipeline, PolicyName
from service.engine.base import GenerationRequest, SpeculationOptions
from service.engine.scheduler import SchedulerLimits
from service.settings import load_settings
from service.wiring import build_pipeline
from tests.checkpoints import CONTEXT_LENGTH, TOKENIZER_LENGTH, VOCABULARY_SIZE
from tests.near_ties import NearTies
from tests.unit.engine.drafters import (
    Oracle,
    Rule,
    RuleDrafter,
    all_but_the_last,
    garbage,
    never_right,
    no_drafts,
    right_for_a_while,
)
from tests.unit.engine.driver import Driver
from transformer.model import Transformer
from verifiers.base import SamplingRules
from verifiers.torch_lm import TorchVerifier

NUM_REQUESTS, MAX_TOKENS = 18, 32

RULES: dict[str, Callable[[Oracle], Rule]] = {
    "oracle": lambda oracle: oracle,
    "garbage": lambda _: garbage(VOCABULARY_SIZE),
    "random-length": lambda oracle: right_for_a_while(oracle, VOCABULARY_SIZE),
    "never-right": lambda oracle: never_right(oracle, VOCABULARY_SIZE),
    "last-wrong": lambda oracle: all_but_the_last(oracle, VOCABULARY_SIZE),
}


@dataclass(frozen=True)
class Setting:
    """One way to run the same requests."""

    num_slots: int = 16
    chunk: int = 256
    reuse: bool = True
    seed: int = 0  # of the times of joining and of the cancelled requests

    def __str__(self) -> str:
        return f"slots{self.num_slots}-chunk{self.chunk}-{'reuse' if self.reuse else 'no-reuse'}"


SETTINGS = [Setting(2, 7, seed=1), Setting(5, 5, seed=2), Setting(16, 64, reuse=False, seed=3)]


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Transformer:
    return Transformer.load(tiny_target)


@pytest.fixture(scope="module")
def reference(tiny_target: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    return loaded.eval()


def verifier(model: Transformer, num_slots: int) -> TorchVerifier:
    return TorchVerifier(model, num_slots=num_slots, context_length=CONTEXT_LENGTH)


def prompts() -> list[list[int]]:
    """Return random prompts of 1 to 120 tokens; two in three begin with one of two common prefixes."""
    generator = np.random.default_rng(5)
    prefixes = [[], *generator.integers(TOKENIZER_LENGTH, size=(2, 60)).tolist()]
    lengths = generator.integers(1, 60, size=NUM_REQUESTS)
    return [prefixes[i % 3] + generator.integers(TOKENIZER_LENGTH, size=n).tolist() for i, n in enumerate(lengths)]


GREEDY = [
    GenerationRequest(f"r{i}", prompt, MAX_TOKENS, SamplingRules(seed=i, temperature=0))
    for i, prompt in enumerate(prompts())
]
"""Without stop tokens, so that every output has its full length."""

SAMPLED_RULES = [
    SamplingRules(seed=1, temperature=1.0),
    SamplingRules(seed=2, temperature=0.6, top_p=0.9),
    SamplingRules(seed=3, temperature=1.3, top_k=20),
    SamplingRules(seed=4, temperature=0.8, min_p=0.05),
    SamplingRules(seed=5, temperature=0.9, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.2),
    SamplingRules(seed=6, temperature=0.7, logit_bias={7: 3.0, 11: -5.0}, min_tokens=10, stop_token_ids=(40, 41, 42)),
    SamplingRules(seed=7, temperature=0, repetition_penalty=1.3, allowed_token_ids=tuple(range(0, 256, 3))),
    SamplingRules(seed=8, temperature=1.0, bad_words=((5,), (6, 7)), stop_token_ids=(100, 101, 102, 103)),
]
SAMPLED = [replace(request, rules=SAMPLED_RULES[i % len(SAMPLED_RULES)]) for i, request in enumerate(GREEDY)]


@pytest.fixture(scope="module")
def plain_greedy(model: Transformer) -> list[list[int]]:
    return plain_outputs(model, GREEDY)


@pytest.fixture(scope="module")
def plain_sampled(model: Transformer) -> list[list[int]]:
    return plain_outputs(model, SAMPLED)


def plain_outputs(model: Transformer, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    """Decode plainly: each request alone in its own engine, without drafts."""
    return [Driver(verifier(model, 1), no_drafts()).outputs([request])[0] for request in requests]


def oracle(requests: Sequence[GenerationRequest], outputs: Sequence[Sequence[int]]) -> Oracle:
    return Oracle([[*request.prompt, *output] for request, output in zip(requests, outputs, strict=True)])


def outputs_under(
    setting: Setting, model: Transformer, requests: Sequence[GenerationRequest], drafter: Pipeline
) -> list[list[int]]:
    """Run all requests, which join at random, together with others that are cancelled midway."""
    generator = np.random.default_rng(setting.seed)
    limits = SchedulerLimits(setting.num_slots, prefill_chunk_tokens=setting.chunk, reuse_prefixes=setting.reuse)
    driver = Driver(verifier(model, setting.num_slots), drafter, limits)
    passers_by: list[str] = []
    for i in generator.permutation(len(requests)):
        driver.submit(requests[i])
        if generator.random() < 0.4:
            other = replace(requests[int(generator.integers(len(requests)))], request_id=f"passer-by-{i}")
            driver.submit(other)
            passers_by.append(other.request_id)
        for _ in range(generator.integers(4)):
            driver.loop.turn()
        if passers_by and generator.random() < 0.5:
            driver.loop.cancel(passers_by.pop(0))
    driver.finish()
    assert driver.loop.cache_usage == 0
    return [driver.received[request.request_id].tokens for request in requests]


def assert_same(
    expected: list[list[int]], actual: list[list[int]], reference: PreTrainedModel, near_ties: NearTies
) -> None:
    """Fail unless the tokens are identical, except for the near-ties that the session allows."""

    def margin(tokens: Sequence[int], wanted: int, found: int) -> float:
        with torch.inference_mode():
            logits = reference(torch.tensor([list(tokens)])).logits[0, -1]
        return float(logits[wanted] - logits[found])

    for request, right, mine in zip(GREEDY, expected, actual, strict=True):
        near_ties.compare(request.prompt, mine, right, margin)


def test_plain_decoding_is_what_transformers_generates(
    reference: PreTrainedModel, plain_greedy: list[list[int]], near_ties: NearTies
) -> None:
    generated = []
    for request in GREEDY:
        prompt = torch.tensor([list(request.prompt)])
        with torch.inference_mode():
            sequence = reference.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=MAX_TOKENS,
                min_new_tokens=MAX_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        generated.append(sequence[0, prompt.shape[1] :].tolist())
    assert len({tuple(tokens) for tokens in generated}) > NUM_REQUESTS // 2  # otherwise the comparison proves little
    assert_same(generated, plain_greedy, reference, near_ties)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_greedy_tokens_do_not_depend_on_drafts_or_company(
    rule: str,
    setting: Setting,
    model: Transformer,
    reference: PreTrainedModel,
    plain_greedy: list[list[int]],
    near_ties: NearTies,
) -> None:
    drafter = RuleDrafter(RULES[rule](oracle(GREEDY, plain_greedy)), 12)
    assert_same(plain_greedy, outputs_under(setting, model, GREEDY, drafter), reference, near_ties)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_seeded_tokens_do_not_depend_on_drafts_or_company(
    rule: str, setting: Setting, model: Transformer, plain_sampled: list[list[int]]
) -> None:
    drafter = RuleDrafter(RULES[rule](oracle(SAMPLED, plain_sampled)), 12)
    assert outputs_under(setting, model, SAMPLED, drafter) == plain_sampled


@pytest.mark.parametrize("policy", ["goodput", "paper", "fixed"])
@pytest.mark.parametrize("source", ["diffusion", "both", "free"])
def test_the_real_pipeline_changes_no_token(
    source: str,
    policy: PolicyName,
    tiny_target: Path,
    tiny_drafter: Path,
    model: Transformer,
    reference: PreTrainedModel,
    plain_greedy: list[list[int]],
    plain_sampled: list[list[int]],
    near_ties: NearTies,
) -> None:
    settings = load_settings(
        overrides={
            "model.target": tiny_target,
            "model.drafter": str(tiny_drafter),
            "speculation.free_drafts": source != "diffusion",
            "speculation.policy": policy,
        }
    )
    drafter = None if source == "free" else Transformer.load(tiny_drafter)
    pipeline = build_pipeline(settings, model.config, drafter)
    assert_same(plain_greedy, outputs_under(Setting(16), model, GREEDY, pipeline), reference, near_ties)
    assert outputs_under(Setting(3), model, SAMPLED, pipeline) == plain_sampled


@pytest.mark.parametrize("length", [0, 1, 5, 32])
def test_no_draft_length_changes_a_token(
    length: int, model: Transformer, reference: PreTrainedModel, plain_greedy: list[list[int]], near_ties: NearTies
) -> None:
    known = oracle(GREEDY, plain_greedy)
    options = SpeculationOptions(max_draft_tokens=length)
    requests = [replace(request, speculation=options) for request in GREEDY]
    drafter = RuleDrafter(right_for_a_while(known, VOCABULARY_SIZE), 32)
    assert_same(plain_greedy, outputs_under(Setting(16), model, requests, drafter), reference, near_ties)


def test_right_drafts_save_steps_and_are_counted(model: Transformer, plain_greedy: list[list[int]]) -> None:
    drafter = RuleDrafter(oracle(GREEDY, plain_greedy), 12)
    driver = Driver(verifier(model, 1), drafter)
    assert driver.outputs(GREEDY[:1]) == plain_greedy[:1]
    stats = driver.received["r0"].deltas[-1].stats
    assert stats is not None
    assert stats.num_spec_steps == 3  # one token from the prompt's rows, then 13, 13 and 5
    assert stats.num_draft_tokens == stats.num_accepted_draft_tokens == 28
    assert [stats.acceptance_histogram[n] for n in (4, 12)] == [1, 2]


def test_reuse_of_a_prefix_is_reported_and_changes_nothing(model: Transformer, plain_greedy: list[list[int]]) -> None:
    driver = Driver(verifier(model, 4), no_drafts())
    again = replace(GREEDY[1], request_id="again")
    first, second = driver.outputs(GREEDY[1:2]), driver.outputs([again])
    assert first == second == plain_greedy[1:2]
    assert driver.received["r1"].deltas[0].num_cached_prompt_tokens == 0
    assert driver.received["again"].deltas[0].num_cached_prompt_tokens == len(again.prompt) - 1


def test_prompt_log_probabilities_are_whole_whatever_the_chunks(model: Transformer, reference: PreTrainedModel) -> None:
    request = replace(GREEDY[1], prompt_logprobs=2, max_tokens=0)
    with torch.inference_mode():
        logits = reference(torch.tensor([list(request.prompt)])).logits[0].float()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(list(request.prompt[1:]))[:, None])[:, 0]
    for chunk in (1, 7, 256):
        driver = Driver(verifier(model, 2), no_drafts(), SchedulerLimits(prefill_chunk_tokens=chunk))
        for name in ("first", "second"):  # the second finds its prompt in the cache, but must not use it
            driver.outputs([replace(request, request_id=name)])
            (delta,) = driver.received[name].deltas
            assert (delta.tokens, delta.finish_reason) == ((), "length")
            assert [each.token for each in delta.prompt_logprobs] == list(request.prompt[1:])
            assert [each.logprob for each in delta.prompt_logprobs] == pytest.approx(expected.tolist(), abs=1e-3)
