"""push: the whole circle against a local Hub, the model card, the published recipe, and every refusal in one sentence."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rtpurbo.converter.card import model_card, published_recipe
from rtpurbo.converter.hub import load_verified, push
from rtpurbo.manifests.manifest import (
    BaseModel,
    Indexer,
    Manifest,
    ModelShape,
    file_digest,
    roles_from_heads,
    verify_files,
)

REPO = "user/tiny"
TOKEN = "hf_test"


@pytest.fixture(scope="module")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with 4 query and 2 KV heads; layer 1 has retrieval heads 2 and 3."""
    folder = tmp_path_factory.mktemp("artifact")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    manifest = Manifest(
        base_model=BaseModel(id="example/Tiny-Llama", revision="a" * 40, config_sha256="0" * 64, tokenizer_sha256=None),
        model=ModelShape(
            model_type="llama",
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=4096,
        ),
        granularity="group",
        group_threshold=0.0,
        layers=roles_from_heads([[0.0, 0.1, 0.0, 0.0], [0.0, 0.1, 0.9, 0.8]], [[], [2, 3]], 2),
        sliding_window=256,
        sinks=4,
        indexer=Indexer(dim=2, keys="head", scale=0.35),
        top_p=0.9,
        decode_block=64,
        prefill_block=128,
        prefill_pattern="dense",
        dense_below=0,
        recipe={"preset": "demo", "indexer_steps": 24},
        metrics={"perplexity": {"dense": 11.13, "sparse": 11.3}, "note": "a | b\n# not a heading"},
    )
    save_file({name: torch.zeros(shape) for name, shape in manifest.index_shapes().items()}, folder / "indexer.safetensors")
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    replace(manifest, files=files).save(folder / "rtpurbo.json")
    recipe = '[recipe]\npreset = "demo"\nindexer_steps = 24\nindexer_data = "/home/ann/private/notes.txt"\ndistill_data = "python-docs"\n'
    (folder / "recipe.toml").write_text(recipe)
    (folder / "training.log").write_text("not part of the artifact\n")
    return folder


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    for path in tiny_artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    # The Xet client talks to a storage service that the local server does not have.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as server:
        yield server


def pull(hub: HubServer, folder: Path, revision: str | None = None, token: str | bool = TOKEN) -> Path:
    cache = folder / "cache"
    return Path(huggingface_hub.snapshot_download(REPO, revision=revision, cache_dir=cache, endpoint=hub.url, token=token))


def test_what_is_pulled_is_byte_identical_to_what_was_pushed_and_verifies(hub: HubServer, artifact: Path, tmp_path: Path):
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    lines: list[str] = []
    url = push(artifact, REPO, token=TOKEN, endpoint=hub.url, progress=lines.append)
    assert url == f"{hub.url}/{REPO}"
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    pulled = pull(hub, tmp_path)
    manifest = Manifest.load(pulled / "rtpurbo.json")
    verify_files(pulled, manifest)
    for name in [*manifest.files, "rtpurbo.json"]:
        assert (pulled / name).read_bytes() == before[name], name
    assert {path.name for path in pulled.iterdir()} == {*manifest.files, "rtpurbo.json", "recipe.toml", "README.md", ".gitattributes"}
    assert any("indexer_data" in line for line in lines)
    model = AutoModelForCausalLM.from_pretrained(pulled)
    assert model.config.num_hidden_layers == 2


def test_the_circle_works_in_a_process_that_knows_the_hub_from_its_environment_only(artifact: Path, tmp_path: Path):
    script = """
import sys
from pathlib import Path
import huggingface_hub
from rtpurbo.converter.hub import load_verified, push
print(push(Path(sys.argv[1]), "user/tiny", branch="v1", private=True))
print(load_verified(Path(huggingface_hub.snapshot_download("user/tiny", revision="v1"))).num_retrieval_heads)
"""
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", script, str(artifact)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"{hub.url}/user/tiny/tree/v1", "2"]
        repository = hub.repositories["models", REPO]
        assert repository.private
        assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}


