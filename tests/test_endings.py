"""How the commands and tools end: one sentence on stderr, and a status that says of which kind the error was."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2idist import cli
from t2idist.config import DataConfig, load
from t2idist.config.strict import to_dict, to_yaml
from t2idist.data.shards import Dataset
from tests.helpers import small_systems, toy_gan
from tests.helpers.object_store import SECRET, seaweedfs
from tests.helpers.shard_sets import make_sample, write_set

WORDS = ["<end>", "red", "green", *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 3))]

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
    "convert export": "convert export --export ATTNGAN --to PLACE",
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


_LOG = re.compile(r"^(INFO|WARNING|problems:)|images/s|it/s")


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
    assert status == (2 if command.startswith("train") else 1)  # found before the run starts
    check_sentence(capsys.readouterr().err, str(tmp_path / "out"))


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
