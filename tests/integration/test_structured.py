"""Structured output keeps to its structure, is the same whatever is drafted, and is drafted well."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from drafters.base import Draft, DraftRequest
from drafters.pipeline import DraftPipeline
from service.engine.base import GenerationRequest, NoTokenLeftError, SpeculationOptions
from service.engine.scheduler import SchedulerLimits
from service.settings import load_settings
from service.structured import Structure, StructureCompiler, StructureSpec
from service.wiring import build_pipeline, build_tokenizer
from tests.checkpoints import CONTEXT_LENGTH, VOCABULARY_SIZE
from tests.integration.api_server import error_of, post
from tests.unit.engine.drafters import RuleDrafter, garbage, no_drafts
from tests.unit.engine.driver import Driver
from transformer.model import Transformer
from verifiers.base import SamplingRules
from verifiers.torch_lm import TorchVerifier

PERSON = {
    "type": "object",
    "properties": {
        "kind": {"const": "a person of whom something is known"},
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["kind", "name", "age", "tags"],
    "additionalProperties": False,
}
SPECS = {
    "schema": StructureSpec("json_schema", json.dumps(PERSON)),
    "regex": StructureSpec("regex", r"[a-f]{3}-(alpha|beta|gamma)-[0-9]{2,4}!"),
    "grammar": StructureSpec(
        "grammar", 'start: sum ("; " sum)?\nsum: term " + " term\nterm: /[0-9]{1,3}/ | "(" /[0-9]/ ")"'
    ),
    "choice": StructureSpec("choice", json.dumps(["yes, of course", "no, never", "äh – vielleicht"])),
}


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Transformer:
    return Transformer.load(tiny_target)


@pytest.fixture(scope="module")
def compiler(tiny_target: Path) -> Iterator[StructureCompiler]:
    tokenizer = build_tokenizer(tiny_target)
    compiler = StructureCompiler(tokenizer.to_json, tokenizer.end_token_ids, 8)
    yield compiler
    compiler.close()


def verifier(model: Transformer, num_slots: int = 6) -> TorchVerifier:
    return TorchVerifier(model, num_slots, CONTEXT_LENGTH, 257)


def requests(structures: list[Structure], temperature: float) -> list[GenerationRequest]:
    """Every structure twice, and a free text in between."""
    rules = SamplingRules(seed=4, temperature=temperature, stop_token_ids=(256,), repetition_penalty=1.2, logprobs=1)
    prompt = tuple(b"Known: ")
    free = GenerationRequest("free", prompt, 40, replace(rules, seed=9))
    return [
        *(
            GenerationRequest(f"{i}-{j}", (*prompt, j), 400, replace(rules, seed=i + 10 * j), structure=structure)
            for i, structure in enumerate(structures)
            for j in range(2)
        ),
        free,
    ]


def text_of(tokens: list[int]) -> str:
    assert tokens[-1] != 256
    return bytes(tokens).decode("utf-8")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_keep_to_their_structure_and_do_not_depend_on_drafts(
    temperature: float, model: Transformer, compiler: StructureCompiler, tiny_target: Path, tiny_drafter: Path
) -> None:
    wanted = requests([compiler.compile(spec) for spec in SPECS.values()], temperature)
    plain = [Driver(verifier(model, 1), no_drafts()).outputs([request])[0] for request in wanted]
    for text in (text_of(tokens) for tokens in plain[:2]):
        parsed = json.loads(text)
        assert list(parsed) == PERSON["required"]
        assert 0 <= parsed["age"] <= 150
        assert set(parsed["tags"]) <= {"red", "green", "blue"}
    assert all(re.fullmatch(SPECS["regex"].definition, text_of(tokens)) for tokens in plain[2:4])
    assert all(re.fullmatch(r"[0-9+(); ]+", text_of(tokens)) for tokens in plain[4:6])
    assert all(text_of(tokens) in json.loads(SPECS["choice"].definition) for tokens in plain[6:8])
    for policy in ("goodput", "fixed", "paper"):
        settings = load_settings(
            overrides={"model.target": tiny_target, "model.drafter": str(tiny_drafter), "speculation.policy": policy}
        )
        pipeline = build_pipeline(settings, model.config, Transformer.load(tiny_drafter))
        assert Driver(verifier(model), pipeline).outputs(wanted) == plain
    assert Driver(verifier(model), RuleDrafter(garbage(VOCABULARY_SIZE), 9)).outputs(wanted) == plain
    chunked = SchedulerLimits(max_running=3, prefill_chunk_tokens=3)
    assert Driver(verifier(model), RuleDrafter(garbage(VOCABULARY_SIZE), 3), chunked).outputs(wanted) == plain


class Unpruned:
    """A pipeline that is told of no structure."""

    def __init__(self, pipeline: DraftPipeline) -> None:
        self._pipeline = pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def propose(self, requests: Sequence[DraftRequest], num_prefill_rows: int) -> list[Draft]:
        return self._pipeline.propose([replace(request, constraint=None) for request in requests], num_prefill_rows)


def test_the_structure_prunes_the_drafts(
    model: Transformer, compiler: StructureCompiler, tiny_target: Path, tiny_drafter: Path
) -> None:
    """Of random models nothing but the structure can make a draft right."""
    overrides = {"model.target": tiny_target, "model.drafter": str(tiny_drafter), "speculation.policy": "fixed"}
    drafter = Transformer.load(tiny_drafter)
    structure = compiler.compile(
        StructureSpec("choice", json.dumps([f"{c}: there is one way to go on" for c in "abc"]))
    )

    def accepted_share(is_pruned: bool, **sources: bool) -> float:
        changes = {f"speculation.{name}": value for name, value in sources.items()}
        settings = load_settings(overrides=overrides | changes)
        pipeline = build_pipeline(settings, model.config, None if "diffusion" in sources else drafter)
        rules = SamplingRules(seed=0, stop_token_ids=(256,))
        driver = Driver(verifier(model), pipeline if is_pruned else Unpruned(pipeline))
        driver.outputs([GenerationRequest("r", (1, 2, 3), 100, rules, structure=structure)])
        stats = driver.received["r"].deltas[-1].stats
        assert stats is not None
        return stats.num_accepted_draft_tokens / max(stats.num_draft_tokens, 1)

    for sources in ({"free_drafts": False}, {"diffusion": False}):
        assert accepted_share(True, **sources) > 0.9
        assert accepted_share(False, **sources) < 0.2


def test_a_structure_that_leaves_nothing_fails_that_request_alone(
    model: Transformer, compiler: StructureCompiler
) -> None:
    good, bad, *_ = requests([compiler.compile(SPECS["choice"])], 0.0)
    bad = replace(bad, rules=replace(bad.rules, allowed_token_ids=(1, 2)))
    driver = Driver(verifier(model), no_drafts())
    outputs = driver.outputs([good, bad])
    assert text_of(outputs[0]) in json.loads(SPECS["choice"].definition)
    assert isinstance(driver.received[bad.request_id].error, NoTokenLeftError)


def test_speculation_can_be_off(model: Transformer, compiler: StructureCompiler) -> None:
    request = replace(requests([compiler.compile(SPECS["regex"])], 0.0)[0], speculation=SpeculationOptions(False))
    assert re.fullmatch(SPECS["regex"].definition, text_of(Driver(verifier(model), no_drafts()).outputs([request])[0]))


@pytest.mark.parametrize("speculative", [{"enabled": False}, {"policy": "fixed"}, {}])
def test_response_formats(url: str, speculative: dict[str, Any]) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    body = {"max_tokens": 400, "seed": 5, "speculative": speculative}
    answer = post(url, prompt="x", response_format=schema, **body)
    assert list(json.loads(answer["choices"][0]["text"])) == PERSON["required"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chat = {"messages": [{"role": "user", "content": "who?"}], **body}
    answer = post(url, "/v1/chat/completions", response_format=schema, n=2, **chat)
    assert all(list(json.loads(choice["message"]["content"])) == PERSON["required"] for choice in answer["choices"])


def test_structured_outputs(url: str) -> None:
    def text(**asked: Any) -> str:
        answer = post(url, prompt="x", max_tokens=400, structured_outputs=asked, seed=3)
        written: str = answer["choices"][0]["text"]
        return written

    assert text(choice=["left", "right"]) in ("left", "right")
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", text(regex=r"[0-9]{3}-[0-9]{4}"))
    assert text(grammar='root ::= "a" "b"+ "c" | "abc"').startswith("ab")  # GBNF
    assert json.loads(text(json={"enum": [17, None, "x"]})) in (17, None, "x")
    assert json.loads(text(json=json.dumps({"const": {"a": [1]}}))) == {"a": [1]}
    assert text(json_object=True).startswith("{")


def test_a_structure_that_other_rules_contradict_is_the_clients_error(url: str) -> None:
    body = {"prompt": "x", "structured_outputs": {"choice": ["abcd"]}, "bad_words": ["cd"]}
    answer = httpx.post(url + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "no_token_left"
    assert "structure" in error_of(answer)["message"]


def test_the_openai_client_parses_what_it_asks_for(url: str, engine: str) -> None:
    class Answer(BaseModel):
        is_right: bool
        score: Literal[1, 20]

    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        completion = client.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "is it?"}],
            response_format=Answer,
            seed=1,
            # vLLM takes no bias while it speculates
            extra_body={} if engine == "vllm" else {"logit_bias": {str(ord(digit)): -50 for digit in "0123456789"}},
        )
    assert isinstance(completion.choices[0].message.parsed, Answer)
