"""Keys and duplicates in the list of images."""

from __future__ import annotations

from t2idist.data.sample_format import KEY_PATTERN
from t2idist.ingest.listing import Listing, hashed_key, make_key
from t2idist.ingest.rejects import Reason


def test_keys_are_valid_and_unique():
    assert make_key("a_b-1.jpg") == "a_b-1"
    names = ["a b.jpg", "a-b .jpg", "a/b.jpg", "b/a.jpg", "\u00e9.png", "x" * 100 + ".jpg", "a.b.jpg", "....jpg"]
    keys = [make_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)
    with Listing() as listing:
        for name in ("a.jpg", "a.png", "a.webp"):
            listing.add("train", name, f"/x/{name}")
        listing.add("val", "a.jpg", "/y/a.jpg")
        listing.add("val", "a.jpg", "/x/a.jpg")
        keys = [image.key for split in ("train", "val") for image in listing.images(split)]
        assert len(set(keys)) == 4 and "a" in keys and hashed_key("a.png") in keys
        assert [reject.reason for reject in listing.rejects()] == [Reason.DUPLICATE]
