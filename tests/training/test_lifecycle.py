"""Start and end of a run: events for the hook, and the stored outcome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2idist import run, storage
from t2idist.engine.preemption import StopRequested
from t2idist.observability import hook
from t2idist.training import lifecycle, stages
from tests.helpers.runs import (
    copy_without_last_stage,
    load_config,
    received_events,
)


def test_hook_receives_start_restart_and_end_without_secrets(hook_program: Path, tmp_path: Path) -> None:
    config = load_config(tmp_path)
    message = {"stage": "damsm", "images": 8, "budget_images": 64, "restarts": 0, "losses": {"a": 1.0}, "run": "tiny"}
    with lifecycle.run_lifecycle(config, hook.CommandHook([str(hook_program)]), stops=False) as notifier:
        notifier.on_progress(message)
        notifier.on_progress({**message, "images": 16, "restarts": 1})
        notifier.on_progress({**message, "images": 24, "restarts": 1})
    events = received_events(hook_program)
    assert [event["event"] for event in events] == ["start", "restart", "end"]
    assert events[1]["images"] == 16 and events[2]["restarts"] == 1 and events[0]["run"] == "tiny"
    environment = (tmp_path / "environment").read_text()
    assert "T2IDIST_HOOK_STATUS=0" in environment and "PATH=" in environment and "AWS_" not in environment
    assert storage.read_json(storage.join(stages.run_url(config), lifecycle.OUTCOME))["state"] == "finished"


@pytest.mark.parametrize(
    ("error", "state", "last_event"),
    [
        (RuntimeError("storage failed: a secret of the environment"), "failed", "failure"),
        (StopRequested("saved at 8 images"), "stopped", "end"),
        (KeyboardInterrupt(), "interrupted", "end"),
    ],
)
def test_outcome_is_sent_to_the_hook_and_stored(
    error: BaseException, state: str, last_event: str, hook_program: Path, tmp_path: Path
) -> None:
    config = load_config(tmp_path)
    with (
        pytest.raises(type(error)),
        lifecycle.run_lifecycle(config, hook.CommandHook([str(hook_program)]), stops=False),
    ):
        raise error
    outcome = storage.read_json(storage.join(stages.run_url(config), lifecycle.OUTCOME))
    assert outcome["state"] == state and received_events(hook_program)[-1]["event"] == last_event
    assert "a secret" not in json.dumps(received_events(hook_program)) + json.dumps(outcome)
    assert state != "failed" or outcome["error"] == "storage failed: ***"


def test_a_refused_second_job_leaves_the_outcome_to_the_first_one(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    with pytest.raises(lifecycle.RunIsTaken), lifecycle.run_lifecycle(config, hook.CommandHook([]), stops=False):
        raise lifecycle.RunIsTaken("name: the Ray job 1 trains the run")
    assert not storage.exists(storage.join(stages.run_url(config), lifecycle.OUTCOME))


@pytest.mark.whole
def test_run_ends_if_the_records_of_a_stage_cannot_be_opened(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, metrics = copy_without_last_stage(finished, tmp_path), tmp_path / "runs/tiny/attngan/metrics.jsonl"
    metrics.unlink(missing_ok=True)
    metrics.mkdir(parents=True)
    assert run.main([str(file), "--local"]) == 1
    assert str(metrics) in capsys.readouterr().err
    metrics.rmdir()
    assert run.main([str(file), "--local"]) == 0
    assert metrics.is_file()


def test_progress_of_a_run_is_its_fatal_error_and_the_stages_that_are_done(tmp_path: Path) -> None:
    config = load_config(tmp_path)
    assert lifecycle.read_progress(config) == (None, frozenset())
    lifecycle.write_fatal(config, "no space")
    first = next(stages.stages_of(config))
    storage.write_json(storage.join(first.export_url, "export.json"), {})
    assert lifecycle.read_progress(config) == ("no space", {first.name})
