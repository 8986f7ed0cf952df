"""What pyproject.toml declares agrees with the tree, and importing the package stays light."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_list_is_the_tree():
    folders = {p.parent.relative_to(ROOT) for p in ROOT.rglob("__init__.py")}
    ours = {f for f in folders if not any(part.startswith((".", "tests", "build", "dist")) for part in f.parts)}
    found = {".".join(("rtpurbo", *folder.parts)) for folder in ours}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)
    assert len(set(listed)) == len(listed)


def test_what_is_no_python_is_package_data():
    assert PROJECT["tool"]["setuptools"]["package-data"] == {"rtpurbo.manifests": ["*.json"], "rtpurbo.kernels.cuda": ["*.cu", "*.cuh"]}
    folders = {p.relative_to(ROOT).parent for pattern in ("*.cu", "*.cuh") for p in ROOT.rglob(pattern)}
    ours = {folder.as_posix() for folder in folders if not any(part.startswith((".", "tests", "build", "dist")) for part in folder.parts)}
    assert ours == {"kernels/cuda"}
    assert [p.name for p in (ROOT / "manifests").glob("*.json")] == ["schema_v1.json"]


def loaded_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import rtpurbo",
        "import rtpurbo.manifests.manifest, rtpurbo.manifests.architectures",
        "import rtpurbo.manifests.plan, rtpurbo.manifests.report",
    ],
)
def test_importing_stays_light(statement):
    modules = loaded_after(statement)
    assert "rtpurbo" in modules
    assert not modules & {"torch", "transformers", "triton", "matplotlib", "rich", "numpy", "jsonschema"}


def test_the_version_is_the_one_in_pyproject():
    import rtpurbo

    assert rtpurbo.__version__ == PROJECT["project"]["version"]
