"""Model cards, what is published of an export, and exports in the local cache of the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import t2idist
from t2idist import storage
from t2idist.convert.cli import main
from t2idist.sampling import sample
from tests.helpers import small_systems, toy_gan
from tests.helpers.hub_server import hub_server
from tests.helpers.mlflow_server import free_port
from tests.helpers.runs import ROOT

WORDS = ["<end>", "a", "red", "heart", *(f"word{i}" for i in range(toy_gan.VOCABULARY_SIZE - 4))]
LICENCE = "drawings | by <b>Ann</b>; MIT"


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The folder of a stage with an export, sample images and scores."""
    folder = tmp_path / "runs/hearts/attngan"
    small_systems.write_export("attngan", str(folder / "export"), WORDS)
    index = json.loads((folder / "export/export.json").read_text())
    index |= {"data": {"source": "my drawings", "licence": LICENCE}, "versions": {"torch": "2.13.0", "cpu": "x"}}
    (folder / "export/export.json").write_text(json.dumps(index))
    (folder / "pictures").mkdir()
    for images in (8, 16):
        (folder / f"pictures/images_{images:09d}.png").write_bytes(b"png %d" % images)
    protocol = {"seed": 0, "export": "/home/ann/runs", "export_sha256": _sha256(folder / "export/export.json")}
    protocol["extractors"] = [{"name": "inception-v3", "weights": "/home/ann/w"}]
    rows = [{"name": "kid", "value": 0.0123456, "standard_error": 0.001}]
    (folder / "scores").mkdir()
    (folder / "scores/scores.json").write_text(json.dumps({"protocol": protocol, "scores": rows}))
    return folder


def _sha256(file: Path) -> str:
    return storage.sha256(file.read_bytes())


def push(stage: Path, to: str, *options: str) -> int:
    return main(["push", "--export", str(stage / "export"), "--to", to, *options])


def test_a_folder_has_weights_and_a_card(stage: Path, tmp_path: Path) -> None:
    to = tmp_path / "published"
    assert push(stage, str(to), "--licence", "cc-by-4.0", "--dataset", "ann/drawings") == 0
    assert {file.name for file in to.iterdir()} == {
        "README.md", "samples.png", "export.json", "generator.safetensors", "text.safetensors"
    }  # fmt: skip
    assert (to / "samples.png").read_bytes() == b"png 16"
    _, metadata, text = (to / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "cc-by-4.0",
        "library_name": "t2idist",
        "pipeline_tag": "text-to-image",
        "tags": ["t2idist", "gan", "attngan"],
        "datasets": ["ann/drawings"],
    }
    assert f't2idist sample --export {to} --text "..."' in text and "![sample images" in text
    assert "| kid | 0.01235 | 0.001 |" in text and "- extractors: inception-v3" in text
    assert "drawings by b Ann /b ; MIT" in text and "/home/ann" not in text
    assert len(t2idist.load(to).draw("a red heart", n=2)) == 2


def test_scores_of_another_export_are_left_out(stage: Path, tmp_path: Path) -> None:
    index = json.loads((stage / "export/export.json").read_text())
    (stage / "export/export.json").write_text(json.dumps({**index, "images": 9}))
    assert push(stage, str(tmp_path / "published")) == 0
    assert "Not scored." in (tmp_path / "published/README.md").read_text()


