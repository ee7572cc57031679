"""Pictures a second of the whole sharding against the bare decode + resize + encode of bytes in memory, one core each.

    python tools/bench_sharding.py [--images 2000] [--rounds 3]

Makes 640 x 480 JPEGs that are like photographs in their number of bytes, shards them with one process, and times both
in turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from t2idist.data.ingest.coco import CocoSplit, list_coco
from t2idist.data.ingest.listing import Listing
from t2idist.data.ingest.writer import IngestOptions, write_set

SIZE, QUALITY = 304, 95


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


def cpu_and_wall() -> tuple[float, float]:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system, time.perf_counter()


def shard(root: Path, out: Path) -> None:
    with Listing() as listing:
        list_coco([CocoSplit("train", str(root / "train"), str(root / "captions.json"))], listing)
        write_set(listing, str(out), IngestOptions(), source="bench", licence="none", processes=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
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
        for number in range(arguments.rounds):
            at = [cpu_and_wall()]
            bare(pictures)
            at.append(cpu_and_wall())
            shard(root, root / f"set{number}")
            at.append(cpu_and_wall())
            cpu, wall = ([b[i] - a[i] for a, b in pairwise(at)] for i in (0, 1))
            rates = [f"{arguments.images / c:.0f} images per CPU second" for c in cpu]
            ratios = f"{cpu[0] / cpu[1]:.3f} of CPU, {wall[0] / wall[1]:.3f} of time"
            print(f"bare: {rates[0]}; sharding: {rates[1]}; ratio {ratios}")


if __name__ == "__main__":
    main()
