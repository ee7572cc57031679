"""tools/check_scores.py: what is worse scores worse, on pictures that ship with the package."""

from __future__ import annotations

import pytest

from t2idist.evaluate.extractors import EXTRACTORS, Seen
from tools import check_scores


@pytest.mark.slow
def test_blur_noise_and_moved_captions_score_worse(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_scores.main(["--data", "emoji", "--n", "150", "--train", "600", "--size", "72"]) == 0
    out = capsys.readouterr().out
    assert "efficientnet-lite0" in out and "blurred, 3 px" in out and "all moved" in out


def test_a_score_that_sees_nothing_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(weights: object, device: object) -> object:
        def look(images: object) -> Seen:
            look.calls += 1  # type: ignore[attr-defined]
            generator = check_scores.torch.Generator().manual_seed(look.calls)  # type: ignore[attr-defined]
            drawn = check_scores.torch.randn(len(images), 16, generator=generator)  # type: ignore[arg-type]
            return Seen(drawn, drawn)

        look.calls, look.facts = 0, {"name": "blind"}  # type: ignore[attr-defined]
        return look

    monkeypatch.setitem(EXTRACTORS, "efficientnet-lite0", blind)  # type: ignore[arg-type]
    assert check_scores.main(["--data", "emoji", "--n", "110", "--train", "120", "--size", "16"]) == 1
    assert "check_scores: kid: " in capsys.readouterr().err


def test_too_few_pictures_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_scores.main(["--data", "emoji", "--n", "100000", "--size", "8"]) == 2
    err = capsys.readouterr().err
    assert "--n 100000: split train has" in err and err.count("\n") == 1
