"""The work folder of a conversion: what each stage leaves there, bound to its inputs, written by rename, read back on resume."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rtpurbo.converter.recipe import RECIPE_NAME, Recipe


class WorkFolder:
    """`<out>.work`: recipe.toml, stage results, optimiser states, teacher logits and step metrics of one conversion."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, model: str, revision: str | None, *, resume: bool) -> "WorkFolder":
        """Create the folder, or continue in it when `resume` is set and model and recipe are the same.

        Raises ValueError when it exists and `resume` is not set, or when what it holds was made from something else.
        """
        work = cls(folder)
        binding = {"model": model, "revision": revision, "recipe": recipe.provenance()}
        if folder.exists() and not (resume and _never_begun(folder)):
            found = work.read("conversion.json")
            if not isinstance(found, dict):
                raise ValueError(
                    f"{folder}: exists, but is not the work folder of a conversion (no conversion.json in it); remove or rename it"
                )
            if not resume:
                raise ValueError(f"{folder}: holds an unfinished conversion; add --resume to continue it, or remove the folder")
            for key, wanted in _flat(binding):
                if (value := dict(_flat(found)).get(key)) != wanted:
                    raise ValueError(
                        f"{folder}/conversion.json: {key} is {value!r}, but this run asks for {wanted!r}; it cannot be resumed"
                    )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            work.write("conversion.json", binding)
        write_text(folder / RECIPE_NAME, recipe.to_toml())
        return work

    @classmethod
    def existing(cls, folder: Path) -> "WorkFolder":
        """The folder of a conversion that was begun; ValueError when there is none."""
        if not (folder / "conversion.json").is_file():
            raise ValueError(f"{folder}: no conversion was begun here (conversion.json is missing); run `rtpurbo calibrate` first")
        return cls(folder)

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    def read(self, name: str) -> Any:
        """A JSON result, or None when that stage has not finished; ValueError when the file is damaged."""
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable JSON file ({error})") from error

    def write(self, name: str, body: Any) -> None:
        """Write a JSON result; it appears complete or not at all."""
        write_text(self.folder / name, json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n")

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        shutil.rmtree(self.folder)


class StepLog:
    """One JSON object a training step; on resume the lines from the first repeated step on are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        try:
            kept = [line for line in self._lines() if json.loads(line)["step"] < first_step]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is damaged ({error}); remove it and the state of its stage to start the stage again") from error
        write_text(path, "".join(line + "\n" for line in kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a step's record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")

    def _lines(self) -> Iterator[str]:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").split("\n"):
                # A process killed inside a write leaves a last line without its end.
                if line.endswith("}"):
                    yield line


def save_training_state(
    path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, step: int, binding: str
) -> None:
    """Parameters and Adam moments after `step` steps, as safetensors bound to the stage's inputs; replaces the file by rename."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors[f"first_moment.{name}"] = state["exp_avg"]
        tensors[f"second_moment.{name}"] = state["exp_avg_sq"]
    write_tensors(path, tensors, {"step": str(step), "binding": binding})


def load_training_state(path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, binding: str) -> int:
    """Restore what `save_training_state` wrote and return its step; 0 when there is no file. ValueError: other inputs, damage."""
    if not path.exists():
        return 0
    with readable(path, "start this stage again"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("binding") != binding:
            raise ValueError(f"{path}: was written for other data or another model; remove it to start this stage again")
        step = int(metadata["step"])
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"parameter.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"first_moment.{name}").to(parameter.device),
                "exp_avg_sq": file.get_tensor(f"second_moment.{name}").to(parameter.device),
            }
    return step


@contextmanager
def readable(path: Path, remedy: str) -> Iterator[None]:
    """Around reading a safetensors file of the work folder: damage becomes a ValueError that says what removing the file does."""
    try:
        yield
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: is damaged or missing ({str(error).splitlines()[0][:200]}); remove it to {remedy}") from error


def binding_digest(*parts: Any) -> str:
    """sha256 (hex) of JSON values: what a state or cache was computed from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file by rename."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
    except OSError as error:
        # A failed write, unlike a failed open, does not say of which file.
        error.filename = error.filename or str(partial)
        raise
    partial.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file by rename. ValueError when it cannot be written, with what was there before left as it is."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written ({str(error).splitlines()[0][:200]})") from error
    partial.replace(path)


def _never_begun(folder: Path) -> bool:
    """Whether a process was killed between creating the folder and its record."""
    return folder.is_dir() and all(entry.name == "conversion.json.partial" for entry in folder.iterdir())


def _flat(body: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in body.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
