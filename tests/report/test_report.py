"""The report page is self-contained and shows what the run folder holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from t2idist.report import report


class Page(HTMLParser):
    """Collect the sources that a page loads and its visible text; check that its tags are closed."""

    VOID = frozenset({"meta", "link", "img", "input", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
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
            self.text += data + " "


def write_run(folder: Path) -> Path:
    run = folder / "run <1>"
    (run / "gan/pictures").mkdir(parents=True)
    about = "faces & </script><b>hats</b>"
    (run / "config.yaml").write_text(
        f"name: run\nabout: '{about}'\nstages:\n  damsm: {{system: damsm}}\n  gan: {{system: attngan}}\n"
    )
    (run / "versions.json").write_text('{"torch": "2.13.0", "cpu": "abacus", "cpu_cores": 2}')
    progress = {"run": "r", "stage": "gan", "images": 128000, "workers": 2, "state": "training"}
    (run / "progress.json").write_text(json.dumps(progress))
    recovery = {"cause": "worker lost", "seconds": {"end": 0.5, "start": 2.0}, "images_repeated": 16}
    attempts = [{"time": f"2026-01-0{i}T00:00:00", "workers": i, "recovery": recovery} for i in (1, 2)]
    (run / "attempts.json").write_text(json.dumps(attempts))
    lines = [
        {"images": 10 * i, "step": i, "seconds": i, "images_per_second": 9.5, "restarts": int(i > 3), "time": "t"}
        | {"generator/adversarial_64": 1.0 / i, "discriminator_64/</script>": 0.5}
        for i in range(1, 6)
    ]
    (run / "gan/metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"images": 6')
    for images in (10, 50):
        for kind in ("images", "attention"):
            Image.new("RGB", (300, 120), (images, 90, 90)).save(run / f"gan/pictures/{kind}_{images:09d}.png")
    return run


def test_report_is_self_contained(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    html = report.build_report(str(run))
    page = Page(html)
    assert len(page.sources) >= 7 and all(source.startswith("data:") for source in page.sources)
    assert not any(link in html for link in ("http://", "https://", "url(", "@import"))
    assert "<b>hats</b>" not in html and "<b>hats</b>" in page.text
    assert html.count("</script>") == 2
    for expected in ("generator", "discriminator_64", "throughput", "2026-01-02", "abacus", "50 images", "torch"):
        assert expected in page.text
    assert "worker lost, 2.5 s (end 0.5, start 2.0), 16 images repeated" in page.text
    assert "Scores" not in page.text


def test_report_shows_the_scores_of_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [{"name": "hat <x>", "value": 0.91, "chance": 0.5, "real": 0.99, "n": 600, "note": "balanced"}]
    (run / "scores.json").write_text(json.dumps(rows))
    assert report.main([str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert "hat <x>" in page.text and "0.910" in page.text and "0.500" in page.text


def test_report_shows_stage_scores_with_their_protocol(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = [json.loads(line) for line in (run / "gan/metrics.jsonl").read_text().splitlines()[:-1]]
    more = {"generator/adversarial_128": 3.0, "norm/generator": 0.7}
    (run / "gan/metrics.jsonl").write_text("".join(json.dumps({**line, **more}) + "\n" for line in lines))
    for folder in ("scores", "scored"):
        (run / "gan" / folder).mkdir()
    (run / "gan/scored/scores.jsonl").write_text('{"images": 20, "kid": 0.5}\n{"images": 40, "kid": 0.25}\n')
    best = {"images": 40, "metric": "kid", "value": 0.25, "export": "scored/000000000040"}
    (run / "gan/scored/best.json").write_text(json.dumps(best))
    row = {"name": "r_precision", "value": 0.31, "error": 0.02, "low": 0.27, "high": 0.35, "real": 0.6, "chance": 0.01}
    words = [{"name": f"word{i}", "n": 20 + i, "r_precision": i / 40, "clip_r": 0.5} for i in range(40)]
    Image.new("RGB", (300, 120), (9, 90, 90)).save(run / "gan/scores/worst.png")
    result = {
        "protocol": {"generated": 600, "jpeg": 0, "truncation": None, "extractors": [{"name": "net", "sha256": "abc"}]},
        "scores": [{**row, "n": 600, "note": "own caption out of 100 <x>"}],
        "breakdown": {"words": words, "attributes": []},
        "sheets": {"worst": "worst.png"},
    }
    (run / "gan/scores/scores.json").write_text(json.dumps(result))
    html = report.build_report(str(run))
    page = Page(html)
    for expected in (
        "r_precision",
        "± 0.020",
        "0.270 to 0.350",
        "extractor net",
        "sha256 abc",
        "own caption out of 100 <x>",
    ):
        assert expected in page.text, expected
    assert "best after 40 images by kid (0.250)" in page.text and "gan/scored/000000000040" in page.text
    assert "word0" in page.text and "word39" in page.text and "word20" not in page.text, "the ends of a long list"
    assert "adversarial loss by scale" in page.text and "gradient norms" in page.text
    assert "kid, scored in training" in page.text and "not comparable" in page.text and "23.98" in page.text
    assert all(source.startswith("data:") for source in page.sources) and "http://" not in html


def test_report_of_a_new_run_and_of_a_missing_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: young\nstages:\n  gan: {system: attngan}\n")
    assert "young" in Page(report.build_report(str(tmp_path))).text
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no run here" in capsys.readouterr().err
