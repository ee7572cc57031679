"""Pillow with this package's memory settings; import `Image` from here wherever images are decoded."""

from __future__ import annotations

from PIL import Image as Image

_MEMORY_BLOCKS_KEPT = 8

# By default Pillow returns each image's memory to the system at once; the page faults cost a quarter of decoding time.
Image.core.set_blocks_max(_MEMORY_BLOCKS_KEPT)  # type: ignore[attr-defined]
