"""Bans, biases and penalties, compared with their definitions token by token."""

import math
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from verifiers.base import SamplingRules
from verifiers.sampling import apply_rules, changes_logits

VOCABULARY = 6
tokens = st.integers(0, VOCABULARY - 1)
stray_tokens = st.integers(-2, VOCABULARY + 3)

any_rules = st.builds(
    SamplingRules,
    seed=st.just(0),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.8]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.5]), max_size=2),
    allowed_token_ids=st.none() | st.lists(tokens, max_size=4),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=3),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(tokens, max_size=2),
)


def one_row(logits: Sequence[float], rules: SamplingRules, prompt: list[int], output: list[int]) -> list[float]:
    """Define the rules: return the logits of the token after `prompt + output`."""
    result = []
    for token, logit in enumerate(logits):
        banned = rules.allowed_token_ids is not None and token not in rules.allowed_token_ids
        for word in rules.bad_words:
            before = list(word[:-1])
            banned |= word[-1] == token and output[len(output) - len(before) :] == before and len(output) >= len(before)
        banned |= len(output) < rules.min_tokens and token in rules.stop_token_ids
        if banned:
            result.append(-math.inf)
            continue
        value = logit + rules.logit_bias.get(token, 0.0)
        if token in prompt + output:
            value = value / rules.repetition_penalty if value > 0 else value * rules.repetition_penalty
        value -= rules.frequency_penalty * output.count(token) + rules.presence_penalty * (token in output)
        result.append(value)
    return result


@given(
    any_rules,
    st.lists(tokens, min_size=1, max_size=5),
    st.lists(tokens, max_size=5),
    st.lists(tokens, max_size=5),
    st.integers(0, 100),
)
def test_the_rules_of_every_row_see_the_tokens_before_it(
    rules: SamplingRules, prompt: list[int], output: list[int], draft: list[int], seed: int
) -> None:
    logits = torch.randn(len(draft) + 1, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    expected = [one_row(row.tolist(), rules, prompt, output + draft[:index]) for index, row in enumerate(logits)]
    changed = logits.clone()
    apply_rules(changed, rules, prompt + output, len(prompt), draft)
    torch.testing.assert_close(changed, torch.tensor(expected))
    if not changes_logits(rules):
        assert torch.equal(changed, logits)


@given(st.lists(stray_tokens, max_size=4), st.lists(stray_tokens, max_size=4))
def test_ids_outside_the_vocabulary_are_ignored(stray: list[int], draft: list[int]) -> None:
    rules = SamplingRules(
        0,
        repetition_penalty=1.2,
        logit_bias=dict.fromkeys(stray, 1.0),
        allowed_token_ids=[0, 1, 2, 3, 4, 5, *stray],
        bad_words=[[token] for token in stray if token not in range(VOCABULARY)],
        min_tokens=3,
        stop_token_ids=[token for token in stray if token not in range(VOCABULARY)],
    )
    logits = torch.zeros(len(draft) + 1, VOCABULARY)
    apply_rules(logits, rules, [0, 1], 1, draft)
    assert logits.isfinite().all()
