"""The avatars' shard set on this machine: made on first use by one process while others wait, and then kept."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock

from t2idist.data.embedded.avatars import LICENCE, VERSION, face
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import cores, write_shards
from t2idist.data.shards import DESCRIPTION, SCHEMA_VERSION

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


def ensure_avatars(samples: int, size: int, cache: str | None, processes: int | None = None) -> str:
    """The folder of the shard set of avatars 0 .. samples - 1, drawn at size x size pixels; made if it is not there.

    cache: the folder that holds such sets (None: ~/.cache/t2idist). processes: that draw (None: one a core). A
    half-made set is never seen: it is renamed into place when it is whole. Raises RuntimeError where drawing fails.
    """
    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "t2idist"
    folder = root / f"avatars-{samples}-{size}-v{VERSION}-{SCHEMA_VERSION}"
    if (folder / DESCRIPTION).exists():
        return str(folder)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not (folder / DESCRIPTION).exists():
            unfinished = root / f".{folder.name}.unfinished"
            for left_over in (folder, unfinished):
                shutil.rmtree(left_over, ignore_errors=True)
            logger.info("drawing %d avatars of %d pixels into %s (once)", samples, size, folder)
            write_shards(
                str(unfinished),
                _with_progress(_records(samples, size, processes or cores()), samples),
                source="avatars",
                licence=LICENCE,
                options={"samples": samples, "size": size, "version": VERSION},
            )
            os.rename(unfinished, folder)
    return str(folder)


def _records(samples: int, size: int, processes: int) -> Iterator[SampleRecord]:
    for number, png in enumerate(_draw(samples, size, min(processes, samples))):
        drawn = face(number)
        yield SampleRecord(
            drawn.split, drawn.key, png, "png", drawn.captions, size, size, drawn.attributes, drawn.class_id
        )


def _draw(samples: int, size: int, processes: int) -> Iterator[bytes]:
    """PNGs of faces 0, 1, ... in order; process k draws every `processes`-th.

    Programs of their own rather than multiprocessing: nothing is imported again from the caller's main program, and it
    works inside a daemon, a thread or another framework's worker.
    """
    command = [sys.executable, "-m", "t2idist.data.embedded.avatars"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with contextlib.ExitStack() as stack:
        painters = []
        for first in range(processes):
            words = [str(number) for number in (first, processes, samples, size)]
            painter = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, env=environment)
            stack.callback(_end, painter)
            painters.append(painter)
        for number in range(samples):
            yield _receive(painters[number % processes], number)


def _receive(painter: subprocess.Popen[bytes], number: int) -> bytes:
    assert painter.stdout is not None
    head = _exactly(painter.stdout, 4)
    data = _exactly(painter.stdout, struct.unpack("<I", head)[0]) if len(head) == 4 else b""
    if not data:
        raise RuntimeError(
            f"avatar {number} could not be drawn (exit status {painter.wait()}); are dicebear-core, dicebear-styles "
            "and resvg-py installed in the versions that t2idist asks for?"
        )
    return data


def _exactly(stream: IO[bytes], count: int) -> bytes:
    """`count` bytes, or none when the stream ends before."""
    data = stream.read(count)
    return data if len(data) == count else b""


def _end(painter: subprocess.Popen[bytes]) -> None:
    assert painter.stdout is not None
    painter.terminate()
    painter.stdout.close()
    painter.wait()


def _with_progress(records: Iterator[SampleRecord], total: int) -> Iterator[SampleRecord]:
    began = last = time.monotonic()
    for done, record in enumerate(records, start=1):
        yield record
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES or done == total:
            last = now
            logger.info("avatars: %d of %d, %.0f a second", done, total, done / (now - began))
