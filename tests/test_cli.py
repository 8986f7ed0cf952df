"""The command line: what every command prints, and one sentence, exit code 2 and nothing left behind for every mistake."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_cli import ForkedCli, Run
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, tiny_checkpoint

from rtpurbo.manifests.manifest import Manifest, file_digest

SMALL = {
    "indexer_steps": 1,
    "distill_steps": 1,
    "distill_batch": 1,
    "calibration_tokens": 256,
    "indexer_max_tokens": 192,
    "distill_max_tokens": 192,
    "evaluation_tokens": 384,
}
PROMPT = "The with statement is used to wrap the execution of a block"
REPO = "Qwen/Qwen3-Coder-30B-A3B-Instruct"


@pytest.fixture(scope="module")
def hub(tiny_model) -> Iterator[HubServer]:
    """A local Hub with a tiny Qwen3-MoE under the name of a real model."""
    with HubServer() as server:
        source = tiny_model("qwen3_moe", num_hidden_layers=2)
        server.add_repository("models", REPO, {path.name: path.read_bytes() for path in source.iterdir()})
        yield server


@pytest.fixture(scope="module")
def cli(hub, tmp_path_factory) -> Iterator[ForkedCli]:
    """Command lines whose Hub is the local one, with a token."""
    with ForkedCli(**hub.environment(tmp_path_factory.mktemp("hub-cache"))) as forked:
        yield forked


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Iterator[ForkedCli]:
    """Command lines without a token, whose Hub cannot be reached."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_TOKEN": ""}
    with ForkedCli(**nowhere, HF_HUB_DISABLE_XET="1") as forked:
        yield forked


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("qwen3", num_hidden_layers=2)


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(tiny_recipe(**SMALL).to_toml())
    return path


@pytest.fixture(scope="module")
def converted(cli, model, recipe, tmp_path_factory) -> tuple[Path, Run]:
    out = tmp_path_factory.mktemp("artifact") / "out"
    return out, cli("convert", model, "--out", out, "--recipe", recipe, "--json")


@pytest.fixture(scope="module")
def artifact(converted) -> Path:
    assert converted[1].code == 0, converted[1].err
    return converted[0]


@pytest.fixture
def copied(artifact, tmp_path) -> Path:
    return shutil.copytree(artifact, tmp_path / "artifact")


def listing(folder: Path) -> dict[str, Any]:
    """Every path below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(run: Run, *named: Any, progress: bool = False) -> str:
    """The refusal's one line; with `progress`, lines about finished work may stand before it."""
    lines = run.err.splitlines()
    assert run.code == 2, run
    assert run.out == ""
    assert lines[-1].startswith("Error: "), run.err
    assert len([line for line in lines if "Error" in line]) == 1, run.err
    assert progress or len(lines) == 1, run.err
    assert "Traceback" not in run.err
    for name in named:
        assert str(name) in lines[-1]
    return lines[-1]


def refused_without_trace(cli: ForkedCli, folder: Path, arguments: list[Any], *named: Any, **options: Any) -> str:
    """Run in `folder`, which must be as before; conversions may have said which stage they were in."""
    before = listing(folder)
    said = refused(cli(*arguments, cwd=folder, **options), *named, progress=arguments[0] in ("convert", "calibrate", "push"))
    assert listing(folder) == before
    return said


# --- what the commands print ---


def test_the_console_script_is_the_command_line():
    from rtpurbo.cli import main

    (script,) = importlib.metadata.entry_points(group="console_scripts", name="rtpurbo")
    assert script.value == "rtpurbo.cli:main"
    assert script.load() is main
    program = Path(sys.executable).with_name("rtpurbo")
    found = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"rtpurbo, version {importlib.metadata.version('rtpurbo')}\n"
    assert found.stderr == ""


def test_without_arguments_and_with_help_every_command_is_explained(cli):
    for arguments in ([], ["--help"], ["-h"]):
        run = cli(*arguments)
        text = run.out + run.err
        for command in ("convert", "generate", "inspect", "verify", "bench", "doctor", "plan", "push", "calibrate", "distill", "package"):
            assert command in text
            assert cli(command, "--help").code == 0
        # Every command's line says what it does, to its full stop.
        assert "..." not in text.split("Commands:")[1]
    assert "[paper: 0.15]" in " ".join(cli("convert", "-h").out.split())


