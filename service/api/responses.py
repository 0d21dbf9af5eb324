"""The bodies of answers. Typed dictionaries: checked by mypy, documented in OpenAPI, and free of cost per chunk."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic needs this one on Python 3.11

TokenKind = Literal["drafted", "recovered", "bonus", "plain"]


def about(description: str) -> Any:
    """Describe a field for OpenAPI."""
    return Field(description=description)


class ErrorDetail(TypedDict):
    """An error, as OpenAI has it."""

    message: Annotated[str, about("What was given, what is allowed, and what to do.")]
    type: Annotated[str, about("The kind of error, such as `invalid_request_error`.")]
    param: Annotated[str | None, about("The field that is wrong; null if the error is no field's.")]
    code: Annotated[str | None, about("The error as a word for programs, such as `queue_full`.")]


class ErrorBody(TypedDict):
    """The answer to every refused or failed request."""

    error: Annotated[ErrorDetail, about("What went wrong. In a stream that has begun it comes as an event of its own.")]


class PromptTokensDetails(TypedDict):
    """More about the prompts' tokens."""

    cached_tokens: Annotated[int, about("Prompt tokens whose keys and values were cached.")]


class Usage(TypedDict):
    """Tokens counted."""

    prompt_tokens: Annotated[int, about("Tokens of the prompts.")]
    completion_tokens: Annotated[int, about("Tokens generated, over all choices.")]
    total_tokens: Annotated[int, about("Both together.")]
    prompt_tokens_details: NotRequired[Annotated[PromptTokensDetails, about("More about the prompts.")]]


class SpeculativeDecoding(TypedDict):
    """Counts of drafted and accepted tokens, under vLLM's names."""

    num_spec_steps: Annotated[int, about("Decoding steps that verified a draft.")]
    num_spec_tokens: Annotated[int, about("Longest draft that a step may have.")]
    num_draft_tokens: Annotated[int, about("Tokens drafted.")]
    num_accepted_draft_tokens: Annotated[int, about("Drafted tokens that are part of the text.")]
    mean_acceptance_length: Annotated[
        float, about("Tokens per verified draft: the accepted ones and the target's own one after them.")
    ]
    draft_acceptance_rate: Annotated[float, about("Accepted tokens per drafted token, from 0 to 1.")]
    acceptance_histogram: Annotated[list[int], about("How many steps accepted 0, 1, 2, ... drafted tokens.")]


class Metrics(TypedDict):
    """An extension of OpenAI's API, the same as vLLM's."""

    speculative_decoding: Annotated[SpeculativeDecoding, about("Drafted and accepted tokens, over all choices.")]


class TracedToken(TypedDict):
    """A token and where it came from."""

    token_id: Annotated[int, about("The token.")]
    text: Annotated[str, about("Its text.")]
    kind: Annotated[
        TokenKind,
        about(
            "`drafted`, or the target's own: `recovered` in place of a rejected one, `bonus` after a draft that was "
            "accepted whole, `plain` in a step without a draft."
        ),
    ]


class TraceStep(TypedDict):
    """One decoding step."""

    source: Annotated[str, about("Source of the draft: `none`, `free` or `diffusion`.")]
    tokens: Annotated[list[TracedToken], about("The tokens that the step added to the text.")]
    rejected: Annotated[list[int], about("Drafted tokens that were not kept.")]
    cut: NotRequired[
        Annotated[
            list[TracedToken],
            about("Tokens that the step kept and a stop text then cut off; the statistics count them."),
        ]
    ]


class LegacyLogprobs(TypedDict):
    """Log probabilities of a completion."""

    tokens: Annotated[list[str], about("Each token's text; `bytes:\\x..` for one that is no whole text.")]
    token_logprobs: Annotated[
        list[float | None], about("Natural logarithm of each token's probability; null for a prompt's first token.")
    ]
    top_logprobs: Annotated[
        list[dict[str, float] | None], about("For each token the most probable ones, by their texts.")
    ]
    text_offset: Annotated[list[int], about("Where each token begins in the text, in characters.")]


