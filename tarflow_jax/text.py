"""Text encoders: map captions to embeddings [B, L, E], the prefix that a flow is conditioned on.

An encoder is any object with `length` L, `dim` E and `fingerprint` that maps captions to float32 [B, L, E].
`WordVectors` is a static table, for laptops; `T5Encoder` is a network of the package transformers.
"""

import dataclasses
import functools
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import safetensors.numpy

from tarflow_jax.errors import MissingPackageError, UserError, one_line
from tarflow_jax.files import replacing, write_text
from tarflow_jax.fingerprint import fingerprint

ENCODER, TABLE = "encoder.json", "words.safetensors"
_WORD = re.compile(r"[^\W_]+")
logger = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """Maps captions to embeddings."""

    @property
    def length(self) -> int:
        """L, the tokens of a caption; longer captions are truncated."""

    @property
    def dim(self) -> int:
        """E, the dimension of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Distinguishes encoders whose embeddings differ."""

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns float32 [B, L, E], padded with zeros."""

    def save(self, folder: Path) -> None:
        """Writes what `open_text_encoder` reads."""


@dataclasses.dataclass(frozen=True)
class WordVectors:
    """Maps each word to a static vector. Unknown words are left out, with a warning."""

    words: tuple[str, ...]  # in lower case
    table: np.ndarray  # float16 [number of words, E]
    length: int = 12

    @property
    def dim(self) -> int:
        return self.table.shape[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint({"table": self.table, "words": np.frombuffer("\n".join(self.words).encode(), np.uint8)})

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(captions), self.length, self.dim), np.float32)
        unknown = set()
        for embedding, caption in zip(found, captions, strict=True):
            words = words_of(caption)
            unknown |= set(words) - self._rows.keys()
            rows = [self._rows[word] for word in words if word in self._rows][: self.length]
            embedding[: len(rows)] = self.table[rows]
        if unknown:
            logger.warning("words without a vector are left out: %s", ", ".join(sorted(unknown)[:10]))
        return found

    @classmethod
    def from_wordllama(cls, captions: Iterable[str] = (), length: int = 12) -> Self:
        """Takes the 256-dimensional vectors of the package wordllama for its whole words and for those of `captions`.

        A word of several tokens gets their mean. Raises UserError if the package is missing.
        """
        package = importlib.util.find_spec("wordllama")
        if package is None or package.origin is None:
            raise UserError("word vectors come from the package wordllama; pip install wordllama, or name an encoder")
        from tokenizers import Tokenizer

        root = Path(package.origin).parent
        tokenizer = Tokenizer.from_file(str(root / "tokenizers" / "l2_supercat_tokenizer_config.json"))
        vectors = safetensors.numpy.load_file(root / "weights" / "l2_supercat_256.safetensors")["embedding.weight"]
        whole = {token[1:] for token in tokenizer.get_vocab() if token[0] == "▁" and token[1:].islower()}
        words = sorted({word for word in whole if _WORD.fullmatch(word)} | {w for c in captions for w in words_of(c)})
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(words, add_special_tokens=False)]
        table = np.stack([vectors[ids].astype(np.float32).mean(0) for ids in tokens])
        table /= table.std()
        return cls(tuple(words), table.astype(np.float16), length)

    def save(self, folder: Path) -> None:
        with replacing(folder / TABLE) as file:
            file.write(safetensors.numpy.save({"table": self.table}))
        fields = {"kind": "words", "length": self.length, "words": self.words}
        write_text(folder / ENCODER, json.dumps(fields) + "\n")

    @classmethod
    def load(cls, folder: Path, fields: dict[str, Any]) -> Self:
        """Reads what `save` wrote; raises UserError if it is damaged."""
        words, length = tuple(map(str, fields["words"])), int(fields["length"])
        table = safetensors.numpy.load_file(folder / TABLE)["table"]
        if table.ndim != 2 or len(table) != len(words) or table.dtype != np.float16 or not np.isfinite(table).all():
            expected = f"finite float16 [{len(words)}, E], a row for each word"
            raise UserError(f"a table {table.dtype} {list(table.shape)}; expected {expected}")
        return cls(words, table, length)


class T5Encoder:
    """Encodes captions with a T5 of the package transformers, such as STARFlow's "google/flan-t5-xl".

    It runs in PyTorch, once per caption. Only safetensors are loaded.
    """

    def __init__(self, name: str, length: int = 128) -> None:
        """Loads a folder or a model of the hub; raises UserError if that fails or a package is missing."""
        try:
            import transformers
        except ImportError as error:
            message = "a T5 needs transformers and PyTorch; pip install transformers sentencepiece torch"
            raise MissingPackageError(message) from error
        try:
            self._network = transformers.T5EncoderModel.from_pretrained(name, use_safetensors=True).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises nearly anything
            raise UserError(f"{name} is no T5 that transformers can load: {one_line(error)}") from error
        self._network.requires_grad_(False)
        self.name, self.length, self.dim = name, length, self._network.config.d_model

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.length}"

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        tokens = self._tokenizer(
            list(captions), max_length=self.length, padding="max_length", truncation=True, return_tensors="pt"
        )
        found = self._network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return (found * tokens.attention_mask[:, :, None]).float().numpy()  # zeros after the token that marks the end

    def save(self, folder: Path) -> None:
        write_text(folder / ENCODER, json.dumps({"kind": "t5", "name": self.name, "length": self.length}) + "\n")


def open_text_encoder(folder: Path) -> TextEncoder:
    """Loads what an encoder's `save` wrote; raises UserError if it is damaged or not an encoder."""
    try:
        fields: dict[str, Any] = json.loads((folder / ENCODER).read_bytes())
        if fields["kind"] == "t5":
            return T5Encoder(str(fields["name"]), int(fields["length"]))
        return WordVectors.load(folder, fields)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} is not a text encoder, or damaged: {one_line(error)}") from error


def words_of(caption: str) -> list[str]:
    """Returns the words of a caption in lower case, without punctuation."""
    return _WORD.findall(caption.lower())
