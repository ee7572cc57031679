"""Exports for other programs: the same tensors with their names, and ONNX that draws the same pictures."""

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
from tools import export_weights as tool

CPU = torch.device("cpu")
WORDS = ["<end>", *(f"word{i}" for i in range(1, toy_gan.VOCABULARY_SIZE))]
NO_PICTURES = {"damsm", "char_text", "captioner"}


def made(folder: Path, name: str) -> str:
    """An export of an untrained small system."""
    small_systems.write_export(name, str(folder / name), WORDS, small_systems.DATA_INFOS.get(name, toy_gan.DATA_INFO))
    return str(folder / name)


def test_plain_files_hold_the_tensors_and_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = made(tmp_path, "attngan")
    assert tool.main(["--export", url, "--to", str(tmp_path / "out")]) == 0
    loaded, said = load_export(url, CPU), json.loads((tmp_path / "out/config.json").read_text())
    assert said["system"] == "attngan" and said["config"]["generator_width"] == 8
    for name, net in loaded.nets.items():
        tensors = load_file(tmp_path / "out" / said["networks"][name]["file"])
        own = net.state_dict()
        assert tensors.keys() == own.keys() == said["networks"][name]["tensors"].keys()
        for key, value in own.items():
            assert torch.equal(tensors[key], value)
            assert said["networks"][name]["tensors"][key]["shape"] == list(value.shape)
    assert (tmp_path / "out/vocabulary.txt").read_text().split() == WORDS
    page = (tmp_path / "out/README.md").read_text()
    assert "generator.safetensors" in page and "forward(z: Tensor, normal: Tensor, sentence: Tensor" in page
    capsys.readouterr()
    assert tool.main(["--export", url, "--to", str(tmp_path / "out")]) == 2
    assert "there is a config.json already; give another folder" in capsys.readouterr().err


def test_onnx_names_the_extra_that_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert tool.main(["--export", made(tmp_path, "attngan"), "--to", str(tmp_path / "out"), "--onnx"]) == 2
    assert "is not installed; pip install 't2idist[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_draws_nothing_has_no_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--export", made(tmp_path, "damsm"), "--to", str(tmp_path / "out"), "--onnx"]) == 2
    assert "damsm draws no pictures; leave --onnx out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("attngan", ["noise_1", "noise_2", "sentence", "words", "lengths"]),
        ("stackgan_pp", ["noise_1", "noise_2", "sentence"]),
    ],
)
def test_onnx_draws_the_same_pictures(tmp_path: Path, name: str, asked: list[str]) -> None:
    """ONNX Runtime, fed by the page, against the system's own sampling with real captions."""
    import onnxruntime

    url = made(tmp_path, name)
    assert tool.main(["--export", url, "--to", str(tmp_path / "out"), "--onnx"]) == 0
    said = json.loads((tmp_path / "out/config.json").read_text())["onnx"]["draw.onnx"]
    assert [given["name"] for given in said["inputs"]] == asked and said["largest_difference"] < 1e-4
    loaded = load_export(url, CPU)
    torch.manual_seed(0)
    lengths = torch.tensor([6, 1, 3, 4, 2])
    tokens = torch.randint(1, len(WORDS), (5, 6)) * (torch.arange(6) < lengths[:, None])
    noises = [torch.randn(5, *given["shape"][1:]) for given in said["inputs"] if given["name"].startswith("noise")]
    calls = iter(noises)
    with torch.no_grad():
        words, sentence = loaded.nets["text"](tokens, lengths)
        captions = Captions(tokens, lengths, torch.zeros(5, 0))
        ours = loaded.system.sample(loaded.nets, captions, lambda *shape: next(calls)).images  # type: ignore[attr-defined]
    values = {"sentence": sentence, "words": words, "lengths": lengths, "noise_1": noises[0], "noise_2": noises[1]}
    session = onnxruntime.InferenceSession(tmp_path / "out/draw.onnx")
    theirs = session.run(None, {key: values[key].numpy() for key in asked})
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.numpy() - b).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in sorted(small_systems.MODELS.keys() - NO_PICTURES - {"attngan", "stackgan_pp"})),
        ("stargan", {"modulated": True, "masked": True}),
    ],
)
def test_every_system_that_makes_pictures_has_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: dict[str, bool]
) -> None:
    """The tool compares them itself, with another number of pictures than it traced."""
    monkeypatch.setitem(small_systems.MODELS, name, {**small_systems.MODELS[name], **more})
    assert tool.main(["--export", made(tmp_path, name), "--to", str(tmp_path / "out"), "--onnx"]) == 0
    graphs = json.loads((tmp_path / "out/config.json").read_text())["onnx"]
    assert graphs.keys() == ({"translate_0.onnx", "translate_1.onnx"} if name == "stargan" else {"draw.onnx"})
    for file, graph in graphs.items():
        assert graph["largest_difference"] < 1e-4 and graph["inputs"] and graph["outputs"]
        assert file in (tmp_path / "out/README.md").read_text()
