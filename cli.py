"""The command line: a command turns its options into one call of a plain function; heavy imports happen inside commands."""

import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from rtpurbo import __version__
from rtpurbo.converter.recipe import HELP, PRESETS, RECIPE_NAME, Recipe


class _Commands(click.Group):
    """Turns what the user can mend into one sentence and exit code 2; our own mistakes keep their traceback."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        given = list(args)
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except click.UsageError as error:
            if not given:  # click's way to print the help
                raise
            raise _misused(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            more = "; the conversion continues with --resume" if ctx.invoked_subcommand in ("convert", "calibrate") else ""
            click.echo(f"interrupted{more}", err=True)
            ctx.exit(130)
        except click.UsageError as error:
            raise _misused(error) from error
        except BrokenPipeError:  # `rtpurbo ... | head`: click ends quietly
            raise
        except (ValueError, OSError) as error:
            raise _Refusal(_sentence(error)) from error
        except (MemoryError, RuntimeError) as error:
            # Allocations that fail on the CPU or a GPU have no class of their own.
            if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
                raise _Refusal(_sentence(error, "not enough memory; `rtpurbo plan` says what each stage needs")) from error
            raise
        except Exception as error:
            if type(error).__name__ == "SafetensorError":
                raise _Refusal(_sentence(error)) from error
            raise


class _Refusal(click.ClickException):
    exit_code = 2


def _misused(error: click.UsageError) -> _Refusal:
    where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return _Refusal(" ".join(error.format_message().split()) + where)


_NO_MEMORY = re.compile("(not enough|out of|can't allocate) memory|can't start new thread")


def _sentence(error: BaseException, said: str = "") -> str:
    said = said or (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return "; ".join([said, *getattr(error, "__notes__", [])])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="rtpurbo")
def main() -> None:
    """Turn a full-attention Hugging Face LLM into a head-wise sparse one, and run it."""
    # Chatter of libraries would bury the one line that matters; errors still arrive as exceptions.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every field of Recipe; an option that is not given leaves the preset's value."""
    hints = typing.get_type_hints(Recipe)
    for field in reversed(dataclasses.fields(Recipe)):
        if field.name == "preset":
            continue
        hint = hints[field.name]
        kind = click.Choice(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else hint
        shown = f"{HELP[field.name]}  [paper: {field.default}]" if field.default != "" else HELP[field.name]
        command = click.option(f"--{field.name.replace('_', '-')}", field.name, type=kind, default=None, help=shown)(command)
    command = click.option("--data", default=None, help="Data of every stage: text, JSONL or parquet file, folder, Hub data set.")(command)
    command = click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="Read the recipe from a TOML file.")(command)
    return click.option(
        "--preset", type=click.Choice(list(PRESETS)), default=None, help="Set of defaults  [demo for MODEL `demo`, else paper]"
    )(command)


def _recipe(model: str, options: dict[str, Any]) -> Recipe:
    preset, file, data = options.pop("preset"), options.pop("recipe_file"), options.pop("data")
    given = {name: value for name, value in options.items() if value is not None}
    if data is not None:
        given = {"indexer_data": data, "distill_data": data, **given}
    if file is not None:
        if preset is not None:
            raise ValueError("--recipe and --preset exclude each other")
        return dataclasses.replace(Recipe.from_toml(file), **given)
    return Recipe.preset_named(preset or ("demo" if model == "demo" else "paper"), **given)


_model = click.argument("model")
_resume = click.option("--resume", is_flag=True, help="Continue an interrupted run.")
_revision = click.option("--revision", default=None, help="Branch, tag or commit of a Hub id.")
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
_work = click.option("--work", required=True, type=click.Path(path_type=Path), help="Work folder of the conversion.")
_out = click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create.")


