"""What the start of a run says about its data, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from t2idist.config import RunConfig, StageConfig
from t2idist.data.sample_format import SampleRecord
from t2idist.preflight import dry_run
from tests.helpers import small_systems
from tests.helpers.runs import load_config
from tests.helpers.shard_sets import make_sample, write_set

SAMPLES = [make_sample(number) for number in range(40)]


def stargan_config(folder: Path, samples: list[SampleRecord], exclusive: bool) -> RunConfig:
    folder.mkdir()
    write_set(folder / "set", samples)
    config = load_config(folder, f"data.source={folder / 'set'}")
    domain = {"attributes": ["red", "green", "blue"], "exclusive": exclusive}
    model = {**small_systems.MODELS["stargan"], "domains": [domain]}
    stage = StageConfig("stargan", group_size=2, groups=2, images=8, model=model)
    return replace(config, stages={"stargan": stage})


def refusals(config: RunConfig) -> list[str]:
    """Return why a run is refused, by the check of a start and by --dry-run."""
    messages = []
    for start in (dry_run.check, dry_run.describe):
        with pytest.raises(ValueError) as caught:
            start(config, None)
        messages.append(str(caught.value))
    return messages


def test_equal_captions_are_refused_for_a_system_of_text(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [replace(sample, captions=("a bird",)) for sample in SAMPLES])
    for message in refusals(load_config(tmp_path, f"data.source={tmp_path / 'set'}")):
        assert message.startswith("stages.damsm: ") and "all captions of split train are equal, 'a bird'" in message


def test_no_train_split_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [replace(sample, split="val") for sample in SAMPLES])
    for message in refusals(load_config(tmp_path, f"data.source={tmp_path / 'set'}")):
        assert "no split 'train', only val" in message


def test_warnings_are_said_on_stderr_once_for_each_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path / "set", [replace(sample, attributes=("face",)) for sample in SAMPLES])
    dry_run.describe(load_config(tmp_path, f"data.source={tmp_path / 'set'}"), None)
    said = capsys.readouterr().err
    assert said.count("warning: split train: all of its 40 images have face") == 1


def test_labels_of_stargan(tmp_path: Path) -> None:
    good = [replace(sample, attributes=(("red", "green", "blue")[i % 3],)) for i, sample in enumerate(SAMPLES)]
    dry_run.check(stargan_config(tmp_path / "good", good, exclusive=True), None)
    wrong = [replace(good[0], attributes=()), replace(good[1], attributes=("red", "blue")), *good[2:]]
    dry_run.check(stargan_config(tmp_path / "free", wrong, exclusive=False), None)
    for message in refusals(stargan_config(tmp_path / "wrong", wrong, exclusive=True)):
        assert "model.domains[0]: exclusive, but 1 of 40 images have none (such as s0000)" in message
        assert "1 of 40 images have several (such as s0001)" in message
    held_out = [replace(sample, split="train" if sample.attributes[0] != "blue" else "test") for sample in good]
    for message in refusals(stargan_config(tmp_path / "nobody", held_out, exclusive=False)):
        assert "model.domains[0]: no image of split train has blue" in message


def test_best_weights_of_a_system_without_r_precision_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set", SAMPLES)
    config = load_config(tmp_path, f"data.source={tmp_path / 'set'}", "stages.attngan.export_best=r_precision")
    for message in refusals(config):
        assert message.startswith("stages.attngan.export_best: attngan does not embed images and captions")
