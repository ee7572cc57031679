"""tools/check_scores.py on the embedded data set: defects give worse scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from t2idist.evaluate.feature_extractors import EXTRACTORS, ExtractorOutput, WeightsFile
from tools import check_scores


@pytest.mark.slow
def test_blur_noise_and_wrong_captions_score_worse(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_scores.main(["--data", "emoji", "--n", "150", "--train", "600", "--size", "72"]) == 0
    out = capsys.readouterr().out
    assert "efficientnet-lite0" in out and "blurred, 3 px" in out and "all moved" in out


class RandomExtractor:
    """An extractor that returns new random features at every call."""

    def __init__(self, weights: WeightsFile, device: torch.device) -> None:
        self.facts: dict[str, Any] = {"name": "random"}
        self.dim, self.classes, self._calls = 16, 16, 0

    def __call__(self, images: Tensor) -> ExtractorOutput:
        self._calls += 1
        features = torch.randn(len(images), 16, generator=torch.Generator().manual_seed(self._calls))
        return ExtractorOutput(features, features)


def test_random_features_fail_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", RandomExtractor)
    assert check_scores.main(["--data", "emoji", "--n", "110", "--train", "120", "--size", "16"]) == 1
    assert "check_scores: kid: " in capsys.readouterr().err


def test_too_few_images_give_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_scores.main(["--data", "emoji", "--n", "100000", "--size", "8"]) == 2
    err = capsys.readouterr().err
    assert "--n 100000: split train has" in err and err.count("\n") == 1
