"""An opened conversion: model, tokenizer, recipe and work folder, checked before any work starts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from rtpurbo.converter import catalog, checkpoint
from rtpurbo.converter.checkpoint import Checkpoint, open_checkpoint
from rtpurbo.converter.data import STAGE1_DATA, STAGE2_DATA, DataSource, Document, load_documents
from rtpurbo.converter.recipe import RECIPE_NAME, Recipe
from rtpurbo.converter.work import WorkFolder, binding_digest
from rtpurbo.manifests import architectures
from rtpurbo.manifests.manifest import Manifest, file_digest

ROLES_NAME = "roles.json"


class Reporter(Protocol):
    """Hears what a conversion does: the command line draws it, a library user may pass an object of their own."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units begins."""
        ...

    def advance(self, facts: Mapping[str, Any]) -> None:
        """One unit of the stage is done."""
        ...

    def note(self, text: str) -> None:
        """A fact worth a line."""
        ...


class Silence:
    """The Reporter that says nothing."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, facts: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What all steps need: the opened checkpoint (RoPE scaling applied), its tokenizer, the recipe and the work folder."""

    source: Checkpoint
    tokenizer: Any
    recipe: Recipe
    work: WorkFolder
    device: str
    report: Reporter
    inputs: str
    is_new: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of frozen passes and of autocast."""
        return getattr(torch, self.recipe.dtype)

    def roles(self) -> Manifest:
        """The manifest of the calibrated roles; ValueError when calibration has not finished."""
        path = self.work.path(ROLES_NAME)
        if not path.exists():
            raise ValueError(f"{self.work.folder}: calibration has not finished ({ROLES_NAME} is missing); run `rtpurbo calibrate` first")
        return Manifest.load(path)

    def data_source(self, stage: str) -> DataSource:
        """Where a stage ("indexer" or "distill") reads its text."""
        return DataSource.parse(getattr(self.recipe, f"{stage}_data") or (STAGE1_DATA if stage == "indexer" else STAGE2_DATA))

    def documents(
        self, stage: str, split: Literal["train", "heldout"], count: int, shortest: int, longest: int, *, at_least: int | None = None
    ) -> list[Document]:
        """Documents of the stage's data source with `answer_tokens` marked."""
        return load_documents(
            self.data_source(stage),
            self.tokenizer,
            min_tokens=shortest,
            max_tokens=longest,
            count=count,
            seed=self.recipe.seed,
            answer_tokens=min(self.recipe.answer_tokens, shortest - 1),
            split=split,
            at_least=at_least,
        )


def begin(
    model: str,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    revision: str | None = None,
    report: Reporter | None = None,
) -> Conversion:
    """Open model and work folder. Nothing is left behind when this fails on a folder that it created."""
    report = Silence() if report is None else report
    resolved = catalog.resolve_model(model)
    if resolved.substituted:
        report.note(resolved.substituted)
    chosen = Recipe.preset_named("demo" if resolved.kind == "demo" else "paper") if recipe is None else recipe
    device = _device(chosen.device)
    existed, work = folder.exists(), WorkFolder(folder)
    try:
        work = WorkFolder.open(folder, chosen, model, revision, resume=resume)
        source = open_checkpoint(model, work=folder, revision=revision)
        if chosen.rope_scaling:
            source = dataclasses.replace(source, config=checkpoint.config_with_rope_scaling(source.config, chosen.rope_scaling))
        _check_recipe(chosen, source)
        if source.revision is None:
            report.stage("digest of the weights", 1)
            source = dataclasses.replace(source, revision=_weights_digest(source))
            report.advance({})
        tokenizer = _tokenizer(source.folder)
        inputs = binding_digest(source.id, source.revision, checkpoint.config_digest(source.config))
        if (found := work.read("inputs.json")) is None:
            work.write("inputs.json", {"digest": inputs})
        elif found["digest"] != inputs:
            raise ValueError(f"{folder}: was begun with other weights of {source.id!r}; remove it to start again")
    except BaseException:
        if not existed and folder.exists():
            work.remove()
        raise
    parts: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "recipe": chosen, "work": work}
    return Conversion(**parts, device=device, report=report, inputs=inputs, is_new=not existed)


def reopen(folder: Path, *, report: Reporter | None = None) -> Conversion:
    """Open the work folder of a conversion that was begun, with the model and recipe that it records."""
    work = WorkFolder.existing(folder)
    recipe = Recipe.from_toml(work.path(RECIPE_NAME))
    record = work.read("conversion.json")
    return begin(record["model"], folder, recipe=recipe, resume=True, revision=record["revision"], report=report)


def _check_recipe(recipe: Recipe, source: Checkpoint) -> None:
    head_dim, positions = architectures.head_dim_of(source.config), source.config["max_position_embeddings"]
    if recipe.index_dim > head_dim:
        raise ValueError(f"index_dim is {recipe.index_dim}, wanted at most the model's head_dim {head_dim}")
    for name in ("calibration_tokens", "indexer_max_tokens", "distill_max_tokens", "evaluation_tokens"):
        if (value := getattr(recipe, name)) > positions:
            raise ValueError(
                f"{name} is {value}, but {source.id} has max_position_embeddings {positions}: lower it, or stretch the model with "
                f"--rope-scaling yarn:{-(-value // positions)}"
            )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # For some model types transformers makes a tokenizer without any token when there is no file of one.
    if checkpoint.tokenizer_digest(folder) is None:
        raise ValueError(f"{folder}: has no tokenizer, wanted tokenizer.json, tokenizer.model, or vocab.json and merges.txt")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{folder}: has no tokenizer that transformers can load ({str(error).splitlines()[0][:200]})") from error


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0][:120]})") from error
    return name


def _weights_digest(source: Checkpoint) -> str:
    files = sorted({info.file for info in source.tensors.values()})
    return "sha256:" + binding_digest([file_digest(Path(file)).sha256 for file in files])
