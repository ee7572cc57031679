"""What a sweep does: the configuration of every trial, the stage that is measured, and the stages that trials share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2idist import config as configuration
from t2idist import storage
from t2idist.config import METRICS, RunConfig
from t2idist.contract import SupportsInvert, SupportsSample, System
from t2idist.evaluate.background_scorer import SMALLER_IS_BETTER
from t2idist.preflight import dry_run
from t2idist.sweep import space as search_space
from t2idist.sweep.space import Space
from t2idist.training.stages import StageRun

OF_PRDC = ("precision", "recall", "density", "coverage")
_LARGER_IS_BETTER = ("is", *OF_PRDC, "r_precision", "clip_r", "damsm_r", "val/r_precision")
MAX_TRIALS = 9999
"""A trial's name has four digits."""
SCORES_PER_TRIAL = 9
"""Scores of a trial if the recipe does not say how often; the first is at the first rung of ASHA."""


@dataclass(frozen=True)
class SweepOptions:
    """The options of ``t2idist sweep`` that decide what is computed."""

    metric: str
    mode: str = ""
    """"min" or "max"; "": known from the metric's name."""
    stage: str = ""
    """"": the last stage that has the metric."""
    trials: int = 16
    seed: int = 0
    early_stopping: bool = True


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep."""

    recipe: str
    name: str
    storage: str
    """Absolute URL of the folder that has the sweep's and its trials' folders."""
    fixed: tuple[str, ...]
    """Overrides of all trials, without name and storage."""
    measuring: tuple[str, ...]
    """Overrides that make a trial compute the metric."""
    space: Space
    options: SweepOptions
    mode: str
    stage: str
    """The stage whose metric counts."""
    shared: tuple[str, ...]
    """The first stages, which no swept key changes: trained once."""
    config: RunConfig
    """Configuration of the first trial."""

    @property
    def url(self) -> str:
        return storage.join(self.storage, self.name)

    @property
    def images(self) -> int:
        """Budget of the measured stage."""
        return self.config.stages[self.stage].images

    @property
    def shared_name(self) -> str:
        return f"{self.name}-shared"

    def trial_name(self, number: int) -> str:
        return f"{self.name}-{number:04d}"

    def overrides(self, values: Mapping[str, str], name: str) -> list[str]:
        """Return the ``key=value`` arguments of a run with these values of the swept keys."""
        swept = [f"{key}={value}" for key, value in values.items()]
        return [*self.fixed, *self.measuring, *swept, f"storage={self.storage}", f"name={name}"]

    def load(self, values: Mapping[str, str], name: str) -> RunConfig:
        """Load the configuration of a run. Raises ValueError if it is invalid."""
        return configuration.load(self.recipe, self.overrides(values, name))

    def stop_options(self, last: str) -> list[str]:
        """Return the options of ``t2idist train`` that end a run with stage `last`."""
        return ["--stop-after", last] if last != list(self.config.stages)[-1] else []


def make(recipe: str, overrides: Sequence[str], options: SweepOptions) -> SweepPlan:
    """Check the arguments of a sweep.

    Args:
        recipe: name of a recipe, or a .yaml file.
        overrides: ``key=value`` arguments, some of them with a list or a range.

    Raises:
        ValueError: in one sentence.
    """
    if options.trials < 1:
        raise ValueError(f"--trials {options.trials}; give at least 1")
    fixed, space = search_space.split_overrides(overrides)
    search_space.check(fixed, space)
    if min(options.trials, search_space.combinations(space) or options.trials) > MAX_TRIALS:
        raise ValueError(f"--trials {options.trials}; give at most {MAX_TRIALS:,}")
    _check_keys(space)
    if recipe.endswith((".yaml", ".yml")):
        recipe = str(Path(recipe).absolute())
    first = search_space.draw(space, options.seed, 1)[0]
    base = configuration.load(recipe, [*fixed, *(f"{key}={value}" for key, value in first.items())])
    stage = _measured_stage(base, options)
    mode = _direction(options)
    if f"stages.{stage}.images" in space:
        raise ValueError(f"stages.{stage}.images: cannot be swept; trials are compared after as many images")
    return SweepPlan(
        recipe=recipe,
        name=sweep_name(base, fixed),
        storage=storage.absolute(base.storage),
        fixed=tuple(text for text in fixed if text.partition("=")[0] not in ("name", "storage")),
        measuring=tuple(_measuring(base, stage, options, fixed)),
        space=space,
        options=options,
        mode=mode,
        stage=stage,
        shared=tuple(_shared_stages(base, stage, space)),
        config=base,
    )


def sweep_name(config: RunConfig, fixed: Sequence[str]) -> str:
    """Return the name of the sweep: that which the user gives, or one made from the recipe's."""
    return config.name if any(text.startswith("name=") for text in fixed) else f"{config.name}-sweep"


