"""Calls into the `tokenizers` library that survive whatever a strange tokenizer.json causes.

Its Rust code can panic on files that parse (a prefix longer than a token, a post-processor naming
an unknown token). Such a panic reaches Python as an exception that is no `Exception`; here it
becomes an error of one request or of one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from ..errors import CheckpointError, RequestError

__all__ = ["encode_batch", "encode_with_offsets", "open_backend"]


def open_backend(tokenizer_json: bytes, content: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The library's tokenizer for a file that `check_tokenizer_json` has passed.

    `content` is the parsed file. Truncation and padding, settings of training runs that would
    change prompts silently, are off.

    Raises:
        CheckpointError: the library refuses the file, reads other ids out of it than it states, or
            cannot encode with it.
    """
    try:
        backend = Tokenizer.from_str(tokenizer_json.decode())
    except BaseException as error:
        raise CheckpointError(f"refused by the tokenizers library: {_cause(error)}") from error
    for token in content.get("added_tokens", []):
        if backend.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(
                f"added_tokens: {token['content']!r} cannot have the id {token['id']}"
            )
    backend.no_truncation()
    backend.no_padding()
    _try_out(backend, vocab_size)
    return backend


def encode_batch(
    backend: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text.

    Raises:
        RequestError: a text holds surrogates, or characters that the tokenizer cannot take.
    """
    # The fast form leaves out offsets: a third of the time of the plain one.
    encodings = _encode(backend.encode_batch_fast, texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def encode_with_offsets(
    backend: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The ids of each text, and the characters from and to which each id reaches in it.

    An id that the tokenizer adds reaches from 0 to 0. Raises as `encode_batch` does.
    """
    encodings = _encode(backend.encode_batch, texts, add_special_tokens=add_special_tokens)
    return [(encoding.ids, encoding.offsets) for encoding in encodings]


def _encode(
    encode: Callable[..., list[Encoding]], texts: Sequence[str], *, add_special_tokens: bool
) -> list[Encoding]:
    for text in texts:
        _check_text(text)
    try:
        return encode(list(texts), add_special_tokens=add_special_tokens)
    except BaseException as error:
        raise RequestError(
            f"the text cannot be tokenized: {_cause(error)}", param="prompt"
        ) from error


def _try_out(backend: Tokenizer, vocab_size: int) -> None:
    """Encode once, so that a faulty file fails now and not on a request."""
    try:
        [ids] = encode_batch(backend, ["a"], add_special_tokens=True)
    except RequestError as error:
        raise CheckpointError(str(error)) from error
    if any(token_id >= vocab_size for token_id in ids):
        raise CheckpointError("post_processor adds an id that is not in the vocabulary")


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds the surrogate {text[error.start]!a} at character {error.start}, "
            "which is no character: send UTF-8",
            param="prompt",
        ) from error


def _cause(error: BaseException) -> str:
    """What the library says; anything that is neither its error nor its panic goes on."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return str(error)[:200]
    raise error
