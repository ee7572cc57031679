"""``t2idist train``, or ``python -m t2idist.run``: train a recipe, or check, plan or list runs."""

from __future__ import annotations

import argparse
import contextlib
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
from t2idist.config.arguments import command_parser
from t2idist.launch import auth
from t2idist.observability import logs
from t2idist.observability.command import command, describe_error

if TYPE_CHECKING:
    from t2idist.launch.worker_pool import WorkerPool
    from t2idist.training.options import StopAfter
    from t2idist.training.resume import ResumePoint

logger = logging.getLogger(__name__)

PROGRAM = "python -m t2idist.run"
_INTERRUPTED = "interrupted; run the same command again to resume from the last checkpoint"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    example = f"{program} attngan preset=demo cluster.workers=2"
    result = command_parser("train", "Train a recipe on a Ray cluster or, with --local, in this process.", example)
    result.prog = program
    add = result.add_argument
    add("recipe", nargs="?", help="name of a recipe (a folder in configs/) or a .yaml file")
    add("settings", nargs="*", metavar="key.path=value", help="override the recipe; preset=NAME selects its file")
    add("--dry-run", action="store_true", help="check the run, print its configuration and networks, and exit")
    add("--local", action="store_true", help="train with one worker in this process, without Ray")
    add(
        "--plan",
        metavar="GPUSxKIND[,key=value...]",
        help="print the estimated memory, speed and hours on these GPUs (8xa100-80), and exit",
    )
    add(
        "--stop-after",
        metavar="STAGE[:IMAGES]",
        help="stop when the stage is done or has seen IMAGES; resume without this option",
    )
    add(
        "--resume-from",
        metavar="CHECKPOINT",
        help="resume once from this checkpoint: images seen, or the folder of another run's checkpoint",
    )
    add(
        "--init-from",
        metavar="[STAGE=]EXPORT",
        action="append",
        default=[],
        help="fine-tune: start from the weights of this export",
    )
    add("--hook", metavar="COMMAND", default="", help="run at start, restart, failure and end, with JSON on its stdin")
    add("--insecure-cluster", action="store_true", help="join a Ray cluster without a token, and do not warn")
    add("--list", metavar="STORAGE", help="list the runs in this folder or bucket, and exit")
    add("--status", metavar="RUN", help="show the state of the run in this folder, and exit")
    return result


@command("error", interrupted=_INTERRUPTED)
def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command.

    Args:
        program: how the user calls it, for the help text.

    Returns:
        Exit status: 0 done, 1 failed, 2 invalid input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = parser(program).parse_intermixed_args(arguments)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    logs.configure(logging.INFO)
    if options.list is not None or options.status is not None:
        return _show_status(options)
    if options.recipe is None:
        raise ValueError(f"give a recipe: {', '.join(configuration.recipes())}, or a .yaml file")
    return _run(configuration.load(options.recipe, options.settings), options)


def _show_status(options: argparse.Namespace) -> int:
    from t2idist.report import status

    if options.recipe is not None:
        raise ValueError(f"{options.recipe}: --list and --status read a folder; they take no recipe")
    if options.list is not None:
        print(status.format_run_list(options.list), flush=True)
    if options.status is not None:
        print(status.format_status(options.status), flush=True)
    return 0


def _run(config: RunConfig, options: argparse.Namespace) -> int:
    prints_only = bool(options.plan) or options.dry_run
    address = "" if options.local else _cluster_address(config)
    warning = ""
    if not options.plan:
        warning = auth.check_cluster(address, os.environ, Path.home(), config.cluster.require_token)
    if warning:
        warning = "" if options.insecure_cluster else f"{warning}; pass --insecure-cluster if its network is private"
    prepare = functools.partial(_prepare, config, options, warning, not address)
    if prints_only or options.local:
        return _train(prepare(), options)
    from t2idist.launch import connection

    if not address:
        with connection.start_local_cluster(config.cluster, prepare) as submission:
            return _train(submission, options)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(connection.join_cluster(config.cluster))
        except ConnectionError as error:  # what is wrong with the run itself is said before
            return _train(prepare(), options, error)
        from t2idist.launch import first_group

        pool = first_group.start_pool(config, own_cluster=False)  # they load while this one imports torch and checks
        return _train(prepare(), options, pool)


