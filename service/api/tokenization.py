"""POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from fastapi import APIRouter, Request

from service.api.call import receive
from service.api.chat import check_messages, render
from service.api.openapi import answers, takes
from service.api.parameters import check_ids
from service.api.responses import Detokenized, Tokenized, TokenizerInfo
from service.api.schemas import DetokenizeRequest, TokenizeRequest
from service.api.serving import Serving
from service.api.tools import check_tools
from service.errors import InvalidRequestError

router = APIRouter(tags=["tokens"])


@router.post(
    "/tokenize",
    summary="Turn a text or a conversation into token ids",
    responses=answers(Tokenized, 404, 408, 413, 415, 503),
    openapi_extra=takes(TokenizeRequest),
    response_model=None,
)
async def tokenize(request: Request) -> Tokenized:
    """What a prompt, or a conversation by the model's chat template, is to the model."""
    call = await receive(request, TokenizeRequest)
    fields, model = call.fields, call.model
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidRequestError("Send either prompt or messages.", param="prompt", code="invalid_value")
    tools, limits = fields.tools or (), call.serving.settings.limits
    if tools and fields.messages is None:
        raise InvalidRequestError("tools: only with messages.", param="tools", code="invalid_value")
    check_tools(tools, limits.max_tools)
    if fields.messages is not None:
        check_messages(fields.messages, limits.max_messages)
        wants_generation_prompt = fields.add_generation_prompt is not False
        text = await render(
            fields.messages,
            model,
            tools=[tool.for_template() for tool in tools],
            add_generation_prompt=wants_generation_prompt,
        )
        add_special_tokens = bool(fields.add_special_tokens)
    else:
        text = fields.prompt or ""
        add_special_tokens = fields.add_special_tokens is not False
    tokens = await model.encode(text, add_special_tokens=add_special_tokens)
    answer: Tokenized = {"count": len(tokens), "max_model_len": model.engine.context_length, "tokens": tokens}
    if fields.return_token_strs:
        answer["token_strs"] = [model.tokenizer.name_of(token) for token in tokens]
    return answer


@router.post(
    "/detokenize",
    summary="Turn token ids into text",
    responses=answers(Detokenized, 404, 408, 413, 415, 503),
    openapi_extra=takes(DetokenizeRequest),
    response_model=None,
)
async def detokenize(request: Request) -> Detokenized:
    """The text of tokens, special ones included."""
    call = await receive(request, DetokenizeRequest)
    fields, model = call.fields, call.model
    if any(token < 0 for token in fields.tokens):
        raise InvalidRequestError("tokens: token ids are at least 0.", param="tokens", code="invalid_value")
    check_ids(fields.tokens, "tokens", model.engine.vocabulary_size)
    return {"prompt": model.tokenizer.decode(fields.tokens, skip_special_tokens=False)}


@router.get(
    "/tokenizer_info", summary="Describe the tokenizer", responses=answers(TokenizerInfo, 503), response_model=None
)
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Its kind and sizes, special tokens and chat template."""
    serving: Serving = request.app.state.serving
    model = serving.model(None)
    special_tokens = model.tokenizer.special_tokens
    return {
        "type": model.tokenizer.kind,
        "size": model.tokenizer.size,
        "vocabulary_size": model.engine.vocabulary_size,
        "max_model_len": model.engine.context_length,
        "special_tokens": special_tokens,
        "bos_token": special_tokens.get("bos_token"),
        "eos_token": special_tokens.get("eos_token"),
        "pad_token": special_tokens.get("pad_token"),
        "chat_template": model.tokenizer.chat_template,
    }
