"""The HTTP surface: routes, errors as JSON, and how each request is counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleet.server.refusals import CLIENT_GONE, FailedError, RefusedError
from fleet.server.service import Service

__all__ = ["REFRESH_S", "ROUTES", "create_app"]

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
ROUTES = ("/v1/variants", "/v1/predict", "/health", "/metrics")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


def create_app(service: Service, *, refresh_s: float = REFRESH_S) -> FastAPI:
    """The application; while it runs, the store is looked at every `refresh_s` seconds."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_keep_looking(service, refresh_s))
        yield
        looking.cancel()
        await service.end()

    app = FastAPI(
        title="Many variants of one base",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(_Outermost, service=service)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _no_route)

    @app.get("/v1/variants")
    async def variants(request: Request) -> Response:
        return JSONResponse({"variants": service.listing(request)})

    @app.post("/v1/predict")
    async def predict(request: Request) -> Response:
        return Response(await service.predict(request), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        service.health()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=PROMETHEUS)

    return app


async def _keep_looking(service: Service, refresh_s: float) -> None:
    while True:
        await asyncio.sleep(refresh_s)
        await service.refresh()


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _answer(error)


def _answer(error: RefusedError) -> Response:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.close:
        headers["Connection"] = "close"
    return JSONResponse({"error": str(error)}, error.status, headers)


def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    wanted = f"{allowed} here" if allowed else f"one of {', '.join(ROUTES)}"
    text = f"{error.detail}; wanted {wanted}"
    return JSONResponse({"error": text}, error.status_code, error.headers)


class _Outermost:
    """Counts each request by its route and status, with its seconds; what fails is logged here.

    An error that no part of the server foresaw is told to nobody but the log. A server that ends
    says with each answer that no other will come on its connection.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = None

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.batcher.draining:
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, seen)
        except Exception as error:
            if status is not None:  # half an answer is sent: the connection must end
                raise
            failed = FailedError()
            logger.error("%s: %s failed", failed.failure, scope["path"], exc_info=error)
            await _answer(failed)(scope, receive, seen)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            seconds = time.perf_counter() - begun
            self._service.metrics.request(route, status or CLIENT_GONE, seconds)
