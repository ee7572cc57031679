"""Read and write files on local disk and in object storage."""

from t2idist.storage.contents import describe_stranger
from t2idist.storage.objects import (
    BLOCK_BYTES,
    absolute,
    check_endpoint,
    check_url,
    exists,
    is_local,
    join,
    list_dir,
    list_files_and_folders,
    local_name,
    local_path,
    read_bytes,
    read_json,
    redact,
    remove,
    sha256,
    size,
    write_bytes,
    write_json,
)
from t2idist.storage.retry import Cancelled

__all__ = [
    "BLOCK_BYTES",
    "Cancelled",
    "absolute",
    "check_endpoint",
    "check_url",
    "describe_stranger",
    "exists",
    "is_local",
    "join",
    "list_dir",
    "list_files_and_folders",
    "local_name",
    "local_path",
    "read_bytes",
    "read_json",
    "redact",
    "remove",
    "sha256",
    "size",
    "write_bytes",
    "write_json",
]
