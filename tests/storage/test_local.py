"""Local files: an error is the operating system's, not a store's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from t2idist import storage


def test_remove_removes_files_folders_and_links_but_not_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "folder/inner/a[b]*").write_text("x")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    os.symlink(tmp_path / "kept", tmp_path / "link")
    for name in ("folder/inner/a[b]*", "folder", "link", "missing"):
        storage.remove(str(tmp_path / name))
        storage.remove(f"file://{tmp_path}/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/file").exists()


def test_file_that_cannot_be_removed_is_named_as_the_system_does() -> None:
    with pytest.raises(PermissionError) as caught:
        storage.remove("/proc/version")
    assert str(caught.value.filename) == "/proc/version"
    assert caught.value.strerror in ("Permission denied", "Operation not permitted")
