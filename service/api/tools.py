"""The fields that offer tools: how the template shows them, and what calls the output may hold."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from service.api.fields import RequestModel, invalid
from service.errors import refuse
from service.structured import WHITESPACE, StructureSpec
from service.text.json_object import parse_object
from service.text.tool_calls import HERMES_TAGS, ToolCallParser, ToolCallStyle

MAX_CALLS = 16  # of one answer where a call is required
NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"

ToolName = Annotated[str, Field(pattern=NAME_PATTERN)]


def _check_parameters(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type", "object") != "object":
        raise invalid('must be the schema of an object, with "object" as its type')
    return value


class FunctionDefinition(RequestModel):
    """A function, by its name and the schema of its arguments."""

    name: ToolName = Field(description="Letters, digits, `_`, `.` and `-`.")
    description: str | None = Field(None, description="What the function does, for the model.")
    parameters: Annotated[dict[str, Any], BeforeValidator(_check_parameters)] | None = Field(
        None, description="JSON schema of the arguments, an object; unset: there are none."
    )
    strict: bool | None = Field(
        None, description="Not needed where a call is required, whose arguments always keep to their schema."
    )


class Tool(RequestModel):
    """A function that the model may ask the client to call."""

    type: Literal["function"] = Field(description="There are only functions.")
    function: FunctionDefinition = Field(description="The function.")

    def for_template(self) -> dict[str, Any]:
        """Return the shape and order that chat templates know."""
        function = {"name": self.function.name, "description": self.function.description}
        function["parameters"] = self.function.parameters  # type: ignore[assignment]
        return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class NamedTool:
    """`{"type": "function", "function": {"name": ...}}` as a tool choice."""

    name: str


def _check_tool_choice(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    function = value.get("function") if isinstance(value, dict) and set(value) == {"type", "function"} else None
    if (
        isinstance(function, dict)
        and value["type"] == "function"
        and set(function) == {"name"}
        and isinstance(function["name"], str)
    ):
        return NamedTool(function["name"])
    raise invalid('must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


ToolChoice = Annotated[
    Any,
    BeforeValidator(_check_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string", "pattern": NAME_PATTERN}},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "function"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


def _check_arguments(value: Any) -> Any:
    if not isinstance(value, str) or (value.strip() and parse_object(value) is None):
        raise invalid("must be the text of a JSON object")
    return value


class FunctionCall(RequestModel):
    """A function and the arguments to call it with."""

    name: ToolName = Field(description="The function's name.")
    arguments: Annotated[str, BeforeValidator(_check_arguments)] = Field(description="JSON, as the model wrote it.")
    parsed_arguments: Any = Field(None, description="Not used; the openai client keeps it.")


class ToolCall(RequestModel):
    """A call that the assistant asked for earlier in the conversation."""

    id: str = Field(
        min_length=1, max_length=256, description="The call's name; the message that answers it has it, too."
    )
    type: Literal["function"] = Field(description="There are only functions.")
    function: FunctionCall = Field(description="The function to call.")
    index: int | None = Field(None, description="Not used; clients keep it from streams.")

    def for_template(self) -> dict[str, Any]:
        """Return the call with its arguments as an object, as templates want them."""
        function = {"name": self.function.name, "arguments": parse_object(self.function.arguments) or {}}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """One request's tools: their form in the prompt, and the way to find their calls in the text."""

    shown: list[dict[str, Any]]  # by the template
    style: ToolCallStyle
    callable_names: tuple[str, ...]
    call_grammar: StructureSpec | None  # where a call is required
    max_calls: int | None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser must see, even where they are special tokens of the model."""
        return HERMES_TAGS if self.style == "hermes" else ()

    def name_tool(self, message: str) -> str:
        """Rewrite an error in the grammar of the calls so that it names the tool whose schema is wrong."""
        found = re.match(r"tools: at (\d+)\(\d+\): (.*)", message)
        index = (int(found[1]) - 4) // 2 if found else -1  # see `call_grammar`
        if found is None or not 0 <= index < len(self.callable_names):
            return message
        return f"tools: the parameters of {self.callable_names[index]!r}: {found[2]}"

    def parser(self, *, is_stream: bool) -> ToolCallParser:
        return ToolCallParser(self.style, self.callable_names, eager=is_stream, max_calls=self.max_calls)


def check_tools(tools: Sequence[Tool], max_tools: int) -> None:
    """Refuse too many tools, or two of one name."""
    if len(tools) > max_tools:
        refuse(f"tools: at most {max_tools}, got {len(tools)}.", param="tools")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name, param = tool.function.name, f"tools[{index}].function.name"
        if name in names:
            refuse(f"{param}: {name!r} is the name of another tool, too.", param=param)
        names.add(name)


def offer_tools(
    tools: Sequence[Tool] | None,
    choice: str | NamedTool | None,
    *,
    parallel: bool,
    max_tools: int,
    template_knows_tools: bool,
    style: ToolCallStyle | None,
) -> OfferedTools | None:
    """Return None if there are no tools, or none may be called. style: how the model writes calls, None if unknown.

    Raises InvalidRequestError.
    """
    if not tools:
        if choice not in (None, "none"):
            refuse("tool_choice: only with tools.", param="tool_choice")
        return None
    check_tools(tools, max_tools)
    if choice == "none":
        return None
    shown = [tool.for_template() for tool in tools]
    if choice in (None, "auto"):
        if not template_knows_tools:
            refuse(
                "tools: this model's chat template shows it no tools, so it cannot choose one; require a call by "
                'tool_choice, which works with every model, or send tool_choice "none".',
                param="tools",
                code="unsupported_field",
            )
        if style is None:
            refuse(
                "tools: it is not known how this model writes calls, so none would be found in its text; require a "
                "call by tool_choice, which works with every model.",
                param="tools",
                code="unsupported_field",
            )
        return OfferedTools(shown, style, tuple(tool.function.name for tool in tools), None, None if parallel else 1)
    style = style or "llama3_json"
    called = list(tools)
    if isinstance(choice, NamedTool):
        called = [tool for tool in tools if tool.function.name == choice.name]
        if not called:
            refuse(f"tool_choice: there is no tool named {choice.name[:64]!r}.", param="tool_choice")
    is_one = isinstance(choice, NamedTool) or not parallel
    grammar = StructureSpec("grammar", call_grammar(called, style, max_calls=1 if is_one else MAX_CALLS))
    return OfferedTools(shown, style, tuple(tool.function.name for tool in called), grammar, 1 if is_one else None)


def call_grammar(tools: Sequence[Tool], style: ToolCallStyle, *, max_calls: int) -> str:
    """Write a grammar, in Lark's notation, of calls in the format that the model knows and the parser reads.

    Each schema is compiled by itself, so that its references to `#` stay in it. Only names, which are plain, and JSON
    come from the client.
    """
    begin, key, end, between = ("<tool_call>\n", "arguments", "\n</tool_call>", "\n")
    if style == "llama3_json":
        begin, key, end, between = "", "parameters", "", "; "
    lines = [f"start: call ({_quote(between)} call){{0,{max_calls - 1}}}" if max_calls > 1 else "start: call"]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        head = f'{begin}{{"name": "{tool.function.name}", "{key}": '
        lines.append(f"call_{index}: {_quote(head)} arguments_{index} {_quote('}' + end)}")
        lines.append(f"arguments_{index}: %json {json.dumps(_arguments_schema(tool))}")
    return "\n".join(lines) + "\n"


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    parameters = tool.function.parameters
    if parameters is None:
        parameters = {"additionalProperties": False}
    return {"type": "object", **parameters, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _quote(text: str) -> str:
    return json.dumps(text)
