"""The bodies that clients may send. Types are strict, unknown fields are refused, null means unset."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from drafters.base import PolicyName
from service.api.fields import (
    MAX_INT,
    MAX_LOGPROBS,
    BestOf,
    Content,
    LogitBias,
    Prompt,
    RequestModel,
    Seed,
    Stop,
    StopTokenIds,
    TokenIds,
    Unsupported,
    invalid,
)
from service.api.tools import Tool, ToolCall, ToolChoice
from service.structured import StructureSpec

MAX_CHOICE_TEXTS = 256
ANY_OBJECT = StructureSpec("json_schema", '{"type": "object"}')

Schema = dict[str, Any]


class StreamOptions(RequestModel):
    """Additions to a stream."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage and no choices.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk has the usage so far.")


class SpeculativeField(RequestModel):
    """Speculative decoding of one request, an extension of OpenAI's API. Unset fields are as the service is set."""

    enabled: bool | None = Field(None, description="False: plain decoding for this request. The text is the same.")
    max_draft_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="Most tokens drafted in one step.")
    policy: PolicyName | None = Field(None, description="What decides the draft length; unset: the service's policy.")
    trace: bool | None = Field(
        None, description="Tell for every token whether it was drafted, recovered, a bonus or plain."
    )


class JsonSchemaFormat(RequestModel):
    """A JSON schema, as OpenAI's API wraps it."""

    name: str | None = Field(None, max_length=128, description="Not used.")
    description: str | None = Field(None, description="Not used.")
    json_schema: Schema = Field(alias="schema", description="The JSON schema that the output keeps to.")
    strict: bool | None = Field(None, description="Not needed: the output always keeps to the schema.")


class ResponseFormat(RequestModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="What the output is.")
    json_schema: JsonSchemaFormat | None = Field(None, description="With `json_schema` as type.")

    @model_validator(mode="after")
    def check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise invalid('a json_schema goes with the type "json_schema", and with no other')
        return self

    @property
    def spec(self) -> StructureSpec | None:
        """The structure that is asked for; None for plain text."""
        if self.json_schema is not None:
            return StructureSpec("json_schema", json.dumps(self.json_schema.json_schema))
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(RequestModel):
    """vLLM's way to ask for a structure: exactly one of these."""

    json_schema: Schema | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, min_length=1, description="A regular expression that the whole output matches.")
    grammar: str | None = Field(None, min_length=1, description="A context-free grammar, in Lark's or GBNF's notation.")
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)] | None = Field(
        None, description="The output is one of these texts."
    )

    @model_validator(mode="after")
    def check(self) -> "StructuredOutputs":
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise invalid("takes exactly one of json, json_object, regex, grammar and choice")
        if self.choice is not None and not all(self.choice):
            raise invalid("no choice may be an empty text")
        return self

    @property
    def spec(self) -> StructureSpec:
        if self.json_schema is not None:
            schema = self.json_schema
            return StructureSpec("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
        if self.regex is not None:
            return StructureSpec("regex", self.regex)
        if self.grammar is not None:
            return StructureSpec("grammar", self.grammar)
        return ANY_OBJECT if self.choice is None else StructureSpec("choice", json.dumps(self.choice))


class GenerationFields(RequestModel):
    """Fields of completions and chat completions alike."""

    model: str | None = Field(None, max_length=256, description="Name from /v1/models; unset: the one there is.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="Most tokens to generate.")
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="Do not stop before so many tokens.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the smallest set with this mass.")
    top_k: int | None = Field(None, ge=-1, le=MAX_INT, description="Draw from this many; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Drop tokens below this share of the best one's.")
    n: int | None = Field(None, ge=1, le=MAX_INT, description="Choices per prompt; choice i is drawn with seed + i.")
    stream: bool | None = Field(None, description="Send the text as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    stop: Stop = Field(None, description="Up to four texts that end the output.")
    stop_token_ids: StopTokenIds | None = Field(None, description="Tokens that end the output.")
    include_stop_str_in_output: bool | None = Field(None, description="Show the text that ended the output.")
    ignore_eos: bool | None = Field(None, description="Go on past the model's end-of-text tokens.")
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from logits of tokens generated already."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted once for each time a token was generated."
    )
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Divides logits of tokens seen already.")
    logit_bias: LogitBias | None = Field(None, description="Added to the logits, by token id.")
    allowed_token_ids: TokenIds | None = Field(None, description="Only these tokens may be generated.")
    bad_words: list[str] | None = Field(None, description="Texts that are not generated.")
    seed: Seed | None = Field(None, description="The same seed gives the same text, speculation on or off.")
    user: str | None = Field(None, max_length=512, description="Not used, not logged.")
    priority: int | None = Field(None, ge=-MAX_INT, le=MAX_INT, description="Lower runs first.")
    timeout: float | None = Field(
        None, gt=0, description="Give up after so many seconds; the server's limit applies, too."
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; default true.")
    return_token_ids: bool | None = Field(None, description="Answer with token ids too.")
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=MAX_INT, description="Keep this many last tokens.")
    speculative: SpeculativeField | None = Field(None, description="Speculative decoding of this request.")
    response_format: ResponseFormat | None = Field(None, description="Text, a JSON object, or JSON by a schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Structure of the output, in vLLM's words.")

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return 1 if self.n is None else self.n


class CompletionRequest(GenerationFields):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "def read_lines(path):\n", "max_tokens": 64, "temperature": 0, "stop": ["\ndef "]},
                {"prompt": ["import os\n", "class Stack:\n"], "n": 2, "seed": 7, "speculative": {"enabled": False}},
            ]
        }
    )

    prompt: Prompt = Field(description="Text, texts, token ids, or lists of token ids.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives to report for each token.")
    echo: bool | None = Field(None, description="Begin the output with the prompt.")
    suffix: Unsupported = Field(None, description="Not supported.")
    best_of: BestOf = Field(None, description="Only 1.")


