"""Alternating data sets: order, resume, any number of workers, and a complete run over two sets."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from t2idist import config as configuration
from t2idist import run
from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.contract import Batch
from t2idist.data.loader import LoaderSpec
from t2idist.data.mixing import MixedLoader, data_info, open_mixed_loader, steps_of_domain
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shards import Dataset
from t2idist.data.sources import open_datasets
from t2idist.engine.batches import read_ledger
from t2idist.engine.checkpoint import export
from t2idist.preflight import dry_run
from t2idist.sampling import sample as sampling
from t2idist.sampling import translate
from t2idist.training import stages
from tests.helpers import small_systems
from tests.helpers.shard_sets import assert_batches_equal, make_loader, png_image, take_batches, write_set
from tools import score_translation

SEEDS = (3, 11, 12)
CONFIG = DataConfig(max_words=5, threads=2)
EXPRESSIONS = ("happy", "neutral", "sad")


def expression_sample(number: int, split: str = "train", image: bytes | None = None) -> SampleRecord:
    """An image without captions; another set has the same key."""
    named = (EXPRESSIONS[number % 3],)
    return SampleRecord(split, f"s{number:04d}", image or png_image(500 + number), "png", (), 20, 24, named)


def face_sample(number: int, split: str = "train") -> SampleRecord:
    named = tuple(name for bit, name in enumerate(("Black_Hair", "Male")) if number >> bit & 1)
    return SampleRecord(split, f"s{number:04d}", png_image(number), "png", ("a face",), 20, 24, named)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, ...]:
    folder = tmp_path_factory.mktemp("sets")
    return (
        write_set(folder / "faces", [face_sample(n, "train" if n < 60 else "test") for n in range(68)]),
        write_set(folder / "expressions", [expression_sample(n, "train" if n < 25 else "test") for n in range(34)]),
        write_set(folder / "third", [expression_sample(n) for n in range(30, 37)]),
    )


def open_mixed(datasets: tuple[Dataset, ...], groups: list[int], step0: int = 0) -> MixedLoader:
    spec = LoaderSpec(CONFIG, sizes=(8, 16), groups=groups, total_groups=4, group_size=6, step0=step0)
    return open_mixed_loader(datasets, spec, SEEDS[: len(datasets)])


def take_mixed(loader: MixedLoader, count: int) -> list[Batch]:
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_steps_of_domain_counts_its_steps() -> None:
    for domains in (1, 2, 3, 5):
        for step in range(17):
            for domain in range(domains):
                assert steps_of_domain(domain, domains, step) == sum(s % domains == domain for s in range(step))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_set_is_read_in_its_own_order(sets: tuple[Dataset, ...], count: int) -> None:
    batches = take_mixed(open_mixed(sets[:count], [0, 1, 2, 3]), 5 * count)
    assert [batch.domain for batch in batches] == list(range(count)) * 5
    for domain, dataset in enumerate(sets[:count]):
        alone = take_batches(make_loader(dataset, [0, 1, 2, 3], seed=SEEDS[domain]), 5)
        own = batches[domain::count]
        for ours, theirs in zip(own, alone, strict=True):
            assert_batches_equal(ours, theirs)
        ids, keys = [key for batch in own for key in batch.ids], dataset.split("train").keys
        assert sorted(ids[: len(keys)]) == keys, "each sample occurs once in an epoch of its set"
        assert all(batch.attributes.shape[1] == len(dataset.attribute_names) for batch in own)


def test_any_partition_of_groups_and_any_resume_load_the_same(sets: tuple[Dataset, ...]) -> None:
    whole = take_mixed(open_mixed(sets[:2], [0, 1, 2, 3]), 8)
    for step0 in (1, 3, 4):
        for owned in ([0, 1, 2, 3], [0, 2], [1], [3]):
            for batch, all_groups in zip(
                take_mixed(open_mixed(sets[:2], owned, step0), 4), whole[step0 : step0 + 4], strict=True
            ):
                rows = [group * 6 + i for group in owned for i in range(6)]
                assert batch.domain == all_groups.domain
                assert batch.ids == tuple(all_groups.ids[row] for row in rows)
                assert torch.equal(batch.images[1], all_groups.images[1][rows])
                assert torch.equal(batch.attributes, all_groups.attributes[rows])


def test_quarantine_names_the_set_of_a_sample(tmp_path: Path, sets: tuple[Dataset, ...], caplog: Any) -> None:
    broken = write_set(tmp_path / "set", [expression_sample(n, image=b"x" if n == 4 else None) for n in range(12)])
    loader = open_mixed((sets[0], broken), [0, 1])
    with caplog.at_level(logging.WARNING):
        take_mixed(loader, 6)
    assert list(loader.quarantine) == [f"{tmp_path}/set: s0004"]
    assert (loader.samples_read, loader.bad_reads) == (72, 3)
    alone = open_mixed((broken,), [0, 1])
    take_mixed(alone, 2)
    assert list(alone.quarantine) == ["s0004"]


def test_data_info_combines_the_sets(sets: tuple[Dataset, ...]) -> None:
    info = data_info(sets[:2])
    assert info.words == sets[0].info.words and info.epoch_images == 85
    assert info.attributes == (("Black_Hair", "Male"), EXPRESSIONS)
    assert data_info(sets[:1]) == sets[0].info


# ------------------------------------------------------------------------------------------------ configuration
def test_errors_name_the_config_key(sets: tuple[Dataset, ...]) -> None:
    url = sets[0].url
    assert [each.url for each in open_datasets(DataConfig(source=url, beside=(sets[1].url,)))] == [url, sets[1].url]
    for beside, message in (
        ((url,), r"data.beside\[0\]: .* is listed twice"),
        ((sets[1].url, "emojis"), r"data.beside\[1\]: 'emojis' .did you mean emoji"),
        (("",), r"data.beside\[0\]: missing"),
        (("/nowhere/set",), "/nowhere/set: no dataset.json"),
    ):
        with pytest.raises(ValueError, match=message):
            open_datasets(DataConfig(source=url, beside=beside))


def write_config(folder: Path, sets: tuple[Dataset, ...], system: str = "stargan", **changed: Any) -> Path:
    model = {**small_systems.MODELS[system], **({"domains": [{}, {"exclusive": True}]} if system == "stargan" else {})}
    stage = {"system": system, "group_size": 4, "groups": 3, "images": 96, "model": model,
             "checkpoint_every_images": 24, "pictures_every_images": 48}  # fmt: skip
    values = {
        "name": "two", "storage": str(folder / "runs"), "precision": "float32",
        "data": {"source": sets[0].url, "beside": [sets[1].url], "max_words": 4, "threads": 1},
        "report": {"ledger": True}, "cluster": {"workers": [1, 2]}, "stages": {system: stage}, **changed,
    }  # fmt: skip
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_dry_run_lists_the_sets(tmp_path: Path, sets: tuple[Dataset, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(write_config(tmp_path, sets)), "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert f"60 images per epoch, 0.8 epochs, 2 attributes, from {sets[0].url}" in page
    assert f"25 images per epoch, 1.9 epochs, 3 attributes, from {sets[1].url}" in page


def test_system_for_one_set_rejects_several(tmp_path: Path, sets: tuple[Dataset, ...]) -> None:
    config = configuration.load(str(write_config(tmp_path, sets, "damsm")))
    with pytest.raises(ValueError, match="stages.damsm: data.beside gives 2 data sets, but damsm trains on one"):
        dry_run.check(config, None)


def test_relative_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage = {"system": "stargan", "group_size": 4, "groups": 1, "images": 4, "data": {"beside": ["./b", "emoji"]}}
    config = from_dict(RunConfig, {"name": "x", "data": {"source": "./a"}, "stages": {"s": stage}})
    absolute = stages.with_absolute_paths(config)
    assert absolute.data.source == f"{tmp_path}/a"
    assert absolute.stages["s"].data == {"beside": [f"{tmp_path}/b", "emoji"]}


def test_run_started_before_the_key_existed_resumes(tmp_path: Path, sets: tuple[Dataset, ...]) -> None:
    config = stages.with_absolute_paths(configuration.load(str(write_config(tmp_path, sets))))
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, beside=()))
    one = {**small_systems.MODELS["stargan"], "domains": []}
    alone = dataclasses.replace(alone, stages={"stargan": dataclasses.replace(config.stages["stargan"], model=one)})
    folder = tmp_path / "runs/two"
    folder.mkdir(parents=True)
    stored = to_dict(alone)
    del stored["data"]["beside"]
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    dry_run.check(alone, None)
    with pytest.raises(ValueError, match="data.beside: .* was started with"):
        dry_run.check(dataclasses.replace(alone, data=dataclasses.replace(alone.data, beside=(sets[1].url,))), None)


# ------------------------------------------------------------------------------------------------ a complete run
@pytest.mark.whole
def test_run_over_two_sets_is_sampled_translated_and_scored(
    tmp_path: Path, sets: tuple[Dataset, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([str(write_config(tmp_path, sets)), "--local"]) == 0
    at = tmp_path / "runs/two"
    keys = [set(dataset.split("train").keys) for dataset in sets[:2]]
    for (step, _), ids in read_ledger(str(at / "stargan")).items():
        assert set(ids) <= keys[step % 2]
    assert sorted(file.name for file in (at / "stargan/pictures").iterdir()) == [
        "translated_000000048.png", "translated_000000096.png",
    ]  # fmt: skip
    page = (at / "report.html").read_text()
    assert "and their translations by stargan" in page and "t2idist translate --export" in page
    url = str(at / "stargan/export")
    assert export.read_index(url)["plan"]["attributes"] == [["Black_Hair", "Male"], list(EXPRESSIONS)]

    capsys.readouterr()
    assert sampling.main(["--export", url, "--text", "a face"]) == 2
    assert f"t2idist translate --export {url}" in capsys.readouterr().err
    image = tmp_path / "me.png"
    image.write_bytes(png_image(7, (30, 40)))
    out = tmp_path / "out"
    arguments = ["--export", url, "--image", str(image), "--out", str(out)]
    assert translate.main([*arguments, "--set", "sad", "--domain", "1"]) == 0
    assert {file.name for file in out.iterdir()} == {"me.png", "grid.png"}
    for invalid, message in (
        ([], "give --set or --clear: Black_Hair, Male"),
        (["--set", "sad"], "'sad' is not among"),
        (["--set", "Male", "--clear", "Male"], "--set Male: it conflicts"),
        (["--set", "sad", "happy", "--domain", "1"], "--set sad: it conflicts"),
        (["--set", "sad", "--domain", "2"], "--domain 2: this export has 2"),
        (["--set", "Male", "--image", str(tmp_path / "two.yaml")], "two.yaml: does not decode: not JPEG, PNG"),
    ):
        assert translate.main([*arguments, *invalid]) == 2
        assert message in capsys.readouterr().err
    assert score_translation.main(["--run", str(at), "--threads", "1"]) == 0
    table = capsys.readouterr().out
    assert "test: Black_Hair" in table and "test: label" in table and "there and back, L1" in table
    assert "Black_Hair" in (at / "report.html").read_text()
