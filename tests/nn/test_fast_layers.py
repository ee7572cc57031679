"""Fast layers match torch in values, gradients and second derivatives; cached casts are never stale."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from t2idist.contract import Adam
from t2idist.engine.strategy import FusedAdam, init_optimizer_state, make_adam
from t2idist.losses.penalties import gradient_penalty
from t2idist.nn.blocks import GLU, JointConv2d
from t2idist.nn.fast import layers
from t2idist.nn.fast.blocks import LastDimGLU
from t2idist.nn.fast.convolution import conv2d, gradient_of_images
from t2idist.nn.fast.layers import AcceleratorConv2d, CachedCast, FastConv2d, clear_cached_casts, use_fast_layers
from t2idist.nn.stargan import PatchDiscriminator
from tests.helpers.hardware import needs_bfloat16


@pytest.mark.parametrize(
    ("side", "stride", "padding", "size"), [(4, 2, 1, 8), (3, 1, 1, 4), (3, 1, 0, 5), (4, 4, 0, 8), (5, 2, 2, 7)]
)
def test_matrix_product_equals_the_convolution(
    monkeypatch: pytest.MonkeyPatch, side: int, stride: int, padding: int, size: int
) -> None:
    monkeypatch.setattr(layers, "MIN_MATRIX_ELEMENTS", 1)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 9, side, stride, padding).double()
    quick = use_fast_layers(copy.deepcopy(plain))
    assert isinstance(quick, FastConv2d) and list(quick.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 6, size, size, dtype=torch.float64, requires_grad=True)

    def gradients(net: nn.Module) -> list[Tensor]:
        out = net(images)
        (to_images,) = torch.autograd.grad(out.sin().sum(), images, create_graph=True)
        return [out, to_images, *torch.autograd.grad(to_images.square().sum(), [images, net.weight])]

    used = _count_calls(monkeypatch, F, "linear")
    ours = gradients(quick)
    assert used, "the weight is larger than the input"
    for mine, theirs in zip(ours, gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_large_input_uses_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    used = _count_calls(monkeypatch, F, "linear")
    net = use_fast_layers(nn.Conv2d(64, 128, 3))
    net(torch.randn(1, 64, 16, 16))
    assert not used, "73,728 weights are below the threshold"


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, (1, 3))]
)
def test_other_convolutions_are_not_replaced(module: nn.Conv2d) -> None:
    assert type(use_fast_layers(module)) is nn.Conv2d


def test_joint_convolution_caches_its_cast_and_keeps_its_class() -> None:
    torch.manual_seed(0)
    plain = JointConv2d(6, 3, 8)
    quick = use_fast_layers(copy.deepcopy(plain))
    assert isinstance(quick, CachedCast) and isinstance(quick, JointConv2d)
    assert use_fast_layers(quick) is quick and type(quick).__mro__.count(CachedCast) == 1
    features, conditions = torch.randn(2, 6, 4, 4), torch.randn(2, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        each = quick(features, *conditions)
    half = quick._half
    assert half is not None and all(out.dtype == torch.bfloat16 for out in each)
    torch.stack(each).float().square().sum().backward()
    torch.stack(plain(features, *conditions)).square().sum().backward()
    assert plain.weight.grad is not None and quick.weight.grad is not None
    assert (quick.weight.grad - plain.weight.grad).norm() < 0.02 * plain.weight.grad.norm()
    copied = copy.deepcopy(quick)
    assert type(copied) is type(quick) and copied._half is None and quick._half is half


def test_weight_is_cast_once_per_update_and_never_stale() -> None:
    torch.manual_seed(0)
    net = use_fast_layers(nn.Sequential(nn.Conv2d(3, 8, 3)))
    conv = net[0]  # type: ignore[index]
    assert isinstance(conv, FastConv2d)
    images = torch.randn(2, 3, 8, 8)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = net(images)
        return out

    def expected() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return F.conv2d(images, conv.weight, conv.bias)

    (run().float().sum() + run().float().square().sum()).backward()
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32
    half = conv._half
    assert half is not None
    run()
    assert conv._half is half, "kept while the weight does not change"
    with torch.no_grad():
        conv.weight.add_(1)
    torch.testing.assert_close(run(), expected())
    conv.weight.data.add_(1)  # does not change the version
    clear_cached_casts(net)
    torch.testing.assert_close(run(), expected())
    conv.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not conv.cast_weight().requires_grad
    with torch.inference_mode():
        clear_cached_casts(net)
        run()
    conv.weight.requires_grad_(True)
    run().float().sum().backward()
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied[0].weight.zero_()  # type: ignore[index, union-attr]
    torch.testing.assert_close(run(), expected())


def test_cast_is_channels_last_whatever_the_layout_of_the_weight() -> None:
    conv = use_fast_layers(nn.Conv2d(8, 8, 3)).to(memory_format=torch.contiguous_format)  # as under DeepSpeed
    assert isinstance(conv, CachedCast) and not conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.cast_weight().is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_two_passes_match_autocast() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, 3)
    quick = use_fast_layers(copy.deepcopy(plain))
    first, second = torch.randn(2, 2, 8, 8, 8)
    for net in (plain, quick):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(first).float().square().mean() + net(second).float().sin().mean()
        loss.backward()
    for mine, theirs in zip(quick.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-2, atol=1e-3)


class _Flops(TorchDispatchMode):
    """Counts operations by torch's table."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("smallest", [1, layers.MIN_MATRIX_ELEMENTS])
