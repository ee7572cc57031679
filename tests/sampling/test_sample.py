"""The command t2idist sample: rows, columns, files and messages."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2idist.engine.checkpoint import export
from t2idist.sampling import sample, sentence_reader
from t2idist.sampling.loading import load_export
from t2idist.sampling.sentence_encoders import open_encoder
from t2idist.sampling.sentences import Sentence
from tests.helpers import small_systems, toy_gan
from tests.sampling.conftest import FIRST, SECOND, WORDS, write_image

CPU = torch.device("cpu")


def sample_attngan(exports: dict[str, str], folder: Path, *arguments: str) -> int:
    return sample.main(["--export", exports["attngan"], "--out", str(folder), "--n", "2", *arguments])


def read_files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_same_seed_gives_the_same_files(exports: dict[str, str], tmp_path: Path) -> None:
    text = ["--text", "a red heart", "--text", "a Blue face!"]
    assert sample_attngan(exports, tmp_path / "a", *text) == 0
    assert sample_attngan(exports, tmp_path / "b", *text) == 0
    assert sample_attngan(exports, tmp_path / "c", *text, "--seed", "1") == 0
    one, two, other = (read_files(tmp_path / name) for name in "abc")
    stems = ["001_a-red-heart_01", "001_a-red-heart_02", "002_a-blue-face_01", "002_a-blue-face_02", "grid"]
    assert list(one) == [f"{stem}.png" for stem in stems]
    assert one == two
    assert one["001_a-red-heart_01.png"] != other["001_a-red-heart_01.png"]
    assert one["001_a-red-heart_01.png"] != one["001_a-red-heart_02.png"]
    assert Image.open(io.BytesIO(one["001_a-red-heart_01.png"])).size == (32, 32)


def test_all_scales_and_attention_are_written(exports: dict[str, str], tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("a red heart\n\n")
    out = tmp_path / "out"
    assert sample_attngan(exports, out, "--captions", str(sentences), "--scale", "all", "--attention", "--n", "1") == 0
    kinds = ("16px", "32px", "attention")
    assert list(read_files(out)) == [*(f"001_a-red-heart_01_{kind}.png" for kind in kinds), "grid.png"]


def test_unknown_words_are_reported(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample_attngan(exports, tmp_path, "--text", "a red zeppelin") == 0
    assert "'zeppelin'" in capsys.readouterr().err
    assert sample_attngan(exports, tmp_path, "--text", "two zeppelins") == 2
    error = capsys.readouterr().err
    assert "no word of this sentence" in error and error.count("\n") == 1
    assert sample_attngan(exports, tmp_path, "--text", os.fsdecode(b"\xff red heart")) == 2
    error = capsys.readouterr().err
    assert (
        error
        == 'sample: "\\udcff red heart": this sentence has characters that are not valid Unicode; give it as UTF-8\n'
    )


def test_invalid_exports_give_one_sentence(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(url: str, *arguments: str) -> str:
        assert sample.main(["--export", url, "--text", "a red heart", "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    assert "no export here" in error_of(str(tmp_path / "nowhere"))
    assert "does not generate images" in error_of(exports["damsm"])
    assert "--device" in error_of(exports["attngan"], "--device", "abacus")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, data in read_files(Path(exports["attngan"])).items():
        (damaged / name).write_bytes(data[:-9] if name == "text.safetensors" else data)
    assert "text.safetensors: damaged" in error_of(str(damaged))
    index = json.loads((damaged / "export.json").read_text())
    for change, expected in (
        ({"system": "attgan"}, "attgan"),
        ({"config": {"colour": 1}}, "colour"),
        ({"plan": {"x": 1}}, "plan"),
    ):
        (damaged / "export.json").write_text(json.dumps({**index, **change, "networks": {}}))
        assert expected in error_of(str(damaged))


def sample_twice(url: str, folder: Path, *arguments: str) -> dict[str, np.ndarray]:
    """Run the command twice, check that it writes the same files, and return the images by name."""
    for name in ("first", "again"):
        assert sample.main(["--export", url, "--out", str(folder / name), *arguments]) == 0
    first, again = ({f.name: f.read_bytes() for f in sorted((folder / name).iterdir())} for name in ("first", "again"))
    assert first == again
    return {name: np.asarray(Image.open(io.BytesIO(data))).astype(int) for name, data in first.items()}


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether images are equal up to the rounding of batches of other sizes."""
    return bool(np.abs(a - b).max() <= 1)


