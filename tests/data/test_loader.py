"""Captions, shard sets and the stream."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import random
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from t2idist.config import DataConfig
from t2idist.contract import Batch
from t2idist.data import sample_format
from t2idist.data.loader import Loader, load_split, open_loader
from t2idist.data.order import Order, SampleRange, draws
from t2idist.data.reader import Bad, Encoded, ShardReader
from t2idist.data.sample_format import SampleRecord, header
from t2idist.data.shard_writer import write_shards
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.data.tokenizer import Vocabulary, tokenise
from t2idist.data.transforms import DecodedImage, crop_and_flip, decode, fill_pyramid, shorter_side

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "happy", "sad", "old", "new"]


def png(number: int, size: tuple[int, int] = (20, 24)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def sample(number: int, split: str = "train", image: bytes | None = None) -> SampleRecord:
    said = random.Random(number)
    captions = tuple(" ".join(said.choices(WORDS, k=length)) for length in (3, 12))
    return SampleRecord(split, f"s{number:04d}", image or png(number), "png", captions, 20, 24, (WORDS[number % 3],))


def write(url: Path | str, samples: list[SampleRecord], **options: object) -> Dataset:
    write_shards(str(url), samples, source="test", licence="none", shard_samples=17, **options)  # type: ignore[arg-type]
    return Dataset.open(str(url))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    splits = ["train"] * 60 + ["test"] * 9
    return write(tmp_path_factory.mktemp("small") / "set", [sample(n, split) for n, split in enumerate(splits)])


def loader(dataset: Dataset, groups: list[int], step0: int = 0, **changed: object) -> Loader:
    settings: dict = {"total_groups": 4, "group_size": 6, "seed": 3, "sizes": (8, 16), **changed}
    config = settings.pop("config", DataConfig(max_words=5, threads=2))
    return open_loader(dataset, "train", config=config, groups=groups, step0=step0, **settings)


def take(stream: Loader, count: int) -> list[Batch]:
    with stream:
        return [next(stream) for _ in range(count)]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.ids == other.ids
    tensors = [
        (*b.images, b.captions.tokens, b.captions.lengths, b.captions.vectors, b.class_ids, b.attributes)
        for b in (one, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


# ------------------------------------------------------------------------------------------------ text
def test_tokenise_as_the_papers_do():
    words = tokenise("This bird's WING-bars:\ufffd\ufffdblack & white_1!")
    assert words == ["this", "bird", "s", "wing", "bars", "black", "white_1"]
    assert tokenise("caf\u00e9 \u4e2d\u6587 ok") == ["caf", "ok"]
    assert tokenise(" ,;- ") == []


def test_vocabulary_order_and_padding():
    words = Vocabulary.from_counts({"b": 2, "a": 2, "c": 5, "rare": 1}, min_count=2)
    assert words.words == ("<end>", "c", "a", "b")
    ids, length = words.encode("a rare c B", 5)
    assert (ids.tolist(), length) == ([2, 1, 3, 0, 0], 3)
    assert words.unknown("a Rare thing, rare") == ["rare", "thing"]
    assert words.decode(ids) == ["a", "c", "b"]
    with pytest.raises(ValueError, match="no word of the caption 'nothing known' is in the vocabulary of 4 words"):
        words.encode("nothing known", 5)
    with pytest.raises(ValueError, match="<end>"):
        Vocabulary(["a", "b"])


def test_long_captions_lose_their_end_or_random_words():
    words = Vocabulary(["<end>", *"abcdefgh"])
    caption = "a b c d e f g h"
    assert words.encode(caption, 3)[0].tolist() == [1, 2, 3]
    kept = {tuple(words.encode(caption, 3, seed)[0].tolist()) for seed in range(200)}
    assert len(kept) > 40  # of 56 subsets
    assert all(list(ids) == sorted(ids) and ids[0] > 0 for ids in kept)


# ------------------------------------------------------------------------------------------------ shards
def test_writer_gives_the_same_bytes_and_a_plain_tar(tmp_path: Path):
    samples = [sample(n, "train" if n % 3 else "val") for n in range(40)]
    write(tmp_path / "a", samples)
    write(tmp_path / "b", samples)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["dataset.json", "manifest.parquet", "train-00000.tar", "train-00001.tar", "val-00000.tar"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "val-00000.tar") as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == ["s0000.png", "s0000.json", "s0003.png"]
        assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
        assert json.load(tar.extractfile("s0003.json"))["captions"] == list(samples[3].captions)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_what_is_written_is_read(tmp_path: Path, compress: bool, place: str):
    url = str(tmp_path / "set") if place == "disk" else f"memory://written-{compress}"
    samples = [sample(n) for n in range(40)]
    dataset = write(url, samples, compress=compress)
    split = dataset.split("train")
    assert split.shard_sizes == [17, 17, 6]
    assert split.keys == [s.key for s in samples]
    assert split.captions(20) == list(samples[20].captions)
    assert split.attributes(20) == ["blue"]
    assert split.class_ids.tolist() == list(range(40))
    assert dataset.vocabulary.words[0] == "<end>" and set(dataset.vocabulary.words[1:]) == set(WORDS)
    reader = ShardReader(dataset, "train")
    assert [e.data for e in reader.read(SampleRange(1, 3, 9))] == [s.image for s in samples[20:29]]


def test_writer_refuses_what_would_go_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match="'s0001' comes twice"):
        write(tmp_path / "twice", [sample(1), sample(1)])
    with pytest.raises(ValueError, match="no sample"):
        write(tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"key '../etc/x'"):
        SampleRecord("train", "../etc/x", b"", "png", (), 1, 1)
    with pytest.raises(ValueError, match="extension 'pkl'"):
        SampleRecord("train", "x", b"", "pkl", (), 1, 1)
    write(tmp_path / "done", [sample(1)])
    with pytest.raises(ValueError, match="finished shard set already"):
        write(tmp_path / "done", [sample(1)])


def damaged(tmp_path: Path, what: str) -> Path:
    folder = tmp_path / "set"
    write(folder, [sample(n) for n in range(30)])
    description = json.loads((folder / "dataset.json").read_text())
    shard = folder / "train-00001.tar"
    if what == "cut":
        shard.write_bytes(shard.read_bytes()[:-5000])
    elif what == "missing":
        shard.unlink()
    elif what == "manifest":
        (folder / "manifest.parquet").write_bytes((folder / "manifest.parquet").read_bytes()[:-1] + b"x")
    elif what == "version":
        description["schema"] = 7
    elif what == "keys":
        del description["vocabulary"]
    elif what == "outside":
        description["splits"]["train"]["shards"][0]["name"] = "../x.tar"
    elif what == "count":
        description["splits"]["train"]["shards"][1]["samples"] -= 1
    elif what == "places":
        table = pq.read_table(folder / "manifest.parquet")
        moved = pa.array([offset + 512 for offset in table["offset"].to_pylist()])
        pq.write_table(table.set_column(3, "offset", moved), folder / "manifest.parquet")
        data = (folder / "manifest.parquet").read_bytes()
        description["manifest"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    elif what == "json":
        (folder / "dataset.json").write_text("{")
        return folder
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("cut", r"train-00001.tar: has \d+ bytes; dataset.json says \d+ bytes"),
        ("missing", "train-00001.tar: is missing"),
        ("manifest", "manifest.parquet: its .* bytes are not those"),
        ("version", "schema version 7; this program reads 2"),
        ("keys", "not a shard set's description.*vocabulary"),
        ("outside", "shard name '../x.tar'; allowed are plain file names"),
        ("count", "manifest.parquet: 30 rows; dataset.json counts 29|do not fit"),
        ("places", "the places of the samples of train-00000.tar do not fit its size"),
        ("json", "not JSON"),
    ],
)
def test_a_damaged_set_gives_a_sentence(tmp_path: Path, what: str, says: str):
    with pytest.raises(ValueError, match=says):
        Dataset.open(str(damaged(tmp_path, what)))


def test_missing_sets_splits_and_sources_give_a_sentence(small: Dataset, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no dataset.json there"):
        Dataset.open(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no split 'valid'; there are test, train"):
        small.split("valid")
    with pytest.raises(ValueError, match=r"'emojis' .did you mean emoji.*; allowed are avatars, emoji and the URL"):
        open_dataset(DataConfig(source="emojis"))
    with pytest.raises(ValueError, match="pipe"):
        open_dataset(DataConfig(source="pipe:cat /etc/passwd"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s0002.x/../y.png", "'s0002.x/../y.png' is not allowed"),
        ("/etc/x.png", "no tar header of sample s0002"),
        ("s0002.pkl", "no picture (webp, png, jpg) among its members ['pkl']"),
    ],
)
def test_a_hostile_member_spoils_only_its_own_sample(
    tmp_path: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch
):
    real = sample_format.member
    renamed = {"s0002.png": name}
    monkeypatch.setattr(sample_format, "member", lambda n, data: real(renamed.get(n, n), data))
    dataset = write(tmp_path / "set", [sample(n) for n in range(5)])
    read = ShardReader(dataset, "train").read(SampleRange(0, 0, 5))
    assert [isinstance(found, Bad) for found in read] == [False, False, True, False, False]
    assert isinstance(read[2], Bad) and says in read[2].reason


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path):
    dataset = write(tmp_path / "set", [sample(n) for n in range(5)], compress=True)
    shard = tmp_path / "set" / dataset.split("train").shards[0].name
    shard.write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(ValueError, match=r"unpacks to .* bytes or more"):
        ShardReader(dataset, "train").read(SampleRange(0, 0, 5))


# ------------------------------------------------------------------------------------------------ pictures
def whole_size(image: Image.Image) -> DecodedImage:
    return DecodedImage(image, image.size)


def photo(width: int, height: int) -> Image.Image:
    """Something with structure at several scales, the finest weak, as photographs have."""
    scales = [Image.effect_noise((width // by, height // by), 90).resize((width, height), 3) for by in (64, 16)]
    return Image.merge("RGB", [Image.blend(*scales, share) for share in (0.1, 0.3, 0.5)])


@pytest.mark.parametrize(("size", "factor"), [((900, 601), 1), ((1216, 1219), 2), ((3001, 2500), 4)])
def test_large_jpegs_are_decoded_at_a_fraction_with_the_same_crop(size: tuple[int, int], factor: int):
    out = io.BytesIO()
    photo(*size).save(out, "JPEG", quality=95)
    whole = decode(Encoded(out.getvalue(), "jpg"))
    drafted = decode(Encoded(out.getvalue(), "jpg"), shorter_side(256, 304 / 256))
    assert drafted.size == whole.size == size
    assert drafted.image.size == tuple(-(-side // factor) for side in size)
    for row in [*draws(1, 0, 4), None]:
        one, other = (
            np.asarray(crop_and_flip(picture, 256, 304 / 256, True, row)).astype(int) for picture in (whole, drafted)
        )
        assert np.abs(one - other).mean() < 0.6


def test_crop_equals_resize_then_crop_and_pyramid_is_antialiased():
    image = Image.effect_noise((150, 90), 60).convert("RGB")
    row = draws(1, 1, 1)[0]
    whole = image.resize((round(150 * 76 / 90), 76), Image.Resampling.BILINEAR)
    x, y = int(row[0]) % (whole.width - 64 + 1), int(row[1]) % (76 - 64 + 1)
    expected = np.asarray(whole.crop((x, y, x + 64, y + 64))).astype(int)
    made = crop_and_flip(whole_size(image), 64, 76 / 64, False, row)
    assert np.abs(np.asarray(made).astype(int) - expected).max() <= 2
    pictures = np.stack([np.asarray(picture) for picture in (made, made.rotate(90))])
    high, *lower = [np.empty((2, 3, size, size), np.uint8) for size in (64, 16, 32)]
    fill_pyramid(pictures, [*lower, high])
    assert np.array_equal(high, pictures.transpose(0, 3, 1, 2))
    for low in lower:
        size = low.shape[-1]
        for ours, picture in zip(low, (made, made.rotate(90)), strict=True):
            theirs = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            assert np.abs(ours.astype(int) - theirs).max() <= 1  # equal on x86; other processors round otherwise


def test_flips_are_drawn_and_centre_crops_are_not():
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    made = [np.asarray(crop_and_flip(whole_size(image), 64, 1.0, True, row)) for row in draws(1, 0, 40)]
    mirrored = sum(np.array_equal(m, np.asarray(image)[:, ::-1]) for m in made)
    straight = sum(np.array_equal(m, np.asarray(image)) for m in made)
    assert mirrored + straight == 40 and 8 <= mirrored <= 32
    assert np.array_equal(np.asarray(crop_and_flip(whole_size(image), 64, 1.0, True, None)), np.asarray(image))


def test_transparency_is_laid_on_white_and_damage_is_a_reason():
    out = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(out, "PNG")
    assert decode(Encoded(out.getvalue(), "png")).image.getpixel((1, 1)) == (255, 255, 255)
    with pytest.raises(ValueError, match="does not decode"):
        decode(Encoded(png(1)[:-400], "png"))
    with pytest.raises(ValueError, match="does not decode"):
        decode(Encoded(png(1), "jpg"))  # no other decoder than the name's
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        decode(Encoded(out.getvalue(), "png"))


# ------------------------------------------------------------------------------------------------ stream
def test_stream_is_the_order_and_each_epoch_has_each_sample(small: Dataset):
    batches = take(loader(small, [0, 1, 2, 3]), 5)
    order = Order(3, small.split("train").shard_sizes, 4, 6)
    expected = [
        small.split("train").keys[i] for step in range(5) for g in range(4) for i in order.sample_index(step, g)
    ]
    ids = [key for batch in batches for key in batch.ids]
    assert ids == expected
    assert sorted(ids[:60]) == sorted(ids[60:]) == small.split("train").keys
    assert [tuple(image.shape) for image in batches[0].images] == [(24, 3, 8, 8), (24, 3, 16, 16)]
    assert batches[0].images[0].dtype == torch.uint8 and batches[0].groups == 4
    assert batches[0].captions.tokens.shape == (24, 5)
    assert torch.equal((batches[0].captions.tokens > 0).sum(1), batches[0].captions.lengths)


def test_any_workers_and_any_resume_give_the_same(small: Dataset):
    whole = take(loader(small, [0, 1, 2, 3]), 6)
    one_thread = DataConfig(max_words=5, threads=1, prefetch_mib=1)
    for owned in ([0, 2], [1], [3]):
        for batch, all_groups in zip(take(loader(small, owned, 3, config=one_thread), 3), whole[3:], strict=True):
            rows = [group * 6 + place for group in owned for place in range(6)]
            assert batch.ids == tuple(all_groups.ids[row] for row in rows)
            assert torch.equal(batch.images[1], all_groups.images[1][rows])
            assert torch.equal(batch.captions.tokens, all_groups.captions.tokens[rows])
            assert torch.equal(batch.class_ids, all_groups.class_ids[rows])


def test_draws_differ_between_epochs_and_seeds_but_not_runs(small: Dataset):
    one, again, other = (take(loader(small, [0], total_groups=1, seed=s), 20) for s in (3, 3, 4))
    for a, b in zip(one, again, strict=True):
        assert_equal(a, b)
    assert [b.ids for b in one] != [b.ids for b in other]
    pictures: dict[str, list[torch.Tensor]] = {}
    for batch in one:
        for row, key in enumerate(batch.ids):
            pictures.setdefault(key, []).append(batch.images[1][row])
    differ = [not torch.equal(first, second) for first, second in pictures.values()]
    assert len(differ) == 60 and np.mean(differ) > 0.8


def test_each_place_of_each_group_has_draws_of_its_own(tmp_path: Path):
    dataset = write(tmp_path / "set", [sample(n, image=png(0)) for n in range(24)])
    config = DataConfig(max_words=5, crop=4.0, flip=False)
    (batch,) = take(loader(dataset, [0, 1, 2, 3], config=config), 1)
    assert len({picture.numpy().tobytes() for picture in batch.images[1]}) == 24  # one picture, 24 crops


def test_evaluation_stream_draws_nothing(small: Dataset):
    with loader(small, [0], total_groups=1, training=False) as stream:
        batch = next(stream)
    split = small.split("train")
    for row, key in enumerate(batch.ids):
        caption = split.captions(split.keys.index(key))[0]
        assert batch.captions.tokens[row].tolist() == small.vocabulary.encode(caption, 5)[0].tolist()
        named = [name for name, has in zip(small.attribute_names, batch.attributes[row], strict=True) if has]
        assert named == sorted(split.attributes(split.keys.index(key)))


def test_tiny_sets_wrap_within_a_step(tmp_path: Path):
    dataset = write(tmp_path / "set", [sample(n) for n in range(5)])
    ids = [key for batch in take(loader(dataset, [0, 1, 2, 3]), 5) for key in batch.ids]
    assert all(sorted(ids[i : i + 5]) == dataset.split("train").keys for i in range(0, 120, 5))


def test_bad_samples_are_filled_from_their_group_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    broken = {7: b"not a picture", 21: png(21)[:-300]}
    clean = write(tmp_path / "clean", [sample(n) for n in range(30)])
    dataset = write(tmp_path / "set", [sample(n, image=broken.get(n)) for n in range(30)])
    shard = tmp_path / "set" / "train-00000.tar"
    flipped = bytearray(shard.read_bytes())
    flipped[int(dataset.split("train").offsets[3]) + 700] ^= 1
    shard.write_bytes(flipped)
    bad = {"s0003", "s0007", "s0021"}
    with caplog.at_level(logging.WARNING):
        streams = [loader(d, [0, 1, 2, 3]) for d in (clean, dataset)]
        pairs = [(next(streams[0]), next(streams[1])) for _ in range(5)]
        quarantine = streams[1].quarantine
        assert (streams[0].samples_read, streams[0].bad_reads) == (120, 0)
        assert (streams[1].samples_read, streams[1].bad_reads) == (120, 12)
        for stream in streams:
            stream.close()
    assert set(quarantine) == bad
    assert "hash" in quarantine["s0003"] and "does not decode" in quarantine["s0007"]
    assert sum("is left out" in message for message in caplog.messages) == 3  # once each, over four epochs
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


def test_a_group_with_no_good_sample_stops_with_names(tmp_path: Path):
    dataset = write(tmp_path / "set", [sample(n, image=b"x") for n in range(8)])
    with pytest.raises(ValueError, match=r"no sample of a group of 6 can be used .such as s000"):
        take(loader(dataset, [0]), 1)


def test_exceptions_of_threads_reach_the_consumer_and_threads_end(tmp_path: Path):
    before = threading.active_count()
    dataset = write(tmp_path / "set", [sample(n) for n in range(40)])
    (tmp_path / "set" / "train-00001.tar").unlink()
    stream = loader(dataset, [0, 1])
    with pytest.raises(ValueError, match=r"train-00001.tar: is missing, though dataset.json lists it"):
        list(stream)
    with pytest.raises(ValueError, match="is missing"):
        next(stream)
    stream.close()
    assert threading.active_count() == before


def test_threads_beside_the_training_take_a_core_each(small: Dataset, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def spied(*args: object) -> None:
        asked.append(torch.get_num_threads())
        fill_pyramid(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("t2idist.data.collate.fill_pyramid", spied)
    torch.set_num_threads(2)
    try:
        with loader(small, [0]) as stream:
            take(stream, 3)
        load_split(small, "test", sizes=(16,), max_words=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(asked) >= 4 and set(asked) == {1}


def test_close_ends_threads_at_any_moment(small: Dataset):
    before = threading.active_count()
    for batches in (0, 1, 9):
        take(loader(small, [0, 1]), batches)
    assert threading.active_count() == before
    stream = loader(small, [0])
    stream.close()
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


@pytest.mark.parametrize("groups", [[], [4], [-1], [1, 1]])
def test_impossible_groups_give_a_sentence(small: Dataset, groups: list[int]):
    with pytest.raises(ValueError, match="of 0 to 3"):
        loader(small, groups)


def test_load_split_in_order_with_all_captions(small: Dataset):
    loaded = load_split(small, "test", sizes=(16,), max_words=5)
    split = small.split("test")
    assert loaded.batch.ids == tuple(split.keys) and loaded.batch.groups == 1
    assert [list(captions) for captions in loaded.captions] == [split.captions(i) for i in range(9)]
    assert loaded.attributes[4] == tuple(split.attributes(4))
    second = load_split(small, "test", sizes=(16,), max_words=5, caption=1)
    assert second.batch.captions.tokens[2].tolist() == small.vocabulary.encode(split.captions(2)[1], 5)[0].tolist()
    few = load_split(small, "train", sizes=(16,), max_words=5, limit=10, seed=1)
    assert len(few.batch.ids) == 10 and list(few.batch.ids) == sorted(few.batch.ids)
    assert few.batch.ids != load_split(small, "train", sizes=(16,), max_words=5, limit=10, seed=2).batch.ids
    whole = load_split(small, "train", sizes=(16,), max_words=5)
    rows = [whole.batch.ids.index(key) for key in few.batch.ids]
    assert torch.equal(whole.batch.images[0][rows], few.batch.images[0])


def test_load_split_leaves_bad_samples_out(tmp_path: Path):
    dataset = write(tmp_path / "set", [sample(n, image=b"x" if n == 2 else None) for n in range(5)])
    loaded = load_split(dataset, "train", sizes=(8,), max_words=5)
    assert loaded.batch.ids == ("s0000", "s0001", "s0003", "s0004")
    assert len(loaded.batch.images[0]) == len(loaded.captions) == 4


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("a" * 90 + ".json", 77), ("s_1-2.webp", 8**11 - 1)])
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    assert header(name.encode(), size) == info.tobuf(tarfile.USTAR_FORMAT)
