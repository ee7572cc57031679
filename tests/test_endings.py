"""How the commands and tools end: one sentence on stderr, and a status that says of which kind the error was."""

from __future__ import annotations

import contextlib
import http.server
import importlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2idist import cli
from t2idist.config import DataConfig, load
from t2idist.config.strict import to_dict, to_yaml
from t2idist.data.shards import Dataset
from tests.convert.author_files import SMALL, make_weights, write_weights
from tests.helpers import small_systems, toy_gan
from tests.helpers.object_store import SECRET, seaweedfs
from tests.helpers.shard_sets import WORDS as SET_WORDS
from tests.helpers.shard_sets import make_sample, write_set

pytestmark = pytest.mark.whole

WORDS = ["<end>", *SET_WORDS, *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 1 - len(SET_WORDS)))]

READERS = {
    "sample": "sample --export PLACE --text red --out OUT",
    "translate": "translate --export PLACE --image a.png --set Smiling --out OUT",
    "translate --image": "translate --export STARGAN --image PLACE/a.png --set Smiling --out OUT",
    "style": "style --export PLACE --out OUT/style.json",
    "score": "score --export PLACE --out OUT",
    "report": "report PLACE",
    "status": "status PLACE",
    "convert export": "convert export --export PLACE --to OUT",
    "convert import": "convert import --system attngan --from PLACE --to OUT",
    "train": "train attngan --local data.source=PLACE storage=OUT",
    "train --dry-run": "train attngan --dry-run data.source=PLACE storage=OUT",
    "check_shards": "tools/check_shards PLACE",
    "embed_captions": "tools/embed_captions --data PLACE --to OUT --encoder STARGAN",
    "check_scores": "tools/check_scores --data PLACE",
    "score_demo": "tools/score_demo PLACE",
    "score_translation": "tools/score_translation --run PLACE",
    "shard_folder": "tools/shard_folder --folder PLACE --out OUT --processes 1",
    "shard_coco": "tools/shard_coco --coco PLACE --out OUT --processes 1",
    "shard_cub": "tools/shard_cub --cub PLACE --out OUT --processes 1",
    "shard_celeba": "tools/shard_celeba --celeba PLACE --out OUT --processes 1",
}
"""Commands that read from PLACE."""

WRITERS = {
    "sample": "sample --export ATTNGAN --text red --n 1 --out PLACE",
    "translate": "translate --export STARGAN --image IMAGE --set Smiling --out PLACE",
    "style": "style --export STYLE --data DATA --split train --clusters 2 --folds 2 --out PLACE/style.json",
    "score": "score --export ATTNGAN --data DATA --split train --metrics kid --n 8 --bootstrap 0 --out PLACE",
    "convert export": "convert export --export ATTNGAN --to PLACE",
    "convert import": "convert import --system stackgan_pp --from WEIGHTS --to PLACE",
    "train": "train attngan --local data.source=DATA storage=PLACE",
    "train --dry-run": "train attngan --dry-run data.source=DATA storage=PLACE",
    "embed_captions": "tools/embed_captions --data DATA --to PLACE --encoder DAMSM",
    "shard_folder": "tools/shard_folder --folder FOLDER --out PLACE --processes 1 --size 16",
}
"""Commands that write to PLACE."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Inputs that the commands can use, by their word in a command line."""
    folder = tmp_path_factory.mktemp("inputs")
    shards = write_set(folder / "set", [make_sample(i) for i in range(24)])
    names = {"ATTNGAN": "attngan", "STARGAN": "stargan", "STYLE": "style", "DAMSM": "damsm"}
    for name in names.values():
        data = small_systems.DATA_INFOS.get(name, toy_gan.DATA_INFO)
        small_systems.write_export(name, str(folder / name), WORDS, data)
    index = folder / "style/export.json"
    settings = {"data": {"settings": to_dict(DataConfig(source=shards.url))}}
    index.write_text(json.dumps({**json.loads(index.read_text()), **settings}))
    (folder / "images").mkdir()
    for number in range(4):
        (folder / f"images/{number}.png").write_bytes(make_sample(number).image)
        (folder / f"images/{number}.txt").write_text(f"a red thing with {'very ' * number}round corners\n")
    write_weights(folder, "weights.pth", make_weights(SMALL["stackganv2/netG"]))
    run_folder = folder / "runs/mine"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text(to_yaml(load("attngan", ["name=mine"])))
    found = {word: str(folder / name) for word, name in names.items()}
    return {
        **found,
        "DATA": shards.url,
        "FOLDER": str(folder / "images"),
        "IMAGE": str(folder / "images/0.png"),
        "RUNS": str(folder / "runs"),
        "WEIGHTS": str(folder / "weights.pth"),
    }


@pytest.fixture(scope="module")
def store_environment() -> Iterator[dict[str, str]]:
    with seaweedfs() as environment:
        yield {key: value for key, value in environment.items() if key.startswith("AWS")}


def run(line: str, places: dict[str, str]) -> int:
    """Run a command line in this process; capital words stand for places."""
    name, *words = line.split()
    for word, place in sorted(places.items(), key=lambda item: -len(item[0])):
        words = [part.replace(word, place) for part in words]
    if name.startswith("tools/"):
        status = importlib.import_module(name.replace("/", ".")).main(words)
    else:
        status = cli.main([name, *words])
    assert isinstance(status, int)
    return status


_LOG = re.compile(r"^(INFO|WARNING|problems:)|images/s|it/s|chunk/s")


def check_sentence(error: str, place: str = "") -> None:
    lines = [line for line in error.splitlines() if line.strip() and not _LOG.search(line)]
    assert len(lines) == 1, error
    assert "Traceback" not in error and SECRET not in error and "Errno" not in error
    assert place in lines[0]


