"""Requests of POST /v1/responses that the OpenAPI page shows. Each runs as it stands with a model's name."""

from __future__ import annotations

from typing import Any

RESPONSES: dict[str, dict[str, Any]] = {
    "a text of the user": {"input": "Say hello.", "max_output_tokens": 8, "temperature": 0},
    "a conversation that is streamed": {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Hello, Ada."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "What is my name?"}]},
        ],
        "max_output_tokens": 8,
        "stream": True,
    },
    "JSON by a schema": {
        "input": "Ada is 36 years old. Give name and age as JSON.",
        "max_output_tokens": 32,
        "text": {
            "format": {
                "type": "json_schema",
                "name": "person",
                "schema": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                    "required": ["name", "age"],
                    "additionalProperties": False,
                },
            }
        },
    },
    "how to speculate": {
        "input": "Count to ten.",
        "max_output_tokens": 8,
        "seed": 7,
        "speculation": {"drafter": "ngram", "policy": "static", "options": {"sl": 3}},
    },
}
