"""Tables as spreadsheets and data sets on the web have them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2idist.data.shards import Dataset
from t2idist.ingest.folder import FolderOptions, list_folder
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.tables import ALL_FLAGS, Columns, table_rows
from tests.helpers.image_files import save_image
from tools import shard_folder

Found = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


def read(root: Path, table: Path, columns: Columns, **options: bool) -> tuple[Found, list[tuple[str, str]], list[str]]:
    """Return captions and attributes by key, what was excluded by name and detail, and the notes."""
    with Listing() as listing:
        list_folder(str(root), listing, FolderOptions(0, 0, **options), table=str(table), columns=columns)
        images = {image.key: (image.captions, image.attributes) for image in listing.images("train")}
        rejects = [(r.name, r.detail) for r in listing.rejects() if r.reason is Reason.MALFORMED]
        return images, rejects, listing.notes


def write_images(root: Path, count: int = 3) -> None:
    for number in range(count):
        save_image(root / f"{number}.jpg", number, (8, 8))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "delimiter", "note"),
    [("t.csv", ",", None), ("t.csv", ";", "semicolons"), ("t.csv", "\t", "tabs"), ("t.csv", "|", "bars"),
     ("t.tsv", "\t", None), ("t.tsv", ",", "commas"), ("t.txt", ",", None), ("t.TSV", ";", "semicolons")],
)  # fmt: skip
def test_the_delimiter_is_found_and_said(tmp_path: Path, name: str, delimiter: str, note: str | None, end: str):
    write_images(tmp_path)
    rows = [["image", "caption"], ["0.jpg", '"a, b; c|d\te"'], ["1.jpg", "plain"], ["2.jpg", '"two ""words"""']]
    (tmp_path / name).write_bytes(end.join(delimiter.join(row) for row in rows).encode())
    images, rejects, notes = read(tmp_path, tmp_path / name, Columns())
    assert {key: captions for key, (captions, _) in images.items()} == {
        "0": ("a, b; c|d\te",), "1": ("plain",), "2": ('two "words"',),
    }  # fmt: skip
    assert not rejects and notes == ([] if note is None else [f"{name}: the fields are separated by {note}"])


def test_a_comma_in_the_header_of_a_table_with_semicolons_does_not_mislead(tmp_path: Path):
    write_images(tmp_path, 1)
    (tmp_path / "t.csv").write_text("image;caption;width, height, depth, weight\n0.jpg;one, two;8, 8, 3, 1\n")
    assert read(tmp_path, tmp_path / "t.csv", Columns())[0] == {"0": (("one, two",), ())}


def test_spaces_around_delimiters_and_the_line_of_excel_are_read(tmp_path: Path):
    write_images(tmp_path, 2)
    (tmp_path / "t.csv").write_text("image| number| caption\n0.jpg| 0| a dog .\n0.jpg| 1| a cat .\n")
    columns = Columns(caption="caption")
    assert read(tmp_path, tmp_path / "t.csv", columns)[0] == {"0": (("a dog .", "a cat ."), ())}
    (tmp_path / "t.csv").write_text("sep=;\r\nimage;caption\r\n1.jpg;hello\r\n")
    assert read(tmp_path, tmp_path / "t.csv", columns)[0] == {"1": (("hello",), ())}


def test_paths_are_read_as_people_write_them(tmp_path: Path):
    root = tmp_path / "mine"
    for name in ("sub/a.jpg", "b.jpg", "000003.jpg", "d.jpg"):
        save_image(root / name)
    rows = ["image;caption", "sub\\a.jpg;one", f"{root}/b.jpg;two", "000003;three", "D:\\photos\\mine\\d.jpg;four"]
    (tmp_path / "t.csv").write_bytes("\r".join(rows).encode())
    images, rejects, notes = read(root, tmp_path / "t.csv", Columns())
    found = {key.split("-")[0]: captions for key, (captions, _) in images.items()}
    assert found == {"sub": ("one",), "b": ("two",), "000003": ("three",), "d": ("four",)} and not rejects
    assert len(notes) == 4


def test_one_image_with_two_spellings_gets_both_captions(tmp_path: Path):
    write_images(tmp_path, 1)
    (tmp_path / "t.csv").write_text("image,caption\n0,one\n0.jpg,two\n.\\0.jpg,three\n")
    images = read(tmp_path, tmp_path / "t.csv", Columns())[0]
    assert images == {"0": (("one", "two", "three"), ())}


