"""Learning rates and document order as pure functions of the step, so that a resumed run repeats an uninterrupted one."""

import math
import random
from functools import lru_cache


def learning_rate(step: int, peak: float, warmup: int, *, cosine_steps: int | None = None) -> float:
    """Rate of step 0, 1, ...: linear warm-up over `warmup` steps, then constant, or a half cosine that ends at `cosine_steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if cosine_steps is None:
        return peak
    progress = (step - warmup) / max(1, cosine_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def document_at(position: int, num_documents: int, seed: int) -> int:
    """Index of the document at a position of the endless sequence of epochs; every epoch is a new permutation."""
    epoch, place = divmod(position, num_documents)
    return _permutation(epoch, num_documents, seed)[place]


@lru_cache(maxsize=4)
def _permutation(epoch: int, num_documents: int, seed: int) -> tuple[int, ...]:
    order = list(range(num_documents))
    random.Random(f"{seed}-epoch-{epoch}").shuffle(order)
    return tuple(order)
