"""Commands that draw: no input and no other image is overwritten; sentences that cannot be drawn are named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2idist import storage
from t2idist.sampling import sample, translate
from t2idist.sampling.drawings import read_settings
from t2idist.sampling.sentence_encoders import open_encoder
from t2idist.sampling.sentences import Sentence
from t2idist.storage.outputs import unique_names
from tests.helpers import small_systems, toy_gan
from tests.sampling.conftest import WORDS, write_image

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def stargan(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("stargan") / "export")
    small_systems.write_export("stargan", url, WORDS, toy_gan.TWO_DOMAINS)
    return url


def write_photo(path: Path, seed: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_image(path, np.random.default_rng(seed).integers(0, 255, (20, 30, 3)))


def translate_images(url: str, *arguments: str) -> int:
    return translate.main(["--export", url, "--set", "Smiling", *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ------------------------------------------------------------ translate
def test_translate_never_writes_over_an_input(stargan: str, tmp_path: Path, capsys: Capture) -> None:
    photo = write_photo(tmp_path / "own/face.png")
    os.symlink(photo, tmp_path / "link.png")
    before = contents(tmp_path)
    for image in (photo, str(tmp_path / "own/../own/face.png")):
        assert translate_images(stargan, "--image", image, "--out", str(tmp_path / "own")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"translate: {tmp_path}/own/face.png: is an input of this command" in error
        assert "give another --out" in error
    grid = write_photo(tmp_path / "grids/grid.png")
    assert translate_images(stargan, "--image", grid, "--out", str(tmp_path / "grids")) == 2
    assert contents(tmp_path / "own") == {"face.png": before["own/face.png"]}
    # the link's own name is free in the folder, and what it points to stays
    assert translate_images(stargan, "--image", str(tmp_path / "link.png"), "--out", str(tmp_path / "own")) == 0
    assert contents(tmp_path / "own")["face.png"] == before["own/face.png"]


def test_translate_never_writes_over_a_hidden_input_or_one_in_another_case(
    stargan: str, tmp_path: Path, capsys: Capture
) -> None:
    for name, output in ((".face.png", ".face.png"), ("Face.PNG", "Face.png")):
        photo = write_photo(tmp_path / "own" / name)
        before = contents(tmp_path / "own")
        assert translate_images(stargan, "--image", photo, "--out", str(tmp_path / "own")) == 2
        assert f"own/{output}: is an input of this command" in capsys.readouterr().err
        assert contents(tmp_path / "own") == before
    other = write_photo(tmp_path / "out/.face.png", seed=1)
    before = contents(tmp_path / "out")
    assert translate_images(stargan, "--image", str(tmp_path / "own/.face.png"), "--out", str(Path(other).parent)) == 2
    assert "out/.face.png: is not an image of this command" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_translate_does_not_write_over_a_foreign_image(stargan: str, tmp_path: Path, capsys: Capture) -> None:
    photo, other = write_photo(tmp_path / "a/face.png"), write_photo(tmp_path / "out/face.png", seed=1)
    before = Path(other).read_bytes()
    assert translate_images(stargan, "--image", photo, "--out", str(tmp_path / "out")) == 2
    assert "out/face.png: is not an image of this command and would be lost" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"face.png": before}


def test_inputs_of_one_name_give_one_output_each(stargan: str, tmp_path: Path) -> None:
    photos = [write_photo(tmp_path / f"{folder}/face.png", seed) for seed, folder in enumerate("abc")]
    photos.append(write_photo(tmp_path / "d/grid.png", 9))
    assert translate_images(stargan, "--image", *photos, "--out", str(tmp_path / "out")) == 0
    names = ["face.png", "face-2.png", "face-3.png", "grid-2.png"]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, "grid.png"])
    for name, photo in zip(names, photos, strict=True):
        settings = read_settings(str(tmp_path / "out" / name))
        assert settings is not None and settings["image"] == storage.sha256(Path(photo).read_bytes())


def test_names_are_unique_without_regard_to_case() -> None:
    assert unique_names(["a", "A", "a-2", "a"], ".png") == ["a.png", "A-2.png", "a-2-2.png", "a-3.png"]
    assert unique_names(["grid"], ".png", reserved=["grid.png"]) == ["grid-2.png"]


def test_translate_reads_rotated_and_16_bit_images(stargan: str, tmp_path: Path) -> None:
    """A photograph that a camera turned is translated as if it were upright."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "up.png")
    Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    sixteen = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    sixteen.save(tmp_path / "sixteen.png")
    files = [str(tmp_path / f"{name}.png") for name in ("up", "turned", "sixteen")]
    assert translate_images(stargan, "--image", *files, "--out", str(tmp_path / "out")) == 0
    up, turned, sixteen_bit = (np.asarray(Image.open(tmp_path / "out" / Path(file).name)).astype(int) for file in files)
    # equal inputs give equal outputs, up to the rounding of a batch
    assert np.abs(up - turned).max() <= 1 and np.abs(up - sixteen_bit).max() <= 1


# ------------------------------------------------------------ sample
def sample_attngan(exports: dict[str, str], *arguments: str) -> int:
    return sample.main(["--export", exports["attngan"], "--n", "1", *arguments])


