"""Imported weights: exports whose networks compute what those of the authors computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from t2idist import systems
from t2idist.contract import BuildInfo, Captions, DataInfo
from t2idist.convert.authors.checkpoints import Checkpoint
from t2idist.convert.authors.importing import ImportOptions, ImportResult, import_weights, prepare_exports
from t2idist.engine.checkpoint import export
from t2idist.sampling.loading import load_export
from tests.convert.author_files import (
    CPU,
    HERE,
    SMALL,
    make_vocabulary,
    make_weights,
    without_num_batches_tracked,
    write_weights,
)
from tests.systems.test_loss_values import (
    TINY_DAMSM,
    build_system,
    colour_batch,
    damsm_config,
    parameter_counts,
    trainer,
)


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    return load_file(HERE / "outputs.safetensors")


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def subsample(images: Tensor, size: int = 16) -> Tensor:
    step = images.shape[2] // size
    return images[:, :, ::step, ::step]


@pytest.fixture(scope="module")
def attngan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[ImportResult]]:
    """Import small weights of AttnGAN in the format of 2018."""
    folder = tmp_path_factory.mktemp("attngan")
    files = [
        write_weights(
            folder,
            f"{i}.pth",
            without_num_batches_tracked(make_weights(SMALL[name])),
            _use_new_zipfile_serialization=False,
        )
        for i, name in enumerate(
            ("damsm/text_encoder", "attngan/netG", "attngan/netD0", "attngan/netD1", "attngan/netD2")
        )
    ]
    return folder, import_weights("attngan", files, str(folder / "out"), ImportOptions(make_vocabulary(60)))


def test_attngan_generator_equals_the_authors(
    attngan: tuple[Path, list[ImportResult]], outputs: dict[str, Tensor]
) -> None:
    loaded = load_export(str(attngan[0] / "out/attngan"), CPU)
    names = ("z", "eps", "sent_emb", "word_embs", "mask")
    with torch.no_grad():
        sample = loaded.nets["generator"](*(outputs[f"attngan/{name}"] for name in names))
        words, sentence = loaded.nets["text"](outputs["text/tokens"], outputs["text/lengths"])
    assert_close(sample.mean, outputs["attngan/mean"])
    for image, size in zip(sample.images, (64, 128, 256), strict=True):
        assert_close(subsample(image), outputs[f"attngan/image_{size}"])
    assert_close(words, outputs["text/words"])
    assert_close(sentence, outputs["text/sentence"])


def test_attngan_discriminators_equal_the_authors(
    attngan: tuple[Path, list[ImportResult]], outputs: dict[str, Tensor]
) -> None:
    url = str(attngan[0] / "out/attngan")
    system, weights = load_export(url, CPU).system, export.read(url).weights
    torch.manual_seed(3)
    for size in (64, 128, 256):
        image = torch.tanh(torch.randn(2, 3, size, size))
        discriminator: Any = system.roles[f"discriminator_{size}"].net.to_empty(device="cpu")
        export.load_into(discriminator, weights[f"discriminator_{size}"], "test")
        with torch.no_grad():
            features = discriminator.eval().features(image)
            conditional = discriminator.conditional(features, outputs["discriminator/condition"])
            assert_close(conditional.sigmoid(), outputs[f"discriminator/conditional_{size}"])
            assert_close(
                discriminator.unconditional(features).sigmoid(), outputs[f"discriminator/unconditional_{size}"]
            )


def test_exports_record_settings_and_sources(attngan: tuple[Path, list[ImportResult]]) -> None:
    folder, (result,) = attngan
    assert result.settings == {
        "generator_width": 8, "branches": 3, "base_size": 64, "residuals": 2, "z_dim": 32, "condition_dim": 32,
        "discriminator_width": 4, "gamma_attention": 4.0, "compat": "authors",
    }  # fmt: skip
    loaded = load_export(result.url, CPU)
    assert loaded.vocabulary == make_vocabulary(60) and loaded.build_info.max_words == 18
    imported = loaded.meta["imported"]
    assert "average" in imported["weights"] and "running statistics" in imported["weights"]
    assert imported["from"]["generator"]["sha256"] == export.storage.sha256((folder / "1.pth").read_bytes())
    assert not (folder / "out/damsm").exists()  # the image encoder of the DAMSM is missing


def test_dm_gan_generator_equals_the_authors(tmp_path: Path, outputs: dict[str, Tensor]) -> None:
    files = [
        write_weights(tmp_path, f"{i}.pth", without_num_batches_tracked(make_weights(SMALL[name])))
        for i, name in enumerate(("damsm/text_encoder", "dmgan/netG"))
    ]
    (result,) = import_weights("dm_gan", files, str(tmp_path / "out"), ImportOptions(make_vocabulary(60)))
    assert result.settings == {
        "generator_width": 8, "branches": 3, "base_size": 64, "residuals": 2, "z_dim": 32, "condition_dim": 32,
        "gamma_attention": 4.0, "compat": "authors",
    }  # fmt: skip
    released = load_file(HERE / "dm_gan.safetensors")
    names = ("z", "eps", "sent_emb", "word_embs", "mask")
    with torch.no_grad():
        sample = load_export(result.url, CPU).nets["generator"](*(outputs[f"attngan/{name}"] for name in names))
    for image, size in zip(sample.images[1:], (128, 256), strict=True):
        assert_close(subsample(image), released[f"image_{size}"])


def test_stackgan_pp_generator_equals_the_authors(tmp_path: Path, outputs: dict[str, Tensor]) -> None:
    file = write_weights(tmp_path, "netG.pth", make_weights(SMALL["stackganv2/netG"]), "module.")
    (result,) = import_weights("stackgan_pp", [file], str(tmp_path / "out"))
    loaded = load_export(result.url, CPU)
    assert loaded.build_info.data.vector_dim == 64 and result.settings["conditional"]
    tokens, lengths = torch.zeros(2, 18, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    noise = iter([outputs["stackgan/z"], outputs["stackgan/eps"]])
    system: Any = loaded.system
    with torch.no_grad():
        sample = system.sample(
            loaded.nets, Captions(tokens, lengths, outputs["stackgan/text_embedding"]), lambda *shape: next(noise)
        )
    for image, size in zip(sample.images, (64, 128, 256), strict=True):
        assert_close(subsample(image), outputs[f"stackgan/image_{size}"])


def test_stackgan_pp_trains_on_sentence_vectors_of_the_data() -> None:
    """The scale of the vectors affects the loss only if they are not normalized."""
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


def test_attndcgan_has_one_output_and_one_conditional_discriminator() -> None:
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
def test_stargan_networks_equal_the_authors(tmp_path: Path, changed: str) -> None:
    theirs = load_file(HERE / "stargan.safetensors")
    generator = make_weights(SMALL["stargan/G"])
    if changed == "without statistics":
        generator = OrderedDict((k, v) for k, v in generator.items() if "running_" not in k and "num_b" not in k)
    files = [
        write_weights(tmp_path, "200000-G.ckpt", generator),
        write_weights(tmp_path, "200000-D.ckpt", make_weights(SMALL["stargan/D"])),
    ]
    (result,) = import_weights("stargan", files, str(tmp_path / "out"))
    loaded = load_export(result.url, CPU)
    system: Any = loaded.system
    assert system.labels == (("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"),)
    with torch.no_grad():
        translated = system.translate(loaded.nets, theirs["images"], theirs["labels"], 0)
        scores, classes = loaded.nets["discriminator"](theirs["images"])
    assert_close(subsample(translated), theirs["translated"])
    assert_close(scores[:, None], theirs["scores"])
    assert_close(classes, theirs["classes"])


def test_attribute_names_must_match_the_files(tmp_path: Path) -> None:
    files = [write_weights(tmp_path, f"{net}.ckpt", make_weights(SMALL[f"stargan/{net}"])) for net in ("G", "D")]
    names = ("hat", "glasses", "beard", "red", "blue")
    (result,) = import_weights("stargan", files, str(tmp_path / "own"), ImportOptions(attributes=(names,)))
    assert load_export(result.url, CPU).build_info.data.attributes == (names,)
    with pytest.raises(ValueError, match="--attributes: 2 names; the files have 5, of 1 data set"):
        import_weights("stargan", files, str(tmp_path / "bad"), ImportOptions(attributes=(names[:2],)))


def small_file(name: str, **changes: Tensor | None) -> Checkpoint:
    state: dict[str, Any] = {**make_weights(SMALL[name]), **changes}
    return Checkpoint(f"{name}.pth", {key: value for key, value in state.items() if value is not None})


def test_mismatched_files_are_refused() -> None:
    generator, text = small_file("attngan/netG"), small_file("damsm/text_encoder")
    default = ImportOptions(make_vocabulary(60))

    def assert_refused(
        message: str, *files: Checkpoint, options: ImportOptions = default, system: str = "attngan"
    ) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            [builder.load() for builder in prepare_exports(system, files, options).values()]
        assert "\n" not in str(caught.value)

    assert_refused("attngan: missing text; add the file with --from FILE", generator)
    assert_refused("attngan: none of the files contains its generator; add it with --from FILE", text)
    assert_refused(
        r"netG\.pth and attngan/netG\.pth: both contain a generator; use only one", generator, generator, text
    )
    assert_refused(
        r"stackganv2/netG\.pth: its tensor names \(the first is 'ca_net\.fc",
        small_file("stackganv2/netG"),
        generator,
        text,
    )
    assert_refused(
        r"text_encoder\.pth: has a vocabulary of 60 words; add the authors' captions\.pickle",
        generator,
        text,
        options=ImportOptions(),
    )
    assert_refused(
        "has a vocabulary of 60 words; the given vocabulary has 59",
        generator,
        text,
        options=ImportOptions(make_vocabulary(59)),
    )
    assert_refused(
        r"netG\.pth: generator: has an unknown 'extra'", small_file("attngan/netG", extra=torch.zeros(1)), text
    )
    missing = {"h_net3.att.conv_context.weight": None}
    assert_refused(
        r"netG\.pth: generator: lacks 'h_net3\.att\.conv_context\.weight'",
        small_file("attngan/netG", **missing),
        text,
    )
    reshaped = {"h_net3.upsample.1.weight": torch.zeros(4, 4, 3, 3)}
    assert_refused(
        r"'h_net3\.upsample\.1\.weight' has shape \[4, 4, 3, 3\]; the network has",
        small_file("attngan/netG", **reshaped),
        text,
    )
    assert_refused(
        r"lacks 'img_net1\.img\.0\.weight', which determines",
        small_file("attngan/netG", **{"img_net1.img.0.weight": None}),
        text,
    )
    assert_refused("no published weights of it can be read; available: attngan", generator, system="pixelcnn")


def test_an_export_is_not_overwritten(attngan: tuple[Path, list[ImportResult]]) -> None:
    folder, _ = attngan
    with pytest.raises(ValueError, match="out/attngan: already contains an export; use another --to"):
        import_weights(
            "attngan",
            [str(folder / f"{i}.pth") for i in (0, 1)],
            str(folder / "out"),
            ImportOptions(make_vocabulary(60)),
        )