def test_interpolate_text_starts_and_ends_at_the_plain_images(exports: dict[str, str], tmp_path: Path) -> None:
    interpolated = sample_twice(
        exports["attngan"], tmp_path / "interpolated", "--interpolate-text", FIRST, SECOND, "--steps", "3", "--n", "2"
    )
    plain = sample_twice(exports["attngan"], tmp_path / "plain", "--text", FIRST, "--text", SECOND, "--n", "2")
    stems = ["001_a-red-heart", "002_50-of-the-way", "003_a-blue-face-word1"]
    assert list(interpolated) == [*(f"{stem}_{column}.png" for stem in stems for column in ("01", "02")), "grid.png"]
    for column in ("01", "02"):
        assert nearly_equal(interpolated[f"001_a-red-heart_{column}.png"], plain[f"001_a-red-heart_{column}.png"])
        assert nearly_equal(
            interpolated[f"003_a-blue-face-word1_{column}.png"], plain[f"002_a-blue-face-word1_{column}.png"]
        )
        assert not nearly_equal(interpolated[f"002_50-of-the-way_{column}.png"], plain[f"001_a-red-heart_{column}.png"])


def test_interpolate_noise_starts_and_ends_at_the_plain_images(exports: dict[str, str], tmp_path: Path) -> None:
    for name in ("attngan", "unconditional"):
        text = [] if name == "unconditional" else ["--text", FIRST]
        stem = "001_without-text" if name == "unconditional" else "001_a-red-heart"
        interpolated = sample_twice(
            exports[name], tmp_path / name / "interpolated", *text, "--interpolate-noise", "--steps", "5"
        )
        plain = sample_twice(exports[name], tmp_path / name / "plain", *text, "--n", "2")
        assert len(interpolated) == 6
        assert nearly_equal(interpolated[f"{stem}_01.png"], plain[f"{stem}_01.png"])
        assert nearly_equal(interpolated[f"{stem}_05.png"], plain[f"{stem}_02.png"])
        assert not nearly_equal(interpolated[f"{stem}_03.png"], plain[f"{stem}_01.png"])


def test_change_word_equals_the_sentences_with_each_word(exports: dict[str, str], tmp_path: Path) -> None:
    changed = sample_twice(
        exports["attngan"], tmp_path / "a", "--text", "a {} heart", "--change-word", "red, blue", "--n", "2"
    )
    plain = sample_twice(
        exports["attngan"], tmp_path / "b", "--text", "a red heart", "--text", "a blue heart", "--n", "2"
    )
    assert list(changed) == list(plain) and all(np.array_equal(changed[name], plain[name]) for name in plain)
    assert not nearly_equal(plain["001_a-red-heart_01.png"], plain["002_a-blue-heart_01.png"])


