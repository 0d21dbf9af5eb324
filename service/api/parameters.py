"""From a validated body to what the engine is asked for, with the checks that need the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.api.choice import TextRules
from service.api.schemas import GenerationFields, SpeculativeField
from service.api.serving import ServedModel
from service.engine.base import GenerationRequest, SpeculationOptions
from service.errors import InvalidRequestError
from service.setting_groups import LimitSettings
from service.structured import Structure
from verifiers.base import SamplingRules

SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt's tokens, and its text for `echo`; None: to be decoded from the tokens."""

    tokens: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything one HTTP request asks of the engine: choice `i` of prompt `p` is sequence `p * n + i`."""

    prompts: Sequence[Prompt]
    n: int
    max_tokens: Sequence[int]  # per prompt; 0: only the prompt is wanted
    rules: SamplingRules
    is_seeded: bool  # by the client
    text_rules: TextRules
    speculation: SpeculationOptions
    priority: int
    prompt_logprobs: int | None
    timeout_seconds: float | None
    structure: Structure | None
    tenant: str

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.n

    def requests(self, request_id: str) -> list[GenerationRequest]:
        """One engine request per sequence; choice i is drawn with seed + i, so choice 0 is what n = 1 would give.

        Prompts share the seed that a client gave; without one, equal prompts are to differ.
        """
        return [
            GenerationRequest(
                request_id=f"{request_id}-{index * self.n + i}",
                prompt=prompt.tokens,
                max_tokens=self.max_tokens[index],
                rules=replace(
                    self.rules, seed=(self.rules.seed + i + (0 if self.is_seeded else index * self.n)) & SEED_MASK
                ),
                include_stop_token=True,  # it was generated, so it counts; whether its text is shown is another matter
                prompt_logprobs=self.prompt_logprobs,
                speculation=self.speculation,
                priority=self.priority,
                timeout_seconds=self.timeout_seconds,
                structure=self.structure,
                tenant=self.tenant,
            )
            for index, prompt in enumerate(self.prompts)
            for i in range(self.n)
        ]


def make_plan(
    fields: GenerationFields,
    prompts: Sequence[Prompt],
    model: ServedModel,
    limits: LimitSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    draw_seed: int,
    timeout_seconds: float | None,
    structure: Structure | None,
    priority: int,
    tenant: str,
) -> Plan:
    """Raises InvalidRequestError. `max_tokens` None: the rest of the context."""
    n = check_counts(fields, len(prompts), limits)
    check_supported(fields, model)
    prompts = [truncate(prompt, fields.truncate_prompt_tokens, model.engine.context_length) for prompt in prompts]
    for prompt in prompts:
        if not prompt.tokens:
            raise InvalidRequestError("prompt: must have at least one token.", param="prompt", code="invalid_value")
        check_ids(prompt.tokens, "prompt", model.engine.vocabulary_size)
    min_tokens = fields.min_tokens or 0
    lengths = [check_length(len(prompt.tokens), max_tokens, model.engine.context_length) for prompt in prompts]
    if min_tokens > min(lengths):
        raise InvalidRequestError(
            f"min_tokens ({min_tokens}) must not be above max_tokens ({min(lengths)}).",
            param="min_tokens",
            code="invalid_value",
        )
    return Plan(
        prompts=prompts,
        n=n,
        max_tokens=lengths,
        rules=sampling_rules(fields, model, limits, logprobs, min_tokens, draw_seed),
        is_seeded=fields.seed is not None,
        text_rules=TextRules(
            stops=tuple(fields.stop or ()),
            include_stop=bool(fields.include_stop_str_in_output),
            skip_special_tokens=fields.skip_special_tokens is not False,
            min_tokens=min_tokens,
        ),
        speculation=speculation_options(fields.speculative, model.engine.default_draft_tokens),
        priority=priority,
        prompt_logprobs=prompt_logprobs,
        timeout_seconds=timeout_seconds,
        structure=structure,
        tenant=tenant,
    )


def check_supported(fields: GenerationFields, model: ServedModel) -> None:
    """Refuse what the engine cannot do, where a client really asks for it: unset and neutral values ask for nothing."""
    for name, reason in model.engine.unsupported_fields.items():
        if getattr(fields, name):
            raise InvalidRequestError(f"{name}: {reason}.", param=name, code="unsupported_field")


def check_counts(fields: GenerationFields, num_prompts: int, limits: LimitSettings) -> int:
    """Return `n`, with all counts within bounds before anything is made of them."""
    n = 1 if fields.n is None else fields.n
    if n > limits.max_choices:
        raise InvalidRequestError(f"n: at most {limits.max_choices}, got {n}.", param="n", code="invalid_value")
    if num_prompts > limits.max_prompts:
        raise InvalidRequestError(
            f"prompt: at most {limits.max_prompts} prompts, got {num_prompts}.", param="prompt", code="invalid_value"
        )
    if num_prompts * n > limits.max_sequences:
        raise InvalidRequestError(
            f"n: prompts times n must be at most {limits.max_sequences}, got {num_prompts * n}.",
            param="n",
            code="invalid_value",
        )
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequestError("stream_options: only with stream.", param="stream_options", code="invalid_value")
    return n


def truncate(prompt: Prompt, num_tokens: int | None, context_length: int) -> Prompt:
    """Keep the last `num_tokens`."""
    if num_tokens is None:
        return prompt
    if num_tokens > context_length:
        raise InvalidRequestError(
            f"truncate_prompt_tokens: at most the context of {context_length} tokens, got {num_tokens}.",
            param="truncate_prompt_tokens",
            code="invalid_value",
        )
    return prompt if len(prompt.tokens) <= num_tokens else Prompt(prompt.tokens[-num_tokens:])


def check_length(num_prompt: int, max_tokens: int | None, context_length: int) -> int:
    """Most tokens to generate."""
    room = context_length - num_prompt
    wanted = max(room, 1) if max_tokens is None else max_tokens
    if room < wanted:
        asked = "at least 1 must be left" if max_tokens is None else f"{max_tokens} are to be generated"
        raise InvalidRequestError(
            f"The context of this model is {context_length} tokens; the prompt has {num_prompt} and {asked}.",
            param="prompt" if room < min(wanted, 1) else "max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def check_ids(tokens: Sequence[int], param: str, vocabulary_size: int) -> None:
    """Compare with the width of the target's logits, which no index may leave."""
    if tokens and max(tokens) >= vocabulary_size:
        raise InvalidRequestError(
            f"{param}: token ids must be below {vocabulary_size}, got {max(tokens)}.", param=param, code="invalid_value"
        )


