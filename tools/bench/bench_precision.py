"""Whether bfloat16 ends where float32 does: short runs of a recipe in both, a few seeds each, and their last losses.

    python tools/bench/bench_precision.py attngan [--preset demo] [--steps 500] [--group-size 8] [--seeds 3] [KEY=VALUE ...]

A loss is its mean over the last fifth of a stage. Noise is the standard deviation between seeds (of both precisions,
pooled): the means over seeds may differ by twice that, else this ends with 1. KEY=VALUE: further settings of the runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from t2idist import config as configuration
from t2idist.report import run_folder

PRECISIONS = ("float32", "bfloat16")
NOT_LOSSES = ("norm/", "data/", "time/", "val/", "guard/")
Losses = dict[str, float]


def train(words: argparse.Namespace, precision: str, seed: int, storage: str) -> Losses:
    """Run it; its last losses by stage and name. Raises ValueError with what it said where it failed."""
    run = configuration.load(words.recipe, [f"preset={words.preset}"])
    name = f"{precision}-{seed}"
    settings = [
        f"preset={words.preset}",
        f"name={name}",
        f"storage={storage}",
        f"precision={precision}",
        f"seed={seed}",
    ]
    for number, stage in enumerate(run.stages):
        settings += [f"stages.{stage}.seed={seed + 100 * number}"]
        settings += [f"stages.{stage}.images={words.steps * words.group_size}", f"stages.{stage}.groups=1"]
        settings += [f"stages.{stage}.group_size={words.group_size}"]
    command = [sys.executable, "-m", "t2idist.run", words.recipe, "--local", *settings, *words.settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = {}
    for of_stage in run_folder.read(f"{storage}/{name}").stages:
        for metric in of_stage.metric_names():
            if "/" in metric and not metric.startswith(NOT_LOSSES) and "accuracy" not in metric:
                values = of_stage.series(metric)[1]
                found[f"{of_stage.name}: {metric}"] = statistics.fmean(values[-max(1, len(values) // 5) :])
    return found


def compare(runs: dict[str, list[Losses]]) -> bool:
    """Print a line a loss; whether all are within the noise."""
    well = True
    print(f"{'':44}{'float32':>18}{'bfloat16':>18}{'apart':>9}{'noise':>9}")
    for name in runs[PRECISIONS[0]][0]:
        of = {precision: [losses[name] for losses in runs[precision]] for precision in PRECISIONS}
        means = [statistics.fmean(of[precision]) for precision in PRECISIONS]
        spreads = [statistics.stdev(of[precision]) for precision in PRECISIONS]
        noise = statistics.fmean([spread**2 for spread in spreads]) ** 0.5
        apart = abs(means[1] - means[0])
        mark = "" if apart <= 2 * noise else "  <- more than twice the noise"
        well = well and not mark
        columns = "".join(f"{f'{mean:.4f} +- {spread:.4f}':>18}" for mean, spread in zip(means, spreads, strict=True))
        print(f"{name:44}{columns}{apart:9.4f}{noise:9.4f}{mark}")
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=500, help="steps of each stage (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    words = parser.parse_intermixed_args()
    if words.seeds < 2:
        print(f"error: --seeds {words.seeds}: noise between seeds takes at least 2", file=sys.stderr)
        return 2
    runs: dict[str, list[Losses]] = {precision: [] for precision in PRECISIONS}
    try:
        with tempfile.TemporaryDirectory() as storage:
            for seed in range(words.seeds):
                for precision in PRECISIONS:
                    runs[precision].append(train(words, precision, seed, storage))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if compare(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
