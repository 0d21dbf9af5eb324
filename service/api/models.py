"""The served model and its tokenizer: GET /v1/models, POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from typing import Any

from fastapi import APIRouter, Request

from service.api.body import receive
from service.api.chat import render
from service.api.openapi import answers, takes
from service.api.requests import check_ids
from service.api.responses import Detokenized, ModelCard, ModelList, Tokenized, TokenizerInfo
from service.api.schemas import DetokenizeRequest, TokenizeRequest
from service.api.serving import ServedModel, Serving
from service.api.tools import check_tools
from service.errors import refuse

router = APIRouter()


def _card(model: ServedModel) -> ModelCard:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "diffuspec",
        "max_model_len": model.engine.context_length,
        "drafter": model.engine.drafter_description,
    }


@router.get(
    "/v1/models",
    summary="List the served model",
    responses=answers(ModelList, 503),
    response_model=None,
    tags=["models"],
)
async def list_models(request: Request) -> ModelList:
    """A server has one model. Requests may name its `id`, or leave it out."""
    serving: Serving = request.app.state.serving
    return {"object": "list", "data": [_card(serving.model(None))]}


_ABOUT_ID = {"description": "The model's name; it may hold slashes.", "example": "diffuspec-python"}
_ID: dict[str, Any] = {
    "parameters": [{"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}, **_ABOUT_ID}]
}


@router.get(
    "/v1/models/{model_id:path}",
    summary="Describe one model",
    responses=answers(ModelCard, 404, 503),
    response_model=None,
    openapi_extra=_ID,
    tags=["models"],
)
async def retrieve_model(request: Request) -> ModelCard:
    """Return the model's name, context length and drafter."""
    serving: Serving = request.app.state.serving
    return _card(serving.model(request.path_params["model_id"]))


@router.post(
    "/tokenize",
    summary="Turn a text or a conversation into token ids",
    responses=answers(Tokenized, 404, 408, 413, 415, 503),
    openapi_extra=takes(TokenizeRequest),
    response_model=None,
    tags=["tokens"],
)
async def tokenize(request: Request) -> Tokenized:
    """Return the token ids of a prompt, or of a conversation as the model's chat template writes it."""
    call = await receive(request, TokenizeRequest)
    fields, model = call.fields, call.model
    if (fields.prompt is None) == (fields.messages is None):
        refuse("Send either prompt or messages.", param="prompt")
    tools = fields.tools or ()
    if tools and fields.messages is None:
        refuse("tools: only with messages.", param="tools")
    if fields.messages is not None:
        check_tools(tools, call.limits.max_tools)
        text = await render(
            fields.messages,
            model,
            call.limits,
            tools=[tool.for_template() for tool in tools],
            add_generation_prompt=fields.add_generation_prompt is not False,
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
    tags=["tokens"],
)
async def detokenize(request: Request) -> Detokenized:
    """Return the text of tokens, special ones included."""
    call = await receive(request, DetokenizeRequest)
    fields, model = call.fields, call.model
    check_ids(fields.tokens, "tokens", model.engine.vocabulary_size)
    return {"prompt": model.tokenizer.decode(fields.tokens, skip_special_tokens=False)}


@router.get(
    "/tokenizer_info",
    summary="Describe the tokenizer",
    responses=answers(TokenizerInfo, 503),
    response_model=None,
    tags=["tokens"],
)
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Return its kind and sizes, special tokens and chat template."""
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
