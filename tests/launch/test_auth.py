"""Joining a cluster on another machine requires a token or --insecure-cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2idist import run
from t2idist.launch import auth

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


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379", "ray://127.3.2.1:10001", ""])
def test_loopback_address_needs_no_token(address: str, tmp_path: Path) -> None:
    auth.require_token(address, {}, tmp_path)


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "head:6379", "ray://head:10001", "localhost.example.com:6379"])
def test_other_addresses_need_a_token(address: str, tmp_path: Path) -> None:
    for mode in ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        with pytest.raises(ValueError, match=r"is not on this machine and RAY_AUTH_MODE is .*--insecure-cluster"):
            auth.require_token(address, mode, tmp_path)
    auth.require_token(address, TOKEN, tmp_path)
    with pytest.raises(ValueError, match=r"auth_token: No such file.*set RAY_AUTH_TOKEN"):
        auth.require_token(address, {"RAY_AUTH_MODE": "token"}, tmp_path)
    (tmp_path / "token").write_text(" \n")
    environment = {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with pytest.raises(ValueError, match="token: is empty"):
        auth.require_token(address, environment, tmp_path)
    (tmp_path / "token").write_text("0" * 64)
    auth.require_token(address, environment, tmp_path)


def test_run_without_a_token_fails_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert run.main(["attngan", "data.source=emoji", f"storage={tmp_path}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "10.255.255.1:6379 is not on this machine" in lines[0]
    assert not list(tmp_path.iterdir())
