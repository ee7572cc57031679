"""DeepSpeed (ZeRO 1 and 2) equals DDP: every system, clipping, skipped steps, resuming across strategies."""

from __future__ import annotations

import gc
import importlib.metadata
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from t2idist.config import CheckpointConfig, RunConfig
from t2idist.config.strict import from_dict
from t2idist.contract import Batch, BuildInfo, Role, Train
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from tests.config.test_config import MINIMAL
from tests.engine.test_guard import NonFiniteGan
from tests.helpers import small_systems, toy_gan
from tests.helpers.hardware import needs_bfloat16
from tests.helpers.runs import check_finished, run_command, train_with_killed_worker, write_recipe
from tests.helpers.worker_processes import Workers
from tools.bench import bench_zero

GROUPS, GROUP_SIZE, STEPS = 4, 3, 10
BUILD_INFO = BuildInfo(GROUP_SIZE, 5, toy_gan.DATA_INFO)

WHOLE_SYSTEMS = [
    pytest.param(name, marks=pytest.mark.whole if name in small_systems.QUICK else pytest.mark.slow)
    for name in small_systems.MODELS
]


class ClippedGan(toy_gan.ToyGan):
    """A toy GAN whose clipping changes every update."""

    def __init__(self, plan: BuildInfo) -> None:
        super().__init__(plan)
        self.roles["discriminator"].clip_norm = 0.02


