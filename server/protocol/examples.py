"""Requests that the OpenAPI page shows. Each runs as it stands; the page puts the served model's name in."""

from __future__ import annotations

from typing import Any

COMPLETION: dict[str, dict[str, Any]] = {
    "a text goes on": {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
    "a stream that ends with its usage": {
        "prompt": "Once upon a time",
        "max_tokens": 8,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "scoring token ids": {
        "prompt": [[10, 11, 12, 13], [20, 21, 22]],
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
    },
    "one of several words": {
        "prompt": "Is the sky blue? Answer:",
        "max_tokens": 8,
        "structured_outputs": {"choice": [" yes", " no"]},
    },
    "how to speculate": {
        "prompt": "one two three one two",
        "max_tokens": 8,
        "speculation": {"drafter": "ngram", "policy": "static", "options": {"sl": 3}},
    },
}
_USER = {"role": "user", "content": "Name a colour."}
CHAT: dict[str, dict[str, Any]] = {
    "a question": {"messages": [_USER], "max_tokens": 8, "temperature": 0},
    "a stream with log-probabilities": {
        "messages": [{"role": "system", "content": "Answer in one word."}, _USER],
        "max_tokens": 8,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "JSON by a schema": {
        "messages": [_USER],
        "max_tokens": 24,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "colour",
                "schema": {
                    "type": "object",
                    "properties": {"colour": {"enum": ["red", "green", "blue"]}},
                    "required": ["colour"],
                    "additionalProperties": False,
                },
            },
        },
    },
    "an answer that goes on": {
        "messages": [_USER, {"role": "assistant", "content": "My colour is"}],
        "continue_final_message": True,
        "max_tokens": 4,
    },
}
TOKENIZE: dict[str, dict[str, Any]] = {
    "a text": {"prompt": "Hello, world", "return_token_strs": True},
    "a conversation": {"messages": [{"role": "user", "content": "Hello"}]},
}
DETOKENIZE: dict[str, dict[str, Any]] = {"token ids": {"tokens": [10, 11, 12]}}
