"""Feature extractors: the published network compared with torch-fidelity, hashes, errors, and diversity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from t2idist import storage
from t2idist.evaluate.diversity import Diversity
from t2idist.evaluate.feature_extractors import WeightsFile, open_extractor, resize, resize_as_2015
from t2idist.nn.inception import Inception2015, InceptionV3

CPU = torch.device("cpu")


def random_images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_weights(net: torch.nn.Module, folder: Path) -> tuple[WeightsFile, Path]:
    """Write random weights and BatchNorm statistics whose signal does not vanish in any layer."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    file = folder / "weights.pth"
    torch.save(net.state_dict(), file)
    return WeightsFile(str(file), storage.sha256(file.read_bytes())), file


@pytest.mark.whole
def test_published_network_equals_torch_fidelity(fidelity: None, tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights, file = write_weights(Inception2015(), tmp_path)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    ours = open_extractor("inception-2015", weights, CPU)
    images = random_images(1, 100)
    output, (features, logits) = ours(images), theirs(images)
    assert (ours.dim, ours.classes) == (2048, 1008)
    assert torch.allclose(output.features, features, rtol=1e-4, atol=1e-4 * float(features.abs().max()))
    assert torch.allclose(output.logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
    assert float(features.std()) > 0.01, "the features are not constant"
    clean = open_extractor("inception-2015-clean", weights, CPU)
    assert not torch.allclose(clean(images).features, output.features, rtol=1e-2), "it resizes differently"
    wrong = WeightsFile(weights.url, "0" * 64)
    with pytest.raises(ValueError, match="extractor inception-2015.weights: .* has sha256 .*; 0000"):
        open_extractor("inception-2015", wrong, CPU)
    net = InceptionV3(10)
    torch.save(net.state_dict(), file)
    other = WeightsFile(str(file), storage.sha256(file.read_bytes()))
    with pytest.raises(ValueError, match=r"weights.pth: size mismatch for fc.weight"):
        open_extractor("inception-2015", other, CPU)
    fine_tuned = open_extractor("inception-v3", other, CPU)
    assert fine_tuned.classes == 10 and fine_tuned(images).logits.shape == (1, 10)


@pytest.mark.parametrize("size", [64, 256, 299, 400])
def test_resizing_equals_the_libraries(fidelity: None, size: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = random_images(1, size)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert (resize_as_2015(images, 299) - theirs).abs().max() < 2e-3
    planes = [Image.fromarray(plane.numpy().astype(np.float32), mode="F") for plane in images[0]]
    pillow = np.stack([np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)) for plane in planes])
    assert (resize(images, 299)[0] - torch.from_numpy(pillow).clamp(0, 255)).abs().max() < 0.02


def test_missing_extractors_and_weights_give_one_sentence() -> None:
    with pytest.raises(ValueError, match="extractor 'vgg': allowed are efficientnet-lite0, inception-2015"):
        open_extractor("vgg", WeightsFile(), CPU)
    with pytest.raises(ValueError, match="inception-2015.weights: missing; give the path or URL of the weights"):
        open_extractor("inception-2015", WeightsFile(), CPU)
    with pytest.raises(ValueError, match="its weights are part of its package"):
        open_extractor("efficientnet-lite0", WeightsFile("/x"), CPU)
    with pytest.raises(ValueError, match="extractor clip: .*give a local folder"):
        open_extractor("clip", WeightsFile("/nowhere"), CPU)


def test_default_extractor_has_its_weights() -> None:
    extractor = open_extractor("efficientnet-lite0", WeightsFile(), CPU)
    images = random_images(2, 64)
    output = extractor(images)
    assert output.features.shape == (2, 1280) and output.logits.shape == (2, 1000)
    assert len(extractor.facts["sha256"]) == 64 and "224" in extractor.facts["resize"]
    assert torch.allclose(extractor(images[1:]).features, output.features[1:], atol=1e-4), (
        "images do not influence each other"
    )


def test_diversity_detects_collapse() -> None:
    diversity = Diversity(CPU)
    images = random_images(6, 32).float() / 127.5 - 1
    varied = diversity(images, columns=3)
    assert set(varied) == {"val/diversity", "val/diversity_of_captions"} and min(varied.values()) > 0.01
    assert not diversity.collapsed(varied)
    one_per_caption = diversity(images[[0, 0, 0, 1, 1, 1]], columns=3)
    assert one_per_caption["val/diversity"] == 0.0 < one_per_caption["val/diversity_of_captions"]
    text_ignored = diversity(images[[0, 1, 2, 0, 1, 2]], columns=3)
    assert text_ignored["val/diversity_of_captions"] == 0.0 < text_ignored["val/diversity"] and not diversity.collapsed(
        text_ignored
    )
    assert diversity.collapsed(one_per_caption), "it was larger before"
    assert not Diversity(CPU).collapsed({"val/diversity": 1e-9}), "there is no larger value yet"
    similar = images[[0, 0, 0, 1, 1, 1]] + 0.01 * torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert 0 < diversity(similar, columns=3)["val/diversity"] < 0.3 * varied["val/diversity"]
    assert list(diversity(images[:1], columns=1)) == []


@pytest.mark.slow
def test_clip_is_read_from_a_folder(tmp_path: Path) -> None:
    """The model has small layers and is written by transformers; the tokenizer knows letters only."""
    import json

    import transformers

    folder = tmp_path / "clip"
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 16, "eos_token_id": len(tokens) - 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    sha256 = storage.sha256((folder / "model.safetensors").read_bytes())
    clip = open_extractor("clip", WeightsFile(str(folder), sha256), CPU)
    images = random_images(3, 64)
    output, embedded = clip(images), clip.embed_captions(["a red bird", "abc " * 40])  # type: ignore[attr-defined]
    assert output.features.shape == (3, 24) and embedded.shape == (2, 24) and torch.isfinite(embedded).all()
    assert safetensors.torch.load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors has sha256"):
        open_extractor("clip", WeightsFile(str(folder), "1" * 64), CPU)
