"""API keys: named, hashed, read again, compared all; and nothing of them in the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI, Request
from http_support import running
from pydantic import SecretStr, ValidationError
from test_bad_input import GOOD, check_error
from typer.testing import CliRunner

from server import keys
from server.cli import app as command
from server.settings import Settings

MakeApp = Callable[..., FastAPI]
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"

BOBS = f"key-{hashlib.sha256(BOB.encode()).hexdigest()[:8]}"  # of a line without a name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# whose\n\n{keys.line(ALICE, 'alice')}  # she\n{keys.line(BOB, None)}\n")
    return path


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at for every request."""
    monkeypatch.setattr(keys, "_LOOK_SECONDS", 0.0)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_keys_of_the_file_and_of_flags_open(make_app: MakeApp, file: Path) -> None:
    app = make_app(api_key=[SecretStr("plain")], api_key_file=str(file))

    @app.get("/whose")
    async def whose(request: Request) -> str:
        return str(request.scope["disco_key_name"])

    async with running(app) as client:
        for key, name in ((ALICE, "alice"), (BOB, BOBS), ("plain", "key-1")):
            assert (await client.get("/whose", headers=bearer(key))).json() == name
            assert (await client.post("/v1/completions", json=GOOD, headers=bearer(key))).status_code == 200
        digest = keys.digest(ALICE).hex()
        for wrong in ("", "x", ALICE[:-1], ALICE + "x", digest, f"sha256:{digest}", "alice", "\xff\xfe"):
            header = {"authorization": f"Bearer {wrong}".encode("latin-1")}
            check_error(await client.get("/v1/models", headers=header), 401)  # type: ignore[arg-type]
        check_error(await client.get("/v1/models", headers={"authorization": f"Basic {ALICE}"}), 401)


@pytest.mark.parametrize("apart", [False, True])
async def test_cached_prefixes_can_be_kept_apart(
    make_app: MakeApp, file: Path, engine: FakeEngine, apart: bool
) -> None:
    """By the key's name; a salt of the request's own is kept, and can name no other key's."""
    app = make_app(api_key_file=str(file), prefix_cache_by_key=apart)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    async with running(app) as client:
        for key, salt in ((ALICE, ""), (BOB, ""), (ALICE, "x"), (BOB, "alice\0x")):
            for path, body in (("/v1/completions", GOOD), ("/v1/chat/completions", chat)):
                await client.post(path, json=body | {"cache_salt": salt}, headers=bearer(key))
    salts = [request.cache_salt for request in engine.requests]
    assert len(salts) == 8 and len(set(salts)) == (4 if apart else 3)


def test_every_key_is_compared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind the one that fits, and through hmac's comparison."""
    compared = []
    compare = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    ring = keys.KeyRing(["plain"], str(file))
    for key, name in (("plain", "key-1"), (BOB, BOBS), ("none", None)):
        compared.clear()
        assert ring.name_of(key) == name
        assert compared == [keys.digest(each) for each in ("plain", ALICE, BOB)]


@pytest.mark.usefixtures("eager")
async def test_the_file_is_read_again_when_it_changes(make_app: MakeApp, file: Path) -> None:
    async with running(make_app(api_key_file=str(file))) as client:

        async def opens(key: str) -> bool:
            return (await client.get("/v1/models", headers=bearer(key))).status_code == 200

        assert await opens(ALICE) and not await opens("sk-carol-0123456789")
        file.write_text(keys.line("sk-carol-0123456789", "carol"))
        assert not await opens(ALICE) and await opens("sk-carol-0123456789")
        file.write_text("nonsense")  # changes nothing
        assert await opens("sk-carol-0123456789")
        file.unlink()
        assert await opens("sk-carol-0123456789")
        other = file.with_name("other")
        other.write_text(keys.line(ALICE, None))
        os.replace(other, file)
        assert await opens(ALICE)
        file.write_text("# all revoked")  # and that is not: open to all
        assert not await opens(ALICE) and not await opens("")
        check_error(await client.get("/v1/models"), 401)


