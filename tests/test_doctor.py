"""`rtpurbo doctor`: every finding is tried, failures carry their reason, and what it advises to install exists."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from rtpurbo.runtime import doctor, doctor_checks
from rtpurbo.runtime.doctor import Finding, as_json, diagnose

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
TORCH = ("torch", "torch", "everything", "pip install rtpurbo")
REFERENCE = ("reference", "reference kernels", False, "torch")


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Only torch and the reference are looked at, for speed."""
    monkeypatch.setattr(doctor, "PACKAGES", (TORCH,))
    monkeypatch.setattr(doctor, "ABILITIES", (REFERENCE,))
    return monkeypatch


@pytest.mark.usefixtures("few")
def test_what_is_there_and_works_is_said_with_its_version() -> None:
    found = named(diagnose())
    assert found["torch"] == Finding(section="installed", name="torch", status="ok", detail=torch.__version__)
    assert found["reference kernels"].status == "ok"
    assert re.fullmatch(r"largest error \d\.\de-0\d on the CPU", found["reference kernels"].detail)
    assert found["python"].status == "ok"
    assert any(finding.section == "device" for finding in found.values())


def test_a_package_that_is_missing_or_does_not_import_is_told_apart_and_keeps_its_checks_from_running(few: pytest.MonkeyPatch) -> None:
    absent = ("no-such-package", "nothing", "nothing", "pip install 'rtpurbo[none]'")
    # Installed under this name, but the module is not there.
    broken = ("click", "click.no_such_part", "nothing", "pip install click")
    few.setattr(doctor, "PACKAGES", (TORCH, absent, broken))
    few.setattr(doctor, "ABILITIES", (("reference", "one", False, "no-such-package"), ("reference", "two", False, "click")))
    found = named(diagnose())
    assert found["no-such-package"].status == "missing"
    assert found["no-such-package"].remedy == "pip install 'rtpurbo[none]'"
    assert found["click"].status == "broken"
    assert "importing click.no_such_part failed: ModuleNotFoundError: No module named 'click.no_such_part'" in found["click"].detail
    assert found["one"].detail == "no-such-package is not installed"
    assert found["two"].detail == "click is broken"


def test_a_check_that_fails_crashes_or_hangs_is_a_reason_and_not_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._child(["-c", "print('seen'); print('fine')"]) == (True, "fine")
    assert doctor._child(["-c", "raise ValueError('what failed')"]) == (False, "ValueError: what failed")
    assert doctor._child(["-c", "import os; os.abort()"]) == (False, "the process was killed by SIGABRT")
    assert doctor._child(["-c", "raise SystemExit(7)"]) == (False, "exit code 7")
    assert doctor._child(["-m", "rtpurbo.runtime.doctor_checks", "unheard-of"]) == (False, "KeyError: 'unheard-of'")
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.2)
    assert doctor._child(["-c", "import time; time.sleep(60)"]) == (False, "it did not end within 0.2 s")


def test_a_wrong_result_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "largest error" in doctor_checks.reference()
    q, k, v = doctor_checks._qkv("cpu", torch.float32)
    with pytest.raises(RuntimeError, match="the result is off by"):
        doctor_checks._causal_error(torch.zeros_like(q), q, k, v)
    with pytest.raises(RuntimeError, match="the result is off by nan"):
        doctor_checks._causal_error(torch.full_like(q, float("nan")), q, k, v)


@pytest.mark.parametrize(
    ("build", "driver", "said", "remedy"),
    [
        (None, None, "torch is built without CUDA; nvidia-smi finds no driver", ""),
        (None, "580.1", "torch is built without CUDA; the driver is 580.1", "pip install --force-reinstall torch (the wheel on PyPI)"),
        ("13.0", "580.1", "torch is built for CUDA 13.0, but it finds no usable GPU; the driver is 580.1", ""),
    ],
)
def test_without_a_gpu_the_reason_is_given(few: pytest.MonkeyPatch, build: str | None, driver: str | None, said: str, remedy: str) -> None:
    few.setattr(torch.version, "cuda", build)
    few.setattr(torch.cuda, "is_available", lambda: False)
    few.setattr(doctor, "_driver", lambda: driver)
    few.setattr(doctor, "ABILITIES", (("triton", "Triton kernels", True, "torch"),))
    found = named(diagnose())
    assert (found["NVIDIA GPU"].detail, found["NVIDIA GPU"].remedy) == (said, remedy)
    assert found["Triton kernels"] == Finding(section="works", name="Triton kernels", status="missing", detail="needs an NVIDIA GPU")


def test_every_check_belongs_to_an_ability_and_what_is_advised_is_what_the_project_declares() -> None:
    packages = {name: remedy for name, _, _, remedy in doctor.PACKAGES}
    required = {re.split(r"[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert {name for name, remedy in packages.items() if remedy == "pip install rtpurbo"} == required
    assert [check for check, *_ in doctor.ABILITIES] == list(doctor_checks.CHECKS)
    assert {package for *_, package in doctor.ABILITIES} <= set(packages)
    for name, remedy in packages.items():
        for extra in re.findall(r"rtpurbo\[([\w-]+)\]", remedy):
            assert any(requirement.startswith(name) for requirement in PROJECT["optional-dependencies"][extra])


def test_json_groups_the_findings_by_section() -> None:
    body = json.loads(as_json([Finding(section="works", name="x", status="broken", detail="why", remedy="what")]))
    assert body == {"installed": [], "device": [], "works": [{"name": "x", "status": "broken", "detail": "why", "remedy": "what"}]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_kernels_and_graphs_are_launched_and_work() -> None:
    found = named(diagnose())
    assert found["cuda:0"].detail.startswith(torch.cuda.get_device_name(0))
    assert "driver" in found["CUDA"].detail
    for name in ("reference kernels", "Triton kernels", "CUDA graphs"):
        assert found[name].status == "ok", found[name]
    for name in ("Gluon kernels (Hopper)", "CUDA C++ kernels (Hopper)"):
        if torch.cuda.get_device_capability(0) == (9, 0):
            assert found[name].status == "ok", found[name]
        else:
            assert "it needs compute capability 9.0" in found[name].detail
