"""The layers: which module may import which, and what must not occur in a folder. Read from the source."""

from __future__ import annotations

import ast
import graphlib
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

# what each layer may import of the package, besides itself; from the lowest layer up
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "nn": set(),
    "contract": {"config.ranges", "nn.images"},
    "observability": set(),
    "storage": set(),
    "losses": {"nn"},
    "systems": {"contract", "nn", "losses"},
    "engine": {"contract", "config", "observability.tracking", "storage", "nn.fast"},
    "data": {"contract", "config", "storage", "nn.images"},
    "sampling": {
        "contract",
        "config",
        "observability.command",
        "observability.progress_bar",
        "storage",
        "nn",
        "data",
        "systems",
        "engine.checkpoint",
        "engine.kernels",
        "engine.strategy",
    },
    "ingest": {
        "contract",
        "config",
        "observability.command",
        "observability.progress_bar",
        "storage",
        "data",
        "sampling",
    },
    "evaluate": {
        "contract",
        "config",
        "observability.command",
        "observability.progress_bar",
        "storage",
        "nn",
        "losses",
        "data",
        "systems",
        "engine.checkpoint",
        "engine.kernels",
        "sampling",
    },
    "report": {"config", "storage", "engine.checkpoint", "observability", "sampling", "evaluate"},
    "convert": {
        "contract",
        "config",
        "observability.command",
        "observability.progress_bar",
        "storage",
        "nn",
        "data",
        "systems",
        "engine.checkpoint",
        "engine.kernels",
        "sampling",
    },
    "training": {
        "contract",
        "config",
        "observability",
        "storage",
        "nn.fast",
        "systems",
        "engine",
        "data",
        "evaluate",
        "report",
    },
    "preflight": {"contract", "config", "storage", "nn", "systems", "engine", "data", "evaluate", "training"},
    "launch": {"config", "observability", "storage", "engine", "training"},
    "serve": {
        "contract",
        "config.arguments",
        "observability.command",
        "storage",
        "nn.fast",
        "data",
        "sampling",
        "launch",
    },
    "run": {"config", "observability", "storage", "engine.preemption", "launch", "preflight", "report", "training"},
    "sweep": {
        "config",
        "contract",
        "observability",
        "storage",
        "engine.checkpoint",
        "evaluate",
        "training",
        "preflight",
        "launch",
        "report",
        "run",
    },
    "cli": {"config", "convert", "evaluate", "launch", "observability", "report", "run", "sampling", "serve", "sweep"},
}
ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("launch/", "serve/deployment.py", "sweep/tune.py"),
    "fastapi": ("serve/api.py",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/local.py",),
    "fsspec": ("storage/objects.py",),
    "s3fs": (),
    "botocore": ("storage/",),
    "aiohttp": ("storage/errors.py",),
    "deepspeed": ("engine/zero.py",),
    "webdataset": ("data/reader.py",),
    "sentence_transformers": ("sampling/sentence_encoders.py",),
    "tqdm": ("observability/progress_bar.py",),
    "huggingface_hub": ("storage/hub.py",),
    "jinja2": ("report/", "convert/card.py"),
    "mlflow": ("observability/mlflow_tracker.py",),
    "wandb": ("observability/wandb_tracker.py",),
}
WITHOUT: dict[str, set[str]] = {"config": {"torch"}, "storage": {"torch"}, "launch/replica_store.py": {"torch"}}
"""Packages that a layer or file must not import: torch takes seconds and 300 MB."""


def layer(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Yield the full names of all modules that a file imports."""
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
        if own == "systems" and below.startswith("systems."):
            assert below.startswith("systems._"), f"{file.name}: a system may not import another"


def test_no_layer_may_import_a_higher_one() -> None:
    order = list(ALLOWED)
    for name, allowed in ALLOWED.items():
        higher = [a for a in allowed if order.index(a.partition(".")[0]) >= order.index(name)]
        assert not higher, f"{name}: {higher}"


def test_the_root_of_the_package_is_small() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "cli.py", "contract.py", "run.py"}
    assert {layer(file) for file in FILES} - {"__init__"} == set(ALLOWED)


def test_no_import_circle() -> None:
    """Over all imports, also those inside functions."""
    graph = {}
    for file in FILES:
        name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {other for other in imports(file) if other.startswith("t2idist.") and is_module(other)}
    graphlib.TopologicalSorter(_without_faces(graph)).prepare()


def _without_faces(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Drop the edges from a module to its own package: `from t2idist.data import order` names the package too."""
    return {name: {o for o in others if not name.startswith(f"{o}.") and o != name} for name, others in graph.items()}


@pytest.mark.whole
def test_a_worker_does_not_import_deepspeed() -> None:
    """It is imported only for `strategy: deepspeed`."""
    line = "import sys, t2idist.training.worker; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT.parent, check=False).returncode == 0


@pytest.mark.whole
def test_no_training_run_imports_ingest() -> None:
    line = "import sys, t2idist.launch.submit; sys.exit(any(n.startswith('t2idist.ingest') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", line], cwd=ROOT.parent, check=False).returncode == 0


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_packages_are_used_only_in_their_layer(file: Path) -> None:
    here = str(file.relative_to(ROOT))
    packages = {name.partition(".")[0] for name in imports(file)}
    for package, places in ONLY_IN.items():
        assert package not in packages or here.startswith(places), f"{here} imports {package}"
    assert not packages & (WITHOUT.get(layer(file), set()) | WITHOUT.get(here, set()))
    if any(name.startswith("torch.distributed") for name in imports(file)):
        assert here.startswith("engine/") or here == "training/worker.py"


@pytest.mark.parametrize("folder", ["systems", "nn", "losses"])
def test_models_contain_no_ranks_or_devices(folder: str) -> None:
    for file in set((ROOT / folder).rglob("*.py")) - {ROOT / "nn/fast/torch_internals.py"}:  # names of torch
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


def test_the_replica_store_does_not_import_torch() -> None:
    """Torch takes 300 MB and seconds, on every node of a run."""
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


@pytest.mark.whole
def test_the_driver_does_not_import_what_it_does_not_use(tmp_path: Path) -> None:
    """PyTorch's checkpoints and its compiler take seconds each before the first step."""
    words = [sys.executable, "-c", DRIVER, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
