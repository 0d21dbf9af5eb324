"""POST /v1/completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.call import Answering, answer, plan, receive
from service.api.choice import Piece
from service.api.formats import choice_ending, join_logprobs, legacy_logprobs
from service.api.formats import prompt_logprobs as score_prompt
from service.api.openapi import answers, takes
from service.api.parameters import Prompt
from service.api.responses import Completion, CompletionChoice, LegacyLogprobs
from service.api.schemas import CompletionRequest
from service.api.serving import ServedModel
from service.errors import InvalidRequestError

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
    call = await receive(request, CompletionRequest)
    fields = call.fields
    max_tokens = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    if max_tokens == 0 and not fields.echo:
        raise InvalidRequestError("max_tokens: 0 only with echo.", param="max_tokens", code="invalid_value")
    prompts = await _encode_prompts(fields.prompt, call.model, call.serving.settings.limits.max_prompts)
    prompt_logprobs = fields.logprobs if fields.echo else None
    wanted = await plan(call, prompts, max_tokens=max_tokens, logprobs=fields.logprobs, prompt_logprobs=prompt_logprobs)
    return await answer(call, wanted, "cmpl", CompletionWriter)


async def _encode_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], model: ServedModel, max_prompts: int
) -> Sequence[Prompt]:
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], int):
        return [Prompt(tuple(prompt))]
    if len(prompt) > max_prompts:
        raise InvalidRequestError(
            f"prompt: at most {max_prompts} prompts, got {len(prompt)}.", param="prompt", code="invalid_value"
        )
    prompts = []
    for item in prompt:
        if isinstance(item, str):
            prompts.append(Prompt(tuple(await model.encode(item, add_special_tokens=True)), item))
        else:
            assert isinstance(item, list)
            prompts.append(Prompt(tuple(item)))
    return prompts


@dataclass(slots=True)
class CompletionWriter:
    """Shapes pieces as completions and their chunks, beginning with the prompt where `echo` asks for it."""

    about: Answering[CompletionRequest]
    _begun: set[int] = field(default_factory=set)  # choices that have had a chunk
    _early: dict[int, list[Piece]] = field(
        default_factory=dict
    )  # pieces before the first token: prompt log probabilities
    _shifts: dict[int, int] = field(default_factory=dict)  # characters of echoed prompt

    def whole(self, pieces: list[Piece]) -> Completion:
        answer = self.envelope()
        answer["choices"] = [self._choice(index, piece, is_first=True) for index, piece in enumerate(pieces)]
        answer["usage"] = self.about.generation.usage()
        answer["metrics"] = self.about.generation.metrics()
        return answer

    def chunk(self, index: int, piece: Piece) -> Completion | None:
        is_first = index not in self._begun
        if is_first:
            early = self._early.setdefault(index, [])
            if not piece.tokens and piece.finish_reason is None:
                early.append(piece)
                return None
            piece = Piece.join([*early, piece])
        says_tokens = piece.tokens and (self.about.fields.logprobs is not None or self.about.fields.return_token_ids)
        is_silent = not (piece.text or says_tokens or piece.steps or piece.finish_reason)
        if is_silent and not (is_first and self.about.fields.echo):
            return None
        self._begun.add(index)
        answer = self.envelope()
        answer["choices"] = [self._choice(index, piece, is_first=is_first)]
        return answer

    def envelope(self) -> Completion:
        return {
            "id": self.about.response_id,
            "object": "text_completion",
            "created": self.about.created,
            "model": self.about.model.name,
            "choices": [],
        }

    def _choice(self, index: int, piece: Piece, *, is_first: bool) -> CompletionChoice:
        prompt = self.about.generation.plan.prompts[index // self.about.generation.plan.n]
        text, logprobs = piece.text, self._logprobs(index, piece)
        if is_first and self.about.fields.echo:
            text = self._prompt_text(prompt) + text
            self._shifts[index] = len(text) - len(piece.text)
            logprobs = self._with_prompt(prompt, piece)
        with_ids = bool(self.about.fields.return_token_ids)
        ending = choice_ending(self.about.model.tokenizer, piece, with_ids=with_ids)
        # A subtype of the ending might hold prompt_token_ids of another type, as far as mypy knows.
        choice: CompletionChoice = {"index": index, "text": text, "logprobs": logprobs, **ending}  # type: ignore[typeddict-item]
        if with_ids and is_first:
            choice["prompt_token_ids"] = list(prompt.tokens)
        return choice

    def _logprobs(self, index: int, piece: Piece) -> LegacyLogprobs | None:
        if self.about.fields.logprobs is None:
            return None
        shift = self._shifts.get(index, 0)
        return legacy_logprobs(self.about.model.tokenizer, piece.logprobs, [offset + shift for offset in piece.offsets])

    def _skips_special_tokens(self) -> bool:
        return self.about.generation.plan.text_rules.skip_special_tokens

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self.about.model.tokenizer.decode(prompt.tokens, skip_special_tokens=self._skips_special_tokens())

    def _with_prompt(self, prompt: Prompt, piece: Piece) -> LegacyLogprobs | None:
        if self.about.fields.logprobs is None:
            return None
        tokenizer = self.about.model.tokenizer
        first = score_prompt(
            tokenizer, prompt.tokens, piece.prompt_logprobs, skip_special_tokens=self._skips_special_tokens()
        )
        second = legacy_logprobs(tokenizer, piece.logprobs, piece.offsets)
        return join_logprobs(first, second, len(self._prompt_text(prompt)))
