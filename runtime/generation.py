"""One batch of requests from token ids to answers: prompts encoded, tokens picked, text streamed, sequences ended."""

# B batch  V vocabulary
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from rtpurbo.runtime.sampling import Sampler, SamplingOptions
from rtpurbo.runtime.text import TextStream

if TYPE_CHECKING:
    from rtpurbo.runtime.engine import Runtime

Reason = Literal["stop", "eos", "length"]
OnText = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer. token_ids: without the end-of-sequence token, with those that completed a stop string; text ends before it.

    finish_reason: "eos", "stop" (a stop string) or "length". dense: the prompt was below the manifest's dense_below.
    prefill_s, decode_s (seconds), decode_steps and cache_bytes are those of the batch that the sequence ran in.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: Reason
    dense: bool
    prefill_s: float
    decode_s: float
    decode_steps: int
    cache_bytes: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts of one mode, by their index in the caller's list, and how to continue them."""

    prompts: dict[int, list[int]]
    options: SamplingOptions
    max_new_tokens: int
    stop: tuple[str, ...]
    dense: bool


def run_batch(runtime: "Runtime", request: Request, prefill_chunk: int, on_text: OnText | None) -> dict[int, Generation]:
    """Prefill and decode the request's prompts together until each has ended; answers by prompt index."""
    indices, prompts = list(request.prompts), list(request.prompts.values())
    longest = max(map(len, prompts))
    state = runtime.start(len(indices), longest + request.max_new_tokens, request.dense)
    ids_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask_BT = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    sampler, eos = Sampler(request.options, indices, runtime.device), runtime.eos_token_ids
    sequences = [_Sequence(index=i, stream=TextStream(runtime.tokenizer, request.stop)) for i in indices]
    began = time.perf_counter()
    picked = sampler.pick(runtime.prefill(state, ids_BT, mask_BT, chunk=prefill_chunk)).tolist()
    decode_began, steps = time.perf_counter(), 0
    while True:
        for sequence, token in zip(sequences, picked, strict=True):
            if sequence.reason is None:
                sequence.take(token, eos, request.max_new_tokens, on_text)
        active = [sequence.reason is None for sequence in sequences]
        if not any(active):
            break
        picked = sampler.pick(runtime.decode(state, torch.tensor(picked), active)).tolist()
        steps += 1
    ended = time.perf_counter()
    return {
        sequence.index: Generation(
            text=sequence.stream.text,
            token_ids=tuple(sequence.tokens),
            prompt_tokens=len(request.prompts[sequence.index]),
            finish_reason=sequence.reason or "length",
            dense=request.dense,
            prefill_s=decode_began - began,
            decode_s=ended - decode_began,
            decode_steps=steps,
            cache_bytes=state.cache.nbytes(),
        )
        for sequence in sequences
    }


def encode_prompts(
    tokenizer: Any | None, vocab_size: int, prompts: str | Sequence[str] | Sequence[Sequence[int]], chat: bool
) -> list[list[int]]:
    """Token ids of every prompt; ValueError for none, an empty one, ids outside the vocabulary, or a missing tokenizer."""
    items = [prompts] if isinstance(prompts, str) else list(prompts)
    if not items:
        raise ValueError("there is no prompt")
    odd = [item for item in items if not isinstance(item, str | Sequence)]
    if odd:
        raise ValueError(f"prompts must be texts or lists of token ids, found {type(odd[0]).__name__}")
    if chat and not all(isinstance(item, str) for item in items):
        raise ValueError("chat needs prompts as text, not as token ids")
    ids = [_encode(tokenizer, item, chat) if isinstance(item, str) else [int(token) for token in item] for item in items]
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {i} has token ids outside 0 ... {vocab_size - 1}")
    return ids


def _encode(tokenizer: Any | None, text: str, chat: bool) -> list[int]:
    if tokenizer is None:
        raise ValueError("the artifact has no tokenizer: give prompts as token ids")
    if not text:
        return []
    if not chat:
        return list(tokenizer(text)["input_ids"])
    if not tokenizer.chat_template:
        raise ValueError("the artifact's tokenizer has no chat template: run without chat")
    message = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


class _Sequence:
    """One sequence in progress."""

    def __init__(self, *, index: int, stream: TextStream) -> None:
        self.index, self.stream = index, stream
        self.tokens: list[int] = []
        self.reason: Reason | None = None

    def take(self, token: int, eos: frozenset[int], max_new_tokens: int, on_text: OnText | None) -> None:
        """Add a token, stream the text that it completes, and notice the end."""
        if token in eos:
            piece = self.stream.finish()
            self.reason = "eos"
        else:
            self.tokens.append(token)
            piece = self.stream.push(token)
            if not self.stream.stopped and len(self.tokens) == max_new_tokens:
                piece += self.stream.finish()
                self.reason = "length"
            if self.stream.stopped:
                self.reason = "stop"
        if piece and on_text is not None:
            on_text(self.index, piece)
