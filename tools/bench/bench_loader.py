"""Images a second of the loader on one core, beside the bare work of Pillow and beside other loaders.

    python tools/bench/bench_loader.py [--images FOLDER] [--samples 4096] [--rounds 2] [--store] [--step-seconds 1.0]

All do the same work on the same JPEGs (shorter side 304, quality 95): decode, random crop of 256, mirror, the pyramid
64/128/256 as uint8 planes, a caption as word numbers, batches of 20. Each runs in a process of its own on one core, in
turns. `bare` is Pillow's part of that work alone, on bytes in memory. webdataset and MosaicML streaming do it as their
documentation shows, without a worker process and with one, the better of both; the second is left out where it is not
installed. --store reads from a SeaweedFS server too (on the other cores). Then: waiting for data where a step takes
--step-seconds, and memory after each of three epochs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2idist.config import DataConfig
from t2idist.data.loader import Loader, open_loader
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset
from tools.bench.bench_sharding import photograph

SIDE, QUALITY, CROP, SIZES = 304, 95, 256, (64, 128, 256)
BATCH, MAX_WORDS = 20, 18
WARM_BATCHES = 20
ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------ the pictures
def encoded(folder: str | None, count: int) -> list[bytes]:
    """`count` JPEGs of shorter side 304; fewer different ones are repeated."""
    if folder is None:
        files: list[Any] = [io.BytesIO(photograph(seed)) for seed in range(min(count, 256))]
    else:
        files = sorted(Path(folder).rglob("*.jpg"))[: min(count, 2048)]
        if not files:
            raise ValueError(f"--images {folder}: no .jpg in it")
    found = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        scale = SIDE / min(picture.size)
        size = (max(SIDE, round(picture.width * scale)), max(SIDE, round(picture.height * scale)))
        out = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
        found.append(out.getvalue())
    return [found[i % len(found)] for i in range(count)]


def captions(number: int) -> tuple[str, ...]:
    words = ("a", "small", "red", "bird", "with", "long", "brown", "wings", "and", "white", "belly", "on", "grass")
    return tuple(" ".join(words[(number * 7 + k * 3 + i) % len(words)] for i in range(11)) for k in range(5))


def prepare(folder: Path, images: str | None, samples: int) -> None:
    pictures = encoded(images, samples)
    sizes = {id(data): Image.open(io.BytesIO(data)).size for data in pictures}
    records = (
        SampleRecord("train", f"s{n:06d}", data, "jpg", captions(n), *sizes[id(data)])
        for n, data in enumerate(pictures)
    )
    write_shards(str(folder / "shards"), records, source="bench", licence="none", shard_samples=1024)
    if streaming_installed():
        streaming = import_streaming()
        with streaming.MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "json": "json"}) as out:
            for number, data in enumerate(pictures):
                out.write({"jpg": data, "json": {"captions": list(captions(number))}})


# ------------------------------------------------------------------------------------------------ the same work
def crop_of(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    x, y = int(rng.integers(image.width - CROP + 1)), int(rng.integers(image.height - CROP + 1))
    image = image.crop((x, y, x + CROP, y + CROP))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else image


def pyramid(image: Image.Image) -> list[Image.Image]:
    return [image if size == CROP else image.resize((size, size), Image.Resampling.BILINEAR) for size in SIZES]


class Peer:
    """A sample as another loader hands it over, made into the same arrays as ours."""

    def __init__(self, words: dict[str, int]) -> None:
        self.words = words
        self.rng = np.random.default_rng(0)

    def __call__(self, picture: Image.Image, facts: dict[str, Any]) -> tuple[Any, ...]:
        planes = [np.asarray(p).transpose(2, 0, 1) for p in pyramid(crop_of(picture, self.rng))]
        texts = facts["captions"]
        known = [self.words[w] for w in texts[int(self.rng.integers(len(texts)))].split() if w in self.words]
        ids = np.zeros(MAX_WORDS, dtype=np.int64)
        ids[: len(known)] = known[:MAX_WORDS]
        return (*planes, ids, np.int64(len(known)))

    def of_webdataset(self, sample: tuple[Image.Image, dict[str, Any]]) -> tuple[Any, ...]:
        return self(*sample)

    def of_bytes(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        return self(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"), sample["json"])


def collate(samples: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack(column) for column in zip(*samples, strict=True))


def rate(batches: Iterator[Any], count: int) -> float:
    """Images a second over `count` batches, after some that do not count."""
    for _ in range(WARM_BATCHES):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - began)


# ------------------------------------------------------------------------------------------------ the loaders
def ours(url: str, step0: int = 0) -> Loader:
    config = DataConfig(source=url, max_words=MAX_WORDS, threads=1, crop=SIDE / CROP)
    return open_loader(
        Dataset.open(url), "train", config=config, sizes=SIZES, groups=[0], total_groups=1, group_size=BATCH, seed=1,
        step0=step0,
    )  # fmt: skip


def time_ours(url: str, samples: int) -> float:
    loader = ours(url)
    found = rate(loader, samples // BATCH)
    loader.close()
    return found


def time_bare(url: str, samples: int) -> float:
    from t2idist.data.order import SampleRange
    from t2idist.data.reader import Encoded, ShardReader

    dataset = Dataset.open(url)
    count = min(samples, 1024, dataset.split("train").shards[0].samples)
    read = ShardReader(dataset, "train").read(SampleRange(0, 0, count))
    pictures = [sample.data for sample in read if isinstance(sample, Encoded)]
    rng = np.random.default_rng(0)
    best = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for data in pictures:
            image = Image.open(io.BytesIO(data))
            image.load()
            pyramid(crop_of(image, rng))
        best = max(best, len(pictures) / (time.perf_counter() - began))
    return best


def time_webdataset(folder: Path, samples: int, workers: int) -> float:
    import webdataset as wds

    peer = Peer(Dataset.open(str(folder / "shards")).vocabulary.numbers)
    urls = sorted(str(file) for file in (folder / "shards").glob("train-*.tar"))
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map(peer.of_webdataset)
        .batched(BATCH, collation_fn=collate)
        .repeat()
    )
    return rate(iter(wds.WebLoader(data, batch_size=None, num_workers=workers)), samples // BATCH)


def streaming_installed() -> bool:
    return importlib.util.find_spec("streaming") is not None


def import_streaming() -> Any:
    """MosaicML streaming; it wants torchvision, which imports beside CPU torch once two schemas are there."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    return streaming


