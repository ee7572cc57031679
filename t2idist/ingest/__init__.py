"""Convert images and captions to shard sets: readers for common layouts, one writer, and a checker."""
