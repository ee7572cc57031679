"""What each of the authors' files holds: which network it is by its names, and the sizes by the shapes.

A system is one entry of `RECIPES`. Parameter names of our networks are the authors', so that an entry only says how its
files are told apart and which settings follow from which tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from t2idist.convert.authors.checkpoints import Checkpoint

Found = Mapping[str, Checkpoint]
"""Files by the network that they hold; those of a slot's export as "slot.network"."""


@dataclass(frozen=True)
class Part:
    """One kind of file.

    network: what our system calls what it holds. has, lacks: names that tell it from the other kinds. numbered: a
    tensor with a row for every word of the vocabulary. inner: tensors whose names begin so are another recipe's
    network: prefix -> (slot, network).
    """

    network: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    numbered: str = ""
    inner: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def fits(self, checkpoint: Checkpoint) -> bool:
        names = checkpoint.weights.keys()
        return all(key in names for key in self.has) and not any(key in names for key in self.lacks)


@dataclass(frozen=True)
class Fit:
    """What the tensors say of the export: its system's settings and its plan's.

    config: settings; the others have the system's defaults. vector_dim: of the sentence vectors that it reads, where
    no encoder of ours gives them. labels, domains: how many attributes it takes, of how many data sets. names: what
    they are, by data set, where the authors published weights for so many.
    """

    config: dict[str, Any]
    vector_dim: int = 0
    labels: int = 0
    domains: int = 1
    names: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class WeightsLayout:
    """How the files of a published system become an export.

    fit: the settings by its files, of which some may not be there. uses: by slot, the recipe whose export the system
    uses; its files are given along. group_size: as published. weights: what they are, for the export's index.
    """

    name: str
    system: str
    parts: tuple[Part, ...]
    fit: Callable[[Found], Fit]
    group_size: int
    weights: str
    uses: Mapping[str, str] = field(default_factory=dict)


AS_TRAINED = "as they were at the end of training"
AVERAGED = (
    "the exponential moving average of the parameters, beside the running statistics of BatchNorm of the network that "
    "was trained, which the authors' code did not average"
)


# ---------------------------------------------------------------------------------------------------- trees
def _tree(generator: Checkpoint) -> dict[str, Any]:
    """Settings that both kinds of trees have; without conditioning augmentation the condition is the noise itself."""
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


def _judge_width(found: Found) -> dict[str, Any]:
    """The width of whichever discriminator is there."""
    judges = [checkpoint for name, checkpoint in found.items() if name.startswith("discriminator_")]
    return {"discriminator_width": judges[0].size("img_code_s16.0.weight", 0)} if judges else {}


def _judges(mark: str) -> tuple[Part, ...]:
    """A tree's discriminators; mark: a name that those of the system have."""
    down = "img_code_s16.0.weight", "img_code_s32.0.weight", "img_code_s64.0.weight"
    return (
        Part("discriminator_64", (mark, down[0]), down[1:]),
        Part("discriminator_128", (mark, down[1]), down[2:]),
        Part("discriminator_256", (mark, down[2])),
    )


def _fit_damsm(found: Found) -> Fit:
    config: dict[str, Any] = {"gamma_attention": 4.0}  # the released settings
    if "text" in found:
        config["word_dim"] = found["text"].size("encoder.weight", 1)
        config["embedding_dim"] = 2 * found["text"].size("rnn.weight_hh_l0", 1)
    elif "image" in found:
        config["embedding_dim"] = found["image"].size("emb_features.weight", 0)
    return Fit(config)


def _fit_attngan(found: Found) -> Fit:
    released: dict[str, Any] = {"gamma_attention": 4.0, "compat": "authors"}
    if "img_net.img.0.weight" in found["generator"].weights:  # AttnDCGAN
        released |= {"single_output": True, "damsm_weight": 1.0}
    return Fit({**_tree(found["generator"]), **_judge_width(found), **released})


def _fit_stackgan_pp(found: Found) -> Fit:
    generator = found["generator"]
    conditional = "ca_net.fc.weight" in generator.weights
    released = {"kl_weight": 2.0, "colour_weight": 0.0 if conditional else 50.0}
    read = {"unit_text": False, "compat": "authors", "conditional": conditional}
    config = {**_tree(generator), **_judge_width(found), **released, **read}
    return Fit(config, vector_dim=generator.size("ca_net.fc.weight", 1) if conditional else 0)


