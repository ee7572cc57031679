"""Exports of small untrained networks to serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import small_systems, toy_gan
from tests.sampling.conftest import WORDS

DRAWING = (
    "attngan",
    "attngan-authors",
    "stackgan_pp",
    "mirrorgan",
    "dm_gan",
    "df_gan",
    "gan_cls",
    "stackgan-2",
    "dcgan",
)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of exports by label, in which the text changes the image."""
    folder = tmp_path_factory.mktemp("served")
    urls = {name: str(folder / name) for name in (*DRAWING, "damsm", "stargan", "cyclegan")}
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWING:
            if "residuals" in small_systems.MODELS[name] and "branches" in small_systems.MODELS[name]:
                patch.setitem(small_systems.MODELS, name, {**small_systems.MODELS[name], "unit_text": True})
        for name, url in urls.items():
            data = toy_gan.TWO_DOMAINS if name == "stargan" else small_systems.DATA_WITHOUT_VECTORS
            small_systems.write_export(name, url, WORDS, data)
    return urls


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")
