"""POST /v1/completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.body import receive
from service.api.choice import Piece
from service.api.formats import choice_ending, join_logprobs, legacy_logprobs, prompt_logprobs
from service.api.generation import Generation
from service.api.openapi import answers, takes
from service.api.requests import Prompt, make_requests, tokenize
from service.api.respond import respond
from service.api.responses import Completion, CompletionChoice, LegacyLogprobs
from service.api.schemas import CompletionRequest
from service.errors import refuse

DEFAULT_MAX_TOKENS = 16

router = APIRouter(tags=["text"])


@router.post(
    "/v1/completions",
    summary="Complete a text",
    responses=answers(Completion, 404, 408, 413, 415, 429, 503, 504, stream=Completion),
    openapi_extra=takes(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts; with `stream`, as server-sent events that end with `data: [DONE]`."""
    call = await receive(request, CompletionRequest, "cmpl")
    fields = call.fields
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    if max_tokens == 0 and not fields.echo:
        refuse("max_tokens: 0 only with echo.", param="max_tokens")
    prompts = await tokenize(call, _as_list(fields.prompt), add_special_tokens=True)
    requests = await make_requests(
        call,
        prompts,
        max_tokens=max_tokens,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if fields.echo else None,
    )
    generation = Generation(call, requests)
    return await respond(generation, CompletionWriter(generation, prompts))


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """Return the prompts, in whatever shape they came."""
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt


@dataclass(slots=True)
class CompletionWriter:
    """Shapes pieces as completions and their chunks, beginning with the prompt where `echo` asks for it."""

    generation: Generation[CompletionRequest]
    prompts: Sequence[Prompt]
    _begun: set[int] = field(default_factory=set)  # choices that have had a chunk
    _early: dict[int, list[Piece]] = field(default_factory=dict)  # by choice, what came before the first token
    _shifts: dict[int, int] = field(default_factory=dict)  # by choice, characters of echoed prompt

    def whole(self, pieces: list[Piece]) -> Completion:
        answer = self.envelope()
        answer["choices"] = [self._choice(index, piece, is_first=True) for index, piece in enumerate(pieces)]
        answer["usage"] = self.generation.usage()
        answer["metrics"] = self.generation.metrics()
        return answer

    def chunk(self, index: int, piece: Piece) -> Completion | None:
        fields = self.generation.call.fields
        is_first = index not in self._begun
        if is_first:
            early = self._early.setdefault(index, [])
            if not piece.tokens and piece.finish_reason is None:
                early.append(piece)
                return None
            piece = Piece.join([*early, piece])
        says_tokens = piece.tokens and (fields.logprobs is not None or fields.return_token_ids)
        is_silent = not (piece.text or says_tokens or piece.steps or piece.finish_reason)
        if is_silent and not (is_first and fields.echo):
            return None
        self._begun.add(index)
        answer = self.envelope()
        answer["choices"] = [self._choice(index, piece, is_first=is_first)]
        return answer

    def envelope(self) -> Completion:
        call = self.generation.call
        return {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model.name,
            "choices": [],
        }

    def _choice(self, index: int, piece: Piece, *, is_first: bool) -> CompletionChoice:
        call = self.generation.call
        prompt = self.prompts[index // call.fields.num_choices]
        text, logprobs = piece.text, self._logprobs(index, piece)
        if is_first and call.fields.echo:
            text = self._prompt_text(prompt) + text
            self._shifts[index] = len(text) - len(piece.text)
            logprobs = self._with_prompt(prompt, piece)
        with_ids = bool(call.fields.return_token_ids)
        ending = choice_ending(call.model.tokenizer, piece, with_ids=with_ids)
        # A subtype of the ending might hold prompt_token_ids of another type, as far as mypy knows.
        choice: CompletionChoice = {"index": index, "text": text, "logprobs": logprobs, **ending}  # type: ignore[typeddict-item]
        if with_ids and is_first:
            choice["prompt_token_ids"] = list(prompt.tokens)
        return choice

    def _logprobs(self, index: int, piece: Piece) -> LegacyLogprobs | None:
        if self.generation.call.fields.logprobs is None:
            return None
        shift = self._shifts.get(index, 0)
        offsets = [offset + shift for offset in piece.offsets]
        return legacy_logprobs(self.generation.call.model.tokenizer, piece.logprobs, offsets)

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        skips = self.generation.text_rules.skip_special_tokens
        return self.generation.call.model.tokenizer.decode(prompt.tokens, skip_special_tokens=skips)

    def _with_prompt(self, prompt: Prompt, piece: Piece) -> LegacyLogprobs | None:
        if self.generation.call.fields.logprobs is None:
            return None
        tokenizer, skips = self.generation.call.model.tokenizer, self.generation.text_rules.skip_special_tokens
        first = prompt_logprobs(tokenizer, prompt.tokens, piece.prompt_logprobs, skip_special_tokens=skips)
        second = legacy_logprobs(tokenizer, piece.logprobs, piece.offsets)
        return join_logprobs(first, second, len(self._prompt_text(prompt)))