@main.command(short_help="Convert a model into an artifact, all steps.")
@_model
@_out
@_resume
@_revision
@click.option("--keep-work", is_flag=True, help="Leave the work folder OUT.work behind.")
@click.option("--engine", is_flag=True, help="Build a TensorRT engine into OUT-engine afterwards (see build-engine).")
@_json
@_recipe_options
def convert(
    model: str, out: Path, resume: bool, revision: str | None, keep_work: bool, engine: bool, as_json: bool, **options: Any
) -> None:
    """Convert MODEL (Hub id, folder or `demo`) into an artifact: calibrate, align, distil, package."""
    from rtpurbo.converter.convert import convert as run
    from rtpurbo.converter.progress import Progress
    from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest

    recipe = _recipe(model, options)
    engine_out = out.with_name(out.name + "-engine")
    if engine:
        from rtpurbo.manifests.output import refuse_existing
        from rtpurbo.plugins.trt.library import require_installed

        require_installed("onnx", "triton")
        from rtpurbo.plugins.trt.build import BuildOptions, build, check_can_build

        refuse_existing(engine_out)
        check_can_build()
    with Progress() as report:
        if recipe.preset == "demo":
            report.note("preset demo: window, lengths and steps are scaled down for a CPU; it shows the path, not the paper's quality")
        run(model, out, recipe=recipe, resume=resume, revision=revision, keep_work=keep_work, report=report)
        if engine:
            build(out, engine_out, BuildOptions(), report)
    manifest = Manifest.load(out / MANIFEST_NAME)
    if as_json:
        click.echo(json.dumps({"out": str(out), "digest": manifest.to_dict()["digest"], "metrics": manifest.metrics}))
    else:
        click.echo(f"{out}: {manifest.num_retrieval_heads} retrieval heads, {manifest.num_retained_groups} full KV groups")


@main.command(short_help="Score the heads and choose their roles.")
@_model
@_work
@_resume
@_revision
@_recipe_options
def calibrate(model: str, work: Path, resume: bool, revision: str | None, **options: Any) -> None:
    """Score the heads of MODEL on needle documents and choose their roles."""
    from rtpurbo.converter.conversion import begin
    from rtpurbo.converter.convert import run_calibration
    from rtpurbo.converter.progress import Progress

    with Progress() as report:
        run_calibration(begin(model, work, recipe=_recipe(model, options), resume=resume, revision=revision, report=report))


@main.command("train-indexer", short_help="Stage 1: align the indexer.")
@_work
def train_indexer(work: Path) -> None:
    """Stage 1: align the indexer of a calibrated work folder."""
    from rtpurbo.converter.conversion import reopen
    from rtpurbo.converter.convert import run_indexer
    from rtpurbo.converter.progress import Progress

    with Progress() as report:
        run_indexer(reopen(work, report=report))


@main.command(short_help="Stage 2: distil the sparse model.")
@_work
def distill(work: Path) -> None:
    """Stage 2: distil the sparse model of a work folder on the original."""
    from rtpurbo.converter.conversion import reopen
    from rtpurbo.converter.convert import run_distillation
    from rtpurbo.converter.progress import Progress

    with Progress() as report:
        run_distillation(reopen(work, report=report))


@main.command(short_help="Write the artifact of a finished work folder.")
@_work
@_out
def package(work: Path, out: Path) -> None:
    """Write the artifact of a finished work folder."""
    from rtpurbo.converter.conversion import reopen
    from rtpurbo.converter.convert import run_package
    from rtpurbo.converter.progress import Progress
    from rtpurbo.manifests.output import refuse_existing

    refuse_existing(out)
    with Progress() as report:
        run_package(reopen(work, report=report), out)