def test_gradient_penalty_matches_torch_with_fewer_operations(monkeypatch: pytest.MonkeyPatch, smallest: int) -> None:
    monkeypatch.setattr(layers, "MIN_MATRIX_ELEMENTS", smallest)
    torch.manual_seed(0)
    plain = PatchDiscriminator(4, 16, 3, 3).double()
    quick = use_fast_layers(copy.deepcopy(plain))
    real, fake = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    flops = []
    for net in (plain, quick):
        with _Flops() as count:
            gradient_penalty(net.scores, real, fake, torch.tensor([0.2, 0.7])).backward()  # type: ignore[operator]
        flops.append(count.total)
    for (name, mine), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None and bool(theirs.grad.any()):  # torch has zeros for biases
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert flops[1] < 0.7 * flops[0], "forward, backward to the images, and the gradients of both: four passes, not six"


@pytest.mark.parametrize(
    ("channels", "out", "side", "geometry"),
    [
        (3, 5, 4, ((2, 2), (1, 1), (1, 1), 1)),
        (4, 6, 3, ((1, 1), (0, 0), (1, 1), 1)),
        (4, 6, 3, ((2, 1), (1, 2), (2, 2), 2)),
    ],
)
def test_accelerator_convolution_has_the_derivatives_of_torch(
    channels: int, out: int, side: int, geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
) -> None:
    """First and second derivatives by images, weight and bias, in float64."""
    torch.manual_seed(0)
    shapes = [(2, channels, 9, 9), (out, channels // geometry[3], side, side), (out,)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs[0] = inputs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for fn in (lambda: conv2d(*inputs, geometry), lambda: F.conv2d(*inputs, *geometry)):  # type: ignore[misc]
        value = fn()
        first = torch.autograd.grad(value.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)  # type: ignore[arg-type]
        results.append([value, *first, *second])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


class _Kernels(TorchDispatchMode):
    """Records the spatial size of the kernel of every convolution, and the passes of its gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sides: set[int] = set()
        self.passes: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is torch.ops.aten.convolution:
            self.sides.add(args[1].shape[-1])
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            self.passes.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_gradient_penalty_on_accelerators_has_no_feature_map_as_kernel() -> None:
    torch.manual_seed(0)
    plain = PatchDiscriminator(4, 32, 3, 2).double()
    quick = use_fast_layers(copy.deepcopy(plain))
    for module in quick.modules():
        if type(module) is FastConv2d:
            module.__class__ = AcceleratorConv2d
    real, fake = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    kernels = []
    for net in (plain, quick):
        with _Kernels() as seen:
            gradient_penalty(net.scores, real, fake, torch.tensor([0.2, 0.7])).backward()  # type: ignore[operator]
        kernels.append(seen)
    assert max(kernels[0].sides) > 4, "torch's own second derivative"
    assert kernels[1].sides <= {3, 4}, "the sides of the network's kernels"
    own = kernels[1].passes
    assert all(sum(mask) == 1 for mask in own), "each pass computes one gradient"
    assert len(own) == 3 + 3, "of the images, then of the weights"
    for (name, mine), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None and bool(theirs.grad.any()):  # torch has zeros for biases
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_gradient_of_images_leaves_out_those_of_weights() -> None:
    images, weight = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    for inside in (True, False):
        out = conv2d(images, weight, None, ((1, 1), (0, 0), (1, 1), 1)).sum()
        with gradient_of_images() if inside else contextlib.nullcontext():
            gradients = torch.autograd.grad(out, [images, weight], allow_unused=True)
        assert gradients[0] is not None and (gradients[1] is None) is inside


@needs_bfloat16
def test_accelerator_convolution_equals_autocast_bitwise() -> None:
    torch.manual_seed(0)
    for plain in (nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"), nn.Conv2d(4, 8, (1, 3), groups=2)):
        quick = copy.deepcopy(plain)
        quick.__class__ = AcceleratorConv2d
        images = torch.randn(2, 4, 8, 8)
        for net in (plain, quick):
            with torch.autocast("cpu", torch.bfloat16):
                net(images).float().square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quick(images), plain(images))
            assert quick.cast_weight() is quick.cast_weight(), "cast once"
        for mine, theirs in zip(quick.parameters(), plain.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)
        with gradient_of_images(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(quick(images), plain(images), rtol=1e-2, atol=1e-2)


def test_devices_that_are_no_cpu_get_accelerator_convolutions() -> None:
    source = """
import torch
from torch import nn
from t2idist.nn.fast.layers import AcceleratorConv2d, use_fast_layers
from tests.helpers import fake_accelerator
fake_accelerator._setup_privateuseone_for_python_backend(fake_accelerator.DEVICE, fake_accelerator.BackendModule())
with fake_accelerator.FakeDevice(), fake_accelerator.DeviceKernels():
    net = use_fast_layers(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, (1, 3))).to(fake_accelerator.DEVICE))
    assert all(type(layer) is AcceleratorConv2d for layer in net)
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_leaky_relu_matches_torch() -> None:
    torch.manual_seed(0)
    layer = use_fast_layers(nn.LeakyReLU(0.3, inplace=True))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
    assert torch.equal(layer(x), F.leaky_relu(x, 0.3)) and torch.equal(layer(x.detach().clone()), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 32, 64])
