"""What a person sees: pictures, scores, progress lines, sampling from an export, the report."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from t2idist.contract import Batch
from t2idist.data.tokenizer import Vocabulary
from t2idist.evaluate.attribute_classifier import ABSENT, TRAITS, answers, balanced_accuracy, classify, train_classifier
from t2idist.evaluate.monitor import ROWS, SampleGrid, score_matching
from t2idist.evaluate.r_precision import r_precision
from t2idist.observability.progress import ProgressPrinter, duration, line
from t2idist.report import charts, report
from t2idist.sampling import figures, sample
from t2idist.sampling.generate import NormalDraw, encode
from t2idist.sampling.loading import load, network
from tests.helpers import small_systems, toy_gan

CPU = torch.device("cpu")
WORDS = ["<end>", "a", "red", "blue", "heart", "face", *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 6))]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Exports of untrained small networks, by system."""
    folder = tmp_path_factory.mktemp("exports")
    made = {name: str(folder / name) for name in ("damsm", "attngan", "dcgan")}
    for name, url in made.items():
        small_systems.write_export(name, url, WORDS)
    return made


# ------------------------------------------------------------------------------------------------ pictures
def blocks(*colours: float, size: int = 8) -> Tensor:
    """One picture of each grey level."""
    return torch.stack([torch.full((3, size, size), colour) for colour in colours])


def test_grid_shows_every_picture_equally_large_in_its_place() -> None:
    low, high = blocks(-1.0, -0.5, 0.0, 0.5, size=4), blocks(-1.0, -0.5, 0.0, 0.5, size=8)
    sheet = np.asarray(figures.grid([low, high], ["one", "two"], columns=2, real=blocks(0.25, 0.75)))
    cell = figures._cell(8)
    assert cell >= 96 and cell % 8 == 0
    top, left = 30 + cell // 2, figures.CAPTION_WIDTH + cell // 2
    step, block = cell + figures.GAP, figures.BLOCK_GAP
    x = [left, left + step + block, left + 2 * step + block, left + 3 * step + 2 * block, left + 4 * step + 2 * block]
    levels = [[int(sheet[top + row * step, column, 0]) for column in x] for row in range(2)]
    assert levels == [[159, 0, 64, 0, 64], [223, 128, 191, 128, 191]]
    assert (sheet[:, : figures.CAPTION_WIDTH] < 100).any()  # the captions' ink


def test_grid_refuses_another_number_of_pictures() -> None:
    with pytest.raises(ValueError, match="3 images; 2 captions in 2 columns need 4"):
        figures.grid([blocks(0, 0, 0)], ["one", "two"], columns=2)


def test_attention_is_bright_where_the_word_looks() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[0, :4], maps[1, 4:] = 0.9, 0.9
    sheet = np.asarray(figures.attention_figure(blocks(0.0)[0], ["up", "down"], [maps]), dtype=float)
    cell = figures._cell(8)
    y, x = figures.GAP + 28, figures.BLOCK_GAP * 3 + cell
    up, down = sheet[y : y + cell, x : x + cell], sheet[y : y + cell, x + cell + 2 * figures.GAP :][:, :cell]
    half = cell // 2 - 8
    assert up[:half].mean() > up[-half:].mean() + 60
    assert down[-half:].mean() > down[:half].mean() + 60
    with pytest.raises(ValueError, match="3 maps for 4 words"):
        figures.attention_figure(blocks(0.0)[0], ["a", "b", "c", "d"], [maps])


def test_attention_of_many_words_wraps() -> None:
    one = figures.attention_figure(blocks(0.0)[0], ["w"] * 9, [torch.rand(18, 4, 4)])
    two = figures.attention_figure(blocks(0.0)[0], ["w"] * 18, [torch.rand(18, 4, 4)])
    assert two.width == one.width and two.height > 1.7 * one.height


# ------------------------------------------------------------------------------------------------ R-precision
def test_r_precision_of_random_codes_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randn(3000, 16, generator=generator) for _ in range(2)]
    score = r_precision(codes[0], codes[1], seed=0)
    assert abs(score.mean - 0.01) < 4 * score.standard_error and score.n == 3000
    assert 0.0005 < score.standard_error < 0.004


def test_r_precision_of_equal_codes_is_one_at_any_length() -> None:
    codes = torch.randn(203, 16, generator=torch.Generator().manual_seed(0))
    score = r_precision(codes, 3 * codes, seed=0)
    assert (score.mean, score.n, score.fold_std) == (1.0, 203, 0.0)


