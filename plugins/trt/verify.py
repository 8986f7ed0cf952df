"""Verify an engine: its folder, and its logits against the safetensors form of the same artifact, token for token."""

# B batch  V vocabulary
from pathlib import Path
from typing import Any

import torch

from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest
from rtpurbo.plugins.trt.folder import read_info
from rtpurbo.plugins.trt.run import load_engine
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import load
from rtpurbo.runtime.verify import CHUNK, DENSE_TOLERANCE, sample_tokens

# In 16 bits one token of so many may exceed the tolerance, and as many may differ in the most likely one beyond usual errors.
EXCEPTIONS = 10


def verify_engine(folder: Path, artifact: Path, *, num_tokens: int = 512) -> dict[str, Any]:
    """Compare an engine with the runtime on the artifact that it was built from.

    Two sequences of different lengths, num_tokens and a third of it (cut to the engine's capacity): the prompts are prefilled in
    odd chunks, then the last eighth of each is given to decode steps token by token, so that one wrong token cannot hide the next.

    Returns a JSON-ready report: of |engine - runtime| / |runtime| (Euclidean norms of a token's logits) the median, the 0.9 quantile with
    its tolerance and the largest; the largest absolute error; how many tokens' logits are not all finite; `argmax_agreement`;
    `argmax_differences`, see `argmax_report`.
    Raises ValueError when the folder is not sound (see load_engine), the artifact is another one, any logit is not finite, tokens exceed
    the tolerance, or differ in the most likely token beyond usual errors. In 16 bits a tenth of the tokens may, because one rounding can
    move a block or an expert over an edge, which changes a token's logits at once; in float32 none may. The selection itself is not an
    output of an engine: it is checked node by node in the tests.
    """
    if num_tokens < 64:
        raise ValueError(f"num_tokens is {num_tokens}, wanted at least 64")
    info = read_info(folder)
    found = Manifest.load(artifact / MANIFEST_NAME).to_dict()["digest"]
    if found != info.manifest_digest:
        raise ValueError(f"{artifact / MANIFEST_NAME}: digest is {found}, but the engine was built from {info.manifest_digest}")
    engine = load_engine(folder)
    runtime = load(artifact, device="cuda", dtype=info.dtype)
    tokens = sample_tokens(runtime, min(num_tokens, info.capacity))
    sequences = [tokens, tokens[-len(tokens) // 3 :]] if info.batch > 1 else [tokens]
    got, want = (teacher_forced_logits(form, sequences, dense=info.dense) for form in (engine, runtime))
    tolerance = DENSE_TOLERANCE[getattr(torch, info.dtype)]
    report = {
        "engine": folder.name,
        "library": f"{info.library} {info.library_version}",
        "dtype": info.dtype,
        "sequences": [len(sequence) for sequence in sequences],
        "tolerance": tolerance,
        **compare_logits(got, want),
    }
    check(report, folder)
    return report


def check(report: dict[str, Any], folder: Path) -> None:
    """ValueError where a report shows an engine that is not the runtime's model."""
    tolerance, tokens = report["tolerance"], report["compared_tokens"]
    exact = report["dtype"] == "float32"
    found, exceptions = (report["relative_error"], 0) if exact else (report["relative_error_0.9"], tokens // EXCEPTIONS)
    if broken := report["not_finite_tokens"]:
        raise ValueError(f"{folder}: logits of {broken} of {tokens} tokens are not finite, the engine's or the runtime's")
    if not found <= tolerance:
        raise ValueError(
            f"{folder}: more than {exceptions} of {tokens} tokens differ from the runtime's logits by a relative {found:.3g} or more, "
            f"wanted at most {tolerance}"
        )
    if report["argmax_differences"] > exceptions:
        differences = report["argmax_differences"]
        raise ValueError(f"{folder}: the most likely token differs in {differences} of {tokens} places beyond what rounding explains")


def teacher_forced_logits(
    form: Runtime, sequences: list[list[int]], *, dense: bool, steps: int | None = None, chunk: int = CHUNK
) -> torch.Tensor:
    """Logits fp32 [1 + steps, B, V] on the CPU: after the prompts, and after every further token, given to all sequences together.

    The last `steps` tokens of each sequence (default: an eighth of the shortest) go to decode steps, those before to prefill.
    """
    steps = max(1, min(map(len, sequences)) // 8) if steps is None else steps
    prompts = [sequence[: len(sequence) - steps] for sequence in sequences]
    width = max(map(len, prompts))
    ids_BT = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    mask_BT = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    state = form.start(len(sequences), max(map(len, sequences)), dense)
    logits = [form.prefill(state, ids_BT, mask_BT, chunk=chunk)]
    for step in range(steps):
        logits.append(form.decode(state, torch.tensor([s[len(p) + step] for s, p in zip(sequences, prompts, strict=True)])))
    return torch.stack(logits).float().cpu()


def compare_logits(got: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """Errors of `got` [steps, B, V] against `want`, as `verify_engine` reports them."""
    relative = ((got - want).norm(dim=-1) / want.norm(dim=-1)).nan_to_num(nan=float("inf"))
    tokens = relative.numel()
    errors = {
        "not_finite_tokens": int((~_finite(got, want)).sum()),
        "relative_error": float(relative.max()),
        # The smallest error that no more than a tenth of the tokens exceed.
        "relative_error_0.9": float(relative.flatten().sort().values[tokens - 1 - tokens // EXCEPTIONS]),
        "median_relative_error": float(relative.median()),
    }
    return {"compared_tokens": tokens, **errors, "max_abs_error": float((got - want).abs().max()), **argmax_report(got, want)}


def argmax_report(got: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """Share of equal argmax, and how many tokens differ although `want` has its two largest further apart than twice the usual error.

    Usual: the median over tokens, those with finite logits, of a token's largest error. (Twice the largest of all errors explains every
    difference.)
    """
    top = want.topk(2, dim=-1).values
    usual = (got - want).abs().amax(dim=-1)[_finite(got, want)].median()
    clear = (top[..., 0] - top[..., 1]) > 2 * usual
    equal = got.argmax(dim=-1) == want.argmax(dim=-1)
    return {"argmax_agreement": float(equal.double().mean()), "argmax_differences": int((clear & ~equal).sum())}


def _finite(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Bool [steps, B]: tokens whose logits are finite in both."""
    return (got.isfinite() & want.isfinite()).all(dim=-1)