def test_convert_prints_json_alone_on_standard_output_and_its_stages_on_standard_error(converted, artifact):
    _, run = converted
    answer = json.loads(run.out)
    assert answer["out"] == str(artifact)
    assert answer["digest"] == json.loads((artifact / "rtpurbo.json").read_text())["digest"]
    assert answer["metrics"]["model"]["sparse_after"]["perplexity"] > 1
    for stage in ("calibrate ...", "stage 1: indexer: 1 of 1", "stage 2: distillation: 1 of 1", "package: 1 of 1"):
        assert stage in run.err.splitlines() or any(line.startswith(stage) for line in run.err.splitlines()), stage
    assert "Warning" not in run.err
    assert sorted(path.name for path in artifact.parent.iterdir()) == ["out"]


def test_the_program_without_a_warm_interpreter_prints_the_same(artifact, model, recipe, tmp_path):
    """Imports happen inside the commands: what libraries say while they are imported must not reach the output either."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: Any) -> Any:
        command = [sys.executable, "-m", "rtpurbo.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    done = run("convert", model, "--out", "out", "--recipe", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "out"
    assert "Warning" not in done.stderr
    done = run("generate", artifact, "-p", PROMPT, "--max-new-tokens", 2, "--json")
    assert len(json.loads(done.stdout)) == 1
    assert done.stderr == ""


def test_convert_without_json_prints_one_line(cli, model, recipe, tmp_path):
    run = cli("convert", model, "--out", tmp_path / "out", "--recipe", recipe, "--keep-work")
    assert run.out == f"{tmp_path / 'out'}: 2 retrieval heads, 1 full KV groups\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]


def test_the_steps_alone_are_commands(cli, model, recipe, artifact, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    for arguments in (
        ["calibrate", model, "--work", work, "--recipe", recipe],
        ["train-indexer", "--work", work],
        ["distill", "--work", work],
        ["package", "--work", work, "--out", out],
    ):
        run = cli(*arguments)
        assert run.code == 0, run.err
        assert run.out == ""
    assert json.loads((out / "rtpurbo.json").read_text())["digest"] == json.loads((artifact / "rtpurbo.json").read_text())["digest"]


def test_steps_out_of_order_say_which_command_comes_first(cli, model, recipe, tmp_path):
    work = tmp_path / "work"
    for command in (["train-indexer"], ["distill"], ["package", "--out", "out"]):
        refused_without_trace(cli, tmp_path, [*command, "--work", work], work, "rtpurbo calibrate")
    assert cli("calibrate", model, "--work", work, "--recipe", recipe).code == 0
    assert "rtpurbo train-indexer" in refused(cli("distill", "--work", work), work, progress=True)
    assert "rtpurbo distill" in refused(cli("package", "--work", work, "--out", tmp_path / "out"), work, progress=True)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_inspect_shows_roles_as_text_and_json_and_plots_them(cli, artifact, tmp_path):
    text = cli("inspect", artifact)
    assert text.code == 0
    assert text.err == ""
    assert "128K" in text.out or "131072" in text.out or "128k" in text.out
    facts = cli("inspect", artifact, "--json")
    body = json.loads(facts.out)
    assert facts.err == ""
    assert body["digest"] == json.loads((artifact / "rtpurbo.json").read_text())["digest"]
    for suffix, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert cli("inspect", artifact, "--plot", tmp_path / f"heads{suffix}", "--json").code == 0
        assert (tmp_path / f"heads{suffix}").read_bytes().startswith(begin)
    assert len(list(tmp_path.iterdir())) == 2


def test_verify_prints_a_line_a_fact_or_json(cli, artifact):
    run = cli("verify", artifact, "--tokens", 96, "--json")
    assert run.code == 0, run.err
    assert run.err == ""
    report = json.loads(run.out)
    text = cli("verify", artifact, "--tokens", 96)
    assert [line.split(":")[0] for line in text.out.splitlines()] == list(report)


def test_bench_prints_a_table_or_json_and_writes_csv_and_a_plot(cli, artifact, tmp_path):
    common = ["bench", artifact, "--new-tokens", 3, "--repeat", 1, "--chunk", 64]
    run = cli(*common, "--tokens", "40,1023", "--batch", "1,2", "--json", "--csv", tmp_path / "rows.csv", "--plot", tmp_path / "rows.svg")
    assert run.code == 0, run.err
    rows = json.loads(run.out)
    assert [(row["tokens"], row["batch"], row["mode"]) for row in rows[:5]] == [
        (40, 1, "sparse"), (40, 1, "dense"), (40, 2, "sparse"), (40, 2, "dense"), (1023, 1, "sparse"),
    ]  # fmt: skip
    assert all(row["ttft_s"] > 0 and row["token_ms"] > 0 for row in rows[:4])
    assert all(row["ttft_s"] is None and row["note"] == "1026 tokens exceed the model's max_position_embeddings 1024" for row in rows[4:])
    assert len(run.err.splitlines()) == len(rows) == 8
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 9
    assert (tmp_path / "rows.svg").read_bytes().startswith(b"<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.svg"]
    table = cli(*common, "--tokens", "40", "--no-dense")
    assert table.code == 0
    assert "100.0%" in table.out
    assert "dense" not in table.out
    nothing = cli(*common, "--tokens", "1023", "--no-dense")
    refused(nothing, "no row could run", "max_position_embeddings 1024", progress=True)


def test_doctor_says_what_is_there_and_ends_well(cli):
    run = cli("doctor", "--json")
    assert (run.code, run.err) == (0, "")
    body = json.loads(run.out)
    assert list(body) == ["installed", "device", "works"]
    assert next(entry for entry in body["installed"] if entry["name"] == "torch")["status"] == "ok"
    assert next(entry for entry in body["works"] if entry["name"] == "reference kernels")["status"] == "ok"


def test_a_prompt_is_asked_for_when_standard_input_is_a_terminal(artifact):
    primary, secondary = os.openpty()
    command = [sys.executable, "-m", "rtpurbo.cli", "generate", str(artifact), "--max-new-tokens", "2", "--device", "cpu"]
    program = subprocess.Popen(command, stdin=secondary, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(primary, b"a question\n\x04")
    out, err = program.communicate(timeout=120)
    assert (program.returncode, err) == (0, "reading the prompt from standard input; end it with Ctrl-D\n")
    assert out.endswith("\n")


def test_plan_reads_a_folder_a_hub_id_and_an_artifacts_own_roles(cli, model, artifact):
    for source, retrieval in ((model, None), (REPO, None), (artifact, 2)):
        run = cli("plan", source, "--context", 512, "--json")
        assert run.code == 0, run.err
        body = json.loads(run.out)
        assert run.err == ""
        if retrieval is not None:
            assert Manifest.load(artifact / "rtpurbo.json").num_retrieval_heads == retrieval
            assert f'"retrieval_heads": {retrieval}' in run.out or retrieval in body["roles"].values()
    assert cli("plan", model, "--context", 512).out.strip()


def answers(run: Run) -> list[Any]:
    assert run.code == 0, run.err
    assert run.err == ""
    return json.loads(run.out)


def test_a_prompt_comes_from_an_option_a_file_or_standard_input(cli, artifact, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    common = ["generate", artifact, "--max-new-tokens", 6]
    by_option = cli(*common, "-p", PROMPT)
    assert by_option.code == 0, by_option.err
    assert by_option.err == ""
    assert cli(*common, "--prompt-file", tmp_path / "prompt.txt").out == by_option.out
    assert cli(*common, stdin=PROMPT).out == by_option.out
    assert cli(*common, "-p", PROMPT, "--no-stream").out == by_option.out
    (answer,) = answers(cli(*common, "-p", PROMPT, "--json"))
    assert answer["text"] + "\n" == by_option.out
    assert answer["finish_reason"] in ("length", "eos")
    assert len(answer["token_ids"]) <= 6


def test_several_prompts_of_different_lengths_run_as_one_batch(cli, artifact, tmp_path):
    other = PROMPT * 3
    (tmp_path / "other.txt").write_text(other)
    common = ["generate", artifact, "--max-new-tokens", 5, "--json"]
    batch = answers(cli(*common, "-p", PROMPT, "--prompt-file", tmp_path / "other.txt"))
    alone = [answers(cli(*common, "-p", prompt))[0] for prompt in (PROMPT, other)]
    assert [answer["token_ids"] for answer in batch] == [answer["token_ids"] for answer in alone]
    lines = cli(*common[:-1], "-p", PROMPT, "-p", other).out
    assert lines == "".join(f"[{i}] {answer['text']}\n" for i, answer in enumerate(alone))


def test_a_stop_string_ends_the_answer_before_it(cli, artifact):
    common = ["generate", artifact, "-p", PROMPT, "--max-new-tokens", 12, "--json"]
    (free,) = answers(cli(*common))
    stop = free["text"][3:5]
    (stopped,) = answers(cli(*common, "--stop", stop))
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == free["text"][: free["text"].index(stop)]


def test_all_local_is_an_ablation_that_keeps_less_and_sampling_depends_on_the_seed(cli, artifact):
    common = ["generate", artifact, "-p", PROMPT * 8, "--max-new-tokens", 8, "--json"]
    (sparse,), (local,) = answers(cli(*common)), answers(cli(*common, "--roles", "all-local"))
    assert local["cache_bytes"] < sparse["cache_bytes"]
    sampled = [answers(cli(*common, "--temperature", 1.5, "--seed", seed))[0]["token_ids"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_push_publishes_an_artifact_that_generate_reads_back_by_its_id(cli, hub, artifact):
    run = cli("push", artifact, "user/tiny", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out) == {"url": f"{hub.url}/user/tiny"}
    assert "verifying" in run.err
    common = ["--max-new-tokens", 4, "-p", PROMPT]
    from_hub, from_folder = cli("generate", "user/tiny", *common), cli("generate", artifact, *common)
    assert (from_hub.code, from_hub.err) == (0, "")
    assert from_hub.out == from_folder.out


def test_a_well_known_short_name_is_converted_from_the_hub_and_the_program_says_so(cli, hub, recipe, tmp_path):
    out = tmp_path / "out"
    run = cli("convert", "Qwen/Qwen3-Coder-30B-A3B", "--out", out, "--recipe", recipe, "--json")
    assert run.code == 0, run.err
    assert f"Qwen/Qwen3-Coder-30B-A3B stands for the Hub id {REPO}" in run.err.splitlines()
    base = Manifest.load(out / "rtpurbo.json").base_model
    assert (base.id, base.revision) == (REPO, hub.repositories["models", REPO].branches["main"])
    assert cli("verify", out, "--tokens", 96).code == 0


# --- refusals: models and their files ---


def test_an_unknown_model_is_refused_with_the_nearest_names(cli, recipe, tmp_path):
    for name, near in (
        ("qwen3-coder-30b", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        ("Qwen/Qwen3-Codr-30B-A3B", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        ("meta-llama/Llama-3.1-8B-Instuct", "meta-llama/Llama-3.1-8B-Instruct"),
    ):
        refused_without_trace(cli, tmp_path, ["convert", name, "--out", "out", "--recipe", recipe], name, near)
        refused_without_trace(cli, tmp_path, ["plan", name, "--context", 512], name, near)
    refused_without_trace(cli, tmp_path, ["generate", "user/nothing", "-p", "x"], "user/nothing")
    refused_without_trace(cli, tmp_path, ["generate", REPO, "-p", "x"], REPO, "rtpurbo.json")
    refused_without_trace(cli, tmp_path, ["generate", "no such folder", "-p", "x"], "no such folder")


def test_without_network_a_hub_id_is_refused(offline, recipe, artifact, tmp_path):
    refused_without_trace(offline, tmp_path, ["convert", "org/model", "--out", "out", "--recipe", recipe], "org/model", "cannot be reached")
    refused_without_trace(offline, tmp_path, ["generate", "org/model", "-p", "x"], "org/model", "cannot be reached")


def test_push_without_token_or_network_is_refused(offline, artifact, tmp_path):
    refused_without_trace(offline, tmp_path, ["push", artifact, "user/tiny"], "no Hugging Face token")
    token = {"HF_TOKEN": "hf_test"}
    refused_without_trace(offline, tmp_path, ["push", artifact, "user/tiny"], "user/tiny", "cannot be reached", environment=token)


def test_push_to_somebody_else_and_to_no_repository_is_refused(cli, artifact, tmp_path):
    refused_without_trace(cli, tmp_path, ["push", artifact, "stranger/tiny"], "stranger/tiny", "403")
    refused_without_trace(cli, tmp_path, ["push", artifact, "tiny"], "'tiny'")
    refused_without_trace(cli, tmp_path, ["push", tmp_path / "none", "user/tiny"], tmp_path / "none")


def _truncate(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def _corrupt(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"?" * 100 + path.read_bytes()[108:])
    return path.name


def _without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _unsupported(folder: Path) -> str:
    edit_json(folder / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    return "mamba"


def _sliding(folder: Path) -> str:
    edit_json(folder / "config.json", use_sliding_window=True, sliding_window=64, max_window_layers=0)
    return "sliding"


def _pickle(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def _without_tokenizer(folder: Path) -> str:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return "tokenizer"


@pytest.mark.parametrize("damage", [_truncate, _corrupt, _without_config, _unsupported, _sliding, _pickle, _without_tokenizer])
def test_a_model_folder_that_cannot_be_converted_is_refused_by_name(damage, cli, model, recipe, tmp_path):
    source = shutil.copytree(model, tmp_path / "model")
    named = damage(source)
    refused_without_trace(cli, tmp_path, ["convert", source, "--out", "out", "--recipe", recipe], source, named)
    refused_without_trace(cli, tmp_path, ["calibrate", source, "--work", "work", "--recipe", recipe], source, named)


def test_a_missing_shard_is_refused_by_name(cli, recipe, tmp_path):
    source = tiny_checkpoint(tmp_path / "model", "llama", max_shard_size="20KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused_without_trace(cli, tmp_path, ["convert", source, "--out", "out", "--recipe", recipe], shard.name)


def test_an_existing_output_is_never_touched(cli, model, recipe, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("folder", "file", "link"):
        refused_without_trace(cli, tmp_path, ["convert", model, "--out", out, "--recipe", recipe], out, "exists")
        refused_without_trace(cli, tmp_path, ["package", "--work", "none", "--out", out], out, "exists")


# --- refusals: artifacts ---


READERS: dict[str, list[Any]] = {
    "inspect": [],
    "verify": ["--tokens", 64],
    "generate": ["-p", "x"],
    "bench": ["--tokens", 8],
    "push": ["user/tampered"],
}


def _change_manifest(folder: Path) -> str:
    path = folder / "rtpurbo.json"
    path.write_text(path.read_text().replace('"top_p": 0.9', '"top_p": 0.8'))
    return "digest"


def _duplicate_key(folder: Path) -> str:
    path = folder / "rtpurbo.json"
    path.write_text(path.read_text().replace('"top_p": 0.9', '"top_p": 0.9, "top_p": 0.9'))
    return "top_p"


def _no_manifest(folder: Path) -> str:
    (folder / "rtpurbo.json").unlink()
    return "rtpurbo.json"


@pytest.mark.parametrize("tamper", [_change_manifest, _duplicate_key, _no_manifest])
@pytest.mark.parametrize("command", READERS)
def test_a_tampered_manifest_is_refused_by_every_reader(command, tamper, cli, hub, copied, tmp_path):
    named = tamper(copied)
    refused_without_trace(cli, tmp_path, [command, copied, *READERS[command]], copied, "rtpurbo.json", named)
    assert ("models", "user/tampered") not in hub.repositories


@pytest.mark.parametrize("name", ["model.safetensors", "indexer.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["verify", "generate", "bench", "push"])
def test_a_changed_or_missing_file_is_refused_by_every_reader_of_files(command, name, cli, hub, copied, tmp_path):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused_without_trace(cli, tmp_path, [command, copied, *READERS[command]], name)
    path.unlink()
    refused_without_trace(cli, tmp_path, [command, copied, *READERS[command]], name)
    assert ("models", "user/tampered") not in hub.repositories


@pytest.mark.parametrize("command", ["verify", "generate", "push"])
def test_an_indexer_of_other_shapes_is_refused_even_with_the_right_digests(command, cli, copied, tmp_path):
    path, manifest = copied / "indexer.safetensors", Manifest.load(copied / "rtpurbo.json")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path)
    dataclasses.replace(manifest, files={**manifest.files, path.name: file_digest(path)}).save(copied / "rtpurbo.json")
    refused_without_trace(cli, tmp_path, [command, copied, *READERS[command]], path.name, name, list(tensors[name][:, :-1].shape))


# --- refusals: options and data ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--top-p 7", "top_p"),
        ("--top-p nan", "top_p"),
        ("--retrieval-ratio 1.5", "retrieval_ratio"),
        ("--sliding-window 0", "sliding_window"),
        ("--sinks -1", "sinks"),
        ("--index-dim 0", "index_dim"),
        ("--index-dim 99", "head_dim"),
        ("--index-dim many", "--index-dim"),
        ("--decode-block 48", "power of two"),
        ("--indexer-steps -1", "indexer_steps"),
        ("--indexer-min-tokens 512", "indexer_min_tokens"),
        ("--answer-tokens 192", "answer_tokens"),
        ("--seed -1", "seed"),
        ("--dtype int8", "--dtype"),
        ("--granularity layer", "--granularity"),
        ("--train most", "--train"),
        ("--rope-scaling yarn:0.5", "yarn:0.5"),
        ("--rope-scaling dynamic:2", "dynamic:2"),
        ("--device quantum", "quantum"),
        ("--device cuda:77", "cuda:77"),
        ("--evaluation-tokens 2048", "max_position_embeddings"),
        ("--sliding-window 512", "sliding window"),
        ("--needle-tokens 128", "calibration"),
        ("--evaluation-tokens 200", "needle question"),
        ("--preset paper", "--preset"),
        ("--windows 5", "--windows"),
        ("--revision main", "revision"),
    ],
)
def test_conversion_options_out_of_range_are_refused_by_name(options, named, cli, model, recipe, tmp_path):
    common = ["--recipe", recipe, *options.split()]
    refused_without_trace(cli, tmp_path, ["convert", model, "--out", "out", *common], named)
    if "--rope" not in options:
        refused_without_trace(cli, tmp_path, ["calibrate", model, "--work", "work", *common], named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("generate ARTIFACT -p x --temperature -1", "temperature"),
        ("generate ARTIFACT -p x --top-k -1", "top_k"),
        ("generate ARTIFACT -p x --top-p 0", "top_p"),
        ("generate ARTIFACT -p x --top-p 1.1", "top_p"),
        ("generate ARTIFACT -p x --max-new-tokens 0", "max_new_tokens"),
        ("generate ARTIFACT -p x --max-new-tokens 1024", "max_position_embeddings 1024"),
        ("generate ARTIFACT -p x --prefill-chunk 0", "prefill_chunk"),
        ("generate ARTIFACT -p x --selection-top-p 0", "top_p"),
        ("generate ARTIFACT -p x --selection-top-p 2", "top_p"),
        ("generate ARTIFACT -p x --roles none", "--roles"),
        ("generate ARTIFACT -p x --dtype int4", "int4"),
        ("generate ARTIFACT -p x --device tpu", "tpu"),
        ("generate ARTIFACT -p x --stop=", "stop"),
        ("generate ARTIFACT -p x --revision main", "revision"),
        ("generate ARTIFACT --prompt=", "prompt 0 is empty"),
        ("generate ARTIFACT", "prompt 0 is empty"),
        ("generate ARTIFACT --prompt-file none.txt", "none.txt"),
        ("generate ARTIFACT --prompt-file latin.txt", "latin.txt: not UTF-8"),
        ("generate", "ARTIFACT"),
        ("inspect ARTIFACT --plot heads.bmp", "heads.bmp"),
        ("inspect ARTIFACT --plot none/heads.png", "none/heads.png"),
        ("inspect none", "none"),
        ("verify ARTIFACT --tokens 0", "num_tokens"),
        ("verify ARTIFACT --dtype int4", "int4"),
        ("verify ARTIFACT --device cuda:77", "cuda:77"),
        ("verify none", "none"),
        ("verify ARTIFACT --tokens x", "--tokens"),
        ("verify empty", "empty is not a converted model"),
        ("inspect empty", "empty is not a converted model"),
        ("generate empty -p x", "empty is not a converted model"),
        ("generate latin.txt -p x", "latin.txt is a file"),
        ("generate none -p x", "none: there is no such folder"),
        ("generate ARTIFACT -p x --seed x", "--seed"),
        ("generate ARTIFACT -p x --device cuda:x", "cuda:x"),
        ("generate ARTIFACT --prompt-file empty", "empty"),
        ("generate ARTIFACT x", "extra argument"),
        ("bench ARTIFACT --tokens 0", "tokens is 0"),
        ("bench ARTIFACT --tokens 64K", "64K"),
        ("bench ARTIFACT --tokens 64,,128", "64,,128"),
        ("bench ARTIFACT --tokens 8 --batch 0", "batch is 0"),
        ("bench ARTIFACT --tokens 8 --batch 1.5", "--batch"),
        ("bench ARTIFACT --tokens 8 --new-tokens 2", "new_tokens is 2"),
        ("bench ARTIFACT --tokens 8 --chunk 0", "chunk is 0"),
        ("bench ARTIFACT --tokens 8 --repeat 0", "repeat is 0"),
        ("bench ARTIFACT --tokens 8 --csv none/rows.csv", "none/rows.csv"),
        ("bench ARTIFACT --tokens 8 --csv empty", "empty"),
        ("bench ARTIFACT --tokens 8 --plot rows.bmp", "rows.bmp"),
        ("bench ARTIFACT --tokens 8 --device cuda:77", "cuda:77"),
        ("bench ARTIFACT --tokens 8 --dtype int4", "int4"),
        ("bench ARTIFACT --tokens 8 --revision main", "revision"),
        ("bench latin.txt", "latin.txt is a file"),
        ("bench empty", "empty is not a converted model"),
        ("bench none", "none"),
        ("bench", "ARTIFACT"),
        ("doctor ARTIFACT", "extra argument"),
        ("doctor --xml", "--xml"),
        ("plan ARTIFACT", "--context"),
        ("plan ARTIFACT --context 0", "context"),
        ("plan ARTIFACT --context 512 --batch 0", "batch"),
        ("plan ARTIFACT --context 512 --top-p 7", "top_p"),
        ("plan ARTIFACT --context 512 --recipe none.toml", "none.toml"),
        ("package --work none --out out", "none"),
        ("train-indexer", "--work"),
        ("convert ARTIFACT", "--out"),
        ("improve ARTIFACT", "improve"),
        ("--improve", "--improve"),
    ],
)
def test_options_of_the_other_commands_are_refused_by_name(arguments, named, cli, artifact, tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    filled = [str(artifact) if word == "ARTIFACT" else word for word in arguments.split()]
    refused_without_trace(cli, tmp_path, filled, named)


def test_a_prompt_beyond_the_models_positions_is_refused(cli, artifact, tmp_path):
    refused_without_trace(cli, tmp_path, ["generate", artifact], "max_position_embeddings 1024", stdin=PROMPT * 100)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", '{"text": "fine"}\n{"text": 5}\n', "line 2"),
        ("rows.jsonl", '{"body": "fine"}\n', "'body'"),
        ("rows.jsonl", '{"text": \n', "line 1"),
        ("rows.csv", "a,b\n", ".csv"),
        ("text.txt", "", "empty"),
        ("short.txt", "Too short for any needle.\n", "tokens"),
        ("latin.txt", b"caf\xe9 " * 2000, "not UTF-8"),
        ("table.parquet", "no parquet", "table.parquet"),
    ],
    ids=["wrong type", "wrong keys", "no JSON", "suffix", "empty", "short", "encoding", "parquet"],
)
@pytest.mark.parametrize("option", ["--data", "--distill-data"])
def test_data_that_cannot_be_used_is_refused_before_anything_is_computed(option, name, content, named, cli, model, recipe, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused_without_trace(cli, tmp_path, ["convert", model, "--out", "out", "--recipe", recipe, option, name], named)
    assert name in said or name == "short.txt"


# --- refusals: disk and memory ---


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """small_disk("200k") -> folder on a file system of that size; small_disk(options) remounts it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        command = (
            ["mount", "-o", f"remount,{options}", str(folder)] if mounted else ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        )
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount a file system")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_a_conversion_that_goes_on_when_there_is_room(cli, model, recipe, artifact, small_disk):
    disk = small_disk("size=208k")
    run = cli("convert", model, "--out", disk / "out", "--recipe", recipe)
    refused(run, disk / "out.work", "No space left", "--resume", progress=True)
    assert (disk / "out.work" / "calibration.safetensors").exists()
    assert [path.name for path in disk.iterdir()] == ["out.work"]
    small_disk("size=64m")
    resumed = cli("convert", model, "--out", disk / "out", "--recipe", recipe, "--resume")
    assert resumed.code == 0, resumed.err
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert json.loads((disk / "out" / "rtpurbo.json").read_text())["digest"] == Manifest.load(artifact / "rtpurbo.json").to_dict()["digest"]


