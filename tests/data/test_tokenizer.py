"""The tokenizer and the vocabulary."""

from __future__ import annotations

import pytest

from t2idist.data.tokenizer import Vocabulary, tokenize


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
