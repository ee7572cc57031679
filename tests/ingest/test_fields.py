"""Fields of annotations, read by one rule in all layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.ingest.fields import Fields
from t2idist.ingest.files import UndecodableText
from tests.helpers.image_files import read_rejects, save_image
from tests.ingest.layout_sets import captions, jpeg, shard, write_tar

NAMED = ("--class-column", "kind", "--attributes-column", "tags", "--val", "0", "--test", "0")


def texts(*values: bytes) -> pa.Array:
    """Return a column of texts, which need not be UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def write_layout(root: Path, layout: str, kinds: list[bytes], tags: list[bytes]) -> list[str]:
    """Write two images with a class and attributes. Returns options, and names of the rows in messages."""
    root.mkdir()
    rows = [
        b'{"image": "%d.jpg", "file_name": "%d.jpg", "caption": "number %d", "kind": "%s", "tags": "%s"}'
        % (number, number, number, kind, tag)
        for number, (kind, tag) in enumerate(zip(kinds, tags, strict=True))
    ]
    if layout == "tar":
        write_tar(root / "0.tar", {f"{n}.{e}": d for n in range(2) for e, d in (("jpg", jpeg(n)), ("json", rows[n]))})
        return []
    columns = {"caption": ["number 0", "number 1"], "kind": texts(*kinds), "tags": texts(*tags)}
    if layout == "parquet":
        pq.write_table(pa.table({"image": [jpeg(0), jpeg(1)], **columns}), root / "all.parquet")
        return []
    for number in range(2):
        save_image(root / f"{number}.jpg", number, (16, 16))
    if layout in ("captions", "metadata"):
        (root / f"{layout}.jsonl").write_bytes(b"\n".join(rows))
        return []
    table = root.parent / f"t.{layout.removesuffix(' table')}"
    if layout == "csv":
        lines = [b'%d.jpg,number %d,%s,"%s"' % (n, n, kinds[n], tags[n]) for n in range(2)]
        table.write_bytes(b"\n".join([b"image,caption,kind,tags", *lines]))
    else:
        pq.write_table(pa.table({"image": ["0.jpg", "1.jpg"], **columns}), table)
    return ["--table", str(table)]


LAYOUTS = ["captions", "metadata", "csv", "parquet table", "parquet", "tar"]


@pytest.mark.parametrize("field", ["kind", "tags"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_whose_class_or_attribute_is_no_text_is_left_out(tmp_path: Path, layout: str, field: str) -> None:
    wrong = rb"gr\ud83dn" if layout in ("captions", "metadata", "tar") else b"gr\xfcn"
    values = {"kinds": [b"jay", b"jay"], "tags": [b"Red", b"Red"]}
    values["kinds" if field == "kind" else "tags"][1] = wrong
    options = write_layout(tmp_path / "mine", layout, **values)
    assert captions(shard(tmp_path / "mine", tmp_path / "set", *NAMED, *options)) == {"train": {"number 0"}}
    assert "invalid_utf8" in {reason for _, reason, _ in read_rejects(tmp_path / "set")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attributes_in_a_string_are_separated_in_every_layout(tmp_path: Path, layout: str) -> None:
    options = write_layout(tmp_path / "mine", layout, [b"a", b"b"], [b"Red, Big;Small | Old", b""])
    train = shard(tmp_path / "mine", tmp_path / "set", *NAMED, *options).split("train")
    found = {train.captions(n)[0]: train.attributes(n) for n in range(2)}
    assert found == {"number 0": ["Red", "Big", "Small", "Old"], "number 1": []}


def test_null_is_no_attribute_and_no_caption(tmp_path: Path) -> None:
    save_image(tmp_path / "mine" / "0.jpg")
    row = {"image": "0.jpg", "captions": ["one", None], "attributes": None, "class": None, "split": None}
    (tmp_path / "mine" / "captions.jsonl").write_text(json.dumps(row))
    assert captions(shard(tmp_path / "mine", tmp_path / "set", "--val", "0", "--test", "0")) == {"train": {"one"}}


def test_what_a_row_says() -> None:
    seen: dict[str, bool] = {}
    fields = Fields(attributes="tags", class_name="kind")
    facts = fields.read(
        {"text": ["a", "b"], "tags": {"Red": 1, "Big": 0}, "kind": 3, "split": " Valid "}, seen, ["Old"]
    )
    assert (facts.captions, facts.attributes, facts.class_name) == (["a", "b"], ["Red", "Old"], "3")
    assert facts.split == "val" and seen == {"Red": True, "Big": False}
    assert Fields(split="").read({"split": "test"}, seen).split is None
    assert Fields(caption="").captions({"": "x", "text": "y"}) == []
    with pytest.raises(UndecodableText, match="U\\+D83D is half of a character"):
        fields.read({"tags": {"gr\ud83dn": 1}}, seen)
    assert set(seen) == {"Red", "Big"}
    for values in ({"kind": 1.5}, {"tags": 4}, {"text": 5}):
        with pytest.raises(ValueError, match="must be a"):
            fields.read(values, seen)
