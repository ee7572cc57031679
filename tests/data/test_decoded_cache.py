"""The cache of decoded images: the same batches, its limit, several processes, and failing disks."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data import decoded_cache
from t2idist.data.decoded_cache import DecodedCache, open_decoded_cache
from t2idist.data.loader import LoaderSpec, open_loader
from t2idist.data.order import SampleRange
from t2idist.data.reader import ShardReader
from t2idist.data.sample_format import SampleRecord
from t2idist.data.samples import DecodedImage, EncodedImage
from t2idist.data.shards import Dataset
from t2idist.data.transforms import decode
from tests.helpers.shard_sets import assert_batches_equal, write_set

SAMPLES = 40
ROOM = 1 << 30


def sample(number: int, side: int = 24, vectors: bool = True) -> SampleRecord:
    """Return a sample as JPEG, PNG or WebP with a size of its own."""
    rng = np.random.default_rng(number)
    width, height = side + number % 5, side + number % 3
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    kind, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[number % 3]
    out = io.BytesIO()
    image.save(out, kind, lossless=True)
    drawn = rng.standard_normal((2, 3)).astype(np.float32) if vectors else None
    captions = (f"a red bird {number % 4}", "a blue bird")
    return SampleRecord("train", f"s{number:04d}", out.getvalue(), extension, captions, width, height, vectors=drawn)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    records = [sample(n) for n in range(SAMPLES)]
    return write_set(tmp_path_factory.mktemp("set") / "set", records, encoder={"name": "test"})


def batches(dataset: Dataset, cache: Path | None, count: int, cache_gib: float = 1.0) -> Iterator[Batch]:
    config = DataConfig(max_words=5, crop=1.1, cache=str(cache), cache_gib=cache_gib if cache else 0.0)
    spec = LoaderSpec(config, sizes=(8, 20), groups=[0, 1], total_groups=2, group_size=5)
    with open_loader(dataset, spec, seed=3) as loader:
        for _ in range(count):
            yield next(loader)


def open_cache(dataset: Dataset, folder: Path, limit_bytes: int = ROOM, shorter: int = 22) -> DecodedCache:
    cache = open_decoded_cache(folder, limit_bytes, dataset, "train", shorter)
    assert cache is not None
    return cache


def encoded(dataset: Dataset) -> list[EncodedImage]:
    reader, images = ShardReader(dataset, "train"), []
    for number, shard in enumerate(dataset.split("train").shards):
        images += reader.read_encoded(SampleRange(number, 0, shard.samples))
    return [image for image in images if isinstance(image, EncodedImage)]


def fill(dataset: Dataset, cache: DecodedCache) -> None:
    """Put all samples, and close the cache."""
    for index, image in enumerate(encoded(dataset)):
        cache.put(index, decode(image, 22))
    cache.close()


def cached(cache: DecodedCache) -> dict[int, DecodedImage]:
    return {index: image for index, image in enumerate(cache.find(range(SAMPLES))) if image is not None}


def assert_decoded(dataset: Dataset, images: dict[int, DecodedImage]) -> None:
    stored = encoded(dataset)
    for index, image in images.items():
        expected = decode(stored[index], 22)
        assert np.array_equal(image.pixels, expected.pixels)
        assert (image.size, image.vectors) == (expected.size, stored[index].vectors)


def files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.suffix != ".lock"]


def test_later_epochs_are_the_same_and_decode_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 3 * SAMPLES // 10
    for one, other in zip(batches(dataset, None, steps), batches(dataset, tmp_path, steps), strict=True):
        assert_batches_equal(one, other)
    expected = list(batches(dataset, None, steps))
    monkeypatch.setattr("t2idist.data.collate.decode", lambda *_: pytest.fail("an image is decoded again"))
    monkeypatch.setattr(ShardReader, "read_stored", lambda *_: pytest.fail("a shard is read again"))
    for one, other in zip(expected, batches(dataset, tmp_path, steps), strict=True):
        assert_batches_equal(one, other)


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_a_limit_is_kept_and_the_rest_is_decoded(dataset: Dataset, tmp_path: Path, share: float) -> None:
    whole = dataset.split("train").decoded_bytes
    limit_gib = share * whole / 2**30
    steps = 2 * SAMPLES // 10
    for one, other in zip(batches(dataset, None, steps), batches(dataset, tmp_path, steps, limit_gib), strict=True):
        assert_batches_equal(one, other)
    stored = files(tmp_path / "decoded")
    assert sum(512 * file.stat().st_blocks for file in stored) <= share * whole + 4096 + 32 * SAMPLES + 8192
    if share == 0.5:
        cache = open_cache(dataset, tmp_path / "decoded", int(share * whole))
        assert 10 <= len(cached(cache)) < SAMPLES
        assert_decoded(dataset, cached(cache))
        cache.close()
    else:
        assert not stored  # not even one image has room


def test_processes_of_a_host_share_the_file(dataset: Dataset, tmp_path: Path) -> None:
    reader = open_cache(dataset, tmp_path)
    assert not cached(reader)
    one, other = open_cache(dataset, tmp_path), open_cache(dataset, tmp_path)
    for index, image in enumerate(encoded(dataset)):
        (one if index % 3 else other).put(index, decode(image, 22))
        one.put(index, decode(image, 22))
    for each in (one, other):
        each.close()
    assert len(cached(reader)) == SAMPLES
    assert_decoded(dataset, cached(reader))
    used = sum(-(-(image.pixels.nbytes + len(image.vectors)) // 64) * 64 for image in cached(reader).values())
    assert used == reader._header[1]  # none was stored twice
    reader.close()
    assert len(files(tmp_path)) == 1


def fill_slowly(url: str, folder: str) -> None:
    """Put all samples one by one, after a line on stdout; never ends."""
    dataset = Dataset.open(url)
    images = [decode(image, 22) for image in encoded(dataset)]
    cache = open_cache(dataset, Path(folder))
    print("ready", flush=True)
    for index, image in enumerate(images):
        cache.put(index, image)
        time.sleep(0.002)
    threading.Event().wait()


def test_a_process_that_is_killed_leaves_whole_images(dataset: Dataset, tmp_path: Path) -> None:
    script = "import sys; from tests.data.test_decoded_cache import fill_slowly; fill_slowly(*sys.argv[1:])"
    command = [sys.executable, "-c", script, dataset.url, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.03)
        process.kill()
    cache = open_cache(dataset, tmp_path)
    assert_decoded(dataset, cached(cache))
    fill(dataset, cache)
    assert len(cached(open_cache(dataset, tmp_path))) == SAMPLES


def test_images_decoded_at_a_fraction_have_a_file_for_each_size(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", [sample(n, 100, vectors=False) for n in range(3)])
    for shorter in (20, 25, 26, 90):
        open_cache(dataset, tmp_path / "cache", shorter=shorter).close()
    assert len(files(tmp_path / "cache")) == 3  # nothing is decoded at a fraction for 26 and 90


def test_only_unused_files_are_removed(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_set(tmp_path / "other", [sample(n, vectors=False) for n in range(30)])
    folder = tmp_path / "cache"
    in_use = open_cache(dataset, folder)
    (name,) = (file.name for file in files(folder))
    before_restart = folder / f"{name.partition('-')[0]}-00000000-0000-0000-0000-000000000000"
    before_restart.write_bytes(bytes(100))
    limit_bytes = os.path.getsize(folder / name) + 20_000
    assert open_decoded_cache(folder, 1000, other, "train", 22) is None
    assert {file.name for file in files(folder)} == {name}
    idle = time.time() - decoded_cache.IDLE_SECONDS - 1
    os.utime(folder / name, (idle, idle))
    open_cache(other, folder, limit_bytes).close()  # has what the first leaves
    assert len(files(folder)) == 2 and sum(file.stat().st_size for file in files(folder)) < limit_bytes + 10_000
    fill(dataset, in_use)
    for file in files(folder):
        os.utime(file, (idle, idle - (file.name == name)))  # the one in question first
    third = write_set(tmp_path / "third", [sample(n, vectors=False) for n in range(20)])
    open_cache(third, folder, limit_bytes).close()
    assert {file.name for file in files(folder)}.isdisjoint({name})


def test_a_disk_that_fails_stops_no_run(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "decoded").write_text("not a folder")
    assert len(list(batches(dataset, tmp_path, 8))) == 8
    assert "decoded images are not cached in" in caplog.text
    (tmp_path / "decoded").unlink()
    written = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: written(file, data[: len(data) // 2], at))
    for one, other in zip(batches(dataset, None, 8), batches(dataset, tmp_path, 8), strict=True):
        assert_batches_equal(one, other)
    assert caplog.text.count("decoded images are no longer cached: only") == 1
    monkeypatch.undo()
    cache = open_cache(dataset, tmp_path / "decoded")
    assert not cached(cache)
    cache.close()


def test_a_remote_set_has_both_caches_within_one_limit(tmp_path: Path) -> None:
    url = f"memory://decoded-{uuid.uuid4().hex}"
    dataset = write_set(url, [sample(n) for n in range(SAMPLES)])
    stored = sum(shard.bytes for shard in dataset.split("train").shards)
    limit_bytes = stored + dataset.split("train").decoded_bytes // 2
    expected = list(batches(dataset, None, 8))
    for one, other in zip(expected, batches(dataset, tmp_path, 8, limit_bytes / 2**30), strict=True):
        assert_batches_equal(one, other)
    written = sum(512 * file.stat().st_blocks for file in tmp_path.rglob("*") if file.is_file())
    assert stored < written <= limit_bytes + 30_000
    storage.remove(url)
    for one, other in zip(expected, batches(dataset, tmp_path, 8, limit_bytes / 2**30), strict=True):
        assert_batches_equal(one, other)


def test_an_image_waits_for_the_disk_but_the_loader_does_not(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "_WAITING_BYTES", 10_000)
    written, slow = os.pwrite, threading.Event()
    monkeypatch.setattr(os, "pwrite", lambda *args: (slow.wait(), written(*args))[1])
    cache = open_cache(dataset, tmp_path)
    images = [decode(image, 22) for image in encoded(dataset)]
    for index, image in enumerate(images):
        cache.put(index, image)
    slow.set()
    cache.close()
    kept = cached(open_cache(dataset, tmp_path))
    assert 1 <= len(kept) < 8
    assert_decoded(dataset, kept)
