"""The writer of shard sets: the same bytes with any number of processes and after any interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.data.order import SampleRange
from t2idist.data.reader import ShardReader
from t2idist.data.sample_format import PackedSample
from t2idist.data.samples import EncodedImage
from t2idist.data.shards import Dataset
from t2idist.ingest.captions import CaptionOptions
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.image import ImageOptions
from t2idist.ingest.listing import Listing
from t2idist.ingest.prepare import MultiprocessPreparer, SampleResult, _ByteBudget
from t2idist.ingest.writer import IngestOptions, StrictError, _choose_shard_samples, write_set
from tests.helpers.image_files import encode, make_image, write_jsonl
from tests.helpers.object_store import SECRET, seaweedfs, store

ROOT = Path(__file__).parents[2]
TINY = IngestOptions(image=ImageOptions(size=8), shard_samples=256)


def write_folder(root: Path, count: int) -> Path:
    """Write images with captions.jsonl; every fiftieth is truncated, and one has no annotation."""
    root.mkdir()
    images = [encode(make_image(24, 16, seed=seed)) for seed in range(16)]
    rows = []
    for number in range(count):
        data = images[number % 16]
        (root / f"p{number:05d}.jpg").write_bytes(data[:-90] if number % 50 == 7 else data)
        rows.append({"image": f"p{number:05d}.jpg", "captions": [f"picture number {number}", "it is small"]})
    (root / "alone.jpg").write_bytes(images[0])
    write_jsonl(root / "captions.jsonl", list(rows))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("own") / "mine", 1000)


def write(root: Path, out: Path | str, processes: int = 1, options: IngestOptions = TINY, **more: object) -> dict:
    with Listing() as listing:
        list_folder(str(root), listing, FolderOptions(val=0.1, test=0))
        settings: dict = {"source": "folder", "licence": "mine", **more}
        return write_set(listing, str(out), options, processes=processes, **settings)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("done") / "set"
    write(folder, out)
    return contents(out)


def test_the_set_is_complete(folder: Path, finished: dict[str, bytes], tmp_path: Path):
    for name, data in finished.items():
        (tmp_path / name).write_bytes(data)
    dataset = Dataset.open(str(tmp_path))
    train, val = dataset.split("train"), dataset.split("val")
    assert len(train) + len(val) == 980 and train.shard_sizes[:-1] == [256] * (len(train.shards) - 1)
    assert len(train.shards) == 4 and 60 < len(val) < 140
    numbers = [int(key[1:]) for key in train.keys]
    assert numbers != sorted(numbers) and sum(a > b for a, b in pairwise(numbers)) > 300
    assert train.captions(5)[0] == f"picture number {numbers[5]}"
    samples = ShardReader(dataset, "train").read_encoded(SampleRange(1, 0, 256))
    assert all(isinstance(sample, EncodedImage) for sample in samples)
    description = json.loads(finished["dataset.json"])
    assert description["rejected"] == {
        "picture_without_captions": {"left out": 1}, "truncated": {"left out": 20},
    }  # fmt: skip
    assert description["captions"]["train"]["words_per_caption"] == {
        "min": 3, "mean": 3.0, "median": 3, "p95": 3, "max": 3,
    }  # fmt: skip
    assert description["options"]["size"] == 8 and description["vocabulary"]["picture"] == 980
    assert finished["rejected.jsonl"].count(b"\n") == 21
    assert description["captions"]["val"]["unknown_word_share"] == 0


@pytest.mark.whole
@pytest.mark.parametrize("processes", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    folder: Path, finished: dict[str, bytes], tmp_path: Path, processes: int
):
    write(folder, tmp_path / "set", processes)
    assert contents(tmp_path / "set") == finished


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("at", "stored"), [(1, 0), (300, 1), (530, 2), (999, 4)])
def test_the_same_call_resumes_after_the_last_stored_shard(
    folder: Path, finished: dict[str, bytes], tmp_path: Path, at: int, stored: int
):
    def kill(done: int, total: int, shards: int) -> None:
        if done == at:
            raise Killed

    out = tmp_path / "set"
    with pytest.raises(Killed):
        write(folder, out, report=kill)
    assert not (out / "dataset.json").exists()
    with pytest.raises(ValueError, match="no finished shard set"):
        Dataset.open(str(out))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(before) == stored
    shard_counts: list[int] = []
    write(folder, out, report=lambda done, total, shards: shard_counts.append(shards))
    assert contents(out) == finished
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert shard_counts[0] == len(before)


def stop_after(folder: Path, out: Path, images: int, options: IngestOptions = TINY) -> None:
    def kill(done: int, total: int, shards: int) -> None:
        if done == images:
            raise Killed

    with pytest.raises(Killed):
        write(folder, out, options=options, report=kill)


def test_other_options_are_refused_and_restart_starts_again(folder: Path, finished: dict[str, bytes], tmp_path: Path):
    out = tmp_path / "set"
    other = IngestOptions(image=ImageOptions(size=8, quality=80), shard_samples=256)
    stop_after(folder, out, 900, other)
    with pytest.raises(ValueError, match=r"started with another quality .then 80, now 95.; .* --restart"):
        write(folder, out)
    write(folder, out, restart=True)
    assert contents(out) == finished
    with pytest.raises(ValueError, match="finished shard set already"):
        write(folder, out)


@pytest.mark.parametrize("damage", ["shard missing", "shard short", "record damaged", "left overs"])
def test_damage_between_two_runs_is_repaired(folder: Path, finished: dict[str, bytes], tmp_path: Path, damage: str):
    out = tmp_path / "set"
    stop_after(folder, out, 900)
    if damage == "shard missing":
        (out / "train-00001.tar").unlink()
    elif damage == "shard short":
        (out / "train-00000.tar").write_bytes(b"short")
    elif damage == "record damaged":
        (out / "progress" / "train-00001.tar.json").write_text("{")
    else:
        (out / ".train-00003.tar.0123abcd").write_bytes(b"half")
        (out / "progress" / ".train-00003.tar.json.0123abcd").write_bytes(b"half")
    write(folder, out)
    assert contents(out) == finished


def test_strict_stops_at_the_first_problem(folder: Path, tmp_path: Path):
    with pytest.raises(StrictError, match="alone.jpg: picture_without_captions"):
        write(folder, tmp_path / "a", strict=True)
    clean = write_folder(tmp_path / "clean", 60)
    (clean / "alone.jpg").unlink()
    with pytest.raises(StrictError, match="p00.07.jpg: truncated, left out"):
        write(clean, tmp_path / "b", strict=True)
    assert not (tmp_path / "b" / "dataset.json").exists()
    for number in (7, 57):
        (clean / f"p{number:05d}.jpg").write_bytes(encode(make_image(24, 16)))
    write(clean, tmp_path / "b", strict=True)
    assert (tmp_path / "b" / "rejected.jsonl").read_bytes() == b""


def test_data_without_usable_images_is_refused(tmp_path: Path):
    root = tmp_path / "mine"
    root.mkdir()
    (root / "a.jpg").write_bytes(b"")
    write_jsonl(root / "captions.jsonl", [{"image": "a.jpg", "caption": "nothing"}])
    with pytest.raises(ValueError, match="no image is usable: zero_bytes 1"):
        write(root, tmp_path / "set")
    with pytest.raises(ValueError, match="--max-megapixels 100: above 64 the images must be stored smaller"):
        IngestOptions(image=ImageOptions(size=0, max_megapixels=100))
    with pytest.raises(ValueError, match="--shard-samples 100: must be a multiple of 256"):
        IngestOptions(shard_samples=100)


def test_the_reasons_are_told_when_every_image_is_rejected(tmp_path: Path):
    root = tmp_path / "mine"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.jpg").write_bytes(b"<html>not found</html>")
        (root / f"{number}.txt").write_text("\na caption")  # an empty caption is no reason
    arguments = ["--folder", str(root), "--processes", "1", "--val", "0", "--test", "0"]
    ended = subprocess.run(
        tool("shard_folder", *arguments, "--out", str(tmp_path / "set")), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "no image is usable: empty_caption 5, not_a_picture 5; the first: " in ended.stderr
    assert ended.stderr.count(".jpg: not_a_picture, left out: not JPEG, PNG") == 3
    assert ended.stderr.rstrip().endswith(f"all of them are in {tmp_path}/set/rejected.jsonl")
    assert len((tmp_path / "set" / "rejected.jsonl").read_text().splitlines()) == 10
    for number in range(5):  # once mended, the same command writes the set
        (root / f"{number}.jpg").write_bytes(encode(make_image(24, 16)))
    again = subprocess.run(tool("shard_folder", *arguments, "--out", str(tmp_path / "set")), check=False)
    assert again.returncode == 0 and len(Dataset.open(str(tmp_path / "set")).split("train").keys) == 5


def test_the_limit_of_pixels_is_in_the_description_only_if_it_was_given():
    assert "max_megapixels" not in IngestOptions().describe()
    assert IngestOptions(image=ImageOptions(max_megapixels=80)).describe()["max_megapixels"] == 80


def test_long_captions_are_cut_and_rare_words_are_unknown(folder: Path, tmp_path: Path):
    options = IngestOptions(image=ImageOptions(size=8), max_words=2, min_count=2)
    description = write(folder, tmp_path / "set", options=options)
    assert description["captions_cut"] == 1960
    assert set(description["vocabulary"]) == {"picture", "number", "it", "is"}
    dataset = Dataset.open(str(tmp_path / "set"))
    assert dataset.split("val").captions(0) == ["picture number", "it is"]


@pytest.mark.parametrize(
    ("sample_bytes", "requested", "expected"),
    [(10_000, 1024, 1024), (200_000, 1024, 512), (400_000, 1024, 256), (600_000, 1024, 128), (60 << 20, 1024, 8)],
)
def test_shards_of_large_images_hold_fewer_samples(sample_bytes: int, requested: int, expected: int):
    class LargeBytes(bytes):
        def __len__(self) -> int:
            return sample_bytes

    results = (SampleResult(PackedSample(LargeBytes(), {"n": n}), ()) for n in range(400))
    shard_samples, same_results = _choose_shard_samples(results, requested)
    assert shard_samples == expected
    assert [result.packed.row["n"] for result in same_results if result.packed] == list(range(400))


def test_prefetching_respects_the_byte_limit_and_the_order():
    budget = _ByteBudget(100)
    order = []

    def acquire(ticket: int, size: int) -> None:
        budget.acquire(ticket, size)
        order.append(ticket)

    threads = [threading.Thread(target=acquire, args=(t, s)) for t, s in ((3, 10), (2, 500), (1, 60), (0, 60))]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert order == [0]
    for size, expected in ((60, [0, 1]), (60, [0, 1, 2]), (500, [0, 1, 2, 3])):
        budget.release(size)
        time.sleep(0.1)
        assert order == expected
    for thread in threads:
        thread.join(5)


@pytest.mark.whole
def test_errors_and_deaths_of_workers_are_reported(folder: Path):
    with Listing() as listing:
        list_folder(str(folder), listing, FolderOptions(val=0, test=0))
        preparer = MultiprocessPreparer(ImageOptions(), CaptionOptions(), 2)
        try:
            results = preparer.run(listing.images("train"))
            assert len(list(islice(results, 20))) == 20
            preparer._processes[0].kill()
            with pytest.raises(RuntimeError, match=r"exited unexpectedly .exit status -9"):
                list(results)
        finally:
            preparer.close()
        (folder / "locked").mkdir(exist_ok=True)
        listing.add("other", "x.jpg", "nothere://bucket/x.jpg")
        preparer = MultiprocessPreparer(ImageOptions(), CaptionOptions(), 1)
        try:
            with pytest.raises(ValueError, match="this URL cannot be opened"):
                list(preparer.run(listing.images("other")))
        finally:
            preparer.close()


def tool(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments]


def shard_folder(folder: Path, out: Path | str, processes: int = 2) -> list[str]:
    arguments = ["--folder", str(folder), "--out", str(out), "--size", "8", "--shard-samples", "256", "--val", "0.1"]
    return tool("shard_folder", *arguments, "--test", "0", "--processes", str(processes), "--licence", "mine")


@pytest.mark.slow
def test_a_killed_tool_resumes_and_its_workers_exit(folder: Path, finished: dict[str, bytes], tmp_path: Path):
    out = tmp_path / "set"
    for shards in (0, 2):
        process = subprocess.Popen(shard_folder(folder, out), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((out / "progress").glob("*.json"))) < shards or not child_pids(process.pid):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = child_pids(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if has_record(path)}
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    ended = subprocess.run(shard_folder(folder, out), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert contents(out) == finished
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items()) and len(kept) >= 2
    assert "truncated" in ended.stdout and "980" not in ended.stderr


def has_record(shard: Path) -> bool:
    return (shard.parent / "progress" / f"{shard.name}.json").exists()


def child_pids(pid: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.whole
def test_tools_print_one_line_and_return_the_status_after_errors(folder: Path, tmp_path: Path):
    def run(*arguments: str) -> tuple[int, str]:
        process = subprocess.run(tool(*arguments), capture_output=True, text=True, timeout=60, check=False)
        return process.returncode, process.stderr

    out = str(tmp_path / "set")
    assert run("shard_coco", "--coco", str(folder), "--out", out)[0] == 2
    status, error = run("shard_cub", "--cub", str(folder), "--out", out)
    assert (
        status == 2
        and error.startswith("shard_cub.py: the folder CUB_200_2011 was not found")
        and error.count("\n") == 1
    )
    status, error = run("shard_folder", "--folder", str(folder), "--out", out, "--strict", "--processes", "1")
    assert status == 1 and "alone.jpg: picture_without_captions" in error and error.count("\n") == 1
    status, error = run("shard_celeba", "--celeba", "pipe:cat /etc/passwd", "--out", out)
    assert status == 2 and "not allowed" in error
    for delay in (0.5, 0.2, 0.1, 0.0):  # a fast machine may finish before the interrupt
        interrupted = f"{out}-{delay}"
        process = subprocess.Popen(
            shard_folder(folder, interrupted), stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
        )  # fmt: skip
        while len(child_pids(process.pid)) < 2:
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        if process.returncode:
            break
    assert process.returncode == 130 and "run the same command again to resume" in error


@pytest.fixture(scope="module")
def object_store() -> Iterator[dict[str, str]]:
    with seaweedfs() as environment:
        yield environment


@pytest.mark.slow
def test_object_stores_as_source_and_destination(
    folder: Path,
    finished: dict[str, bytes],
    tmp_path: Path,
    object_store: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
):
    address = object_store["AWS_ENDPOINT_URL"]
    remote = store(address)
    remote.put(str(folder) + "/", "bucket/mine/", recursive=True)
    env = {name: value for name, value in object_store.items() if name != "AWS_ENDPOINT_URL"}
    command = [*shard_folder(folder, "s3://bucket/set"), "--endpoint-url", address]
    command[command.index(str(folder))] = "s3://bucket/mine"
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and not remote.exists("bucket/set/train-00000.tar"):
        time.sleep(0.05)
        remote.invalidate_cache()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert SECRET not in ended.stdout + ended.stderr
    remote.invalidate_cache()
    stored = {name.removeprefix("bucket/set/"): remote.cat_file(name) for name in remote.find("bucket/set")}
    assert stored == finished
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, object_store[name])
    assert len(Dataset.open("s3://bucket/set", endpoint_url=address).split("train").shards) == 4
    check = tool("check_shards", "s3://bucket/set", "--endpoint-url", address, "--processes", "2")
    ended = subprocess.run(check, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0 and "problems: none" in ended.stdout, ended.stdout + ended.stderr


def test_sets_in_memory_are_written_in_process(tmp_path: Path):
    data = encode(make_image(24, 16))
    for number in range(5):
        storage.write_bytes(f"memory://own/{number}.jpg", data)
        storage.write_bytes(f"memory://own/{number}.txt", b"a picture")
    with Listing() as listing:
        list_folder("memory://own", listing, FolderOptions(val=0, test=0))
        write_set(listing, "memory://own-set", TINY, source="x", licence="x", processes=2)
    assert len(Dataset.open("memory://own-set").split("train")) == 5
    assert storage.list_dir("memory://own-set/progress") == []


def peak_kib(command: list[str]) -> list[int]:
    """Return the peak resident memory of a tool and of its workers, largest first."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in [process.pid, *child_pids(process.pid)]:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            peak = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
            peaks[pid] = max([peaks.get(pid, 0), *peak])
        time.sleep(0.05)
    assert process.returncode == 0
    main = peaks.pop(process.pid)
    return [main, *sorted(peaks.values(), reverse=True)[:2]]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path):
    peaks = []
    for count in (5000, 20_000):
        root = write_folder(tmp_path / f"mine{count}", count)
        peaks.append(peak_kib(shard_folder(root, tmp_path / f"set{count}")))
    for few, many in zip(*peaks, strict=True):
        assert many < 1.1 * few, peaks
