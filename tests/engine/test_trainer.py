"""The trainer with a toy GAN: groups, roles, checkpoints, exports."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
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
from t2idist.engine.ema import Average
from t2idist.engine.groups import GroupedBatchNorm, convert_layers
from t2idist.engine.noise import Noise
from t2idist.engine.reports import stack_scalars
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.storage import objects
from tests.helpers import toy_gan
from tests.helpers.worker_processes import Workers

GROUPS, GROUP_SIZE = 4, 3
BUILD_INFO = BuildInfo(GROUP_SIZE, 5, toy_gan.DATA_INFO)
SINGLE_WORKER = World()


def make_trainer(
    world: World, precision: str = "float64", seed: int = 3, gradients: torch.dtype = torch.float32
) -> Trainer:
    torch.manual_seed(seed)
    share = Share.of(world, GROUPS)
    return Trainer(
        toy_gan.ToyGan(BUILD_INFO),
        stage="toy",
        seed=seed,
        group_size=GROUP_SIZE,
        share=share,
        world=world,
        precision=Precision(precision),
        gradients=gradients,
    )


def train_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.run_step(toy_gan.batch(trainer.step, trainer.share.lanes, GROUP_SIZE))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Copy parameters, EMA, averaged buffers and optimizer state by name."""
    return {k: v.detach().clone() for k, v in (trainer.state() | trainer.averaged_buffers()).items()}


def save_and_wait(checkpoints: CheckpointManager, trainer: Trainer) -> Path:
    folder = checkpoints.save(trainer)
    checkpoints.finish()
    assert folder is not None
    return Path(folder)


def state_after(world: World, count: int, precision: str) -> dict[str, Tensor]:
    trainer = make_trainer(world, precision)
    train_steps(trainer, count)
    return snapshot(trainer)


def train_or_resume(world: World, url: str, count: int, first: bool) -> dict[str, Tensor]:
    """Train for `count` steps and save, or resume from there; then train for `count` more."""
    trainer = make_trainer(world)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {"note": "x"})
    if first:
        train_steps(trainer, count)
        save_and_wait(checkpoints, trainer)
    else:
        checkpoint = checkpoints.restore(trainer)
        assert checkpoint is not None and checkpoint.marker["note"] == "x" and trainer.step == count
    train_steps(trainer, count)
    return snapshot(trainer)


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest norm of a difference, relative to 1 + the norm of the expected tensor."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[name].double(), expected[name].double()) for name in actual]
    return max(float((ours - theirs).norm() / (1 + theirs.norm())) for ours, theirs in pairs)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_workers_gives_the_same_state(workers: Workers, size: int) -> None:
    expected = state_after(SINGLE_WORKER, 6, "float64")
    for state in workers.run(size, state_after, 6, "float64"):
        assert largest_difference(state, expected) < 1e-11


def test_float32_on_three_workers_equals_one_worker_to_rounding(workers: Workers) -> None:
    for state in workers.run(3, state_after, 6, "float32"):
        assert largest_difference(state, state_after(SINGLE_WORKER, 6, "float32")) < 1e-4


def state_after_sending(world: World, count: int, gradients: torch.dtype) -> dict[str, Tensor]:
    trainer = make_trainer(world, "float32", gradients=gradients)
    train_steps(trainer, count)
    return snapshot(trainer)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_sent_in_bfloat16_are_equal_on_all_workers_and_near_float32(workers: Workers, size: int) -> None:
    (exact, *_) = workers.run(size, state_after_sending, 1, torch.float32)
    states = workers.run(size, state_after_sending, 1, torch.bfloat16)
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in exact)
    first = [name for name in exact if name.startswith("discriminator/") and name.endswith("exp_avg")]
    sent, expected = (torch.cat([state[name].flatten() for name in first]) for state in (states[0], exact))
    # each element is rounded twice to 8 bits: on its way to the worker that averages it, and as an average
    assert 0 < (sent - expected).norm() < 2**-8 * expected.norm()


