"""Configuration of a service: one frozen dataclass, from flags, SHOAL_ variables and defaults, in that order.

A service declares its fields once::

    @dataclass(frozen=True, slots=True)
    class GatewayConfig:
        redis_url: str = option("redis://127.0.0.1:6379", "where Redis is")
        backlog_limit: int = option(1000, "most requests waiting", minimum=1)

and calls `parse(GatewayConfig, "gateway")`. `--redis-url` and `SHOAL_REDIS_URL` then set the first field.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from services.common.ending import UnfitError, ending_with

T = TypeVar("T")


class ConfigError(UnfitError):
    """A value that cannot be used. The text names the flag, the value and the limit."""


def option(
    default: Any, help_text: str, *, minimum: float | None = None, maximum: float | None = None, secret: bool = False
) -> Any:
    """Declare a field with its help and limits. A `secret` value is printed as `***`. `...` as default: required."""
    metadata = {"help": help_text, "minimum": minimum, "maximum": maximum, "secret": secret}
    if default is ...:
        return field(kw_only=True, metadata=metadata)
    return field(kw_only=True, default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """A configuration and, for each field, where its value comes from: `flag`, `environment` or `default`."""

    config: T
    origins: Mapping[str, str]

    def describe(self) -> dict[str, str]:
        """Each field as `value (origin)`, secrets hidden: for the log line at start."""
        shown = {}
        for declared in fields(self.config):  # type: ignore[arg-type]
            value = str(getattr(self.config, declared.name))
            value = "***" if declared.metadata.get("secret") else without_password(value)
            shown[declared.name] = f"{value} ({self.origins[declared.name]})"
        return shown


def without_password(url: str) -> str:
    """A URL as it may be shown; any other text as it is."""
    return re.sub(r"(?<=://)[^/]*(?=@)", "***", url)


def parse(
    config_type: type[T], service: str, arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> Parsed[T]:
    """Read a service's configuration, or end the process with a line that says what is wrong.

    Flags win over `SHOAL_<FIELD>` variables, those over defaults. `--help` lists all of them.
    """
    parser = _parser(config_type, service)
    flags = vars(parser.parse_args(arguments))
    with ending_with(service, ConfigError):
        values, origins = _resolve(config_type, flags, os.environ if environ is None else environ)
        config = config_type(**values)
    return Parsed(config, origins)


def _parser(config_type: type[T], service: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m services.{service}", description=config_type.__doc__)
    for declared in fields(config_type):  # type: ignore[arg-type]
        default = "required" if declared.default is MISSING else f"default: {declared.default}"
        parser.add_argument(
            _flag(declared.name),
            dest=declared.name,
            metavar="VALUE",
            help=f"{declared.metadata['help']} ({default}; {_variable(declared.name)})".replace("%", "%%"),
        )
    return parser


def _resolve(
    config_type: type[T], flags: Mapping[str, str | None], environ: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of the fields that are set, and every field's origin."""
    hints = get_type_hints(config_type)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for declared in fields(config_type):  # type: ignore[arg-type]
        raw, origin = flags.get(declared.name), "flag"
        if raw is None:
            raw, origin = environ.get(_variable(declared.name)), "environment"
        if raw is not None:
            values[declared.name] = _convert(declared, raw, hints[declared.name])
            origins[declared.name] = origin
        elif declared.default is MISSING:
            about = declared.metadata["help"]
            raise ConfigError(f"{_flag(declared.name)} (or {_variable(declared.name)}) is required: {about}")
        else:
            origins[declared.name] = "default"
    return values, origins


def _convert(declared: "Field[Any]", raw: str, kind: Any) -> Any:
    flag = _flag(declared.name)
    if kind is bool:
        lowered = raw.lower()
        if lowered not in ("true", "false", "1", "0"):
            raise ConfigError(f"{flag} is {raw!r}; expected true or false")
        return lowered in ("true", "1")
    if kind in (str, Path):
        return kind(raw)
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ConfigError(f"{flag} is {raw!r}; expected one of {', '.join(get_args(kind))}")
        return raw
    try:
        number = kind(raw)
    except ValueError as error:
        raise ConfigError(f"{flag} is {raw!r}; expected {kind.__name__}") from error
    minimum, maximum = declared.metadata["minimum"], declared.metadata["maximum"]
    if minimum is not None and number < minimum:
        raise ConfigError(f"{flag} is {raw}; the least is {minimum}")
    if maximum is not None and number > maximum:
        raise ConfigError(f"{flag} is {raw}; the most is {maximum}")
    return number


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return "SHOAL_" + name.upper()
