"""Structured logs: one JSON object a line on standard error.

`logging.getLogger(name).info("placed", extra={**about(key, traceparent), "worker": worker})`: fields of `extra` become
fields of the line. Prompts and answers are never logged.
"""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

from services.common.ids import RequestKey
from services.common.telemetry.trace_context import trace_id_of

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(service: str, level: str = "INFO") -> None:
    """Send all logging of this process to standard error, as JSON lines that name the service."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def about(key: RequestKey, traceparent: str) -> dict[str, object]:
    """The fields of every line that is about a request: its key, and the id of its trace."""
    return {"request": key, "trace_id": trace_id_of(traceparent)}


class _JsonLines(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)
