"""Layouts of the authors' files: names that identify a network, and settings that follow from the shapes.

Each published set of weights is one entry of `LAYOUTS`. The parameters of our networks have the authors' names, so an
entry only describes how to distinguish its files, and which setting follows from which tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from t2idist.convert.authors.checkpoints import Checkpoint

Files = Mapping[str, Checkpoint]
"""Files by network. The key is "slot.network" for a network of an export that the system uses."""


@dataclass(frozen=True)
class FileLayout:
    """One kind of file, identified by the names of its tensors."""

    network: str
    """Name of the network in our system."""
    has: tuple[str, ...]
    """Names that the file contains."""
    lacks: tuple[str, ...] = ()
    """Names that the file does not contain."""
    vocabulary_tensor: str = ""
    """Tensor with one row per word of the vocabulary."""
    again: str = ""
    """Name of the network of a second file of this kind."""
    nested: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Networks of other layouts in the same file: prefix of the names -> (slot, network)."""

    def matches(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.weights.keys() >= set(self.has) and checkpoint.weights.keys().isdisjoint(self.lacks)


@dataclass(frozen=True)
class InferredConfig:
    """What follows from the tensors."""

    config: dict[str, Any]
    """Settings of the system; the others have their defaults."""
    vector_dim: int = 0
    """Elements of the sentence vectors that come with the data; 0: none."""
    labels: int = 0
    """Total number of attributes."""
    domains: int = 1
    """Number of data sets."""
    paired: bool = False
    """The system learns from pairs of images."""
    names: tuple[tuple[str, ...], ...] = ()
    """Names of the attributes of each data set, if the authors published weights with as many."""


@dataclass(frozen=True)
class WeightsLayout:
    """How the files of a published system become an export."""

    name: str
    system: str
    files: tuple[FileLayout, ...]
    infer: Callable[[Files], InferredConfig]
    """Infers the settings from the files; some of them may be missing."""
    group_size: int
    """As published."""
    weights: str
    """Description of the weights, for the index of the export."""
    uses: Mapping[str, str] = field(default_factory=dict)
    """Layouts of the exports that the system uses, by slot."""


AS_TRAINED = "as at the end of training"
AVERAGED = (
    "the exponential moving average of the parameters, with the BatchNorm running statistics of the trained network, "
    "which the authors' code did not average"
)


# ---------------------------------------------------------------------------------------------------- trees
def _infer_tree(generator: Checkpoint) -> dict[str, Any]:
    """Infer the settings of any tree of generators. Without conditioning augmentation the input is only noise."""
    head = "img_net.img.0.weight" if "img_net.img.0.weight" in generator.weights else "img_net1.img.0.weight"
    sizes: dict[str, Any] = {
        "generator_width": generator.size(head, 1),
        "branches": generator.count(r"h_net(\d+)\."),
        "base_size": 4 << generator.count(r"h_net1\.upsample(\d+)\."),
        "residuals": generator.count(r"h_net2\.residual\.(\d+)\."),
        "z_dim": generator.size("h_net1.fc.0.weight", 1),
    }
    if "ca_net.fc.weight" in generator.weights:
        sizes["condition_dim"] = generator.size("ca_net.fc.weight", 0) // 4
        sizes["z_dim"] -= sizes["condition_dim"]
    return sizes


def _discriminator_width(files: Files) -> dict[str, Any]:
    """Infer the width from any of the discriminators."""
    given = [checkpoint for name, checkpoint in files.items() if name.startswith("discriminator_")]
    return {"discriminator_width": given[0].size("img_code_s16.0.weight", 0)} if given else {}


def _discriminators(mark: str) -> tuple[FileLayout, ...]:
    """Return the layouts of a tree's discriminators. `mark` is a tensor name that only this system's have."""
    down = "img_code_s16.0.weight", "img_code_s32.0.weight", "img_code_s64.0.weight"
    return (
        FileLayout("discriminator_64", (mark, down[0]), down[1:]),
        FileLayout("discriminator_128", (mark, down[1]), down[2:]),
        FileLayout("discriminator_256", (mark, down[2])),
    )


def _infer_damsm(files: Files) -> InferredConfig:
    config: dict[str, Any] = {"gamma_attention": 4.0}  # the released settings
    if "text" in files:
        config["word_dim"] = files["text"].size("encoder.weight", 1)
        config["embedding_dim"] = 2 * files["text"].size("rnn.weight_hh_l0", 1)
    elif "image" in files:
        config["embedding_dim"] = files["image"].size("emb_features.weight", 0)
    return InferredConfig(config)


def _infer_attngan(files: Files) -> InferredConfig:
    released: dict[str, Any] = {"gamma_attention": 4.0, "compat": "authors"}
    if "img_net.img.0.weight" in files["generator"].weights:  # AttnDCGAN
        released |= {"single_output": True, "damsm_weight": 1.0}
    return InferredConfig({**_infer_tree(files["generator"]), **_discriminator_width(files), **released})


def _infer_dm_gan(files: Files) -> InferredConfig:
    released: dict[str, Any] = {"gamma_attention": 4.0, "compat": "authors"}
    return InferredConfig({**_infer_tree(files["generator"]), **released})


def _infer_stackgan_pp(files: Files) -> InferredConfig:
    generator = files["generator"]
    conditional = "ca_net.fc.weight" in generator.weights
    released = {"kl_weight": 2.0, "colour_weight": 0.0 if conditional else 50.0}
    reading = {"unit_text": False, "compat": "authors", "conditional": conditional}
    config = {**_infer_tree(generator), **_discriminator_width(files), **released, **reading}
    return InferredConfig(config, vector_dim=generator.size("ca_net.fc.weight", 1) if conditional else 0)


def _infer_mirrorgan(files: Files) -> InferredConfig:
    released = {"stream_weight": 10.0, "compat": "authors"}
    return InferredConfig({**_infer_tree(files["generator"]), **_discriminator_width(files), **released})


def _infer_captioner(files: Files) -> InferredConfig:
    config: dict[str, Any] = {"compat": "authors"}
    if "rnn" in files:
        config["word_dim"] = files["rnn"].size("embed.weight", 1)
        config["hidden_dim"] = files["rnn"].size("lstm.weight_hh_l0", 1)
    return InferredConfig(config)


# ------------------------------------------------------------------------------------------------- StackGAN, two stages
def _infer_stage(files: Files, first: Checkpoint) -> tuple[dict[str, Any], Checkpoint]:
    """Infer the settings common to both stages. `first`: generator of stage 1."""
    generator = files["generator"]
    config: dict[str, Any] = {
        "condition_dim": generator.size("ca_net.fc.weight", 0) // 2,
        "z_dim": first.size("fc.0.weight", 1) - first.size("ca_net.fc.weight", 0) // 2,
        "image_size": 4 << first.count(r"upsample(\d+)\."),
        "kl_weight": 2.0,
        "compat": "authors",
    }
    if "discriminator" in files:
        config["discriminator_width"] = files["discriminator"].size("encode_img.0.weight", 0)
    return config, generator


def _infer_stackgan_1(files: Files) -> InferredConfig:
    config, generator = _infer_stage(files, files["generator"])
    config["generator_width"] = 2 * generator.size("img.0.weight", 1)
    return InferredConfig({**config, "stage": 1}, vector_dim=generator.size("ca_net.fc.weight", 1))


def _infer_stackgan_2(files: Files) -> InferredConfig:
    config, generator = _infer_stage(files, files["stage1.generator"])
    config["image_size"] = config["image_size"] // 4 << generator.count(r"upsample(\d+)\.")
    config["generator_width"] = generator.size("encoder.0.weight", 0)
    config["residuals"] = generator.count(r"residual\.(\d+)\.")
    return InferredConfig({**config, "stage": 2}, vector_dim=generator.size("ca_net.fc.weight", 1))


# ---------------------------------------------------------------------------------------------------- GAN-CLS, the port
def _infer_gan_cls(files: Files) -> InferredConfig:
    generator = files["generator"]
    condition_dim = generator.size("projection.0.weight", 0)
    layers = generator.count(r"netG\.(\d+)\.weight") - generator.count(r"netG\.(\d+)\.running_mean")
    config: dict[str, Any] = {
        "image_size": 4 << (layers - 1),
        "generator_width": generator.size(f"netG.{3 * layers - 3}.weight", 0),
        "condition_dim": condition_dim,
        "z_dim": generator.size("netG.0.weight", 0) - condition_dim,
        "residual": False,
        "interpolate": False,
        "compat": "authors",
    }
    if "discriminator" in files:
        config["discriminator_width"] = files["discriminator"].size("netD_1.0.weight", 0)
    return InferredConfig(config, vector_dim=generator.size("projection.0.weight", 1))


# -------------------------------------------------------------------------------------------------------------- StarGAN
CELEBA = "Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"
RAFD = "angry", "contemptuous", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"
LABELS = {(5, 1): (CELEBA,), (8, 1): (RAFD,), (13, 2): (CELEBA, RAFD)}
"""Attributes of the released weights, by the number of attributes and of data sets."""


def _infer_stargan(files: Files) -> InferredConfig:
    generator = files["generator"]
    planes = generator.size("main.0.weight", 1) - 3
    config: dict[str, Any] = {
        "generator_width": generator.size("main.0.weight", 0),
        "residuals": generator.count(r"main\.(\d+)\.main\."),
        "compat": "authors",
    }
    classes = planes
    if "discriminator" in files:
        discriminator = files["discriminator"]
        layers = discriminator.count(r"main\.(\d+)\.weight")
        config["layers"] = layers
        config["image_size"] = discriminator.size("conv2.weight", 2) << layers
        config["discriminator_width"] = discriminator.size("main.0.weight", 0)
        classes = discriminator.size("conv2.weight", 0)
    domains = max(planes - classes, 1)  # with several data sets the generator has a mask plane for each
    names = LABELS.get((classes, domains), ())
    config["domains"] = [{"exclusive": attributes == RAFD} for attributes in names or ((),) * domains]
    return InferredConfig(config, labels=classes, domains=domains, names=names)


# ------------------------------------------------------------------------------------------------ CycleGAN and pix2pix
def _infer_cyclegan(files: Files) -> InferredConfig:
    generator = files["a_to_b"]
    config = {
        "generator_width": generator.size("model.1.weight", 0),
        "residuals": generator.count(r"model\.(\d+)\.conv_block\."),
    }
    return InferredConfig(config, labels=2, names=(("A", "B"),))


def _infer_pix2pix(files: Files) -> InferredConfig:
    generator = files["generator"]
    levels = generator.count(r"(model\.model\.(?:0|1\.(?:model\.3\.)*model\.1))\.weight")
    config = {"generator_width": generator.size("model.model.0.weight", 0), "image_size": 1 << levels}
    return InferredConfig(config, paired=True)


TEXT_ENCODER = FileLayout("text", ("encoder.weight", "rnn.weight_hh_l0"), vocabulary_tensor="encoder.weight")

LAYOUTS = {
    layout.name: layout
    for layout in (
        WeightsLayout(
            name="damsm",
            system="damsm",
            files=(TEXT_ENCODER, FileLayout("image", ("emb_features.weight", "emb_cnn_code.weight"))),
            infer=_infer_damsm,
            group_size=48,
            weights=f"{AS_TRAINED}; Inception's running statistics drifted with the training images",
        ),
        WeightsLayout(
            name="attngan",
            system="attngan",
            files=(
                FileLayout("generator", ("h_net1.fc.0.weight", "h_net2.att.conv_context.weight")),
                *_discriminators("COND_DNET.outlogits.0.weight"),
            ),
            infer=_infer_attngan,
            group_size=20,
            weights=AVERAGED,
            uses={"damsm": "damsm"},
        ),
        WeightsLayout(
            name="stackgan_pp",
            system="stackgan_pp",
            files=(
                FileLayout("generator", ("h_net1.fc.0.weight", "h_net2.jointConv.0.weight")),
                *_discriminators("logits.0.weight"),
            ),
            infer=_infer_stackgan_pp,
            group_size=24,
            weights=AVERAGED,
        ),
        WeightsLayout(
            name="mirrorgan",
            system="mirrorgan",
            files=(
                FileLayout("generator", ("h_net1.fc.0.weight", "h_net2.att.conv_sentence_vis.weight")),
                *_discriminators("COND_DNET.outlogits.0.weight"),
            ),
            infer=_infer_mirrorgan,
            group_size=12,
            weights=AVERAGED,
            uses={"damsm": "damsm", "captioner": "captioner"},
        ),
        WeightsLayout(
            name="dm_gan",
            system="dm_gan",
            files=(FileLayout("generator", ("h_net1.fc.0.weight", "h_net2.response_gate.0.weight")),),
            infer=_infer_dm_gan,
            group_size=10,
            weights=AVERAGED,
            uses={"damsm": "damsm"},
        ),
        WeightsLayout(
            name="captioner",
            system="captioner",
            files=(
                FileLayout("cnn", ("resnet.0.weight", "bn.weight")),
                FileLayout("rnn", ("embed.weight", "lstm.weight_hh_l0"), vocabulary_tensor="embed.weight"),
            ),
            infer=_infer_captioner,
            group_size=12,
            weights=AS_TRAINED,
        ),
        WeightsLayout(
            name="stackgan_1",
            system="stackgan",
            files=(
                FileLayout("generator", ("fc.0.weight", "upsample1.1.weight", "img.0.weight")),
                FileLayout("discriminator", ("encode_img.0.weight",), ("get_uncond_logits.outlogits.0.weight",)),
            ),
            infer=_infer_stackgan_1,
            group_size=128,
            weights=AS_TRAINED,
        ),
        WeightsLayout(
            name="stackgan_2",
            system="stackgan",
            files=(
                FileLayout(
                    "generator",
                    ("STAGE1_G.fc.0.weight", "hr_joint.0.weight"),
                    nested={"STAGE1_G.": ("stage1", "generator")},
                ),
                FileLayout("discriminator", ("encode_img.0.weight", "get_uncond_logits.outlogits.0.weight")),
            ),
            infer=_infer_stackgan_2,
            group_size=40,
            weights=f"{AS_TRAINED}; stage 1's running statistics drifted while stage 2 was trained",
            uses={"stage1": "stackgan_1"},
        ),
        WeightsLayout(
            name="gan_cls",
            system="gan_cls",
            files=(
                FileLayout("generator", ("projection.0.weight", "netG.0.weight")),
                FileLayout("discriminator", ("netD_1.0.weight", "netD_2.0.weight")),
            ),
            infer=_infer_gan_cls,
            group_size=64,
            weights=f"{AS_TRAINED}; of the PyTorch port, not of the paper",
        ),
        WeightsLayout(
            name="stargan",
            system="stargan",
            files=(
                FileLayout("discriminator", ("main.0.weight", "conv1.weight", "conv2.weight")),
                FileLayout("generator", ("main.0.weight", "main.1.weight", "main.9.main.0.weight")),
            ),
            infer=_infer_stargan,
            group_size=16,
            weights=AS_TRAINED,
        ),
        WeightsLayout(
            name="cyclegan",
            system="cyclegan",
            files=(FileLayout("a_to_b", ("model.1.weight", "model.10.conv_block.5.weight"), again="b_to_a"),),
            infer=_infer_cyclegan,
            group_size=1,
            weights=AS_TRAINED,
        ),
        WeightsLayout(
            name="pix2pix",
            system="pix2pix",
            files=(FileLayout("generator", ("model.model.0.weight", "model.model.3.weight")),),
            infer=_infer_pix2pix,
            group_size=1,
            weights=AS_TRAINED,
        ),
    )
}


def layouts_for(system: str) -> list[WeightsLayout]:
    """Return the layouts of a system. Raises ValueError if there is none."""
    layouts = [layout for layout in LAYOUTS.values() if layout.system == system]
    if not layouts:
        known = ", ".join(sorted({layout.system for layout in LAYOUTS.values()}))
        raise ValueError(f"--system {system}: no published weights of it can be read; available: {known}")
    return layouts
