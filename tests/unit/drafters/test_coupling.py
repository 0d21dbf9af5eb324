"""A draft that knows the noise of the draw guesses better, and no worse without noise."""

import numpy as np
import pytest
import torch

from drafters.base import DraftRequest, Tokens
from drafters.coupling import CAUSAL_TEMPERATURE, known_noise
from drafters.search.causal_model import CausalModel
from drafters.search.lattice import DraftLattice, LatticeOptions
from drafters.search.ngram import NgramModel
from drafters.search.path_search import PathSearch
from models.training.ngram import fit_ngram
from transformer.noise import draw_tokens, noise_keys

VOCABULARY = 40
EVERYTHING = LatticeOptions(candidate_mass=1.0, max_candidates=VOCABULARY)


def request(seed: int | None, temperature: float, tokens: Tokens) -> DraftRequest:
    return DraftRequest("one", tokens, 8, None, temperature, seed)


def target_draws(log_probs: torch.Tensor, temperature: float, seed: int, first_position: int) -> list[int]:
    """Return the tokens that the verifier would draw, row by row."""
    count = len(log_probs)
    keys = noise_keys(np.full(count, seed, np.uint64), np.arange(first_position, first_position + count))
    drawn = np.empty(count, np.int64)
    draw_tokens((log_probs / temperature).softmax(-1).numpy(), keys, drawn)
    return drawn.tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("lattice_temperature", [0.5, 1.0])
def test_a_lattice_of_the_targets_own_distribution_drafts_its_very_draws(
    temperature: float, lattice_temperature: float
) -> None:
    history = np.arange(6, dtype=np.int32)
    search = PathSearch(CausalModel(VOCABULARY, use_copy=False), beam_width=3, lattice_weight=1.0)
    for seed in range(30):
        target = (torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2).log_softmax(-1)
        lattice = DraftLattice.from_logits(target / lattice_temperature, [8], EVERYTHING)
        noise = known_noise([request(seed, temperature, history)], lattice_temperature)
        (path,) = search.search([history], lattice, noise)
        assert list(path.tokens) == target_draws(target, temperature, seed, len(history))


def test_greedy_requests_and_unknown_seeds_are_drafted_for_without_noise() -> None:
    history = np.arange(6, dtype=np.int32)
    search = PathSearch(CausalModel(VOCABULARY, use_copy=False), lattice_weight=0.7)
    logits = torch.randn(24, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2
    lattice = DraftLattice.from_logits(logits, [8, 8, 8], EVERYTHING)
    requests = [request(3, 0.0, history), request(None, 1.0, history), request(3, 1.0, history)]
    plain = search.search([history] * 3, lattice)
    mixed = search.search([history] * 3, lattice, known_noise(requests))
    for before, after in zip(plain[:2], mixed[:2], strict=True):
        assert (before.tokens, before.score, before.confidences.tolist()) == (
            after.tokens,
            after.score,
            after.confidences.tolist(),
        )
    assert plain[2].tokens != mixed[2].tokens


@pytest.fixture(scope="module")
def ngram() -> NgramModel:
    random = np.random.default_rng(0)
    table = random.dirichlet(np.full(VOCABULARY, 0.15), VOCABULARY)
    text = [0]
    for _ in range(20_000):
        text.append(int(random.choice(VOCABULARY, p=table[text[-1]])))
    return fit_ngram([np.array(text, np.int32)], VOCABULARY, order=2)


def test_free_drafts_foretell_draws_far_better_with_the_noise_than_without(ngram: NgramModel) -> None:
    """Here the target is the n-gram model itself, at the temperature that it approximates."""
    causal = CausalModel(VOCABULARY, ngram, use_copy=False)
    right = {"with": 0, "without": 0}
    for seed in range(400):
        history = np.array([seed % VOCABULARY], np.int32)
        known = request(seed, CAUSAL_TEMPERATURE, history)
        probabilities = np.exp([causal_log_prob(causal, history, token) for token in range(VOCABULARY)])
        (drawn,) = target_draws(torch.from_numpy(probabilities).log()[None], 1.0, seed, 1)
        for name, noise in (("with", known_noise([known])), ("without", None)):
            (chain,) = causal.draft([history], [1], None, noise)
            right[name] += chain.tokens == (drawn,)
    assert right["with"] > 1.2 * right["without"], right


def causal_log_prob(causal: CausalModel, history: Tokens, token: int) -> float:
    """Take the score from the search itself, with a lattice of one token."""
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, token] = 0.0
    lattice = DraftLattice.from_logits(logits, [1], LatticeOptions(1.0, 1))
    (path,) = PathSearch(causal, lattice_weight=0.0, mode="argmax").search([history], lattice)
    return float(path.log_causal[0])


def test_confidence_is_high_where_the_lead_is_large(ngram: NgramModel) -> None:
    causal = CausalModel(VOCABULARY, ngram, use_copy=False)
    outcomes = []
    for seed in range(600):
        history = np.array([seed % VOCABULARY], np.int32)
        (chain,) = causal.draft([history], [1], None, known_noise([request(seed, CAUSAL_TEMPERATURE, history)]))
        probabilities = np.exp([causal_log_prob(causal, history, token) for token in range(VOCABULARY)])
        (drawn,) = target_draws(torch.from_numpy(probabilities).log()[None], 1.0, seed, 1)
        outcomes.append((float(chain.confidences[0]), chain.tokens == (drawn,)))
    outcomes.sort()
    low, high = outcomes[:200], outcomes[-200:]
    assert sum(right for _, right in high) > sum(right for _, right in low)
    assert all(0.0 <= confidence <= 1.0 for confidence, _ in outcomes)
