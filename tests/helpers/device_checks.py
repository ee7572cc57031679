"""Checks of the engine on a device, for tests/engine/test_gpu.py and tools/check_gpu.py. They raise AssertionErrors.

    python -m tests.helpers.device_checks [--device cuda] NAME ...

Each check also runs on the CPU, where it compares the CPU with itself. Needs neither Ray nor a test runner.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2idist.config import CheckpointConfig
from t2idist.contract import Batch, BuildInfo, Frozen, Role, Train
from t2idist.engine.checkpoint.manager import CheckpointManager
from t2idist.engine.device_batches import DeviceBatches
from t2idist.engine.step_graphs import CudaGraphRecorder, Recorder
from t2idist.engine.strategy import Precision
from t2idist.engine.trainer import Trainer
from t2idist.engine.world import Share, World
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn.fast.layers import use_fast_layers
from t2idist.nn.stargan import PatchDiscriminator
from tests.helpers import small_systems, toy_gan

CPU = torch.device("cpu")
GROUPS, GROUP_SIZE, WORDS = 4, 3, 5


# ------------------------------------------------------------ systems and trainers
class PlainSystem:
    """A linear model of sentence vectors: a system without any floating buffer."""

    def __init__(self) -> None:
        self.roles = {
            "net": Role(nn.Sequential(nn.Linear(toy_gan.DATA_INFO.vector_dim, 8), nn.SiLU(), nn.Linear(8, 1)))
        }
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (8,)
        self.exports = ("net",)

    def step(self, batch: Batch, train: Train) -> None:
        def loss(net: nn.Module) -> Tensor:
            brightness = batch.images[-1].mean((1, 2, 3))
            return (net(batch.captions.vectors).squeeze(1) - brightness).square().mean()

        train.report("net/loss", train.update("net", loss))


class FailingRecorder(CudaGraphRecorder):
    """Records a step that then reads a value of the device."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        def reads() -> None:
            step()
            float(torch.ones(2, device="cuda").sum())

        try:
            return super().record(reads)
        except RuntimeError as error:
            raise RuntimeError("a recorded step reads a value") from error


def toy_trainer(
    world: World, plain: bool = False, precision: str = "float64", recorder: Recorder | None = None
) -> Trainer:
    torch.manual_seed(3)
    system = PlainSystem() if plain else toy_gan.ToyGan(BuildInfo(GROUP_SIZE, WORDS, toy_gan.DATA_INFO))
    return Trainer(
        system, stage="toy", seed=3, group_size=GROUP_SIZE, share=Share.of(world, GROUPS), world=world,
        precision=Precision(precision), recorder=recorder,
    )  # fmt: skip


def run_toy_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.run_step(toy_gan.batch(trainer.step, trainer.share.lanes, GROUP_SIZE))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Copy the state to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in trainer.state().items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare states by name: the norm of a difference, relative to 1 + the norm of the expected tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        theirs = value.double()
        difference = float((actual[name].double() - theirs).norm() / (1 + theirs.norm()))
        assert difference <= tolerance, f"{name}: {difference:.2g} apart"


def small_reports(label: str, device: torch.device, precision: str, steps: int) -> dict[str, float]:
    """Train a small system without kinks; return its reports."""
    world = World(device=device)
    trainer = Trainer(
        small_systems.build_smooth(label), stage=label, seed=5, group_size=small_systems.GROUP_SIZE,
        share=Share.of(world, small_systems.GROUPS), world=world, precision=Precision(precision),
    )  # fmt: skip
    small_systems.run_steps(trainer, steps)
    return trainer.reduce_reports()


# ------------------------------------------------------------ checks
def four_groups_equal_those_of_the_cpu(device: torch.device) -> None:
    """Two steps in float64 on four groups: group statistics, negatives and noise."""
    for label in ("damsm", "attngan", "captioner", "char_text", "stargan"):
        states = []
        for at in (CPU, device):
            trainer = small_systems.trainer(World(device=at), label, "float64")
            small_systems.run_steps(trainer, 2)
            states.append(snapshot(trainer))
        # sums of other orders; hinges and sorting amplify them in a step or two
        assert_close(states[1], states[0], 1e-6)


def micro_batches_equal_all_groups_at_once(device: torch.device) -> None:
    """Steps in float64; the generator's forward is computed twice, and its second one must be the first."""
    states = []
    for groups in (None, 1):
        trainer = small_systems.trainer(World(device=device), "attngan", "float64", micro_batch_groups=groups)
        small_systems.run_steps(trainer, 3)
        states.append(snapshot(trainer))
    assert_close(states[1], states[0], 1e-6)


