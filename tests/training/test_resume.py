"""Resume a run from a given checkpoint."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from t2idist import run, storage
from t2idist.config import RunConfig
from t2idist.engine.checkpoint.format import images_of, list_committed
from t2idist.preflight import dry_run
from t2idist.report import status
from t2idist.training import resume
from tests.helpers.runs import (
    check_finished,
    copy_without_last_stage,
    export_bytes,
    load_config,
)


def assert_refused(config: RunConfig, checkpoint: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run.check(config, resume.find(config, checkpoint))


@pytest.mark.whole
def test_stopped_and_rewound_run_gives_the_same_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, at = copy_without_last_stage(finished, tmp_path), tmp_path / "runs/tiny"
    assert run.main([str(file), "--local", "--stop-after", "attngan:30", "checkpoint.keep=5"]) == 0
    assert "run the same command without --stop-after to resume" in capsys.readouterr().out
    checkpoints = str(at / "attngan/checkpoints")
    assert [images_of(name) for name in list_committed(checkpoints)] == [32, 16]
    assert not (at / "attngan/export").exists()
    run_status = status.read_status(str(at), datetime.datetime.now(datetime.UTC))
    assert (run_status.state, run_status.restarts) == ("stopped", 1)
    assert (run_status.current_stage.name, run_status.current_stage.images) == ("attngan", 32)
    page = status.format_status(str(at))
    assert "tiny: stopped" in page and "attngan (attngan): 32 of 64 images; newest checkpoint at 32 images" in page
    assert "damsm (damsm): done, 64 images" in page and "git " in page
    assert "tiny  stopped  attngan 2/2  32/64   32          1" in status.format_run_list(str(tmp_path / "runs"))

    config = load_config(tmp_path, "checkpoint.keep=5")
    assert_refused(config, "24", "stage attngan of tiny has no checkpoint at 24 images; it has 32, 16")
    assert_refused(config, str(at / "attngan"), "give images seen, or a checkpoint's folder")
    assert_refused(
        config, str(at / "attngan/checkpoints/000000000016-x"), "missing; the checkpoint was never completed"
    )
    assert_refused(
        config,
        str(at / "damsm/checkpoints" / list_committed(str(at / "damsm/checkpoints"))[0]),
        "damsm of tiny is done",
    )
    folder = storage.join(checkpoints, list_committed(checkpoints)[1])
    for settings, message in (
        (("stages.attngan.groups=1", "cluster.workers=1"), "was trained with stages.attngan.groups=2; here it is 1"),
        (("stages.attngan.model.z_dim=7",), "is .* there and .* in this configuration"),
        (("stages.attngan.images=16",), "has seen 16 images, and .* is 16"),
        (("data.source=avatars", "data.samples=8"), "has another vocabulary"),
    ):
        assert_refused(load_config(tmp_path, "name=other", *settings), folder, message)

    # another run resumes from there and copies earlier exports; submitted again, it resumes from its own state
    command = [str(file), "--local", "name=other", "--resume-from", folder, "stages.attngan.images=32"]
    for _ in range(2):
        assert run.main([*command, "stages.attngan.micro_batch_groups=1"]) == 0
    there = tmp_path / "runs/other"
    assert json.loads((there / "attngan/metrics.jsonl").read_text().splitlines()[0])["images"] == 24
    assert json.loads((there / "attempts.json").read_text())[0]["resumed"]["attngan"]["images"] == 16
    assert export_bytes(tmp_path, "damsm") == {file.name: file.read_bytes() for file in there.glob("damsm/export/*.s*")}

    # the run itself goes back and trains to its end; the result is that of an undisturbed run
    for _ in range(2):
        assert run.main([str(file), "--local", "checkpoint.keep=5", "--resume-from", "16"]) == 0
    assert json.loads((at / "attempts.json").read_text())[-2]["resumed"]["attngan"]["images"] == 16
    check_finished(tmp_path)
    assert export_bytes(tmp_path, "attngan") == export_bytes(finished, "attngan")
