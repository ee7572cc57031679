"""Reader for CUB-200-2011 with the captions of StackGAN and AttnGAN: text/<class>/<name>.txt, filenames.pickle."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator

from t2idist import storage
from t2idist.ingest.files import first_existing, is_image, is_unsafe, read_limited, read_lines, walk
from t2idist.ingest.listing import Listing
from t2idist.ingest.rejects import Reason

_NAMES_MAX_BYTES = 64 << 20
_STRINGS = {"STRING", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_MARK = object()


def list_cub(
    root: str, listing: Listing, text_url: str | None = None, test_classes_url: str | None = None, crop: bool = True
) -> None:
    """List all images with class, captions and bounding box.

    Args:
        text_url: folder of the captions. Default: `text` or `text_c10` next to the images.
        test_classes_url: file that names the classes of the test split, one name or number per line. Default: the
            splits are read from filenames.pickle, or train.txt and test.txt.
        crop: crop to the bounding box.

    Raises:
        ValueError: a file is missing.
    """
    birds = first_existing(
        [storage.join(root, "CUB_200_2011"), storage.join(root, "images")], "the folder CUB_200_2011", root
    )
    birds = birds if birds.endswith("CUB_200_2011") else root
    texts = text_url or first_existing(
        [storage.join(above, name) for above in (root, birds) for name in ("text", "text_c10")],
        "the folder of captions",
        root,
    )
    listing.classes = {int(number): name for number, name in _read_table(birds, "classes.txt", listing, 2)}
    labels = {number: int(label) for number, label in _read_table(birds, "image_class_labels.txt", listing, 2)}
    boxes = {row[0]: row[1:] for row in _read_table(birds, "bounding_boxes.txt", listing, 5)} if crop else {}
    splits = _read_splits(root, birds) if test_classes_url is None else None
    test_classes = set() if test_classes_url is None else _read_test_classes(test_classes_url, listing.classes)
    seen: set[str] = set()
    for number, name in _read_table(birds, "images.txt", listing, 2):
        stem = name.rsplit(".", 1)[0]
        url = storage.join(birds, "images", name)
        box = _parse_box(boxes.get(number, ()))
        label = labels.get(number)
        split = splits.get(stem) if splits is not None else "test" if label in test_classes else "train"
        reason, detail = Reason.MALFORMED, ""  # why the image is excluded
        if is_unsafe(name):
            reason, detail, url = Reason.UNSAFE_NAME, "images.txt", ""
        elif number in seen:
            reason, detail = Reason.DUPLICATE, f"images.txt: id {number} is repeated"
        elif label is None or label not in listing.classes:
            detail = f"image_class_labels.txt has no known class for id {number}"
        elif crop and box is None:
            reason, detail = Reason.BAD_BOX, f"bounding_boxes.txt has no valid box for id {number}"
        elif split is None:
            reason, detail = Reason.NO_SPLIT, "listed in neither train nor test"
        else:
            caption_file = storage.join(texts, f"{stem}.txt")
            listing.add(split, name, url, class_id=label, box=box if crop else None, text_url=caption_file)
            seen.add(number)
            continue
        seen.add(number)
        listing.exclude(split or "", name, reason, detail)
        if url:
            listing.mark_annotated(url)
    _reject_unlisted_files(storage.join(birds, "images"), texts, listing)


def _reject_unlisted_files(images: str, texts: str, listing: Listing) -> None:
    """Reject images and captions that images.txt does not list."""
    stems = set()
    for name in walk(images):
        if is_image(name):
            stems.add(name.rsplit(".", 1)[0])
            listing.add_file("", name, storage.join(images, name))
    listing.reject_unannotated_files()
    for name in walk(texts):
        if name.endswith(".txt") and name.removesuffix(".txt") not in stems:
            listing.exclude("", name, Reason.NO_IMAGE, "captions without an image")


def _read_table(folder: str, name: str, listing: Listing, columns: int) -> Iterator[list[str]]:
    """Yield the rows of a CUB table: an id first; the last column may contain spaces."""
    for number, line in read_lines(storage.join(folder, name)):
        words = line.decode("utf-8", "surrogateescape").strip().split(maxsplit=columns - 1)
        if (
            len(words) == columns
            and words[0].isdecimal()
            and (name != "image_class_labels.txt" or words[1].isdecimal())
        ):
            yield words
        elif words:
            detail = f"expected {columns} columns"
            listing.exclude("", f"{name}, line {number}", Reason.MALFORMED, detail)


def _parse_box(row: tuple[str, ...] | list[str]) -> tuple[float, float, float, float] | None:
    try:
        x, y, width, height = (float(value) for value in row)
    except ValueError:
        return None
    valid = all(abs(value) < 1e6 for value in (x, y, width, height)) and width > 0 and height > 0
    return (x, y, width, height) if valid else None


def _read_test_classes(url: str, classes: dict[int, str]) -> set[int]:
    numbers = {name: number for number, name in classes.items()}
    test_classes = set()
    for line_number, line in read_lines(url):
        word = line.decode("utf-8", "replace").strip()
        if not word:
            continue
        number = numbers.get(word, int(word) if word.isdecimal() else -1)
        if number not in classes:
            raise ValueError(f"{storage.redact(url)}, line {line_number}: {word!r} is not a class of classes.txt")
        test_classes.add(number)
    return test_classes


def _read_splits(root: str, birds: str) -> dict[str, str]:
    """Read the split of each image, by name without extension."""
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        candidates = [storage.join(root, split, "filenames.pickle"), storage.join(root, f"{split}.txt")]
        candidates.append(storage.join(birds, f"{split}.txt"))
        url = first_existing(candidates, f"the list of {split} images (alternative: --test-classes)", root)
        if url.endswith(".pickle"):
            names = read_names(url)
        else:
            names = [line.decode("utf-8", "surrogateescape").strip() for _, line in read_lines(url)]
        for name in names:
            stem = name.rsplit(".", 1)[0] if is_image(name) else name
            if splits.setdefault(stem, split) != split:
                raise ValueError(f"{storage.redact(url)}: {name!r} is in both train and test")
    return splits


def read_names(url: str) -> list[str]:
    """Read a pickled list of strings without unpickling. Raises ValueError if the pickle holds anything else."""
    file = storage.redact(url)
    try:
        data = read_limited(url, _NAMES_MAX_BYTES)
    except OverflowError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        return _list_of_strings(data)
    except _NotANameList as error:
        raise ValueError(f"{file}: holds more than a list of names: {error}; it was not executed") from None
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise ValueError(f"{file}: not a pickled list of names: {error!r}"[:300]) from None


class _NotANameList(Exception):
    pass


def _list_of_strings(data: bytes) -> list[str]:
    """Interpret the pickle operations for lists, strings and the memo; reject all others, so no code can run."""
    stack: list[object] = []
    memo: dict[int, object] = {}
    for operation, argument, position in pickletools.genops(data):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in _STRINGS:
            stack.append(argument)
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _PUTS:
            memo[int(str(argument))] = stack[-1]
        elif name in _GETS:
            stack.append(memo[int(str(argument))])
        elif name in ("LIST", "APPENDS"):
            start = len(stack) - 1 - stack[::-1].index(_MARK)
            items = stack[start + 1 :]
            del stack[start:]
            if name == "LIST":
                stack.append(items)
            else:
                _extend(stack[-1], items)
        elif name == "APPEND":
            item = stack.pop()
            _extend(stack[-1], [item])
        elif name == "STOP":
            break
        else:
            raise _NotANameList(f"operation {name} at byte {position}")
    (names,) = stack
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise _NotANameList("it is not a list of strings")
    return names


def _extend(target: object, items: list[object]) -> None:
    if not isinstance(target, list):
        raise _NotANameList("items appended to a value that is not a list")
    target.extend(items)
