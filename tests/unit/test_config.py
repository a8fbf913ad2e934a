"""What a service prints of its configuration."""

import pytest

from services.common.config import parse, without_password
from services.common.ending import UNFIT_STATUS
from services.scheduler.config import SchedulerConfig


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@redis:6379/0", "redis://***@redis:6379/0"),
        ("rediss://:se@cret@redis:6379", "rediss://***@redis:6379"),
        ("redis://redis:6379", "redis://redis:6379"),
        ("someone@example", "someone@example"),
    ],
)
def test_a_password_in_a_url_is_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
    if url.startswith("redis"):
        described = parse(SchedulerConfig, "scheduler", ["--redis-url", url], {}).describe()
        assert described["redis_url"] == f"{shown} (flag)"


def test_a_level_that_logs_do_not_have_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"SHOAL_REDIS_URL": "redis://redis:6379", "SHOAL_LOG_LEVEL": "debug"}
    with pytest.raises(SystemExit) as ended:
        parse(SchedulerConfig, "scheduler", [], environ)
    assert ended.value.code == UNFIT_STATUS
    said = "scheduler: --log-level is 'debug'; expected one of DEBUG, INFO, WARNING, ERROR\n"
    assert capsys.readouterr().err == said