def build(system: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    if system in small_systems.MODELS:
        return small_systems.build_smooth(system)
    return (
        {"toy": toy_gan.ToyGan, "clipped": ClippedGan}[system](BUILD_INFO)
        if system in ("toy", "clipped")
        else NonFiniteGan(system)
    )


def make_trainer(world: World, system: str, zero: int, precision: str = "float32") -> Trainer:
    """`system` is one of systems/, "toy", "clipped", or where a `NonFiniteGan` is not finite."""
    return Trainer(
        build(system),
        stage=system,
        seed=5,
        group_size=GROUP_SIZE,
        share=Share.of(world, GROUPS),
        world=world,
        precision=Precision(precision),
        zero=zero,
    )


def train_steps(trainer: Trainer, count: int) -> None:
    max_words = small_systems.MAX_WORDS if trainer.system.sizes != (8,) else 5
    for _ in range(count):
        trainer.run_step(toy_gan.batch(trainer.step, trainer.share.lanes, GROUP_SIZE, trainer.system.sizes, max_words))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Copy parameters, EMA, averaged buffers and optimizer state by name."""
    return {k: v.detach().clone() for k, v in (trainer.state() | trainer.averaged_buffers()).items()}


def state_after(world: World, system: str, zero: int, precision: str = "float32") -> dict[str, Tensor]:
    trainer = make_trainer(world, system, zero, precision)
    train_steps(trainer, STEPS)
    return snapshot(trainer)


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest norm of a difference, relative to the norm of the expected tensor.

    Adam's first moment may be close to zero after gradients of opposite signs, and its norm is then no measure of its
    rounding errors (in float64 the relative difference of one was 2,000 times that of the others). Its difference is
    relative to the root of the second moment if that is larger. A worker has only the memory of its own groups.
    """
    assert all(name.startswith("memory/") for name in actual.keys() ^ expected.keys())

    def scale(name: str) -> float:
        norm = float(expected[name].double().norm())
        if name.endswith("/exp_avg"):
            norm = max(norm, float(expected[f"{name}_sq"].double().sqrt().norm()))
        return max(norm, 1e-30)

    return max(
        float((actual[name].double() - expected[name].double()).norm()) / scale(name)
        for name in actual.keys() & expected
    )


# ------------------------------------------------------------ equality with DDP
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("system", ["toy", "clipped", *WHOLE_SYSTEMS])
def test_ten_steps_equal_ddp(workers: Workers, system: str, zero: int, size: int) -> None:
    expected = workers.run(size, state_after, system, 0)[0]
    for state in workers.run(size, state_after, system, zero):
        assert largest_difference(state, expected) < 1e-4


def test_only_clipped_parameters_have_small_moments(workers: Workers) -> None:
    clipped, unclipped = (workers.run(2, state_after, system, 1)[0] for system in ("clipped", "toy"))
    moment = "discriminator/adam/{}/exp_avg".format
    assert float(clipped[moment("body.0.weight")].norm()) < 0.02 < float(unclipped[moment("body.0.weight")].norm())
    assert float(clipped[moment("head.weight")].norm()) > 0.02


@needs_bfloat16
def test_bfloat16_equals_ddp(workers: Workers) -> None:
    expected = workers.run(2, state_after, "attngan", 0, "bfloat16")[0]
    assert largest_difference(workers.run(2, state_after, "attngan", 2, "bfloat16")[0], expected) < 1e-4


def test_single_worker_uses_ddp_strategy() -> None:
    single = World()
    assert largest_difference(state_after(single, "toy", 2), state_after(single, "toy", 0)) == 0


# ------------------------------------------------------------ skipped steps
def states_around_skip(
    world: World, how: str, zero: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
    """Return the states before and after the non-finite step and at the end, and the number of skipped steps."""
    trainer = make_trainer(world, how, zero)
    train_steps(trainer, 2)
    before = snapshot(trainer)
    train_steps(trainer, 1)
    skipped = snapshot(trainer)
    train_steps(trainer, 3)
    return before, skipped, snapshot(trainer), trainer.guard.skipped_steps


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize(
    ("how", "unchanged"), [("image", "discriminator/"), ("loss", "generator/"), ("gradient", "generator/")]
)
def test_nonfinite_update_changes_nothing_on_any_worker(workers: Workers, how: str, unchanged: str, zero: int) -> None:
    *_, expected, _ = workers.run(3, states_around_skip, how, 0)[0]
    for before, skipped, state, count in workers.run(3, states_around_skip, how, zero):
        for name, value in skipped.items():
            if name.startswith(unchanged) and "/ema/" not in name and "num_batches" not in name:
                assert torch.equal(value, before[name]), name
        assert count == 1 and largest_difference(state, expected) < 1e-4


# ------------------------------------------------------------ checkpoints
def train_leg(world: World, system: str, zero: int, url: str, resume: bool, count: int) -> dict[str, Tensor]:
    """Train for `count` steps, from the start or from the newest checkpoint, and save."""
    trainer = make_trainer(world, system, zero)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    assert (checkpoints.restore(trainer) is not None) is resume
    train_steps(trainer, count)
    checkpoints.save(trainer)
    checkpoints.finish()
    return snapshot(trainer)


def train_uninterrupted(world: World, system: str, zero: int, count: int) -> dict[str, Tensor]:
    trainer = make_trainer(world, system, zero)
    train_steps(trainer, count)
    return snapshot(trainer)


@pytest.mark.parametrize("system", ["toy", *WHOLE_SYSTEMS])
def test_run_resumes_under_any_strategy_on_any_number_of_workers(workers: Workers, tmp_path: Path, system: str) -> None:
    count = 3
    legs = [(0, 4), (1, 3), (2, 2), (0, 2), (2, 3), (1, 2), (0, 1)]
    states: list[dict[str, Tensor]] = []
    for index, (zero, size) in enumerate(legs):
        states = workers.run(size, train_leg, system, zero, str(tmp_path), index > 0, count)
    expected = workers.run(1, train_uninterrupted, system, 0, count * len(legs))[0]
    assert largest_difference(states[0], expected) < 1e-4
    assert max(float(value) for name, value in expected.items() if name.endswith("/step")) == count * len(legs)


@pytest.mark.parametrize("zero", [1, 2])
def test_same_number_of_workers_resumes_bitwise(workers: Workers, tmp_path: Path, zero: int) -> None:
    for index in range(2):
        state = workers.run(3, train_leg, "toy", zero, str(tmp_path), index > 0, 3)[0]
    expected = workers.run(3, train_uninterrupted, "toy", zero, 6)[0]
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def load_uneven_steps(world: World, zero: int) -> None:
    trainer = make_trainer(world, "toy", zero)
    state = trainer.state()
    state["generator/adam/out.bias/step"].fill_(2)
    trainer.finish_load(state)


def test_step_counts_that_differ_by_parameter_are_rejected(workers: Workers) -> None:
    with pytest.raises(AssertionError, match=r"generator: parameters took \[0.0, 2.0\] steps"):
        workers.run(2, load_uneven_steps, 1)


# ------------------------------------------------------------ memory
def optimizer_bytes(world: World, zero: int) -> int:
    trainer = make_trainer(world, "attngan", zero)
    train_steps(trainer, 1)
    return trainer.optimizer_bytes()


@pytest.mark.whole
@pytest.mark.parametrize("zero", [1, 2])
def test_optimizer_memory_is_inverse_to_the_number_of_workers(workers: Workers, zero: int) -> None:
    (whole,) = workers.run(1, optimizer_bytes, zero)
    assert workers.run(2, optimizer_bytes, 0) == [whole, whole]
    for size in (2, 3, 4):
        assert workers.run(size, optimizer_bytes, zero) == pytest.approx([whole / size] * size, rel=0.01)


def count_live_objects(world: World, zero: int) -> int:
    """Return how many strategies and networks stay in memory after their trainer was deleted."""
    trainer = make_trainer(world, "toy", zero)
    train_steps(trainer, 2)
    trainer.evaluation_nets()
    references = [
        weakref.ref(part) for state in trainer._role_states.values() for part in (state.strategy, state.role.net)
    ]
    del trainer
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_deleted_trainer_leaves_nothing_in_memory(workers: Workers, zero: int) -> None:
    assert workers.run(2, count_live_objects, zero) == [0, 0]


# ------------------------------------------------------------ rejected settings and networks
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "fsdp"}, "strategy: 'fsdp'; expected 'ddp' or 'deepspeed'"),
        ({"zero": 2}, "zero: 2; it needs strategy: deepspeed, and the strategy is ddp"),
        ({"strategy": "deepspeed"}, "zero: 0; allowed with strategy: deepspeed are 1"),
        (
            {"strategy": "deepspeed", "zero": 3},
            "zero: 3; allowed are 1 and 2: with stage 3 no worker has a whole network",
        ),
        (
            {"strategy": "deepspeed", "zero": 1, "precision": "float64"},
            "precision: float64; DeepSpeed keeps weights in",
        ),
    ],
)
def test_config_rejects_what_deepspeed_does_not_support(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, {**MINIMAL, **values})


