"""What clients are answered. Typed dictionaries: checked by mypy, documented in OpenAPI, and free of cost per chunk."""

from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic needs this one on Python 3.11


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class SpeculativeDecoding(TypedDict):
    num_spec_steps: int
    num_spec_tokens: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]


class Metrics(TypedDict):
    speculative_decoding: SpeculativeDecoding


class TracedToken(TypedDict):
    token_id: int
    text: str
    kind: str  # drafted, recovered or bonus


class TraceStep(TypedDict):
    source: str  # none, copy or diffusion
    tokens: list[TracedToken]
    rejected: list[int]  # drafted tokens that were not kept
    cut: NotRequired[list[TracedToken]]  # kept by the step, then cut off by a stop text; the statistics count them


class LegacyLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChoiceEnding(TypedDict):
    """What choices of both endpoints have in common."""

    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]
    trace: NotRequired[list[TraceStep]]


class CompletionChoice(ChoiceEnding):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    prompt_token_ids: NotRequired[list[int]]


class AnswerHead(TypedDict):
    id: str
    object: str
    created: int
    model: str


class Completion(AnswerHead):
    """Answer of POST /v1/completions, whole or as one chunk of a stream."""

    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    metrics: NotRequired[Metrics]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    name: str
    arguments: str  # JSON


class ToolCallBody(TypedDict):
    id: str
    type: str
    function: CalledFunction


class CalledFunctionDelta(TypedDict, total=False):
    name: str
    arguments: str


class ToolCallDelta(TypedDict):
    """Part of a call: the first has id, type and name, and the arguments come in pieces."""

    index: int
    id: NotRequired[str]
    type: NotRequired[str]
    function: CalledFunctionDelta


class ChatMessageBody(TypedDict):
    role: str
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallBody]]


class ChatDelta(TypedDict, total=False):
    role: str
    content: str | None
    tool_calls: list[ToolCallDelta]


class ChatChoiceBase(ChoiceEnding):
    index: int
    logprobs: ChatLogprobs | None


class ChatChoice(ChatChoiceBase):
    message: ChatMessageBody


class ChatChunkChoice(ChatChoiceBase):
    delta: ChatDelta


class ChatCompletion(AnswerHead):
    """Answer of POST /v1/chat/completions."""

    choices: list[ChatChoice]
    usage: Usage
    metrics: Metrics
    prompt_token_ids: NotRequired[list[int]]


class ChatCompletionChunk(AnswerHead):
    """One chunk of a streamed POST /v1/chat/completions."""

    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    metrics: NotRequired[Metrics]
    prompt_token_ids: NotRequired[list[int]]


class ModelCard(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    drafter: str


class ModelList(TypedDict):
    object: str
    data: list[ModelCard]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    type: str
    size: int
    vocabulary_size: int
    max_model_len: int
    special_tokens: dict[str, Any]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Health(TypedDict):
    status: str


class Startup(TypedDict):
    phase: str
    progress: float
    detail: str
    seconds: float


class Version(TypedDict):
    version: str
