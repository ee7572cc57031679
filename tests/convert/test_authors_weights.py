"""The authors' weights: their files become exports that draw what their networks drew, and nothing else gets in."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from t2idist import systems
from t2idist.contract import BuildInfo, Captions, DataInfo, SupportsEmbed, SupportsSample, SupportsTranslate
from t2idist.convert.authors import captions, checkpoints
from t2idist.convert.authors.checkpoints import Checkpoint
from t2idist.convert.authors.importing import ImportResult, ImportOptions, import_weights, prepare_exports
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.sampling.loading import load_export, exported_network
from tests.helpers.fixed_weights import weight
from tests.systems.test_loss_values import (TINY_DAMSM, colour_batch, parameter_counts, damsm_config, build_system, trainer)
from tools import import_weights as tool

CPU = torch.device("cpu")
HERE = Path(__file__).parent / "authors"
PUBLISHED: dict[str, dict[str, list[int]]] = json.loads((HERE / "state_dict_keys.json").read_text())
SMALL: dict[str, dict[str, list[int]]] = json.loads((HERE / "small_keys.json").read_text())


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(HERE / "outputs.safetensors")


def words(count: int) -> Vocabulary:
    return Vocabulary(["<end>", *(f"word{i}" for i in range(1, count))])


def recipe_weights(shapes: Mapping[str, Sequence[int]]) -> OrderedDict[str, Tensor]:
    """The weights that the authors' networks had when their outputs were kept."""
    return OrderedDict((key, weight(key, torch.empty(list(shape)))) for key, shape in shapes.items())


def write(folder: Path, name: str, state: Mapping[str, Tensor], prefix: str = "", **settings: Any) -> str:
    file = folder / name
    torch.save(OrderedDict((prefix + key, value) for key, value in state.items()), file, **settings)
    return str(file)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def thin(images: Tensor, places: int = 16) -> Tensor:
    step = images.shape[2] // places
    return images[:, :, ::step, ::step]


# --------------------------------------------------------------------------------- the authors' networks, through files
@pytest.fixture(scope="module")
def attngan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ImportResult]]:
    """Small weights of AttnGAN as its authors saved theirs in 2018, imported."""
    folder = tmp_path_factory.mktemp("attngan")
    files = [
        write(folder, f"{i}.pth", as_of_2018(recipe_weights(SMALL[name])), _use_new_zipfile_serialization=False)
        for i, name in enumerate(
            ("damsm/text_encoder", "attngan/netG", "attngan/netD0", "attngan/netD1", "attngan/netD2")
        )
    ]
    return folder, import_weights("attngan", files, str(folder / "out"), ImportOptions(words(60)))


