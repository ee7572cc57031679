"""Measure the images per second of sharding and of bare decoding, resizing and encoding, on one core.

    python tools/bench/bench_sharding.py [--images 4096]

Generates 640 x 480 JPEGs with the file sizes of photographs and shards them in one process. After every 64 images
sharding pauses for the bare work on as many, so that other load on the machine affects both. CPU time is counted,
including the threads that read and store: images per CPU second are the throughput of one core.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from t2idist.ingest.coco import CocoSplit, list_coco
from t2idist.ingest.listing import Listing
from t2idist.ingest.writer import IngestOptions, ReportProgress, write_set
from t2idist.observability.command import command

SIZE, QUALITY = 304, 95
BLOCK = 64


def photograph(seed: int) -> bytes:
    """Return a JPEG with the spectrum of natural images, about 100 kB."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((480, 640, 3), dtype=np.float32)
    for grid, weight in ((4, 90.0), (16, 45.0), (64, 22.0), (240, 11.0)):
        coarse = rng.normal(0, weight, (grid * 3 // 4, grid, 3)).clip(-127, 127) + 128
        wide = Image.fromarray(coarse.astype(np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        layers += np.asarray(wide, dtype=np.float32) - 128
    out = io.BytesIO()
    Image.fromarray((layers + 128).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def decode_and_encode(jpegs: list[bytes]) -> None:
    for data in jpegs:
        image = Image.open(io.BytesIO(data))
        image.load()
        scaled = image.resize((SIZE * 640 // 480, SIZE), Image.Resampling.BILINEAR)
        scaled.save(io.BytesIO(), "JPEG", quality=QUALITY)


class InterleavedWork:
    """Do the bare work in between while a shard set is written, and count its CPU seconds."""

    def __init__(self, jpegs: list[bytes]) -> None:
        self._jpegs = jpegs
        self._done = 0
        self.bare_seconds = 0.0

    def report(self, done: int, total: int, shards: int) -> None:
        if done - self._done < BLOCK and done < total:
            return
        before = time.thread_time()
        decode_and_encode(self._jpegs[self._done : done])
        self.bare_seconds += time.thread_time() - before
        self._done = done


def shard(root: Path, out: Path, report: ReportProgress) -> None:
    with Listing() as listing:
        list_coco([CocoSplit("train", str(root / "train"), str(root / "captions.json"))], listing)
        write_set(listing, str(out), IngestOptions(), source="bench", licence="none", processes=1, report=report)


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    options = parser.parse_args()
    photographs = [photograph(seed) for seed in range(64)]
    jpegs = [photographs[number % 64] for number in range(options.images)]
    print(f"{options.images} images of {sum(map(len, photographs)) / 64e3:.0f} kB")
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as folder:
        root = Path(folder)
        (root / "train").mkdir()
        for number, data in enumerate(jpegs):
            (root / "train" / f"{number:06d}.jpg").write_bytes(data)
        images = [{"id": n, "file_name": f"{n:06d}.jpg"} for n in range(options.images)]
        annotations = [
            {"id": n, "image_id": n, "caption": f"picture number {n} of a bench"} for n in range(options.images)
        ]
        (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        decode_and_encode(photographs)  # warm-up, so that neither is charged for one-time work
        interleaved = InterleavedWork(jpegs)
        before = time.process_time()
        shard(root, root / "set", interleaved.report)
        sharding_seconds = time.process_time() - before - interleaved.bare_seconds
    rates = [options.images / seconds for seconds in (interleaved.bare_seconds, sharding_seconds)]
    print(f"images per CPU second: bare {rates[0]:.0f}, sharding {rates[1]:.0f}; ratio {rates[1] / rates[0]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
