"""Needle documents: for calibration (the same span at both ends) and for the retrieval test (a fact, then its question)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Farid", "Greta", "Hiro", "Irene", "Jonas", "Karin", "Louis")
_THINGS = ("vault", "garden gate", "archive", "telescope", "workshop", "greenhouse", "lighthouse", "bicycle shed")
# Shares of the document's length at which the earlier needle may stand; the later one ends the document.
_DEPTHS = (0.02, 0.30)
# Documents of one calibration take these shares of `calibration_tokens` in turn.
_LENGTH_SHARES = (1.0, 0.75, 0.5, 0.875)


@dataclass(frozen=True, kw_only=True)
class NeedleDocument:
    """token_ids with the same tokens in [earlier, earlier + needle) and [later, later + needle); positions in tokens."""

    token_ids: tuple[int, ...]
    earlier: int
    later: int
    needle: int


@dataclass(frozen=True, kw_only=True)
class NeedleQuestion:
    """A prompt whose answer stands at `fact` (share of the context, 0 ... 1): greedy decoding of `prompt` should give `answer`."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    answer_text: str
    fact: int


def calibration_documents(
    tokenizer: Any, filler: Sequence[Sequence[int]], *, count: int, tokens: int, needle_tokens: int, window: int, seed: int
) -> list[NeedleDocument]:
    """`count` documents: filler text, an earlier needle at a random depth, filler, and the same needle at the end.

    Spans are exact for any tokenizer because needle and filler are joined as token ids. Lengths vary between tokens and tokens / 2.
    Raises ValueError when the filler is too short, or when a document would leave the earlier needle inside the sliding window of
    the later one (its attention would then not tell retrieval from locality). Source: arXiv 2605.16928 section 3.1; several
    documents, depths and lengths: ours.
    """
    documents = []
    for i in range(count):
        rng = random.Random(f"{seed}-calibration-{i}")
        needle = _needle_ids(tokenizer, rng, needle_tokens)
        length = int(tokens * _LENGTH_SHARES[i % len(_LENGTH_SHARES)])
        body_length = length - 2 * needle_tokens
        earlier = int(length * rng.uniform(*_DEPTHS))
        if body_length - earlier < window or body_length < 2 * needle_tokens:
            raise ValueError(
                f"calibration document {i} of {length} tokens is too short for needles of {needle_tokens} tokens outside a sliding "
                f"window of {window}: raise calibration_tokens (now {tokens}) or lower sliding_window"
            )
        body = tuple(filler[i % len(filler)][:body_length])
        if len(body) < body_length:
            raise ValueError(f"calibration filler {i} has {len(body)} tokens, wanted {body_length}: give longer documents")
        ids = body[:earlier] + needle + body[earlier:] + needle
        documents.append(NeedleDocument(token_ids=ids, earlier=earlier, later=len(ids) - needle_tokens, needle=needle_tokens))
    return documents


def needle_questions(
    tokenizer: Any, filler: Sequence[Sequence[int]], *, count: int, tokens: int, window: int, seed: int
) -> list[NeedleQuestion]:
    """`count` prompts of about `tokens` tokens: a fact outside the window of the question, with the chat template if there is one.

    The answer's beginning is given (an assistant turn that starts "The code of ... is"), so that one greedy decoding of a few
    digits decides. Raises ValueError when the context is too short to put the fact outside the window.
    """
    questions = []
    for i in range(count):
        rng = random.Random(f"{seed}-question-{i}")
        who, what, code = rng.choice(_NAMES), rng.choice(_THINGS), str(rng.randint(10000, 99999))
        lead = f"The secret code of {who}'s {what} is"
        room = tokens - 160
        body = list(filler[i % len(filler)][:room])
        depth = int((room - window - 64) * rng.uniform(0.05, 0.95)) if room > window + 128 else -1
        if depth < 0 or len(body) < room:
            raise ValueError(
                f"needle question {i}: {len(body)} filler tokens in a context of {tokens} leave no place for a fact outside the "
                f"sliding window of {window}"
            )
        context = tokenizer.decode(body[:depth]) + f"\n{lead} {code}. Remember it.\n" + tokenizer.decode(body[depth:])
        question = f"\n\nWhat is the secret code of {who}'s {what}?"
        prompt = _ids(tokenizer, _with_template(tokenizer, context + question) + lead)
        whole = _ids(tokenizer, _with_template(tokenizer, context + question) + f"{lead} {code}")
        answer = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or not answer:
            raise ValueError("the tokenizer merges the answer into the prompt; needle questions need a tokenizer that splits at spaces")
        # A token for the space alone belongs to the prompt: whether the model writes a space, a quote or a colon is style.
        while len(answer) > 1 and not tokenizer.decode(answer[:1]).strip():
            prompt, answer = (*prompt, answer[0]), answer[1:]
        questions.append(NeedleQuestion(prompt=prompt, answer=answer, answer_text=code, fact=depth))
    return questions


def _needle_ids(tokenizer: Any, rng: random.Random, length: int) -> tuple[int, ...]:
    """Exactly `length` tokens of sentences that no filler contains by chance."""
    ids: list[int] = []
    while len(ids) < length:
        who, what = rng.choice(_NAMES), rng.choice(_THINGS)
        ids += _ids(tokenizer, f" The secret code of {who}'s {what} is {rng.randint(10**5, 10**6)}, and it opens at {rng.randint(1, 23)}.")
    return tuple(ids[:length])


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_template(tokenizer: Any, text: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        return text + "\n"
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
