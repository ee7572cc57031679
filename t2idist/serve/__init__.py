"""Draw over HTTP: a page and an API over an export, in one process or on Ray Serve."""
