"""The progress bar: drawn on terminals and in notebooks, on stderr; in pipes lines, and seldom."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from t2idist.observability.progress_bar import SECONDS_BETWEEN_LINES, ProgressBar
from tests.helpers import small_systems, toy_gan
from tests.helpers.runs import ROOT, command_environment

WORDS = ["<end>", "a", "red", "heart", *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 4))]


def on_terminal(words: Sequence[str]) -> tuple[str, str]:
    """Run a program with its stderr on a pseudo-terminal; return its stdout, from a pipe, and what was drawn."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(words, cwd=ROOT, env=command_environment(), stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux reports the closed terminal this way
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, drawn
    return out.decode(), drawn.decode()


def in_pipe(words: Sequence[str]) -> tuple[str, str]:
    done = subprocess.run(words, cwd=ROOT, env=command_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def sample(folder: Path) -> list[str]:
    small_systems.write_export("attngan", str(folder / "export"), WORDS)
    words = ["-m", "t2idist.cli", "sample", "--export", str(folder / "export"), "--out", str(folder / "out")]
    return [sys.executable, *words, "--text", "a red heart", "--text", "a heart", "--text", "red"]


def shard(folder: Path) -> list[str]:
    (folder / "in").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"in/{i}.png")
        (folder / f"in/{i}.txt").write_text("a red square\n")
    words = ["tools/shard_folder.py", "--folder", str(folder / "in"), "--out", str(folder / "out"), "--size", "16"]
    return [sys.executable, *words, "--processes", "1", "--restart"]


@pytest.mark.whole
@pytest.mark.parametrize(("command", "total"), [(sample, "3"), (shard, "6")])
def test_a_bar_is_drawn_on_a_terminal_only(command: object, total: str, tmp_path: Path) -> None:
    words = command(tmp_path)  # type: ignore[operator]
    out, drawn = on_terminal(words)
    assert "\r" in drawn and f"/{total} [" in drawn and "<" in drawn, "a bar with the time left"
    assert "\r" not in out and out.strip()
    shutil.rmtree(tmp_path / "out")
    again, err = in_pipe(words)
    assert "\r" not in again + err and "%|" not in again + err and again == out


class Stream(io.StringIO):
    """A pipe, or a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_log_gets_a_line_every_thirty_seconds() -> None:
    now, stream = [0.0], Stream(terminal=False)
    with ProgressBar(stream, "chunk", clock=lambda: now[0]) as bar:
        for done in range(0, 101, 10):
            bar.update(done, 100, shards=2)
            now[0] += SECONDS_BETWEEN_LINES / 2
    assert stream.getvalue().splitlines()[:2] == [
        "20 of 100 chunks, 0.667 chunks/s, 2 shards, 02:00 left",
        "40 of 100 chunks, 0.667 chunks/s, 2 shards, 01:30 left",
    ]
    assert len(stream.getvalue().splitlines()) == 5


def test_a_bar_is_removed_at_the_end() -> None:
    stream = Stream(terminal=True)
    with ProgressBar(stream) as bar:
        for done in range(4):
            bar.update(done, 3, shards=1)
    drawn = stream.getvalue()
    assert "0/3 [" in drawn and drawn.endswith("\r") and "\n" not in drawn


IN_NOTEBOOK = """
import sys, types
sys.modules["IPython"] = ipython = types.ModuleType("IPython")
ipython.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
from t2idist.observability.progress_bar import ProgressBar, in_notebook
assert in_notebook()
with ProgressBar() as bar:
    bar.update(1, 3)
    assert bar._bar is not None
"""


def test_a_notebook_gets_a_bar_though_its_stderr_is_no_terminal() -> None:
    """A notebook is recognized by IPython's kernel; without ipywidgets the bar is text."""
    out, err = in_pipe([sys.executable, "-W", "ignore", "-c", IN_NOTEBOOK])
    assert out == "" and "1/3 [" in err