@pytest.mark.parametrize("command", READERS)
def test_missing_bucket_is_one_sentence(
    command: str,
    places: dict[str, str],
    store_environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in store_environment.items():
        monkeypatch.setenv(key, value)
    place = "s3://missing-bucket/place"
    expected = 1 if command == "check_shards" else 2  # its verdict
    assert run(READERS[command], {**places, "PLACE": place, "OUT": str(tmp_path / "out")}) == expected
    captured = capsys.readouterr()
    check_sentence(captured.out if command == "check_shards" else captured.err, place)


@pytest.mark.parametrize("command", READERS)
def test_file_in_place_of_a_folder_is_one_sentence(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    place = str(tmp_path / "file")
    expected = 1 if command == "check_shards" else 2
    assert run(READERS[command], {**places, "PLACE": place, "OUT": str(tmp_path / "out")}) == expected
    captured = capsys.readouterr()
    check_sentence(captured.out if command == "check_shards" else captured.err, place)


SIGNED = {
    "style --labels": "style --export STYLE --data DATA --split train --labels PLACE --out OUT/style.json",
    "sample --captions": "sample --export ATTNGAN --captions PLACE --out OUT",
    "translate --image": "translate --export STARGAN --image PLACE --set Smiling --out OUT",
    "sample --out": "sample --export ATTNGAN --text red --n 1 --out PLACE",
    "translate --out": "translate --export STARGAN --image IMAGE --set Smiling --out PLACE",
    "style --out": WRITERS["style"].replace("PLACE/style.json", "PLACE"),
}


@pytest.mark.parametrize("command", SIGNED)
@pytest.mark.parametrize("answer", [200, 401, 403, 404, 410])
def test_signature_of_a_url_is_never_printed(
    command: str, answer: int, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an answer that stays the same is not asked for again."""
    with answering_server(answer) as address:
        place = f"{address}/file?X-Amz-Signature={SECRET}"
        assert run(SIGNED[command], {**places, "PLACE": place, "OUT": str(tmp_path / "out")}) in (1, 2)
    check_sentence(capsys.readouterr().err, f"{address}/file")


@contextlib.contextmanager
def answering_server(status: int) -> Iterator[str]:
    """Run a server that answers every request with this status and a page of text; writing is never allowed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(status)

        def do_HEAD(self) -> None:
            self._answer(status)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(405)

        def _answer(self, code: int) -> None:
            body = b"<html>\xff\xfe</html>"
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Run a server that never answers; at the first connection, the user presses Ctrl-C."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            connections.append(listener.accept()[0])
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                connections.append(listener.accept()[0])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("command", READERS)
def test_ctrl_c_is_one_sentence(
    command: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with silent_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        place = "s3://bucket/place"
        assert run(READERS[command], {**places, "PLACE": place, "OUT": str(tmp_path / "out")}) == 130
    error = capsys.readouterr().err
    check_sentence(error)
    assert "interrupted" in error


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("kind", ["file", "read-only", "refused keys"])
def test_output_that_cannot_be_written_is_one_sentence(
    command: str,
    kind: str,
    places: dict[str, str],
    store_environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in store_environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    (tmp_path / "file").write_text("no folder")
    place = {"file": str(tmp_path / "file"), "read-only": "/sys/place", "refused keys": "s3://bucket/place"}
    assert run(WRITERS[command], {**places, "PLACE": place[kind]}) == 2
    check_sentence(capsys.readouterr().err, place[kind])


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", [name for name in WRITERS if not name.startswith(("embed", "shard"))])
def test_full_disk_is_one_sentence(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk():
        status = run(WRITERS[command], {**places, "PLACE": str(tmp_path / "out")})
    # a run finds it before it starts; a score below a limit is 1
    assert status == (2 if command.startswith(("train", "score")) else 1)
    check_sentence(capsys.readouterr().err, str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_report_into_a_folder_that_cannot_be_written_is_one_sentence(kind: str, places: dict[str, str]) -> None:
    run_folder = f"{places['RUNS']}/mine"
    before = {"full": "ulimit -f 0", "read-only": 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'}[kind]
    shell = [
        "sh",
        "-c",
        f'{before} && exec "$@"',
        run_folder,
        sys.executable,
        "-m",
        "t2idist.cli",
        "report",
        run_folder,
    ]
    command = shell if kind == "full" else ["unshare", "--map-root-user", "--mount", *shell]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if kind == "full" else 2), done.stderr
    check_sentence(done.stderr, run_folder)


PRINTERS = {
    **{name: WRITERS[name] for name in ("sample", "translate", "style", "train --dry-run")},
    "status": "status --list RUNS",
    "check_shards": "tools/check_shards DATA --processes 1",
    "shard_folder": WRITERS["shard_folder"],
    "help": "--help",
}


@pytest.mark.parametrize("command", PRINTERS)
@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_output_that_cannot_be_printed_is_no_traceback(
    command: str,
    kind: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    else:
        stream = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    status = run(PRINTERS[command], {**places, "PLACE": str(tmp_path / "out")})
    stream.close()  # as at the end of the interpreter: what was not written is not an error once more
    error = "".join(line for line in capsys.readouterr().err.splitlines(True) if not _LOG.search(line))
    if kind == "closed pipe":
        assert status == 141 and error == ""
    else:
        assert status in (1, 2)
        check_sentence(error, "standard output: No space left on device")


def test_help_into_a_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    stream.close()


def test_programmers_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, places: dict[str, str]) -> None:
    for kind in (AssertionError, TypeError, KeyError, NotImplementedError):

        def fail(*arguments: object, error: type[Exception] = kind, **more: object) -> None:
            raise error("of the program")

        monkeypatch.setattr(Dataset, "open", fail)
        with pytest.raises(kind):
            run("tools/check_scores --data DATA", places)