def time_streaming(folder: Path, samples: int, workers: int) -> float:
    from torch.utils.data import DataLoader

    peer = Peer(Dataset.open(str(folder / "shards")).vocabulary.numbers)
    streaming = import_streaming()
    data = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)

    def endless() -> Iterator[Any]:
        loader = DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_Decoded(peer), drop_last=True)
        while True:
            yield from loader

    return rate(endless(), samples // BATCH)


class _Decoded:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        return collate([self.peer.of_bytes(sample) for sample in samples])


def wait_share(url: str, step_seconds: float, steps: int = 20) -> float:
    """Share of the time that `next` waits where a step takes so long."""
    loader = ours(url)
    next(loader)
    began, waited = time.perf_counter(), loader.wait_seconds
    for _ in range(steps):
        time.sleep(step_seconds)
        next(loader)
    share = (loader.wait_seconds - waited) / (time.perf_counter() - began)
    loader.close()
    return share


def memory_by_epoch(url: str, samples: int) -> list[float]:
    """MiB resident after each of three epochs."""
    loader = ours(url)
    found = []
    for _ in range(3):
        for _ in range(samples // BATCH):
            next(loader)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    loader.close()
    return found


# ------------------------------------------------------------------------------------------------ the table
def measured(words: list[str], core: int, env: dict[str, str]) -> Any:
    """The JSON that this file prints as a process of its own on one core."""
    line = [sys.executable, __file__, *words]
    pinned = functools.partial(os.sched_setaffinity, 0, {core})
    done = subprocess.run(line, env=env, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=pinned)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed")
    return json.loads(done.stdout.splitlines()[-1])


def child(what: str, folder: Path, url: str, samples: int, step_seconds: float) -> Any:
    name, _, workers = what.partition(":")
    works: dict[str, Any] = {
        "ours": lambda: time_ours(url, samples),
        "bare": lambda: time_bare(str(folder / "shards"), samples),
        "webdataset": lambda: time_webdataset(folder, samples, int(workers)),
        "streaming": lambda: time_streaming(folder, samples, int(workers)),
        "wait": lambda: wait_share(url, step_seconds),
        "memory": lambda: memory_by_epoch(url, samples),
    }
    return works[name]()


def show(best: dict[str, float]) -> None:
    print(f"{'one core':34}{'images/s':>10}{'of bare':>10}{'ours is':>12}")
    for name, value in best.items():
        times = f"{best['ours, local disk'] / value:.2f} times" if not name.startswith(("ours", "bare")) else ""
        print(f"{name:34}{value:10.0f}{value / best['bare Pillow']:10.2f}{times:>12}")


def run(folder: Path, words: argparse.Namespace) -> None:
    prepare(folder, words.images, words.samples)
    core = max(os.sched_getaffinity(0))
    shards = str(folder / "shards")
    common = ["--folder", str(folder), "--samples", str(words.samples), "--step-seconds", str(words.step_seconds)]
    entries = {"ours, local disk": ["ours"], "bare Pillow": ["bare"], "webdataset": ["webdataset:0", "webdataset:1"]}
    if streaming_installed():
        entries["MosaicML streaming"] = ["streaming:0", "streaming:1"]
    best: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        remote = ""
        if words.store:
            sys.path.insert(0, str(ROOT))
            from tests.helpers.object_store import seaweedfs, store

            reach = stack.enter_context(seaweedfs())
            env |= {key: value for key, value in reach.items() if key.startswith("AWS")}
            store(reach["AWS_ENDPOINT_URL"]).put(shards + "/", "bucket/shards/", recursive=True)
            remote = "s3://bucket/shards"
            entries["ours, SeaweedFS"] = ["ours"]
        for _ in range(words.rounds):
            for name, children in entries.items():
                url = remote if "SeaweedFS" in name else shards
                for what in children:
                    value = measured([*common, "--child", what, "--url", url], core, env)
                    best[name] = max(best.get(name, 0.0), value)
        show(best)
        for name, url in (("local disk", shards), ("SeaweedFS", remote)):
            if url:
                share = measured([*common, "--child", "wait", "--url", url], core, env)
                print(f"waiting for data, {name}: {share:.2%} of steps of {words.step_seconds:g} s for {BATCH} images")
        memory = measured([*common, "--child", "memory", "--url", shards], core, env)
        print("resident after epochs 1 to 3, MiB: " + ", ".join(f"{value:.0f}" for value in memory))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", metavar="FOLDER", help="JPEGs to use (default: made up)")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--store", action="store_true", help="measure from a SeaweedFS server too")
    parser.add_argument("--step-seconds", type=float, default=1.0)
    for hidden in ("--folder", "--child", "--url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child is not None:
        print(json.dumps(child(words.child, Path(words.folder), words.url, words.samples, words.step_seconds)))
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as folder:
            run(Path(folder), words)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
