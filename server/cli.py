"""The command `disco-serve`: serve, generate, models; and what entry points add."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points, version
from typing import Annotated, Any

import typer

from engine.log_writer import set_levels
from engine.types import EngineUnavailable, InvalidRequest, RequestFailed
from server.bench.command import bench
from server.flags import fail, one_line_errors, settings_flags
from server.interrupts import ends_at_once
from server.keys import BadKeys, KeyRing
from server.keys_command import key
from server.settings import Settings
from server.top import top

app = typer.Typer(
    name="disco-serve",
    help="Serve language models over OpenAI's API with lossless speculation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # whole flag names, whatever the width
    pretty_exceptions_enable=False,
)
models = typer.Typer(help="The models that have a short name.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models, name="models")
app.command("bench")(bench)
app.command("top")(top)
app.command("key")(key)

_ENGINE_FLAGS = (
    "target",
    "draft",
    "drafter",
    "policy",
    "policy_options",
    "head",
    "policy_state",
    "device",
    "dtype",
    "max_model_len",
    "memory_fraction",
    "kv_blocks",
    "max_sl",
    "token_budget",
    "runner",
    "offload",
    "resident_layers",
    "offload_buffers",
    "quantization",
    "draft_quantization",
    "threads",
    "trust_remote_code",
    "log_level",
)
_SERVER_FLAGS = (
    "host",
    "port",
    "api_key",
    "api_key_file",
    "ssl_certfile",
    "ssl_keyfile",
    "served_model_name",
    "max_num_seqs",
    "prefix_cache",
    "prefix_cache_by_key",
    "cors_origin",
    "docs",
    "page",
    "max_body_bytes",
    "max_body_objects",
    "read_seconds",
    "write_seconds",
    "max_connections",
    "max_queued_requests",
    "max_queued_tokens",
    "max_request_seconds",
    "key_concurrency",
    "key_requests_per_minute",
    "key_tokens_per_minute",
    "max_n",
    "max_sequences",
    "max_logit_bias",
    "max_stop_length",
    "tool_format",
    "grammar_seconds",
    "max_grammar_bytes",
    "step_seconds",
    "shutdown_seconds",
    "log_format",
    "log_prompts",
    "otlp_endpoint",
    "metrics_port",
    "metrics_label",
    "metrics_compat",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"disco-serve {version('disco-serve')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@settings_flags(*_SERVER_FLAGS, *_ENGINE_FLAGS)
def serve(settings: Settings) -> None:
    """Serve a target model over OpenAI's API. Every flag also reads DISCO_<NAME>."""
    with _importing():
        from server import logs

        # First: libraries take stderr as they find it.
        logs.configure(settings.log_level, settings.log_format)

        from engine.models.folder import ModelError
        from server import tls, tracing
        from server.launch import PortTaken, run

    refusals = (tracing.CannotTrace, BadKeys, tls.BadCertificate, PortTaken)
    with one_line_errors(ModelError, EngineUnavailable, InvalidRequest, *refusals):
        tracing.endpoint(settings)  # told at once, before any model is loaded
        KeyRing(file=settings.api_key_file)
        with ExitStack() as stack:
            ports = (settings.port, settings.metrics_port)
            listeners = [
                stack.enter_context(_listen(settings.host, port)) for port in ports if port is not None
            ]
            code = run(settings, *listeners)
        raise typer.Exit(code)


@app.command()
@settings_flags(*_ENGINE_FLAGS)
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or the user's message.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable, whatever the draft.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Chat template; default: if the model has one.")
    ] = None,
    color: Annotated[
        bool | None, typer.Option("--color/--no-color", help="Mark drafted tokens; default: on a terminal.")
    ] = None,
) -> None:
    """Generate from one prompt here, without a server: the text as it comes, then what speculation did."""
    with _importing():
        from engine.models.folder import ModelError
        from server.generate import run

    _log_to_stderr(settings.log_level if settings.log_level != "info" else "warning")
    with one_line_errors(ModelError, EngineUnavailable, InvalidRequest, RequestFailed):
        asyncio.run(
            run(
                settings,
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                chat=chat,
                color=color,
            )
        )


@models.command("list")
def list_models() -> None:
    """Models by short name, and where their files lie."""
    with _importing():
        from rich.console import Console
        from rich.table import Table

        from engine.models.references import ALIASES, cached

    table = Table("name", "model", "what", "here", box=None)
    for column in table.columns:
        column.overflow = "fold"  # paths are for copying
    for name, alias in ALIASES.items():
        table.add_row(name, alias.hub_id, alias.note, str(cached(name) or "no"))
    Console().print(table)


@models.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(help="An alias, a Hugging Face id or a .gguf file to convert.")],
) -> None:
    """Fetch a model now, so that a later start does not have to. Prints where it lies."""
    with _importing():
        from engine.models.folder import ModelError
        from engine.models.references import pull

    _log_to_stderr("info")
    with one_line_errors(ModelError):
        print(pull(name))


def main() -> None:
    """The command, whose entry point is server/__main__.py."""
    add_commands()
    app()


def add_commands() -> None:
    """Other rooms add commands of their own by entry point."""
    for entry in entry_points(group="disco_serve.commands"):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)


@contextmanager
def _importing() -> Iterator[None]:
    """For imports: Ctrl-C ends the process, and what the system refuses to a library is told in one line."""
    with ends_at_once(), one_line_errors(OSError):
        yield


class _OneLine(logging.Formatter):
    """The message without the traceback: what went wrong is in it, and people read this on a terminal."""

    def formatException(self, ei: Any) -> str:
        return f"{ei[0].__name__}: {ei[1]}"


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s") if level == "debug" else _OneLine("%(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    set_levels(logging.getLevelNamesMapping()[level.upper()])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request is not news here


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before any model is loaded: a taken port is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        fail(f"cannot listen on {host}: {error.strerror or error}")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        fail(f"cannot listen on {host}:{port}: {error.strerror or error}")
    return listener


if __name__ == "__main__":
    main()
