"""deploy/kubernetes, rendered: valid for two versions of Kubernetes, hardened, and consistent in itself."""

import tomllib
from collections.abc import Mapping
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from services.common.config import parse
from services.common.probe import ProbeConfig
from tests.deploy.conftest import DEPLOY, OVERLAYS, ROOT, SERVICES, Manifests, pod_of, render

VERSIONS = ("1.34", "1.37")
FOREIGN = {"ScaledObject", "PodMonitor"}
"""Kinds of CustomResourceDefinitions: no schema of Kubernetes' own has them."""
SCALED_OBJECT_SPEC = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
        "minReplicaCount": {"type": "integer", "minimum": 0},
        "maxReplicaCount": {"type": "integer", "minimum": 1},
        "cooldownPeriod": {"type": "integer", "minimum": 0},
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "horizontalPodAutoscalerConfig": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"behavior": {"type": "object"}},
                }
            },
        },
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "metadata"],
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": ["external", "external-push"]},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                    "metadata": {
                        "type": "object",
                        "required": ["scalerAddress"],
                        "additionalProperties": {"type": "string"},
                    },
                },
            },
        },
    },
}
"""The fields of KEDA's ScaledObject (keda.sh/v1alpha1) that are used here, in our own words: strict, unlike the CRD."""
POD_MONITOR_SPEC = {
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "jobLabel": {"type": "string"},
        "selector": {
            "type": "object",
            "required": ["matchLabels"],
            "additionalProperties": False,
            "properties": {"matchLabels": {"type": "object"}},
        },
        "podMetricsEndpoints": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"port": {"type": "string"}, "interval": {"type": "string", "pattern": "^[0-9]+s$"}},
            },
        },
    },
}
"""The same of the Prometheus Operator's PodMonitor (monitoring.coreos.com/v1)."""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_strictly_valid(manifests: Manifests, version: str) -> None:
    validated = [each for each in manifests.objects if each["kind"] not in FOREIGN]
    assert len(validated) > 15
    for each in validated:
        assert kubernetes_validate.validate(each, version, strict=True) == version


