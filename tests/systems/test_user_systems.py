"""Systems that lie outside the package: named by a module's path, trained, and loaded again from their exports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from t2idist import config as configuration
from t2idist import systems
from t2idist.engine.metrics import read_metrics
from t2idist.sampling.loading import load_export
from tests.helpers import nan_system
from tests.helpers.runs import run_command, write_recipe
from tools.chaos.history import order_of


def test_a_name_with_a_dot_is_a_module() -> None:
    assert systems.load("tests.helpers.nan_system") is nan_system  # type: ignore[comparison-overlap]
    assert "poisoned" not in systems.names()


def test_a_module_that_is_no_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gans").mkdir()
    config = "import dataclasses\n@dataclasses.dataclass\nclass Config:\n    width: int = 1\n"
    files = {"empty": "", "plain": "class Config: pass\n", "unbuilt": config, "lacking": "import no_such_package\n"}
    for name, text in files.items():
        (tmp_path / f"gans/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for path, said in {
        "gans.empty": "the module has no Config, a dataclass of its settings",
        "gans.plain": "the module has no Config, a dataclass of its settings",
        "gans.unbuilt": r"the module has no function build\(config, plan\)",
        "gans.lacking": r"cannot be imported \(No module named 'no_such_package'\)",
        "gans.missing": r"cannot be imported \(No module named 'gans.missing'\)",
        "gans/empty.py": "not a module's dotted path, such as my_package.my_gan",
        "..gans": "not a module's dotted path",
    }.items():
        with pytest.raises(ValueError, match=f"^system: '{path}': {said}"):
            systems.load(path)
    assert not [name for name in sys.modules if name.startswith("t2idist.systems.gans")]


@pytest.mark.whole
def test_a_poisoned_step_is_skipped_and_the_export_loads_again(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    order, keys = order_of(configuration.load(str(file)), "attngan")
    words = [
        "stages.attngan.system=tests.poisoned",
        "stages.attngan.model.nan_steps=[3]",
        f"stages.attngan.model.nan_samples=['{keys[order.sample_indices(3, 1)[0]]}']",
    ]
    done = run_command(str(file), "--local", *words)
    assert done.returncode == 0, done.stderr
    stage = tmp_path / "runs/tiny/attngan"
    assert [line["guard/skipped_steps"] for line in read_metrics(str(stage))] == [0, 0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"if you trust it, give --system tests\.poisoned"):
        load_export(str(stage / "export"), torch.device("cpu"))
    loaded = load_export(str(stage / "export"), torch.device("cpu"), "tests.helpers.nan_system")
    assert loaded.name == "tests.helpers.nan_system" and isinstance(loaded.system, nan_system.Poisoned)
    assert all(value.isfinite().all() for net in loaded.nets.values() for value in net.state_dict().values())
