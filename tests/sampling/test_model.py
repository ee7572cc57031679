"""The Python API: it draws what the commands draw, warns of what they print, and refuses bad input in one sentence."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import t2idist
from t2idist.sampling import sample, translate
from t2idist.sampling.model import SHOWN_IMAGES, Images
from t2idist.sampling.sentence_encoders import open_encoder
from tests.helpers import small_systems, toy_gan
from tests.helpers.runs import ROOT
from tests.helpers.wheel import install_wheel
from tests.sampling.conftest import FIRST, SECOND, WORDS, write_image

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def more_exports(exports: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`exports`, and those of a system that translates, of one that reads vectors, and of the encoder of these."""
    folder = tmp_path_factory.mktemp("more")
    urls = {name: str(folder / name) for name in ("stargan", "reads_vectors", "encoder")}
    small_systems.write_export("stargan", urls["stargan"], WORDS, toy_gan.TWO_DOMAINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.USES, "stackgan_pp", {})
        small_systems.write_export("stackgan_pp", urls["reads_vectors"], WORDS, toy_gan.DATA_INFO)
        damsm = {**small_systems.MODELS["damsm"], "embedding_dim": toy_gan.DATA_INFO.vector_dim}
        patch.setitem(small_systems.MODELS, "damsm", damsm)
        small_systems.write_export("damsm", urls["encoder"], WORDS)
    return {**exports, **urls}


def command_images(folder: Path, url: str, *arguments: str) -> dict[str, bytes]:
    """Run ``t2idist sample``; returns the pixels of the files by name."""
    assert sample.main(["--export", url, "--out", str(folder), *arguments]) == 0
    return {file.name: Image.open(file).tobytes() for file in sorted(folder.iterdir())}


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


# ------------------------------------------------------------ draw
@pytest.mark.parametrize("name", ["attngan", "stackgan_pp", "reads_vectors", "unconditional"])
def test_draw_gives_the_bytes_of_the_command_whatever_the_number(
    more_exports: dict[str, str], tmp_path: Path, name: str
) -> None:
    text = [] if name == "unconditional" else ["--text", FIRST]
    encoder = more_exports["encoder"] if name == "reads_vectors" else None
    options = [*text, *([] if encoder is None else ["--encoder", encoder]), "--seed", "3"]
    written = list(command_images(tmp_path / "six", more_exports[name], *options, "--n", "6").values())[:6]
    model = t2idist.load(more_exports[name], encoder=encoder)
    for n in (1, 3, 6, 9):
        drawn = model.draw(*text[1:], n=n, seed=3)
        assert isinstance(drawn, list) and len(drawn) == n and drawn[0].mode == "RGB"
        assert pixels(drawn)[:6] == written[:n]
    assert pixels(model.draw(*text[1:], n=2, seed=4)) != written[:2]
    single = command_images(tmp_path / "one", more_exports[name], *options, "--n", "1")
    assert next(iter(single.values())) == written[0]


def test_draw_has_the_defaults_and_the_truncation_of_the_command(exports: dict[str, str], tmp_path: Path) -> None:
    model = t2idist.load(Path(exports["attngan"]))
    assert (
        pixels(model.draw(SECOND))
        == list(command_images(tmp_path / "a", exports["attngan"], "--text", SECOND).values())[:4]
    )
    truncated = command_images(tmp_path / "b", exports["attngan"], "--text", SECOND, "--truncation", "0.5")
    assert pixels(model.draw(SECOND, truncation=0.5)) == list(truncated.values())[:4]
    assert repr(model) == f"<t2idist.Model {exports['attngan']}: attngan, 32 px, after 7 images>"


def test_attention_gives_the_figures_of_the_command(exports: dict[str, str], tmp_path: Path) -> None:
    written = command_images(tmp_path, exports["attngan"], "--text", FIRST, "--n", "2", "--attention")
    figures = t2idist.load(exports["attngan"]).attention(FIRST, n=2)
    assert pixels(figures) == [data for name, data in written.items() if name.endswith("_attention.png")]
    with pytest.raises(ValueError, match="'stackgan_pp' has no attention to show; use draw"):
        t2idist.load(exports["stackgan_pp"]).attention(FIRST)


