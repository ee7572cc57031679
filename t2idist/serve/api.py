"""The API and the page, as one ASGI app over a `Drawer`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import t2idist
from t2idist import storage
from t2idist.observability.command import describe_error
from t2idist.serve.drawer import Drawer, Drawing
from t2idist.serve.gate import Gate, GateConfig, media_type
from t2idist.serve.queue import FullQueue
from t2idist.serve.requests import DrawRequest, DrawResponse, Health, ModelCard, Problem, TranslateResponse

T = TypeVar("T")

PAGE = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"}
"""Kind of each file of the page; "/" is page.html."""
JSON, PNG, ZIP = "application/json", "image/png", "application/zip"
RETRY_SECONDS = 2
CLIENT_LEFT = 499
POLL_SECONDS = 0.25
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 403, 413, 415, 422, 500, 503)
}


def create_app(drawer: Drawer, gate: GateConfig) -> ASGIApp:
    """Return the app; it closes the drawer when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        drawer.close()

    app = FastAPI(
        title="t2idist", version=t2idist.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )  # its pages of documentation would load scripts from the network
    _add_errors(app, drawer)
    _add_page(app)
    _add_model(app, drawer)
    _add_drawing(app, drawer)
    return Gate(app, gate)


def _add_page(app: FastAPI) -> None:
    folder = resources.files("t2idist.serve") / "page"
    for path, kind in PAGE.items():
        content = (folder / (path[1:] or "page.html")).read_bytes()
        app.add_api_route(path, _file_route(content, kind), include_in_schema=False, response_class=Response)


