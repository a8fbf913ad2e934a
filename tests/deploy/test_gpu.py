"""What is deployed on GPUs tells its workers to use them."""

import pytest
import yaml

from services.worker.config import WorkerConfig
from services.worker.front.engine_client import engine_config
from tests.deploy.conftest import DEPLOY, image_environment, pod_of, render
from tests.deploy.test_settings import configured, pod_environment


@pytest.mark.parametrize(("overlay", "num_gpus"), [("gpu", "1"), ("gpu-shards", "2")])
def test_workers_of_the_overlay_take_their_gpus_memory_and_write_where_they_may(overlay: str, num_gpus: str) -> None:
    manifests = render(overlay)
    environment = pod_environment(manifests, "worker")
    config: WorkerConfig = configured("worker", environment).config
    config.check()
    assert (config.device, engine_config(config, 3).kv_cache_bytes) == ("cuda", 0)
    (container,) = pod_of(manifests.named("Deployment", "worker"))["containers"]
    assert environment["TRITON_CACHE_DIR"] in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == num_gpus


def test_composes_gpu_file_does_the_same() -> None:
    worker = yaml.safe_load((DEPLOY / "compose" / "gpu.yml").read_text())["services"]["worker"]
    config: WorkerConfig = configured("worker", image_environment("worker") | worker["environment"]).config
    config.check()
    assert config.device == "cuda"
    assert worker["volumes"] == [f"triton:{worker['environment']['TRITON_CACHE_DIR']}"]
    assert worker["shm_size"] == "1gb", "for NCCL, if it is sharded"
