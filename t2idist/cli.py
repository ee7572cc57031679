"""The command ``t2idist``: dispatches to the subcommands, which are imported only when they are run."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from t2idist.observability.command import command

Main = Callable[[Sequence[str]], int]


def _train() -> Main:
    from t2idist import run

    return lambda arguments: run.main(arguments, "t2idist train")


def _score() -> Main:
    from t2idist.evaluate import score
    from t2idist.launch.parallel import map_unordered

    return lambda arguments: score.main(arguments, map_unordered=map_unordered)


def _main_of(module: str) -> Callable[[], Main]:
    def load() -> Main:
        main: Main = importlib.import_module(module).main
        return main

    return load


COMMANDS: dict[str, tuple[str, Callable[[], Main]]] = {
    "train": ("train a recipe; check it (--dry-run) or estimate its cost (--plan)", _train),
    "sweep": ("train a recipe with many settings and rank them", _main_of("t2idist.sweep.cli")),
    "status": ("show the state of a run, or list the runs in a folder", _main_of("t2idist.report.status")),
    "report": ("write the report page of a run", _main_of("t2idist.report.report")),
    "sample": ("generate images from captions with an export", _main_of("t2idist.sampling.sample")),
    "serve": ("serve an export: a page to draw with, and an API", _main_of("t2idist.serve.cli")),
    "translate": ("change attributes of images with an export", _main_of("t2idist.sampling.translate")),
    "style": ("score how well an export of system style separates styles", _main_of("t2idist.evaluate.style")),
    "score": ("score exports: FID, KID, R-precision and more", _score),
    "convert": (
        "convert an export to plain safetensors or ONNX, publish it, or import published weights",
        _main_of("t2idist.convert.cli"),
    ),
    "drain": ("drain this node of a Ray cluster before it is shut down", _main_of("t2idist.launch.drain")),
}
"""Description and loader of each subcommand."""


@command("t2idist")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2 if there is no such subcommand.

    Modules in the working directory can be imported, so that a custom system (`system: my_gan`) is found there.
    """
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # `python -m` does so by itself, a console script does not
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean '{similar[0]}'?" if similar else ""
        print(f"error: no command '{name}'{hint}\n\n{_help()}" if name else _help(), file=sys.stderr)
        return 2
    _, load = COMMANDS[name]
    return load()(rest)


def _help() -> str:
    lines = [f"  {name:<11}{description}" for name, (description, _) in COMMANDS.items()]
    return "\n".join(["usage: t2idist COMMAND ...", "", "commands:", *lines, "", "t2idist COMMAND --help: its options"])


if __name__ == "__main__":
    sys.exit(main())
