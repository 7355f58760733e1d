"""Whether requests are traced, and to where. OpenTelemetry is imported only if they are."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from server.record import Decode
from server.settings import Settings, is_web_url

if TYPE_CHECKING:
    from server.spans import Tracing

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class CannotTrace(ValueError):
    """Traces are asked for and cannot be sent; the message says why, in one line."""


def endpoint(settings: Settings) -> str | None:
    """Where spans go, the signal's path included; None: tracing is off.

    The flag wins over OpenTelemetry's own variables. Raises CannotTrace for what is not spoken here.
    """
    if _variable("OTEL_SDK_DISABLED").lower() == "true":
        return None
    base, whole = settings.otlp_endpoint, None
    if base is None:
        if _variable("OTEL_TRACES_EXPORTER") == "none":
            return None
        whole = _variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        base = _variable("OTEL_EXPORTER_OTLP_ENDPOINT")
    url = whole or (f"{base.rstrip('/')}/v1/traces" if base else None)
    if url is not None:
        _check_spoken(url)
    return url


def connect(settings: Settings, decode: Decode) -> Tracing | None:
    """What traces the requests of an app; None: tracing is off. `decode`: token ids to text.

    Raises CannotTrace.
    """
    url = endpoint(settings)
    if url is None:
        return None
    from server.spans import Tracing, exporter_to

    try:
        return Tracing(exporter_to(url), settings.target, decode if settings.log_prompts else None)
    except ValueError as error:
        raise CannotTrace(f"OpenTelemetry cannot use its OTEL_ variables: {error}") from error


def _check_spoken(url: str) -> None:
    protocol = _variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or _variable("OTEL_EXPORTER_OTLP_PROTOCOL")
    exporter = _variable("OTEL_TRACES_EXPORTER")
    if not is_web_url(url):
        raise CannotTrace(f"the traces' collector must be an http or https URL, not {url!r}")
    if protocol not in ("", "http/protobuf"):
        raise CannotTrace(
            f"traces are sent by http/protobuf only, not {protocol!r} (OTEL_EXPORTER_OTLP_PROTOCOL)"
        )
    if exporter not in ("", "otlp", "none"):
        raise CannotTrace(f"traces are sent by otlp only, not {exporter!r} (OTEL_TRACES_EXPORTER)")
    if not all(_found(name) for name in _PACKAGES):
        raise CannotTrace(
            f"traces for {url} need OpenTelemetry's SDK: pip install -e '.[tracing]', "
            "or turn them off by OTEL_SDK_DISABLED=true"
        )


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a package that it is in
        return False


def _variable(name: str) -> str:
    return os.environ.get(name, "").strip()
