"""API keys, where the settings have any."""

import hmac

from fastapi import Request

from service.api.serving import Serving
from service.errors import AuthenticationError


async def require_key(request: Request) -> None:
    """Raises AuthenticationError unless the request has one of the keys, or none is asked for."""
    serving: Serving = request.app.state.serving
    keys = serving.settings.auth.api_keys
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Every key is compared in constant time, so that the time taken tells nothing.
    matches = [hmac.compare_digest(given.strip().encode(), key.get_secret_value().encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise AuthenticationError(
            "Send one of this server's API keys as Authorization: Bearer KEY.", headers={"WWW-Authenticate": "Bearer"}
        )