@pytest.mark.parametrize("installed", [None, "0.18.0"])
def test_missing_or_other_deepspeed_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, installed: str | None
) -> None:
    values = {**MINIMAL, "strategy": "deepspeed", "zero": 1}
    assert from_dict(RunConfig, values).zero == 1

    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ValueError, match=f"is {installed or 'not installed'}; install it with: pip install deepspeed==0"
    ):
        from_dict(RunConfig, values)


class HeadlessGan(toy_gan.ToyGan):
    def step(self, batch: Batch, train: Train) -> None:
        train.update("discriminator", lambda net: net.body(batch.images[-1]).mean())


class ScalarGan(toy_gan.ToyGan):
    def __init__(self, plan: BuildInfo) -> None:
        super().__init__(plan)
        self.roles = {"scale": Role(nn.ParameterDict({"weight": nn.Parameter(torch.tensor(1.0))}))}


def run_one_step(world: World, system: type[toy_gan.ToyGan], zero: int) -> None:
    torch.manual_seed(3)
    trainer = Trainer(
        system(BUILD_INFO), stage="toy", seed=5, group_size=GROUP_SIZE, share=Share.of(world, GROUPS), world=world,
        precision=Precision("float32"), zero=zero,
    )  # fmt: skip
    train_steps(trainer, 1)


@pytest.mark.parametrize("zero", [1, 2])
def test_parameter_without_gradient_is_an_assertion_error(workers: Workers, zero: int) -> None:
    with pytest.raises(AssertionError, match="discriminator: head.weight got no gradient"):
        workers.run(2, run_one_step, HeadlessGan, zero)


def test_unsupported_parameter_is_named(workers: Workers) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: scale: 'weight' is \(\) torch.float32; DeepSpeed takes"):
        workers.run(2, run_one_step, ScalarGan, 1)


# ------------------------------------------------------------ whole runs
@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_deepspeed_on_two_ray_workers_trains_the_same_weights_as_one_worker(tmp_path: Path, zero: int) -> None:
    for name in ("single", "cluster"):
        (tmp_path / name).mkdir()
    assert run_command(str(write_recipe(tmp_path / "single")), "--local").returncode == 0
    cluster = {"workers": 2, "cpus_per_worker": 1}
    done = run_command(str(write_recipe(tmp_path / "cluster", cluster=cluster, strategy="deepspeed", zero=zero)))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "workers 2" in done.stdout and "DeepSpeed" not in done.stdout + done.stderr
    check_finished(tmp_path / "cluster")
    for stage, file in (("damsm", "text"), ("attngan", "generator")):
        actual = load_file(tmp_path / "cluster/runs/tiny" / stage / f"export/{file}.safetensors")
        expected = load_file(tmp_path / "single/runs/tiny" / stage / f"export/{file}.safetensors")
        for name, value in expected.items():
            limit = 1e-3 * float(value.double().norm()) + 1e-6
            assert float((actual[name].double() - value.double()).norm()) <= limit, name


@pytest.mark.slow
def test_strategy_deepspeed_imports_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")  # only DeepSpeed reads it
    failed = run_command(
        str(write_recipe(tmp_path, cluster={"workers": 2, "cpus_per_worker": 1}, strategy="deepspeed", zero=1))
    )
    assert failed.returncode == 1 and "DS_ACCELERATOR" in failed.stderr


@pytest.mark.slow
def test_killed_deepspeed_worker_is_replaced_and_the_weights_are_the_same(tmp_path: Path) -> None:
    _, images, resumed = train_with_killed_worker(tmp_path, strategy="deepspeed", zero=2)
    assert resumed["from"] == "copy in memory" and resumed["images"] >= images - 8


@pytest.mark.slow
def test_benchmark_prints_half_the_optimizer_state_for_two_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_zero.py", "damsm", "--workers", "2", "--steps", "1"])
    assert bench_zero.main() == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    shares = [[part.strip() for part in row if part.strip()][1:4:2] for row in rows]
    assert shares == [["ddp", "1.000"], ["zero 1", "0.500"], ["zero 2", "0.500"]]
