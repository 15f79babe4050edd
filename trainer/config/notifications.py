"""`resilience.notify`: who is told when a run fails, recovers or ends. See docs/report.md."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from trainer.config.errors import is_secret_url
from trainer.config.section import Section


class Notification(Section):
    """A command that is run, or a URL that is sent to, with the event as JSON."""

    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description='Program and arguments, run without a shell: ["mail", "-s", "dsft", "me@site"]'
    )
    webhook: str | None = Field(
        None,
        description="URL that takes a POST of JSON, or $NAME: the environment variable that holds a secret one",
    )
    events: tuple[Literal["failure", "recovery", "bad_node", "end"], ...] = ("failure", "recovery", "bad_node", "end")

    @field_validator("webhook")
    @classmethod
    def _url(cls, webhook: str | None) -> str | None:
        if webhook is None or re.fullmatch(r"\$[A-Za-z_][A-Za-z0-9_]*", webhook):
            return webhook
        url = urlsplit(webhook)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("give an http:// or https:// URL, or $NAME of the environment variable that holds it")
        if url.username or is_secret_url(webhook):
            raise ValueError("this URL holds a secret: put it into an environment variable and give its $NAME")
        return webhook

    @model_validator(mode="after")
    def _one_way(self) -> Notification:
        if (self.command is None) == (self.webhook is None):
            raise ValueError("give exactly one of `command` and `webhook`")
        return self