def bfloat16_is_close_to_float64(device: torch.device) -> None:
    """The losses of a step: bfloat16 has 8 bits, and the losses are means."""
    for label in ("damsm", "attngan", "stargan"):
        exact, rounded = (small_reports(label, device, precision, 1) for precision in ("float64", "bfloat16"))
        assert exact.keys() == rounded.keys()
        for name, value in exact.items():
            if "accuracy" in name or name.startswith("norm/"):  # counts, and sums of many cancelling terms
                continue
            assert abs(rounded[name] - value) <= 0.05 * abs(value) + 0.02, (
                f"{label} {name}: {rounded[name]}, not {value}"
            )


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Within the context, an operation that lets the host wait for a CUDA device is an error with its stack."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def the_host_never_waits(device: torch.device) -> None:
    """A warm step of each small system, on a batch that is on the device."""
    for label in small_systems.MODELS:
        trainer = small_systems.trainer(World(device=device), label, "bfloat16")
        small_systems.run_steps(trainer, 2)
        data = small_systems.DATA_INFOS.get(label, toy_gan.DATA_INFO)
        batch = toy_gan.batch(
            trainer.step,
            trainer.share.lanes,
            small_systems.GROUP_SIZE,
            trainer.system.sizes,
            small_systems.MAX_WORDS,
            data,
        )
        batch = batch.to(device, trainer.precision.weights)
        with no_waits(device):
            trainer.run_step(batch)


@contextlib.contextmanager
def world_of_one(device: torch.device) -> Iterator[World]:
    """Open a process group of this process alone, as a worker does."""
    with tempfile.TemporaryDirectory() as folder:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield World(0, 1, device, dist.group.WORLD)
        finally:
            dist.destroy_process_group()


def one_worker_under_ddp_equals_the_bare_network(device: torch.device) -> None:
    """On NCCL if the device is a CUDA one; objects are gathered on gloo."""
    bare = toy_trainer(World(device=device))
    run_toy_steps(bare, 4)
    with world_of_one(device) as world:
        assert world.all_gather_object("x") == ["x"]
        trainer = toy_trainer(world)
        run_toy_steps(trainer, 4)
        assert_close(snapshot(trainer), snapshot(bare), 1e-6)
        assert trainer.reduce_reports().keys() == bare.reduce_reports().keys()


def checkpoints_load_bitwise_on_either_device(device: torch.device) -> None:
    """Saved on the device; read on the CPU and on the device."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = toy_trainer(World(device=device), precision="float32")
        run_toy_steps(trainer, 2)
        checkpoints = CheckpointManager(folder, trainer.world, CheckpointConfig(), {})
        assert checkpoints.save(trainer) is not None
        saved = snapshot(trainer)
        run_toy_steps(trainer, 1)  # the copy must not follow
        checkpoints.finish()
        for at in (CPU, device):
            world = World(device=at)
            resumed = toy_trainer(world, precision="float32")
            loaded = CheckpointManager(folder, world, CheckpointConfig(), {}).restore(resumed)
            assert loaded is not None and resumed.step == 2, at
            state = snapshot(resumed)
            assert all(torch.equal(state[name], value) for name, value in saved.items()), at
            run_toy_steps(resumed, 1)


def a_nan_changes_nothing(device: torch.device) -> None:
    """A step on an image with a NaN leaves weights, moments and buffers of the discriminator as they were."""
    trainer = toy_trainer(World(device=device))
    run_toy_steps(trainer, 2)
    before = snapshot(trainer)
    batch = toy_gan.batch(trainer.step, trainer.share.lanes, GROUP_SIZE).to(device, torch.float64)
    images = batch.images[-1].clone()
    images[-1, 0, 0, 0] = torch.nan
    trainer.run_step(replace(batch, images=(images,)))
    after = snapshot(trainer)
    kept = [name for name, value in before.items() if name.startswith("discriminator/") and value.is_floating_point()]
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []
    assert trainer.guard.skipped_steps == trainer.guard.skips_in_a_row == 1
    run_toy_steps(trainer, 1)
    assert trainer.guard.skips_in_a_row == 0
    assert all(bool(value.isfinite().all()) for value in snapshot(trainer).values())


def a_system_without_buffers_trains(device: torch.device) -> None:
    states = []
    for at in (CPU, device):
        trainer = toy_trainer(World(device=at), plain=True)
        run_toy_steps(trainer, 3)
        states.append(snapshot(trainer))
        assert trainer.guard.skipped_steps == 0
    assert_close(states[1], states[0], 1e-9)


def captions_are_encoded_as_on_the_cpu(device: torch.device) -> None:
    """The text encoder's LSTM, in float64."""
    net = small_systems.build("damsm").roles["damsm"].net.get_submodule("text").double().eval()
    captions = toy_gan.batch(0, range(2), 5).captions
    results = []
    with torch.no_grad():
        for at in (CPU, device):
            words, sentence = net.to(at)(captions.tokens.to(at), captions.lengths.to(at))[:2]
            results.append((words.cpu(), sentence.cpu()))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def recorded_steps_equal_launched_ones(device: torch.device) -> None:
    """Ten steps in float64 with CUDA graphs, and without; on a CPU there are none."""
    recorder = CudaGraphRecorder() if device.type == "cuda" else None
    for label in ("damsm", "attngan", "stackgan_pp-options", "stargan"):
        states = []
        for each in (None, recorder):
            trainer = small_systems.trainer(World(device=device), label, "float64", recorder=each)
            for _ in range(24):
                trainer.run_step(small_systems.toy_batch(trainer))
            states.append(snapshot(trainer))
            graphs = trainer.graphs
            assert graphs is None or (graphs.repeated_steps > 2 and not graphs.failure), f"{label}: {graphs.failure}"
        assert_close(states[1], states[0], 1e-5)


