"""Generation: batches, streaming, stop strings, sampling, dense_below, and the errors a user can make."""

import dataclasses
from pathlib import Path
from typing import Any

import eager_model as eager
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import load
from rtpurbo.runtime.text import TextStream

EOS = "<eos>"


def byte_tokenizer() -> Any:
    """Every byte is a token, as in byte-level BPE without merges: most characters beyond ASCII span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    return fast


def save(folder: Path, *, dense_below: int = 0, tokenizer: Any = None, **changes: Any) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = eager.tiny_config("llama", layers=2, vocab_size=len(tokenizer), **changes)
    return eager.save_artifact(folder, config, [[0, 5], [4, 5, 6, 7]], dense_below=dense_below)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("artifact")
    save(folder, dense_below=20)
    return load(folder, device="cpu")


PROMPTS = ["a long enough prompt, which runs sparse: " * 3, "short", "another prompt of more than twenty bytes", "été"]


def test_a_batch_generates_what_its_prompts_generate_alone(runtime: Runtime) -> None:
    together = runtime.generate(PROMPTS, max_new_tokens=40, prefill_chunk=16)
    assert [g.dense for g in together] == [False, True, False, True]
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = runtime.generate(prompt, max_new_tokens=40, prefill_chunk=1000)[0]
        assert (alone.token_ids, alone.text, alone.finish_reason) == (answer.token_ids, answer.text, answer.finish_reason)
        assert answer.prompt_tokens == len(prompt.encode())
        assert len(answer.token_ids) == 40
        assert answer.finish_reason == "length"
        assert answer.decode_steps == 39
        assert answer.cache_bytes > 0


def test_greedy_tokens_are_those_of_teacher_forced_decode(runtime: Runtime) -> None:
    prompt = runtime.tokenizer(PROMPTS[0])["input_ids"]
    answer = runtime.generate([prompt], max_new_tokens=10)[0]
    state = runtime.start(1, len(prompt) + 10)
    logits = runtime.prefill(state, torch.tensor([prompt]))
    for token in answer.token_ids:
        assert int(logits.argmax()) == token
        logits = runtime.decode(state, torch.tensor([token]))


def test_streamed_pieces_join_to_the_text_of_each_sequence(runtime: Runtime) -> None:
    pieces: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}
    answers = runtime.generate(PROMPTS, max_new_tokens=60, temperature=1.5, seed=3, on_text=lambda index, text: pieces[index].append(text))
    for i, answer in enumerate(answers):
        assert "".join(pieces[i]) == answer.text
        assert answer.text == runtime.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert len(pieces[i]) > 1


def test_characters_of_several_tokens_are_streamed_whole() -> None:
    text = "naïve — 漢字 🙂 end"
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join([*pieces, stream.finish()]) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🙂" in pieces


def test_an_incomplete_character_at_the_end_is_shown_when_the_sequence_ends() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer("aé")["input_ids"][:2]]
    assert pieces == ["a", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_words_keep_the_spaces_that_their_tokenizer_puts_between_them() -> None:
    words = ["[UNK]", "one", "two", "three"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    assert [stream.push(token) for token in (1, 2, 3, 1)] == ["one", " two", " three", " one"]


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("abcSTOPdef", ("STOP",), "abc"),
        ("abcSTOdef", ("STOP",), None),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd", "zzz"), "abc"),
        ("héé!", ("é!",), "hé"),
        ("first\nsecond", ("second", "\n"), "first"),
    ],
)
def test_nothing_of_a_stop_string_is_ever_streamed(text: str, stop: tuple[str, ...], wanted: str | None) -> None:
    tokenizer = byte_tokenizer()
    stream, seen = TextStream(tokenizer, stop), ""
    for token in tokenizer(text)["input_ids"]:
        seen += stream.push(token)
        assert (wanted if wanted is not None else text).startswith(seen)
        if stream.stopped:
            break
    seen += stream.finish()
    assert seen == stream.text == (text if wanted is None else wanted)
    assert stream.stopped == (wanted is not None)


def test_a_stop_string_ends_its_sequence_and_leaves_the_others_unchanged(runtime: Runtime) -> None:
    free = runtime.generate(PROMPTS, max_new_tokens=60, temperature=2.0, seed=1)
    stop = next(c for c in free[0].text[10:] if c.isascii() and c.isprintable())
    pieces: dict[int, str] = dict.fromkeys(range(len(PROMPTS)), "")

    def collect(index: int, text: str) -> None:
        pieces[index] += text

    stopped = runtime.generate(PROMPTS, max_new_tokens=60, temperature=2.0, seed=1, stop=[stop], on_text=collect)
    assert stopped[0].finish_reason == "stop"
    for i, (before, after) in enumerate(zip(free, stopped, strict=True)):
        assert after.text == before.text.split(stop)[0] == pieces[i]
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        assert after.finish_reason == ("stop" if stop in before.text else before.finish_reason)


def test_the_end_of_sequence_token_ends_a_sequence_and_is_not_part_of_it(tmp_path: Path) -> None:
    save(tmp_path)
    runtime = load(tmp_path, device="cpu")
    free = runtime.generate(PROMPTS, max_new_tokens=30)
    token = free[0].token_ids[5]
    runtime.model.generation_config.eos_token_id = [token]
    for before, after in zip(free, runtime.generate(PROMPTS, max_new_tokens=30), strict=True):
        end = before.token_ids.index(token) if token in before.token_ids else 30
        assert after.token_ids == before.token_ids[:end]
        assert after.finish_reason == ("length" if end == 30 else "eos")


def test_sampling_depends_on_the_seed_and_on_nothing_else(runtime: Runtime) -> None:
    def tokens(seed: int, prompts: list[str]) -> list[tuple[int, ...]]:
        return [g.token_ids for g in runtime.generate(prompts, max_new_tokens=20, temperature=1.0, top_k=50, top_p=0.95, seed=seed)]

    first = tokens(7, PROMPTS)
    assert tokens(7, PROMPTS) == first
    assert tokens(8, PROMPTS) != first
    assert tokens(7, PROMPTS[:1]) == first[:1]
    same = tokens(7, [PROMPTS[0]] * 2)
    assert same[0] != same[1]


def test_chat_wraps_each_prompt_in_the_tokenizers_template(runtime: Runtime) -> None:
    chat = runtime.generate(["hello there, model"], max_new_tokens=8, chat=True)[0]
    plain = runtime.generate(["[user]hello there, model[bot]"], max_new_tokens=8)[0]
    assert (chat.token_ids, chat.prompt_tokens) == (plain.token_ids, plain.prompt_tokens)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ("", {}, "prompt 0 is empty"),
        (["fine", ""], {}, "prompt 1 is empty"),
        ([[1, 2], []], {}, "prompt 1 is empty"),
        ([1, 2], {}, "prompts must be texts or lists of token ids, found int"),
        ([[1, 5000]], {}, r"prompt 0 has token ids outside 0 \.\.\. 256"),
        ([[1, -1]], {}, "prompt 0 has token ids outside"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("a", {"prefill_chunk": 0}, "prefill_chunk 0"),
        ("a" * 1000, {"max_new_tokens": 25}, "prompt 0 has 1000 tokens; with max_new_tokens 25 it exceeds .* 1024"),
        ("a", {"temperature": -1.0}, "temperature is -1.0"),
        ("a", {"temperature": float("nan")}, "temperature is nan"),
        ("a", {"top_k": -1}, "top_k is -1"),
        ("a", {"top_p": 0.0}, "top_p is 0.0"),
        ("a", {"top_p": 1.5}, "top_p is 1.5"),
        ("a", {"stop": [""]}, "stop strings must not be empty"),
        ([[1, 2]], {"chat": True}, "chat needs prompts as text"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_before_any_work(
    runtime: Runtime, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.generate(prompts, **options)


def test_an_artifact_without_tokenizer_takes_token_ids_and_refuses_text(tmp_path: Path) -> None:
    eager.save_artifact(tmp_path, eager.tiny_config("llama", layers=2), [[0, 5], []])
    runtime = load(tmp_path, device="cpu")
    answer = runtime.generate([[1, 2, 3]], max_new_tokens=4)[0]
    assert (len(answer.token_ids), answer.text) == (4, "")
    with pytest.raises(ValueError, match="no tokenizer: give prompts as token ids"):
        runtime.generate("text")
    with pytest.raises(ValueError, match="need an artifact with a tokenizer"):
        runtime.generate([[1]], stop=["x"])


def test_a_tokenizer_without_chat_template_refuses_chat(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    save(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path, device="cpu").generate("hi", chat=True)


def test_a_full_cache_refuses_more_tokens_before_writing_any(runtime: Runtime) -> None:
    state = runtime.start(2, 10)
    runtime.prefill(state, torch.ones(2, 8, dtype=torch.int64), torch.tensor([[1] * 8, [0] * 3 + [1] * 5]))
    stored = [tensor.clone() for layer in state.cache.layers for tensor in layer.tensors()]
    with pytest.raises(ValueError, match="sequence 0 has 8 tokens in the cache and gets 3 more, but the capacity is 10"):
        runtime.prefill(state, torch.ones(2, 3, dtype=torch.int64))
    assert state.cache.lengths == state.cache.lengths_B.tolist() == [8, 5]
    now = [tensor for layer in state.cache.layers for tensor in layer.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(stored, now, strict=True))


def test_a_cache_that_memory_cannot_hold_is_refused(tmp_path: Path) -> None:
    save(tmp_path, max_position_embeddings=1 << 30)
    runtime = load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"a cache for 64 sequences of 1073741824 tokens needs .* GiB on cpu, but .* available"):
        runtime.start(64, 1 << 30)
    with pytest.raises(ValueError, match="exceed the model's max_position_embeddings"):
        runtime.start(1, (1 << 30) + 1)
    with pytest.raises(ValueError, match="both must be at least 1"):
        runtime.start(0, 10)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.ones(1, 3), None, r"do not fit a batch of 2"),
        (torch.ones(2, 3), torch.ones(2, 2), r"attention_mask \(2, 2\) do not fit"),
        (torch.ones(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "sequence 1 has no token"),
    ],
)
def test_prefill_refuses_shapes_and_masks_that_do_not_fit(runtime: Runtime, ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.prefill(runtime.start(2, 10), ids.long(), mask)


def test_right_and_left_padding_give_the_same_logits(runtime: Runtime) -> None:
    rows, widest = [[5, 6, 7, 8, 9], [3, 4]], 5
    left = torch.tensor([[0] * (widest - len(row)) + row for row in rows])
    right = torch.tensor([row + [0] * (widest - len(row)) for row in rows])
    states = [runtime.start(2, 8) for _ in range(2)]
    logits = [runtime.prefill(s, ids, (ids > 0).long(), chunk=2) for s, ids in zip(states, (left, right), strict=True)]
    assert torch.equal(logits[0], logits[1])
    every = runtime.prefill(runtime.start(2, 8), left, (left > 0).long(), all_logits=True)
    assert (every[:, -1] - logits[0]).abs().max() < 1e-5
    assert (every[1, :3] == 0).all()


def test_a_generation_is_frozen(runtime: Runtime) -> None:
    answer = runtime.generate("some prompt", max_new_tokens=1)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.text = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_captured_generation_streams_and_stops_as_a_cpu_does(tmp_path: Path) -> None:
    save(tmp_path, dense_below=20)
    answers = []
    for device in ("cpu", "cuda"):
        pieces = dict.fromkeys(range(len(PROMPTS)), "")

        def collect(index: int, text: str, pieces: dict[int, str] = pieces) -> None:
            pieces[index] += text

        found = load(tmp_path, device=device).generate(PROMPTS, max_new_tokens=60, stop=["e", "7"], on_text=collect)
        assert all(pieces[i] == answer.text for i, answer in enumerate(found))
        answers.append([(answer.token_ids, answer.text, answer.finish_reason, answer.decode_steps) for answer in found])
    assert answers[0] == answers[1]
    assert any(reason == "stop" for _, _, reason, _ in answers[0])
