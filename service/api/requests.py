"""From a valid body to the engine's requests. Everything that depends on the model or the limits is checked here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from service.api.body import Call
from service.api.schemas import GenerationFields, SpeculativeField
from service.api.serving import ServedModel
from service.api.tools import OfferedTools
from service.engine.base import GenerationRequest, SpeculationOptions
from service.errors import TooManyRequestsError, refuse
from service.keys import Key
from service.setting_groups import LimitSettings
from service.structured import Structure, StructureError
from verifiers.base import SamplingRules

SEED_MASK = 2**64 - 1
MAX_BAD_WORD_CHARACTERS = 256

TextFields = TypeVar("TextFields", bound=GenerationFields)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens, and its text for `echo`; None: to be decoded from the tokens."""

    tokens: tuple[int, ...]
    text: str | None = None


async def tokenize(
    call: Call[TextFields], given: Sequence[str | list[int]], *, add_special_tokens: bool
) -> list[Prompt]:
    """Turn texts, or token ids that a client sent, into prompts. Raises InvalidRequestError."""
    check_counts(call.fields, len(given), call.limits)
    engine, kept = call.model.engine, call.fields.truncate_prompt_tokens
    if kept is not None and kept > engine.context_length:
        refuse(
            f"truncate_prompt_tokens: at most the context of {engine.context_length} tokens, got {kept}.",
            param="truncate_prompt_tokens",
        )
    prompts = []
    for item in given:
        text = item if isinstance(item, str) else None
        tokens = await call.model.encode(item, add_special_tokens=add_special_tokens) if isinstance(item, str) else item
        if not tokens:
            refuse("prompt: must have at least one token.", param="prompt")
        if kept is not None and len(tokens) > kept:
            text, tokens = None, tokens[-kept:]
        check_ids(tokens, "prompt", engine.vocabulary_size)
        prompts.append(Prompt(tuple(tokens), text))
    return prompts


async def make_requests(
    call: Call[TextFields],
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    tools: OfferedTools | None = None,
) -> list[GenerationRequest]:
    """Make one engine request per sequence: choice `i` of prompt `p` is sequence `p * num_choices + i`.

    max_tokens: None for the rest of the context. Raises InvalidRequestError, TooManyRequestsError.
    """
    fields, model = call.fields, call.model
    check_supported(fields, model)
    priority = permitted_priority(call.key, fields.priority)
    structure = await find_structure(call, tools)  # before the lengths: tools may be what makes the prompt too long
    lengths = [check_length(len(prompt.tokens), max_tokens, model.engine.context_length) for prompt in prompts]
    min_tokens = fields.min_tokens or 0
    if min_tokens > min(lengths):
        refuse(f"min_tokens ({min_tokens}) must not be above max_tokens ({min(lengths)}).", param="min_tokens")
    rules = sampling_rules(fields, model, call.limits, logprobs, min_tokens, call.serving.draw_seed())
    timeouts = [one for one in (fields.timeout, call.serving.settings.server.request_seconds) if one is not None]
    speculation = speculation_options(fields.speculative, model.engine.default_draft_tokens)
    requests: list[GenerationRequest] = []
    for prompt, length in zip(prompts, lengths, strict=True):
        for choice in range(fields.num_choices):
            # Choice 0 is what n = 1 would give. Without a client's seed, equal prompts get different texts.
            seed = rules.seed + (len(requests) if fields.seed is None else choice)
            request = GenerationRequest(
                request_id=f"{call.id}-{len(requests)}",
                prompt=prompt.tokens,
                max_tokens=length,
                rules=replace(rules, seed=seed & SEED_MASK),
                include_stop_token=True,  # it was generated, so it counts; its text may be hidden all the same
                prompt_logprobs=prompt_logprobs,
                speculation=speculation,
                priority=priority,
                timeout_seconds=min(timeouts, default=None),
                structure=structure,
                tenant="" if call.key is None else call.key.name,
            )
            requests.append(request)
    return requests


def check_counts(fields: GenerationFields, num_prompts: int, limits: LimitSettings) -> None:
    """Refuse more prompts or choices than the limits allow, before anything is made of them."""
    n = fields.num_choices
    if num_prompts > limits.max_prompts:
        refuse(f"prompt: at most {limits.max_prompts} prompts, got {num_prompts}.", param="prompt")
    if n > limits.max_choices:
        refuse(f"n: at most {limits.max_choices}, got {n}.", param="n")
    if num_prompts * n > limits.max_sequences:
        refuse(f"n: prompts times n must be at most {limits.max_sequences}, got {num_prompts * n}.", param="n")
    if fields.stream_options is not None and not fields.stream:
        refuse("stream_options: only with stream.", param="stream_options")


def check_supported(fields: GenerationFields, model: ServedModel) -> None:
    """Refuse what the engine cannot do, where a client really asks for it: unset and neutral values ask for nothing."""
    for name, reason in model.engine.unsupported_fields.items():
        if getattr(fields, name):
            refuse(f"{name}: {reason}.", param=name, code="unsupported_field")


