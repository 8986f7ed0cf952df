"""Writing artifacts: they load dense in plain transformers, experts lie side by side, equal bytes, and every refusal leaves nothing."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoints import FAMILIES, VOCABULARY, edit_json, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rtpurbo.converter.checkpoint import Checkpoint, config_digest, config_with_rope_scaling, open_checkpoint, read_tensor
from rtpurbo.converter.package import write_artifact
from rtpurbo.manifests.architectures import head_dim_of
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, file_digest, roles_from_heads, verify_files
from rtpurbo.manifests.output import appearing, refuse_existing

RETRIEVAL = [[], [1], [0, 2, 3]]


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family with tokenizer, chat template, generation config and licence; read only."""
    from tokenizers import Tokenizer, models

    root = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        folder = tiny_checkpoint(root / family, family, dtype="bfloat16" if family == "qwen2" else "float32")
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0")
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.save_pretrained(folder)
        edit_json(folder / "config.json", _name_or_path="/home/ann/models/x")
        edit_json(folder / "tokenizer_config.json", name_or_path="/home/ann/models/x")
        (folder / "LICENSE").write_text("Do what is right.\n")
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def opened(sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Checkpoint]:
    return lambda family: open_checkpoint(str(sources[family]), work=tmp_path / "work")


def manifest_for(checkpoint: Checkpoint) -> Manifest:
    config = checkpoint.config
    return Manifest(
        base_model=BaseModel(id=checkpoint.id, revision=None, config_sha256=config_digest(config), tokenizer_sha256=None),
        model=ModelShape(
            model_type=config["model_type"],
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim_of(config),
            max_position_embeddings=config["max_position_embeddings"],
        ),
        granularity="head",
        group_threshold=0.0,
        layers=roles_from_heads([[0.25] * 4] * 3, RETRIEVAL, 2),
        sliding_window=8,
        sinks=2,
        indexer=Indexer(dim=4, keys="group", scale=0.25),
        top_p=0.9,
        decode_block=4,
        prefill_block=8,
        prefill_pattern="dense",
        dense_below=0,
    )


def indexer_for(manifest: Manifest) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in manifest.index_shapes().items()}


def write(out: Path, checkpoint: Checkpoint, **changes: Any) -> Manifest:
    manifest = changes.pop("manifest", manifest_for(checkpoint))
    keys = {"indexer": indexer_for(manifest), "student": {}, "recipe_toml": "seed = 1\n", "metrics": {"loss": 0.5}, **changes}
    return write_artifact(out, checkpoint, manifest, **keys)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    return header


# What is written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000], ids=["one file", "shards"])
def test_an_artifact_loads_in_plain_transformers_with_the_logits_of_its_source(
    sources: dict[str, Path], opened: Callable[[str], Checkpoint], tmp_path: Path, family: str, max_shard_bytes: int
):
    checkpoint = opened(family)
    out = tmp_path / "out" / "artifact"
    manifest = write(out, checkpoint, max_shard_bytes=max_shard_bytes, extra_files={"README.md": b"# Card\n"})
    assert torch.equal(logits_of(out), logits_of(sources[family]))
    assert Manifest.load(out / "rtpurbo.json") == manifest
    verify_files(out, manifest)
    here = {path.name for path in out.iterdir()}
    assert here - manifest.files.keys() == {"rtpurbo.json", "recipe.toml", "README.md"}
    assert [path.name for path in out.parent.iterdir()] == ["artifact"]
    found = {key: value for file in out.glob("model*.safetensors") for key, value in load_file(file).items()}
    assert found.keys() == checkpoint.tensors.keys()
    assert ("lm_head.weight" in found) == (family != "llama")
    # Read it again as a source: header checks, index, digest of the config.
    again = open_checkpoint(str(out), work=tmp_path)
    assert config_digest(again.config) == config_digest(checkpoint.config)
    if max_shard_bytes == 20_000:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == checkpoint.size_bytes
        assert index["weight_map"].keys() == checkpoint.tensors.keys()
        assert len({*index["weight_map"].values()}) == len(list(out.glob("model-*.safetensors"))) > 3
    else:
        assert "model.safetensors" in here
        assert "model.safetensors.index.json" not in here