def test_a_disk_without_room_for_the_artifact_is_refused_before_any_work(cli, model, recipe, small_disk):
    disk = small_disk("size=192k")
    refused(cli("convert", model, "--out", disk / "out", "--recipe", recipe), disk / "out", "bytes of disk space", progress=True)
    assert not (disk / "out.work" / "calibration.safetensors").exists()


def test_a_disk_that_is_full_from_the_beginning_is_left_as_it_was(cli, model, recipe, artifact, small_disk):
    disk = small_disk("size=16k")
    (disk / "filler").write_bytes(bytes(12 << 10))
    refused(cli("convert", model, "--out", disk / "out", "--recipe", recipe), disk, "No space left", progress=True)
    refused(cli("inspect", artifact, "--plot", disk / "heads.png"), disk, "No space left")
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_read_only_disk_is_refused(cli, model, recipe, artifact, small_disk):
    disk = small_disk("size=64m,ro")
    refused(cli("convert", model, "--out", disk / "out", "--recipe", recipe), disk / "out.work", "Read-only", progress=True)
    refused(cli("inspect", artifact, "--plot", disk / "heads.png"), disk, "Read-only")
    assert list(disk.iterdir()) == []


def test_a_limit_on_file_sizes_stops_a_conversion_that_can_be_resumed(cli, model, recipe, artifact, tmp_path):
    """The same failure for users who may not mount anything: writes beyond the limit fail as on a full disk."""
    out = tmp_path / "out"
    state = 100_000  # between the sizes of the teacher's files and of stage 2's state
    run = cli("convert", model, "--out", out, "--recipe", recipe, limits={"RLIMIT_FSIZE": state})
    refused(run, tmp_path / "out.work", "--resume", progress=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    assert (tmp_path / "out.work" / "teacher-train" / "teacher.json").exists()
    resumed = cli("convert", model, "--out", out, "--recipe", recipe, "--resume")
    assert resumed.code == 0, resumed.err
    assert json.loads((out / "rtpurbo.json").read_text())["digest"] == Manifest.load(artifact / "rtpurbo.json").to_dict()["digest"]
    plot = tmp_path / "heads.png"
    # Room for the sentence, not for the picture.
    refused(cli("inspect", artifact, "--plot", plot, limits={"RLIMIT_FSIZE": 1000}), "too large")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_not_enough_memory_is_one_sentence(cli, tiny_tokenizer, recipe, tmp_path):
    """A layer of 77 MB in float32, read from 38 MB, under a limit of 96 MB on top of what the interpreter uses."""
    source = tiny_checkpoint(
        tmp_path / "wide",
        "llama",
        dtype="bfloat16",
        num_hidden_layers=1,
        intermediate_size=200_000,
        vocab_size=384,
        max_position_embeddings=1024,
    )
    tiny_tokenizer.save_pretrained(source)
    run = cli("convert", source, "--out", tmp_path / "out", "--recipe", recipe, limits={"RLIMIT_AS": "+96 MiB"})
    refused(run, "not enough memory", "rtpurbo plan", "--resume", progress=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.work", "wide"]