def check_length(num_prompt: int, max_tokens: int | None, context_length: int) -> int:
    """Return how many tokens to generate at most. Refuses what does not fit into the context."""
    num_left = context_length - num_prompt
    wanted = max(num_left, 1) if max_tokens is None else max_tokens
    if wanted > num_left:
        asked = "at least 1 must be left" if max_tokens is None else f"{max_tokens} are to be generated"
        refuse(
            f"The context of this model is {context_length} tokens; the prompt has {num_prompt} and {asked}.",
            param="prompt" if num_left < min(wanted, 1) else "max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def check_ids(tokens: Sequence[int], param: str, vocabulary_size: int) -> None:
    """Refuse ids outside of the target's logits: everywhere behind this, ids are indices."""
    if not tokens:
        return
    if min(tokens) < 0:
        refuse(f"{param}: token ids are at least 0, got {str(min(tokens))[:40]}.", param=param)
    if max(tokens) >= vocabulary_size:
        refuse(f"{param}: token ids must be below {vocabulary_size}, got {str(max(tokens))[:40]}.", param=param)


def permitted_priority(key: Key | None, asked: int | None) -> int:
    """Return the request's priority: the best one that its key has, if it asks for none."""
    best = None if key is None else key.best_priority
    if best is None:
        return asked or 0
    if asked is None:
        return max(best, 0)
    if asked < best:
        refuse(f"priority: this key may not go below {best}, got {asked}.", param="priority")
    return asked


def speculation_options(field: SpeculativeField | None, service_draft_tokens: int) -> SpeculationOptions:
    if field is None:
        return SpeculationOptions()
    if field.max_draft_tokens is not None and field.max_draft_tokens > service_draft_tokens:
        refuse(
            f"speculative.max_draft_tokens: at most {service_draft_tokens} here, got {field.max_draft_tokens}.",
            param="speculative.max_draft_tokens",
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
    """Return the rules of the first sequence. draw_seed: for requests without a seed."""
    size = model.engine.vocabulary_size
    bias = {int(token): value for token, value in (fields.logit_bias or {}).items()}
    if len(bias) > limits.max_logit_bias:
        refuse(f"logit_bias: at most {limits.max_logit_bias} entries, got {len(bias)}.", param="logit_bias")
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
    """Return each word's tokens at the start of a text and after a space."""
    if len(words) > limits.max_bad_words:
        refuse(f"bad_words: at most {limits.max_bad_words} entries, got {len(words)}.", param="bad_words")
    sequences: dict[tuple[int, ...], None] = {}
    for position, word in enumerate(words):
        name = f"bad_words[{position}]"
        if not word.strip() or len(word) > MAX_BAD_WORD_CHARACTERS:
            refuse(f"{name}: must be a word of 1 to {MAX_BAD_WORD_CHARACTERS} characters.", param=name)
        for text in (word, " " + word.lstrip()):
            sequences[tuple(model.tokenizer.encode(text, add_special_tokens=False))] = None
    check_ids([token for sequence in sequences for token in sequence], "bad_words", model.engine.vocabulary_size)
    return tuple(sequences)


def check_something_left(
    allowed: tuple[int, ...] | None, bad_words: Sequence[tuple[int, ...]], stops: Sequence[int], num_tokens: int
) -> None:
    """Refuse rules under which no token may come first. Only ids below `num_tokens` are ever drawn."""
    banned = {word[0] for word in bad_words if len(word) == 1} | set(stops)
    if allowed is None:
        is_something_left = sum(token < num_tokens for token in banned) < num_tokens
    else:
        is_something_left = any(token < num_tokens and token not in banned for token in allowed)
    if not is_something_left:
        refuse(
            "allowed_token_ids, bad_words and min_tokens together leave no token that may be generated: "
            f"allow an id below {num_tokens} that the others do not ban.",
            param="allowed_token_ids" if allowed is not None else "bad_words",
            code="no_token_left",
        )


async def find_structure(call: Call[TextFields], tools: OfferedTools | None) -> Structure | None:
    """Return the compiled structure that the output must keep to. Raises InvalidRequestError, TooManyRequestsError."""
    fields, limits = call.fields, call.limits
    param = "structured_outputs" if fields.structured_outputs is not None else "response_format"
    asked = [field.spec for field in (fields.response_format, fields.structured_outputs) if field is not None]
    specs = [spec for spec in asked if spec is not None]
    if tools is not None and tools.call_grammar is not None:
        specs, param = [tools.call_grammar], "tools"
    if not specs:
        return None
    if len(specs) > 1:
        refuse("response_format and structured_outputs both ask for a structure; send one of them.", param=param)
    if fields.ignore_eos:
        refuse("ignore_eos: not with structured output, which ends where its structure does.", param="ignore_eos")
    length = len(specs[0].definition)
    if length > limits.max_structure_characters:
        refuse(f"{param}: at most {limits.max_structure_characters} characters, got {length}.", param=param)
    try:
        return await call.model.compile(specs[0], limits.structure_seconds)
    except StructureError as error:
        message = f"{param}: {error}."
        refuse(message if tools is None else tools.name_tool(message), param=param, code="invalid_structure")
    except TimeoutError:
        raise TooManyRequestsError(
            "Other structures are being compiled: try again later.", param=param, headers={"Retry-After": "1"}
        ) from None
