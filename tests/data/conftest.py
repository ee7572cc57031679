"""Fixtures of the data tests."""

from __future__ import annotations

import pytest

from t2idist.data.shards import Dataset
from tests.helpers.shard_sets import make_sample, write_set


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A set of 60 train and 9 test samples, which no test changes."""
    splits = ["train"] * 60 + ["test"] * 9
    folder = tmp_path_factory.mktemp("small") / "set"
    return write_set(folder, [make_sample(n, split) for n, split in enumerate(splits)])
