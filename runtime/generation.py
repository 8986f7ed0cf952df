"""From prompts to answers: texts encoded, one batch of requests run to its end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rtpurbo.runtime.batch import Batch, OnText, Reason, Request

if TYPE_CHECKING:
    from rtpurbo.runtime.engine import Runtime


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


def run_batch(
    runtime: "Runtime", requests: Sequence[Request], dense: bool, prefill_chunk: int | None, on_text: OnText | None
) -> dict[int, Generation]:
    """Prefill the requests one after the other, decode them together until each has ended; answers by index."""
    began = time.perf_counter()
    capacity = max(len(request.prompt) + request.max_new_tokens for request in requests)
    batch = Batch(runtime, slots=len(requests), capacity=capacity, dense=dense)
    sequences = [batch.add([request], prefill_chunk=prefill_chunk, on_text=on_text)[0] for request in requests]
    decode_began = time.perf_counter()
    while batch.running:
        batch.step()
    ended = time.perf_counter()
    return {
        sequence.request.index: Generation(
            text=sequence.stream.text,
            token_ids=tuple(sequence.tokens),
            prompt_tokens=len(sequence.request.prompt),
            finish_reason=sequence.reason or "length",
            dense=dense,
            prefill_s=decode_began - began,
            decode_s=ended - decode_began,
            decode_steps=batch.steps,
            cache_bytes=batch.state.cache.nbytes(),
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
