"""What a sweep will do: measured and shared stages, settings for scores, and what is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist.sweep import plan
from tests.helpers.runs import write_recipe

RATE = "stages.attngan.model.generator_lr=[1e-4,2e-4]"


def make(folder: Path, *overrides: str, metric: str = "kid", **options: object) -> plan.SweepPlan:
    recipe = str(write_recipe(folder))
    return plan.make(recipe, overrides, plan.SweepOptions(metric=metric, **options))  # type: ignore[arg-type]


def test_the_last_stage_that_generates_is_measured() -> None:
    rate = ["stages.gan_cls.model.generator_lr=[1e-4,2e-4]"]
    assert plan.make("gan_cls", rate, plan.SweepOptions("kid")).stage == "gan_cls", "not style, which inverts it"
    made = plan.make("attngan", ["stages.damsm.model.dropout=[0.1,0.2]"], plan.SweepOptions("kid"))
    assert (made.stage, made.mode, made.name) == ("attngan", "min", "attngan-demo-sweep")


@pytest.mark.parametrize(
    ("key", "shared"),
    [
        ("stages.attngan.model.generator_lr=[1e-4,2e-4]", ("damsm", "judge")),
        ("stages.judge.model.dropout=[0.1,0.2]", ("damsm",)),
        ("stages.damsm.model.dropout=[0.1,0.2]", ()),
        ("seed=[1,2]", ()),
    ],
)
def test_stages_that_no_swept_key_changes_are_shared(key: str, shared: tuple[str, ...]) -> None:
    assert plan.make("attngan", [key], plan.SweepOptions("kid")).shared == shared


def test_a_stage_is_not_shared_if_it_uses_a_changed_one() -> None:
    made = plan.make("mirrorgan", ["stages.damsm.model.dropout=[0.1,0.2]"], plan.SweepOptions("kid"))
    assert "damsm" not in made.shared and not set(made.shared) & {made.stage}


def test_trials_are_ordinary_runs_that_compute_the_metric(tmp_path: Path) -> None:
    made = make(tmp_path, RATE, metric="fid")
    config = made.load({"stages.attngan.model.generator_lr": "0.0002"}, made.trial_name(3))
    assert (config.name, config.storage) == ("tiny-sweep-0003", str(tmp_path / "runs"))
    assert config.scores.metrics == ("kid", "fid") and config.scores.best == "fid" and config.scores.share == 1
    assert config.stages["attngan"].scores_every_images == 64 // plan.SCORES_PER_TRIAL
    own = make(tmp_path, RATE, "stages.attngan.scores_every_images=20", "scores.share=0.5", "name=mine")
    config = own.load({}, own.trial_name(1))
    assert config.stages["attngan"].scores_every_images == 20 and config.scores.share == 0.5
    assert (own.name, config.name) == ("mine", "mine-0001")
    assert not make(tmp_path, RATE, metric="generator/total").measuring


def test_a_trial_ends_with_the_measured_stage() -> None:
    rate = "stages.gan_cls.model.generator_lr=[1e-4,2e-4]"
    made = plan.make("gan_cls", [rate], plan.SweepOptions("kid"))
    assert made.stop_options(made.stage) == ["--stop-after", "gan_cls"]
    assert plan.make("gan_cls", [rate], plan.SweepOptions("style/loss", stage="style")).stop_options("style") == []


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {}, "no key to sweep"),
        ([RATE], {"trials": 0}, "--trials 0; give at least 1"),
        (["seed=randint(1,9)"], {"trials": 10**9}, "--trials 1000000000; give at most 9,999"),
        (["stages.attngan.model.base_size=[15,16]"], {}, "stages.attngan: base_size is 15"),
        ([RATE], {"metric": "beauty"}, "--metric beauty: no such score in training; there are fid, kid"),
        ([RATE], {"metric": "nobody/loss"}, "has no 'nobody/...'; its metrics begin with .*discriminator.*generator/"),
        ([RATE], {"metric": "generator/adversarial_16"}, "give --mode min or --mode max"),
        ([RATE], {"stage": "damsm"}, "damsm does not generate images from captions"),
        ([RATE], {"stage": "gan"}, "--stage: no stage 'gan'; there are damsm, attngan"),
        (["stages.attngan.model.generator_rate=[1,2]"], {}, "generator_rate: unknown key"),
        (["stages.gan.images=[16,32]"], {}, "no such stage"),
        (["stages.attngan.images=[16,32]"], {}, "stages.attngan.images: cannot be swept"),
        (["storage=[a,b]"], {}, "storage: cannot be swept"),
        (["cluster.workers=[1,2]"], {}, "cluster.workers: cannot be swept"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    tmp_path: Path, overrides: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, *overrides, **{"metric": "kid", **options})  # type: ignore[arg-type]


def test_every_trial_is_checked_and_an_invalid_one_named(tmp_path: Path) -> None:
    made = make(tmp_path, RATE, metric="generator/total")
    trials = {n: {"stages.attngan.model.generator_lr": v} for n, v in enumerate(("0.0001", "fast"), 1)}
    with pytest.raises(
        ValueError, match="trial 2 \\(.*generator_lr=fast\\): .*generator_lr: 'fast'; expected a number"
    ):
        plan.check_trials(made, trials, local=True)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"
