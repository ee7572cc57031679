"""Distributed training of text-to-image GANs: Ray Train workers, webdataset shards, elastic restarts."""

__version__ = "0.1.0"