class ChoiceEnding(TypedDict):
    """Fields that choices of both endpoints share."""

    finish_reason: Annotated[str | None, about("`stop`, `length` or `tool_calls`; null while the choice goes on.")]
    stop_reason: Annotated[
        int | str | None, about("The stop text, or the stop token's id, that ended the choice; else null.")
    ]
    token_ids: NotRequired[Annotated[list[int], about("The choice's tokens; with `return_token_ids`.")]]
    trace: NotRequired[
        Annotated[
            list[TraceStep],
            about("The decoding steps, with the tokens that each drafted and kept; with `speculative.trace`."),
        ]
    ]


class CompletionChoice(ChoiceEnding):
    """One text."""

    index: Annotated[int, about("Number of the choice; prompt i has the choices from i * n on.")]
    text: Annotated[str, about("The text, or in a stream the new part of it.")]
    logprobs: Annotated[LegacyLogprobs | None, about("Log probabilities; null unless asked for.")]
    prompt_token_ids: NotRequired[Annotated[list[int], about("The prompt's tokens; with `return_token_ids`.")]]


class AnswerHead(TypedDict):
    """Fields that every answer has."""

    id: Annotated[str, about("Name of this answer.")]
    object: Annotated[str, about("The kind of answer.")]
    created: Annotated[int, about("When the request came, in Unix seconds.")]
    model: Annotated[str, about("Name of the model.")]


class Completion(AnswerHead):
    """Answer of POST /v1/completions, whole or as one chunk of a stream."""

    choices: Annotated[list[CompletionChoice], about("The texts; empty in a stream's chunk with the usage.")]
    usage: NotRequired[
        Annotated[Usage | None, about("Tokens counted; in a stream null, or with `include_usage` on the last chunk.")]
    ]
    metrics: NotRequired[
        Annotated[Metrics, about("Drafted and accepted tokens; in a stream on the chunk with the usage.")]
    ]


class TopLogprob(TypedDict):
    """A token and its log probability."""

    token: Annotated[str, about("The token's text.")]
    logprob: Annotated[float, about("Natural logarithm of its probability.")]
    bytes: Annotated[list[int], about("Its bytes.")]


class TokenLogprob(TopLogprob):
    """A token of the text and its alternatives."""

    top_logprobs: Annotated[list[TopLogprob], about("The most probable tokens in its place.")]


class ChatLogprobs(TypedDict):
    """Log probabilities of a chat."""

    content: Annotated[list[TokenLogprob], about("One entry for each token.")]
    refusal: Annotated[None, about("Always null.")]


class CalledFunction(TypedDict):
    """A function and its arguments."""

    name: Annotated[str, about("Name of the function.")]
    arguments: Annotated[str, about("Its arguments, as JSON text.")]


class ToolCallBody(TypedDict):
    """A call that the model asks for."""

    id: Annotated[str, about("Name of this call, for the message that answers it.")]
    type: Annotated[str, about("Always `function`.")]
    function: Annotated[CalledFunction, about("The function to call, and with what.")]


class CalledFunctionDelta(TypedDict, total=False):
    """Part of a function and its arguments."""

    name: Annotated[str, about("Name of the function.")]
    arguments: Annotated[str, about("New JSON text of the arguments.")]


class ToolCallDelta(TypedDict):
    """Part of a call: the first has id, type and name, and the arguments come in pieces."""

    index: Annotated[int, about("Number of the call in the message.")]
    id: NotRequired[Annotated[str, about("Name of this call; on its first part.")]]
    type: NotRequired[Annotated[str, about("Always `function`; on the first part.")]]
    function: Annotated[CalledFunctionDelta, about("The new part of the function to call.")]


class ChatMessageBody(TypedDict):
    """The assistant's message."""

    role: Annotated[str, about("Always `assistant`.")]
    content: Annotated[str | None, about("The text; null if there are only calls.")]
    refusal: Annotated[None, about("Always null.")]
    tool_calls: NotRequired[Annotated[list[ToolCallBody], about("Functions that the model asks to be called.")]]


class ChatDelta(TypedDict, total=False):
    """Part of the assistant's message."""

    role: Annotated[str, about("Always `assistant`; on the first chunk of a choice.")]
    content: Annotated[str | None, about("New text.")]
    tool_calls: Annotated[list[ToolCallDelta], about("The new parts of calls.")]


