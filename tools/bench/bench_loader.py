"""Measure the images per second of the loader on one core, next to Pillow alone and to other loaders.

    python tools/bench/bench_loader.py [--images FOLDER] [--samples 4096] [--rounds 2] [--store] [--step-seconds 1.0]
    python tools/bench/bench_loader.py --open 1 3 12

All do the same work on the same JPEGs (shorter side 304, quality 95): decode, random crop of 256, flip, the pyramid
64/128/256 as uint8 planes, a caption as token ids, batches of 20. Each runs in its own process on one core, in turns.
`bare` is the share of Pillow in this work, on bytes in memory. webdataset and MosaicML streaming are used as in their
documentation, without and with a worker process, and the better of the two counts; streaming is skipped if it is not
installed. "decoded cache" is the third epoch, the cache being filled in the first; "for a GPU" the
loader yields the largest size, of which the device makes the pyramid. --store also reads from a SeaweedFS
server (on the other cores). Then the time spent waiting for data is measured with steps of --step-seconds, and the
memory after each of three epochs.

--open measures instead how long sets of so many million made-up samples take to open and to be searched for what cannot
teach, each time in a new process: the first time on a host, and later. Their shards are files of holes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
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
from t2idist.data.loader import Loader, LoaderSpec, open_loader
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset
from t2idist.data.statistics import problems_of
from t2idist.nn.fast.memory import keep_freed_memory
from t2idist.observability.command import command
from tools.bench.bench_sharding import photograph
from tools.bench.made_up_set import write_made_up_set

SIDE, QUALITY, CROP, SIZES = 304, 95, 256, (64, 128, 256)
BATCH, MAX_WORDS = 20, 18
WARM_BATCHES = 20
ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------ input images
def load_jpegs(folder: str | None, count: int) -> list[bytes]:
    """Return `count` JPEGs of shorter side 304, repeated if there are fewer."""
    if folder is None:
        files: list[Any] = [io.BytesIO(photograph(seed)) for seed in range(min(count, 256))]
    else:
        files = sorted(Path(folder).rglob("*.jpg"))[: min(count, 2048)]
        if not files:
            raise ValueError(f"--images {folder}: no .jpg in it")
    jpegs = []
    for file in files:
        image = Image.open(file).convert("RGB")
        scale = SIDE / min(image.size)
        size = (max(SIDE, round(image.width * scale)), max(SIDE, round(image.height * scale)))
        out = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
        jpegs.append(out.getvalue())
    return [jpegs[i % len(jpegs)] for i in range(count)]


def captions(number: int) -> tuple[str, ...]:
    words = ("a", "small", "red", "bird", "with", "long", "brown", "wings", "and", "white", "belly", "on", "grass")
    return tuple(" ".join(words[(number * 7 + k * 3 + i) % len(words)] for i in range(11)) for k in range(5))


def write_datasets(folder: Path, images: str | None, samples: int) -> None:
    jpegs = load_jpegs(images, samples)
    sizes = {id(data): Image.open(io.BytesIO(data)).size for data in jpegs}
    records = (
        SampleRecord("train", f"s{n:06d}", data, "jpg", captions(n), *sizes[id(data)]) for n, data in enumerate(jpegs)
    )
    write_shards(str(folder / "shards"), records, source="bench", licence="none", shard_samples=1024)
    if streaming_installed():
        streaming = import_streaming()
        with streaming.MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "json": "json"}) as out:
            for number, data in enumerate(jpegs):
                out.write({"jpg": data, "json": {"captions": list(captions(number))}})


# ------------------------------------------------------------------------------------------------ one sample
def random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    x, y = int(rng.integers(image.width - CROP + 1)), int(rng.integers(image.height - CROP + 1))
    image = image.crop((x, y, x + CROP, y + CROP))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else image


def pyramid(image: Image.Image) -> list[Image.Image]:
    return [image if size == CROP else image.resize((size, size), Image.Resampling.BILINEAR) for size in SIZES]


class PeerTransform:
    """Turn a sample of another loader into the same arrays as ours."""

    def __init__(self, token_ids: dict[str, int]) -> None:
        self.token_ids = token_ids
        self.rng = np.random.default_rng(0)

    def __call__(self, image: Image.Image, metadata: dict[str, Any]) -> tuple[Any, ...]:
        planes = [np.asarray(p).transpose(2, 0, 1) for p in pyramid(random_crop(image, self.rng))]
        texts = metadata["captions"]
        caption = texts[int(self.rng.integers(len(texts)))].split()
        known = [self.token_ids[word] for word in caption if word in self.token_ids]
        ids = np.zeros(MAX_WORDS, dtype=np.int64)
        ids[: len(known)] = known[:MAX_WORDS]
        return (*planes, ids, np.int64(len(known)))

    def from_webdataset(self, sample: tuple[Image.Image, dict[str, Any]]) -> tuple[Any, ...]:
        return self(*sample)

    def from_bytes(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        return self(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"), sample["json"])


def collate(samples: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.stack(column) for column in zip(*samples, strict=True))


def rate(batches: Iterator[Any], count: int) -> float:
    """Return the images per second over `count` batches, after some warm-up batches."""
    for _ in range(WARM_BATCHES):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------ loaders
def open_ours(url: str, cache: str | None = None, for_device: bool = False) -> Loader:
    gib = 64.0 if cache else 0.0
    config = DataConfig(source=url, max_words=MAX_WORDS, threads=1, crop=SIDE / CROP, cache=cache, cache_gib=gib)
    spec = LoaderSpec(config, SIZES, groups=[0], total_groups=1, group_size=BATCH, for_device=for_device)
    return open_loader(Dataset.open(url), spec, seed=1)


def time_ours(url: str, samples: int) -> float:
    loader = open_ours(url)
    images_per_second = rate(loader, samples // BATCH)
    loader.close()
    return images_per_second


def time_cached(url: str, samples: int, filled: bool, for_device: bool = False) -> float:
    """Return the images per second with a cache of decoded images: of its first epoch or, if `filled`, of the third."""
    epoch = samples // BATCH
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as cache, open_ours(url, cache, for_device) as loader:
        for _ in range(2 * epoch if filled else 0):
            next(loader)
        return rate(loader, epoch - (0 if filled else 2 * WARM_BATCHES))


def time_bare(url: str, samples: int) -> float:
    from t2idist.data.order import SampleRange
    from t2idist.data.reader import ShardReader
    from t2idist.data.samples import EncodedImage

    dataset = Dataset.open(url)
    count = min(samples, 1024, dataset.split("train").shards[0].samples)
    read = ShardReader(dataset, "train").read_encoded(SampleRange(0, 0, count))
    jpegs = [sample.data for sample in read if isinstance(sample, EncodedImage)]
    rng = np.random.default_rng(0)
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for data in jpegs:
            image = Image.open(io.BytesIO(data))
            image.load()
            pyramid(random_crop(image, rng))
        best = max(best, len(jpegs) / (time.perf_counter() - start))
    return best


def time_webdataset(folder: Path, samples: int, workers: int) -> float:
    import webdataset as wds

    transform = PeerTransform(Dataset.open(str(folder / "shards")).vocabulary.ids)
    urls = sorted(str(file) for file in (folder / "shards").glob("train-*.tar"))
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map(transform.from_webdataset)
        .batched(BATCH, collation_fn=collate)
        .repeat()
    )
    return rate(iter(wds.WebLoader(data, batch_size=None, num_workers=workers)), samples // BATCH)


def streaming_installed() -> bool:
    return importlib.util.find_spec("streaming") is not None


def import_streaming() -> Any:
    """Import MosaicML streaming. It needs torchvision, which imports with a CPU build of torch if two schemas exist."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    with contextlib.suppress(RuntimeError):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    return streaming