def test_r_precision_of_collapsed_codes_is_chance_and_not_one() -> None:
    score = r_precision(torch.ones(150, 8), torch.ones(150, 8), seed=0)
    assert score.mean == pytest.approx(score.chance)


def test_r_precision_keeps_captions_of_one_class_apart() -> None:
    codes = torch.randn(60, 32, generator=torch.Generator().manual_seed(1)).repeat_interleave(2, 0)
    twins = torch.arange(120) // 2
    assert r_precision(codes, codes, seed=0, class_ids=twins).mean == 1.0
    assert r_precision(codes, codes, seed=0).mean < 0.8  # the twin ties wherever it is among the candidates
    with pytest.raises(ValueError, match="only 119"):
        r_precision(codes, codes, seed=0, class_ids=twins, candidates=120)


def test_r_precision_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    images, captions = (torch.randn(40, 4, generator=generator) for _ in range(2))
    cosine = torch.nn.functional.cosine_similarity(images[:, None], captions[None], dim=-1)
    first = (cosine.argmax(1) == torch.arange(40)).float().mean()
    assert r_precision(images, captions, seed=0, candidates=40).mean == pytest.approx(float(first))


# ------------------------------------------------------------------------------------------------ attributes
def test_balanced_accuracy_counts_classes_equally() -> None:
    wanted = torch.tensor([0] * 90 + [1] * 10 + [ABSENT] * 5)
    assert balanced_accuracy(torch.zeros(105, dtype=torch.int64), wanted) == (0.5, 100)
    assert balanced_accuracy(wanted.clamp(min=0), wanted) == (1.0, 100)


def test_answers_say_what_applies() -> None:
    rows = answers([["Blond_Hair", "Skin_Pale", "Eyeglasses"], ["Wearing_Hat", "Skin_Dark", "Beard"]])
    assert rows.tolist() == [[2, 4, 0, 1, 0], [ABSENT, 0, 1, 0, 1]]


