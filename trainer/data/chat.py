"""Conversations as text by a tokenizer's chat template (Jinja, as in transformers), and what is learned of them.

Where the template marks what the model writes (`{% generation %}`), the marks are used. Elsewhere a turn is the
difference between the conversation up to it, asking for an answer, and the conversation with it; that is right only if
each is a beginning of the next, which is checked for every turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.failures import DataError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text holds them
_MARKED = re.compile(r"\{%-?\s*generation\b")

Span = tuple[int, int]  # characters


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, the markers of transformers."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class Chat:
    """Renders conversations.

    Args:
        template: of the tokenizer.
        special_tokens: `bos_token` and the like, which templates name.
        arguments: further variables of the template.
        loss_on: `assistant`, `last` or `all`.

    Raises:
        DataError: the template is no Jinja.
    """

    def __init__(self, template: str, special_tokens: dict[str, str], arguments: dict[str, Any], loss_on: str) -> None:
        # As in transformers, but without `strftime_now`: a text with today's date in it would change overnight
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template cannot be read: {error}") from error
        self._variables = {**special_tokens, **arguments}
        self._marked = bool(_MARKED.search(template))
        self._loss_on = loss_on

    def render(self, messages: Any, tools: Any = None, asking: bool = False) -> tuple[str, list[Span] | None]:
        """The text of a conversation, and the spans of characters in it that are learned, rising.

        With ``asking`` one that does not end with an answer is followed by what asks for it, and None is learned.

        Raises:
            ValueError: it is no conversation, or the template refuses it, or its turns cannot be told apart.
        """
        turns, tools = _conversation(messages), _parsed(tools, "tools")
        if asking and turns[-1]["role"] != "assistant":
            return self._text(turns, tools, True).replace(_OPEN, "").replace(_CLOSE, ""), None
        marked = self._text(turns, tools, False)
        text = marked.replace(_OPEN, "").replace(_CLOSE, "")
        if self._loss_on == "all":
            return text, [(0, len(text))]
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if self._marked:
            spans = _marked_spans(marked)
            if answers and not any(start < end for start, end in spans):
                raise ValueError("the chat template has generation markers, but marks nothing of this conversation")
            if self._loss_on == "last" and answers and answers[-1]:  # a turn may have several spans, or an empty one
                spans = spans[self._text(turns[: answers[-1]], tools, False).count(_OPEN) :]
            return text, [(start, end) for start, end in spans if start < end]
        return text, [self._span(turns, tools, text, i) for i in (answers[-1:] if self._loss_on == "last" else answers)]

    def _span(self, turns: list[dict[str, Any]], tools: Any, text: str, turn: int) -> Span:
        before = self._text(turns[:turn], tools, True)
        after = self._text(turns[: turn + 1], tools, False)
        if not after.startswith(before) or not text.startswith(after):
            what = "the text changes with what follows" if after.startswith(before) else "the prompt is not part of it"
            raise ValueError(
                f"what the assistant writes in turn {turn + 1} cannot be found: {what}, as this chat template writes "
                'it. Use a template with {% generation %} markers, or set data.loss_on to "last" or "all"'
            )
        return len(before), len(after)

    def _text(self, turns: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=turns, tools=tools, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except Exception as error:  # a template is a program: anything may come
            raise ValueError(f"the chat template refuses it: {error or type(error).__name__}") from error


def _marked_spans(text: str) -> list[Span]:
    spans, start, length = [], 0, 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if part == _OPEN:
            start = length
        elif part == _CLOSE:
            spans.append((start, length))
        else:
            length += len(part)
    return spans


def _parsed(value: Any, name: str) -> Any:
    """Columns of CSV and the like hold JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"`{name}` is text, but not JSON: {error}") from None


def _conversation(messages: Any) -> list[dict[str, Any]]:
    messages = _parsed(messages, "messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` has to be a list of objects with `role` and `content`, with one at least")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} has no `role`; expected an object with `role` and `content`")
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise ValueError(f"message {number} ({message['role']}) has neither `content` nor `tool_calls`")
        if any(mark in json.dumps(message, ensure_ascii=False, default=str) for mark in (_OPEN, _CLOSE)):
            raise ValueError(f"message {number} holds U+FDD0 or U+FDD1, which are no characters")
        # tables fill in what a message lacks with nulls, which templates take for something
        turns.append({name: value for name, value in message.items() if value is not None or name == "content"})
    return turns


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)
