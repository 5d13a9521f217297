"""The server's routes and error handlers. Each kind of answer has its own module.

Slow work without the model (templates, tokenization, grammars) runs on worker threads, so that streams are not delayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from paceline import __version__
from paceline.engine.engine import Engine
from paceline.errors import PacelineError, SettingsError
from paceline.sampling_params import PARAMETERS
from paceline.server.access import AccessMiddleware
from paceline.server.bodies import Bodies, component_schemas, declared, explain, read_json
from paceline.server.chat import ChatAnswer
from paceline.server.choices import Choice, ChoicesAnswer
from paceline.server.completions import CompletionAnswer
from paceline.server.http import EventStream, Json, error_response, failure, respond
from paceline.server.metrics import Metrics
from paceline.server.prompts import PreparedPrompt, RequestPreparer
from paceline.server.responses import ResponsesAnswer, as_chat
from paceline.server.runner import Runner, RunningRequest
from paceline.server.schemas import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    RequestBody,
    ResponsesRequest,
    TokenizeRequest,
)

logger = logging.getLogger("paceline")

PLAYGROUND = Path(__file__).with_name("playground.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in {
        400: "Invalid request; see the message.",
        401: "No valid API key.",
        403: "Host header not allowed.",
        404: "No such model.",
        408: "The request took too long.",
        413: "The request is too large.",
        429: "The queue is full.",
        503: "The server is stopping.",
    }.items()
}


@dataclass(frozen=True)
class ServerSettings:
    """How an engine is served."""

    names: tuple[str, ...] = ("paceline",)  # of the model; answers carry the first
    keys: tuple[str, ...] = ()  # API keys; none: no check
    hosts: tuple[str, ...] = ()  # allowed Host headers; none: any
    max_bytes: int = 4 << 20  # of a request
    max_seconds: float = 3600.0  # time limit of a request
    log_prompts: bool = False


B = TypeVar("B", bound=RequestBody)
BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)


@dataclass
class Answering:
    """An answer that is being generated. It must not hold on to the request's body, which may be large."""

    running: RunningRequest
    answer: ChoicesAnswer | ResponsesAnswer
    stream: bool
    headers: dict[str, str]


