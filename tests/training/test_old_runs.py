"""Runs and exports of the commit before the package was reorganized (14b3d5f, November 2026) still load.

`data/half_run` was stopped after 32 of 64 images of its second stage; `data/finished_export` is the export at the end
of that stage, by the same commit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from t2idist.config.strict import to_dict
from t2idist.engine.checkpoint import export
from t2idist.sampling import sample
from t2idist.systems.attngan import Config
from tests.helpers.runs import run_command, write_recipe

DATA = Path(__file__).parent / "data"


@pytest.mark.whole
def test_old_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    shutil.copytree(DATA / "half_run", tmp_path / "runs")
    cache = str(tmp_path / "cache")
    data = {"source": "avatars", "samples": 64, "size": 32, "max_words": 8, "threads": 1, "cache": cache}
    file = write_recipe(tmp_path, precision="float64", data=data, checkpoint={"keep": 1})
    widths = [f"stages.attngan.model.{name}_width=4" for name in ("generator", "discriminator")]
    done = run_command(str(file), "--local", *widths)
    assert done.returncode == 0, done.stderr
    attempts = json.loads((tmp_path / "runs/tiny/attempts.json").read_text())
    assert [attempt.get("resumed", {}).get("attngan", {}).get("images") for attempt in attempts] == [None, 32]

    result = export.read(str(tmp_path / "runs/tiny/attngan/export"))
    expected = export.read(str(DATA / "finished_export"))
    assert (result.system, result.plan) == (expected.system, {"paired": False} | expected.plan)
    assert result.config == to_dict(Config()) | expected.config  # keys that are new since have their defaults
    assert (result.vocabulary, result.images) == (expected.vocabulary, expected.images)
    assert result.weights.keys() == expected.weights.keys()
    for network, weights in expected.weights.items():
        assert result.weights[network].keys() == weights.keys()
        for name, value in weights.items():
            # equal on the CPU that wrote it; others may sum in another order, and round float64 differently
            torch.testing.assert_close(
                result.weights[network][name], value, rtol=0, atol=1e-9, msg=f"{network}: {name}"
            )


@pytest.mark.whole
def test_old_export_generates_images(tmp_path: Path) -> None:
    arguments = ["--export", str(DATA / "finished_export"), "--text", "a person with long brown hair", "--n", "2"]
    assert sample.main([*arguments, "--out", str(tmp_path)]) == 0
    images = [Image.open(file) for file in sorted(tmp_path.rglob("*.png"))]
    assert images and all(len(image.getcolors(image.width * image.height) or []) > 2 for image in images)
