"""What a newcomer gets wrong is told in a line, and what to do with it."""

from pathlib import Path

import pytest

from services.common.model.location import default_model_path
from shoal.cli.program import main

MODEL = ["--model", str(default_model_path())]


def test_the_command_alone_tells_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "start a fleet on this machine" in said
    assert "tell what became of a request" in said


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_state_directory_that_cannot_be_made(
    detach: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_STATE_DIR", str(tmp_path / "file" / "state"))
    assert main(["up", *MODEL, *detach]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"shoal: the folder {tmp_path}/file/state/log can't be made: Not a directory; name another directory by "
        "SHOAL_STATE_DIR\n"
    )


def test_a_folder_of_data_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_STATE_DIR", str(tmp_path / "state"))
    assert main(["up", *MODEL, "--data-dir", str(tmp_path / "file" / "data")]) == 1
    assert "file/data can't be made: Not a directory; name another by --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "parts"), [("keys", "create|list|revoke"), ("bench", "serve|engine|profile")])
def test_a_command_of_parts_alone_names_them(command: str, parts: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command])
    assert caught.value.code == 2
    assert parts in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("up", "--workers", "two"), "--workers: 'two' is not a whole number from 1 to 64"),
        (("up", "--workers", "٣"), "--workers: '٣' is not a whole number from 1 to 64"),
        (("up", "--workers", "0"), "--workers: '0' is not a whole number from 1 to 64"),
        (("up", "--port", "65001"), "--port: '65001' is not a whole number from 0 to 65000"),
        (("up", "--autoscale", "3:1"), "--autoscale: '3:1' is not MIN:MAX, as 1:4"),
        (("keys", "create", "--max-in-flight", "-1"), "--max-in-flight: '-1' is not a whole number from 1 to 1000000"),
        (("top", "--interval-s", "soon"), "--interval-s: 'soon' is not a number from 0.1 to 3600"),
        (("generate", "--logit-bias", "7"), "--logit-bias: '7' is not ID=BIAS, as 42=-1.5"),
    ],
)
def test_a_flags_value_that_cannot_be_is_told_with_what_could_be(
    command: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
