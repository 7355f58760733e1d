"""The compose files: valid, their images pinned, what they mount there and where it is looked for."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


class _Loader(yaml.SafeLoader):
    """Knows Compose's own tag: a value that is taken away."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def read(name: str) -> dict[str, Any]:
    return yaml.load((DEPLOY / name).read_text(), _Loader)  # type: ignore[no-any-return]


COMPOSE, CPU = read("compose.yaml"), read("compose.cpu.yaml")


@pytest.mark.skipif(find_spec("check_jsonschema") is None, reason="check-jsonschema is not installed")
@pytest.mark.parametrize("composed", [COMPOSE, CPU], ids=["gpu", "cpu"])
def test_the_file_is_a_compose_file(composed: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump(composed))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_pinned() -> None:
    for name, service in COMPOSE["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_what_is_mounted_is_there() -> None:
    for service in COMPOSE["services"].values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source


def test_targets_are_stages_of_the_dockerfile() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (DEPLOY.parent / "Dockerfile").read_text(), re.MULTILINE)
    for composed in (COMPOSE, CPU):
        assert composed["services"]["server"]["build"]["target"] in stages


def test_the_cpu_variant_asks_for_no_gpu_and_is_another_image() -> None:
    server, cpu = COMPOSE["services"]["server"], CPU["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert cpu["deploy"] is None
    assert cpu["image"] != server["image"]


def test_grafana_finds_prometheus_and_its_dashboards() -> None:
    grafana = COMPOSE["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/disco.yaml").read_text())["providers"]
    folder = provider["options"]["path"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["./grafana/dashboards"] == folder
    assert source["url"] == "http://prometheus:9090"
    assert (DEPLOY / "grafana" / "dashboards" / Path(home).relative_to(folder)).exists()


def test_prometheus_scrapes_the_server() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["job_name"] == "disco"  # alerts name it
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert "server" in COMPOSE["services"]
