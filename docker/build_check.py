"""Builds the CPU image on a Debian of its own, runs it as a cluster would, and looks at what it does.

    sudo python docker/build_check.py [--keep]

For machines without Docker: needs buildah, runc, debootstrap and hadolint on the PATH, root, and this project
installed beside the Python that runs it (3.11, as in the image). Wheels are fetched here with this machine's
pip, the build itself asks the network for one Debian package. The container gets no capabilities, a read-only
root, a user that is not root, a small /tmp and the default model. Exits with 1 at the first thing that is not
as it must be. Takes some minutes, and 5 GB in --work until it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from container import Container, Failed, run, say
from container_checks import check_drain, check_early_stop, check_inside, check_service

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "localhost/disco-serve:check"
BASE = "localhost/disco-serve-base:check"
UID = 10001
SUITE = "bookworm"


class Buildah:
    """buildah with a storage of its own under `work`."""

    def __init__(self, work: Path, driver: str) -> None:
        self._words = ["buildah", "--storage-driver", driver]
        self._words += ["--root", str(work / "storage"), "--runroot", str(work / "run")]

    def __call__(self, *words: str, log: Path | None = None) -> str:
        """What it printed. Raises Failed."""
        return run([*self._words, *words], log=log)

    def has(self, image: str) -> bool:
        return subprocess.run([*self._words, "inspect", image], capture_output=True).returncode == 0

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """The image's files."""
        container = self("from", "--pull-never", image).strip()
        try:
            yield Path(self("mount", container).strip())
        finally:
            self("rm", container)


def make_base(buildah: Buildah, work: Path) -> str:
    """A Debian with Python, in place of the official image that the Dockerfile names."""
    if buildah.has(BASE):
        return BASE
    say(f"debootstrap {SUITE}")
    folder = work / "base"
    packages = "--include=python3,python3-venv,ca-certificates"
    run(["debootstrap", "--variant=minbase", packages, SUITE, str(folder / "rootfs")], log=work / "base.log")
    (folder / "Dockerfile").write_text("FROM scratch\nADD rootfs /\n")
    buildah("build", "--isolation", "chroot", "--tag", BASE, str(folder), log=work / "base.log")
    shutil.rmtree(folder)
    return BASE


def fetch_wheels(work: Path) -> Path:
    """Every wheel of the CPU image, by the pip of this machine and its settings."""
    say("fetching the wheels")
    wanted = [word for kind in ("", "-cpu", "-build") for word in ("-r", f"docker/requirements{kind}.txt")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    folder = work / "wheels"
    run([*pip, "--only-binary", ":all:", "--dest", str(folder), *wanted], log=work / "wheels.log", cwd=ROOT)
    return folder


def build(buildah: Buildah, work: Path, base: str) -> None:
    wheels = fetch_wheels(work)
    say(f"building {IMAGE}; {work / 'build.log'}")
    arguments = {"BASE": base, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
    options = [word for pair in arguments.items() for word in ("--build-arg", "=".join(pair))]
    # docker's format: OCI's knows no health check
    options += ["--isolation", "chroot", "--format", "docker", "--target", "cpu"]
    buildah("build", *options, "--volume", f"{wheels}:/wheels:ro", "--tag", IMAGE, str(ROOT),
            log=work / "build.log")  # fmt: skip


def check_image(config: dict[str, Any], rootfs: Path) -> None:
    """What the image says of itself, and what must not lie in it."""
    wanted: dict[str, Any] = {
        "User": f"{UID}:{UID}",
        "ExposedPorts": {"8000/tcp": {}},
        "Volumes": {"/cache": {}},
        "StopSignal": "SIGTERM",
        "WorkingDir": "/cache",
        "Entrypoint": ["disco-entrypoint"],
    }
    found = {name: config.get(name) for name in wanted}
    if found != wanted:
        raise Failed(f"the image's config is {found}, not {wanted}")
    if config.get("Healthcheck", {}).get("Test") != ["CMD", "disco-health"]:
        raise Failed(f"the health check is {config.get('Healthcheck')}")
    places = ("usr/bin", "usr/local/bin", "opt/disco/bin")
    if tools := [f"{p}/{t}" for p in places for t in ("gcc", "cc", "g++", "ld") if (rootfs / p / t).exists()]:
        raise Failed(f"build tools in the image: {tools}")
    if left := [name for name in ("build", "wheels", "src", "package") if any((rootfs / name).glob("*"))]:
        raise Failed(f"left by the build: {left}")
    owned = subprocess.run(["find", str(rootfs), "-xdev", "-uid", str(UID)], capture_output=True, text=True)
    if (names := owned.stdout.split()) != [str(rootfs / "cache")]:
        raise Failed(f"the server's user owns {names[:5]}, and should own /cache alone")
    say(f"image: user {config['User']}, no build tools, {_gigabytes(rootfs):.2f} GB of files")


def _gigabytes(folder: Path) -> float:
    return int(run(["du", "-s", "--block-size=1", str(folder)]).split()[0]) / 1e9


def check_container(work: Path, config: dict[str, Any], rootfs: Path, port: int) -> None:
    say("the default model")
    disco = Path(sys.executable).with_name("disco-serve")
    model = Path(run([str(disco), "models", "pull", "smollm2"]).strip().splitlines()[-1])
    cache = work / "cache"  # a volume that holds it, and is the server's user's
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(model, cache / "disco-serve" / "models" / "smollm2")
    for place in (cache, *cache.rglob("*")):
        os.chown(place, UID, UID)
    environment = {"DISCO_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def started(name: str, *flags: str) -> Container:
        return Container(work / name, rootfs, config, cache, environment, flags)

    url = f"http://127.0.0.1:{port}"
    with started("early") as container:
        check_early_stop(container)
    flags = ("--threads", "1", "--max-model-len", "1024", "--kv-blocks", "256", "--shutdown-seconds", "60")
    with started("serving", *flags) as container:
        check_service(container, url)
        check_inside(container, UID)
        check_drain(container, url)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "image", help="where everything lies")
    parser.add_argument("--base", help="an image to build on, instead of one made by debootstrap")
    parser.add_argument("--driver", default="overlay", help="buildah's storage driver: overlay or vfs")
    parser.add_argument("--port", type=int, default=8000, help="of the server, on this machine")
    parser.add_argument("--keep", action="store_true", help="keep the images and all else for another run")
    parser.add_argument("--no-build", action="store_true", help="check the image that an earlier run kept")
    asked = parser.parse_args(argv)
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    buildah, start = Buildah(work, asked.driver), time.monotonic()
    try:
        run(["hadolint", str(ROOT / "Dockerfile")])
        say("hadolint: nothing to say")
        if not asked.no_build:
            build(buildah, work, asked.base or make_base(buildah, work))
        config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        with buildah.mounted(IMAGE) as rootfs:
            check_image(config, rootfs)
            check_container(work, config, rootfs, asked.port)
    except Failed as fault:
        print(f"FAILED: {fault}", file=sys.stderr)
        return 1
    finally:
        if not asked.keep:
            shutil.rmtree(work, ignore_errors=True)
    say(f"all well, after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
