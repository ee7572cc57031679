"""The command line: ``python -m t2idist.run RECIPE [preset=NAME] [key.path=value ...] [--dry-run] [--local]``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from t2idist import config as configuration
from t2idist.config import RunConfig

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m t2idist.run", description=__doc__)
    made.add_argument("recipe", help="a recipe's name (a folder in configs/) or a .yaml file")
    made.add_argument(
        "settings", nargs="*", metavar="key.path=value", help="over the recipe; preset=NAME picks its file"
    )
    made.add_argument("--dry-run", action="store_true", help="check, print what would run, and exit")
    made.add_argument("--local", action="store_true", help="one worker in this process, without Ray")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Run a recipe; gives the exit status: 0 done, 1 failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    arguments = parser().parse_intermixed_args(words)
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for noisy in ("ray", "webdataset", "fsspec", "s3fs", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return _run(configuration.load(arguments.recipe, arguments.settings), arguments.dry_run, arguments.local)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def _run(config: RunConfig, dry_run: bool, local: bool) -> int:
    from t2idist import dry, stages

    config = stages.anchored(config)
    print(f"{config.name}: {config.about or ', '.join(config.stages)}", flush=True)
    if dry_run:
        print(dry.describe(config), flush=True)
        return 0
    dry.check(config)
    print(f"run folder {stages.run_url(config)}", flush=True)
    from t2idist.engine.notice import Left

    try:
        if local:
            from t2idist import alone

            alone.train(config)
        else:
            from t2idist import launch  # Ray takes seconds to import

            launch.submit(config)
    except Left as left:
        print(f"ended on request, {left}; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGTERM
    print(f"report {stages.run_url(config)}/report.html", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
