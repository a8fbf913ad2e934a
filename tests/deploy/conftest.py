"""The manifests as kustomize renders them, and what the images already set."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("cpu", "gpu", "cpu-shards", "gpu-shards", "cpu-tls")
SERVICES = ("gateway", "tokenizer", "scheduler", "worker")


@dataclass(frozen=True, slots=True)
class Manifests:
    """All objects of one overlay."""

    overlay: str
    objects: tuple[dict[str, Any], ...]

    @property
    def is_for_gpus(self) -> bool:
        """Whether it is for a cluster with GPUs, KEDA, Prometheus and a Redis that is there already."""
        return self.overlay.startswith("gpu")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str) -> dict[str, Any]:
        """The one object of this name; raises ValueError unless there is exactly one."""
        (found,) = [each for each in self.of_kind(kind) if each["metadata"]["name"] == name]
        return found

    def workloads(self) -> list[dict[str, Any]]:
        """What makes pods."""
        return [*self.of_kind("Deployment"), *self.of_kind("StatefulSet")]


@cache
def render(overlay: str) -> Manifests:
    folder = DEPLOY / "kubernetes" / "overlays" / overlay
    kubectl = Path(sys.executable).with_name("kubectl")  # of a package in the same environment
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return Manifests(overlay, tuple(yaml.safe_load_all(done.stdout)))


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return render(request.param)


def pod_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def image_environment(service: str) -> dict[str, str]:
    """The SHOAL_ variables that a service's image sets, out of the Dockerfile."""
    stages = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    (common,) = [stage for stage in stages if re.match(r"\S+ AS service\n", stage)]
    (own,) = [stage for stage in stages if re.match(rf"service AS {service}\n", stage)]
    return dict(re.findall(r"(SHOAL_\w+)=(\S+)", common + own))