def test_the_validation_is_strict() -> None:
    gateway = render("cpu").named("Deployment", "gateway")
    misspelt = {**gateway, "spec": {**gateway["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(misspelt, VERSIONS[0], strict=True)


def test_workers_are_scaled_by_the_schedulers_word() -> None:
    manifests = render("gpu")
    scaled = manifests.named("ScaledObject", "worker")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    jsonschema.Draft202012Validator(SCALED_OBJECT_SPEC).validate(scaled["spec"])
    _check_behavior(scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"])
    worker = manifests.named("Deployment", scaled["spec"]["scaleTargetRef"]["name"])
    assert "replicas" not in worker["spec"], "`kubectl apply` would set back what KEDA has set"
    (trigger,) = scaled["spec"]["triggers"]
    host, _, port = trigger["metadata"]["scalerAddress"].partition(":")
    service = manifests.named("Service", host.split(".")[0])
    assert int(port) in [each["port"] for each in service["spec"]["ports"]]


def test_pods_are_scraped_as_the_prometheus_operator_is_told() -> None:
    (monitor,) = render("gpu").of_kind("PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    jsonschema.Draft202012Validator(POD_MONITOR_SPEC).validate(monitor["spec"])


def _check_behavior(behavior: Mapping[str, Any]) -> None:
    """KEDA hands it on to a HorizontalPodAutoscaler, whose schema is Kubernetes' own."""
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "worker"},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "worker"}, "maxReplicas": 1, "behavior": behavior},
    }
    kubernetes_validate.validate(scaler, VERSIONS[0], strict=True)


def test_everything_is_in_one_namespace(manifests: Manifests) -> None:
    outside = [each["metadata"]["name"] for each in manifests.objects if each["metadata"].get("namespace") != "shoal"]
    assert outside == ["shoal"]  # the namespace itself


def test_no_pod_may_more_than_anybody(manifests: Manifests) -> None:
    for workload in manifests.workloads():
        pod = pod_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_pod_says_what_it_needs_and_how_it_fares(manifests: Manifests) -> None:
    for workload in manifests.workloads():
        for container in pod_of(workload)["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert {"readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_probed_over_grpc_and_lives_while_it_only_waits(manifests: Manifests, service: str) -> None:
    (container,) = pod_of(manifests.named("Deployment", service))["containers"]
    assert asked_for(container["readinessProbe"]) == ""
    assert asked_for(container["livenessProbe"]) == asked_for(container["startupProbe"]) == "live"


def asked_for(probe: Mapping[str, Any]) -> str:
    """The name in gRPC's health that a probe asks for: the kubelet's own or, where there is TLS, a client's."""
    if "grpc" in probe:
        assert probe["grpc"]["port"] == 50051
        return str(probe["grpc"].get("service", ""))
    python, module, name, *flags = probe["exec"]["command"]
    assert (python, module, name) == ("python", "-m", "services.common.probe")
    config = parse(ProbeConfig, name, flags, {"SHOAL_LISTEN": "0.0.0.0:50051"}).config
    assert probe["timeoutSeconds"] * 1000 > config.probe_timeout_ms
    return config.health_name


@pytest.mark.parametrize("service", SERVICES)
def test_a_drained_node_takes_one_pod_of_a_service_at_a_time(manifests: Manifests, service: str) -> None:
    assert manifests.named("PodDisruptionBudget", service)["spec"]["maxUnavailable"] == 1


def test_every_selector_finds_pods_and_every_port_has_a_name_there(manifests: Manifests) -> None:
    pods = {
        workload["metadata"]["name"]: (
            workload["spec"]["template"]["metadata"]["labels"],
            {port["name"] for container in pod_of(workload)["containers"] for port in container["ports"]},
        )
        for workload in manifests.workloads()
    }

    def ports_of(labels: Mapping[str, str]) -> set[str]:
        """Of all pods with these labels."""
        found = [ports for theirs, ports in pods.values() if labels.items() <= theirs.items()]
        assert found, f"nothing has the labels {labels}"
        return set().union(*found)

    for service in manifests.of_kind("Service"):
        ports = ports_of(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in manifests.of_kind("PodDisruptionBudget"):
        ports_of(budget["spec"]["selector"]["matchLabels"])
    for policy in manifests.of_kind("NetworkPolicy"):
        own = ports_of(policy["spec"]["podSelector"].get("matchLabels", {}))
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= own, policy["metadata"]["name"]
        for rule in policy["spec"].get("egress", []):
            for peer in (each for each in rule.get("to", []) if "podSelector" in each):
                theirs = ports_of(peer["podSelector"]["matchLabels"])
                assert {port["port"] for port in rule["ports"]} <= theirs, policy["metadata"]["name"]


def test_each_way_of_a_request_is_open_at_both_ends(manifests: Manifests) -> None:
    """A client asks a gateway, that a tokenizer; a worker sends tokens to a gateway."""
    ways = {("gateway", "tokenizer", "grpc"), ("worker", "gateway", "fleet")}
    assert _opened(manifests, "egress", "to") == ways
    assert ways <= _opened(manifests, "ingress", "from")


def _opened(manifests: Manifests, direction: str, peers: str) -> set[tuple[str, str, Any]]:
    """Each (caller, called, port) between services that a policy names."""
    label = "app.kubernetes.io/name"
    found = set()
    for policy in manifests.of_kind("NetworkPolicy"):
        own = policy["spec"]["podSelector"].get("matchLabels", {}).get(label)
        for rule in policy["spec"].get(direction, []):
            for peer in rule.get(peers, []):
                other = peer.get("podSelector", {}).get("matchLabels", {}).get(label)
                if own and other:
                    ends = (own, other) if direction == "egress" else (other, own)
                    found |= {(*ends, port["port"]) for port in rule["ports"]}
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_have_the_projects_version(overlay: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    deployments = render(overlay).of_kind("Deployment")
    compose = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text())["services"]
    for service, deployment in ((each["metadata"]["name"], each) for each in deployments):
        (container,) = pod_of(deployment)["containers"]
        assert container["image"] == compose[service]["image"] == f"shoal-{service}:{version}"


def test_an_overlay_without_its_own_redis_brings_the_secret(manifests: Manifests) -> None:
    has_redis = bool(manifests.of_kind("StatefulSet"))
    assert has_redis == bool(manifests.of_kind("Secret"))
    assert has_redis != manifests.is_for_gpus
