"""Documents of token ids for calibration, training and held-out evaluation: tokenise, pack, cut, split; deterministic."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rtpurbo.converter.sources import PYTHON_DOCS, STAGE1_DATA, STAGE2_DATA, DataSource, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PYTHON_DOCS", "STAGE1_DATA", "STAGE2_DATA", "DataSource", "Document", "Split", "data_digest", "load_documents"]

Split = Literal["train", "heldout"]
HELDOUT_EVERY = 8
_MAX_SPARE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Document:
    """One sequence for the model.

    token_ids: int32 [tokens], read-only. answer_start: index of the first answer token, >= 1; the answer runs to the end;
    None when the text has no marked answer and none was asked for. key: stable id: source name, row and token offset.
    """

    token_ids: np.ndarray
    answer_start: int | None
    key: str

    def __len__(self) -> int:
        return len(self.token_ids)


def load_documents(
    source: DataSource,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    min_tokens: int,
    max_tokens: int,
    count: int,
    seed: int,
    answer_tokens: int,
    split: Split,
    at_least: int | None = None,
) -> list[Document]:
    """`count` documents of min_tokens ... max_tokens tokens (the beginning-of-text token included).

    Split: rows with position % 8 == 7 are held out, all others are for training; decided before packing, so the two never share
    a row (a text file is read in about 64 pieces, a topic of python-docs is a row).
    Plain texts: those shorter than min_tokens are joined with their successors (end-of-text token between them, if there
    is one), longer ones than max_tokens are cut into windows of max_tokens. A joined document ends at a length drawn from the
    triangular distribution (min_tokens, mode min_tokens, max_tokens): 32K ... 80K gives the paper's mean of 48K. If the source
    ends before `count` documents are full, every document is min_tokens long instead.
    Rows with an answer: the document ends with the answer; a short one follows its predecessors; of a long one the oldest
    tokens are dropped. Plain texts: the last `answer_tokens` tokens are the answer (0: answer_start is None).
    Seed: draws lengths and, out of the first `count` + min(count, 16) documents, which and in which order.
    at_least: accept a source that fills only so many documents (training then repeats them in epochs); default `count`.
    Memory: one row and the documents; the source is read only as far as needed. arXiv 2605.16928 section 5; joining and
    split are ours.

    Errors: ValueError for malformed rows, and with the numbers of tokens found and wanted when there is not enough text.
    """
    if not 2 <= min_tokens <= max_tokens:
        raise ValueError(f"min_tokens {min_tokens} and max_tokens {max_tokens}: wanted 2 <= min_tokens <= max_tokens")
    if not 0 <= answer_tokens < min_tokens:
        raise ValueError(f"answer_tokens is {answer_tokens}, wanted 0 ... min_tokens - 1 ({min_tokens - 1})")
    if count < 1:
        raise ValueError(f"count is {count}, wanted at least 1")
    wanted = count if at_least is None else at_least
    if not 1 <= wanted <= count:
        raise ValueError(f"at_least is {at_least}, wanted 1 ... count ({count})")
    source = source.resolve()
    documents: list[Document] = []
    num_tokens = 0
    # The second pass wastes nothing on windows longer than they must be; large sources never get there.
    for longest in dict.fromkeys((max_tokens, min_tokens)):
        packer = _Packer(source.name, tokenizer, min_tokens, longest, answer_tokens, seed)
        documents = []
        for document in packer.documents(row for row in source.rows() if _split_of(row) == split):
            documents.append(document)
            if len(documents) == count + min(count, _MAX_SPARE):
                break
        num_tokens = packer.num_tokens
        if len(documents) >= wanted:
            return random.Random(seed).sample(documents, min(count, len(documents)))
    raise ValueError(
        f"{source.name}: the {split} part has {num_tokens} tokens, enough for {len(documents)} documents of {min_tokens}; "
        f"wanted {wanted} documents ({wanted * min_tokens} tokens)"
    )


def data_digest(documents: Iterable[Document]) -> str:
    """sha256 (hex) over lengths, answer starts (-1: none) and token ids in order; binds caches and resumed runs to the data."""
    sha = hashlib.sha256()
    for document in documents:
        start = -1 if document.answer_start is None else document.answer_start
        sha.update(np.array([len(document), start], dtype="<i8").tobytes())
        sha.update(document.token_ids.astype("<i4").tobytes())
    return sha.hexdigest()


def _split_of(row: Row) -> Split:
    return "heldout" if row.position % HELDOUT_EVERY == HELDOUT_EVERY - 1 else "train"


class _Packer:
    """Turns rows into documents; `num_tokens` counts what it has tokenised."""

    def __init__(
        self, name: str, tokenizer: "PreTrainedTokenizerBase", min_tokens: int, max_tokens: int, answer_tokens: int, seed: int
    ) -> None:
        self.name, self.tokenizer, self.answer_tokens = name, tokenizer, answer_tokens
        self.random = random.Random(seed)
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.separator = _int32([eos] if isinstance(eos, int) else [])
        begins = isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos]
        self.begin = _int32([bos] if begins else [])
        self.min_body, self.max_body = min_tokens - len(self.begin), max_tokens - len(self.begin)
        self.body = _int32([])
        self.first = (0, 0)
        self.num_tokens = 0
        self.target = self._draw()

    def documents(self, rows: Iterable[Row]) -> Iterator[Document]:
        previous = -1
        for row in rows:
            joined = row.continues and row.position == previous + 1
            previous = row.position
            context, answer = _encode(row, self.tokenizer)
            self.num_tokens += len(context) + len(answer)
            if len(answer):
                yield from self._marked(row.position, context, answer)
            elif len(context):
                yield from self._plain(row.position, context, joined)
        if len(self.body) >= self.min_body:
            yield self._cut(len(self.body))

    def _plain(self, position: int, tokens: np.ndarray, joined: bool) -> Iterator[Document]:
        if not len(self.body):
            self.first = (position, 0)
        between = self.separator if len(self.body) and not joined else self.separator[:0]
        self.body = np.concatenate([self.body, between, tokens])
        # A row that is long enough by itself ends the document; otherwise the drawn length does.
        while len(self.body) >= (self.target if len(tokens) < self.min_body else self.min_body):
            document = self._cut(min(len(self.body), self.max_body))
            self.first = (position, len(tokens) - len(self.body))
            self.target = self._draw()
            yield document

    def _marked(self, position: int, context: np.ndarray, answer: np.ndarray) -> Iterator[Document]:
        answer = answer[: self.max_body - 1]
        between = self.separator if len(self.body) else self.separator[:0]
        self.body = np.concatenate([self.body, between, context, answer])
        if len(self.body) >= self.min_body:
            body = self.body[-self.max_body :]
            self.body = self.body[:0]
            ids = self._with_begin(body)
            yield _document(ids, len(ids) - len(answer), f"{self.name}#{position}")

    def _cut(self, length: int) -> Document:
        ids = self._with_begin(self.body[:length])
        self.body = self.body[length:]
        start = len(ids) - self.answer_tokens if self.answer_tokens else None
        return _document(ids, start, f"{self.name}#{self.first[0]}+{self.first[1]}")

    def _with_begin(self, body: np.ndarray) -> np.ndarray:
        has_begin = len(self.begin) and body[0] == self.begin[0]
        return body.copy() if has_begin else np.concatenate([self.begin, body])

    def _draw(self) -> int:
        return round(self.random.triangular(self.min_body, self.max_body, self.min_body))


def _document(ids: np.ndarray, answer_start: int | None, key: str) -> Document:
    ids.setflags(write=False)
    return Document(token_ids=ids, answer_start=answer_start, key=key)


def _encode(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[np.ndarray, np.ndarray]:
    """Context and answer ids of a row, tokenised apart so that no token spans the border; plain text has no answer."""
    if row.messages is not None:
        context, answer = _conversation(list(row.messages), row.where, tokenizer)
    elif row.prompt is not None:
        context, answer = row.prompt, row.answer or ""
    else:
        context, answer = row.text or "", ""
    # verbose=False: documents are longer than the model's own limit on purpose.
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else [] for text in (context, answer))
    context_ids, answer_ids = (_int32(ids) for ids in encoded)
    return context_ids, answer_ids


def _conversation(messages: list[dict[str, str]], where: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """The conversation as text, up to and from the answer; through the chat template when the tokenizer has one."""
    answer = messages[-1]["content"]
    if not getattr(tokenizer, "chat_template", None):
        turns = "".join(f"{message['role']}: {message['content']}\n\n" for message in messages[:-1])
        return f"{turns}assistant: ", answer
    from jinja2 import TemplateError

    try:
        context = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses these messages ({error})") from error
    assert isinstance(context, str)
    assert isinstance(whole, str)
    # A template may write past answers differently from the generation prompt; then the bare answer follows the prompt.
    return (context, whole[len(context) :]) if whole.startswith(context) and len(whole) > len(context) else (context, answer)


def _int32(ids: Any) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
