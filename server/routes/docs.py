"""What the API takes and gives, for people: /docs, made here from /openapi.json. No script, nothing from
elsewhere."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from jinja2 import Environment
from markupsafe import Markup, escape

from server.routes.page import HEADERS

router = APIRouter(include_in_schema=False)

_BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": ">",
    "maximum": "≤",
    "exclusiveMaximum": "<",
    "minItems": "items ≥",
    "maxItems": "items ≤",
    "minLength": "characters ≥",
    "maxLength": "characters ≤",
    "maxProperties": "entries ≤",
}
_PARTS = files("server").joinpath("docs")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Every route with its body, its answers and examples, and every object with its fields."""
    state = request.app.state
    if not hasattr(state, "docs"):
        page = Environment(autoescape=True).from_string(_PARTS.joinpath("docs.html.jinja").read_text("utf-8"))
        state.docs = page.render(page=request.app.openapi(), typed=typed)
    return Response(state.docs, media_type="text/html; charset=utf-8", headers=HEADERS)


@router.get("/docs/docs.css")
async def style() -> Response:
    """How it looks."""
    return Response(_PARTS.joinpath("docs.css").read_bytes(), media_type="text/css", headers=HEADERS)


@router.get("/openapi.json")
async def description(request: Request) -> dict[str, Any]:
    """The same for programs, as OpenAPI has it."""
    page: dict[str, Any] = request.app.openapi()
    return page


def typed(schema: dict[str, Any]) -> Markup:
    """A JSON schema in few words; names of objects lead to them."""
    arms = schema.get("anyOf") or schema.get("oneOf")
    if arms:
        return Markup(" or ").join(typed(arm) for arm in arms)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return Markup(" or ").join(Markup("<code>{}</code>").format(_literal(value)) for value in values)
    if schema.get("type") == "array":
        return Markup("list of ({})").format(typed(schema.get("items", {})))
    bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return escape(" ".join([str(schema.get("type", "any")), *bounds]))


def _literal(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
