"""Attention of the converter: dense for the teacher, and the differentiable head-wise sparse pattern for the student."""

# B batch (1 here)  T tokens  A answer tokens  H query heads  K kv heads  D head dim  R index dim  N blocks
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import select_blocks
from rtpurbo.manifests.architectures import PreRopeTap

IMPLEMENTATION = "rtpurbo_convert"
# Rows of one masked call: its logits are at most this many rows by (sinks + window + rows) keys a head.
_LOCAL_ROWS = 512


class AttentionContext(Protocol):
    """What a forward pass does in place of attention; passed as the model's keyword argument `rtpurbo`."""

    def __call__(self, layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention output [B, H, T, D] of one layer, from post-RoPE q, k and v."""
        ...


def _attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    rtpurbo: AttentionContext,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None, "the converter runs one unpadded document at a time"
    layer: Any = module.layer_idx
    return rtpurbo(layer, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, _attention_function)


def dense_attention(layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
    """Full causal attention, the original model's: the context of calibration, stage 1 and the teacher."""
    k_BHTD, v_BHTD = _per_query_head(k_BKTD, q_BHTD.shape[1]), _per_query_head(v_BKTD, q_BHTD.shape[1])
    return scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale)


def local_attention(
    q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, window: int, sinks: int, scale: float
) -> torch.Tensor:
    """Differentiable causal attention over `i - j < window or j < sinks`, in row chunks: memory linear in T.

    One key head a query head. Equals kernels.local_attention.attend_local. Returns [B, H, T, D].
    """
    T = q_BHTD.shape[2]
    device = q_BHTD.device
    chunks = []
    for start in range(0, T, _LOCAL_ROWS):
        end = min(T, start + _LOCAL_ROWS)
        first = max(0, start - window + 1)
        num_sinks = min(sinks, first)  # sinks that stand before the window's slice; the others are inside it
        keys = torch.cat([k_BHTD[:, :, :num_sinks], k_BHTD[:, :, first:end]], dim=2)
        values = torch.cat([v_BHTD[:, :, :num_sinks], v_BHTD[:, :, first:end]], dim=2)
        position_S = torch.cat([torch.arange(num_sinks, device=device), torch.arange(first, end, device=device)])
        row_T1 = torch.arange(start, end, device=device)[:, None]
        visible_TS = (position_S <= row_T1) & ((row_T1 - position_S < window) | (position_S < sinks))
        chunks.append(masked_attention(q_BHTD[:, :, start:end], keys, values, visible_TS, scale))
    return torch.cat(chunks, dim=2)