class ChatChoiceBase(ChoiceEnding):
    """Fields that choices of chats share."""

    index: Annotated[int, about("Number of the choice.")]
    logprobs: Annotated[ChatLogprobs | None, about("Log probabilities; null unless asked for.")]


class ChatChoice(ChatChoiceBase):
    """One answer."""

    message: Annotated[ChatMessageBody, about("The assistant's message.")]


class ChatChunkChoice(ChatChoiceBase):
    """Part of one answer."""

    delta: Annotated[ChatDelta, about("The new part of the assistant's message.")]


class ChatCompletion(AnswerHead):
    """Answer of POST /v1/chat/completions."""

    choices: Annotated[list[ChatChoice], about("The answers.")]
    usage: Annotated[Usage, about("Tokens counted.")]
    metrics: Annotated[Metrics, about("Drafted and accepted tokens.")]
    prompt_token_ids: NotRequired[Annotated[list[int], about("The prompt's tokens; with `return_token_ids`.")]]


class ChatCompletionChunk(AnswerHead):
    """One chunk of a streamed POST /v1/chat/completions."""

    choices: Annotated[list[ChatChunkChoice], about("The new parts of the answers; empty in the chunk with the usage.")]
    usage: NotRequired[
        Annotated[Usage | None, about("Null, or with `include_usage` on the last chunk the tokens counted.")]
    ]
    metrics: NotRequired[Annotated[Metrics, about("Drafted and accepted tokens; on the chunk with the usage.")]]
    prompt_token_ids: NotRequired[
        Annotated[list[int], about("The prompt's tokens, on the first chunk; with `return_token_ids`.")]
    ]


class ModelCard(TypedDict):
    """A model."""

    id: Annotated[str, about("Name of the model, for the field `model` of requests.")]
    object: Annotated[str, about("Always `model`.")]
    created: Annotated[int, about("When it was loaded, in Unix seconds.")]
    owned_by: Annotated[str, about("Always `diffuspec`.")]
    max_model_len: Annotated[int, about("Most tokens of prompt and output together.")]
    drafter: Annotated[str, about("What drafts for it.")]


class ModelList(TypedDict):
    """All models."""

    object: Annotated[str, about("Always `list`.")]
    data: Annotated[list[ModelCard], about("The served model.")]


class Tokenized(TypedDict):
    """Answer of POST /tokenize."""

    count: Annotated[int, about("How many tokens.")]
    max_model_len: Annotated[int, about("Most tokens of prompt and output together.")]
    tokens: Annotated[list[int], about("The tokens' ids.")]
    token_strs: NotRequired[Annotated[list[str], about("Each token's text; with `return_token_strs`.")]]


class Detokenized(TypedDict):
    """Answer of POST /detokenize."""

    prompt: Annotated[str, about("The text.")]


class TokenizerInfo(TypedDict):
    """Answer of GET /tokenizer_info."""

    type: Annotated[str, about("The kind of tokenizer, such as `BPE`.")]
    size: Annotated[int, about("Ids that the tokenizer knows.")]
    vocabulary_size: Annotated[int, about("Width of the model's logits; ids below it may be sent.")]
    max_model_len: Annotated[int, about("Most tokens of prompt and output together.")]
    special_tokens: Annotated[dict[str, Any], about("Special tokens by their roles.")]
    bos_token: Annotated[str | None, about("Begins a text; null if there is none.")]
    eos_token: Annotated[str | None, about("Ends a text; null if there is none.")]
    pad_token: Annotated[str | None, about("Fills up a batch; null if there is none.")]
    chat_template: Annotated[str | None, about("Jinja template of conversations; null if the model has none.")]


class Health(TypedDict):
    """Answer of the probes."""

    status: Annotated[str, about("`ok` or `ready`.")]


class Startup(TypedDict):
    """Answer of GET /startup."""

    phase: Annotated[str, about("`loading`, `ready`, `draining`, `hung` or `dead`.")]
    progress: Annotated[float, about("From 0 to 1.")]
    detail: Annotated[str, about("What is being done.")]
    seconds: Annotated[float, about("Since the process began to serve.")]


class Version(TypedDict):
    """Answer of GET /version."""

    version: Annotated[str, about("Version of this server.")]
