"""The sampler's axes: words, ways between sentences and between draws, truncation, the style of pictures."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from t2idist.contract import Captions, NoiseFn, Sample
from t2idist.engine.checkpoint import export
from t2idist.evaluate.monitor import reads_text
from t2idist.sampling import axes, figures, sample
from t2idist.sampling.generate import ArcDraw, GivenDraw, NormalDraw, RowsDraw, encode, generate
from t2idist.sampling.loading import Loaded, load
from tests.helpers import small_systems, toy_gan

CPU = torch.device("cpu")
WORDS = ["<end>", "a", "red", "blue", "heart", "face", *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 6))]
FROM, TO = "a red heart", "a blue face word1"
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports of untrained small networks, by system; "alone" is a tree without text."""
    folder = tmp_path_factory.mktemp("exports")
    made = {name: str(folder / name) for name in ("attngan", "stackgan_pp", "alone")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            small_systems.MODELS, "attngan", {**small_systems.MODELS["attngan"], "unit_text": True}
        )  # so that text is seen
        for name in ("attngan", "stackgan_pp"):
            small_systems.write_export(name, made[name], WORDS)
        patch.setitem(
            small_systems.MODELS, "stackgan_pp", {**small_systems.MODELS["stackgan_pp"], "conditional": False}
        )
        patch.setitem(small_systems.USES, "stackgan_pp", {})
        small_systems.write_export("stackgan_pp", made["alone"], WORDS)
    return made


def both(exports: dict[str, str]) -> list[Loaded]:
    return [load(exports[name], CPU) for name in ("attngan", "stackgan_pp")]


def said(loaded: Loaded, *sentences: str) -> Captions:
    return encode(loaded.vocabulary, list(sentences), loaded.plan.max_words)


def drawn(loaded: Loaded, captions: Captions, draw: RowsDraw, nets: Mapping[str, nn.Module] | None = None) -> Sample:
    return generate(loaded.system, loaded.nets if nets is None else nets, captions, draw, device=CPU)  # type: ignore[arg-type]


def furthest(a: Sample, b: Sample) -> float:
    """The largest difference of two samples' pictures, over all sizes."""
    return max(float((x - y).abs().max()) for x, y in zip(a.images, b.images, strict=True))


# ------------------------------------------------------------------------------------------------ noise
@pytest.mark.parametrize("largest", [0.02, 0.5, 1.0, 2.0])
def test_truncated_noise_is_within_bounds_and_the_rest_stays(largest: float) -> None:
    plain, cut = NormalDraw(3, range(8), CPU), NormalDraw(3, range(8), CPU, truncation=largest)
    for _ in range(2):
        whole, values = plain(5, 40), cut(5, 40)
        assert values.abs().max() <= largest
        inside = whole.abs() <= largest
        assert torch.equal(values[inside], whole[inside]) and not inside.all()
    assert torch.equal(
        NormalDraw(3, [4, 1], CPU, truncation=largest)(7), NormalDraw(3, range(8), CPU, truncation=largest)(7)[[4, 1]]
    )


def test_truncated_noise_has_the_spread_of_the_truncated_normal() -> None:
    values = NormalDraw(0, range(400), CPU, truncation=1.0)(50)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert float(values.std()) == pytest.approx(math.sqrt(1 - 2 * density / math.erf(math.sqrt(0.5))), rel=0.02)
    assert abs(float(values.mean())) < 0.02


def test_arc_goes_from_one_draw_to_the_other_in_every_call() -> None:
    shares = [0.0, 0.25, 0.5, 1.0]
    start, end = NormalDraw(3, [0] * 4, CPU), NormalDraw(3, [1] * 4, CPU)
    arc, part = ArcDraw(start, end, shares), ArcDraw(start, end, shares)[1:3]
    for call in range(2):
        here, there = (NormalDraw(3, [place], CPU) for place in (0, 1))
        for _ in range(call):
            here(6), there(6)
        (a,), (b,) = here(6), there(6)
        way = arc(6)
        assert torch.equal(way[0], a) and torch.allclose(way[3], b, rtol=0, atol=ROUNDING)
        assert torch.allclose(way[2], (a + b) / math.sqrt(2), atol=ROUNDING)
        assert torch.equal(part(6), way[1:3])
    wide = ArcDraw(NormalDraw(0, [0], CPU), NormalDraw(0, [1], CPU), [0.3])(20000)
    assert float(wide.std()) == pytest.approx(1, rel=0.03)  # as a straight line would not have


