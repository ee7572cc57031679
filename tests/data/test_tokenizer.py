"""The tokenizer and the vocabulary."""

from __future__ import annotations

import random
import unicodedata

import pytest

from t2idist.data.embedded.avatars import face
from t2idist.data.tokenizer import ASCII, UNICODE, Vocabulary, count_words, tokenize


def test_tokenize_splits_lower_case_ascii_words():
    words = tokenize("This bird's WING-bars:\ufffd\ufffdblack & white_1!")
    assert words == ["this", "bird", "s", "wing", "bars", "black", "white_1"]
    assert tokenize("caf\u00e9 \u4e2d\u6587 ok") == ["caf", "ok"]
    assert tokenize(" ,;- ") == []


def test_vocabulary_is_ordered_by_count_and_encodes_with_padding():
    vocabulary = Vocabulary.from_counts({"b": 2, "a": 2, "c": 5, "rare": 1}, min_count=2)
    assert vocabulary.words == ("<end>", "c", "a", "b")
    ids, length = vocabulary.encode("a rare c B", 5)
    assert (ids.tolist(), length) == ([2, 1, 3, 0, 0], 3)
    assert vocabulary.unknown_words("a Rare thing, rare") == ["rare", "thing"]
    assert vocabulary.decode(ids) == ["a", "c", "b"]
    with pytest.raises(ValueError, match="no word of the caption 'nothing known' is in the vocabulary of 4 words"):
        vocabulary.encode("nothing known", 5)
    with pytest.raises(ValueError, match="<end>"):
        Vocabulary(["a", "b"])


def test_encode_truncates_long_captions_or_draws_a_subset():
    vocabulary = Vocabulary(["<end>", *"abcdefgh"])
    caption = "a b c d e f g h"
    assert vocabulary.encode(caption, 3)[0].tolist() == [1, 2, 3]
    kept = {tuple(vocabulary.encode(caption, 3, seed)[0].tolist()) for seed in range(200)}
    assert len(kept) > 40  # of 56 subsets
    assert all(list(ids) == sorted(ids) and ids[0] > 0 for ids in kept)


def test_ascii_captions_have_the_same_words_in_both_tokenizers():
    generator = random.Random(0)
    captions = [caption for number in range(300) for caption in face(number).captions]
    captions += ["".join(map(chr, generator.choices(range(128), k=60))) for _ in range(3000)]
    assert any(tokenize(caption, ASCII) for caption in captions)
    for caption in captions:
        assert tokenize(caption, UNICODE) == tokenize(caption, ASCII)


def test_unicode_words_keep_their_letters():
    assert tokenize("ein gr\u00fcner Vogel, f\u00fcr", ASCII) == ["ein", "grner", "vogel", "fr"]
    assert tokenize("ein gr\u00fcner Vogel, f\u00fcr", UNICODE) == ["ein", "gr\u00fcner", "vogel", "f\u00fcr"]
    assert tokenize("\uff32\uff25\uff24 \ufb01re so\u00adft \u2764\ufe0f", UNICODE) == ["red", "fire", "soft"]
    hindi = "\u0939\u093f\u0928\u094d\u0926\u0940"  # its vowel signs are marks, not letters
    assert tokenize(f"{hindi} {hindi}", UNICODE) == [hindi, hindi]
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"  # with a joiner inside
    assert tokenize(persian, UNICODE) == [persian]


def test_composed_and_decomposed_forms_give_one_vocabulary():
    captions = [
        "ein gr\u00fcner V\u00f6gel \u00c5ngstr\u00f6m", "\u1ec7 vi\u1ec7t", "\uac00\ub098 \ub2e4", "\u304c\u3071",
        "\u0e19\u0e49\u0e33", "\u0958\u093c",
    ]  # fmt: skip
    counts = [
        count_words([unicodedata.normalize(form, caption) for caption in captions], UNICODE)
        for form in ("NFC", "NFD", "NFKC", "NFKD")
    ]
    assert all(other == counts[0] for other in counts)
    words = set(counts[0])
    assert {"gr\u00fcner", "v\u00f6gel", "\u00e5ngstr\u00f6m", "vi\u1ec7t", "\uac00\ub098"} <= words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("\u7ea2\u8272\u7684\u9e1f 12 birds", ["\u7ea2", "\u8272", "\u7684", "\u9e1f", "12", "birds"]),
        ("\u8d64\u3044\u30c8\u30ea\u30fc\u3002", ["\u8d64", "\u3044", "\u30c8", "\u30ea", "\u30fc"]),
        ("\u0e19\u0e01\u0e2a\u0e35", ["\u0e19", "\u0e01", "\u0e2a\u0e35"]),
        ("\u0e99\u0ebb\u0e81", ["\u0e99\u0ebb", "\u0e81"]),
        ("\u1794\u1780\u17d2\u179f\u17b8", ["\u1794", "\u1780\u17d2\u179f\u17b8"]),
        ("\u101e\u1010\u1039\u1010", ["\u101e", "\u1010\u1039\u1010"]),
    ],
    ids=["Chinese", "Japanese", "Thai", "Lao", "Khmer", "Burmese"],
)
def test_in_scripts_without_blanks_characters_are_words(caption: str, words: list[str]):
    assert tokenize(caption, UNICODE) == words


def test_words_are_their_own_tokens_and_keep_every_letter():
    generator = random.Random(1)
    letters = [chr(point) for point in range(0x110000) if chr(point).isalpha()]
    for _ in range(2000):
        caption = " ".join("".join(generator.choices(letters, k=3)) for _ in range(4))
        words = tokenize(caption, UNICODE)
        assert [part for word in words for part in tokenize(word, UNICODE)] == words
        kept = unicodedata.normalize("NFKC", "".join(words))
        expected = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).lower())
        assert sum(map(str.isalpha, kept)) == sum(map(str.isalpha, expected))


def test_a_vocabulary_splits_captions_with_its_tokenizer():
    words = ["<end>", "ein", "gr\u00fcner", "vogel"]
    new, old = Vocabulary(words, UNICODE), Vocabulary(["<end>", "ein", "grner", "vogel"])
    for form in ("NFC", "NFD"):
        assert new.encode(unicodedata.normalize(form, "Ein gr\u00fcner Vogel"), 4)[0].tolist() == [1, 2, 3, 0]
    assert old.encode("ein gr\u00fcner Vogel", 4)[0].tolist() == [1, 2, 3, 0]
    assert new.words_read_by(ASCII) == list(old.words) and new != Vocabulary(words)
    assert old.unknown_words("ein r\u00f6tlicher \u9e1f, gr\u00fcner") == ["r\u00f6tlicher", "\u9e1f"]
    assert Vocabulary.from_index({"vocabulary": words, "tokenizer": UNICODE}) == new
    assert Vocabulary.from_index({"vocabulary": words}).tokenizer == ASCII
    with pytest.raises(ValueError, match="tokenizer is 'words-2'; this program has unicode, ascii"):
        Vocabulary(words, "words-2")
