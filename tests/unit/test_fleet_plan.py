"""What `shoal up` decides before it starts anything."""

import random
import socket
from pathlib import Path

import pytest

from shoal.fleet.certificates import make_certificates
from shoal.fleet.errors import FleetError
from shoal.fleet.kind import Kind
from shoal.fleet.options import FleetOptions
from shoal.fleet.plan import ProcessPlan, plan_fleet
from shoal.fleet.ports import choose_ports
from shoal.fleet.state_dir import StateDir


def flags(process: ProcessPlan) -> dict[str, str]:
    """`--name value` pairs of a command line."""
    words = process.command
    return {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}


@pytest.mark.parametrize(
    ("file", "pool"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("Llama-3.2-1B-Instruct-Q8_0.gguf", "llama-3.2-1b-instruct"),
        ("model-f16.gguf", "model"),
        ("my model.gguf", "my-model"),
        ("iq4_xs.gguf", "iq4_xs"),
        ("models/Qwen2.5-0.5B", "qwen2.5-0.5b"),
    ],
)
def test_the_model_is_named_after_its_file_or_folder(file: str, pool: str) -> None:
    assert FleetOptions(Path(file)).pool == pool


def test_processes_know_each_other(tmp_path: Path) -> None:
    options = FleetOptions(Path("/m.gguf"), workers=2, gateways=2, schedulers=2, tokenizers=2)
    plan = plan_fleet(options, StateDir(tmp_path), random.Random(1))
    assert plan.redis is not None
    kinds = [process.kind for process in plan.services]
    assert all(kinds.count(kind) == 2 for kind in (Kind.WORKER, Kind.TOKENIZER, Kind.SCHEDULER, Kind.GATEWAY))
    tokenizers = ",".join(process.address for process in plan.services if process.kind is Kind.TOKENIZER)
    for process in plan.services:
        given = flags(process)
        assert (given["--listen"], given["--pool"]) == (process.address, "m")
        if process.kind is not Kind.TOKENIZER:
            assert given["--redis-url"] == f"redis://{plan.redis.address}"
        if process.kind is Kind.GATEWAY:
            assert given["--tokenizers"] == tokenizers
    listening = [process.address for process in (*plan.services, plan.redis)]
    for process in plan.services:
        if process.kind is Kind.GATEWAY:
            assert flags(process)["--http-listen"] == process.http_address
            listening += [process.http_address, flags(process)["--fleet-listen"]]
        else:
            assert not process.http_address
    assert len(set(listening)) == len(listening)


def test_workers_beyond_the_least_are_spare_and_schedulers_know_both_bounds(tmp_path: Path) -> None:
    options = FleetOptions(Path("/m.gguf"), workers=1, spare_workers=2, schedulers=2)
    plan = plan_fleet(options, StateDir(tmp_path), random.Random(1))
    assert plan.spare is not None
    assert [process.name for process in plan.services if process.kind is Kind.WORKER] == ["worker-0"]
    assert [process.name for process in plan.spare.workers] == ["worker-1", "worker-2"]
    schedulers = [process for process in plan.services if process.kind is Kind.SCHEDULER]
    assert plan.spare.schedulers == tuple(scheduler.address for scheduler in schedulers)
    for scheduler in schedulers:
        assert (flags(scheduler)["--min-workers"], flags(scheduler)["--max-workers"]) == ("1", "3")
    assert plan_fleet(FleetOptions(Path("/m.gguf")), StateDir(tmp_path), random.Random(1)).spare is None


def test_the_embedded_redis_keeps_what_it_is_given(tmp_path: Path) -> None:
    plan = plan_fleet(FleetOptions(Path("/m.gguf"), data_dir=tmp_path / "data"), StateDir(tmp_path), random.Random(1))
    assert plan.redis is not None
    given = flags(plan.redis)
    assert (given["--appendonly"], given["--maxmemory-policy"]) == ("yes", "noeviction")
    assert given["--dir"] == str(tmp_path / "data")
    assert given["--bind"] == "127.0.0.1"


def test_a_redis_of_the_users_own_is_not_started(tmp_path: Path) -> None:
    plan = plan_fleet(FleetOptions(Path("/m.gguf"), redis_url="redis://r:1"), StateDir(tmp_path), random.Random(1))
    assert plan.redis is None
    assert flags(plan.services[0])["--redis-url"] == "redis://r:1"


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option in ("port", "http_port"):
            with pytest.raises(
                FleetError, match=f"port {port} is taken: choose another by --{option.replace('_', '-')}"
            ):
                plan_fleet(FleetOptions(Path("/m.gguf"), **{option: port}), StateDir(tmp_path), random.Random(1))


def test_chosen_ports_are_those_of_the_gateways_and_must_not_meet(tmp_path: Path) -> None:
    def gateways(first: int, first_http: int) -> list[tuple[str, str]]:
        options = FleetOptions(Path("/m.gguf"), gateways=2, port=first, http_port=first_http)
        plan = plan_fleet(options, StateDir(tmp_path), random.Random(1))
        return [(each.address, each.http_address) for each in plan.services if each.kind is Kind.GATEWAY]

    first, third = sorted(choose_ports(2, random.Random(2)))
    assert gateways(first, third) == [
        (f"127.0.0.1:{first}", f"127.0.0.1:{third}"),
        (f"127.0.0.1:{first + 1}", f"127.0.0.1:{third + 1}"),
    ]
    with pytest.raises(FleetError, match="--http-port"):
        gateways(first, first + 1)


def test_ports_differ_and_are_free() -> None:
    ports = choose_ports(50, random.Random(1))
    assert len(set(ports)) == 50
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports[0]))


def test_one_fleet_a_directory(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert not state.is_locked()
    with state.lock():
        state.write({"pid": 1})
        assert state.is_locked()
        assert state.read() == {"pid": 1}
        with pytest.raises(FleetError, match="runs in"), StateDir(tmp_path).lock():
            pass
    assert not state.is_locked()
    assert state.read() is None


def test_with_tls_every_service_is_told_of_the_same_files(tmp_path: Path) -> None:
    tls = make_certificates(tmp_path / "tls")
    plan = plan_fleet(FleetOptions(Path("/m.gguf"), tls=tls), StateDir(tmp_path), random.Random(1))
    for process in plan.services:
        given = flags(process)
        assert given["--tls-ca"] == str(tls.ca)
        assert (given["--tls-certificate"], given["--tls-key"]) == (str(tls.certificate), str(tls.key))
    assert plan.tls is tls


def test_shards_are_the_workers_affair(tmp_path: Path) -> None:
    plan = plan_fleet(FleetOptions(Path("/m.gguf"), shards=3), StateDir(tmp_path), random.Random(1))
    told = {str(process.kind): process.command[-2:] for process in plan.services if "--shards" in process.command}
    assert told == {"worker": ("--shards", "3")}
