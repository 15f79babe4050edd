"""Notifications: a real command, a real HTTP server, and what happens when either does not work."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher import notify
from launcher.notify import Notifier, problems
from trainer.config.notifications import Notification
from trainer.rundir import RunDirectory, read_lines, write_json

Json = dict[str, Any]
FAILURE = {"class": "node", "rank": 1, "node": "n1", "step": 7, "message": "gone", "action": "retry"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "a")
    run.new_attempt()
    return run


@pytest.fixture
def server() -> Iterator[tuple[str, list[Json]]]:
    """Answers /ok... with 204, /slow after a second, all else with 500; and what was posted to the former."""
    posted: list[Json] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/slow":
                time.sleep(1.0)
            if self.path.startswith("/ok"):
                assert self.headers["Content-Type"] == "application/json"
                posted.append(json.loads(body))
            self.send_response(204 if self.path.startswith("/ok") else 500)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", posted
    server.shutdown()


def warnings(run: RunDirectory) -> list[str]:
    return [event["message"] for event in read_lines(run.events_dir / "notify.jsonl")]


def to(url: str, *events: Any) -> list[Notification]:
    return [Notification(webhook=url, **({"events": events} if events else {}))]


def test_a_failure_a_recovery_and_the_end_are_posted(run: RunDirectory, server: tuple[str, list[Json]]) -> None:
    url, posted = server
    supervisor, rank0 = run.event_writer("supervisor"), run.event_writer("rank0")
    supervisor.write("attempt", attempt=1)
    notifier = Notifier(run, to(f"{url}/ok"))
    rank0.write("first_step", attempt=1, step=1)  # no failure came before: no news
    supervisor.write("failure", attempt=1, **FAILURE)
    notifier.tick()
    notifier.close()  # so that the order is certain
    rank0.write("first_step", attempt=2, step=5)
    notifier.close()
    rank0.write("stopped", attempt=2, step=9)
    supervisor.write("finished", attempt=2, exit_code=0, reason="")
    notifier.close()
    assert [message["event"] for message in posted] == ["failure", "recovery", "end"]
    assert {key: posted[0][key] for key in FAILURE} == FAILURE
    assert posted[0]["run"] == str(run.path)
    assert posted[0]["text"] == "a: node error on rank 1 (node n1), step 7: gone; trying again"
    assert posted[1]["step"] == 5
    assert (posted[2]["state"], posted[2]["exit_code"]) == ("finished", 0)
    assert warnings(run) == []


def test_the_past_is_no_news_but_a_recovery_from_it_is(run: RunDirectory, server: tuple[str, list[Json]]) -> None:
    """The job was requeued after a failure: its end is told by nobody, its going on is."""
    url, posted = server
    supervisor = run.event_writer("supervisor")
    first = Notifier(run, to(f"{url}/ok", "end", "recovery"))
    supervisor.write("failure", attempt=1, **FAILURE)
    write_json(run.verdict_path(1), {"requeue": True})
    supervisor.write("failed", attempt=1, exit_code=75, reason="no node left")
    first.close()
    assert posted == []
    second = Notifier(run, to(f"{url}/ok", "end", "recovery"))
    run.event_writer("rank0").write("first_step", attempt=2, step=8)
    second.close()
    assert [message["event"] for message in posted] == ["recovery"]


def test_a_command_gets_json_and_variables(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_RUN_DIR", str(run.path))  # the mark of processes that are killed with the run
    target = tmp_path / "told.json"
    program = "import json, os, sys; json.dump([json.load(sys.stdin), dict(os.environ)], open(sys.argv[1], 'w'))"
    notifier = Notifier(run, [Notification(command=(sys.executable, "-c", program, str(target)))])
    run.event_writer("supervisor").write("stopped", attempt=1, exit_code=130, reason="interrupt; $(rm -rf /)")
    notifier.close()
    message, variables = json.loads(target.read_text())
    assert message["reason"] == "interrupt; $(rm -rf /)"
    assert variables["DSFT_EVENT"] == "end"
    assert variables["DSFT_STATE"] == "stopped"
    assert variables["DSFT_RUN"] == str(run.path)
    assert "DSFT_RUN_DIR" not in variables


def test_what_goes_wrong_is_a_warning_without_the_url(
    run: RunDirectory, server: tuple[str, list[Json]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    monkeypatch.setenv("HOOK", f"{url}/s3cret")
    monkeypatch.setattr(notify, "_WEBHOOK_SECONDS", 0.3)
    monkeypatch.setattr(notify, "_COMMAND_SECONDS", 1.5)
    bad: list[Json] = [{"webhook": "$HOOK"}, {"webhook": f"{url}/slow"}, {"webhook": "http://127.0.0.1:1/s3cret"}]
    bad += [{"webhook": "$GONE"}, {"webhook": "http://s3cret.invalid/"}]
    bad += [{"command": [sys.executable, "-c", "raise SystemExit(3)"]}, {"command": ["/s3cret"]}]
    bad += [{"command": [sys.executable, "-c", "import time; time.sleep(100)"]}]
    notifier = Notifier(run, [Notification.model_validate(value) for value in bad])
    run.event_writer("supervisor").write("failure", attempt=1, **FAILURE)
    began = time.monotonic()
    notifier.tick()
    assert time.monotonic() - began < 1.5  # nobody waits for a receiver
    notifier.close()
    told = sorted(warnings(run))
    assert len(told) == len(bad)
    assert "HTTP status 500" in told[0]
    assert "Connection refused" in told[2]
    assert "exit code 3" in told[5]
    assert "did not end within" in told[7]
    assert "s3cret" not in " ".join(told)


def test_variables_are_looked_up_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET", "https://example.org/s3cret")
    monkeypatch.setenv("WRONG", "s3cret")
    names = ("$SET", "$UNSET", "$WRONG", "https://example.org/plain")
    told = list(problems([Notification(webhook=name) for name in names]))
    assert [text.partition(":")[0] for text in told] == [f"resilience.notify.{i}.webhook" for i in (1, 2)]
    assert "UNSET is not set" in told[0]
    assert "s3cret" not in told[1]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"command": ["mail"], "webhook": "https://example.org"},
        {"command": []},
        {"webhook": "example.org"},
        {"webhook": "file:///etc/passwd"},
        {"webhook": "https://user:word@example.org/"},
        {"webhook": "https://example.org/?token=abc"},
        {"webhook": "https://example.org", "events": ["start"]},
    ],
)
def test_what_a_config_may_not_say(value: Json) -> None:
    with pytest.raises(ValidationError):
        Notification.model_validate(value)
