"""Exports as safetensors and ONNX."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from t2idist.contract import Captions
from t2idist.sampling.loading import load_export
from tests.helpers import small_systems, toy_gan
from tools import export_weights

CPU = torch.device("cpu")
WORDS = ["<end>", *(f"word{i}" for i in range(1, toy_gan.VOCABULARY_SIZE))]
WITHOUT_IMAGES = {"damsm", "char_text", "captioner"}


def write_export(folder: Path, name: str) -> str:
    """Write an export of an untrained small system. Returns its URL."""
    small_systems.write_export(name, str(folder / name), WORDS, small_systems.DATA_INFOS.get(name, toy_gan.DATA_INFO))
    return str(folder / name)


def test_safetensors_hold_the_tensors_and_the_readme_documents_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write_export(tmp_path, "attngan")
    assert export_weights.main(["--export", url, "--to", str(tmp_path / "out")]) == 0
    loaded, config = load_export(url, CPU), json.loads((tmp_path / "out/config.json").read_text())
    assert config["system"] == "attngan" and config["config"]["generator_width"] == 8
    for name, net in loaded.nets.items():
        tensors = load_file(tmp_path / "out" / config["networks"][name]["file"])
        own = net.state_dict()
        assert tensors.keys() == own.keys() == config["networks"][name]["tensors"].keys()
        for key, value in own.items():
            assert torch.equal(tensors[key], value)
            assert config["networks"][name]["tensors"][key]["shape"] == list(value.shape)
    assert (tmp_path / "out/vocabulary.txt").read_text().split() == WORDS
    readme = (tmp_path / "out/README.md").read_text()
    assert "generator.safetensors" in readme and "forward(z: Tensor, normal: Tensor, sentence: Tensor" in readme
    capsys.readouterr()
    assert export_weights.main(["--export", url, "--to", str(tmp_path / "out")]) == 2
    assert "already contains a config.json; use another folder" in capsys.readouterr().err


def test_onnx_without_its_packages_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert (
        export_weights.main(["--export", write_export(tmp_path, "attngan"), "--to", str(tmp_path / "out"), "--onnx"])
        == 2
    )
    assert "is not installed; pip install 't2idist[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_onnx_of_a_system_without_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        export_weights.main(["--export", write_export(tmp_path, "damsm"), "--to", str(tmp_path / "out"), "--onnx"]) == 2
    )
    assert "damsm generates no images; omit --onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("attngan", ["noise_1", "noise_2", "sentence", "words", "lengths"]),
        ("stackgan_pp", ["noise_1", "noise_2", "sentence"]),
    ],
)
def test_onnx_runtime_generates_the_same_images(tmp_path: Path, name: str, inputs: list[str]) -> None:
    """Compares ONNX Runtime, with inputs as the README describes, with the `sample` of the system."""
    import onnxruntime

    url = write_export(tmp_path, name)
    assert export_weights.main(["--export", url, "--to", str(tmp_path / "out"), "--onnx"]) == 0
    graph = json.loads((tmp_path / "out/config.json").read_text())["onnx"]["draw.onnx"]
    assert [tensor["name"] for tensor in graph["inputs"]] == inputs and graph["largest_difference"] < 1e-4
    loaded = load_export(url, CPU)
    torch.manual_seed(0)
    lengths = torch.tensor([6, 1, 3, 4, 2])
    tokens = torch.randint(1, len(WORDS), (5, 6)) * (torch.arange(6) < lengths[:, None])
    noises = [torch.randn(5, *tensor["shape"][1:]) for tensor in graph["inputs"] if tensor["name"].startswith("noise")]
    calls = iter(noises)
    with torch.no_grad():
        words, sentence = loaded.nets["text"](tokens, lengths)
        captions = Captions(tokens, lengths, torch.zeros(5, 0))
        ours = loaded.system.sample(loaded.nets, captions, lambda *shape: next(calls)).images  # type: ignore[attr-defined]
    values = {"sentence": sentence, "words": words, "lengths": lengths, "noise_1": noises[0], "noise_2": noises[1]}
    session = onnxruntime.InferenceSession(tmp_path / "out/draw.onnx")
    theirs = session.run(None, {key: values[key].numpy() for key in inputs})
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.numpy() - b).max() < 1e-4


def test_an_image_that_no_input_changes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = write_export(tmp_path, "neural_style")
    assert export_weights.main(["--export", url, "--to", str(tmp_path / "out"), "--onnx"]) == 2
    assert "--onnx: neural_style draws the same image from any input; omit --onnx" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        *(
            (name, {})
            for name in sorted(
                small_systems.MODELS.keys() - WITHOUT_IMAGES - {"attngan", "stackgan_pp", "neural_style"}
            )
            if not name.endswith("-options") or small_systems.MODELS[name].get("skip_excitation")  # else the same
        ),
        ("stargan", {"modulated": True, "masked": True}),
    ],
)
def test_every_system_with_images_converts_to_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: dict[str, bool]
) -> None:
    """The tool compares the images itself, for another number of images than in the trace."""
    monkeypatch.setitem(small_systems.MODELS, name, {**small_systems.MODELS[name], **more})
    assert export_weights.main(["--export", write_export(tmp_path, name), "--to", str(tmp_path / "out"), "--onnx"]) == 0
    graphs = json.loads((tmp_path / "out/config.json").read_text())["onnx"]
    expected = {
        "stargan": {"translate_0.onnx", "translate_1.onnx"},
        "cyclegan": {"to_domain_0.onnx", "to_domain_1.onnx"},
        "pix2pix": {"to_domain_1.onnx"},
    }
    assert graphs.keys() == expected.get(name, {"draw.onnx"})
    for file, graph in graphs.items():
        assert graph["largest_difference"] < 1e-4 and graph["inputs"] and graph["outputs"]
        assert file in (tmp_path / "out/README.md").read_text()
