"""The engine with a toy system: groups, roles, checkpoints."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from t2idist import storage
from t2idist.config import CheckpointConfig, StageConfig
from t2idist.contract import BuildInfo, Role
from t2idist.engine import loop
from t2idist.engine.checkpoint import export, sharded
from t2idist.engine.checkpoint.format import COMMIT, CorruptCheckpoint, list_folders, milestones_of, read_marker
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.groups import GroupedBatchNorm, convert_layers
from t2idist.engine.noise import Noise
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.helpers import toy_gan
from tests.helpers.worker_processes import Workers

GROUPS, GROUP_SIZE = 4, 3
PLAN = BuildInfo(GROUP_SIZE, 5, toy_gan.EXTENT)
ALONE = World()


def trainer(world: World, precision: str = "float64", seed: int = 3) -> Trainer:
    torch.manual_seed(seed)
    share = Share.of(world, GROUPS)
    return Trainer(
        toy_gan.ToyGan(PLAN),
        stage="toy",
        seed=seed,
        group_size=GROUP_SIZE,
        share=share,
        world=world,
        precision=Precision(precision),
    )


def step(made: Trainer, count: int) -> None:
    for _ in range(count):
        made.run_step(toy_gan.batch(made.step, made.share.lanes, GROUP_SIZE))


def snapshot(made: Trainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in (made.state() | made.averaged_buffers()).items()}


def saved(checkpoints: CheckpointManager, made: Trainer) -> Path:
    folder = checkpoints.save(made)
    checkpoints.finish()
    assert folder is not None
    return Path(folder)


def after(world: World, count: int, precision: str) -> dict[str, Tensor]:
    made = trainer(world, precision)
    step(made, count)
    return snapshot(made)


def resumed(world: World, url: str, count: int, save: bool) -> dict[str, Tensor]:
    """Train, save after `count` steps or resume from there, and go on to twice as many."""
    made = trainer(world)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {"note": "x"})
    if save:
        step(made, count)
        saved(checkpoints, made)
    else:
        found = checkpoints.restore(made)
        assert found is not None and found.marker["note"] == "x" and made.step == count
    step(made, count)
    return snapshot(made)


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[k].double() - theirs[k].double()).norm() / (1 + theirs[k].double().norm())) for k in ours)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_workers_does_the_same_mathematics(workers: Workers, size: int) -> None:
    alone = after(ALONE, 6, "float64")
    for ours in workers.run(size, after, 6, "float64"):
        assert apart(ours, alone) < 1e-11


def test_float32_agrees_to_rounding(workers: Workers) -> None:
    for ours in workers.run(3, after, 6, "float32"):
        assert apart(ours, after(ALONE, 6, "float32")) < 1e-4


def test_another_seed_is_another_run() -> None:
    one, other = trainer(ALONE, seed=3), trainer(ALONE, seed=4)
    other.state()["generator/net/seed.weight"].copy_(one.state()["generator/net/seed.weight"])
    step(one, 1)
    step(other, 1)
    assert apart(snapshot(one), snapshot(other)) > 1e-3


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("resumed_by", [1, 2, 3])
def test_resume_on_any_number_of_workers(workers: Workers, tmp_path: Path, saved_by: int, resumed_by: int) -> None:
    whole = workers.run(saved_by, resumed, str(tmp_path), 3, True)[0]
    again = workers.run(resumed_by, resumed, str(tmp_path), 3, False)[0]
    if saved_by == resumed_by:
        assert all(torch.equal(whole[k], again[k]) for k in whole), "the same number of workers resumes bitwise"
    assert apart(again, whole) < 1e-11


def test_checkpoint_to_an_object_store_url() -> None:
    url = "memory://checkpoints/run"
    whole = resumed(ALONE, url, 2, True)
    again = resumed(ALONE, url, 2, False)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("fault", ["torn marker", "no marker", "flipped byte", "cut part", "lost part"])
def test_a_broken_checkpoint_is_found_and_the_previous_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    made = trainer(ALONE)
    checkpoints = CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(), {})
    step(made, 1)
    saved(checkpoints, made)
    kept = snapshot(made)
    step(made, 1)
    newest = saved(checkpoints, made)
    marker, part = newest / COMMIT, next(newest.glob("*.safetensors"))
    if fault == "torn marker":
        marker.write_bytes(marker.read_bytes()[:-40])
    elif fault == "no marker":
        marker.unlink()
    elif fault == "lost part":
        part.unlink()
    else:
        data = bytearray(part.read_bytes())
        data[-9] ^= 1
        part.write_bytes(data if fault == "flipped byte" else data[:-100])
    fresh = trainer(ALONE, seed=9)
    found = checkpoints.restore(fresh)
    assert found is not None and fresh.step == 1 and apart(snapshot(fresh), kept) == 0
    named = part.name if "part" in fault or "byte" in fault else COMMIT
    assert named in caplog.text


def test_where_every_checkpoint_is_broken_the_run_stops(tmp_path: Path) -> None:
    made = trainer(ALONE)
    checkpoints = CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(), {})
    step(made, 1)
    (saved(checkpoints, made) / COMMIT).unlink()
    with pytest.raises(ValueError, match="no checkpoint can be used.*commit.json: missing"):
        checkpoints.restore(trainer(ALONE))


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert CheckpointManager(str(tmp_path / "none"), ALONE, CheckpointConfig(), {}).restore(trainer(ALONE)) is None


def test_old_checkpoints_go_and_another_scale_is_refused(tmp_path: Path) -> None:
    made = trainer(ALONE)
    checkpoints = CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(), {})
    for _ in range(4):
        step(made, 1)
        saved(checkpoints, made)
    assert [int(name[:12]) for name in list_folders(str(tmp_path))] == [48, 36]
    other = Trainer(
        toy_gan.ToyGan(PLAN),
        stage="toy",
        seed=3,
        group_size=GROUP_SIZE,
        share=Share(range(2), 2, 1),
        world=ALONE,
        precision=made.precision,
    )
    with pytest.raises(ValueError, match="made with groups 4, and this run has groups 2"):
        checkpoints.restore(other)


def test_a_checkpoint_of_another_system_names_what_is_missing(tmp_path: Path) -> None:
    made = trainer(ALONE)
    step(made, 1)
    url = str(saved(CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(), {}), made))
    with pytest.raises(CorruptCheckpoint, match="has no 'x'"):
        sharded.load({"x": torch.zeros(1)}, url, read_marker(url), None)


def test_batch_norm_in_groups_is_batch_norm_of_each_group() -> None:
    torch.manual_seed(0)
    plain, grouped = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    convert_layers(grouped, 4, Noise(0, "s", range(3), 4, torch.device("cpu"), torch.float32))
    x = torch.randn(12, 5, 2, 2)
    expected = torch.cat([plain(part) for part in x.split(4)])
    assert torch.equal(grouped(x), expected)
    means = torch.stack([part.mean((0, 2, 3)) for part in x.split(4)])
    assert grouped.running_mean is not None
    torch.testing.assert_close(grouped.running_mean, 0.1 * means.mean(0))
    assert int(grouped.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_noise_depends_on_group_and_place_only() -> None:
    def draw(lanes: range, at: int) -> Tensor:
        noise = Noise(1, "stage", lanes, 2, torch.device("cpu"), torch.float64)
        noise.start(at)
        noise.normal(3)
        return noise.normal(3)

    whole = draw(range(4), 7)
    assert torch.equal(whole, torch.cat([draw(range(1), 7), draw(range(1, 4), 7)]))
    assert not torch.equal(whole, draw(range(4), 8)) and whole.unique().numel() == whole.numel()
    assert abs(float(Noise(1, "s", range(1), 20000, ALONE.device, torch.float32).normal(2).std()) - 1) < 0.02


def test_shares_are_whole_groups_and_even() -> None:
    shares = [Share.of(World(r, 3), 7) for r in range(3)]
    assert [list(s.lanes) for s in shares] == [[0, 1, 2], [3, 4], [5, 6]]
    assert sum(s.fraction for s in shares) == pytest.approx(1) and sum(s.weight for s in shares) == pytest.approx(3)
    with pytest.raises(ValueError, match="3 workers for 2 groups"):
        Share.of(World(0, 3), 2)


def test_layers_that_cannot_run_in_groups_are_refused() -> None:
    noise = Noise(0, "s", range(1), 2, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="recurrent"):
        convert_layers(nn.Sequential(nn.LSTM(3, 3, num_layers=2, dropout=0.5)), 2, noise)
    with pytest.raises(ValueError, match="Dropout2d"):
        convert_layers(nn.Sequential(nn.Dropout2d()), 2, noise)


class Misused(toy_gan.ToyGan):
    def step(self, batch, train):  # type: ignore[no-untyped-def]
        self.fault(batch, train)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lambda b, t: (t.forward("generator", lambda n: 0), t.forward("generator", lambda n: 0)), "second forward"),
        (lambda b, t: t.apply("generator", torch.zeros(())), "without forward"),
        (lambda b, t: t.forward("generator", lambda n: 0), "forward without apply"),
        (lambda b, t: t.update("discriminator", lambda n: n.body(b.images[0]).mean()), "head.weight got no gradient"),
        (lambda b, t: t.update("discriminator", lambda n: n.body(b.images[0])), "must be a scalar"),
    ],
)
def test_misuse_of_the_seam_is_caught(fault, sentence: str) -> None:  # type: ignore[no-untyped-def]
    system = Misused(PLAN)
    system.fault = fault  # type: ignore[attr-defined]
    made = Trainer(
        system,
        stage="toy",
        seed=0,
        group_size=GROUP_SIZE,
        share=Share.of(ALONE, 1),
        world=ALONE,
        precision=Precision("float32"),
    )
    with pytest.raises(AssertionError, match=sentence):
        made.run_step(toy_gan.batch(0, range(1), GROUP_SIZE))


def test_the_average_has_its_half_life_and_takes_buffers_along() -> None:
    made = trainer(ALONE)
    step(made, 1)
    live = made.state()
    ema, net = live["generator/ema/out.bias"], live["generator/net/out.bias"]
    buffer = live["generator/ema/norm2.running_var"]
    before, buffer_before = ema.clone(), buffer.clone()
    step(made, 1)
    keep = 0.5 ** (GROUPS * GROUP_SIZE / 200)
    torch.testing.assert_close(ema, keep * before + (1 - keep) * net)
    torch.testing.assert_close(buffer, keep * buffer_before + (1 - keep) * live["generator/net/norm2.running_var"])


def test_export_round_trip_and_its_faults(tmp_path: Path) -> None:
    made = trainer(ALONE, "float32")
    step(made, 2)
    index = {
        "system": "toy",
        "config": {},
        "plan": {},
        "vocabulary": ["<end>"],
        "images": made.images,
        "data": {"a": 1},
    }
    export.write(str(tmp_path), made.evaluation_nets(), index)
    found = export.read(str(tmp_path))
    assert set(found.weights) == {"generator", "body"} and found.meta["data"] == {"a": 1}
    ema = made.state()["generator/ema/conv.weight"]
    assert torch.equal(found.weights["generator"]["conv.weight"], ema)
    with pytest.raises(ValueError, match="no network 'x'; it has"):
        export.read(str(tmp_path), ("x",))
    with pytest.raises(ValueError, match="lacks 'seed.weight'"):
        export.load_into(
            toy_gan.Generator(), {k: v for k, v in found.weights["generator"].items() if k != "seed.weight"}, "e"
        )
    (tmp_path / "body.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match="body.safetensors: broken"):
        export.read(str(tmp_path))
    with pytest.raises(ValueError, match="no export here"):
        export.read(str(tmp_path / "none"))


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "simplecache::s3://b/k", "s3://user:secret@host/key"])
def test_urls_that_run_programs_or_hold_secrets_are_refused(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        storage.read_bytes(url)
    assert "secret" not in str(caught.value)


def test_a_role_without_average_exports_its_live_weights() -> None:
    made = trainer(ALONE)
    step(made, 1)
    body = made.evaluation_nets()["body"]
    assert torch.equal(body.state_dict()["0.weight"], made.state()["discriminator/net/body.0.weight"])
    assert not body.training and isinstance(made.system.roles["generator"], Role)


@pytest.mark.parametrize("size", [1, 2])
def test_a_save_cut_after_any_write_leaves_a_complete_state(workers: Workers, tmp_path: Path, size: int) -> None:
    for writes in range(size + 2):
        folder = tmp_path / str(writes)
        for images, cut in workers.run(size, cut_save, str(folder), writes):
            assert images == (24 if writes > size else 12) and cut == (writes <= size)


def cut_save(world: World, url: str, writes: int) -> tuple[int, bool]:
    """Save after step 1, then after step 2 with a store that fails after so many writes; what a fresh trainer finds."""
    made = trainer(world)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    step(made, 1)
    saved(checkpoints, made)
    step(made, 1)
    whole = snapshot(made)
    write = storage.write_bytes

    def failing(url: str, data: bytes | memoryview, **more: str | None) -> None:
        part = url.rpartition("part-")[2]
        number = int(part[:5]) if part[:5].isdigit() else world.size  # parts in order of workers, then the marker
        if number >= writes:
            raise OSError("the store is gone")
        write(url, data, **more)

    storage.write_bytes = failing  # type: ignore[assignment]
    try:
        saved(checkpoints, made)
        cut = False
    except OSError as error:
        cut = "the store is gone" in str(error)
    finally:
        storage.write_bytes = write
    fresh = trainer(world, seed=9)
    found = CheckpointManager(url, world, CheckpointConfig(), {}).restore(fresh)
    assert found is not None
    if not cut:
        assert apart(snapshot(fresh), whole) == 0
    return found.images, cut


def test_the_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(ALONE)
    held, write = threading.Event(), storage.write_bytes

    def slow(url: str, data: bytes | memoryview, **more: str | None) -> None:
        assert held.wait(60)
        write(url, data, **more)

    monkeypatch.setattr(storage, "write_bytes", slow)
    step(made, 1)
    then = snapshot(made)
    checkpoints = CheckpointManager(str(tmp_path), ALONE, CheckpointConfig(when_busy="skip"), {})
    assert checkpoints.save(made) is not None
    step(made, 3)
    assert checkpoints.busy and checkpoints.save(made) is None
    held.set()
    checkpoints.finish()
    fresh = trainer(ALONE, seed=9)
    found = checkpoints.restore(fresh)
    assert found is not None and fresh.step == 1 and apart(snapshot(fresh), then) == 0


def test_milestones_stay() -> None:
    assert milestones_of([10, 20, 30, 40, 50, 60], 25) == {30, 50}
    assert milestones_of([100, 200], 100) == {100, 200}


def test_averaged_networks_get_the_statistics_of_their_own_passes() -> None:
    made = trainer(ALONE)
    step(made, 2)
    seen: list[Tensor] = []
    average = made._role_states["generator"].ema
    assert average is not None
    first = next(module for module in average.modules() if isinstance(module, GroupedBatchNorm))

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert module.training and not average.training, "its own mode is that of evaluation"
        means = [group.mean([0, *range(2, group.dim())]) for group in given[0].split(GROUP_SIZE)]
        seen.append(torch.stack(means).mean(0))

    first.register_forward_pre_hook(note)
    for number in range(3):
        made.run_step(toy_gan.batch(made.step, made.share.lanes, GROUP_SIZE), momentum=1 / (number + 1))
    assert len(seen) == 3 and first.running_mean is not None
    torch.testing.assert_close(first.running_mean, torch.stack(seen).mean(0))
    live = made.state()["generator/net/norm2.running_mean"]
    assert not torch.allclose(made.state()["generator/ema/norm2.running_mean"], live)
    assert not first.training and first.momentum == 0.1


def test_statistics_are_settled_in_the_steps_before_a_look() -> None:
    stage = StageConfig(system="toy", group_size=5, groups=2, images=2010, pictures_every_images=505)
    momenta = [loop.statistics_momentum(stage, number) for number in range(stage.steps)]
    looks = [n for n in range(stage.steps) if loop.due(505, n * 10, n * 10 + 10)] + [stage.steps - 1]
    assert looks == [50, 100, 151, 200]
    for look in looks:
        window = momenta[look - 31 : look + 1]
        assert window == [1 / (i + 1) for i in range(32)], "the mean of the last 32"
    assert sum(momentum > 0 for momentum in momenta) == 4 * 32
    often = replace(stage, pictures_every_images=10)
    assert [loop.statistics_momentum(often, number) for number in (0, 1, 2, 100)] == [1, 1 / 2, 1 / 3, 1 / 32]