def check_trials(plan: SweepPlan, trials: Mapping[int, Mapping[str, str]], local: bool) -> None:
    """Check the configuration of every trial as ``t2idist train`` would.

    Args:
        trials: values of the swept keys, by number.
        local: they train on this machine.

    Raises:
        ValueError: names the trial.
    """
    for number, values in trials.items():
        try:
            dry_run.check(plan.load(values, f"{plan.name}-check"), None, local)
        except ValueError as error:
            swept = ", ".join(f"{key}={value}" for key, value in values.items())
            raise ValueError(f"trial {number} ({swept}): {error}") from None


def _check_keys(space: Space) -> None:
    for key in space:
        if key in ("name", "storage", "preset") or key.split(".")[0] in ("cluster", "report", "checkpoint", "scores"):
            raise ValueError(
                f"{key}: cannot be swept; it does not change what a run trains, or says where it is stored"
            )


def _measured_stage(config: RunConfig, options: SweepOptions) -> str:
    """Return the stage whose metric counts. Raises ValueError if no stage has the metric."""
    if options.stage and options.stage not in config.stages:
        raise ValueError(f"--stage: no stage '{options.stage}'; there are {', '.join(config.stages)}")
    names = [options.stage] if options.stage else list(reversed(config.stages))
    prefix, slash, _ = options.metric.partition("/")
    scores = [*(name for name in METRICS if name not in ("clip_r", "prdc")), *OF_PRDC]
    if not slash and options.metric not in scores:
        raise ValueError(
            f"--metric {options.metric}: no such score in training; there are {', '.join(scores)}, and the metrics of "
            "a run's log, such as generator/loss"
        )
    built = {name: _build(config, name) for name in names}
    for name, system in built.items():
        if slash and (isinstance(system, ValueError) or prefix in (*system.roles, "val")):
            return name
        if not slash and isinstance(system, SupportsSample) and not isinstance(system, SupportsInvert):
            return name  # a system that inverts a generator shows the images of that one
    if slash:
        built_roles = [system.roles for system in built.values() if not isinstance(system, ValueError)]
        prefixes = sorted({"val"}.union(*built_roles))
        raise ValueError(
            f"--metric {options.metric}: the log of {', '.join(names)} has no '{prefix}/...'; its metrics begin with "
            f"{', '.join(f'{role}/' for role in prefixes)}"
        )
    if errors := [system for system in built.values() if isinstance(system, ValueError)]:
        raise errors[-1]  # of the earliest stage
    raise ValueError(
        f"--metric {options.metric}: {config.stages[names[0]].system} does not generate images from captions; give a "
        "metric of its log, such as val/r_precision"
    )


def _build(config: RunConfig, name: str) -> System | ValueError:
    """Build the system of a stage without weights; returns the error if its settings are invalid or need the data."""
    stage = StageRun(config, name)
    stage.model_config()
    try:
        return dry_run.build_on_meta(stage, dry_run.UNKNOWN)
    except ValueError as error:
        return error


def _direction(options: SweepOptions) -> str:
    if options.mode:
        return options.mode
    if options.metric in SMALLER_IS_BETTER or options.metric.endswith(("/loss", "/total")):
        return "min"
    if options.metric in _LARGER_IS_BETTER or options.metric.startswith("val/r_precision"):
        return "max"
    raise ValueError(f"--metric {options.metric}: give --mode min or --mode max: which values are better is not known")


def _measuring(config: RunConfig, stage: str, options: SweepOptions, fixed: Sequence[str]) -> Iterator[str]:
    """Yield overrides that make a trial compute the metric as often as early stopping needs it."""
    settings, given = config.stages[stage], {text.partition("=")[0] for text in fixed}
    if "/" in options.metric:
        return
    if not settings.scores_every_images:
        yield f"stages.{stage}.scores_every_images={max(1, settings.images // SCORES_PER_TRIAL)}"
    score = "prdc" if options.metric in OF_PRDC else options.metric
    if score not in config.scores.metrics:
        yield f"scores.metrics=[{','.join((*config.scores.metrics, score))}]"
    if "scores.best" not in given and options.metric != config.scores.best:
        yield f"scores.best={options.metric}"
    if "scores.share" not in given:
        yield "scores.share=1"  # a score that is skipped is missing in the comparison


def _shared_stages(config: RunConfig, measured: str, space: Space) -> Iterator[str]:
    """Yield the first stages that no swept key changes, by itself or through the stages that they use."""
    if any(not key.startswith("stages.") for key in space):
        return
    changed = {key.split(".")[1] for key in space}
    for name in itertools.takewhile(lambda name: name != measured, config.stages):
        if name in changed or changed & set(config.stages[name].uses.values()):
            return
        yield name
