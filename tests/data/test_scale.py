"""Training from an image folder through an object store, with workers killed during the run."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, parse_yaml
from t2idist.data.loader import load_split
from t2idist.data.order import Order
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_dataset
from t2idist.engine.batches import read_ledger
from t2idist.engine.noise import derive_seed
from tests.helpers.object_store import SECRET, seaweedfs
from tests.helpers.runs import ROOT, command_environment, command_line, export_bytes, train_worker_pids, write_recipe

REAL = os.environ.get("T2IDIST_COCO")
"""A folder in COCO's layout to use instead of avatars, such as several thousand photographs."""


def write_coco_folder(folder: Path) -> Path:
    """Write avatars with their captions to a small folder in COCO's layout."""
    faces = open_dataset(DataConfig(source="avatars", samples=400, size=64))
    folder = folder / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split, year in (("train", 2017), ("val", 2017)):
        loaded = load_split(faces, split, sizes=(64,), max_words=18, crop=1.0)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (folder / f"{split}{year}").mkdir()
        for number, (image, captions) in enumerate(zip(loaded.batch.images[0], loaded.captions, strict=True), 1):
            name = f"{number:012d}.jpg" if split == "train" else f"{number + 500_000:012d}.jpg"
            encoded = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(encoded, "JPEG", quality=90)
            (folder / f"{split}{year}" / name).write_bytes(encoded.getvalue())
            images.append({"id": int(name[:12]), "file_name": name, "width": 64, "height": 64})
            annotations += [
                {"id": 10 * int(name[:12]) + i, "image_id": int(name[:12]), "caption": text}
                for i, text in enumerate(captions)
            ]
        text = json.dumps({"images": images, "annotations": annotations, "licenses": []})
        (folder / f"annotations/captions_{split}{year}.json").write_text(text)
    return folder


def run_tool(env: dict[str, str], *arguments: str) -> str:
    line = [sys.executable, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def check_ledger(run: Path, stage: str, dataset: Dataset) -> None:
    """Check that every step and group took the samples of the order, and that every sample occurs once per epoch."""
    config = from_dict(RunConfig, parse_yaml((run / "config.yaml").read_text(), "config.yaml"))
    scale = config.stages[stage]
    train = dataset.split("train")
    seed = derive_seed(config.stage_seed(stage), stage, "data")
    order = Order(seed, train.shard_sizes, scale.groups, scale.group_size)
    taken = read_ledger(str(run / stage))
    assert list(taken) == [(step, group) for step in range(scale.steps) for group in range(scale.groups)]
    for (step, group), ids in taken.items():
        assert ids == [train.keys[i] for i in order.sample_indices(step, group)]
    sequence = [sample for ids in taken.values() for sample in ids]
    for start in range(0, len(sequence) - len(train) + 1, len(train)):
        assert set(Counter(sequence[start : start + len(train)]).values()) == {1}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ["small", "demo"])
def test_training_from_a_folder_through_a_store_survives_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    source = Path(REAL) if REAL else write_coco_folder(tmp_path)
    with seaweedfs() as reach:
        mark = f"{os.getpid()}-{time.time_ns()}"
        env = {**command_environment(), **{k: v for k, v in reach.items() if k.startswith("AWS")}, "T2IDIST_MARK": mark}
        run_tool(env, "tools/shard_coco.py", "--coco", str(source), "--out", "s3://bucket/coco", "--size", "76")
        run_tool(env, "tools/check_shards.py", "s3://bucket/coco")
        words = ["data.source=s3://bucket/coco", "report.ledger=true", "cluster.workers=2", "cluster.cpus_per_worker=1"]
        if size == "small":
            file = str(write_recipe(tmp_path))
            words += ["stages.attngan.images=320", "stages.attngan.checkpoint_every_images=32"]
        else:
            file = "attngan"
            budgets = {"damsm": 3200, "attngan": 6400, "judge": 320}
            for stage, images in budgets.items():
                scale = {"groups": 2, "group_size": 16, "images": images, "pictures_every_images": images}
                words += [f"stages.{stage}.{key}={value}" for key, value in scale.items()]
            words += [f"storage={tmp_path}/runs", "name=tiny", "stages.attngan.checkpoint_every_images=640"]
        process = subprocess.Popen(
            command_line(file, *words), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        checkpoints = tmp_path / "runs/tiny/attngan/checkpoints"
        deadline = time.monotonic() + 280
        while not list(checkpoints.glob("*/commit.json")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        os.kill(train_worker_pids(mark)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err + out
        assert "restarts 1" in out and SECRET not in out + err
        for name in [k for k in reach if k.startswith("AWS")]:
            monkeypatch.setenv(name, reach[name])
        check_ledger(tmp_path / "runs/tiny", "attngan", Dataset.open("s3://bucket/coco"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_times_give_the_same_model_and_a_complete_ledger(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    words = ["--local", "report.ledger=true", "stages.attngan.images=6400", "stages.attngan.checkpoint_every_images=64",
             "stages.attngan.pictures_every_images=6400"]  # fmt: skip
    line = command_line(str(write_recipe(tmp_path / "whole")), *words)
    subprocess.run(line, cwd=ROOT, env=command_environment(), check=True, stdout=subprocess.DEVNULL, timeout=600)
    line = command_line(str(write_recipe(tmp_path / "killed")), *words)
    rng = random.Random(3)
    kill_at_images = sorted(rng.sample(range(1, 5600), 20))
    folder = tmp_path / "killed/runs/tiny/attngan/checkpoints"
    for images in kill_at_images:
        process = subprocess.Popen(line, cwd=ROOT, env=command_environment(), stdout=subprocess.DEVNULL)
        while not any(int(name.parent.name[:12]) >= images // 64 * 64 for name in folder.glob("*/commit.json")):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(line, cwd=ROOT, env=command_environment(), check=True, stdout=subprocess.DEVNULL, timeout=600)
    for stage in ("damsm", "attngan"):
        assert export_bytes(tmp_path / "killed", stage) == export_bytes(tmp_path / "whole", stage)
        check_ledger(tmp_path / "killed/runs/tiny", stage, open_dataset(DataConfig(source="emoji")))
