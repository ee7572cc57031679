"""Draining a node: find its raylet, read the notices of clouds, notify Ray."""

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
def metadata_server(responses: dict[tuple[str, str], str], required: dict[str, str]) -> Iterator[str]:
    """Serve responses by method and path; 404 for others, 403 without the required headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if any(self.headers.get(name) != value for name, value in required.items()) and self.command == "GET":
                self.send_error(403)
                return
            body = responses.get((self.command, self.path))
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

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


def test_aws_notice_returns_the_seconds_left() -> None:
    responses = {("PUT", "/latest/api/token"): "abc"}
    with metadata_server(responses, {"X-aws-ec2-metadata-token": "abc"}) as address:
        assert drain.aws_notice(address) is None
        end = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
        responses["GET", "/latest/meta-data/spot/instance-action"] = f'{{"action": "terminate", "time": "{end}"}}'
        seconds = drain.aws_notice(address)
    assert seconds is not None and 110 < seconds <= 120


def test_gcp_notice_returns_the_fixed_notice_time() -> None:
    responses = {("GET", "/computeMetadata/v1/instance/preempted"): "FALSE"}
    with metadata_server(responses, {"Metadata-Flavor": "Google"}) as address:
        assert drain.gcp_notice(address) is None
        responses["GET", "/computeMetadata/v1/instance/preempted"] = "TRUE"
        assert drain.gcp_notice(address) == drain.GCP_NOTICE_SECONDS


def test_watch_retries_after_errors_of_the_metadata_server() -> None:
    results: list[float | Exception | None] = [OSError("no route"), ValueError("not JSON"), None, 17.0]

    def notice() -> float | None:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    assert drain.watch(notice, poll_seconds=0.0) == 17.0


def add_process(folder: Path, number: int, *arguments: str) -> None:
    process = folder / str(number)
    (process / "ns").mkdir(parents=True)
    (process / "cmdline").write_text("\0".join(arguments) + "\0")
    (process / "ns/net").symlink_to("/proc/self/ns/net")


def test_find_raylet_reads_node_and_head_of_this_network_namespace(tmp_path: Path) -> None:
    add_process(tmp_path, 9, "/usr/bin/python", "--node_id=aa", "--gcs-address=1.2.3.4:5")
    with pytest.raises(ProcessLookupError, match="no Ray node"):
        drain.find_raylet(tmp_path)
    add_process(tmp_path, 12, "/venv/ray/core/src/ray/raylet/raylet", "--node_id=bb", "--gcs-address=10.0.0.1:6379")
    assert drain.find_raylet(tmp_path) == drain.Raylet(12, "bb", "10.0.0.1:6379")
    (tmp_path / "12/ns/net").unlink()
    (tmp_path / "12/ns/net").symlink_to("/dev/null")  # another network namespace: another host of a local cluster
    with pytest.raises(ProcessLookupError):
        drain.find_raylet(tmp_path)


def test_main_rejects_seconds_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert drain.main(["--seconds", "0"]) == 2
    assert "--seconds 0; allowed are more than 0, up to 3600" in capsys.readouterr().err


def test_drain_fails_at_once_if_the_head_is_lost() -> None:
    with pytest.raises(RuntimeError, match="Ray's head at 127.0.0.1:1 could not be notified"):
        drain.drain(drain.Raylet(1, "aa" * 28, "127.0.0.1:1"), 30.0, "test")
