"""The commands that build and take engines: what they print, and one sentence with exit code 2 where they cannot."""

import json
import os
import signal
import subprocess
import sys

import eager_model as eager
import pytest
import torch
from click.testing import CliRunner

from rtpurbo.cli import main
from rtpurbo.plugins.trt import library
from rtpurbo.plugins.trt.build import _interruptible
from rtpurbo.plugins.trt.verify import argmax_report, check, compare_logits

pytestmark = pytest.mark.trt
pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'rtpurbo[trt-rtx]'")
pytest.importorskip("triton")


def refused(*arguments) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    return result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    artifact, engine = folder / "artifact", folder / "engine"
    config = eager.tiny_config("llama", heads=4, groups=2, head_dim=64, layers=2)
    eager.save_artifact(artifact, config, [[0], []], key_dtype="bfloat16", index_dim=16, sliding_window=60)
    options = ["--library", "tensorrt-rtx", "--capability", "80", "--dtype", "bfloat16", "--capacity", "512", "--prefill-chunk", "128"]
    result = CliRunner().invoke(main, ["build-engine", str(artifact), "--out", str(engine), *options, "--json"])
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout.strip().splitlines()[-1])
    assert (described["library_version"], described["capacity"], described["capabilities"]) == ("1.6.1.120", 512, [80])
    assert described["build"]["peak_bytes"] > 0
    return artifact, engine


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", [("generate", "-p", "x"), ("bench", "--tokens", "64"), ("verify", "--against")])
def test_commands_that_run_an_engine_say_that_there_is_no_gpu(folders, command):
    artifact, engine = folders
    more = [artifact] if command[-1] == "--against" else []
    assert "runs on an NVIDIA GPU" in refused(command[0], engine, *command[1:], *more)


def test_an_engine_takes_no_options_that_were_decided_at_its_build(folders):
    assert "has this built in" in refused("generate", folders[1], "-p", "x", "--selection-top-p", "0.5")
    assert "has this built in" in refused("bench", folders[1], "--dtype", "float16")
    assert "give the artifact that it was built from with --against" in refused("verify", folders[1])
    assert "is not an engine" in refused("verify", folders[0], "--against", folders[0])


def test_verify_refuses_the_artifact_of_another_engine(folders, tmp_path):
    config = eager.tiny_config("llama", heads=4, groups=2, head_dim=64, layers=2)
    eager.save_artifact(tmp_path / "other", config, [[1], []], key_dtype="bfloat16", index_dim=16, sliding_window=60)
    assert "but the engine was built from" in refused("verify", folders[1], "--against", tmp_path / "other")


def test_an_unknown_capability_and_an_existing_output_are_refused(folders, tmp_path):
    artifact, engine = folders
    assert "capabilities are [120]" in refused("build-engine", artifact, "--out", tmp_path / "new", "--capability", "120")
    assert "exists already" in refused("build-engine", artifact, "--out", engine)


