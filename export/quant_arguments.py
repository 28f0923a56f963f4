"""The arguments of `llmserve quantize`, and the options behind them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.errors import ConfigError

if TYPE_CHECKING:
    from .quant_options import QuantizationOptions

__all__ = ["add_quantize_arguments", "options_of"]

_SCHEMES = ("int8", "w8a8", "int4", "nf4", "fp4", "bnb-int8")
_INTEGERS = _SCHEMES[:3]
_METHODS = ("rtn", "mse", "gptq", "awq", "smoothquant", "best")
_INT4_GROUP_SIZE = 32
_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all of them."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the original model")
    _add_form(parser)
    _add_contract(parser)
    _add_texts(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: MODEL-SCHEME)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FOLDER")
    parser.add_argument("--layers", action="store_true", help="print one line for each layer too")


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", choices=_SCHEMES, help="see above; needed without a bound")
    parser.add_argument(
        "--group-size",
        type=_group_size,
        default="",
        metavar="N|row",
        help="int8, w8a8, int4: weights that share a scale; a width that it does not divide gets "
        "the nearest divisor that keeps the error (default: 32 for int4, else row)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="int8, w8a8, int4: groups have zero points; with a bound: they may have",
    )
    parser.add_argument(
        "--method", choices=_METHODS, default="rtn", help="see above (default: %(default)s)"
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME=FORM",
        help="int8, w8a8, int4: an exception, as down_proj=int8:row or layers.0=float; NAME is a "
        "layer's or a part of it between dots, FORM float, int8 or int4 with :N, :row, :zero",
    )
    parser.add_argument(
        "--double-quant", action="store_true", help="nf4, fp4: scales are quantized too"
    )
    parser.add_argument(
        "--kv-cache",
        choices=("int8",),
        help="int8, w8a8, int4: the folder asks for an int8 KV cache; its cost is measured too",
    )


def _add_contract(parser: argparse.ArgumentParser) -> None:
    bounds = parser.add_argument_group("bounds to search for, any of them")
    bounds.add_argument(
        "--max-perplexity-increase", type=_share, metavar="1%", help="on the measured text"
    )
    bounds.add_argument(
        "--max-kl", type=_positive_number, metavar="NATS", help="mean KL divergence per token"
    )
    bounds.add_argument(
        "--max-size", type=_size, metavar="40MB", help="of all weights on disk; kB, MB, GB"
    )


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to calibrate on (default: calibration.txt in MODEL, which "
        "training leaves)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=_positive,
        default=32_768,
        metavar="N",
        help="most tokens of it (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to measure on (default: evaluation.txt in MODEL, which training leaves)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        default=16_384,
        metavar="N",
        help="most tokens of the text that are measured (default: %(default)s)",
    )
    parser.add_argument("--no-measure", action="store_true", help="quantize without measuring")


def options_of(args: argparse.Namespace) -> QuantizationOptions:
    """What was asked for. Raises `ConfigError` for a combination that means nothing."""
    from .quant_options import Contract, QuantizationOptions
    from .quant_plan import parse_override

    bounds = (args.max_perplexity_increase, args.max_kl, args.max_size)
    contract = None
    if any(bound is not None for bound in bounds):
        contract = Contract(
            max_perplexity_increase=bounds[0], max_kl=bounds[1], max_bytes=bounds[2]
        )
    _check_form(args, has_contract=contract is not None)
    return QuantizationOptions(
        scheme=args.scheme or "int4",
        group_size=_asked_group_size(args),
        is_symmetric=not args.asymmetric,
        method=args.method,
        overrides=tuple(parse_override(text) for text in args.layer),
        double_quant=args.double_quant,
        has_int8_cache=args.kv_cache is not None,
        contract=contract,
        calibration=args.calibration,
        calibration_tokens=args.calibration_tokens,
        measure=not args.no_measure,
        text=args.text,
        max_tokens=args.max_tokens,
    )


def _check_form(args: argparse.Namespace, *, has_contract: bool) -> None:
    """Raise `ConfigError` for a form that is not given, or given twice."""
    if has_contract:
        chosen = (args.scheme, args.group_size, args.layer, args.double_quant)
        if any(chosen) or args.method != "rtn":
            raise ConfigError(
                "with a bound the search chooses the form of each layer: leave out --scheme, "
                "--group-size, --method, --layer and --double-quant"
            )
    elif args.scheme is None:
        raise ConfigError(
            f"give --scheme ({', '.join(_SCHEMES)}), or a bound to search for: "
            "--max-perplexity-increase, --max-kl, --max-size"
        )


def _asked_group_size(args: argparse.Namespace) -> int | None:
    if args.group_size == "":
        return _INT4_GROUP_SIZE if args.scheme == "int4" else None
    if args.scheme not in _INTEGERS:
        raise ConfigError(f"--group-size is a choice of int8 and int4; {args.scheme} has its own")
    size: int | None = args.group_size
    return size


def _group_size(text: str) -> int | str | None:
    """`row` → None, a positive whole number → itself; "" → "", the scheme's own default."""
    if text in ("", "row"):
        return None if text else ""
    return _positive(text)


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, got {text!r}")
    return value


def _positive_number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?|\.\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"a number from 0 on is needed, as 0.01; got {text!r}")
    return float(text)


def _share(text: str) -> float:
    """`1%` → 0.01."""
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"a percentage is needed, as 1%; got {text!r}")
    return _positive_number(text[:-1].strip()) / 100


def _size(text: str) -> int:
    """`40MB` → 40000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]?B?)", text, re.ASCII)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"a size is needed, as 40MB; got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
