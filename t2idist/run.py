"""The command line: ``python -m t2idist.run RECIPE [preset=NAME] [key.path=value ...] [--dry-run] [--local]``.

``--list STORAGE`` and ``--status RUN`` need no recipe: they read from storage how runs stand.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from t2idist import config as configuration
from t2idist.config import RunConfig
from t2idist.launch import auth
from t2idist.observability import logs

if TYPE_CHECKING:
    from t2idist.training.options import StopAfter
    from t2idist.training.resume import ResumePoint

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m t2idist.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("recipe", nargs="?", help="a recipe's name (a folder in configs/) or a .yaml file")
    made.add_argument(
        "settings", nargs="*", metavar="key.path=value", help="over the recipe; preset=NAME picks its file"
    )
    made.add_argument("--dry-run", action="store_true", help="check, print what would run, and exit")
    made.add_argument("--local", action="store_true", help="one worker in this process, without Ray")
    made.add_argument(
        "--plan",
        metavar="GPUSxKIND[,key=value...]",
        help="print memory, network, speed and hours on so many GPUs of a kind, such as 8xa100-80, and exit",
    )
    made.add_argument(
        "--stop-after",
        metavar="STAGE[:IMAGES]",
        help="end when the stage is done, or has seen so many images and saved them; the same command without this "
        "goes on, and the model is the same as without the stop",
    )
    made.add_argument(
        "--resume-from",
        metavar="CHECKPOINT",
        help="go on from the checkpoint of the present stage at so many images (newer ones are removed), or, as a new "
        "run, from the folder of another run's checkpoint; once: submitted again, the run goes on from where it is",
    )
    made.add_argument(
        "--init-from",
        metavar="[STAGE=]EXPORT",
        action="append",
        default=[],
        help="fine-tune: start the networks that the export holds from its weights (stages.STAGE.init_from)",
    )
    made.add_argument(
        "--hook",
        metavar="COMMAND",
        default="",
        help="run at start, restart, failure and end, with a JSON object on its standard input; its environment is "
        "PATH, HOME and the like, and what begins with T2IDIST_HOOK_",
    )
    made.add_argument(
        "--insecure-cluster", action="store_true", help="join a Ray cluster off this machine without its token"
    )
    made.add_argument("--list", metavar="STORAGE", help="the runs in a folder or bucket: state, images, restarts")
    made.add_argument(
        "--status", metavar="RUN", help="how the run in this folder stands: stages, checkpoints, restarts"
    )
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run a recipe; gives the exit status: 0 done, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    arguments = parser().parse_intermixed_args(words)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    logs.configure(logging.INFO)
    try:
        if arguments.list is not None or arguments.status is not None:
            return _show(arguments)
        if arguments.recipe is None:
            raise ValueError(f"give a recipe: {', '.join(configuration.recipes())}, or a .yaml file")
        return _run(configuration.load(arguments.recipe, arguments.settings), arguments)
    except ValueError as error:
        print(logs.redact_secrets(f"error: {error}"), file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(logs.redact_secrets(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _show(arguments: argparse.Namespace) -> int:
    from t2idist.report import status

    if arguments.recipe is not None:
        raise ValueError(f"{arguments.recipe}: --list and --status read a folder; they take no recipe")
    if arguments.list is not None:
        print(status.format_run_list(arguments.list), flush=True)
    if arguments.status is not None:
        print(status.format_status(arguments.status), flush=True)
    return 0


def _run(config: RunConfig, arguments: argparse.Namespace) -> int:
    only_told = bool(arguments.plan) or arguments.dry_run
    address = "" if arguments.local else auth.cluster_address(config.cluster.address, os.environ)
    if not (only_told or arguments.insecure_cluster):
        auth.require_token(address, os.environ, Path.home())
    check = functools.partial(_check, config, arguments)
    if only_told or arguments.local or address:
        return _train(check(), arguments)
    from t2idist.launch import connection

    if connection.is_initialized():
        return _train(check(), arguments)
    with connection.start_local_cluster(config.cluster, check) as checked:
        return _train(checked, arguments, own=True)


@dataclass(frozen=True)
class _Checked:
    """A run that nothing is found wrong with, and what its command says besides."""

    config: RunConfig
    stop: StopAfter | None
    resumed: ResumePoint | None
    hook: list[str]
    place: logs.LogContext


def _check(config: RunConfig, arguments: argparse.Namespace) -> _Checked | None:
    """None where the command asked for a page alone; it is printed."""
    from t2idist.observability import hook
    from t2idist.preflight import dry_run
    from t2idist.training import options, resume, stages

    config = options.apply_init_from(stages.with_absolute_paths(config), arguments.init_from)
    stop = options.parse_stop_after(arguments.stop_after, config) if arguments.stop_after else None
    if arguments.plan:
        from t2idist.preflight import plan

        print(plan.page(config, arguments.plan), flush=True)
        return None
    words = hook.parse(arguments.hook) if arguments.hook else []
    resumed = resume.find(config, arguments.resume_from) if arguments.resume_from else None
    place = logs.LogContext(config.name)
    if config.report.json_logs:
        logs.configure(logging.INFO, place)
    _say(config, f"{config.name}: {config.about or ', '.join(config.stages)}")
    if arguments.dry_run:
        print(dry_run.describe(config, resumed), flush=True)
        return None
    dry_run.check(config, resumed)
    if not arguments.local:
        import t2idist.launch.submit  # noqa: F401  # Ray Train takes seconds to import
    return _Checked(config, stop, resumed, words, place)


def _train(run: _Checked | None, arguments: argparse.Namespace, own: bool = False) -> int:
    """own: Ray was started for this run alone."""
    if run is None:
        return 0
    from t2idist.engine.preemption import StopRequested
    from t2idist.observability import hook
    from t2idist.training import lifecycle, resume, stages

    config = run.config
    _say(config, f"run folder {stages.run_url(config)}")
    if run.resumed is not None:
        resume.prepare(config, arguments.resume_from, run.resumed)
    try:
        with lifecycle.run_lifecycle(config, hook.Hook(run.hook), stops=run.stop is not None) as telling:
            if arguments.local:
                from t2idist.training import local

                local.run_local(config, run.stop, telling.follow, run.place)
            else:
                from t2idist.launch import submit

                submit.submit(config, run.stop, telling.follow, own)
    except StopRequested as left:
        print(f"ended on request, {left}; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGTERM
    if run.stop is not None:
        _say(config, f"stopped after {arguments.stop_after}; the same command without --stop-after goes on")
    _say(config, f"report {stages.run_url(config)}/report.html")
    return 0


def _say(config: RunConfig, text: str) -> None:
    """A line for people, or of the log where that is JSON."""
    if config.report.json_logs:
        logger.info(text)
    else:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