def test_what_is_left_out_is_warned_of_at_the_line_of_the_caller(
    exports: dict[str, str], tmp_path: Path, capsys: Capture
) -> None:
    text = "a red zeppelin " + " ".join(f"word{number}" for number in range(9))
    command_images(tmp_path, exports["attngan"], "--text", text)
    printed = [line.removeprefix("sample: ") for line in capsys.readouterr().err.splitlines()]
    assert len(printed) == 2
    model = t2idist.load(exports["attngan"])
    for call in (lambda: model.draw(text, n=1), lambda: model.attention(text), lambda: model.embed(text)):
        with pytest.warns(UserWarning, match="zeppelin") as caught:
            call()
        assert [str(warning.message) for warning in caught] == printed
        assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.draw(FIRST, n=1)


def test_an_encoder_other_than_the_training_data_s_is_warned_of(more_exports: dict[str, str], tmp_path: Path) -> None:
    def write(name: str) -> str:
        url = str(tmp_path / name)
        small_systems.write_export("stackgan_pp", url, WORDS, toy_gan.DATA_INFO)
        index = Path(url) / "export.json"
        facts = '{"vectors": {"name": "v", "encoder": {"name": "minilm", "sha256": "0"}}}'
        index.write_text(index.read_text().replace("{", f'{{"data": {facts}, ', 1))
        return url

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_systems.USES, "stackgan_pp", {})
        url = write("other")
    with pytest.warns(UserWarning, match=r"encoder is not the encoder of the training data's vectors \(minilm\)"):
        t2idist.load(url, encoder=more_exports["encoder"])
    with pytest.raises(
        ValueError, match="sentence vectors of 12 elements, made by minilm; give their encoder as encoder"
    ):
        t2idist.load(url).draw(FIRST)


LONG = "a red heart " * 834  # 10,008 characters
INVALID: list[tuple[str, dict[str, Any], str]] = [
    ("attngan", {"text": None}, "text is missing: .*attngan draws from sentences"),
    ("attngan", {"text": ""}, "text is ''; give a sentence"),
    ("attngan", {"text": " \n"}, "give a sentence"),
    ("attngan", {"text": 5}, "text is 5; give one sentence as a string"),
    ("attngan", {"text": ["a", "b"]}, "give one sentence as a string"),
    ("attngan", {"text": "zeppelins"}, "\"zeppelins\": no word of this .* vocabulary of the export: 'zeppelins'"),
    ("attngan", {"text": "!!"}, "no word of this sentence"),
    ("attngan", {"text": "a {} heart"}, "has a placeholder, {}; put words in its place"),
    ("attngan", {"text": LONG[:10_001]}, r"\.\.\.\": this sentence has 10,001 characters; at most 10,000 are read"),
    ("reads_vectors", {"text": LONG[:10_001]}, "this sentence has 10,001 characters"),
    ("reads_vectors", {"text": "zeppelins"}, "the encoder knows no word of this sentence"),
    ("attngan", {"text": FIRST, "n": 0}, "n 0: give at least 1 and at most 1000"),
    ("attngan", {"text": FIRST, "n": -1}, "n -1: give at least 1"),
    ("attngan", {"text": FIRST, "n": 10**6}, "n 1000000: give at least 1 and at most 1000"),
    ("attngan", {"text": FIRST, "n": 2.5}, "n is 2.5; give a whole number"),
    ("attngan", {"text": FIRST, "n": "4"}, "n is '4'; give a whole number"),
    ("attngan", {"text": FIRST, "seed": "x"}, "seed is 'x'; give a whole number"),
    ("attngan", {"text": FIRST, "truncation": 0}, "truncation 0: give at least 0.01"),
    ("attngan", {"text": FIRST, "truncation": "1"}, "truncation is '1'; give a number"),
    ("attngan", {"text": FIRST, "truncation": 10**400}, "truncation: the number has too many digits"),
    ("attngan", {"text": "\ud800 red"}, r"\\ud800 red\": this sentence has characters that are not valid Unicode"),
    ("reads_vectors", {"text": "\ud800 red"}, "this sentence has characters that are not valid Unicode"),
    ("unconditional", {"text": FIRST}, "this export is unconditional; give no text"),
    ("damsm", {"text": FIRST}, "this export does not generate images; give that of a generator"),
    ("stargan", {"text": FIRST}, r"translates images and generates none from sentences; use translate\(\)"),
]  # fmt: skip


