"""From pictures and captions to a trained model by way of an object store, with workers killed on the way."""

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
from t2idist.engine.noise import key
from tests.helpers.object_store import SECRET, seaweedfs
from tests.helpers.runs import ROOT, command_environment, command_line, export_bytes, train_worker_pids, write_recipe

REAL = os.environ.get("T2IDIST_COCO")
"""A folder in COCO's layout to use instead of drawn faces (several thousand photographs, say)."""


def coco_folder(folder: Path) -> Path:
    """A small folder in COCO's layout: drawn faces with their captions."""
    faces = open_dataset(DataConfig(source="avatars", samples=400, size=64))
    folder = folder / "coco"
    (folder / "annotations").mkdir(parents=True)
    for split, year in (("train", 2017), ("val", 2017)):
        loaded = load_split(faces, split, sizes=(64,), max_words=18, crop=1.0)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (folder / f"{split}{year}").mkdir()
        for number, (picture, captions) in enumerate(zip(loaded.batch.images[0], loaded.captions, strict=True), 1):
            name = f"{number:012d}.jpg" if split == "train" else f"{number + 500_000:012d}.jpg"
            encoded = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(encoded, "JPEG", quality=90)
            (folder / f"{split}{year}" / name).write_bytes(encoded.getvalue())
            images.append({"id": int(name[:12]), "file_name": name, "width": 64, "height": 64})
            annotations += [
                {"id": 10 * int(name[:12]) + i, "image_id": int(name[:12]), "caption": text}
                for i, text in enumerate(captions)
            ]
        text = json.dumps({"images": images, "annotations": annotations, "licenses": []})
        (folder / f"annotations/captions_{split}{year}.json").write_text(text)
    return folder


def tool(env: dict[str, str], *words: str) -> str:
    line = [sys.executable, *words]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def check_ledger(run: Path, stage: str, dataset: Dataset) -> None:
    """Every step and group took what the order says, and every sample came once an epoch."""
    config = from_dict(RunConfig, parse_yaml((run / "config.yaml").read_text(), "config.yaml"))
    scale = config.stages[stage]
    train = dataset.split("train")
    order = Order(key(config.stage_seed(stage), stage, "data"), train.shard_sizes, scale.groups, scale.group_size)
    taken = read_ledger(str(run / stage))
    assert list(taken) == [(step, group) for step in range(scale.steps) for group in range(scale.groups)]
    for (step, group), ids in taken.items():
        assert ids == [train.keys[i] for i in order.sample_index(step, group)]
    stream = [sample for ids in taken.values() for sample in ids]
    for start in range(0, len(stream) - len(train) + 1, len(train)):
        assert set(Counter(stream[start : start + len(train)]).values()) == {1}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", ["small", "demo"])
def test_from_pictures_in_a_folder_to_a_model_by_way_of_a_store_and_through_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    source = Path(REAL) if REAL else coco_folder(tmp_path)
    with seaweedfs() as reach:
        mark = f"{os.getpid()}-{time.time_ns()}"
        env = {**command_environment(), **{k: v for k, v in reach.items() if k.startswith("AWS")}, "T2IDIST_MARK": mark}
        tool(env, "tools/shard_coco.py", "--coco", str(source), "--out", "s3://bucket/coco", "--size", "76")
        tool(env, "tools/check_shards.py", "s3://bucket/coco")
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
def test_twenty_kills_at_random_moments_leave_the_same_model_and_a_whole_ledger(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    words = ["--local", "report.ledger=true", "stages.attngan.images=6400", "stages.attngan.checkpoint_every_images=64",
             "stages.attngan.pictures_every_images=6400"]  # fmt: skip
    line = command_line(str(write_recipe(tmp_path / "whole")), *words)
    subprocess.run(line, cwd=ROOT, env=command_environment(), check=True, stdout=subprocess.DEVNULL, timeout=600)
    line = command_line(str(write_recipe(tmp_path / "killed")), *words)
    draws = random.Random(3)
    moments = sorted(draws.sample(range(1, 5600), 20))
    folder = tmp_path / "killed/runs/tiny/attngan/checkpoints"
    for images in moments:
        process = subprocess.Popen(line, cwd=ROOT, env=command_environment(), stdout=subprocess.DEVNULL)
        while not any(int(name.parent.name[:12]) >= images // 64 * 64 for name in folder.glob("*/commit.json")):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(line, cwd=ROOT, env=command_environment(), check=True, stdout=subprocess.DEVNULL, timeout=600)
    for stage in ("damsm", "attngan"):
        assert export_bytes(tmp_path / "killed", stage) == export_bytes(tmp_path / "whole", stage)
        check_ledger(tmp_path / "killed/runs/tiny", stage, open_dataset(DataConfig(source="emoji")))
