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
    serving: Serving = request.app.state.serving
    return {"object": "list", "data": [_card(serving.model(None))]}


_ID: dict[str, Any] = {
    "parameters": [{"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}]
}


@router.get(
    "/v1/models/{model_id:path}",
    summary="Describe one model",
    responses=answers(ModelCard, 404, 503),
    response_model=None,
    openapi_extra=_ID,
)
async def retrieve_model(request: Request) -> ModelCard:
    serving: Serving = request.app.state.serving
    return _card(serving.model(request.path_params["model_id"]))