def test_a_model_card_of_the_users_own_is_published_as_it_is(hub: HubServer, artifact: Path, tmp_path: Path):
    (artifact / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    assert (pull(hub, tmp_path) / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_a_second_push_of_the_same_artifact_makes_no_new_commit(hub: HubServer, artifact: Path):
    push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    commits = len(hub.repositories["models", REPO].commits)
    push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    assert len(hub.repositories["models", REPO].commits) == commits == 2


def test_weights_of_an_older_version_are_deleted_and_other_files_stay(hub: HubServer, artifact: Path):
    hub.add_repository("models", REPO, {"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"})
    push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    repository = hub.repositories["models", REPO]
    files = repository.commits[repository.branches["main"]]
    assert "model-00001-of-00002.safetensors" not in files
    assert "notes.md" in files
    assert "model.safetensors" in files


def test_the_published_recipe_names_the_data_but_not_where_it_lies(hub: HubServer, artifact: Path, tmp_path: Path):
    push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    published = (pull(hub, tmp_path) / "recipe.toml").read_text()
    assert tomllib.loads(published)["recipe"] == {
        "preset": "demo",
        "indexer_steps": 24,
        "indexer_data": "notes.txt",
        "distill_data": "python-docs",
    }


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/data/books", "books"),
        ("~/books.jsonl", "books.jsonl"),
        ("../secret/books/", "books"),
        ("C:\\\\Users\\\\ann\\\\books.txt", "books.txt"),
        ("corpus/books.parquet", "books.parquet"),
        ("HuggingFaceFW/fineweb:sample-10BT@9bb295ddab0e05d785b879661af7260fed5140fc", None),
        ("python-docs", None),
        ("", None),
    ],
)
def test_only_local_paths_of_a_recipe_are_shortened(value: str, published: str | None):
    text = f'[recipe]\nindexer_data = "{value}"\n'
    result, changed = published_recipe(text.encode())
    assert changed == ([] if published is None else ["recipe.indexer_data"])
    if published is None:
        assert result == text
    else:
        assert tomllib.loads(result)["recipe"]["indexer_data"] == published


def test_a_recipe_that_is_not_toml_is_refused_by_name():
    for content in (b"[recipe", b'x = "\xff"'):
        with pytest.raises(ValueError, match=r"work/recipe\.toml: not valid TOML"):
            published_recipe(content, "work/recipe.toml")


def test_a_recipe_with_a_local_path_that_the_manifest_has_hashed_is_refused(hub: HubServer, artifact: Path):
    manifest = Manifest.load(artifact / "rtpurbo.json")
    replace(manifest, files={**manifest.files, "recipe.toml": file_digest(artifact / "recipe.toml")}).save(artifact / "rtpurbo.json")
    with pytest.raises(ValueError, match=r"recipe\.toml: recipe\.indexer_data is a local path, and the manifest's digest"):
        push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def test_the_model_card_has_valid_metadata_and_every_figure_of_the_manifest(tiny_artifact: Path):
    card = model_card(Manifest.load(tiny_artifact / "rtpurbo.json"), repo_id=REPO, license="apache-2.0")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "base_model": "example/Tiny-Llama",
        "license": "apache-2.0",
        "library_name": "rtpurbo",
        "pipeline_tag": "text-generation",
        "tags": ["rtpurbo", "sparse-attention", "long-context", "llama"],
    }
    for text in ("2605.16928", "a" * 40, "2 of 8 (25.0%)", "1 of 4 (25.0%)", f'rtpurbo.load("{REPO}")', "256 tokens", "layers (1 to 1)"):
        assert text in card, text
    assert "| perplexity.sparse | 11.3 |" in card
    assert "| indexer_steps | 24 |" in card
    assert "\n# not a heading" not in card
    assert r"a \| b" in card


def test_a_base_model_that_is_a_folder_is_named_without_a_link(tiny_artifact: Path):
    manifest = Manifest.load(tiny_artifact / "rtpurbo.json")
    manifest = replace(manifest, base_model=replace(manifest.base_model, id='my "odd": model', revision=None), metrics={}, recipe={})
    card = model_card(manifest)
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in metadata
    assert "license" not in metadata
    assert "https://huggingface.co/my" not in card
    assert "No metrics were measured." in card


