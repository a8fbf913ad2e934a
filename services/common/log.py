"""Structured logs: one JSON object a line on standard error.

`logging.getLogger(name).info("placed", extra={**about(key, traceparent), "worker": worker})`: fields of `extra` become
fields of the line. Prompts and answers are never logged, unless `--log-prompts true` asks for it. An error that nobody
foresaw may quote one in its text, so its text is left out too: its type and the lines of code that it passed are told.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType

from services.common.ids import RequestKey
from services.common.telemetry.trace_context import trace_id_of

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TO_JSON = json.JSONEncoder(default=str)
_HIDDEN = "(its text may quote a prompt: --log-prompts true shows it)"


def configure(service: str, level: str = "INFO", *, log_prompts: bool = False) -> None:
    """Send all logging of this process, and what ends it, to standard error, as JSON lines that name the service."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(service, log_prompts))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Shown in no line, and a quarter of what one costs (Python's Logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    sys.excepthook = _log_end


def described(error: BaseException, *, with_text: bool) -> str:
    """An error and what led to it, as Python shows it; without `with_text`, only texts that quote no input.

    Those are of errors of the system, and of classes that say so by `shown_in_logs`. Notes are always told: they are
    ours.
    """
    if with_text:
        return "".join(traceback.format_exception(error))
    return "\n".join(_without_texts(error))


def _without_texts(error: BaseException) -> Iterator[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _without_texts(cause)
        yield "which led to:"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    shown = isinstance(error, OSError) or getattr(error, "shown_in_logs", False)
    yield f"{type(error).__qualname__}: {error if shown else _HIDDEN}"
    yield from getattr(error, "__notes__", ())
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _without_texts(each)


def _log_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger(__name__).critical("the process ends by an error", exc_info=error)


def about(key: RequestKey, traceparent: str) -> dict[str, object]:
    """The fields of every line that is about a request: its key, and the id of its trace."""
    return {"request": key, "trace_id": trace_id_of(traceparent)}


class _JsonLines(logging.Formatter):
    def __init__(self, service: str, log_prompts: bool) -> None:
        super().__init__()
        self._service = service
        self._log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = described(record.exc_info[1], with_text=self._log_prompts)
        return _TO_JSON.encode(line)
