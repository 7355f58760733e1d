"""Tool calls: a small registry of formats, found by the chat template or named by a setting."""

from __future__ import annotations

from server.tools import hermes, llama3, mistral, smollm2, smollm3  # noqa: F401  # they register themselves
from server.tools.calls import Tool, ToolCall, ToolDelta
from server.tools.format import ToolFormat, by_name, by_template, names
from server.tools.parser import CallParser

__all__ = ["CallParser", "Tool", "ToolCall", "ToolDelta", "ToolFormat", "format_for", "names"]


def format_for(chat_template: str, name: str = "auto") -> ToolFormat | None:
    """The format named, or with "auto" the one that fits the template; None if none does.

    Raises ValueError for an unknown name.
    """
    return by_template(chat_template) if name == "auto" else by_name(name)
