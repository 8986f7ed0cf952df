"""The runtime: chunked prefill, decode and batched generation of a loaded artifact."""

# B batch  T tokens  V vocabulary
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rtpurbo.manifests.architectures import ARCHITECTURES, PreRopeTap
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.attention import AttentionContext, LayerPlan
from rtpurbo.runtime.cache import Cache
from rtpurbo.runtime.generation import Generation, Request, encode_prompts, run_batch
from rtpurbo.runtime.sampling import SamplingOptions
from rtpurbo.runtime.selection import DecodePlan, SelectionObserver, plan_decode

PREFILL_CHUNK = 1024


@dataclass(kw_only=True)
class State:
    """A batch in progress. `on_selection`, if set, sees every selection of decode steps (runtime.selection.SelectionObserver)."""

    cache: Cache
    decode_plans: tuple[DecodePlan | None, ...]
    on_selection: SelectionObserver | None = None


class Runtime:
    """A loaded artifact. `runtime.loader.load` makes it; `manifest` holds the roles and top_p that it runs with."""

    def __init__(
        self, *, model: Any, tokenizer: Any | None, manifest: Manifest, device: torch.device, plans: tuple[LayerPlan, ...]
    ) -> None:
        self.model, self.tokenizer, self.manifest, self.device = model, tokenizer, manifest, device
        self._plans = plans
        # For the model's lifetime: registering hooks anew for every token would cost more than they do.
        self._tap = PreRopeTap(model, ARCHITECTURES[manifest.model.model_type]).__enter__()

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: the generation config's and the tokenizer's."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in (*ids, getattr(self.tokenizer, "eos_token_id", None)) if i is not None)

    def start(self, batch: int, capacity: int, dense: bool = False) -> State:
        """An empty batch whose sequences may grow to `capacity` tokens; dense: all heads attend fully, nothing is dropped.

        Raises ValueError when the capacity exceeds max_position_embeddings or the memory is not there.
        """
        limit = self.manifest.model.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"{capacity} tokens exceed the model's max_position_embeddings {limit}")
        layouts = tuple(plan.layout for plan in self._plans)
        dtype = self.model.dtype
        cache = Cache(self.manifest, layouts, batch=batch, capacity=capacity, dtype=dtype, device=self.device, dense=dense)
        try:
            plans = tuple(
                None if dense else plan_decode(self.manifest, layout, batch=batch, capacity=capacity, device=self.device)
                for layout in layouts
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(f"no memory on {self.device} for decoding {batch} sequences of {capacity} tokens") from error
        return State(cache=cache, decode_plans=plans)

    @torch.no_grad()
    def prefill(
        self,
        state: State,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        chunk: int = PREFILL_CHUNK,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Append tokens [B, T] with the prefill pattern, `chunk` at a time.

        attention_mask [B, T] marks the real tokens (left or right padding); positions count real tokens only. Returns the logits
        after each sequence's last real token [B, V]; with all_logits those of every token [B, T, V], 0 at padding.
        Raises ValueError, before anything is written, for an empty row or more tokens than the cache has room for.
        """
        if chunk < 1:
            raise ValueError(f"prefill chunk is {chunk}, wanted at least 1")
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.shape != mask_BT.shape or input_ids.ndim != 2 or input_ids.shape[0] != state.cache.batch:
            raise ValueError(
                f"prefill: input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask_BT.shape)} do not fit "
                f"a batch of {state.cache.batch}"
            )
        # Real tokens first, in order: the caller's padding side does not matter any more.
        order_BT = torch.argsort(mask_BT.cpu().bool(), dim=1, descending=True, stable=True)
        counts = mask_BT.bool().sum(dim=1).tolist()
        if min(counts) == 0:
            raise ValueError(f"prefill: sequence {counts.index(0)} has no token")
        state.cache.check_room(counts)
        ids_BT = input_ids.cpu().gather(1, order_BT).to(self.device)
        pieces, last = [], [torch.empty(0)] * len(counts)
        for begin in range(0, max(counts), chunk):
            part = [min(max(count - begin, 0), chunk) for count in counts]
            ends = {b: n - 1 for b, n in enumerate(part) if n and begin + n == counts[b]}
            rows = sorted(set(ends.values()))
            keep = list(range(max(part))) if all_logits else rows
            logits_BtV = self._forward(state, ids_BT[:, begin : begin + max(part)], part, "prefill", keep)
            if all_logits:
                pieces.append(logits_BtV)
            for b, row in ends.items():
                last[b] = logits_BtV[b, keep.index(row)]
        if not all_logits:
            return torch.stack(last)
        logits_BTV = torch.cat(pieces, dim=1)
        out_BTV = logits_BTV.new_zeros(*input_ids.shape, logits_BTV.shape[-1])
        for b, count in enumerate(counts):
            out_BTV[b, order_BT[b, :count].to(self.device)] = logits_BTV[b, :count]
        return out_BTV

    @torch.no_grad()
    def decode(self, state: State, token_ids: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        """Append one token [B] to each active sequence (default: all) with the decode pattern; logits [B, V].

        Rows that are not active are neither read nor written; their logits mean nothing.
        Raises ValueError, before anything is written, when a sequence has no room.
        """
        if token_ids.shape != (state.cache.batch,):
            raise ValueError(f"decode: token_ids {tuple(token_ids.shape)} do not fit a batch of {state.cache.batch}")
        counts = [1] * state.cache.batch if active is None else [int(on) for on in active]
        state.cache.check_room(counts)
        return self._forward(state, token_ids.to(self.device)[:, None], counts, "decode", [0])[:, 0]

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
        prefill_chunk: int = PREFILL_CHUNK,
        on_text: Callable[[int, str], None] | None = None,
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
        if max_new_tokens < 1 or prefill_chunk < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens} and prefill_chunk {prefill_chunk}, wanted at least 1")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop or (stop and self.tokenizer is None):
            raise ValueError("stop strings must not be empty, and need an artifact with a tokenizer")
        ids = encode_prompts(self.tokenizer, self.model.config.vocab_size, prompts, chat)
        limit = self.manifest.model.max_position_embeddings
        for i, prompt in enumerate(ids):
            if len(prompt) + max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it exceeds the model's "
                    f"max_position_embeddings {limit}"
                )
        answers: dict[int, Generation] = {}
        for dense in (False, True):
            batch = {i: prompt for i, prompt in enumerate(ids) if (len(prompt) < self.manifest.dense_below) == dense}
            if batch:
                request = Request(prompts=batch, options=options, max_new_tokens=max_new_tokens, stop=stop, dense=dense)
                answers |= run_batch(self, request, prefill_chunk, on_text)
        return [answers[i] for i in range(len(ids))]

    def _forward(
        self, state: State, ids_BT: torch.Tensor, counts: list[int], phase: Literal["prefill", "decode"], keep: list[int]
    ) -> torch.Tensor:
        """One pass over a right-padded chunk; logits of its rows `keep`."""
        cache = state.cache
        counts_B = torch.tensor(counts, dtype=torch.int32).to(self.device)
        context = AttentionContext(
            manifest=self.manifest,
            plans=self._plans,
            decode_plans=state.decode_plans,
            cache=cache,
            tap=self._tap,
            phase=phase,
            counts_B=counts_B,
            rows=cache.rows(counts),
            newest=max(length + count for length, count in zip(cache.lengths, counts, strict=True)),
            on_selection=state.on_selection,
        )
        position_BT = cache.lengths_B.long()[:, None] + torch.arange(ids_BT.shape[1], device=self.device)
        output = self.model(
            input_ids=ids_BT,
            position_ids=position_BT,
            use_cache=False,
            rtpurbo=context,
            logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self.device),
        )
        cache.advance(counts)
        return output.logits
