"""Prompts of any length for measurements, in an artifact's own tokens."""

# B batch  T tokens
from typing import Any

import torch


class SyntheticPrompts:
    """Deterministic prompts of any length: numbered facts in the artifact's own tokens, or spread ids where it has no tokenizer."""

    def __init__(self, tokenizer: Any | None, vocab_size: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocab_size
        self._ids: dict[int, list[int]] = {}
        self._lines: dict[int, int] = {}

    def take(self, tokens: int, batch: int) -> torch.Tensor:
        """int64 [B, T]: sequence b starts as it does for every other length, and differs from the others of its batch."""
        return torch.tensor([self._sequence(b, tokens)[:tokens] for b in range(batch)], dtype=torch.int64)

    def _sequence(self, b: int, tokens: int) -> list[int]:
        if self._tokenizer is None:
            return [(7919 * (i + 1) + 104729 * b + i // 13) % self._vocabulary for i in range(tokens)]
        begin = self._tokenizer.bos_token_id
        ids = self._ids.setdefault(b, [] if begin is None else [begin])
        while len(ids) < tokens:
            first = self._lines.get(b, 0)
            numbers = range(first, first + 256)
            text = "".join(f"Shelf {b}-{i % 997}: box {i * 7919 % 10007} stands beside box {i % 23 * 104729 % 10007}.\n" for i in numbers)
            ids += self._tokenizer(text, add_special_tokens=False)["input_ids"]
            self._lines[b] = first + 256
        return ids
