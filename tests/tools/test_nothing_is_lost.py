"""Tools and converters overwrite none of their inputs, and no other result."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from t2idist import storage
from t2idist.convert import cli as convert
from t2idist.evaluate.earlier_scores import keep_rows
from tests.helpers import small_systems
from tests.helpers.shard_sets import make_sample, write_set
from tests.sampling.conftest import WORDS
from tools import check_shards, embed_captions, shard_folder

Capture = pytest.CaptureFixture[str]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_contact_sheet_is_no_file_of_the_set(tmp_path: Path, capsys: Capture) -> None:
    write_set(tmp_path / "set", [make_sample(number) for number in range(3)])
    before = contents(tmp_path)
    for name in ("manifest.parquet", "dataset.json", "train-00000.tar"):
        sheet = str(tmp_path / "set" / name)
        assert check_shards.main([str(tmp_path / "set"), "--sheet", sheet, "--processes", "1"]) == 2
        assert f"{sheet}: is an input of this command, which it would overwrite; give another --sheet" in (
            capsys.readouterr().err
        )
    assert contents(tmp_path) == before


def test_vectors_are_not_written_into_their_own_set(tmp_path: Path, capsys: Capture) -> None:
    write_set(tmp_path / "set", [make_sample(number) for number in range(3)])
    before = contents(tmp_path)
    url = str(tmp_path / "set")
    for restart in ([], ["--restart"]):
        assert embed_captions.main(["--data", url, "--to", f"{url}/", "--encoder", "x/y", *restart]) == 2
        assert "is also --data, which is copied; use another folder" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_shards_are_not_written_over_the_tars_that_they_are_made_of(tmp_path: Path, capsys: Capture) -> None:
    write_set(tmp_path / "made", [make_sample(number) for number in range(3)])
    (tmp_path / "own").mkdir()
    shutil.copy(tmp_path / "made/train-00000.tar", tmp_path / "own/train-00000.tar")
    assert tarfile.is_tarfile(tmp_path / "own/train-00000.tar")
    before = contents(tmp_path)
    own = str(tmp_path / "own")
    assert shard_folder.main(["--folder", own, "--out", own, "--size", "16", "--processes", "1"]) == 2
    assert "is also the input, whose train-00000.tar would be overwritten" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_convert_export_writes_over_no_file_of_the_user(tmp_path: Path, capsys: Capture) -> None:
    small_systems.write_export("damsm", str(tmp_path / "export"), WORDS)
    for name in ("README.md", "vocabulary.txt", "text.safetensors"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        assert convert.main(["export", "--export", str(tmp_path / "export"), "--to", str(folder)]) == 2
        assert f"already contains {name}; use another folder" in capsys.readouterr().err
        assert contents(folder) == {name: b"mine"}
    assert convert.main(["export", "--export", str(tmp_path / "export"), "--to", str(tmp_path / "export")]) == 2
    assert convert.main(["export", "--export", str(tmp_path / "export"), "--to", str(tmp_path / "free")]) == 0


def test_other_rows_of_a_run_folder_are_kept(tmp_path: Path) -> None:
    rows = [{"name": "hat", "value": 0.5}]
    assert keep_rows(str(tmp_path), rows) is None
    storage.write_json(str(tmp_path / "scores.json"), rows)
    assert keep_rows(str(tmp_path), rows) is None, "the same scores again"
    other = [{"name": "hat", "value": 0.75}]
    for number in (1, 2):
        kept = keep_rows(str(tmp_path), other)
        assert kept == str(tmp_path / f"scores-{number}.json") and storage.read_json(kept) == rows