def test_glu_matches_torch(dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(0)
    given = torch.randn(2, 2 * channels, 5, 7).to(dtype)
    results = []
    for layout, fn in ((torch.contiguous_format, lambda x: F.glu(x, 1)), (torch.channels_last, GLU())):
        x = given.clone(memory_format=layout).requires_grad_()
        out = fn(x)
        (out.float() ** 2).sum().backward()
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_last_dim_glu_has_the_gradients_of_glu() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LastDimGLU.apply, rows)
    one = torch.randn(1, 8, dtype=torch.float64)
    before = one.clone()
    torch.testing.assert_close(LastDimGLU.apply(one), F.glu(before, -1))  # type: ignore[no-untyped-call]
    assert torch.equal(one, before)


def test_adam_matches_torch_in_either_layout() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = copy.deepcopy(net)
    ours = make_adam(net.parameters(), Adam(lr=0.01))
    init_optimizer_state(ours)
    fused = FusedAdam(ours)
    theirs = torch.optim.Adam(other.parameters(), lr=0.01, betas=(0.5, 0.999), foreach=False)
    for step in range(3):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 1:
            net[0].weight.grad = net[0].weight.grad.contiguous()  # type: ignore[union-attr]
        fused.step(0.01, torch.zeros(()))
        theirs.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    before = [p.detach().clone() for p in net.parameters()]
    fused.step(0.01, torch.ones(()))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)), "found_inf skips the update"


def test_adam_with_kept_views_equals_new_views_bitwise() -> None:
    torch.manual_seed(0)
    kept = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    renewed = copy.deepcopy(kept)
    optimizers = [make_adam(net.parameters(), Adam(lr=0.01)) for net in (kept, renewed)]
    for optimizer in optimizers:
        init_optimizer_state(optimizer)
    fused = FusedAdam(optimizers[0])
    for _ in range(3):
        for p, q in zip(kept.parameters(), renewed.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        fused.step(0.01, torch.zeros(()))
        FusedAdam(optimizers[1]).step(0.01, torch.zeros(()))
    for p, q in zip(kept.parameters(), renewed.parameters(), strict=True):
        assert torch.equal(p, q)
        pair = (optimizers[0].state[p], optimizers[1].state[q])
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in pair[0])


def test_freed_memory_is_kept() -> None:
    """Large tensors reuse their pages. Runs in a separate process, because the setting is permanent."""
    code = (
        "import resource, torch; from t2idist.nn.fast.memory import keep_freed_memory\n"
        "torch.set_num_threads(1); keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.empty(1 << 26).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(faults() > 100, min(faults() for _ in range(9)) < 20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"], done.stdout


def _count_calls(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[int]:
    calls: list[int] = []
    own = getattr(module, name)

    def counted(*args: object, **settings: object) -> object:
        calls.append(1)
        return own(*args, **settings)

    monkeypatch.setattr(module, name, counted)
    return calls
