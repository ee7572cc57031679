"""`t2idist convert`, and the tools that call it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from t2idist.convert.cli import main
from t2idist.sampling.loading import load_export
from tests.convert.author_files import CPU, SMALL, make_vocabulary, make_weights, write_weights
from tools import import_weights


def test_import_writes_exports_and_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = make_vocabulary(60)
    text = write_weights(tmp_path, "text.pth", make_weights(SMALL["damsm/text_encoder"]))
    generator = write_weights(tmp_path, "g.pth", make_weights(SMALL["attngan/netG"]))
    (tmp_path / "words.txt").write_text("\n".join(vocabulary.words) + "\n")
    (tmp_path / "captions.pickle").write_bytes(
        pickle.dumps([[], [], dict(enumerate(vocabulary.words)), vocabulary.ids], 2)
    )
    arguments = ["--system", "attngan", "--from", text, "--from", generator]
    for i, (option, file) in enumerate((("--captions", "captions.pickle"), ("--vocabulary", "words.txt"))):
        more = [option, str(tmp_path / file), "--to", str(tmp_path / f"out{i}"), "--max-words", "12"]
        if i:
            assert main(["import", *arguments, *more]) == 0
        else:
            assert import_weights.main([*arguments, *more]) == 0
        assert "generator 509,352, text 103,504" in capsys.readouterr().out
        loaded = load_export(str(tmp_path / f"out{i}" / "attngan"), CPU)
        assert loaded.vocabulary == vocabulary and loaded.build_info.max_words == 12
    assert main(["import", *arguments, "--to", str(tmp_path / "out2")]) == 2
    assert "has a vocabulary of 60 words" in capsys.readouterr().err and not (tmp_path / "out2").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["import", "--help"], ["export", "--help"]])
def test_help_texts_are_short_and_have_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 110 and "example:" in lines
