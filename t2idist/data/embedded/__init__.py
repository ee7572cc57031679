"""Data that needs no download: emoji that ship with the package, and avatars that are generated on first use."""