@pytest.mark.parametrize("name,arguments,expected", INVALID)
def test_draw_refuses_bad_input_in_one_sentence(
    more_exports: dict[str, str], name: str, arguments: dict[str, Any], expected: str
) -> None:
    model = t2idist.load(more_exports[name], encoder=more_exports["encoder"] if name == "reads_vectors" else None)
    with pytest.raises(ValueError, match=expected) as raised:
        model.draw(**arguments)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_the_encoder_does_not_see_what_is_refused(
    more_exports: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = t2idist.load(more_exports["reads_vectors"], encoder=more_exports["encoder"])
    encoder = model._reader.encoder
    seen: list[str] = []
    encode = encoder.encode  # type: ignore[union-attr]
    monkeypatch.setattr(encoder, "encode", lambda texts: (seen.extend(texts), encode(texts))[1])
    for text in (LONG[:10_001], "\ud800 red"):
        with pytest.raises(ValueError, match="this sentence has"):
            model.draw(text)
    assert seen == ["", ""]


def test_ten_thousand_characters_are_read_and_named_in_short(exports: dict[str, str]) -> None:
    with pytest.warns(UserWarning, match="and 2,47[0-9] more|'re'") as caught:
        t2idist.load(exports["attngan"]).draw(LONG[:10_000], n=1)
    assert len(caught) == 2 and max(len(str(warning.message)) for warning in caught) < 600


def test_load_refuses_bad_input_in_one_sentence(more_exports: dict[str, str], tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(tmp_path), {}, "no export here"),
        (str(Path(more_exports["attngan"]) / "export.json"), {}, "no export here"),
        (more_exports["attngan"], {"device": "meta"}, "device meta: not available on this machine"),
        (more_exports["attngan"], {"device": "abacus"}, "device abacus: not available on this machine"),
        (more_exports["attngan"], {"encoder": more_exports["encoder"]}, "encoder: this export has its own"),
        (more_exports["unconditional"], {"encoder": more_exports["encoder"]}, "encoder: .* reads no sentences; remove"),
        (more_exports["reads_vectors"], {"encoder": more_exports["damsm"]}, "have 16 elements; the export reads 12"),
    ]  # fmt: skip
    for url, arguments, expected in cases:
        with pytest.raises(ValueError, match=expected):
            t2idist.load(url, **arguments)
    index = tmp_path / "export.json"
    index.write_text((Path(more_exports["attngan"]) / "export.json").read_text().replace('"attngan"', '"my.gan"', 1))
    with pytest.raises(ValueError, match="if you trust it, give system= my.gan"):
        t2idist.load(tmp_path)


