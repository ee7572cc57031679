"""``t2idist sweep``: train a recipe with many settings and rank them."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from t2idist import config as configuration
from t2idist import storage
from t2idist.config.arguments import command_parser
from t2idist.observability import logs
from t2idist.observability.command import command

if TYPE_CHECKING:
    from t2idist.sweep.plan import SweepPlan
    from t2idist.sweep.state import Sweep

_INTERRUPTED = "interrupted; run the same command again to continue the sweep"


def parser() -> argparse.ArgumentParser:
    example = "t2idist sweep gan_cls 'stages.gan_cls.model.generator_lr=loguniform(1e-4,1e-3)' --trials 8"
    result = command_parser("sweep", "Train a recipe with many settings on Ray Tune and rank them.", example)
    add = result.add_argument
    add("recipe", help="name of a recipe (a folder in configs/) or a .yaml file")
    add(
        "settings",
        nargs="*",
        metavar="key.path=...",
        help="[a,b,c], uniform(a,b), loguniform(a,b) or randint(a,b): values to try; else one value for all trials",
    )
    add("--metric", default="kid", help="a score in training (kid, fid, r_precision, ...) or a metric of the run's log")
    add("--mode", choices=("min", "max"), default="", help="which values are better, if the name does not say it")
    add("--stage", default="", help="the stage whose metric counts; default: the last one that has it")
    add("--trials", type=int, default=16, help="number of trials; a resumed sweep may have more (default 16)")
    add("--seed", type=int, default=0, help="of the drawn values (default 0)")
    add(
        "--max-concurrent", type=int, metavar="N", help="trials at a time; default: as many as the cluster has room for"
    )
    add("--no-early-stopping", action="store_true", help="train every trial to its end, without ASHA")
    add("--best", action="store_true", help="print the command that trains the best trial again, and exit")
    return result


@command("error", interrupted=_INTERRUPTED)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0 done, 1 trials failed, 2 invalid input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = parser().parse_intermixed_args(arguments)
    logs.configure(logging.INFO)
    if options.best:
        print(_best(options), flush=True)
        return 0
    if options.max_concurrent is not None and options.max_concurrent < 1:
        raise ValueError(f"--max-concurrent {options.max_concurrent}; give at least 1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    made = _plan(options)
    _check_installed()
    from t2idist.sweep import driver

    _print_plan(made)
    sweep = driver.run(made, options.max_concurrent)
    return _report(made, sweep)


def _plan(options: argparse.Namespace) -> SweepPlan:
    from t2idist.sweep import plan

    given = plan.SweepOptions(
        metric=options.metric,
        mode=options.mode,
        stage=options.stage,
        trials=options.trials,
        seed=options.seed,
        early_stopping=not options.no_early_stopping,
    )
    return plan.make(options.recipe, options.settings, given)


def _check_installed() -> None:
    """Raise ValueError if a package that Ray Tune needs is missing."""
    missing = [name for name in ("pandas", "tensorboardX", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"Ray Tune needs {' and '.join(missing)}; install them with: pip install 't2idist[sweep]'")


def _best(options: argparse.Namespace) -> str:
    """Return the command that trains the best trial again."""
    from t2idist.sweep import plan, space, state

    fixed, swept = space.split_overrides(options.settings)
    first = space.draw(swept, 0, 1)[0] if swept else {}
    config = configuration.load(options.recipe, [*fixed, *(f"{key}={value}" for key, value in first.items())])
    name, folder = plan.sweep_name(config, fixed), storage.absolute(config.storage)
    sweep = state.read(storage.join(folder, name))
    if sweep is None:
        raise ValueError(f"--best: no sweep {name} in {storage.redact(folder)}; give its name=... and storage=...")
    state.refresh(folder, sweep)
    return state.best_command(folder, sweep)


def _print_plan(made: SweepPlan) -> None:
    from t2idist.sweep import space

    total = space.combinations(made.space)
    trials = made.options.trials if total is None else min(total, made.options.trials)
    keys = ", ".join(f"{key}={text}" for key, text in space.describe(made.space).items())
    print(
        f"{made.name}: {trials} trials of {keys}; {made.mode} of {made.options.metric} of stage {made.stage}",
        flush=True,
    )


def _report(made: SweepPlan, sweep: Sweep) -> int:
    from t2idist.sweep import page, state

    print(f"report {storage.redact(storage.join(made.url, page.FILE))}")
    failed = [trial for trial in sweep.trials if trial.state == state.FAILED]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(sweep.trials)} trials failed, such as {made.trial_name(failed[0].number)}: "
            f"{failed[0].error}; the same command runs them again"
        )
    if sweep.best is None:
        raise RuntimeError(
            f"--metric {sweep.metric}: no trial has a value of it; {made.trial_name(1)}/{made.stage}/metrics.jsonl has "
            "the names of the metrics"
        )
    best = sweep.best
    print(f"best: trial {best.number:04d}, {sweep.metric} {best.value:.4g} at {best.images:,} images")
    print(state.best_command(made.storage, sweep), flush=True)
    return 0