def test_tokenizer_template_licence_and_a_config_without_local_names_come_along(
    sources: dict[str, Path], opened: Callable[[str], Checkpoint], tmp_path: Path
):
    out = tmp_path / "artifact"
    write(out, opened("qwen3"))
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (sources["qwen3"] / name).read_bytes()
    source, written = (json.loads((folder / "config.json").read_text()) for folder in (sources["qwen3"], out))
    assert written.pop("rtpurbo") == {"manifest": "rtpurbo.json", "schema_version": 1}
    del source["_name_or_path"]
    assert written == source
    assert (out / "generation_config.json").is_file()
    for path in out.iterdir():
        assert b"/home/ann" not in path.read_bytes(), path.name
    assert AutoTokenizer.from_pretrained(out).apply_chat_template([{"content": "w5"}], tokenize=False) == "w5"
    assert load_file(out / "indexer.safetensors").keys() == {f"layers.{i}.index_{x}" for i in (1, 2) for x in "qk"}
    assert json.loads((out / "metrics.json").read_text()) == {"loss": 0.5}


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 30_000], ids=["one file", "shards"])
def test_the_experts_of_a_layer_lie_side_by_side_in_the_order_of_their_numbers(
    opened: Callable[[str], Checkpoint], tmp_path: Path, max_shard_bytes: int
):
    checkpoint = opened("qwen3_moe")
    out = tmp_path / "artifact"
    write(out, checkpoint, max_shard_bytes=max_shard_bytes)
    headers = {path: header_of(path) for path in out.glob("model*.safetensors")}
    model = AutoModelForCausalLM.from_pretrained(out)
    for header in headers.values():
        assert all(entry["data_offsets"][0] % 8 == 0 for entry in header.values())
    for layer in (0, 2):
        stack_ends = []
        for parts in (("gate_proj", "up_proj"), ("down_proj",)):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}.weight" for e in range(12) for part in parts]
            (path,) = (path for path, header in headers.items() if names[0] in header)
            offsets = [headers[path][name]["data_offsets"] for name in names]
            size = offsets[0][1] - offsets[0][0]
            assert [begin for begin, _ in offsets] == [offsets[0][0] + i * size for i in range(len(names))]
            stack_ends.append((path, offsets[0][0], offsets[-1][1]))
            # One view of the bytes is the stack of all experts, as transformers stacks them.
            start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            raw = bytearray(path.read_bytes()[start + offsets[0][0] : start + offsets[-1][1]])
            rows, width = headers[path][names[0]]["shape"]
            stack = torch.frombuffer(raw, dtype=torch.float32).view(12, len(parts) * rows, width)
            fused = "gate_up_proj" if len(parts) == 2 else "down_proj"
            assert torch.equal(stack, model.state_dict()[f"model.layers.{layer}.mlp.experts.{fused}"])
        if max_shard_bytes > 1 << 30:
            assert stack_ends[0][2] == stack_ends[1][1]


def test_layers_are_written_in_the_order_of_their_numbers(tmp_path: Path):
    folder = tiny_checkpoint(tmp_path / "deep", "qwen2", num_hidden_layers=12, head_dim=8)
    checkpoint = open_checkpoint(str(folder), work=tmp_path)
    manifest = dataclasses.replace(
        manifest_for(checkpoint),
        model=dataclasses.replace(manifest_for(checkpoint).model, num_hidden_layers=12),
        layers=roles_from_heads([[0.25] * 4] * 12, [[]] * 12, 2),
    )
    out = tmp_path / "artifact"
    write(out, checkpoint, manifest=manifest)
    names = list(header_of(out / "model.safetensors"))
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert (names[0], names[-2:]) == ("model.embed_tokens.weight", ["model.norm.weight", "lm_head.weight"])
    assert load_file(out / "indexer.safetensors") == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_one_input_follow_each_other(opened: Callable[[str], Checkpoint], tmp_path: Path, family: str):
    out = tmp_path / "artifact"
    write(out, opened(family))
    names = list(header_of(out / "model.safetensors"))
    qkv, gate_up = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    for layer in range(3):
        for parts in ([f"{p}.weight" for p in qkv], [f"{p}.bias" for p in qkv], [f"{p}.weight" for p in gate_up]):
            full = [f"model.layers.{layer}.{part}" for part in parts]
            if full[0] in names:
                first = names.index(full[0])
                assert names[first : first + len(full)] == full


def test_tensors_of_odd_size_come_last_so_that_the_others_stay_aligned(tmp_path: Path):
    shape = {"hidden_size": 31, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "dtype": "bfloat16"}
    checkpoint = open_checkpoint(str(tiny_checkpoint(tmp_path / "odd", "llama", **shape)), work=tmp_path)
    manifest = manifest_for(checkpoint)
    model = dataclasses.replace(manifest.model, num_attention_heads=1, num_key_value_heads=1, head_dim=4)
    layers = roles_from_heads([[0.25]] * 3, [[]] * 3, 1)
    out = tmp_path / "artifact"
    write(out, checkpoint, manifest=dataclasses.replace(manifest, model=model, layers=layers))
    entries = list(header_of(out / "model.safetensors").values())
    odd = [(entry["data_offsets"][1] - entry["data_offsets"][0]) % 8 != 0 for entry in entries]
    assert sorted(odd) == odd
    assert True in odd
    assert all(entry["data_offsets"][0] % 8 == 0 for entry, is_odd in zip(entries, odd, strict=True) if not is_odd)
    assert torch.equal(logits_of(out), logits_of(tmp_path / "odd"))


