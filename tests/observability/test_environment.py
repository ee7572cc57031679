"""The recorded environment of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2idist.observability import environment


def test_commit_is_known_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(environment.environment_info(1, torch.device("cpu"))["git"]) <= set("0123456789abcdef+")
    monkeypatch.setattr(environment.t2idist, "__file__", str(tmp_path / "t2idist/__init__.py"))
    assert environment.environment_info(1, torch.device("cpu"))["git"] == "unknown"
    monkeypatch.setenv("T2IDIST_GIT", "5707fd98dd7d+")
    assert environment.environment_info(1, torch.device("cpu"))["git"] == "5707fd98dd7d+"
