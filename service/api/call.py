"""What every route with a body does first, and what both text endpoints do last."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastapi import Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.fields import RequestModel
from service.api.generation import Generation
from service.api.parameters import Plan, Prompt, make_plan
from service.api.quota import permitted_priority
from service.api.respond import Writer, respond
from service.api.schemas import GenerationFields
from service.api.serving import ServedModel, Serving
from service.errors import InvalidRequestError, TooManyRequestsError
from service.keys import Key
from service.setting_groups import LimitSettings
from service.structured import Structure, StructureError, StructureSpec

Fields = TypeVar("Fields", bound=RequestModel)
TextFields = TypeVar("TextFields", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Call(Generic[Fields]):
    """A request whose body has been read, and the model it asks for."""

    request: Request
    serving: Serving
    fields: Fields
    model: ServedModel

    @property
    def key(self) -> Key | None:
        """The API key it came with."""
        found: Key | None = self.request.state.key
        return found


async def receive(request: Request, fields_type: type[Fields]) -> Call[Fields]:
    """Read the body and find the model. Raises an ApiError, or ClientDisconnectedError."""
    serving: Serving = request.app.state.serving
    server = serving.settings.server
    fields = await read_body(request, fields_type, server.max_body_bytes, server.body_seconds)
    return Call(request, serving, fields, serving.model(getattr(fields, "model", None)))


@dataclass(frozen=True, slots=True)
class Answering(Generic[TextFields]):
    """What a writer needs to know of the answer it writes."""

    response_id: str
    created: int  # Unix time
    model: ServedModel
    fields: TextFields
    generation: Generation


async def plan(
    call: Call[TextFields],
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    call_structure: StructureSpec | None = None,
) -> Plan:
    """What to ask of the engine, within this server's limits. Raises InvalidRequestError.

    call_structure: what the output is to keep to where a tool call is required.
    """
    settings = call.serving.settings
    priority = permitted_priority(call.key, call.fields.priority)
    limits = [seconds for seconds in (call.fields.timeout, settings.server.request_seconds) if seconds is not None]
    structure = await find_structure(call.fields, call.model, settings.limits, call_structure)
    return make_plan(
        call.fields,
        prompts,
        call.model,
        settings.limits,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        draw_seed=call.serving.draw_seed(),
        timeout_seconds=min(limits, default=None),
        structure=structure,
        priority=priority,
        tenant="" if call.key is None else call.key.name,
    )


async def find_structure(
    fields: GenerationFields, model: ServedModel, limits: LimitSettings, call_structure: StructureSpec | None = None
) -> Structure | None:
    """What the output is to keep to, compiled. Raises InvalidRequestError, TooManyRequestsError."""
    param = "structured_outputs" if fields.structured_outputs is not None else "response_format"
    asked = [field.spec for field in (fields.response_format, fields.structured_outputs) if field is not None]
    specs = [spec for spec in asked if spec is not None]
    if call_structure is not None:
        specs, param = [call_structure], "tools"
    if not specs:
        return None
    if len(specs) > 1:
        raise InvalidRequestError(
            "response_format and structured_outputs both ask for a structure; send one of them.",
            param=param,
            code="invalid_value",
        )
    if fields.ignore_eos:
        raise InvalidRequestError(
            "ignore_eos: not with structured output, which ends where its structure does.",
            param="ignore_eos",
            code="invalid_value",
        )
    if len(specs[0].definition) > limits.max_structure_characters:
        raise InvalidRequestError(
            f"{param}: at most {limits.max_structure_characters} characters, got {len(specs[0].definition)}.",
            param=param,
            code="invalid_value",
        )
    try:
        return await model.compile(specs[0], limits.structure_seconds)
    except StructureError as error:
        raise InvalidRequestError(f"{param}: {error}.", param=param, code="invalid_structure") from None
    except TimeoutError:
        raise TooManyRequestsError(
            "Other structures are being compiled: try again later.", param=param, headers={"Retry-After": "1"}
        ) from None


async def answer(
    call: Call[TextFields], plan: Plan, id_prefix: str, make_writer: Callable[[Answering[TextFields]], Writer]
) -> Response:
    """Generate, and answer whole or as a stream. Raises ApiError and ClientDisconnectedError before the first byte."""
    response_id = f"{id_prefix}-{uuid.uuid4().hex}"
    generation = Generation(call.serving, call.model, plan, call.request.state.record, response_id, call.key)
    answering = Answering(response_id, int(call.serving.now()), call.model, call.fields, generation)
    return await respond(call.request, call.fields, generation, make_writer(answering))
