"""Verify an artifact: schema, digests, shapes; dense mode against transformers; sparse against dense in numbers."""

# T tokens  V vocabulary
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rtpurbo.manifests.manifest import MANIFEST_NAME, SCHEMA_VERSION
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import device_of, load
from rtpurbo.runtime.plans import SelectionObserver
from rtpurbo.runtime.state import State

# Largest relative error of a token's logits between two exact computations of the same mask. A wrong head, mask or position
# gives errors near 1; in 16 bits, rounding and a router's near-ties leave some room below that.
DENSE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# Odd, so that chunk edges fall inside blocks and windows.
CHUNK = 61


def verify(folder: str | Path, *, device: str = "auto", dtype: str = "auto", num_tokens: int = 512) -> dict[str, Any]:
    """Check an artifact and report how its sparse attention differs from dense attention on a short synthetic text.

    Args:
        folder: the artifact. device, dtype: as in `load`.
        num_tokens: length of the text, cut to max_position_embeddings; its last eighth is decoded token by token.

    Returns a JSON-ready report: what was checked; `dense_relative_error` (largest over tokens of |runtime in dense mode -
    transformers| / |transformers|, Euclidean norms of logits) with its tolerance and the largest absolute error; for the manifest's
    roles against dense the mean and largest KL(dense || sparse) in nats and the share of equal argmax, over prefill and decode
    tokens; the share of blocks that decode kept; bytes of both caches.
    Raises ValueError when schema, digests, shapes or the exactness of dense mode fail, or num_tokens is below 16. Source: ours.
    """
    if num_tokens < 16:
        raise ValueError(f"num_tokens is {num_tokens}, wanted at least 16")
    where = device_of(device)
    runtime = load(folder, device=device, dtype=dtype)
    token_ids = sample_tokens(runtime, num_tokens)
    prompt = len(token_ids) - max(1, len(token_ids) // 8)
    dense_mode, dense_state = teacher_forced(runtime, token_ids, prompt, dense=True)
    kept = KeptBlocks(runtime.manifest.decode_block)
    sparse, sparse_state = teacher_forced(runtime, token_ids, prompt, dense=False, on_selection=kept.observe)
    checked, weights = _checked(Path(folder), runtime), runtime.model.dtype
    cache_bytes = sparse_state.cache.nbytes(), dense_state.cache.nbytes()
    # The device may hold one model, not two.
    del runtime, dense_state, sparse_state
    dense = transformers_logits(Path(folder), token_ids, weights, where)
    error = relative_error(dense_mode, dense, weights, str(folder))
    return {
        **checked,
        "device": str(where),
        "dtype": str(weights).removeprefix("torch."),
        "tokens": len(token_ids),
        "decoded_tokens": len(token_ids) - prompt,
        "dense_relative_error": error,
        "dense_tolerance": DENSE_TOLERANCE[weights],
        "dense_max_abs_error": float((dense_mode - dense).abs().max()),
        "prefill": compare(dense[:prompt], sparse[:prompt]),
        "decode": compare(dense[prompt:], sparse[prompt:]),
        "kept_blocks": kept.share,
        "sparse_cache_bytes": cache_bytes[0],
        "dense_cache_bytes": cache_bytes[1],
    }


def sample_tokens(runtime: Runtime, num_tokens: int) -> list[int]:
    """A deterministic text with facts that recur far apart, as token ids; plain ids where the artifact has no tokenizer."""
    num_tokens = min(num_tokens, runtime.manifest.model.max_position_embeddings)
    vocabulary = runtime.model.config.vocab_size
    if runtime.tokenizer is None:
        return [7919 * i % vocabulary for i in range(num_tokens)]
    lines = (f"Shelf {i % 23}: box {i * 7919 % 10007} stands beside box {i % 23 * 104729 % 10007}." for i in range(num_tokens))
    token_ids = list(runtime.tokenizer("\n".join(lines))["input_ids"])[:num_tokens]
    assert len(token_ids) == num_tokens, "a line gives at least one token"
    return token_ids


def teacher_forced(
    runtime: Runtime, token_ids: list[int], prompt: int, *, dense: bool, on_selection: SelectionObserver | None = None
) -> tuple[torch.Tensor, State]:
    """Logits fp32 [T, V] on the CPU: `prompt` tokens by chunked prefill, the others by decode steps; and the state after."""
    state = runtime.start(1, len(token_ids), dense=dense)
    state.on_selection = on_selection
    logits = [runtime.prefill(state, torch.tensor([token_ids[:prompt]]), chunk=CHUNK, all_logits=True)[0].float().cpu()]
    logits += [runtime.decode(state, torch.tensor([token])).float().cpu() for token in token_ids[prompt:]]
    return torch.cat(logits), state


@torch.no_grad()
def transformers_logits(folder: Path, token_ids: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Logits fp32 [T, V] on the CPU of transformers' own model of the folder; ValueError where it finds the weights incomplete."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: transformers cannot load the model ({' '.join(str(error).split())[:300]})") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            name = min(map(str, report[kind]))
            raise ValueError(
                f"{folder}: for transformers {len(report[kind])} weights are {kind.removesuffix('_keys')}, the first is {name}"
            )
    return model.eval().to(device)(input_ids=torch.tensor([token_ids], device=device), use_cache=False).logits[0].float().cpu()


def relative_error(found_TV: torch.Tensor, wanted_TV: torch.Tensor, dtype: torch.dtype, source: str) -> float:
    """Largest over tokens of |found - wanted| / |wanted| (Euclidean norms); ValueError when DENSE_TOLERANCE is exceeded."""
    relative_T = (found_TV - wanted_TV).norm(dim=-1) / wanted_TV.norm(dim=-1)
    relative_T = relative_T.nan_to_num(nan=float("inf"))
    largest, tolerance = float(relative_T.max()), DENSE_TOLERANCE[dtype]
    if largest > tolerance:
        raise ValueError(
            f"{source}: in dense mode the logits differ from transformers' by a relative {largest:.3g} at token "
            f"{int(relative_T.argmax())}, wanted at most {tolerance} in {dtype}"
        )
    return largest


def compare(dense_TV: torch.Tensor, sparse_TV: torch.Tensor) -> dict[str, float]:
    """Mean and largest KL(softmax dense || softmax sparse) in nats over tokens, and the share of tokens with equal argmax."""
    p_TV, q_TV = dense_TV.double().log_softmax(dim=-1), sparse_TV.double().log_softmax(dim=-1)
    kl_T = (p_TV.exp() * (p_TV - q_TV)).sum(dim=-1)
    agreement = (dense_TV.argmax(dim=-1) == sparse_TV.argmax(dim=-1)).double().mean()
    return {"kl_mean": float(kl_T.mean()), "kl_max": float(kl_T.max()), "argmax_agreement": float(agreement)}


class KeptBlocks:
    """Counts selected and stored blocks over decode steps, layers and retrieval heads; use `observe` as State.on_selection."""

    def __init__(self, block_size: int) -> None:
        self._block_size, self._kept, self._stored = block_size, 0, 0

    def observe(self, _layer: int, selected_BHN: torch.Tensor, visible_B: torch.Tensor) -> None:
        """Count one layer's selection."""
        self._kept += int(selected_BHN.sum())
        self._stored += int((-(-visible_B // self._block_size)).sum()) * selected_BHN.shape[1]

    @property
    def share(self) -> float | None:
        """Selected / stored; None where nothing was selected."""
        return self._kept / self._stored if self._stored else None


def _checked(folder: Path, runtime: Runtime) -> dict[str, Any]:
    manifest = runtime.manifest
    return {
        "artifact": folder.name,
        "manifest": MANIFEST_NAME,
        "schema_version": SCHEMA_VERSION,
        "files_verified": len(manifest.files),
        "index_tensors": len(manifest.index_shapes()),
        "model_type": manifest.model.model_type,
        "retrieval_heads": manifest.num_retrieval_heads,
        "attention_heads": manifest.model.num_hidden_layers * manifest.model.num_attention_heads,
        "retained_groups": manifest.num_retained_groups,
        "key_value_groups": manifest.model.num_hidden_layers * manifest.model.num_key_value_heads,
    }
