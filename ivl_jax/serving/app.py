"""The HTTP application: its paths, who may use them, and what they answer.

In: a catalogue of models and the thread that decodes. Out: a Starlette application.
"""

import asyncio
import contextlib
import functools
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ivl_jax.config import ServeConfig
from ivl_jax.serving.answers import Answer, Kind, TokenTexts
from ivl_jax.serving.bodies import Asked, read_chat, read_completion, read_value_request
from ivl_jax.serving.catalogue import Catalogue, Chosen
from ivl_jax.serving.connection import EventStream, read_json_body, unless_disconnected
from ivl_jax.serving.engine_thread import ChoiceProgress, EngineThread
from ivl_jax.serving.errors import ApiError, error_response, stopping
from ivl_jax.serving.front import Front, Places
from ivl_jax.serving.hosts import KnownHosts
from ivl_jax.serving.metrics import CONTENT_TYPE, Metrics
from ivl_jax.serving.openapi import describe_api
from ivl_jax.serving.page import PATHS, page_routes
from ivl_jax.serving.value_desk import ValueDesk

# Answered without a key: they say nothing of models or requests.
_OPEN_PATHS = ("/health", *PATHS)
_STOP_SECONDS = 2.0  # for the step that the engine is in, once requests have had their time
_CLIENT_LEFT = 499  # nobody reads it; it is counted

# An answer that is still empty, and what it will be made of.
_Begun = tuple[Answer, AsyncGenerator[ChoiceProgress, None]]


class Service:
    """What the paths share.

    Args:
        config: of the server.
        catalogue: the models.
        engine: the thread that decodes.
        metrics: what is counted.
        front: takes requests to the engine.
        values: loads and unloads value networks.
        texts: what tokens are called.
    """

    def __init__(
        self,
        config: ServeConfig,
        catalogue: Catalogue,
        engine: EngineThread,
        metrics: Metrics,
        front: Front,
        values: ValueDesk,
        texts: TokenTexts,
    ) -> None:
        self.config, self.catalogue, self.engine = config, catalogue, engine
        self.metrics, self.front, self.values = metrics, front, values
        self._texts = texts
        self._description = describe_api(config)

    async def health(self, request: Request) -> Response:
        """Whether requests can be answered."""
        del request
        if self.engine.failure is not None:
            raise ApiError(503, f"the engine has failed: {self.engine.failure}", code="unavailable")
        return JSONResponse({"status": "ok", "in_flight": self.front.in_flight})

    async def show_metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        del request
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def list_models(self, request: Request) -> Response:
        """The names that requests may use."""
        del request
        data = [self._describe(name) for name in self.catalogue.names]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        self.catalogue.choose(name, {})
        return JSONResponse(self._describe(name))

    async def load_value(self, request: Request) -> Response:
        """Load a value network."""
        body = await read_json_body(request, most_bytes=self.config.max_body_bytes)
        value = await self.values.load(read_value_request(body))
        return JSONResponse(self._describe(value.name), status_code=201)

    async def unload_value(self, request: Request) -> Response:
        """Unload one that no request uses."""
        name = request.path_params["name"]
        await self.values.unload(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def openapi(self, request: Request) -> Response:
        """Describe all this."""
        del request
        return JSONResponse(self._description)

    async def chat(self, request: Request) -> Response | EventStream:
        """Continue a dialogue."""
        body = await read_json_body(request, most_bytes=self.config.max_body_bytes)
        return await self._answer(request, "chat", read_chat(body, self.config))

    async def complete(self, request: Request) -> Response | EventStream:
        """Continue texts."""
        body = await read_json_body(request, most_bytes=self.config.max_body_bytes)
        return await self._answer(request, "text", read_completion(body, self.config))

    def _describe(self, name: str) -> dict[str, Any]:
        catalogue = self.catalogue
        chosen = catalogue.choose(name, {})
        (value,) = chosen.values or (None,)
        return {
            "id": name,
            "object": "model",
            "created": catalogue.started if value is None else value.loaded,
            "owned_by": "ivl_jax",
            "max_model_len": chosen.reader.context,
            "strengths": {
                value: alpha for value, alpha in catalogue.strengths(chosen).items() if alpha
            },
        }

    async def _answer(self, request: Request, kind: Kind, asked: Asked) -> Response | EventStream:
        with contextlib.ExitStack() as held:
            places = held.enter_context(self.front.admit(asked.choices * len(asked.prompts)))
            chosen = self.catalogue.choose(asked.model, asked.strengths)
            held.enter_context(self.catalogue.hold(chosen))
            begin = functools.partial(self._begin, kind, asked, chosen, places)
            if not asked.stream:
                return JSONResponse(await unless_disconnected(request, _whole(begin)))
            # Until something is decoded, a refusal still has a status of its own.
            answer, first, progress = await unless_disconnected(request, _first(begin))
            # The stream outlives this call: it keeps what it uses.
            kept = held.pop_all()
            events = _chunks(answer, first, progress, kept)
            longest = 2 * self.config.request_seconds
            return EventStream(events, source=progress, held=kept, longest=longest)

    async def _begin(self, kind: Kind, asked: Asked, chosen: Chosen, places: Places) -> _Begun:
        """Encode the prompts; nothing is decoded before the first event is asked for."""
        catalogue = self.catalogue
        prompts = await self.front.encode(
            lambda: catalogue.encode(
                chosen,
                asked.prompts,
                asked.options,
                choices=asked.choices,
                field=asked.prompt_field,
            ),
            places,
        )
        answer = Answer(
            kind,
            asked.model,
            choices=len(prompts),
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts[:: asked.choices]),
            texts=self._texts,
            log_probs=asked.top_log_probs is not None,
            shows_usage=asked.include_usage,
            strengths=catalogue.strengths(chosen),
        )
        return answer, self.front.choices(prompts, streams=asked.stream, places=places)


