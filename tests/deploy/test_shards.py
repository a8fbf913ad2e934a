"""A sharded worker is one pod, or one container: each of its processes has what it computes with."""

from typing import Any

import pytest

from services.worker.config import WorkerConfig
from tests.deploy.conftest import Manifests, pod_of, render
from tests.deploy.test_settings import composed_environment, configured, pod_environment

SHARDED = ("cpu-shards", "gpu-shards")


def shards(manifests: Manifests) -> int:
    config: WorkerConfig = configured("worker", pod_environment(manifests, "worker")).config
    return config.shards


def worker_container(manifests: Manifests) -> dict[str, Any]:
    """The only one of a worker's pod."""
    (container,) = pod_of(manifests.named("Deployment", "worker"))["containers"]
    return dict(container)


def test_a_worker_is_sharded_where_the_overlay_says_so(manifests: Manifests) -> None:
    assert (shards(manifests) > 1) == (manifests.overlay in SHARDED)


@pytest.mark.parametrize("overlay", SHARDED)
def test_each_process_has_a_core_and_a_thread_of_its_own(overlay: str) -> None:
    """They meet in each layer: one that waits for a core holds up all."""
    manifests = render(overlay)
    config: WorkerConfig = configured("worker", pod_environment(manifests, "worker")).config
    assert int(worker_container(manifests)["resources"]["requests"]["cpu"]) >= config.shards
    assert config.threads >= config.shards


def test_each_process_has_a_gpu_where_there_are_some(manifests: Manifests) -> None:
    limits = worker_container(manifests)["resources"]["limits"]
    assert int(limits.get("nvidia.com/gpu", 0)) == (shards(manifests) if manifests.is_for_gpus else 0)


def test_nccls_processes_have_memory_to_meet_in(manifests: Manifests) -> None:
    """Processes on the CPU share memory without a name: tests/docker sees that they leave /dev/shm alone."""
    pod = pod_of(manifests.named("Deployment", "worker"))
    mounted = [
        mount["name"] for mount in worker_container(manifests)["volumeMounts"] if mount["mountPath"] == "/dev/shm"
    ]
    volumes = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] in mounted]
    expected = [{"medium": "Memory", "sizeLimit": "1Gi"}] if manifests.overlay == "gpu-shards" else []
    assert volumes == expected


def test_composes_worker_takes_the_number_of_its_user() -> None:
    config: WorkerConfig = configured("worker", composed_environment("worker", SHOAL_SHARDS="2")).config
    assert config.shards == 2