def _fit_mirrorgan(found: Found) -> Fit:
    released = {"stream_weight": 10.0, "compat": "authors"}
    return Fit({**_tree(found["generator"]), **_judge_width(found), **released})


def _fit_captioner(found: Found) -> Fit:
    config: dict[str, Any] = {"compat": "authors"}
    if "rnn" in found:
        config["word_dim"] = found["rnn"].size("embed.weight", 1)
        config["hidden_dim"] = found["rnn"].size("lstm.weight_hh_l0", 1)
    return Fit(config)


# ------------------------------------------------------------------------------------------------- StackGAN, two stages
def _fit_stage(found: Found, first: Checkpoint) -> tuple[dict[str, Any], Checkpoint]:
    """Settings that both stages have; first: stage 1's generator."""
    generator = found["generator"]
    config: dict[str, Any] = {
        "condition_dim": generator.size("ca_net.fc.weight", 0) // 2,
        "z_dim": first.size("fc.0.weight", 1) - first.size("ca_net.fc.weight", 0) // 2,
        "image_size": 4 << first.count(r"upsample(\d+)\."),
        "kl_weight": 2.0,
        "compat": "authors",
    }
    if "discriminator" in found:
        config["discriminator_width"] = found["discriminator"].size("encode_img.0.weight", 0)
    return config, generator


def _fit_stackgan_1(found: Found) -> Fit:
    config, generator = _fit_stage(found, found["generator"])
    config["generator_width"] = 2 * generator.size("img.0.weight", 1)
    return Fit({**config, "stage": 1}, vector_dim=generator.size("ca_net.fc.weight", 1))


def _fit_stackgan_2(found: Found) -> Fit:
    config, generator = _fit_stage(found, found["stage1.generator"])
    config["image_size"] = config["image_size"] // 4 << generator.count(r"upsample(\d+)\.")
    config["generator_width"] = generator.size("encoder.0.weight", 0)
    config["residuals"] = generator.count(r"residual\.(\d+)\.")
    return Fit({**config, "stage": 2}, vector_dim=generator.size("ca_net.fc.weight", 1))


# ---------------------------------------------------------------------------------------------------- GAN-CLS, the port
def _fit_gan_cls(found: Found) -> Fit:
    generator = found["generator"]
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
    if "discriminator" in found:
        config["discriminator_width"] = found["discriminator"].size("netD_1.0.weight", 0)
    return Fit(config, vector_dim=generator.size("projection.0.weight", 1))


# -------------------------------------------------------------------------------------------------------------- StarGAN
CELEBA = "Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"
RAFD = "angry", "contemptuous", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"
LABELS = {(5, 1): (CELEBA,), (8, 1): (RAFD,), (13, 2): (CELEBA, RAFD)}
"""The released weights' attributes, by how many there are and of how many data sets."""


def _fit_stargan(found: Found) -> Fit:
    generator = found["generator"]
    planes = generator.size("main.0.weight", 1) - 3
    config: dict[str, Any] = {
        "generator_width": generator.size("main.0.weight", 0),
        "residuals": generator.count(r"main\.(\d+)\.main\."),
        "compat": "authors",
    }
    classes = planes
    if "discriminator" in found:
        judge = found["discriminator"]
        layers = judge.count(r"main\.(\d+)\.weight")
        config["layers"] = layers
        config["image_size"] = judge.size("conv2.weight", 2) << layers
        config["discriminator_width"] = judge.size("main.0.weight", 0)
        classes = judge.size("conv2.weight", 0)
    domains = max(planes - classes, 1)  # with several data sets, the generator's mask has a plane for each
    names = LABELS.get((classes, domains), ())
    config["domains"] = [{"exclusive": own == RAFD} for own in names or ((),) * domains]
    return Fit(config, labels=classes, domains=domains, names=names)


TEXT = Part("text", ("encoder.weight", "rnn.weight_hh_l0"), numbered="encoder.weight")

