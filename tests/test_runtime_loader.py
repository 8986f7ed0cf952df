"""Loading and verifying artifacts: everything that does not fit is refused in one sentence, before the model is used."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import eager_model as eager
import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, Manifest
from rtpurbo.manifests.parameters import count_parameters
from rtpurbo.runtime.cache import require_memory
from rtpurbo.runtime.layout import layout_of, with_roles
from rtpurbo.runtime.loader import load
from rtpurbo.runtime.verify import relative_error, verify

RETRIEVAL = [[0, 5], [4, 5, 6, 7]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    eager.save_artifact(tmp_path / "artifact", eager.tiny_config("qwen2", layers=2), RETRIEVAL)
    return tmp_path / "artifact"


def refused(folder: Path | str, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(folder, **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest anew with the digests of the files as they are now."""
    eager.write_manifest(folder, dataclasses.replace(Manifest.load(folder / MANIFEST_NAME), **changes))


@pytest.mark.parametrize("source", ["./no-such-folder", "no-such-folder", "a/b/c", "user/..", "https://huggingface.co/user/repo"])
def test_a_source_that_is_neither_a_folder_nor_a_hub_id_is_refused(source: str) -> None:
    refused(source, "there is no such folder, and it is not a Hub id of the form user/repo")


def test_a_file_and_a_revision_of_a_folder_are_refused(folder: Path) -> None:
    refused(folder / "config.json", "is a file, wanted an artifact's folder")
    refused(folder, "is a folder, and revision 'main' needs a Hub repository", revision="main")


def test_a_folder_without_manifest_is_refused_by_name(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    refused(folder, r"rtpurbo\.json: cannot be read")


def test_a_changed_file_is_refused_by_its_digest(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(folder, r"model\.safetensors: sha256 \w+, wanted")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEXER_NAME])
def test_a_file_that_the_manifest_does_not_list_is_not_loaded(folder: Path, name: str) -> None:
    manifest = Manifest.load(folder / MANIFEST_NAME)
    files = {other: digest for other, digest in manifest.files.items() if other != name}
    dataclasses.replace(manifest, files=files).save(folder / MANIFEST_NAME)
    refused(folder, f"files has no digest for {re.escape(name)}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 3, "num_hidden_layers is 3, but rtpurbo.json says 2"),
        ("head_dim", 8, "head_dim is 8, but rtpurbo.json says 16"),
        ("num_key_value_heads", 4, "num_key_value_heads is 4, but rtpurbo.json says 2"),
        ("model_type", "llama", "model_type is 'llama', but rtpurbo.json says 'qwen2'"),
        ("max_position_embeddings", 2048, "max_position_embeddings is 2048, but rtpurbo.json says 1024"),
        ("model_type", "gpt2", "model_type is 'gpt2', supported are"),
    ],
)
def test_a_config_that_differs_from_the_manifest_is_refused_by_key(folder: Path, key: str, value: Any, message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    reseal(folder)
    refused(folder, message)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    for text in ("{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        reseal(folder)
        refused(folder, r"config\.json: not valid JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.index_k"), "tensor layers.1.index_k is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not expected"),
        (lambda t: t.update({"layers.0.index_q": torch.zeros(2, 4, 8)}), r"index_q has shape \[2, 4, 8\], wanted \[2, 4, 16\]"),
        (lambda t: t.update({"layers.0.index_q": torch.zeros(2, 4, 16).half()}), "index_q is torch.float16, wanted torch.float32"),
        (lambda t: t["layers.0.index_k"].fill_(float("inf")), "index_k has values that are not finite"),
    ],
    ids=["missing", "extra", "shape", "dtype", "infinite"],
)
def test_an_indexer_that_differs_from_the_manifest_is_refused_by_tensor(folder: Path, change: Any, message: str) -> None:
    tensors = load_file(folder / INDEXER_NAME)
    change(tensors)
    save_file(tensors, folder / INDEXER_NAME)
    reseal(folder)
    refused(folder, rf"indexer\.safetensors: .*{message}")


def test_a_missing_or_damaged_indexer_is_refused(folder: Path) -> None:
    (folder / INDEXER_NAME).write_bytes(b"no safetensors")
    reseal(folder)
    refused(folder, "not a readable safetensors file")
    (folder / INDEXER_NAME).unlink()
    reseal(folder)
    refused(folder, r"indexer\.safetensors: missing, but rtpurbo\.json has 6 retrieval heads")


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reseal(folder)
    refused(folder, r"1 weights are missing, the first is model\.layers\.1\.self_attn\.q_proj\.bias")