HEADER = ["image", "caption", "Smiling", "Bald", "age", "Young"]
ROWS = [
    ["0.jpg", "x", "1", "-1", "31", "yes"], ["1.jpg", "x", "0", "1", "40", "TRUE"], ["2.jpg", "x", "0", "0", "1", "no"],
]  # fmt: skip


def write_table(path: Path, rows: list[list[str]], delimiter: str = ",") -> None:
    path.write_text("\n".join(delimiter.join(row) for row in [HEADER, *rows]))


def test_columns_of_flags_are_attributes(tmp_path: Path):
    write_images(tmp_path)
    write_table(tmp_path / "t.csv", ROWS, ";")
    images, rejects, _ = read(tmp_path, tmp_path / "t.csv", Columns(flags=("Young", "Smiling")))
    assert {key: attributes for key, (_, attributes) in images.items()} == {
        "0": ("Young", "Smiling"), "1": ("Young",), "2": (),
    }  # fmt: skip
    assert not rejects


def test_all_columns_of_flags_are_found_and_said(tmp_path: Path):
    write_images(tmp_path)
    write_table(tmp_path / "t.csv", ROWS)
    images, _, notes = read(tmp_path, tmp_path / "t.csv", Columns(flags=ALL_FLAGS))
    assert images["0"][1] == ("Smiling", "Young") and images["1"][1] == ("Bald", "Young") and images["2"][1] == ()
    assert notes == ["t.csv: 3 attributes: Smiling, Bald, Young; not attributes: 'age' ('31' in t.csv, line 2)"]


def test_other_values_are_malformed_by_line(tmp_path: Path):
    write_images(tmp_path, 20)
    rows = [[f"{number}.jpg", "x", "0", "1", "50", "1"] for number in range(20)]
    rows[3][2], rows[7][3] = "maybe", ""
    write_table(tmp_path / "t.csv", rows)
    for flags in (ALL_FLAGS, ("Smiling", "Bald", "Young")):
        images, rejects, _ = read(tmp_path, tmp_path / "t.csv", Columns(flags=flags))
        assert len(images) == 18 and [name for name, _ in rejects] == ["t.csv, line 5", "t.csv, line 9"]
        assert rejects[0][1].startswith("attribute 'Smiling' is 'maybe'; allowed are 1, 0, -1, true")


def test_flags_of_parquet_have_any_type(tmp_path: Path):
    write_images(tmp_path)
    arrays = {
        "image": ["0.jpg", "1.jpg", "2.jpg"], "caption": ["x"] * 3, "A": [True, False, True], "B": [1, 0, -1],
        "C": [1.0, 0.0, 1.0], "D": ["yes", "no", "no"], "E": [1, None, 0], "F": [[1], [0], [1]], "G": [2.5, 1.0, 0.0],
    }  # fmt: skip
    pq.write_table(pa.table(arrays), tmp_path / "t.parquet")
    images, rejects, notes = read(tmp_path, tmp_path / "t.parquet", Columns(flags=ALL_FLAGS))
    assert [attributes for _, (_, attributes) in sorted(images.items())] == [
        ("A", "B", "C", "D"), (), ("A", "C"),
    ]  # fmt: skip
    assert "'E' (None in t.parquet, row 2), 'G' (2.5 in t.parquet, row 1)" in notes[0] and not rejects
    images, rejects, _ = read(tmp_path, tmp_path / "t.parquet", Columns(flags=("E",)))
    assert len(images) == 2 and rejects[0][0] == "t.parquet, row 2"


def test_numbers_name_images(tmp_path: Path):
    write_images(tmp_path)
    pq.write_table(pa.table({"image": [2, 0], "caption": ["two", "zero"]}), tmp_path / "t.parquet")
    images = read(tmp_path, tmp_path / "t.parquet", Columns())[0]
    assert images == {"2": (("two",), ()), "0": (("zero",), ())}


