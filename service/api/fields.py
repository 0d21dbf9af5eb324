"""Types of request fields. Each refuses a wrong value with a sentence that names what is allowed."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_INT = 2**31 - 1


class RequestModel(BaseModel):
    """A body, or an object in one: types are strict, unknown fields are refused, null means unset."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def invalid(message: str) -> PydanticCustomError:
    """Make an error whose text reaches the client as it is; braces in it are not placeholders."""
    return PydanticCustomError("refused", "{message}", {"message": message})


def _is_integer(value: Any) -> bool:
    return type(value) is int  # JSON's true is no token id


def _check_integers(value: list[Any]) -> None:
    """Their range is checked where the vocabulary is known, see `service.api.requests.check_ids`."""
    for position, token in enumerate(value):
        if not _is_integer(token):
            raise invalid(f"token {position} must be a token id, a whole number of at least 0")


def check_prompt(value: Any) -> Any:
    """Take a string, a list of strings, a list of whole numbers, or a list of such lists; nothing empty."""
    if isinstance(value, str) or not isinstance(value, list):
        if not isinstance(value, str) or not value:
            raise invalid("must be a text of at least one character, a list of texts, or token ids")
        return value
    if not value:
        raise invalid("must not be an empty list")
    if all(isinstance(item, str) for item in value):
        if not all(value):
            raise invalid("no prompt may be an empty text")
        return value
    if all(isinstance(item, list) for item in value):
        for item in value:
            if not item:
                raise invalid("no prompt may be an empty list of token ids")
            _check_integers(item)
        return value
    if any(isinstance(item, str | list) for item in value):
        raise invalid("must not mix texts and token ids in one list")
    _check_integers(value)
    return value


def check_stop(value: Any) -> Any:
    """Take null, a string, or up to four strings."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("must be a text or a list of texts")
    if len(stops) > MAX_STOP_STRINGS:
        raise invalid(f"takes at most {MAX_STOP_STRINGS} texts, got {len(stops)}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise invalid(f"each text must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def check_content(value: Any) -> Any:
    """Take a chat message's text: a string, or text parts, which are joined. `ChatMessage` refuses null."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise invalid("must be a text or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            raise invalid(f'only parts of type "text" are supported, got {str(kind)[:40]!r}')
        if not isinstance(part.get("text"), str):
            raise invalid('a part of type "text" must have a text')
        if unknown := sorted(set(part) - {"type", "text"}):
            raise invalid(f"unknown field {unknown[0][:40]!r} in a text part")
        texts.append(part["text"])
    return "\n".join(texts)


def _check_logit_bias(value: dict[str, float]) -> dict[str, float]:
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise invalid(f"keys must be token ids, got {key[:40]!r}")
        if not -100 <= bias <= 100:
            raise invalid(f"values must be from -100 to 100, got {bias} for token {key}")
    return value


def _refuse_set(value: Any) -> Any:
    is_empty = isinstance(value, str | list | dict) and not value
    if value is None or value is False or is_empty:
        return None
    raise invalid("is not supported by this server")


def _check_best_of(value: Any) -> Any:
    if value is None or (_is_integer(value) and value == 1):
        return None
    raise invalid("only 1 is supported by this server")


_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}

Prompt = Annotated[
    Any,
    BeforeValidator(check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]
Stop = Annotated[
    Any,
    BeforeValidator(check_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {**_TEXT_SCHEMA, "maxLength": MAX_STOP_CHARACTERS},
                {
                    "type": "array",
                    "items": {**_TEXT_SCHEMA, "maxLength": MAX_STOP_CHARACTERS},
                    "maxItems": MAX_STOP_STRINGS,
                },
                {"type": "null"},
            ]
        }
    ),
]
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    Any,
    BeforeValidator(check_content),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA, "minItems": 1}, {"type": "null"}]}
    ),
]
TokenIds = Annotated[list[int], Field(min_length=1), WithJsonSchema(_IDS_SCHEMA)]
StopTokenIds = Annotated[
    list[int],
    Field(min_length=1, max_length=MAX_STOP_TOKENS),
    WithJsonSchema({**_IDS_SCHEMA, "maxItems": MAX_STOP_TOKENS}),
]
LogitBias = Annotated[dict[str, float], AfterValidator(_check_logit_bias)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Unsupported = Annotated[
    Any,
    BeforeValidator(_refuse_set),
    WithJsonSchema({"enum": [None, False, "", [], {}], "description": "Not supported; may be sent empty."}),
]
BestOf = Annotated[Any, BeforeValidator(_check_best_of), WithJsonSchema({"enum": [1, None]})]
