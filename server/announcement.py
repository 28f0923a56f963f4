"""What the person at the terminal is told when a server is up: what runs, and how to call it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmserve.console import console
from llmserve.runners.protocol import CacheGroup

from .server_state import ServerState
from .service import Service

__all__ = ["announce", "describe"]

MIB = 1 << 20
LABEL_WIDTH = 11


def announce(state: ServerState, url: str) -> None:
    """Print it."""
    for label, text in describe(state, url):
        console().print(f"{label:<{LABEL_WIDTH}}{text}", markup=False, soft_wrap=True)


def describe(state: ServerState, url: str) -> Iterator[tuple[str, str]]:
    """Lines of label and text; a line without a label goes on with the one before it."""
    for service in state.services:
        yield from _describe_model(service)
    yield "page", f"{url}/"
    yield "API", f"{url}/v1"
    key = "" if state.settings.keys.is_empty else " -H 'Authorization: Bearer KEY'"
    name = f'"model": "{state.services[0].name}", ' if len(state.services) > 1 else ""
    yield (
        "try",
        f"curl {url}/v1/completions{key} -H 'Content-Type: application/json' "
        f"""-d '{{{name}"prompt": "Once upon a time", "max_tokens": 50}}'""",
    )


def _describe_model(service: Service) -> Iterator[tuple[str, str]]:
    info, config, settings = service.card.info, service.card.config, service.model.settings
    yield (
        "model",
        f"{service.card.names[0]} ({info.num_parameters:,} parameters, "
        f"{info.weight_bytes / MIB:.1f} MiB)",
    )
    yield "executed", f"{info.executed_form} by the {info.runner} runner"
    for card in service.model.adapter_cards:
        yield "adapter", f"{card.names[0]}, from {card.root}"
    yield from _cache_lines(service)
    yield "prefixes", _prefixes(service)
    yield "context", f"{config.max_seq_len} tokens, up to {config.max_num_seqs} sequences a step"
    yield "steps", _steps(service)
    if settings.num_replicas > 1:
        yield "replicas", f"{settings.num_replicas}, each with a KV cache of that size"
    if settings.num_prefill_engines:
        count = settings.num_prefill_engines
        yield "prompts", f"read by {count} more engine{'s' * (count > 1)}, as far as that pays"
    if config.policy != "fcfs":
        yield "policy", _policy(service)
    if config.speculation is not None:
        yield "guesses", _guesses(service)
    if settings.engine.record is not None:
        yield "recording", f"to {settings.engine.record}, prompts and answers too"


def _cache_lines(service: Service) -> Iterator[tuple[str, str]]:
    """The whole, and where layers differ in their window one line for each group of them."""
    info, config = service.card.info, service.card.config
    sizes = [
        count * config.block_size * group.bytes_per_token
        for count, group in zip(config.num_blocks, info.cache_groups, strict=True)
    ]
    groups = list(zip(info.cache_groups, config.num_blocks, sizes, strict=True))
    whole = f"{sum(sizes) / MIB:.1f} MiB of {info.cache_dtype}"
    blocks = f"{sum(config.num_blocks)} blocks of {config.block_size} tokens"
    if len(groups) == 1:
        blocks += _window(groups[0][0])
    yield "KV cache", f"{whole}: {blocks}"
    if len(groups) > 1:
        for group, count, size in groups:
            layers = "1 layer" if group.num_layers == 1 else f"{group.num_layers} layers"
            yield "", f"{size / MIB:.1f} MiB, {count} blocks for {layers}{_window(group)}"


def _window(group: CacheGroup) -> str:
    return "" if group.window is None else f", a window of {group.window} tokens"


def _prefixes(service: Service) -> str:
    if not service.card.config.has_prefix_cache:
        return "computed anew for every request"
    if service.settings.keys.is_empty or service.settings.shares_prefix_cache:
        return "computed once, shared by all requests"
    return "computed once, each API key's apart"


def _steps(service: Service) -> str:
    config, settings = service.card.config, service.model.settings.engine
    text = f"up to {config.max_batched_tokens} tokens"
    if config.max_batched_tokens < 2 * config.max_num_seqs:
        text += " or two for each request"
    if config.far_token_weight > 1.0:
        far = round(config.max_batched_tokens / config.far_token_weight)
        text += f", {far} at the end of a long prompt"
    if config.max_prefill_tokens > config.max_batched_tokens:
        text += f", {config.max_prefill_tokens} while nobody decodes"
    if config.full_step_s is None:
        return f"{text}, as asked"
    measured_ms = 1e3 * config.full_step_s
    text += f": {measured_ms:.{0 if measured_ms >= 10 else 1}f} ms measured"
    if settings.max_step_s is None:
        return text
    return f"{text}, {1e3 * settings.max_step_s:g} ms asked"


def _policy(service: Service) -> str:
    config = service.card.config
    if config.policy == "priority":
        return "priority, lower numbers first"
    shares = sorted(config.tenant_weights.values())
    weights = ", ".join(f"{share:g}" for share in shares)
    return "fair among API keys" + (f", weights {weights}, others 1" if shares else "")


def _guesses(service: Service) -> str:
    speculation, draft = service.card.config.speculation, service.engine.draft_info
    assert speculation is not None, "nothing is guessed"
    if draft is None:
        who = f"what followed the same {speculation.min_ngram} to {speculation.max_ngram} tokens"
    else:
        folder = Path(service.model.settings.engine.draft_model or "").name
        cache_bytes = (
            service.card.config.num_blocks[0]
            * service.card.config.block_size
            * draft.cache_bytes_per_token
        )
        who = (
            f"the model {folder} ({draft.num_parameters:,} parameters, "
            f"{cache_bytes / MIB:.1f} MiB of KV cache)"
        )
    when = "always" if speculation.is_always_on else "while it pays"
    return f"up to {speculation.num_draft_tokens} tokens ahead {when}, by {who}"
