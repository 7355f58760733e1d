"""Renders the overlays, and holds what comes out to the schemas and to itself.

    pip install -r deploy/kubernetes/requirements.txt && python deploy/kubernetes/check.py

Needs kubectl (its kustomize) and promtool on the PATH, and no cluster. Exits with 1 at the first fault.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator

HERE = Path(__file__).resolve().parent
OVERLAYS = ("gpu", "cpu")
VERSIONS = ("1.30", "1.37")  # of Kubernetes: an old one, and the newest that kubernetes-validate knows
CUSTOM = {"ServiceMonitor": prometheus_operator.ServiceMonitor}  # kinds that Kubernetes itself has not
CLUSTER_WIDE = {"Namespace"}

Document = dict[str, Any]


class Fault(Exception):
    """A manifest is not as it must be; the message says which and why."""


def run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise Fault(f"{command[0]} is not installed") from None
    if done.returncode:
        raise Fault(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def render(overlay: str) -> list[Document]:
    return list(yaml.safe_load_all(run("kubectl", "kustomize", str(HERE / "overlays" / overlay))))


def check_schema(document: Document) -> None:
    """Against Kubernetes' own schemas, strictly, or the operator's types."""
    kind, name = document["kind"], document["metadata"]["name"]
    if kind in CUSTOM:
        try:
            read = CUSTOM[kind].model_validate(document)
        except ValueError as error:
            raise Fault(f"{kind} {name}: {error}") from None
        kept = read.model_dump(by_alias=True, exclude_unset=True, mode="json")
        if unknown := sorted(set(_paths(document)) - set(_paths(kept))):
            raise Fault(f"{kind} {name}: unknown fields {unknown}")
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            raise Fault(f"{kind} {name}, Kubernetes {version}: {path}: {error.message}") from None


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}"
            yield from _paths(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, f"{path}[]")


class Rendered:
    """What one overlay gives, by kind: each kind is there once."""

    def __init__(self, documents: list[Document]) -> None:
        self.all = documents
        self._by_kind = {document["kind"]: document for document in documents}
        if len(self._by_kind) != len(documents):
            raise Fault("a kind is there twice")
        self.pod: Document = self["Deployment"]["spec"]["template"]
        (self.server,) = self.pod["spec"]["containers"]

    def __getitem__(self, kind: str) -> Document:
        return self._by_kind[kind]

    def __contains__(self, kind: str) -> bool:
        return kind in self._by_kind

    def check(self) -> None:
        """That the parts fit together."""
        for document in self.all:
            if document["kind"] not in CLUSTER_WIDE:
                self._same(document["kind"], document["metadata"].get("namespace"), self._name("Namespace"))
        labels = self.pod["metadata"]["labels"]
        for kind, field in (("Deployment", "selector"), ("PodDisruptionBudget", "selector"),
                            ("NetworkPolicy", "podSelector")):  # fmt: skip
            self._selects(kind, (self[kind]["spec"].get(field) or {}).get("matchLabels"), labels)
        self._selects("Service", self["Service"]["spec"].get("selector"), labels)
        (spread,) = self.pod["spec"]["topologySpreadConstraints"]
        self._selects("topology spread", spread["labelSelector"]["matchLabels"], labels)
        if "ServiceMonitor" in self:
            self._check_monitoring()
        self._check_references()
        self._check_ports()

    def _check_monitoring(self) -> None:
        monitor, service = self["ServiceMonitor"]["spec"], self["Service"]
        self._selects("ServiceMonitor", monitor["selector"]["matchLabels"], service["metadata"]["labels"])
        ports = {port["name"] for port in service["spec"]["ports"]}
        for endpoint in monitor["endpoints"]:
            self._within("ServiceMonitor's port", endpoint["port"], ports)
        target = self["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
        self._same("autoscaler's target", target["name"], self._name("Deployment"))

    def _check_references(self) -> None:
        spec = self.pod["spec"]
        self._same("service account", spec["serviceAccountName"], self._name("ServiceAccount"))
        (settings,) = self.server["envFrom"]
        self._same("settings", settings["configMapRef"]["name"], self._name("ConfigMap"))
        claims = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
        self._same("claims", [c["claimName"] for c in claims], [self._name("PersistentVolumeClaim")])
        volumes = {volume["name"] for volume in spec["volumes"]}
        self._same("mounts", {mount["name"] for mount in self.server["volumeMounts"]}, volumes)

    def _check_ports(self) -> None:
        names = {port["name"] for port in self.server["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            self._within(probe, self.server[probe]["httpGet"]["port"], names)
        for port in self["Service"]["spec"]["ports"]:
            self._within("Service", port["targetPort"], names)
        for rule in self["NetworkPolicy"]["spec"]["ingress"]:
            for port in rule["ports"]:
                self._within("NetworkPolicy", port["port"], names)

    def _name(self, kind: str) -> str:
        name: str = self[kind]["metadata"]["name"]
        return name

    def _same(self, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise Fault(f"{what}: {found!r}, not {wanted!r}")

    def _within(self, what: str, found: Any, wanted: set[Any]) -> None:
        if found not in wanted:
            raise Fault(f"{what}: {found!r} is not among {sorted(wanted)}")

    def _selects(self, what: str, selector: Mapping[str, str] | None, labels: Mapping[str, str]) -> None:
        if not selector or not selector.items() <= labels.items():
            raise Fault(f"{what} selects {selector}, and the labels are {labels}")


def check_adapter(metric: str) -> None:
    """The adapter's query, filled in as the adapter does, asked of a Prometheus with two pods' series."""
    values = yaml.safe_load((HERE / "components" / "prometheus" / "adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    if rule["name"]["as"] != metric:
        raise Fault(f"the autoscaler asks for {metric}, the adapter gives {rule['name']['as']}")
    parts = {"Series": metric, "LabelMatchers": 'namespace="n",pod=~"a|b"', "GroupBy": "pod"}
    query = rule["metricsQuery"]
    for name, text in parts.items():
        query = query.replace(f"<<.{name}>>", text)
    series = {"a": "4x8", "b": "0 0 0 0 8 8 8 8 8", "c": "9x8"}  # every 15 s
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": f'{metric}{{namespace="n",pod="{pod}"}}', "values": values}
                    for pod, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "80s",  # the minute before holds two zeros and two eights of b
                        "exp_samples": [
                            {"labels": '{pod="a"}', "value": 4},
                            {"labels": '{pod="b"}', "value": 4},
                        ],
                    }
                ],
            }
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test.yml"
        file.write_text(yaml.safe_dump(test))
        run("promtool", "test", "rules", str(file))


def main() -> int:
    try:
        for overlay in OVERLAYS:
            documents = render(overlay)
            for document in documents:
                check_schema(document)
            rendered = Rendered(documents)
            rendered.check()
            print(f"{overlay}: {', '.join(sorted(document['kind'] for document in documents))}: well")
            if "HorizontalPodAutoscaler" in rendered:
                (metric,) = rendered["HorizontalPodAutoscaler"]["spec"]["metrics"]
                check_adapter(metric["pods"]["metric"]["name"])
                print(f"{overlay}: the adapter's query gives what the autoscaler asks for")
    except Fault as fault:
        print(f"FAILED: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
