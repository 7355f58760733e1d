"""The files that Ray Serve and KubeRay read. Without Ray only its own schema of them is not asked."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "ray"))

from disco_ray.arguments import Arguments

from server.settings import Settings

RAY = Path(__file__).parents[2] / "deploy" / "ray"
CONFIGS = ("serve.yaml", "serve-cpu.yaml")
HAS_RAY = importlib.util.find_spec("ray") is not None

# What KubeRay's API reference lists of ray.io/v1, as far as it is used here: a typo is no field.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"},
    "cluster": {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
    "autoscaler": {"upscalingMode", "idleTimeoutSeconds", "resources"},
    "head": {"rayStartParams", "template"},
    "worker": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def config(name: str) -> Any:
    return yaml.safe_load((RAY / name).read_text())


def application(name: str) -> Any:
    return config(name)["applications"][0]


def deployment(name: str, which: str) -> Any:
    return next(each for each in application(name)["deployments"] if each["name"] == which)


@pytest.fixture
def manifest() -> Any:
    return config("rayservice.yaml")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_server_takes_the_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Arguments.model_validate(application(name)["args"])
    assert Settings(**args.settings).target == args.settings["target"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_replica_is_given_as_many_requests_as_its_engine_runs(name: str) -> None:
    settings = Settings(**application(name)["args"]["settings"])
    given = deployment(name, "Replica").get("max_ongoing_requests", settings.max_num_seqs)
    assert given == settings.max_num_seqs
    autoscaling = deployment(name, "Replica").get("autoscaling_config")
    assert autoscaling is None or autoscaling["target_ongoing_requests"] < given


@pytest.mark.parametrize("name", CONFIGS)
def test_the_application_can_be_imported(name: str) -> None:
    module, _, attribute = application(name)["import_path"].partition(":")
    source = (RAY / Path(*module.split("."))).with_suffix(".py").read_text()
    assert f"def {attribute}(" in source
    assert {each["name"] for each in application(name)["deployments"]} == {"Front", "Replica"}
    assert "class Front:" in source and 'name="Replica"' in source


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install -e '.[ray]'")
@pytest.mark.parametrize("name", CONFIGS)
def test_ray_takes_the_config(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(config(name)).applications[0].name == "disco"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"settings": {"port": 8001}}, "port: Ray has the say"),
        ({"settings": {"host": "::", "metrics_port": 1}}, "host, metrics_port: Ray has the say"),
        ({"settings": {"max_sl": -1}}, "max_sl"),
        ({"settings": {"most_sequences": 3}}, "most_sequences"),
        ({"setting": {}}, "setting"),
        ({"metrics_port": 80}, "metrics_port"),
        ({"accept_seconds": 0}, "accept_seconds"),
        ({"affinity_slack": 0.9}, "affinity_slack"),
    ],
)
def test_arguments_that_cannot_work_are_refused_by_name(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        Arguments.model_validate(args)


def test_the_manifest_carries_the_config_file(manifest: Any) -> None:
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == config("serve.yaml")


def test_the_manifest_has_only_fields_that_kuberay_knows(manifest: Any) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    (worker,) = cluster["workerGroupSpecs"]
    found = {
        "": manifest,
        "spec": manifest["spec"],
        "cluster": cluster,
        "autoscaler": cluster["autoscalerOptions"],
        "head": cluster["headGroupSpec"],
        "worker": worker,
    }
    assert {where: set(part) for where, part in found.items()} == FIELDS
    for group in (cluster["headGroupSpec"], worker):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_a_worker_pod_holds_one_replica_and_can_be_scraped(manifest: Any) -> None:
    (worker,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    replica = deployment("serve.yaml", "Replica")
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert replica["ray_actor_options"]["num_gpus"] == 1
    assert worker["maxReplicas"] == replica["autoscaling_config"]["max_replicas"]
    assert pod["terminationGracePeriodSeconds"] > replica["graceful_shutdown_timeout_s"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    (endpoint,) = config("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert ports[endpoint["port"]] == application("serve.yaml")["args"]["metrics_port"]
    selector = config("podmonitor.yaml")["spec"]["selector"]["matchLabels"]
    assert selector.items() <= worker["template"]["metadata"]["labels"].items()


def test_every_pod_runs_without_privileges(manifest: Any) -> None:
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_image_has_the_ray_that_the_manifest_names(manifest: Any) -> None:
    named = manifest["spec"]["rayClusterConfig"]["rayVersion"]
    (installed,) = re.findall(r"ray\[serve\]==([\d.]+)", (RAY / "Dockerfile").read_text())
    assert installed == named
