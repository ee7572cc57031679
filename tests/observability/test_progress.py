"""The progress line, in a terminal and in a log file."""

from __future__ import annotations

import io
import re
from typing import Any

from t2idist.observability.progress import ProgressPrinter, format_duration, progress_line

PROGRESS: dict[str, Any] = {
    "run": "r",
    "stage": "attngan",
    "stage_index": 1,
    "stages": 2,
    "images": 128000,
    "budget_images": 210000,
    "images_per_second": 168.2,
    "seconds_left": 492,
    "losses": {
        "generator/adversarial_64": 3.0,
        "generator/kl": 1.1,
        "discriminator_32/real": 1.5,
        "discriminator_64/real": 1.5,
        "discriminator_64/fake": 0.8,
        "val/r_precision": 0.3,
    },
    "restarts": 0,
    "workers": 2,
    "state": "training",
}


def test_progress_line_shows_share_rate_losses_and_time_left() -> None:
    text = "attngan 2/2   61%  128.0k/210.0k images  168 images/s  G 4.10 D 1.90  left 8m12s  restarts 0  workers 2"
    assert progress_line(PROGRESS) == text
    narrow = progress_line(PROGRESS, 60)
    assert len(narrow) <= 60 and "61%" in narrow and "8m12s" in narrow
    start = {**PROGRESS, "images": 0, "losses": {}, "images_per_second": 0.0, "seconds_left": None}
    assert progress_line(start) == "attngan 2/2    0%  0/210.0k images  restarts 0  workers 2"
    done = progress_line({**PROGRESS, "state": "done"})
    assert "done" in done and "left" not in done
    assert [format_duration(s) for s in (3, 492, 3 * 3600 + 301, 90000)] == ["3s", "8m12s", "3h05m", "1d01h"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_file_gets_a_line_per_interval_and_per_change() -> None:
    now = [0.0]
    stream = io.StringIO()
    printer = ProgressPrinter(stream, every_seconds_log=30, clock=lambda: now[0])
    for second in range(120):
        now[0] = float(second)
        printer.show({**PROGRESS, "images": 1000 * second, "workers": 2 if second < 65 else 1})
    assert len(stream.getvalue().splitlines()) == 5  # at 0, 30, 60, 65 (one worker fewer) and 95
    assert "\r" not in stream.getvalue()


def test_terminal_line_is_rewritten_in_place() -> None:
    stream = Terminal()
    printer = ProgressPrinter(stream, columns=lambda: 100)
    for images in (1000, 2000, 3000):
        printer.show({**PROGRESS, "images": images})
    printer.message("warning: a sample is left out")
    printer.show({**PROGRESS, "stage": "damsm"})
    printer.close()
    text = stream.getvalue()
    assert text.count("\r") == 4 and text.count("\n") == 3 and text.endswith("\n")
    assert all(len(part) <= 99 for part in re.split("[\r\n]", text))
