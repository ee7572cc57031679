"""The strict configuration, the shipped recipes, and the page of a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from t2idist import config as configuration
from t2idist import run
from t2idist.config import RunConfig, load
from t2idist.config.strict import from_dict, parse_yaml, to_dict, to_yaml
from t2idist.contract import DataInfo, Schedule
from t2idist.data.tokenizer import UNICODE, Vocabulary
from t2idist.engine.schedule import ema_decay, lr_factor
from t2idist.preflight import dry_run
from t2idist.training import stages
from t2idist.training.stages import StageRun

MINIMAL = {"name": "x", "stages": {"a": {"system": "damsm", "group_size": 4, "groups": 2, "images": 16}}}
DATA_INFO = DataInfo(("",) * 100, 1000, vector_dim=1024, attributes=())
RECIPES = [(recipe, preset) for recipe, presets in configuration.recipes().items() for preset in presets]


def changed(path: str, value: object) -> dict[str, object]:
    values = to_dict(from_dict(RunConfig, MINIMAL))
    section = values
    *keys, last = path.split(".")
    for key in keys:
        section = section[key]
    section[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("sed", 1, "sed: unknown key; did you mean 'seed'?"),
        ("stages.a.group_sizes", 4, "stages.a.group_sizes: unknown key; did you mean 'group_size'?"),
        ("stages.a.group_size", "4", "stages.a.group_size: '4'; expected a whole number"),
        ("stages.a.group_size", True, "expected a whole number"),
        ("stages.a.group_size", 0, "stages.a.group_size: 0; it must be above 0"),
        ("stages.a.images", 1.5, "stages.a.images: 1.5; expected a whole number"),
        ("data.flip", 1, "data.flip: 1; expected true or false"),
        ("data.crop", 0.5, "data.crop: 0.5; allowed are 1"),
        ("precision", "float16", "^precision: 'float16'; expected 'auto' or 'bfloat16' or 'float32' or 'float64'"),
        ("strategy", "fsdp", "^strategy: 'fsdp'; expected 'ddp' or 'deepspeed'"),
        ("checkpoint.when_busy", "stop", "^checkpoint.when_busy: 'stop'; expected 'wait' or 'skip'"),
        ("stages.a.export_best", "best", "^stages.a.export_best: 'best'; expected 'auto' or 'r_precision' or 'last'"),
        ("name", "a/b", "name: 'a/b'; allowed are letters"),
        ("seed", -1, "seed: -1; allowed are 0"),
        ("cluster.workers", [3, 2], r"cluster.workers: \[3, 2\]; expected a number"),
        ("cluster.workers", [1, 2, 3], "expected 2 values"),
        ("cluster.workers", 3, "cluster.workers: 3 is more than the 2 groups of stage a"),
        ("stages.a.max_groups_per_worker", 1, "cluster.workers: 1 cannot run stage a: 2 groups, at most 1 per worker"),
        ("stages", {}, "stages: a run needs at least one stage"),
        ("report.captions", "a heart", "report.captions: 'a heart'; expected a list"),
        ("checkpoint", 3, "checkpoint: 3; expected a mapping"),
    ],
)
def test_bad_values_raise_an_error_that_names_key_and_value(path: str, value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_dict(RunConfig, changed(path, value))


@pytest.mark.parametrize(("gpus", "groups", "expected"), [(0, None, 4), (1, None, 1), (1, 3, 1), (0, 3, 3), (0, 9, 4)])
def test_groups_at_once(gpus: int, groups: int | None, expected: int) -> None:
    values = changed("cluster", {"workers": [2, 8], "gpus_per_worker": gpus})
    values["stages"] = {"a": values["stages"]["a"] | {"groups": 8, "micro_batch_groups": groups}}
    config = from_dict(RunConfig, values)
    assert config.groups_at_once(config.stages["a"]) == expected


def test_too_few_groups_are_named_in_every_stage() -> None:
    with pytest.raises(ValueError, match=r"give stages.damsm.groups=2 stages.attngan.groups=2$"):
        load("attngan", ["cluster.workers=[1,2]", "stages.judge.groups=2"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_bad": 5.0}, "max_bad: 5.0; allowed are 0"), ({"crop": 9.0}, "crop: 9.0; allowed are 1"),
        ({"cache_gib": -1.0}, "cache_gib: -1.0; allowed are 0"),
        ({"endpoint_url": "http://a:b@c"}, "endpoint_url: cred"),
    ],
)  # fmt: skip
def test_the_data_of_a_stage_is_named_with_the_stage(values: dict[str, object], sentence: str) -> None:
    config = from_dict(RunConfig, changed("stages.a.data", values))
    with pytest.raises(ValueError, match=f"^stages.a.data.{sentence}"):
        config.stage_data("a")


@pytest.mark.parametrize("key", ["about", "data.source", "stages.damsm.init_from"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x: y", "x: y"), ("@home", "@home"), ("*x", "*x"), ("a: b: c", "a: b: c"), ("[1", "[1"), ("{a: 1}", "{a: 1}"),
        ("123", "123"), ("true", "true"), ("null", "null"), ("", ""), ("'x: y'", "x: y"), ('"123"', "123"),
        ("it's", "it's"), ("'tis", "'tis"), ("a # b", "a # b"), ("'a' and 'b'", "'a' and 'b'"), (" x ", "x"),
    ],
)  # fmt: skip
def test_a_text_is_taken_as_it_stands(key: str, text: str, value: str) -> None:
    config = to_dict(load("attngan", [f"{key}={text}"]))
    for name in key.split("."):
        config = config[name]
    assert config == value


@pytest.mark.parametrize(("text", "value"), [("null", None), ("~", None), ("", None), ("'null'", "null"), ("@x", "@x")])
def test_null_is_no_text_where_it_is_allowed(text: str, value: str | None) -> None:
    assert load("attngan", [f"data.cache={text}"]).data.cache == value


def test_missing_key_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="stages.a.images: missing"):
        from_dict(RunConfig, {"name": "x", "stages": {"a": {"system": "damsm", "group_size": 4, "groups": 2}}})


def test_round_trip_through_yaml() -> None:
    for recipe, preset in RECIPES:
        config = load(recipe, [f"preset={preset}"])
        assert from_dict(RunConfig, parse_yaml(to_yaml(config), "x")) == config


@pytest.mark.parametrize(
    ("recipe", "overrides", "sentence"),
    [
        ("atngan", [], "no such recipe; did you mean 'attngan'"),
        ("attngan", ["preset=cubb"], "preset=cubb: attngan has .*cub"),
        ("attngan", ["seed"], "'seed': expected key.path=value"),
        ("attngan", ["seed=[1"], "seed=.*not valid YAML"),
        ("attngan", ["seed.x=1"], "'seed' is a value, not a section|seed: .*expected"),
        ("attngan", ["stages.attngan.model.witdh=1"], "unknown key"),
        ("attngan", ["stages.damsm.system=dams"], "stages.damsm.system: 'dams': no such system; did you mean 'damsm'?"),
        ("attngan", ["stages.damsm.uses={damsm: attngan}"], "stage 'attngan' does not come before 'damsm'"),
        ("attngan", ["stages.attngan.group_size=1"], "stages.attngan: group_size is 1"),
        ("attngan", ["data.source=avatar"], "did you mean avatars"),
        ("attngan", ["data.source=/nowhere/shards"], "/nowhere/shards: no dataset.json there"),
        ("attngan", ["stages.attngan.uses={damsm: /nowhere}"], "/nowhere: no export here"),
        ("nothere.yaml", [], "nothere.yaml: no such file"),
    ],
)
def test_bad_commands_print_one_sentence_and_return_2(
    recipe: str, overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = [] if any(override.startswith("data.source") for override in overrides) else ["data.source=emoji"]
    assert run.main([recipe, "--dry-run", f"storage={tmp_path}", *data, *overrides]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(lines[0])


def test_duplicate_keys_and_yaml_tags_are_errors() -> None:
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        parse_yaml("a: 1\na: 2\n", "file.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.system ['true']", "file.yaml")


def test_encoders_with_different_vocabularies_are_rejected() -> None:
    data, one, other = (Vocabulary(["<end>", *words]) for words in ("a", "ab", "ba"))
    assert stages.stage_vocabulary(data, {"damsm": one, "captioner": one}) == one
    assert stages.stage_vocabulary(data, {}) == data
    with pytest.raises(ValueError, match=r"uses.captioner: its vocabulary is not that of uses.damsm"):
        stages.stage_vocabulary(data, {"damsm": one, "captioner": other})


def test_an_encoder_brings_its_tokenizer_to_the_data() -> None:
    data = Vocabulary(["<end>", "gr\u00fcn", "red", "\u9ce5"], UNICODE)
    authors = Vocabulary(["<end>", "red", "grn"])
    assert stages.stage_vocabulary(data, {"damsm": authors}) == authors
    with pytest.raises(ValueError, match=r"uses.damsm: .* 1 of the data's .* \(grn...\)"):
        stages.stage_vocabulary(data, {"damsm": Vocabulary(["<end>", "red"])})


def test_every_recipe_builds_and_describes_its_preset(tmp_path: Path) -> None:
    assert {"attngan", "dcgan", "gan_cls", "stackgan_pp", "stargan"} <= set(configuration.recipes())
    for recipe, preset in RECIPES:
        config = load(recipe, [f"preset={preset}", f"storage={tmp_path}"])
        assert config.about and len(config.stages) >= 1
        for name in config.stages:
            with torch.device("meta"):
                stage = StageRun(config, name)
                stage.build(stage.build_info(DATA_INFO))


@pytest.mark.parametrize(
    ("recipe", "preset", "counts"),
    [
        ("attngan", "coco", ["G 13,811,456", "D 13,304,450 / 42,800,258 / 160,774,274"]),
        ("attngan", "cub", ["G 7,084,592", "D 6,313,730 / 19,424,002 / 71,858,946"]),
        ("stackgan_pp", "cub", ["G 21,239,696", "D 5,723,906 / 18,834,178 / 71,269,122"]),
        ("stargan", "celeba128", ["G 8,430,528", "D 44,762,048"]),
        ("stargan", "both256", ["G 8,461,888", "D 45,147,072"]),
    ],
)
def test_dry_run_prints_the_published_parameter_counts(
    recipe: str, preset: str, counts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run.main([recipe, f"preset={preset}", f"storage={tmp_path}", "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert all(count in page for count in counts)
    assert "memory per worker" in page and "images a step" in page
    assert "(721,152 trained)" in page or recipe != "attngan"


def test_command_without_a_preset_names_the_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run.main(["attngan", "--dry-run", "data.source=emoji", f"storage={tmp_path}"]) == 0
    page = capsys.readouterr().out
    assert "demo preset" in page.splitlines()[0]
    assert "images per epoch" in page and "vocabulary of 3,5" in page


def test_resume_rejects_settings_that_change_the_mathematics(tmp_path: Path) -> None:
    config = stages.with_absolute_paths(load("attngan", [f"storage={tmp_path}", "data.source=emoji"]))
    folder = tmp_path / config.name
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    overrides = [f"storage={tmp_path}", "data.source=emoji"]
    adjustable = ("cluster.workers=[1,1]", "stages.attngan.images=99", "data.threads=1", "checkpoint.keep=3")
    for same in (*adjustable, "gradients=bfloat16", "cuda_graphs=auto"):
        dry_run.check(stages.with_absolute_paths(load("attngan", [*overrides, same])), None)
    for other in ("seed=9", "stages.attngan.group_size=9", "stages.attngan.model.z_dim=9", "data.max_words=9"):
        with pytest.raises(ValueError, match="was started with .*; give name=ANOTHER for a new run"):
            dry_run.check(stages.with_absolute_paths(load("attngan", [*overrides, other])), None)


def test_run_of_an_older_version_lacks_newer_settings(tmp_path: Path) -> None:
    overrides = [f"storage={tmp_path}", "data.source=emoji"]
    config = stages.with_absolute_paths(load("attngan", overrides))
    newer = ("tf32", "deterministic", "gradients", "cuda_graphs")
    stored = {key: value for key, value in to_dict(config).items() if key not in newer}
    folder = tmp_path / config.name
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    dry_run.check(config, None)
    with pytest.raises(ValueError, match="tf32: True, but the run .* was started with False"):
        dry_run.check(stages.with_absolute_paths(load("attngan", [*overrides, "tf32=true"])), None)


def test_gradients_in_bfloat16_need_ddp() -> None:
    assert load("attngan", ["gradients=bfloat16"]).gradients == "bfloat16"
    with pytest.raises(ValueError, match="^gradients: bfloat16; DeepSpeed sends them in float32: use strategy: ddp$"):
        load("attngan", ["gradients=bfloat16", "strategy=deepspeed", "zero=1"])


def test_check_rejects_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="storage: cannot write to"):
        dry_run.check(
            stages.with_absolute_paths(load("attngan", [f"storage={tmp_path}/file/below", "data.source=emoji"])), None
        )


def test_check_requires_inception_weights_with_their_hash(tmp_path: Path) -> None:
    overrides = ["preset=cub", "data.source=emoji", f"storage={tmp_path}"]
    with pytest.raises(ValueError, match=r"stages.damsm.model.trunk_weights: missing; give the path or URL"):
        dry_run.check(stages.with_absolute_paths(load("attngan", overrides)), None)
    overrides.append(f"stages.damsm.model.trunk_weights={tmp_path}/x.safetensors")
    with pytest.raises(ValueError, match="has no sha256 of 64 digits"):
        dry_run.check(stages.with_absolute_paths(load("attngan", overrides)), None)


def test_schedules_follow_the_images_seen() -> None:
    exponential = Schedule("exponential", factor=0.98, every_images=100.0, floor=0.1)
    assert [lr_factor(exponential, n) for n in (0, 99, 100, 250)] == [1.0, 1.0, 0.98, 0.98**2]
    assert lr_factor(exponential, 10**6) == 0.1
    linear = Schedule("linear", start_images=100.0, end_images=300.0)
    assert [lr_factor(linear, n) for n in (0, 100, 200, 300, 900)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(ValueError, match="schedule kind 'cosine'; allowed are"):
        lr_factor(Schedule("cosine"), 0)
    assert ema_decay(692.8 * 20, 20) == pytest.approx(0.999, abs=1e-6)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E5", 2e5), ("-3e+2", -300.0), ("1.5e-3", 1.5e-3)])
def test_parse_yaml_reads_exponents_as_numbers(text: str, value: float) -> None:
    assert parse_yaml(f"lr: {text}", "here") == {"lr": value}