def test_equal_inputs_give_equal_bytes_and_digests(opened: Callable[[str], Checkpoint], tmp_path: Path):
    checkpoint = opened("qwen3_moe")
    name = "model.layers.1.self_attn.q_proj.weight"
    student = {name: lambda: read_tensor(checkpoint.tensors[name]) * 2}
    first, second = (
        write(tmp_path / x, checkpoint, max_shard_bytes=30_000, student=student, metrics=metrics)
        for x, metrics in (("a", {"b": 1, "a": 2}), ("b", {"a": 2, "b": 1}))
    )
    assert first == second
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in names:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert first.files["metrics.json"] == file_digest(tmp_path / "a" / "metrics.json")


def test_distilled_weights_replace_the_source_in_its_dtype(opened: Callable[[str], Checkpoint], tmp_path: Path):
    checkpoint = opened("qwen2")
    name = "model.layers.1.self_attn.q_proj.weight"
    trained = torch.randn(64, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out = tmp_path / "artifact"
    write(out, checkpoint, student={name: lambda: trained})
    tensors = load_file(out / "model.safetensors")
    assert tensors[name].dtype == torch.bfloat16
    assert torch.equal(tensors[name], trained.to(torch.bfloat16))
    for other, info in checkpoint.tensors.items():
        assert other == name or torch.equal(tensors[other], read_tensor(info))


def test_a_changed_rope_scaling_is_in_the_written_config(opened: Callable[[str], Checkpoint], tmp_path: Path):
    checkpoint = opened("qwen3")
    checkpoint = dataclasses.replace(checkpoint, config=config_with_rope_scaling(checkpoint.config, "yarn:4"))
    out = tmp_path / "artifact"
    write(out, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.max_position_embeddings == 512


# Refusals: nothing may be left behind


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if path.name.startswith("artifact")]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_refused_and_untouched(opened: Callable[[str], Checkpoint], tmp_path: Path, kind: str):
    out = tmp_path / "artifact"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to(tmp_path / "nowhere")}[kind]()
    with pytest.raises(ValueError, match="exists already, wanted a new folder"):
        refuse_existing(out)

    def unread() -> torch.Tensor:
        raise AssertionError("the student was read")

    with pytest.raises(ValueError, match="exists already, wanted a new folder"):
        write(out, opened("llama"), student={"model.norm.weight": unread})
    assert os.path.lexists(out)
    assert not os.path.lexists(tmp_path / "artifact.partial")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(31), r"student's model.norm.weight is float32 \[31\], wanted a floating dtype and shape \[32\]"),
        (torch.zeros(32, dtype=torch.int64), r"student's model.norm.weight is int64 \[32\]"),
        (torch.full((32,), torch.nan), "student's model.norm.weight has 32 values that are not finite"),
        (torch.full((32,), 1e39, dtype=torch.float64), r"has 32 values that are not finite in torch.float32"),
    ],
)
def test_a_student_that_does_not_fit_or_diverged_is_refused(
    opened: Callable[[str], Checkpoint], tmp_path: Path, value: torch.Tensor, message: str
):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "artifact", opened("llama"), student={"model.norm.weight": lambda: value})
    assert nothing_left(tmp_path)


def test_a_student_tensor_that_the_source_has_not_is_refused(opened: Callable[[str], Checkpoint], tmp_path: Path):
    with pytest.raises(ValueError, match=r"the student has the tensor lm_head.weight, which is not in llama"):
        write(tmp_path / "artifact", opened("llama"), student={"lm_head.weight": lambda: torch.zeros(1)})
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.index_q", None, "layers.1.index_q is missing"),
        ("layers.0.index_q", torch.zeros(1, 4, 16), "layers.0.index_q is not wanted by the manifest"),
        ("layers.1.index_k", torch.zeros(2, 4, 16), r"layers.1.index_k has shape \[2, 4, 16\], wanted \[1, 4, 16\]"),
        ("layers.1.index_k", torch.full((1, 4, 16), torch.inf), "layers.1.index_k has values that are not finite"),
        ("layers.1.index_k", torch.zeros(1, 4, 16, dtype=torch.int32), "layers.1.index_k has values that are not finite floating"),
    ],
)
def test_an_indexer_that_does_not_fit_the_manifest_is_refused(
    opened: Callable[[str], Checkpoint], tmp_path: Path, name: str, value: torch.Tensor | None, message: str
):
    checkpoint = opened("llama")
    indexer = {**indexer_for(manifest_for(checkpoint)), name: value}
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "artifact", checkpoint, indexer={key: x for key, x in indexer.items() if x is not None})
    assert nothing_left(tmp_path)


