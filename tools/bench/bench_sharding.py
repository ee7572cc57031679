"""Pictures a second of the whole sharding against the bare decode + resize + encode of bytes in memory, one core each.

    python tools/bench/bench_sharding.py [--images 4096]

Makes 640 x 480 JPEGs that are like photographs in their number of bytes and shards them in one process. After every 64
pictures sharding stops for the bare work on as many, so that what else the machine does falls on both. Counted is CPU
time, with that of the threads that read and store: pictures per CPU second are what a core does.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from t2idist.ingest.coco import CocoSplit, list_coco
from t2idist.ingest.listing import Listing
from t2idist.ingest.writer import IngestOptions, Progress, write_set

SIZE, QUALITY = 304, 95
BLOCK = 64


def photograph(seed: int) -> bytes:
    """A JPEG with the spectrum of natural pictures, about 100 kB."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((480, 640, 3), dtype=np.float32)
    for grid, weight in ((4, 90.0), (16, 45.0), (64, 22.0), (240, 11.0)):
        coarse = rng.normal(0, weight, (grid * 3 // 4, grid, 3)).clip(-127, 127) + 128
        wide = Image.fromarray(coarse.astype(np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        layers += np.asarray(wide, dtype=np.float32) - 128
    out = io.BytesIO()
    Image.fromarray((layers + 128).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def bare(pictures: list[bytes]) -> None:
    for data in pictures:
        image = Image.open(io.BytesIO(data))
        image.load()
        scaled = image.resize((SIZE * 640 // 480, SIZE), Image.Resampling.BILINEAR)
        scaled.save(io.BytesIO(), "JPEG", quality=QUALITY)


class Interleaved:
    """Does the bare work now and then while a set is written; counts the CPU seconds of both."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = pictures
        self._done = 0
        self.bare_seconds = 0.0

    def report(self, progress: Progress) -> None:
        if progress.images - self._done < BLOCK and progress.images < progress.total:
            return
        before = time.thread_time()
        bare(self._pictures[self._done : progress.images])
        self.bare_seconds += time.thread_time() - before
        self._done = progress.images


def shard(root: Path, out: Path, report: Callable[[Progress], None]) -> None:
    with Listing() as listing:
        list_coco([CocoSplit("train", str(root / "train"), str(root / "captions.json"))], listing)
        write_set(listing, str(out), IngestOptions(), source="bench", licence="none", processes=1, report=report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    arguments = parser.parse_args()
    some = [photograph(seed) for seed in range(64)]
    pictures = [some[number % 64] for number in range(arguments.images)]
    print(f"{arguments.images} pictures of {sum(map(len, some)) / 64e3:.0f} kB")
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as folder:
        root = Path(folder)
        (root / "train").mkdir()
        for number, data in enumerate(pictures):
            (root / "train" / f"{number:06d}.jpg").write_bytes(data)
        images = [{"id": n, "file_name": f"{n:06d}.jpg"} for n in range(arguments.images)]
        said = [{"id": n, "image_id": n, "caption": f"picture number {n} of a bench"} for n in range(arguments.images)]
        (root / "captions.json").write_text(json.dumps({"images": images, "annotations": said}))
        bare(some)  # so that neither pays for what is done once in a process
        interleaved = Interleaved(pictures)
        before = time.process_time()
        shard(root, root / "set", interleaved.report)
        sharding_seconds = time.process_time() - before - interleaved.bare_seconds
    rates = [arguments.images / seconds for seconds in (interleaved.bare_seconds, sharding_seconds)]
    print(f"pictures per CPU second: bare {rates[0]:.0f}, sharding {rates[1]:.0f}; ratio {rates[1] / rates[0]:.3f}")


if __name__ == "__main__":
    main()
