"""The shard set of avatars on this node: generated on first use, by one process while others wait, and then kept."""

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
from t2idist.data.shard_writer import available_cpus, write_shards
from t2idist.data.shards import DESCRIPTION, SCHEMA_VERSION

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


def ensure_avatars(samples: int, size: int, cache: str | None, processes: int | None = None) -> str:
    """Return the folder of the shard set of avatars 0 to samples - 1, generating it if it does not exist.

    A half-made set is never visible: it is renamed into place when it is complete.

    Args:
        samples: Number of avatars.
        size: Pixels of each side.
        cache: Folder of such sets (None: ~/.cache/t2idist).
        processes: Number of processes that render (None: one for each CPU).

    Raises:
        RuntimeError: If rendering fails.
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
            logger.info("generating %d avatars of %d pixels into %s (once)", samples, size, folder)
            write_shards(
                str(unfinished),
                _with_progress(_records(samples, size, processes or available_cpus()), samples),
                source="avatars",
                licence=LICENCE,
                options={"samples": samples, "size": size, "version": VERSION},
            )
            os.rename(unfinished, folder)
    return str(folder)


def _records(samples: int, size: int, processes: int) -> Iterator[SampleRecord]:
    for number, png in enumerate(_render(samples, size, min(processes, samples))):
        avatar = face(number)
        yield SampleRecord(
            avatar.split, avatar.key, png, "png", avatar.captions, size, size, avatar.attributes, avatar.class_id
        )


def _render(samples: int, size: int, processes: int) -> Iterator[bytes]:
    """Yield the PNGs of faces 0, 1, ... in order; process k renders k, k + processes, ...

    Subprocesses are used instead of multiprocessing, because they do not import the caller's main program again, and
    work inside a daemon, a thread or another framework's worker.
    """
    command = [sys.executable, "-m", "t2idist.data.embedded.avatars"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with contextlib.ExitStack() as stack:
        renderers = []
        for first in range(processes):
            arguments = [str(number) for number in (first, processes, samples, size)]
            renderer = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, env=environment)
            stack.callback(_terminate, renderer)
            renderers.append(renderer)
        for number in range(samples):
            yield _receive(renderers[number % processes], number)


def _receive(renderer: subprocess.Popen[bytes], number: int) -> bytes:
    assert renderer.stdout is not None
    head = _read_exactly(renderer.stdout, 4)
    data = _read_exactly(renderer.stdout, struct.unpack("<I", head)[0]) if len(head) == 4 else b""
    if not data:
        raise RuntimeError(
            f"avatar {number} could not be rendered (exit status {renderer.wait()}); are dicebear-core, "
            "dicebear-styles and resvg-py installed in the versions that t2idist requires?"
        )
    return data


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    """Read `count` bytes; returns b"" if the stream ends earlier."""
    data = stream.read(count)
    return data if len(data) == count else b""


def _terminate(renderer: subprocess.Popen[bytes]) -> None:
    assert renderer.stdout is not None
    renderer.terminate()
    renderer.stdout.close()
    renderer.wait()


def _with_progress(records: Iterator[SampleRecord], total: int) -> Iterator[SampleRecord]:
    began = last = time.monotonic()
    for done, record in enumerate(records, start=1):
        yield record
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES or done == total:
            last = now
            logger.info("avatars: %d of %d, %.0f a second", done, total, done / (now - began))
