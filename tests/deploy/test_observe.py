"""What watches the fleet asks for what services register, reads every process, and nobody else reaches that port."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.telemetry.metrics import Metrics
from services.gateway.config import GatewayConfig
from services.gateway.metrics import GatewayMetrics
from services.scheduler.metrics import SchedulerMetrics
from services.tokenizer.metrics import TokenizerMetrics
from services.worker.front.metrics import WorkerMetrics
from tests.deploy.conftest import DEPLOY, ROOT, SERVICES, Manifests, pod_of, render
from tests.deploy.test_settings import composed_environment, configured, pod_environment

PORT = 9464
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
}
OWN_LABELS = {"le", "outcome", "reason", "state", "operation"}
SCRAPED_LABELS = {"job", "instance"}
"""Prometheus' own."""


def registered() -> set[str]:
    """Every sample name that a service has, whether it has counted anything or not."""
    names: set[str] = set()
    for register in (
        lambda metrics: GatewayMetrics(metrics, lambda: 0, lambda: 0.0),
        lambda metrics: TokenizerMetrics(metrics, lambda: 0),
        SchedulerMetrics,
        WorkerMetrics,
    ):
        metrics = Metrics()
        register(metrics)
        names |= {family.name + end for family in metrics.registry.collect() for end in SUFFIXES[family.type]}
    return names


def queries() -> Iterator[str]:
    """All queries of all dashboards."""
    for path in sorted((DEPLOY / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                yield target["expr"]


def test_dashboards_ask_only_for_what_is_registered() -> None:
    asked = {name for query in queries() for name in re.findall(r"\b(?:shoal|process)_\w+", query)}
    assert len(asked) > 20
    assert asked <= registered()


def test_dashboards_tell_apart_only_by_labels_that_there_are() -> None:
    groups = {
        label.strip() for query in queries() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")
    }
    selected = {label for query in queries() for label in re.findall(r"[{,]\s*(\w+)\s*[=!]", query)}
    assert groups | selected <= OWN_LABELS | SCRAPED_LABELS


def test_the_documentation_names_every_metric_and_no_other() -> None:
    chapter = (ROOT / "docs" / "operations.md").read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    told = set(re.findall(r"`(shoal_\w+)", chapter))
    known = {re.sub("_(bucket|count|sum)$", "", name) for name in registered() if name.startswith("shoal_")}
    assert told == known


def test_prometheus_takes_every_query_and_its_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    # As rules, since promtool checks these without a server; Grafana fills in the variable.
    rules = [{"record": f"r{n}", "expr": each.replace("$__rate_interval", "1m")} for n, each in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboards", "rules": rules}]}))
    for words in (("rules", tmp_path / "rules.yml"), ("config", DEPLOY / "compose" / "observe" / "prometheus.yml")):
        done = subprocess.run([promtool, "check", *words], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# Compose


def composed() -> dict[str, Any]:
    """docker-compose.yml."""
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text())
    return document


def test_composes_prometheus_reads_every_container_of_every_service() -> None:
    config = yaml.safe_load((DEPLOY / "compose" / "observe" / "prometheus.yml").read_text())
    read = {
        name: found["port"]
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert read == dict.fromkeys(SERVICES, PORT)
    services = composed()["services"]
    for service in SERVICES:
        assert configured(service, composed_environment(service)).config.metrics_port == PORT
        assert not any(str(PORT) in port for port in services[service].get("ports", [])), "not for clients"


def test_composes_observers_run_in_their_profile_only_and_are_reached_from_this_machine_only() -> None:
    services = composed()["services"]
    observers = {name: each for name, each in services.items() if "profiles" in each}
    assert observers.keys() == {"prometheus", "grafana", "collector", "jaeger"}
    for each in observers.values():
        assert each["profiles"] == ["observe"]
        assert all(port.startswith("127.0.0.1:") for port in each.get("ports", []))


def test_composes_traces_go_to_the_collector_where_the_profile_is_chosen() -> None:
    chosen = dict(
        line.split("=", 1)
        for line in (DEPLOY / "compose" / "observe.env").read_text().splitlines()
        if not line.startswith("#")
    )
    assert chosen["COMPOSE_PROFILES"] == "observe"
    host, _, port = chosen["SHOAL_OTLP_ENDPOINT"].removeprefix("http://").partition(":")
    assert host in composed()["services"]
    collector = yaml.safe_load((DEPLOY / "compose" / "observe" / "collector.yml").read_text())
    assert collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(f":{port}")
    for service in SERVICES:
        assert composed()["services"][service]["environment"]["SHOAL_OTLP_ENDPOINT"] == "${SHOAL_OTLP_ENDPOINT:-}"


def test_what_compose_mounts_is_there() -> None:
    for service in composed()["services"].values():
        for mount in service.get("volumes", []):
            if mount.startswith("."):
                assert (DEPLOY / "compose" / mount.split(":")[0]).exists(), mount


# Kubernetes


@pytest.mark.parametrize("service", SERVICES)
def test_a_pods_metrics_port_is_the_one_its_service_listens_on(manifests: Manifests, service: str) -> None:
    (container,) = pod_of(manifests.named("Deployment", service))["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["metrics"] == configured(service, pod_environment(manifests, service)).config.metrics_port == PORT


def test_no_service_leads_to_the_metrics_port(manifests: Manifests) -> None:
    for service in manifests.of_kind("Service"):
        assert all(port["targetPort"] not in ("metrics", PORT) for port in service["spec"]["ports"])


def test_only_prometheus_namespace_reaches_the_metrics_port(manifests: Manifests) -> None:
    """All else is refused by the policy `nothing-else`, as long as each rule names its ports."""
    assert manifests.named("NetworkPolicy", "nothing-else")["spec"]["podSelector"] == {}
    allowed = []
    for policy in manifests.of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert rule["ports"], "no rule opens every port"
            if {port["port"] for port in rule["ports"]} & {"metrics", PORT}:
                allowed += rule["from"]
    monitoring = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert allowed == (monitoring if manifests.is_for_gpus else [])


def test_prometheus_operator_finds_each_services_pods() -> None:
    manifests = render("gpu")
    (monitor,) = manifests.of_kind("PodMonitor")
    assert [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    label = monitor["spec"]["jobLabel"]
    assert {pod["spec"]["template"]["metadata"]["labels"][label] for pod in manifests.of_kind("Deployment")} == set(
        SERVICES
    )
    policies = {policy: manifests.named("NetworkPolicy", policy)["spec"] for policy in ("metrics", "traces")}
    for selector in (monitor["spec"]["selector"], *(policy["podSelector"] for policy in policies.values())):
        found = {
            workload["metadata"]["name"]
            for workload in manifests.workloads()
            if selector["matchLabels"].items() <= workload["spec"]["template"]["metadata"]["labels"].items()
        }
        assert found == set(SERVICES)


def test_traces_may_leave_for_where_they_are_sent() -> None:
    manifests = render("gpu")
    config: GatewayConfig = configured("gateway", pod_environment(manifests, "gateway")).config
    host, _, port = config.otlp_endpoint.removeprefix("http://").partition(":")
    (rule,) = manifests.named("NetworkPolicy", "traces")["spec"]["egress"]
    assert rule["ports"] == [{"port": int(port)}]
    namespace = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": host.split(".")[1]}}}
    assert rule["to"] == [namespace]
