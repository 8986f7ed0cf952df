"""The repositories of the local Hub (see hub_server.py): files with their git and LFS hashes, commits and branches, in memory."""

import hashlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".gguf", ".zst")
LFS_BYTES = 10_000_000
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Blob:
    """A file's content; `lfs` says how it was uploaded."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The git object id: of the content, or of the pointer for an LFS file."""
        body = self.content
        if self.lfs:
            body = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(body)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repository:
    """branches: name -> commit; commits: sha -> the files of that commit by path."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        parent = self.branches.get(branch, "")
        listing = "".join(f"{path}\0{blob.oid}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{parent}\0{message}\0{listing}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def sha_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


def listing(files: dict[str, Blob]) -> list[dict[str, Any]]:
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if str(parent) != "."}
    entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
    for path, blob in files.items():
        entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["path"])
