"""The authors' vocabularies."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from t2idist.convert.authors import captions
from tests.convert.author_files import (
    RunsCode,
)


def python_2(value: Any) -> bytes:
    """Return a pickle of protocol 2 as Python 2 wrote it, with strings as bytes."""

    def dump(part: Any) -> bytes:
        if isinstance(part, list):
            return b"](" + b"".join(map(dump, part)) + b"e"
        if isinstance(part, dict):
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in part.items()) + b"u"
        if isinstance(part, str):
            return b"U" + bytes([len(part)]) + part.encode("latin1")
        return b"\x8a\x01" + bytes([part]) if part % 2 else b"J" + struct.pack("<i", part)  # long and int

    return b"\x80\x02" + dump(value) + b"."


TABLE = {0: "<end>", 1: "bird", 2: "caf\u00e9"}
PICKLED = [[[1, 2], [2]], [[1]], TABLE, {word: number for number, word in TABLE.items()}]


@pytest.mark.parametrize("data", [python_2(PICKLED), *(pickle.dumps(PICKLED, protocol) for protocol in range(6))])
def test_captions_pickles_give_the_vocabulary(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "captions.pickle").write_bytes(data)
    assert captions.from_pickle(str(tmp_path / "captions.pickle")).words == ("<end>", "bird", "caf\u00e9")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("position", ["whole", "word", "caption"])
def test_captions_pickles_that_would_run_code_are_refused(tmp_path: Path, protocol: int, position: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "captions.pickle"
    dangerous: Any = RunsCode(marker)
    train, test, by_number, by_word = PICKLED
    content = {
        "whole": dangerous,
        "word": [train, test, {**TABLE, 3: dangerous}, by_word],
        "caption": [[[dangerous]], test, by_number, by_word],
    }[position]
    file.write_bytes(pickle.dumps(content, protocol))
    pickle.loads(file.read_bytes())
    assert marker.exists()  # unpickling it does run code
    marker.unlink()
    with pytest.raises(ValueError, match=r"captions\.pickle: not a readable captions\.pickle: it needs posix\.sys"):
        captions.from_pickle(str(file))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Ran out of input"),
        (b"words", "."),
        (pickle.dumps([1, 2]), "it is not .train captions, test captions"),
        (pickle.dumps([[[1.5]], [], TABLE, {}]), "it contains a float"),
        (pickle.dumps([[], [], {0: "<end>", 2: "bird"}, {}]), "2 words|word 0 is"),
        (
            pickle.dumps([[], [], TABLE, {"<end>": 0, "bird": 2, "caf\u00e9": 1}]),
            "word 1 is 'bird', which has id 2",
        ),
        (pickle.dumps([[], [], {0: "a"}, {"a": 0}]), "the vocabulary's first word is a; it must be <end>"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "it needs more than 4 GB of memory"),
        (b"\x80\x02" + b"(" * 3 + b"R.", "."),
    ],
)
def test_invalid_captions_pickles_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "captions.pickle").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        captions.from_pickle(str(tmp_path / "captions.pickle"))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_slow_readers_are_stopped(tmp_path: Path) -> None:
    (tmp_path / "captions.pickle").write_bytes(pickle.dumps(PICKLED))
    with pytest.raises(ValueError, match=r"not read within 0\.001 s; the reader was stopped"):
        captions.from_pickle(str(tmp_path / "captions.pickle"), seconds=0.001)
