"""Documents: every format, packing, windows, splits, answers, seeds, and every malformed row refused by name."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hub_server import HubServer
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rtpurbo.converter.data import Document, data_digest, load_documents
from rtpurbo.converter.sources import PYTHON_DOCS, STAGE1_DATA, STAGE2_DATA, DataSource

BOS, EOS = 0, 1
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def byte_tokenizer(*, begin: bool = False, eos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte: id - 2 is the rank in the byte-level alphabet; <s> is 0 and </s> is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={"<s>": BOS, "</s>": EOS, **{c: i + 2 for i, c in enumerate(alphabet)}}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if begin:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>" if eos else None)
    tokenizer.chat_template = chat_template
    return tokenizer


def encode(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def load(path: Path | str, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> list[Document]:
    options: dict[str, Any] = {"min_tokens": 20, "max_tokens": 20, "count": 1, "seed": 0, "answer_tokens": 0, "split": "train"}
    return load_documents(DataSource.parse(str(path)), tokenizer or byte_tokenizer(), **{**options, **changes})


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_key(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda d: [int(n) for n in d.key.split("#")[1].split("+")])


def test_the_python_documentation_gives_real_english_in_every_installation():
    documents = load(PYTHON_DOCS, min_tokens=1000, max_tokens=4000, count=20, answer_tokens=50)
    assert len({d.key for d in documents}) == 20
    assert all(1000 <= len(d) <= 4000 and d.answer_start == len(d) - 50 for d in documents)
    assert "statement" in byte_tokenizer().decode(np.concatenate([d.token_ids for d in documents]))


def test_short_texts_are_joined_with_the_end_of_text_token_between_them(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "ijklmnop"}, {"text": "qrstuvwx"}])
    (document,) = load(path)
    assert document.token_ids.tolist() == [*encode("abcdefgh"), EOS, *encode("ijklmnop"), EOS, *encode("qr")]
    (document,) = load(path, byte_tokenizer(eos=False))
    assert document.token_ids.tolist() == encode("abcdefghijklmnopqrst")


def test_long_texts_are_cut_into_windows_that_cover_the_text(tmp_path: Path):
    text = "".join(chr(97 + i % 26) for i in range(95))
    documents = by_key(load(jsonl(tmp_path / "a.jsonl", [{"text": text}]), min_tokens=10, max_tokens=20, count=5))
    assert [d.key for d in documents] == [f"a.jsonl#0+{i}" for i in (0, 20, 40, 60, 80)]
    assert np.concatenate([d.token_ids for d in documents]).tolist() == encode(text)


def test_a_text_between_the_limits_is_a_document_of_its_own(tmp_path: Path):
    rows = [{"text": "a" * 12}, {"text": "b" * 17}, {"text": "c" * 20}]
    documents = by_key(load(jsonl(tmp_path / "a.jsonl", rows), min_tokens=10, max_tokens=20, count=3))
    assert [d.token_ids.tolist() for d in documents] == [encode(row["text"]) for row in rows]


def test_joined_documents_average_the_mean_of_the_triangular_distribution(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "abcdefg"}] * 4000)
    lengths = [len(d) for d in load(path, min_tokens=32, max_tokens=80, count=400)]
    assert min(lengths) >= 32
    assert max(lengths) <= 80
    # (32 + 32 + 80) / 3 = 48, plus half a row by which a document overshoots its drawn length.
    assert 48 < np.mean(lengths) < 54


def test_every_document_begins_with_the_token_that_the_tokenizer_puts_first(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "abcdefghij" * 10}])
    documents = by_key(load(path, byte_tokenizer(begin=True), count=5))
    assert all(d.token_ids[0] == BOS and len(d) == 20 for d in documents)
    assert documents[1].token_ids[1:].tolist() == encode(("abcdefghij" * 10)[19:38])


@pytest.mark.parametrize("key", ["response", "answer", "completion"])
def test_the_answer_of_a_prompt_begins_where_the_prompt_ends(tmp_path: Path, key: str):
    rows = [{"prompt": "a question that is long: ", key: "the answer"}]
    (document,) = load(jsonl(tmp_path / "a.jsonl", rows), max_tokens=100, answer_tokens=3)
    assert document.token_ids.tolist() == encode("a question that is long: the answer")
    assert document.token_ids[document.answer_start :].tolist() == encode("the answer")


def test_a_short_dialogue_follows_its_predecessors_and_the_last_answer_counts(tmp_path: Path):
    rows = [{"prompt": "q1:", "response": "one"}, {"prompt": "q2:", "response": "two"}, {"prompt": "q3:", "response": "three"}]
    (document,) = load(jsonl(tmp_path / "a.jsonl", rows), max_tokens=100)
    assert document.token_ids.tolist() == [*encode("q1:one"), EOS, *encode("q2:two"), EOS, *encode("q3:three")]
    assert document.token_ids[document.answer_start :].tolist() == encode("three")


def test_a_long_dialogue_loses_its_oldest_tokens_and_keeps_the_answer(tmp_path: Path):
    rows = [{"prompt": "x" * 50 + "near", "response": "the answer"}]
    (document,) = load(jsonl(tmp_path / "a.jsonl", rows), byte_tokenizer(begin=True))
    assert document.token_ids.tolist() == [BOS, *encode("xxxxxnearthe answer")]
    assert document.answer_start == 10


def test_messages_pass_through_the_chat_template_and_the_last_assistant_message_is_the_answer(tmp_path: Path):
    turns = [("user", "hello"), ("assistant", "hi"), ("user", "who are you?"), ("assistant", "a model"), ("user", "bye")]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (document,) = load(path, byte_tokenizer(chat_template=CHAT), max_tokens=200)
    text = "<user>hello\n<assistant>hi\n<user>who are you?\n<assistant>a model\n"
    assert document.token_ids.tolist() == encode(text)
    assert document.token_ids[document.answer_start :].tolist() == encode("a model\n")
    (document,) = load(path, max_tokens=200)
    assert document.token_ids.tolist() == encode("user: hello\n\nassistant: hi\n\nuser: who are you?\n\nassistant: a model")
    assert document.token_ids[document.answer_start :].tolist() == encode("a model")


def test_a_template_that_refuses_the_messages_is_named_with_the_line(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1: the tokenizer's chat template refuses .*roles must alternate"):
        load(path, byte_tokenizer(chat_template=template))


@pytest.mark.parametrize("kind", ["jsonl", "txt", "folder", "parquet"])
def test_training_and_held_out_documents_share_no_text(tmp_path: Path, kind: str):
    words = [f"w{i:04d}" for i in range(800)]
    if kind == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", [{"text": word} for word in words])
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": words, "id": list(range(800))}), path)
    elif kind == "txt":
        path = tmp_path / "a.txt"
        path.write_text("\n".join(words) + "\n")
    else:
        path = tmp_path / "books"
        (path / "sub").mkdir(parents=True)
        for i in range(0, 800, 50):
            (path / ("sub" if i % 100 else ".") / f"{i:03d}.md").write_text(" ".join(words[i : i + 50]))
    parts = {}
    for split, count in (("train", 60), ("heldout", 8)):
        documents = load(path, min_tokens=48, max_tokens=60, count=count, split=split)
        text = " ".join(str(byte_tokenizer().decode(d.token_ids)) for d in documents)
        parts[split] = {word for word in words if word in text}
    assert len(parts["train"]) > 400
    assert len(parts["heldout"]) > 40
    assert not parts["train"] & parts["heldout"]


def test_a_text_file_is_read_without_a_gap_inside_its_pieces(tmp_path: Path):
    path = tmp_path / "ä.txt"
    text = "Zürich, 東京 and København\n" * 900 + "ein Wort ohne Zeilenende " * 500
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = list(DataSource.parse(str(path)).rows())
    assert "".join(row.text or "" for row in rows) == text
    assert 40 < len(rows) <= 66
    assert [row.continues for row in rows] == [False] + [True] * (len(rows) - 1)


def test_pieces_that_follow_each_other_are_joined_without_a_separator(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i:05d}\n" for i in range(700)))
    documents = by_key(load(path, min_tokens=1700, max_tokens=1700, count=4))
    # One separator, where the eighth piece is left out.
    assert [int((d.token_ids == EOS).sum()) for d in documents] == [0, 0, 1, 0]


def test_the_same_seed_gives_the_same_documents_and_another_seed_others():
    digests = [data_digest(load(PYTHON_DOCS, min_tokens=500, max_tokens=900, count=6, seed=seed, answer_tokens=10)) for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_covers_tokens_answer_starts_and_borders():
    document = Document(token_ids=np.arange(8, dtype=np.int32), answer_start=5, key="a#0+0")
    halves = [replace(document, token_ids=document.token_ids[:4]), replace(document, token_ids=document.token_ids[4:])]
    other = [replace(document, answer_start=None), replace(document, answer_start=6), replace(document, token_ids=document.token_ids + 1)]
    digests = {data_digest([document]), data_digest(halves), data_digest([]), *(data_digest([d]) for d in other)}
    assert len(digests) == 6
    assert data_digest([replace(document, key="b#9+9")]) == data_digest([document])


def test_token_ids_cannot_be_written_to(tmp_path: Path):
    (document,) = load(jsonl(tmp_path / "a.jsonl", [{"text": "a" * 30}]))
    with pytest.raises(ValueError, match="read-only"):
        document.token_ids[0] = 1


def test_too_little_text_is_refused_with_the_tokens_found_and_wanted(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a" * 25}, {"text": "b" * 25}])
    with pytest.raises(
        ValueError, match=r"a\.jsonl: the train part has 50 tokens, enough for 2 .* of 20; wanted 3 documents \(60 tokens\)"
    ):
        load(path, count=3)
    with pytest.raises(ValueError, match=r"the heldout part has 0 tokens"):
        load(path, split="heldout")
    assert len(load(path, count=3, at_least=2)) == 2


def test_scarce_text_is_cut_at_the_shortest_length_rather_than_refused(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a" * 100}])
    documents = load(path, min_tokens=20, max_tokens=60, count=5)
    assert [len(d) for d in documents] == [20] * 5


def test_a_source_is_read_only_as_far_as_needed(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "abcdefghijklmnopqrstuvwxyz"}] * 50)
    with path.open("a") as file:
        file.write("{broken\n")
    assert len(load(path, count=5)) == 5
    with pytest.raises(ValueError, match=r"a\.jsonl: line 51: not valid JSON"):
        load(path, count=60)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 2: not valid JSON"),
        ("[1, 2]", r"line 2: a list, wanted an object with 'text'"),
        ('{"body": "a", "id": 3}', r"line 2: keys are 'body', 'id', wanted 'text', or 'prompt' and 'response'"),
        ('{"prompt": "a"}', r"line 2: keys are 'prompt', wanted"),
        ("{}", r"line 2: keys are none, wanted"),
        ('{"text": null}', r"line 2: text is null, wanted a string"),
        ('{"text": 5}', r"line 2: text is a number, wanted a string"),
        ('{"prompt": "a", "answer": ["b"]}', r"line 2: answer is a list, wanted a string"),
        ('{"prompt": "", "answer": "b"}', r"line 2: prompt is empty, wanted text"),
        ('{"messages": "hi"}', r"line 2: messages is a string, wanted a list"),
        ('{"messages": []}', r"line 2: messages is an empty list, wanted a list"),
        ('{"messages": ["hi"]}', r"line 2: messages\.0 is a string, wanted"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\.0: content is missing, wanted a string"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"line 2: messages have the roles user, wanted an assistant message"),
    ],
)
def test_a_malformed_row_is_refused_with_file_line_and_what_was_wanted(tmp_path: Path, line: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"{path}: {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_bytes(b"x" * 4000 + b"\n" + b"\xff\n")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text \(invalid start byte at byte 4001\)"):
        load(text, count=500)
    cut = tmp_path / "cut.txt"
    cut.write_bytes(b"x" * 600 + "é".encode()[:1])
    with pytest.raises(ValueError, match=r"cut\.txt: not UTF-8 text \(unexpected end of data at byte 600\)"):
        load(cut, count=500)
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1: not UTF-8 text"):
        load(lines)


def test_empty_and_blank_files_are_refused_by_name(tmp_path: Path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name}: the file is empty"):
            load(tmp_path / name)
    (tmp_path / "blank.md").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"blank\.md: the file has only white space"):
        load(tmp_path / "blank.md")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"blank\.jsonl: the file has no rows"):
        load(tmp_path / "blank.jsonl")


def test_parquet_columns_and_damage_are_reported_by_file(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["question " * 3], "answer": ["yes"], "embedding": [[0.5]]}), path)
    (document,) = load(path, max_tokens=50)
    assert document.token_ids[document.answer_start :].tolist() == encode("yes")
    parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 0: keys are 'body', 'id', wanted"):
        load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        load(path)


def test_a_source_that_does_not_exist_is_refused_and_a_folder_needs_text(tmp_path: Path):
    for spec in (str(tmp_path / "missing.txt"), "data/missing.jsonl", "", "nothing", "a/b/c"):
        with pytest.raises(ValueError, match="no such file or folder, and not a Hub data set"):
            DataSource.parse(spec)
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"suffix is '\.pdf', wanted one of \.txt, \.md, \.jsonl, \.parquet"):
        DataSource.parse(str(tmp_path / "a.pdf"))
    with pytest.raises(ValueError, match="no file with suffix"):
        DataSource.parse(str(tmp_path))


def test_a_hub_name_is_split_into_repository_configuration_and_revision():
    source = DataSource.parse("org/name:part@v1")
    assert (source.kind, source.repo, source.config, source.revision) == ("hub", "org/name", "part", "v1")
    for default in (STAGE1_DATA, STAGE2_DATA):
        source = DataSource.parse(default)
        assert len(source.revision or "") == 40
        assert source.resolve() is source


def test_local_sources_are_named_without_their_folder(tmp_path: Path):
    path = jsonl(tmp_path / "notes.jsonl", [{"text": "a" * 30}])
    assert DataSource.parse(str(path)).name == "notes.jsonl"
    assert load(path)[0].key == "notes.jsonl#0+0"


@pytest.mark.parametrize("options", [{"min_tokens": 30}, {"min_tokens": 1}, {"answer_tokens": 20}, {"count": 0}, {"at_least": 2}])
def test_impossible_lengths_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match="wanted"):
        load(PYTHON_DOCS, **options)


HUB_SCRIPT = """
import sys
from rtpurbo.converter.data import data_digest, load_documents
from rtpurbo.converter.sources import DataSource
from test_data import byte_tokenizer
for spec in sys.argv[1:]:
    try:
        source = DataSource.parse(spec).resolve()
        documents = load_documents(source, byte_tokenizer(), min_tokens=40, max_tokens=40, count=4, seed=0, answer_tokens=0, split="train")
        print("OK", source.name, len(documents), documents[0].key)
    except ValueError as error:
        print("ERROR", error)
