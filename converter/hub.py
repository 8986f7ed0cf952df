"""Publish a converted model on the Hugging Face Hub: verify the artifact, write its card, upload everything in one commit."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtpurbo.converter.card import absolute_path_in, model_card, published_recipe
from rtpurbo.converter.safetensors_format import read_header
from rtpurbo.converter.sources import first_line, hub_failures
from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, Manifest, verify_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

RECIPE_NAME = "recipe.toml"
CARD_NAME = "README.md"
# Weights that an older commit left behind would be found before, or beside, the ones that the manifest lists.
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model converted by rtpurbo",
    license: str | None = None,
    endpoint: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> str:
    """Upload the artifact in `folder` to the model repository `repo_id` ("user/name"); returns its URL.

    The artifact is verified first: manifest, size and sha256 of every listed file, names and shapes in indexer.safetensors.
    Uploaded in one commit: the files that the manifest lists, the manifest, recipe.toml with local paths replaced by their last part,
    and the folder's README.md or else a generated model card. `folder` is not changed. Weights in the repository that the manifest
    does not list are deleted in the same commit. The repository and `branch` are created when missing (`private` then applies);
    pushing the same artifact again changes nothing.
    token: None means the token that huggingface_hub has stored. endpoint: None means huggingface_hub's own.
    progress: receives one line for each step.

    Errors: ValueError, one sentence, for an artifact that does not verify, an invalid repository name, no token, a token that
    is unknown or may not write there, an existing public repository with private=True, no network, a failed upload. Until
    the commit succeeds the repository's branch is as it was.
    """
    import huggingface_hub

    progress(f"verifying {folder}")
    manifest = load_verified(folder)
    generated = _generated_files(folder, manifest, repo_id, license, progress)
    _check_repo_id(repo_id)
    token = token or huggingface_hub.get_token()
    if not token:
        raise ValueError("no Hugging Face token: log in with `hf auth login` or give a token that may write")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="rtpurbo")
    names = sorted({*manifest.files, MANIFEST_NAME} - generated.keys())
    additions = {**{name: str(folder / name) for name in names}, **generated}
    size = sum((folder / name).stat().st_size for name in names)
    try:
        progress(f"creating {repo_id} if it is missing")
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.model_info(repo_id).private
        if not is_public:
            if branch is not None and branch != "main":
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            progress(f"uploading {len(additions)} files, {size / 1e9:.2f} GB")
            _commit(api, repo_id, branch, additions, commit_message, progress)
    # RuntimeError: how huggingface_hub and its Xet client report a failed transfer. ValueError: refused metadata.
    except (*hub_failures(), RuntimeError, ValueError) as error:
        raise ValueError(_refusal(error, repo_id, api.endpoint)) from error
    if is_public:
        raise ValueError(f"{repo_id}: the repository exists and is public, wanted a private one")
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{branch}" if branch not in (None, "main") else "")
    progress(f"published {url}")
    return url


def load_verified(folder: Path) -> Manifest:
    """The manifest of `folder` after every check; ValueError names the first file or tensor that is missing or differs."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, wanted a converted model")
    manifest = Manifest.load(folder / MANIFEST_NAME)
    verify_files(folder, manifest)
    wanted = manifest.index_shapes()
    if wanted and INDEXER_NAME not in manifest.files:
        raise ValueError(f"{folder / MANIFEST_NAME}: files does not list {INDEXER_NAME}, but there are retrieval heads")
    found = {name: info.shape for name, info in read_header(folder / INDEXER_NAME).items()} if wanted else {}
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder / INDEXER_NAME}: {name} has shape {_shape(found.get(name))}, the manifest wants {_shape(wanted.get(name))}"
            )
    if (path := absolute_path_in(manifest.to_dict())) is not None:
        raise ValueError(f"{folder / MANIFEST_NAME}: {path[0]} is the local path {path[1]!r}, which must not be published")
    return manifest


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    why = "no '/'" if "/" not in repo_id else ""
    try:
        validate_repo_id(repo_id)
    except hub_failures() as error:
        why = first_line(error)
    if why:
        raise ValueError(f"{repo_id!r} is not a repository name, wanted 'user/name' ({why})")


def _commit(
    api: "HfApi", repo_id: str, branch: str | None, additions: dict[str, Any], message: str, progress: Callable[[str], None]
) -> None:
    """One commit with these files (name -> path or bytes) and without the weights that are not among them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repo_id, revision=branch)
    stale = [name for name in there if "/" not in name and name.endswith(_WEIGHT_SUFFIXES) and name not in additions]
    if stale:
        progress(f"deleting {', '.join(stale)} of an older version")
    operations = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in additions.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]
    api.create_commit(repo_id, operations, commit_message=message, revision=branch)


def _generated_files(
    folder: Path, manifest: Manifest, repo_id: str, license: str | None, progress: Callable[[str], None]
) -> dict[str, bytes]:
    """Name -> content of what is uploaded without being a file of the artifact, or in another form."""
    generated: dict[str, bytes] = {}
    card = folder / CARD_NAME
    if card.is_file() and CARD_NAME not in manifest.files:
        progress(f"{CARD_NAME}: published as it is in {folder}")
        generated[CARD_NAME] = card.read_bytes()
    elif CARD_NAME not in manifest.files:
        generated[CARD_NAME] = model_card(manifest, repo_id=repo_id, license=license).encode()
    recipe = folder / RECIPE_NAME
    if recipe.is_file():
        text, changed = published_recipe(recipe.read_bytes(), str(recipe))
        if changed and RECIPE_NAME in manifest.files:
            raise ValueError(f"{recipe}: {changed[0]} is a local path, and the manifest's digest of the file forbids to replace it")
        if changed:
            progress(f"{RECIPE_NAME}: published without the local path of {', '.join(changed)}")
        if RECIPE_NAME not in manifest.files:
            generated[RECIPE_NAME] = text.encode()
    return generated


def _refusal(error: Exception, repo_id: str, endpoint: str) -> str:
    """One sentence for what the Hub or the network refused."""
    cause: BaseException = error
    while not hasattr(cause, "response") and cause.__cause__ is not None:
        cause = cause.__cause__
    response = getattr(cause, "response", None)
    if response is None:
        answered = isinstance(error, (ValueError, RuntimeError)) and cause is error
        problem = "the upload was refused" if answered else f"{endpoint} cannot be reached"
        return f"{repo_id}: {problem} ({first_line(cause)})"
    meaning = {
        401: "the Hub does not know this token; log in again with `hf auth login`",
        403: "this token may not write there; wanted a token with write permission and a user or organisation that is yours",
        404: "the Hub has no such repository or branch, or the token may not see it",
    }
    said = response.headers.get("X-Error-Message") or first_line(cause)
    status = response.status_code
    return f"{repo_id}: {meaning.get(status, 'the Hub did not accept the upload')} (HTTP {status}: {said[:300]})"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (no such tensor)" if shape is None else str(list(shape))
