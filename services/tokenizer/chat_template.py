"""Renders a conversation with the model's own template, as Hugging Face does, in a sandbox."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateError(Exception):
    """The template could not be compiled, or refuses a conversation; the text says why."""


class ChatTemplate:
    """A compiled chat template.

    Environment, filters and variables are those of `apply_chat_template` in transformers, so that templates written for
    it work here. `special_tokens` become variables: `bos_token`, `eos_token` and so on. `now` is the clock behind
    `strftime_now`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the model's chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render messages, oldest first, and an opening for the assistant's answer. Raises TemplateError."""
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:
            raise TemplateError(f"the model's chat template refuses this conversation: {error}") from error


def _to_json(value: object, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML's characters; a model should see them as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
