"""What the fuzzer sends, made from a seed: requests that went wrong, and bytes that never were one."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "hello there",
        "max_tokens": 4,
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "stop": ["zz"],
        "logprobs": 2,
        "logit_bias": {"5": 1},
        "echo": False,
        "stream": False,
    },
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 4,
        "top_logprobs": 1,
        "logprobs": True,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "integer"}},
        },
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "max_output_tokens": 4,
        "instructions": "short",
        "stream": True,
        "text": {"format": {"type": "text"}},
    },
    "/tokenize": {"prompt": "hello", "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6, 7]},
}
READS = ("/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/policies")
PAGES = ("/", "/docs", "/openapi.json", "/page/app.js", "/nothing")
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "\x00", "\U0001f600", "￿", "a" * 5000, "../../etc/passwd", "{{ 7*7 }}", "<|im_end|>", "%s%n"),
    *([], [[]], [None], ["a", 1], [0] * 300, {}, {"a": {}}, {"": ""}),
]
JSONS = [  # that json.dumps would not write
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-", b"01", b"0x1", b"'a'", b"{a:1}", b"[1,]", b"{,}"),
    *(
        b'"\\ud800"',
        b'"\\x41"',
        b'"\n"',
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"[" * 5000,
        b'{"a":' * 5000,
        b"9" * 5000,
    ),
    *(b'{"model":"a","model":"b"}', b"/* c */{}", b"nul", b"", b" ", b"null", b"[]", b"3", b'"a"'),
]


NAMES = [b"x-request-id", b"traceparent", b"tracestate", b"accept", b"origin", b"cookie", b"te"]
ODD_VALUES = [  # of headers
    *(
        b"",
        b"\xff\xfe",
        b"a" * 300,
        b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01",
        b"Bearer",
        b"Bearer \x00",
    ),
    *(b"a" * 20_000, b"\t\t", b'"; DROP', b"text/event-stream;q=x", b"=,;=,;" * 40, b"http://[::1"),
]


@dataclass(frozen=True)
class Input:
    """One connection's worth. `pieces` are sent one after the other; `then`: what the client does at last:
    ends its side and listens (end), ends it once something came (listen), or goes at once (leave)."""

    kind: str
    pieces: tuple[bytes, ...]
    then: str = "end"


class Inputs:
    """An endless supply. `key`: for the header; `model`: a name that the server serves."""

    def __init__(self, seed: int, key: str, model: str) -> None:
        self._random = random.Random(seed)
        self._key, self._model = key, model
        self._kinds: list[Callable[[], Input]] = [
            self._good,
            self._odd_json,
            self._odd_json,
            self._no_json,
            self._no_utf8,
            self._mutated,
            self._mutated,
            self._truncated,
            self._garbage,
            self._framing,
            self._headers,
            self._pipelined,
            self._reads,
        ]

    def next(self) -> Input:
        return self._random.choice(self._kinds)()

    def _body(self) -> tuple[str, dict[str, Any]]:
        path = self._random.choice(list(BODIES))
        body = json.loads(json.dumps(BODIES[path]))
        if path.startswith("/v1"):
            body["model"] = self._model
        return path, body

    def _request(self, path: str, data: bytes, *more: bytes, method: str = "POST") -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1".encode(),
            b"host: tiny",
            b"content-type: application/json",
            f"authorization: Bearer {self._key}".encode(),
            *more,
        ]
        if data or method == "POST":
            lines.append(b"content-length: %d" % len(data))
        return b"\r\n".join(lines) + b"\r\n\r\n" + data

    def _then(self) -> str:
        return self._random.choices(("end", "listen", "leave"), (8, 1, 1))[0]

    def _pieces(self, raw: bytes) -> tuple[bytes, ...]:
        """Sometimes as several writes."""
        if self._random.random() < 0.7 or len(raw) < 3:
            return (raw,)
        cuts = sorted(self._random.randrange(len(raw)) for _ in range(self._random.randrange(1, 4)))
        return tuple(raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True))

    def _good(self) -> Input:
        path, body = self._body()
        return Input("good", self._pieces(self._request(path, json.dumps(body).encode())), "end")

    def _reads(self) -> Input:
        path = self._random.choice(READS + PAGES)
        method = self._random.choice(
            ("GET", "GET", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "get", "X" * 40)
        )
        if self._random.random() < 0.3:
            path += self._random.choice(
                ("/", "?a=b", "%00", "/..", "//", "%2e%2e/x", "#a", ";a", "\xe9", " ")
            )
        return Input("reads", (self._request(path, b"", method=method),), self._then())

    def _odd_json(self) -> Input:
        path, body = self._body()
        for _ in range(self._random.randrange(1, 4)):
            self._twist(body)
        return Input("odd json", self._pieces(self._request(path, json.dumps(body).encode())), self._then())

    def _twist(self, body: Any) -> None:
        """Changes something somewhere in it."""
        place = body
        while isinstance(place, (dict, list)) and place:
            name = self._random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            inner = place[name]
            if isinstance(inner, (dict, list)) and inner and self._random.random() < 0.7:
                place = inner
                continue
            what = self._random.randrange(4)
            if what == 0:
                del place[name]
            elif what == 1 and isinstance(place, dict):
                place[self._random.choice(("x", "", "\x00", "best_of", "tools", "regex", "model"))] = inner
            elif what == 2 and isinstance(place, list):
                place.extend(copy.deepcopy(inner) for _ in range(self._random.randrange(40)))
            else:
                place[name] = copy.deepcopy(self._random.choice(ODD))
            return

    def _no_json(self) -> Input:
        path, body = self._body()
        data = json.dumps(body).encode()
        odd = self._random.choice(JSONS)
        if self._random.random() < 0.5:  # in the place of a value
            values = [json.dumps(value).encode() for value in body.values()]
            data = data.replace(self._random.choice(values), odd, 1)
        else:
            data = odd
        return Input("no json", self._pieces(self._request(path, data)), self._then())

    def _no_utf8(self) -> Input:
        path, body = self._body()
        data = bytearray(json.dumps(body, ensure_ascii=False).encode())
        for _ in range(self._random.randrange(1, 4)):
            odd = self._random.choice(
                (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80")
            )
            place = self._random.randrange(len(data))
            data[place:place] = odd
        return Input("no utf-8", self._pieces(self._request(path, bytes(data))), self._then())

    def _mutated(self) -> Input:
        path, body = self._body()
        raw = bytearray(self._request(path, json.dumps(body).encode()))
        for _ in range(self._random.choice((1, 1, 2, 4, 16))):
            place = self._random.randrange(len(raw))
            match self._random.randrange(5):
                case 0:
                    raw[place] ^= 1 << self._random.randrange(8)
                case 1:
                    raw[place:place] = self._random.randbytes(self._random.choice((1, 1, 4, 64)))
                case 2:
                    del raw[place : place + self._random.choice((1, 1, 4, 64))]
                case 3:
                    raw[place:place] = raw[place : place + self._random.choice((1, 8, 200))]
                case _:
                    raw[place : place + 1] = self._random.choice(
                        (b"\r\n", b"\x00", b" ", b":", b"\r", b"\n", b"\xff")
                    )
            if not raw:
                raw += b"\x00"
        return Input("mutated", self._pieces(bytes(raw)), self._then())

    def _truncated(self) -> Input:
        path, body = self._body()
        raw = self._request(path, json.dumps(body).encode())
        return Input("truncated", self._pieces(raw[: self._random.randrange(1, len(raw))]), self._then())

    def _garbage(self) -> Input:
        size = self._random.choice((1, 3, 16, 200, 4000, 70_000))
        raw = self._random.randbytes(size)
        if self._random.random() < 0.3:
            raw = (
                self._random.choice(
                    (b"GET ", b"POST / HTTP/1.1\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\n")
                )
                + raw
            )
        return Input("garbage", self._pieces(raw), self._then())

    def _framing(self) -> Input:
        path, body = self._body()
        data = json.dumps(body).encode()
        size = b"%x\r\n" % len(data)
        chunked = b"transfer-encoding: chunked"
        head = self._request(path, b"", chunked).replace(b"content-length: 0\r\n", b"")
        whole = head + size + data + b"\r\n0\r\n\r\n"
        raw = self._random.choice(
            (
                whole,
                whole.replace(b"0\r\n\r\n", b"0\r\na: b\r\n\r\n"),
                whole.replace(size, size.strip() + b";ext=" + b"a" * 100 + b"\r\n"),
                whole.replace(size, b"f" * self._random.randrange(1, 40) + b"\r\n"),
                whole.replace(size, b"-1\r\n"),
                whole.replace(b"\r\n", b"\n"),
                self._request(path, data, chunked),
                self._request(path, data, b"transfer-encoding: gzip, chunked"),
                self._request(path, data, b"content-length: %d" % (len(data) + 1)),
                self._request(path, data, b"content-length: +5"),
                self._request(
                    path, data, b"expect: " + self._random.choice((b"100-continue", b"200-ok", b""))
                ),
                self._request(path, data).replace(
                    b"1.1", self._random.choice((b"1.0", b"2.0", b"0.9", b"1.9"))
                ),
                self._request(path, data, b"content-encoding: gzip"),
                self._request(f"http://a{path}", data),
                self._request(path, data, b"upgrade: h2c", b"connection: upgrade, http2-settings"),
            )
        )
        return Input("framing", self._pieces(raw), self._then())

    def _headers(self) -> Input:
        path, body = self._body()
        name = self._random.choice(NAMES)
        value = self._random.choice(ODD_VALUES)
        more = [name + b": " + value] * self._random.choice((1, 1, 2, 200))
        return Input("headers", (self._request(path, json.dumps(body).encode(), *more),), self._then())

    def _pipelined(self) -> Input:
        parts = [b"".join(self._reads().pieces) for _ in range(self._random.randrange(2, 6))]
        parts[self._random.randrange(len(parts))] = b"".join(self._good().pieces)
        return Input("pipelined", self._pieces(b"".join(parts)), self._then())