# ------------------------------------------------------------ translate
def photo(mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    if mode in ("F", "I"):
        return Image.fromarray(levels[..., 0].astype(np.float32 if mode == "F" else np.int32))
    return Image.fromarray(levels, "RGBA").convert(mode)


def test_translate_gives_the_bytes_of_the_command(more_exports: dict[str, str], tmp_path: Path) -> None:
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, file in enumerate(files):
        photo().rotate(90 * number).save(file)
    arguments = ["--export", more_exports["stargan"], "--set", "Smiling", "--clear", "Black_Hair", "--image", *files]
    assert translate.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    model = t2idist.load(more_exports["stargan"])
    for file in files:
        written = Image.open(tmp_path / "out" / Path(file).name).tobytes()
        for image in (file, Path(file), Image.open(file)):
            assert model.translate(image, set=["Smiling"], clear=["Black_Hair"]).tobytes() == written
        assert model.translate(file, set="Smiling", clear="Black_Hair").tobytes() == written
        assert model.translate(file, set="Blond_Hair").tobytes() != written
    assert model.translate(files[0], set="sad", domain=1).size == (16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I", "I;16", "F", "CMYK", "HSV", "YCbCr"])
def test_an_image_of_any_mode_is_translated_as_its_file(
    more_exports: dict[str, str], tmp_path: Path, mode: str
) -> None:
    image, file = photo(mode), str(tmp_path / "photo")
    stored = image.convert("RGB") if mode in ("HSV", "YCbCr", "CMYK") else image
    stored.save(file, "TIFF" if mode in ("I", "F") else "PNG")
    model = t2idist.load(more_exports["stargan"])
    before = image.tobytes()
    assert model.translate(image, set="Smiling").tobytes() == model.translate(file, set="Smiling").tobytes()
    assert image.tobytes() == before


def test_a_turned_photo_is_translated_upright(more_exports: dict[str, str], tmp_path: Path) -> None:
    turned = photo()
    turned.getexif()[0x0112] = 6
    model = t2idist.load(more_exports["stargan"])
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    assert model.translate(turned, set="Smiling").tobytes() == model.translate(upright, set="Smiling").tobytes()
    assert model.translate(turned, set="Smiling").tobytes() != model.translate(photo(), set="Smiling").tobytes()


def test_translate_refuses_bad_input_in_one_sentence(more_exports: dict[str, str], tmp_path: Path) -> None:
    image = write_image(tmp_path / "x.png", np.zeros((8, 8, 3)))
    text = tmp_path / "text.png"
    text.write_text("not an image")
    bomb = tmp_path / "bomb.png"
    header = Image.new("1", (30000, 30000))
    header.save(bomb)
    cut = tmp_path / "cut.png"
    photo().resize((300, 300)).save(cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    changes: dict[str, Any] = {"set": "Smiling"}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (str(text), changes, "text.png: does not decode: not JPEG"),
        (str(bomb), changes, "bomb.png: does not decode: .*pixels"),
        (header, changes, "image: 30000 x 30000 pixels; at most 67108864"),
        (Image.open(cut), changes, "image: does not decode: OSError: image file is truncated"),
        (str(tmp_path / "nowhere.png"), changes, "nowhere.png"),
        (np.zeros((8, 8, 3)), changes, "image is a ndarray; give a path, a URL or a PIL image"),
        (None, changes, "image is a NoneType"),
        (image, {}, "give set or clear: Black_Hair, Blond_Hair, Smiling"),
        (image, {"set": None}, "set is None; give the name of an attribute, or a list of them"),
        (image, {"clear": 5}, "clear is 5; give the name of an attribute"),
        (image, {"set": "Wings"}, "'Wings' is not among the attributes that this export changes: Black_Hair"),
        (image, {"clear": "Wings"}, "'Wings' is not among"),
        (image, {"set": "Smiling", "clear": "Smiling"}, "set Smiling: it conflicts with the other changes"),
        (image, {"set": ["Black_Hair", "Blond_Hair"]}, "set Black_Hair: it conflicts"),
        (image, {"set": "Smiling", "domain": 2}, "domain 2: this export has 2, counted from 0"),
    ]
    model = t2idist.load(more_exports["stargan"])
    for given, arguments, expected in cases:
        with pytest.raises(ValueError, match=expected) as raised:
            model.translate(given, **arguments)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="attngan: this export does not translate images"):
        t2idist.load(more_exports["attngan"]).translate(image, set="Smiling")
    with pytest.raises(ValueError, match="unconditional: this export does not translate images"):
        t2idist.load(more_exports["unconditional"]).translate(image, to="red")
    with pytest.raises(ValueError, match="'stargan' has no text encoder"):
        model.embed(FIRST)


# ------------------------------------------------------------ embed
@pytest.mark.parametrize("name", ["damsm", "attngan", "reads_vectors"])
def test_embed_gives_the_vector_of_the_text_encoder(more_exports: dict[str, str], name: str) -> None:
    encoder = more_exports["encoder"] if name == "reads_vectors" else None
    model = t2idist.load(more_exports[name], encoder=encoder)
    expected = open_encoder(encoder or more_exports[name], torch.device("cpu")).encode([FIRST])[0]
    vector = model.embed(FIRST)
    assert vector.dtype == np.float32 and np.array_equal(vector, expected)
    assert not np.allclose(model.embed(SECOND), vector)
    if name == "attngan":
        model.draw(FIRST, n=1)
        assert np.array_equal(model.embed(FIRST), expected), "drawing does not change the encoder"


# ------------------------------------------------------------ notebooks
def test_a_notebook_shows_all_images_in_a_grid(exports: dict[str, str]) -> None:
    drawn = t2idist.load(exports["attngan"]).draw(FIRST, n=3)
    shown = Image.open(io.BytesIO(drawn._repr_png_() or b""))
    cell = 96  # three times 32 pixels, without smoothing
    for i, image in enumerate(drawn):
        corner = (4 + i * (cell + 4), 4)
        part = shown.crop((*corner, corner[0] + cell, corner[1] + cell))
        assert part.tobytes() == image.resize((cell, cell), Image.Resampling.NEAREST).tobytes()
    assert shown.size == (3 * (cell + 4) + 4, cell + 8)


def test_a_notebook_shows_at_most_so_many_images_and_any_shapes() -> None:
    plain = Image.new("RGB", (200, 200), "red")
    many = Image.open(io.BytesIO(Images([plain] * (SHOWN_IMAGES + 9))._repr_png_() or b""))
    assert many.size == (5 * 204 + 4, 13 * 204 + 4) and 5 * 12 < SHOWN_IMAGES <= 5 * 13
    assert Images()._repr_png_() is None
    wide = Image.open(io.BytesIO(Images([Image.new("RGB", (1500, 300)), plain])._repr_png_() or b""))
    assert wide.size == (1508, 612), "one below the other"


# ------------------------------------------------------------ the package
def test_importing_the_package_imports_no_library() -> None:
    line = "import sys, t2idist; sys.exit(bool({'torch', 'numpy', 'PIL', 'ray', 'yaml'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", line], check=True, cwd=ROOT, timeout=60)
    assert {"load", "Model", "Images"} <= set(dir(t2idist))
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = t2idist.lod  # type: ignore[attr-defined]


