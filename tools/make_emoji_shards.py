"""Make the embedded emoji shards from an unpacked archive of captioned emoji images.

    python tools/make_emoji_shards.py SOURCE_FOLDER OUT_FOLDER

SOURCE_FOLDER holds captions.jsonl (one image a line: image, split, captions, vendor, group, base) and the images. Only
vendors whose licences allow redistribution with attribution are kept (see NOTICE). The archive's splits are used; they
are by base emoji, so that no object of the test split is in any vendor's train split.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from t2idist.data.sample_format import SampleRecord
from t2idist.data.shard_writer import write_shards
from t2idist.observability.command import command

VENDORS = ("fluent", "noto", "twemoji")
LICENCE = (
    "Fluent Emoji (c) Microsoft, MIT; Noto Emoji (c) Google, Apache-2.0; "
    "Twemoji (c) Twitter and contributors, CC BY 4.0; captions from emojibase and CLDR, Unicode licence"
)


def record(row: dict[str, Any], folder: Path, classes: dict[str, int]) -> SampleRecord:
    path = folder / row["image"]
    data = path.read_bytes()
    width, height = Image.open(io.BytesIO(data)).size
    group = "_".join(word.title() for word in re.findall(r"[a-z]+", row["group"]))
    return SampleRecord(
        split=row["split"],
        key=path.stem,
        image=data,
        extension=path.suffix[1:],
        captions=tuple(row["captions"]),
        width=width,
        height=height,
        attributes=(f"Vendor_{row['vendor'].title()}", f"Group_{group}"),
        class_id=classes[row["base"]],
    )


@command("make_emoji_shards")
def main(source: str, out: str) -> int:
    folder = Path(source)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["vendor"] in VENDORS]
    classes = {base: number for number, base in enumerate(sorted({row["base"] for row in rows}))}
    # shuffled, so that neighbours are not three renderings of one emoji
    rows.sort(key=lambda row: hashlib.blake2b(row["image"].encode()).digest())
    samples = (record(row, folder, classes) for row in rows)
    write_shards(
        out, samples, source="emoji", licence=LICENCE, options={"vendors": list(VENDORS), "size": 64}, compress=True
    )
    print(f"{len(rows)} images of {len(classes)} emoji in {out}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2]))
