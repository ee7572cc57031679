"""Cartoon faces with exact attributes and captions, rendered offline; face n is a function of n alone.

The art is "avataaars" by Pablo Stanley (free for personal and commercial use), rendered by DiceBear. Run as a program
(``python -m t2idist.data.embedded.avatars FIRST STEP END SIZE``), this module renders for another process: it writes
faces FIRST, FIRST + STEP, ... below END to standard output, each as a length (uint32, little-endian) and a PNG.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

from PIL import Image

T = TypeVar("T")

VERSION = 1
"""Part of the cache folder's name; increment it whenever a face, its captions or its split changes."""

LICENCE = "avataaars by Pablo Stanley, free for personal and commercial use; drawn by DiceBear (MIT)"

HAIR_COLOURS = {
    "black": ("2c1b18", "171717"),
    "brown": ("724133", "6b4423"),
    "blond": ("d6b370", "e5c46f"),
    "red": ("c93305", "b8360f"),
    "gray": ("e8e1e1", "b7b7b7"),
}
LONG_HAIR = {
    "straight": ("straight01", "straight02", "straightAndStrand", "longButNotTooLong"),
    "curly": ("curly", "curvy", "bigHair"),
    "dreadlocked": ("dreads",),
    "bobbed": ("bob",),
}
SHORT_HAIR = {
    "flat": ("shortFlat", "shortRound"),
    "wavy": ("shortWaved", "shaggyMullet"),
    "curly": ("shortCurly", "frizzle"),
    "cropped": ("theCaesar", "theCaesarAndSidePart", "sides"),
    "dreadlocked": ("dreads01", "dreads02"),
}
HATS = {
    "hat": ("hat",),
    "winter hat": ("winterHat02", "winterHat03", "winterHat04"),
    "ear flap hat": ("winterHat1",),
    "turban": ("turban",),
    "hijab": ("hijab",),
}
SKINS = {"dark": "614335", "brown": "ae5d29", "tanned": "d08b5b", "light": "edb98a", "pale": "ffdbb4"}
CLOTH_COLOURS = {
    "red": "ff5c5c",
    "blue": "5199e4",
    "navy": "25557c",
    "black": "262e33",
    "white": "ffffff",
    "gray": "929598",
    "green": "a7ffc4",
    "pink": "ff488e",
    "yellow": "ffffb1",
}
CLOTHES = {
    "blazerAndShirt": "blazer",
    "blazerAndSweater": "blazer",
    "collarAndSweater": "sweater",
    "hoodie": "hoodie",
    "overall": "overall",
    "shirtCrewNeck": "shirt",
    "shirtScoopNeck": "shirt",
    "shirtVNeck": "shirt",
}
GLASSES = {
    "eyeglasses": ("prescription01", "prescription02", "round"),
    "sunglasses": ("sunglasses", "wayfarers", "kurt"),
}
BEARDS = {
    "light beard": ("beardLight", "Beard"),
    "full beard": ("beardMajestic", "Beard"),
    "beard": ("beardMedium", "Beard"),
    "mustache": ("moustacheFancy", "Mustache"),
    "thick mustache": ("moustacheMagnum", "Mustache"),
}
MOODS = {
    "smile": ("smiling", ("Smiling", "Mouth_Slightly_Open")),
    "twinkle": ("smiling", ("Smiling",)),
    "tongue": ("playful", ("Smiling", "Mouth_Slightly_Open")),
    "serious": ("serious", ()),
    "sad": ("sad", ()),
    "screamOpen": ("screaming", ("Mouth_Slightly_Open",)),
    "disbelief": ("doubtful", ()),
    "grimace": ("grimacing", ("Mouth_Slightly_Open",)),
}
EYES: dict[str, tuple[str, str | None]] = {
    "default": ("", None),
    "happy": ("happy eyes", None),
    "closed": ("closed eyes", "Eyes_Closed"),
    "squint": ("narrow eyes", "Narrow_Eyes"),
    "wink": ("a wink", None),
    "side": ("eyes looking aside", None),
    "surprised": ("wide eyes", None),
    "hearts": ("heart eyes", None),
}
EYEBROWS = ("default", "defaultNatural", "flatNatural", "raisedExcited", "angry")
BACKGROUNDS = ("ffffff", "f1f5f9", "dbeafe", "fee2e2", "dcfce7", "fef9c3")