def test_convert_checks_that_an_engine_can_be_built_before_it_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "MODULES", {"tensorrt": "no_such_tensorrt", "tensorrt-rtx": "no_such_tensorrt_rtx"})
    # The model does not exist: a conversion that had begun would say so.
    assert "no TensorRT: install" in refused("convert", "no/such-model", "--out", tmp_path / "out", "--engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["triton", "onnx"])
def test_commands_say_what_to_install_where_a_library_of_engines_is_missing(folders, tmp_path, missing):
    artifact, engine = map(str, folders)
    build = ["build-engine", artifact, "--out", str(tmp_path / "new")]
    run = [["generate", engine, "-p", "x"], ["bench", engine, "--tokens", "64"], ["verify", engine, "--against", artifact]]
    for arguments in [build, *(run if missing == "triton" else [])]:
        # A process of its own: here the library is imported already.
        code = f"import sys; sys.modules[{missing!r}] = None; from rtpurbo.cli import main; main({arguments!r})"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert found.returncode == 2, found.stderr
        assert found.stderr.strip() == f"Error: TensorRT engines need {missing}: install rtpurbo[trt] or rtpurbo[trt-rtx]"
    assert not list(tmp_path.iterdir())


def test_differences_of_the_most_likely_token_count_only_beyond_rounding():
    want = torch.tensor([[[3.0, 1.0, 0.0]], [[2.0, 1.9, 0.0]], [[0.0, 0.0, 5.0]]])
    got = torch.tensor([[[3.2, 1.0, 0.0]], [[1.9, 2.0, 0.0]], [[0.0, 0.0, 5.0]]])
    assert argmax_report(got, want) == {"argmax_agreement": pytest.approx(2 / 3), "argmax_differences": 0}
    got[2, 0] = torch.tensor([0.0, 5.0, 4.9])
    # One token is wrong by 5, which is not what the others' errors are like.
    assert argmax_report(got, want)["argmax_differences"] == 1
    assert argmax_report(torch.tensor([[[2.9, 3.0]]]), torch.tensor([[[3.5, 3.0]]]))["argmax_differences"] == 0
    assert argmax_report(torch.tensor([[[3.0, 3.1]]]), torch.tensor([[[3.05, 3.0]]]))["argmax_differences"] == 0


def test_in_float32_no_token_may_differ(tmp_path):
    want = torch.randn(40, 2, 50, generator=torch.Generator().manual_seed(0))
    got = want * 1.00001
    check({"dtype": "float32", "tolerance": 1e-3, **compare_logits(got, want)}, tmp_path)
    got[3, 1] = 1.01 * want[3, 1]
    with pytest.raises(ValueError, match=r"more than 0 of 80 tokens differ .* by a relative 0\.01"):
        check({"dtype": "float32", "tolerance": 1e-3, **compare_logits(got, want)}, tmp_path)
    got[3, 1] = want[3, 1].flip(0)
    with pytest.raises(ValueError, match="differs in 1 of 80 places"):
        check({"dtype": "float32", "tolerance": 9.0, **compare_logits(got, want)}, tmp_path)


def test_an_engine_whose_logits_are_another_models_is_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(40, 2, 50, generator=generator)
    near = want + 0.01 * torch.randn(40, 2, 50, generator=generator)
    few, many = near.clone(), near.clone()
    few[:2, 0], many[:12, 0] = -want[:2, 0], -want[:12, 0]
    check({"dtype": "bfloat16", "tolerance": 0.05, **compare_logits(few, want)}, tmp_path)
    with pytest.raises(ValueError, match="more than 8 of 80 tokens differ"):
        check({"dtype": "bfloat16", "tolerance": 0.05, **compare_logits(many, want)}, tmp_path)
    with pytest.raises(ValueError, match="logits of 80 of 80 tokens are not finite"):
        check({"dtype": "bfloat16", "tolerance": 0.05, **compare_logits(near * float("nan"), want)}, tmp_path)
    with pytest.raises(ValueError, match="the most likely token differs in 9 of 80 places"):
        check({"dtype": "bfloat16", "tolerance": 3.0, **compare_logits(many, want)}, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1], ids=["engine", "runtime"])
def test_a_few_logits_that_are_not_finite_are_refused_and_hide_no_other_difference(tmp_path, value, place):
    generator = torch.Generator().manual_seed(0)
    want = torch.randn(40, 2, 50, generator=generator)
    got = want + 0.01 * torch.randn(40, 2, 50, generator=generator)
    # Eight tokens are another's, fewer than the nine that the tolerance would refuse; three more are broken.
    got[:8, 0] = -want[:8, 0]
    differences = argmax_report(got, want)["argmax_differences"]
    assert differences > 5
    for token in ((20, 0), (21, 1), (39, 1)):
        (got, want)[place][token][7] = value
    report = {"dtype": "bfloat16", "tolerance": 0.05, **compare_logits(got, want)}
    assert report["not_finite_tokens"] == 3
    assert report["argmax_differences"] >= differences
    with pytest.raises(ValueError, match="logits of 3 of 80 tokens are not finite"):
        check(report, tmp_path)


@pytest.mark.parametrize("tokens", [64, 75, 80, 99, 101])
def test_no_more_than_a_tenth_of_the_tokens_may_exceed_the_tolerance(tmp_path, tokens):
    want = torch.randn(tokens, 1, 50, generator=torch.Generator().manual_seed(1))
    for wrong in (tokens // 10, tokens // 10 + 1):
        got = want * 1.001
        got[:wrong] = 1.5 * want[:wrong]
        report = {"dtype": "bfloat16", "tolerance": 0.05, **compare_logits(got, want)}
        if wrong <= tokens / 10:
            check(report, tmp_path)
        else:
            with pytest.raises(ValueError, match=f"more than {tokens // 10} of {tokens} tokens differ"):
                check(report, tmp_path)


def test_ctrl_c_ends_a_build_between_two_of_its_steps():
    class Library:
        class IProgressMonitor:
            pass

    before = signal.getsignal(signal.SIGINT)

    def build() -> None:
        with _interruptible(Library) as monitor:
            assert monitor.step_complete("tactics", 1)
            os.kill(os.getpid(), signal.SIGINT)
            assert not monitor.step_complete("tactics", 2)

    with pytest.raises(KeyboardInterrupt):
        build()
    assert signal.getsignal(signal.SIGINT) is before
    with _interruptible(Library) as monitor:
        assert monitor.step_complete("tactics", 3)
