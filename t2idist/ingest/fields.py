"""Names of the fields of samples that carry their annotations: columns of a table, or keys of a JSON object."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CAPTION_FIELDS = ("text", "caption", "captions")
"""Looked for in this order if no name is given."""
IMAGE_FIELDS = ("image", "img", "jpg", "png")
"""Likewise, of columns that hold images."""


@dataclass(frozen=True)
class Fields:
    """Names of fields; None: the usual ones for captions and images, otherwise there is no such field."""

    image: str | None = None
    caption: str | None = None
    """'': there are no captions."""
    attributes: str | None = None
    class_name: str | None = None
    split: str | None = None

    def caption_name(self, names: Collection[str]) -> str | None:
        """Return the name of the field with captions, out of `names`; None if there is none."""
        if self.caption is not None:
            return self.caption if self.caption in names else None
        return next((name for name in CAPTION_FIELDS if name in names), None)

    def captions(self, values: Mapping[str, Any]) -> list[str]:
        """Return the captions of a sample. Raises ValueError if they are not text."""
        name = self.caption_name(values)
        value = None if name is None else values[name]
        captions = value if isinstance(value, list) else [] if value is None else [value]
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


def require_captions(where: str, fields: Fields, names: Iterable[str]) -> None:
    """Raise ValueError unless one of the fields holds captions. `where`: the file, for the message."""
    names = list(names)
    if fields.caption == "" or fields.caption_name(names) is not None:
        return
    wanted = CAPTION_FIELDS if fields.caption is None else (fields.caption,)
    raise ValueError(
        f"{where}: no field {' or '.join(map(repr, wanted))}; name the one with the captions with --caption-column, or "
        f"keep the images with --allow-no-captions; fields: {', '.join(map(repr, names[:20])) or 'none'}"
    )
