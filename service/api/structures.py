"""The fields that ask for structured output, in OpenAI's and in vLLM's words, and what they come to."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from service.api.fields import RequestModel, refuse
from service.structured import StructureSpec

MAX_CHOICES = 256
ANY_OBJECT = StructureSpec("json_schema", '{"type": "object"}')

Schema = dict[str, Any]


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
            raise refuse('a json_schema goes with the type "json_schema", and with no other')
        return self

    @property
    def spec(self) -> StructureSpec | None:
        """What the output keeps to; None for plain text."""
        if self.json_schema is not None:
            return StructureSpec("json_schema", json.dumps(self.json_schema.json_schema))
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(RequestModel):
    """vLLM's way to ask for a structure: exactly one of these."""

    json_schema: Schema | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    json_object: Literal[True] | None = Field(None, description="Any JSON object.")
    regex: str | None = Field(None, min_length=1, description="A regular expression that the whole output matches.")
    grammar: str | None = Field(None, min_length=1, description="A context-free grammar, in Lark's or GBNF's notation.")
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        None, description="The output is one of these texts."
    )

    @model_validator(mode="after")
    def check(self) -> "StructuredOutputs":
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise refuse("takes exactly one of json, json_object, regex, grammar and choice")
        if self.choice is not None and not all(self.choice):
            raise refuse("no choice may be an empty text")
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
