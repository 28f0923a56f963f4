"""What each linear layer of a model becomes: bits, group size, with or without zero points.

A plan holds for a whole model: a scheme, and exceptions for layers that are named. Group sizes are
those asked for where they divide a layer's width, else chosen by error
(`llmserve/quant/group_size.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmserve.checkpoint import Checkpoint
from llmserve.errors import ConfigError
from llmserve.layouts import expected_tensors, linear_layers
from llmserve.quant.dtypes import Float32Array
from llmserve.quant.group_size import choose_group_size
from llmserve.quant.groups import Bits, GridRule

__all__ = [
    "HEAD",
    "LayerForm",
    "Method",
    "Override",
    "Scheme",
    "parse_form",
    "parse_override",
    "plan_layers",
    "rule_of",
]

Scheme = Literal["int8", "w8a8", "int4", "nf4", "fp4", "bnb-int8"]
Method = Literal["rtn", "mse", "gptq", "awq", "smoothquant", "best"]
HEAD = "lm_head"
_BITS: dict[str, Bits] = {"int8": 8, "w8a8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """What one layer becomes."""

    bits: Bits | None
    """Bits of an integer; None: the layer stays as it is."""
    group_size: int | None = None
    """Weights that share a scale; None: a whole row."""
    is_symmetric: bool = True
    """Whether there are no zero points."""

    def __str__(self) -> str:
        if self.bits is None:
            return "float"
        return f"int{self.bits}:{self.group_size or 'row'}{'' if self.is_symmetric else ':zero'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """An exception from the scheme."""

    name: str
    """A layer's whole name, or its end or a part of it between dots."""
    form: LayerForm

    def picks(self, layer: str) -> bool:
        """Whether the exception is for `layer`."""
        return f".{self.name}." in f".{layer}."


def parse_override(text: str) -> Override:
    """`NAME=FORM`, as `down_proj=int8:row`. Raises `ConfigError`."""
    name, separator, form = text.partition("=")
    if not name or not separator:
        raise ConfigError(f"an exception is NAME=FORM, as down_proj=int8:row; got {text!r}")
    return Override(name=name, form=parse_form(form))


def parse_form(text: str) -> LayerForm:
    """`float`, or `int8` or `int4` with `:32` or `:row`, and `:zero` for zero points."""
    kind, *details = text.split(":")
    if kind == "float" and not details:
        return LayerForm(bits=None)
    is_symmetric = "zero" not in details[-1:]
    details = details if is_symmetric else details[:-1]
    size = details[0] if details else ("32" if kind == "int4" else "row")
    is_size = size == "row" or (size.isdecimal() and int(size) > 0)
    if kind not in ("int8", "int4") or len(details) > 1 or not is_size:
        raise ConfigError(
            f"form {text!r} is unknown; float, int8, int4, int8:GROUP and int4:GROUP are known, "
            "GROUP a number or `row`, and `:zero` behind for zero points"
        )
    return LayerForm(
        bits=_BITS[kind], group_size=None if size == "row" else int(size), is_symmetric=is_symmetric
    )


def plan_layers(
    source: Checkpoint, default: LayerForm, overrides: Sequence[Override] = ()
) -> dict[str, LayerForm]:
    """Layer → form, with group sizes that divide its width; every layer but the head.

    Raises:
        ConfigError: an exception that no layer has the name of, or an impossible group size.
    """
    names = [name for name in linear_layers(source.config) if name != HEAD]
    for override in overrides:
        if not any(override.picks(name) for name in names):
            raise ConfigError(
                f"no layer is called {override.name!r}; layers are {', '.join(names[:7])} ..."
            )
    wanted = {name: _wanted(name, default, overrides) for name in names}
    return _with_sizes(source, wanted)


def rule_of(form: LayerForm, *, dtype: str, is_searched: bool) -> GridRule:
    """How the grid of a layer of this form is found. `form.bits` must not be None."""
    assert form.bits is not None, "a layer that stays as it is"
    return GridRule(
        bits=form.bits,
        group_size=form.group_size,
        is_symmetric=form.is_symmetric,
        is_searched=is_searched,
        scale_dtype=dtype,
    )


def _wanted(name: str, default: LayerForm, overrides: Sequence[Override]) -> LayerForm:
    """The last exception that picks the layer wins."""
    picked = [override.form for override in overrides if override.picks(name)]
    return picked[-1] if picked else default


def _with_sizes(source: Checkpoint, wanted: Mapping[str, LayerForm]) -> dict[str, LayerForm]:
    """Layers of one width and form share a group size: others join some of them."""
    shapes = expected_tensors(source.config)
    widths = {name: shapes[f"{name}.weight"][1] for name in wanted}
    sizes: dict[tuple[LayerForm, int], int | None] = {}
    for name, form in wanted.items():
        key = form, widths[name]
        if key not in sizes:
            members = [one for one in wanted if (wanted[one], widths[one]) == key]
            sizes[key] = _size(source, members, widths[name], form)
    return {
        name: LayerForm(
            bits=form.bits, group_size=sizes[form, widths[name]], is_symmetric=form.is_symmetric
        )
        for name, form in wanted.items()
    }


def _size(source: Checkpoint, members: list[str], width: int, form: LayerForm) -> int | None:
    if form.bits is None or form.group_size is None:
        return None

    def weights() -> Iterator[Float32Array]:
        return (source.float32(f"{name}.weight") for name in members)

    size = choose_group_size(
        width, form.group_size, weights, form.bits, scale_dtype=source.config.dtype
    )
    return None if size == width else size
