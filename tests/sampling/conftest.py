"""Exports of small untrained networks, and the sentences that the tests of sampling use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import small_systems, toy_gan

WORDS = ["<end>", "a", "red", "blue", "heart", "face", *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 6))]
FIRST, SECOND = "a red heart", "a blue face word1"
ROUNDING = 1e-6


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of exports of untrained small networks, by system; "unconditional" is StackGAN++ without text."""
    folder = tmp_path_factory.mktemp("exports")
    urls = {name: str(folder / name) for name in ("damsm", "attngan", "stackgan_pp", "unconditional")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            small_systems.MODELS, "attngan", {**small_systems.MODELS["attngan"], "unit_text": True}
        )  # so that the text changes the image
        for name in ("damsm", "attngan", "stackgan_pp"):
            small_systems.write_export(name, urls[name], WORDS)
        patch.setitem(
            small_systems.MODELS, "stackgan_pp", {**small_systems.MODELS["stackgan_pp"], "conditional": False}
        )
        patch.setitem(small_systems.USES, "stackgan_pp", {})
        small_systems.write_export("stackgan_pp", urls["unconditional"], WORDS)
    return urls


def write_image(path: Path, pixels: np.ndarray) -> str:
    """Write pixels (H, W, 3) as an image file and return its path."""
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)
