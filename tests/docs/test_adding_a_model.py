"""docs/adding_a_model.md, run as it stands, with a smaller budget."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs/adding_a_model.md"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return [block for of_language, block in found if of_language == language]


@pytest.mark.whole
def test_the_page_gives_a_trained_model(tmp_path: Path) -> None:
    (model,) = blocks("python")
    (recipe,) = blocks("yaml")
    create, commands = blocks("")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}

    def run(words: list[str]) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    for line in create.splitlines():
        run(shlex.split(line))
    assert (tmp_path / "my_gans/tiny_gan.py").read_text() == ""
    (tmp_path / "my_gans/tiny_gan.py").write_text(model)
    (tmp_path / "tiny_gan.yaml").write_text(recipe)
    cli = [sys.executable, "-P", "-c", "import sys; from t2idist.cli import main; sys.exit(main())"]  # as installed
    small = ["data.samples=128", f"data.cache={tmp_path}/cache", "stages.gan.images=256"]
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[0] == "t2idist"
        run([*cli, *words[1:], *(small if words[1] == "train" else [])])
    image = Image.open(next((tmp_path / "samples").glob("001_*_01.png")))
    assert image.size == (64, 64) and len(image.getcolors(64 * 64) or []) > 16
    assert (tmp_path / "runs/tiny-gan/report.html").exists()
