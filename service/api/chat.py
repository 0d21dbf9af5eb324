"""POST /v1/chat/completions."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.call import Answering, answer, plan, receive
from service.api.choice import Piece
from service.api.formats import chat_logprobs, choice_ending
from service.api.openapi import answers, takes
from service.api.parameters import Prompt
from service.api.responses import ChatChoice, ChatChoiceBase, ChatCompletion, ChatCompletionChunk, ChatDelta
from service.api.schemas import ChatCompletionRequest, ChatMessage
from service.api.serving import LONG_TEXT_CHARACTERS, ServedModel
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
    call = await receive(request, ChatCompletionRequest)
    messages, most = call.fields.messages, call.serving.settings.limits.max_messages
    if len(messages) > most:
        raise InvalidRequestError(
            f"messages: at most {most}, got {len(messages)}.", param="messages", code="invalid_value"
        )
    prompt = await call.model.encode(await render(messages, call.model), add_special_tokens=False)
    wanted = await plan(
        call, [Prompt(tuple(prompt))], max_tokens=_max_tokens(call.fields), logprobs=_num_logprobs(call.fields)
    )
    return await answer(call, wanted, "chatcmpl", ChatWriter)


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

    about: Answering[ChatCompletionRequest]
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

    def chunk(self, index: int, piece: Piece) -> ChatCompletionChunk | None:
        says_tokens = piece.tokens and (self.about.fields.logprobs or self.about.fields.return_token_ids)
        if not (piece.text or says_tokens or piece.steps or piece.finish_reason):
            return None
        answer = self.envelope()
        if self.about.fields.return_token_ids and not self._begun:
            answer["prompt_token_ids"] = list(self.about.generation.plan.prompts[0].tokens)
        delta: ChatDelta = {"content": piece.text}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": piece.text}
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
