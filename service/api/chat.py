"""POST /v1/chat/completions."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.body import read_body
from service.api.choice import Piece
from service.api.formats import chat_logprobs, trace_steps
from service.api.generation import Generation
from service.api.openapi import answers, takes
from service.api.parameters import Prompt, make_plan
from service.api.respond import respond
from service.api.responses import ChatChoice, ChatChoiceBase, ChatCompletion, ChatCompletionChunk, ChatDelta
from service.api.schemas import ChatCompletionRequest, ChatMessage
from service.api.serving import LONG_TEXT_CHARACTERS, ServedModel, Serving
from service.errors import InvalidRequestError
from service.text.tokenizer import ChatTemplateError

router = APIRouter(tags=["text"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    responses=answers(ChatCompletion, 404, 408, 413, 415, 429, 503),
    openapi_extra=takes(ChatCompletionRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next message, with the chat template that came with the model."""
    serving: Serving = request.app.state.serving
    server, limits = serving.settings.server, serving.settings.limits
    fields = await read_body(request, ChatCompletionRequest, server.max_body_bytes, server.body_seconds)
    model = serving.model(fields.model)
    if len(fields.messages) > limits.max_messages:
        raise InvalidRequestError(
            f"messages: at most {limits.max_messages}, got {len(fields.messages)}.", param="messages"
        )
    text = await render(fields.messages, model)
    plan = make_plan(
        fields,
        [Prompt(tuple(await model.encode(text, add_special_tokens=False)))],
        model,
        limits,
        max_tokens=_max_tokens(fields),
        logprobs=_num_logprobs(fields),
        prompt_logprobs=None,
        draw_seed=serving.draw_seed(),
        timeout_seconds=server.request_seconds,
    )
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    generation = Generation(serving, model, plan, request.state.record, response_id)
    writer = ChatWriter(response_id, int(serving.now()), model, fields, generation)
    return await respond(request, fields, generation, writer)


async def render(messages: Sequence[ChatMessage], model: ServedModel, *, add_generation_prompt: bool = True) -> str:
    """The prompt, by the checkpoint's template; long conversations in another thread. Raises InvalidRequestError."""
    plain = [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.content,
            **({} if message.name is None else {"name": message.name}),
        }
        for message in messages
    ]
    is_long = sum(len(message["content"]) for message in plain) > LONG_TEXT_CHARACTERS
    render_chat = model.tokenizer.render_chat
    try:
        if is_long or len(plain) > 64:
            return await asyncio.to_thread(render_chat, plain, add_generation_prompt=add_generation_prompt)
        return render_chat(plain, add_generation_prompt=add_generation_prompt)
    except ChatTemplateError as error:
        raise InvalidRequestError(f"messages: {error}.", param="messages", code="invalid_value") from None


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

    response_id: str
    created: int  # Unix time
    model: ServedModel
    fields: ChatCompletionRequest
    generation: Generation
    _begun: set[int] = field(default_factory=set)  # choices that have had a chunk

    def whole(self, pieces: list[Piece]) -> ChatCompletion:
        choices: list[ChatChoice] = [
            {
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                **self._choice(index, piece),
            }
            for index, piece in enumerate(pieces)
        ]
        answer: ChatCompletion = {
            "id": self.response_id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            "usage": self.generation.usage(),
            "metrics": self.generation.metrics(),
        }
        if self.fields.return_token_ids:
            answer["prompt_token_ids"] = list(self.generation.plan.prompts[0].tokens)
        return answer

    def chunk(self, index: int, piece: Piece) -> ChatCompletionChunk | None:
        says_tokens = piece.tokens and (self.fields.logprobs or self.fields.return_token_ids)
        if not (piece.text or says_tokens or piece.steps or piece.finish_reason):
            return None
        answer = self.envelope()
        if self.fields.return_token_ids and not self._begun:
            answer["prompt_token_ids"] = list(self.generation.plan.prompts[0].tokens)
        delta: ChatDelta = {"content": piece.text}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": piece.text}
        answer["choices"] = [{"delta": delta, **self._choice(index, piece)}]
        return answer

    def envelope(self) -> ChatCompletionChunk:
        return {
            "id": self.response_id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model.name,
            "choices": [],
        }

    def _choice(self, index: int, piece: Piece) -> ChatChoiceBase:
        tokenizer = self.model.tokenizer
        choice: ChatChoiceBase = {
            "index": index,
            "logprobs": chat_logprobs(tokenizer, piece.logprobs) if self.fields.logprobs else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.fields.return_token_ids:
            choice["token_ids"] = list(piece.tokens)
        if piece.steps:
            choice["trace"] = trace_steps(tokenizer, piece.steps)
        return choice
