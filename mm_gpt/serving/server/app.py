"""The routes of the server, who may use them, and errors in OpenAI's shape."""

import hmac
import logging
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mm_gpt.serving.server.config import ServerConfig
from mm_gpt.serving.server.endpoints import Chat, Completions
from mm_gpt.serving.server.errors import RequestError, internal_error, unavailable
from mm_gpt.serving.server.metrics import CONTENT_TYPE
from mm_gpt.serving.server.requests import no_such_model
from mm_gpt.serving.server.responses import to_json
from mm_gpt.serving.server.service import Service

logger = logging.getLogger(__name__)
PUBLIC = ("/health", "/v1/health")
"""Without a key: who starts and watches servers need not know it."""


class App:
    """The ASGI application of one server. `service` is set when the model is loaded; until then it answers 503."""

    def __init__(self, config: ServerConfig):
        self.config = config
        self.service: Service | None = None
        routes = [
            Route("/v1/chat/completions", Chat(self.loaded), methods=["POST"]),
            Route("/v1/completions", Completions(self.loaded), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/metrics", self._metrics),
            *(Route(path, self._health) for path in PUBLIC),
        ]
        middleware = [Middleware(Guard, config=config)]
        if config.allow_origins:
            cors = Middleware(
                CORSMiddleware,
                allow_origins=config.allow_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
            middleware.insert(0, cors)
        self._app = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={RequestError: _refused, HTTPException: _no_route, Exception: _failed},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def loaded(self) -> Service:
        """Raises RequestError (503) while the model is loading, and when the engine has died."""
        if self.service is None:
            raise unavailable("Loading the model.")
        self.service.check()
        return self.service

    def close(self) -> None:
        """End the engine; whoever waits for it is told."""
        if self.service is not None:
            self.service.close()

    async def _health(self, request: Request) -> Response:
        self.loaded()
        return _json({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_card(self.loaded())]})

    async def _model(self, request: Request) -> Response:
        service = self.loaded()
        name = unquote(request.path_params["name"])
        if name != service.served.name:
            raise no_such_model(name, service.served)
        return _json(_card(service))

    async def _metrics(self, request: Request) -> Response:
        return Response(self.loaded().metrics.text(), media_type=CONTENT_TYPE)


class Guard:
    """Lets in who has the key, and from browsers only the pages that may."""

    def __init__(self, app: ASGIApp, *, config: ServerConfig):
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC:
            headers = Headers(scope=scope)
            refusal = self._origin(headers) or self._key(headers)
            if refusal is not None:
                await _json(refusal.body(), refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _origin(self, headers: Headers) -> RequestError | None:
        """A page of any other site must not use a server that listens on its visitor's machine, whatever name it
        gives that machine."""
        origin = headers.get("origin")
        if origin is None or "*" in self.config.allow_origins or origin in self.config.allow_origins:
            return None
        message = f"Pages of {origin} may not use this server; it can be started with --allow-origin."
        return RequestError(message, status=403, code="origin_not_allowed")

    def _key(self, headers: Headers) -> RequestError | None:
        if not self.config.api_key:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.config.api_key.encode())
        if right and scheme.lower() == "bearer":
            return None
        message = "Incorrect API key." if given else "No API key: send it as 'Authorization: Bearer KEY'."
        return RequestError(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _card(service: Service) -> dict[str, object]:
    served = service.served
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "mm-gpt",
        "max_model_len": served.context,
        "input_modalities": ["text", "image"] if served.takes_images else ["text"],
        "output_modalities": ["text"],
    }


def _json(value: object, error: RequestError | None = None) -> Response:
    status, headers = (200, {}) if error is None else (error.status, error.headers)
    return Response(to_json(value), status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if error.__cause__ is not None and error.status >= 500:
        logger.error("a request failed", exc_info=error.__cause__)
    return _json(error.body(), error)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = f"There is no {path} here."
    if error.status_code == 405:
        message = f"{path} does not take {request.method}."
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    found = RequestError(message, status=error.status_code, code=code, headers=error.headers)
    return _json(found.body(), found)


async def _failed(request: Request, error: Exception) -> Response:
    found = internal_error()
    return _json(found.body(), found)
