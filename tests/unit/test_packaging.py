"""The wheel holds our packages and nothing else, and nobody else's stand in for them."""

from __future__ import annotations

import email
import json
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from server.flags import flag
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("server", "engine", "classifiers")

LOOK = """
import json, importlib, importlib.metadata as m
packages = ("server", "engine", "classifiers")
owners = {name: m.packages_distributions().get(name) for name in packages}
files = {name: importlib.import_module(name).__file__ for name in packages}
print(json.dumps({"owners": owners, "files": files}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_of_ours_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert {name for name in inside if name.endswith(".py")} == modules
    assert {name.split("/")[0] for name in inside} == set(PACKAGES)
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "server" / "page").iterdir()}
    assert page and page <= inside


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_metadata_keep_it_off_public_registries(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_string(archive.read(name).decode())
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        commands = archive.read(name).decode()
    assert "Private :: Do Not Upload" in metadata.get_all("Classifier", [])
    assert (metadata["Name"], metadata["License-Expression"]) == ("disco-serve", "Apache-2.0")
    assert "disco-serve = server.__main__:main" in commands


def test_installed_in_a_clean_environment_the_names_are_ours(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-index",
        "--no-deps",
        "--quiet",
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    seen = json.loads(
        subprocess.run([str(python), "-I", "-c", LOOK], check=True, capture_output=True, text=True).stdout
    )
    assert seen["owners"] == {name: ["disco-serve"] for name in PACKAGES}
    for name, file in seen["files"].items():
        assert Path(file).is_relative_to(tmp_path / "venv"), name


def test_no_dependency_brings_a_package_of_our_names() -> None:
    strangers = {
        f"{each.metadata['Name']}: {path}"
        for each in distributions()
        if each.metadata["Name"] != "disco-serve"
        for path in each.files or []
        if path.parts and path.parts[0].removesuffix(".py") in PACKAGES
    }
    assert strangers == set()


def test_the_readme_names_every_flag() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in Settings.model_fields if f"`{flag(name)}`" not in readme] == []
