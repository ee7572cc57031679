"""Reader for webdataset tars, as img2dataset writes them: members with one name and the extensions .jpg, .txt, .json.

A tar is read once, front to back, to list its members; an image is then read from its position in the tar, and nothing
is unpacked. Only the images of compressed tars are copied into a temporary file.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import IO, Any

from t2idist import storage
from t2idist.data.sample_format import MAX_FILE_BYTES
from t2idist.ingest.fields import Fields, require_captions, require_named
from t2idist.ingest.files import (
    CAPTION_SUFFIXES,
    MAX_LINE_BYTES,
    ByteRange,
    UndecodableText,
    is_image,
    is_unsafe,
    text_lines,
    text_of_file,
)
from t2idist.ingest.folder import OUTSIDE_SPLITS, FolderOptions, SplitChooser, number_classes
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason
from t2idist.ingest.splits import NamedSplits
from t2idist.ingest.stored_file import open_file
from t2idist.observability.progress_bar import track

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_TEXT, _JSON, _CLASS, _IMAGE, _OTHER = ".txt", ".json", ".cls", "image", "other"
_FIELDS = Fields(attributes="attributes")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


def list_tars(root: str, names: Sequence[str], listing: Listing, options: FolderOptions, fields: Fields) -> str:
    """List the images in tars. Returns a sentence about the splits.

    Args:
        names: the tars, relative to `root`.

    Raises:
        ValueError: no member of the tars holds captions.
    """
    scan = _Scan(listing, fields)
    with track(names, "file") as tracked:
        for name in tracked:
            scan.add_tar(storage.join(root, name), name)
    if options.needs_captions and scan.json_keys and not scan.captioned:
        require_captions(f"the .json members of {names[0]}", fields, scan.json_keys)
    require_named(f"the .json members of {names[0]}", fields, scan.json_keys)
    if options.by_class and not scan.classes:
        raise ValueError("--split-by-class: the tars have no classes (.cls members, or --class-column)")
    class_ids = number_classes(scan.classes, listing)
    splits = NamedSplits(names, file_names=True, ignore=not options.split_folders)
    chooser = SplitChooser(options, splits)
    for _, members in listing.annotations():
        for image, about in _samples(members, listing):
            where, name = image["tar"], f"{image['tar']}/{image['member']}"
            merged = _merge(about)
            split = chooser.choose(merged["split"], where, merged["class_name"], name)
            if split is None:
                listing.exclude("", name, Reason.NO_SPLIT, OUTSIDE_SPLITS)
                continue
            listing.add(
                split, name, image["url"], part=ByteRange(*image["part"]), captions=merged["captions"],
                attributes=merged["attributes"], needs_captions=options.needs_captions,
                class_id=None if merged["class_name"] is None else class_ids[merged["class_name"]],
            )  # fmt: skip
    return chooser.describe()


class _Scan:
    """List the members of tars.

    Attributes:
        classes: the classes that occur.
        captioned: a member holds a caption.
        json_keys: keys of the JSON objects: all of the first one, and those that options name.
    """

    def __init__(self, listing: Listing, fields: Fields) -> None:
        self._listing = listing
        self._fields = fields
        self.classes: dict[str, None] = {}
        self.captioned = False
        self.json_keys: dict[str, None] = {}

    def add_tar(self, url: str, name: str) -> None:
        """Store the members of a tar as annotations of their samples; a damaged end becomes a reject."""
        last = "no member"
        compressed = not name.lower().endswith(".tar")
        with open_file(url) as file:
            try:
                with _open_tar(file, compressed) as archive:
                    while (member := _next_member(archive, compressed)) is not None:
                        last = f"member {_utf8(member.name)[:100]!r}"
                        self._add_member(archive, member, url, name, compressed)
            except _DAMAGE as error:
                detail = f"{last} is the last one that is readable: {type(error).__name__}: {error}"
                self._listing.exclude("", name, Reason.TRUNCATED, detail[:250])

    def _add_member(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, url: str, tar: str, compressed: bool
    ) -> None:
        name = "/".join(part for part in _utf8(member.name).split("/") if part != ".")
        folder, _, base = name.rpartition("/")
        if member.isdir() or base.startswith(".") or (base.startswith("__") and base.endswith("__")):
            return  # hidden files, and webdataset's own members
        if not member.isreg() or member.issparse() or is_unsafe(name):
            detail = "only regular members with names inside their folder are read"
            self._listing.exclude("", f"{tar}/{name}", Reason.UNSAFE_NAME, detail)
            return
        stem, dot, extension = base.rpartition(".") if "." in base else (base, "", "")
        data = b""
        if not dot and member.size <= MAX_FILE_BYTES:
            data = _read(archive, member)
        kind = _kind_of_suffix(f".{extension.lower()}") if dot else _kind_of_content(data)
        if kind == _OTHER:
            return
        if member.size > (MAX_FILE_BYTES if kind == _IMAGE else MAX_LINE_BYTES):
            self._listing.exclude("", f"{tar}/{name}", Reason.FILE_TOO_LARGE, f"{member.size} bytes")
            return
        key = base.partition(".")[0]
        facts: dict[str, Any] = {"kind": kind, "tar": tar, "member": name, "stem": stem, "key": key}
        if kind == _IMAGE:
            part = ByteRange(member.offset_data, member.size)
            if compressed:
                url, part = self._listing.spool(data or _read(archive, member))
            facts |= {"url": url, "part": (part.start, part.length)}
        else:
            try:
                facts |= self._annotation(kind, data or _read(archive, member))
            except UndecodableText as error:
                self._listing.exclude("", f"{tar}/{name}", Reason.INVALID_UTF8, str(error))
                return
            except (ValueError, RecursionError) as error:
                self._listing.exclude("", f"{tar}/{name}", Reason.MALFORMED, str(error)[:200])
                return
        self._listing.add_annotation(f"{tar}/{folder}/{key}", facts)

    def _annotation(self, kind: str, data: bytes) -> dict[str, Any]:
        """Parse a member with captions, a class or both. Raises ValueError if it is malformed."""
        if kind == _TEXT:
            lines = text_lines(data)
            self.captioned |= bool(lines)
            return {"captions": [line.decode("utf-8", "surrogateescape") for line in lines]}
        if kind == _CLASS:
            class_name = text_of_file(data).strip()
            if class_name:
                self.classes[class_name] = None
            return {"class_name": class_name or None}
        values = json.loads(text_of_file(data))
        if not isinstance(values, dict):
            raise ValueError("the JSON must be an object")
        named = set(self._fields.options().values()) & values.keys() if self.json_keys else values
        self.json_keys |= dict.fromkeys(named)
        fields = self._fields.or_else(_FIELDS)
        try:
            facts = fields.read(values, self._listing.attributes)
        except UndecodableText:
            raise
        except ValueError:
            if self._fields.attributes:
                raise
            facts = replace(fields, attributes=None).read(values, self._listing.attributes)  # it may be something else
        self.captioned |= bool(facts.captions)
        if facts.class_name is not None:
            self.classes[facts.class_name] = None
        return asdict(facts)


def _open_tar(file: IO[bytes], compressed: bool) -> tarfile.TarFile:
    """Open a tar; one that is compressed can only be read front to back."""
    if compressed:
        return tarfile.open(fileobj=gzip.GzipFile(fileobj=file), mode="r|")
    return tarfile.open(fileobj=file, mode="r:")


def _next_member(archive: tarfile.TarFile, compressed: bool) -> tarfile.TarInfo | None:
    """Return the next member, None at the end. Raises ReadError if the tar is damaged there."""
    try:
        member = archive.next()
    except ValueError as error:  # of a damaged extended header
        raise tarfile.ReadError(str(error)) from None
    archive.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
    if member is None and not compressed and archive.fileobj is not None:
        archive.fileobj.seek(archive.offset)
        header = archive.fileobj.read(tarfile.BLOCKSIZE)
        if header.strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
    return member


def _utf8(name: str) -> str:
    """Escape surrogates, which stand for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _kind_of_suffix(suffix: str) -> str:
    if is_image(f"x{suffix}"):
        return _IMAGE
    if suffix in (*CAPTION_SUFFIXES, ".text"):
        return _TEXT
    return suffix if suffix in (_JSON, _CLASS) else _OTHER


