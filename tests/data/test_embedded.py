"""The embedded data: emoji that ship with the package, and avatars that are generated on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.config import DataConfig
from t2idist.data.embedded import avatar_cache
from t2idist.data.embedded.avatars import face, face_renderer
from t2idist.data.loader import load_split
from t2idist.data.order import SampleRange
from t2idist.data.reader import ShardReader
from t2idist.data.samples import EncodedImage
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.data.tokenizer import tokenize


def test_emoji_are_complete_and_small():
    dataset = open_dataset(DataConfig(source="emoji"))
    names = storage.list_dir(dataset.url)
    assert sum(storage.size(storage.join(dataset.url, name)) for name in names) < 6_000_000
    counts = {name: len(split) for name, split in dataset.splits.items()}
    assert counts == {"test": 629, "train": 3883, "val": 359}
    assert dataset.options["vendors"] == ["fluent", "noto", "twemoji"]
    classes = {}
    for name, split in dataset.splits.items():
        classes[name] = set(split.class_ids.tolist())
        assert {key.split("_")[0] for key in split.keys} == {"fluent", "noto", "twemoji"}
        for shard in split.shards:
            assert storage.sha256(storage.read_bytes(storage.join(dataset.url, shard.name))) == shard.sha256
    assert not classes["train"] & classes["test"] and not classes["train"] & classes["val"]
    loaded = load_split(dataset, "val", sizes=(32, 64), max_words=18)
    assert len(loaded.batch.ids) == 359 and loaded.batch.images[1].float().std() > 40
    assert int(loaded.batch.captions.lengths.min()) >= 1


@pytest.fixture(scope="module")
def avatars(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(DataConfig(source="avatars", samples=60, size=48, cache=str(tmp_path_factory.mktemp("cache"))))


def test_avatars_are_a_function_of_their_number(avatars: Dataset, tmp_path: Path):
    again = avatar_cache.ensure_avatars(60, 48, str(tmp_path), processes=3)
    for name in storage.list_dir(avatars.url):
        assert storage.read_bytes(storage.join(avatars.url, name)) == storage.read_bytes(storage.join(again, name))
    fewer = Dataset.open(avatar_cache.ensure_avatars(20, 48, str(tmp_path)))
    assert sorted(key for split in fewer.splits.values() for key in split.keys) == [
        f"avatar_{n:07d}" for n in range(20)
    ]
    train = avatars.split("train")
    number = int(train.keys[0].removeprefix("avatar_"))
    (stored,) = ShardReader(avatars, "train").read_encoded(SampleRange(0, 0, 1))
    assert isinstance(stored, EncodedImage) and stored.data == face_renderer(48)(number)
    assert train.captions(0) == list(face(number).captions)


def test_half_made_avatars_are_not_used_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(samples: int, size: int, processes: int) -> Iterator[bytes]:
        yield b"one image"
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(avatar_cache, "_render", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            avatar_cache.ensure_avatars(5, 32, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("avatars") and path.is_dir()]
    dataset = Dataset.open(avatar_cache.ensure_avatars(5, 32, str(tmp_path)))
    assert sum(len(split) for split in dataset.splits.values()) == 5


def test_failure_of_a_rendering_process_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(avatar_cache.sys, "executable", "false")
    with pytest.raises(RuntimeError, match=r"avatar 0 could not be rendered \(exit status 1\)"):
        list(avatar_cache._render(3, 32, 2))


def test_no_test_combination_is_in_the_train_split():
    faces = [face(number) for number in range(3000)]
    combinations = {split: {f.combination for f in faces if f.split == split} for split in ("train", "val", "test")}
    assert not combinations["train"] & combinations["test"] and not combinations["train"] & combinations["val"]
    shares = {split: sum(f.split == split for f in faces) / 3000 for split in combinations}
    assert 0.75 < shares["train"] < 0.85 and 0.11 < shares["test"] < 0.19 and 0.03 < shares["val"] < 0.08


def test_first_captions_name_every_evaluated_trait_and_all_name_hair_or_hat():
    for number in range(800):
        avatar = face(number)
        hair, skin, glasses, beard = avatar.combination.split("|")
        first = avatar.captions[0]
        assert all(trait in first for trait in (hair, f"{skin} skin", glasses, beard))
        assert len(tokenize(first)) <= 18
        assert all(hair in caption for caption in avatar.captions) and len(set(avatar.captions)) == 5
        named = set(avatar.attributes)
        assert (hair == "no hair") == ("Bald" in named)
        assert len([name for name in named if name.startswith("Skin_")]) == 1
        assert bool(glasses) == ("Eyeglasses" in named) and (glasses == "sunglasses") == ("Sunglasses" in named)
        assert ("Beard" in named) != ("No_Beard" in named)
        assert ("Mustache" in named) == ("mustache" in beard)