def test_given_noise_is_the_first_call_and_only_that() -> None:
    code = torch.arange(8.0).view(2, 4)
    rest = NormalDraw(3, [5, 6], CPU)
    rest(4)
    draw = GivenDraw(code, NormalDraw(3, [5, 6], CPU))
    assert torch.equal(draw(4), code) and torch.equal(draw(7), rest(7))
    assert torch.equal(draw[1:](4), code[1:])
    with pytest.raises(AssertionError, match=r"\(2, 4\) given, \(2, 3\) drawn"):
        draw[:](3)


# ------------------------------------------------------------------------------------------------ between sentences
class Spelled(nn.Module):
    """A text encoder of one dimension: a word's vector is its number, the sentence's their sum; past the end -99."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
        return tokens.float().masked_fill(padding, -99)[:, None], tokens.sum(1, keepdim=True).float()


def caption(*tokens: int, max_words: int = 5) -> Captions:
    padded = torch.tensor([[*tokens, *[0] * (max_words - len(tokens))]])
    return Captions(padded, torch.tensor([len(tokens)]), torch.zeros(1, 0))


def test_words_of_two_captions_are_paired_in_their_order() -> None:
    (words, sentence), (others, other) = axes.aligned(Spelled(), caption(10, 20), caption(1, 2, 3))
    assert words.tolist() == [[[10, 10, 10, 20, 20, 20]]] and sentence.tolist() == [[30]]
    assert others.tolist() == [[[1, 1, 2, 2, 3, 3]]] and other.tolist() == [[6]]


def test_between_two_captions_lies_the_mean_of_words_and_of_sentences(exports: dict[str, str]) -> None:
    loaded = load(exports["stackgan_pp"], CPU)
    loaded.nets["text"] = Spelled()
    captions = Captions(torch.tensor([[10, 20, 0], [1, 2, 3]]), torch.tensor([2, 3]), torch.zeros(2, 0))
    middle = axes.rows_between(loaded, [FROM, TO], captions, 3)[1]
    two = middle.caption.each(2)
    words, sentence = middle.nets["text"](two.tokens, two.lengths)
    assert words.tolist() == [[[5.5, 5.5, 6, 11, 11.5, 11.5]]] * 2 and sentence.tolist() == [[18]] * 2
    assert middle.caption.lengths.tolist() == [6]


def test_an_encoder_without_words_has_none_between() -> None:
    class Whole(Spelled):
        def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            words, sentence = super().forward(tokens, lengths)
            return words[:, :, :0], sentence

    (words, _), (others, _) = axes.aligned(Whole(), caption(10, 20), caption(1, 2, 3))
    assert words.shape == others.shape == (1, 1, 0)


def test_ends_between_two_sentences_are_the_plain_pictures_and_the_way_has_no_jump(exports: dict[str, str]) -> None:
    for loaded in both(exports):
        captions, draw = said(loaded, FROM, TO), NormalDraw(0, range(3), CPU)
        plain = [drawn(loaded, captions[i : i + 1].each(3), draw) for i in range(2)]
        way = axes.rows_between(loaded, [FROM, TO], captions, 5)
        assert [row.label for row in way] == [FROM, "25 % of the way", "50 % of the way", "75 % of the way", TO]
        shown = [drawn(loaded, row.caption.each(3), draw, row.nets) for row in way]
        apart = furthest(plain[0], plain[1])
        assert apart > 0.01
        assert furthest(shown[0], plain[0]) < ROUNDING and furthest(shown[-1], plain[1]) < ROUNDING
        steps = [furthest(a, b) for a, b in pairwise(shown)]
        assert min(steps) > 0.02 * apart and max(steps) < 0.8 * apart
        near = axes.rows_between(loaded, [FROM, TO], captions, 1001)[1]
        assert furthest(drawn(loaded, near.caption.each(3), draw, near.nets), plain[0]) < 0.02 * apart


def test_vectors_that_came_with_the_data_are_interpolated_where_there_is_no_encoder(exports: dict[str, str]) -> None:
    loaded = load(exports["alone"], CPU)
    assert not reads_text(loaded.system, loaded.plan.extent.vector_dim)
    captions = dataclasses.replace(said(loaded, FROM, TO), vectors=torch.tensor([[0.0, 8.0], [4.0, 0.0]]))
    way = axes.rows_between(loaded, [FROM, TO], captions, 5)
    assert [row.caption.vectors.tolist() for row in way] == [[[0, 8]], [[1, 6]], [[2, 4]], [[3, 2]], [[4, 0]]]


# ------------------------------------------------------------------------------------------------ words and styles
def test_words_fill_the_place_that_a_sentence_leaves() -> None:
    assert axes.changed_words("red, light blue") == ["red", "light blue"]
    filled = axes.fill_in(["a {} heart", "{} on {}"], ["red", "light blue"])
    assert filled == ["a red heart", "a light blue heart", "red on red", "light blue on light blue"]


class Inverting:
    """A system whose picture is z beside its second draw, so that z can be read off the picture."""

    sizes = (4,)

    def sample(self, nets: Mapping[str, nn.Module], captions: Captions, draw: NoiseFn) -> Sample:
        shown = torch.cat([draw(24), draw(24)], 1).view(-1, 3, 4, 4)
        return Sample((shown,))

    def invert(self, nets: Mapping[str, nn.Module], images: Tensor) -> Tensor:
        return images.flatten(1)[:, :24]


def test_style_of_a_picture_is_its_z_and_all_else_is_the_same(exports: dict[str, str]) -> None:
    loaded = dataclasses.replace(load(exports["alone"], CPU), system=Inverting())  # type: ignore[arg-type]
    captions = said(loaded, FROM).each(3)
    given = drawn(loaded, captions, NormalDraw(9, range(3), CPU)).images[0]
    columns = axes.style_columns(loaded, given, seed=0, truncation=math.inf)
    assert columns.count == 3 and columns.pictures is not None and torch.equal(columns.pictures, given)
    shown = drawn(loaded, captions, columns.draw).images[0].flatten(1)
    assert torch.equal(shown[:, :24], given.flatten(1)[:, :24])
    plain = drawn(loaded, captions[:1], NormalDraw(0, [0], CPU)).images[0].flatten(1)
    assert torch.equal(shown[:, 24:], plain[:, 24:].expand(3, -1))


def picture_file(path: Path, colours: np.ndarray) -> str:
    Image.fromarray(colours.astype(np.uint8)).save(path)
    return str(path)


def test_picture_is_the_middle_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3))
    wide[:, 8:16] = 255
    image = figures.read_picture(picture_file(tmp_path / "wide.PNG", wide), 8)
    assert image.shape == (3, 8, 8) and torch.equal(image, torch.ones(3, 8, 8))
    assert figures.read_picture(picture_file(tmp_path / "wide.jpeg", wide), 4).shape == (3, 4, 4)
    torn = tmp_path / "torn.png"
    torn.write_bytes((tmp_path / "wide.PNG").read_bytes()[:40])
    for url, reason in (
        (str(torn), "does not decode"),
        (str(tmp_path / "no.png"), "No such file"),
        ("a.gif", "end in"),
    ):
        with pytest.raises(ValueError, match=reason):
            figures.read_picture(url, 8)


def test_grid_shows_names_and_pictures_over_their_columns() -> None:
    images, tops = torch.zeros(4, 3, 96, 96), torch.stack([torch.full((3, 96, 96), level) for level in (-1.0, 1.0)])
    plain = np.asarray(figures.grid([images, images], ["one", "two"], 2))
    sheet = np.asarray(figures.grid([images, images], ["one", "two"], 2, names=["left", "right"], tops=tops))
    lower = figures.NAMES + 96 + figures.BLOCK_GAP
    assert sheet.shape == (plain.shape[0] + lower, *plain.shape[1:])
    assert np.array_equal(sheet[figures.HEAD + lower :], plain[figures.HEAD :])
    y = figures.HEAD + figures.NAMES + 48
    x = [
        figures.CAPTION_WIDTH + 48 + column * 100 + block * (200 + figures.BLOCK_GAP)
        for block in (0, 1)
        for column in (0, 1)
    ]
    assert [int(sheet[y, place, 0]) for place in x] == [0, 255, 0, 255]
    names = sheet[figures.HEAD : figures.HEAD + figures.NAMES]
    assert all((names[:, place - 48 : place + 40] < 100).any() for place in x)


# ------------------------------------------------------------------------------------------------ the command
def run(url: str, folder: Path, *words: str) -> dict[str, np.ndarray]:
    """The pictures that the command writes, by name, twice the same."""
    for name in ("first", "again"):
        assert sample.main(["--export", url, "--out", str(folder / name), *words]) == 0
    first, again = ({f.name: f.read_bytes() for f in sorted((folder / name).iterdir())} for name in ("first", "again"))
    assert first == again
    return {name: np.asarray(Image.open(io.BytesIO(data))).astype(int) for name, data in first.items()}


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the last bit of rounding, which batches of another size may turn."""
    return bool(np.abs(a - b).max() <= 1)


