"""Fixtures that several test folders use."""

from __future__ import annotations

import signal
import stat
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.worker_processes import Workers

# a shell starts background jobs with SIGINT ignored, and so would be the processes of the tests
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with long tests first, so that the two processes of ``make test`` end at about the same time."""
    long = {item.path for item in items if item.get_closest_marker("whole")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    processes = Workers()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small recipe and its finished run; tests must not change it."""
    from tests.helpers.runs import run_command, write_recipe

    folder = tmp_path_factory.mktemp("finished")
    done = run_command(str(write_recipe(folder)), "--local")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True, scope="session")
def _start_with_one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reset_to_one_thread() -> Iterator[None]:
    """Undo what commands set: with another busy process, two threads are thirty times slower."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def hook_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hook that writes its events and environment to files `events` and `environment` next to it."""
    program = tmp_path / "hook_program"
    program.write_text(
        f"#!/bin/sh\ncat >> {tmp_path}/events; env > {tmp_path}/environment; exit $T2IDIST_HOOK_STATUS\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("T2IDIST_HOOK_STATUS", "0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret of the environment")
    return program


class _StubModule(types.ModuleType):
    """A module that provides any name as an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="session")
def fidelity() -> None:
    """Make torch-fidelity importable without torchvision, of which no test uses anything."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = _StubModule(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        import torch_fidelity.metrics

        assert torch_fidelity.metrics is not None
    finally:
        for name in names:
            del sys.modules[name]
