"""The command `disco-serve`, and `python -m server`: imports nothing heavy before Ctrl-C can be taken."""

from __future__ import annotations

from engine.standard_streams import open_missing
from server.interrupts import ends_at_once


def main() -> None:
    """Entry point of the command. Ctrl-C while its modules are imported ends it with exit code 130."""
    open_missing()
    with ends_at_once():
        from server.cli import add_commands, app

        add_commands()
    app()


if __name__ == "__main__":
    main()
