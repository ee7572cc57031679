"""A machine that is about to go: which Ray node it is, and what clouds say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from t2idist.launch import drain


@contextmanager
def metadata_server(answers: dict[tuple[str, str], str], wanted: dict[str, str]) -> Iterator[str]:
    """Answers by method and path; 404 for others, 403 without the wanted headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if any(self.headers.get(name) != value for name, value in wanted.items()) and self.command == "GET":
                self.send_error(403)
                return
            said = answers.get((self.command, self.path))
            if said is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said.encode())

        do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_aws_says_when_a_spot_instance_goes() -> None:
    answers = {("PUT", "/latest/api/token"): "abc"}
    with metadata_server(answers, {"X-aws-ec2-metadata-token": "abc"}) as address:
        assert drain.aws_notice(address) is None
        when = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
        answers["GET", "/latest/meta-data/spot/instance-action"] = f'{{"action": "terminate", "time": "{when}"}}'
        seconds = drain.aws_notice(address)
    assert seconds is not None and 110 < seconds <= 120


def test_google_says_that_a_spot_machine_goes() -> None:
    answers = {("GET", "/computeMetadata/v1/instance/preempted"): "FALSE"}
    with metadata_server(answers, {"Metadata-Flavor": "Google"}) as address:
        assert drain.gcp_notice(address) is None
        answers["GET", "/computeMetadata/v1/instance/preempted"] = "TRUE"
        assert drain.gcp_notice(address) == drain.GCP_NOTICE_SECONDS


def test_a_metadata_server_that_fails_is_asked_again() -> None:
    said: list[float | Exception | None] = [OSError("no route"), ValueError("not JSON"), None, 17.0]

    def notice() -> float | None:
        answer = said.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert drain.watch(notice, look_seconds=0.0) == 17.0


def process(folder: Path, number: int, *words: str) -> None:
    at = folder / str(number)
    (at / "ns").mkdir(parents=True)
    (at / "cmdline").write_text("\0".join(words) + "\0")
    (at / "ns/net").symlink_to("/proc/self/ns/net")


def test_ray_s_node_of_this_machine_is_found(tmp_path: Path) -> None:
    process(tmp_path, 9, "/usr/bin/python", "--node_id=aa", "--gcs-address=1.2.3.4:5")
    with pytest.raises(ProcessLookupError, match="no Ray node"):
        drain.find_raylet(tmp_path)
    process(tmp_path, 12, "/venv/ray/core/src/ray/raylet/raylet", "--node_id=bb", "--gcs-address=10.0.0.1:6379")
    assert drain.find_raylet(tmp_path) == drain.Raylet(12, "bb", "10.0.0.1:6379")
    (tmp_path / "12/ns/net").unlink()
    (tmp_path / "12/ns/net").symlink_to("/dev/null")  # another network namespace: another host of a rehearsal
    with pytest.raises(ProcessLookupError):
        drain.find_raylet(tmp_path)


def test_bad_words_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert drain.main(["--seconds", "0"]) == 2
    assert "--seconds 0; allowed are more than 0, up to 3600" in capsys.readouterr().err


def test_a_head_that_is_gone_is_not_waited_for() -> None:
    with pytest.raises(RuntimeError, match="Ray's head at 127.0.0.1:1 was not told"):
        drain.drain(drain.Raylet(1, "aa" * 28, "127.0.0.1:1"), 30.0, "test")
