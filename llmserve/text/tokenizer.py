"""Text to token ids and back: the tokenizer of a model folder.

First hop of a prompt and last of an answer. Encoding is the `tokenizers` library's; what a token
adds to a text is defined in `decoding.py`, for whole texts and streams alike. Folders made
elsewhere are read unchanged; the files of a tokenizer made here open in `tokenizers` and in
`transformers.AutoTokenizer` with the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..strict_json import parse_json
from .backend import encode_batch, encode_with_offsets, open_backend
from .decoding import TextStream, parse_decoder, whole_piece
from .tokenizer_file import check_tokenizer_json
from .tokenizer_folder import read_tokenizer_folder
from .train import END_OF_TEXT, TokenizerKind, train_tokenizer

__all__ = ["Tokenizer"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """A tokenizer and the names of its special tokens. Not changed after loading; thread-safe.

    Attributes:
        vocab_size: Ids are below it. A model's output may be wider; ids beyond have no text.
        special_ids: Ids that mark something and are no part of a text.
        special_tokens: Their texts under the names that chat templates use (`bos_token`, ...).
        bos_token_id, eos_token_id, pad_token_id: None where the folder names none.
        chat_template: Source of the folder's template, or None.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        settings: Mapping[str, Any],
        *,
        model_settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        companions: Mapping[str, bytes] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Take the contents of the files as `TokenizerFolder` describes them.

        Raises:
            CheckpointError: a file is malformed, beyond its bounds, or names unknown tokens.
        """
        folder = folder or Path()
        self._tokenizer_json = tokenizer_json
        self._settings = dict(settings)
        self._companions = dict(companions or {})
        self.chat_template = chat_template
        content = parse_json(tokenizer_json, folder / "tokenizer.json")
        with _naming(folder / "tokenizer.json"):
            self.vocab_size = check_tokenizer_json(content)
            self._decoder = parse_decoder(content.get("decoder"))
            self._backend = open_backend(tokenizer_json, content, self.vocab_size)
        added = content.get("added_tokens", [])
        self.special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self._tokens: dict[int, str | None] = {}
        self._whole_texts: dict[int, str | None] = {}
        with _naming(folder / "tokenizer_config.json"):
            self.special_tokens = self._name_special_tokens(model_settings or {})
            self.bos_token_id = self._id_of("bos_token")
            self.eos_token_id = self._id_of("eos_token")
            self.pad_token_id = self._id_of("pad_token", is_required=False)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a model folder.

        Special tokens come from tokenizer_config.json, then special_tokens_map.json, then the ids
        in config.json; the chat template from chat_template.jinja, then tokenizer_config.json.

        Raises:
            CheckpointError: naming the file and the cause.
        """
        folder = Path(folder)
        found = read_tokenizer_folder(folder)
        return cls(
            found.tokenizer_json,
            found.settings,
            model_settings=found.model_settings,
            chat_template=found.chat_template,
            companions=found.companions,
            folder=folder,
        )

    @classmethod
    def train(cls, kind: TokenizerKind, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Train a tokenizer of at most `vocab_size` tokens; see `text/train.py` for the kinds.

        Every text comes back exactly from its ids. An encoded text begins with `<|endoftext|>`,
        as a document does in packed training data; the same token ends a text.

        Raises:
            ConfigError, DataError: as `train_tokenizer` says.
        """
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        return cls(train_tokenizer(kind, texts, vocab_size=vocab_size), settings)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with `add_special_tokens`, what the tokenizer's own file adds too.

        The text of a special token inside `text` becomes that token's id, as in other programs.
        O(n log n) in the length for any text.

        Raises:
            RequestError: `text` holds surrogates, or characters that the tokenizer cannot take.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` for many texts, on several threads."""
        return encode_batch(self._backend, texts, add_special_tokens=add_special_tokens)

    def encode_with_offsets(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """`encode_batch`, with the range of characters that each id stands for, from and to.

        An id that the tokenizer's own file adds has the range (0, 0).
        """
        return encode_with_offsets(self._backend, texts, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token are skipped, invalid UTF-8 becomes U+FFFD."""
        stream = self.open_stream()
        tokens = self.text_tokens(ids, skip_special_tokens=skip_special_tokens)
        return "".join([*map(stream.push, tokens), stream.flush()])

    def open_stream(self) -> TextStream:
        """A stream that takes the tokens of a text one by one."""
        return TextStream(self._decoder)

    def text_tokens(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> Iterator[str]:
        """The tokens of those `ids` that take part in a text."""
        for token_id in ids:
            if skip_special_tokens and token_id in self.special_ids:
                continue
            token = self._token(token_id)
            if token is not None:
                yield token

    def whole_text(self, token_id: int) -> str | None:
        """What an id adds to a text that other tokens precede, if that is whole characters.

        None for a part of a character. Empty for a special token and for an id without a token.
        """
        try:
            return self._whole_texts[token_id]
        except KeyError:
            pass
        text: str | None = ""
        for token in self.text_tokens((token_id,)):
            text = whole_piece(self._decoder.piece(token))
        if 0 <= token_id < self.vocab_size:  # the cache stays as small as the vocabulary
            self._whole_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, which need not be whole characters.

        A special token's are its name; an id without a token has none.
        """
        token = self._token(token_id)
        if token is None:
            return b""
        if token_id in self.special_ids:
            return token.encode()
        piece = self._decoder.piece(token)
        return piece if isinstance(piece, bytes) else piece.encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD where they are no whole characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def files(self, *, model_max_length: int | None = None) -> dict[str, bytes]:
        """The tokenizer's files by name, to be written into a model folder.

        Files that were read come back unchanged. For a tokenizer trained here, `model_max_length`
        (tokens of the model's context) is recorded where other programs look for it.
        """
        files = {"tokenizer.json": self._tokenizer_json, **self._companions}
        if "tokenizer_config.json" not in files:
            settings = self._settings | self.special_tokens
            if model_max_length is not None:
                settings["model_max_length"] = model_max_length
            files["tokenizer_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
        return files

    def _token(self, token_id: int) -> str | None:
        try:
            return self._tokens[token_id]
        except KeyError:
            if not 0 <= token_id < self.vocab_size:  # the cache stays as small as the vocabulary
                return None
            token: str | None = self._backend.id_to_token(token_id)
            self._tokens[token_id] = token
            return token

    def _name_special_tokens(self, model_settings: Mapping[str, Any]) -> dict[str, str]:
        """Texts of the special tokens by name; a null in the settings is an answer, too."""
        tokens = {}
        for role in _ROLES:
            name = f"{role}_token"
            token = self._settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if name not in self._settings:
                token = self._token_of_model(model_settings.get(f"{name}_id"))
            if token is not None and not isinstance(token, str):
                raise CheckpointError(f"{name} must be a string, got {token!r}")
            if token is not None:
                tokens[name] = token
        return tokens

    def _token_of_model(self, token_id: object) -> str | None:
        """The token of an id in config.json, which may be a list of several."""
        if isinstance(token_id, list) and token_id:
            token_id = token_id[0]
        return self._token(token_id) if isinstance(token_id, int) else None

    def _id_of(self, name: str, *, is_required: bool = True) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None and is_required:
            raise CheckpointError(f"{name} is {token!r}, which is not in tokenizer.json")
        return token_id


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the name of a file before the message of a `CheckpointError`."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
