"""Hostile and damaged data: errors are reported, and nothing from the data is executed, opened or unpacked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pickle
import tarfile
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2idist import storage
from t2idist.data.reader import parse
from t2idist.data.samples import BadSample, EncodedImage, StoredSample
from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import Vocabulary, tokenize
from t2idist.data.transforms import decode
from tests.helpers.shard_sets import make_sample, png_image, write_set

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
changes_of_bytes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    write_set(folder, [make_sample(n) for n in range(6)])
    return folder


def mutate(data: bytes, changes: list[tuple[float, int]]) -> bytes:
    """Set bytes, at positions given as fractions of the length."""
    out = bytearray(data)
    for position, value in changes:
        out[int(position * len(out))] = value
    return bytes(out)


def make_tar(members: list[tarfile.TarInfo], data: bytes = b"") -> bytes:
    """Return members as a tar without its end; the first has the data."""
    out = b""
    for member in members:
        out += member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
        data = b""
    return out


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info


# ------------------------------------------------------------------------------------------------ random bytes
@quick
@given(changes_of_bytes, st.integers(0, 40))
def test_any_tar_bytes_parse_to_an_image_or_a_reason(folder: Path, changes: list, cut: int) -> None:
    split = Dataset.open(str(folder), check_sizes=False).split("train")
    data = (folder / "train-00000.tar").read_bytes()[: int(split.lengths[0])]
    sample = parse(StoredSample("s0000", mutate(data, changes)[: len(data) - 64 * cut]))
    assert isinstance(sample, EncodedImage | BadSample)


@quick
@given(changes_of_bytes)
def test_any_tar_header_parses_to_an_image_or_a_reason(folder: Path, changes: list) -> None:
    data = (folder / "train-00000.tar").read_bytes()[:4096]
    head = bytearray(mutate(data[:512], changes))
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:512]))  # a valid checksum
    sample = parse(StoredSample("s0000", bytes(head) + data[512:]))
    assert isinstance(sample, EncodedImage | BadSample)


@quick
@given(changes_of_bytes, st.sampled_from(["png", "jpg", "webp"]))
def test_any_image_bytes_decode_or_raise_value_error(changes: list, extension: str) -> None:
    with contextlib.suppress(ValueError):
        assert decode(EncodedImage(mutate(png_image(1), changes), extension), 16).pixels.ndim == 2


@quick
@given(st.text(max_size=300), st.integers(1, 20))
def test_any_caption_is_encoded_or_raises_value_error(caption: str, max_words: int) -> None:
    vocabulary = Vocabulary(["<end>", "red", "a"])
    assert all(word.isascii() for word in tokenize(caption))
    with contextlib.suppress(ValueError):
        ids, length = vocabulary.encode(caption, max_words)
        assert 1 <= length <= max_words == len(ids)


def open_changed(folder: Path, description: Any, manifest: bytes | None = None) -> None:
    """Open a copy of the set with another description or manifest; only ValueError is allowed."""
    url = "memory://fuzzed"
    manifest = (folder / "manifest.parquet").read_bytes() if manifest is None else manifest
    storage.write_bytes(f"{url}/dataset.json", json.dumps(description).encode())
    storage.write_bytes(f"{url}/manifest.parquet", manifest)
    with contextlib.suppress(ValueError):
        dataset = Dataset.open(url, check_sizes=False)
        for split in dataset.splits.values():
            for index in range(len(split)):
                split.captions(index), split.attributes(index), split.sha256(index)


@quick
@given(st.data(), json_values)
def test_any_description_opens_or_raises_value_error(folder: Path, data: st.DataObject, value: Any) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    node: Any = description
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = value
            break
        node = node[key]
    open_changed(folder, description)


@quick
@given(changes_of_bytes)
def test_any_manifest_bytes_open_or_raise_value_error(folder: Path, changes: list) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    manifest = mutate((folder / "manifest.parquet").read_bytes(), changes)
    description["manifest"] = {"bytes": len(manifest), "sha256": hashlib.sha256(manifest).hexdigest()}
    open_changed(folder, description, manifest)


# ------------------------------------------------------------------------------------------------ hostile
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "'s0000.png' is a link"),
        (tarfile.LNKTYPE, "'s0000.png' is a link"),
        (tarfile.CHRTYPE, "'s0000.png' is a device"),
        (tarfile.BLKTYPE, "'s0000.png' is a device"),
        (tarfile.FIFOTYPE, "'s0000.png' is a pipe"),
        (tarfile.DIRTYPE, "'s0000.png/' is a folder"),
        (tarfile.GNUTYPE_SPARSE, "'s0000.png' is a file with holes"),
        (tarfile.GNUTYPE_LONGNAME, "'s0000.png' is an extended header"),
        (tarfile.XHDTYPE, "'s0000.png' is an extended header"),
        (b"?", "'s0000.png' is of an unknown kind"),
    ],
)
def test_members_other_than_plain_files_are_rejected(kind: bytes, message: str) -> None:
    sample = parse(StoredSample("s0000", make_tar([member("s0000.png", 0, kind), member("s0000.json")])))
    assert isinstance(sample, BadSample) and message in sample.reason


@pytest.mark.parametrize("name", ["s0000.a/../../x.png", "s0000.\\x.png"])
def test_member_names_outside_the_folder_are_rejected(name: str) -> None:
    sample = parse(StoredSample("s0000", make_tar([member(name)])))
    assert isinstance(sample, BadSample) and "is not allowed" in sample.reason


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/t2idist-pickle-was-run"),))


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "pt", "npy", "cbor"])
def test_pickles_are_never_executed(extension: str) -> None:
    Path("/tmp/t2idist-pickle-was-run").unlink(missing_ok=True)
    data = pickle.dumps(_Bomb())
    sample = parse(StoredSample("s0000", make_tar([member(f"s0000.{extension}", len(data))], data)))
    assert isinstance(sample, BadSample) and extension in sample.reason
    assert not Path("/tmp/t2idist-pickle-was-run").exists()
    pickle.loads(data)  # the payload works
    assert Path("/tmp/t2idist-pickle-was-run").exists()


def test_member_of_four_gigabytes_is_rejected_without_allocating_memory() -> None:
    tracemalloc.start()
    sample = parse(StoredSample("s0000", make_tar([member("s0000.json", 4 << 30)], b"{" * 1024)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(sample, BadSample) and "do not match" in sample.reason
    assert peak < 16 << 20


def test_image_of_a_hundred_megapixels_is_rejected_without_decoding() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = 10_000
    head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side + 1) * side), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(bomb) < 200_000
    with pytest.raises(ValueError, match="10000 x 10000 pixels are more than"):
        decode(EncodedImage(bomb, "png"))


@pytest.mark.parametrize(
    "name", ["pipe:touch /tmp/x", "file:///etc/passwd", "/etc/passwd", "../x.tar", "s3://other/x.tar", "http://h/x.tar"]
)
def test_shard_names_outside_the_set_are_rejected(folder: Path, tmp_path: Path, name: str) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    description["splits"]["train"]["shards"][0]["name"] = name
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(ValueError) as error:
        Dataset.open(str(tmp_path))
    assert repr(name) in str(error.value) and "plain file names" in str(error.value)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "simplecache::s3://b/k", "python://x", "filecache::file:///etc/passwd"]
)
def test_urls_that_run_code_or_chain_are_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        storage.read_bytes(url)


def test_credentials_in_urls_and_endpoints_are_rejected_and_not_repeated() -> None:
    for url, endpoint in (("s3://me:hunter2@bucket/x", None), ("s3://bucket/x", "http://me:hunter2@host:9000")):
        with pytest.raises(ValueError, match="credentials") as error:
            storage.read_bytes(url, endpoint_url=endpoint)
        assert "hunter2" not in str(error.value)
    with pytest.raises(ValueError, match="is for s3:// only"):
        storage.read_bytes("memory://x", endpoint_url="http://host:9000")


def test_huge_caption_is_rejected(tmp_path: Path) -> None:
    record = dataclasses.replace(make_sample(1), captions=("red " * 500_000,))
    with pytest.raises(ValueError, match=r"manifest.parquet: a caption has 2000000 characters"):
        write_set(tmp_path / "set", [record])
