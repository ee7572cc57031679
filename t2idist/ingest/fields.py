"""Names of the fields of samples that carry their annotations: columns of a table, or keys of a JSON object."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from t2idist.ingest.files import UndecodableText, undecodable_part
from t2idist.ingest.flags import parse_attributes
from t2idist.ingest.splits import split_of_word

CAPTION_FIELDS = ("text", "caption", "captions")
"""Looked for in this order if no name is given."""
IMAGE_FIELDS = ("image", "img", "jpg", "png")
"""Likewise, of columns that hold images."""
NAME_FIELDS = ("image", "file_name", "filename", "image_name", "image_id", "file", "image_path", "filepath", "path")
"""Likewise, of columns that hold the names of images."""
SPLIT_FIELD = "split"
_MAX_ATTRIBUTE = 200


@dataclass(frozen=True)
class Facts:
    """What the fields say about an image."""

    captions: list[str]
    """As they are: they may hold surrogates, which stand for bytes that are not UTF-8."""
    attributes: list[str]
    class_name: str | None
    split: str | None


@dataclass(frozen=True)
class Fields:
    """Names of fields; None: the usual ones for captions, images and splits, otherwise there is no such field."""

    image: str | None = None
    caption: str | None = None
    """'': there are no captions."""
    attributes: str | None = None
    class_name: str | None = None
    split: str | None = None
    """'': no splits are stated."""
    usual_captions: tuple[str, ...] = CAPTION_FIELDS

    def or_else(self, usual: Fields) -> Fields:
        """Return these names; where none is given, the name in `usual`."""
        given = {kind: name for kind, name in vars(self).items() if kind != "usual_captions" and name is not None}
        return replace(usual, **given)

    def options(self) -> dict[str, str]:
        """Return the names that are given, by the option that gives them."""
        kinds = ("image", "caption", "attributes", "class_name", "split")
        return {f"--{kind.removesuffix('_name')}-column": getattr(self, kind) for kind in kinds if getattr(self, kind)}

    def read(self, values: Mapping[str, Any], seen: dict[str, bool], more: Sequence[str] = ()) -> Facts:
        """Read the annotations of an image.

        Args:
            values: the fields of the image.
            seen: gets the attributes that are flags, as `parse_attributes` says.
            more: further attributes.

        Raises:
            UndecodableText: an attribute, the class or the split has a byte that is no text.
            ValueError: a value has the wrong type.
        """
        flags: dict[str, bool] = {}
        value = values.get(self.attributes) if self.attributes else None
        attributes = parse_attributes(value, self.attributes or "attributes", flags)
        attributes = [name[:_MAX_ATTRIBUTE] for name in (*attributes, *more)]
        facts = Facts(self.captions(values), attributes, self.class_of(values), self.split_of(values))
        if (problem := undecodable_part([*attributes, facts.class_name or "", facts.split or ""])) is not None:
            raise UndecodableText(problem)
        for name, present in flags.items():
            seen[name] = present or seen.get(name, False)
        return facts

    def caption_name(self, names: Collection[str]) -> str | None:
        """Return the name of the field with captions, out of `names`; None if there is none."""
        if self.caption is not None:
            return self.caption if self.caption and self.caption in names else None
        return next((name for name in self.usual_captions if name in names), None)

    def captions(self, values: Mapping[str, Any]) -> list[str]:
        """Return the captions of a sample. Raises ValueError if they are not text."""
        name = self.caption_name(values)
        value = None if name is None else values[name]
        captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
        if not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"'{name}' must be a string or a list of strings")
        return captions

    def class_of(self, values: Mapping[str, Any]) -> str | None:
        value = None if self.class_name is None else values.get(self.class_name)
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"'{self.class_name}' must be a string or an integer")
        return str(value)

    def split_of(self, values: Mapping[str, Any]) -> str | None:
        """Return the split that a sample states, by its usual name: "validation" is "val"."""
        value = None if self.split == "" else values.get(self.split or SPLIT_FIELD)
        if not isinstance(value, str | None):
            if self.split is None:
                return None  # the field of this name is something else
            raise ValueError(f"'{self.split}' must be a string")
        return (split_of_word(value.strip()) or value.strip() or None) if value else None


def require_captions(where: str, fields: Fields, names: Iterable[str]) -> None:
    """Raise ValueError unless one of the fields holds captions. `where`: the file, for the message."""
    names = list(names)
    if fields.caption == "" or fields.caption_name(names) is not None:
        return
    wanted = fields.usual_captions if fields.caption is None else (fields.caption,)
    raise ValueError(
        f"{where}: no field {' or '.join(map(repr, wanted))}; name the one with the captions with --caption-column, or "
        f"keep the images with --allow-no-captions; fields: {', '.join(map(repr, names[:20])) or 'none'}"
    )


def require_named(where: str, fields: Fields, found: Collection[str]) -> None:
    """Raise ValueError if a field that is given by an option occurs nowhere. `found`: the names that occur."""
    for option, name in fields.options().items():
        if name not in found:
            raise ValueError(
                f"{where}: no field '{name}' ({option}); fields: {', '.join(map(repr, list(found)[:20])) or 'none'}"
            )
