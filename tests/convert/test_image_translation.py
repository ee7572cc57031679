"""The released weights of CycleGAN and pix2pix, by the names and shapes of their tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2idist.contract import SupportsDomains
from t2idist.convert.cli import import_main
from t2idist.sampling.loading import load_export

CPU = torch.device("cpu")


def published_resnet(blocks: int = 9, width: int = 64, *, statistics: bool = True) -> dict[str, list[int]]:
    """Names and shapes of a released generator with instance norm: horse2zebra.pth has 9 blocks.

    statistics: files from before PyTorch 0.4 also have the norms' unused running averages.
    """
    shapes: dict[str, list[int]] = {}

    def layer(name: str, shape: list[int], norm: str = "", transposed: bool = False) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, [shape[1 if transposed else 0]]
        if norm and statistics:
            shapes[f"{norm}.running_mean"] = shapes[f"{norm}.running_var"] = shapes[f"{name}.bias"]

    layer("model.1", [width, 3, 7, 7], "model.2")
    layer("model.4", [2 * width, width, 3, 3], "model.5")
    layer("model.7", [4 * width, 2 * width, 3, 3], "model.8")
    for i in range(10, 10 + blocks):
        layer(f"model.{i}.conv_block.1", [4 * width, 4 * width, 3, 3], f"model.{i}.conv_block.2")
        layer(f"model.{i}.conv_block.5", [4 * width, 4 * width, 3, 3], f"model.{i}.conv_block.6")
    up = 10 + blocks
    layer(f"model.{up}", [4 * width, 2 * width, 3, 3], f"model.{up + 1}", transposed=True)
    layer(f"model.{up + 3}", [2 * width, width, 3, 3], f"model.{up + 4}", transposed=True)
    layer(f"model.{up + 7}", [3, width, 7, 7])
    return shapes


def published_unet(levels: int = 8, width: int = 64) -> dict[str, list[int]]:
    """Names and shapes of a released U-Net with batch norm: facades_label2photo.pth has 8 levels."""
    channels = [3, *(width * min(2**level, 8) for level in range(levels))]
    shapes: dict[str, list[int]] = {"model.model.0.weight": [width, 3, 4, 4]}
    shapes |= {"model.model.3.weight": [2 * width, 3, 4, 4], "model.model.3.bias": [3]}

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.{key}": [size] for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = []

    at = "model.model.1"
    for level in range(1, levels):
        outside, inside, lowest = channels[level], channels[level + 1], level == levels - 1
        shapes[f"{at}.model.1.weight"] = [inside, outside, 4, 4]
        if not lowest:
            norm(f"{at}.model.2", inside)
        up = 3 if lowest else 5
        shapes[f"{at}.model.{up}.weight"] = [inside if lowest else 2 * inside, outside, 4, 4]
        norm(f"{at}.model.{up + 1}", outside)
        at = f"{at}.model.3"
    return shapes


def write(path: Path, shapes: dict[str, list[int]], seed: int) -> str:
    """Write random weights as a PyTorch file; returns its path."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: list[int]) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(5)
        drawn = 0.02 * torch.randn(shape, generator=generator)
        return drawn.abs() + 1 if name.endswith("running_var") else drawn

    torch.save({name: value(name, shape) for name, shape in shapes.items()}, path)
    return str(path)


def parameters(shapes: dict[str, list[int]]) -> int:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return sum(size for name, size in sizes.items() if name.rpartition(".")[2] in ("weight", "bias"))


def test_the_tables_have_the_published_numbers_of_parameters() -> None:
    """11.378 M and 54.414 M, as the released code prints them."""
    assert parameters(published_resnet()) == 11_378_179
    assert parameters(published_unet()) == 54_413_955


@pytest.mark.parametrize("statistics", [True, False])
def test_two_generators_of_cyclegan_become_an_export(tmp_path: Path, statistics: bool) -> None:
    shapes = published_resnet(blocks=6, width=8, statistics=statistics)
    files = [write(tmp_path / f"{name}.pth", shapes, seed) for seed, name in enumerate(("horse2zebra", "zebra2horse"))]
    named = [argument for file in files for argument in ("--from", file)]
    command = ["--system", "cyclegan", *named, "--attributes", "horse,zebra", "--to", str(tmp_path / "out")]
    assert import_main(command) == 0
    loaded = load_export(str(tmp_path / "out/cyclegan"), CPU)
    assert isinstance(loaded.system, SupportsDomains) and loaded.system.domains == ("horse", "zebra")
    for name, file in zip(("a_to_b", "b_to_a"), files, strict=True):
        weights = torch.load(file, weights_only=True)
        ours = loaded.nets[name].state_dict()
        assert ours.keys() == {key for key in weights if "running" not in key}
        assert all(torch.equal(ours[key], weights[key]) for key in ours)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert loaded.system.to_domain(loaded.nets, images, 1).shape == images.shape


def test_one_generator_of_cyclegan_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "horse2zebra.pth", published_resnet(blocks=6, width=8), 0)
    assert import_main(["--system", "cyclegan", "--from", file, "--to", str(tmp_path / "out")]) == 2
    assert "missing b_to_a; add the file with --from FILE" in capsys.readouterr().err


def test_a_generator_of_pix2pix_becomes_an_export(tmp_path: Path) -> None:
    file = write(tmp_path / "facades_label2photo.pth", published_unet(levels=6, width=8), 0)
    assert import_main(["--system", "pix2pix", "--from", file, "--to", str(tmp_path / "out")]) == 0
    loaded = load_export(str(tmp_path / "out/pix2pix"), CPU)
    assert isinstance(loaded.system, SupportsDomains) and loaded.system.sizes == (64,)
    ours, weights = loaded.nets["generator"].state_dict(), torch.load(file, weights_only=True)
    assert ours.keys() == weights.keys() and all(torch.equal(ours[key], weights[key]) for key in ours)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    assert loaded.system.to_domain(loaded.nets, images, 1).shape == images.shape
