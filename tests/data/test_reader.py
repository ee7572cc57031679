"""Reading samples from damaged and hostile shards."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from t2idist.data import sample_format
from t2idist.data.order import SampleRange
from t2idist.data.reader import ShardReader
from t2idist.data.samples import BadSample
from tests.helpers.shard_sets import make_sample, write_set


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s0002.x/../y.png", "'s0002.x/../y.png' is not allowed"),
        ("/etc/x.png", "no tar header of sample s0002"),
        ("s0002.pkl", "no image (webp, png, jpg) among its members ['pkl']"),
    ],
)
def test_hostile_member_makes_only_its_own_sample_bad(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    real = sample_format.member
    renamed = {"s0002.png": name}
    monkeypatch.setattr(sample_format, "member", lambda n, data: real(renamed.get(n, n), data))
    dataset = write_set(tmp_path / "set", [make_sample(n) for n in range(5)])
    read = ShardReader(dataset, "train").read_encoded(SampleRange(0, 0, 5))
    assert [isinstance(sample, BadSample) for sample in read] == [False, False, True, False, False]
    assert isinstance(read[2], BadSample) and message in read[2].reason


def test_gzip_bomb_is_not_decompressed(tmp_path: Path):
    dataset = write_set(tmp_path / "set", [make_sample(n) for n in range(5)], compress=True)
    shard = tmp_path / "set" / dataset.split("train").shards[0].name
    shard.write_bytes(gzip.compress(bytes(50_000_000)))
    with pytest.raises(ValueError, match=r"unpacks to .* bytes or more"):
        ShardReader(dataset, "train").read_encoded(SampleRange(0, 0, 5))
