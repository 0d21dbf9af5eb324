"""Training resumes identically, learns, and writes a folder that the service can draft with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from drafters.base import DraftRequest
from drafters.coupling import known_noise
from drafters.diffusion.drafter import DiffusionDrafter
from drafters.diffusion.masked import MaskedRequest
from drafters.policy.policy import MIN_SURVIVAL
from drafters.search.causal_model import CausalModel
from models.training.blocks import BLOCK_SIZE
from models.training.continuations import Continuations, corpus_rows
from models.training.distillation import Phase, distil, train_drafter
from models.training.drafter import build_drafter, save_drafter
from models.training.evaluate import accepted_at_every_anchor, drafts_at, walk
from models.training.examples import drawn_contexts, missing_features
from models.training.hints import NO_HINT, FreeDrafts, Lessons, free_drafts
from tests.unit.models.conftest import LENGTH, RECIPE, VOCABULARY_SIZE, lessons_of
from transformer.model import Transformer


def test_a_stopped_run_continues_identically(
    tiny_target: LlamaForCausalLM, toy_lessons: Lessons, tmp_path: Path
) -> None:
    whole = train_drafter(tiny_target, toy_lessons, toy_lessons, tmp_path, RECIPE)
    stopped = build_drafter(tiny_target, RECIPE)
    work = tmp_path / "stopped"
    work.mkdir()
    # stop inside the second phase: the schedule is that of the whole run, but the loop ends early
    distil(stopped, toy_lessons, work, RECIPE, Phase("drafter-start", RECIPE.start_steps, 0.0, RECIPE.seed))
    phase = Phase("drafter", RECIPE.steps, RECIPE.decay_share, RECIPE.seed + 1)
    distil(stopped, toy_lessons, work, RECIPE, phase, stop_at=2)
    resumed = train_drafter(tiny_target, toy_lessons, toy_lessons, work, RECIPE)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.model.layers[0].mlp.up_proj.weight, stopped.model.layers[0].mlp.up_proj.weight)


def test_training_learns_a_predictable_text(tiny_target: LlamaForCausalLM, tmp_path: Path) -> None:
    counting = (np.arange(2000) % 12 + 1).astype(np.int32)
    rows = corpus_rows(tiny_target, counting, 32, LENGTH, seed=0)
    recipe = replace(RECIPE, start_steps=0, steps=120, muon_rate=0.05, adam_rate=2e-2)
    before = accepted_at_every_anchor(build_drafter(tiny_target, recipe).eval(), rows, 4).mean()
    lessons = lessons_of(rows)
    trained = train_drafter(tiny_target, lessons, lessons, tmp_path, recipe).eval()
    after = accepted_at_every_anchor(trained, rows, 4).mean()
    assert before < 0.5
    assert after > 3


def test_the_drafter_learns_from_hidden_states_alone(tiny_target: LlamaForCausalLM, tmp_path: Path) -> None:
    """Tokens are random, but the hidden state that comes with each names the next one."""
    random = np.random.default_rng(0)
    rows = corpus_rows(tiny_target, random.integers(1, VOCABULARY_SIZE, 4000).astype(np.int32), 64, LENGTH, seed=0)
    codes = random.standard_normal((VOCABULARY_SIZE, rows.features.shape[2])).astype(np.float16)
    rows.features[:, :-1] = codes[rows.tokens[:, 1:]]
    recipe = replace(RECIPE, start_steps=0, steps=200, muon_rate=0.05, adam_rate=2e-2, unconditioned_share=0.0)
    lessons = lessons_of(rows)
    drafter = train_drafter(tiny_target, lessons, lessons, tmp_path, recipe).eval()
    assert (accepted_at_every_anchor(drafter, rows, 1)).mean() > 0.5
    rows.features[:] = 0
    assert (accepted_at_every_anchor(drafter, rows, 1)).mean() < 0.1


def test_the_drafter_learns_from_hints_alone(tiny_target: LlamaForCausalLM, tmp_path: Path) -> None:
    """Tokens are random, but a free draft from elsewhere knows the next ones."""
    random = np.random.default_rng(0)
    rows = corpus_rows(tiny_target, random.integers(1, VOCABULARY_SIZE, 4000).astype(np.int32), 64, LENGTH, seed=0)
    rows.features[:] = 0
    following = np.pad(rows.tokens, ((0, 0), (0, 4)), constant_values=NO_HINT)
    drafts = np.lib.stride_tricks.sliding_window_view(following, 4, axis=1)[:, 1:].astype(np.int16)
    known = FreeDrafts(drafts, np.zeros(rows.tokens.shape, np.float16))
    recipe = replace(RECIPE, start_steps=0, steps=200, muon_rate=0.05, adam_rate=2e-2, unhinted_share=0.0)
    drafter = train_drafter(tiny_target, Lessons(rows, known), Lessons(rows, known), tmp_path, recipe).eval()
    rows.tokens[:, :1] = 1
    anchors, text = torch.arange(10, 70), torch.from_numpy(rows.tokens.astype(np.int64))
    features = torch.from_numpy(rows.features.astype(np.float32))
    true = text.unfold(1, 4, 1)[:, anchors + 1]
    hinted = drafts_at(drafter, text, features, anchors, 4, known.tokens) == true
    alone = drafts_at(drafter, text, features, anchors, 4) == true
    assert hinted[..., 1:].float().mean() > 0.5  # the first token's row is a clean row, which gets no hints
    assert alone[..., 1:].float().mean() < 0.1


def test_free_drafts_are_those_of_serving(toy_continuations: Continuations, toy_lessons: Lessons) -> None:
    """A request with this seed gets the same chains, cut where their probability of survival is too small."""
    causal = CausalModel(VOCABULARY_SIZE)
    drafts = free_drafts(causal, toy_continuations)
    row = int(np.flatnonzero(toy_continuations.temperatures > 0)[0])
    text, seed = toy_continuations.tokens[row].astype(np.int32), int(toy_continuations.seeds[row])
    request = DraftRequest("", text[:60], 16, None, float(toy_continuations.temperatures[row]), seed)
    (chain,) = causal.draft([request.tokens], [16], [MIN_SURVIVAL], known_noise([request]))
    known = [token for token in drafts.tokens[row, 59].tolist() if token != NO_HINT]
    assert tuple(known) == chain.tokens
    assert drafts.promised[row, 59] == np.float16(chain.confidences.cumprod().sum())
    assert (drafts.tokens[row, : toy_continuations.prompt_lengths[row] - 1] == NO_HINT).all()


def test_drafts_see_a_bounded_context_in_most_sequences() -> None:
    recipe = replace(RECIPE, contexts=(4, 7), whole_share=0.25)
    blocks = np.tile(np.repeat(np.arange(5), 3), (2000, 1))
    contexts = drawn_contexts(50, blocks, recipe, np.random.default_rng(0))
    is_whole = (contexts == 50).all(1)
    assert 0.22 < is_whole.mean() < 0.28
    bounded = contexts[~is_whole]
    assert (bounded[:, :50] == 7).all()
    of_blocks = bounded[:, 50:].reshape(-1, 5, 3)
    assert (of_blocks == of_blocks[:, :, :1]).all()
    assert set(np.unique(of_blocks)) == {4, 5, 6, 7}


def test_hidden_states_are_withheld_at_the_beginning_of_some_sequences() -> None:
    missing = missing_features(4000, 50, 0.2, np.random.default_rng(0))
    counts = missing.sum(1)
    assert all(row[:count].all() for row, count in zip(missing, counts, strict=True))
    assert 0.17 < (counts > 0).mean() < 0.23
    assert 0.08 < (counts == 50).mean() < 0.12
    assert len(set(counts.tolist())) > 40


def test_the_saved_folder_drafts_in_the_service_as_in_training(
    tiny_target: LlamaForCausalLM, toy_continuations: Continuations, tmp_path: Path
) -> None:
    drafter = build_drafter(tiny_target, RECIPE)
    torch.nn.init.normal_(drafter.model.target_projection.weight, std=0.2)
    torch.nn.init.normal_(drafter.model.hint_gates, std=0.5)
    target_folder = tmp_path / "target"
    target_folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (target_folder / name).write_text("{}")
    save_drafter(drafter, target_folder, tmp_path / "drafter", RECIPE, {})
    drafter.float().eval()  # saving has rounded the weights to bfloat16
    model = Transformer.load(tmp_path / "drafter")
    assert model.config.attention == "block"
    assert model.config.logits_shifted
    assert len(model.config.mask_token_ids) == model.config.block_size == BLOCK_SIZE
    service = DiffusionDrafter(model, num_slots=1, vocabulary_size=VOCABULARY_SIZE)
    text = toy_continuations.tokens[0].astype(np.int32)
    anchors = torch.tensor([20, 33, 34, 50])
    features = torch.from_numpy(toy_continuations.features[0].astype(np.float32))
    free = np.full((1, LENGTH, 6), NO_HINT, np.int16)
    for drafts in (None, free):
        expected = drafts_at(drafter, torch.from_numpy(text.astype(np.int64))[None], features[None], anchors, 8, drafts)
        for anchor, draft in zip(anchors.tolist(), expected[0], strict=True):
            hints = () if drafts is None else [token for token in free[0, anchor].tolist() if token != NO_HINT]
            service.release("one")
            logits = service.propose([MaskedRequest("one", text[: anchor + 1], 8, features[: anchor + 1], hints)])
            assert logits.argmax(-1).tolist() == draft.tolist()
        free[0, anchors] = np.random.default_rng(0).integers(1, VOCABULARY_SIZE, (len(anchors), 6))
        free[0, anchors[0], 3:] = NO_HINT


def test_a_walk_advances_by_accepted_tokens_and_the_extra_one() -> None:
    acceptance = walk(np.array([[2, 9, 9, 0, 1, 9]]), 3)
    assert (acceptance.accepted, acceptance.steps) == (1.0, 3)
    assert acceptance.survival == (round(2 / 3, 4), round(1 / 3, 4), 0.0)
