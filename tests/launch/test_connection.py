"""A Ray cluster that a run starts for itself is protected and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from t2idist.config import ClusterConfig
from t2idist.launch import connection

JOIN = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)"


def joins(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Try to join a cluster from another process."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-c", JOIN, address]
    return subprocess.run(
        command, env={**others, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.whole
def test_own_cluster_has_a_token_of_its_own_that_ends_with_it(home: Path) -> None:
    with connection.start_local_cluster(ClusterConfig(), lambda: "prepared") as prepared:
        assert prepared == "prepared"
        file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        token = file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
        open_door = joins(ray.get_runtime_context().gcs_address)
        assert open_door.returncode != 0 and "AuthenticationError" in open_door.stderr, open_door.stderr
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
    assert list(home.iterdir()) == [] and not file.parent.exists()
    assert not {name for name in os.environ if name.startswith("RAY_AUTH_")}
    with connection._authentication(required=False):  # the next cluster has another token
        next_token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert len(token) == len(next_token) == 64 and token != next_token


def test_the_users_own_token_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with connection._authentication(required=False):
        assert os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert "RAY_AUTH_MODE" not in os.environ and list(home.iterdir()) == []


def test_the_user_may_switch_the_token_off_unless_it_is_required(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with connection._authentication(required=False):
        assert os.environ["RAY_AUTH_MODE"] == "disabled" and list(home.iterdir()) == []
    with connection._authentication(required=True):
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_ray_that_does_not_start_is_answered_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(RuntimeError, match="Ray did not start; try again when this machine is less busy: The current"),
        connection.start_ray(1, with_gpus=False),
    ):
        pass
