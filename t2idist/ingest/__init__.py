"""Own pictures and captions into shard sets: readers of the usual layouts, one writer, and the check of a set."""
