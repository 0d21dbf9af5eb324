"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter, Request

from service.api.openapi import answers
from service.api.responses import ModelCard, ModelList
from service.api.serving import ServedModel, Serving

router = APIRouter(tags=["models"])


def _card(model: ServedModel) -> ModelCard:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "diffuspec",
        "max_model_len": model.engine.context_length,
        "drafter": model.engine.drafter_description,
    }


@router.get("/v1/models", summary="List the served model", responses=answers(ModelList, 503), response_model=None)
async def list_models(request: Request) -> ModelList:
    """A server has one model; its `id` is what requests name, or leave out."""
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
)
async def retrieve_model(request: Request) -> ModelCard:
    """Name, context length, and who drafts for it."""
    serving: Serving = request.app.state.serving
    return _card(serving.model(request.path_params["model_id"]))
