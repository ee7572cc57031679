"""Joining a cluster without a token gives a warning, or an error with cluster.require_token."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from t2idist import run
from t2idist.launch import auth, connection, interfaces

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}


@pytest.mark.parametrize(
    ("address", "environment", "expected"),
    [
        ("auto", {}, ""),
        ("auto", {"RAY_ADDRESS": "10.0.0.5:6379"}, "10.0.0.5:6379"),
        ("local", {"RAY_ADDRESS": "10.0.0.5:6379"}, ""),
        ("ray://head:10001", {"RAY_ADDRESS": "10.0.0.5:6379"}, "ray://head:10001"),
    ],
)
def test_cluster_address_of_config_and_environment(address: str, environment: dict[str, str], expected: str) -> None:
    assert auth.cluster_address(address, environment) == expected


def test_a_run_that_starts_ray_needs_no_token(tmp_path: Path) -> None:
    assert auth.check_cluster("", {}, tmp_path, required=True) == ""


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379", "ray://127.3.2.1:10001", "auto"])
def test_open_cluster_on_this_machine_is_joined_with_a_warning(address: str, tmp_path: Path) -> None:
    for environment, mode in (({}, "not set"), ({"RAY_AUTH_MODE": "disabled"}, "disabled")):
        warning = auth.check_cluster(address, environment, tmp_path, required=False)
        assert (
            f"the Ray cluster at {address} (this machine) is joined without a token (RAY_AUTH_MODE is {mode})"
            in warning
        )


@pytest.mark.parametrize("address", ["10.255.0.5:6379", "head:6379", "ray://head:10001", "localhost.example.com:6379"])
def test_open_cluster_elsewhere_is_joined_with_a_warning(address: str, tmp_path: Path) -> None:
    warning = auth.check_cluster(address, {"RAY_AUTH_TOKEN": "0" * 64}, tmp_path, required=False)
    assert f"the Ray cluster at {address} is joined without a token (RAY_AUTH_MODE is not set)" in warning


def test_every_interface_of_this_machine_is_this_machine() -> None:
    for address in interfaces.addresses():
        assert auth.is_this_machine(f"[{address}]:6379" if ":" in address else f"{address}:6379"), address
    assert auth.is_this_machine(f"{socket.gethostname()}:6379")
    assert not auth.is_this_machine("10.255.0.5:6379") and not auth.is_this_machine("[fd00::ffff:1")


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "10.255.0.5:6379"])
def test_required_token_refuses_every_open_cluster(address: str, tmp_path: Path) -> None:
    for environment in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        with pytest.raises(ValueError, match=r"cluster.require_token: true, but RAY_AUTH_MODE is .* at .*; start it"):
            auth.check_cluster(address, environment, tmp_path, required=True)
    assert auth.check_cluster(address, TOKEN, tmp_path, required=True) == ""


def test_token_mode_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"auth_token: No such file.*set RAY_AUTH_TOKEN"):
        auth.check_cluster("head:6379", {"RAY_AUTH_MODE": "token"}, tmp_path, required=False)
    (tmp_path / "token").write_text(" \n")
    environment = {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with pytest.raises(ValueError, match="token: is empty"):
        auth.check_cluster("head:6379", environment, tmp_path, required=False)
    (tmp_path / "token").write_text("0" * 64)
    assert auth.check_cluster("head:6379", environment, tmp_path, required=True) == ""


def test_run_with_a_required_token_fails_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    command = ["attngan", "data.source=emoji", f"storage={tmp_path}", "cluster.require_token=true"]
    for more in ([], ["--dry-run"]):
        assert run.main([*command, *more]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "10.255.255.1:6379; start it with RAY_AUTH_MODE=token" in lines[0]
        assert run.main([*command, *more, "--insecure-cluster"]) == 2, "it leaves out the warning, not the check"
        assert "cluster.require_token: true, but RAY_AUTH_MODE is not set" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.whole
def test_cluster_that_the_process_is_connected_to_is_checked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a notebook that has called ray.init()."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    command = ["attngan", "data.source=emoji", f"storage={tmp_path / 'runs'}", "cluster.require_token=true"]
    with connection.start_workers(1, 0):
        for more in ([], ["--dry-run"], ["--insecure-cluster"]):
            assert run.main([*command, *more]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "RAY_AUTH_MODE is disabled for the Ray cluster at" in error
    assert auth.joined_address() == "" and not (tmp_path / "runs").exists()


def test_dry_run_warns_of_an_open_cluster_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    command = ["attngan", "data.source=emoji", f"storage={tmp_path}", "--dry-run"]
    assert run.main([*command, "--insecure-cluster"]) == 0
    assert caplog.messages == []
    assert run.main(command) == 0
    (message,) = caplog.messages
    assert message.startswith("the Ray cluster at 10.255.255.1:6379 is joined without a token")
