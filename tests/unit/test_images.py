"""The Dockerfile and what it copies: pinned, complete, not root; its two scripts at work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINUX = {"extra": "", "platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux"}
LINUX |= {"python_version": "3.11", "python_full_version": "3.11.15", "implementation_name": "cpython"}
GPU_ONLY = ("triton", "nvidia-", "cuda-")

Stage = list[tuple[str, str]]  # instructions with their words


def read_stages() -> dict[str, tuple[str, Stage]]:
    """Stages by name: what each is made from, and its instructions."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: dict[str, tuple[str, Stage]] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.split()
            stages[name] = base, []
        elif word and stages:
            stages[name][1].append((word, rest))
    return stages


STAGES = read_stages()


def whole(name: str) -> Stage:
    """A stage's instructions behind those of the stages it is made from."""
    base, own = STAGES[name]
    return (whole(base) if base in STAGES else []) + own


def last(name: str, instruction: str) -> str:
    return [rest for word, rest in whole(name) if word == instruction][-1]


def environment(name: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for word, rest in whole(name) if word == "ENV")))


def pins(kind: str = "") -> dict[str, str]:
    """Versions by name. Raises ValueError for a line that is no exact version."""
    found = {}
    for line in (DOCKER / f"requirements{kind}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            if specifier.operator != "==" or "*" in specifier.version:
                raise ValueError(f"{line} is no exact version")
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def wanted() -> Iterator[tuple[str, Requirement]]:
    """Every requirement that holds in the images, ours and those of what is required, with who has it."""
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["tracing"], "pip"]
    todo, seen = [("disco-serve", Requirement(each)) for each in asked], set()
    while todo:
        owner, requirement = todo.pop()
        yield owner, requirement
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen or key[0].startswith(GPU_ONLY):
            continue
        seen.add(key)
        for each in map(Requirement, distribution(requirement.name).requires or []):
            if any(_holds(each.marker, extra) for extra in ("", *requirement.extras)):
                todo.append((requirement.name, each))


def _holds(marker: Marker | None, extra: str) -> bool:
    return marker is None or marker.evaluate(LINUX | {"extra": extra})


def test_the_base_is_one_release() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base)
    assert {made_from for made_from, _ in STAGES.values()} <= {"${BASE}", *STAGES}


def test_what_is_installed_has_exact_versions() -> None:
    for kind in ("", "-cpu", "-gpu", "-build"):
        assert pins(kind)
    for _, instructions in STAGES.values():
        for words in (rest.split() for word, rest in instructions if word == "RUN"):
            if "apt-get" in words:
                packages = words[words.index("install") + 1 : words.index("&&", words.index("install"))]
                assert all("=" in each for each in packages if not each.startswith("--")), packages
            if words[:2] == ["pip", "install"]:
                assert "--no-deps" in words and ("-r" in words or words[-1] == "."), words


def test_every_dependency_is_in_the_images_and_fits() -> None:
    for kind in ("-cpu", "-gpu"):
        held = pins() | pins(kind)
        for owner, requirement in wanted():
            name = canonicalize_name(requirement.name)
            # xgrammar asks for triton, and takes it only on a GPU; which torch is here, and so what it asks
            # for, may be another than in the image
            if name.startswith(GPU_ONLY) and (kind == "-cpu" or owner == "torch"):
                continue
            assert name in held, f"{owner} needs {requirement}: add it to docker/requirements.txt"
            assert requirement.specifier.contains(held[name], prereleases=True), f"{owner}: {requirement}"