def a_step_that_cannot_be_recorded_is_launched(device: torch.device) -> None:
    """A recording that fails half-way leaves the device usable, and the state as it was."""
    if device.type != "cuda":
        return
    states = []
    for recorder in (None, FailingRecorder()):
        trainer = toy_trainer(World(device=device), plain=True, recorder=recorder)
        run_toy_steps(trainer, 12)
        states.append(snapshot(trainer))
        if recorder is not None:
            assert trainer.graphs is not None and "recorded step reads a value" in trainer.graphs.failure
    assert_close(states[1], states[0], 1e-9)
    assert int(torch.ones(1 << 20, device=device).sum()) == 1 << 20
    torch.cuda.empty_cache()


def penalties_have_the_gradients_of_the_cpu(device: torch.device) -> None:
    """The second derivative of a patch discriminator, in float64."""
    gradients = []
    for at in (CPU, device):
        torch.manual_seed(2)
        net = use_fast_layers(PatchDiscriminator(4, 32, 2, 3).to(at, torch.float64))
        real, fake = (torch.rand(3, 3, 32, 32, dtype=torch.float64).to(at) for _ in range(2))
        mixing = torch.rand(3, dtype=torch.float64).to(at)
        gradient_penalty(net.scores, real, fake, mixing).backward()
        gradients.append({name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None})
    assert_close(gradients[1], gradients[0], 1e-9)


def device_batches_equal_host_batches(device: torch.device) -> None:
    """Copied one step ahead on a stream of their own; the CPU has no streams."""
    if device.type == "cpu":
        return
    batches = DeviceBatches(_PinnedSource(), device, torch.float32)
    expected = toy_gan.batches(range(2), 4, (64,), 5)
    for _ in range(6):
        batch, host = next(batches), next(expected).to(CPU, torch.float32)
        assert batch.ids == host.ids and batch.images[0].device.type == device.type
        pairs = (
            (batch.images[0], host.images[0]), (batch.captions.tokens, host.captions.tokens),
            (batch.captions.vectors, host.captions.vectors), (batch.attributes, host.attributes),
            (batch.class_ids, host.class_ids),
        )  # fmt: skip
        for actual, wanted in pairs:
            torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=1e-6)
    batches.close()


class _PinnedSource:
    """Toy batches in page-locked memory."""

    samples_read, bad_reads, wait_seconds = 0, 0, 0.0

    def __init__(self) -> None:
        self.quarantine: dict[str, str] = {}
        self._batches = toy_gan.batches(range(2), 4, (64,), 5)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        return replace(batch, images=tuple(image.pin_memory() for image in batch.images))

    def close(self) -> None:
        pass


CHECKS: dict[str, Callable[[torch.device], None]] = {
    check.__name__: check
    for check in (
        one_worker_under_ddp_equals_the_bare_network,
        checkpoints_load_bitwise_on_either_device,
        a_nan_changes_nothing,
        a_system_without_buffers_trains,
        captions_are_encoded_as_on_the_cpu,
        penalties_have_the_gradients_of_the_cpu,
        device_batches_equal_host_batches,
        four_groups_equal_those_of_the_cpu,
        recorded_steps_equal_launched_ones,
        a_step_that_cannot_be_recorded_is_launched,
        micro_batches_equal_all_groups_at_once,
        bfloat16_is_close_to_float64,
        the_host_never_waits,
    )
}
QUICK = tuple(CHECKS)[:6]
"""Checks of a second or two on a CPU."""
IN_BFLOAT16 = (bfloat16_is_close_to_float64.__name__, the_host_never_waits.__name__)
"""Checks of a CPU that need its instructions for bfloat16."""


def main() -> None:
    """Run checks; print a JSON line for each: its name and its failure, "" if there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for name in options.names or CHECKS:
        failure = ""
        try:
            CHECKS[name](torch.device(options.device))
        except Exception as error:  # each check is a result of its own
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps({"check": name, "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