def test_another_seed_gives_another_state() -> None:
    one, other = make_trainer(SINGLE_WORKER, seed=3), make_trainer(SINGLE_WORKER, seed=4)
    other.state()["generator/net/seed.weight"].copy_(one.state()["generator/net/seed.weight"])
    train_steps(one, 1)
    train_steps(other, 1)
    assert largest_difference(snapshot(one), snapshot(other)) > 1e-3


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("resumed_by", [1, 2, 3])
def test_resume_on_any_number_of_workers_gives_the_same_state(
    workers: Workers, tmp_path: Path, saved_by: int, resumed_by: int
) -> None:
    expected = workers.run(saved_by, train_or_resume, str(tmp_path), 3, True)[0]
    resumed = workers.run(resumed_by, train_or_resume, str(tmp_path), 3, False)[0]
    if saved_by == resumed_by:
        assert all(torch.equal(expected[k], resumed[k]) for k in expected), "same number of workers: bitwise"
    assert largest_difference(resumed, expected) < 1e-11


def test_checkpoint_in_an_object_store_resumes_bitwise() -> None:
    url = "memory://checkpoints/run"
    expected = train_or_resume(SINGLE_WORKER, url, 2, True)
    resumed = train_or_resume(SINGLE_WORKER, url, 2, False)
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)


@pytest.mark.parametrize("fault", ["truncated marker", "no marker", "flipped byte", "truncated part", "missing part"])
def test_restore_skips_a_damaged_checkpoint_and_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    trainer = make_trainer(SINGLE_WORKER)
    checkpoints = CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(), {})
    train_steps(trainer, 1)
    save_and_wait(checkpoints, trainer)
    expected = snapshot(trainer)
    train_steps(trainer, 1)
    newest = save_and_wait(checkpoints, trainer)
    marker, part = newest / COMMIT, next(newest.glob("*.safetensors"))
    if fault == "truncated marker":
        marker.write_bytes(marker.read_bytes()[:-40])
    elif fault == "no marker":
        marker.unlink()
    elif fault == "missing part":
        part.unlink()
    else:
        data = bytearray(part.read_bytes())
        data[-9] ^= 1
        part.write_bytes(data if fault == "flipped byte" else data[:-100])
    fresh = make_trainer(SINGLE_WORKER, seed=9)
    assert (
        checkpoints.restore(fresh) is not None
        and fresh.step == 1
        and largest_difference(snapshot(fresh), expected) == 0
    )
    damaged = part.name if "part" in fault or "byte" in fault else COMMIT
    assert damaged in caplog.text


def test_restore_raises_if_no_checkpoint_is_valid(tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE_WORKER)
    checkpoints = CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(), {})
    train_steps(trainer, 1)
    (save_and_wait(checkpoints, trainer) / COMMIT).unlink()
    with pytest.raises(ValueError, match="no checkpoint is valid.*commit.json: missing"):
        checkpoints.restore(make_trainer(SINGLE_WORKER))


def test_restore_returns_none_without_checkpoints(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(str(tmp_path / "none"), SINGLE_WORKER, CheckpointConfig(), {})
    assert checkpoints.restore(make_trainer(SINGLE_WORKER)) is None


def test_old_checkpoints_are_deleted_and_another_scale_is_rejected(tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE_WORKER)
    checkpoints = CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(), {})
    for _ in range(4):
        train_steps(trainer, 1)
        save_and_wait(checkpoints, trainer)
    assert [int(name[:12]) for name in list_folders(str(tmp_path))] == [48, 36]
    other = Trainer(
        toy_gan.ToyGan(BUILD_INFO),
        stage="toy",
        seed=3,
        group_size=GROUP_SIZE,
        share=Share(range(2), 2, 1),
        world=SINGLE_WORKER,
        precision=trainer.precision,
    )
    with pytest.raises(ValueError, match="written with groups 4, but this run has groups 2"):
        checkpoints.restore(other)


def test_load_names_a_tensor_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE_WORKER)
    train_steps(trainer, 1)
    url = str(save_and_wait(CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(), {}), trainer))
    with pytest.raises(CorruptCheckpoint, match="has no 'x'"):
        sharded.load({"x": torch.zeros(1)}, url, read_marker(url), SINGLE_WORKER)


def test_grouped_batch_norm_equals_batch_norm_of_each_group() -> None:
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


