"""What keeps data from teaching anything."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t2idist.data import statistics
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shards import Dataset
from tests.helpers.shard_sets import make_sample, png_image, write_set

SAMPLES = [make_sample(number, "train" if number < 30 else "test") for number in range(40)]


def texts(dataset: Dataset) -> str:
    return "\n".join(finding.text for finding in statistics.problems_of(dataset))


def with_attributes(*names: tuple[str, ...]) -> list[SampleRecord]:
    return [
        replace(sample, split="train", attributes=attributes)
        for sample, attributes in zip(SAMPLES, names, strict=False)
    ]


def test_good_data_has_no_findings_and_no_new_entries(tmp_path: Path) -> None:
    assert statistics.problems_of(write_set(tmp_path / "set", SAMPLES)) == []
    assert statistics.IMAGES_KEY not in json.loads((tmp_path / "set" / "dataset.json").read_text())


def test_no_train_split_is_fatal(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", [replace(sample, split="val") for sample in SAMPLES])
    first = statistics.problems_of(dataset)[0]
    assert first.fatal and first.text.startswith("no split 'train', only val")


def test_equal_captions(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", [replace(sample, captions=("a bird",)) for sample in SAMPLES])
    assert "split train: all captions are equal: 'a bird'" in texts(dataset)
    (finding,) = statistics.problems_for_text(dataset)
    assert finding.fatal and "'a bird'" in finding.text


def test_equal_images(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", [replace(sample, image=png_image(0)) for sample in SAMPLES])
    assert texts(dataset) == "all 40 images are equal"


def test_images_in_two_splits_are_counted_and_named(tmp_path: Path) -> None:
    leaked = [replace(sample, image=SAMPLES[index].image) for index, sample in enumerate(SAMPLES[30:33])]
    dataset = write_set(tmp_path / "set", [*SAMPLES[:30], *leaked, *SAMPLES[33:]])
    assert "3 images are in two splits (test/s0030 = train/s0000" in texts(dataset) or (
        "3 images are in two splits (train/s0000 = test/s0030" in texts(dataset)
    )


def test_equal_images_of_one_split_are_not_reported(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", [SAMPLES[0], replace(SAMPLES[1], image=SAMPLES[0].image), *SAMPLES[2:]])
    assert statistics.problems_of(dataset) == []


def test_statistics_of_images_agree_with_a_count_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    sizes = {"test": 40, "train": 200, "val": 0, "zoo": 60}
    splits = [split for split, size in sizes.items() for _ in range(size)]
    digests = [hashlib.sha256(bytes([number])).hexdigest()[:32] for number in rng.integers(0, 120, 300)]
    images = statistics.ImageStatistics(sizes)
    for position in rng.permutation(300):
        if position != 7:  # one that an older version did not hash
            images.add(int(position), digests[position])
    positions = [position for position in range(300) if position != 7]
    first = {digests[position]: position for position in reversed(positions)}
    across = [(first[digests[each]], each) for each in positions if splits[first[digests[each]]] != splits[each]]
    assert images.describe(str) == {
        "samples": 299, "different_images": len(first), "across_splits": len(across),
        "examples": [[f"{splits[each]}/{each}" for each in pair] for pair in across[:3]],
    }  # fmt: skip


def test_statistics_of_images_take_few_bytes_per_image() -> None:
    count = 200_000
    tracemalloc.start()
    try:
        images = statistics.ImageStatistics({"train": count, "val": 1})
        for position in range(count + 1):
            images.add(position, hashlib.sha256(b"%d" % (position % count)).hexdigest()[:32])
        held, _ = tracemalloc.get_traced_memory()
        found = images.describe(str)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == {
        "samples": count + 1, "different_images": count, "across_splits": 1, "examples": [["train/0", f"val/{count}"]],
    }  # fmt: skip
    assert held / count < 20 and peak / count < 40  # 244 as Python objects


@pytest.mark.parametrize(("left_out", "reported"), [(4, False), (5, True)])
def test_more_than_a_tenth_left_out(tmp_path: Path, left_out: int, reported: bool) -> None:
    dataset = write_set(tmp_path / "set", SAMPLES)
    rejected = {"truncated": {"left out": left_out}, "exif": {"repaired": 30}}
    dataset = replace(dataset, quality={"rejected": rejected})
    assert (f"{left_out} of {40 + left_out} images are left out: truncated {left_out}" in texts(dataset)) == reported


def test_files_without_an_image_are_not_counted_as_images(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", SAMPLES)
    rejected = {"captions_without_picture": {"left out": 80}, "truncated": {"left out": 4}}
    found = texts(replace(dataset, quality={"rejected": rejected}))
    assert found == "80 files or entries with captions have no image; rejected.jsonl lists them"


def test_attributes_of_all_and_of_nobody_by_split(tmp_path: Path) -> None:
    train = with_attributes(*[("Face", "Hat")] * 10, *[("Face",)] * 10)
    test = [
        replace(sample, split="test", attributes=("Tail", "Hat")[: 1 + i % 2]) for i, sample in enumerate(SAMPLES[30:])
    ]
    found = texts(write_set(tmp_path / "set", [*train, *test]))
    assert "split train: all of its 20 images have Face" in found
    assert "split train: none of its 20 images have Tail" in found
    assert (
        "split test: all of its 10 images have Tail" in found and "split test: none of its 10 images have Face" in found
    )
    assert "Hat" not in found


def test_labels_of_a_domain(tmp_path: Path) -> None:
    dataset = write_set(tmp_path / "set", with_attributes(*[("happy",), ("sad",)] * 14, (), ("happy", "sad")))
    assert statistics.problems_of_domain(dataset, ("happy", "sad"), exclusive=False) == []
    (finding,) = statistics.problems_of_domain(dataset, ("happy", "sad"), exclusive=True, where="model.domains[0]")
    assert finding.fatal and finding.text.startswith(
        "model.domains[0]: exclusive, but 1 of 30 images have none (such as s"
    )
    assert "and 1 of 30 images have several (such as s" in finding.text
    (finding,) = statistics.problems_of_domain(dataset, ("happy", "angry"), exclusive=False)
    assert finding.fatal and "no image of split train has angry" in finding.text
    assert "nearly all images have exactly one attribute, but 1 of 30 images have none" in texts(dataset)
