"""GET /v1/models, /v1/models/{id} and /v1/policies."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from engine.speculation.policy import describe
from engine.speculation.tree import describe_trees
from engine.types import ModelInfo
from server.context import Context, context_of
from server.openapi import documented
from server.protocol.answers import ModelCard, ModelList, PolicyList

router = APIRouter(tags=["models"])
_STARTED = int(time.time())
_NO_MODEL = "this server has no draft model"


def _model(context: Context, name: str) -> dict[str, Any]:
    """OpenAI's model object. `max_model_len` (tokens) is null until the model was loaded once."""
    info = context.known()
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "disco-serve",
        "max_model_len": None if info is None else info.max_model_len,
    }


@router.get("/v1/models", **documented(answer=ModelList, errors=(500,)))
async def models(request: Request) -> dict[str, Any]:
    """The names that requests may use; all are the one target."""
    context = context_of(request)
    names = context.settings.served_model_name
    return {"object": "list", "data": [_model(context, name) for name in names]}


@router.get("/v1/models/{model_id:path}", **documented(answer=ModelCard, errors=(404, 500)))
async def model(request: Request, model_id: str) -> dict[str, Any]:
    """One of them."""
    context = context_of(request)
    context.check_model(model_id)
    return _model(context, model_id)


@router.get("/v1/policies", **documented(answer=PolicyList, errors=(500, 503)))
async def policies(request: Request) -> dict[str, Any]:
    """What the field `speculation` may name: drafters, policies of those that draft chains, with their
    options as JSON schema, and `trees`: the drafters that take options themselves, and no policy.

    `unavailable` says by drafter why a policy cannot govern it here, or why there are no such trees; `head`
    what it was taught on.
    """
    info = context_of(request).ready()
    return {
        "object": "list",
        "drafters": list(info.drafters),
        "policies": [
            {
                "name": name,
                "options": schema,
                "unavailable": {
                    drafter: reasons[name] for drafter, reasons in info.refusals.items() if name in reasons
                },
                "head": info.heads.get(name),
            }
            for name, schema in describe().items()
        ],
        "trees": [
            {
                "name": name,
                "options": schema,
                "unavailable": None if name in info.drafters else info.absent.get(name, _NO_MODEL),
                "head": info.heads.get(name),
            }
            for name, schema in describe_trees().items()
        ],
        "max_sl": info.max_sl,
        "default": _default(info),
    }


def _default(info: ModelInfo) -> dict[str, Any]:
    """What a request gets that names nothing. Nobody stops who does not draft: then the policy is "none"; nor
    does a policy stop trees."""
    drafts = info.default_drafter != "none"
    chains = drafts and info.default_drafter not in describe_trees()
    return {
        "drafter": info.default_drafter,
        "policy": info.default_policy if chains else "none",
        "options": info.default_options if drafts else {},
    }
