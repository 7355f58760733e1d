"""Clients that others wrote, each in an environment of its own, against one live server.

    python tests/clients/run.py [SESSION ...]       all sessions, or those whose names are given
    python tests/clients/run.py --list
    python tests/clients/run.py --url http://host:8000 --key KEY     a server that runs already

Installs from PyPI and npm into out/clients/. Prints a table; exits with 1 if any check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from live import ROOT, RunFailed, Served, node_environment, python_environment, serving
from outcomes import failed, of_the_server, outcome_of, table

HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "clients"


@dataclass(frozen=True)
class Client:
    """`environment`: a file in requirements/, or js. `script`: in sessions/ or js/."""

    environment: str
    script: str

    def folder(self) -> Path:
        """Where its session runs."""
        return OUT / "js" if self.environment == "js" else ROOT

    def command(self) -> list[str]:
        """How its session is started; installs what it needs first. Raises RunFailed."""
        if self.environment == "js":
            return ["node", str(node_environment(OUT / "js", HERE / "js") / self.script)]
        requirements = HERE / "requirements" / f"{self.environment}.txt"
        python = python_environment(OUT / self.environment, requirements)
        return [str(python), str(HERE / "sessions" / self.script)]


CLIENTS = {
    "openai": Client("openai", "with_openai.py"),
    "openai-forms": Client("openai", "with_openai_forms.py"),
    "openai-responses": Client("openai", "with_openai_responses.py"),
    "openai-npm": Client("js", "with_openai.mjs"),
    "langchain": Client("langchain", "with_langchain.py"),
    "litellm": Client("litellm", "with_litellm.py"),
    "llm": Client("llm", "with_llm.py"),
    "instructor": Client("instructor", "with_instructor.py"),
    "pydantic-ai": Client("pydantic_ai", "with_pydantic_ai.py"),
    "ai-sdk": Client("js", "with_ai_sdk.mjs"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sessions", nargs="*", metavar="SESSION", help=", ".join(CLIENTS))
    parser.add_argument("--list", action="store_true", help="the sessions' names, and no more")
    parser.add_argument("--url", help="a server that runs already, without /v1")
    parser.add_argument("--key", default="none", help="its key")
    parser.add_argument("--model", default="smollm2", help="a model that it serves")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CLIENTS))
        return 0
    if unknown := set(arguments.sessions) - CLIENTS.keys():
        parser.error(f"no session {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    names = arguments.sessions or list(CLIENTS)
    given = Served(arguments.url, arguments.key, arguments.model) if arguments.url else None
    try:
        with nullcontext(given) if given else serving(OUT / "server.log") as served:
            environment = {**served.environment(), "PYTHONPATH": str(HERE)}
            outcomes = [
                outcome_of(name, CLIENTS[name].command, CLIENTS[name].folder(), environment) for name in names
            ]
            outcomes.append(of_the_server(served.url))
    except RunFailed as fault:
        print(fault, file=sys.stderr)
        return 1
    (OUT / "results.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    print(table(outcomes))
    return int(failed(outcomes))


if __name__ == "__main__":
    sys.exit(main())