def test_a_changed_file_is_refused_before_the_hub_is_asked(hub: HubServer, artifact: Path):
    data = bytearray((artifact / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (artifact / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 .* wanted"):
        push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def test_an_indexer_with_other_shapes_than_the_roles_is_refused_by_tensor(artifact: Path):
    manifest = Manifest.load(artifact / "rtpurbo.json")
    shapes = {**manifest.index_shapes(), "layers.1.index_k": (1, 2, 8)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, artifact / "indexer.safetensors")
    files = {**manifest.files, "indexer.safetensors": file_digest(artifact / "indexer.safetensors")}
    replace(manifest, files=files).save(artifact / "rtpurbo.json")
    with pytest.raises(ValueError, match=r"layers\.1\.index_k has shape \[1, 2, 8\], the manifest wants \[2, 2, 8\]"):
        load_verified(artifact)


def test_a_manifest_with_a_local_path_is_refused_by_key(artifact: Path):
    manifest = Manifest.load(artifact / "rtpurbo.json")
    replace(manifest, calibration={"documents": ["/home/ann/book.txt"]}).save(artifact / "rtpurbo.json")
    with pytest.raises(ValueError, match=r"calibration\.documents\.0 is the local path '/home/ann/book\.txt'"):
        load_verified(artifact)


@pytest.mark.parametrize("repo_id", ["tiny", "user/", "a/b/c", "user/na me", "user/--x"])
def test_an_invalid_repository_name_is_refused_before_the_hub_is_asked(hub: HubServer, artifact: Path, repo_id: str):
    with pytest.raises(ValueError, match=r"is not a repository name, wanted 'user/name'"):
        push(artifact, repo_id, token=TOKEN, endpoint=hub.url)
    assert hub.requests == []


def test_without_a_token_push_says_how_to_log_in(hub: HubServer, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ValueError, match="no Hugging Face token: log in with `hf auth login`"):
        push(artifact, REPO, endpoint=hub.url)
    assert hub.requests == []


def test_an_unknown_token_and_another_users_repository_are_refused(hub: HubServer, artifact: Path):
    with pytest.raises(ValueError, match=r"user/tiny: the Hub does not know this token.*HTTP 401"):
        push(artifact, REPO, token="hf_wrong", endpoint=hub.url)
    with pytest.raises(ValueError, match=r"somebody/tiny: this token may not write there.*HTTP 403"):
        push(artifact, "somebody/tiny", token=TOKEN, endpoint=hub.url)
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_is_one_sentence(artifact: Path):
    with HubServer() as closed:
        url = closed.url
    with pytest.raises(ValueError, match=rf"user/tiny: {url} cannot be reached \(.+\)"):
        push(artifact, REPO, token=TOKEN, endpoint=url)


def test_a_public_repository_is_not_taken_for_a_private_one(hub: HubServer, artifact: Path):
    hub.add_repository("models", REPO, {})
    with pytest.raises(ValueError, match="exists and is public, wanted a private one"):
        push(artifact, REPO, token=TOKEN, endpoint=hub.url, private=True)
    assert len(hub.repositories["models", REPO].commits) == 1


@pytest.mark.parametrize("step", ["/lfs-storage/", "/commit/"])
def test_a_failed_upload_leaves_the_branch_as_it_was(hub: HubServer, artifact: Path, step: str):
    hub.fail(step, 403, times=9)
    with pytest.raises(ValueError, match=r"user/tiny: .*HTTP 403"):
        push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    repository = hub.repositories["models", REPO]
    assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}


def test_an_upload_that_fails_once_is_repeated(hub: HubServer, artifact: Path, tmp_path: Path):
    hub.fail("/lfs-storage/", 500)
    push(artifact, REPO, token=TOKEN, endpoint=hub.url)
    load_verified(pull(hub, tmp_path))


def test_a_private_repository_is_hidden_from_strangers(hub: HubServer, artifact: Path, tmp_path: Path):
    push(artifact, REPO, token=TOKEN, endpoint=hub.url, private=True)
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        pull(hub, tmp_path, token=False)
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        pull(hub, tmp_path, revision="no-such-branch")
    assert json.loads((pull(hub, tmp_path) / "rtpurbo.json").read_text())["schema_version"] == 1
