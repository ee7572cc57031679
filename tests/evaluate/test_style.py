"""The style encoder inverts a generator, the measure on known cases, and the command t2idist style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2idist.config import DataConfig, RunConfig
from t2idist.config.strict import from_dict, to_dict
from t2idist.data.loader import load_split
from t2idist.data.sources import open_dataset
from t2idist.engine.checkpoint import export
from t2idist.evaluate import style
from t2idist.evaluate.style import area_under_curve, background_colours, kmeans, label_ids, roc_curve, verify
from t2idist.sampling.loading import exported_network, load_export
from t2idist.training.stages import StageRun
from tests.helpers import small_systems
from tests.helpers.fixed_weights import fill
from tests.systems.test_gan_cls import TINY_TEXT, VECTORS, build_info, build_system, export_index, text_batch
from tests.systems.test_loss_values import trainer


# ---------------------------------------------------------------------------------------------------- the system
@pytest.mark.parametrize("name", ["gan_cls", "dcgan"])
def test_style_encoder_inverts_images(name: str) -> None:
    torch.manual_seed(0)
    settings = {**TINY_TEXT, **({"conditional": True} if name == "dcgan" else {"residual": False})}
    plan = build_info(VECTORS, 32, sources={"generator": export_index(name, build_info(VECTORS), **settings)})
    system: Any = build_system("style", plan, width=16, lr=1e-3)
    generator = fill(system.frozen["generator"].net)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    run = trainer(system, 32)
    for step in range(150):
        run.run_step(text_batch(step, repeats=4))
        if step == 0:
            first = run.reduce_reports()["style/squared_error"]
        if step == 129:
            run.reduce_reports()
    assert 0.8 < first < 1.5  # a constant prediction scores 1
    assert run.reduce_reports()["style/squared_error"] < 0.05
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())

    # the style of one image with the text of another: z of the first image, captions of the others
    nets = run.evaluation_nets()
    batch = text_batch(999, repeats=4)
    z = torch.randn(32, 4, generator=torch.Generator().manual_seed(5))
    captions, others = batch.captions, batch.captions[torch.arange(32).roll(1)]
    with torch.no_grad():
        images, expected = (system.sample(nets, c, lambda *_: z).images[-1] for c in (captions, others))
        inverted = system.invert(nets, images)
        transferred = system.sample(nets, others, lambda *_: inverted).images[-1]
        other_noise = system.sample(nets, others, lambda *_: z.roll(1, 0)).images[-1]
        enlarged = nn.functional.interpolate(images, scale_factor=2, mode="nearest")
        moved = (system.invert(nets, enlarged) - inverted).square().mean()
    assert moved < 0.5 * (inverted.roll(1, 0) - inverted).square().mean()
    assert (transferred - expected).square().mean() < 0.6 * (other_noise - expected).square().mean()


# ---------------------------------------------------------------------------------------------------- the measure
def test_roc_curve_computed_by_hand() -> None:
    scores = torch.tensor([0.9, 0.8, 0.8, 0.1])
    same = torch.tensor([True, True, False, False])
    false_positive, true_positive = roc_curve(scores, same)
    assert false_positive.tolist() == [0.0, 0.0, 0.5, 1.0]
    assert true_positive.tolist() == [0.0, 0.5, 1.0, 1.0]
    assert area_under_curve(false_positive, true_positive) == 0.875  # of 4 pairs of pairs, 3 are in order and one ties
    assert area_under_curve(*roc_curve(-scores, same)) == 0.125


def test_codes_with_the_style_score_one_and_random_ones_a_half() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 8
    directions = torch.eye(8)[labels]
    exact = verify(directions + 0.01 * torch.randn(400, 8, generator=generator), labels)
    assert exact.auc > 0.9999 and exact.fold_std < 1e-3 and (exact.folds, exact.n) == (5, 400)
    assert exact.roc[0] == (0.0, 0.0) and exact.roc[-1] == (1.0, 1.0) and len(exact.roc) <= 201
    blind = verify(torch.randn(400, 8, generator=generator), labels)
    assert abs(blind.auc - 0.5) < 0.03
    assert verify(torch.ones(400, 8), labels).auc == 0.5
    alike = 1 + 1e-13 * torch.randn(400, 8, generator=generator).double() * labels.unsqueeze(1)
    assert verify(alike, labels).auc == 0.5
    part = verify(directions + 1.0 * torch.randn(400, 8, generator=generator), labels)
    assert blind.auc + 0.05 < part.auc < exact.auc - 0.05


def test_result_is_the_mean_over_the_folds() -> None:
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    codes = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    result = verify(codes, labels, folds=2, seed=3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    areas = []
    for rows in (order[:4], order[4:]):
        pairs = [(i, j) for a, i in enumerate(rows.tolist()) for j in rows.tolist()[a + 1 :]]
        cosine = [float(nn.functional.cosine_similarity(codes[i], codes[j], dim=0)) for i, j in pairs]
        same = [bool(labels[i] == labels[j]) for i, j in pairs]
        wins = [
            float(a > b)
            for a, s in zip(cosine, same, strict=True)
            if s
            for b, t in zip(cosine, same, strict=True)
            if not t
        ]
        areas.append(sum(wins) / len(wins))
    assert result.auc == pytest.approx(sum(areas) / 2)
    assert result.fold_std == pytest.approx(abs(areas[0] - areas[1]) / 2)


def test_invalid_input_of_the_measure_is_rejected() -> None:
    with pytest.raises(ValueError, match="no fold has both pairs of one label and pairs of two"):
        verify(torch.randn(10, 2), torch.arange(10))
    with pytest.raises(ValueError, match="give one row per label"):
        verify(torch.randn(9, 2), torch.arange(10))
    with pytest.raises(ValueError, match="0 folds"):
        verify(torch.randn(10, 2), torch.arange(10) % 2, folds=0)
    with pytest.raises(ValueError, match="--clusters 9: allowed are 2 to 3"):
        kmeans(torch.tensor([[0.0], [0.0], [1.0], [2.0]]), 9)
    with pytest.raises(ValueError, match="a.json: has no label for any of the 2 samples"):
        label_ids({"x": 1}, ["a", "b"], "a.json")


def test_kmeans_finds_separated_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(300) % 6
    centres = torch.randn(6, 3, generator=generator) * 5
    assignment = kmeans(centres[kinds] + 0.05 * torch.randn(300, 3, generator=generator), 6, seed=4)
    assert (
        all(len(set(assignment[kinds == kind].tolist())) == 1 for kind in range(6))
        and len(set(assignment.tolist())) == 6
    )


def test_background_colour_is_the_mean_of_the_frame() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0] = torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1)
    images[:, :, 4:-4, 4:-4] = 200
    expected = torch.tensor([[1.0, -1.0, -0.6], [-1.0, -1.0, -1.0]])
    torch.testing.assert_close(background_colours(images), expected, rtol=0, atol=1e-6)


def test_label_ids_number_the_labels_by_sample_key() -> None:
    rows, numbers = label_ids({"a": "perched", "c": "flies", "d": "perched"}, ["a", "b", "c", "d"], "x")
    assert (rows.tolist(), numbers.tolist()) == ([0, 2, 3], [0, 1, 0])


# ---------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs of exports of small untrained networks for emoji, by system."""
    folder = tmp_path_factory.mktemp("exports")
    values = to_dict(small_systems.config("style", "float32"))
    run = from_dict(RunConfig, {**values, "data": {"source": "emoji", "max_words": 6, "crop": 1.0}})
    dataset = open_dataset(run.data)
    urls = {}
    for name in run.stages:
        torch.manual_seed(0)
        plan = StageRun(run, name).build_info(dataset.info)
        system = StageRun(run, name).build(plan)
        index = {
            "system": run.stages[name].system,
            "config": to_dict(StageRun(run, name).model_config()),
            "plan": plan.describe(),
            "vocabulary": list(dataset.vocabulary.words),
            "images": 7,
            "data": {"settings": to_dict(run.data)},
        }
        nets = {dotted.rpartition(".")[2]: fill(exported_network(system, dotted)) for dotted in system.exports}
        urls[name] = str(folder / name)
        export.write(urls[name], nets, index)
    return urls


