"""The manifests for Kubernetes: of the right form, and of one mind with each other and with us."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import capacity
import jsonschema
import kubernetes_validate
import pytest
import yaml

from llmproxy import config
from llmproxy.metrics import Metrics
from llmproxy.proxy import PATIENCE_S

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = Path(__file__).parent.parent / "deploy" / "kubernetes"
#: The oldest minor version that knows all fields: `sleep` as a hook is on by default since 1.30.
VERSION = "1.30"

# What the Prometheus operator's schema (monitoring.coreos.com/v1) says of the fields that we use.
SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["selector", "endpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "matchLabels": {
                            "type": "object",
                            "additionalProperties": {"type": "string"},
                        }
                    },
                },
                "endpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h))+$"},
                        },
                    },
                },
            },
        },
    },
}


def documents() -> Iterator[tuple[str, Any]]:
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            named = document.get("metadata", {}).get("name")
            yield f"{path.name} {document['kind']} {named}", document


DOCUMENTS = dict(documents())


def only(kind: str, name: str = "llmproxy") -> Any:
    found = [d for d in DOCUMENTS.values() if d["kind"] == kind and d["metadata"]["name"] == name]
    assert len(found) == 1, kind
    return found[0]


def pod() -> Any:
    return only("StatefulSet")["spec"]["template"]


def container() -> Any:
    (found,) = pod()["spec"]["containers"]
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_manifest_is_of_its_kind_s_form(name: str) -> None:
    document = DOCUMENTS[name]
    if document["kind"] == "ServiceMonitor":
        jsonschema.validate(document, SERVICE_MONITOR)
    elif document["kind"] != "Kustomization":  # which only the command line tool reads
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_all_manifests_are_applied() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    (generated,) = kustomization["configMapGenerator"]
    assert all((FOLDER / name).exists() for name in generated["files"])
    volumes = {each["name"]: each for each in pod()["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == generated["name"]
    assert kustomization["images"][0]["name"] == container()["image"]


def test_everything_means_the_same_pods() -> None:
    labels = pod()["metadata"]["labels"]
    selectors = [
        only("StatefulSet")["spec"]["selector"]["matchLabels"],
        only("Service")["spec"]["selector"],
        only("Service", "llmproxy-pods")["spec"]["selector"],
        only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(
            each["labelSelector"]["matchLabels"]
            for each in pod()["spec"]["topologySpreadConstraints"]
        ),
    ]
    assert all(selector == labels for selector in selectors)
    target = only("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("StatefulSet", "llmproxy")
    assert only("StatefulSet")["spec"]["serviceName"] == "llmproxy-pods"


def test_prometheus_is_led_to_the_admin_sites_and_nobody_else_is() -> None:
    service = only("Service", "llmproxy-pods")
    monitor = only("ServiceMonitor")["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    assert not wanted <= only("Service")["metadata"]["labels"].items()
    assert {each["port"] for each in monitor["endpoints"]} == {"admin"}
    assert [each["targetPort"] for each in only("Service")["spec"]["ports"]] == ["http"]
    open_to_all = [each for each in only("NetworkPolicy")["spec"]["ingress"] if "from" not in each]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == ["http"]


def settings() -> config.Config:
    mapping = tomllib.loads((FOLDER / "config.toml").read_text())
    return config.parse(mapping, read_text=lambda path: "mongodb://host/")


def test_the_configuration_fits_the_pods() -> None:
    found = settings()
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert found.port == ports["http"]
    assert found.admin.listen == (f"tcp:{ports['admin']}",)
    mounts = {each["name"]: each["mountPath"] for each in container()["volumeMounts"]}
    assert str(found.ledger.path.parent) == mounts["data"]
    text = (FOLDER / "config.toml").read_text()
    secrets = re.findall(r'_file = "(.*)/(\w+)"', text)
    assert {folder for folder, _ in secrets} == {mounts["secrets"]}
    told = (FOLDER / "kustomization.yaml").read_text()
    assert all(f"--from-literal={name}=" in told for _, name in secrets)


def test_a_pod_has_the_time_that_it_takes_to_stop() -> None:
    pause = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = pause + settings().drain_deadline + PATIENCE_S
    assert pod()["spec"]["terminationGracePeriodSeconds"] >= needed


def in_bytes(quantity: str) -> float:
    units = {"Mi": 2**20, "Gi": 2**30}
    return float(quantity[:-2]) * units[quantity[-2:]]


def test_a_pod_has_room_for_the_streams_that_the_autoscaler_gives_it() -> None:
    pages = ((DOCS / name).read_text() for name in ("performance.md", "operations.md"))
    costs = capacity.costs_of(*pages)
    requests, cpu = only("HorizontalPodAutoscaler")["spec"]["metrics"]
    streams = int(requests["pods"]["target"]["averageValue"])
    rate = 20  # chunks/s, as the comment there has it
    # The two targets mean the same, by and large; figures of one machine are no closer.
    assert streams == pytest.approx(costs.streams_per_process(rate), rel=0.3)
    assert cpu["resource"]["target"]["averageUtilization"] == 100 * capacity.BUSY
    one = capacity.Fleet(costs, streams, rate)
    needed = one.memory_gib(costs.unread_kib) * 2**30 + 2 * 4 * settings().max_json_body
    assert in_bytes(container()["resources"]["requests"]["memory"]) > needed
    (claim,) = only("StatefulSet")["spec"]["volumeClaimTemplates"]
    days = in_bytes(claim["spec"]["resources"]["requests"]["storage"]) / 1e9 / one.journals_gb_a_day
    assert days > 30


def test_the_autoscaler_s_metric_exists() -> None:
    exposed = Metrics("0", []).exposition().decode()
    for each in only("HorizontalPodAutoscaler")["spec"]["metrics"]:
        if each["type"] == "Pods":
            assert f"# TYPE {each['pods']['metric']['name']} gauge" in exposed
