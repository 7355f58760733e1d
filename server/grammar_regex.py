"""What of regular expressions a grammar can follow. The rest is refused, with its position."""

from __future__ import annotations

import re

_CLASSES = frozenset("dDwWsS")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_CODES = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|u\{[0-9A-Fa-f]{1,6}\}|c[A-Za-z]")
_GROUP = re.compile(r"\(\?(:|<[A-Za-z_]\w*>)")
_OPENING = re.compile(r"(\((\?(:|<[A-Za-z_]\w*>))?)*")
_REFUSED = {"b": "a word boundary", "B": "a word boundary", "k": "a backreference"} | {
    name: "a class of Unicode properties" for name in "pP"
}


class Refused(ValueError):
    """A grammar that cannot be followed. `where`: the place in it; the message names the reason."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")


def check_regex(pattern: str, *, in_json: bool = False) -> None:
    """Raises Refused for what xgrammar would ignore, misread or not know.

    The pattern is held to the whole text. `in_json`: the text is the inside of a JSON string, where a
    quote, a backslash and control characters would have to be escaped.
    """
    at, depth = 0, 0
    while at < len(pattern):
        char = pattern[at]
        size = 1
        if char == "\\":
            size, literal = _escape(pattern, at)
            if in_json and literal is not None and (literal in '"\\' or literal < " "):
                raise _at(at, f"{literal!r} stands in a JSON string only escaped, which is not supported")
        elif char == "[":
            size = _class(pattern, at)
        elif char == "(":
            size = _group(pattern, at)
            depth += 1
        elif char == ")":
            depth -= 1
            if depth < 0:
                raise _at(at, "')' without a '(' before it")
        elif char == "^" and not (_begins(pattern, at) or (depth == 0 and pattern[at - 1] == "|")):
            raise _at(at, "'^' is supported at the begin only")
        elif char == "$" and not (pattern[at + 1 :].strip(")") == "" or _before_bar(pattern, at, depth)):
            raise _at(at, "'$' is supported at the end only")
        elif in_json and (char == '"' or char < " "):
            raise _at(at, f"{char!r} stands in a JSON string only escaped, which is not supported")
        at += size
    if depth:
        raise _at(len(pattern), f"{depth} '(' are not closed")


def _at(position: int, why: str) -> Refused:
    return Refused(f"position {position}", why)


def _begins(pattern: str, at: int) -> bool:
    return _OPENING.fullmatch(pattern, 0, at) is not None


def _before_bar(pattern: str, at: int, depth: int) -> bool:
    return depth == 0 and pattern[at + 1] == "|"


def _escape(pattern: str, at: int) -> tuple[int, str | None]:
    """Its length, and the character that it stands for, None for a class."""
    char = pattern[at + 1 : at + 2]
    if not char:
        raise _at(at, "a backslash at the end")
    if char in _CLASSES:
        return 2, None
    if found := _CODES.match(pattern, at + 1):
        code = found.group()
        return 1 + len(code), _character(code, at)
    if char in _CONTROLS:
        return 2, _CONTROLS[char]
    if char.isdigit():
        raise _at(at, "a backreference is not supported")
    if char.isascii() and char.isalpha():
        raise _at(at, f"'\\{char}', {_REFUSED.get(char, 'an unknown escape')}, is not supported")
    return 2, char


def _character(code: str, at: int) -> str:
    if code[0] == "c":
        return chr(ord(code[1].upper()) - 64)
    value = int(code[1:].strip("{}"), 16)
    if value > 0x10FFFF or 0xD800 <= value < 0xE000:
        raise _at(at, f"'\\{code}' is no character")
    return chr(value)


def _class(pattern: str, begin: int) -> int:
    first = at = begin + 1 + (pattern[begin + 1 : begin + 2] == "^")
    while at < len(pattern):
        if pattern[at] == "]":
            if at == first:
                raise _at(begin, "an empty class is not supported; ']' in a class is written '\\]'")
            return at + 1 - begin
        if pattern.startswith(("[:", "[=", "[."), at):
            raise _at(at, "POSIX classes are not supported")
        at += _escape(pattern, at)[0] if pattern[at] == "\\" else 1
    raise _at(begin, "'[' is not closed")


def _group(pattern: str, at: int) -> int:
    if not pattern.startswith("(?", at):
        return 1
    if found := _GROUP.match(pattern, at):
        return len(found.group())
    raise _at(at, f"'{pattern[at : at + 3]}', a look-around, a flag or the like, is not supported")
