"""The command: what it refuses, and that it serves what the wheel holds."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2idist.sampling import sample
from t2idist.serve import cli, local
from tests.helpers.served import Client, command
from tests.helpers.wheel import install_wheel
from tests.sampling.conftest import FIRST

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, *arguments: str) -> str:
    """Run the command, which must end with status 2 and one sentence; returns it."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_misuse_is_answered_in_a_sentence(
    served: dict[str, str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cli.TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    export = ["--local", "--export", served["attngan"]]
    assert "damsm: this export does not generate images" in refused(capsys, "--local", "--export", served["damsm"])
    assert "nowhere" in refused(capsys, "--local", "--export", str(tmp_path / "nowhere"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for local in (["--local"], []):
            sentence = refused(capsys, *local, "--export", served["attngan"], "--port", port)
            assert f"--port {port}: Address already in use; give another --port" in sentence
    assert "--port 70000: give a port from 1 to 65535, or 0" in refused(capsys, *export, "--port", "70000")
    monkeypatch.setenv(cli.TOKEN_VARIABLE, "a-token-of-20-letters")
    for host in ("203.0.113.1", "a..b"):  # an address for documentation, and no valid name
        assert "give another --host, an address of this machine" in refused(capsys, *export, "--host", host)
    monkeypatch.delenv(cli.TOKEN_VARIABLE)
    assert "other machines could draw" in refused(capsys, *export, "--host", "0.0.0.0")
    short = tmp_path / "short"
    short.write_text("short\n")
    assert "give at least 16 ASCII characters" in refused(capsys, *export, "--token-file", str(short))
    (tmp_path / "binary").write_bytes(b"\xff" * 20)
    for file, sentence in (
        ("none", "none: No such file or directory; give a file that holds the token"),
        (".", "Is a directory; give a file that holds the token"),
        ("binary", "binary: give at least 16 ASCII characters"),
    ):
        assert sentence in refused(capsys, *export, "--token-file", str(tmp_path / file))
    assert "--device meta: not available" in refused(capsys, *export, "--device", "meta")
    assert "--max-images 0: give at least 1" in refused(capsys, *export, "--max-images", "0")
    assert "more than --queue 8 holds" in refused(capsys, *export, "--queue", "8", "--max-images", "9")
    assert "are for Ray; remove them or --local" in refused(capsys, *export, "--replicas", "2")
    assert "is for Ray; remove it or --local" in refused(capsys, *export, "--cpus-per-replica", "2")
    assert "--encoder" in refused(capsys, *export, "--encoder", "minilm")
    assert "this machine has 0 GPUs" in refused(
        capsys, "--export", served["attngan"], "--port", "0", "--gpus-per-replica", "0.5"
    )


def test_a_missing_extra_is_named_with_its_command(
    served: dict[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    sentence = refused(capsys, "--local", "--export", served["attngan"])
    assert "install them with: pip install 't2idist[serve]'" in sentence


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_address_that_is_printed_is_a_url(
    served: dict[str, str], capsys: Capture, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 on this machine")
    monkeypatch.setattr(local, "serve", lambda app, sock: sock.close())
    assert cli.main(["--local", "--export", served["attngan"], "--host", host, "--port", "0"]) == 0
    assert re.search(r" at http://\[::1\]:\d+ ", capsys.readouterr().out)


@pytest.mark.whole
def test_the_command_of_the_wheel_serves_and_ends(served: dict[str, str], home: Path, tmp_path: Path) -> None:
    site = install_wheel(tmp_path / "wheel")
    token = tmp_path / "token"
    token.write_text("a token of 20 letters".replace(" ", "-"))
    options = ["--local", "--export", served["attngan"], "--token-file", str(token)]
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(home)}
    words = [sys.executable, "-P", "-m", "t2idist.cli", "serve", "--port", "0", *options]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        client = Client(line.split()[3], {"Authorization": f"Bearer {token.read_text()}"})
        for path in ("/", "/page.js", "/page.css"):
            assert len(client.ask(path).body) > 2000
        assert Client(client.url).ask("/model").status == 401
        drawn = client.draw(text=FIRST, n=2).files
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130, -signal.SIGINT)
    out = tmp_path / "out"
    assert sample.main(["--export", served["attngan"], "--text", FIRST, "--n", "2", "--out", str(out)]) == 0
    assert [files[0] for files in drawn] == [file.read_bytes() for file in sorted(out.glob("0*.png"))]


@pytest.mark.whole
def test_a_token_is_in_no_output(served: dict[str, str], home: Path) -> None:
    token = "a-very-secret-token"
    export = ["--local", "--export", served["attngan"]]
    with command(home, *export, **{cli.TOKEN_VARIABLE: token}) as (client, _):
        assert client.ask("/model", Authorization=f"Bearer {token}").status == 200
        assert client.ask("/draw", {"text": "zzz"}, Authorization=f"Bearer {token}").status == 422
        assert client.ask("/model", Authorization="Bearer wrong").status == 401
    assert token not in (home / "serve.log").read_text()
