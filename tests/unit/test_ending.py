"""A service that cannot go on ends with a line for each error, and a status that says whether a retry may help."""

import pytest

from services.common.config import ConfigError
from services.common.ending import ending_with
from services.common.store.connection import StoreUnavailable, StoreUnfit

FLAG, REDIS, CREDENTIALS = ConfigError("--n is 0"), StoreUnavailable("Redis is away"), StoreUnfit("wrong credentials")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FLAG, 78, ["--n is 0"]),
        (CREDENTIALS, 78, ["wrong credentials"]),
        (REDIS, 1, ["Redis is away"]),
        (ExceptionGroup("", [FLAG, ExceptionGroup("", [CREDENTIALS])]), 78, ["--n is 0", "wrong credentials"]),
        (ExceptionGroup("", [FLAG, ExceptionGroup("", [REDIS])]), 1, ["--n is 0", "Redis is away"]),
    ],
)
def test_errors_are_told_in_their_own_words(
    error: Exception, status: int, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, ending_with("service", ConfigError, StoreUnavailable, StoreUnfit):
        raise error
    assert ended.value.code == status
    assert capsys.readouterr().err.splitlines() == [f"service: {line}" for line in said]


def test_a_defect_passes() -> None:
    with pytest.raises(ZeroDivisionError), ending_with("service", ConfigError):
        raise ZeroDivisionError


def test_a_defect_hides_no_error_that_came_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExceptionGroup) as ended, ending_with("service", StoreUnavailable):
        raise ExceptionGroup("", [REDIS, ZeroDivisionError()])
    assert [type(error) for error in ended.value.exceptions] == [ZeroDivisionError]
    assert capsys.readouterr().err == "service: Redis is away\n"


def test_nothing_is_said_of_a_good_end(capsys: pytest.CaptureFixture[str]) -> None:
    with ending_with("service", ConfigError):
        pass
    assert capsys.readouterr().err == ""
