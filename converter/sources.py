"""Where documents come from: parse `--data` and read rows one by one from files, a Hub data set or the Python documentation."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

PYTHON_DOCS = "python-docs"
STAGE1_DATA = "HuggingFaceFW/fineweb:sample-10BT@9bb295ddab0e05d785b879661af7260fed5140fc"
STAGE2_DATA = "allenai/dolma3_longmino_mix-50B-1025@8c0b3b265f95514c0f1b643c95da518e261a32a7"
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
ANSWER_KEYS = ("response", "answer", "completion")
WANTED_KEYS = "'text', or 'prompt' and 'response' (or 'answer' or 'completion'), or 'messages'"

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
_SHA = re.compile(r"[0-9a-f]{40}")
# A text source is read in about 64 pieces, so that holding out every eighth piece works for a small file too; the upper limit
# bounds the memory, the lower one keeps a piece longer than a sentence.
_PIECES, _MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 64, 512, 256 << 10
_PARQUET_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One unit of a source, before tokenisation. Exactly one of `text`, (`prompt`, `answer`) and `messages` is set.

    position: index in the source, from 0; it decides the split. where: file and line or row, for messages to the user.
    continues: the text goes on where the row before it ended (pieces of one file).
    """

    position: int
    where: str
    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    continues: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """What `--data` names. name: how results refer to it: never a local path, only the file's or folder's own name.

    files: the local files in reading order (kind "files"). repo, config, revision: the Hub data set (kind "hub").
    """

    kind: Literal["files", "hub", "python-docs"]
    name: str
    files: tuple[Path, ...] = ()
    repo: str = ""
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, spec: str) -> "DataSource":
        """The source that `spec` names; nothing is read and no network is used.

        "python-docs": the topics of `pydoc_data` in the standard library, about 465,000 characters of English, always there.
        A file .txt, .md, .jsonl or .parquet, or a folder of such files (with subfolders, in the order of their names).
        "org/name[:config][@revision]": a data set of the Hub. A local file or folder of that name comes first.

        Errors: ValueError when a path does not exist, is empty, has another suffix, or a folder has no such file.
        """
        if spec == PYTHON_DOCS:
            return cls(kind="python-docs", name=PYTHON_DOCS)
        path = Path(spec).expanduser()
        if spec and path.exists():
            files = _files_of(path)
            for file in files:
                if file.stat().st_size == 0:
                    raise ValueError(f"{file}: the file is empty, wanted text")
            return cls(kind="files", name=path.resolve().name, files=files)
        match = _HUB_ID.fullmatch(spec)
        if match is None or path.suffix in SUFFIXES:
            hub = f"a Hub data set 'org/name[:config][@revision]' or {PYTHON_DOCS!r}"
            raise ValueError(f"--data {spec!r}: no such file or folder, and not {hub}")
        repo, config, revision = match.group("repo", "config", "revision")
        return cls(kind="hub", name=spec, repo=repo, config=config, revision=revision)

    def resolve(self) -> "DataSource":
        """The same source with the Hub revision replaced by its commit sha (network, unless it is one already).

        `name` then holds the sha too. Local sources are returned unchanged. Errors: ValueError when the Hub cannot be reached
        or has no such data set or revision.
        """
        if self.kind != "hub" or _SHA.fullmatch(self.revision or ""):
            return self
        from huggingface_hub import HfApi

        try:
            sha = HfApi().dataset_info(self.repo, revision=self.revision).sha
        except hub_failures() as error:
            raise ValueError(f"--data {self.name}: the Hub gives no revision of it ({first_line(error)})") from error
        config = f":{self.config}" if self.config else ""
        return replace(self, revision=sha, name=f"{self.repo}{config}@{sha}")

    def rows(self) -> Iterator[Row]:
        """Rows in source order, read as they are asked for; ValueError names file and row of the first that is malformed."""
        if self.kind == "python-docs":
            yield from _topics()
        elif self.kind == "hub":
            yield from _hub_rows(self.resolve())
        else:
            yield from _file_rows(self.files)


