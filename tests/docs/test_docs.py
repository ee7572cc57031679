"""README, docs and the cluster guide: quoted commands parse, links resolve, config keys exist, words keep one sense."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2idist import cli, systems
from t2idist import config as configuration
from t2idist.config import DataConfig, RunConfig, StageConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PROGRAMS = ("t2idist", ".venv/bin/t2idist", "python", "cluster/submit.sh", "ray", "make")


class Parsed(Exception):
    """Stops a program as soon as it has parsed its arguments."""


def commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every shell command in the fenced blocks and inline code of a page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    for block in [block for language, block in blocks if language in ("", "sh", "bash")]:
        for line in block.replace("\\\n", " ").splitlines():
            yield from _split(line.removeprefix("$ "))
    for span in re.findall(r"`([^`]+)`", without_blocks(text)):
        if " " in span:
            yield from _split(" ".join(span.split()))


def without_blocks(text: str) -> str:
    """Remove the fenced blocks of a page."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def _split(line: str) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return
    words = [word for word in words if word not in ("sudo", "nohup", "&")]
    while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):
        words = words[1:]
    if words and words[0] in PROGRAMS:
        yield words


def quoted_commands() -> list[tuple[str, list[str]]]:
    found = [
        (name, words) for name, page in zip(PAGE_NAMES, PAGES, strict=True) for words in commands(page.read_text())
    ]
    return [(name, words) for name, words in found if not any(word in ("RECIPE", "[options]") for word in words)]


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = words[0].rpartition("/")[2] if words[0].endswith("t2idist") else words[0]
    partial = len(words) == 2 or "..." in words  # names a command, or leaves out arguments
    rest = [word for word in words[1:] if word != "..."]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets or "=" in word for word in rest), words
    elif program == "t2idist":
        if rest[0] == "train":
            check_training(rest[1:])
        elif not rest[0].startswith("-"):
            check_parses(lambda: cli.main(rest), monkeypatch, partial=partial)
    elif program == "python" and rest[:2] == ["-m", "t2idist.run"]:
        check_training(rest[2:])
    elif program == "python" and rest[:2] == ["-m", "t2idist.cli"]:
        check_command(["t2idist", *rest[2:]], monkeypatch)
    elif program == "python" and rest[0].endswith(".py"):
        tool = ROOT / rest[0]
        assert tool.is_file(), f"{rest[0]} does not exist"
        monkeypatch.setattr(sys, "argv", rest)
        monkeypatch.setattr(sys, "path", [str(tool.parent), *sys.path])
        check_parses(lambda: runpy.run_path(str(tool), run_name="__main__"), monkeypatch, partial=partial)
    elif program == "cluster/submit.sh":
        check_training(rest[1:])
    elif program == "ray" and "t2idist.run" in rest:
        check_training(rest[rest.index("t2idist.run") + 1 :])


