"""The data loader."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from t2idist.config import DataConfig
from t2idist.data.loader import load_split
from t2idist.data.order import Order
from t2idist.data.shards import Dataset
from t2idist.data.transforms import fill_pyramid
from tests.helpers.shard_sets import (
    assert_batches_equal,
    assert_same_on_device,
    make_loader,
    make_sample,
    png_image,
    take_batches,
    write_set,
)


def test_loader_follows_the_order_and_each_epoch_has_each_sample(small_set: Dataset):
    batches = take_batches(make_loader(small_set, [0, 1, 2, 3]), 5)
    order = Order(3, small_set.split("train").shard_sizes, 4, 6)
    expected = [
        small_set.split("train").keys[i] for step in range(5) for g in range(4) for i in order.sample_indices(step, g)
    ]
    ids = [key for batch in batches for key in batch.ids]
    assert ids == expected
    assert sorted(ids[:60]) == sorted(ids[60:]) == small_set.split("train").keys
    assert [tuple(image.shape) for image in batches[0].images] == [(24, 3, 8, 8), (24, 3, 16, 16)]
    assert batches[0].images[0].dtype == torch.uint8 and batches[0].groups == 4
    assert batches[0].captions.tokens.shape == (24, 5)
    assert torch.equal((batches[0].captions.tokens > 0).sum(1), batches[0].captions.lengths)


def test_any_partition_of_groups_and_any_resume_load_the_same(small_set: Dataset):
    whole = take_batches(make_loader(small_set, [0, 1, 2, 3]), 6)
    one_thread = DataConfig(max_words=5, threads=1, prefetch_mib=1)
    for owned in ([0, 2], [1], [3]):
        batches = take_batches(make_loader(small_set, owned, 3, config=one_thread), 3)
        for batch, all_groups in zip(batches, whole[3:], strict=True):
            rows = [group * 6 + i for group in owned for i in range(6)]
            assert batch.ids == tuple(all_groups.ids[row] for row in rows)
            assert torch.equal(batch.images[1], all_groups.images[1][rows])
            assert torch.equal(batch.captions.tokens, all_groups.captions.tokens[rows])
            assert torch.equal(batch.class_ids, all_groups.class_ids[rows])


def test_augmentation_differs_between_epochs_and_seeds_but_not_runs(small_set: Dataset):
    one, again, other = (take_batches(make_loader(small_set, [0], total_groups=1, seed=s), 20) for s in (3, 3, 4))
    for a, b in zip(one, again, strict=True):
        assert_batches_equal(a, b)
    assert [b.ids for b in one] != [b.ids for b in other]
    images: dict[str, list[torch.Tensor]] = {}
    for batch in one:
        for row, key in enumerate(batch.ids):
            images.setdefault(key, []).append(batch.images[1][row])
    differ = [not torch.equal(first, second) for first, second in images.values()]
    assert len(differ) == 60 and np.mean(differ) > 0.8


def test_each_row_of_each_group_has_its_own_augmentation(tmp_path: Path):
    dataset = write_set(tmp_path / "set", [make_sample(n, image=png_image(0)) for n in range(24)])
    config = DataConfig(max_words=5, crop=4.0, flip=False)
    (batch,) = take_batches(make_loader(dataset, [0, 1, 2, 3], config=config), 1)
    assert len({image.numpy().tobytes() for image in batch.images[1]}) == 24  # one image, 24 crops


def test_evaluation_loader_uses_the_first_caption(small_set: Dataset):
    with make_loader(small_set, [0], total_groups=1, training=False) as loader:
        batch = next(loader)
    split = small_set.split("train")
    for row, key in enumerate(batch.ids):
        caption = split.captions(split.keys.index(key))[0]
        assert batch.captions.tokens[row].tolist() == small_set.vocabulary.encode(caption, 5)[0].tolist()
        named = [name for name, has in zip(small_set.attribute_names, batch.attributes[row], strict=True) if has]
        assert named == sorted(split.attributes(split.keys.index(key)))


def test_tiny_set_begins_a_new_epoch_within_a_step(tmp_path: Path):
    dataset = write_set(tmp_path / "set", [make_sample(n) for n in range(5)])
    ids = [key for batch in take_batches(make_loader(dataset, [0, 1, 2, 3]), 5) for key in batch.ids]
    assert all(sorted(ids[i : i + 5]) == dataset.split("train").keys for i in range(0, 120, 5))


def test_bad_samples_are_replaced_from_their_group_and_quarantined(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    broken = {7: b"not an image", 21: png_image(21)[:-300]}
    clean = write_set(tmp_path / "clean", [make_sample(n) for n in range(30)])
    dataset = write_set(tmp_path / "set", [make_sample(n, image=broken.get(n)) for n in range(30)])
    shard = tmp_path / "set" / "train-00000.tar"
    flipped = bytearray(shard.read_bytes())
    flipped[int(dataset.split("train").offsets[3]) + 700] ^= 1
    shard.write_bytes(flipped)
    bad = {"s0003", "s0007", "s0021"}
    with caplog.at_level(logging.WARNING):
        loaders = [make_loader(d, [0, 1, 2, 3]) for d in (clean, dataset)]
        pairs = [(next(loaders[0]), next(loaders[1])) for _ in range(5)]
        quarantine = loaders[1].quarantine
        assert (loaders[0].samples_read, loaders[0].bad_reads) == (120, 0)
        assert (loaders[1].samples_read, loaders[1].bad_reads) == (120, 12)
        for loader in loaders:
            loader.close()
    assert set(quarantine) == bad
    assert "hash" in quarantine["s0003"] and "does not decode" in quarantine["s0007"]
    assert sum("is skipped" in message for message in caplog.messages) == 3  # once each, over four epochs
    seen = 0
    for good, patched in pairs:
        for row, (wanted, got) in enumerate(zip(good.ids, patched.ids, strict=True)):
            if wanted not in bad:
                assert got == wanted
                continue
            seen += 1
            group = good.ids[row - row % 6 : row - row % 6 + 6]
            before = [key for key in group[: row % 6] if key not in bad]
            fill = before[-1] if before else next(key for key in group if key not in bad)
            source = patched.ids.index(fill, row - row % 6)
            assert got == fill
            assert torch.equal(patched.images[1][row], patched.images[1][source])
            assert torch.equal(patched.captions.tokens[row], patched.captions.tokens[source])
    assert seen == 12


def test_batches_for_a_device_have_pixels_of_which_it_makes_the_pyramid(tmp_path: Path):
    samples = [make_sample(n, image=b"not an image" if n == 7 else None) for n in range(30)]
    dataset = write_set(tmp_path / "set", samples)
    plain = take_batches(make_loader(dataset, [0, 1, 2, 3]), 3)
    for_device = take_batches(make_loader(dataset, [0, 1, 2, 3], for_device=True), 3)
    for one, other in zip(plain, for_device, strict=True):
        assert [image.shape for image in other.images] == [(24, 16, 16, 4)]
        assert_same_on_device(one, other)


def test_group_without_a_good_sample_raises_with_names(tmp_path: Path):
    dataset = write_set(tmp_path / "set", [make_sample(n, image=b"x") for n in range(8)])
    with pytest.raises(ValueError, match=r"no sample of a group of 6 is usable .such as s000"):
        take_batches(make_loader(dataset, [0]), 1)


def test_next_raises_exceptions_of_threads_and_threads_end(tmp_path: Path):
    before = threading.active_count()
    dataset = write_set(tmp_path / "set", [make_sample(n) for n in range(40)])
    (tmp_path / "set" / "train-00001.tar").unlink()
    loader = make_loader(dataset, [0, 1])
    with pytest.raises(ValueError, match=r"train-00001.tar: is missing, though dataset.json lists it"):
        list(loader)
    with pytest.raises(ValueError, match="is missing"):
        next(loader)
    loader.close()
    assert threading.active_count() == before


def test_decode_threads_use_one_core_each(small_set: Dataset, monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []

    def spy(*args: object) -> None:
        counts.append(torch.get_num_threads())
        fill_pyramid(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("t2idist.data.collate.fill_pyramid", spy)
    torch.set_num_threads(2)
    try:
        with make_loader(small_set, [0]) as loader:
            take_batches(loader, 3)
        load_split(small_set, "test", sizes=(16,), max_words=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(counts) >= 4 and set(counts) == {1}


def test_close_ends_threads_at_any_time(small_set: Dataset):
    before = threading.active_count()
    for batches in (0, 1, 9):
        take_batches(make_loader(small_set, [0, 1]), batches)
    assert threading.active_count() == before
    loader = make_loader(small_set, [0])
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize("groups", [[], [4], [-1], [1, 1]])
def test_invalid_groups_are_rejected(small_set: Dataset, groups: list[int]):
    with pytest.raises(ValueError, match="of 0 to 3"):
        make_loader(small_set, groups)


def test_load_split_keeps_the_order_and_all_captions(small_set: Dataset):
    loaded = load_split(small_set, "test", sizes=(16,), max_words=5)
    split = small_set.split("test")
    assert loaded.batch.ids == tuple(split.keys) and loaded.batch.groups == 1
    assert [list(captions) for captions in loaded.captions] == [split.captions(i) for i in range(9)]
    assert loaded.attributes[4] == tuple(split.attributes(4))
    second = load_split(small_set, "test", sizes=(16,), max_words=5, caption=1)
    assert second.batch.captions.tokens[2].tolist() == small_set.vocabulary.encode(split.captions(2)[1], 5)[0].tolist()
    few = load_split(small_set, "train", sizes=(16,), max_words=5, limit=10, seed=1)
    assert len(few.batch.ids) == 10 and list(few.batch.ids) == sorted(few.batch.ids)
    assert few.batch.ids != load_split(small_set, "train", sizes=(16,), max_words=5, limit=10, seed=2).batch.ids
    whole = load_split(small_set, "train", sizes=(16,), max_words=5)
    rows = [whole.batch.ids.index(key) for key in few.batch.ids]
    assert torch.equal(whole.batch.images[0][rows], few.batch.images[0])


def test_load_split_leaves_out_bad_samples(tmp_path: Path):
    dataset = write_set(tmp_path / "set", [make_sample(n, image=b"x" if n == 2 else None) for n in range(5)])
    loaded = load_split(dataset, "train", sizes=(8,), max_words=5)
    assert loaded.batch.ids == ("s0000", "s0001", "s0003", "s0004")
    assert len(loaded.batch.images[0]) == len(loaded.captions) == 4
