"""Tool calls: forced ones keep to their schema, chosen ones are found in the text, whole and streamed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer

from service.engine.base import GenerationRequest, TokenDelta
from service.settings import load_settings
from tests.checkpoints import HERMES_TEMPLATE, LLAMA3_TEMPLATE, write_checkpoint, write_tokenizer
from tests.integration.api_server import embedded_app, error_of, post, scripted_app, serving
from tests.integration.scripted_engine import ScriptedEngine, deltas

USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What the weather is like",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Rome", "Köln"]}},
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CHAT = "/v1/chat/completions"


def check_call(name: str, arguments: str) -> None:
    content = json.loads(arguments)
    if name == "clock":
        assert content == {}
    else:
        assert name == "get_weather"
        assert list(content) == ["city", "days"]
        assert content["city"] in ("Rome", "Köln")
        assert content["days"] in (1, 2, 3)


def qwen(folder: Path) -> Path:
    write_checkpoint(folder, "qwen2", max_position_embeddings=2048)
    write_tokenizer(folder, HERMES_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def qwen_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def qwen_url(qwen_target: Path, tiny_drafter: Path) -> Iterator[str]:
    with serving(embedded_app(qwen_target, tiny_drafter)) as url:
        yield url


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_model_whose_template_knows_no_tools_can_be_made_to_call_one(url: str, choice: Any) -> None:
    """On both engines."""
    body = {"messages": [USER], "tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 400, "seed": 4}
    answer = post(url, CHAT, **body, parallel_tool_calls=False)
    (choice_made,) = answer["choices"]
    assert choice_made["finish_reason"] == "tool_calls"
    assert choice_made["message"]["content"] is None
    (call,) = choice_made["message"]["tool_calls"]
    check_call(**call["function"])
    if choice is NAMED:
        assert call["function"]["name"] == "get_weather"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_do_not_depend_on_drafts_and_stream_as_they_are(
    qwen_url: str, choice: Any, temperature: float
) -> None:
    body = {
        **{"messages": [USER], "tools": [WEATHER, CLOCK], "tool_choice": choice},
        **{"max_tokens": 600, "seed": 8, "n": 3, "temperature": temperature},
    }
    answers = []
    for speculative in ({"enabled": False}, {}, {"policy": "fixed", "max_draft_tokens": 6}, {"policy": "paper"}):
        answer = post(qwen_url, CHAT, **body, speculative=speculative)
        found = []
        for one in answer["choices"]:
            calls = [call["function"] for call in one["message"].get("tool_calls", ())]
            for call in calls:
                check_call(**call)
            assert calls
            assert one["finish_reason"] in ("tool_calls", "length" if choice == "required" else "")
            found.append([(call["name"], call["arguments"]) for call in calls])
        answers.append(found)
        ids = [call["id"] for one in answer["choices"] for call in one["message"]["tool_calls"]]
        assert len(set(ids)) == len(ids)
    assert answers[1:] == answers[:1] * 3
    streamed: list[list[list[str]]] = [[] for _ in range(3)]
    with openai.OpenAI(base_url=qwen_url + "/v1", api_key="none", max_retries=0) as client:
        for chunk in client.chat.completions.create(model="tiny", stream=True, **body):  # type: ignore[call-overload]
            for one in chunk.choices:
                for part in one.delta.tool_calls or ():
                    if part.id is not None:
                        streamed[one.index].append([part.function.name, ""])
                    streamed[one.index][part.index][1] += part.function.arguments
    for calls, whole in zip(streamed, answers[0], strict=True):
        assert [(name, arguments) for name, arguments in calls][: len(whole)] == whole
        assert len(calls) - len(whole) in (0, 1)  # one that the last token cut


def test_the_openai_client_parses_forced_calls(qwen_url: str) -> None:
    class Weather(BaseModel):
        model_config = ConfigDict(extra="forbid")
        is_cold: bool

    with openai.OpenAI(base_url=qwen_url + "/v1", api_key="none", max_retries=0) as client:
        completion = client.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "is it?"}],
            tools=[openai.pydantic_function_tool(Weather)],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=200,
        )
        (call,) = completion.choices[0].message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)
        history: list[Any] = [
            USER,
            completion.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "yes"},
        ]
        again = client.chat.completions.create(model="tiny", messages=history, max_tokens=2)
    assert again.usage is not None
    assert again.usage.completion_tokens >= 1


def rendered(url: str, **body: Any) -> str:
    return bytes(post(url, "/tokenize", **body)["tokens"]).decode()


def test_the_template_sees_tools_calls_results_and_reasoning(qwen_url: str) -> None:
    arguments = '{"city": "Rome", "days": 1}'
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "It said so."},
    ]
    text = rendered(qwen_url, messages=messages, tools=[WEATHER, CLOCK])
    shown = [json.loads(line) for line in text[text.index("<tools>") : text.index("</tools>")].splitlines()[1:]]
    assert shown[0]["function"] == {key: value for key, value in WEATHER["function"].items() if key != "strict"}
    assert shown[1] == CLOCK
    after = text[text.index("<user>") :]
    assert f'<assistant>\n<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>' in after
    assert "<tool_response>rain</tool_response>" in after
    assert "<think>It said so.</think>It rains." in after
    assert "<tools>" not in rendered(qwen_url, messages=messages)


SAYS = 'I will <look>.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
SAYS += '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def script(text: str, finish_reason: str = "stop") -> Any:
    def play(request: GenerationRequest) -> list[TokenDelta]:
        return deltas(text, sizes=[5, 13, 1, 1, 22, 9, 1, 30, 1, 1, 1], finish_reason=finish_reason)

    return play


def scripted(target: Path, text: str, finish_reason: str = "stop", **overrides: Any) -> Any:
    settings = load_settings(overrides={"model.served_model_name": "tiny", **overrides})
    return serving(scripted_app(ScriptedEngine(script(text, finish_reason), context_length=2048), target, settings))


def asked(url: str, **body: Any) -> tuple[Any, Any]:
    """The answer as a whole, and put together from a stream by the openai client."""
    body = {"model": "tiny", "messages": [USER], "tools": [WEATHER, CLOCK], "max_tokens": 300} | body
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**body)
        with client.chat.completions.stream(**body) as stream:
            streamed = stream.get_final_completion()
    return whole, streamed


def told(completion: Any) -> list[Any]:
    return [
        (
            choice.finish_reason,
            choice.message.content,
            [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
        )
        for choice in completion.choices
    ]


CALLS = [("get_weather", '{"city": "Köln", "days": 2}'), ("clock", "{}")]


def test_chosen_calls_are_found_whole_and_streamed(qwen_target: Path) -> None:
    tools = [json.loads(json.dumps(tool)) for tool in (WEATHER, CLOCK)]
    for tool in tools:  # of strict ones the client would want schemas without limits
        tool["function"].pop("strict", None)
    with scripted(qwen_target, SAYS) as url:
        for completion in asked(url, n=2, tools=tools):
            assert told(completion) == [("tool_calls", "I will <look>.", CALLS)] * 2
        for completion in asked(url, parallel_tool_calls=False, tools=tools):
            assert told(completion) == [("tool_calls", "I will <look>.", CALLS[:1])]
        for completion in asked(url, tool_choice="none", tools=tools):
            assert told(completion) == [("stop", SAYS, [])]


def test_the_stream_holds_back_a_tag_and_names_a_call_before_its_arguments(qwen_target: Path) -> None:
    with scripted(qwen_target, SAYS) as url:
        body = {"messages": [USER], "tools": [WEATHER, CLOCK], "stream": True, "max_tokens": 300}
        text = httpx.post(url + CHAT, json=body, timeout=120).text
    frames = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    choices = [frame["choices"][0] for frame in frames]
    assert choices[0]["delta"] == {"role": "assistant", "content": "I wil"}
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "I will <look>."
    parts = [part for choice in choices for part in choice["delta"].get("tool_calls", ())]
    assert len(parts) > 4
    for index in (0, 1):
        first, *others = [part for part in parts if part["index"] == index]
        assert set(first) == {"index", "id", "type", "function"}
        assert set(first["function"]) == {"name", "arguments"}
        assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in others)
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


@pytest.mark.parametrize(
    ("text", "finish_reason"),
    [
        ('<tool_call>{"name": "get_weather", "argu', "length"),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "stop"),
        ("<tool_call>what?</tool_call>", "stop"),
        (" <tool_call", "stop"),
    ],
)
def test_what_is_no_call_is_content(qwen_target: Path, text: str, finish_reason: str) -> None:
    with scripted(qwen_target, text, finish_reason) as url:
        whole = post(url, CHAT, messages=[USER], tools=[CLOCK], max_tokens=300)["choices"][0]
        assert (whole["finish_reason"], whole["message"]) == (
            finish_reason,
            {"role": "assistant", "content": text, "refusal": None},
        )
        body = {"messages": [USER], "tools": [CLOCK], "stream": True, "max_tokens": 300}
        streamed = httpx.post(url + CHAT, json=body, timeout=120).text
    frames = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == text


def test_a_call_that_a_stop_string_cuts_is_not_one_to_make(qwen_target: Path) -> None:
    """What was streamed of it cannot be taken back; as a whole it is content, beside the one that is complete."""
    second = '<tool_call>{"name": "clock", "arguments": {"zone": "a'
    with scripted(qwen_target, f'<tool_call>{{"name": "clock", "arguments": {{}}}}</tool_call>{second}b"}}}}') as url:
        whole, streamed = asked(url, tools=[CLOCK], stop=["b"])
    assert told(whole) == [("tool_calls", second, [("clock", "{}")])]
    assert told(streamed) == [("stop", None, [("clock", "{}"), ("clock", '{"zone": "a')])]


def test_the_format_is_the_templates_or_the_settings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", max_position_embeddings=2048)
    write_tokenizer(tmp_path, LLAMA3_TEMPLATE)
    says = '{"name": "clock", "parameters": {"zone": 1}}'
    with scripted(tmp_path, says) as url:
        calls = post(url, CHAT, messages=[USER], tools=[CLOCK], max_tokens=9)["choices"][0]["message"]["tool_calls"]
        assert [call["function"] for call in calls] == [{"name": "clock", "arguments": '{"zone": 1}'}]
    with scripted(tmp_path, says, **{"model.tool_call_parser": "hermes"}) as url:
        assert post(url, CHAT, messages=[USER], tools=[CLOCK], max_tokens=9)["choices"][0]["message"]["content"] == says
    with scripted(tmp_path, says, **{"model.tool_call_parser": "none"}) as url:
        answer = httpx.post(url + CHAT, json={"messages": [USER], "tools": [CLOCK]}, timeout=120)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")


def changed(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": CLOCK["function"] | fields}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASSISTANT = {"role": "assistant", "content": None}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": ["clock"]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**CLOCK, "type": "custom"}]}, "tools[0].type"),
    ({"tools": [{**CLOCK, "cache": 1}]}, "tools[0].cache"),
    ({"tools": [CLOCK, changed(name="")]}, "tools[1].function.name"),
    ({"tools": [changed(name="a b")]}, "tools[0].function.name"),
    ({"tools": [changed(name='a" | x')]}, "tools[0].function.name"),
    ({"tools": [changed(name="a\n")]}, "tools[0].function.name"),
    ({"tools": [changed(name="x" * 65)]}, "tools[0].function.name"),
    ({"tools": [changed(description=1)]}, "tools[0].function.description"),
    ({"tools": [changed(parameters="{}")]}, "tools[0].function.parameters"),
    ({"tools": [changed(parameters={"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
    ({"tools": [changed(name=f"f{index}") for index in range(129)]}, "tools"),
    ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": ["auto"]}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "function": {"name": "clock"}}}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": "required", "tools": [changed(parameters={"properties": {"a": {"type": 5}}})]}, "tools"),
    ({"tool_choice": "required", "tools": [changed(parameters={"$ref": "http://127.0.0.1/x"})]}, "tools"),
    ({"tool_choice": "required", "tools": [changed(parameters={"description": "x" * 65537})]}, "tools"),
    ({"tool_choice": "required", "tools": [CLOCK], "ignore_eos": True}, "ignore_eos"),
    ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [CLOCK], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [CLOCK["function"]]}, "functions"),
    ({"messages": [ASSISTANT]}, "messages[0].content"),
    ({"messages": [{**ASSISTANT, "tool_calls": [{**CALL, "type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
    (
        {"messages": [{**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        {"messages": [{**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{**USER, "reasoning_content": "x"}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
]


@pytest.fixture(scope="module")
def http(qwen_target: Path) -> Iterator[httpx.Client]:
    with scripted(qwen_target, "text") as url, httpx.Client(base_url=url, timeout=120) as http:
        yield http


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_field_of_tools_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post(CHAT, json={"messages": [USER], **body})
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [USER], "tools": [CLOCK, CLOCK]}, "tools[1].function.name"),
        ({"messages": [USER], "tools": [changed(name=f"f{index}") for index in range(129)]}, "tools"),
        ({"messages": [USER] * 5000}, "messages"),
        ({"prompt": "x", "tools": [CLOCK]}, "tools"),
    ],
    ids=["names", "tools", "messages", "prompt"],
)
def test_what_a_chat_refuses_is_refused_where_its_tokens_are_counted(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    answer = http.post("/tokenize", json=body)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == param


def test_a_choice_among_tools_that_the_template_does_not_show_is_refused(tiny_target: Path) -> None:
    with scripted(tiny_target, "text", **{"model.tool_call_parser": "hermes"}) as url:
        answer = httpx.post(url + CHAT, json={"messages": [USER], "tools": [CLOCK]}, timeout=120)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")
        assert "template" in error_of(answer)["message"]
        assert post(url, CHAT, messages=[USER], tools=[CLOCK], tool_choice="none", max_tokens=4)["choices"]


def test_an_error_in_a_schema_is_told_of_its_tool(http: httpx.Client) -> None:
    bad = changed(name="bad", parameters={"properties": {"a": {"type": 5}}})
    body = {"messages": [USER], "tools": [CLOCK, WEATHER, bad], "tool_choice": "required"}
    message = error_of(http.post(CHAT, json=body))["message"]
    assert message.startswith("tools: the parameters of 'bad': ")


def test_tags_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2", max_position_embeddings=2048)
    write_tokenizer(tmp_path, HERMES_TEMPLATE)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = (257, *b'{"name": "clock", "arguments": {}}', 258)

    def play(request: GenerationRequest) -> list[TokenDelta]:
        return [TokenDelta(tokens=tokens, finish_reason="stop")]

    settings = load_settings(overrides={"model.served_model_name": "tiny"})
    with serving(scripted_app(ScriptedEngine(play, context_length=2048), tmp_path, settings)) as url:
        (choice,) = post(url, CHAT, messages=[USER], tools=[CLOCK], max_tokens=99)["choices"]
    assert choice["finish_reason"] == "tool_calls"


def test_harmless_values_are_taken(http: httpx.Client) -> None:
    for body in (
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": None},
        {"tools": [CLOCK], "response_format": {"type": "text"}},
        {"tools": [CLOCK], "tool_choice": "none", "structured_outputs": {"choice": ["a"]}},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [], "reasoning": None}]},
        {"messages": [{**ASSISTANT, "tool_calls": [{**CALL, "index": 0}]}]},
        {"messages": [{**ASSISTANT, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}]}]},
    ):
        answer = http.post(CHAT, json={"messages": [USER], "max_tokens": 4, **body})
        assert answer.status_code == 200, answer.text
