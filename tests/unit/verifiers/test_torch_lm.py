"""Speculation changes no token: the verifier, compared with its own plain decoding and with transformers."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import TOKENIZER_LENGTH, VOCABULARY_SIZE, write_checkpoint
from transformer.integer_model import IntegerTransformer
from transformer.model import Transformer
from verifiers.base import SamplingRules, TokenLogprobs, VerifyRequest
from verifiers.torch_lm import TorchVerifier

CONTEXT = 256
NUM_SLOTS = 20
PROMPT = [10, 20, 30, 40, 50]

RULES = {
    "greedy": SamplingRules(1, temperature=0.0),
    "sampled": SamplingRules(2),
    "cool": SamplingRules(3, temperature=0.5),
    "hot": SamplingRules(4, temperature=1.6),
    "top_k": SamplingRules(5, top_k=7),
    "top_p": SamplingRules(6, top_p=0.8),
    "min_p": SamplingRules(7, min_p=0.1),
    "all cuts": SamplingRules(8, temperature=1.2, top_k=50, top_p=0.9, min_p=0.02),
    "penalties": SamplingRules(9, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3),
    "greedy penalties": SamplingRules(10, temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2),
    "bias": SamplingRules(11, logit_bias={5: 4.0, 6: -100.0, 99: 3.0}),
    "allowed": SamplingRules(12, allowed_token_ids=range(40, 90)),
    "bad words": SamplingRules(
        13, bad_words=[[7], [8, 9], [100, 101, 102]], allowed_token_ids=[7, 8, 9, 100, 101, 102]
    ),
    "min tokens": SamplingRules(14, min_tokens=30, stop_token_ids=[50, 51], allowed_token_ids=range(48, 56)),
}


WIDE: dict[str, int] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}  # enough for compiled passes


@pytest.fixture(scope="module", params=["layer by layer", "compiled", "integer"])
def arithmetic(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(arithmetic: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    write_checkpoint(folder, **({} if arithmetic == "layer by layer" else WIDE))
    return folder


@pytest.fixture(scope="module")
def verifier(arithmetic: str, target: Path) -> TorchVerifier:
    model = IntegerTransformer.load(target, num_threads=2) if arithmetic == "integer" else Transformer.load(target)
    return TorchVerifier(model, NUM_SLOTS, CONTEXT, TOKENIZER_LENGTH)


class Decoding:
    """One request in flight, as an engine keeps it."""

    def __init__(self, slot: int, prompt: Sequence[int], rules: SamplingRules) -> None:
        self.slot, self.tokens, self.rules, self.num_prompt = slot, list(prompt), rules, len(prompt)
        self.num_cached = 0
        self.logprobs: list[TokenLogprobs] = []

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def request(self, draft: Sequence[int] = ()) -> VerifyRequest:
        new = len(self.tokens) - self.num_cached
        tokens = np.array(self.tokens, dtype=np.int32)
        return VerifyRequest(self.slot, tokens, self.num_prompt, self.num_cached, new, draft, self.rules)


def advance(verifier: TorchVerifier, decodings: Sequence[Decoding], drafts: Sequence[Sequence[int]]) -> list[int]:
    """Run one step; return the number of accepted tokens of each."""
    requests = [decoding.request(draft) for decoding, draft in zip(decodings, drafts, strict=True)]
    accepted = []
    for decoding, draft, result in zip(decodings, drafts, verifier.verify(requests), strict=True):
        assert result.verification is not None
        count = result.verification.num_accepted
        decoding.num_cached = len(decoding.tokens) + count
        decoding.tokens += [*draft[:count], result.verification.next_token]
        decoding.logprobs += result.verification.logprobs
        accepted.append(count)
    return accepted


def decode(
    verifier: TorchVerifier, count: int, rules: SamplingRules, slot: int = 0, prompt: Sequence[int] = PROMPT
) -> Decoding:
    decoding = Decoding(slot, prompt, rules)
    for _ in range(count):
        advance(verifier, [decoding], [()])
    return decoding


def some_draft(truth: Sequence[int], done: int, source: random.Random) -> list[int]:
    """Return up to 32 tokens: right, right up to a point, or garbage (also ids outside the vocabulary)."""
    length = min(source.randrange(33), len(truth) - done - 1)
    draft = list(truth[done : done + length])
    kind = source.random()
    if kind < 0.5 and draft:
        draft[source.randrange(len(draft))] = source.randrange(-5, VOCABULARY_SIZE + 50)
    elif kind < 0.7:
        draft = [source.randrange(-5, VOCABULARY_SIZE + 50) for _ in draft]
    return draft


@pytest.mark.parametrize("name", RULES)
def test_any_drafts_give_the_tokens_of_plain_decoding(verifier: TorchVerifier, name: str) -> None:
    truth = decode(verifier, 120, RULES[name]).output
    assert len(set(truth)) > 4
    for seed in range(3):
        source, decoding, num_accepted = random.Random(seed), Decoding(1, PROMPT, RULES[name]), 0
        while len(decoding.output) < len(truth):
            draft = some_draft(truth, len(decoding.output), source)
            num_accepted += advance(verifier, [decoding], [draft])[0]
        assert decoding.output == truth
        assert num_accepted > 20


def test_a_mixed_batch_gives_every_request_the_tokens_of_plain_decoding(verifier: TorchVerifier) -> None:
    """All rules at once, with prompts of all lengths, in scattered slots, joining at different steps."""
    source = random.Random(0)
    prompts = [[source.randrange(TOKENIZER_LENGTH) for _ in range(source.randrange(1, 90))] for _ in RULES]
    truths = [
        decode(verifier, 60, rules, 0, prompt).output for rules, prompt in zip(RULES.values(), prompts, strict=True)
    ]
    slots = source.sample(range(NUM_SLOTS), len(RULES))
    decodings = [
        Decoding(slot, prompt, rules) for slot, prompt, rules in zip(slots, prompts, RULES.values(), strict=True)
    ]
    step = 0
    while any(len(decoding.output) < 60 for decoding in decodings):
        running = [i for i, d in enumerate(decodings) if len(d.output) < 60 and i <= step]
        drafts = [some_draft(truths[i], len(decodings[i].output), source) for i in running]
        advance(verifier, [decodings[i] for i in running], drafts)
        step += 1
    assert [decoding.output for decoding in decodings] == truths


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_greedy_equals_transformers_generate(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family)  # type: ignore[arg-type]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    own = TorchVerifier(Transformer.load(tmp_path), 1, CONTEXT)
    source = random.Random(1)
    for _ in range(5):
        prompt = [source.randrange(TOKENIZER_LENGTH) for _ in range(source.randrange(1, 40))]
        inputs = torch.tensor([prompt])
        expected = reference.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=80, do_sample=False, eos_token_id=None
        )
        assert decode(own, 80, RULES["greedy"], 0, prompt).output == expected[0, len(prompt) :].tolist()


def test_prefill_in_chunks_draws_nothing_until_the_end(verifier: TorchVerifier) -> None:
    prompt = list(range(100))
    expected = decode(verifier, 1, RULES["sampled"], 0, prompt).output[0]
    results = [
        verifier.verify([VerifyRequest(3, prompt, 100, start, count, (), RULES["sampled"])])[0]
        for start, count in [(0, 40), (40, 1), (41, 59)]
    ]
    assert [result.verification is None for result in results] == [True, True, False]
    assert results[2].verification is not None
    assert results[2].verification.next_token == expected


def test_copied_prefix_continues_like_a_prompt_that_is_read_again(verifier: TorchVerifier) -> None:
    first = decode(verifier, 20, RULES["greedy"], 4)
    verifier.copy_slot(4, 9, first.num_cached)
    copied = Decoding(9, first.tokens, RULES["hot"])
    copied.num_cached = first.num_cached
    for _ in range(20):
        advance(verifier, [copied], [()])
    assert copied.output == decode(verifier, 20, RULES["hot"], 5, first.tokens).output


def test_drafts_may_reach_beyond_the_end_of_the_context(verifier: TorchVerifier) -> None:
    decoding = Decoding(0, [1] * (CONTEXT - 1), RULES["greedy"])
    advance(verifier, [decoding], [[2] * 32])
    advance(verifier, [decoding], [[2] * 32])
    assert len(decoding.output) >= 2


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny_target: Path) -> None:
    model = Transformer.load(tiny_target)
    bias = SamplingRules(0, temperature=2.0, logit_bias=dict.fromkeys(range(100, VOCABULARY_SIZE), 100.0))
    assert max(decode(TorchVerifier(model, 1, CONTEXT), 60, bias).output) >= 120
    assert max(decode(TorchVerifier(model, 1, CONTEXT, 120), 60, bias).output) in range(100, 120)


def test_logprobs_are_those_of_the_raw_logits(target: Path, verifier: TorchVerifier, arithmetic: str) -> None:
    rules = replace(RULES["all cuts"], logit_bias={3: 5.0}, logprobs=4)
    plain = decode(verifier, 40, rules)
    drafted = Decoding(2, PROMPT, rules)
    while len(drafted.output) < 40:
        advance(verifier, [drafted], [some_draft(plain.output, len(drafted.output), random.Random(5))])
    reference = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([plain.tokens])).logits[0, len(PROMPT) - 1 : -1], dim=-1)
    for decoding in (plain, drafted):
        assert [entry.token for entry in decoding.logprobs] == plain.output
        for entry, row in zip(decoding.logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=0.5 if arithmetic == "integer" else 1e-4)
            if arithmetic == "integer":
                continue  # rounded weights and rows
            assert entry.rank == 1 + int((row > row[entry.token]).sum())
            assert [token for token, _ in entry.top] == row.topk(4).indices.tolist()


def test_prompt_logprobs_cover_the_prompt_once_whatever_the_chunks(verifier: TorchVerifier) -> None:
    prompt = list(range(50, 90))

    def entries(chunks: list[tuple[int, int]]) -> list[TokenLogprobs]:
        requests = [VerifyRequest(0, prompt, 40, start, count, (), RULES["greedy"], 2) for start, count in chunks]
        return [entry for request in requests for entry in verifier.verify([request])[0].prompt_logprobs]

    whole, parts = entries([(0, 40)]), entries([(0, 1), (1, 20), (21, 19)])
    assert [entry.token for entry in whole] == [entry.token for entry in parts] == prompt[1:]
    assert [e.logprob for e in whole] == pytest.approx([e.logprob for e in parts], abs=1e-4)
    assert all(len(entry.top) == 2 for entry in whole)


def test_rules_that_ban_everything_fail_that_request_alone(verifier: TorchVerifier) -> None:
    nothing = Decoding(1, PROMPT, SamplingRules(0, allowed_token_ids=[]))
    other = Decoding(2, PROMPT, RULES["sampled"])
    results = verifier.verify([nothing.request([1, 2]), other.request()])
    assert results[0].verification is None
    assert "ban every token" in results[0].error
    assert results[0].is_request_at_fault
    assert results[1].verification is not None
    assert results[1].error == ""
    assert results[1].verification.next_token == decode(verifier, 1, RULES["sampled"]).output[0]


@pytest.mark.parametrize("sizes", [{}, WIDE])
@pytest.mark.parametrize("rules", [RULES["greedy"], RULES["sampled"], RULES["penalties"]])
def test_logits_that_are_not_numbers_fail_that_request_alone(
    tmp_path: Path, rules: SamplingRules, sizes: dict[str, int]
) -> None:
    """One embedding row is broken: requests that read that token fail, and leave nothing behind."""
    model = write_checkpoint(tmp_path, tied=False, **sizes)
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = float("nan")
    model.save_pretrained(tmp_path)
    broken = TorchVerifier(Transformer.load(tmp_path), 3, CONTEXT)
    unable, able, drafted = (Decoding(slot, PROMPT, rules) for slot in range(3))
    unable.tokens[2] = 200
    results = broken.verify([unable.request(), able.request(), drafted.request([200] * 5)])
    assert results[2].error == ""  # a wrong draft is rejected, even if its own row spoils the pass
    assert "not a number" in results[0].error
    assert results[0].verification is None
    expected = decode(broken, 30, rules, 1).output
    again, long = Decoding(0, PROMPT[:2], rules), Decoding(2, PROMPT * 10, rules)
    for _ in range(10):  # in slots that held NaN before, padded to the longer neighbour
        advance(broken, [again, long], [(), ()])
    assert again.output == decode(broken, 10, rules, 1, PROMPT[:2]).output
    assert results[1].error == ""
    assert results[1].verification is not None
    assert results[1].verification.next_token == expected[0]
    assert results[2].verification == results[1].verification
    far, plain = Decoding(0, PROMPT, rules), Decoding(1, PROMPT, rules)
    (result,) = broken.verify([far.request([*expected[:9], 200, 200])])  # right for more rows than one attention call
    assert result.error == ""
    assert result.verification is not None
    assert result.verification.next_token == expected[0]
    advance(broken, [far, plain], [(), ()])
    assert far.output == plain.output


def test_no_requests_need_no_pass(verifier: TorchVerifier) -> None:
    assert verifier.verify([]) == []


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-30, 9e-6])
def test_a_temperature_too_small_for_arithmetic_is_greedy(verifier: TorchVerifier, temperature: float) -> None:
    greedy = Decoding(0, PROMPT, SamplingRules(1, temperature=0.0))
    tiny = Decoding(1, PROMPT, SamplingRules(2, temperature=temperature, logprobs=2))
    for _ in range(8):
        advance(verifier, [greedy, tiny], [(), ()])
    assert tiny.output == greedy.output


def test_rules_that_fail_affect_their_own_request_alone(verifier: TorchVerifier) -> None:
    alone = Decoding(0, PROMPT, SamplingRules(1))
    advance(verifier, [alone], [()])
    neighbour = Decoding(1, PROMPT, SamplingRules(1))
    broken = Decoding(2, PROMPT, SamplingRules(1, logit_bias={"no id": 1.0}))  # type: ignore[dict-item]
    fine, failed = verifier.verify([neighbour.request(), broken.request()])
    assert failed.error
    assert fine.verification is not None
    assert fine.verification.next_token == alone.output[0]


def test_hidden_states_are_those_that_tokens_were_predicted_from(tiny_target: Path) -> None:
    """Also after tokens were drafted, rejected or copied between slots. Some drafters read them."""
    verifier = TorchVerifier(Transformer.load(tiny_target), 3, CONTEXT, TOKENIZER_LENGTH, keep_hidden_states=True)
    decodings = [Decoding(0, PROMPT, RULES["greedy"]), Decoding(1, PROMPT[:3], RULES["sampled"])]
    for step in range(12):
        right = [1, 2, 3] if step % 2 else []
        advance(verifier, decodings, [right, [7] * (step % 5)])
    verifier.copy_slot(0, 2, 10)
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    for slot, decoding, length in ((0, decodings[0], None), (1, decodings[1], None), (2, decodings[0], 10)):
        tokens = decoding.tokens[:length]
        states = verifier.hidden_states(slot)
        assert states is not None
        kept = states[: len(tokens)]
        with torch.inference_mode():
            expected = model.model(torch.tensor([tokens])).last_hidden_state[0]
        assert (kept[0] == 0).all()
        torch.testing.assert_close(kept[1:], expected[:-1], atol=1e-4, rtol=1e-4)


def test_hidden_states_are_not_kept_unasked(verifier: TorchVerifier) -> None:
    assert verifier.hidden_states(0) is None