def speculation_options(field: SpeculativeField | None, service_draft_tokens: int) -> SpeculationOptions:
    if field is None:
        return SpeculationOptions()
    if field.max_draft_tokens is not None and field.max_draft_tokens > service_draft_tokens:
        raise InvalidRequestError(
            f"speculative.max_draft_tokens: at most {service_draft_tokens} here, got {field.max_draft_tokens}.",
            param="speculative.max_draft_tokens",
            code="invalid_value",
        )
    return SpeculationOptions(
        enabled=field.enabled is not False,
        max_draft_tokens=field.max_draft_tokens,
        policy=field.policy,
        trace=bool(field.trace),
    )


def sampling_rules(
    fields: GenerationFields,
    model: ServedModel,
    limits: LimitSettings,
    logprobs: int | None,
    min_tokens: int,
    draw_seed: int,
) -> SamplingRules:
    size = model.engine.vocabulary_size
    bias = {int(token): value for token, value in (fields.logit_bias or {}).items()}
    if len(bias) > limits.max_logit_bias:
        raise InvalidRequestError(
            f"logit_bias: at most {limits.max_logit_bias} entries, got {len(bias)}.",
            param="logit_bias",
            code="invalid_value",
        )
    check_ids(tuple(bias), "logit_bias", size)
    own_stops = fields.stop_token_ids or ()
    check_ids(own_stops, "stop_token_ids", size)
    stops = tuple(dict.fromkeys((*(() if fields.ignore_eos else model.tokenizer.end_token_ids), *own_stops)))
    allowed = None if fields.allowed_token_ids is None else tuple(dict.fromkeys(fields.allowed_token_ids))
    check_ids(allowed or (), "allowed_token_ids", size)
    bad_words = encode_bad_words(fields.bad_words or (), model, limits)
    check_something_left(allowed, bad_words, stops if min_tokens else (), min(size, model.tokenizer.size))
    top_k = max(fields.top_k or 0, 0)
    return SamplingRules(
        seed=(draw_seed if fields.seed is None else fields.seed) & SEED_MASK,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=0 if top_k >= size else top_k,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
        logit_bias=bias,
        allowed_token_ids=allowed,
        bad_words=bad_words,
        min_tokens=min_tokens,
        stop_token_ids=stops,
        logprobs=logprobs,
    )


def encode_bad_words(words: Sequence[str], model: ServedModel, limits: LimitSettings) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens at the start of a text and after a space."""
    if len(words) > limits.max_bad_words:
        raise InvalidRequestError(
            f"bad_words: at most {limits.max_bad_words} entries, got {len(words)}.",
            param="bad_words",
            code="invalid_value",
        )
    sequences: dict[tuple[int, ...], None] = {}
    for position, word in enumerate(words):
        name = f"bad_words[{position}]"
        if not word.strip() or len(word) > 256:
            raise InvalidRequestError(
                f"{name}: must be a word of 1 to 256 characters.", param=name, code="invalid_value"
            )
        for text in (word, " " + word.lstrip()):
            sequences[tuple(model.tokenizer.encode(text, add_special_tokens=False))] = None
    check_ids([token for sequence in sequences for token in sequence], "bad_words", model.engine.vocabulary_size)
    return tuple(sequences)


def check_something_left(
    allowed: tuple[int, ...] | None, bad_words: Sequence[tuple[int, ...]], stops: Sequence[int], num_tokens: int
) -> None:
    """Refuse rules under which no token at all may be drawn first; only ids below `num_tokens` ever are."""
    banned = {word[0] for word in bad_words if len(word) == 1} | set(stops)
    if allowed is None:
        is_something_left = sum(token < num_tokens for token in banned) < num_tokens
    else:
        is_something_left = any(token < num_tokens and token not in banned for token in allowed)
    if not is_something_left:
        raise InvalidRequestError(
            "allowed_token_ids, bad_words and min_tokens together leave no token that may be generated: "
            f"allow an id below {num_tokens} that the others do not ban.",
            param="allowed_token_ids" if allowed is not None else "bad_words",
            code="no_token_left",
        )
