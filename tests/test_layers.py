"""Who may import whom, and what never stands in which folder: the layers of the house, read from the source."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "t2idist"
FILES = sorted(ROOT.rglob("*.py"))

# a layer and what it may import of the package, besides itself
ALLOWED: dict[str, set[str]] = {
    "contract": set(),
    "strict": set(),
    "config": {"strict"},
    "retry": set(),
    "storage": {"retry"},
    "nn": set(),
    "losses": {"nn.precision"},
    "sentences": {"contract", "nn"},
    "systems": {"contract", "nn", "losses", "sentences"},
    "engine": {"contract", "storage", "config"},
    "cores": set(),
    "data": {"contract", "storage", "config", "cores"},
    "evaluate": {
        "contract",
        "nn",
        "losses",
        "data",
        "storage",
        "config",
        "strict",
        "engine.export",
        "engine.kernels",
        "engine.pretrained",
        "engine.saved",
        "engine.strategy",
        "systems",
        "spread",
    },
    "stages": {"config", "strict", "contract", "storage", "systems", "engine.export", "data.text"},
    "logs": set(),
    "hook": {"logs"},
    "access": set(),
    "versions": {"engine.world"},
    "orders": {"config", "storage", "engine.export"},
    "resume": {"config", "contract", "storage", "stages", "engine"},
    "outcome": {"config", "storage", "stages", "engine.metrics", "engine.notice", "hook", "logs"},
    "dry": {"config", "strict", "contract", "storage", "stages", "data", "engine", "resume", "nn.initial"},
    "estimate": {"config", "strict", "contract", "storage", "stages", "data", "engine", "dry"},
    "worker": {
        "config",
        "strict",
        "contract",
        "storage",
        "stages",
        "data",
        "engine",
        "evaluate",
        "logs",
        "orders",
        "outcome",
        "versions",
    },
    "launch": {
        "config",
        "strict",
        "storage",
        "stages",
        "worker",
        "connect",
        "leave",
        "keepers",
        "nodes",
        "regroup",
        "gauges",
        "logs",
        "orders",
        "outcome",
        "versions",
        "engine.metrics",
        "engine.notice",
        "evaluate.progress",
    },
    "alone": {"config", "worker", "logs", "orders", "outcome", "engine.notice", "evaluate.progress"},
    "connect": {"config"},
    "gauges": set(),
    "keepers": {"engine.held"},
    "nodes": {"storage", "config", "keepers"},
    "leave": set(),
    "regroup": set(),
    "drain": set(),
    "spread": set(),
    "run": {
        "config",
        "access",
        "logs",
        "hook",
        "orders",
        "outcome",
        "resume",
        "estimate",
        "engine.notice",
        "evaluate.status",
        "stages",
        "dry",
        "alone",
        "connect",
        "launch",
    },
}
ONLY_IN: dict[str, set[str]] = {
    "ray": {
        "connect.py",
        "launch.py",
        "gauges.py",
        "keepers.py",
        "leave.py",
        "nodes.py",
        "regroup.py",
        "spread.py",
        "drain.py",
    },
    "fsspec": {"storage.py"},
    "s3fs": set(),
    "botocore": {"storage.py", "retry.py"},
    "aiohttp": {"retry.py"},
    "deepspeed": {"engine/zero.py"},
    "webdataset": {"data/reader.py"},
    "sentence_transformers": {"evaluate/encoders.py"},
}
OUTSIDE: dict[str, set[str]] = {"config": {"torch"}, "strict": {"torch"}, "storage": {"torch"}, "retry": {"torch"}}


def layer(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Full names of all modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""
            if node.module == "t2idist" or (node.module or "").startswith("t2idist."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_keep_to_the_layers(file: Path) -> None:
    own = layer(file)
    if own == "__init__":
        return
    allowed = ALLOWED[own] | {own}
    for name in imports(file):
        if not name.startswith("t2idist.") or not is_module(name):
            continue
        below = name.removeprefix("t2idist.")
        within = any(below == a or below.startswith(f"{a}.") or a.startswith(f"{below}.") for a in allowed)
        assert within, f"{own} may not import {name}"
        if own == "systems" and file.name != "__init__.py":
            assert not below.startswith("systems."), f"{file.name}: a system may not import another"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_some_packages_are_used_in_one_place(file: Path) -> None:
    here = str(file.relative_to(ROOT))
    packages = {name.partition(".")[0] for name in imports(file)}
    for package, places in ONLY_IN.items():
        assert package not in packages or here in places, f"{here} imports {package}"
    assert not packages & OUTSIDE.get(layer(file), set())
    if any(name.startswith("torch.distributed") for name in imports(file)):
        assert here.startswith("engine/") or here == "worker.py"


@pytest.mark.parametrize("folder", ["systems", "nn", "losses"])
def test_mathematics_knows_nothing_of_machines(folder: str) -> None:
    for file in (ROOT / folder).glob("*.py"):
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            words = re.findall(r"[a-z]+", token.string.lower().replace("world_size", "worldsize"))
            assert not {"rank", "worldsize", "cuda"} & set(words), f"{file.name}:{token.start[0]}: {token.string}"


def calls(file: Path) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_code_runs_from_data(file: Path) -> None:
    banned = {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "os.popen"}
    for line, name, call in calls(file):
        assert name not in banned, f"{file.name}:{line}: {name}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name.startswith("subprocess."):
            assert keywords.get("shell", "False") == "False", f"{file.name}:{line}: a shell"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{file.name}:{line}: torch.load runs code"


def test_files_and_functions_stay_short() -> None:
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 420, f"{file}: {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 65, f"{file.name}: {node.name} is too long"


def test_what_holds_copies_does_without_torch() -> None:
    """It is 300 MB and seconds, on every machine of a run."""
    line = "import sys, t2idist.launch.replica_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT.parent, check=False).returncode == 0


DRIVER = """
import sys, t2idist.launch.connection
assert not {"torch", "ray.train"} & set(sys.modules), "these are imported while Ray starts"
from t2idist import config
from t2idist.launch import submit
from t2idist.preflight import dry_run
dry_run.check(config.load("attngan", [f"storage={sys.argv[1]}"]), None)
print(sorted({"torch.distributed.checkpoint", "torch._dynamo"} & set(sys.modules)))
"""


def test_the_driver_does_without_what_it_has_no_use_for(tmp_path: Path) -> None:
    """Each of them seconds of imports before the first step: torch's checkpoints and its compiler."""
    words = [sys.executable, "-c", DRIVER, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
