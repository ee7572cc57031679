from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.worker_processes import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small recipe and its run, which is done; not to be changed."""
    from tests.helpers.runs import run_command, write_recipe

    folder = tmp_path_factory.mktemp("finished")
    done = run_command(str(write_recipe(folder)), "--local")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True, scope="session")
def _begin_with_one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _go_on_with_one_thread() -> Iterator[None]:
    """After commands that set their own: two threads beside another process take thirty times as long."""
    yield
    torch.set_num_threads(1)


class _Absent(types.ModuleType):
    """A module of which everything can be imported and nothing works."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="session")
def fidelity() -> None:
    """torch-fidelity can be imported; what it takes of torchvision, which is not installed, is used by no test."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = _Absent(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        import torch_fidelity.metrics

        assert torch_fidelity.metrics is not None
    finally:
        for name in names:
            del sys.modules[name]
