"""The page of ``--plan``: measured costs, estimates and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from t2idist import config as configuration
from t2idist import run
from t2idist.config import load
from t2idist.contract import Batch, Frozen, Role, Train
from t2idist.engine.world import World
from t2idist.preflight import plan
from t2idist.preflight.cost import UPDATE_LAUNCHES, measure_step
from t2idist.preflight.dry_run import build_on_meta
from t2idist.training import stages
from t2idist.training.stages import StageRun
from tests.helpers import small_systems, toy_gan

PENALISED = ("stargan", "df_gan")
# PyTorch's counter fails on gradient penalties
SYSTEMS = [name for name, model in small_systems.MODELS.items() if name not in PENALISED and not model.get("r1_weight")]


@pytest.mark.parametrize("system", small_systems.MODELS)
def test_every_system_builds_on_the_meta_device(system: str) -> None:
    data = small_systems.DATA_INFOS.get(system, toy_gan.DATA_INFO)
    built = build_on_meta(StageRun(small_systems.config(system), system), data)
    assert all(weight.is_meta for role in built.roles.values() for weight in role.net.parameters())


@pytest.mark.parametrize("system", SYSTEMS)
def test_cost_on_the_meta_device_is_that_of_a_real_step(system: str) -> None:
    trainer = small_systems.trainer(World(), system, "float32", groups=1)
    with FlopCounterMode(display=False) as counter:
        small_systems.run_steps(trainer, 1)
    config = small_systems.config(system)
    with torch.device("meta"):
        stage = StageRun(config, system)
        data = small_systems.DATA_INFOS.get(system, toy_gan.DATA_INFO)
        system_on_meta = stage.build(stage.build_info(data))
    cost = measure_step(
        system_on_meta,
        small_systems.GROUP_SIZE,
        small_systems.MAX_WORDS,
        toy_gan.DATA_INFO.vector_dim,
        toy_gan.DATA_INFO.attributes,
    )
    # PyTorch's table lacks the CPU's RNN kernels, and real steps leave out pairs of one class
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    trained = [p.numel() for role in trainer.system.roles.values() for p in role.net.parameters() if p.requires_grad]
    assert cost.gradients == sum(trained)
    assert cost.activations > 0


def test_cost_counts_how_often_a_role_is_updated() -> None:
    config = small_systems.config("stargan")
    with torch.device("meta"):
        stage = StageRun(config, "stargan")
        system = stage.build(stage.build_info(toy_gan.TWO_DOMAINS))
    cost = measure_step(system, small_systems.GROUP_SIZE, small_systems.MAX_WORDS, 0, toy_gan.TWO_DOMAINS.attributes)
    sizes = {name: sum(p.numel() for p in role.net.parameters()) for name, role in system.roles.items()}
    steps = 3  # two data sets in turns, the generator at every second turn: steps 0, 1 and 2
    assert cost.gradients == pytest.approx(sizes["discriminator"] + sizes["generator"] / steps)


class LinearSystem:
    """A linear layer of sentence vectors."""

    def __init__(self) -> None:
        self.roles = {"net": Role(nn.Linear(3, 1))}
        self.frozen: dict[str, Frozen] = {}
        self.sizes = (4,)
        self.exports = ("net",)

    def step(self, batch: Batch, train: Train) -> None:
        train.update("net", lambda net: net(batch.captions.vectors).view(-1).mean())


def test_launches_are_the_operations_that_start_kernels() -> None:
    with torch.device("meta"):
        system = LinearSystem()
    cost = measure_step(system, 2, 4, 3, ((),))
    forward = ["addmm", "mean"]
    backward = ["ones_like", "div", "sum of the bias", "mm of the weight"]  # views and allocations start none
    assert cost.launches == len(forward) + len(backward) + UPDATE_LAUNCHES


def test_a_step_takes_as_long_as_its_submission() -> None:
    stage = plan.Estimate(
        state_gib=1.0, activations_gib=1.0, flops=1.0, compute_seconds=1e-3, launches=2000, sent_bytes=0.0,
        network_seconds=0.02, images_per_step=20, images=1000,
    )  # fmt: skip
    assert stage.submit_seconds == stage.busy_seconds == pytest.approx(2000 * plan.LAUNCH_SECONDS)
    exposed = 0.02 - plan.BACKWARD_SHARE * stage.submit_seconds
    assert stage.step_seconds == pytest.approx(stage.submit_seconds + exposed)


def test_plan_of_automatic_precision_takes_what_the_gpu_has() -> None:
    config = load("gan_cls", ["data.source="])
    assert "1 x t4, float32, ddp" in plan.page(config, "1xt4").splitlines()[0]
    assert "1 x l4, bfloat16, ddp" in plan.page(config, "1xl4").splitlines()[0]


def plan_page(text: str, *settings: str) -> str:
    return plan.page(stages.with_absolute_paths(load("attngan", ["preset=coco", *settings])), text)


SCALE = ("stages.damsm.groups=8", "stages.attngan.groups=8")


@pytest.mark.whole
def test_plan_of_the_paper_run_on_eight_gpus() -> None:
    page = plan_page("8xa100-80,efficiency=0.15", *SCALE)
    assert "compute 278.8 GFLOP an image, 83.4 ms a step" in page  # 304 without sharing of computations
    assert "network 1,615 MB sent a step and worker inside the node" in page  # 2 x 7/8 of 923 MB
    assert "speed 1,343 images/s" in page and "2.1 hours for 9,933,960 images" in page
    assert "assumed, not measured" in page
    slow = plan_page("16xa100-80,gbit=25", *(setting.replace("8", "16") for setting in SCALE))
    assert "sent a step and worker between nodes: 553.7 ms, 498.1 of them not hidden" in slow
    message = r"stage attngan needs .* and the a10g has 22; give more GPUs or stages.attngan.micro_batch_groups=4"
    with pytest.raises(ValueError, match=message):
        plan_page("1xa10g", *SCALE)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("8xa100-80", (), "cluster.workers: 8 is more than the 1 groups of stage damsm"),
        ("a100", (), "give a number of GPUs and their kind"),
        ("1xh10", (), "h10: no such kind; did you mean 'h100'"),
        ("1xh100,gbits=2", (), "gbits: unknown key; did you mean 'gbit'"),
        ("1xh100,efficiency=2", (), "efficiency=2; give 0 to 1"),
        ("1xt4", ("precision=bfloat16",), "the t4 has no bfloat16; give precision=float32"),
        ("1xh100", ("precision=float64",), "precision is float64"),
    ],
)
def test_plan_rejects_hardware_and_settings(text: str, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_page(text, *settings)


def test_plan_option_prints_the_page_and_writes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["dcgan", f"storage={tmp_path}", "--plan", "1xl4"]
    assert run.main(arguments) == 0
    assert "minutes in all" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", configuration.recipes())
def test_plan_of_every_recipe(recipe: str) -> None:
    for preset in configuration.recipes()[recipe]:
        assert "in all" in plan.page(stages.with_absolute_paths(load(recipe, [f"preset={preset}"])), "1xh200")
