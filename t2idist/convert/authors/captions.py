"""Read the authors' vocabularies. The order of the words cannot be reconstructed from the captions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from t2idist import storage
from t2idist.data.tokenizer import Vocabulary

TIMEOUT_SECONDS = 180.0
MAX_BYTES = 1 << 30


def from_pickle(url: str, seconds: float = TIMEOUT_SECONDS) -> Vocabulary:
    """Read the vocabulary of an AttnGAN captions.pickle in a subprocess with limited time and memory.

    Raises ValueError if it is not such a file, or needs anything but plain values.
    """
    file = storage.redact(url)
    data = _bytes(url)
    reader = Path(__file__).with_name("unpickle.py")
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-S", str(reader)], input=data, capture_output=True, timeout=seconds, env={}
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{file}: not read within {seconds:g} s; the reader was stopped") from None
    try:
        answer = json.loads(process.stdout)
    except ValueError:
        raise ValueError(f"{file}: the process that read it exited with status {process.returncode}") from None
    if "error" in answer:
        raise ValueError(
            f"{file}: not a readable captions.pickle: {answer['error']}; --vocabulary FILE takes a text with one word "
            "per line"
        )
    return _vocabulary(answer["words"], file)


def from_text(url: str) -> Vocabulary:
    """Read the vocabulary of a text file with one word per line; the first line is word 0."""
    file = storage.redact(url)
    try:
        text = _bytes(url).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None
    return _vocabulary(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"), file)


def _bytes(url: str) -> bytes:
    try:
        if (size := storage.size(url)) > MAX_BYTES:
            raise ValueError(f"{storage.redact(url)}: {size >> 20} MB; a vocabulary file has at most 1024 MB")
        return storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{storage.redact(url)}: no such file") from None


def _vocabulary(words: list[str], file: str) -> Vocabulary:
    try:
        return Vocabulary(words)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
