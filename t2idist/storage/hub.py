"""Files of exports on the Hugging Face Hub (``hf://USER/NAME``): read through its local cache, and published.

``huggingface_hub`` is an optional package; HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE have their usual meaning.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

SCHEME = "hf"
SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".png", ".webp")
_URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")
_EXPECTED = "expected hf://USER/NAME, or hf://USER/NAME@REVISION"
_INSTALL = "pip install 't2idist[hub]'"


def split(url: str) -> tuple[str, str | None, str]:
    """Return the repository, the revision (None: the newest) and the path in it. Raises ValueError."""
    match = _URL.fullmatch(url.rstrip("/"))
    if match is None:
        raise ValueError(f"{url}: {_EXPECTED}")
    return match[1], match[2], match[3] or ""


def local_file(url: str) -> Path:
    """Return the local copy of a file, which is downloaded if the cache does not have it.

    Raises:
        FileNotFoundError: there is no such repository or file.
        ValueError: `huggingface_hub` is not installed, or the file is of a kind that is not read.
        ConnectionError: the Hub does not answer, or refuses.
    """
    repository, revision, name = split(url)
    if not name:  # of hf://NAME/export.json
        raise ValueError(f"{url}: {_EXPECTED}")
    if not name.endswith(SUFFIXES):
        raise ValueError(
            f"{url}: only {', '.join(SUFFIXES)} files are read from the Hub; a file of another kind, such as a pickle, "
            "can run code: convert its weights with t2idist convert import"
        )
    with _errors(url):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, name, revision=revision))
    raise AssertionError


def publish(folder: Path, url: str, *, private: bool, message: str) -> str:
    """Upload the files of a folder to a repository, which is created if needed; return the address of the commit.

    Raises ValueError and ConnectionError as `local_file` does, and PermissionError without a login that may write.
    """
    repository, revision, _ = split(url)
    with _errors(url):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message))
    raise AssertionError


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Raise the client's errors as ours, in one sentence that has no token."""
    try:
        import huggingface_hub.errors as errors
    except ImportError:
        raise ValueError(f"{url}: the Hub's client is not installed; install it with: {_INSTALL}") from None
    try:
        yield
    except errors.LocalEntryNotFoundError:
        raise ConnectionError(f"{url}: not in the local cache, and the Hub cannot be reached") from None
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise FileNotFoundError(2, "no such file or repository on the Hub, or no access (HF_TOKEN)", url) from None
    except errors.HFValidationError:
        raise ValueError(f"{url}: not a valid name of a repository") from None
    except Exception as error:  # of the client's HTTP library, which depends on its version
        if (status := getattr(getattr(error, "response", None), "status_code", 0)) in (401, 403):
            raise PermissionError(
                errno.EACCES,
                f"the Hub refuses access (status {status}); log in with hf auth login, or set HF_TOKEN",
                url,
            ) from None
        lines = str(error).splitlines() or [type(error).__name__]
        raise ConnectionError(f"{url}: {lines[0][:200]}") from None
