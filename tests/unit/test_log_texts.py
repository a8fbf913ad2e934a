"""Logs tell what went wrong, and not what was asked."""

import json
import logging
import subprocess
import sys

import pytest

from services.common.log import _JsonLines, described
from services.common.store.connection import StoreUnavailable

PROMPT = "the planted prompt"


def a_defect() -> Exception:
    try:
        try:
            raise KeyError(PROMPT)
        except KeyError as error:
            raise RuntimeError(f"cannot do {PROMPT}") from error
    except RuntimeError as error:
        return ExceptionGroup(PROMPT, [error])


def test_an_unforeseen_errors_text_is_left_out_and_its_place_is_told() -> None:
    told = described(a_defect(), with_text=False)
    assert PROMPT not in told
    for part in ("KeyError", "RuntimeError", "ExceptionGroup", "test_log_texts.py", "a_defect", "--log-prompts true"):
        assert part in told
    assert PROMPT in described(a_defect(), with_text=True)


def test_errors_of_the_store_and_the_system_and_notes_are_told_whole() -> None:
    error = StoreUnavailable("Redis cannot be used now")
    error.add_note("a note of ours")
    told = described(error, with_text=False)
    assert "StoreUnavailable: Redis cannot be used now\na note of ours" in told
    assert "No such file" in described(FileNotFoundError(2, "No such file"), with_text=False)


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_line_has_the_text_only_if_it_was_asked_for(log_prompts: bool) -> None:
    error = a_defect()
    record = logging.LogRecord("x", logging.ERROR, "", 0, "it failed", (), (type(error), error, None))
    line = json.loads(_JsonLines("gateway", log_prompts).format(record))
    assert line["message"] == "it failed"
    assert (PROMPT in line["exception"]) == log_prompts


def test_what_ends_a_process_is_a_line_too() -> None:
    code = f"from services.common import log; log.configure('worker'); raise ValueError({PROMPT!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["level"] == "critical"
    assert PROMPT not in json.loads(line)["exception"].replace(code, "")
