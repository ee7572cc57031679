"""The state of a sweep: ``sweep.json`` in its folder, next to the run folders of its trials."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from t2idist import storage
from t2idist.config.strict import from_dict
from t2idist.engine.checkpoint import export
from t2idist.sweep import space as search_space
from t2idist.sweep.plan import SweepPlan
from t2idist.sweep.points import read_points

FILE = "sweep.json"
NEW, TRAINING, FINISHED, STOPPED, FAILED = "new", "training", "finished", "stopped early", "failed"


@dataclass
class Trial:
    """One trial."""

    number: int
    values: dict[str, str]
    """Of the swept keys, as written after ``key=``."""
    state: str = NEW
    error: str = ""
    images: int = 0
    """Images seen at the last value."""
    value: float | None = None
    """The last value of the metric."""


@dataclass
class Sweep:
    """The contents of sweep.json."""

    recipe: str
    fixed: tuple[str, ...]
    measuring: tuple[str, ...]
    space: dict[str, str]
    seed: int
    metric: str
    mode: str
    stage: str
    name: str
    images: int
    """Budget of the measured stage."""
    shared: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def ranked(self) -> list[Trial]:
        """Trials from best to worst: finished ones first, then by their last value."""
        sign = 1 if self.mode == "min" else -1

        def key(trial: Trial) -> tuple[bool, float, int]:
            value = math.inf if trial.value is None else sign * trial.value
            return trial.state != FINISHED or trial.value is None, value, trial.number

        return sorted(self.trials, key=key)

    @property
    def best(self) -> Trial | None:
        return next((trial for trial in self.ranked if trial.value is not None), None)

    def trial_name(self, number: int) -> str:
        return f"{self.name}-{number:04d}"


def open_sweep(plan: SweepPlan) -> Sweep:
    """Read the sweep's state and add the trials that it lacks; nothing is written.

    Raises:
        ValueError: a sweep of this name has another space, seed, metric or settings.
    """
    fixed = tuple(text for text in plan.fixed if not text.startswith("cluster."))
    sweep = Sweep(
        recipe=plan.recipe,
        fixed=plan.fixed,
        measuring=plan.measuring,
        space=search_space.describe(plan.space),
        seed=plan.options.seed,
        metric=plan.options.metric,
        mode=plan.mode,
        stage=plan.stage,
        name=plan.name,
        images=plan.images,
        shared=plan.shared,
    )
    before = read(plan.url)
    if before is not None:
        old_fixed = tuple(text for text in before.fixed if not text.startswith("cluster."))
        for what, old, new in (
            ("recipe", before.recipe, sweep.recipe),
            ("search space", _words(before.space), _words(sweep.space)),
            ("settings", " ".join(sorted(old_fixed)), " ".join(sorted(fixed))),
            ("--seed", before.seed, sweep.seed),
            ("--metric", before.metric, sweep.metric),
            ("--mode", before.mode, sweep.mode),
            ("stage", before.stage, sweep.stage),
        ):
            if old != new:
                raise ValueError(
                    f"name: the sweep {plan.name} in {storage.redact(plan.storage)} has the {what} "
                    f"{_or_none(old)}, here it is {_or_none(new)}; give name=ANOTHER for a new sweep"
                )
        sweep.trials = before.trials
    drawn = search_space.draw(plan.space, plan.options.seed, max(plan.options.trials, len(sweep.trials)))
    added = [Trial(number, values) for number, values in enumerate(drawn, 1) if number > len(sweep.trials)]
    sweep.trials = (*sweep.trials, *added)
    return sweep


def _or_none(value: str | int) -> str:
    return "none" if value == "" else str(value)


def _words(space: Mapping[str, str]) -> str:
    return " ".join(f"{key}={text}" for key, text in sorted(space.items()))


def read(url: str) -> Sweep | None:
    """Read the state of the sweep in folder `url`; None if there is none."""
    values = storage.read_json_if_present(storage.join(url, FILE))
    if values is None:
        return None
    try:
        return from_dict(Sweep, values)
    except ValueError as error:
        where = storage.redact(storage.join(url, FILE))
        raise ValueError(
            f"{where}: not the state of a sweep: {error}; restore the file or give another name="
        ) from None


def write(url: str, sweep: Sweep) -> None:
    storage.write_json(storage.join(url, FILE), asdict(sweep))


def refresh(storage_url: str, sweep: Sweep) -> None:
    """Bring the trials up to date from their run folders, which are the truth about what was trained."""
    for trial in sweep.trials:
        url = storage.join(storage_url, sweep.trial_name(trial.number))
        points = read_points(url, sweep.stage, sweep.metric)
        if points:
            trial.images, trial.value = points[-1]
        scored = "/" in sweep.metric or trial.images >= sweep.images
        if export.exists(storage.join(url, sweep.stage, "export")) and (points and scored):
            trial.state, trial.error = FINISHED, ""
        elif trial.state == FINISHED:  # its folder was removed, or the last weights were not scored
            trial.state, trial.images, trial.value = NEW, 0, None


def best_command(storage_url: str, sweep: Sweep) -> str:
    """Return the command that trains the best trial again, under its own name.

    Raises:
        ValueError: no trial has a value yet.
    """
    best = sweep.best
    if best is None:
        raise ValueError(f"--best: no trial of the sweep {sweep.name} has a value of {sweep.metric} yet")
    swept = [f"{key}={value}" for key, value in best.values.items()]
    where = [f"storage={storage_url}", f"name={sweep.name}-best"]
    return shell(["t2idist", "train", sweep.recipe, *sweep.fixed, *sweep.measuring, *swept, *where])


def shell(words: Iterable[str]) -> str:
    """Write a command as it is typed into a shell."""
    return " ".join(shlex.quote(word) for word in words)


def counts(sweep: Sweep) -> dict[str, int]:
    """Count the trials by state."""
    return dict(Counter(trial.state for trial in sweep.trials))
