"""The authors' vocabularies: words in the order of their numbers, which no one can make again from the captions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from t2idist import storage
from t2idist.data.tokenizer import Vocabulary

SECONDS = 180.0
LARGEST_BYTES = 1 << 30


def from_pickle(url: str, seconds: float = SECONDS) -> Vocabulary:
    """The vocabulary of an AttnGAN captions.pickle, read by another process with limits of time and memory.

    Raises ValueError, one sentence, where it is not one, or asks for anything but plain values.
    """
    file = storage.redact(url)
    data = _bytes(url)
    reader = Path(__file__).with_name("unpickle.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(reader)], input=data, capture_output=True, timeout=seconds, env={}
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{file}: not read within {seconds:g} s; the reader was stopped") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ValueError(f"{file}: the process that read it ended with status {done.returncode}") from None
    if "error" in answer:
        raise ValueError(f"{file}: not a captions.pickle that can be read: {answer['error']}")
    return _vocabulary(answer["words"], file)


def from_text(url: str) -> Vocabulary:
    """The vocabulary of a text file: one word a line, the first line is word 0."""
    file = storage.redact(url)
    try:
        text = _bytes(url).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None
    return _vocabulary(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"), file)


def _bytes(url: str) -> bytes:
    try:
        if (size := storage.size(url)) > LARGEST_BYTES:
            raise ValueError(f"{storage.redact(url)}: {size >> 20} MB; a vocabulary's file has at most 1024 MB")
        return storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{storage.redact(url)}: no such file") from None


def _vocabulary(words: list[str], file: str) -> Vocabulary:
    try:
        return Vocabulary(words)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
