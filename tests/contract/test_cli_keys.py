"""`shoal keys`: keys are made, listed and revoked; a key itself is told once."""

import json
from pathlib import Path

import pytest

from shoal.cli import main
from tests.conftest import RedisServer


def test_keys_are_made_listed_and_revoked(own_redis_server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--redis", own_redis_server.url)
    limits = ("--max-in-flight", "4", "--max-tokens-per-minute", "100000", "--expires-in", "90d")
    assert main(["keys", "create", "--tenant", "acme", *limits, *at]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["tenant"], made["max_in_flight"], made["max_tokens_per_minute"]) == ("acme", 4, 100_000)
    assert made["created_at"] < made["expires_at"]
    assert main(["keys", "create", "--tenant", "umbrella", *at]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["expires_at"] is None
    assert main(["keys", "list", *at]) == 0
    listed = capsys.readouterr().out
    assert [json.loads(line)["key_id"] for line in listed.splitlines()] == [made["key_id"], other["key_id"]]
    assert made["key"].split("_")[2] not in listed
    assert main(["keys", "revoke", made["key_id"], *at]) == 0
    assert main(["keys", "list", *at]) == 0
    assert made["key_id"] not in capsys.readouterr().out


def test_mistakes_say_what_to_do(
    own_redis_server: RedisServer, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_STATE_DIR", str(tmp_path))
    at = ("--redis", own_redis_server.url)
    for words, told in (
        (("create", "--tenant", "a/b", *at), "1 to 64 of"),
        (("revoke", "0123456789ab", *at), "shoal keys list"),
        (("list",), "shoal up"),
    ):
        assert main(["keys", *words]) == 1
        assert told in capsys.readouterr().err
    for flags, told in ((("--expires-in", "soon"), "one of s, m, h, d"), (("--max-in-flight", "0"), "1 to 1000000")):
        with pytest.raises(SystemExit):
            main(["keys", "create", "--tenant", "acme", *flags])
        assert told in capsys.readouterr().err
