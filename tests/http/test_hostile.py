"""What a client or a model may try to get at Python or at files: templates, names, code, pickles."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from chat_support import Grammars
from fastapi import FastAPI
from http_support import running
from test_bad_input import CHAT, GOOD, check_error

from engine.config import EngineConfig
from engine.models import load
from engine.models.folder import ModelError
from server.settings import Settings

MakeApp = Callable[..., FastAPI]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__cl' ~ 'ass__'] }}",
    "{{ ''|attr('__class__')|attr('__base__') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch %s').read() }}",
    "{{ lipsum.__globals__['os'].system('touch %s') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__.__builtins__.open('%s', 'w') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'].modules }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('%%s{0.__init__.__globals__}')|format(messages) }}{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.__getattribute__('__class__') }}",
    "{% set f = ''.join %}{{ f.__self__.__class__.__mro__ }}",
    "{{ [].__class__.__class__ }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ range(10 ** 9)|list }}",
]
LEAKS = ("root:", "<class", "subclasses", "module 'os'", "builtin_function", "<function", "&lt;class")


@pytest.mark.parametrize("template", ESCAPES)
async def test_templates_do_not_reach_python(
    app_of: Callable[[str], FastAPI], grammars: Grammars, tmp_path: Path, template: str
) -> None:
    """Each is a 400 with the template's message, or renders as nothing."""
    mark = tmp_path / "mark"
    hostile = template.replace("%s", str(mark)).replace("%%", "%")
    async with running(
        app_of(f"{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{hostile}")
    ) as client:
        response = await client.post("/tokenize", json=CHAT | {"return_token_strs": True})
        assert response.status_code in (200, 400)
        if response.status_code == 200:
            text = "".join(response.json()["token_strs"])
            assert not any(leak in text for leak in LEAKS), text
        else:
            assert response.json()["error"]["code"] == "chat_template_error"
    assert not mark.exists()


NAMES = [
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "tiny/../../etc",
        "tiny\x00.gguf",
        "..\\..\\x",
        "file:///etc/passwd",
    ),
    *(
        "%2e%2e%2fetc%2fpasswd",
        "~/.ssh/id_rsa",
        "org/other",
        "./tiny",
        "tiny/",
        " tiny",
        "TINY",
        "self:1",
        "default",
    ),
]


@pytest.mark.parametrize("name", NAMES)
async def test_names_of_models_open_no_file(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A request's name is compared with those served, and never a path."""
    opened: list[str] = []
    watching = [True]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in ("open", "os.stat", "os.listdir", "os.scandir"):
            opened.append(str(arguments[0]))

    sys.addaudithook(audit)
    for path, body in (("/v1/completions", GOOD), ("/v1/chat/completions", CHAT), ("/tokenize", GOOD)):
        response = await client.post(path, json=body | {"model": name})
        assert check_error(response, 404)["code"] == "model_not_found"
    assert (await client.get(f"/v1/models/{quote(name, safe='')}")).status_code == 404
    for field in ("policy", "drafter"):
        response = await client.post("/v1/completions", json=GOOD | {"speculation": {field: name}})
        assert response.status_code == 400
    watching[0] = False
    secrets = [file for file in opened if "etc" in file or "ssh" in file or "gguf" in file]
    assert not secrets


async def test_the_page_has_no_other_files(client: httpx.AsyncClient) -> None:
    for path in (
        "/page/../settings.py",
        "/page/%2e%2e/settings.py",
        "/page/..%2fsettings.py",
        "/docs/../app.py",
    ):
        response = await client.send(httpx.Request("GET", f"http://tiny{path}"))
        assert response.status_code == 404 and "import" not in response.text
    assert (await client.get("/docs/docs.html.jinja")).status_code == 404


def test_code_that_comes_with_a_model_is_not_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its configuration's, nor its model's, nor its tokenizer's; and it is refused, not ignored."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    where = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    code = f"open({str(tmp_path / 'mark')!r}, 'w')\n"
    (where / "evil.py").write_text(code)
    config = json.loads((where / "config.json").read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (where / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((where / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "EvilTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]},
    }
    (where / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for load_it in (load.load_model, load.load_tokenizer):
        with pytest.raises(ModelError):
            load_it(str(where))
    assert not (tmp_path / "mark").exists()
    assert not (Settings().trust_remote_code or EngineConfig(target="x").trust_remote_code)


def test_pickles_are_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    """Beside good weights a pickle is left alone; without them it is refused by name."""
    where = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    mark = tmp_path / "mark"
    (where / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(mark).encode())
    load.load_model(str(where))
    (where / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles"):
        load.load_model(str(where))
    assert not mark.exists()


SLOW = [
    {"regex": "(a|aa|aaa|aaaa){0,400}b{0,400}(c|cc){0,400}"},
    {"regex": "(" * 150 + "a" + ")*" * 150},
    {"regex": "[a-z]{1,9999}" * 20},
    {"json": {"type": "array", "items": {"type": "string", "pattern": "^(a+)+$"}, "minItems": 5000}},
]


async def test_grammars_do_not_hang_the_server(make_app: MakeApp) -> None:
    """All at once: each ends, read or refused, and others are answered meanwhile."""
    async with running(make_app(grammar_seconds=1.0)) as client:

        async def structured(**how: Any) -> httpx.Response:
            return await client.post("/v1/completions", json=GOOD | {"structured_outputs": how})

        assert (await structured(regex="a")).status_code == 200  # the compiler has started
        slow = [asyncio.create_task(structured(**how)) for how in SLOW]
        answered = 0
        while not all(task.done() for task in slow):
            async with asyncio.timeout(5):
                assert (await client.post("/v1/completions", json=GOOD)).status_code == 200
            answered += 1
        assert answered > 3
        told = [task.result() for task in slow]
        assert {response.status_code for response in told} <= {200, 400}
