"""What Ray Train costs a step: the same stage of the same run by its workers, and by the same workers under torchrun.

    python tools/bench_ray.py attngan [--workers 2] [--images 6400] [--rounds 3] [key.path=value ...]

Both train the recipe's demo for so many images, in turns, into a folder of their own; the rate is the median of the
metric lines after the first third. Copies in memory are off in both, so that only Ray itself differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from t2idist import config as configuration
from t2idist import worker
from t2idist.config import RunConfig
from t2idist.strict import to_yaml

ROOT = Path(__file__).parent.parent


def load(words: argparse.Namespace, folder: Path) -> RunConfig:
    groups = [f"stages.{name}.groups={words.workers}" for name in ("damsm", words.system, "judge")]
    settings = [
        f"storage={folder}", "checkpoint.memory=false", f"cluster.workers={words.workers}", "cluster.cpus_per_worker=1",
        "stages.damsm.images=1", f"stages.{words.system}.images={words.images}", "stages.judge.images=1",
        f"stages.{words.system}.checkpoint_every_images={10 * words.images}",
        f"stages.{words.system}.pictures_every_images={10 * words.images}",
    ]  # fmt: skip
    return configuration.load(words.system, [*settings, *groups, *words.settings])


def rate(run: Path, stage: str) -> float:
    """Images a second of a stage once it is under way."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    rates: list[float] = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(rates[len(rates) // 3 :])


def under_torchrun(words: argparse.Namespace, folder: Path) -> None:
    """What each process of torchrun does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    worker.main(load(words, folder), torch.device("cpu"), worker.Around())
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchrun", help=argparse.SUPPRESS)
    words = parser.parse_intermixed_args()
    if words.torchrun:
        under_torchrun(words, Path(words.torchrun))
        return
    same = [words.system, *words.settings, f"--workers={words.workers}", f"--images={words.images}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={words.workers}", __file__, *same]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found: dict[str, list[float]] = {"torchrun": [], "Ray Train": []}
    with tempfile.TemporaryDirectory(prefix="t2idist-bench-") as folder:
        for number in range(words.rounds):
            for name, rates in found.items():
                place = Path(folder) / f"{number}-{name.split()[0]}"
                config = load(words, place)
                line = [*torchrun, f"--torchrun={place}"]
                if name != "torchrun":
                    place.mkdir()
                    recipe = place / "recipe.yaml"
                    recipe.write_text(to_yaml(config))
                    line = [sys.executable, "-m", "t2idist.run", str(recipe)]
                done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                rates.append(rate(place / config.name, words.system))
                print(f"round {number}: {name:10} {rates[-1]:.1f} images/s", flush=True)
    ray, plain = (statistics.median(found[name]) for name in ("Ray Train", "torchrun"))
    print(
        f"a step under Ray Train takes {plain / ray:.3f} times that under torchrun (medians of {words.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
