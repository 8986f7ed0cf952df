"""Attention nodes: inputs of one execution and what it must give, from whole sequences and explicit masks in fp64.

Of kernels/ it uses the references of the selections alone.
"""

# B batch  S positions  O heads of the fused projections  H query heads  K kv heads  D head dim  J retrieval heads  I index-key sets
from typing import Any

import torch

from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.prefill_selection import select_prefill
from rtpurbo.plugins.trt.nodes import DECODE, NODES, PREFILL

WINDOW, SINKS, BLOCK, R, EPS = 24, 3, 16, 16, 1e-6
# Retained groups with (retrieval heads), then local groups, of 3 heads each.
RETRIEVAL, LOCAL, G = (3, 1), 2, 3


class AttentionCase:
    """One chunk of an attention node; chunk: (lengths before, valid tokens, rows)."""

    def __init__(
        self, name: str, chunk: Any, *, D: int = 16, S: int = 128, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
    ) -> None:
        self.node, self.name, self.D, self.S = NODES[name], name, D, S
        ports = {port.name for port in self.node.inputs}
        self.selects = "index_q" in ports
        self.counts_K = RETRIEVAL if "k_cache" in ports else ()
        self.pooled, self.prefill_block = "prefill_ppb" in self.node.attributes, 16 if D == 16 else 128
        self.local, self.norm = LOCAL if "ring_k" in ports else 0, "norms" in ports
        self.K = len(self.counts_K) + self.local
        self.H, self.lengths, self.counts, self.T = G * self.K, *chunk
        self.dtype, self.device, self.scale = dtype, device, 2.0 * D**-0.5
        self.ends = [length + count for length, count in zip(self.lengths, self.counts, strict=True)]
        self.visible = [end if count else 0 for end, count in zip(self.ends, self.counts, strict=True)]
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(self.H, generator=self.generator).tolist()
        for part in range(2):
            self.order += [self.H + part * self.K + i for i in torch.randperm(self.K, generator=self.generator).tolist()]
        self.attributes: dict[str, Any] = {
            "heads": self.H, "order": self.order, "window": WINDOW, "sinks": SINKS, "scale": self.scale,
        }  # fmt: skip
        if self.norm:
            self.attributes["eps"] = EPS
        if self.counts_K:
            self.attributes["retrieval_counts"] = list(self.counts_K)
        self.heads = [g * G + j for g, n in enumerate(self.counts_K) for j in range(n)]
        if self.selects:
            # Three sets: of head 0 alone, of the two others of its group, and of the other group.
            self.key_sets = [0, 1, 1, 2]
            self.attributes |= {
                "retrieval_heads": self.heads, "key_groups": [0, 0, 1], "key_sets": self.key_sets, "block": BLOCK,
                "top_p_ppb": 800_000_000, "index_scale": 0.5, "narrow_keys": int(dtype != torch.float32),
            }  # fmt: skip
        if self.pooled:
            self.attributes |= {"prefill_ppb": 700_000_000, "prefill_block": self.prefill_block}
        self._make_history()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _make_history(self) -> None:
        """Raw projections of all positions, rounded to the node's dtype, and from them everything in fp64."""
        B, S, D, half = len(self.lengths), self.S, self.D, self.D // 2
        self.raw = self.random(B, S, self.H + 2 * self.K, D).to(self.dtype)
        angle = torch.arange(S)[:, None] * 100.0 ** (-torch.arange(half) / half)
        self.cos, self.sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        x = self.raw.double()[:, :, self.order]
        qk, self.v = x[:, :, : self.H + self.K], x[:, :, self.H + self.K :]
        self.norms = 1 + 0.3 * self.random(2, D)
        if self.norm:
            weight = torch.cat([self.norms[:1].expand(self.H, D), self.norms[1:].expand(self.K, D)]).double()
            qk = qk / (qk.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        J, sets = len(self.heads), 3
        self.index_q_weight, self.index_k_weight = 2 * self.random(J, R, D) / D**0.5, self.random(sets, R, D) / D**0.5
        if self.selects:
            self.index_q = torch.einsum("bshd,hrd->bshr", qk[:, :, self.heads], self.index_q_weight.double()).float()
            keys = qk[:, :, [self.H + g for g in (0, 0, 1)]]
            self.index_k = torch.einsum("bsid,ird->bsir", keys, self.index_k_weight.double()).to(self.dtype)
        a, b = qk[..., :half], qk[..., half:]
        cos, sin = self.cos.double()[:, None], self.sin.double()[:, None]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        self.q, self.k = turned[:, :, : self.H], turned[:, :, self.H :].to(self.dtype).double()

    def inputs(self) -> list[torch.Tensor]:
        """Tensors in the order of the node's ports, with garbage where nothing may be read."""
        retained, B = len(self.counts_K), len(self.lengths)
        decode = self.T == 1
        rows = torch.full((B, self.T, (self.H + 2 * self.K) * self.D), 99.0)
        for b in range(B):
            rows[b, : self.counts[b]] = self.raw[b, self.lengths[b] : self.ends[b]].flatten(1)
        named = {
            "qkv": rows.flatten(0, 1), "cos": self.cos, "sin": self.sin, "norms": self.norms, "index_q": self.index_q_weight,
            "index_k": self.index_k_weight,
            "k_cache": self._cache(self.k[:, :, :retained], self.lengths), "v_cache": self._cache(self.v[:, :, :retained], self.lengths),
            "ring_k": self._ring(self.k[:, :, retained:], self.lengths), "ring_v": self._ring(self.v[:, :, retained:], self.lengths),
        }  # fmt: skip
        if self.selects:
            named["index_cache"] = self._cache(self.index_k, self.lengths).transpose(1, 2)
        whole = {"lengths": self.lengths, "counts": self.counts, "visible": self.visible, "phase": [0] * (DECODE if decode else PREFILL)}
        found = []
        for port in self.node.inputs:
            if port.name in whole:
                found.append(torch.tensor(whole[port.name], dtype=torch.int32))
            else:
                found.append(named[port.name].to(torch.float32 if port.dtype == "float32" else self.dtype))
        return [x.to(self.device).contiguous() for x in found]

    def _cache(self, x: torch.Tensor, ends: Any) -> torch.Tensor:
        out = torch.full(x.shape, 99.0, dtype=torch.float64)
        for b, end in enumerate(ends):
            out[b, :end] = x[b, :end].double()
        return out

    def _ring(self, x: torch.Tensor, ends: Any) -> torch.Tensor:
        out = torch.full((x.shape[0], SINKS + WINDOW, *x.shape[2:]), 99.0, dtype=torch.float64)
        for b, end in enumerate(ends):
            for position in range(end):
                out[b, position if position < SINKS else SINKS + (position - SINKS) % WINDOW] = x[b, position].double()
        return out

    def _chosen(self) -> torch.Tensor | None:
        """Bool [B, J, blocks] of a decode step, from the reference selection; None where nothing is selected."""
        if not self.selects or self.T > 1:
            return None
        B, J, blocks = len(self.lengths), len(self.heads), -(-self.S // BLOCK)
        last = [max(end - 1, 0) for end in self.ends]
        index_q = torch.stack([self.index_q[b, place] for b, place in enumerate(last)])
        plan = plan_selection(self.key_sets, num_sets=3, batch=B, capacity=self.S, device="cpu", block_size=BLOCK)
        ids, count = score_and_select(
            index_q, self.index_k, plan=plan, lengths_B=torch.tensor(self.ends, dtype=torch.int32).clamp(min=1), scale=0.5, top_p=0.8,
            sinks=SINKS, impl="reference",
        )  # fmt: skip
        mask = torch.zeros(B, J, blocks, dtype=torch.bool)
        for b in range(B):
            for j in range(J):
                mask[b, j, ids[b, j, : count[b, j]].long()] = True
        return mask

    def _listed(self) -> torch.Tensor | None:
        """Bool [B, J, T, S] of a chunk that selects, from the reference; None elsewhere."""
        if not self.pooled or self.T == 1:
            return None
        index_q = torch.full((len(self.lengths), self.T, *self.index_q.shape[2:]), 99.0)
        for b, (length, end) in enumerate(zip(self.lengths, self.ends, strict=True)):
            index_q[b, : end - length] = self.index_q[b, length:end]
        lengths, counts = (torch.tensor(x, dtype=torch.int32) for x in (self.lengths, self.counts))
        ids, count = select_prefill(
            index_q, self.index_k, key_set_H=torch.tensor(self.key_sets), lengths_B=lengths, counts_B=counts, scale=0.5, top_p=0.7,
            sinks=SINKS, block=self.prefill_block, impl="reference",
        )  # fmt: skip
        B, J, Q, N = ids.shape
        blocks = torch.zeros(B, J, Q, N + 1, dtype=torch.bool)
        places = torch.where(torch.arange(N) < count[..., None], ids, N).long()
        blocks = blocks.scatter(3, places, True)
        return blocks[:, :, torch.arange(self.T) // self.prefill_block][..., torch.arange(self.S) // self.prefill_block]

    def check(self, out: torch.Tensor, caches: list[torch.Tensor], tolerance: float) -> float:
        """Assert outputs (finite everywhere, and the error of every head and valid row relative to its outputs) and caches.

        Returns the share of blocks kept.
        """
        out, chosen, listed = out.double().cpu().view(len(self.lengths), self.T, self.H, self.D), self._chosen(), self._listed()
        assert out.isfinite().all(), "a row of padding is not finite"
        retained = len(self.counts_K)
        for b, count in enumerate(self.counts):
            end = self.ends[b]
            i, j = torch.arange(self.lengths[b], end)[:, None], torch.arange(end)[None, :]
            for head in range(self.H if count else 0):
                group, place = head // G, head % G
                seen = (i - j < WINDOW) | (j < SINKS)
                if group < retained and place < self.counts_K[group]:
                    seen = j >= 0 if chosen is None else chosen[b, self.heads.index(head)][j // BLOCK]
                    if listed is not None:
                        seen = listed[b, self.heads.index(head), :count, :end]
                q = self.q[b, self.lengths[b] : end, head].to(self.dtype).double()
                logits = (q @ self.k[b, :end, group].T * self.scale).masked_fill(~((j <= i) & seen), float("-inf"))
                exact = logits.softmax(-1) @ self.v[b, :end, group]
                error = (out[b, :count, head] - exact).norm() / exact.norm()
                assert error < tolerance, (b, head, error)
        wanted = []
        if retained:
            wanted += [self._cache(x[:, :, :retained], self.ends) for x in (self.k, self.v)]
        if self.selects:
            wanted.append(self._cache(self.index_k, self.ends).transpose(1, 2))
        if self.local:
            wanted += [self._ring(x[:, :, retained:], self.ends) for x in (self.k, self.v)]
        for found, want in zip(caches, wanted, strict=True):
            torch.testing.assert_close(found.double().cpu(), want.to(self.dtype).double(), atol=tolerance, rtol=tolerance)
        if listed is not None:
            rows = [(b, count, end) for b, (count, end) in enumerate(zip(self.counts, self.ends, strict=True)) if count]
            return sum(listed[b, :, :count, :end].float().mean().item() for b, count, end in rows) / len(rows)
        if chosen is None:
            return 1.0
        return float(chosen.sum()) / sum(-(-end // BLOCK) * len(self.heads) for end, count in zip(self.ends, self.counts, strict=True))