def test_command_goes_from_one_sentence_to_another(exports: dict[str, str], tmp_path: Path) -> None:
    way = run(exports["attngan"], tmp_path / "way", "--interpolate-text", FROM, TO, "--steps", "3", "--n", "2")
    plain = run(exports["attngan"], tmp_path / "plain", "--text", FROM, "--text", TO, "--n", "2")
    stems = ["001_a-red-heart", "002_50-of-the-way", "003_a-blue-face-word1"]
    assert list(way) == [*(f"{stem}_{column}.png" for stem in stems for column in ("01", "02")), "grid.png"]
    for column in ("01", "02"):
        assert alike(way[f"001_a-red-heart_{column}.png"], plain[f"001_a-red-heart_{column}.png"])
        assert alike(way[f"003_a-blue-face-word1_{column}.png"], plain[f"002_a-blue-face-word1_{column}.png"])
        assert not alike(way[f"002_50-of-the-way_{column}.png"], plain[f"001_a-red-heart_{column}.png"])


def test_command_goes_from_one_noise_to_another(exports: dict[str, str], tmp_path: Path) -> None:
    for name in ("attngan", "alone"):
        text = [] if name == "alone" else ["--text", FROM]
        stem = "001_without-text" if name == "alone" else "001_a-red-heart"
        way = run(exports[name], tmp_path / name / "way", *text, "--interpolate-noise", "--steps", "5")
        plain = run(exports[name], tmp_path / name / "plain", *text, "--n", "2")
        assert len(way) == 6
        assert alike(way[f"{stem}_01.png"], plain[f"{stem}_01.png"])
        assert alike(way[f"{stem}_05.png"], plain[f"{stem}_02.png"])
        assert not alike(way[f"{stem}_03.png"], plain[f"{stem}_01.png"])


