"""Continuations hold the target's own tokens, distributions and hidden states."""

import numpy as np
import torch
from transformers import LlamaForCausalLM

from models.training.continuations import CANDIDATES, Continuations, continue_prompts, corpus_rows
from tests.unit.models.conftest import LENGTH
from verifiers.draws import draw


def test_greedy_rows_are_the_targets_own_choice(
    tiny_target: LlamaForCausalLM, toy_continuations: Continuations
) -> None:
    greedy = toy_continuations.temperatures == 0
    assert greedy.any()
    tokens = torch.from_numpy(toy_continuations.tokens[greedy].astype(np.int64))
    with torch.inference_mode():
        expected = tiny_target(tokens).logits.argmax(-1)
    for row, own, start in zip(tokens, expected, toy_continuations.prompt_lengths[greedy], strict=True):
        assert row[start:].tolist() == own[start - 1 : -1].tolist()


def test_candidates_are_the_targets_distribution(
    tiny_target: LlamaForCausalLM, toy_continuations: Continuations
) -> None:
    tokens = torch.from_numpy(toy_continuations.tokens.astype(np.int64))
    with torch.inference_mode():
        best, ids = tiny_target(tokens).logits.log_softmax(-1).topk(CANDIDATES)
    stored = torch.from_numpy(toy_continuations.log_probabilities.astype(np.float32))
    torch.testing.assert_close(stored[:, 1:], best[:, :-1], atol=4e-3, rtol=1e-3)
    assert (torch.from_numpy(toy_continuations.candidates)[:, 1:] == ids[:, :-1]).float().mean() > 0.999


def test_features_are_the_hidden_states_that_tokens_were_predicted_from(
    tiny_target: LlamaForCausalLM, toy_continuations: Continuations, toy_tokens: np.ndarray
) -> None:
    for rows in (toy_continuations, corpus_rows(tiny_target, toy_tokens, 5, LENGTH, seed=0)):
        with torch.inference_mode():
            hidden = tiny_target.model(torch.from_numpy(rows.tokens.astype(np.int64))).last_hidden_state
        stored = torch.from_numpy(rows.features.astype(np.float32))
        torch.testing.assert_close(stored[:, 1:], hidden[:, :-1], atol=4e-3, rtol=2e-3)
        assert (stored[:, 0] == 0).all()


def test_the_same_seed_gives_the_same_continuation(tiny_target: LlamaForCausalLM) -> None:
    prompts, temperatures = torch.randint(0, 60, (3, 12)), np.full(3, 0.8, np.float32)
    first, second, other = (continue_prompts(tiny_target, prompts, LENGTH, temperatures, seed) for seed in (1, 1, 2))
    assert (first.tokens == second.tokens).all()
    assert (first.tokens != other.tokens).any()


def test_sampled_rows_are_drawn_as_the_verifier_draws(
    tiny_target: LlamaForCausalLM, toy_continuations: Continuations
) -> None:
    sampled = np.flatnonzero(toy_continuations.temperatures > 0)
    assert len(sampled)
    for row in sampled:
        text, first = toy_continuations.tokens[row], int(toy_continuations.prompt_lengths[row])
        with torch.inference_mode():
            logits = tiny_target(torch.from_numpy(text.astype(np.int64))[None]).logits[0, first - 1 : -1]
        weights = (logits / float(toy_continuations.temperatures[row])).softmax(-1)
        positions = range(first, len(text))
        drawn = draw(weights, [int(toy_continuations.seeds[row])] * len(positions), positions)
        assert drawn.tolist() == text[first:].tolist()


def test_corpus_rows_are_windows_whose_next_token_is_certain(
    tiny_target: LlamaForCausalLM, toy_tokens: np.ndarray
) -> None:
    rows = corpus_rows(tiny_target, toy_tokens, 5, 30, seed=0)
    text = toy_tokens.astype(np.int16).tobytes()
    assert all(row.tobytes() in text for row in rows.tokens)
    assert (rows.candidates == rows.tokens[:, :, None]).all()
    assert (rows.log_probabilities == 0).all()
