"""POST /v1/chat/completions, and conversations as text."""

import asyncio
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.body import Call, receive
from service.api.choice import Piece
from service.api.formats import call_deltas, chat_logprobs, choice_ending, read_calls, whole_calls
from service.api.generation import Generation
from service.api.openapi import answers, takes
from service.api.requests import Prompt, make_requests, tokenize
from service.api.respond import respond
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
from service.api.tools import OfferedTools, offer_tools
from service.errors import refuse
from service.setting_groups import LimitSettings
from service.text.tokenizer import ChatTemplateError
from service.text.tool_calls import ToolCallParser, style_of_template

LONG_CONVERSATION_MESSAGES = 64  # longer conversations are rendered in another thread

router = APIRouter(tags=["text"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    responses=answers(ChatCompletion, 404, 408, 413, 415, 429, 503, 504, stream=ChatCompletionChunk),
    openapi_extra=takes(ChatCompletionRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next message, with the chat template that came with the model."""
    call = await receive(request, ChatCompletionRequest, "chatcmpl")
    tools = _offered_tools(call)
    shown = () if tools is None else tools.shown
    text = await render(call.fields.messages, call.model, call.limits, tools=shown)
    prompts = await tokenize(call, [text], add_special_tokens=False)
    requests = await make_requests(
        call, prompts, max_tokens=_max_tokens(call.fields), logprobs=_num_logprobs(call.fields), tools=tools
    )
    kept = frozenset() if tools is None else call.model.tokenizer.special_ids_of(tools.markers)
    generation = Generation(call, requests, kept)
    return await respond(generation, ChatWriter(generation, prompts[0], tools))


async def render(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    limits: LimitSettings,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> str:
    """Write a conversation as the checkpoint's template has it, a long one in another thread.

    Raises InvalidRequestError.
    """
    if len(messages) > limits.max_messages:
        refuse(f"messages: at most {limits.max_messages}, got {len(messages)}.", param="messages")
    plain = [_for_template(message) for message in messages]
    is_long = len(plain) > LONG_CONVERSATION_MESSAGES or bool(tools)
    is_long |= sum(len(message["content"] or "") for message in plain) > LONG_TEXT_CHARACTERS
    is_long |= any("tool_calls" in message for message in plain)
    render_chat = functools.partial(
        model.tokenizer.render_chat, plain, tools=tools, add_generation_prompt=add_generation_prompt
    )
    try:
        if is_long:
            return await asyncio.to_thread(render_chat)
        return render_chat()
    except ChatTemplateError as error:
        refuse(f"messages: {error}.", param="messages")


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """Return a message as templates know it, with reasoning under both of the names that templates use."""
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


def _offered_tools(call: Call[ChatCompletionRequest]) -> OfferedTools | None:
    """Raises InvalidRequestError."""
    fields, template = call.fields, call.model.tokenizer.tool_template
    parser = call.serving.settings.model.tool_call_parser
    tools = offer_tools(
        fields.tools,
        fields.tool_choice,
        parallel=fields.parallel_tool_calls is not False,
        max_tools=call.limits.max_tools,
        template_knows_tools=re.search(r"\btools\b", template) is not None,
        style=style_of_template(template) if parser == "auto" else None if parser == "none" else parser,
    )
    if tools is not None:
        for name in ("response_format", "structured_outputs"):
            asked = getattr(fields, name)
            if asked is not None and asked.spec is not None:
                refuse(f'{name}: not together with tools, unless tool_choice is "none".', param=name)
    return tools


def _max_tokens(fields: ChatCompletionRequest) -> int | None:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        refuse(
            f"max_completion_tokens ({new}) and its older name max_tokens ({old}) differ; send one of them.",
            param="max_completion_tokens",
        )
    wanted = old if new is None else new
    if wanted == 0:
        refuse("max_tokens: at least 1.", param="max_tokens" if new is None else "max_completion_tokens")
    return wanted


def _num_logprobs(fields: ChatCompletionRequest) -> int | None:
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs is not None:
        refuse("top_logprobs: only with logprobs set to true.", param="top_logprobs")
    return None


@dataclass(slots=True)
class ChatWriter:
    """Shapes pieces as chat completions and their chunks."""

    generation: Generation[ChatCompletionRequest]
    prompt: Prompt
    tools: OfferedTools | None = None
    _begun: set[int] = field(default_factory=set)  # choices that have had a chunk
    _parsers: dict[int, ToolCallParser] = field(default_factory=dict)  # by choice, while streaming

    def whole(self, pieces: list[Piece]) -> ChatCompletion:
        call = self.generation.call
        answer: ChatCompletion = {
            "id": call.id,
            "object": "chat.completion",
            "created": call.created,
            "model": call.model.name,
            "choices": [self._whole_choice(index, piece) for index, piece in enumerate(pieces)],
            "usage": self.generation.usage(),
            "metrics": self.generation.metrics(),
        }
        if call.fields.return_token_ids:
            answer["prompt_token_ids"] = list(self.prompt.tokens)
        return answer

    def _whole_choice(self, index: int, piece: Piece) -> ChatChoice:
        message: ChatMessageBody = {"role": "assistant", "content": piece.text, "refusal": None}
        if self.tools is not None:
            piece, read = read_calls(self.tools.parser(is_stream=False), piece)
            if read.calls:
                message["content"] = read.content or None
                message["tool_calls"] = whole_calls(read.calls)
        return {"message": message, **self._choice(index, piece)}

    def chunk(self, index: int, piece: Piece) -> ChatCompletionChunk | None:
        fields = self.generation.call.fields
        says_tokens = piece.tokens and (fields.logprobs or fields.return_token_ids)
        calls: list[ToolCallDelta] = []
        if self.tools is not None:
            if index not in self._parsers:
                self._parsers[index] = self.tools.parser(is_stream=True)
            piece, read = read_calls(self._parsers[index], piece)
            piece, calls = replace(piece, text=read.content), call_deltas(read.calls)
        if not (piece.text or calls or says_tokens or piece.steps or piece.finish_reason):
            return None
        answer = self.envelope()
        if fields.return_token_ids and not self._begun:
            answer["prompt_token_ids"] = list(self.prompt.tokens)
        delta: ChatDelta = {"content": piece.text} if piece.text or self.tools is None else {}
        if calls:
            delta["tool_calls"] = calls
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": piece.text or (None if calls else ""), **delta}
        answer["choices"] = [{"delta": delta, **self._choice(index, piece)}]
        return answer

    def envelope(self) -> ChatCompletionChunk:
        call = self.generation.call
        return {
            "id": call.id,
            "object": "chat.completion.chunk",
            "created": call.created,
            "model": call.model.name,
            "choices": [],
        }

    def _choice(self, index: int, piece: Piece) -> ChatChoiceBase:
        fields, tokenizer = self.generation.call.fields, self.generation.call.model.tokenizer
        logprobs = chat_logprobs(tokenizer, piece.logprobs) if fields.logprobs else None
        ending = choice_ending(tokenizer, piece, with_ids=bool(fields.return_token_ids))
        return {"index": index, "logprobs": logprobs, **ending}