def test_sample_does_not_write_over_images_of_other_settings(
    exports: dict[str, str], tmp_path: Path, capsys: Capture
) -> None:
    out = ("--out", str(tmp_path))
    assert sample_attngan(exports, "--text", "a red heart", *out) == 0
    before = contents(tmp_path)
    assert sample_attngan(exports, "--text", "a red heart", *out) == 0, "the same images again"
    assert contents(tmp_path) == before
    capsys.readouterr()
    for other in (["--text", "a red heart", "--seed", "1"], ["--text", "a red heart", "--text", "a face"]):
        assert sample_attngan(exports, *other, *out) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "was drawn with other settings" in error and "give another --out" in error
    assert sample_attngan(exports, "--text", "a red heart", "--seed", "1", *out) == 2
    assert "seed: 1 here, 0 there" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_sample_without_out_takes_the_next_free_folder(
    exports: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, folder in ((0, "samples"), (1, "samples-2"), (2, "samples-3"), (1, "samples-2"), (0, "samples")):
        assert sample_attngan(exports, "--text", "a red heart", "--seed", str(seed)) == 0
        assert f"files to {folder}, all images in {folder}/grid.png" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "samples-2", "samples-3"]


def test_unknown_sentences_are_named_and_the_others_drawn(
    exports: dict[str, str], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a red heart\n\ntwo zeppelins\na blue face\n???\n")
    assert sample_attngan(exports, "--captions", str(file), "--out", str(tmp_path / "out")) == 1
    out, error = capsys.readouterr()
    lines = error.splitlines()
    problem = "no word of this sentence is in the vocabulary of the export"
    assert lines[0] == (
        f"sample: {file}, line 3: \"two zeppelins\": {problem}: 'two', 'zeppelins'; the others are drawn"
    )
    assert lines[1] == f'sample: {file}, line 5: "???": {problem}; the others are drawn'
    assert lines[2:] == ["sample: 2 of 4 sentences could not be drawn"]
    assert sorted(contents(tmp_path / "out")) == ["001_a-red-heart_01.png", "003_a-blue-face_01.png", "grid.png"]
    assert "wrote 3 files" in out


def test_only_unknown_sentences_draw_nothing(exports: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("one\ntwo\nthree\nfour\nfive\nsix\nseven\n")
    assert sample_attngan(exports, "--captions", str(file), "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{file}, line 1" in error and f"{file}, line 5" in error
    assert error.endswith("and 2 more\n") and not (tmp_path / "out").exists()
    ends = ("--interpolate-text", "a heart", "zeppelins")
    assert sample_attngan(exports, *ends, "--out", str(tmp_path / "out")) == 2, "an interpolation needs both ends"


def test_sentences_that_are_cut_are_named(exports: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    long = "a red heart " + " ".join(f"word{number}" for number in range(9))
    limit = sample.load_export(exports["attngan"], torch.device("cpu")).build_info.max_words
    assert limit < 12
    assert sample_attngan(exports, "--text", long, "--text", "a face", "--out", str(tmp_path)) == 0
    error = capsys.readouterr().err
    cut = ", ".join(f"'{word}'" for word in long.split()[limit:])
    assert error == (
        f'sample: "{long}": is cut, because the export reads {limit} words and it has 12; left out: {cut}\n'
    )


def test_what_an_encoder_of_characters_cuts_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "export")
    long = "heart" * 3
    small_systems.write_export("char_text", url, [long if word == "heart" else word for word in WORDS])
    encoder = open_encoder(url, torch.device("cpu"))
    loaded = sample.load_export(url, torch.device("cpu"))
    limit, words = loaded.nets["text"].characters, loaded.build_info.max_words
    text, read = " ".join([long] * (words + 1)), " ".join([long] * words)
    assert limit < len(read)
    assert encoder.warnings(Sentence(text, "captions.txt, line 3")) == [
        f'captions.txt, line 3: "{text}": is cut, because the encoder reads {words} words and it has {words + 1}; '
        f"left out: '{long}'",
        f'captions.txt, line 3: "{text}": is cut, because the encoder reads {limit} characters and its words have '
        f"{len(read)}; left out: '{read[limit:]}'",
    ]
    assert encoder.warnings(Sentence("a red face")) == []


def test_captions_are_read_from_a_store_and_in_their_encoding(
    exports: dict[str, str], tmp_path: Path, capsys: Capture
) -> None:
    url = "memory://test_captions/captions.txt"
    storage.write_bytes(url, "a red heart\r\na blue face\r\n".encode("utf-16"))
    assert sample_attngan(exports, "--captions", url, "--out", str(tmp_path / "out")) == 0
    assert sorted(contents(tmp_path / "out")) == ["001_a-red-heart_01.png", "002_a-blue-face_01.png", "grid.png"]
    windows = tmp_path / "windows.txt"
    windows.write_bytes(b"a face\na red heart\x92s face\n")
    assert sample_attngan(exports, "--captions", str(windows), "--out", str(tmp_path / "w")) == 2
    error = capsys.readouterr().err
    assert f"--captions {windows}, line 2: byte 0x92" in error and "--encoding cp1252" in error
    named = ("--captions", str(windows), "--encoding", "cp1252", "--out", str(tmp_path / "w"))
    assert sample_attngan(exports, *named) == 0
    assert sample_attngan(exports, "--captions", "memory://test_captions/none.txt") == 2
    assert "--captions memory://test_captions/none.txt" in capsys.readouterr().err
    assert sample_attngan(exports, "--text", "a face", "--encoding", "cp1252") == 2