@dataclass(frozen=True)
class Face:
    """The description of face `number`."""

    number: int
    split: str
    """Determined by `combination`, so that no test combination is in the train split."""
    combination: str
    """The traits that held-out captions are evaluated on: hair or hat, skin, glasses, beard."""
    captions: tuple[str, ...]
    attributes: tuple[str, ...]
    options: dict[str, Any]
    """For DiceBear."""

    @property
    def key(self) -> str:
        return f"avatar_{self.number:07d}"

    @property
    def class_id(self) -> int:
        """Faces of one combination are one class, because their captions match each other's images."""
        return _hash(self.combination) >> 1


class _Traits:
    """Draw a face's traits at random, and collect its options for DiceBear and its attributes."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(f"t2idist-avatar-{VERSION}-{number}")
        self.options: dict[str, Any] = {"seed": str(number)}
        self.attributes: set[str] = set()
        self.skin = self._skin()
        self.kind, self.hair, self.hair_colour = self._top()
        self.glasses = self._glasses()
        self.beard = self._beard()
        self.mood = self._mood()
        self.eyes = self._eyes()
        self.clothes = self._clothes()
        self.options["eyebrowsVariant"] = [self.random.choice(EYEBROWS)]
        self.options["backgroundColor"] = [self.random.choice(BACKGROUNDS)]

    def _weighted(self, values: Iterable[T], weights: Sequence[int]) -> T:
        return self.random.choices(list(values), weights)[0]

    def _skin(self) -> str:
        skin = self.random.choice(list(SKINS))
        self.options["skinColor"] = [SKINS[skin]]
        self.attributes.add(f"Skin_{skin.title()}")
        return skin

    def _top(self) -> tuple[str, str, str]:
        kind = self._weighted(("long", "short", "hat", "bald"), (36, 34, 20, 10))
        colour = self._weighted(HAIR_COLOURS, (22, 22, 22, 16, 18))
        self.options["hairColor"] = [self.random.choice(HAIR_COLOURS[colour])]
        self.options["topProbability"] = 0 if kind == "bald" else 100
        if kind == "bald":
            self.attributes.add("Bald")
            return kind, "no hair", "brown"
        if kind == "hat":
            hat, hat_colour = self.random.choice(list(HATS)), self.random.choice(list(CLOTH_COLOURS))
            self.options |= {"topVariant": [self.random.choice(HATS[hat])], "hatColor": [CLOTH_COLOURS[hat_colour]]}
            self.attributes.add("Wearing_Hat")
            return kind, f"a {hat_colour} {hat}", colour
        styles = LONG_HAIR if kind == "long" else SHORT_HAIR
        style = self.random.choice(list(styles))
        self.options["topVariant"] = [self.random.choice(styles[style])]
        self.attributes.add(f"{colour.title()}_Hair")
        self.attributes |= {"Long_Hair"} if kind == "long" else set()
        self.attributes |= {"Curly_Hair"} if style == "curly" else set()
        return kind, f"{kind} {style} {colour} hair", colour

    def _glasses(self) -> str:
        worn = self.random.random() < 0.36
        self.options["accessoriesProbability"] = 100 if worn else 0
        if not worn:
            return ""
        kind = self._weighted(GLASSES, (60, 40))
        self.options |= {"accessoriesVariant": [self.random.choice(GLASSES[kind])], "accessoriesColor": ["262e33"]}
        self.attributes |= {"Eyeglasses"} | ({"Sunglasses"} if kind == "sunglasses" else set())
        return kind

    def _beard(self) -> str:
        share = 0.0 if "hijab" in self.hair else 0.15 if self.kind == "long" else 0.45
        grown = self.random.random() < share
        self.options["facialHairProbability"] = 100 if grown else 0
        beard = self.random.choice(list(BEARDS)) if grown else ""
        if grown:
            variant, attribute = BEARDS[beard]
            colour = HAIR_COLOURS[self.hair_colour][0]
            self.options |= {"facialHairVariant": [variant], "facialHairColor": [colour]}
            self.attributes.add(attribute)
        self.attributes |= set() if "Beard" in self.attributes else {"No_Beard"}
        return f"a {beard}" if grown else ""

    def _mood(self) -> str:
        mouth = self._weighted(MOODS, (30, 18, 6, 14, 10, 8, 8, 6))
        self.options["mouthVariant"] = [mouth]
        self.attributes |= set(MOODS[mouth][1])
        return MOODS[mouth][0]

    def _eyes(self) -> str:
        eyes = self._weighted(EYES, (50, 10, 9, 8, 7, 7, 6, 3))
        self.options["eyesVariant"] = [eyes]
        if self.glasses == "sunglasses":
            return ""  # they are not visible
        phrase, attribute = EYES[eyes]
        self.attributes |= {attribute} if attribute else set()
        return phrase

    def _clothes(self) -> str:
        clothes, colour = self.random.choice(list(CLOTHES)), self.random.choice(list(CLOTH_COLOURS))
        self.options |= {"clothesVariant": [clothes], "clothesColor": [CLOTH_COLOURS[colour]]}
        self.attributes |= {"Wearing_Blazer"} if CLOTHES[clothes] == "blazer" else set()
        return f"a {colour} {CLOTHES[clothes]}"


def face(number: int) -> Face:
    """Return face `number`, with five captions; the first names the hair or hat, skin, glasses and beard."""
    traits = _Traits(number)
    combination = f"{traits.hair}|{traits.skin}|{traits.glasses}|{traits.beard}"
    share = _hash(combination) % 100
    split = "train" if share < 80 else "val" if share < 85 else "test"
    attributes = tuple(sorted(traits.attributes))
    return Face(number, split, combination, _captions(traits), attributes, traits.options)


def _captions(traits: _Traits) -> tuple[str, ...]:
    skin = f"{traits.skin} skin"
    extras = [trait for trait in (traits.glasses, traits.beard) if trait]
    eyes = [traits.eyes] if traits.eyes else []

    def shuffle(*parts: str) -> list[str]:
        shuffled = list(parts)
        traits.random.shuffle(shuffled)
        return shuffled

    return (
        f"a person with {_joined([traits.hair, skin, *extras])}",
        f"a {traits.mood} person with {_joined([traits.hair, *extras])} wearing {traits.clothes}",
        f"this {traits.mood} face has {_joined([skin, *shuffle(traits.hair, *extras, *eyes)])}",
        f"a cartoon of a {traits.mood} face with {_joined(shuffle(traits.hair, skin, *extras[:1]))}",
        f"a person wearing {traits.clothes} with {_joined(shuffle(traits.hair, skin, *extras))}",
    )


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([*([", ".join(parts[:-1])] if len(parts) > 1 else []), parts[-1]])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def face_renderer(size: int) -> Callable[[int], bytes]:
    """Return a function that renders face n as a PNG of size x size pixels."""
    import resvg_py
    from dicebear import Avatar, Style

    style = Style(json.loads(files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8")))

    def render(number: int) -> bytes:
        svg = Avatar(style, {**face(number).options, "size": size}).to_string()
        rendered = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
        out = io.BytesIO()
        Image.open(io.BytesIO(rendered)).convert("RGB").save(out, "PNG")
        return out.getvalue()

    return render


def main(first: int, step: int, end: int, size: int) -> None:
    render = face_renderer(size)
    for number in range(first, end, step):
        data = render(number)
        sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:5]))
