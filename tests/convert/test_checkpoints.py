"""The authors' files of weights: old formats, damaged files, and files that would run code."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from t2idist.contract import Pretrained
from t2idist.convert.authors import checkpoints
from t2idist.convert.authors.checkpoints import Checkpoint
from t2idist.convert.authors.importing import import_weights
from t2idist.engine.checkpoint import export, pretrained
from tests.convert.author_files import (
    SMALL,
    RunsCode,
    make_weights,
    without_num_batches_tracked,
    write_weights,
)


def torch_of_2017(state: Mapping[str, Tensor]) -> bytes:
    """Return a file as PyTorch 0.3 wrote it on a GPU: pickles of protocol 2, then the bytes of each storage."""
    storages = b""

    class Saved(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", torch.cuda.FloatStorage, value.key, "cuda:0", value.count, None)
            return None

    class Storage:
        def __init__(self, key: str, tensor: Tensor) -> None:
            self.key, self.count = key, tensor.numel()

    class Rebuilt:
        def __init__(self, key: str, tensor: Tensor) -> None:
            self.arguments = (Storage(key, tensor), 0, tuple(tensor.shape), tensor.stride())

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor, self.arguments

    out = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(value, out, protocol=2)
    Saved(out, protocol=2).dump(OrderedDict((name, Rebuilt(name, value)) for name, value in state.items()))
    pickle.dump(sorted(state), out, protocol=2)
    for name in sorted(state):
        storages += struct.pack("<q", state[name].numel()) + state[name].float().contiguous().numpy().tobytes()
    return out.getvalue() + storages


def test_gpu_files_of_2017_are_read(tmp_path: Path) -> None:
    state = {"module.b": torch.arange(6.0).view(2, 3), "module.a": torch.tensor([7.0])}
    (tmp_path / "old.pth").write_bytes(torch_of_2017(state))
    checkpoint, _ = checkpoints.read(str(tmp_path / "old.pth"))
    assert list(checkpoint.weights) == ["b", "a"]
    assert torch.equal(checkpoint.weights["b"], state["module.b"]) and torch.equal(
        checkpoint.weights["a"], state["module.a"]
    )


@pytest.mark.parametrize("tracks", [True, False])
def test_instance_norm_statistics_are_added_or_removed(tracks: bool) -> None:
    net = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=tracks), nn.BatchNorm2d(3))
    theirs = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=not tracks), nn.BatchNorm2d(3))
    export.load_into(
        net, checkpoints.adapt_weights(Checkpoint("f", without_num_batches_tracked(theirs.state_dict())), net), "f"
    )
    if tracks:
        assert net.state_dict()["0.running_var"].tolist() == [1, 1, 1]
    state = theirs.state_dict()
    del state["1.running_mean"]  # BatchNorm statistics are not invented
    with pytest.raises(ValueError, match=r"f: lacks '1\.running_mean'"):
        export.load_into(net, checkpoints.adapt_weights(Checkpoint("f", state), net), "f")


@pytest.mark.parametrize("new", [True, False])
def test_files_that_would_run_code_are_refused(tmp_path: Path, new: bool) -> None:
    marker = tmp_path / "ran"
    file = write_weights(tmp_path, "bad.pth", {"a": RunsCode(marker)}, _use_new_zipfile_serialization=new)  # type: ignore[dict-item]
    torch.load(file, weights_only=False)
    assert marker.exists()  # opening it does run code
    marker.unlink()
    with pytest.raises(ValueError, match=r"bad\.pth: is a pickle that needs posix\.system, and opening it would run"):
        import_weights("attngan", [file], str(tmp_path / "out"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {
            "netG": state,
            "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1}]},
        },
        lambda state: {"model": {"state_dict": state}, "loss": torch.ones(1), "arguments": {"lr": 0.1}},
    ],
)
def test_nested_weights_are_entered(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    state = {"module.a": torch.arange(3.0)}
    torch.save(wrap(state), tmp_path / "nested.pth")
    checkpoint, _ = checkpoints.read(str(tmp_path / "nested.pth"))
    assert list(checkpoint.weights) == ["a"] and torch.equal(checkpoint.weights["a"], state["module.a"])


def test_several_sets_of_weights_in_a_file_are_named(tmp_path: Path) -> None:
    torch.save({"netG": {"a": torch.ones(1)}, "netD": {"b": torch.ones(1)}, "epoch": 1}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth: contains several sets of named tensors: netG, netD; save each"):
        checkpoints.read(str(tmp_path / "two.pth"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\n<!DOCTYPE html>\n<title>Sign in</title>", "a web page"),
        (b"<html><body>404</body></html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, .*git lfs pull"),
        (b"", "empty"),
    ],
)
def test_what_was_downloaded_in_place_of_weights_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file\.pth: not a PyTorch file.*{sentence}"):
        checkpoints.read(str(tmp_path / "file.pth"))
    digest = hashlib.sha256(content).hexdigest()
    of_page = Pretrained(str(tmp_path / "file.pth"), digest, "weights", lambda tensors: None)
    with pytest.raises(ValueError, match=rf"model\.weights: .*file\.pth: {sentence}"):
        pretrained.check_content(of_page, "model")


@pytest.mark.parametrize("old", [True, False])
def test_pretrained_weights_are_entered_too(tmp_path: Path, old: bool) -> None:
    file = tmp_path / "file.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1}, file, _use_new_zipfile_serialization=not old)
    loaded: dict[str, Tensor] = {}
    weights = Pretrained(str(file), hashlib.sha256(file.read_bytes()).hexdigest(), "weights", loaded.update)
    pretrained.load(weights, "model")
    assert loaded["a"].tolist() == [1, 1]


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_length_of_a_safetensors_header_is_not_taken_for_the_start_of_a_pytorch_file(
    tmp_path: Path, length: int
) -> None:
    content = safetensors.torch.save({"a": torch.arange(3.0)})
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].ljust(length)
    file = tmp_path / "file.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header + content[-12:])
    loaded: dict[str, Tensor] = {}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    pretrained.load(Pretrained(str(file), digest, "weights", loaded.update), "model")
    assert loaded["a"].tolist() == [0, 1, 2]


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    whole = Path(write_weights(tmp_path, "whole.pth", make_weights(SMALL["stargan/D"]))).read_bytes()
    old = torch_of_2017({"a": torch.zeros(4)})
    contents = {
        "empty": b"",
        "text": b"<html>404</html>",
        "cut": whole[: len(whole) // 2],
        "old-cut": old[:-9],
        "pickle": b"\x80\x02K\x01.",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: (not a PyTorch file|unreadable for torch)") as caught:
            checkpoints.read(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    torch.save([torch.zeros(1)], tmp_path / "list")
    with pytest.raises(ValueError, match="contains a list; expected a state_dict of named tensors"):
        checkpoints.read(str(tmp_path / "list"))
    torch.save({"epoch": 3, "a": torch.zeros(1)}, tmp_path / "mixed")
    with pytest.raises(ValueError, match="'epoch' is a int; expected a state_dict"):
        checkpoints.read(str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="'a' has values that are not finite"):
        checkpoints.read(write_weights(tmp_path, "nan", {"a": torch.tensor([float("nan")])}))
    with pytest.raises(ValueError, match="no such file"):
        checkpoints.read(str(tmp_path / "nowhere"))
