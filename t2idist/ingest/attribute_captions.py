"""Captions made from attributes, for sets such as CelebA that have no captions."""

from __future__ import annotations

import random
from collections.abc import Container, Sequence

CAPTIONS = 5

_NOT_DESCRIBED = frozenset({"Attractive", "Blurry"})
_COLORS = {"Black_Hair": "black", "Blond_Hair": "blond", "Brown_Hair": "brown", "Gray_Hair": "gray"}
_TEXTURES = {"Straight_Hair": "straight", "Wavy_Hair": "wavy"}
_STRIKING = ("Bald", "Bangs", "Eyeglasses", "Goatee", "Mustache", "Smiling", "Wearing_Hat", "Wearing_Necktie")
"""Attributes that most captions mention."""
_BEARDS = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns")
_ADJECTIVES = {"Bald": "bald", "Chubby": "chubby", "Smiling": "smiling"}
_CLOTHES = {
    "Eyeglasses": "glasses",
    "Heavy_Makeup": "heavy makeup",
    "Wearing_Earrings": "earrings",
    "Wearing_Hat": "a hat",
    "Wearing_Lipstick": "lipstick",
    "Wearing_Necklace": "a necklace",
    "Wearing_Necktie": "a necktie",
}
_FEATURES = {
    "5_o_Clock_Shadow": "stubble",
    "Bags_Under_Eyes": "bags under the eyes",
    "Big_Nose": "a big nose",
    "Double_Chin": "a double chin",
    "Goatee": "a goatee",
    "Mouth_Slightly_Open": "a slightly open mouth",
    "Mustache": "a mustache",
    "No_Beard": "no beard",
    "Oval_Face": "an oval face",
    "Pointy_Nose": "a pointy nose",
    "Receding_Hairline": "a receding hairline",
}
"""Words of attributes whose names alone would read badly; others are their names in lower case."""
_OFTEN, _SOMETIMES = 0.85, 0.25


def captions_from_attributes(key: str, names: Sequence[str], present: Container[str]) -> tuple[str, ...]:
    """Return `CAPTIONS` captions of an image; always the same ones for a key.

    Every caption says sex and age, if the set has the attributes Male and Young, and the hair. A random part of the
    other attributes that are present follows; what they exclude (the hair of a bald person) is left out.

    Args:
        names: All attributes of the set, as CelebA names them; others are used as they are named.
        present: The attributes of this image.
    """
    return tuple(_caption(random.Random(f"{key} {number}"), names, present) for number in range(CAPTIONS))


def _caption(rng: random.Random, names: Sequence[str], present: Container[str]) -> str:
    said = [name for name in names if name in present and _is_said(rng, name, names, present)]
    rng.shuffle(said)
    adjectives = [_ADJECTIVES[name] for name in said if name in _ADJECTIVES]
    if "Young" in names:
        adjectives.append("young" if "Young" in present else "older")
    noun = ("man" if "Male" in present else "woman") if "Male" in names else "person"
    clothes = [_CLOTHES[name] for name in said if name in _CLOTHES]
    features = [_feature(name) for name in said if name not in _CLOTHES and name not in _ADJECTIVES]
    features[:0] = _hair(names, present)
    person = " ".join([*adjectives, noun])
    if features and rng.random() < 0.5:
        wears = f" and wears {_listed(clothes)}" if clothes else ""
        return f"the {person} has {_listed(features)}{wears}"
    with_features = f" with {_listed(features)}" if features else ""
    wearing = f" wearing {_listed(clothes)}" if clothes else ""
    article = "an" if person[0] in "aeiou" else "a"
    return f"{article} {person}{with_features}{wearing}"


def _is_said(rng: random.Random, name: str, names: Sequence[str], present: Container[str]) -> bool:
    if name in _NOT_DESCRIBED or name in _COLORS or name in _TEXTURES or name in ("Male", "Young"):
        return False
    if name == "No_Beard" and (
        any(beard in present for beard in _BEARDS) or ("Male" in names and "Male" not in present)
    ):
        return False
    return rng.random() < (_OFTEN if name in _STRIKING else _SOMETIMES)


def _hair(names: Sequence[str], present: Container[str]) -> list[str]:
    if "Bald" in present:
        return []
    textures = [_TEXTURES[name] for name in names if name in _TEXTURES and name in present][:1]
    colors = [_COLORS[name] for name in names if name in _COLORS and name in present]
    words = [*textures, *([" and ".join(colors)] if colors else [])]
    return [" ".join([*words, "hair"])] if words else []


def _feature(name: str) -> str:
    return _FEATURES.get(name, name.replace("_", " ").lower())


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
