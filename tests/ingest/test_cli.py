"""Help texts of the tools that write and check shard sets."""

from __future__ import annotations

import importlib

import pytest

TOOLS = ["shard_celeba", "shard_coco", "shard_cub", "shard_folder", "check_shards", "embed_captions"]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_texts_are_short_and_have_an_example(tool: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.{tool}").main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 110 and "example:" in lines
