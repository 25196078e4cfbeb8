"""A data set of the Hugging Face hub -> a local folder of its data files; scripts are never fetched or run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import InputError, ResourceError


def hub_folder(name: str, path: Path, suffixes: Sequence[str]) -> Path:
    """The snapshot of the data set `name`, with files of `suffixes` only; from the hub's cache when offline.

    `path` is where a local folder of that name would stand, named in the error. InputError: unknown
    or gated data set. ResourceError: the hub cannot be reached and the cache has no copy.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = [f"*{suffix}" for suffix in suffixes]
    here = f"{name}: no such file or folder ({path.absolute()})"
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except errors.GatedRepoError:
        raise InputError(
            f"{here}, and the hub asks for consent to use it",
            "accept its terms on the hub and log in with `hf auth login`",
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(f"{here}, and the hub has no such public data set", "check the name") from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, OSError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ResourceError(
            f"{here}, and the hub cannot be reached: {what:.120}", "go online, or give a local file or folder"
        ) from None
