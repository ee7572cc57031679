"""Custom systems: modules outside the package, trained and loaded from their exports."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from t2idist import config as configuration
from t2idist import systems
from t2idist.engine.metrics import read_metrics
from t2idist.sampling.loading import load_export
from t2idist.systems import dcgan
from tests.helpers import nan_system, small_systems
from tests.helpers.runs import run_command, write_recipe
from tools.chaos.history import order_of


def test_dotted_name_loads_a_module() -> None:
    assert systems.load("tests.helpers.nan_system") is nan_system  # type: ignore[comparison-overlap]
    assert "nan_system" not in systems.names()


CUSTOM = """
from t2idist.systems import dcgan

Config = dcgan.Config
build = dcgan.build
"""


@pytest.fixture
def my_gan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module my_gan on the path, not yet imported."""
    (tmp_path / "my_gan.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_gan", raising=False)
    return "my_gan"


def test_plain_name_loads_a_module_on_the_path(my_gan: str) -> None:
    assert systems.is_custom(my_gan) and my_gan not in sys.modules
    assert systems.load(my_gan).Config is systems.load("dcgan").Config
    assert my_gan not in systems.names()


def test_published_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dcgan.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert not systems.is_custom("dcgan") and systems.load("dcgan") is dcgan  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("atngan", "no such system; did you mean 'attngan'[?] There are attngan, .*, and custom modules"),
        ("quite_another", "no such system; there are attngan, .*, and custom modules"),
        ("_tree_gan", "no such system"),
        ("my-gan", "no such system"),
        ("", "no such system"),
    ],
)
def test_unknown_name_suggests_the_nearest_system(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^system: '{name}': {message}"):
        systems.load(name)


def test_export_of_a_custom_system_needs_its_name(my_gan: str, tmp_path: Path) -> None:
    url = str(tmp_path / "export")
    small_systems.write_export("dcgan", url, ["<end>", *"abcdefgh"])
    index = json.loads((tmp_path / "export/export.json").read_text())
    (tmp_path / "export/export.json").write_text(json.dumps({**index, "system": my_gan}))
    for custom_system in ("", "other_gan"):
        with pytest.raises(ValueError, match="is of the custom system 'my_gan', .* give --system my_gan"):
            load_export(url, torch.device("cpu"), custom_system)
    assert my_gan not in sys.modules, "its code has not run"
    assert load_export(url, torch.device("cpu"), my_gan).name == my_gan


def test_load_rejects_modules_that_are_no_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gans").mkdir()
    config = "import dataclasses\n@dataclasses.dataclass\nclass Config:\n    width: int = 1\n"
    files = {"empty": "", "plain": "class Config: pass\n", "unbuilt": config, "lacking": "import no_such_package\n"}
    for name, text in files.items():
        (tmp_path / f"gans/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for path, message in {
        "gans.empty": "the module has no dataclass Config",
        "gans.plain": "the module has no dataclass Config",
        "gans.unbuilt": r"the module has no function build\(config, info\)",
        "gans.lacking": r"cannot be imported \(No module named 'no_such_package'\)",
        "gans.missing": r"cannot be imported \(No module named 'gans.missing'\)",
        "gans/empty.py": "not a module path, such as my_package.my_gan",
        "..gans": "not a module path",
    }.items():
        with pytest.raises(ValueError, match=f"^system: '{path}': {message}"):
            systems.load(path)
    assert not [name for name in sys.modules if name.startswith("t2idist.systems.gans")]


@pytest.mark.whole
def test_nan_step_is_skipped_and_the_export_loads(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    order, keys = order_of(configuration.load(str(file)), "attngan")
    words = [
        "stages.attngan.system=tests.helpers.nan_system",
        "stages.attngan.model.nan_steps=[3]",
        f"stages.attngan.model.nan_samples=['{keys[order.sample_indices(3, 1)[0]]}']",
    ]
    result = run_command(str(file), "--local", *words)
    assert result.returncode == 0, result.stderr
    stage = tmp_path / "runs/tiny/attngan"
    assert [line["guard/skipped_steps"] for line in read_metrics(str(stage))] == [0, 0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"if you trust it, give --system tests\.helpers\.nan_system"):
        load_export(str(stage / "export"), torch.device("cpu"))
    loaded = load_export(str(stage / "export"), torch.device("cpu"), "tests.helpers.nan_system")
    assert loaded.name == "tests.helpers.nan_system" and isinstance(loaded.system, nan_system.NanAttnGan)
    assert all(value.isfinite().all() for net in loaded.nets.values() for value in net.state_dict().values())
