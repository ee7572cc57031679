"""Data that needs no download of pictures: emoji that ship with the package, avatars made on first use."""
