"""Turning a growing list of token ids into text: whole characters only, and nothing past a stop string."""

from collections.abc import Sequence
from typing import Any

# What a tokenizer decodes an incomplete UTF-8 sequence to.
REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one sequence, token by token.

    `push` and `finish` return the text that became certain; their concatenation is `text`. Text is held back while its last
    character is incomplete, or while it could be the beginning of a stop string. Once a stop string appears, `stopped` is
    True and the text ends before it.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._context = self._decoded = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; the text that is now certain, possibly empty."""
        self._ids.append(token)
        return self._take(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The end of the sequence: everything that was held back."""
        return "" if self.stopped else self._take(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        """Text of the tokens since `_decoded`; decoded behind a few earlier tokens, since spaces can depend on them."""
        if self._tokenizer is None:
            return ""
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _take(self, new: str, *, final: bool) -> str:
        pending = self._held + new
        ends = [place for stop in self._stop if (place := pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            certain, self._held = pending[: min(ends)], ""
        else:
            hold = 0 if final else max((_overlap(pending, stop) for stop in self._stop), default=0)
            certain, self._held = pending[: len(pending) - hold], pending[len(pending) - hold :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
