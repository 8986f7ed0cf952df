"""The conversion as a linear script: calibrate -> stage 1 -> stage 2 -> package, each step resumable in one work folder."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import rtpurbo
from rtpurbo.converter import checkpoint
from rtpurbo.converter.align import align
from rtpurbo.converter.attention import IMPLEMENTATION, SparseSpec
from rtpurbo.converter.calibrate import Calibration, calibrate, choose_roles, rank_stability
from rtpurbo.converter.checkpoint import Checkpoint, load_model, load_rotary
from rtpurbo.converter.conversion import ROLES_NAME, Conversion, Reporter, begin
from rtpurbo.converter.data import Document, data_digest
from rtpurbo.converter.distill import cache_teacher, distill
from rtpurbo.converter.evaluate import evaluate_indexers, evaluate_model, routing_agreement, routing_choices
from rtpurbo.converter.indexer import index_scale, initial_indexer, mean_rotation, random_indexer
from rtpurbo.converter.needle import NeedleDocument, NeedleQuestion, calibration_documents, needle_questions
from rtpurbo.converter.package import write_artifact
from rtpurbo.converter.recipe import RECIPE_NAME, Recipe
from rtpurbo.converter.work import binding_digest, readable, write_tensors
from rtpurbo.manifests import architectures
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, file_digest, roles_from_heads
from rtpurbo.manifests.output import check_space, refuse_existing

_INDEXER = "indexer.safetensors"
_FINAL_INDEXER = "indexer-final.safetensors"
_STUDENT = "student.safetensors"
_LOGS = ("indexer.jsonl", "distill.jsonl", "realign.jsonl")


def convert(
    model: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    resume: bool = False,
    revision: str | None = None,
    keep_work: bool = False,
    report: Reporter | None = None,
) -> Path:
    """Convert a checkpoint into an artifact folder and return its path.

    Args:
        model: Hub id, local folder, or "demo".
        out: folder to create; it appears by rename when everything is done. Unfinished work stays in `<out>.work`.
        recipe: all options (default: the preset `paper`, or `demo` for the model "demo").
        resume: continue in `<out>.work`.
        keep_work: leave `<out>.work` behind.

    Raises ValueError with one sentence for anything the user can mend.
    """
    out = Path(out)
    refuse_existing(out)
    conversion = begin(model, work_folder(out), recipe=recipe, resume=resume, revision=revision, report=report)
    try:
        # The artifact is as large as the source: hours of training are no time to learn that it does not fit.
        check_space(out, conversion.source.size_bytes)
        run_calibration(conversion)
        run_indexer(conversion)
        run_distillation(conversion)
        run_package(conversion, out)
    except Exception as error:
        if conversion.work.folder.exists():
            error.add_note(f"{conversion.work.folder} keeps what is finished: continue with --resume")
        raise
    if not keep_work:
        conversion.work.remove()
    return out


def work_folder(out: Path) -> Path:
    """Where the conversion into `out` keeps its unfinished work."""
    return out.with_name(out.name + ".work")


def run_calibration(c: Conversion) -> Manifest:
    """Needle scores and roles; writes calibration.safetensors and the manifest of the roles. Source: docs/method.md, Roles."""
    if c.work.path(ROLES_NAME).exists():
        return c.roles()
    try:
        documents = _needle_documents(c)
        _check_data(c)
    except Exception:
        if c.is_new:  # nothing was computed, so there is nothing to resume
            c.work.remove()
        raise
    c.report.stage("calibrate", c.source.config["num_hidden_layers"])
    result = calibrate(c.source, documents, dtype=c.dtype, device=c.device, on_layer=lambda i: c.report.advance({"layer": i}))
    result.save(c.work.path("calibration.safetensors"))
    manifest = _manifest(c, result, documents)
    manifest.save(c.work.path(ROLES_NAME))
    stability = manifest.calibration["rank_stability"]
    c.report.note(
        f"{manifest.num_retrieval_heads} retrieval heads in {manifest.num_retained_groups} KV groups; documents agree on "
        f"{stability['top_overlap']:.0%} of the top {stability['num_top']} heads (Spearman {stability['spearman']:.2f})"
    )
    return manifest


def run_indexer(c: Conversion) -> None:
    """Stage 1: initialise from data, align, measure on held-out text; writes indexer.safetensors and indexer.json."""
    if c.work.path("indexer.json").exists():
        return
    manifest, r = c.roles(), c.recipe
    spec = sparse_spec(manifest)
    rotary = load_rotary(c.source, device=c.device)
    limit = max(r.sliding_window + 1, r.indexer_max_tokens)
    rotation = mean_rotation(rotary, manifest.model.head_dim, min(r.sliding_window, limit - 1), limit, c.device)
    calibration_path = c.work.path("calibration.safetensors")
    with readable(calibration_path, f"calibrate again, and {ROLES_NAME} with it"):
        calibration = Calibration.load(calibration_path)
    initial = initial_indexer(calibration, spec.retrieval_heads, spec.key_sets, rotation, r.index_dim)
    documents = c.documents("indexer", "train", max(1, r.indexer_steps), r.indexer_min_tokens, r.indexer_max_tokens, at_least=1)
    heldout = c.documents("indexer", "heldout", r.evaluation_documents, r.evaluation_tokens, r.evaluation_tokens)
    model = load_model(c.source, dtype=c.dtype, device=c.device, attn_implementation=IMPLEMENTATION)
    c.report.stage("stage 1: indexer", r.indexer_steps)
    trained = align(model, c.source.architecture, spec, initial, documents, r, c.work, inputs=c.inputs, on_step=c.report.advance)
    indexers = {"random": random_indexer(manifest.index_shapes(), r.seed), "initial": initial, "trained": trained}
    result = evaluate_indexers(model, c.source.architecture, spec, indexers, heldout)
    write_tensors(c.work.path(_INDEXER), trained)
    c.work.write("indexer-data.json", {"train": data_digest(documents), "heldout": data_digest(heldout)})
    c.work.write("indexer.json", result)
    if trained:
        c.report.note(
            "true attention mass on 5 % of the tokens: "
            + ", ".join(f"{name} {result[name]['mass_5_percent']:.3f}" for name in ("random", "initial", "trained", "oracle"))
        )


def run_distillation(c: Conversion) -> None:
    """Stage 2: cache the teacher, measure, self-distil, measure again; writes student.safetensors and distillation.json."""
    if c.work.path("distillation.json").exists():
        return
    manifest, r = c.roles(), c.recipe
    if not c.work.path("indexer.json").exists():
        raise ValueError(f"{c.work.folder}: stage 1 has not finished (indexer.json is missing); run `rtpurbo train-indexer` first")
    spec, indexer = sparse_spec(manifest), _indexer(c)
    documents = c.documents(
        "distill", "train", max(1, r.distill_steps * r.distill_batch), r.distill_min_tokens, r.distill_max_tokens, at_least=1
    )
    heldout = c.documents("distill", "heldout", r.evaluation_documents, r.evaluation_tokens, r.evaluation_tokens)
    questions = _questions(c, heldout)
    # Autocast needs the stored precision at least; without it everything is computed in fp32.
    dtype = torch.float32 if c.dtype == torch.float32 else _source_dtype(c.source)
    model = load_model(c.source, dtype=dtype, device=c.device, attn_implementation=IMPLEMENTATION)
    teachers = {"train": documents, "heldout": heldout}
    c.report.stage("teacher logits", len(documents) + len(heldout))
    for name, docs in teachers.items():
        cache_teacher(
            model,
            docs,
            c.work.path(f"teacher-{name}"),
            top_k=r.teacher_top_k,
            dtype=c.dtype,
            inputs=c.inputs,
            on_document=lambda n: c.report.advance({"document": n}),
        )

    def measure(spec: SparseSpec | None) -> dict[str, float]:
        c.report.advance({})
        return evaluate_model(model, c.source.architecture, spec, indexer, heldout, c.work.path("teacher-heldout"), questions, c.dtype)

    if (before := c.work.read("before.json")) is None:
        c.report.stage("evaluate before stage 2", 2)
        before = {"full": measure(None), "sparse_before": measure(spec)}
        c.work.write("before.json", before)
    routing_path = c.work.path("teacher-routing.safetensors")
    if not routing_path.exists():
        write_tensors(routing_path, routing_choices(model, c.source.architecture, None, indexer, heldout, c.dtype))
    with readable(routing_path, "compute it again"):
        teacher_routing = load_file(routing_path)
    c.report.stage("stage 2: distillation", r.distill_steps)
    student = distill(
        model,
        c.source.architecture,
        spec,
        indexer,
        documents,
        c.work.path("teacher-train"),
        r,
        c.work,
        inputs=binding_digest(c.inputs, file_digest(c.work.path(_INDEXER)).sha256),
        on_step=c.report.advance,
    )
    if r.realign_steps:
        indexer = _realign(c, model, spec, indexer)
    c.report.stage("evaluate after stage 2", 2)
    result = {**before, "sparse_after": measure(spec), "full_after": measure(None)}
    kept = evaluate_indexers(model, c.source.architecture, spec, {"trained": indexer}, heldout)
    if teacher_routing:
        sparse_routing = routing_choices(model, c.source.architecture, spec, indexer, heldout, c.dtype)
        result["sparse_after"]["routing_agreement"] = routing_agreement(teacher_routing, sparse_routing)
    write_tensors(c.work.path(_FINAL_INDEXER), indexer)
    write_tensors(c.work.path(_STUDENT), {name: tensor.to("cpu", c.source.tensors[name].dtype) for name, tensor in student.items()})
    digests = {"train": data_digest(documents), "heldout": data_digest(heldout)}
    data = {"indexer": c.work.read("indexer-data.json"), "distill": digests}
    c.work.write("distillation.json", {"model": result, "indexer_after_distillation": kept, "data": data})
    c.report.note("; ".join(f"{name}: {_facts(result[name])}" for name in ("full", "sparse_before", "sparse_after")))


def run_package(c: Conversion, out: Path) -> Manifest:
    """Stream the distilled weights, manifest and indexer into `out`."""
    if not c.work.path("distillation.json").exists():
        raise ValueError(f"{c.work.folder}: stage 2 has not finished (distillation.json is missing); run `rtpurbo distill` first")
    c.report.stage("package", 1)
    metrics = {"indexer": c.work.read("indexer.json"), **c.work.read("distillation.json")}
    summary = {
        "indexer": {name: _without_heads(values) for name, values in metrics["indexer"].items()},
        "indexer_after_distillation": _without_heads(metrics["indexer_after_distillation"].get("trained", {})),
        "model": metrics["model"],
    }
    student = c.work.path(_STUDENT)
    with readable(student, "distil again, and distillation.json with it"), safe_open(student, framework="pt") as file:
        readers: dict[str, Callable[[], torch.Tensor]] = {name: (lambda n=name: file.get_tensor(n)) for name in file.keys()}  # noqa: SIM118
        logs = {path.name: path.read_bytes() for path in map(c.work.path, _LOGS) if path.exists()}
        manifest = write_artifact(
            out,
            c.source,
            dataclasses.replace(c.roles(), metrics=summary),
            indexer=_indexer(c, _FINAL_INDEXER),
            student=readers,
            recipe_toml=c.work.path(RECIPE_NAME).read_text(encoding="utf-8"),
            metrics=metrics,
            extra_files=logs,
        )
    c.report.advance({})
    return manifest


def sparse_spec(manifest: Manifest) -> SparseSpec:
    """The training pattern that a manifest describes."""
    return SparseSpec(
        retrieval_heads=[layer.retrieval_heads for layer in manifest.layers],
        key_sets=[manifest.key_sets(i) for i in range(len(manifest.layers))],
        window=manifest.sliding_window,
        sinks=manifest.sinks,
        top_p=manifest.top_p,
        block_size=manifest.decode_block,
        index_scale=manifest.indexer.scale,
    )


def _needle_documents(c: Conversion) -> list[NeedleDocument]:
    r = c.recipe
    filler = c.documents("indexer", "train", r.calibration_documents, r.calibration_tokens, r.calibration_tokens)
    return calibration_documents(
        c.tokenizer,
        [d.token_ids.tolist() for d in filler],
        count=r.calibration_documents,
        tokens=r.calibration_tokens,
        needle_tokens=r.needle_tokens,
        window=r.sliding_window,
        seed=r.seed,
    )


def _check_data(c: Conversion) -> None:
    """Read the beginning of every stage's data, so that what a later stage would refuse is refused before hours of work."""
    r = c.recipe
    c.documents("indexer", "train", 1, r.indexer_min_tokens, r.indexer_max_tokens)
    c.documents("distill", "train", 1, r.distill_min_tokens, r.distill_max_tokens)
    for stage in ("indexer", "distill"):
        heldout = c.documents(stage, "heldout", r.evaluation_documents, r.evaluation_tokens, r.evaluation_tokens)
    _questions(c, heldout)


