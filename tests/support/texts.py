"""Small tokenizers of every kind, and texts that are hard on them."""

from __future__ import annotations

import json
from functools import cache

from llmserve.text.tokenizer import Tokenizer
from llmserve.text.train import TokenizerKind

KINDS: tuple[TokenizerKind, ...] = ("bpe", "word", "char")

CORPUS = (
    "The list of names is sorted, and the list of values is not.\n"
    "    def names(self): return [name for name in self._names]\n"
    "Grüße aus Köln: 3 Äpfel, 20 €. The names, the values; the list! 😀😀\n"
) * 4

HARD_TEXTS = (
    "",
    " ",
    "the list of names",
    "  two  spaces \n\n\t tabs\r\n",
    "unseen: żółć 漢字 🇩🇪 👩‍👩‍👧",
    "e\u0301 \ufffd \x00 \u200b",
    "<0x41><0xE2> <|endoftext|> \u2581 \u0120",
)


@cache
def trained(kind: TokenizerKind) -> Tokenizer:
    """A tokenizer of about 400 tokens."""
    return Tokenizer.train(kind, [CORPUS], vocab_size=400)


def sentencepiece_json() -> dict[str, object]:
    """A tokenizer.json as converted from SentencePiece: marks for spaces, byte fallback, BOS."""
    pieces = [*"▁abehlot", "▁a", "he", "▁the", "ll", "▁t"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": True, **special}
            for index in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [["▁", "a"], ["▁", "t"], ["h", "e"], ["▁t", "he"], ["l", "l"]],
        },
    }


@cache
def sentencepiece_like() -> Tokenizer:
    """The tokenizer of `sentencepiece_json`."""
    return Tokenizer(json.dumps(sentencepiece_json()).encode(), {"bos_token": "<s>"})


@cache
def all_tokenizers() -> tuple[Tokenizer, ...]:
    """One of each kind."""
    return (*map(trained, KINDS), sentencepiece_like())
