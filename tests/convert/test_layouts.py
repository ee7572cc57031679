"""Layouts of the published weights, at full size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from t2idist import systems
from t2idist.contract import Captions, SupportsEmbed, SupportsSample, SupportsTranslate
from t2idist.convert.authors import checkpoints
from t2idist.convert.authors.checkpoints import Checkpoint
from t2idist.convert.authors.importing import ImportOptions, prepare_exports
from t2idist.convert.cli import import_main
from t2idist.data.tokenizer import Vocabulary
from t2idist.engine.checkpoint import export
from t2idist.sampling.loading import exported_network, load_export
from tests.convert.author_files import (
    CPU,
    PUBLISHED,
    make_vocabulary,
    make_weights,
    write_weights,
)

CUB_DISCRIMINATORS = tuple(f"attngan/cub/netD{i}" for i in range(3))
TREES = {"z_dim": 100, "base_size": 64, "branches": 3}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "attngan-cub": (
        "attngan",
        ("attngan/cub/netG", *CUB_DISCRIMINATORS, "damsm/cub/text_encoder", "damsm/image_encoder"),
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
            "mirrorgan/cub/netG", *CUB_DISCRIMINATORS, "damsm/cub/text_encoder", "damsm/image_encoder",
            "mirrorgan/caption_cnn", "mirrorgan/cub/caption_rnn",
        ),
        {**TREES, "generator_width": 32, "discriminator_width": 64, "residuals": 2, "condition_dim": 100},
    ),
    "mirrorgan-coco": (
        "mirrorgan",
        ("mirrorgan/coco/netG", "damsm/coco/text_encoder"),
        {**TREES, "generator_width": 48, "residuals": 3, "condition_dim": 100},
    ),
    "dm_gan-cub": (
        "dm_gan",
        ("dmgan/cub/netG", "damsm/cub/text_encoder", "damsm/image_encoder"),
        {**TREES, "generator_width": 64, "residuals": 2, "condition_dim": 100, "compat": "authors"},
    ),
    "dm_gan-coco": (
        "dm_gan",
        ("dmgan/coco/netG", "damsm/coco/text_encoder"),
        {**TREES, "generator_width": 64, "residuals": 3, "condition_dim": 100, "gamma_attention": 4.0},
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
"""By name: the system, the authors' networks (in state_dict_keys.json), and settings to infer."""

AVAILABLE = [name for name, (system, _, _) in CASES.items() if system in systems.names()]


def vocabulary_for(names: Sequence[str]) -> Vocabulary | None:
    rows = [
        PUBLISHED[name][key][0]
        for name in names
        for key in ("encoder.weight", "embed.weight")
        if key in PUBLISHED[name]
    ]
    return make_vocabulary(rows[0]) if rows else None


@pytest.mark.parametrize("case", AVAILABLE)
def test_every_published_tensor_is_used(case: str) -> None:
    """Names, shapes and settings at full size, on the meta device."""
    system, names, settings = CASES[case]
    files = [
        Checkpoint(name, {key: torch.empty(shape, device="meta") for key, shape in PUBLISHED[name].items()})
        for name in names
    ]
    builders = prepare_exports(system, files, ImportOptions(vocabulary_for(names)))
    assert settings.items() <= vars(builders[system].config).items()
    used = set()
    for builder in builders.values():
        for dotted, file in builder.networks().values():
            assert file is not None
            net = exported_network(builder.system, dotted)
            ours = {key: list(value.shape) for key, value in net.state_dict().items()}
            assert ours == {key: list(value.shape) for key, value in checkpoints.adapt_weights(file, net).items()}
            used.add(file.file)
    assert used == set(names)


def test_every_published_network_has_a_case() -> None:
    assert {name for _, names, _ in CASES.values() for name in names} == PUBLISHED.keys()


MAX_MB = 300


def megabytes(name: str) -> float:
    return sum(math.prod(shape) for shape in PUBLISHED[name].values()) * 4e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", AVAILABLE)
def test_full_size_files_are_imported_and_run(tmp_path: Path, case: str) -> None:
    """Files as large as the authors', imported by the command; without discriminators above 300 MB."""
    system, names, _ = CASES[case]
    arguments = ["--system", system, "--to", str(tmp_path / "out")]
    vocabulary = vocabulary_for(names)
    if vocabulary is not None:
        (tmp_path / "words.txt").write_text("\n".join(vocabulary.words))
        arguments += ["--vocabulary", str(tmp_path / "words.txt")]
    for i, name in enumerate(name for name in names if megabytes(name) <= MAX_MB):
        arguments += [
            "--from",
            write_weights(tmp_path, f"{i}.pth", make_weights(PUBLISHED[name]), "module." if i % 2 else ""),
        ]
    assert import_main(arguments) == 0
    loaded = load_export(str(tmp_path / "out" / system), CPU)
    model: Any = loaded.system
    size = max(loaded.system.sizes)
    images = torch.rand(2, 3, size, size) * 2 - 1
    tokens = torch.tensor([[1, 0, 0], [1, 2, 0]]) if vocabulary is not None else torch.zeros(2, 3, dtype=torch.int64)
    captions = Captions(tokens, torch.tensor([1, 2]), torch.randn(2, loaded.build_info.data.vector_dim))
    with torch.no_grad():
        if isinstance(model, SupportsSample):
            outputs = model.sample(loaded.nets, captions, lambda *shape: torch.randn(2, *shape)).images
            assert [image.shape[2] for image in outputs] == list(loaded.system.sizes)
        elif isinstance(model, SupportsTranslate):
            outputs = tuple(
                model.translate(loaded.nets, images, torch.ones(2, len(labels)), domain)
                for domain, labels in enumerate(model.labels)
            )
        elif isinstance(model, SupportsEmbed):
            outputs = model.embed_images(loaded.nets, images), model.embed_captions(loaded.nets, captions)
        else:
            outputs = (model.describe(loaded.nets, images, 3),)
        for name, weights in export.read(loaded.url).weights.items():
            if name not in loaded.nets:
                discriminator: Any = model.roles[name].net.to_empty(device="cpu").eval()
                export.load_into(discriminator, weights, name)
                side = int(name.rpartition("_")[2]) if "_" in name else size
                outputs += (discriminator.features(torch.rand(1, 3, side, side)),)
    assert all(bool(value.isfinite().all()) for value in outputs)