def _questions(c: Conversion, heldout: list[Document]) -> list[NeedleQuestion]:
    r = c.recipe
    return needle_questions(
        c.tokenizer,
        [d.token_ids.tolist() for d in heldout],
        count=r.evaluation_needles,
        tokens=r.evaluation_tokens,
        window=r.sliding_window,
        seed=r.seed,
    )


def _manifest(c: Conversion, calibration: Calibration, documents: list[Any]) -> Manifest:
    config, r = c.source.config, c.recipe
    shape = ModelShape(
        model_type=config["model_type"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=architectures.key_value_heads_of(config),
        head_dim=architectures.head_dim_of(config),
        max_position_embeddings=config["max_position_embeddings"],
    )
    scores = [[round(s, 6) for s in row] for row in calibration.scores_LH.tolist()]
    roles = roles_from_heads(scores, choose_roles(scores, r, shape.group_size), shape.group_size)
    num_top = round(r.retrieval_ratio * shape.num_hidden_layers * shape.num_attention_heads)
    return Manifest(
        base_model=BaseModel(
            id=c.source.id,
            revision=c.source.revision,
            config_sha256=checkpoint.config_digest(config),
            tokenizer_sha256=checkpoint.tokenizer_digest(c.source.folder),
        ),
        model=shape,
        granularity=r.granularity,
        group_threshold=r.group_threshold,
        layers=roles,
        sliding_window=r.sliding_window,
        sinks=r.sinks,
        indexer=Indexer(dim=r.index_dim, keys=r.index_keys, scale=index_scale(shape.head_dim), key_dtype=r.index_key_dtype),
        top_p=r.top_p,
        decode_block=r.decode_block,
        prefill_block=r.prefill_block,
        prefill_pattern=r.prefill_pattern,
        dense_below=r.dense_below,
        prefill_top_p=r.prefill_top_p or None,
        calibration={
            "documents": [{"tokens": len(d.token_ids), "earlier": d.earlier, "later": d.later, "needle": d.needle} for d in documents],
            "rank_stability": rank_stability(calibration.scores_NLH, num_top),
        },
        # By name, never by path; metrics.json has the digest of every document set.
        recipe={**r.provenance(), **{f"{stage}_data": c.data_source(stage).name for stage in ("indexer", "distill")}},
        libraries={module.__name__: module.__version__ for module in (rtpurbo, safetensors, torch, transformers)},
    )


def _indexer(c: Conversion, name: str = _INDEXER) -> dict[str, torch.Tensor]:
    path = c.work.path(name)
    stage = "align again, and indexer.json" if name == _INDEXER else "distil again, and distillation.json"
    with readable(path, f"{stage} with it"):
        return load_file(path)


def _realign(c: Conversion, model: Any, spec: SparseSpec, indexer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A short second stage 1 on the distilled weights, whose queries and keys have moved away from those the indexer was trained on."""
    short = dataclasses.replace(
        c.recipe, indexer_steps=c.recipe.realign_steps, indexer_warmup=min(c.recipe.indexer_warmup, c.recipe.realign_steps // 2)
    )
    count, r = max(1, short.indexer_steps), short
    documents = c.documents("indexer", "train", count, r.indexer_min_tokens, r.indexer_max_tokens, at_least=1)
    c.report.stage("re-alignment", short.indexer_steps)
    inputs = binding_digest(c.inputs, "distilled")
    architecture, report = c.source.architecture, c.report.advance
    return align(model, architecture, spec, indexer, documents, short, c.work, stage="realign", inputs=inputs, on_step=report)


def _source_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype of the checkpoint's embedding: what training copies start from and the artifact is stored in."""
    return source.tensors["model.embed_tokens.weight"].dtype


def _without_heads(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "heads"}


def _facts(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