def time_streaming(folder: Path, samples: int, workers: int) -> float:
    from torch.utils.data import DataLoader

    transform = PeerTransform(Dataset.open(str(folder / "shards")).vocabulary.ids)
    streaming = import_streaming()
    data = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)

    def endless() -> Iterator[Any]:
        loader = DataLoader(
            data, batch_size=BATCH, num_workers=workers, collate_fn=PeerCollate(transform), drop_last=True
        )
        while True:
            yield from loader

    return rate(endless(), samples // BATCH)


class PeerCollate:
    def __init__(self, transform: PeerTransform) -> None:
        self.transform = transform

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[np.ndarray, ...]:
        return collate([self.transform.from_bytes(sample) for sample in samples])


def wait_share(url: str, step_seconds: float, steps: int = 20) -> float:
    """Return the share of time spent waiting in `next` if a step takes `step_seconds`."""
    loader = open_ours(url)
    next(loader)
    start, waited = time.perf_counter(), loader.wait_seconds
    for _ in range(steps):
        time.sleep(step_seconds)
        next(loader)
    share = (loader.wait_seconds - waited) / (time.perf_counter() - start)
    loader.close()
    return share


def memory_by_epoch(url: str, samples: int) -> list[float]:
    """Return the resident memory in MiB after each of three epochs."""
    loader = open_ours(url)
    resident = []
    for _ in range(3):
        for _ in range(samples // BATCH):
            next(loader)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    loader.close()
    return resident


# ------------------------------------------------------------------------------------------------ openings
def opening(url: str, cache: str) -> list[float]:
    """Return the seconds of opening a set, those of the CPU, and by how many MiB memory grew at most and for good."""

    def resident(key: str) -> float:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    dataset = Dataset.open(url, cache=cache)
    problems_of(dataset)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return [seconds, cpu, resident("VmHWM") - before, resident("VmRSS") - before]


def measure_openings(folder: Path, millions: list[float]) -> None:
    core = max(os.sched_getaffinity(0))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    print(f"{'million samples':>16}{'opening':>9}{'seconds':>10}{'CPU s':>10}{'peak MiB':>10}{'kept MiB':>10}")
    for count in millions:
        write_made_up_set(folder / "set", round(count * 1e6))
        for name in ("first", "later", "later"):
            child = ["--child", "opening", "--folder", str(folder), "--url", str(folder / "set")]
            seconds, cpu, peak, kept = run_child(child, core, env)
            print(f"{count:16g}{name:>9}{seconds:10.2f}{cpu:10.2f}{peak:10.0f}{kept:10.0f}", flush=True)
        shutil.rmtree(folder / "set")
        shutil.rmtree(folder / "cache", ignore_errors=True)


# ------------------------------------------------------------------------------------------------ table
def run_child(arguments: list[str], core: int, env: dict[str, str]) -> Any:
    """Run this file in its own process on one core. Returns the JSON that it prints."""
    command = [sys.executable, __file__, *arguments]
    pinned = functools.partial(os.sched_setaffinity, 0, {core})
    process = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=pinned)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed")
    return json.loads(process.stdout.splitlines()[-1])


def measure_one(variant: str, folder: Path, url: str, samples: int, step_seconds: float) -> Any:
    name, _, workers = variant.partition(":")
    keep_freed_memory()  # as in training
    functions: dict[str, Any] = {
        "ours": lambda: time_ours(url, samples),
        "decoded": lambda: time_cached(url, samples, filled=True),
        "decoded_for_device": lambda: time_cached(url, samples, filled=True, for_device=True),
        "filling": lambda: time_cached(url, samples, filled=False),
        "bare": lambda: time_bare(str(folder / "shards"), samples),
        "webdataset": lambda: time_webdataset(folder, samples, int(workers)),
        "streaming": lambda: time_streaming(folder, samples, int(workers)),
        "wait": lambda: wait_share(url, step_seconds),
        "memory": lambda: memory_by_epoch(url, samples),
        "opening": lambda: opening(url, str(folder / "cache")),
    }
    return functions[name]()


def print_table(best: dict[str, float]) -> None:
    print(f"{'one core':34}{'images/s':>10}{'of bare':>10}{'ours is':>12}")
    for name, value in best.items():
        times = f"{best['ours, local disk'] / value:.2f} times" if not name.startswith(("ours", "bare")) else ""
        print(f"{name:34}{value:10.0f}{value / best['bare Pillow']:10.2f}{times:>12}")


def run(folder: Path, options: argparse.Namespace) -> None:
    write_datasets(folder, options.images, options.samples)
    core = max(os.sched_getaffinity(0))
    shards = str(folder / "shards")
    common = ["--folder", str(folder), "--samples", str(options.samples), "--step-seconds", str(options.step_seconds)]
    entries = {
        "ours, local disk": ["ours"],
        "ours, filling the cache": ["filling"],
        "ours, decoded cache": ["decoded"],
        "ours, decoded cache, for a GPU": ["decoded_for_device"],
        "bare Pillow": ["bare"],
        "webdataset": ["webdataset:0", "webdataset:1"],
    }
    if streaming_installed():
        entries["MosaicML streaming"] = ["streaming:0", "streaming:1"]
    best: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        remote = ""
        if options.store:
            sys.path.insert(0, str(ROOT))
            from tests.helpers.object_store import seaweedfs, store

            environment = stack.enter_context(seaweedfs())
            env |= {key: value for key, value in environment.items() if key.startswith("AWS")}
            store(environment["AWS_ENDPOINT_URL"]).put(shards + "/", "bucket/shards/", recursive=True)
            remote = "s3://bucket/shards"
            entries["ours, SeaweedFS"] = ["ours"]
        for _ in range(options.rounds):
            for name, variants in entries.items():
                url = remote if "SeaweedFS" in name else shards
                for variant in variants:
                    value = run_child([*common, "--child", variant, "--url", url], core, env)
                    best[name] = max(best.get(name, 0.0), value)
        print_table(best)
        for name, url in (("local disk", shards), ("SeaweedFS", remote)):
            if url:
                share = run_child([*common, "--child", "wait", "--url", url], core, env)
                print(
                    f"waiting for data, {name}: {share:.2%} of steps of {options.step_seconds:g} s for {BATCH} images"
                )
        memory = run_child([*common, "--child", "memory", "--url", shards], core, env)
        print("resident after epochs 1 to 3, MiB: " + ", ".join(f"{value:.0f}" for value in memory))


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", metavar="FOLDER", help="JPEGs to use (default: synthetic ones)")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--store", action="store_true", help="also measure from a SeaweedFS server")
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--open", type=float, nargs="+", metavar="MILLIONS", help="measure openings instead")
    for hidden in ("--folder", "--child", "--url"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        folder = Path(options.folder)
        print(json.dumps(measure_one(options.child, folder, options.url, options.samples, options.step_seconds)))
        return 0
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as directory:
        if options.open:
            measure_openings(Path(directory), options.open)
        else:
            run(Path(directory), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
