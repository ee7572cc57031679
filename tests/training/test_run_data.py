"""The data of a run: other data under the same URL is refused, the same data under another URL is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from t2idist import run
from t2idist.config import RunConfig
from t2idist.config.strict import to_yaml
from t2idist.data.sample_format import SampleRecord
from t2idist.data.shards import Dataset
from t2idist.preflight import dry_run
from t2idist.training import run_data
from t2idist.training.stages import StageRun, open_unrecorded_data, run_url
from tests.helpers.runs import export_bytes, load_config, write_recipe
from tests.helpers.shard_sets import make_sample, png_image, write_set

SAMPLES = [make_sample(number) for number in range(40)]


def replace_set(url: Path, samples: Sequence[SampleRecord]) -> Dataset:
    """Write another set in the place of the one at `url`."""
    shutil.rmtree(url, ignore_errors=True)
    return write_set(url, list(samples))


def changed_samples() -> dict[str, list[SampleRecord]]:
    """Return sets that differ from SAMPLES, by what is different."""
    first, *others = SAMPLES
    return {
        "an image": [dataclasses.replace(first, image=png_image(99)), *others],
        "a caption": [dataclasses.replace(first, captions=(*first.captions[:1], "old and new")), *others],
        "the number": others,
        "a class": [dataclasses.replace(first, class_id=7), *others],
        "the order": [*others, first],
    }


def config_on(folder: Path, url: Path) -> RunConfig:
    return load_config(folder, f"data.source={url}")


def start(config: RunConfig) -> None:
    """Do what the start of a run does with its data: the check, then the record of the worker."""
    dry_run.check(config, None)
    run_data.record(run_url(config), open_unrecorded_data(config))


def refusal(config: RunConfig) -> str:
    """Return why a run is refused, the same in the check of the driver, on the page of --dry-run, and in a worker."""
    messages = set()
    for start in (
        lambda: dry_run.check(config, None),
        lambda: dry_run.describe(config, None),
        lambda: StageRun(config, "damsm").open_data(),
    ):
        with pytest.raises(ValueError) as caught:
            start()
        messages.add(str(caught.value))
    (message,) = messages
    return message


def test_data_of_a_run_that_did_not_start_may_change(tmp_path: Path) -> None:
    """A cluster without room, or another run of the name, ends a command after its check."""
    url = tmp_path / "set"
    config = config_on(tmp_path, url)
    for samples in (SAMPLES, SAMPLES[1:]):
        replace_set(url, samples)
        dry_run.check(config, None)
    assert not (tmp_path / "runs/tiny/data.json").exists()


@pytest.mark.parametrize("what", changed_samples())
def test_other_data_under_the_same_url_is_refused(tmp_path: Path, what: str) -> None:
    url = tmp_path / "set"
    before = write_set(url, SAMPLES)
    config = config_on(tmp_path, url)
    start(config)
    start(config)
    after = replace_set(url, changed_samples()[what])
    message = refusal(config)
    assert message.startswith(
        f"data.source: {url} has the data {after.fingerprint} ({len(after.split('train'))} images)"
    )
    assert f"was started on the data {before.fingerprint} (40 images, then in {url})" in message
    assert message.endswith("give the URL of that data, or name=ANOTHER for a new run")
    replace_set(url, SAMPLES)  # the data is restored
    dry_run.check(config, None)
    dry_run.check(dataclasses.replace(config_on(tmp_path, url), name="another"), None)


def test_copy_under_another_url_is_the_same_data(tmp_path: Path) -> None:
    url, copy, other = (tmp_path / name for name in ("set", "copy", "other"))
    write_set(url, SAMPLES)
    config = config_on(tmp_path, url)
    start(config)
    (tmp_path / "runs/tiny/config.yaml").write_text(to_yaml(config))
    shutil.move(url, copy)
    dry_run.check(config_on(tmp_path, copy), None)
    assert str(copy) in dry_run.describe(config_on(tmp_path, copy), None)
    write_set(other, SAMPLES[1:])
    assert f"data.source: {other} has the data" in refusal(config_on(tmp_path, other))


def test_source_of_an_older_run_without_a_record_may_not_change(tmp_path: Path) -> None:
    url, copy = tmp_path / "set", tmp_path / "copy"
    write_set(url, SAMPLES)
    shutil.copytree(url, copy)
    config = config_on(tmp_path, url)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/config.yaml").write_text(to_yaml(config))
    with pytest.raises(ValueError, match=r"data.source: .*copy.*was started with .*set"):
        dry_run.check(config_on(tmp_path, copy), None)
    assert not (tmp_path / "runs/tiny/data.json").exists()
    start(config)  # the next attempt adopts the data
    dry_run.check(config_on(tmp_path, copy), None)


def test_embedded_data_is_recorded_by_its_settings_and_version(tmp_path: Path) -> None:
    settings = ["data.source=avatars", "data.samples=24", "data.size=32", f"data.cache={tmp_path / 'cache'}"]
    config = load_config(tmp_path, *settings)
    start(config)
    recorded = run_data.read(str(tmp_path / "runs/tiny"))
    assert list(recorded) == ["damsm", "attngan"] and recorded["damsm"] == recorded["attngan"]
    # another machine draws the same avatars, but may write other bytes
    (folder,) = (tmp_path / "cache").glob("avatars-*/manifest.parquet")
    (avatars,) = StageRun(config, "damsm").open_data()
    description = json.loads((folder.parent / "dataset.json").read_text())
    replace_set(folder.parent, [make_sample(number) for number in range(24)])
    rewritten = json.loads((folder.parent / "dataset.json").read_text())
    (folder.parent / "dataset.json").write_text(
        json.dumps({**rewritten, **{key: description[key] for key in ("source", "options")}})
    )
    (redrawn,) = StageRun(config, "damsm").open_data()
    assert redrawn.fingerprint == avatars.fingerprint == recorded["damsm"][0]["sha256"]
    with pytest.raises(ValueError, match="data.source: .* has the data .* was started on the data"):
        dry_run.check(load_config(tmp_path, *settings, "data.samples=25"), None)


def test_fingerprint_depends_on_words_attributes_and_tokenizer_not_on_source_or_licence(tmp_path: Path) -> None:
    before = write_set(tmp_path / "set", SAMPLES)
    file = tmp_path / "set/dataset.json"
    description = json.loads(file.read_text())

    def fingerprint(**changed: object) -> str:
        file.write_text(json.dumps({**description, **changed}))
        return Dataset.open(str(tmp_path / "set")).fingerprint

    assert fingerprint(source="x", licence="y", options={"z": 1}) == before.fingerprint
    words = description["vocabulary"]
    others = {
        fingerprint(vocabulary=dict(reversed(words.items()))),
        fingerprint(vocabulary={**words, "more": 1}),
        fingerprint(attributes=[*description["attributes"], "more"]),
        fingerprint(tokenizer="ascii" if description.get("tokenizer") == "unicode" else "unicode"),
    }
    assert len(others) == 4 and before.fingerprint not in others


def test_worker_records_the_data_of_all_stages(tmp_path: Path) -> None:
    """Stages that have not begun may then go on with a copy too."""
    write_set(tmp_path / "set", SAMPLES)
    source = f"data.source={tmp_path / 'set'}"
    assert run.main([str(write_recipe(tmp_path)), "--local", "--stop-after", "damsm:8", source]) == 0
    assert list(run_data.read(str(tmp_path / "runs/tiny"))) == ["damsm", "attngan"]
    shutil.move(tmp_path / "set", tmp_path / "copy")
    dry_run.check(config_on(tmp_path, tmp_path / "copy"), None)


@pytest.mark.whole
def test_stopped_run_refuses_other_data_and_finishes_on_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal changes nothing, so that the finished run has the weights of one that was never stopped."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        write_set(tmp_path / name / "set", SAMPLES)
    data = {"max_words": 8, "threads": 1}

    def command(name: str, source: str, *more: str) -> int:
        folder = tmp_path / name
        file = write_recipe(folder, precision="float64", data={**data, "source": str(folder / source)})
        return run.main([str(file), "--local", *more])

    assert command("whole", "set") == 0
    assert command("stopped", "set", "--stop-after", "attngan:30") == 0
    at = tmp_path / "stopped/runs/tiny"
    shutil.move(tmp_path / "stopped/set", tmp_path / "stopped/copy")
    write_set(tmp_path / "stopped/set", SAMPLES[1:])
    files = {path: path.read_bytes() for path in at.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command("stopped", "set") == 2
    error = capsys.readouterr().err
    assert "was started on the data" in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in at.rglob("*") if path.is_file()} == files
    assert command("stopped", "copy") == 0
    assert export_bytes(tmp_path / "stopped", "attngan") == export_bytes(tmp_path / "whole", "attngan")
