"""torch's private names are in one file, and are what we take them for; the checked versions are those we allow."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet

from t2idist.nn.fast import torch_internals as internals

ROOT = Path(__file__).parents[2]
FILES = [
    file
    for folder in ("t2idist", "tools")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != Path(internals.__file__)
]
PRIVATE = re.compile(r"(torch|nn)\.([a-z_0-9]+\.)*_[A-Za-z]")


def private_names_of_torch(file: Path) -> list[str]:
    """Return private names of torch that a file imports or reaches as attributes; operations (torch.ops) are data."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return [name for name in names if PRIVATE.match(name) and not name.startswith("torch.ops.")]


def test_no_other_file_names_a_private_part_of_torch() -> None:
    assert len(FILES) > 100
    assert {str(file): names for file in FILES if (names := private_names_of_torch(file))} == {}


def test_private_names_are_recognised(tmp_path: Path) -> None:
    imports = [
        "from torch.utils._pytree import x",
        "from torch.nn.modules.dropout import _DropoutNd",
        "import torch._C",
    ]
    uses = ["torch._softmax(y)", "torch.ops.aten._to_copy", "torch.zeros"]
    (tmp_path / "x.py").write_text("\n".join([*imports, *uses]))
    assert len(private_names_of_torch(tmp_path / "x.py")) == 4


def test_checked_versions_are_installed_and_allowed() -> None:
    assert version("torch").startswith(internals.CHECKED_VERSIONS)
    (requirement,) = (
        line
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("torch")
    )
    allowed = SpecifierSet(requirement.removeprefix("torch"))
    assert all(f"{each}.0" in allowed for each in internals.CHECKED_VERSIONS) and "2.12.1" not in allowed


def test_operations_on_lists_and_softmax_are_what_we_take_them_for() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.rand(2, 3, 4, dtype=torch.float64)
    mine, others = [row.clone() for row in ours], list(theirs)
    internals.foreach_lerp_(mine, others, 0.25)
    assert torch.equal(torch.stack(mine), ours.lerp(theirs, 0.25))
    internals.foreach_mul_(mine, torch.tensor(2.0, dtype=torch.float64))
    assert torch.equal(torch.stack(mine), 2.0 * ours.lerp(theirs, 0.25))
    internals.foreach_copy_(mine, others)
    assert torch.equal(torch.stack(mine), theirs)
    torch.testing.assert_close(torch.stack(internals.foreach_norm(others)), theirs.norm(dim=1))
    out, scores = torch.empty_like(ours), ours.clone().requires_grad_()
    internals.softmax(ours, 1, False, out=out)
    expected = scores.softmax(1)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(expected, scores, theirs)
    torch.testing.assert_close(internals.softmax_backward(theirs, out, 1, out.dtype), gradient)


def test_base_classes_are_those_of_the_public_layers() -> None:
    for norm in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm):
        assert issubclass(norm, internals.BatchNormBase)
    assert issubclass(torch.nn.InstanceNorm2d, internals.InstanceNormBase)
    assert issubclass(torch.nn.Dropout2d, internals.DropoutBase)