def test_command_changes_a_word_and_nothing_else(exports: dict[str, str], tmp_path: Path) -> None:
    rows_of = run(exports["attngan"], tmp_path / "a", "--text", "a {} heart", "--change-word", "red, blue", "--n", "2")
    plain = run(exports["attngan"], tmp_path / "b", "--text", "a red heart", "--text", "a blue heart", "--n", "2")
    assert list(rows_of) == list(plain) and all(np.array_equal(rows_of[name], plain[name]) for name in plain)
    assert not alike(plain["001_a-red-heart_01.png"], plain["002_a-blue-heart_01.png"])


def test_command_truncates_the_noise(exports: dict[str, str], tmp_path: Path) -> None:
    name = "001_a-red-heart_01.png"
    plain = run(exports["attngan"], tmp_path / "plain", "--text", FROM)
    far = run(exports["attngan"], tmp_path / "far", "--text", FROM, "--truncation", "9")
    near = run(exports["attngan"], tmp_path / "near", "--text", FROM, "--truncation", "0.1")
    assert np.array_equal(plain[name], far[name]) and not alike(plain[name], near[name])
    columns = [near[f"001_a-red-heart_0{column}.png"] for column in (1, 2)]
    others = [plain[f"001_a-red-heart_0{column}.png"] for column in (1, 2)]
    assert np.abs(columns[0] - columns[1]).mean() < 0.5 * np.abs(others[0] - others[1]).mean()