@pytest.mark.parametrize("sizes", [(8, 64), (64, 8)])
def test_one_layer_normalizes_small_and_large_images_in_one_graph(sizes: tuple[int, int]) -> None:
    """Small ones by torch's operation, large ones by exact sums; both move the statistics."""
    torch.manual_seed(0)
    plain, grouped = nn.BatchNorm2d(5).double(), nn.BatchNorm2d(5)
    convert_layers(grouped, 4, Noise(0, "s", range(1), 4, torch.device("cpu"), torch.float32))
    images = [torch.randn(4, 5, size, size).contiguous(memory_format=torch.channels_last) for size in sizes]
    for layer in (plain, grouped):
        losses = [(layer(image.to(layer.weight.dtype)) + 1).pow(3).mean() for image in images]
        torch.stack(losses).sum().backward()
    assert grouped.weight.grad is not None and plain.weight.grad is not None
    torch.testing.assert_close(grouped.weight.grad.double(), plain.weight.grad, rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(grouped, name).double(), getattr(plain, name).double(), rtol=1e-5, atol=1e-6)


def test_noise_depends_on_step_group_and_position_only() -> None:
    def draw(lanes: range, step: int) -> Tensor:
        noise = Noise(1, "stage", lanes, 2, torch.device("cpu"), torch.float64)
        noise.start(step)
        noise.normal(3)
        return noise.normal(3)

    whole = draw(range(4), 7)
    assert torch.equal(whole, torch.cat([draw(range(1), 7), draw(range(1, 4), 7)]))
    assert not torch.equal(whole, draw(range(4), 8)) and whole.unique().numel() == whole.numel()
    assert abs(float(Noise(1, "s", range(1), 20000, SINGLE_WORKER.device, torch.float32).normal(2).std()) - 1) < 0.02


def test_shares_are_even_and_of_whole_groups() -> None:
    shares = [Share.of(World(r, 3), 7) for r in range(3)]
    assert [list(s.lanes) for s in shares] == [[0, 1, 2], [3, 4], [5, 6]]
    assert sum(s.fraction for s in shares) == pytest.approx(1) and sum(s.weight for s in shares) == pytest.approx(3)
    with pytest.raises(ValueError, match="3 workers for 2 groups"):
        Share.of(World(0, 3), 2)


def test_convert_layers_rejects_unsupported_layers() -> None:
    noise = Noise(0, "s", range(1), 2, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="recurrent"):
        convert_layers(nn.Sequential(nn.LSTM(3, 3, num_layers=2, dropout=0.5)), 2, noise)
    with pytest.raises(ValueError, match="Dropout2d"):
        convert_layers(nn.Sequential(nn.Dropout2d()), 2, noise)


class MisusingGan(toy_gan.ToyGan):
    def step(self, batch, train):  # type: ignore[no-untyped-def]
        self.misuse(batch, train)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda b, t: (t.forward("generator", lambda n: 0), t.forward("generator", lambda n: 0)), "second forward"),
        (lambda b, t: t.apply("generator", torch.zeros(())), "without forward"),
        (lambda b, t: t.forward("generator", lambda n: 0), "forward without apply"),
        (lambda b, t: t.update("discriminator", lambda n: n.body(b.images[0]).mean()), "head.weight got no gradient"),
        (lambda b, t: t.update("discriminator", lambda n: n.body(b.images[0])), "must be a scalar"),
    ],
)
def test_misuse_of_train_is_an_assertion_error(misuse, message: str) -> None:  # type: ignore[no-untyped-def]
    system = MisusingGan(BUILD_INFO)
    system.misuse = misuse  # type: ignore[attr-defined]
    trainer = Trainer(
        system,
        stage="toy",
        seed=0,
        group_size=GROUP_SIZE,
        share=Share.of(SINGLE_WORKER, 1),
        world=SINGLE_WORKER,
        precision=Precision("float32"),
    )
    with pytest.raises(AssertionError, match=message):
        trainer.run_step(toy_gan.batch(0, range(1), GROUP_SIZE))


def test_ema_has_its_half_life_and_averages_buffers() -> None:
    trainer = make_trainer(SINGLE_WORKER)
    train_steps(trainer, 1)
    state = trainer.state()
    ema, net = state["generator/ema/out.bias"], state["generator/net/out.bias"]
    buffer = state["generator/ema/norm2.running_var"]
    before, buffer_before = ema.clone(), buffer.clone()
    train_steps(trainer, 1)
    decay = 0.5 ** (GROUPS * GROUP_SIZE / 200)
    torch.testing.assert_close(ema, decay * before + (1 - decay) * net)
    torch.testing.assert_close(buffer, decay * buffer_before + (1 - decay) * state["generator/net/norm2.running_var"])