class ChatMessage(RequestModel):
    """A message. Only an assistant's has fields other than role, content, name and tool_call_id."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who says it; `developer` is the newer name of `system`."
    )
    tool_calls: list[ToolCall] | None = Field(None, description="Calls that an assistant asked for.")
    tool_call_id: str | None = Field(
        None, validate_default=True, max_length=256, description="With the role `tool`: the call that this answers."
    )
    content: Content = Field(
        None, validate_default=True, description="Text; null only for an assistant that asked for calls."
    )
    reasoning_content: str | None = Field(None, description="An assistant's; given to the template as it is.")
    reasoning: str | None = Field(None, description="The newer name of `reasoning_content`.")
    name: str | None = Field(None, max_length=256, description="Who says it, for templates that know names.")
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    parsed: Any = Field(None, description="Not used; the openai client keeps it.")

    @field_validator("tool_calls", "reasoning_content", "reasoning")
    @classmethod
    def check_assistants(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") not in ("assistant", None):
            raise invalid("only with the role assistant")
        return value or None

    @field_validator("tool_call_id")
    @classmethod
    def check_tool_call_id(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if value is None and role == "tool":
            raise PydanticCustomError("missing", "missing")
        if value is not None and role not in ("tool", None):
            raise invalid("only with the role tool")
        return value

    @field_validator("content")
    @classmethod
    def check_null(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not (info.data.get("role") == "assistant" and info.data.get("tool_calls")):
            raise PydanticCustomError("missing", "missing")
        return value


class ChatCompletionRequest(GenerationFields):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"messages": [{"role": "user", "content": "Read a file line by line"}], "max_tokens": 64},
                {
                    "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
                    "tools": [
                        {
                            "type": "function",
                            "function": {
                                "name": "get_weather",
                                "parameters": {
                                    "type": "object",
                                    "properties": {"city": {"type": "string", "maxLength": 24}},
                                    "required": ["city"],
                                    "additionalProperties": False,
                                },
                            },
                        }
                    ],
                    "tool_choice": "required",
                },
            ]
        }
    )

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_INT, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Report each token's log probability.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Alternatives; only with `logprobs`.")
    tools: list[Tool] | None = Field(None, description="Functions that the model may ask to be called.")
    tool_choice: ToolChoice = Field(
        None,
        description="`auto` (default): the model decides, if its chat template knows tools. `required`, or a function: "
        "the answer is a call that keeps to its schema, with any model. `none`: the model is not shown the tools.",
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call; default true.")


class TokenizeRequest(RequestModel):
    """Body of POST /tokenize: a text, or messages for the chat template."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "import os\n"}]})

    model: str | None = Field(None, max_length=256, description="Name from /v1/models; unset: the one there is.")
    prompt: str | None = Field(None, description="A text; either this or `messages`.")
    messages: list[ChatMessage] | None = Field(None, min_length=1, description="A conversation.")
    tools: list[Tool] | None = Field(None, description="For messages: the tools that the chat template shows.")
    add_special_tokens: bool | None = Field(None, description="Default: true for a text, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="For messages; default true.")
    return_token_strs: bool | None = Field(None, description="Answer with each token's text too.")


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [300, 301]}]})

    model: str | None = Field(None, max_length=256, description="Name from /v1/models; unset: the one there is.")
    tokens: list[int] = Field(description="Token ids.")