def test_command_gives_the_style_of_pictures_to_sentences(tmp_path: Path) -> None:
    url = str(tmp_path / "export")
    small_systems.write_export("style", url, WORDS)
    loaded = load(url, CPU)
    for weight in [weight for net in loaded.nets.values() for weight in net.parameters() if weight.dim() > 1]:
        weight.mul_(10)  # untrained, all its pictures are gray
    export.write(url, loaded.nets, export.read_index(url))
    given = [
        picture_file(tmp_path / f"{level}.png", np.random.default_rng(level).integers(level, 256, (16, 20, 3)))
        for level in (0, 128, 200)
    ]
    shown = run(url, tmp_path / "a", "--text", "a {} heart", "--change-word", "red,blue", "--style-of", *given)
    alone = run(url, tmp_path / "b", "--text", "a red heart", "--style-of", given[1])
    assert len(shown) == 2 * 3 + 1
    assert alike(shown["001_a-red-heart_02.png"], alone["001_a-red-heart_01.png"])
    assert not alike(shown["001_a-red-heart_01.png"], shown["001_a-red-heart_02.png"])


BAD: list[tuple[list[str], str]] = [
    ([], "no sentence"),
    (["--interpolate-text", FROM, TO, "--text", FROM], "leave --text away"),
    (["--interpolate-text", FROM, TO, "--change-word", "red"], "leave --change-word away"),
    (["--interpolate-text", FROM, TO, "--attention"], "--attention"),
    (["--interpolate-text", FROM, "a {} heart"], "--change-word"),
    (["--interpolate-text", FROM, "zeppelins"], "no word of this sentence"),
    (["--text", FROM, "--steps", "3"], "--steps is for"),
    (["--text", FROM, "--interpolate-noise", "--steps", "1"], "--steps 1: give at least 2"),
    (["--text", FROM, "--interpolate-noise", "--n", "2"], "--n counts draws"),
    (["--text", FROM, "--n", "0"], "--n 0"),
    (["--text", FROM, "--truncation", "0"], "--truncation 0.0: give at least 0.01"),
    (["--text", FROM, "--truncation", "nan"], "--truncation nan"),
    (["--text", "a {} heart"], "say with --change-word"),
    (["--text", FROM, "--change-word", "red"], "has no {}"),
    (["--text", "a {} heart", "--change-word", "red,,blue"], "commas"),
    (["--text", "a {} heart", "--change-word", "red,mauve"], "'mauve'"),
    (["--change-word", "red"], "give the sentence too"),
    (["--text", FROM, "--style-of", "x.png", "--interpolate-noise"], "give one of them"),
    (["--text", FROM, "--style-of", "nowhere.png"], "nowhere.png"),
]


@pytest.mark.parametrize("words,wanted", BAD)
def test_options_that_do_not_go_together_are_one_sentence(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str
) -> None:
    assert sample.main(["--export", exports["attngan"], "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_exports_that_lack_what_is_asked_say_so(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = picture_file(tmp_path / "x.png", np.zeros((8, 8, 3)))
    asked: list[tuple[str, list[str], Any]] = [
        ("attngan", ["--text", FROM, "--style-of", picture], "give that of a 'style' stage"),
        ("alone", ["--text", FROM], "draws without text"),
    ]
    for name, words, wanted in asked:
        assert sample.main(["--export", exports[name], "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1
