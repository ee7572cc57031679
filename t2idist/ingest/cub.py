"""CUB-200-2011 with captions, as StackGAN and AttnGAN have it: text/<class>/<name>.txt, split by filenames.pickle."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator

from t2idist import storage
from t2idist.ingest.files import first_existing, is_picture, is_unsafe, lines, read_limited, walk
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
    """List all birds with class, captions and bounding box.

    text_url: the folder of captions (None: found beside the pictures). test_classes_url: a file with one class a line,
    by name or number, whose birds are the test split (None: train and test are read from filenames.pickle or
    train.txt and test.txt). crop: whether to crop to the bounding box. Raises ValueError for missing files.
    """
    birds = first_existing(
        [storage.join(root, "CUB_200_2011"), storage.join(root, "images")], "the folder CUB_200_2011"
    )
    birds = birds if birds.endswith("CUB_200_2011") else root
    texts = text_url or first_existing(
        [storage.join(above, name) for above in (root, birds) for name in ("text", "text_c10")],
        "the folder of captions",
    )
    listing.classes = {int(number): name for number, name in _table(birds, "classes.txt", listing, 2)}
    labels = {number: int(label) for number, label in _table(birds, "image_class_labels.txt", listing, 2)}
    boxes = {row[0]: row[1:] for row in _table(birds, "bounding_boxes.txt", listing, 5)} if crop else {}
    splits = _splits(root, birds) if test_classes_url is None else None
    test_classes = set() if test_classes_url is None else _test_classes(test_classes_url, listing.classes)
    seen: set[str] = set()
    for number, name in _table(birds, "images.txt", listing, 2):
        stem = name.rsplit(".", 1)[0]
        url = storage.join(birds, "images", name)
        box = _box(boxes.get(number, ()))
        label = labels.get(number)
        split = splits.get(stem) if splits is not None else "test" if label in test_classes else "train"
        reason, detail = Reason.MALFORMED, ""
        if is_unsafe(name):
            reason, detail, url = Reason.UNSAFE_NAME, "images.txt", ""
        elif number in seen:
            reason, detail = Reason.DUPLICATE, f"images.txt: number {number} comes twice"
        elif label is None or label not in listing.classes:
            detail = f"image_class_labels.txt has no known class for number {number}"
        elif crop and box is None:
            reason, detail = Reason.BAD_BOX, f"bounding_boxes.txt has no box for number {number}"
        elif split is None:
            reason, detail = Reason.NO_SPLIT, "neither among the names of train nor of test"
        else:
            caption_file = storage.join(texts, f"{stem}.txt")
            listing.add(split, name, url, class_id=label, box=box if crop else None, text_url=caption_file)
            seen.add(number)
            continue
        seen.add(number)
        listing.left_out(split or "", name, reason, detail)
        if url:
            listing.name_file(url)
    _list_left_over(storage.join(birds, "images"), texts, listing)


def _list_left_over(images: str, texts: str, listing: Listing) -> None:
    """Pictures and captions that images.txt does not name."""
    stems = set()
    for name in walk(images):
        if is_picture(name):
            stems.add(name.rsplit(".", 1)[0])
            listing.note_file("", name, storage.join(images, name))
    listing.reject_unnamed_files()
    for name in walk(texts):
        if name.endswith(".txt") and name.removesuffix(".txt") not in stems:
            listing.left_out("", name, Reason.NO_PICTURE, "captions of no picture")


def _table(folder: str, name: str, listing: Listing, columns: int) -> Iterator[list[str]]:
    """Rows of a list of CUB: the number first, the last column may hold spaces."""
    for number, line in lines(storage.join(folder, name)):
        words = line.decode("utf-8", "surrogateescape").strip().split(maxsplit=columns - 1)
        if (
            len(words) == columns
            and words[0].isdecimal()
            and (name != "image_class_labels.txt" or words[1].isdecimal())
        ):
            yield words
        elif words:
            detail = f"{columns} columns must stand there"
            listing.left_out("", f"{name}, line {number}", Reason.MALFORMED, detail)


def _box(numbers: tuple[str, ...] | list[str]) -> tuple[float, float, float, float] | None:
    try:
        x, y, width, height = (float(number) for number in numbers)
    except ValueError:
        return None
    sound = all(abs(value) < 1e6 for value in (x, y, width, height)) and width > 0 and height > 0
    return (x, y, width, height) if sound else None


def _test_classes(url: str, classes: dict[int, str]) -> set[int]:
    numbers = {name: number for number, name in classes.items()}
    found = set()
    for place, line in lines(url):
        word = line.decode("utf-8", "replace").strip()
        if not word:
            continue
        number = numbers.get(word, int(word) if word.isdecimal() else -1)
        if number not in classes:
            raise ValueError(f"{storage.redact(url)}, line {place}: {word!r} is no class of classes.txt")
        found.add(number)
    return found


def _splits(root: str, birds: str) -> dict[str, str]:
    """Split by name without extension."""
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        candidates = [storage.join(root, split, "filenames.pickle"), storage.join(root, f"{split}.txt")]
        candidates.append(storage.join(birds, f"{split}.txt"))
        url = first_existing(candidates, f"the list of {split} pictures (or give --test-classes)")
        if url.endswith(".pickle"):
            names = read_names(url)
        else:
            names = [line.decode("utf-8", "surrogateescape").strip() for _, line in lines(url)]
        for name in names:
            stem = name.rsplit(".", 1)[0] if is_picture(name) else name
            if splits.setdefault(stem, split) != split:
                raise ValueError(f"{storage.redact(url)}: {name!r} is in both train and test")
    return splits


def read_names(url: str) -> list[str]:
    """The strings of a pickled list, read without unpickling; raises ValueError that names any other operation."""
    where = storage.redact(url)
    try:
        data = read_limited(url, _NAMES_MAX_BYTES)
    except OverflowError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        return _list_of_strings(data)
    except _NotNames as error:
        raise ValueError(f"{where}: holds more than a list of names: {error}; it was not run") from None
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise ValueError(f"{where}: not a pickled list of names: {error!r}"[:300]) from None


class _NotNames(Exception):
    pass


def _list_of_strings(data: bytes) -> list[str]:
    """A machine that knows lists, strings and its memo, and nothing that could run anything."""
    stack: list[object] = []
    memo: dict[int, object] = {}
    for operation, argument, place in pickletools.genops(data):
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
            raise _NotNames(f"operation {name} at byte {place}")
    (names,) = stack
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise _NotNames("something else than strings")
    return names


def _extend(target: object, items: list[object]) -> None:
    if not isinstance(target, list):
        raise _NotNames("items of something that is no list")
    target.extend(items)