USER = """
import sys, t2idist
from pathlib import Path
url, out = sys.argv[1:]
assert not Path(t2idist.__file__).is_relative_to(sys.argv[0]), t2idist.__file__
images: t2idist.Images = t2idist.load(url).draw("a red heart", n=2, seed=5)
for number, image in enumerate(images):
    image.save(f"{out}/{number}.png")
print(t2idist.__file__)
"""


@pytest.mark.whole
def test_the_installed_wheel_draws_what_its_command_draws(exports: dict[str, str], tmp_path: Path) -> None:
    site = install_wheel(tmp_path / "wheel")
    assert (site / "t2idist/py.typed").is_file()
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*words: str) -> str:
        python = [sys.executable, "-P", *words]
        done = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "user.py").write_text(USER)
    assert run("user.py", exports["attngan"], str(tmp_path)).strip() == str(site / "t2idist/__init__.py")
    arguments = ["--export", exports["attngan"], "--text", FIRST, "--n", "2", "--seed", "5", "--out", "drawn"]
    run("-m", "t2idist.cli", "sample", *arguments)
    for number in range(2):
        ours, theirs = tmp_path / f"{number}.png", tmp_path / f"drawn/001_a-red-heart_0{number + 1}.png"
        assert Image.open(ours).tobytes() == Image.open(theirs).tobytes()


@pytest.mark.filterwarnings("ignore:.*not in the vocabulary:UserWarning")
def test_the_page_s_code_runs(more_exports: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Python blocks of README and docs/python.md; exports and images are small ones."""
    load = t2idist.load
    blocks = [
        block
        for page in ("README.md", "docs/python.md")
        for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    ]
    assert len(blocks) >= 4
    kinds = {"stargan": "stargan", "vectors": "reads_vectors"}

    def small(url: str, **options: Any) -> Any:
        name = next((export for word, export in kinds.items() if word in url), "attngan")
        return load(more_exports[name], encoder=more_exports["encoder"] if "encoder" in options else None)

    monkeypatch.setattr(t2idist, "load", small, raising=False)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace('"face.png"', "photo()"), "page", "exec"), {"photo": photo, **names}, names)
