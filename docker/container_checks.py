"""What a running container of the image must do."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from container import Container, Failed, say

LOAD_SECONDS = 300.0
PROMPT = {"model": "smollm2", "prompt": "The capital of France is", "temperature": 0}


def check_early_stop(container: Container) -> None:
    """A SIGTERM while nothing listens yet ends it at once, and well."""
    end = time.monotonic() + 30
    while "disco-serve" not in _status(container.pid, "Name", children=True) and time.monotonic() < end:
        time.sleep(0.1)
    start = time.monotonic()
    container.signal(signal.SIGTERM)
    if (code := container.wait(30)) != 0:
        raise Failed(f"stopped before it listened it ended with {code}{container.words()}")
    say(f"stopped while it loads: 0 after {time.monotonic() - start:.1f} s")


def check_service(container: Container, url: str) -> None:
    """Not healthy before it is ready, then healthy, and it answers."""
    start, seen = time.monotonic(), set()
    while (code := _code(f"{url}/ready")) != 200:
        seen.add(container.execute("disco-health")[0])
        if not container.running or time.monotonic() - start > LOAD_SECONDS:
            raise Failed(f"not ready after {time.monotonic() - start:.0f} s ({code}){container.words()}")
        time.sleep(0.5)
    if seen != {1}:
        raise Failed(f"while it loaded, the health check gave {seen}, not 1")
    if (health := container.execute("disco-health"))[0] != 0 or _code(f"{url}/health") != 200:
        raise Failed(f"ready, but the health check says {health}")
    say(f"ready after {time.monotonic() - start:.1f} s; unhealthy before, healthy now")
    answer = _post(f"{url}/v1/completions", PROMPT | {"max_tokens": 8})
    text, told = answer["choices"][0]["text"], answer["speculation"]
    if "Paris" not in text or answer["usage"]["completion_tokens"] != 8 or not told["accepted"]:
        raise Failed(f"a strange answer: {answer}")
    share = f"{told['accepted']} of {told['drafted']} drafted tokens accepted"
    say(f"/v1/completions: {PROMPT['prompt']!r} -> {text!r}, {share}")


def check_inside(container: Container, uid: int) -> None:
    """The user, the capabilities and the file system that the server has."""
    ids = _status(container.pid, "Uid").split()
    if ids != [str(uid)] * 4:
        raise Failed(f"it runs as {ids}")
    if int(_status(container.pid, "CapEff"), 16) or _status(container.pid, "NoNewPrivs") != "1":
        raise Failed("it has capabilities")
    for place in ("/", "/opt/disco", "/etc", "/usr/local/bin"):
        code, words = container.execute("touch", f"{place}/written")
        if code == 0 or "Read-only" not in words:
            raise Failed(f"{place} can be written: {words}")
    code, words = container.execute("python", "-m", "pip", "check")
    unmet = [line for line in words.splitlines() if "requires triton" not in line]  # which only runs on a GPU
    if any("requires" in line or "has requirement" in line for line in unmet):
        raise Failed(f"packages do not fit together: {words}")
    say(f"inside: uid {uid}, no capabilities, read-only root")


def check_drain(container: Container, url: str) -> None:
    """SIGTERM lets an open stream end, takes no new requests, and ends with 0."""
    chunks: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = PROMPT | {"max_tokens": 96, "ignore_eos": True, "stream": True}
        with _open(f"{url}/v1/completions", body) as answer:
            for line in answer:
                chunks.append(line.decode().strip())
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    if not begun.wait(60):
        raise Failed(f"no stream{container.words()}")
    start, before = time.monotonic(), len(chunks)
    container.signal(signal.SIGTERM)
    time.sleep(0.3)
    late = _code(f"{url}/ready")
    code = container.wait(90)
    seconds = time.monotonic() - start
    reader.join(10)
    data = [line.removeprefix("data: ") for line in chunks if line.startswith("data: ")]
    if data[-1:] != ["[DONE]"] or json.loads(data[-2])["choices"][0]["finish_reason"] != "length":
        raise Failed(f"the open stream did not end as it should: {data[-3:]}{container.words()}")
    if late != 503:
        raise Failed(f"/ready answers {late} though it is about to end")
    if code != 0:
        raise Failed(f"after SIGTERM it ended with {code}{container.words()}")
    more = len(chunks) - before
    say(f"SIGTERM: {more} more lines of the open stream, its end, then 0 after {seconds:.1f} s")


def _status(pid: int, field: str, *, children: bool = False) -> str:
    """A field of /proc/PID/status; of its children's too, set apart by spaces."""
    pids = [pid]
    if children:
        pids += [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    lines = [line for each in pids for line in Path(f"/proc/{each}/status").read_text().splitlines()]
    return " ".join(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{field}:"))


def _open(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120)


def _code(url: str) -> int:
    """The status of an answer; 0 if there is none."""
    try:
        with _open(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        with _open(url, body) as answer:
            told: dict[str, Any] = json.loads(answer.read())
            return told
    except urllib.error.HTTPError as error:
        raise Failed(f"{url}: {error.code} {error.read().decode()}") from None