def test_missing_columns_are_named_with_their_option(tmp_path: Path):
    write_table(tmp_path / "t.csv", ROWS, ";")
    for columns, message in (
        (Columns(flags=("Smilng",)), r"no column 'Smilng' \(--attribute-columns\); columns: 'image', 'caption', 'Smil"),
        (Columns(image="file"), r"no column 'file' \(--image-column\); columns: 'image', 'caption'"),
        (Columns(class_name="kind"), r"no column 'kind' \(--class-column\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, tmp_path / "t.csv", columns)
    (tmp_path / "u.csv").write_text("image,caption,age\n0.jpg,x,31\n")
    with pytest.raises(ValueError, match=r"u.csv: no column holds 1 and 0 .*'age' \('31' in u.csv, line 2\)"):
        read(tmp_path, tmp_path / "u.csv", Columns(flags=ALL_FLAGS))


def test_the_tool_shards_a_table_of_flags_without_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_images(tmp_path / "mine")
    (tmp_path / "mine" / "labels.csv").write_text("image;Red;Big;size\n0;1;0;5\n1;true;yes;6\n2;-1;no;7\n")
    arguments = [
        "--folder", str(tmp_path / "mine"), "--out", str(tmp_path / "set"), "--table", f"{tmp_path}/mine/labels.csv",
        "--processes", "1", "--val", "0", "--test", "0", "--attribute-columns", "all",
    ]  # fmt: skip
    assert shard_folder.main(arguments) == 2
    error = capsys.readouterr().err
    assert "no column 'caption' (--caption-column; without captions: --caption-column '' --allow-no-captions)" in error
    assert shard_folder.main([*arguments, "--caption-column", "", "--allow-no-captions"]) == 0
    error = capsys.readouterr().err
    assert "shard_folder.py: labels.csv: the fields are separated by semicolons\n" in error
    train = Dataset.open(str(tmp_path / "set")).split("train")
    assert {key: train.attributes(n) for n, key in enumerate(train.keys)} == {
        "0": ["Red"],
        "1": ["Red", "Big"],
        "2": [],
    }


def test_options_that_would_be_ignored_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_images(tmp_path / "mine")
    base = ["--folder", str(tmp_path / "mine"), "--out", str(tmp_path / "set"), "--processes", "1"]
    for more, message in (
        (["--attribute-columns", "A"], "--attribute-columns A: needs --table"),
        (["--caption-extension", ".x", "--table", "t.csv"], "--caption-extension .x: not together with --table"),
        (["--max-megapixels", "0"], "--max-megapixels 0: must be at least 1"),
    ):
        assert shard_folder.main([*base, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_unclosed_quote_swallows_no_rows(tmp_path: Path, end: str):
    write_images(tmp_path, 6)
    rows = [
        "image,caption",
        '0.jpg,"a bird',
        "1.jpg,a cat",
        '2.jpg,a "dog"',
        "3.jpg,a cow",
        '4.jpg,"a fox',
        "5.jpg,a hen",
    ]
    (tmp_path / "t.csv").write_bytes(end.join(rows).encode())
    images, rejects, _ = read(tmp_path, tmp_path / "t.csv", Columns())
    found = {key: captions for key, (captions, _) in images.items() if captions}
    assert found == {"1": ("a cat",), "2": ('a "dog"',), "3": ("a cow",), "5": ("a hen",)}
    assert [name for name, _ in rejects] == ["t.csv, line 2", "t.csv, line 6"]
    assert rejects[0][1] == "its quote is not closed before line 3, which names another image: '1.jpg,a cat'"


def test_an_unclosed_quote_before_many_rows_costs_one_row(tmp_path: Path):
    write_images(tmp_path, 1)
    rows = [
        f"{number}.jpg,a caption that is a little longer, number {number}".replace(", n", " n")
        for number in range(1, 4000)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", '0.jpg,"a bird', *rows]))
    with Listing() as listing:
        found = [row.name for row in table_rows(str(tmp_path / "t.csv"), Columns(), listing)]
        assert found == [f"{number}.jpg" for number in range(1, 4000)] and len(list(listing.rejects())) == 1


def test_captions_of_several_lines_stay(tmp_path: Path):
    write_images(tmp_path, 3)
    captions = ["a bird,\nred, on a branch", "one\n2.jpg", "a cat\n\n5, six"]
    rows = "".join(f'{number}.jpg,"{caption}"\n' for number, caption in enumerate(captions))
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    images, rejects, _ = read(tmp_path, tmp_path / "t.csv", Columns())
    assert [images[str(number)][0] for number in range(3)] == [(caption,) for caption in captions] and not rejects


def test_numbers_as_names_are_swallowed_neither(tmp_path: Path):
    write_images(tmp_path, 2)
    (tmp_path / "t.csv").write_text('image,caption\n0,"a bird\n1,a cat\n')
    images, rejects, _ = read(tmp_path, tmp_path / "t.csv", Columns())
    assert images["1"][0] == ("a cat",) and [name for name, _ in rejects] == ["t.csv, line 2"]
