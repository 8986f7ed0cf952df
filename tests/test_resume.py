"""Conversions that are killed with SIGKILL at many points of every stage go on with --resume to the digests of an uninterrupted run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_cli import DieAt, ForkedCli, Run
from safetensors.torch import load_file, save_file

# Tiny, but with several states and teacher files, and steps between states.
SMALL = {
    "indexer_steps": 5,
    "distill_steps": 5,
    "distill_batch": 1,
    "checkpoint_every": 2,
    "calibration_tokens": 256,
    "indexer_max_tokens": 192,
    "distill_max_tokens": 192,
    "evaluation_tokens": 384,
}


@pytest.fixture(scope="module")
def cli() -> Iterator[ForkedCli]:
    with ForkedCli() as forked:
        yield forked


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(tiny_recipe(**SMALL).to_toml())
    return path


@pytest.fixture(scope="module")
def whole(cli, model, recipe, tmp_path_factory) -> str:
    """Digest of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run = cli("convert", model, "--out", out, "--recipe", recipe)
    assert run.code == 0, run.err
    return digest(out)


@pytest.fixture(scope="module")
def stopped(cli, model, recipe, tmp_path_factory) -> Callable[[str], Path]:
    """Folders with an `out.work` that was killed in the named stage; every call gives a copy."""
    points = {"stage 1": DieAt("os.rename", "indexer.json.partial"), "stage 2": DieAt("os.rename", "student.safetensors.partial")}
    made: dict[str, Path] = {}

    def copy(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("stopped")
            run = cli("convert", model, "--out", made[stage] / "out", "--recipe", recipe, die_at=points[stage])
            assert run.code == -signal.SIGKILL, run.err
        return shutil.copytree(made[stage], tmp_path_factory.mktemp("copy") / "copy")

    return copy


def digest(out: Path) -> str:
    return json.loads((out / "rtpurbo.json").read_text())["digest"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def error_line(run: Run) -> str:
    """The one line of a refusal with exit code 2; progress may stand before it."""
    lines = run.err.splitlines()
    assert run.code == 2, run.err
    assert run.out == ""
    assert "Traceback" not in run.err
    assert lines[-1].startswith("Error: ")
    assert sum(line.startswith("Error: ") for line in lines) == 1
    return lines[-1]


POINTS = {
    "before the work folder's record": DieAt("os.rename", "conversion.json.partial"),
    "before the record of the weights": DieAt("os.rename", "inputs.json.partial"),
    "calibration: scores computed": DieAt("os.rename", "calibration.safetensors.partial"),
    "calibration: before the roles": DieAt("os.rename", "roles.json.partial"),
    "stage 1: before the first state": DieAt("open", "indexer.jsonl", 2),
    "stage 1: first state written, not renamed": DieAt("os.rename", "indexer-state.safetensors.partial"),
    "stage 1: between states": DieAt("open", "indexer.jsonl", 4),
    "stage 1: second state written, not renamed": DieAt("os.rename", "indexer-state.safetensors.partial", 2),
    "stage 1: before the result": DieAt("os.rename", "work/indexer.safetensors.partial"),
    "stage 1: between tensors and measures": DieAt("os.rename", "work/indexer.json.partial"),
    "teacher: first file": DieAt("os.rename", "teacher-train/00000.safetensors.partial"),
    "teacher: some files": DieAt("os.rename", "teacher-train/00003.safetensors.partial"),
    "teacher: held-out": DieAt("os.rename", "teacher-heldout/00000.safetensors.partial"),
    "evaluation before stage 2": DieAt("os.rename", "before.json.partial"),
    "stage 2: before the first state": DieAt("open", "distill.jsonl", 2),
    "stage 2: first state written, not renamed": DieAt("os.rename", "distill-state.safetensors.partial"),
    "stage 2: between states": DieAt("open", "distill.jsonl", 4),
    "evaluation after stage 2": DieAt("os.rename", "student.safetensors.partial"),
    "stage 2: between weights and measures": DieAt("os.rename", "distillation.json.partial"),
    "package: small files": DieAt("open", "out.partial/metrics.json"),
    "package: weights": DieAt("open", "out.partial/model.safetensors"),
    "package: before the rename": DieAt("os.rename", "out.partial"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_conversion_resumes_to_the_digest_of_an_uninterrupted_one(point, cli, model, recipe, whole, tmp_path):
    out = tmp_path / "out"
    killed = cli("convert", model, "--out", out, "--recipe", recipe, die_at=POINTS[point])
    assert killed.code == -signal.SIGKILL, killed.err
    assert not out.exists()
    assert "out.work" in names(tmp_path)
    assert ("out.partial" in names(tmp_path)) == point.startswith("package")
    states = [name for name in names(tmp_path / "out.work") if name.endswith("-state.safetensors")]
    if point.startswith("stage 1:"):
        assert states == ([] if "first state" in point else ["indexer-state.safetensors"])
    if point.startswith("stage 2:"):
        assert ("distill-state.safetensors" in states) == ("first state" not in point)
    resumed = cli("convert", model, "--out", out, "--recipe", recipe, "--resume")
    assert resumed.code == 0, resumed.err
    assert names(tmp_path) == ["out"]
    assert digest(out) == whole


def test_a_conversion_killed_again_and_again_still_ends_at_the_same_digest(cli, model, recipe, whole, tmp_path):
    out = tmp_path / "out"
    for point in (
        "stage 1: before the first state",
        "stage 1: first state written, not renamed",
        "stage 1: between tensors and measures",
        "teacher: some files",
        "stage 2: first state written, not renamed",
        "stage 2: between states",
        "package: weights",
    ):
        event = POINTS[point]
        # The log of the process before is read first, which opens it once more.
        nth = event.nth + (point == "stage 2: between states")
        killed = cli("convert", model, "--out", out, "--recipe", recipe, "--resume", die_at=DieAt(event.event, event.path, nth))
        assert killed.code == -signal.SIGKILL, (point, killed.err)
    assert cli("convert", model, "--out", out, "--recipe", recipe, "--resume").code == 0
    assert digest(out) == whole


@pytest.mark.parametrize(("log", "lines"), [("indexer.jsonl", 3), ("distill.jsonl", 1), ("distill.jsonl", 4)], ids=lambda value: str(value))
def test_kill_9_from_outside_in_the_middle_of_a_step_is_resumed(log, lines, model, recipe, cli, whole, tmp_path):
    out = tmp_path / "out"
    pid = cli.start("convert", model, "--out", out, "--recipe", recipe)
    path = tmp_path / "out.work" / log
    while not (path.exists() and len(path.read_bytes().splitlines()) >= lines):
        time.sleep(0.001)
        os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)
    assert cli.wait().code == -signal.SIGKILL
    assert cli("convert", model, "--out", out, "--recipe", recipe, "--resume").code == 0
    assert digest(out) == whole


def test_the_program_itself_is_killed_and_resumed(model, recipe, whole, tmp_path):
    """As the user runs it: `python -m rtpurbo.cli`, killed once calibration has finished."""
    command = [sys.executable, "-m", "rtpurbo.cli", "convert", str(model), "--out", "out", "--recipe", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "out.work" / "roles.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert names(tmp_path) == ["out.work"]
    subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert names(tmp_path) == ["out"]
    assert digest(tmp_path / "out") == whole


def test_a_file_cut_in_the_middle_of_its_writing_is_never_taken_for_the_file(cli, model, recipe, whole, stopped):
    """Every file is written as NAME.partial and renamed; a kill inside the write leaves a cut one, here planted for all of them."""
    folder = stopped("stage 2")
    work = folder / "out.work"
    for path in [p for p in work.rglob("*") if p.is_file() and not p.name.endswith(".partial")]:
        content = path.read_bytes()
        path.with_name(path.name + ".partial").write_bytes(content[: len(content) // 2])
    for name in ("distill-state.safetensors", "before.json", "teacher-train/00004.safetensors"):
        (work / name).unlink()
    assert cli("convert", model, "--out", folder / "out", "--recipe", recipe, "--resume").code == 0
    assert digest(folder / "out") == whole


@pytest.mark.parametrize("name", ["indexer.jsonl", "distill.jsonl"])
@pytest.mark.parametrize("torn", ['{"docum', '{"document": "python-docs#0", "step": 4', "\x00\x00\x00"])
def test_a_torn_last_line_of_the_step_log_is_dropped(name, torn, tmp_path):
    from rtpurbo.converter.work import StepLog

    lines = [json.dumps({"step": step}) for step in range(3)]
    (tmp_path / name).write_text("\n".join([*lines, torn]))
    log = StepLog(tmp_path / name, 2)
    log.append({"step": 2})
    assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [0, 1, 2]


def test_a_torn_last_line_leaves_the_digest_as_it_is(cli, model, recipe, whole, stopped):
    folder = stopped("stage 2")
    for name in ("indexer.jsonl", "distill.jsonl"):
        path = folder / "out.work" / name
        path.write_bytes(path.read_bytes()[:-20])
    # Without its last state stage 2 repeats the step whose record was torn; stage 1 is repeated by removing its result.
    (folder / "out.work" / "indexer.json").unlink(missing_ok=True)
    resumed = cli("convert", model, "--out", folder / "out", "--recipe", recipe, "--resume")
    assert resumed.code == 0, resumed.err
    assert digest(folder / "out") == whole


def test_a_damaged_line_inside_the_step_log_is_refused_by_name(cli, model, recipe, stopped):
    folder = stopped("stage 1")
    path = folder / "out.work" / "indexer.jsonl"
    path.write_text('{"st}\n' + path.read_text())
    assert str(path) in error_line(cli("convert", model, "--out", folder / "out", "--recipe", recipe, "--resume"))


def test_a_work_folder_is_not_overwritten_without_resume(cli, model, recipe, stopped):
    folder = stopped("stage 1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = error_line(cli("convert", model, "--out", folder / "out", "--recipe", recipe))
    assert str(folder / "out.work") in said
    assert "--resume" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resuming_with_another_recipe_model_or_revision_names_what_differs(cli, model, recipe, tiny_model, tiny_recipe, stopped, tmp_path):
    folder = stopped("stage 1")
    out, work = folder / "out", folder / "out.work"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = error_line(cli("convert", model, "--out", out, "--recipe", recipe, "--top-p", 0.8, "--resume"))
    assert "recipe.top_p is 0.9" in said
    assert "0.8" in said
    said = error_line(cli("convert", tiny_model("qwen2"), "--out", out, "--recipe", recipe, "--resume"))
    assert f"model is {str(model)!r}" in said
    said = error_line(cli("convert", model, "--out", out, "--recipe", recipe, "--resume", "--revision", "abc"))
    assert "revision is None" in said
    assert str(work) in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_interval_of_states_and_the_device_may_change_on_resume(cli, model, recipe, whole, stopped):
    folder = stopped("stage 1")
    run = cli("convert", model, "--out", folder / "out", "--recipe", recipe, "--checkpoint-every", 3, "--device", "cpu", "--resume")
    assert run.code == 0, run.err
    assert digest(folder / "out") == whole


def test_resuming_with_changed_weights_is_refused(cli, model, recipe, tmp_path):
    source, out = shutil.copytree(model, tmp_path / "model"), tmp_path / "out"
    killed = cli("convert", source, "--out", out, "--recipe", recipe, die_at=DieAt("open", "indexer.jsonl", 4))
    assert killed.code == -signal.SIGKILL
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    said = error_line(cli("convert", source, "--out", out, "--recipe", recipe, "--resume"))
    assert "other weights" in said
    assert str(tmp_path / "out.work") in said


def test_resuming_with_other_training_data_is_refused(cli, model, recipe, tmp_path, stopped):
    folder, text = stopped("stage 1"), tmp_path / "other.txt"
    text.write_text("".join(f"Line {i} tells of the number {i * i}.\n" for i in range(4000)))
    said = error_line(cli("convert", model, "--out", folder / "out", "--recipe", recipe, "--indexer-data", text, "--resume"))
    assert "indexer-state.safetensors" in said
    assert "other data" in said


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("stage", "name", "damage"),
    [
        ("stage 1", "conversion.json", _cut),
        ("stage 1", "inputs.json", _cut),
        ("stage 1", "calibration.safetensors", _cut),
        ("stage 1", "roles.json", _cut),
        ("stage 1", "indexer-state.safetensors", _cut),
        ("stage 1", "indexer-state.safetensors", _without_metadata),
        ("stage 2", "indexer.safetensors", _cut),
        ("stage 2", "before.json", _cut),
        ("stage 2", "distill-state.safetensors", _cut),
        ("stage 2", "teacher-train/00004.safetensors", _cut),
        ("stage 2", "teacher-train/teacher.json", _cut),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_damaged_file_of_the_work_folder_is_refused_by_name(stage, name, damage, cli, model, recipe, stopped):
    folder = stopped(stage)
    damage(folder / "out.work" / name)
    # Without its last state stage 2 reads every teacher file again.
    if name.startswith("teacher-train/0"):
        (folder / "out.work" / "distill-state.safetensors").unlink()
    said = error_line(cli("convert", model, "--out", folder / "out", "--recipe", recipe, "--resume"))
    assert name in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_work_folder_that_is_something_else_is_left_alone(kind, resume, cli, model, recipe, tmp_path):
    work = tmp_path / "out.work"
    if kind == "folder":
        work.mkdir()
        (work / "thesis.txt").write_text("mine")
    else:
        work.write_text("mine")
    said = error_line(cli("convert", model, "--out", tmp_path / "out", "--recipe", recipe, *["--resume"] * resume))
    assert str(work) in said
    assert [path.read_text() for path in (work, work / "thesis.txt") if path.is_file()] == ["mine"]


def test_resume_without_anything_to_resume_starts_from_the_beginning(cli, model, recipe, whole, tmp_path):
    assert cli("convert", model, "--out", tmp_path / "out", "--recipe", recipe, "--resume").code == 0
    assert digest(tmp_path / "out") == whole


def test_ctrl_c_ends_with_one_line_and_exit_code_130_and_can_be_resumed(cli, model, recipe, whole, tmp_path):
    out = tmp_path / "out"
    pid = cli.start("convert", model, "--out", out, "--recipe", recipe)
    while not (tmp_path / "out.work" / "indexer-state.safetensors").exists():
        time.sleep(0.001)
        os.kill(pid, 0)
    os.kill(pid, signal.SIGINT)
    run: Any = cli.wait()
    assert run.code == 130, run.err
    assert run.out == ""
    assert "Traceback" not in run.err
    assert run.err.splitlines()[-1].startswith("interrupted")
    assert sum("interrupted" in line for line in run.err.splitlines()) == 1
    assert cli("convert", model, "--out", out, "--recipe", recipe, "--resume").code == 0
    assert digest(out) == whole
