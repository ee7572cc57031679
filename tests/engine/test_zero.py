"""DeepSpeed under ZeRO 1 and 2 does DDP's mathematics: every system, clipping, skipped steps, resumes across both."""

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
from tests.engine.test_guard import Poisoned
from tests.helpers import small_systems, toy_gan
from tests.helpers.runs import check_finished, run_command, train_with_killed_worker, write_recipe
from tests.helpers.worker_processes import Workers
from tools.bench import bench_zero

GROUPS, GROUP_SIZE, STEPS = 4, 3, 10
PLAN = BuildInfo(GROUP_SIZE, 5, toy_gan.EXTENT)

WHOLE_SYSTEMS = [
    pytest.param(name, marks=pytest.mark.whole if name in small_systems.QUICK else pytest.mark.slow)
    for name in small_systems.MODELS
]


class Clipped(toy_gan.ToyGan):
    """Gradients of one part are cut far down, so that every update feels it."""

    def __init__(self, plan: BuildInfo) -> None:
        super().__init__(plan)
        self.roles["discriminator"].clip_norm = 0.02


def build(system: str):  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    if system in small_systems.MODELS:
        return small_systems.build_smooth(system)
    return (
        {"toy": toy_gan.ToyGan, "clipped": Clipped}[system](PLAN) if system in ("toy", "clipped") else Poisoned(system)
    )


def trainer(world: World, system: str, zero: int, precision: str = "float32") -> Trainer:
    """`system`: one of systems/, toy, clipped, or how a toy's step is poisoned."""
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


def steps(made: Trainer, count: int) -> None:
    words = small_systems.MAX_WORDS if made.system.sizes != (8,) else 5
    for _ in range(count):
        made.run_step(toy_gan.batch(made.step, made.share.lanes, GROUP_SIZE, made.system.sizes, words))


def snapshot(made: Trainer) -> dict[str, Tensor]:
    """Parameters, EMA, settled buffers and optimiser moments by name."""
    return {k: v.detach().clone() for k, v in (made.state() | made.averaged_buffers()).items()}