def as_of_2018(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def test_attngan_draws_what_its_authors_drew(attngan: tuple[Path, list[ImportResult]], outputs: dict[str, Tensor]) -> None:
    loaded = load_export(str(attngan[0] / "out/attngan"), CPU)
    names = ("z", "eps", "sent_emb", "word_embs", "mask")
    with torch.no_grad():
        drawn = loaded.nets["generator"](*(outputs[f"attngan/{name}"] for name in names))
        read = loaded.nets["text"](outputs["text/tokens"], outputs["text/lengths"])
    close(drawn.mean, outputs["attngan/mean"])
    for image, size in zip(drawn.images, (64, 128, 256), strict=True):
        close(thin(image), outputs[f"attngan/image_{size}"])
    close(read[0], outputs["text/words"])
    close(read[1], outputs["text/sentence"])


def test_attngan_judges_as_its_authors_did(attngan: tuple[Path, list[ImportResult]], outputs: dict[str, Tensor]) -> None:
    url = str(attngan[0] / "out/attngan")
    system, weights = load_export(url, CPU).system, export.read(url).weights
    torch.manual_seed(3)
    for size in (64, 128, 256):
        picture = torch.tanh(torch.randn(2, 3, size, size))
        judge: Any = system.roles[f"discriminator_{size}"].net.to_empty(device="cpu")
        export.load_into(judge, weights[f"discriminator_{size}"], "test")
        with torch.no_grad():
            features = judge.eval().features(picture)
            conditional = judge.conditional(features, outputs["discriminator/condition"])
            close(conditional.sigmoid(), outputs[f"discriminator/conditional_{size}"])
            close(judge.unconditional(features).sigmoid(), outputs[f"discriminator/unconditional_{size}"])


def test_an_import_says_what_it_found_and_where_from(attngan: tuple[Path, list[ImportResult]]) -> None:
    folder, (made,) = attngan
    assert made.settings == {
        "generator_width": 8, "branches": 3, "base_size": 64, "residuals": 2, "z_dim": 32, "condition_dim": 32,
        "discriminator_width": 4, "gamma_attention": 4.0, "compat": "authors",
    }  # fmt: skip
    loaded = load_export(made.url, CPU)
    assert loaded.vocabulary == words(60) and loaded.build_info.max_words == 18
    said = loaded.meta["imported"]
    assert "average" in said["weights"] and "running statistics" in said["weights"]
    assert said["from"]["generator"]["sha256"] == export.storage.sha256((folder / "1.pth").read_bytes())
    assert not (folder / "out/damsm").exists()  # without the image encoder there is no whole DAMSM


def test_stackgan_pp_draws_what_its_authors_drew(tmp_path: Path, outputs: dict[str, Tensor]) -> None:
    file = write(tmp_path, "netG.pth", recipe_weights(SMALL["stackganv2/netG"]), "module.")
    (made,) = import_weights("stackgan_pp", [file], str(tmp_path / "out"))
    loaded = load_export(made.url, CPU)
    assert loaded.build_info.data.vector_dim == 64 and made.settings["conditional"]
    tokens, lengths = torch.zeros(2, 18, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    noise = iter([outputs["stackgan/z"], outputs["stackgan/eps"]])
    system: Any = loaded.system
    with torch.no_grad():
        drawn = system.sample(
            loaded.nets, Captions(tokens, lengths, outputs["stackgan/text_embedding"]), lambda *shape: next(noise)
        )
    for image, size in zip(drawn.images, (64, 128, 256), strict=True):
        close(thin(image), outputs[f"stackgan/image_{size}"])


def test_stackgan_pp_trains_on_vectors_that_come_with_the_data() -> None:
    """As its authors did; vectors of another length give another loss only where they are not scaled."""
    module = systems.load("stackgan_pp")
    shape = {"base_size": 16, "branches": 2, "generator_width": 8, "discriminator_width": 4, "residuals": 1, "z_dim": 4}

    def losses(scale: float, unit_text: bool) -> Mapping[str, float]:
        torch.manual_seed(0)
        config = module.Config(**shape, condition_dim=8, unit_text=unit_text)
        system = module.build(config, BuildInfo(8, 5, DataInfo(("<end>",), 100, vector_dim=12)))
        assert not system.frozen and system.exports == ("generator",)
        batch = colour_batch(system.sizes, 0)
        vectors = scale * torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
        run = trainer(system, 8)
        run.run_step(replace(batch, captions=replace(batch.captions, vectors=vectors)))
        return run.reduce_reports()

    assert losses(1.0, True) == pytest.approx(losses(3.0, True), rel=1e-4)
    assert losses(1.0, False)["generator/kl"] != pytest.approx(losses(3.0, False)["generator/kl"], rel=1e-2)


def test_attndcgan_has_one_picture_and_one_judge_of_pairs() -> None:
    with torch.device("meta"):
        system = build_system("attngan", damsm_config(), residuals=0, single_output=True)
    assert parameter_counts(system) == {"generator": 6_638_960, "discriminator_256": 71_850_753}
    torch.manual_seed(0)
    shape = {"base_size": 16, "branches": 2, "generator_width": 8, "discriminator_width": 4, "residuals": 0, "z_dim": 4}
    tiny = build_system("attngan", damsm_config(**TINY_DAMSM), 15, 8, **shape, condition_dim=8, single_output=True)
    assert tiny.sizes == (32,)
    run = trainer(tiny, 8)
    for step in range(2):
        run.run_step(colour_batch(tiny.sizes, step))
    reports = run.reduce_reports()
    assert {"discriminator_32/real", "discriminator_32/wrong", "generator/adversarial_32"} <= reports.keys()
    assert "discriminator_32/real_alone" not in reports


@pytest.mark.parametrize("changed", ["as saved", "without statistics"])
def test_stargan_translates_and_judges_as_its_authors_did(tmp_path: Path, changed: str) -> None:
    theirs = load_file(HERE / "stargan.safetensors")
    generator = recipe_weights(SMALL["stargan/G"])
    if changed == "without statistics":
        generator = OrderedDict((k, v) for k, v in generator.items() if "running_" not in k and "num_b" not in k)
    files = [
        write(tmp_path, "200000-G.ckpt", generator),
        write(tmp_path, "200000-D.ckpt", recipe_weights(SMALL["stargan/D"])),
    ]
    (made,) = import_weights("stargan", files, str(tmp_path / "out"))
    loaded = load_export(made.url, CPU)
    system: Any = loaded.system
    assert system.labels == (("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"),)
    with torch.no_grad():
        translated = system.translate(loaded.nets, theirs["images"], theirs["labels"], 0)
        scores, classes = loaded.nets["discriminator"](theirs["images"])
    close(thin(translated), theirs["translated"])
    close(scores[:, None], theirs["scores"])
    close(classes, theirs["classes"])


def test_names_of_attributes_fit_the_files(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{net}.ckpt", recipe_weights(SMALL[f"stargan/{net}"])) for net in ("G", "D")]
    names = ("hat", "glasses", "beard", "red", "blue")
    (made,) = import_weights("stargan", files, str(tmp_path / "own"), ImportOptions(attributes=(names,)))
    assert load_export(made.url, CPU).build_info.data.attributes == (names,)
    with pytest.raises(ValueError, match="--attributes: 2 names are given; the files have 5, of 1 data set"):
        import_weights("stargan", files, str(tmp_path / "bad"), ImportOptions(attributes=(names[:2],)))


# ------------------------------------------------------------------------------------------- the published sizes, whole
CUB_JUDGES = tuple(f"attngan/cub/netD{i}" for i in range(3))
TREES = {"z_dim": 100, "base_size": 64, "branches": 3}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "attngan-cub": (
        "attngan",
        ("attngan/cub/netG", *CUB_JUDGES, "damsm/cub/text_encoder", "damsm/image_encoder"),
        {**TREES, "generator_width": 32, "discriminator_width": 64, "residuals": 2, "condition_dim": 100},
    ),
    "attngan-coco": (
        "attngan",
        ("attngan/coco/netG", *(f"attngan/coco/netD{i}" for i in range(3)), "damsm/coco/text_encoder"),
        {**TREES, "generator_width": 48, "discriminator_width": 96, "residuals": 3, "condition_dim": 100},
    ),
    "attndcgan-cub": (
        "attngan",
        ("attngan/cub/attnDCGAN_netG", "damsm/cub/text_encoder"),
        {**TREES, "generator_width": 32, "residuals": 0, "condition_dim": 100, "single_output": True},
    ),
    "damsm": ("damsm", ("damsm/cub/text_encoder", "damsm/image_encoder"), {"embedding_dim": 256, "word_dim": 300}),
    "stackgan_pp-cub": (
        "stackgan_pp",
        tuple(f"stackganv2/cub/net{net}" for net in ("G", "D0", "D1", "D2")),
        {**TREES, "generator_width": 64, "discriminator_width": 64, "residuals": 2, "condition_dim": 128},
    ),
    "stackgan_pp-unconditional": (
        "stackgan_pp",
        tuple(f"stackganv2/uncond/net{net}" for net in ("G", "D0", "D1", "D2")),
        {**TREES, "generator_width": 64, "discriminator_width": 64, "residuals": 2, "conditional": False},
    ),
    "mirrorgan-cub": (
        "mirrorgan",
        (
            "mirrorgan/cub/netG", *CUB_JUDGES, "damsm/cub/text_encoder", "damsm/image_encoder",
            "mirrorgan/caption_cnn", "mirrorgan/cub/caption_rnn",
        ),
        {**TREES, "generator_width": 32, "discriminator_width": 64, "residuals": 2, "condition_dim": 100},
    ),
    "mirrorgan-coco": (
        "mirrorgan",
        ("mirrorgan/coco/netG", "damsm/coco/text_encoder"),
        {**TREES, "generator_width": 48, "residuals": 3, "condition_dim": 100},
    ),
    "captioner": (
        "captioner", ("mirrorgan/caption_cnn", "mirrorgan/cub/caption_rnn"), {"word_dim": 256, "hidden_dim": 512},
    ),
    "stackgan-1": (
        "stackgan",
        ("stackganv1/coco/stage1_netG", "stackganv1/coco/stage1_netD"),
        {
            "stage": 1, "image_size": 64, "generator_width": 192, "discriminator_width": 96, "z_dim": 100,
            "condition_dim": 128,
        },
    ),
    "stackgan-2": (
        "stackgan",
        ("stackganv1/coco/stage2_netG", "stackganv1/coco/stage2_netD"),
        {
            "stage": 2, "image_size": 256, "generator_width": 192, "discriminator_width": 96, "z_dim": 100,
            "condition_dim": 128, "residuals": 2,
        },
    ),
    "stargan-celeba": (
        "stargan",
        ("stargan/celeba128/G", "stargan/celeba128/D"),
        {"generator_width": 64, "discriminator_width": 64, "residuals": 6, "layers": 6, "image_size": 128},
    ),
    "stargan-both": (
        "stargan",
        ("stargan/both256/G", "stargan/both256/D"),
        {"generator_width": 64, "discriminator_width": 64, "residuals": 6, "layers": 6, "image_size": 256},
    ),
    "gan_cls": (
        "gan_cls",
        ("aelnouby/gan_cls/G", "aelnouby/gan_cls/D"),
        {
            "image_size": 64, "generator_width": 64, "discriminator_width": 64, "z_dim": 100, "condition_dim": 128,
            "residual": False,
        },
    ),
}  # fmt: skip
"""By name: the system, the authors' networks (in state_dict_keys.json), and settings that are to be found."""

there = [name for name, (system, _, _) in CASES.items() if system in systems.names()]


def vocabulary_of(names: Sequence[str]) -> Vocabulary | None:
    rows = [
        PUBLISHED[name][key][0]
        for name in names
        for key in ("encoder.weight", "embed.weight")
        if key in PUBLISHED[name]
    ]
    return words(rows[0]) if rows else None


@pytest.mark.parametrize("case", there)
def test_every_published_tensor_has_its_place(case: str) -> None:
    """Names, shapes and settings at full size, without the memory that they would take."""
    system, names, settings = CASES[case]
    files = [
        Checkpoint(name, {key: torch.empty(shape, device="meta") for key, shape in PUBLISHED[name].items()})
        for name in names
    ]
    made = prepare_exports(system, files, ImportOptions(vocabulary_of(names)))
    assert settings.items() <= vars(made[system].config).items()
    placed = set()
    for maker in made.values():
        for dotted, file in maker.places().values():
            assert file is not None
            net = exported_network(maker.system, dotted)
            ours = {key: list(value.shape) for key, value in net.state_dict().items()}
            assert ours == {key: list(value.shape) for key, value in checkpoints.adapt_weights(file, net).items()}
            placed.add(file.file)
    assert placed == set(names)


def test_no_published_network_is_left_out() -> None:
    assert {name for _, names, _ in CASES.values() for name in names} == PUBLISHED.keys()


LARGEST_MB = 300


def megabytes(name: str) -> float:
    return sum(math.prod(shape) for shape in PUBLISHED[name].values()) * 4e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", there)
def test_published_sizes_go_the_whole_way(tmp_path: Path, case: str) -> None:
    """Files as large as the authors', imported by the command, and run; discriminators above 300 MB are left out."""
    system, names, _ = CASES[case]
    line = ["--system", system, "--to", str(tmp_path / "out")]
    vocabulary = vocabulary_of(names)
    if vocabulary is not None:
        (tmp_path / "words.txt").write_text("\n".join(vocabulary.words))
        line += ["--vocabulary", str(tmp_path / "words.txt")]
    for i, name in enumerate(name for name in names if megabytes(name) <= LARGEST_MB):
        line += ["--from", write(tmp_path, f"{i}.pth", recipe_weights(PUBLISHED[name]), "module." if i % 2 else "")]
    assert tool.main(line) == 0
    loaded = load_export(str(tmp_path / "out" / system), CPU)
    runs: Any = loaded.system
    size = max(loaded.system.sizes)
    pictures = torch.rand(2, 3, size, size) * 2 - 1
    tokens = torch.tensor([[1, 0, 0], [1, 2, 0]]) if vocabulary is not None else torch.zeros(2, 3, dtype=torch.int64)
    read = Captions(tokens, torch.tensor([1, 2]), torch.randn(2, loaded.build_info.data.vector_dim))
    with torch.no_grad():
        if isinstance(runs, SupportsSample):
            made = runs.sample(loaded.nets, read, lambda *shape: torch.randn(2, *shape)).images
            assert [image.shape[2] for image in build_system] == list(loaded.system.sizes)
        elif isinstance(runs, SupportsTranslate):
            made = tuple(
                runs.translate(loaded.nets, pictures, torch.ones(2, len(labels)), domain)
                for domain, labels in enumerate(runs.labels)
            )
        elif isinstance(runs, SupportsEmbed):
            made = runs.embed_images(loaded.nets, pictures), runs.embed_captions(loaded.nets, read)
        else:
            made = (runs.describe(loaded.nets, pictures, 3),)
        for name, weights in export.read(loaded.url).weights.items():
            if name not in loaded.nets:
                judge: Any = runs.roles[name].net.to_empty(device="cpu").eval()
                export.load_into(judge, weights, name)
                side = int(name.rpartition("_")[2]) if "_" in name else size
                made += (judge.features(torch.rand(1, 3, side, side)),)
    assert all(bool(value.isfinite().all()) for value in made)


# ---------------------------------------------------------------------------------------------- files as they come
def torch_of_2017(state: Mapping[str, Tensor]) -> bytes:
    """What torch 0.3 wrote on a GPU: three pickles of protocol 2, then the bytes of each storage."""
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


def test_files_of_2017_from_a_gpu_are_read(tmp_path: Path) -> None:
    state = {"module.b": torch.arange(6.0).view(2, 3), "module.a": torch.tensor([7.0])}
    (tmp_path / "old.pth").write_bytes(torch_of_2017(state))
    found, _ = checkpoints.read(str(tmp_path / "old.pth"))
    assert list(found.weights) == ["b", "a"]
    assert torch.equal(found.weights["b"], state["module.b"]) and torch.equal(found.weights["a"], state["module.a"])


@pytest.mark.parametrize("tracks", [True, False])
def test_instance_normalisation_with_and_without_statistics(tracks: bool) -> None:
    net = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=tracks), nn.BatchNorm2d(3))
    theirs = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=not tracks), nn.BatchNorm2d(3))
    export.load_into(net, checkpoints.adapt_weights(Checkpoint("f", as_of_2018(theirs.state_dict())), net), "f")
    if tracks:
        assert net.state_dict()["0.running_var"].tolist() == [1, 1, 1]
    state = theirs.state_dict()
    del state["1.running_mean"]  # of BatchNorm nothing is made up
    with pytest.raises(ValueError, match=r"f: lacks '1\.running_mean'"):
        export.load_into(net, checkpoints.adapt_weights(Checkpoint("f", state), net), "f")


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new", [True, False])
def test_a_file_of_weights_that_would_run_code_is_not_opened(tmp_path: Path, new: bool) -> None:
    marker = tmp_path / "ran"
    file = write(tmp_path, "bad.pth", {"a": Harmful(marker)}, _use_new_zipfile_serialization=new)  # type: ignore[dict-item]
    torch.load(file, weights_only=False)
    assert marker.exists()  # so it would
    marker.unlink()
    with pytest.raises(
        ValueError, match=r"bad\.pth: is a pickle that asks for posix\.system, and to open it would run"
    ):
        import_weights("attngan", [file], str(tmp_path / "out"))
    assert not marker.exists()


