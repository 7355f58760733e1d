"""Events stay whole for clients that split text where Unicode says that lines end."""

from __future__ import annotations

import json

from server.stream import json_line


def test_an_event_is_one_line_whatever_a_client_takes_for_the_end_of_one() -> None:
    text = "a\u0085b\u2028c\u2029d\nñ名\U0001f600\\u2028\x0b\x1c"
    sent = json_line({"text": text, "\u2028": [text]})
    assert len(sent.decode().splitlines()) == 1
    assert json.loads(sent) == {"text": text, "\u2028": [text]}
    assert "ñ名\U0001f600" in sent.decode()  # the rest goes as it is
