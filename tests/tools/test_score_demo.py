"""tools/score_demo.py, which ``make demo`` runs last, on a run of untrained networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from t2idist.config import DataConfig
from t2idist.data.sources import open_dataset
from tests.helpers import small_systems
from tools import score_demo


@pytest.mark.whole
def test_untrained_generator_scores_chance_and_real_images_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, damsm = tmp_path / "run", tmp_path / "judge"
    data = {"source": "avatars", "samples": 800, "size": 32, "crop": 1.0, "cache": str(tmp_path / "cache")}
    values = {"name": "run", "stages": {"attngan": {"system": "attngan", "group_size": 2, "groups": 1, "images": 2}}}
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({**values, "data": data}))
    words = open_dataset(DataConfig(**data)).vocabulary.words[:40]  # the vocabulary size of the small networks
    small_systems.write_export("attngan", str(run / "attngan/export"), words)
    small_systems.write_export("damsm", str(damsm), words)
    index_file = damsm / "export.json"
    index_file.write_text(json.dumps({**json.loads(index_file.read_text()), "seed": 5}))
    assert score_demo.main([str(run), "--judge", str(damsm), "--threads", "1"]) == 0
    rows = {row["name"]: row for row in json.loads((run / "scores.json").read_text())}
    assert rows["glasses"]["real"] > 0.7 > rows["glasses"]["value"] + 0.05
    mean = rows["mean of the five"]
    assert abs(mean["value"] - mean["chance"]) < 0.05 < mean["real"] - mean["chance"] and mean["n"] > 100
    assert rows["R-precision, 1 of 100"]["value"] < 0.1 and rows["two draws of one caption differ by"]["value"] > 0
    assert "mean of the five" in (run / "report.html").read_text() and "R-precision" in capsys.readouterr().out
    assert score_demo.main([str(tmp_path / "nothing")]) == 2
    assert "no run here" in capsys.readouterr().err
