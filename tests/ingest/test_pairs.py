"""Readers for image-to-image translation: domains, and pairs in two folders or side by side."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2idist.data.shards import Dataset
from tests.helpers.image_files import encode, make_image, read_rejects, save_image
from tests.ingest.test_check import find_problems

ROOT = Path(__file__).parents[2]
Run = Callable[..., int]


@pytest.fixture
def shard_folder() -> Run:
    """Run tools/shard_folder.py in this process; returns its exit status."""
    main = runpy.run_path(str(ROOT / "tools/shard_folder.py"))["main"]
    return lambda *arguments: main([*map(str, arguments), "--processes", "1"])


def stored_image(dataset: Dataset, key: str) -> np.ndarray:
    """Decode the stored image of a sample of split train."""
    for shard in dataset.split("train").shards:
        with tarfile.open(Path(dataset.url) / shard.name) as tar:
            for member in tar:
                if member.name.rsplit(".", 1)[0] == key and not member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
    raise AssertionError(key)


def test_each_image_of_a_domain_has_its_name_as_attribute(tmp_path: Path, shard_folder: Run) -> None:
    for number in range(3):
        save_image(tmp_path / f"horses/train/{number}.jpg", number)
        save_image(tmp_path / f"zebras/train/{number}.jpg", 10 + number)
    save_image(tmp_path / "horses/test/9.jpg", 20)
    save_image(tmp_path / "zebras/test/9.jpg", 21)
    domains = [f"--domain=horse={tmp_path / 'horses'}", f"--domain=zebra={tmp_path / 'zebras'}"]
    assert shard_folder(*domains, "--out", tmp_path / "out", "--size", 32) == 0
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.attribute_names == ("horse", "zebra") and not dataset.paired
    counts = {name: split.attribute_counts() for name, split in dataset.splits.items()}
    assert counts == {"train": {"horse": 3, "zebra": 3}, "test": {"horse": 1, "zebra": 1}}
    assert find_problems(dataset) == []


def test_published_unpaired_folders_are_domains_a_and_b(tmp_path: Path, shard_folder: Run) -> None:
    for number, folder in enumerate(("trainA", "trainB", "testA", "testB", "other")):
        save_image(tmp_path / "h2z" / folder / "n1.jpg", number)
    assert shard_folder("--folder", tmp_path / "h2z", "--out", tmp_path / "out", "--size", 32) == 0
    dataset = Dataset.open(str(tmp_path / "out"))
    counts = {name: split.attribute_counts() for name, split in dataset.splits.items()}
    assert counts == {"train": {"A": 1, "B": 1}, "test": {"A": 1, "B": 1}}
    assert read_rejects(tmp_path / "out") == [("other/n1.jpg", "no_split", "left out")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain=a={root}/a"], "it is the only domain"),
        (["--domain=a={root}/a", "--domain=a={root}/b"], "the domain a is given twice"),
        (["--domain=a={root}/a", "--domain=b"], "give NAME=FOLDER"),
        (["--domain=a={root}/a", "--domain=b={root}/empty"], "empty: no images found"),
        (["--pairs", "{root}/a", "{root}/empty"], "empty: no images found"),
        (["--pairs", "{root}/a", "{root}/c"], "no image has the name of another one"),
        (["--folder", "{root}/empty", "--side-by-side"], "no images found"),
        (["--pairs", "{root}/a", "{root}/b", "--side-by-side"], "--side-by-side: needs --folder"),
        (["--pairs", "{root}/a", "{root}/b", "--table", "t.csv"], "--table t.csv: images of domains and pairs"),
    ],
)
def test_folders_that_are_no_domains_or_pairs_are_refused(
    tmp_path: Path, shard_folder: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "c/2.jpg"):
        save_image(tmp_path / name)
    (tmp_path / "empty").mkdir()
    given = [each.format(root=tmp_path) for each in arguments]
    assert shard_folder(*given, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_pairs_of_two_folders_are_stored_side_by_side(tmp_path: Path, shard_folder: Run) -> None:
    for number in range(3):
        save_image(tmp_path / f"a/{number}.jpg", number)
        save_image(tmp_path / f"b/{number}.jpg", 10 + number)
    save_image(tmp_path / "a/alone.jpg", 5)
    save_image(tmp_path / "b/only.jpg", 6)
    save_image(tmp_path / "a/other.jpg", 7)
    save_image(tmp_path / "b/other.jpg", 8, size=(40, 40))
    (tmp_path / "a/empty.jpg").write_bytes(b"")
    save_image(tmp_path / "b/empty.jpg", 9)
    save_image(tmp_path / "a/torn.jpg", 9)
    (tmp_path / "b/torn.jpg").write_bytes(encode(make_image())[:300])
    options = ["--out", tmp_path / "out", "--size", 20, "--val", 0, "--test", 0]
    assert shard_folder("--pairs", tmp_path / "a", tmp_path / "b", *options) == 0
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.paired and sorted(dataset.split("train").keys) == ["0", "1", "2"]
    assert set(read_rejects(tmp_path / "out")) == {
        ("alone.jpg", "no_partner", "left out"),
        ("only.jpg", "no_partner", "left out"),
        ("other.jpg", "sizes_differ", "left out"),
        ("empty.jpg", "zero_bytes", "left out"),
        ("torn.jpg", "truncated", "left out"),
    }
    pair = stored_image(dataset, "1")
    assert pair.shape == (20, 60, 3)
    for half, seed in ((pair[:, :30], 1), (pair[:, 30:], 11)):
        expected = np.asarray(make_image(60, 40, seed=seed).resize((30, 20), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(half - expected).mean() < 5  # JPEG
    assert find_problems(dataset) == []


def test_images_side_by_side_are_pairs(tmp_path: Path, shard_folder: Run) -> None:
    for split in ("train", "test"):
        save_image(tmp_path / f"facades/{split}/1.jpg", 3, size=(80, 40))
    save_image(tmp_path / "facades/train/odd.jpg", 4, size=(81, 40))
    assert (
        shard_folder("--folder", tmp_path / "facades", "--side-by-side", "--out", tmp_path / "out", "--size", 40) == 0
    )
    dataset = Dataset.open(str(tmp_path / "out"))
    assert dataset.paired and {name: len(split) for name, split in dataset.splits.items()} == {"train": 1, "test": 1}
    assert read_rejects(tmp_path / "out") == [("train/odd.jpg", "sizes_differ", "left out")]
    (key,) = dataset.split("train").keys
    original = np.asarray(Image.open(tmp_path / "facades/train/1.jpg"))
    assert np.array_equal(stored_image(dataset, key), original), "an image that is small enough keeps its bytes"


def test_pairs_of_png_files_stay_exact_if_they_are_kept(tmp_path: Path, shard_folder: Run) -> None:
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(encode(make_image(33, 21, seed=seed), "PNG"))
    options = ["--out", tmp_path / "out", "--keep-original", "--val", 0, "--test", 0]
    assert shard_folder("--pairs", tmp_path / "a", tmp_path / "b", *options) == 0
    expected = np.concatenate([np.asarray(make_image(33, 21, seed=seed)) for seed in (1, 2)], axis=1)
    assert np.array_equal(stored_image(Dataset.open(str(tmp_path / "out")), "x"), expected)


def test_sets_of_single_images_do_not_mention_pairs(tmp_path: Path, shard_folder: Run) -> None:
    save_image(tmp_path / "mine/1.jpg")
    assert shard_folder("--folder", tmp_path / "mine", "--allow-no-captions", "--out", tmp_path / "out") == 0
    assert "pairs" not in json.loads((tmp_path / "out/dataset.json").read_text())["options"]


def test_a_pair_of_odd_width_is_found_by_the_check(tmp_path: Path, shard_folder: Run) -> None:
    save_image(tmp_path / "mine/1.jpg", size=(81, 40))
    assert shard_folder("--folder", tmp_path / "mine", "--allow-no-captions", "--out", tmp_path / "out") == 0
    dataset = Dataset.open(str(tmp_path / "out"))
    (problem,) = find_problems(replace(dataset, options={**dataset.options, "pairs": True}))
    assert problem == "1 and 0 others of split train: no pairs, as their width is odd"