def _loading(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16.")(command)
    return click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")(command)


@main.command(short_help="Generate text from an artifact.")
@click.argument("artifact")
@click.option("-p", "--prompt", multiple=True, help="Prompt text; may be given several times for one batch.")
@click.option("--prompt-file", type=click.Path(path_type=Path, dir_okay=False), multiple=True, help="File with one prompt; may repeat.")
@click.option("--chat/--no-chat", default=True, help="Use the chat template, where the artifact has one.")
@click.option("--max-new-tokens", type=int, default=256, help="Tokens generated at most.")
@click.option("--temperature", type=float, default=0.0, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, help="Nucleus sampling; not the selection's top-p.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may repeat.")
@click.option("--seed", type=int, default=0, help="Same seed, same tokens.")
@click.option("--prefill-chunk", type=int, default=None, help="Prompt tokens processed at a time  [8192 on a GPU, else 1024]")
@click.option("--roles", type=click.Choice(["manifest", "all-local", "all-retrieval"]), default="manifest", help="Roles, or an ablation.")
@click.option("--selection-top-p", type=float, default=None, help="Replace the manifest's selection top-p (1: retrieval heads dense).")
@click.option("--stream/--no-stream", default=True, help="Print text as it comes (one prompt, not with --json).")
@_revision
@_loading
@_json
def generate(
    artifact: str,
    prompt: tuple[str, ...],
    prompt_file: tuple[Path, ...],
    chat: bool,
    roles: Any,
    selection_top_p: float | None,
    stream: bool,
    revision: str | None,
    device: str,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate from an ARTIFACT (folder or Hub id) or the folder of an engine; prompts come from options, files or standard input."""
    from rtpurbo.plugins.trt.folder import is_engine_folder

    prompts = [*prompt, *(_decoded(path.read_bytes(), str(path)) for path in prompt_file)]
    if not prompts:
        if sys.stdin.isatty():
            click.echo("reading the prompt from standard input; end it with Ctrl-D", err=True)
        prompts = [_decoded(sys.stdin.buffer.read(), "standard input")]
    if is_engine_folder(artifact):
        runtime = _engine(artifact, device=device, dtype=dtype, roles=roles, revision=revision, selection_top_p=selection_top_p)
    else:
        from rtpurbo.runtime.loader import load

        runtime = load(artifact, device=device, dtype=dtype, roles=roles, revision=revision, top_p=selection_top_p)
    streaming = stream and not as_json and len(prompts) == 1
    chat = chat and getattr(runtime.tokenizer, "chat_template", None) is not None
    on_text = (lambda _i, text: click.echo(text, nl=False)) if streaming else None
    answers = runtime.generate(prompts, chat=chat, on_text=on_text, **options)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(answer) for answer in answers]))
    elif streaming:
        click.echo()
    else:
        for i, answer in enumerate(answers):
            click.echo(answer.text if len(answers) == 1 else f"[{i}] {answer.text}")


def _engine(folder: str | Path, **fixed: Any) -> Any:
    """Load an engine; ValueError for an option that was decided when it was built."""
    from rtpurbo.plugins.trt.library import require_installed

    require_installed("triton")
    from rtpurbo.plugins.trt.run import load_engine

    for name, value in fixed.items():
        if value not in (None, "auto", "manifest"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: {folder} is an engine, which has this built in")
    return load_engine(folder)


@main.command("build-engine", short_help="Build a TensorRT engine of an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@_out
@click.option("--library", type=click.Choice(["tensorrt", "tensorrt-rtx"]), default=None, help="TensorRT library  [the first installed]")
@click.option("--capability", "capabilities", type=int, multiple=True, help="Compute capability of the kernels (may repeat)  [80 86 89 90]")
@click.option("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16.")
@click.option("--batch", type=int, default=4, help="Sequences decoded together at most.")
@click.option("--capacity", type=int, default=None, help="Tokens of a sequence at most  [max_position_embeddings]")
@click.option("--prefill-chunk", type=int, default=8192, help="Prompt tokens processed at a time at most.")
@click.option("--dense", is_flag=True, help="Full attention, for prompts below the manifest's dense_below.")
@_json
def build_engine(artifact: Path, out: Path, capabilities: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine of an ARTIFACT folder, with this project's kernels as plugins."""
    from rtpurbo.converter.progress import Progress
    from rtpurbo.plugins.trt.library import require_installed

    require_installed("onnx", "triton")
    from rtpurbo.plugins.trt.build import CAPABILITIES, BuildOptions, build

    with Progress() as report:
        info = build(artifact, out, BuildOptions(capabilities=capabilities or CAPABILITIES, **options), report)
    if as_json:
        click.echo(json.dumps({"out": str(out), **dataclasses.asdict(info)}))
    else:
        click.echo(
            f"{out}: {info.library} {info.library_version}, {info.dtype}, {info.plan_bytes / 2**20:.0f} MiB, {info.build['seconds']} s"
        )


@main.command(short_help="Show roles, scores and cache sizes.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), help="Heat map of the scores as .png or .svg.")
@_json
def inspect(artifact: Path, plot_file: Path | None, as_json: bool) -> None:
    """Show roles, scores, sparsity and cache sizes of an ARTIFACT folder."""
    from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest
    from rtpurbo.manifests.report import describe, plot, render

    manifest = Manifest.load(artifact / MANIFEST_NAME)
    if plot_file is not None:
        plot(manifest, plot_file)
    if as_json:
        click.echo(json.dumps(describe(manifest)))
    else:
        render(manifest, _console())


@main.command(short_help="Check an artifact, and sparse against dense.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--tokens", "num_tokens", type=int, default=512, help="Length of the text on which both forms are compared.")
@click.option("--against", type=click.Path(path_type=Path), help="The artifact that an engine was built from.")
@_loading
@_json
def verify(artifact: Path, num_tokens: int, against: Path | None, device: str, dtype: str, as_json: bool) -> None:
    """Check schema, digests and shapes of an ARTIFACT folder, and sparse against dense attention on a short text.

    Given the folder of an engine: check it, and compare its logits with those of the artifact that --against names.
    """
    from rtpurbo.plugins.trt.folder import is_engine_folder

    if is_engine_folder(artifact):
        from rtpurbo.plugins.trt.library import require_installed

        require_installed("triton")
        from rtpurbo.plugins.trt.verify import verify_engine

        if against is None or (device, dtype) != ("auto", "auto"):
            raise ValueError(
                f"{artifact} is an engine: give the artifact that it was built from with --against, and neither --device nor --dtype"
            )
        report = verify_engine(artifact, against, num_tokens=num_tokens)
    else:
        from rtpurbo.runtime.verify import verify as run

        if against is not None:
            raise ValueError(f"--against {against}: {artifact} is not an engine")
        report = run(artifact, device=device, dtype=dtype, num_tokens=num_tokens)
    click.echo(json.dumps(report) if as_json else "\n".join(f"{name}: {_shown(value)}" for name, value in report.items()))


class _Numbers(click.ParamType):
    """Whole numbers separated by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 4096,32768", param, ctx)


@main.command(short_help="Measure times and memory of an artifact.")
@click.argument("artifact")
@click.option("--tokens", type=_Numbers(), default="4096,32768", help="Prompt lengths.")
@click.option("--batch", type=_Numbers(), default="1", help="Batch sizes.")
@click.option("--new-tokens", type=int, default=64, help="Tokens generated after each prompt.")
@click.option("--chunk", type=int, default=None, help="Prompt tokens processed at a time  [8192 on a GPU, else 1024]")
@click.option("--repeat", type=int, default=3, help="Measured runs of every row.")
@click.option("--dense/--no-dense", default=True, help="Measure dense attention beside the sparse one.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write the rows as CSV.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Plot times over the prompt length as .png or .svg.")
@_revision
@_loading
@_json
def bench(
    artifact: str,
    csv_file: Path | None,
    plot_file: Path | None,
    revision: str | None,
    device: str,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure an ARTIFACT (folder or Hub id) or an engine's folder: time to first token, time per token, memory, sparse beside dense.

    A length or batch size that exceeds the model's positions or the memory is skipped, with the reason in its row.
    """
    from rtpurbo.plugins.trt.folder import is_engine_folder
    from rtpurbo.runtime import bench_report
    from rtpurbo.runtime.bench import Subject
    from rtpurbo.runtime.bench import bench as run
    from rtpurbo.runtime.bench_rows import BenchOptions

    asked = BenchOptions(**options)
    bench_report.check_outputs(csv_file, plot_file)
    if is_engine_folder(artifact):
        engine = _engine(artifact, device=device, dtype=dtype, revision=revision)
        from rtpurbo.plugins.trt.run import bench_subject

        subject = bench_subject(engine)
    else:
        from rtpurbo.runtime.engine import PREFILL_CHUNK
        from rtpurbo.runtime.loader import load

        runtime = load(artifact, device=device, dtype=dtype, revision=revision)
        subject = Subject(
            runtime=runtime,
            config=runtime.model.config.to_dict(),
            dtype=runtime.model.dtype,
            chunk=PREFILL_CHUNK[runtime.device.type],
            form="safetensors",
        )
    rows = run(subject, asked, on_row=lambda row: click.echo(bench_report.line(row), err=True))
    if csv_file is not None:
        bench_report.write_csv(rows, csv_file)
    if plot_file is not None:
        bench_report.plot(rows, plot_file)
    if as_json:
        click.echo(json.dumps(bench_report.as_json(rows)))
    else:
        bench_report.render(rows, _console())


@main.command(short_help="Say what is installed and what works here.")
@_json
def doctor(as_json: bool) -> None:
    """Say what is installed, what works on this machine, and what to install for the rest."""
    from rtpurbo.runtime import doctor as run

    findings = run.diagnose()
    if as_json:
        click.echo(run.as_json(findings))
    else:
        run.render(findings, _console())


@main.command(short_help="Memory and time of a model, from its config.")
@_model
@click.option("--context", type=int, required=True, help="Tokens per sequence to serve.")
@click.option("--batch", type=int, default=1, help="Sequences served together.")
@_revision
@_json
@_recipe_options
def plan(model: str, context: int, batch: int, revision: str | None, as_json: bool, **options: Any) -> None:
    """Parameters, cache, memory and time of converting and serving MODEL, from its config alone."""
    from rtpurbo.converter.checkpoint import config_with_rope_scaling, model_config
    from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest
    from rtpurbo.manifests.plan import PlanOptions
    from rtpurbo.manifests.plan import plan as run

    recipe = _recipe(model, options)
    config = model_config(model, revision=revision)
    if recipe.rope_scaling:
        config = config_with_rope_scaling(config, recipe.rope_scaling)
    shared = {f.name for f in dataclasses.fields(PlanOptions)} & {f.name for f in dataclasses.fields(Recipe)}
    manifest = Path(model) / MANIFEST_NAME
    assumed = PlanOptions(**{name: getattr(recipe, name) for name in shared}, roles=Manifest.load(manifest) if manifest.is_file() else None)
    planned = run(config, context=context, batch=batch, options=assumed)
    if as_json:
        click.echo(json.dumps(planned.to_dict()))
    else:
        planned.render(_console())


@main.command(short_help="Upload an artifact to the Hub.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create the repository as private.")
@click.option("--branch", default=None, help="Branch to upload to  [main]")
@click.option("--license", default=None, help="Licence for the model card.")
@_json
def push(artifact: Path, repo: str, private: bool, branch: str | None, license: str | None, as_json: bool) -> None:
    """Verify an ARTIFACT folder and upload it to the Hub repository REPO (user/name), with a model card."""
    from rtpurbo.converter.hub import push as run

    url = run(artifact, repo, private=private, branch=branch, license=license, progress=lambda line: click.echo(line, err=True))
    click.echo(json.dumps({"url": url}) if as_json else url)


def _decoded(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _console() -> Any:
    from rich.console import Console

    return Console()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(entry)}" for name, entry in value.items())
    return str(value)


__all__ = ["RECIPE_NAME", "main"]

if __name__ == "__main__":
    main()
