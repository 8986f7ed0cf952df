"""Whole conversions of tiny models: every family, every option that changes the result, and what the artifact then holds."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import FAMILIES
from transformers import AutoModelForCausalLM

import rtpurbo
from rtpurbo.manifests.manifest import Manifest, verify_files


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_and_generates(family, tiny_model, tiny_recipe, tmp_path):
    out = rtpurbo.convert(str(tiny_model(family)), tmp_path / "out", recipe=tiny_recipe())
    manifest = Manifest.load(out / "rtpurbo.json")
    verify_files(out, manifest)
    assert manifest.num_retained_groups == round(0.34 * 3 * 2)
    assert set(load_file(out / "indexer.safetensors")) == set(manifest.index_shapes())
    assert manifest.metrics["model"]["full"]["distillation_loss"] < 1e-3
    assert manifest.recipe["indexer_data"] == manifest.recipe["distill_data"] == "python-docs"
    data = json.loads((out / "metrics.json").read_text())["data"]
    assert all(len(data[stage][split]) == 64 for stage in ("indexer", "distill") for split in ("train", "heldout"))
    steps = [json.loads(line) for line in (out / "distill.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [0, 1, 2]
    assert not (tmp_path / "out.work").exists()
    runtime = rtpurbo.load(out)
    answers = runtime.generate(["Python is", "The with statement is used to wrap"], max_new_tokens=4)
    assert all(len(answer.token_ids) <= 4 for answer in answers)


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": "head"},
        {"index_keys": "group"},
        {"index_key_dtype": "float8_e4m3fn"},
        {"train": "attention"},
        {"train": "lora"},
        {"rope_scaling": "yarn:2"},
        {"dense_below": 64},
        {"dtype": "bfloat16"},
        {"retrieval_ratio": 0.0},
        {"retrieval_ratio": 1.0},
        {"distill_steps": 0},
        {"indexer_steps": 0},
        {"group_threshold": 0.5},
        {"realign_steps": 2},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_option_that_changes_the_model_gives_an_artifact_that_verifies(changes, tiny_model, tiny_recipe, tmp_path):
    from rtpurbo.runtime.verify import verify

    out = rtpurbo.convert(str(tiny_model("qwen3")), tmp_path / "out", recipe=tiny_recipe(**changes))
    verify(out, num_tokens=96)


@pytest.mark.parametrize("train", ["all", "attention", "lora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_bfloat16_checkpoint_stays_one(train, dtype, tiny_model, tiny_recipe, tmp_path):
    source = tiny_model("qwen3_moe", dtype="bfloat16")
    out = rtpurbo.convert(str(source), tmp_path / "out", recipe=tiny_recipe(train=train, dtype=dtype))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
    assert any(not torch.equal(after[name], before[name]) for name in before if "o_proj" in name)


def test_training_changes_only_the_weights_that_train_names(tiny_model, tiny_recipe, tmp_path):
    source = tiny_model("qwen3_moe")
    before = load_file(source / "model.safetensors")
    for train, changed in (("attention", ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")), ("all", None)):
        out = rtpurbo.convert(str(source), tmp_path / train, recipe=tiny_recipe(train=train))
        after = load_file(out / "model.safetensors")
        assert set(after) == set(before)
        for name, tensor in after.items():
            if ".experts." in name or ".mlp.gate." in name or (changed is not None and not any(part in name for part in changed)):
                assert torch.equal(tensor, before[name]), name
            elif name.endswith("q_proj.weight"):
                assert not torch.equal(tensor, before[name]), name


def test_the_artifact_loads_dense_in_plain_transformers_with_the_converters_logits(tiny_model, tiny_recipe, tmp_path):
    from rtpurbo.converter.attention import IMPLEMENTATION, dense_attention
    from rtpurbo.converter.checkpoint import load_model, open_checkpoint

    out = rtpurbo.convert(str(tiny_model("qwen2")), tmp_path / "out", recipe=tiny_recipe())
    ids = torch.arange(200)[None] % 300
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    checkpoint = open_checkpoint(str(out), work=tmp_path / "unused")
    ours = load_model(checkpoint, dtype=torch.float32, device="cpu", attn_implementation=IMPLEMENTATION)
    with torch.no_grad():
        wanted = plain(input_ids=ids, use_cache=False).logits
        found = ours(input_ids=ids, use_cache=False, rtpurbo=dense_attention).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_equal_runs_give_equal_digests_and_the_seed_changes_them(tiny_model, tiny_recipe, tmp_path):
    def digest(name: str, seed: int) -> str:
        out = rtpurbo.convert(str(tiny_model("llama")), tmp_path / name, recipe=tiny_recipe(seed=seed))
        return json.loads((out / "rtpurbo.json").read_text())["digest"]

    first = digest("a", 0)
    assert digest("b", 0) == first
    assert digest("c", 1) != first


def test_steps_alone_give_what_convert_gives(tiny_model, tiny_recipe, tmp_path):
    from rtpurbo.converter.conversion import begin, reopen
    from rtpurbo.converter.convert import run_calibration, run_distillation, run_indexer, run_package

    source, work = str(tiny_model("llama")), tmp_path / "steps"
    run_calibration(begin(source, work, recipe=tiny_recipe()))
    run_indexer(reopen(work))
    run_distillation(reopen(work))
    manifest = run_package(reopen(work), tmp_path / "from-steps")
    whole = rtpurbo.convert(source, tmp_path / "whole", recipe=tiny_recipe())
    assert manifest.to_dict()["digest"] == Manifest.load(whole / "rtpurbo.json").to_dict()["digest"]


def test_no_path_of_this_machine_is_in_the_digested_files(tiny_model, tiny_recipe, tmp_path):
    out = rtpurbo.convert(str(tiny_model("llama")), tmp_path / "out", recipe=tiny_recipe())
    digested = {*Manifest.load(out / "rtpurbo.json").files, "rtpurbo.json"}
    for path in Path(out).iterdir():
        if path.name in digested and path.suffix in (".json", ".jsonl", ".jinja"):
            assert str(tmp_path.parent) not in path.read_text(), path.name


def test_a_disk_without_room_for_the_artifact_is_refused_before_any_work(tiny_model, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("rtpurbo.manifests.output.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"out: needs \d+ bytes of disk space, .* has 1000 bytes free"):
        rtpurbo.convert(str(tiny_model("llama")), tmp_path / "out", recipe=tiny_recipe())
    assert not (tmp_path / "out.work" / "calibration.safetensors").exists()
