"""Grids of sample images that training writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2idist.evaluate.in_training import GRID_ROWS, SampleGrid
from t2idist.sampling.loading import LoadedExport, load_export
from tests.helpers import small_systems
from tests.sampling.conftest import WORDS


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of exports of untrained small networks, by system."""
    folder = tmp_path_factory.mktemp("exports")
    urls = {name: str(folder / name) for name in ("attngan", "dcgan")}
    for name, url in urls.items():
        small_systems.write_export(name, url, WORDS)
    return urls


def open_grid(loaded: LoadedExport, captions: list[str], folder: Path) -> SampleGrid:
    return SampleGrid(
        loaded.system,
        loaded.vocabulary,
        captions,
        max_words=6,
        columns=2,
        seed=0,
        folder=str(folder),
        device=torch.device("cpu"),
    )


def test_grid_of_the_same_networks_is_the_same(exports: dict[str, str], tmp_path: Path) -> None:
    loaded = load_export(exports["attngan"], torch.device("cpu"))
    for net in loaded.nets.values():
        net.train()
    first, second = (open_grid(loaded, ["a red heart", "a blue face"], tmp_path / name) for name in ("a", "b"))
    urls = first.write(first.generate(loaded.nets), 12800)
    assert [Path(url).name for url in urls] == ["images_000012800.png", "attention_000012800.png"]
    assert all(net.training for net in loaded.nets.values())
    again = second.write(second.generate(loaded.nets), 12800)
    assert [Path(a).read_bytes() for a in urls] == [Path(b).read_bytes() for b in again]


def test_grid_without_captions_has_different_noise_in_every_row(exports: dict[str, str], tmp_path: Path) -> None:
    loaded = load_export(exports["dcgan"], torch.device("cpu"))
    grid = open_grid(loaded, [], tmp_path)
    sample = grid.generate(loaded.nets)
    grid.write(sample, 64)
    images = [image.numpy().tobytes() for image in sample.images[-1]]
    assert len(set(images)) == len(images) == 2 * GRID_ROWS
    assert (tmp_path / "images_000000064.png").is_file()
