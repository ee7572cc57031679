"""The ranges of all numbers of all configs, and what --dry-run refuses before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist import config as configuration
from t2idist import run, storage, systems
from t2idist.config import load
from t2idist.config.ranges import RangeError, check_ranges
from t2idist.config.strict import from_dict, to_dict
from t2idist.data import sources
from tests.helpers.shard_sets import make_sample, write_set

SECTIONS = [
    configuration.DataConfig,
    configuration.CheckpointConfig,
    configuration.GuardConfig,
    configuration.ReportConfig,
    configuration.ScoresConfig,
    configuration.ClusterConfig,
]
CONFIGS = [*SECTIONS, *(systems.load(name).Config for name in systems.names())]


def numbers(config: type[Any]) -> list[tuple[type[Any], str]]:
    hints = {field.name: str(field.type) for field in dataclasses.fields(config)}
    return [(config, name) for name, hint in hints.items() if hint.startswith(("int", "float", "tuple[int"))]


NUMBERS = [pair for config in CONFIGS for pair in numbers(config)]


@pytest.mark.parametrize(("config", "key"), NUMBERS, ids=lambda v: v if isinstance(v, str) else v.__module__)
def test_no_number_may_be_negative_or_infinite(config: type[Any], key: str) -> None:
    hint = str(next(field.type for field in dataclasses.fields(config) if field.name == key))
    wrong: list[Any] = [-3]
    if hint.startswith("float"):
        wrong += [float("nan"), float("inf")]
    if hint.startswith("tuple"):
        wrong = [tuple([-3] * (hint.count("int")))]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^here\.(\w+\.)?{key}: |^\w+\.{key}: "):
            from_dict(config, {key: value}, "here")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stages.attngan.model.z_dim=-3", "stages.attngan.model.z_dim: -3; it must be at least 1"),
        ("stages.attngan.model.ema_half_life_images=0", "ema_half_life_images: 0.0; it must be above 0"),
        ("stages.damsm.model.dropout=1", "stages.damsm.model.dropout: 1.0; it must be at least 0 and below 1"),
        ("stages.damsm.model.lr=0", "stages.damsm.model.lr: 0.0; it must be above 0"),
        ("cluster.max_failures=-1", "cluster.max_failures: -1; it must be at least 0"),
        ("cluster.wait_seconds=.inf", "cluster.wait_seconds: inf; it must be a finite number"),
        ("stages.atngan.images=8", "stages.atngan: no such stage; did you mean 'attngan'?"),
        ("stages.attngan.uses={damsm: damsn}", "'damsn': no such stage and no such folder; did you mean 'damsm'?"),
        ("data.beside=[mine]", "data.beside[0]: 'mine'; allowed are avatars"),
        ("data.source=s3:/bucket/x", "s3:/bucket/x: two slashes follow the protocol: s3://bucket/x"),
        ("storage=s3:/bucket", "storage: s3:/bucket/attngan-demo: two slashes follow the protocol: s3://bucket"),
        ("data.source=s3:bucket", "s3:bucket: two slashes follow the protocol: s3://bucket"),
    ],
)
def test_dry_run_refuses_in_one_sentence_and_draws_nothing(
    setting: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(config: object) -> str:
        raise AssertionError("avatars are drawn")

    monkeypatch.setitem(sources.EMBEDDED, "avatars", draw)
    monkeypatch.chdir(tmp_path)
    assert run.main(["attngan", "--dry-run", f"storage={tmp_path}/runs", setting]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nearest_judge_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["stages.judge={system: damsm, group_size: 4, groups: 2, images: 8}"]
    uses = ["stages.attngan.uses={damsm: jugde}", "data.source=emoji", f"storage={tmp_path}"]
    assert run.main(["attngan", "--dry-run", *stages, *uses]) == 2
    error = capsys.readouterr().err
    assert "'jugde': no such stage and no such folder" in error


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize("mode", [["--dry-run"], ["--dry-run", "--local"], ["--local"]])
def test_missing_accelerator_is_refused(mode: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attngan", "data.source=emoji", f"storage={tmp_path}", "cluster.gpus_per_worker=1"]
    assert run.main([*arguments, *mode]) == 2
    error = capsys.readouterr().err
    assert "cluster.gpus_per_worker: 1, but PyTorch finds no accelerator" in error
    assert "give cluster.gpus_per_worker=0 to train on its CPU, or train on a cluster (RAY_ADDRESS" in error


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_accelerator_of_a_cluster_or_of_a_recipe_is_not_that_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attngan", "--dry-run", f"storage={tmp_path}", "cluster.gpus_per_worker=1"]
    assert run.main([*arguments, "data.source=emoji", "cluster.address=192.0.2.2:6379"]) == 0
    assert "no accelerator" not in capsys.readouterr().out
    assert run.main([*arguments, "data.source="]) == 0
    assert "cluster.gpus_per_worker: 1, but PyTorch finds no accelerator" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file"),
        (b"other bytes", "has sha256"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page (HTML or XML), not the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
    ],
)
def test_dry_run_checks_the_weights_of_the_trunk(
    content: bytes | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "inception.pth"
    if content is not None:
        file.write_bytes(content)
    arguments = [
        "attngan",
        "preset=cub",
        "data.source=emoji",
        f"storage={tmp_path}/runs",
        "--dry-run",
        "cluster.gpus_per_worker=0",
    ]
    weights = [f"stages.damsm.model.trunk_weights={file}", f"stages.damsm.model.trunk_sha256={'a' * 64}"]
    assert run.main([*arguments, *weights]) == 2
    error = capsys.readouterr().err
    assert "stages.damsm.model.trunk_weights: " in error and sentence in error
    assert run.main(arguments) == 2  # given data, the run is meant, and it needs the weights
    assert "stages.damsm.model.trunk_weights: missing" in capsys.readouterr().err


def test_dry_run_leaves_no_folder_behind(tmp_path: Path) -> None:
    assert run.main(["attngan", "--dry-run", "data.source=emoji", f"storage={tmp_path}/a/b"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_shard_set_in_the_working_directory_needs_no_slash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "mine", [make_sample(i) for i in range(24)])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run.main(["attngan", "--dry-run", "data.source=mine", "storage=runs"]) == 0
    assert f"source: {tmp_path}/mine" in capsys.readouterr().out
    assert run.main(["attngan", "--dry-run", "data.source=other", "storage=runs"]) == 2
    assert "data.source: 'other' is a folder without dataset.json" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["123", "1e3", "007", "true", "2024-01-01", "null", "'123'"])
def test_text_keys_take_any_text_on_the_command_line(text: str) -> None:
    assert load("attngan", [f"name={text}"]).name == text.strip("'")


def test_types_of_values_on_the_command_line() -> None:
    config = load("attngan", ["data.cache=null", "report.captions=[1, a b]", "seed=7", "stages.attngan.system=123"])
    assert (config.data.cache, config.report.captions, config.seed) == (None, ("1", "a b"), 7)
    assert load("attngan", ["data.cache=5"]).data.cache == "5"
    with pytest.raises(ValueError, match=r"^seed: 'x'; expected a whole number"):
        load("attngan", ["seed=x"])


def test_number_for_a_text_in_a_file_asks_for_quotes(tmp_path: Path) -> None:
    values = to_dict(load("attngan"))
    (tmp_path / "a.yaml").write_text(json.dumps({**values, "name": 123}))
    with pytest.raises(ValueError, match="name: 123; expected a text: put it in quotes"):
        load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("url", ["s3:/b/k", "gs:/b", "s3:b/k", "https:/host/x", "file:/x", "hdfs:/x"])
def test_storage_names_the_missing_slash(url: str) -> None:
    with pytest.raises(ValueError, match="two slashes follow the protocol"):
        storage.exists(url)


def test_ranges_of_tuples_and_none() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        widths: tuple[int, ...] = (4, 0)
        half_life: float | None = None

        def __post_init__(self) -> None:
            check_ranges(self, at_least_1="widths", above_0="half_life")

    with pytest.raises(RangeError, match="widths: 0; it must be at least 1"):
        Config()
    assert Config((1,)).half_life is None
