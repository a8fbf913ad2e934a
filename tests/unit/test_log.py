"""Log lines are JSON objects, and each that is about a request names it and its trace."""

import ast
import json
import logging
from pathlib import Path

import pytest

import services
from services.common import log
from services.common.ids import RequestKey
from services.common.telemetry.trace_context import is_traceparent, new_traceparent, trace_id_of
from services.common.telemetry.tracing import NoTracer
from services.gateway.identity import traceparent_of

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_line_about_a_request_names_it_and_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("gateway")
    try:
        logging.getLogger("x").info("accepted", extra={**log.about(RequestKey("default/a"), GIVEN), "reader": 1})
    finally:
        logging.basicConfig(handlers=[], force=True)
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["service"], line["request"]) == ("accepted", "gateway", "default/a")
    assert (line["trace_id"], line["reader"]) == ("0af7651916cd43dd8448eb211c80319c", 1)


def test_no_line_names_a_request_without_its_trace() -> None:
    """Every one goes through `about`: no other file of the services writes the field."""
    sources = Path(services.__path__[0]).rglob("*.py")
    writers = {source.name for source in sources if _writes_request_field(source)}
    assert writers == {"log.py"}


def _writes_request_field(source: Path) -> bool:
    dicts = (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Dict))
    return any(isinstance(key, ast.Constant) and key.value == "request" for each in dicts for key in each.keys)


def test_a_callers_trace_is_kept_and_one_without_gets_its_own() -> None:
    assert traceparent_of([("traceparent", GIVEN)]) == GIVEN
    assert NoTracer().begin("call", GIVEN).traceparent == GIVEN
    drawn = NoTracer().begin("call", traceparent_of([])).traceparent
    assert is_traceparent(drawn)
    assert drawn.endswith("-00"), "nobody asked for it to be recorded"
    assert trace_id_of(drawn) != trace_id_of(new_traceparent())


@pytest.mark.parametrize(
    "nonsense",
    ["", "x", GIVEN[:-1], GIVEN.upper(), "01" + GIVEN[2:], f"00-{'0' * 32}-b7ad6b7169203331-01", GIVEN + "\n"],
)
def test_what_is_no_trace_is_not_taken_for_one(nonsense: str) -> None:
    assert traceparent_of([("traceparent", nonsense)]) == ""
