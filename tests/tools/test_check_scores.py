"""tools/check_scores.py: what is worse scores worse, on pictures that ship with the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist.evaluate.feature_extractors import EXTRACTORS, Seen, Weights
from tools import check_scores


@pytest.mark.slow
def test_blur_noise_and_moved_captions_score_worse(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_scores.main(["--data", "emoji", "--n", "150", "--train", "600", "--size", "72"]) == 0
    out = capsys.readouterr().out
    assert "efficientnet-lite0" in out and "blurred, 3 px" in out and "all moved" in out


class Blind:
    """An extractor that gives noise, another for each call."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.facts: dict[str, Any] = {"name": "blind"}
        self.dim, self.classes, self._calls = 16, 16, 0

    def __call__(self, images: Tensor) -> Seen:
        self._calls += 1
        drawn = torch.randn(len(images), 16, generator=torch.Generator().manual_seed(self._calls))
        return Seen(drawn, drawn)


def test_a_score_that_sees_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", Blind)
    assert check_scores.main(["--data", "emoji", "--n", "110", "--train", "120", "--size", "16"]) == 1
    assert "check_scores: kid: " in capsys.readouterr().err


def test_too_few_pictures_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_scores.main(["--data", "emoji", "--n", "100000", "--size", "8"]) == 2
    err = capsys.readouterr().err
    assert "--n 100000: split train has" in err and err.count("\n") == 1
