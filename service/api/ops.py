"""Routes for operators and their machines: health, readiness, start-up progress, metrics, version."""

from fastapi import APIRouter, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from service import VERSION
from service.api.openapi import answers
from service.api.responses import Health, Startup, Version
from service.api.serving import Serving
from service.errors import NotReadyError

router = APIRouter(tags=["operations"])


@router.get("/health", summary="Is the server alive?", responses=answers(Health, 503), response_model=None)
async def health(request: Request) -> Health:
    """200 while loading, serving and draining; 503 when only a restart helps: the engine hangs or has died."""
    serving: Serving = request.app.state.serving
    status = serving.status()
    if status.phase in ("hung", "dead"):
        raise NotReadyError(f"The engine is {status.phase}: {status.detail}.", code=f"engine_{status.phase}")
    return {"status": "ok"}


@router.get("/ready", summary="Does the server take requests?", responses=answers(Health, 503), response_model=None)
async def ready(request: Request) -> Health:
    """503 with the reason while loading, draining, hung or dead."""
    serving: Serving = request.app.state.serving
    serving.model(None)
    return {"status": "ready"}


@router.get("/startup", summary="How far is loading?", responses=answers(Startup), response_model=None)
async def startup(request: Request) -> Startup:
    """Answers within a second of the start of the process, with the phase and the progress from 0 to 1."""
    serving: Serving = request.app.state.serving
    status = serving.status()
    return {
        "phase": status.phase,
        "progress": round(status.progress, 3),
        "detail": status.detail,
        "seconds": round(serving.seconds_since_start, 3),
    }


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    responses={200: {"description": "Text format", "content": {"text/plain": {"schema": {"type": "string"}}}}},
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    """Metrics have vLLM's names where vLLM has one, else `diffuspec_...`."""
    serving: Serving = request.app.state.serving
    return Response(generate_latest(serving.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/version", summary="Version of this server", responses=answers(Version, 503), response_model=None)
async def show_version() -> Version:
    """Return the version of the service, not of the model."""
    return {"version": VERSION}