def masked_attention(
    q_BHTD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, visible_TS: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax over the visible keys of scale * q . k, times v; every row sees at least one key. Returns [B, H, T, D].

    Written out and checkpointed: with masked SDPA the backward pass ended in an illegal memory access (torch 2.11, sm_90), without it
    the same run passes; row lengths that are not aligned are the likely cause. Nothing of size T x S survives the forward pass.
    """
    return checkpoint(_masked_attention, q_BHTD, k_BHSD, v_BHSD, visible_TS, scale, use_reentrant=False)


def _masked_attention(
    q_BHTD: torch.Tensor, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, visible_TS: torch.Tensor, scale: float
) -> torch.Tensor:
    logits_BHTS = torch.matmul(q_BHTD, k_BHSD.transpose(2, 3)).float() * scale
    weights_BHTS = logits_BHTS.masked_fill(~visible_TS, float("-inf")).softmax(dim=-1)
    return torch.matmul(weights_BHTS.to(v_BHSD.dtype), v_BHSD)


@dataclass(frozen=True, kw_only=True)
class SparseSpec:
    """The sparse pattern of a model, as the manifest describes it.

    retrieval_heads, key_sets: per layer, the retrieval query heads and the row of index_k that each reads.
    """

    retrieval_heads: Sequence[Sequence[int]]
    key_sets: Sequence[Sequence[int]]
    window: int
    sinks: int
    top_p: float
    block_size: int
    index_scale: float


class SparseAttention:
    """Context tokens in the prefill pattern, answer tokens (from `answer_start` on) in the decode pattern; one document.

    Local heads: sliding window + sinks on every row. Retrieval heads: dense causal rows before `answer_start`; from there on each
    row attends to the blocks that indexer and top-p select, which are constants to the gradient. `observe`, if given, receives
    (layer, selected bool [H, A, T], q [H, A, D], k [H, T, D], scale) of the retrieval heads' answer rows.
    Source: arXiv 2605.16928 sections 3.2-3.4 and 4; the split into context and answer rows: ours.
    """

    def __init__(
        self,
        spec: SparseSpec,
        indexer: dict[str, torch.Tensor],
        tap: PreRopeTap,
        answer_start: int,
        observe: Callable[..., None] | None = None,
    ) -> None:
        self.spec, self.indexer, self.tap, self.answer_start, self.observe = spec, indexer, tap, answer_start, observe

    def __call__(self, layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
        """See AttentionContext."""
        q_pre_BTHD, k_pre_BTKD = self.tap.pop(layer)
        H = q_BHTD.shape[1]
        retrieval = list(self.spec.retrieval_heads[layer])
        local = [h for h in range(H) if h not in set(retrieval)]
        group_size = H // k_BKTD.shape[1]
        parts: list[torch.Tensor] = []
        if local:
            kv = [h // group_size for h in local]
            out = local_attention(
                q_BHTD[:, local], k_BKTD[:, kv], v_BKTD[:, kv], window=self.spec.window, sinks=self.spec.sinks, scale=scale
            )
            parts.append(out)
        if retrieval:
            kv = [h // group_size for h in retrieval]
            selected_BHAT = self._select(layer, q_pre_BTHD.detach(), k_pre_BTKD.detach(), retrieval, kv)
            parts.append(self._retrieve(layer, q_BHTD[:, retrieval], k_BKTD[:, kv], v_BKTD[:, kv], selected_BHAT, scale))
        order = torch.argsort(torch.tensor(local + retrieval, device=q_BHTD.device))
        return torch.cat(parts, dim=1)[:, order]

    @torch.no_grad()
    def _select(self, layer: int, q_pre_BTHD: torch.Tensor, k_pre_BTKD: torch.Tensor, retrieval: list[int], kv: list[int]) -> torch.Tensor:
        """Keys each retrieval head's answer rows may read: bool [B, H, A, T], causal."""
        T, start, spec = q_pre_BTHD.shape[1], self.answer_start, self.spec
        index_q_BAHR, index_k_BTIR = index_projections(
            self.indexer, layer, q_pre_BTHD[:, start:], k_pre_BTKD, retrieval, kv, spec.key_sets[layer]
        )
        visible_BA = torch.arange(start + 1, T + 1, device=q_pre_BTHD.device)[None]
        key_set_H = torch.tensor(spec.key_sets[layer], device=q_pre_BTHD.device)
        maxima, sums = block_scores(
            index_q_BAHR,
            index_k_BTIR,
            key_set_H=key_set_H,
            visible_BT=visible_BA,
            scale=spec.index_scale,
            block_size=spec.block_size,
        )
        blocks_BHAN = select_blocks(maxima, sums, top_p=spec.top_p, sinks=spec.sinks, block_size=spec.block_size)
        key_T = torch.arange(T, device=q_pre_BTHD.device)
        return blocks_BHAN[..., key_T // spec.block_size] & (key_T < visible_BA[:, None, :, None])

    def _retrieve(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        k_BHTD: torch.Tensor,
        v_BHTD: torch.Tensor,
        selected_BHAT: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        start = self.answer_start
        if self.observe is not None:
            self.observe(layer, selected_BHAT[0], q_BHTD[0, :, start:].detach(), k_BHTD[0].detach(), scale)
        context = scaled_dot_product_attention(
            q_BHTD[:, :, :start], k_BHTD[:, :, :start], v_BHTD[:, :, :start], is_causal=True, scale=scale
        )
        answer = masked_attention(q_BHTD[:, :, start:], k_BHTD, v_BHTD, selected_BHAT, scale)
        return torch.cat([context, answer], dim=2)


def index_projections(
    indexer: dict[str, torch.Tensor],
    layer: int,
    q_pre_BTHD: torch.Tensor,
    k_pre_BTKD: torch.Tensor,
    retrieval: Sequence[int],
    kv_heads: Sequence[int],
    key_sets: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """index_q [B, T, H, R] of the retrieval heads and index_k [B, S, I, R] of the key sets, in fp32.

    q^I = W^Q q, k^I = W^K k on pre-RoPE q and k; `kv_heads[h]` is the KV head of retrieval head h, `key_sets[h]` its row of index_k.
    Differentiable in the projections. Source: arXiv 2605.16928 section 3.3.
    """
    index_q_HRD = indexer[f"layers.{layer}.index_q"].float()
    index_k_IRD = indexer[f"layers.{layer}.index_k"].float()
    kv_of_set = [kv_heads[key_sets.index(i)] for i in range(index_k_IRD.shape[0])]
    index_q_BTHR = torch.einsum("bthd,hrd->bthr", q_pre_BTHD[:, :, list(retrieval)].float(), index_q_HRD)
    index_k_BTIR = torch.einsum("btid,ird->btir", k_pre_BTKD[:, :, kv_of_set].float(), index_k_IRD)
    return index_q_BTHR, index_k_BTIR


def _per_query_head(x_BKTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x_BKTD.repeat_interleave(num_heads // x_BKTD.shape[1], dim=1)
