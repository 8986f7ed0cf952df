"""Checkpoints from the Hugging Face Hub: config first, so that an unsupported model is refused before its weights are fetched."""

import errno
from pathlib import Path
from typing import Any

from rtpurbo.converter.catalog import nearest_names
from rtpurbo.converter.shards import CONFIG, read_config
from rtpurbo.manifests.architectures import architecture_of

_WANTED = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "merges.txt", "LICENSE*", "NOTICE*", "USE_POLICY.md"]
# Other formats of the same weights, in subfolders or beside them.
_UNWANTED = ["*/*", "consolidated*", "*.gguf"]


def download_checkpoint(repo: str, revision: str | None) -> tuple[Path, str]:
    """(folder in the Hub's cache, commit sha) of a model repository; only safetensors, JSON, tokenizer and licence files.

    Cached files are used again. ValueError: unknown repository (with the nearest known names), unknown revision, gated without
    access, no network, full disk, and every unsupported model (see architecture_of) before its weights are fetched.
    """
    folder = _snapshot(repo, revision, [CONFIG], [])
    architecture_of(read_config(folder), f"{repo}/{CONFIG}")
    commit = folder.name
    return _snapshot(repo, commit, _WANTED, _UNWANTED), commit


def download_config(repo: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model repository, supported or not; ValueError as download_checkpoint."""
    return read_config(_snapshot(repo, revision, [CONFIG], []))


def _snapshot(repo: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repo}: is gated: accept its licence on https://huggingface.co/{repo} and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"{repo}: the Hub has no such public model (a private one needs `hf auth login`){nearest_names(repo)}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo}: the Hub has no revision {revision!r} of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise ValueError(f"{repo}{at}: is not in the local cache and the Hub cannot be reached{nearest_names(repo)}") from error
    # HTTPError comes from the HTTP library of the installed version of huggingface_hub: httpx or its successor.
    except (errors.HTTPError, errors.XetDownloadError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(f"{repo}{at}: the download failed: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise ValueError(f"{repo}{at}: cannot be downloaded: {why}") from error
