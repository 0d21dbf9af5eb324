"""POST /v1/chat/completions."""

import asyncio
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.call import Answering, Call, answer, plan, receive
from service.api.choice import Piece
from service.api.formats import chat_logprobs, choice_ending
from service.api.openapi import answers, takes
from service.api.parameters import Prompt
from service.api.responses import (
    ChatChoice,
    ChatChoiceBase,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessageBody,
    ToolCallDelta,
)
from service.api.schemas import ChatCompletionRequest, ChatMessage
from service.api.serving import LONG_TEXT_CHARACTERS, ServedModel
from service.api.tool_answers import call_deltas, read_piece, whole_calls
from service.api.tools import ToolPlan, make_tool_plan
from service.errors import InvalidRequestError
from service.text.tokenizer import ChatTemplateError
from service.text.tool_calls import ToolCallParser, style_of_template

router = APIRouter(tags=["text"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    responses=answers(ChatCompletion, 404, 408, 413, 415, 429, 503, 504, stream=ChatCompletionChunk),
    openapi_extra=takes(ChatCompletionRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next message, with the chat template that came with the model."""
    call = await receive(request, ChatCompletionRequest)
    messages = call.fields.messages
    check_messages(messages, call.serving.settings.limits.max_messages)
    tools = _plan_tools(call)
    text = await render(messages, call.model, tools=() if tools is None else tools.shown)
    prompt = await call.model.encode(text, add_special_tokens=False)
    try:
        wanted = await plan(
            call,
            [Prompt(tuple(prompt))],
            max_tokens=_max_tokens(call.fields),
            logprobs=_num_logprobs(call.fields),
            call_structure=None if tools is None else tools.forced,
        )
    except InvalidRequestError as error:
        if tools is not None and error.code == "invalid_structure":
            error.message = tools.name_tool(error.message)
        raise
    if tools is not None:
        kept = call.model.tokenizer.special_ids_of(tools.markers)
        wanted = replace(wanted, text_rules=replace(wanted.text_rules, kept_special_tokens=kept))
    return await answer(call, wanted, "chatcmpl", functools.partial(ChatWriter, tools=tools))


def check_messages(messages: Sequence[ChatMessage], most: int) -> None:
    """Raises InvalidRequestError for too many."""
    if len(messages) > most:
        raise InvalidRequestError(
            f"messages: at most {most}, got {len(messages)}.", param="messages", code="invalid_value"
        )


async def render(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> str:
    """The prompt, by the checkpoint's template; long conversations in another thread. Raises InvalidRequestError."""
    plain = [_for_template(message) for message in messages]
    is_long = len(plain) > 64 or sum(len(message["content"] or "") for message in plain) > LONG_TEXT_CHARACTERS
    is_long |= bool(tools) or any("tool_calls" in message for message in plain)
    render_chat = functools.partial(
        model.tokenizer.render_chat, plain, tools=tools, add_generation_prompt=add_generation_prompt
    )
    try:
        if is_long:
            return await asyncio.to_thread(render_chat)
        return render_chat()
    except ChatTemplateError as error:
        raise InvalidRequestError(f"messages: {error}.", param="messages", code="invalid_value") from None


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """In the shape that templates know; reasoning by both of its names, since some know the one, some the other."""
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content,
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_calls is not None:
        plain["tool_calls"] = [call.for_template() for call in message.tool_calls]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    reasoning = message.reasoning_content or message.reasoning
    return plain if reasoning is None else {**plain, "reasoning_content": reasoning, "reasoning": reasoning}


def _plan_tools(call: Call[ChatCompletionRequest]) -> ToolPlan | None:
    """Raises InvalidRequestError."""
    fields, settings, template = call.fields, call.serving.settings, call.model.tokenizer.tool_template
    parser = settings.model.tool_call_parser
    tools = make_tool_plan(
        fields.tools,
        fields.tool_choice,
        parallel=fields.parallel_tool_calls is not False,
        most_tools=settings.limits.max_tools,
        template_knows_tools=re.search(r"\btools\b", template) is not None,
        style=style_of_template(template) if parser == "auto" else None if parser == "none" else parser,
    )
    if tools is not None:
        for name in ("response_format", "structured_outputs"):
            asked = getattr(fields, name)
            if asked is not None and asked.spec is not None:
                raise InvalidRequestError(
                    f'{name}: not together with tools, unless tool_choice is "none".', param=name, code="invalid_value"
                )
    return tools


def _max_tokens(fields: ChatCompletionRequest) -> int | None:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"max_completion_tokens ({new}) and its older name max_tokens ({old}) differ; send one of them.",
            param="max_completion_tokens",
            code="invalid_value",
        )
    wanted = old if new is None else new
    if wanted == 0:
        raise InvalidRequestError(
            "max_tokens: at least 1.",
            param="max_tokens" if new is None else "max_completion_tokens",
            code="invalid_value",
        )
    return wanted


def _num_logprobs(fields: ChatCompletionRequest) -> int | None:
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs is not None:
        raise InvalidRequestError(
            "top_logprobs: only with logprobs set to true.", param="top_logprobs", code="invalid_value"
        )
    return None


@dataclass(slots=True)
class ChatWriter:
    """Shapes pieces as chat completions and their chunks."""

    about: Answering[ChatCompletionRequest]
    tools: ToolPlan | None = None
    _begun: set[int] = field(default_factory=set)  # choices that have had a chunk
    _parsers: dict[int, ToolCallParser] = field(default_factory=dict)  # by choice, while streaming

    def whole(self, pieces: list[Piece]) -> ChatCompletion:
        choices = [self._whole_choice(index, piece) for index, piece in enumerate(pieces)]
        answer: ChatCompletion = {
            "id": self.about.response_id,
            "object": "chat.completion",
            "created": self.about.created,
            "model": self.about.model.name,
            "choices": choices,
            "usage": self.about.generation.usage(),
            "metrics": self.about.generation.metrics(),
        }
        if self.about.fields.return_token_ids:
            answer["prompt_token_ids"] = list(self.about.generation.plan.prompts[0].tokens)
        return answer

    def _whole_choice(self, index: int, piece: Piece) -> ChatChoice:
        message: ChatMessageBody = {"role": "assistant", "content": piece.text, "refusal": None}
        if self.tools is not None:
            piece, read = read_piece(self.tools.parser(is_stream=False), piece)
            if read.calls:
                message["content"] = read.content or None
                message["tool_calls"] = whole_calls(read.calls)
        return {"message": message, **self._choice(index, piece)}

    def chunk(self, index: int, piece: Piece) -> ChatCompletionChunk | None:
        says_tokens = piece.tokens and (self.about.fields.logprobs or self.about.fields.return_token_ids)
        calls: list[ToolCallDelta] = []
        if self.tools is not None:
            if index not in self._parsers:
                self._parsers[index] = self.tools.parser(is_stream=True)
            piece, read = read_piece(self._parsers[index], piece)
            piece, calls = replace(piece, text=read.content), call_deltas(read.calls)
        if not (piece.text or calls or says_tokens or piece.steps or piece.finish_reason):
            return None
        answer = self.envelope()
        if self.about.fields.return_token_ids and not self._begun:
            answer["prompt_token_ids"] = list(self.about.generation.plan.prompts[0].tokens)
        delta: ChatDelta = {"content": piece.text} if piece.text or self.tools is None else {}
        if calls:
            delta["tool_calls"] = calls
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": piece.text or (None if calls else ""), **delta}
        answer["choices"] = [{"delta": delta, **self._choice(index, piece)}]
        return answer

    def envelope(self) -> ChatCompletionChunk:
        return {
            "id": self.about.response_id,
            "object": "chat.completion.chunk",
            "created": self.about.created,
            "model": self.about.model.name,
            "choices": [],
        }

    def _choice(self, index: int, piece: Piece) -> ChatChoiceBase:
        tokenizer = self.about.model.tokenizer
        logprobs = chat_logprobs(tokenizer, piece.logprobs) if self.about.fields.logprobs else None
        ending = choice_ending(tokenizer, piece, with_ids=bool(self.about.fields.return_token_ids))
        return {"index": index, "logprobs": logprobs, **ending}