def test_judge_learns_from_real_pictures_what_they_show() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, 2, (384, len(TRAITS)), generator=generator)
    images = torch.randint(0, 60, (384, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for t in range(len(TRAITS)):
        images[wanted[:, t] == 1, :, 3 * t : 3 * t + 3] += 120
    state = torch.random.get_rng_state()
    judge = train_classifier(images[:256], wanted[:256], seed=0, epochs=8, batch_size=32)
    assert torch.equal(state, torch.random.get_rng_state())
    decided = classify(judge, images[256:])
    assert min(balanced_accuracy(decided[:, t], wanted[256:, t])[0] for t in range(len(TRAITS))) > 0.9


# ------------------------------------------------------------------------------------------------ noise and monitor
def test_noise_depends_on_seed_place_and_call_only() -> None:
    whole, part = NormalDraw(3, range(6), CPU), NormalDraw(3, [4, 1], CPU)
    first, second = whole(2, 5), whole(2, 5)
    assert first.shape == (6, 2, 5) and not torch.equal(first, second)
    assert torch.equal(part(2, 5), first[[4, 1]]) and torch.equal(part(2, 5), second[[4, 1]])
    assert not torch.equal(NormalDraw(4, range(6), CPU)(2, 5), first)
    many = NormalDraw(0, range(2000), CPU)(4)
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


def test_monitor_draws_the_same_pictures_of_the_same_networks(exports: dict[str, str], tmp_path: Path) -> None:
    loaded = load(exports["attngan"], CPU)
    captions = ["a red heart", "a blue face"]

    def monitor(folder: str) -> SampleGrid:
        return SampleGrid(
            loaded.system, loaded.vocabulary, captions, max_words=6, draws=2, seed=0, folder=folder, device=CPU
        )

    for net in loaded.nets.values():
        net.train()
    one, two = monitor(str(tmp_path / "one")), monitor(str(tmp_path / "two"))
    urls = one.write(one.draw(loaded.nets), 12800)
    assert [Path(url).name for url in urls] == ["images_000012800.png", "attention_000012800.png"]
    assert all(net.training for net in loaded.nets.values())
    again = two.write(two.draw(loaded.nets), 12800)
    assert [Path(a).read_bytes() for a in urls] == [Path(b).read_bytes() for b in again]


def test_monitor_draws_other_noise_in_every_row_without_captions(exports: dict[str, str], tmp_path: Path) -> None:
    loaded = load(exports["dcgan"], CPU)
    monitor = SampleGrid(
        loaded.system, loaded.vocabulary, [], max_words=6, draws=2, seed=0, folder=str(tmp_path), device=CPU
    )
    sample = monitor.draw(loaded.nets)
    monitor.write(sample, 64)
    pictures = [picture.numpy().tobytes() for picture in sample.images[-1]]
    assert len(set(pictures)) == len(pictures) == 2 * ROWS
    assert (tmp_path / "images_000000064.png").is_file()


def test_score_matching_names_its_candidates(exports: dict[str, str]) -> None:
    loaded = load(exports["damsm"], CPU)
    captions = encode(loaded.vocabulary, [f"word{i}" for i in range(12)], 6)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    batch = Batch((images,), captions, torch.arange(12), torch.zeros(12, 0), tuple(map(str, range(12))), 1)
    values = score_matching(loaded.system, loaded.nets, batch, seed=0, device=CPU)
    assert list(values) == ["val/r_precision_of_12"] and 0 <= values["val/r_precision_of_12"] <= 1
    same = dataclasses.replace(batch, class_ids=torch.zeros(12, dtype=torch.int64))
    assert score_matching(loaded.system, loaded.nets, same, seed=0, device=CPU) == {}


# ------------------------------------------------------------------------------------------------ sampling
def draw(exports: dict[str, str], folder: Path, *words: str) -> int:
    return sample.main(["--export", exports["attngan"], "--out", str(folder), "--n", "2", *words])


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_same_seed_same_files(exports: dict[str, str], tmp_path: Path) -> None:
    text = ["--text", "a red heart", "--text", "a Blue face!"]
    assert draw(exports, tmp_path / "a", *text) == 0
    assert draw(exports, tmp_path / "b", *text) == 0
    assert draw(exports, tmp_path / "c", *text, "--seed", "1") == 0
    one, two, other = (files(tmp_path / name) for name in "abc")
    stems = ["001_a-red-heart_01", "001_a-red-heart_02", "002_a-blue-face_01", "002_a-blue-face_02", "grid"]
    assert list(one) == [f"{stem}.png" for stem in stems]
    assert one == two
    assert one["001_a-red-heart_01.png"] != other["001_a-red-heart_01.png"]
    assert one["001_a-red-heart_01.png"] != one["001_a-red-heart_02.png"]
    assert Image.open(io.BytesIO(one["001_a-red-heart_01.png"])).size == (32, 32)


def test_all_scales_and_attention(exports: dict[str, str], tmp_path: Path) -> None:
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("a red heart\n\n")
    out = tmp_path / "out"
    assert draw(exports, out, "--captions", str(sentences), "--scale", "all", "--attention", "--n", "1") == 0
    kinds = ("16px", "32px", "attention")
    assert list(files(out)) == [*(f"001_a-red-heart_01_{kind}.png" for kind in kinds), "grid.png"]


def test_unknown_words_are_named(exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(exports, tmp_path, "--text", "a red zeppelin") == 0
    assert "'zeppelin'" in capsys.readouterr().err
    assert draw(exports, tmp_path, "--text", "two zeppelins") == 2
    error = capsys.readouterr().err
    assert "no word of this sentence" in error and error.count("\n") == 1


def test_broken_exports_are_one_sentence(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(url: str, *words: str) -> str:
        assert sample.main(["--export", url, "--text", "a red heart", "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    assert "no export here" in fails(str(tmp_path / "nowhere"))
    assert "does not draw" in fails(exports["damsm"])
    assert "--device" in fails(exports["attngan"], "--device", "abacus")
    torn = tmp_path / "torn"
    torn.mkdir()
    for name, data in files(Path(exports["attngan"])).items():
        (torn / name).write_bytes(data[:-9] if name == "text.safetensors" else data)
    assert "text.safetensors: broken" in fails(str(torn))
    index = json.loads((torn / "export.json").read_text())
    for change, wanted in (
        ({"system": "attgan"}, "attgan"),
        ({"config": {"colour": 1}}, "colour"),
        ({"plan": {"x": 1}}, "plan"),
    ):
        (torn / "export.json").write_text(json.dumps({**index, **change, "networks": {}}))
        assert wanted in fails(str(torn))


def test_loaded_networks_are_the_exported_ones(exports: dict[str, str]) -> None:
    loaded = load(exports["attngan"], CPU)
    made = small_systems.build("attngan")
    assert set(loaded.nets) == {"generator", "text"}
    for name in made.exports:
        wanted = network(made, name).state_dict()
        assert all(torch.equal(wanted[key], value) for key, value in loaded.nets[name].state_dict().items())
    assert isinstance(loaded.vocabulary, Vocabulary) and not any(
        p.requires_grad for p in loaded.nets["text"].parameters()
    )


# ------------------------------------------------------------------------------------------------ progress
PROGRESS: dict[str, Any] = {
    "run": "r",
    "stage": "attngan",
    "stage_index": 1,
    "stages": 2,
    "images": 128000,
    "budget_images": 210000,
    "images_per_second": 168.2,
    "seconds_left": 492,
    "losses": {
        "generator/adversarial_64": 3.0,
        "generator/kl": 1.1,
        "discriminator_32/real": 1.5,
        "discriminator_64/real": 1.5,
        "discriminator_64/fake": 0.8,
        "val/r_precision": 0.3,
    },
    "restarts": 0,
    "workers": 2,
    "state": "training",
}


def test_progress_line() -> None:
    text = "attngan 2/2   61%  128.0k/210.0k images  168 images/s  G 4.10 D 1.90  left 8m12s  restarts 0  workers 2"
    assert line(PROGRESS) == text
    assert len(line(PROGRESS, 60)) <= 60 and "61%" in line(PROGRESS, 60) and "8m12s" in line(PROGRESS, 60)
    start = {**PROGRESS, "images": 0, "losses": {}, "images_per_second": 0.0, "seconds_left": None}
    assert line(start) == "attngan 2/2    0%  0/210.0k images  restarts 0  workers 2"
    assert "done" in line({**PROGRESS, "state": "done"}) and "left" not in line({**PROGRESS, "state": "done"})
    assert [duration(s) for s in (3, 492, 3 * 3600 + 301, 90000)] == ["3s", "8m12s", "3h05m", "1d01h"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_file_is_not_flooded() -> None:
    now = [0.0]
    stream = io.StringIO()
    printer = ProgressPrinter(stream, every_seconds_log=30, clock=lambda: now[0])
    for second in range(120):
        now[0] = float(second)
        printer.show({**PROGRESS, "images": 1000 * second, "workers": 2 if second < 65 else 1})
    assert len(stream.getvalue().splitlines()) == 5  # at 0, 30, 60, 65 (a worker less) and 95
    assert "\r" not in stream.getvalue()


def test_terminal_line_is_rewritten_in_place() -> None:
    stream = Terminal()
    printer = ProgressPrinter(stream, columns=lambda: 100)
    for images in (1000, 2000, 3000):
        printer.show({**PROGRESS, "images": images})
    printer.message("warning: a sample is left out")
    printer.show({**PROGRESS, "stage": "damsm"})
    printer.close()
    text = stream.getvalue()
    assert text.count("\r") == 4 and text.count("\n") == 3 and text.endswith("\n")
    assert all(len(part) <= 99 for part in re.split("[\r\n]", text))


# ------------------------------------------------------------------------------------------------ charts and report
def test_chart_ticks_enclose_the_values_and_take_the_scale_that_shows_them() -> None:
    assert charts._ticks(0, 4.2) == [0, 1, 2, 3, 4, 5] or charts._ticks(0, 4.2) == [0, 2, 4, 6]
    flat = charts.chart("flat", [charts.Series("x", (1.0, 2.0), (3.0, 3.0))], 0)
    steep = charts.chart("steep", [charts.Series("x", (1.0, 2.0, 3.0), (1e-4, 1.0, 30.0))], 1)
    assert "log scale" not in flat.html and "log scale" in steep.html
    for made in (flat, steep):
        for series in made.values["series"]:
            assert all(charts.LEFT <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in series["at"])


def test_long_series_are_thinned_and_keep_their_mean() -> None:
    n = 5000
    series = charts.Series("x", tuple(map(float, range(n))), tuple(float(i % 7) for i in range(n)))
    thin = charts._thinned(series)
    assert len(thin.x) == charts.MOST_POINTS and abs(np.mean(thin.y) - np.mean(series.y)) < 0.05


class Page(HTMLParser):
    """What a page would fetch, its visible text, and whether its tags close."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [
            value or "" for name, value in attrs if name in ("src", "srcset") or (name == "href" and tag == "link")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words += data + " "


def run_folder(folder: Path) -> Path:
    at = folder / "run <1>"
    (at / "gan/pictures").mkdir(parents=True)
    about = "faces & </script><b>hats</b>"
    (at / "config.yaml").write_text(
        f"name: run\nabout: '{about}'\nstages:\n  damsm: {{system: damsm}}\n  gan: {{system: attngan}}\n"
    )
    (at / "versions.json").write_text('{"torch": "2.13.0", "cpu": "abacus", "cpu_cores": 2}')
    (at / "progress.json").write_text(json.dumps({**PROGRESS, "state": "training", "stage": "gan"}))
    (at / "attempts.json").write_text(json.dumps([{"time": f"2026-01-0{i}T00:00:00", "workers": i} for i in (1, 2)]))
    lines = [
        {"images": 10 * i, "step": i, "seconds": i, "images_per_second": 9.5, "restarts": int(i > 3), "time": "t"}
        | {"generator/adversarial_64": 1.0 / i, "discriminator_64/</script>": 0.5}
        for i in range(1, 6)
    ]
    (at / "gan/metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"images": 6')
    for images in (10, 50):
        for kind in ("images", "attention"):
            Image.new("RGB", (300, 120), (images, 90, 90)).save(at / f"gan/pictures/{kind}_{images:09d}.png")
    return at


def test_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    at = run_folder(tmp_path)
    text = report.build(str(at))
    page = Page(text)
    assert len(page.sources) >= 7 and all(source.startswith("data:") for source in page.sources)
    assert not any(word in text for word in ("http://", "https://", "url(", "@import"))
    assert "<b>hats</b>" not in text and "<b>hats</b>" in page.words
    assert text.count("</script>") == 2
    for wanted in ("generator", "discriminator_64", "throughput", "2026-01-02", "abacus", "50 images", "torch"):
        assert wanted in page.words
    assert "Scores" not in page.words


def test_report_shows_scores_where_there_are_some(tmp_path: Path) -> None:
    at = run_folder(tmp_path)
    rows = [{"name": "hat <x>", "value": 0.91, "chance": 0.5, "real": 0.99, "n": 600, "note": "balanced"}]
    (at / "scores.json").write_text(json.dumps(rows))
    assert report.main([str(at)]) == 0
    page = Page((at / "report.html").read_text())
    assert "hat <x>" in page.words and "0.910" in page.words and "0.500" in page.words


def test_report_shows_what_was_scored_and_by_which_protocol(tmp_path: Path) -> None:
    at = run_folder(tmp_path)
    lines = [json.loads(line) for line in (at / "gan/metrics.jsonl").read_text().splitlines()[:-1]]
    more = {"generator/adversarial_128": 3.0, "norm/generator": 0.7}
    (at / "gan/metrics.jsonl").write_text("".join(json.dumps({**line, **more}) + "\n" for line in lines))
    for folder in ("scores", "scored"):
        (at / "gan" / folder).mkdir()
    (at / "gan/scored/scores.jsonl").write_text('{"images": 20, "kid": 0.5}\n{"images": 40, "kid": 0.25}\n')
    best = {"images": 40, "metric": "kid", "value": 0.25, "export": "scored/000000000040"}
    (at / "gan/scored/best.json").write_text(json.dumps(best))
    row = {"name": "r_precision", "value": 0.31, "error": 0.02, "low": 0.27, "high": 0.35, "real": 0.6, "chance": 0.01}
    words = [{"name": f"word{i}", "n": 20 + i, "r_precision": i / 40, "clip_r": 0.5} for i in range(40)]
    Image.new("RGB", (300, 120), (9, 90, 90)).save(at / "gan/scores/worst.png")
    result = {
        "protocol": {"generated": 600, "jpeg": 0, "truncation": None, "extractors": [{"name": "net", "sha256": "abc"}]},
        "scores": [{**row, "n": 600, "note": "own caption out of 100 <x>"}],
        "breakdown": {"words": words, "attributes": []},
        "sheets": {"worst": "worst.png"},
    }
    (at / "gan/scores/scores.json").write_text(json.dumps(result))
    text = report.build(str(at))
    page = Page(text)
    for wanted in (
        "r_precision",
        "± 0.020",
        "0.270 to 0.350",
        "extractor net",
        "sha256 abc",
        "own caption out of 100 <x>",
    ):
        assert wanted in page.words, wanted
    assert "best after 40 images by kid (0.250)" in page.words and "gan/scored/000000000040" in page.words
    assert "word0" in page.words and "word39" in page.words and "word20" not in page.words, "the ends of a long list"
    assert "adversarial loss by scale" in page.words and "gradient norms" in page.words
    assert "kid, scored in training" in page.words and "none compares" in page.words and "23.98" in page.words
    assert all(source.startswith("data:") for source in page.sources) and "http://" not in text


def test_report_of_a_run_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: young\nstages:\n  gan: {system: attngan}\n")
    assert "young" in Page(report.build(str(tmp_path))).words
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no run here" in capsys.readouterr().err