def after(world: World, system: str, zero: int, precision: str = "float32") -> dict[str, Tensor]:
    made = trainer(world, system, zero, precision)
    steps(made, STEPS)
    return snapshot(made)


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of a name, relative to the norm.

    That of Adam's first moment may come close to zero where gradients of opposite signs follow each other, and then
    says nothing of what rounding does to it (in float64 such a one was 2,000 times as far apart as the others): where
    the root of the second moment is larger, it is relative to that.
    """
    assert ours.keys() == theirs.keys()

    def scale(name: str) -> float:
        norm = float(theirs[name].double().norm())
        if name.endswith("/exp_avg"):
            norm = max(norm, float(theirs[f"{name}_sq"].double().sqrt().norm()))
        return max(norm, 1e-30)

    return max(float((ours[name].double() - theirs[name].double()).norm()) / scale(name) for name in theirs)


# ------------------------------------------------------------ the same mathematics
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("system", ["toy", "clipped", *WHOLE_SYSTEMS])
def test_ten_steps_equal_those_of_ddp(workers: Workers, system: str, zero: int, size: int) -> None:
    theirs = workers.run(size, after, system, 0)[0]
    for ours in workers.run(size, after, system, zero):
        assert apart(ours, theirs) < 1e-4


def test_clipping_is_felt(workers: Workers) -> None:
    clipped, free = (workers.run(2, after, system, 1)[0] for system in ("clipped", "toy"))
    moment = "discriminator/adam/{}/exp_avg".format
    assert float(clipped[moment("body.0.weight")].norm()) < 0.02 < float(free[moment("body.0.weight")].norm())
    assert float(clipped[moment("head.weight")].norm()) > 0.02


def test_autocast_is_the_same(workers: Workers) -> None:
    theirs = workers.run(2, after, "attngan", 0, "bfloat16")[0]
    assert apart(workers.run(2, after, "attngan", 2, "bfloat16")[0], theirs) < 1e-4


def test_one_worker_takes_the_plain_engine() -> None:
    alone = World()
    assert apart(after(alone, "toy", 2), after(alone, "toy", 0)) == 0


# ------------------------------------------------------------ skipped steps
def poisoned(world: World, how: str, zero: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
    """Before and after the step that goes wrong, at the end, and how many were skipped."""
    made = trainer(world, how, zero)
    steps(made, 2)
    before = snapshot(made)
    steps(made, 1)
    skipped = snapshot(made)
    steps(made, 3)
    return before, skipped, snapshot(made), made.guard.skipped_steps


@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize(
    ("how", "kept"), [("picture", "discriminator/"), ("loss", "generator/"), ("gradient", "generator/")]
)
def test_a_bad_update_changes_nothing_on_any_worker(workers: Workers, how: str, kept: str, zero: int) -> None:
    *_, theirs, _ = workers.run(3, poisoned, how, 0)[0]
    for before, skipped, ours, count in workers.run(3, poisoned, how, zero):
        for name, value in skipped.items():
            if name.startswith(kept) and "/ema/" not in name and "num_batches" not in name:
                assert torch.equal(value, before[name]), name
        assert count == 1 and apart(ours, theirs) < 1e-4


# ------------------------------------------------------------ checkpoints
def leg(world: World, system: str, zero: int, url: str, go_on: bool, count: int) -> dict[str, Tensor]:
    """So many steps from the start or from the newest checkpoint, and a checkpoint of them."""
    made = trainer(world, system, zero)
    checkpoints = CheckpointManager(url, world, CheckpointConfig(), {})
    assert (checkpoints.restore(made) is not None) is go_on
    steps(made, count)
    checkpoints.save(made)
    checkpoints.finish()
    return snapshot(made)


def uninterrupted(world: World, system: str, zero: int, count: int) -> dict[str, Tensor]:
    made = trainer(world, system, zero)
    steps(made, count)
    return snapshot(made)


@pytest.mark.parametrize("system", ["toy", *WHOLE_SYSTEMS])
def test_a_run_goes_on_under_any_strategy_on_any_number_of_workers(
    workers: Workers, tmp_path: Path, system: str
) -> None:
    count = 3
    legs = [(0, 4), (1, 3), (2, 2), (0, 2), (2, 3), (1, 2), (0, 1)]
    ours: list[dict[str, Tensor]] = []
    for number, (zero, size) in enumerate(legs):
        ours = workers.run(size, leg, system, zero, str(tmp_path), number > 0, count)
    whole = workers.run(1, uninterrupted, system, 0, count * len(legs))[0]
    assert apart(ours[0], whole) < 1e-4
    assert max(float(value) for name, value in whole.items() if name.endswith("/step")) == count * len(legs)


@pytest.mark.parametrize("zero", [1, 2])
def test_the_same_workers_resume_bitwise(workers: Workers, tmp_path: Path, zero: int) -> None:
    for number in range(2):
        ours = workers.run(3, leg, "toy", zero, str(tmp_path), number > 0, 3)[0]
    whole = workers.run(3, uninterrupted, "toy", zero, 6)[0]
    assert all(torch.equal(ours[name], value) for name, value in whole.items())


def uneven(world: World, zero: int) -> None:
    made = trainer(world, "toy", zero)
    state = made.state()
    state["generator/adam/out.bias/step"].fill_(2)
    made.finish_load(state)


def test_steps_that_differ_by_parameter_are_refused(workers: Workers) -> None:
    with pytest.raises(AssertionError, match=r"generator: parameters took \[0.0, 2.0\] steps"):
        workers.run(2, uneven, 1)


# ------------------------------------------------------------ memory
def optimizer_bytes(world: World, zero: int) -> int:
    made = trainer(world, "attngan", zero)
    steps(made, 1)
    return made.optimizer_bytes()


@pytest.mark.whole
@pytest.mark.parametrize("zero", [1, 2])
def test_optimizer_memory_falls_with_the_number_of_workers(workers: Workers, zero: int) -> None:
    (whole,) = workers.run(1, optimizer_bytes, zero)
    assert workers.run(2, optimizer_bytes, 0) == [whole, whole]
    for size in (2, 3, 4):
        assert workers.run(size, optimizer_bytes, zero) == pytest.approx([whole / size] * size, rel=0.01)


def left_over(world: World, zero: int) -> int:
    """How many engines and networks stay in memory when their trainer is gone."""
    made = trainer(world, "toy", zero)
    steps(made, 2)
    made.evaluation_nets()
    parts = [weakref.ref(part) for live in made._role_states.values() for part in (live.strategy, live.role.net)]
    del made
    gc.collect()
    return sum(part() is not None for part in parts)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_finished_stage_leaves_nothing_in_memory(workers: Workers, zero: int) -> None:
    assert workers.run(2, left_over, zero) == [0, 0]


# ------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"strategy": "fsdp"}, "strategy: 'fsdp'; allowed are ddp and deepspeed"),
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
def test_what_deepspeed_cannot_do_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_dict(RunConfig, {**MINIMAL, **values})


@pytest.mark.parametrize("found", [None, "0.18.0"])
def test_deepspeed_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    values = {**MINIMAL, "strategy": "deepspeed", "zero": 1}
    assert from_dict(RunConfig, values).zero == 1

    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=f"is {found or 'not installed'}; install it with: pip install deepspeed==0"):
        from_dict(RunConfig, values)


class Headless(toy_gan.ToyGan):
    def step(self, batch: Batch, train: Train) -> None:
        train.update("discriminator", lambda net: net.body(batch.images[-1]).mean())


class Scalar(toy_gan.ToyGan):
    def __init__(self, plan: BuildInfo) -> None:
        super().__init__(plan)
        self.roles = {"scale": Role(nn.ParameterDict({"weight": nn.Parameter(torch.tensor(1.0))}))}


def one_step(world: World, system: type[toy_gan.ToyGan], zero: int) -> None:
    torch.manual_seed(3)
    made = Trainer(
        system(PLAN), stage="toy", seed=5, group_size=GROUP_SIZE, share=Share.of(world, GROUPS), world=world,
        precision=Precision("float32"), zero=zero,
    )  # fmt: skip
    steps(made, 1)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_parameter_without_gradient_is_found(workers: Workers, zero: int) -> None:
    with pytest.raises(AssertionError, match="discriminator: head.weight got no gradient"):
        workers.run(2, one_step, Headless, zero)


def test_a_parameter_that_deepspeed_cannot_take_is_named(workers: Workers) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: scale: 'weight' is \(\) torch.float32; DeepSpeed takes"):
        workers.run(2, one_step, Scalar, 1)


# ------------------------------------------------------------ a real run
@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
def test_two_ray_workers_train_under_deepspeed_what_one_trains(tmp_path: Path, zero: int) -> None:
    for name in ("alone", "cluster"):
        (tmp_path / name).mkdir()
    assert run_command(str(write_recipe(tmp_path / "alone")), "--local").returncode == 0
    cluster = {"workers": 2, "cpus_per_worker": 1}
    done = run_command(str(write_recipe(tmp_path / "cluster", cluster=cluster, strategy="deepspeed", zero=zero)))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "workers 2" in done.stdout and "DeepSpeed" not in done.stdout + done.stderr
    check_finished(tmp_path / "cluster")
    for stage, file in (("damsm", "text"), ("attngan", "generator")):
        ours = load_file(tmp_path / "cluster/runs/tiny" / stage / f"export/{file}.safetensors")
        theirs = load_file(tmp_path / "alone/runs/tiny" / stage / f"export/{file}.safetensors")
        for name, value in theirs.items():
            limit = 1e-3 * float(value.double().norm()) + 1e-6
            assert float((ours[name].double() - value.double()).norm()) <= limit, name


@pytest.mark.slow
def test_a_run_under_deepspeed_does_take_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")  # nobody else reads it
    failed = run_command(
        str(write_recipe(tmp_path, cluster={"workers": 2, "cpus_per_worker": 1}, strategy="deepspeed", zero=1))
    )
    assert failed.returncode == 1 and "DS_ACCELERATOR" in failed.stderr


@pytest.mark.slow
def test_a_worker_killed_under_deepspeed_is_replaced_and_the_model_is_the_same(tmp_path: Path) -> None:
    _, images, resumed = train_with_killed_worker(tmp_path, strategy="deepspeed", zero=2)
    assert resumed["from"] == "copy in memory" and resumed["images"] >= images - 8


@pytest.mark.slow
def test_the_benchmark_prints_half_the_optimizer_for_two_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_zero.py", "damsm", "--workers", "2", "--steps", "1"])
    assert bench_zero.main() == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    shares = [[part.strip() for part in row if part.strip()][1:4:2] for row in rows]
    assert shares == [["ddp", "1.000"], ["zero 1", "0.500"], ["zero 2", "0.500"]]