@pytest.mark.parametrize("family", eager.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_held_once(tmp_path: Path, family: str, tied: bool) -> None:
    config = eager.tiny_config(family, tie_word_embeddings=tied, **({"mlp_only_layers": [1]} if family == "qwen3_moe" else {}))
    eager.save_artifact(tmp_path, config, [[0, 5], [], [4]])
    stored = count_parameters(json.loads((tmp_path / "config.json").read_text())).total
    assert load(tmp_path, device="cpu").model.nbytes() == 4 * stored


def test_shards_stacked_experts_and_superfluous_tensors_load_to_the_same_logits(tmp_path: Path) -> None:
    config = eager.tiny_config("qwen3_moe", layers=2, tie_word_embeddings=True)
    eager.save_artifact(tmp_path, config, RETRIEVAL)
    ids = torch.tensor([[1, 2, 3, 4, 5]])

    def logits() -> torch.Tensor:
        runtime = load(tmp_path, device="cpu")
        return runtime.prefill(runtime.start(1, 8), ids)

    want, tensors = logits(), load_file(tmp_path / "model.safetensors")
    for i in range(2):
        prefix = f"model.layers.{i}.mlp.experts."
        parts = {n: [tensors.pop(f"{prefix}{e}.{n}_proj.weight") for e in range(4)] for n in ("gate", "up", "down")}
        pairs = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}down_proj"] = torch.stack(parts["down"])
    tensors["lm_head.weight"] = torch.zeros(eager.VOCABULARY, 48)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, some in shards.items():
        save_file({name: tensors[name] for name in some}, tmp_path / shard)
    weight_map = {name: shard for shard, some in shards.items() for name in some}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reseal(tmp_path)
    assert torch.equal(logits(), want)


def test_a_tensor_of_another_shape_a_missing_shard_and_a_broken_index_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(47)}, folder / "model.safetensors")
    reseal(folder)
    refused(folder, r"model\.norm\.weight has shape \[47\], wanted \[48\]")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    reseal(folder)
    refused(folder, "the model cannot be loaded")
    index.write_text("[]")
    reseal(folder)
    refused(folder, "not an index of shards")


def test_an_activation_other_than_silu_is_refused(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=2, hidden_act="gelu"), RETRIEVAL)
    refused(tmp_path, "hidden_act is 'gelu', wanted 'silu'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu', wanted auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device cuda:99 is not there: this machine offers"),
        ({"dtype": "int8"}, "dtype is 'int8', wanted auto, float32, bfloat16, float16"),
        ({"roles": "some"}, "roles is 'some', wanted manifest, all-local or all-retrieval"),
        ({"top_p": 0.0}, "top_p is 0.0, wanted"),
        ({"roles": "all-retrieval"}, "needs an index projection for every head, but the manifest has 6 of 16; use top_p 1"),
    ],
)
def test_options_that_cannot_be_served_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    refused(folder, message, **options)


def test_all_retrieval_runs_sparse_when_every_head_has_an_indexer(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=1), [list(range(8))])
    runtime = load(tmp_path, device="cpu", roles="all-retrieval")
    assert runtime.manifest.top_p == 0.9
    assert runtime.start(1, 100).cache.layers[0].index_k_BSIR is not None


def test_memory_that_is_not_there_is_refused_with_both_figures() -> None:
    with pytest.raises(ValueError, match=r"the model needs 1048576\.00 GiB on cpu, but \d+\.\d+ GiB are available"):
        require_memory(1 << 50, torch.device("cpu"), "the model")


def test_the_dtype_option_changes_weights_and_cache(folder: Path) -> None:
    runtime = load(folder, device="cpu", dtype="bfloat16")
    assert runtime.model.dtype == torch.bfloat16
    assert runtime.start(1, 8).cache.layers[0].k_BSKD.dtype == torch.bfloat16
    assert runtime.generate([[1, 2, 3]], max_new_tokens=3)[0].finish_reason == "length"


