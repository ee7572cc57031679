"""Captions in any encoding and script, through the tools, in every form that captions have."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from t2idist.data.shards import Dataset
from t2idist.data.tokenizer import ASCII, UNICODE
from tests.helpers.image_files import save_image
from tools import shard_celeba, shard_coco, shard_cub, shard_folder

CAPTION = "ein gr\u00fcner Vogel \u2013 f\u00fcr bird\u2019s"
WORDS = {"ein", "gr\u00fcner", "vogel", "f\u00fcr", "bird", "s"}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]
FORMS = ["txt", "csv", "tsv", "jsonl", "metadata", "coco", "tar", "celeba"]


def write_layout(root: Path, form: str, encoding: str) -> list[str]:
    """Write two images with captions in a form. Returns the arguments of the tool."""
    folder = {"coco": root / "train2014", "celeba": root / "img_align_celeba"}.get(form, root)
    names = ["a.jpg", "b.jpg"]
    for number, name in enumerate(names):
        save_image(folder / name, number)

    def write(name: str, text: str) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode(encoding))

    rows = [{"image": name, "file_name": name, "caption": CAPTION, "text": CAPTION} for name in names]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    arguments = ["--folder", str(root)]
    if form == "txt":
        for name in names:
            write(name.replace("jpg", "txt"), CAPTION + "\n")
    elif form in ("csv", "tsv"):
        separator = "," if form == "csv" else "\t"
        write(
            f"t.{form}",
            "\r\n".join(separator.join(row) for row in [("image", "caption"), *((n, CAPTION) for n in names)]),
        )
        arguments += ["--table", str(root / f"t.{form}")]
    elif form == "jsonl":
        write("captions.jsonl", lines)
    elif form == "metadata":
        write("metadata.jsonl", lines)
    elif form == "tar":
        arguments = ["--folder", str(tar_of(root, encoding))]
    elif form == "celeba":
        write("list_attr_celeba.txt", "2\nSmiling Gr\u00fcn\na.jpg 1 -1\nb.jpg -1 1\n")
        write("list_eval_partition.txt", "a.jpg 0\nb.jpg 0\n")
        write("captions.jsonl", lines)
        arguments = ["--celeba", str(root), "--captions", str(root / "captions.jsonl")]
    else:
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        captions = [{"id": i, "image_id": i, "caption": CAPTION} for i in range(2)]
        content = {"images": images, "annotations": captions}
        write("annotations/captions_train2014.json", json.dumps(content, ensure_ascii=False))
        arguments = ["--coco", str(root)]
    return arguments


def tar_of(root: Path, encoding: str) -> Path:
    with tarfile.open(root / "0.tar", "w") as tar:
        for name in ("a", "b"):
            members = {f"{name}.jpg": (root / f"{name}.jpg").read_bytes(), f"{name}.txt": CAPTION.encode(encoding)}
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root / "0.tar"


def run(form: str, arguments: list[str], out: Path) -> int:
    tool = {"coco": shard_coco, "celeba": shard_celeba}.get(form, shard_folder)
    splits = [] if tool is not shard_folder else ["--val", "0", "--test", "0"]
    return tool.main([*arguments, *splits, "--out", str(out), "--processes", "1", "--size", "32"])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_captions_is_read_in_every_encoding(tmp_path: Path, form: str, encoding: str):
    arguments = write_layout(tmp_path / "mine", form, encoding)
    named = ["--encoding", encoding] if encoding == "cp1252" else []
    assert run(form, [*arguments, *named], tmp_path / "set") == 0
    dataset = Dataset.open(str(tmp_path / "set"))
    train = dataset.split("train")
    assert [train.captions(i) for i in range(len(train))] == [[CAPTION], [CAPTION]]
    assert set(dataset.vocabulary.words) == {"<end>", *WORDS} and dataset.vocabulary.tokenizer == UNICODE
    assert form != "celeba" or dataset.attribute_names == ("Gr\u00fcn", "Smiling")


@pytest.mark.parametrize(
    ("form", "location"),
    [
        ("txt", "b.txt, line 1: byte 0x96"), ("csv", "t.csv, line 2: byte 0xfc"), ("tsv", "t.tsv, line 2: byte 0xfc"),
        ("jsonl", "captions.jsonl, line 1"), ("metadata", "metadata.jsonl, line 1"), ("tar", "byte 0xfc"),
        ("coco", "captions_train2014.json: byte 0xfc"), ("celeba", "list_attr_celeba.txt, line 2: byte 0xfc"),
    ],
)  # fmt: skip
def test_an_undecodable_byte_is_answered_with_the_byte_the_file_and_the_offer(
    tmp_path: Path, form: str, location: str, capsys: pytest.CaptureFixture[str]
):
    arguments = write_layout(tmp_path / "mine", form, "cp1252")
    if form == "txt":
        (tmp_path / "mine/a.txt").write_text("a red bird\n")
        (tmp_path / "mine/b.txt").write_bytes(b"a red \x96 bird\n")
    run(form, arguments, tmp_path / "set")
    errors = capsys.readouterr().err
    assert location.split(":")[0] in errors and "is not UTF-8; if the text is of Windows, --encoding cp1252" in errors
    if ":" in location:
        assert location.split(": ")[1] in errors


def test_the_class_lists_of_cub_are_read_in_other_encodings(tmp_path: Path):
    root = tmp_path / "CUB"
    birds = root / "CUB_200_2011"
    for number in (1, 2):
        save_image(birds / f"images/00{number}.K/b{number}.jpg", number)
        (root / f"text/00{number}.K").mkdir(parents=True)
        (root / f"text/00{number}.K/b{number}.txt").write_bytes(CAPTION.encode("utf-16"))
    tables = {
        "images.txt": "1 001.K/b1.jpg\n2 002.K/b2.jpg\n", "image_class_labels.txt": "1 1\n2 2\n",
        "classes.txt": "1 001.K\u00f6nig\n2 002.K\n", "bounding_boxes.txt": "1 0 0 20 20\n2 0 0 20 20\n",
    }  # fmt: skip
    for name, text in tables.items():
        (birds / name).write_bytes(text.encode("utf-16-le"))
    (tmp_path / "test.txt").write_bytes(b"2")
    arguments = ["--cub", str(root), "--test-classes", str(tmp_path / "test.txt"), "--out", str(tmp_path / "set")]
    assert shard_cub.main([*arguments, "--processes", "1", "--size", "32"]) == 0
    assert json.loads((tmp_path / "set/dataset.json").read_text())["classes"]["1"] == "001.K\u00f6nig"
    assert set(Dataset.open(str(tmp_path / "set")).vocabulary.words) == {"<end>", *WORDS}


def test_the_authors_tokenizer_is_an_option(tmp_path: Path):
    arguments = write_layout(tmp_path / "mine", "txt", "utf-8")
    assert run("txt", [*arguments, "--tokenizer", "ascii"], tmp_path / "ascii") == 0
    assert "tokenizer" not in json.loads((tmp_path / "ascii/dataset.json").read_text())
    dataset = Dataset.open(str(tmp_path / "ascii"))
    assert set(dataset.vocabulary.words) == {"<end>", "ein", "grner", "vogel", "fr", "bird", "s"}
    assert dataset.vocabulary.tokenizer == ASCII


def test_an_encoding_that_is_none_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = write_layout(tmp_path / "mine", "txt", "utf-8")
    assert run("txt", [*arguments, "--encoding", "utf-9"], tmp_path / "set") == 2
    assert "--encoding utf-9: no such text encoding" in capsys.readouterr().err and not (tmp_path / "set").exists()
