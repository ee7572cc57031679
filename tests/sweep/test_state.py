"""The state of a sweep, its ranking, the command of its winner, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from t2idist.config import load
from t2idist.sweep import cli, page, plan, state, tune
from t2idist.sweep.state import Sweep, Trial
from tests.helpers.runs import write_recipe

KEY = "stages.attngan.model.generator_lr"
VALUES = [
    (1, state.FINISHED, 64, 0.3),
    (2, state.STOPPED, 16, 0.1),
    (3, state.FINISHED, 64, 0.2),
    (4, state.NEW, 0, None),
]


def example(mode: str = "min") -> Sweep:
    trials = tuple(Trial(n, {KEY: f"0.000{n}"}, s, "", images, value) for n, s, images, value in VALUES)
    space = {KEY: "loguniform(0.0001,0.001)"}
    return Sweep("attngan", ("seed=1",), (), space, 0, "kid", mode, "attngan", "lr", 48, ("damsm",), trials)


def write_run(folder: Path, trial: Trial) -> None:
    """Write what a trial leaves: scores, a sample sheet and its report."""
    stage = folder / f"lr-{trial.number:04d}" / "attngan"
    (stage / "scored").mkdir(parents=True)
    (stage / "pictures").mkdir()
    points = [(16, 0.4 + trial.number / 100)] if trial.images > 16 else []
    lines = [{"images": images, "kid": value} for images, value in [*points, (trial.images, trial.value)]]
    (stage / "scored/scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (500, 150), (40 * trial.number, 90, 120)).save(stage / "pictures/images_000000016.png")
    (stage.parent / "report.html").write_text("a report")


def plan_of(folder: Path, *overrides: str, **options: object) -> plan.SweepPlan:
    values = {"metric": "generator/total", **options}
    return plan.make(str(write_recipe(folder)), overrides, plan.SweepOptions(**values))  # type: ignore[arg-type]


def test_finished_trials_come_first_and_the_last_value_decides() -> None:
    assert [trial.number for trial in example().ranked] == [3, 1, 2, 4]
    assert [trial.number for trial in example("max").ranked] == [1, 3, 2, 4]
    best = example().best
    assert best is not None and best.number == 3


def test_the_command_of_the_winner_loads_its_configuration() -> None:
    words = state.best_command("/data/my runs", example()).split(" ", 3)
    assert words[:3] == ["t2idist", "train", "attngan"]
    assert words[3] == f"seed=1 {KEY}=0.0003 'storage=/data/my runs' name=lr-best"
    config = load("attngan", ["seed=1", f"{KEY}=0.0003", "storage=/data/my runs", "name=lr-best"])
    assert config.stages["attngan"].model["generator_lr"] == 3e-4


def test_without_a_value_there_is_no_winner() -> None:
    sweep = example()
    for trial in sweep.trials:
        trial.value = None
    with pytest.raises(ValueError, match="--best: no trial of the sweep lr has a value of kid yet"):
        state.best_command("runs", sweep)


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    state.write(str(tmp_path / "lr"), example())
    assert state.read(str(tmp_path / "lr")) == example()
    assert state.read(str(tmp_path / "other")) is None


def test_the_same_command_draws_the_same_trials_and_more_on_request(tmp_path: Path) -> None:
    key = f"{KEY}=loguniform(1e-4,1e-3)"
    first = state.open_sweep(made := plan_of(tmp_path, key, trials=3))
    first.trials[0].state = state.FINISHED
    state.write(made.url, first)
    assert state.open_sweep(plan_of(tmp_path, key, "cluster.cpus_per_worker=2", trials=3)).trials == first.trials
    more = state.open_sweep(plan_of(tmp_path, key, trials=5)).trials
    assert more[:3] == first.trials and [trial.number for trial in more] == [1, 2, 3, 4, 5]
    assert state.open_sweep(plan_of(tmp_path, key, trials=1)).trials == first.trials, "no trial is dropped"


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([f"{KEY}=[1e-4,3e-4]"], {}, "has the search space .*0.0002.*, here it is .*0.0003"),
        ([f"{KEY}=[1e-4,2e-4]", "seed=4"], {}, "has the settings none, here it is seed=4"),
        ([f"{KEY}=[1e-4,2e-4]"], {"seed": 4}, "has the --seed 0, here it is 4"),
        ([f"{KEY}=[1e-4,2e-4]"], {"metric": "generator/loss"}, "has the --metric generator/total, here"),
        ([f"{KEY}=[1e-4,2e-4]"], {"mode": "max"}, "has the --mode min, here it is max"),
    ],
)
def test_another_sweep_of_the_same_name_is_refused(
    tmp_path: Path, overrides: list[str], options: dict[str, object], message: str
) -> None:
    made = plan_of(tmp_path, f"{KEY}=[1e-4,2e-4]")
    state.write(made.url, state.open_sweep(made))
    with pytest.raises(ValueError, match=f"{message}.*; give name=ANOTHER for a new sweep"):
        state.open_sweep(plan_of(tmp_path, *overrides, **options))


def test_a_damaged_file_of_a_sweep_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"recipe": "gan_cls"}'):
        (tmp_path / state.FILE).write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path}/sweep.json: not "):
            state.read(str(tmp_path))


def test_the_run_folders_are_the_truth(tmp_path: Path) -> None:
    sweep = example()
    write_run(tmp_path, Trial(4, {}, images=48, value=0.25))
    (tmp_path / "lr-0004/attngan/export").mkdir()
    (tmp_path / "lr-0004/attngan/export/export.json").write_text("{}")
    state.refresh(str(tmp_path), sweep)
    removed, *_, finished = sweep.trials
    assert (finished.state, finished.images, finished.value) == (state.FINISHED, 48, 0.25)
    assert (removed.state, removed.value) == (state.NEW, None), "its folder was removed"
    sweep.images = 64
    state.refresh(str(tmp_path), sweep)
    assert finished.state == state.NEW, "its last weights are not scored yet"


def test_the_page_ranks_trials_with_images_curves_and_values(tmp_path: Path) -> None:
    sweep = example()
    for trial in sweep.trials[:3]:
        write_run(tmp_path, trial)
    text = Path(page.write(str(tmp_path), sweep)).read_text()
    rows = [text.index(f'href="../lr-000{n}/report.html"') for n in (3, 1, 2)]
    assert rows == sorted(rows) and 'href="../lr-0004' not in text
    assert text.count('<img width="64"') == 3 and text.count('class="image"') == 3
    assert text.count('<path class="line') == 2 and 'class="line point' in text, "three curves, one of one point"
    assert text.count('class="mark other') == 2 and text.count('class="mark best') == 1
    assert "2 finished" in text and "1 stopped early" in text and f"{KEY}=0.0003" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_a_page_without_results_lists_the_trials(tmp_path: Path) -> None:
    sweep = example()
    sweep.trials = (Trial(1, {KEY: "0.1"}),)
    text = page.build(str(tmp_path), sweep)
    assert "0001" in text and 'id="curves"' not in text and 'id="images"' not in text


def test_earlier_trials_count_at_the_rungs_of_a_resumed_sweep() -> None:
    points = [[(8, value), (24, value)] for value in (0.1, 0.2, 0.3)]
    scheduler = tune.asha(64, "min", points)
    for name, value, decision in (("good", 0.05, "CONTINUE"), ("bad", 0.5, "STOP")):
        trial = type("Trial", (), {"trial_id": name})()
        scheduler.on_trial_add(None, trial)
        assert scheduler.on_trial_result(None, trial, {"images": 8, "value": value}) == decision
    fresh = tune.asha(64, "min", [])
    fresh.on_trial_add(None, trial)
    assert fresh.on_trial_result(None, trial, {"images": 8, "value": 0.5}) == "CONTINUE"


def test_a_missing_package_is_answered_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Ray Tune needs pandas.*pip install 't2idist\\[sweep\\]'"):
        cli._check_installed()


def test_best_of_no_sweep_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(write_recipe(tmp_path)), "name=mine", "--best"]) == 2
    assert "error: --best: no sweep mine in" in capsys.readouterr().err
