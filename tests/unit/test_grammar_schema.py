"""What of JSON Schema and regexes is compiled, and what is refused, and where."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar
from lossless.schemas import schema as random_schema
from xgrammar.testing import _is_grammar_accept_string

from server.grammar_messages import Ask
from server.grammar_regex import Refused, check_regex
from server.grammar_schema import normalized
from server.grammar_worker import answer, of_schema

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
BYTES = [bytes([b]) for b in range(256)]
INFO = xgrammar.TokenizerInfo([*BYTES, b"\xffeos"], xgrammar.VocabType.RAW, stop_token_ids=[256])
COMPILER = xgrammar.GrammarCompiler(INFO, max_threads=1, cache_enabled=False)


def accepts(schema: Any, *texts: str) -> list[bool]:
    grammar = of_schema(schema)
    return [_is_grammar_accept_string(grammar, text) for text in texts]


@pytest.mark.parametrize(
    ("schema", "where", "why"),
    [
        ({"not": {}}, "$", "the keyword 'not' is not supported"),
        ({"type": "strin"}, "$.type", "must be one or more of"),
        ({"type": []}, "$.type", "must be one or more of"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {"if": {}}}}},
            "$.properties.a.items",
            "'if'",
        ),
        ({"type": "array", "items": {}, "uniqueItems": True}, "$", "'uniqueItems'"),
        ({"type": "array", "contains": {}}, "$", "'contains'"),
        ({"type": "array", "items": [{}]}, "$.items", "'prefixItems'"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "$", "'minItems' is more than 'maxItems'"),
        ({"type": "array", "minItems": "3"}, "$.minItems", "must be an integer"),
        ({"type": "object", "required": ["b"]}, "$.required", "'b' is not in 'properties'"),
        ({"type": "object", "required": "b"}, "$.required", "must be a list"),
        ({"type": "object", "properties": []}, "$.properties", "must be an object, not array"),
        ({"type": "string", "pattern": "(a"}, "$.pattern", "not closed"),
        ({"type": "string", "format": ["uri"]}, "$.format", "not supported"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": {}}}}, "$.$ref", "only references"),
        ({"type": "string", "pattern": "a)"}, "$.pattern", "without a '('"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0}, "$", "no number lies between"),
        ({"type": "object", "properties": {"a": False}}, "$.properties.a", "allows nothing"),
        (
            {"type": "object", "properties": {"a": 3}},
            "$.properties.a",
            "must be an object or a boolean, not integer",
        ),
        ({"type": "object", "dependentRequired": {}}, "$", "'dependentRequired'"),
        ({"type": "object", "patternProperties": {"a": {}, "b": {}}}, "$.patternProperties", "more than one"),
        ({**OBJECT, "patternProperties": {"b": {}}}, "$", "exclude each other"),
        ({"type": "object", "minProperties": 2}, "$", "declared properties only"),
        ({"type": "string", "pattern": "a", "maxLength": 2}, "$", "together are not supported"),
        ({"type": "string", "format": "color"}, "$.format", "'color' is not supported"),
        ({"type": "string", "pattern": "a(?=b)"}, "$.pattern", "position 1"),
        ({"type": "string", "pattern": 'a"'}, "$.pattern", "only escaped"),
        ({"type": "number", "multipleOf": 0.5}, "$", "integer only"),
        ({"type": "integer", "multipleOf": 5, "minimum": 0}, "$.multipleOf", "without bounds"),
        ({"type": "integer", "minimum": 5.5, "exclusiveMaximum": 6}, "$", "no integer lies between"),
        ({"type": "integer", "exclusiveMinimum": True}, "$.exclusiveMinimum", "must be a number"),
        ({"anyOf": [{"type": "null"}], "type": "object"}, "$", "'anyOf' together with 'type'"),
        ({"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {}}}, "$", "'$ref' together with 'maxLength'"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "$.$ref", "points nowhere: there is no 'b'"),
        ({"$ref": "http://example.org/a"}, "$.$ref", "only references into the schema itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "$.$ref", "nothing but itself"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"not": {}}}}},
            "$.$defs.a.items",
            "'not'",
        ),
        ({"allOf": [OBJECT, OBJECT]}, "$.allOf", "more than one"),
        ({"anyOf": []}, "$.anyOf", "at least one"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "$.oneOf",
            "alternatives 0 and 1 may both match",
        ),
        ({"oneOf": [OBJECT, OBJECT]}, "$.oneOf", "may both match"),
        ({"enum": []}, "$.enum", "at least one"),
        ({"type": "string", "enum": [1]}, "$.enum", "no value has the type"),
        ({"const": 2**70}, "$.const", "64 bits"),
        ({"const": "\ud800"}, "$.const", "not valid Unicode"),
        ({"maxLength": 2, "minimum": 1}, "$", "needs a 'type'"),
        ({"type": "string", "nullable": True}, "$", "'nullable'"),
        ([], "$", "must be an object or a boolean, not array"),
    ],
    ids=str,
)
def test_what_cannot_be_held_to_is_refused_by_name(schema: Any, where: str, why: str):
    with pytest.raises(Refused) as caught:
        normalized(schema)
    assert str(caught.value).startswith(f"{where}: ") and why in str(caught.value)


def test_deep_schemas_are_refused():
    schema: dict[str, Any] = {}
    for _ in range(70):
        schema = {"type": "array", "items": schema}
    with pytest.raises(Refused, match="64 deep"):
        normalized(schema)


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        (True, ["{}", "1", '"a"'], ["", "nul"]),
        ({"type": "object"}, ["{}", '{"x": [1]}'], ["[]", "1"]),
        ({"type": "array", "minItems": 1}, ["[1]", '["a", {}]'], ["[]"]),
        (OBJECT, ['{"a": 1}'], ["{}", '{"a": 1, "b": 2}', '{"a": "x"}']),
        ({**OBJECT, "additionalProperties": True}, ['{"a": 1, "b": 2}'], ['{"a": 1, "a": "x"}']),
        ({"type": ["string", "null"], "maxLength": 1}, ["null", '"a"'], ['"ab"']),
        ({"maxLength": 1}, ['"a"', '""'], ['"ab"']),
        (
            {"minLength": 2},
            ['"ab"', '"日本"', '"' + 90 * "x" + '"'],
            ['"a"', r'"a\n"', '"é"', '"a\t"', '"a\x12"', '"🙂"', r'"\n"', r'"ab\x"'],
        ),
        ({"type": "object", "propertyNames": {"minLength": 1}}, ['{"n":1}'], ['{"":1}', '{"\t":1}']),
        ({"type": "string", "enum": ["a", 1, None]}, ['"a"'], ["1", "null"]),
        ({"type": "number", "enum": [1, 2.5, "a"]}, ["1", "2.5"], ['"a"']),
        ({"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3}, ["1", "2"], ["0", "3"]),
        ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 20}, ["0", "15"], ["7", "25"]),
        ({"allOf": [{"type": "null"}]}, ["null"], ["1"]),
        (
            {"type": "array", "prefixItems": [True, {"type": "null"}], "items": False},
            ["[1,null]"],
            ["[1,1]", "[1,null,1]"],
        ),
        (
            {"type": "object", "propertyNames": {"enum": ["x"]}, "additionalProperties": {"type": "null"}},
            ['{"x":null}'],
            ['{"y":null}', '{"x":1}'],
        ),
        ({"type": "object", "propertyNames": {"maxLength": 1}}, ['{"x":[]}'], ['{"xy":1}']),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ['"a"', "1"], ["null"]),
        ({"$ref": "#/properties/a", "properties": {"a": {"type": "null"}}, "$defs": {}}, [], []),
        ({"type": "object", "properties": {}}, ["{}"], ['{"a": 1}']),
        ({"type": "string", "format": "ipv4"}, ['"1.20.0.255"'], ['"1.20.006.3"', '"1.2.3.256"', '"1.2.3"']),
    ],
    ids=str,
)
def test_what_is_accepted_and_what_is_not(schema: Any, yes: list[str], no: list[str]):
    if not yes:
        with pytest.raises(Refused):
            normalized(schema)
        return
    assert accepts(schema, *yes) == [True] * len(yes)
    assert accepts(schema, *no) == [False] * len(no)


def test_properties_named_as_annotations_are_not_confused():
    """xgrammar alone takes the second of these objects for the first."""
    pair = [
        {"type": "object", "properties": {"title": {"type": kind}}, "required": ["title"]}
        for kind in ("string", "integer")
    ]
    schema = {"type": "array", "prefixItems": pair, "items": False}
    assert accepts(schema, '[{"title":"a"},{"title":1}]', '[{"title":"a"},{"title":"b"}]') == [True, False]


def test_references_of_every_spelling():
    schema = {
        "type": "object",
        "title": "kept out",
        "$defs": {"a/b~c d": {"type": "null", "description": "x"}},
        "properties": {
            "p": {"$ref": "#/$defs/a~1b~0c%20d"},
            "q": {"$ref": "#"},
            "r": {"$ref": "#/properties/p"},
        },
        "required": ["p"],
    }
    assert accepts(schema, '{"p":null,"q":{"p":null,"r":null}}', '{"p":1}', '{"p":null,"q":null}') == [
        True,
        False,
        False,
    ]


def test_discriminated_unions_by_reference():
    """What pydantic writes for them."""
    schema = {
        "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A", "b": "#/$defs/B"}},
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
        "$defs": {
            name.upper(): {
                "type": "object",
                "title": name,
                "properties": {"kind": {"const": name, "title": "Kind", "type": "string"}},
                "required": ["kind"],
            }
            for name in "ab"
        },
    }
    assert accepts(schema, '{"kind":"a"}', '{"kind":"b"}', '{"kind":"c"}') == [True, True, False]


def random_answer(data: bytes, source: random.Random) -> str:
    """A text that the compiled grammar allows, byte by byte, drawn towards its end."""
    compiled = xgrammar.CompiledGrammar.deserialize_json(data.decode(), INFO)
    matcher = xgrammar.GrammarMatcher(compiled)
    words = np.empty((1, -(-257 // 32)), dtype=np.int32)
    text, quoted = b"", False
    while True:
        matcher.fill_next_token_bitmask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:257])
        assert len(allowed)
        token = _next(list(map(int, allowed)), len(text) > 60, quoted, source)
        if token == 256:
            return text.decode()
        quoted ^= token == ord('"') and not text.endswith(b"\\")
        text += bytes([token])
        assert matcher.accept_token(token) and len(text) < 5000


def _next(allowed: list[int], long: bool, quoted: bool, source: random.Random) -> int:
    if 256 in allowed:
        return 256
    if long:
        for liked in b'"' if quoted else b"}]n":
            if liked in allowed:
                return liked
    # Bytes that begin what is no UTF-8 as well: xgrammar does not look so closely.
    sound = [t for t in allowed if t not in (0xE0, 0xED, 0xF0, 0xF4) and not (t == ord("\\") and quoted)]
    return source.choice(sound or allowed)


@pytest.mark.parametrize("seed", range(4))
def test_random_answers_validate(seed: int):
    """Of random schemas, the grammar alone: whatever it lets through is what the schema says."""
    source = random.Random(seed)
    for _ in range(15):
        schema = random_schema(source)
        found = answer(COMPILER, Ask("json_schema", json.dumps(schema)))
        assert found.refused is None, (found.refused, schema)
        for _ in range(3):
            said = random_answer(found.data, source)
            jsonschema.validate(json.loads(said, strict=True), schema, jsonschema.Draft202012Validator)


def test_what_is_slow_to_follow_is_refused(monkeypatch: pytest.MonkeyPatch):
    asked = Ask("grammar", 'root ::= "a"*')
    assert answer(COMPILER, asked).refused is None
    monkeypatch.setattr("server.grammar_worker.SLOWEST_SECONDS", -1.0)
    assert "takes too long" in (answer(COMPILER, asked).refused or "")


# ---- regexes


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^a$",
        "^(a|b)$",
        "^a|b$",
        "(^a$)",
        "a+?b*",
        r"\d{2,3}\.[\w.-]+",
        r"[^\]a]\\",
        r"é\u00e9\x41\u{1F600}",
        "(?:a)(?<name>b)",
        "😀{2}",
        r"\[\^\$\/\-",
    ],
)
def test_regexes_that_are_taken(pattern: str):
    check_regex(pattern)
    xgrammar.Grammar.from_regex(pattern)


@pytest.mark.parametrize(
    ("pattern", "position"),
    [
        ("a(?=b)", 1),
        ("(?!a)", 0),
        ("(?<=a)b", 0),
        ("(?i)a", 0),
        ("(?P<n>a)", 0),
        ("(?>a)", 0),
        (r"(a)\1", 3),
        (r"a\b", 1),
        (r"\p{L}", 0),
        (r"\k<n>", 0),
        (r"\Aa", 0),
        (r"a\Z", 1),
        (r"\e", 0),
        ("a^b", 1),
        ("a$b", 1),
        ("a(^b)", 2),
        ("a\\", 1),
        ("[a", 0),
        ("a[]b]", 1),
        ("[^]a]", 0),
        ("x[[:alpha:]]", 2),
        (r"[a\b]", 2),
        (r"\ud800", 0),
        (r"\u{110000}", 0),
    ],
)
def test_regexes_that_are_refused_say_where(pattern: str, position: int):
    with pytest.raises(Refused, match=f"position {position}: "):
        check_regex(pattern)


@pytest.mark.parametrize("pattern", ['a"', r"\"", r"\\", "\n", r"\n", r"\x22", r"\u0009", r"\cA"])
def test_patterns_of_what_json_escapes_are_refused(pattern: str):
    check_regex(pattern)
    with pytest.raises(Refused, match="only escaped"):
        check_regex(pattern, in_json=True)