def _file_route(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def route() -> Response:
        return Response(content, media_type=kind)

    return route


def _add_model(app: FastAPI, drawer: Drawer) -> None:
    @app.get("/healthz", responses={503: {"model": Problem}})
    async def healthz() -> Health:
        """Say whether this server can draw."""
        if (problem := drawer.problem()) is not None:
            raise HTTPException(503, problem)
        return Health(ok=True, waiting=drawer.queue.waiting)

    @app.get("/model", responses={401: {"model": Problem}})
    async def model() -> ModelCard:
        """Describe the export that is served."""
        return drawer.card

    @app.get("/vocabulary", responses={401: {"model": Problem}})
    async def vocabulary() -> list[str]:
        """List the words that the model knows; empty if it reads any word."""
        return drawer.vocabulary


def _add_drawing(app: FastAPI, drawer: Drawer) -> None:
    images: dict[int | str, dict[str, Any]] = {200: {"content": {PNG: {}, ZIP: {}}}}

    @app.post("/draw", response_model=DrawResponse, responses=images | _PROBLEMS)
    async def draw(body: DrawRequest, request: Request) -> Response:
        """Draw images of a sentence: JSON, or by the Accept header one PNG or a ZIP of PNG files.

        A PNG file equals the one that `t2idist sample` writes for the same options.
        """
        _check_parameters(request, ())
        kind = _accepted(request, (JSON, PNG, ZIP))
        count = 1 if body.to is None and not body.interpolate_noise else 2
        if kind == PNG and (body.n != 1 or count != 1 or body.scale == "all"):
            raise ValueError(f"Accept: {PNG} is for one image of one size; give n 1, or accept {ZIP} or {JSON}")
        drawing = await _unless_client_leaves(request, drawer.draw(body))
        if drawing is None:
            return Response(status_code=CLIENT_LEFT)
        if kind == PNG:
            return Response(drawing.pngs[0][-1], media_type=PNG)
        if kind == ZIP:
            return Response(_zip(drawing), media_type=ZIP)
        return Response(drawing.response().model_dump_json(), media_type=JSON)

    upload = {"required": True, "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}}
    image: dict[int | str, dict[str, Any]] = {200: {"content": {PNG: {}}}}

    @app.post(
        "/translate",
        response_model=TranslateResponse,
        responses=image | _PROBLEMS,
        openapi_extra={"requestBody": upload},
    )
    async def translate(
        request: Request,
        chosen: Annotated[list[str], Query(alias="set", description="attributes to set")] = [],  # noqa: B006
        cleared: Annotated[list[str], Query(alias="clear", description="attributes to clear")] = [],  # noqa: B006
        domain: Annotated[int, Query(description="index of the data set with these attributes")] = 0,
        to: Annotated[str | None, Query(description="domain to translate to")] = None,
        outlines: Annotated[bool, Query(description="translate the outlines of the image")] = False,
    ) -> Response:
        """Translate the image file that is the body: JSON, or by the Accept header a PNG."""
        _check_parameters(request, ("set", "clear", "domain", "to", "outlines"))
        kind = _accepted(request, (JSON, PNG))
        content_type = media_type(request.headers)
        if not content_type.startswith("image/") and content_type != "application/octet-stream":
            return _problem(415, "the body must be an image file, with a header such as Content-Type: image/png")
        body = await request.body()
        translated = await _unless_client_leaves(request, drawer.translate(body, chosen, cleared, domain, to, outlines))
        if translated is None:
            return Response(status_code=CLIENT_LEFT)
        if kind == PNG:
            return Response(translated.png_bytes(), media_type=PNG)
        return Response(translated.model_dump_json(), media_type=JSON)


def _check_parameters(request: Request, known: tuple[str, ...]) -> None:
    """Raise ValueError for a parameter of the URL that is not known, or is given twice and holds one value."""
    for name, values in ((name, request.query_params.getlist(name)) for name in request.query_params):
        if name not in known:
            given = f"there are {', '.join(known)}" if known else "give it in the JSON body"
            raise ValueError(f"the URL has no parameter {name[:100]!r}; {given}")
        if len(values) > 1 and name not in ("set", "clear"):
            raise ValueError(f"{name} is given {len(values)} times; give it once")


def _accepted(request: Request, kinds: tuple[str, ...]) -> str:
    """Return the first of the kinds that the Accept header names; the first of all by default."""
    accept = request.headers.get("accept", "")
    named = [part.partition(";")[0].strip() for part in accept.split(",")]
    return next((kind for kind in named if kind in kinds), kinds[0])


async def _unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of the work; None, without waiting for it, if the client closes the connection."""
    task = asyncio.create_task(work)
    try:
        while True:
            done, _ = await asyncio.wait([task], timeout=POLL_SECONDS)
            if done:
                return task.result()
            if await request.is_disconnected():
                return None
    finally:
        task.cancel()


def _zip(drawing: Drawing) -> bytes:
    """Return the PNG files in an archive that stores them as they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, files in enumerate(drawing.pngs, start=1):
            for size, png in zip(drawing.sizes, files, strict=True):
                suffix = f"_{size}px" if len(files) > 1 else ""
                archive.writestr(zipfile.ZipInfo(f"{i:02d}{suffix}.png"), png)
    return buffer.getvalue()


# ------------------------------------------------------------ errors
def _add_errors(app: FastAPI, drawer: Drawer) -> None:
    where = storage.redact(drawer.config.export)

    async def invalid(_: Request, error: Exception) -> Response:
        return _problem(422, describe_error(error).replace(where, drawer.card.name))  # clients need not know the folder

    async def misread(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _problem(422, _describe_first(error))

    async def full(_: Request, error: Exception) -> Response:
        return _problem(503, str(error), {"retry-after": str(RETRY_SECONDS)})

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI could not parse the body, and does not say why
            return _problem(422, "the body is not JSON: give an object in UTF-8, of usual depth and numbers")
        names = {
            404: "there is no such path; see /openapi.json",
            405: f"this path has the method {(error.headers or {}).get('Allow', '')}; see /openapi.json",
        }
        return _problem(error.status_code, names.get(error.status_code, str(error.detail)), error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        return _problem(500, f"drawing failed: {type(error).__name__}; the log of the server says more")

    app.add_exception_handler(ValueError, invalid)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(FullQueue, full)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)  # Starlette raises it again, so that it is logged


def _problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


def _describe_first(error: RequestValidationError) -> str:
    """Return the first mistake as one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or "the body"
    kind, given = first["type"], repr(first.get("input"))[:100]
    if kind == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', 'it does not parse')}"
    if kind == "extra_forbidden":
        return f"there is no field {name!r}; there are {', '.join(DrawRequest.model_fields)}"
    if kind == "model_attributes_type":
        return f'{name} is {given}; give an object, such as {{"text": "a red heart"}}'
    if kind in ("int_type", "int_parsing", "int_parsing_size", "int_from_float"):
        return f"{name} is {given}; give a whole number"
    if kind == "missing":
        return f"{name} is missing"
    return f"{name} is {given}; {first['msg'][:1].lower()}{first['msg'][1:]}"
