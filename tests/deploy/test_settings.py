"""What manifests and compose set is what the services know: one typed configuration, services/*/config.py."""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common.config import Parsed, parse
from services.common.probe import ProbeConfig
from services.gateway.config import GatewayConfig
from services.scheduler.config import SchedulerConfig
from services.tokenizer.config import TokenizerConfig
from services.worker.config import WorkerConfig
from shoal.fleet.certificates import make_certificates
from tests.deploy.conftest import DEPLOY, SERVICES, Manifests, image_environment, pod_of, render

CONFIGS: Mapping[str, type[Any]] = {
    "gateway": GatewayConfig,
    "tokenizer": TokenizerConfig,
    "scheduler": SchedulerConfig,
    "worker": WorkerConfig,
}
CLUSTER = {"status.podIP": "10.0.0.7", "shoal-redis/url": "redis://redis:6379"}
"""What a cluster would put in: fields of a pod, and Secrets."""
TLS_FOLDER = "/tls/"


def configured(service: str, environment: Mapping[str, str]) -> Parsed[Any]:
    """The service's configuration. Fails if a variable is not one of its fields, is missing, or cannot be used."""
    ours = {name for name in environment if name.startswith("SHOAL_")}
    known = {f"SHOAL_{declared.name.upper()}" for declared in fields(CONFIGS[service])}
    assert ours <= known, f"{service} does not know {sorted(ours - known)}"
    return parse(CONFIGS[service], service, [], environment)


def pod_environment(manifests: Manifests, service: str, tls: Path | None = None) -> dict[str, str]:
    """A container's variables, as a cluster resolves them. `tls`: what is at /tls; None: without the files there."""
    (container,) = pod_of(manifests.named("Deployment", service))["containers"]
    environment = image_environment(service)
    for source in container["envFrom"]:
        environment |= manifests.named("ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        environment[variable["name"]] = _value(variable, environment, container)
    if tls is None:
        return {name: value for name, value in environment.items() if not value.startswith(TLS_FOLDER)}
    return {name: value.replace(TLS_FOLDER, f"{tls}/") for name, value in environment.items()}


def composed_environment(service: str, **users: str) -> dict[str, str]:
    """A container's variables, as Compose resolves them, where its user has set these."""
    composed = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text())["services"][service]
    given = {
        name: re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: users.get(found[1]) or found[2], value)
        for name, value in composed.get("environment", {}).items()
    }
    return image_environment(service) | given


def _value(variable: Mapping[str, Any], earlier: Mapping[str, str], container: Mapping[str, Any]) -> str:
    source = variable.get("valueFrom", {})
    if "fieldRef" in source:
        return CLUSTER[source["fieldRef"]["fieldPath"]]
    if "resourceFieldRef" in source:
        kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
        return str(container["resources"][kind][resource])
    if "secretKeyRef" in source:
        return CLUSTER[f"{source['secretKeyRef']['name']}/{source['secretKeyRef']['key']}"]
    value = str(variable["value"])
    for name, known in earlier.items():
        value = value.replace(f"$({name})", known)
    return value


@pytest.mark.parametrize("service", SERVICES)
def test_a_pods_variables_make_a_whole_configuration(manifests: Manifests, service: str) -> None:
    config = configured(service, pod_environment(manifests, service)).config
    assert config.listen == "0.0.0.0:50051"


@pytest.mark.parametrize("service", SERVICES)
def test_composes_variables_make_a_whole_configuration(service: str) -> None:
    configured(service, composed_environment(service))


def test_workers_reach_the_gateways_own_pod(manifests: Manifests) -> None:
    config: GatewayConfig = configured("gateway", pod_environment(manifests, "gateway")).config
    assert config.advertised(config.fleet_listen) == "10.0.0.7:50052"


def test_a_container_starts_no_more_threads_than_it_may_use(manifests: Manifests) -> None:
    """Inside a limit a process still sees every core of its node."""
    for service, setting in (("worker", "threads"), ("tokenizer", "processes")):
        (container,) = pod_of(manifests.named("Deployment", service))["containers"]
        config = configured(service, pod_environment(manifests, service)).config
        assert getattr(config, setting) == int(container["resources"]["limits"]["cpu"])


@pytest.mark.parametrize(("service", "drain"), [("gateway", "drain_ms"), ("tokenizer", "stop_grace_ms")])
def test_a_pods_grace_covers_its_drain(manifests: Manifests, service: str, drain: str) -> None:
    pod = pod_of(manifests.named("Deployment", service))
    (container,) = pod["containers"]
    drain_s = getattr(configured(service, pod_environment(manifests, service)).config, drain) / 1000
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    last_words_s = 5
    assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + last_words_s


@pytest.mark.parametrize("service", SERVICES)
def test_with_tls_a_service_and_its_probes_have_the_secrets_files(service: str, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    for name, path in (("ca.crt", made.ca), ("tls.crt", made.certificate), ("tls.key", made.key)):
        Path(str(path)).rename(tmp_path / name)
    manifests = render("cpu-tls")
    environment = pod_environment(manifests, service, tmp_path)
    tls = configured(service, environment).config.fleet_tls()
    assert (tls.files.ca_pem, tls.files.key_pem) == (made.ca_pem, made.key_pem)
    assert parse(ProbeConfig, "common.probe", [], environment).config.asking_tls() == tls.files
    pod = pod_of(manifests.named("Deployment", service))
    (container,) = pod["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == TLS_FOLDER.rstrip("/")]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert volume["secret"] == {"secretName": "shoal-tls"}


def test_keda_has_the_schedulers_limits() -> None:
    manifests = render("gpu")
    scaled = manifests.named("ScaledObject", "worker")["spec"]
    scheduler: SchedulerConfig = configured("scheduler", pod_environment(manifests, "scheduler")).config
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (scheduler.min_workers, scheduler.max_workers)
