"""A fleet of the built images, by testcontainers: each container under its name in a network of its own."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

# Read when testcontainers is imported. Its reaper is an image to be pulled; here each container ends with its block.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"

from docker.models.containers import Container
from testcontainers.community.redis import RedisContainer
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

REDIS_IMAGE = "redis:7"
REDIS_COMMAND = "redis-server --appendonly yes --maxmemory-policy noeviction"
PUBLIC_PORT = 50051


def redis_container() -> RedisContainer:
    """A Redis as Shoal needs it; not started."""
    return RedisContainer(REDIS_IMAGE).with_command(REDIS_COMMAND)


class ContainerFleet:
    """Containers by their names: redis, tokenizer, scheduler, gateway, worker-0, worker-1."""

    def __init__(self, images: Mapping[str, str], resources: ExitStack) -> None:
        self._images = images
        self._resources = resources
        self._network = resources.enter_context(Network())
        self._containers: dict[str, DockerContainer] = {}

    def start(self) -> None:
        """Start all of them, in no order that they would need: each waits for what it calls."""
        self._start("redis", redis_container())
        redis = {"SHOAL_REDIS_URL": "redis://redis:6379"}
        for number in range(2):
            self._start(f"worker-{number}", self._service("worker", {**redis, "SHOAL_THREADS": "1"}))
        self._start("scheduler", self._service("scheduler", redis))
        joined = {"SHOAL_TOKENIZERS": "tokenizer:50051", "SHOAL_FLEET_ADDRESS": "gateway:50052"}
        gateway = self._service("gateway", {**redis, **joined}).with_exposed_ports(PUBLIC_PORT)
        self._start("gateway", gateway)
        self._start("tokenizer", self._service("tokenizer", {}))

    @property
    def address(self) -> str:
        """Of the gateway, for a client outside."""
        gateway = self._containers["gateway"]
        return f"{gateway.get_container_host_ip()}:{gateway.get_exposed_port(PUBLIC_PORT)}"

    def container(self, name: str) -> Container:
        """A container, to be killed or stopped."""
        return self._containers[name].get_wrapped_container()

    def running(self) -> list[str]:
        """The names of those that run, from the last that was started to the first."""
        containers = {name: self.container(name) for name in reversed(self._containers)}
        for container in containers.values():
            container.reload()
        return [name for name, container in containers.items() if container.status == "running"]

    def log(self, name: str) -> list[str]:
        """All that a container has said."""
        return b"".join(self._containers[name].get_logs()).decode(errors="replace").splitlines()

    def logs(self) -> str:
        """The end of what each container has said."""
        return "\n".join("\n".join([f"== {name}", *self.log(name)[-15:]]) for name in self._containers)

    def _service(self, service: str, settings: Mapping[str, str]) -> DockerContainer:
        # As the manifests run it: nothing is written but below /tmp, nothing is allowed but what anyone may do.
        hardened = {"read_only": True, "cap_drop": ["ALL"]}
        container = DockerContainer(self._images[service]).with_envs(**settings)
        return container.with_tmpfs_mount("/tmp").with_kwargs(**hardened)

    def _start(self, name: str, container: DockerContainer) -> None:
        container.with_network(self._network).with_network_aliases(name)
        self._containers[name] = self._resources.enter_context(container)


@contextmanager
def container_fleet(images: Mapping[str, str]) -> Iterator[ContainerFleet]:
    """A started fleet; all of it is gone when the block ends."""
    with ExitStack() as resources:
        fleet = ContainerFleet(images, resources)
        fleet.start()
        yield fleet
