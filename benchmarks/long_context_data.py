"""Text and needle prompts of the long-context teacher: the sources of Python's standard library, and facts hidden in them."""

# B rows of a step  T tokens of a row
import json
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rtpurbo.converter.data import HELDOUT_EVERY, Split

NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Farid", "Greta", "Hiro", "Irene", "Jonas", "Karin", "Louis")
THINGS = ("vault", "garden gate", "archive", "telescope", "workshop", "greenhouse", "lighthouse", "bicycle shed")
# Tests, generated tables and other packages are not prose about a program.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
_MIN_BYTES = 2048


def source_texts(split: Split, max_bytes: int) -> list[str]:
    """Sources of the standard library, in a fixed shuffled order; every eighth file is held out; files until `max_bytes` are full."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts))
    random.Random("sources").shuffle(files)
    texts, size = [], 0
    for n, path in enumerate(files):
        heldout = n % HELDOUT_EVERY == HELDOUT_EVERY - 1
        if heldout == (split == "heldout") and path.stat().st_size >= _MIN_BYTES and size < max_bytes:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1])
    if not texts:
        raise ValueError(f"{root}: has no Python sources, wanted the standard library's")
    return texts


def write_rows(texts: Sequence[str], path: Path) -> None:
    """The texts as JSONL, as `rtpurbo convert --data` reads it."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """token_ids int32 [T]; is_answer bool [T] marks the tokens of the codes that the model has to find."""

    token_ids: np.ndarray
    is_answer: np.ndarray

    @property
    def predicting(self) -> np.ndarray:
        """Positions whose logits predict an answer token."""
        return np.flatnonzero(self.is_answer) - 1


class Material:
    """A stream of text tokens and the needle prompts that are made of it.

    Facts read "The secret code of Alice's vault is 48213."; a prompt is one user message with filler, facts at random depths and
    questions, and the assistant's answer, both in the tokenizer's chat template. All parts are joined as token ids.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        # verbose=False: texts are longer than the model's own limit on purpose.
        encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        self.tokens = np.concatenate([np.array(ids + end, dtype=np.int32) for ids in encoded])
        self.encode = lru_cache(maxsize=4096)(self._encode)

    def text(self, draw: random.Random, length: int) -> np.ndarray:
        """`length` tokens in a row from a random place."""
        if len(self.tokens) < length:
            raise ValueError(f"the text has {len(self.tokens)} tokens, wanted at least {length}")
        start = draw.randrange(len(self.tokens) - length + 1)
        return self.tokens[start : start + length]

    def texts(self, draw: random.Random, rows: int, length: int) -> np.ndarray:
        """[B, T] of such pieces."""
        return np.stack([self.text(draw, length) for _ in range(rows)])

    def needles(self, draw: random.Random, length: int, *, keys: int, asked: int = 1) -> Prompt:
        """A prompt of exactly `length` tokens with `keys` facts, `asked` of them in question, and the answer.

        Raises ValueError when `length` leaves no filler, or asked is not 1 ... keys, or keys exceed the different facts.
        """
        if not 1 <= asked <= keys <= len(NAMES) * len(THINGS):
            raise ValueError(f"{asked} of {keys} facts asked, wanted 1 <= asked <= keys <= {len(NAMES) * len(THINGS)}")
        owners = draw.sample([f"{name}'s {thing}" for name in NAMES for thing in THINGS], keys)
        codes = [f" {draw.randint(10000, 99999)}" for _ in owners]
        before, after = self._frame
        leads = [f"The secret code of {owner} is" for owner in owners]
        end = self.encode(". Remember it.\n")
        facts = [self.encode(f"\n{lead}") + self.encode(code) + end for lead, code in zip(leads, codes, strict=True)]
        chosen = draw.sample(range(keys), asked)
        question = self.encode("\n")
        for n in chosen:
            question = question + self.encode(f"\nWhat is the secret code of {owners[n]}?")
        question = question + after
        answer: list[int] = []
        marks: list[bool] = []
        for n in chosen:
            for part, is_code in ((self.encode(leads[n]), False), (self.encode(codes[n]), True), (self.encode(".\n"), False)):
                answer += part
                # A token for the space alone is style, not the code.
                marks += [is_code and bool(self.tokenizer.decode([token]).strip()) for token in part]
        room = length - len(before) - len(question) - len(answer) - sum(map(len, facts))
        if room < keys:
            raise ValueError(f"{length} tokens leave {room} for filler beside {keys} facts, wanted at least {keys}")
        filler = self.text(draw, room).tolist()
        cuts = [0, *sorted(draw.sample(range(room), keys)), room]
        body: list[int] = []
        for n in range(keys + 1):
            body += filler[cuts[n] : cuts[n + 1]] + (facts[n] if n < keys else [])
        prompt = before + body + question
        return Prompt(token_ids=np.array(prompt + answer, dtype=np.int32), is_answer=np.array([False] * len(prompt) + marks))

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Tokens of the chat template before and after the user's text."""
        mark = "<|here|>"
        message = [{"role": "user", "content": mark}]
        whole = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = whole.split(mark)
        return self._encode(before), self._encode(after)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