def test_the_licence_of_the_data_must_be_known(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stage / "export/export.json"
    index = json.loads(file.read_text())
    index["data"]["licence"] = "not said; not said"
    file.write_text(json.dumps(index))
    assert push(stage, str(tmp_path / "published")) == 2
    assert "--data-licence TEXT" in capsys.readouterr().err and not (tmp_path / "published").exists()
    assert push(stage, str(tmp_path / "published"), "--data-licence", "CC0") == 0
    assert push(stage, str(tmp_path / "published"), "--data-licence", "CC0") == 2
    assert "is not empty" in capsys.readouterr().err


def test_pickles_are_refused(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = stage / "export/export.json"
    index = json.loads(file.read_text())
    index["networks"]["text"]["file"] = "text.bin"
    file.write_text(json.dumps(index))
    (stage / "export/text.safetensors").rename(stage / "export/text.bin")
    assert push(stage, str(tmp_path / "published")) == 2
    assert "a pickle can run code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="only .safetensors, .* are read from the Hub"):
        storage.read_bytes("hf://ann/hearts/pytorch_model.bin")


def in_cache(stage: Path, home: Path) -> None:
    """Put an export into a cache of the Hub, as a download does."""
    repository, commit = home / "hub/models--ann--hearts", "0123456789" * 4
    shutil.copytree(stage / "export", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)


def without_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT set: a cache, and a port where nothing listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")


def test_exports_are_read_from_the_cache(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_cache(stage, tmp_path)
    without_hub(tmp_path, monkeypatch)
    ours, theirs = t2idist.load(stage / "export"), t2idist.load("hf://ann/hearts")
    assert ours.draw("a red heart")[0].tobytes() == theirs.draw("a red heart")[0].tobytes()
    out = str(tmp_path / "out")
    assert sample.main(["--export", "hf://ann/hearts@main", "--text", "a red heart", "--out", out]) == 0
    assert sample.main(["--export", "hf://ann/other", "--text", "a red heart", "--out", out]) == 1
    assert "hf://ann/other/export.json: not in the local cache" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_hub(tmp_path, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    assert push(stage, "hf://ann/hearts") == 1
    error = capsys.readouterr().err
    assert error.startswith("t2idist convert push: hf://ann/hearts: ") and error.count("\n") == 1
    assert "hf_secret" not in error
    for wrong, sentence in (
        ("hf://hearts", "expected hf://USER/NAME"),
        ("hf://ann/hearts/more", "give a repository: hf://USER/NAME"),
        ("https://huggingface.co/ann/hearts", "give a repository as hf://USER/NAME, or a folder"),
    ):
        assert push(stage, wrong) == 2
        assert sentence in capsys.readouterr().err
    for option, value in (
        ("--licence", ""),
        ("--licence", "mit\nx: y"),
        ("--dataset", "birds"),
        ("--dataset", "a/b/c"),
    ):
        assert push(stage, str(tmp_path / "card"), option, value) == 2
        assert f"{option} {value!r}: not a name of the Hub; give one such as " in capsys.readouterr().err
    assert not (tmp_path / "card").exists()
    with pytest.raises(ValueError, match="hf://hearts/export.json: expected hf://USER/NAME"):
        t2idist.load("hf://hearts")


@pytest.mark.parametrize("status", [401, 403])
def test_a_push_without_login_is_told_how_to_log_in(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = RuntimeError(f"{status} Client Error")
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    assert push(stage, "hf://ann/hearts") == 2
    error = capsys.readouterr().err
    assert f"hf://ann/hearts: the Hub refuses access (status {status}); log in with hf auth login" in error


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(ValueError, match=r"pip install 't2idist\[hub\]'"):
        t2idist.load("hf://ann/hearts")


@pytest.mark.whole
def test_an_export_goes_to_the_hub_and_comes_back(stage: Path, tmp_path: Path) -> None:
    """With the real client, and a server on loopback that speaks the Hub's API."""
    token = "hf_secret_of_the_environment"
    with hub_server() as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}

        def command(*words: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "t2idist.cli", *words],
                cwd=ROOT,
                env={**environment, "HF_HUB_OFFLINE": offline},
                capture_output=True,
                text=True,
                check=False,
            )

        done = command("convert", "push", "--export", str(stage / "export"), "--to", "hf://ann/hearts", "--private")
        assert done.returncode == 0, done.stderr
        assert f"{server.url}/ann/hearts/commit/" in done.stdout and token not in done.stdout + done.stderr
        assert server.private == {"ann/hearts": True} and server.tokens == {f"Bearer {token}"}
        files = server.files["ann/hearts"]
        assert files.keys() == {"README.md", "samples.png", "export.json", "generator.safetensors", "text.safetensors"}
        assert files["generator.safetensors"] == (stage / "export/generator.safetensors").read_bytes()
        assert b"t2idist sample --export hf://ann/hearts" in files["README.md"] and token.encode() not in b"".join(
            files.values()
        )
        sampling = ["sample", "--export", "hf://ann/hearts", "--text", "a red heart", "--out"]
        done = command(*sampling, str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr
        missing = command("sample", "--export", "hf://ann/none", "--text", "a red heart")
        assert missing.returncode == 2 and missing.stderr.startswith("sample: hf://ann/none")
    done = command(*sampling, str(tmp_path / "again"), offline="1")  # the server is gone
    assert done.returncode == 0, done.stderr
    names = [file.name for file in (tmp_path / "out").iterdir()]
    assert names and all((tmp_path / "out" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