def test_retained_groups_come_first_and_retrieval_heads_lead_each_group(tmp_path: Path) -> None:
    config = eager.tiny_config("llama", heads=12, groups=4, layers=1, head_dim=8)
    manifest = eager.save_artifact(tmp_path, config, [[4, 6, 7, 8, 9, 11]], keys="group")
    layout = layout_of(manifest, 0)
    assert layout.group_order == (2, 3, 1, 0)
    assert layout.head_order == (6, 7, 8, 9, 11, 10, 4, 3, 5, 0, 1, 2)
    assert layout.retrieval_counts == (3, 2, 1)
    assert layout.retrieval_heads == (0, 1, 2, 3, 4, 6)
    assert [(run.start, run.stop, run.num_retrieval) for run in layout.runs] == [(0, 1, 3), (1, 2, 2), (2, 3, 1)]
    assert layout.index_q_rows == (1, 2, 3, 4, 5, 0)
    assert layout.index_k_rows == (1, 2, 0)
    assert layout.key_sets == (0, 0, 0, 1, 1, 2)
    assert layout.key_groups == (0, 1, 2)


def test_roles_of_an_ablation_replace_every_layers_roles(folder: Path) -> None:
    manifest = Manifest.load(folder / MANIFEST_NAME)
    assert with_roles(manifest, "all-local", None).num_retained_groups == 0
    assert with_roles(manifest, "all-retrieval", 1.0).num_retrieval_heads == 16
    assert with_roles(manifest, "manifest", None) == manifest


def test_verify_reports_exact_dense_mode_and_the_distance_of_sparse_mode(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("qwen3", layers=2), RETRIEVAL, index_peak=12.0)
    report = verify(tmp_path, device="cpu", num_tokens=400)
    assert json.loads(json.dumps(report)) == report
    assert (report["tokens"], report["decoded_tokens"], report["retrieval_heads"], report["retained_groups"]) == (400, 50, 6, 3)
    assert 0 <= report["dense_relative_error"] < 1e-4
    assert report["prefill"]["kl_mean"] > 1e-3
    assert report["decode"]["kl_mean"] > 1e-3
    assert 0 < report["decode"]["argmax_agreement"] < 1
    assert 0.05 < report["kept_blocks"] < 0.9
    assert report["sparse_cache_bytes"] < report["dense_cache_bytes"]


def test_verify_finds_no_distance_when_window_and_selection_cover_everything(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=2), RETRIEVAL, sliding_window=512, top_p=1.0)
    report = verify(tmp_path, device="cpu", num_tokens=200)
    assert report["kept_blocks"] is None
    for phase in ("prefill", "decode"):
        assert report[phase]["kl_max"] < 1e-6
        assert report[phase]["argmax_agreement"] == 1


def test_verify_works_without_any_retrieval_head_and_refuses_short_texts(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=2), [[], []])
    assert verify(tmp_path, device="cpu", num_tokens=64)["kept_blocks"] is None
    with pytest.raises(ValueError, match="num_tokens is 15, wanted at least 16"):
        verify(tmp_path, device="cpu", num_tokens=15)


@pytest.mark.parametrize("wrong", [0.5, float("nan"), float("inf")])
def test_verify_refuses_one_token_whose_logits_are_not_transformers_own(wrong: float) -> None:
    wanted = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    found = wanted + 1e-6
    assert relative_error(found, wanted, torch.float32, "artifact") < 1e-5
    found[13] += wrong
    with pytest.raises(ValueError, match=r"artifact: in dense mode the logits differ from transformers' by a relative .* at token 13"):
        relative_error(found, wanted, torch.float32, "artifact")


HUB_SCRIPT = """
import sys
from rtpurbo.runtime.loader import load
for source in sys.argv[1:]:
    source, _, revision = source.partition("@")
    try:
        print("loaded", load(source, device="cpu", revision=revision or None).manifest.num_retrieval_heads)
    except ValueError as error:
        print(error)
"""


def run_hub_script(environment: dict[str, str], *sources: str) -> list[str]:
    command = [sys.executable, "-c", HUB_SCRIPT, *sources]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_id_is_downloaded_and_every_hub_error_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with HubServer() as hub:
        hub.add_repository("models", "user/artifact", files)
        hub.add_repository("models", "user/bare", {"config.json": files["config.json"]})
        hub.add_repository("models", "other/private", files, private=True)
        lines = run_hub_script(
            hub.environment(tmp_path / "home"), "user/artifact", "user/missing", "other/private", "user/artifact@v9", "user/bare"
        )
    unreachable = run_hub_script(hub.environment(tmp_path / "other_home"), "user/artifact")
    assert lines[:4] == [
        "loaded 6",
        "user/missing: neither a folder nor a Hub repository that is public or open to your token",
        "other/private: neither a folder nor a Hub repository that is public or open to your token",
        "user/artifact: the Hub repository has no revision v9",
    ]
    assert re.search(r"rtpurbo\.json: cannot be read", lines[4])
    assert unreachable[0] == "user/artifact: no such folder, and the Hub cannot be reached"