def test_every_sentence_is_encoded_once(
    exports: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded: list[str] = []
    opened = open_encoder(exports["attngan"], CPU)
    monkeypatch.setitem(small_systems.USES, "stackgan_pp", {})
    url = str(tmp_path / "reads_vectors")
    small_systems.write_export("stackgan_pp", url, WORDS, toy_gan.DATA_INFO)

    class Counting:
        dim, facts = toy_gan.DATA_INFO.vector_dim, opened.facts

        def encode(self, captions: Sequence[str]) -> Any:
            encoded.extend(captions)
            return opened.encode(captions)[:, : self.dim]

        def warnings(self, sentence: Sentence) -> list[str]:
            return opened.warnings(sentence)

    monkeypatch.setattr(sentence_reader, "open_encoder", lambda name, device: Counting())
    long = " ".join(["a blue face", *(f"word{number}" for number in range(9))])
    sentences = ["--text", "a red heart", "--text", "zeppelins", "--text", long]
    arguments = ["--export", url, "--encoder", exports["attngan"], "--n", "1", "--out", str(tmp_path / "out")]
    assert sample.main([*arguments, *sentences]) == 1
    assert encoded == sentences[1::2]
    assert [name[:15] for name in read_files(tmp_path / "out")] == ["001_a-red-heart", "003_a-blue-face", "grid.png"]
    said = capsys.readouterr().err
    assert '"zeppelins": the encoder knows no word of this sentence; the others are drawn' in said
    assert f'sample: "{long}": is cut, because the encoder reads' in said and said.count("is cut") == 1


def test_truncation_reduces_the_variety(exports: dict[str, str], tmp_path: Path) -> None:
    name = "001_a-red-heart_01.png"
    plain = sample_twice(exports["attngan"], tmp_path / "plain", "--text", FIRST)
    not_truncated = sample_twice(exports["attngan"], tmp_path / "not_truncated", "--text", FIRST, "--truncation", "9")
    truncated = sample_twice(exports["attngan"], tmp_path / "truncated", "--text", FIRST, "--truncation", "0.1")
    assert np.array_equal(plain[name], not_truncated[name]) and not nearly_equal(plain[name], truncated[name])
    columns = [truncated[f"001_a-red-heart_0{column}.png"] for column in (1, 2)]
    others = [plain[f"001_a-red-heart_0{column}.png"] for column in (1, 2)]
    assert np.abs(columns[0] - columns[1]).mean() < 0.5 * np.abs(others[0] - others[1]).mean()


def test_style_of_gives_each_column_the_style_of_an_image(tmp_path: Path) -> None:
    url = str(tmp_path / "export")
    small_systems.write_export("style", url, WORDS)
    loaded = load_export(url, CPU)
    for weight in [weight for net in loaded.nets.values() for weight in net.parameters() if weight.dim() > 1]:
        weight.mul_(10)  # all images of the untrained network are gray
    export.write(url, loaded.nets, export.read_index(url))
    images = [
        write_image(tmp_path / f"{level}.png", np.random.default_rng(level).integers(level, 256, (16, 20, 3)))
        for level in (0, 128, 200)
    ]
    sheet = sample_twice(
        url, tmp_path / "a", "--text", "a {} heart", "--change-word", "red,blue", "--style-of", *images
    )
    single = sample_twice(url, tmp_path / "b", "--text", "a red heart", "--style-of", images[1])
    assert len(sheet) == 2 * 3 + 1
    assert nearly_equal(sheet["001_a-red-heart_02.png"], single["001_a-red-heart_01.png"])
    assert not nearly_equal(sheet["001_a-red-heart_01.png"], sheet["001_a-red-heart_02.png"])


INVALID: list[tuple[list[str], str]] = [
    ([], "no sentence"),
    (["--interpolate-text", FIRST, SECOND, "--text", FIRST], "remove --text"),
    (["--interpolate-text", FIRST, SECOND, "--change-word", "red"], "remove --change-word"),
    (["--interpolate-text", FIRST, SECOND, "--attention"], "--attention"),
    (["--interpolate-text", FIRST, "a {} heart"], "--change-word"),
    (["--interpolate-text", FIRST, "zeppelins"], "no word of this sentence"),
    (["--text", FIRST, "--steps", "3"], "--steps is for"),
    (["--text", FIRST, "--interpolate-noise", "--steps", "1"], "--steps 1: give at least 2"),
    (["--text", FIRST, "--interpolate-noise", "--n", "2"], "remove --n"),
    (["--text", FIRST, "--n", "0"], "--n 0"),
    (["--text", FIRST, "--n", "1000000"], "--n 1000000: give at least 1 and at most 1000"),
    (["--text", FIRST, "--interpolate-noise", "--steps", "1001"], "--steps 1001: give at least 1 and at most 1000"),
    (["--text", "a red heart " * 900], '..": this sentence has 10,800 characters; at most 10,000 are read'),
    (["--text", FIRST, "--truncation", "0"], "--truncation 0: give at least 0.01"),
    (["--text", FIRST, "--truncation", "nan"], "--truncation nan"),
    (["--text", "a {} heart"], "give words for it with --change-word"),
    (["--text", FIRST, "--change-word", "red"], "has no {}"),
    (["--text", "a {} heart", "--change-word", "red,,blue"], "commas"),
    (["--text", "a {} heart", "--change-word", "red,mauve"], "'mauve'"),
    (["--change-word", "red"], "also give a sentence"),
    (["--text", FIRST, "--style-of", "x.png", "--interpolate-noise"], "give one of them"),
    (["--text", FIRST, "--style-of", "nowhere.png"], "nowhere.png"),
]


@pytest.mark.parametrize("arguments,expected", INVALID)
def test_invalid_options_give_one_sentence(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert sample.main(["--export", exports["attngan"], "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_options_that_the_export_does_not_support_give_one_sentence(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_image(tmp_path / "x.png", np.zeros((8, 8, 3)))
    cases: list[tuple[str, list[str], Any]] = [
        ("attngan", ["--text", FIRST, "--style-of", image], "give the export of a 'style' stage"),
        ("unconditional", ["--text", FIRST], "this export is unconditional"),
    ]
    for name, arguments, expected in cases:
        assert sample.main(["--export", exports[name], "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
