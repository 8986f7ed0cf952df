"""The runtime: chunked prefill, decode and batched generation of a loaded artifact."""

# B batch  T tokens  V vocabulary
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.batch import OnText, Request
from rtpurbo.runtime.cache import Cache
from rtpurbo.runtime.forward import decode_step, prefill_chunk
from rtpurbo.runtime.generation import Generation, encode_prompts, run_batch
from rtpurbo.runtime.model import Experts, Model
from rtpurbo.runtime.plans import LayerPlan, plan_decode
from rtpurbo.runtime.sampling import Kind, SamplingOptions, sample
from rtpurbo.runtime.state import CapturedStep, State

# Prompt tokens processed at a time unless the caller says otherwise.
PREFILL_CHUNK = {"cpu": 1024, "cuda": 8192}


class Runtime:
    """A loaded artifact. `runtime.loader.load` makes it; `manifest` holds the roles and top_p that it runs with."""

    def __init__(self, *, model: Model, tokenizer: Any | None, manifest: Manifest, plans: tuple[LayerPlan, ...]) -> None:
        self.model, self.tokenizer, self.manifest, self.device = model, tokenizer, manifest, model.device
        self._plans = plans

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: the generation config's and the tokenizer's."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, getattr(self.tokenizer, "eos_token_id", None)) if i is not None)

    @property
    def graph_obstacle(self) -> str | None:
        """Why decode steps cannot be captured, or None."""
        if self.device.type != "cuda":
            return f"the model is on {self.device}, wanted a CUDA device"
        if self.model.dtype == torch.float32 and any(isinstance(layer.mlp, Experts) for layer in self.model.layers):
            return "experts in float32 run eagerly and wait for the device, wanted bfloat16 or float16"
        return None

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.model.config.vocab_size

    def start(self, batch: int, capacity: int, dense: bool = False, *, graph: bool | None = None) -> State:
        """An empty batch whose sequences may grow to `capacity` tokens; dense: all heads attend fully, nothing is dropped.

        graph: run decode steps as a captured CUDA graph (default: where `graph_obstacle` is None). Both ways compute the same.
        Raises ValueError when the capacity exceeds max_position_embeddings, the memory is not there, or a graph cannot be captured.
        """
        limit = self.manifest.model.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens exceed the model's max_position_embeddings {limit}")
        obstacle = self.graph_obstacle
        if graph and obstacle is not None:
            raise ValueError(f"decode steps cannot run as a CUDA graph: {obstacle}")
        layouts = tuple(plan.layout for plan in self._plans)
        dtype = self.model.dtype
        cache = Cache(self.manifest, layouts, batch=batch, capacity=capacity, dtype=dtype, device=self.device, dense=dense)
        try:
            plans = plan_decode(self.manifest, layouts, batch=batch, capacity=capacity, device=self.device, dense=dense)
            rope = self.model.rope(capacity)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"no memory on {self.device} for decoding {batch} sequences of {capacity} tokens") from error
        return State.of(cache, plans, rope, graph=obstacle is None if graph is None else graph)

    @torch.no_grad()
    def prefill(
        self,
        state: State,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        chunk: int | None = None,
        all_logits: bool = False,
        slot: int | None = None,
    ) -> torch.Tensor:
        """Append tokens [B, T] with the prefill pattern, `chunk` at a time (default: PREFILL_CHUNK of the device).

        attention_mask [B, T] marks the real tokens (left or right padding); positions count real tokens only. slot: append one
        sequence [1, T] to this slot only; the other slots keep their state. Returns the logits after each sequence's last real
        token [B, V]; with all_logits those of every token [B, T, V], 0 at padding.
        Raises ValueError, before anything is written, for an empty row or more tokens than the cache has room for.
        """
        chunk = PREFILL_CHUNK[self.device.type] if chunk is None else chunk
        if chunk < 1:
            raise ValueError(f"prefill chunk is {chunk}, wanted at least 1")
        slots = range(state.cache.batch) if slot is None else [slot]
        shape, mask_shape = input_ids.shape, None if attention_mask is None else attention_mask.shape
        if len(shape) != 2 or shape[0] != len(slots) or mask_shape not in (None, shape):
            found = None if mask_shape is None else tuple(mask_shape)
            raise ValueError(f"prefill: input_ids {tuple(shape)} and attention_mask {found} do not fit a batch of {len(slots)}")
        ids_BT, order_BT, counts = _real_tokens_first(input_ids, attention_mask)
        if min(counts) == 0:
            raise ValueError(f"prefill: sequence {counts.index(0)} has no token")
        added = [0] * state.cache.batch
        for b, count in zip(slots, counts, strict=True):
            added[b] = count
        state.cache.check_room(added)
        lengths = [state.cache.lengths[b] for b in slots]
        logits = self._prefill(state, slot, ids_BT.to(self.device), counts, lengths, chunk, all_logits)
        state.cache.advance(added)
        if not all_logits:
            return logits
        out_BTV = logits.new_zeros(*input_ids.shape, logits.shape[-1])
        for b, count in enumerate(counts):
            out_BTV[b, order_BT[b, :count].to(self.device)] = logits[b, :count]
        return out_BTV

    def _prefill(
        self, state: State, slot: int | None, ids_BT: torch.Tensor, counts: list[int], lengths: list[int], chunk: int, all_logits: bool
    ) -> torch.Tensor:
        """All chunks of right-padded rows: logits of every row [B, T, V], or after each sequence's last token [B, V]."""
        pieces, last = [], [torch.empty(0)] * len(counts)
        for begin in range(0, max(counts), chunk):
            part = [min(max(count - begin, 0), chunk) for count in counts]
            ends = {b: n - 1 for b, n in enumerate(part) if n and begin + n == counts[b]}
            keep = list(range(max(part))) if all_logits else sorted(set(ends.values()))
            logits_BkV = prefill_chunk(
                self.model,
                self._plans,
                self.manifest,
                state.cache.view(slot),
                ids_BT[:, begin : begin + max(part)],
                torch.tensor(part, dtype=torch.int32).to(self.device, non_blocking=True),
                newest=max(length + begin + n for length, n in zip(lengths, part, strict=True) if n),
                keep=keep,
            )
            if all_logits:
                pieces.append(logits_BkV)
            for b, row in ends.items():
                last[b] = logits_BkV[b, keep.index(row)]
        return torch.cat(pieces, dim=1) if all_logits else torch.stack(last)

    def decode(self, state: State, token_ids: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        """Append one token [B] to each active sequence (default: all) with the decode pattern; logits [B, V].

        Rows that are not active are neither read nor written; their logits mean nothing.
        Raises ValueError, before anything is written, when a sequence has no room.
        """
        if token_ids.shape != (state.cache.batch,):
            raise ValueError(f"decode: token_ids {tuple(token_ids.shape)} do not fit a batch of {state.cache.batch}")
        active = [True] * state.cache.batch if active is None else list(active)
        state.cache.check_room([int(on) for on in active])
        state.ids_B.copy_(token_ids, non_blocking=True)
        # A captured graph writes its logits to the same place every time.
        return self.advance(state, active).clone()

    @torch.no_grad()
    def advance(self, state: State, active: Sequence[bool], kind: Kind = "greedy") -> torch.Tensor:
        """Append state.ids_B to the active sequences and sample each one's next token into state.ids_B, without waiting for it.

        kind: the least sampling work that covers the sequences' options (runtime.sampling.kind_of). Returns logits [B, V], valid
        until the next step. Raises ValueError, before anything is written, when a sequence has no room.
        """
        counts = [int(on) for on in active]
        state.cache.check_room(counts)
        state.activate(active)
        if not state.graph or state.on_selection is not None:
            logits_BV = self._decode_step(state, kind)
        else:
            if kind not in state.graphs:
                state.graphs[kind] = CapturedStep(state, lambda: self._decode_step(state, kind))
            logits_BV = state.graphs[kind].replay()
        state.cache.advance(counts)
        return logits_BV

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        chat: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        prefill_chunk: int | None = None,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """Continue prompts (texts or token ids), as one batch; one Generation per prompt, in order.

        Args:
            max_new_tokens: tokens generated at most per prompt.
            chat: wrap each text in the tokenizer's chat template as one user message.
            temperature, top_k, top_p, seed: see sampling (top_p here is nucleus sampling, not the selection's top_p).
            stop: texts that end a sequence; they are not part of its text.
            prefill_chunk: prompt tokens processed at a time; bounds the memory of prefill.
            on_text: called with (prompt index, new text) as text becomes certain.

        Prompts below the manifest's dense_below run with full attention, in a batch of their own. Raises ValueError, before any
        work, for empty prompts, options out of range, and prompts that with max_new_tokens exceed max_position_embeddings.
        """
        options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        if max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
            raise ValueError(f"max_new_tokens is {max_new_tokens} and prefill_chunk {prefill_chunk}, wanted at least 1")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop or (stop and self.tokenizer is None):
            raise ValueError("stop strings must not be empty, and need an artifact with a tokenizer")
        ids = encode_prompts(self.tokenizer, self.vocab_size, prompts, chat)
        limit = self.manifest.model.max_position_embeddings
        for i, prompt in enumerate(ids):
            if len(prompt) + max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it exceeds the model's "
                    f"max_position_embeddings {limit}"
                )
        requests = [
            Request(index=i, prompt=tuple(prompt), options=options, max_new_tokens=max_new_tokens, stop=stop)
            for i, prompt in enumerate(ids)
        ]
        answers: dict[int, Generation] = {}
        for dense in (False, True):
            together = [r for r in requests if (len(r.prompt) < self.manifest.dense_below) == dense]
            if together:
                answers |= run_batch(self, together, dense, prefill_chunk, on_text)
        return [answers[i] for i in range(len(ids))]

    def _decode_step(self, state: State, kind: Kind) -> torch.Tensor:
        """One step and its sampling, on the device alone: what a graph captures."""
        logits_BV = self._decode_logits(state)
        sampled_B = sample(logits_BV, replace(state.options, kind=kind), state.seed_B, state.step_B)
        state.ids_B.copy_(torch.where(state.active_B > 0, sampled_B, state.ids_B))
        state.step_B.add_(state.active_B)
        return logits_BV

    def _decode_logits(self, state: State) -> torch.Tensor:
        """Append state.ids_B to the active sequences and their count to the lengths; logits [B, V]."""
        return decode_step(
            self.model,
            self._plans,
            self.manifest,
            state.cache.view(),
            state.decode_plans,
            state.ids_B,
            state.active_B,
            state.rope,
            state.on_selection,
        )


def _real_tokens_first(input_ids: torch.Tensor, mask_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens with the real ones of each row first, in order, so that the padding side does not matter; where each came from; counts."""
    B, T = input_ids.shape
    if mask_BT is None:
        return input_ids, torch.arange(T).expand(B, T), [T] * B
    real_BT = mask_BT.cpu().bool()
    order_BT = torch.argsort(real_BT, dim=1, descending=True, stable=True)
    return input_ids.cpu().gather(1, order_BT), order_BT, real_BT.sum(dim=1).tolist()
