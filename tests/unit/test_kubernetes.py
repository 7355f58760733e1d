"""The manifests against the server and the image that they run. deploy/kubernetes/check.py renders them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, PropertyMock

import pytest
import yaml
from prometheus_client import CollectorRegistry

from engine import client_process, client_worker
from engine.client import EngineClient
from engine.types import EngineUnavailable
from server import http1
from server.metrics_engine import EngineMetrics
from server.routes import ops
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OVERLAYS = ("gpu", "cpu")


def read(name: str) -> Any:
    return yaml.safe_load((HERE / name).read_text())


DEPLOYMENT = read("base/deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]
(SERVER,) = POD["spec"]["containers"]


def settings_of(overlay: str) -> dict[str, str]:
    """The variables that the overlay's pods get from the ConfigMap."""
    found: dict[str, str] = {}
    for file in ("base", f"overlays/{overlay}"):
        (generated,) = read(f"{file}/kustomization.yaml")["configMapGenerator"]
        assert generated["name"] == "settings"
        found |= dict(line.split("=", 1) for line in generated["literals"])
    return found


def resources_of(overlay: str) -> dict[str, dict[str, str]]:
    (server,) = read(f"overlays/{overlay}/deployment.yaml")["spec"]["template"]["spec"]["containers"]
    assert server["name"] == SERVER["name"]  # or it would be a second container
    resources: dict[str, dict[str, str]] = server["resources"]
    return resources


def kustomizations() -> Iterator[Path]:
    yield from HERE.rglob("kustomization.yaml")


def test_every_manifest_is_used_and_every_file_named_is_there() -> None:
    used = set()
    for file in kustomizations():
        content = yaml.safe_load(file.read_text())
        patches = [patch["path"] for patch in content.get("patches", [])]
        for name in [*content.get("resources", []), *content.get("components", []), *patches]:
            path = (file.parent / name).resolve()
            assert path.exists(), f"{file}: {name}"
            used.add(path / "kustomization.yaml" if path.is_dir() else path)
    apart = {HERE / "components/prometheus/adapter-values.yaml"}  # a chart's values
    apart |= {HERE / "overlays" / overlay / "kustomization.yaml" for overlay in OVERLAYS}
    assert set(HERE.rglob("*.yaml")) - used == apart


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_are_the_servers_own(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = settings_of(overlay)
    variables |= {each["name"]: "secret" for each in SERVER["env"] if each["name"].startswith("DISCO_")}
    fields = {name.removeprefix("DISCO_").lower() for name in variables}
    assert fields <= set(Settings.model_fields)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert {
        name for name in fields if getattr(settings, name) != Settings.model_fields[name].default
    } == fields


def test_the_keys_must_be_there_and_the_hub_token_need_not() -> None:
    secrets = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in SERVER["env"]}
    assert "optional" not in secrets["DISCO_API_KEY"]  # else a server without the Secret is open to all
    assert secrets["HF_TOKEN"]["optional"] is True


@pytest.mark.parametrize(
    ("probe", "path"), [("startup", "/ready"), ("readiness", "/ready"), ("liveness", "/health")]
)
def test_probes_ask_what_the_server_answers(probe: str, path: str) -> None:
    asked = SERVER[f"{probe}Probe"]["httpGet"]
    assert asked == {"path": path, "port": "http"}
    assert path in {route.path for route in ops.router.routes}  # type: ignore[attr-defined]


def test_an_engine_that_is_started_again_does_not_cost_the_pod() -> None:
    probe, start = SERVER["livenessProbe"], SERVER["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
    assert start["periodSeconds"] * start["failureThreshold"] >= 1800


def test_the_port_the_user_and_the_volume_are_the_images() -> None:
    (port,) = SERVER["ports"]
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert port == {"name": "http", "containerPort": int(re.search(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)[1])}  # type: ignore[index]
    context = POD["spec"]["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (
        int(user),
        int(group),
        int(group),
    )
    volume = re.search(r"^VOLUME (\S+)$", DOCKERFILE, re.M)[1]  # type: ignore[index]
    assert {mount["mountPath"] for mount in SERVER["volumeMounts"]} == {volume, "/tmp"}


def test_the_pod_may_do_as_little_as_the_restricted_standard_says() -> None:
    namespace = read("base/namespace.yaml")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"
    context, own = POD["spec"]["securityContext"], SERVER["securityContext"]
    assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert POD["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_is_given_time_to_drain(overlay: str) -> None:
    before = int(SERVER["lifecycle"]["preStop"]["exec"]["command"][-1])
    grace = inspect.signature(client_worker.WorkerEngine).parameters["grace"].default
    needed = before + float(settings_of(overlay)["DISCO_SHUTDOWN_SECONDS"]) + http1.LATE_SECONDS
    assert POD["spec"]["terminationGracePeriodSeconds"] >= needed + grace + client_process._REAP


def test_selectors_meet_the_pods_labels() -> None:
    labels = POD["metadata"]["labels"]
    disruption, network = (
        read("base/poddisruptionbudget.yaml")["spec"],
        read("base/networkpolicy.yaml")["spec"],
    )
    service, monitor = read("base/service.yaml"), read("components/prometheus/servicemonitor.yaml")
    (spread,) = POD["spec"]["topologySpreadConstraints"]
    selectors = [
        DEPLOYMENT["spec"]["selector"],
        disruption["selector"],
        network["podSelector"],
        spread["labelSelector"],
    ]
    for selector in [*(each["matchLabels"] for each in selectors), service["spec"]["selector"]]:
        assert selector and selector.items() <= labels.items()
    (given,) = read("base/kustomization.yaml")["labels"]  # to the Service, which the monitor looks for
    assert monitor["spec"]["selector"]["matchLabels"] == given["pairs"]
    assert [each["port"] for each in monitor["spec"]["endpoints"]] == [
        each["name"] for each in service["spec"]["ports"]
    ]


def test_prometheus_knows_the_job_by_the_name_that_the_alerts_use() -> None:
    (endpoint,) = read("components/prometheus/servicemonitor.yaml")["spec"]["endpoints"]
    alerts = (ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml").read_text()
    (job,) = {each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"}
    assert set(re.findall(r'job="(\w+)"', alerts)) == {job}


def test_replicas_follow_a_metric_that_the_server_has() -> None:
    engine = Mock(spec=EngineClient, state="loading", restarts=0)
    type(engine).info = PropertyMock(side_effect=EngineUnavailable("it is loading"))
    names = {family.name for family in EngineMetrics(CollectorRegistry(), engine, "0").collect()}
    (metric,) = read("components/prometheus/horizontalpodautoscaler.yaml")["spec"]["metrics"]
    (rule,) = read("components/prometheus/adapter-values.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert rule["name"]["as"] in names and rule["seriesQuery"].startswith(rule["name"]["as"] + "{")


def test_the_gpu_is_asked_for_where_there_is_one() -> None:
    assert resources_of("gpu")["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in resources_of("cpu")["limits"]


def test_on_cpus_the_engine_is_told_what_it_has() -> None:
    settings, limits = settings_of("cpu"), resources_of("cpu")["limits"]
    assert settings["DISCO_THREADS"] == limits["cpu"]  # torch would count the node's
    assert int(settings["DISCO_KV_BLOCKS"]) > 0  # a share of memory would be of the node's