def _cluster_address(config: RunConfig) -> str:
    """Return the address of the cluster that the run joins; "" if it starts Ray itself."""
    return auth.joined_address() or auth.cluster_address(config.cluster.address, os.environ)


@dataclass(frozen=True)
class _Submission:
    """A checked run and the parsed options of its command."""

    config: RunConfig
    stop_after: StopAfter | None
    resume_point: ResumePoint | None
    hook_command: list[str]
    log_context: logs.LogContext


def _prepare(config: RunConfig, options: argparse.Namespace, warning: str, local: bool) -> _Submission | None:
    """Check the run, and log `warning`. With --plan and --dry-run, print their page and return None.

    Args:
        local: the run trains on this machine, in this process or on a Ray cluster that it starts.
    """
    from t2idist.observability import hook
    from t2idist.preflight import dry_run
    from t2idist.training import options as run_options
    from t2idist.training import resume, stages

    config = run_options.apply_init_from(stages.with_absolute_paths(config), options.init_from)
    stop_after = run_options.parse_stop_after(options.stop_after, config) if options.stop_after else None
    if options.plan:
        from t2idist.preflight import plan

        print(plan.page(config, options.plan), flush=True)
        return None
    hook_command = hook.parse(options.hook) if options.hook else []
    resume_point = resume.find(config, options.resume_from) if options.resume_from else None
    log_context = logs.LogContext(config.name)
    if config.report.json_logs:
        logs.configure(logging.INFO, log_context)
    if warning:
        logger.warning(warning)
    _print(config, f"{config.name}: {config.about or ', '.join(config.stages)}")
    if options.dry_run:
        print(dry_run.describe(config, resume_point, local), flush=True)
        return None
    dry_run.check(config, resume_point, local)
    if not options.local:
        import t2idist.launch.submit  # noqa: F401  # importing Ray Train takes seconds, here while Ray starts
    return _Submission(config, stop_after, resume_point, hook_command, log_context)


def _train(
    submission: _Submission | None, options: argparse.Namespace, joined: WorkerPool | ConnectionError | None = None
) -> int:
    """Train the run.

    Args:
        submission: None if there is nothing to train.
        joined: The pool on the cluster that the run has joined, or why it could not; None: there is no such cluster.
    """
    if submission is None:
        return 0
    if not options.local:
        return _train_alone(submission, options, joined)
    from t2idist.training import lock

    with lock.only_one(submission.config):
        return _train_alone(submission, options, None)


def _train_alone(
    submission: _Submission, options: argparse.Namespace, joined: WorkerPool | ConnectionError | None
) -> int:
    """Train the run, which no other process trains."""
    from t2idist.engine.preemption import StopRequested
    from t2idist.observability.hook import CommandHook
    from t2idist.training import resume
    from t2idist.training.lifecycle import run_lifecycle
    from t2idist.training.stages import run_url

    config, stop_after = submission.config, submission.stop_after
    _print(config, f"run folder {run_url(config)}")
    if submission.resume_point is not None:
        resume.prepare(config, options.resume_from, submission.resume_point)
    try:
        with run_lifecycle(config, CommandHook(submission.hook_command), stops=stop_after is not None) as notifier:
            if isinstance(joined, ConnectionError):
                raise joined
            if options.local:
                from t2idist.training import local

                local.run_local(config, stop_after, notifier.on_progress, submission.log_context)
            else:
                from t2idist.launch import submit

                submit.submit(config, stop_after, notifier.on_progress, joined)
    except BrokenPipeError:
        raise
    except OSError as error:  # in training, this is a failure, never bad input
        raise RuntimeError(describe_error(error)) from error
    except StopRequested as stop:
        print(f"ended on request, {stop}; run the same command again to resume", file=sys.stderr)
        return 128 + signal.SIGTERM
    if stop_after is not None:
        _print(config, f"stopped after {options.stop_after}; run the same command without --stop-after to resume")
    _print(config, f"report {run_url(config)}/report.html")
    return 0


def _print(config: RunConfig, text: str) -> None:
    """Print a line, or log it if the log is JSON."""
    if config.report.json_logs:
        logger.info(text)
    else:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