"""


def test_a_hub_data_set_is_streamed_at_a_resolved_revision(tmp_path: Path):
    shards = {f"data/train-{i:05d}.jsonl": b"".join(b'{"text": "row %d of shard %d"}\n' % (j, i) for j in range(400)) for i in range(3)}
    with HubServer() as hub:
        sha = hub.add_repository("datasets", "org/texts", shards)
        hub.add_repository("datasets", "org/keys", {"train.jsonl": b'{"body": "a"}\n'})
        environment = {**os.environ, **hub.environment(tmp_path, token=None), "PYTHONPATH": str(Path(__file__).parent)}
        specs = ["org/texts", "org/texts@no-such-branch", "org/nothing", "org/keys", "org/texts:no-config"]
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT, *specs], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        read = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stdout
    assert lines[0].startswith(f"OK org/texts@{sha} 4 org/texts@{sha}#")
    assert lines[1].startswith("ERROR --data org/texts@no-such-branch: the Hub gives no revision of it (")
    assert lines[2].startswith("ERROR --data org/nothing: the Hub gives no revision of it (")
    assert "row 0: keys are 'body', wanted 'text'" in lines[3]
    assert "the data set cannot be opened (" in lines[4]
    assert any("train-00000" in path for path in read)
    assert not any("train-00002" in path for path in read)
