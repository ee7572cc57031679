"""Options of one submission: where to stop, what to fine-tune from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from t2idist import run
from t2idist.engine.checkpoint import export
from t2idist.training import options
from tests.helpers import small_systems
from tests.helpers.runs import (
    copy_without_last_stage,
    load_config,
    write_recipe,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("damsm", options.StopAfter("damsm", None)), ("attngan:40", options.StopAfter("attngan", 40))],
)
def test_parse_stop_after(text: str, expected: options.StopAfter, tmp_path: Path) -> None:
    assert options.parse_stop_after(text, load_config(tmp_path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dams",
            "--stop-after: dams: give one of the stages damsm, attngan, or images of one of them, such as attngan:32",
        ),
        ("40", "--stop-after: 40: give one of the stages .* such as attngan:40"),
        ("dams:40", "no stage 'dams'; there are damsm, attngan"),
        ("attngan:0", "0 images of stage attngan; allowed are 1 to 64, its budget"),
        ("attngan:65", "65 images of stage attngan; allowed are 1 to 64"),
        ("attngan:x", "x images of stage attngan; allowed"),
    ],
)
def test_parse_stop_after_rejects_unknown_stages_and_images(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        options.parse_stop_after(text, load_config(tmp_path))


def test_stop_is_at_the_first_step_that_reaches_the_images(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    one = replace(config, stages={"damsm": config.stages["damsm"]})
    assert options.parse_stop_after("17", one) == options.StopAfter("damsm", 17)
    stop = options.StopAfter("damsm", 17)
    assert stop.steps("damsm", config.stages["damsm"]) == 3 and stop.steps("attngan", config.stages["attngan"]) == 8
    assert options.StopAfter("damsm", None).steps("damsm", config.stages["damsm"]) == 8


def test_init_from_goes_to_the_stage_of_the_exports_system(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    small_systems.write_export("attngan", str(tmp_path / "attngan"), ["", "a"])
    url = str(tmp_path / "attngan")
    assert options.apply_init_from(config, [url]).stages["attngan"].init_from == url
    assert options.apply_init_from(config, [f"attngan={url}"]).stages["attngan"].init_from == url
    twice = replace(config, stages={**config.stages, "second": config.stages["attngan"]})
    for other, text, message in (
        (twice, url, "is of system attngan, which attngan, second train; give STAGE=EXPORT"),
        (replace(config, stages={"damsm": config.stages["damsm"]}), url, "which no stage of damsm trains"),
        (config, f"dams={url}", "no stage 'dams'; there are damsm, attngan"),
        (config, str(tmp_path / "nothing"), "no export here"),
    ):
        with pytest.raises(ValueError, match=message):
            options.apply_init_from(other, [text])


def test_dry_run_rejects_an_export_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(tmp_path)
    small_systems.write_export("attngan", str(tmp_path / "attngan"), ["", "a"])
    small_systems.write_export("damsm", str(tmp_path / "damsm"), ["", "a"])
    small_systems.write_export("dcgan", str(tmp_path / "dcgan"), ["", "a"])
    for arguments, message in (
        (["--init-from", f"{tmp_path}/damsm"], "has shape .*; the network has"),
        (["--init-from", f"damsm={tmp_path}/dcgan"], "contains generator of system dcgan; the stage trains"),
        (["--init-from", f"{tmp_path}/attngan", "stages.attngan.model.z_dim=7"], "network 'generator': .* has shape"),
    ):
        assert run.main([str(file), "--dry-run", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(lines[0])
    assert run.main([str(file), "--dry-run", "--init-from", f"{tmp_path}/attngan"]) == 0
    assert f"init_from: {tmp_path}/attngan" in capsys.readouterr().out


@pytest.mark.whole
def test_run_starts_from_the_weights_of_an_export(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy_without_last_stage(finished, tmp_path)
    source = str(finished / "runs/tiny/attngan/export")
    rates = [f"stages.attngan.model.{name}_lr=1e-30" for name in ("generator", "discriminator")]
    arguments = [str(file), "--local", "name=fine", "stages.attngan.images=8", *rates]
    shutil.copytree(tmp_path / "runs/tiny/damsm/export", tmp_path / "runs/fine/damsm/export")
    assert run.main([*arguments, "--init-from", source]) == 0
    tuned, before = export.read(str(tmp_path / "runs/fine/attngan/export")), export.read(source)
    for name, value in before.weights["generator"].items():
        if "running" not in name and value.is_floating_point():
            assert float((tuned.weights["generator"][name] - value).abs().max()) < 1e-5, name
    assert tuned.meta["init_from"] == source
    assert run.main(arguments) == 2
    assert "stages.attngan.init_from: '', but the run fine" in capsys.readouterr().err
