"""Compare the final losses of bfloat16 and float32: short runs of a recipe with both, over a few seeds.

    python tools/bench/bench_precision.py attngan [--preset demo] [--steps 500] [--group-size 8] [--seeds 3]
        [KEY=VALUE ...]

A loss is averaged over the last fifth of a stage. Noise is the standard deviation between seeds, pooled over both
precisions. The exit status is 1 if the means over seeds differ by more than twice the noise. KEY=VALUE: further
settings of the runs.
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
from t2idist.observability.command import command
from t2idist.report import run_folder

PRECISIONS = ("float32", "bfloat16")
NOT_LOSSES = ("norm/", "data/", "time/", "val/", "guard/")
Losses = dict[str, float]


def train(options: argparse.Namespace, precision: str, seed: int, storage: str) -> Losses:
    """Train once. Returns the final losses by stage and name; raises ValueError with the output if the run fails."""
    run = configuration.load(options.recipe, [f"preset={options.preset}"])
    name = f"{precision}-{seed}"
    settings = [
        f"preset={options.preset}",
        f"name={name}",
        f"storage={storage}",
        f"precision={precision}",
        f"seed={seed}",
    ]
    for number, stage in enumerate(run.stages):
        settings += [f"stages.{stage}.seed={seed + 100 * number}"]
        settings += [f"stages.{stage}.images={options.steps * options.group_size}", f"stages.{stage}.groups=1"]
        settings += [f"stages.{stage}.group_size={options.group_size}"]
    command = [sys.executable, "-m", "t2idist.run", options.recipe, "--local", *settings, *options.settings]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with {process.returncode}:\n{process.stderr[-2000:]}")
    losses = {}
    for stage_record in run_folder.read_run(f"{storage}/{name}").stages:
        for metric in stage_record.metric_names():
            if "/" in metric and not metric.startswith(NOT_LOSSES) and "accuracy" not in metric:
                values = stage_record.series(metric)[1]
                losses[f"{stage_record.name}: {metric}"] = statistics.fmean(values[-max(1, len(values) // 5) :])
    return losses


def compare(runs: dict[str, list[Losses]]) -> bool:
    """Print a table of the losses. Returns whether all are within the noise."""
    within_noise = True
    print(f"{'':44}{'float32':>18}{'bfloat16':>18}{'diff':>9}{'noise':>9}")
    for name in runs[PRECISIONS[0]][0]:
        values = {precision: [losses[name] for losses in runs[precision]] for precision in PRECISIONS}
        means = [statistics.fmean(values[precision]) for precision in PRECISIONS]
        spreads = [statistics.stdev(values[precision]) for precision in PRECISIONS]
        noise = statistics.fmean([spread**2 for spread in spreads]) ** 0.5
        difference = abs(means[1] - means[0])
        mark = "" if difference <= 2 * noise else "  <- more than twice the noise"
        within_noise = within_noise and not mark
        columns = "".join(f"{f'{mean:.4f} +- {spread:.4f}':>18}" for mean, spread in zip(means, spreads, strict=True))
        print(f"{name:44}{columns}{difference:9.4f}{noise:9.4f}{mark}")
    return within_noise


@command("error")
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=int, default=500, help="steps of each stage (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2 (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    if options.seeds < 2:
        raise ValueError(f"--seeds {options.seeds}: the noise between seeds needs at least 2")
    runs: dict[str, list[Losses]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as storage:
        for seed in range(options.seeds):
            for precision in PRECISIONS:
                runs[precision].append(train(options, precision, seed, storage))
    return 0 if compare(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