def test_files_that_are_no_weights_get_a_sentence(tmp_path: Path) -> None:
    whole = Path(write(tmp_path, "whole.pth", recipe_weights(SMALL["stargan/D"]))).read_bytes()
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
        with pytest.raises(ValueError, match=f"{name}: (not a file that torch wrote|torch cannot read it)") as caught:
            checkpoints.read(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    torch.save([torch.zeros(1)], tmp_path / "list")
    with pytest.raises(ValueError, match="holds a list; a state_dict of named tensors is expected"):
        checkpoints.read(str(tmp_path / "list"))
    torch.save({"epoch": 3, "a": torch.zeros(1)}, tmp_path / "mixed")
    with pytest.raises(ValueError, match="'epoch' is a int; a state_dict"):
        checkpoints.read(str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="'a' has values that are no numbers"):
        checkpoints.read(write(tmp_path, "nan", {"a": torch.tensor([float("nan")])}))
    with pytest.raises(ValueError, match="no such file"):
        checkpoints.read(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------- what does not fit
def small(name: str, **changes: Tensor | None) -> Checkpoint:
    state: dict[str, Any] = {**recipe_weights(SMALL[name]), **changes}
    return Checkpoint(f"{name}.pth", {key: value for key, value in state.items() if value is not None})


def test_what_does_not_fit_is_named() -> None:
    generator, text = small("attngan/netG"), small("damsm/text_encoder")
    known = ImportOptions(words(60))

    def refused(message: str, *files: Checkpoint, options: ImportOptions = known, system: str = "attngan") -> None:
        with pytest.raises(ValueError, match=message) as caught:
            [maker.load() for maker in prepare_exports(system, files, options).values()]
        assert "\n" not in str(caught.value)

    refused("attngan: its text too must be given, with --from FILE", generator)
    refused("attngan: none of the files holds its generator", text)
    refused(r"netG\.pth and attngan/netG\.pth: each holds a generator; give one", generator, generator, text)
    refused(r"stackganv2/netG\.pth: by its names \(the first is 'ca_net\.fc", small("stackganv2/netG"), generator, text)
    refused(
        r"text_encoder\.pth: knows 60 words by number; give the captions\.pickle", generator, text, options=ImportOptions()
    )
    refused("knows 60 words; the given vocabulary has 59", generator, text, options=ImportOptions(words(59)))
    refused(r"netG\.pth: generator: has an unknown 'extra'", small("attngan/netG", extra=torch.zeros(1)), text)
    gone = {"h_net3.att.conv_context.weight": None}
    refused(r"netG\.pth: generator: lacks 'h_net3\.att\.conv_context\.weight'", small("attngan/netG", **gone), text)
    other = {"h_net3.upsample.1.weight": torch.zeros(4, 4, 3, 3)}
    refused(r"'h_net3\.upsample\.1\.weight' is \[4, 4, 3, 3\] there and", small("attngan/netG", **other), text)
    refused(
        r"lacks 'img_net1\.img\.0\.weight', which tells", small("attngan/netG", **{"img_net1.img.0.weight": None}), text
    )
    refused("no weights of its authors that can be read; there are: attngan", generator, system="pixelcnn")


def test_an_export_is_not_overwritten(attngan: tuple[Path, list[ImportResult]]) -> None:
    folder, _ = attngan
    with pytest.raises(ValueError, match="out/attngan: an export is there already; give another --to"):
        import_weights("attngan", [str(folder / f"{i}.pth") for i in (0, 1)], str(folder / "out"), ImportOptions(words(60)))


# ------------------------------------------------------------------------------------------------ captions.pickle
def python_2(value: Any) -> bytes:
    """A pickle of protocol 2 as Python 2 wrote it, whose texts are bytes."""

    def one(part: Any) -> bytes:
        if isinstance(part, list):
            return b"](" + b"".join(map(one, part)) + b"e"
        if isinstance(part, dict):
            return b"}(" + b"".join(one(key) + one(item) for key, item in part.items()) + b"u"
        if isinstance(part, str):
            return b"U" + bytes([len(part)]) + part.encode("latin1")
        return b"\x8a\x01" + bytes([part]) if part % 2 else b"J" + struct.pack("<i", part)  # long and int

    return b"\x80\x02" + one(value) + b"."


TABLE = {0: "<end>", 1: "bird", 2: "caf\u00e9"}
PICKLED = [[[1, 2], [2]], [[1]], TABLE, {word: number for number, word in TABLE.items()}]


@pytest.mark.parametrize("data", [python_2(PICKLED), *(pickle.dumps(PICKLED, protocol) for protocol in range(6))])
def test_the_vocabulary_of_a_captions_pickle(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "captions.pickle").write_bytes(data)
    assert captions.from_pickle(str(tmp_path / "captions.pickle")).words == ("<end>", "bird", "caf\u00e9")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["whole", "word", "caption"])
def test_a_captions_pickle_that_would_run_code_runs_none(tmp_path: Path, protocol: int, place: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "captions.pickle"
    harmful: Any = Harmful(marker)
    train, test, by_number, by_word = PICKLED
    made = {
        "whole": harmful,
        "word": [train, test, {**TABLE, 3: harmful}, by_word],
        "caption": [[[harmful]], test, by_number, by_word],
    }[place]
    file.write_bytes(pickle.dumps(made, protocol))
    pickle.loads(file.read_bytes())
    assert marker.exists()  # so it would
    marker.unlink()
    with pytest.raises(
        ValueError, match=r"captions\.pickle: not a captions\.pickle that can be read: it asks for posix\.sys"
    ):
        captions.from_pickle(str(file))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Ran out of input"),
        (b"words", "."),
        (pickle.dumps([1, 2]), "it is not .train captions, test captions"),
        (pickle.dumps([[[1.5]], [], TABLE, {}]), "it holds a float"),
        (pickle.dumps([[], [], {0: "<end>", 2: "bird"}, {}]), "2 words|word 0 is"),
        (
            pickle.dumps([[], [], TABLE, {"<end>": 0, "bird": 2, "caf\u00e9": 1}]),
            "word 1 is 'bird', which has number 2",
        ),
        (pickle.dumps([[], [], {0: "a"}, {"a": 0}]), "the vocabulary's first word is a; it must be <end>"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "it needs more than 4 GB of memory"),
        (b"\x80\x02" + b"(" * 3 + b"R.", "."),
    ],
)
def test_what_is_no_captions_pickle_gets_a_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "captions.pickle").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        captions.from_pickle(str(tmp_path / "captions.pickle"))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_reader_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "captions.pickle").write_bytes(pickle.dumps(PICKLED))
    with pytest.raises(ValueError, match=r"not read within 0\.001 s; the reader was stopped"):
        captions.from_pickle(str(tmp_path / "captions.pickle"), seconds=0.001)


# ----------------------------------------------------------------------------------------------------- the command
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "text.pth", recipe_weights(SMALL["damsm/text_encoder"]))
    generator = write(tmp_path, "g.pth", recipe_weights(SMALL["attngan/netG"]))
    (tmp_path / "words.txt").write_text("\n".join(words(60).words) + "\n")
    (tmp_path / "captions.pickle").write_bytes(
        pickle.dumps([[], [], dict(enumerate(words(60).words)), words(60).ids], 2)
    )
    given = ["--system", "attngan", "--from", file, "--from", generator]
    for i, option in enumerate((("--captions", "captions.pickle"), ("--vocabulary", "words.txt"))):
        line = [*given, option[0], str(tmp_path / option[1]), "--to", str(tmp_path / f"out{i}"), "--max-words", "12"]
        assert tool.main(line) == 0
        assert "generator 509,352, text 103,504" in capsys.readouterr().out
        loaded = load_export(str(tmp_path / f"out{i}" / "attngan"), CPU)
        assert loaded.vocabulary == words(60) and loaded.build_info.max_words == 12
    assert tool.main([*given, "--to", str(tmp_path / "out2")]) == 2
    assert "knows 60 words by number" in capsys.readouterr().err and not (tmp_path / "out2").exists()