def check_parses(run: Any, monkeypatch: pytest.MonkeyPatch, *, partial: bool = False) -> None:
    """Run a program until it has parsed its arguments. partial: required arguments may be missing."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        for action in self._actions:
            action.required = action.required and not partial
        for group in self._mutually_exclusive_groups:
            group.required = group.required and not partial
        namespace, unknown = original(self, *arguments, **options)
        if any(action.nargs == argparse.SUPPRESS for action in self._get_positional_actions()):
            return namespace, unknown  # the first pass of parse_intermixed_args
        assert not unknown, f"unknown arguments {unknown}"
        if self.prog == "t2idist convert":  # passes the rest on to the parser of its own command
            return namespace, unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        run()
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", original)


def check_training(arguments: list[str]) -> None:
    """Parse a training command and load its config, so that every key and value is checked."""
    from t2idist import run

    parsed = run.parser().parse_intermixed_args(arguments)
    if parsed.recipe is None or parsed.recipe.endswith(".yaml"):
        return
    overrides = [re.sub(r"=(NAME|ANOTHER|URL)$", "=x", setting) for setting in parsed.settings]
    configuration.load(parsed.recipe, [setting for setting in overrides if "..." not in setting])


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)[:80]}") for p, w in quoted_commands()]
)
def test_quoted_command_parses(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(words, monkeypatch)


def test_commands_are_found() -> None:
    programs = [words[0] for _, words in quoted_commands()]
    assert programs.count("t2idist") > 20 and programs.count("python") > 15 and programs.count("make") > 5


def test_a_wrong_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("t2idist train attngan stages.attngan.images_=3", "t2idist train atngan", "python tools/nothing.py"):
        with pytest.raises((ValueError, AssertionError)):
            check_command(line.split(), monkeypatch)
    with pytest.raises(SystemExit):
        check_command(["t2idist", "sample", "--nonsense"], monkeypatch)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def fields_of(config: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def model_fields() -> set[str]:
    return {name for system in systems.names() for name in fields_of(systems.load(system).Config)}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_config_keys_exist(page: Path) -> None:
    """`data.max_bad`, `stages.STAGE.groups`, `model.compat` ... in inline code are keys of the config."""
    sections = {field.name: field for field in dataclasses.fields(RunConfig)}
    nested = {"data": DataConfig, "checkpoint": configuration.CheckpointConfig, "guard": configuration.GuardConfig}
    nested |= {"report": configuration.ReportConfig, "scores": configuration.ScoresConfig}
    nested |= {"cluster": configuration.ClusterConfig}
    for span in re.findall(r"`([a-z_]+(?:\.[A-Za-z0-9_]+)+)(?:=[^`]*)?`", page.read_text()):
        head, *rest = span.split(".")
        if rest[-1] in (
            "py",
            "md",
            "html",
            "json",
            "jsonl",
            "yaml",
            "parquet",
            "txt",
            "safetensors",
            "sh",
            "csv",
            "tsv",
        ):
            continue
        if head in nested:
            assert rest[0] in fields_of(nested[head]), f"{span}: no such key"
        elif head == "stages" and len(rest) > 1:
            assert rest[1] in fields_of(StageConfig), f"{span}: no such key"
            assert rest[1] != "model" or len(rest) < 3 or rest[2] in model_fields(), f"{span}: no such key"
        elif head == "model":
            assert rest[0] in model_fields(), f"{span}: no such key"
        elif head in sections:
            assert head == "uses" or not rest, f"{span}: no such key"


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert not re.search(r"\b[0-9a-f]{7}\b", text), "a commit hash"


def test_the_model_pages_cover_every_recipe() -> None:
    for recipe in configuration.recipes():
        page = ROOT / f"docs/models/{recipe}.md"
        assert page.is_file(), f"{recipe} has no page"
        for preset in configuration.recipes()[recipe]:
            assert preset in page.read_text() or preset == "demo", f"{page.name} does not mention preset {preset}"


REMOVED = """
Keeper RayKeepers Held Keepers Memory Copy Leave StandStill Notices Notice Ask Left Intake Telling Watch Stop Around
Known AllThere StayingMachines OwnWorkers OwnController Engine Replicated Partitioned Quick CastOnce Alone Verdict Turns
Arrays Recipe Place Run Piece Job Look Watcher Monitor Judge Plan Extent Source
"""
"""Names of classes that the glossary replaced."""


def test_words_are_used_in_one_sense() -> None:
    """No two public classes share a name, and the names that the glossary replaced are gone."""
    places: dict[str, list[str]] = {}
    for file in sorted((ROOT / "t2idist").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Config":
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    shared = {name: files for name, files in places.items() if len(files) > 1}
    assert not shared
    assert not set(REMOVED.split()) & places.keys()


def test_the_glossary_lists_the_words_of_the_contract() -> None:
    glossary = (ROOT / "docs/concepts.md").read_text()
    for word in ("run", "stage", "role", "group", "lane", "export", "checkpoint", "replica", "worker", "node", "step"):
        assert f"**{word}**" in glossary


def test_recipes_have_an_about_text() -> None:
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        assert yaml.safe_load(file.read_text())["about"], file