@pytest.mark.parametrize(("with_statistics", "copies"), [(True, False), (False, False), (True, True), (False, True)])
def test_average_equals_the_formula_bitwise(with_statistics: bool, copies: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    ema = copy.deepcopy(net)
    expected = {name: value.clone() for name, value in ema.state_dict().items()}
    average = Average(ema, net, copies_statistics=copies)
    for step in range(3):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.copy_(step + torch.rand(value.shape) if value.is_floating_point() else value + 1)
        average.update(1 - 0.9, with_statistics=with_statistics)
        for name, value in net.state_dict().items():
            if not value.is_floating_point() or (copies and "running" in name):
                expected[name] = value.clone()
            elif with_statistics or "running" not in name:
                expected[name] = expected[name].lerp(value, 1 - 0.9)
    assert ema.state_dict().keys() == expected.keys() and expected["1.num_batches_tracked"] == 3
    assert all(torch.equal(value, expected[name]) for name, value in ema.state_dict().items())


def test_reports_keep_their_values_and_their_order() -> None:
    given = [torch.tensor(0.1), torch.tensor(2, dtype=torch.int64), torch.tensor(0.3).bfloat16(),
             torch.tensor(0.1, dtype=torch.float64), torch.tensor(float("nan")), torch.tensor(0.7)]  # fmt: skip
    expected = [float(value) for value in given]
    stacked, order = stack_scalars(given)
    assert [f"{value}" for value in stacked.tolist()] == [f"{expected[index]}" for index in order]
    assert sorted(order) == list(range(len(given))) and stack_scalars([])[1] == []


def test_export_round_trip_and_error_messages(tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE_WORKER, "float32")
    train_steps(trainer, 2)
    index = {
        "system": "toy",
        "config": {},
        "plan": {},
        "vocabulary": ["<end>"],
        "images": trainer.images,
        "data": {"a": 1},
    }
    export.write(str(tmp_path), trainer.evaluation_nets(), index)
    result = export.read(str(tmp_path))
    assert set(result.weights) == {"generator", "body"} and result.meta["data"] == {"a": 1}
    ema = trainer.state()["generator/ema/conv.weight"]
    assert torch.equal(result.weights["generator"]["conv.weight"], ema)
    with pytest.raises(ValueError, match="no network 'x'; it has"):
        export.read(str(tmp_path), ("x",))
    weights = {k: v for k, v in result.weights["generator"].items() if k != "seed.weight"}
    with pytest.raises(ValueError, match="lacks 'seed.weight'"):
        export.load_into(toy_gan.Generator(), weights, "e")
    (tmp_path / "body.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match="body.safetensors: damaged"):
        export.read(str(tmp_path))
    with pytest.raises(ValueError, match="no export here"):
        export.read(str(tmp_path / "none"))


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "simplecache::s3://b/k", "s3://user:secret@host/key"])
def test_urls_that_run_programs_or_contain_secrets_are_rejected(url: str) -> None:
    with pytest.raises(ValueError) as error:
        storage.read_bytes(url)
    assert "secret" not in str(error.value)


def test_role_without_ema_exports_its_live_weights() -> None:
    trainer = make_trainer(SINGLE_WORKER)
    train_steps(trainer, 1)
    body = trainer.evaluation_nets()["body"]
    assert torch.equal(body.state_dict()["0.weight"], trainer.state()["discriminator/net/body.0.weight"])
    assert not body.training and isinstance(trainer.system.roles["generator"], Role)


@pytest.mark.parametrize("size", [1, 2])
def test_interrupted_save_leaves_a_valid_checkpoint(workers: Workers, tmp_path: Path, size: int) -> None:
    for writes in range(size + 2):
        folder = tmp_path / str(writes)
        for images, interrupted in workers.run(size, interrupted_save, str(folder), writes):
            assert images == (24 if writes > size else 12) and interrupted == (writes <= size)


def replace_write_bytes(patch: pytest.MonkeyPatch, write: Callable[..., None]) -> None:
    for module in (storage, objects):  # write_json looks it up in the second
        patch.setattr(module, "write_bytes", write)