def test_nothing_is_in_the_images_that_nothing_asks_for() -> None:
    asked = {canonicalize_name(requirement.name) for _, requirement in wanted()}
    assert set(pins()) - asked == set()


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_an_image_is_not_root_and_heeds_signals(image: str) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(image, "USER"))  # a number: Kubernetes can tell
    assert last(image, "ENTRYPOINT") == '["disco-entrypoint"]'
    assert last(image, "HEALTHCHECK").endswith('CMD ["disco-health"]')
    assert last(image, "STOPSIGNAL") == "SIGTERM"
    scripts = dict(re.findall(r"(docker/\S+) /usr/local/bin/(\S+)", " ".join(r for _, r in whole(image))))
    assert set(scripts.values()) == {"disco-entrypoint", "disco-health"}
    assert "exec tini" in (DOCKER / "entrypoint.sh").read_text()


def test_only_the_gpu_image_has_a_compiler_and_it_is_the_default() -> None:
    assert list(STAGES)[-1] == "gpu"
    assert " gcc=" in " ".join(rest for _, rest in whole("gpu"))
    assert "gcc" not in " ".join(rest for _, rest in whole("cpu"))


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_all_that_is_written_goes_to_the_volume(image: str) -> None:
    volume, variables = last(image, "VOLUME"), environment(image)
    places = {"HOME", "HF_HOME", "DISCO_CACHE", *(["TRITON_CACHE_DIR"] if image == "gpu" else [])}
    assert all(variables[each].startswith(volume) for each in places)
    own = {name.removeprefix("DISCO_").lower() for name in variables if name.startswith("DISCO_")}
    assert own - {"cache"} <= set(Settings.model_fields)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for _, instructions in STAGES.values():
        for words in (rest.split() for word, rest in instructions if word == "COPY"):
            if not words[0].startswith("--from"):
                for source in [each for each in words if not each.startswith("--")][:-1]:
                    assert (ROOT / source).exists() and source.split("/")[0] in let_through, source


def test_the_names_and_the_version_are_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert f'image.version="{version}"' in last("gpu", "LABEL")
    compose = (ROOT / "deploy" / "compose.yaml", ROOT / "deploy" / "compose.cpu.yaml")
    named = {re.search(r"image: (disco-serve:\S+)", each.read_text())[1] for each in compose}  # type: ignore[index]
    assert named == {f"disco-serve:{version}", f"disco-serve:{version}-cpu"}
    for overlay, tag in (("gpu", version), ("cpu", f"{version}-cpu")):
        file = ROOT / "deploy" / "kubernetes" / "overlays" / overlay / "kustomization.yaml"
        assert yaml.safe_load(file.read_text())["images"] == [{"name": "disco-serve", "newTag": tag}]


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ([], "serve"),
        (["--target", "a b", "--draft", "c"], "serve|--target|a b|--draft|c"),
        (["models", "pull", "smollm2"], "models|pull|smollm2"),
    ],
)
def test_the_entrypoint_serves_unless_told_another_command(
    given: list[str], run: str, tmp_path: Path
) -> None:
    (tmp_path / "tini").write_text('#!/bin/sh\nIFS="|"; echo "$*"\n')
    (tmp_path / "tini").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", str(DOCKER / "entrypoint.sh"), *given], capture_output=True, text=True, env=path
    )
    assert done.stdout.strip() == f"-e|143|--|disco-serve|{run}"


class _Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b"the engine is loading")

    def log_message(self, format: str, *args: object) -> None:
        pass


def _asked(port: int) -> subprocess.CompletedProcess[str]:
    told = {"DISCO_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}  # a proxy that must not be asked
    command = [sys.executable, "-I", str(DOCKER / "health.py")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **told})


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_says_what_the_server_says(
    status: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Health, "status", status)
    with HTTPServer(("127.0.0.1", 0), _Health) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()
        done = _asked(server.server_address[1])
        serving.join()
    assert done.returncode == code
    assert done.stderr.strip() == ("" if code == 0 else "503: the engine is loading")


def test_the_health_check_fails_where_nothing_listens() -> None:
    with HTTPServer(("127.0.0.1", 0), _Health) as server:
        port = server.server_address[1]
    done = _asked(port)
    assert done.returncode == 1 and "refused" in done.stderr
