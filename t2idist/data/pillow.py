"""Pillow as this package uses it; import it in place of PIL wherever pictures are decoded."""

from __future__ import annotations

from PIL import Image as Image

_MEMORY_BLOCKS_KEPT = 8

# Pillow gives each picture's memory back to the system at once; page faults then cost a quarter of the decoding time.
Image.core.set_blocks_max(_MEMORY_BLOCKS_KEPT)  # type: ignore[attr-defined]