def test_metrics_that_json_cannot_hold_are_refused(opened: Callable[[str], Checkpoint], tmp_path: Path):
    with pytest.raises(ValueError, match=r"metrics.json: a value is not a finite JSON number"):
        write(tmp_path / "artifact", opened("llama"), metrics={"loss": float("nan")})
    assert nothing_left(tmp_path)


def test_an_interrupted_run_is_replaced_but_a_strange_folder_is_not(opened: Callable[[str], Checkpoint], tmp_path: Path):
    checkpoint, partial = opened("llama"), tmp_path / "artifact.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"artifact.partial: is in the way and was not left over by an interrupted run"):
        write(tmp_path / "artifact", checkpoint)
    assert (partial / "thesis.txt").read_text() == "mine"
    shutil.rmtree(partial)
    # A process that is killed cannot clean up.
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from rtpurbo.converter.checkpoint import open_checkpoint
import test_package
checkpoint = open_checkpoint({str(checkpoint.folder)!r}, work=Path("."))
test_package.write(Path({str(tmp_path / "artifact")!r}), checkpoint, student={{"model.norm.weight": lambda: os._exit(9)}})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert (partial / "config.json").is_file()
    assert not (tmp_path / "artifact").exists()
    write(tmp_path / "artifact", checkpoint)
    assert not partial.exists()
    assert not [path for path in (tmp_path / "artifact").iterdir() if path.name.startswith(".")]


def test_a_source_that_shrinks_while_it_is_read_is_refused(sources: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(sources["llama"], tmp_path / "source"))
    checkpoint = open_checkpoint(str(folder), work=tmp_path)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(ValueError, match=r"source/model.safetensors: \d+ bytes are missing at its end"):
        write(tmp_path / "artifact", checkpoint)
    assert nothing_left(tmp_path)


def test_a_place_that_cannot_be_written_is_one_sentence(opened: Callable[[str], Checkpoint], tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/artifact: cannot be written: Not a directory"):
        write(tmp_path / "file" / "artifact", opened("llama"))


def test_a_read_only_folder_is_one_sentence(opened: Callable[[str], Checkpoint], tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root may write into a read-only folder")
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(ValueError, match=r"locked/artifact: cannot be written: permission denied"):
        write(tmp_path / "locked" / "artifact", opened("llama"))


def test_a_write_that_fails_half_way_leaves_nothing(opened: Callable[[str], Checkpoint], tmp_path: Path):
    resource = pytest.importorskip("resource", reason="no file-size limit on this system")
    checkpoint = opened("llama")
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.size_bytes // 2, hard))
    try:
        with pytest.raises(ValueError, match=r"artifact: cannot be written: a file is larger than the file system or the process"):
            write(tmp_path / "artifact", checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
    assert nothing_left(tmp_path)


def test_a_disk_without_room_is_refused_before_anything_is_written(opened: Callable[[str], Checkpoint], tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(ValueError, match=r"artifact: needs \d+ bytes of disk space, .*disk has \d+ bytes free"):
            write(disk / "artifact", opened("llama"))
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_reference_reader_of_the_format_accepts_the_files(opened: Callable[[str], Checkpoint], tmp_path: Path):
    checkpoint = opened("qwen3_moe")
    write(tmp_path / "artifact", checkpoint)
    with safe_open(tmp_path / "artifact" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), read_tensor(checkpoint.tensors[name]))


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with appearing(out) as folder:
        assert folder == partial
        (folder / "file").write_text("content")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert not partial.exists()
    with pytest.raises(ValueError, match=r"out: exists already"), appearing(out):
        pass


@pytest.mark.parametrize(
    ("error", "said", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out: cannot be written: the disk is full", ValueError),
        (OSError(errno.EIO, "Input/output error"), "out: cannot be written: Input/output error", ValueError),
        (OSError(errno.ENOENT, "No such file", "/elsewhere/weights"), "/elsewhere/weights", FileNotFoundError),
        (KeyboardInterrupt(), "", KeyboardInterrupt),
    ],
    ids=["full", "broken", "another file", "interrupted"],
)
def test_a_folder_that_cannot_be_finished_leaves_nothing(tmp_path: Path, error: BaseException, said: str, kind: type[BaseException]):

    def write() -> None:
        with appearing(tmp_path / "out") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(kind, match=said or None):
        write()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_replaced_and_what_is_not_ours_is_kept(tmp_path: Path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with appearing(out) as folder:
        (folder / "old").touch()
        # A process killed here leaves a folder with the mark.
        shutil.copytree(folder, tmp_path / "left")
    shutil.rmtree(out)
    (tmp_path / "left").rename(partial)
    with appearing(out) as folder:
        assert not (folder / "old").exists()
    shutil.rmtree(out)
    partial.mkdir()
    (partial / "diary").touch()
    with pytest.raises(ValueError, match=r"out.partial: is in the way"), appearing(out):
        pass
    assert (partial / "diary").exists()