async def _whole(begin: Callable[[], Awaitable[_Begun]]) -> dict[str, Any]:
    answer, progress = await begin()
    async with contextlib.aclosing(progress):
        async for event in progress:
            answer.take(event)
    return answer.whole()


async def _first(
    begin: Callable[[], Awaitable[_Begun]],
) -> tuple[Answer, ChoiceProgress, AsyncGenerator[ChoiceProgress, None]]:
    answer, progress = await begin()
    try:
        return answer, await anext(progress), progress
    except BaseException:
        await progress.aclose()
        raise


async def _chunks(
    answer: Answer,
    first: ChoiceProgress,
    progress: AsyncGenerator[ChoiceProgress, None],
    held: contextlib.ExitStack,
) -> AsyncGenerator[dict[str, Any], None]:
    # What is held is free before the client learns that this was all.
    with held:
        async with contextlib.aclosing(progress):
            for chunk in answer.first_chunks():
                yield chunk
            if chunk := answer.chunk(first):
                yield chunk
            async for event in progress:
                if chunk := answer.chunk(event):
                    yield chunk
    if answer.shows_usage:
        yield answer.usage_chunk()


def make_app(service: Service, *, api_key: str, framed_by: Sequence[str] = ()) -> Starlette:
    """Make the application; the engine's thread runs while the application does.

    Args:
        service: what its paths do.
        api_key: what clients must send; empty: nothing.
        framed_by: origins whose pages may show the server's page in a frame.

    Returns:
        The application.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        service.engine.start()
        try:
            yield
        finally:
            service.values.close()
            service.front.close()
            service.engine.stop(seconds=_STOP_SECONDS)

    routes = [
        *page_routes(framed_by=framed_by),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.show_metrics, methods=["GET"]),
        Route("/v1/models", service.list_models, methods=["GET"]),
        Route("/v1/models/{name}", service.show_model, methods=["GET"]),
        Route("/v1/values", service.load_value, methods=["POST"]),
        Route("/v1/values/{name}", service.unload_value, methods=["DELETE"]),
        Route("/openapi.json", service.openapi, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(_Counted, metrics=service.metrics, routes=routes),
            Middleware(
                KnownHosts,
                listens_on=service.config.host,
                allowed=service.config.allowed_hosts,
            ),
            Middleware(_Guarded, api_key=api_key),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_left,
            Exception: _unexpected,
        },
    )


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    messages = {404: f"there is nothing at {what:.200}", 405: f"{what:.200} is not allowed"}
    shown = ApiError(error.status_code, messages.get(error.status_code, error.detail))
    headers = {**shown.headers, **(error.headers or {})}
    return JSONResponse(shown.body(), status_code=error.status_code, headers=headers)


async def _client_left(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=_CLIENT_LEFT)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Answer with the error's class; its traceback goes to the log."""
    del request
    shown = ApiError(500, f"the server failed ({type(error).__name__}); its log says more")
    return JSONResponse(shown.body(), status_code=500)


class _Counted:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:  # the server stops, and the request's time is up
            if status != _CLIENT_LEFT:
                raise
            await error_response(stopping())(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            # Paths themselves would be as many labels as a client likes.
            found = (one.path for one in self._routes if one.path_regex.match(scope["path"]))
            path = next(found, "other")
            self._metrics.requests.labels(path=path, status=str(status)).inc()
            if status == _CLIENT_LEFT:
                self._metrics.disconnects.inc()


class _Guarded:
    """Lets requests in that have the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._expected = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected and scope["path"] not in _OPEN_PATHS:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            # RFC 9110: the scheme's case does not count.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._expected):
                error = ApiError(
                    401,
                    "the API key is missing or wrong: send it as 'Authorization: Bearer …'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