def hub_failures() -> tuple[type[Exception], ...]:
    """The exceptions by which huggingface_hub reports a refused request, an invalid id or a network that does not answer."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The first base is the HTTP library's own class (connection errors, time-outs); which library it is differs by version.
    return (OSError, HFValidationError, cast(type[Exception], HfHubHTTPError.__bases__[0]))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for use inside one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def _files_of(path: Path) -> tuple[Path, ...]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: suffix is {path.suffix or 'missing'!r}, wanted one of {', '.join(SUFFIXES)}")
        return (path,)
    found = (p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
    files = tuple(sorted(visible, key=lambda p: p.relative_to(path).as_posix()))
    if not files:
        raise ValueError(f"{path}: no file with suffix {', '.join(SUFFIXES)} in this folder")
    return files


def _topics() -> Iterator[Row]:
    from pydoc_data.topics import topics

    for position, (topic, text) in enumerate(sorted(topics.items())):
        yield Row(position=position, where=f"{PYTHON_DOCS}: {topic}", text=text)


def _file_rows(files: tuple[Path, ...]) -> Iterator[Row]:
    total_bytes = sum(file.stat().st_size for file in files if file.suffix in TEXT_SUFFIXES)
    piece_bytes = min(max(total_bytes // _PIECES, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    position = 0
    for file in files:
        read = readers.get(file.suffix)
        try:
            for row in read(file) if read else _text_pieces(file, piece_bytes):
                yield replace(row, position=position)
                position += 1
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error


def _text_pieces(path: Path, piece_bytes: int) -> Iterator[Row]:
    """Runs of whole lines (a line longer than a piece is split) of at least `piece_bytes`, the last one shorter."""
    pieces = 0
    lines, size, offset = [], 0, 0
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while True:
            raw = file.readline(piece_bytes)
            pending = len(decoder.getstate()[0])
            try:
                lines.append(decoder.decode(raw, final=not raw))
            except UnicodeDecodeError as error:
                byte = offset - pending + error.start
                raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {byte})") from error
            size, offset = size + len(raw), offset + len(raw)
            if size >= piece_bytes or not raw:
                text = "".join(lines)
                lines, size = [], 0
                if text.strip():
                    yield Row(position=0, where=f"{path}: piece {pieces}", text=text, continues=pieces > 0)
                    pieces += 1
            if not raw:
                break
    if not pieces:
        raise ValueError(f"{path}: the file has only white space, wanted text")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    rows = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}: line {number}"
            try:
                line = raw.decode("utf-8-sig")
                if not line.strip():
                    continue
                body = json.loads(line)
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from error
            yield row_from(body, where)
            rows += 1
    if not rows:
        raise ValueError(f"{path}: the file has no rows, wanted one JSON object a line")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'rtpurbo[data]'") from error
    rows = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = ("text", "prompt", *ANSWER_KEYS, "messages")
            names = file.schema_arrow.names
            # Without a usable column the first row is read whole, so that the message lists what is there.
            columns = [name for name in names if name in known] or names
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                for body in batch.to_pylist():
                    yield row_from(body, f"{path}: row {rows}")
                    rows += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
    if not rows:
        raise ValueError(f"{path}: the file has no rows")


def _hub_rows(source: DataSource) -> Iterator[Row]:
    """Rows of the split `train`, streamed: only the shards that are reached travel."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"--data {source.name}: a Hub data set needs datasets: pip install 'rtpurbo[data]'") from error
    failures = (*hub_failures(), ValueError, ImportError)
    try:
        stream = iter(datasets.load_dataset(source.repo, source.config, split="train", revision=source.revision, streaming=True))
    except failures as error:
        raise ValueError(f"--data {source.name}: the data set cannot be opened ({first_line(error)})") from error
    position = 0
    while True:
        try:
            body = next(stream, None)
        except failures as error:
            raise ValueError(f"--data {source.name}: row {position} cannot be read ({first_line(error)})") from error
        if body is None:
            break
        yield replace(row_from(body, f"{source.name}: row {position}"), position=position)
        position += 1
    if not position:
        raise ValueError(f"--data {source.name}: the split 'train' has no rows")


def row_from(body: Any, where: str) -> Row:
    """A row from one record: {"messages"}, {"prompt", "response" | "answer" | "completion"} or {"text"}, in this order.

    Errors: ValueError with `where`, the keys found and those wanted, or the type found and the one wanted.
    """
    if not isinstance(body, dict):
        raise ValueError(f"{where}: {_kind(body)}, wanted an object with {WANTED_KEYS}")
    if "messages" in body:
        return Row(position=0, where=where, messages=_messages(body["messages"], where))
    answer_key = next((key for key in ANSWER_KEYS if key in body), None)
    if "prompt" in body and answer_key is not None:
        prompt, answer = _string(body, "prompt", where), _string(body, answer_key, where)
        for key, value in (("prompt", prompt), (answer_key, answer)):
            if not value:
                raise ValueError(f"{where}: {key} is empty, wanted text")
        return Row(position=0, where=where, prompt=prompt, answer=answer)
    if "text" in body:
        return Row(position=0, where=where, text=_string(body, "text", where))
    found = ", ".join(repr(str(key)) for key in list(body)[:12]) or "none"
    raise ValueError(f"{where}: keys are {found}, wanted {WANTED_KEYS}")


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    """The conversation up to its last assistant message, which is the answer."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: messages is {_kind(value)}, wanted a list of {{'role', 'content'}}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: messages.{i} is {_kind(message)}, wanted {{'role', 'content'}}")
        messages.append({key: _string(message, key, f"{where}: messages.{i}") for key in ("role", "content")})
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"]]
    if not answers or answers[-1] == 0:
        roles = ", ".join(message["role"] for message in messages[:8])
        raise ValueError(f"{where}: messages have the roles {roles}, wanted an assistant message with content after another message")
    return tuple(messages[: answers[-1] + 1])


def _string(body: dict[Any, Any], key: str, where: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {_kind(value) if key in body else 'missing'}, wanted a string")
    return value


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list" if value else "an empty list",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")
