"""Fixtures that several test files share: tiny models with a tokenizer of their own, and where a file's kernels run."""

import os
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter_process import interpreting
from tiny_checkpoints import tiny_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rtpurbo.converter.recipe import Recipe

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY = 384


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens, trained on a few topics of the Python documentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = list(pydoc_data.topics.topics.values())[:8]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """A factory of tiny checkpoints with tokenizer: tiny_model("llama", num_hidden_layers=2) -> folder; equal calls share one."""
    made: dict[Any, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            shape = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024}
            made[key] = tiny_checkpoint(folder, family, **{**shape, **changes})
            tiny_tokenizer.save_pretrained(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Recipe]:
    """The demo recipe at the size of tiny models; keyword arguments replace fields."""

    def make(**changes: Any) -> Recipe:
        small = {
            "sliding_window": 32,
            "dtype": "float32",
            "index_dim": 8,
            "decode_block": 16,
            "retrieval_ratio": 0.34,
            "calibration_documents": 2,
            "calibration_tokens": 384,
            "needle_tokens": 16,
            "indexer_steps": 4,
            "indexer_min_tokens": 192,
            "indexer_max_tokens": 256,
            "indexer_warmup": 1,
            "distill_steps": 3,
            "distill_batch": 2,
            "distill_min_tokens": 192,
            "distill_max_tokens": 256,
            "answer_tokens": 48,
            "distill_learning_rate": 1e-3,
            "distill_warmup": 1,
            "checkpoint_every": 1,
            "evaluation_documents": 1,
            "evaluation_tokens": 640,
            "evaluation_needles": 1,
        }
        return Recipe.preset_named("demo", **{**small, **changes})

    return make


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """call(operation, message) -> answer: an operation of the test file's OPERATIONS in Triton's interpreter."""
    with interpreting(request.module.__file__) as call:
        yield call


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], Any]:
    """As `interpreted`, and on a GPU where there is one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        return lambda operation, message: request.module.OPERATIONS[operation](message, "cuda")
    return request.getfixturevalue("interpreted")
