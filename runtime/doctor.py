"""What is installed, what works on this machine, and what to install for the rest; everything is tried, not guessed."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import torch

TIMEOUT_S = 180
# Distribution, module that is imported, what it is for, and how to get it.
PACKAGES = (
    ("torch", "torch", "everything", "pip install rtpurbo"),
    ("transformers", "transformers", "everything", "pip install rtpurbo"),
    ("safetensors", "safetensors", "reading weights", "pip install rtpurbo"),
    ("huggingface-hub", "huggingface_hub", "the Hub", "pip install rtpurbo"),
    ("numpy", "numpy", "everything", "pip install rtpurbo"),
    ("click", "click", "the command line", "pip install rtpurbo"),
    ("rich", "rich", "tables", "pip install rtpurbo"),
    ("jsonschema", "jsonschema", "reading manifests", "pip install rtpurbo"),
    ("tomli-w", "tomli_w", "writing recipes", "pip install rtpurbo"),
    ("triton", "triton", "the kernels on an NVIDIA GPU", "pip install 'triton>=3.6'"),
    ("flash-attn-4", "flash_attn.cute", "FlashAttention-4 on Hopper", "pip install 'rtpurbo[fa4]'"),
    ("onnx", "onnx", "exporting an engine's graph", "pip install 'rtpurbo[trt]' or 'rtpurbo[trt-rtx]'"),
    ("tensorrt", "tensorrt", "TensorRT engines", "pip install 'rtpurbo[trt]'"),
    ("tensorrt-rtx", "tensorrt_rtx", "TensorRT engines, built without a GPU", "pip install 'rtpurbo[trt-rtx]'"),
    ("datasets", "datasets", "Hub data sets in conversions", "pip install 'rtpurbo[data]'"),
    ("gguf", "gguf", "the demo model's weights", "pip install 'rtpurbo[gguf]'"),
    ("peft", "peft", "conversion with --train lora", "pip install 'rtpurbo[lora]'"),
    ("matplotlib", "matplotlib", "plots", "pip install 'rtpurbo[plot]'"),
)
# Check (see doctor_checks), its name for people, whether it needs a GPU, and the package without which it is not tried.
ABILITIES = (
    ("reference", "reference kernels", False, "torch"),
    ("triton", "Triton kernels", True, "triton"),
    ("cuda_cpp", "CUDA C++ kernels (Hopper)", True, "torch"),
    ("gluon", "Gluon kernels (Hopper)", True, "triton"),
    ("fa4", "FlashAttention-4 (Hopper)", True, "flash-attn-4"),
    ("cuda_graphs", "CUDA graphs", True, "torch"),
    ("tensorrt", "TensorRT engines", True, "tensorrt"),
    ("tensorrt_rtx", "TensorRT-RTX engines", False, "tensorrt-rtx"),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. status: "ok", "missing" (not installed, or no such device) or "broken" (there, and it failed).

    detail: the version or what was seen, or the reason. remedy: what to install, "" where installing something does not help.
    """

    section: Literal["installed", "device", "works"]
    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Import every package that is installed, ask the GPU for its facts, and try every form of running, each in its own process."""
    gpu = _gpu()
    has_gpu = gpu[0].status == "ok"
    with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
        packages = list(pool.map(lambda package: _package(*package), PACKAGES))
        statuses = {finding.name: finding for finding in packages}
        tried = pool.map(lambda ability: _ability(*ability, statuses=statuses, has_gpu=has_gpu), ABILITIES)
        python = Finding(section="installed", name="python", status="ok", detail=platform.python_version())
        return [python, *packages, *gpu, *tried]


def render(findings: Sequence[Finding], console: Any) -> None:
    """Print a table a section on a rich console, and what to install below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "missing": "dim", "broken": "red"}
    for section, title in (("installed", "Installed"), ("device", "Device"), ("works", "Works on this machine")):
        table = Table(title=title, box=box.SIMPLE_HEAD, show_header=False, title_justify="left", pad_edge=False)
        for finding in findings:
            if finding.section == section:
                table.add_row(Text(finding.name), Text(finding.status, style=styles[finding.status]), Text(finding.detail))
        console.print(table)
    console.print("To install:" if any(finding.remedy for finding in findings) else "Nothing is left to install.")
    for finding in findings:
        if finding.remedy:
            console.print(f"  {finding.name}: {finding.remedy}", markup=False, highlight=False, soft_wrap=True)


def as_json(findings: Sequence[Finding]) -> str:
    """The findings by section, as one JSON object."""
    by_section: dict[str, list[dict[str, str]]] = {"installed": [], "device": [], "works": []}
    for finding in findings:
        body = asdict(finding)
        by_section[body.pop("section")].append(body)
    return json.dumps(by_section)


def _package(distribution: str, module: str, purpose: str, remedy: str) -> Finding:
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding(section="installed", name=distribution, status="missing", detail=f"for {purpose}", remedy=remedy)
    ok, said = _child(["-c", "import importlib, sys; importlib.import_module(sys.argv[1])", module])
    if not ok:
        detail = f"{version}, but importing {module} failed: {said}"
        return Finding(section="installed", name=distribution, status="broken", detail=detail, remedy=remedy)
    return Finding(section="installed", name=distribution, status="ok", detail=version)


def _gpu() -> list[Finding]:
    """Name, capability, memory and driver of every GPU, or one finding with the reason why there is none."""
    driver, build = _driver(), torch.version.cuda
    if not torch.cuda.is_available():
        if build is None:
            reason, remedy = "torch is built without CUDA", "pip install --force-reinstall torch (the wheel on PyPI)" if driver else ""
        else:
            reason, remedy = f"torch is built for CUDA {build}, but it finds no usable GPU", ""
        reason += f"; the driver is {driver}" if driver else "; nvidia-smi finds no driver"
        return [Finding(section="device", name="NVIDIA GPU", status="missing", detail=reason, remedy=remedy)]
    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        detail = f"{facts.name}, compute capability {facts.major}.{facts.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        found.append(Finding(section="device", name=f"cuda:{i}", status="ok", detail=detail))
    detail = f"CUDA {build} in torch, driver {driver or 'unknown: nvidia-smi does not say'}"
    return [*found, Finding(section="device", name="CUDA", status="ok", detail=detail)]


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.split("\n")[0].strip() or None if run.returncode == 0 else None


def _ability(check: str, name: str, needs_gpu: bool, package: str, *, statuses: dict[str, Finding], has_gpu: bool) -> Finding:
    missing = ""
    if statuses[package].status != "ok":
        missing = f"{package} is {'not installed' if statuses[package].status == 'missing' else 'broken'}"
    elif needs_gpu and not has_gpu:
        missing = "needs an NVIDIA GPU"
    if missing:
        return Finding(section="works", name=name, status="missing", detail=missing)
    ok, said = _child(["-m", "rtpurbo.runtime.doctor_checks", check])
    return Finding(section="works", name=name, status="ok" if ok else "broken", detail=said)


def _child(arguments: list[str]) -> tuple[bool, str]:
    """Whether a Python process with these arguments ended well, and its last line or the reason why not."""
    try:
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False, f"it did not end within {TIMEOUT_S} s"
    if run.returncode < 0:
        return False, f"the process was killed by {signal.Signals(-run.returncode).name}"
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return run.returncode == 0, lines[-1][:400] if lines else f"exit code {run.returncode}"
