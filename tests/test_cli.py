"""The command t2idist: its help texts, and unknown commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2idist import cli, run
from tests.helpers.runs import write_recipe

LINES, COLUMNS = 40, 110


def check_help(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS
    assert lines.count("example:") == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_is_short_and_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    check_help(text)
    assert text.startswith(f"usage: t2idist {name}") and f"\n  t2idist {name} " in text


def test_help_of_the_run_module_names_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    check_help(text)
    assert text.startswith("usage: python -m t2idist.run") and "\n  python -m t2idist.run attngan" in text


def test_help_lists_every_command_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (description, _) in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines].count([name, description]) == 1


def test_a_module_in_the_working_directory_is_a_system(tmp_path: Path) -> None:
    """As with the installed command, whose sys.path does not contain the working directory."""
    (tmp_path / "my_gan.py").write_text("from t2idist.systems.dcgan import Config, build\n")
    recipe = write_recipe(tmp_path, stages={"gan": {"system": "my_gan", "group_size": 4, "groups": 2, "images": 8}})
    installed = [sys.executable, "-P", "-c", "import sys; from t2idist.cli import main; sys.exit(main())"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [*installed, "train", str(recipe), "--dry-run"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "stage gan (my_gan): 2 groups x 4" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian", "error: no command 'trian'; did you mean 'train'?"),
        ("convrt", "error: no command 'convrt'; did you mean 'convert'?"),
        ("x", "error: no command 'x'"),
        ("--local", "error: no command '--local'"),
    ],
)
def test_unknown_command_suggests_the_nearest(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name]) == 2
    assert capsys.readouterr().err.splitlines()[0] == message


def test_no_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: t2idist COMMAND")


def test_train_does_what_the_run_module_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["atngan"], ["attngan", "data.sorce=emoji"]):
        assert cli.main(["train", *arguments]) == run.main(arguments) == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first == second and first.startswith("error: ")


@pytest.mark.whole
def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "t2idist.cli", "status", "/nowhere/run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "/nowhere/run: no run here" in done.stderr


def test_dispatcher_imports_no_command() -> None:
    command = "import sys, t2idist.cli; assert not {'torch', 'ray', 't2idist.run'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