def test_hangup_reads_it_at_once(file: Path) -> None:
    """What the signal's handler calls."""
    ring = keys.KeyRing(file=str(file))
    assert ring.name_of(ALICE) == "alice"
    file.write_text(keys.line("other-key-0123456789", "other"))
    ring.reload()
    assert (ring.name_of(ALICE), ring.name_of("other-key-0123456789")) == (None, "other")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("# nobody\n", "holds no key"),
        (f"ok sha256:{'0' * 64}\n{ALICE}", "line 2"),
        (f"alice sha256:{'0' * 63}", "line 1"),
        (f"alice md5:{'0' * 32}", "line 1"),
        (f"two names sha256:{'0' * 64}", "line 1"),
    ],
)
def test_bad_files_are_refused_at_start(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(keys.BadKeys, match=says) as error:
        keys.KeyRing(file=str(file))
    assert ALICE not in str(error.value)  # it may be a key that was not hashed
    result = CliRunner().invoke(command, ["serve", "--api-key-file", str(file)])
    assert result.exit_code == 1 and says in result.stderr and result.stderr.count("\n") == 1


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, says in (("none", "No such file"), ("bytes", "not UTF-8"), (".", "directory")):
        with pytest.raises(keys.BadKeys, match=says):
            keys.KeyRing(file=str(tmp_path / name))


def test_the_command_makes_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    made = CliRunner().invoke(command, ["key", "--name", "alice", "--file", str(file)])
    key = made.stdout.strip()
    assert made.exit_code == 0 and len(key) > 40 and key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    own = CliRunner().invoke(command, ["key", "--file", str(file), "--stdin"], input=f"{BOB}\n")
    assert own.exit_code == 0 and own.stdout == ""
    ring = keys.KeyRing(file=str(file))
    assert (ring.name_of(key), ring.name_of(BOB)) == ("alice", BOBS)
    shown = CliRunner().invoke(command, ["key"])
    assert shown.stderr.strip() == keys.line(shown.stdout.strip(), None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--name", "a b"], "--name"), (["--stdin"], "16 characters"), (["--file", "/none/keys"], "No such")],
)
def test_the_command_refuses(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(command, ["key", *arguments], input="short\n")
    assert result.exit_code and says in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["clé-secrète-et-longue", "a key with its spaces", "a-tab\tand-more-of-it"])
def test_a_key_that_nobody_could_send_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(ValidationError, match="printable ASCII") as refused:
        Settings(api_key=[SecretStr("plain"), SecretStr(key)])
    assert key not in str(refused.value)
    result = CliRunner().invoke(command, ["key", "--stdin"], input=f"{key}\n")
    assert result.exit_code == 2 and "printable ASCII" in result.stderr and key not in result.output


@pytest.mark.usefixtures("eager")
async def test_no_key_and_no_prompt_in_the_log(
    make_app: MakeApp, file: Path, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """At the log's finest, through answers, refusals, faults and reading the keys again."""
    caplog.set_level(logging.DEBUG)
    secret, wrong, prompt = "plain-secret-key", "wrong-secret-key", "whispered words"
    body = GOOD | {"prompt": prompt}
    async with running(make_app(api_key=[SecretStr(secret)], api_key_file=str(file))) as client:
        for key in (secret, ALICE, wrong):
            for path in ("/v1/completions", "/tokenize", f"/v1/nothing/{'x' * 50}"):
                await client.post(path, json=body, headers=bearer(key))
                await client.post(path, content=str(body), headers=bearer(key))
            await client.post("/v1/completions", json=body | {"stream": True}, headers=bearer(key))
        file.write_text(ALICE)  # somebody forgot to hash it
        await client.get("/v1/models", headers=bearer(secret))
        engine.fail_after = 2
        await client.post("/v1/completions", json=body, headers=bearer(secret))
    said = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert "the API keys stay as they were" in said
    for hidden in (secret, wrong, ALICE, prompt, "whispered", keys.digest(secret).hex()):
        assert hidden not in said
