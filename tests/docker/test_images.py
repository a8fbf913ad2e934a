"""What an image is: small, without root, with a health check, and without what its service does not need."""

import pytest

from tests.docker.images import BUILD_LIMIT_S, SERVICES, inspect, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(BUILD_LIMIT_S + 60)]

WITHOUT_TORCH = ("gateway", "tokenizer", "scheduler")
MAX_BYTES = 250_000_000


@pytest.mark.parametrize("service", WITHOUT_TORCH)
def test_it_has_at_most_250_mb(images: dict[str, str], service: str) -> None:
    assert inspect(images[service])["Size"] <= MAX_BYTES


@pytest.mark.parametrize("service", WITHOUT_TORCH)
def test_it_has_no_torch_and_nothing_to_install_it_with(images: dict[str, str], service: str) -> None:
    look = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('redis') is not None)"
    assert run("docker", "run", "--rm", "--entrypoint", "python", images[service], "-c", look).split() == [
        "None",
        "True",
    ]


@pytest.mark.parametrize("service", SERVICES)
def test_it_runs_as_nobody_special_and_is_probed(images: dict[str, str], service: str) -> None:
    config = inspect(images[service])["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "services.common.probe"]


@pytest.mark.parametrize("service", SERVICES)
def test_it_lists_its_flags_on_a_read_only_file_system(images: dict[str, str], service: str) -> None:
    assert "--listen" in run("docker", "run", "--rm", "--read-only", "--network", "none", images[service], "--help")


def test_a_worker_has_kernels_for_every_processor(images: dict[str, str]) -> None:
    kernels = "/app/services/worker/cpu_kernels/lib"
    found = run("docker", "run", "--rm", "--entrypoint", "ls", images["worker"], kernels).split()
    assert "generic.so" in found