@dataclass
class Service:
    """State that the routes share."""

    engine: Engine
    settings: ServerSettings
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine, self.settings.names[0])
        self.preparer = RequestPreparer(self.engine)
        self.runner = Runner(self.engine, self.metrics, self.settings.max_seconds)
        self.bodies = Bodies(self.settings.max_bytes)
        draft = "mtp" if self.engine.backend.info.has_drafter else "plain"
        self.fingerprint = (
            f"paceline-{__version__}-{self.engine.backend.info.quant}-{self.engine.backend.info.kv}-{draft}"
        )

    @property
    def model(self) -> str:
        return self.settings.names[0]

    def check_model(self, name: str | None) -> None:
        """Raise 404 if a request is for another model."""
        if name is not None and name not in self.settings.names:
            raise HTTPException(404, f"there is no model {name!r} here; this server has {self.model!r}; see /v1/models")

    async def read(self, request: Request, model: type[B]) -> B:
        """Read, check and parse the body of a request.

        Raises:
            SettingsError, HTTPException, StoppingError: see `read_json`.
            ValidationError: a field is missing or wrong.
        """
        raw = await read_json(request)
        if self.settings.log_prompts:
            logger.info("request: %s", raw.decode(errors="replace"))
        body = model.model_validate_json(raw)
        self.check_model(body.model)
        return body

    async def prepare(
        self, work: Callable[[Any], list[PreparedPrompt]], body: GenerationRequest
    ) -> list[PreparedPrompt]:
        """Prepare a request on a worker thread."""
        try:
            return await run_in_threadpool(work, body)
        except RecursionError as error:
            raise SettingsError("the request is nested too deeply; make it flatter") from error

    def submit(self, prompts: list[PreparedPrompt], client: str) -> tuple[RunningRequest, list[Choice]]:
        """Start the generation of all choices of some prompts for a client."""
        requests = [(prompt, request) for prompt in prompts for request in prompt.requests]
        running = self.runner.submit([(prompt.tokens, request) for prompt, request in requests], client=client)
        choices = [
            Choice(sequence, self.engine.tokenizer, prompt.in_reasoning, plain=not request.marks)
            for sequence, (prompt, request) in zip(running.sequences, requests, strict=True)
        ]
        return running, choices


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The ASGI application that serves a loaded pair."""
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.runner.start()
        yield
        await service.runner.stop()

    app = FastAPI(
        title="paceline",
        version=__version__,
        summary="OpenAI-compatible API for Gemma 4 with speculative decoding.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
    )
    app.state.service = service
    app.add_middleware(AccessMiddleware, keys=settings.keys, hosts=settings.hosts, bodies=service.bodies)
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    _handle_errors(app)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        document.setdefault("components", {}).setdefault("schemas", {}).update(component_schemas(BODIES))
        app.openapi_schema = document
    return app.openapi_schema


def _add_generation(app: FastAPI, service: Service) -> None:
    async def chat(request: Request) -> Answering:
        body = await service.read(request, ChatRequest)
        running, choices = service.submit(await service.prepare(service.preparer.chat, body), request.state.client)
        answer = ChatAnswer(running, choices, body, service.model, service.fingerprint)
        return Answering(running, answer, bool(body.stream), _headers(body))

    async def completion(request: Request) -> Answering:
        body = await service.read(request, CompletionRequest)
        prompts = await service.prepare(service.preparer.completions, body)
        running, choices = service.submit(prompts, request.state.client)
        echoes = [prompt.echo for prompt in prompts for _ in prompt.requests]
        answer = CompletionAnswer(running, choices, body, service.model, service.fingerprint, echoes)
        return Answering(running, answer, bool(body.stream), _headers(body))

    async def response(request: Request) -> Answering:
        body = await service.read(request, ResponsesRequest)
        prompts = await service.prepare(lambda body: service.preparer.chat(as_chat(body)), body)
        running, [choice] = service.submit(prompts, request.state.client)
        answer = ResponsesAnswer(running, choice, body, service.model)
        return Answering(running, answer, bool(body.stream), _headers(body))

    @app.post("/v1/chat/completions", responses=ERRORS, openapi_extra=declared(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await _respond(request, await chat(request))

    @app.post("/v1/completions", responses=ERRORS, openapi_extra=declared(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await _respond(request, await completion(request))

    @app.post("/v1/responses", responses=ERRORS, openapi_extra=declared(ResponsesRequest))
    async def responses(request: Request) -> Response:
        return await _respond(request, await response(request))


def _add_tokens(app: FastAPI, service: Service) -> None:
    engine = service.engine

    def answer_of(body: TokenizeRequest) -> Response:
        tokens = tokens_of(body)
        answer: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.backend.info.context, "tokens": tokens}
        if body.return_token_strs:
            texts = [engine.tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
            answer["token_strs"] = texts
        return Json(answer, headers=_headers(body))

    def tokens_of(body: TokenizeRequest) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            raise SettingsError("give prompt or messages, and not both")
        if body.messages is None:
            return engine.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens is not False)
        return service.preparer.render(body.messages, body.tools or [], body.chat_template_kwargs or {})[1]

    @app.post("/tokenize", responses=ERRORS, openapi_extra=declared(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return await run_in_threadpool(answer_of, await service.read(request, TokenizeRequest))

    def text_of(body: DetokenizeRequest) -> Response:
        info = engine.backend.info
        if len(body.tokens) > info.context:
            raise SettingsError(f"{len(body.tokens)} tokens are more than the context of {info.context}; send fewer")
        if body.tokens and max(body.tokens) >= info.vocab_size:
            raise SettingsError(f"token {max(body.tokens)} is outside the model's vocabulary of {info.vocab_size}")
        return Json({"prompt": engine.tokenizer.decode(body.tokens)}, headers=_headers(body))

    @app.post("/detokenize", responses=ERRORS, openapi_extra=declared(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        return await run_in_threadpool(text_of, await service.read(request, DetokenizeRequest))


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=ERRORS)
    async def models() -> Response:
        return Json({"object": "list", "data": [_model(service, name) for name in service.settings.names]})

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> Response:
        service.check_model(name)
        return Json(_model(service, name))

    @app.get("/health")
    async def health() -> Response:
        return Json({"status": "ok"})

    @app.get("/metrics", responses=ERRORS)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(
            PLAYGROUND.read_bytes(),
            headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"},
        )


def _model(service: Service, name: str) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "paceline",
        "max_model_len": engine.backend.info.context,
        "paceline": {
            "version": __version__,
            "quant": engine.backend.info.quant,
            "kv": engine.backend.info.kv,
            "threads": engine.backend.threads,
            "drafter": engine.backend.info.has_drafter,
            "slots": engine.backend.info.slots,
            "chat": engine.chat_template is not None,
            "thinks": engine.chat_template is not None and engine.chat_template.knows("enable_thinking"),
            "sampling": {name: getattr(engine.sampling, name) for name, one in PARAMETERS.items() if one.checkpoint},
        },
    }


def _headers(body: Body) -> dict[str, str]:
    names = ",".join(name for name in body.ignored if name.isidentifier() and name.isascii())
    return {"x-paceline-ignored": names[:1000]} if names else {}


async def _respond(request: Request, answering: Answering) -> Response:
    async def whole() -> Response:
        return Json(await answering.answer.whole(), headers=answering.headers)

    if answering.stream:
        return EventStream(answering.running, answering.answer.chunks(), answering.headers)
    return await respond(request, answering.running, whole())


def _handle_errors(app: FastAPI) -> None:
    async def refuse(_: Request, error: Exception) -> Response:
        return failure(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, ValidationError)
        message, param = explain(error)
        return error_response(400, message, param=param)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.detail == "Not Found":
            return error_response(404, f"there is nothing at {request.url.path}; the API is under /v1 (docs/server.md)")
        code = "model_not_found" if error.status_code == 404 and "model" in error.detail else None
        return error_response(error.status_code, str(error.detail), code=code, headers=error.headers)

    app.add_exception_handler(PacelineError, refuse)
    app.add_exception_handler(ValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, refuse)
