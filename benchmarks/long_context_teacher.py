"""The long-context teacher: SmolLM2-135M-Instruct with RoPE theta 1e6, tuned on text and needle prompts of 2K to 16K tokens."""

# B rows of a step  T tokens of a row  A answer tokens  C hidden  V vocabulary
import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from rtpurbo.benchmarks.long_context_data import Material, Prompt
from rtpurbo.converter.checkpoint import Checkpoint, load_model

HELDOUT_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """How the teacher is tuned; lengths in tokens. A step is `step_tokens` tokens: rows of one length from `needle_lengths`, or every
    `text_every`-th time of `text_length`. Learning rate: linear warm-up, then a half cosine that ends at `final_rate` of the peak."""

    steps: int = 300
    step_tokens: int = 16384
    text_every: int = 3
    text_length: int = 4096
    needle_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    max_keys: int = 8
    learning_rate: float = 2e-4
    warmup: int = 30
    final_rate: float = 0.05
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    rope_theta: float = 1e6
    max_positions: int = 40960
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """ids_BT int32, and the flat positions b * T + t whose logits are trained; targets are the tokens after them."""

    ids_BT: np.ndarray
    predicting_A: np.ndarray

    @property
    def targets_A(self) -> np.ndarray:
        """The tokens to predict, int64."""
        return self.ids_BT.reshape(-1)[self.predicting_A + 1].astype(np.int64)


def step_of(material: Material, recipe: TeacherRecipe, step: int) -> Step:
    """The data of one step: plain text with loss everywhere, or needle prompts with loss on the codes alone."""
    draw = random.Random(f"{recipe.seed}-step-{step}")
    if step % recipe.text_every == 0:
        ids_BT = material.texts(draw, recipe.step_tokens // recipe.text_length, recipe.text_length)
        predicting_BT = np.ones(ids_BT.shape, dtype=bool)
        predicting_BT[:, -1] = False
        return Step(ids_BT=ids_BT, predicting_A=np.flatnonzero(predicting_BT))
    length = draw.choice(recipe.needle_lengths)
    prompts = []
    for _ in range(recipe.step_tokens // length):
        keys = draw.randint(1, recipe.max_keys)
        prompts.append(material.needles(draw, length, keys=keys, asked=draw.randint(1, keys)))
    predicting_A = np.concatenate([row * length + prompt.predicting for row, prompt in enumerate(prompts)])
    return Step(ids_BT=np.stack([prompt.token_ids for prompt in prompts]), predicting_A=predicting_A)


def stretched(source: Checkpoint, recipe: TeacherRecipe) -> Checkpoint:
    """The checkpoint with the recipe's RoPE base and number of positions."""
    config = {**source.config, "max_position_embeddings": recipe.max_positions}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": recipe.rope_theta}
    config.pop("rope_theta", None)
    return dataclasses.replace(source, config=config)


def tune(source: Checkpoint, material: Material, recipe: TeacherRecipe, *, device: str, say: Callable[[str], None]) -> Any:
    """The tuned model in fp32. Nothing in a step waits for the device."""
    model: Any = load_model(stretched(source, recipe), dtype=torch.float32, device=device, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=device.startswith("cuda")
    )
    losses: list[torch.Tensor] = []
    began = time.perf_counter()
    for n in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(n)
        step = step_of(material, recipe, n)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16), fast_attention():
            loss = loss_of(model, step, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (n + 1) % 60 == 0 or n + 1 == recipe.steps:
            text = [x for i, x in enumerate(losses) if i % recipe.text_every == 0]
            needle = [x for i, x in enumerate(losses) if i % recipe.text_every]
            say(f"step {n + 1}: text loss {_tail(text)}, needle loss {_tail(needle)}, {time.perf_counter() - began:.1f} s")
    return model.eval().requires_grad_(False)


def loss_of(model: Any, step: Step, device: str) -> torch.Tensor:
    """Mean cross entropy of the step's trained positions; logits exist for those alone."""
    ids_BT = _moved(step.ids_BT.astype(np.int64), device)
    hidden_BTC = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    hidden_AC = hidden_BTC.flatten(0, 1).index_select(0, _moved(step.predicting_A, device))
    return cross_entropy(model.lm_head(hidden_AC).float(), _moved(step.targets_A, device))


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the teacher in bf16; buffers keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def exact_match(model: Any, prompts: Sequence[Prompt], device: str) -> float:
    """Share of prompts whose every code token is the arg-max given the tokens before it: exact match of greedy decoding."""
    hits = []
    for prompt in prompts:
        with fast_attention():
            hidden = model.model(input_ids=_moved(prompt.token_ids[None].astype(np.int64), device), use_cache=False).last_hidden_state
        found_A = model.lm_head(hidden[0, _moved(prompt.predicting, device)]).argmax(dim=-1)
        hits.append((found_A == _moved(prompt.token_ids[prompt.is_answer].astype(np.int64), device)).all())
    return torch.stack(hits).float().mean().item()


@torch.no_grad()
def perplexity(model: Any, ids_BT: np.ndarray, device: str) -> float:
    """exp of the mean negative log likelihood of every token but each row's first."""
    losses = []
    for row in ids_BT:
        predicting = np.arange(len(row) - 1)
        losses.append(loss_of(model, Step(ids_BT=row[None], predicting_A=predicting), device))
    return math.exp(torch.stack(losses).mean().item())


def measure(model: Any, heldout: Material, lengths: Sequence[int], *, samples: int, text_length: int, device: str) -> dict[str, Any]:
    """Needle exact match (one fact; one of four facts asked) at each length, and perplexity of held-out text."""
    result: dict[str, Any] = {"samples": samples, "needle": {}, "four_keys": {}}
    for name, keys in (("needle", 1), ("four_keys", 4)):
        for length in lengths:
            draws = (random.Random(f"{HELDOUT_SEED}-{name}-{length}-{n}") for n in range(samples))
            prompts = [heldout.needles(draw, length, keys=keys) for draw in draws]
            result[name][str(length)] = round(exact_match(model, prompts, device), 4)
    texts = heldout.texts(random.Random(HELDOUT_SEED), samples, text_length)
    result["perplexity"] = {str(text_length): round(perplexity(model, texts, device), 4)}
    return result


@contextlib.contextmanager
def fast_attention() -> Iterator[None]:
    """The fastest SDPA that is there, cuDNN before FlashAttention; the CPU takes its own."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def _moved(array: np.ndarray, device: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else tensor


def _tail(losses: Sequence[torch.Tensor]) -> str:
    return f"{torch.stack(list(losses[-20:])).mean().item():.3f}" if losses else "-"