def run_command(exports: dict[str, str], out: Path, *arguments: str) -> dict[str, Any]:
    command = ["--export", exports["style"], "--limit", "80", "--folds", "2", "--out", str(out), *arguments]
    assert style.main(command) == 0
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def test_style_export_is_scored(exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_command(exports, tmp_path / "style.json", "--clusters", "5")
    assert set(results) == {"inverted noise", "sentence vector"}
    output = capsys.readouterr().out
    for name, row in results.items():
        assert 0.0 <= row["auc"] <= 1.0 and row["n"] == 80 and row["roc"][-1] == [1.0, 1.0]
        assert f"{name:16} AUC {row['auc']:.3f}" in output
    assert run_command(exports, tmp_path / "again.json", "--clusters", "5") == results
    assert run_command(exports, tmp_path / "style.json", "--clusters", "5") == results


def test_result_of_other_options_and_inputs_are_not_overwritten(
    exports: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(exports, tmp_path / "style.json", "--clusters", "5")
    (tmp_path / "labels.json").write_text('{"a": "b"}')
    (tmp_path / "photo.png").write_bytes(b"photo")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for out, options, message in (
        ("style.json", ["--clusters", "6"], "exists, and is not a result with these options; give another --out"),
        ("photo.png", ["--clusters", "5"], "exists, and is not a result with these options; give another --out"),
        ("labels.json", ["--labels", str(tmp_path / "labels.json")], "is an input of this command"),
    ):
        arguments = ["--export", exports["style"], "--limit", "80", "--folds", "2", "--out", str(tmp_path / out)]
        assert style.main([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_command_equals_verify_of_the_parts(exports: dict[str, str], tmp_path: Path) -> None:
    """The labels are computed from the inverted noise, so that it predicts them."""
    loaded = load_export(exports["style"], torch.device("cpu"))
    settings = from_dict(DataConfig, loaded.meta["data"]["settings"])
    batch = load_split(open_dataset(settings), "test", sizes=(16,), max_words=6, limit=80, crop=1.0).batch
    codes = style.encode_batch(loaded, batch)["inverted noise"]
    positive = (codes[:, 0] > codes[:, 0].median()).long()
    file = tmp_path / "labels.json"
    labels = [(key, f"style {int(n)}") for key, n in zip(batch.ids, positive, strict=True)]
    file.write_text(json.dumps(dict(labels[1:])))
    results = run_command(exports, tmp_path / "style.json", "--labels", str(file))
    assert results["inverted noise"]["auc"] == pytest.approx(verify(codes[1:], positive[1:], folds=2).auc)
    assert results["inverted noise"]["n"] == 79
    assert results["inverted noise"]["auc"] > results["sentence vector"]["auc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clusters", "1"], "--clusters 1: allowed are 2 to"),
        (["--split", "valid"], "no split 'valid'; there are"),
        (["--labels", "/nowhere.json"], "--labels /nowhere.json: "),
        (["--data", "emojis"], "did you mean emoji"),
    ],
)
def test_invalid_arguments_give_one_sentence(
    exports: dict[str, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert style.main(["--export", exports["style"], "--limit", "20", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_export_without_inversion_is_rejected(exports: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert style.main(["--export", exports["gan_cls"]]) == 2
    assert "system gan_cls does not invert images; give the export of a style stage" in capsys.readouterr().err


def test_style_export_generates_the_same_images_as_its_generator(exports: dict[str, str]) -> None:
    theirs, own = (load_export(exports[name], torch.device("cpu")) for name in ("gan_cls", "style"))
    batch = load_split(open_dataset(DataConfig(source="emoji")), "test", sizes=(16,), max_words=6, limit=4).batch

    def draw(*shape: int) -> Tensor:
        return torch.ones(4, *shape)

    images = [x.system.sample(x.nets, batch.captions, draw).images[-1] for x in (theirs, own)]  # type: ignore[attr-defined]
    assert torch.equal(*images) and float(images[0].std()) > 0.01
