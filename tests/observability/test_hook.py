"""The user's program that is notified of a run."""

from __future__ import annotations

import http.server
import io
import json
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from t2idist import run
from t2idist.observability import hook
from tools import notify_webhook


def test_hook_that_fails_or_hangs_logs_a_warning(
    hook_program: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("T2IDIST_HOOK_STATUS", "3")
    monkeypatch.setattr(hook, "TIMEOUT_SECONDS", 1.0)
    for command in ([str(hook_program)], [sys.executable, "-c", "import time; time.sleep(60)"], ["/nowhere/hook"]):
        runner = hook.CommandHook(command)
        runner.send({"event": "start"})
        runner.close()
    assert "exit status 3: nothing on stderr" in caplog.text and "No such file" in caplog.text
    assert "killed after 1 s" in caplog.text


def test_missing_hook_program_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attngan", "--dry-run", "data.source=emoji", f"storage={tmp_path}"]
    assert run.main([*arguments, "--hook", "nosuchprogram -x"]) == 2
    assert capsys.readouterr().err == "error: --hook: nosuchprogram: no such program\n"
    with pytest.raises(ValueError, match=r"--hook: \"a 'b\": No closing quotation"):
        hook.parse("a 'b")


class PostHandler(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted; answers "/broken" with an error."""

    received: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        return


def test_notify_webhook_posts_the_event(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"event": "restart", "run": "x", "stage": "gan", "images": 1200, "budget_images": 64000, "restarts": 2}
    server = http.server.HTTPServer(("127.0.0.1", 0), PostHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        for path, status_code in (("/here", 0), ("/broken", 1)):
            monkeypatch.setenv("T2IDIST_HOOK_URL", f"http://127.0.0.1:{server.server_port}{path}")
            monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(event)))
            assert notify_webhook.main() == status_code
    finally:
        server.shutdown()
        server.server_close()
    assert PostHandler.received[0] == {**event, "text": "x: restart, stage gan at 1,200 of 64,000 images, restarts 2"}
    stderr = capsys.readouterr().err
    assert "HTTPError 500" in stderr and "127.0.0.1" not in stderr
    monkeypatch.setenv("T2IDIST_HOOK_URL", "")
    assert notify_webhook.main() == 2
