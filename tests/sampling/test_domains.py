"""CycleGAN and pix2pix from shards to translated images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from t2idist import config as configuration
from t2idist import run
from t2idist.data.shards import Dataset
from t2idist.engine.batches import read_ledger
from t2idist.preflight import dry_run
from t2idist.sampling import sample as sampling
from t2idist.sampling import translate
from t2idist.sampling.figures import read_image, to_pil
from tests.helpers import small_systems
from tests.helpers.shard_sets import make_sample, write_set


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Samples with the attributes red, green and blue in turn."""
    samples = [make_sample(n, "train" if n < 30 else "test") for n in range(39)]
    return write_set(tmp_path_factory.mktemp("domains") / "set", samples)


def write_recipe(folder: Path, source: str, system: str, model: dict[str, Any], **data: object) -> str:
    stage = {"system": system, "group_size": 2, "groups": 2, "images": 24, "pictures_every_images": 12}
    values = {
        "name": "small",
        "storage": str(folder / "runs"),
        "precision": "float32",
        "data": {"source": source, "max_words": 4, "threads": 1, "crop": 1.0, **data},
        "cluster": {"workers": 1},
        "report": {"ledger": True},
        "stages": {system: {**stage, "model": {**small_systems.MODELS[system], **model}}},
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(file)


def write_png(path: Path, seed: int) -> str:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 20, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.whole
def test_cyclegan_trains_on_two_attributes_and_translates(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe(tmp_path, dataset.url, "cyclegan", {"domains": ["red", "blue"]})
    assert run.main([file, "--local"]) == 0
    at = tmp_path / "runs/small/cyclegan"
    for ids in read_ledger(str(at)).values():
        numbers = [tuple(int(key[1:]) for key in name.split("+")) for name in ids]
        assert all(first % 3 == 0 and second % 3 == 2 for first, second in numbers), "an image of each domain"
    pictures = sorted(file.name for file in (at / "pictures").iterdir())
    assert pictures == ["translated_000000012.png", "translated_000000024.png"]
    assert "translations by cyclegan" in (tmp_path / "runs/small/report.html").read_text()
    capsys.readouterr()

    image, out = write_png(tmp_path / "me.png", 1), tmp_path / "out"
    arguments = ["--export", str(at / "export"), "--image", image, "--out", str(out)]
    for name in ("blue", "red"):
        assert translate.main([*arguments, "--to", name]) == 0
        assert {file.name for file in out.iterdir()} >= {"me.png", "grid.png"}
        (out / "me.png").rename(tmp_path / f"{name}.png")
        (out / "grid.png").unlink()
    blue, red = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("blue", "red"))
    assert blue.shape == (16, 16, 3) and not np.array_equal(blue, red)
    for invalid, message in (
        ([], "give --to; this export translates to blue and red"),
        (["--to", "green"], "--to green: there is no such domain; this export translates to blue and red"),
        (["--to", "red", "--domain", "1"], "--set, --clear and --domain are for exports of stargan"),
        (["--set", "red"], "--set, --clear and --domain are for exports of stargan; this one has --to"),
    ):
        assert translate.main([*arguments, *invalid]) == 2
        assert message in capsys.readouterr().err
    assert sampling.main(["--export", str(at / "export"), "--text", "a face"]) == 2
    assert "t2idist translate --export" in capsys.readouterr().err


@pytest.mark.whole
def test_pix2pix_trains_on_outlines_and_translates(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_recipe(tmp_path, dataset.url, "pix2pix", {"domains": ["outlines", "image"]}, outlines=True)
    assert run.main([file, "--local"]) == 0
    at = tmp_path / "runs/small/pix2pix"
    assert len([*(at / "pictures").iterdir()]) == 2
    image, out = write_png(tmp_path / "me.png", 1), tmp_path / "out"
    to_pil(read_image(image, 16, as_outlines=True)).save(tmp_path / "drawing.png")
    for name, more in (("me", ["--outlines"]), ("drawing", [])):
        export = ["--export", str(at / "export"), "--out", str(out)]
        assert translate.main([*export, "--image", str(tmp_path / f"{name}.png"), *more]) == 0
        (out / "grid.png").unlink()
    results = [np.asarray(Image.open(out / f"{name}.png")) for name in ("me", "drawing")]
    assert np.array_equal(*results), "--outlines is the drawing of the image"
    assert "wrote 1 images" in capsys.readouterr().out


def test_outlines_of_a_file_are_black_and_white(tmp_path: Path) -> None:
    image = read_image(write_png(tmp_path / "me.png", 1), 16, as_outlines=True)
    assert image.shape == (3, 16, 16) and set(image.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(
    ("system", "model", "message"),
    [
        (
            "cyclegan",
            {"domains": ["red", "black"]},
            "domains: 'black' is not an attribute of the data: blue, green, red",
        ),
        ("cyclegan", {"domains": []}, "domains: none, and the data has 3 attributes"),
        ("pix2pix", {}, "pix2pix learns from pairs of images, and the data has none"),
    ],
)
def test_data_without_the_domains_is_refused(
    tmp_path: Path, dataset: Dataset, system: str, model: dict[str, Any], message: str
) -> None:
    config = configuration.load(write_recipe(tmp_path, dataset.url, system, model))
    with pytest.raises(ValueError, match=f"stages.{system}: {message}"):
        dry_run.check(config, None)


def test_dry_run_lists_the_domains(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_recipe(tmp_path, dataset.url, "cyclegan", {"domains": ["red", "blue"]})
    assert run.main([file, "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert "10 images per epoch, 2.4 epochs, domain red" in page
    assert "10 images per epoch, 2.4 epochs, domain blue" in page


def test_a_domain_without_training_images_is_refused(tmp_path: Path) -> None:
    samples = [make_sample(n, "test" if n % 3 == 2 else "train") for n in range(30)]
    dataset = write_set(tmp_path / "set", samples)
    config = configuration.load(write_recipe(tmp_path, dataset.url, "cyclegan", {"domains": ["red", "blue"]}))
    with pytest.raises(ValueError, match="model.domains: no image of split train has blue"):
        dry_run.check(config, None)