def _kind_of_content(data: bytes) -> str:
    """Say what a member without extension is."""
    if data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return _IMAGE
    return _TEXT if data and b"\0" not in data else _OTHER


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a member. Raises EOFError if the tar ends too early."""
    file = archive.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) < member.size:
        raise EOFError("the tar ends too early")
    return data


def _samples(members: list[dict[str, Any]], listing: Listing) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield each image of the members that share a key, with the members that describe it.

    The key of webdataset ends at the first dot of a name, so ``a.v1.jpg`` and ``a.v2.jpg`` have the same one. An image
    is described by the members with its name up to the last dot. The others belong to the image that is named like the
    key, or to the only one.
    """
    images = [member for member in members if member["kind"] == _IMAGE]
    texts = [member for member in members if member["kind"] != _IMAGE]
    stems = {image["stem"] for image in images}
    if not images:
        first = members[0]
        listing.exclude("", f"{first['tar']}/{first['member']}", Reason.NO_IMAGE, "the sample has no image")
        return
    rest = [text for text in texts if text["stem"] not in stems]
    main = next((image for image in images if image["stem"] == image["key"]), images[0] if len(images) == 1 else None)
    used: set[str] = set()
    for image in images:
        if image["stem"] in used:  # for example a.jpg and a.png: two images of one name
            detail = "another image of this sample has the same name"
            listing.exclude("", f"{image['tar']}/{image['member']}", Reason.DUPLICATE, detail)
            continue
        used.add(image["stem"])
        yield image, [text for text in texts if text["stem"] == image["stem"]] + (rest if image is main else [])


def _merge(about: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine what describes an image. Text members come before JSON, which may repeat the caption."""
    texts = [caption for member in about if member["kind"] == _TEXT for caption in member["captions"]]
    others = [caption for member in about if member["kind"] == _JSON for caption in member["captions"]]
    return {
        "captions": texts or others,
        "attributes": list(dict.fromkeys(name for member in about for name in member.get("attributes", []))),
        "class_name": next((m["class_name"] for m in about if m.get("class_name") is not None), None),
        "split": next((m["split"] for m in about if m.get("split") is not None), None),
    }