def interrupted_save(world: World, url: str, writes: int) -> tuple[int, bool]:
    """Save after step 1, then after step 2 with a store that fails after some writes.

    Returns:
        Images of the checkpoint that a new trainer restores; whether the second save failed.
    """
    trainer = make_trainer(world)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    train_steps(trainer, 1)
    save_and_wait(checkpoints, trainer)
    train_steps(trainer, 1)
    expected = snapshot(trainer)
    write = storage.write_bytes

    def write_or_fail(url: str, data: bytes | memoryview, **more: str | None) -> None:
        rank = url.rpartition("part-")[2][:5]
        position = int(rank) if rank.isdigit() else world.size  # the parts by rank, then the marker
        if position >= writes:
            raise OSError("the store is unreachable")
        write(url, data, **more)

    with pytest.MonkeyPatch.context() as patch:
        replace_write_bytes(patch, write_or_fail)
        try:
            save_and_wait(checkpoints, trainer)
            interrupted = False
        except OSError as error:
            interrupted = "the store is unreachable" in str(error)
    fresh = make_trainer(world, seed=9)
    checkpoint = CheckpointManager(url, world, CheckpointConfig(), {}).restore(fresh)
    assert checkpoint is not None
    if not interrupted:
        assert largest_difference(snapshot(fresh), expected) == 0
    return checkpoint.images, interrupted


def test_training_continues_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(SINGLE_WORKER)
    may_write, write = threading.Event(), storage.write_bytes

    def wait_and_write(url: str, data: bytes | memoryview, **more: str | None) -> None:
        assert may_write.wait(60)
        write(url, data, **more)

    replace_write_bytes(monkeypatch, wait_and_write)
    train_steps(trainer, 1)
    expected = snapshot(trainer)
    checkpoints = CheckpointManager(str(tmp_path), SINGLE_WORKER, CheckpointConfig(when_busy="skip"), {})
    assert checkpoints.save(trainer) is not None
    train_steps(trainer, 3)
    assert checkpoints.busy and checkpoints.save(trainer) is None
    may_write.set()
    checkpoints.finish()
    fresh = make_trainer(SINGLE_WORKER, seed=9)
    assert (
        checkpoints.restore(fresh) is not None
        and fresh.step == 1
        and largest_difference(snapshot(fresh), expected) == 0
    )


def test_milestones_are_the_first_at_or_after_each_multiple() -> None:
    assert milestones_of([10, 20, 30, 40, 50, 60], 25) == {30, 50}
    assert milestones_of([100, 200], 100) == {100, 200}


def test_ema_networks_track_the_statistics_of_their_own_forward() -> None:
    trainer = make_trainer(SINGLE_WORKER)
    train_steps(trainer, 2)
    batch_means: list[Tensor] = []
    ema = trainer._role_states["generator"].ema
    assert ema is not None
    norm = next(module for module in ema.modules() if isinstance(module, GroupedBatchNorm))

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert module.training and not ema.training, "the network stays in eval mode"
        means = [group.mean([0, *range(2, group.dim())]) for group in inputs[0].split(GROUP_SIZE)]
        batch_means.append(torch.stack(means).mean(0))

    norm.register_forward_pre_hook(record)
    for count in (1, 2, 3):
        trainer.run_step(toy_gan.batch(trainer.step, trainer.share.lanes, GROUP_SIZE), momentum=1 / count)
    assert len(batch_means) == 3 and norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.stack(batch_means).mean(0))
    live = trainer.state()["generator/net/norm2.running_mean"]
    assert not torch.allclose(trainer.state()["generator/ema/norm2.running_mean"], live)
    assert not norm.training and norm.momentum == 0.1


def test_statistics_momentum_averages_the_steps_before_each_evaluation() -> None:
    stage = StageConfig(system="toy", group_size=5, groups=2, images=2010, pictures_every_images=505)
    momenta = [loop.statistics_momentum(stage, step) for step in range(stage.steps)]
    evaluations = [n for n in range(stage.steps) if loop.due(505, n * 10, n * 10 + 10)] + [stage.steps - 1]
    assert evaluations == [50, 100, 151, 200]
    for step in evaluations:
        window = momenta[step - 31 : step + 1]
        assert window == [1 / (i + 1) for i in range(32)], "the mean of the last 32"
    assert sum(momentum > 0 for momentum in momenta) == 4 * 32
    often = replace(stage, pictures_every_images=10)
    assert [loop.statistics_momentum(often, step) for step in (0, 1, 2, 100)] == [1, 1 / 2, 1 / 3, 1 / 32]