RECIPES = {
    recipe.name: recipe
    for recipe in (
        WeightsLayout(
            name="damsm",
            system="damsm",
            parts=(TEXT, Part("image", ("emb_features.weight", "emb_cnn_code.weight"))),
            fit=_fit_damsm,
            group_size=48,
            weights=f"{AS_TRAINED}; Inception's running statistics drifted with the pictures that it was trained on",
        ),
        WeightsLayout(
            name="attngan",
            system="attngan",
            parts=(
                Part("generator", ("h_net1.fc.0.weight", "h_net2.att.conv_context.weight")),
                *_judges("COND_DNET.outlogits.0.weight"),
            ),
            fit=_fit_attngan,
            group_size=20,
            weights=AVERAGED,
            uses={"damsm": "damsm"},
        ),
        WeightsLayout(
            name="stackgan_pp",
            system="stackgan_pp",
            parts=(
                Part("generator", ("h_net1.fc.0.weight", "h_net2.jointConv.0.weight")),
                *_judges("logits.0.weight"),
            ),
            fit=_fit_stackgan_pp,
            group_size=24,
            weights=AVERAGED,
        ),
        WeightsLayout(
            name="mirrorgan",
            system="mirrorgan",
            parts=(
                Part("generator", ("h_net1.fc.0.weight", "h_net2.att.conv_sentence_vis.weight")),
                *_judges("COND_DNET.outlogits.0.weight"),
            ),
            fit=_fit_mirrorgan,
            group_size=12,
            weights=AVERAGED,
            uses={"damsm": "damsm", "captioner": "captioner"},
        ),
        WeightsLayout(
            name="captioner",
            system="captioner",
            parts=(
                Part("cnn", ("resnet.0.weight", "bn.weight")),
                Part("rnn", ("embed.weight", "lstm.weight_hh_l0"), numbered="embed.weight"),
            ),
            fit=_fit_captioner,
            group_size=12,
            weights=AS_TRAINED,
        ),
        WeightsLayout(
            name="stackgan_1",
            system="stackgan",
            parts=(
                Part("generator", ("fc.0.weight", "upsample1.1.weight", "img.0.weight")),
                Part("discriminator", ("encode_img.0.weight",), ("get_uncond_logits.outlogits.0.weight",)),
            ),
            fit=_fit_stackgan_1,
            group_size=128,
            weights=AS_TRAINED,
        ),
        WeightsLayout(
            name="stackgan_2",
            system="stackgan",
            parts=(
                Part(
                    "generator",
                    ("STAGE1_G.fc.0.weight", "hr_joint.0.weight"),
                    inner={"STAGE1_G.": ("stage1", "generator")},
                ),
                Part("discriminator", ("encode_img.0.weight", "get_uncond_logits.outlogits.0.weight")),
            ),
            fit=_fit_stackgan_2,
            group_size=40,
            weights=f"{AS_TRAINED}; stage 1's running statistics drifted while stage 2 was trained",
            uses={"stage1": "stackgan_1"},
        ),
        WeightsLayout(
            name="gan_cls",
            system="gan_cls",
            parts=(
                Part("generator", ("projection.0.weight", "netG.0.weight")),
                Part("discriminator", ("netD_1.0.weight", "netD_2.0.weight")),
            ),
            fit=_fit_gan_cls,
            group_size=64,
            weights=f"{AS_TRAINED}; the PyTorch port's, not those of the paper",
        ),
        WeightsLayout(
            name="stargan",
            system="stargan",
            parts=(
                Part("discriminator", ("main.0.weight", "conv1.weight", "conv2.weight")),
                Part("generator", ("main.0.weight", "main.1.weight", "main.9.main.0.weight")),
            ),
            fit=_fit_stargan,
            group_size=16,
            weights=AS_TRAINED,
        ),
    )
}


def of_system(system: str) -> list[WeightsLayout]:
    """The recipes of a system. Raises ValueError where there is none."""
    made = [recipe for recipe in RECIPES.values() if recipe.system == system]
    if not made:
        known = ", ".join(sorted({recipe.system for recipe in RECIPES.values()}))
        raise ValueError(f"--system {system}: there are no weights of its authors that can be read; there are: {known}")
    return made
