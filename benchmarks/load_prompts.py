"""The workload of one load test: made, checked against the server's context, and tried out.

Sits between what `ready.py` learned of the server and the loops that send it (`load.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from llmserve.errors import ConfigError

from .chat_sets import CHAT_SETS, read_conversations
from .client import CHAT_ENDPOINT, Client, ServerError
from .options import ServeOptions
from .ready import ServedModel, align_all, first_request
from .trace_prompts import trace_prompts
from .workload import Prompt, RandomLengths, random_prompts, sample_ids, text_prompts

__all__ = ["Workload", "make_workload"]

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is sent."""

    prompts: list[Prompt]
    """The measured requests, in order; the turns of a conversation stand together."""
    warmups: list[Prompt]

    @property
    def conversations(self) -> list[list[Prompt]]:
        """The measured requests, those of one conversation in a list of their own."""
        found: list[list[Prompt]] = []
        for prompt in self.prompts:
            if prompt.turn == 0:
                found.append([])
            found[-1].append(prompt)
        return found


async def make_workload(
    client: Client,
    options: ServeOptions,
    served: ServedModel,
    *,
    deadline_s: float,
    announce: Announce,
) -> Workload:
    """Make the prompts, and send one to find out what the server takes (`ready.first_request`).

    Raises:
        ConfigError: they cannot fit the model's context.
        DataError: a file of prompts cannot be used.
        ServerError: they cannot be made, or the first request failed.
    """
    num_extras = 1 + options.num_warmups
    made = await _make(client, options, served, num_extras, announce)
    first = len(made) - num_extras
    if not await first_request(client, made[first], deadline_s=deadline_s, announce=announce):
        made = await align_all(client, made, announce)
        await first_request(client, made[first], deadline_s=deadline_s, announce=announce)
    return Workload(prompts=made[:first], warmups=made[first + 1 :])


async def _make(
    client: Client,
    options: ServeOptions,
    served: ServedModel,
    num_extras: int,
    announce: Announce,
) -> list[Prompt]:
    """The measured prompts, then `num_extras` single ones."""
    num_prompts, path = options.traffic.num_prompts, options.dataset_path
    if path is not None and options.dataset_name in CHAT_SETS:
        asked = read_conversations(path, options.dataset_name)
        turns = 1 if options.multi_turn is None else options.multi_turn.num_turns
        return _chat_prompts(asked, num_prompts, num_extras, turns, options.lengths.output_len)
    if path is not None:
        output_len = options.lengths.output_len
        return text_prompts(path, num_prompts + num_extras, output_len=output_len)
    _check_lengths(options, served)
    ids = await _known_ids(client, options, served)
    prompts = _random(options, ids, num_extras)
    if options.endpoint == CHAT_ENDPOINT:
        return await align_all(client, prompts, announce)
    return prompts


def _random(options: ServeOptions, ids: Sequence[int], num_extras: int) -> list[Prompt]:
    num_prompts = options.traffic.num_prompts
    if (trace := options.traffic.trace) is not None:
        recorded = trace_prompts(trace, ids, seed=options.seed)
        lengths = RandomLengths(input_len=len(recorded[0].content), output_len=1)
        return recorded + random_prompts(num_extras, lengths, ids, seed=options.seed)
    turns = 1 if options.multi_turn is None else options.multi_turn.num_turns or 1
    prompts = random_prompts(
        num_prompts * turns + num_extras, options.lengths, ids, seed=options.seed
    )
    measured = [replace(p, turn=p.index % turns) for p in prompts[: num_prompts * turns]]
    return measured + prompts[num_prompts * turns :]


def _chat_prompts(
    asked: Sequence[Sequence[str]],
    num_prompts: int,
    num_extras: int,
    most_turns: int | None,
    output_len: int,
) -> list[Prompt]:
    """Conversations in their order, from the start again where there are too few."""
    chosen = list(islice(cycle(asked), num_prompts + num_extras))
    pairs = [
        (turn, text)
        for turns in chosen[:num_prompts]
        for turn, text in enumerate(turns[:most_turns])
    ]
    pairs += [(0, turns[0]) for turns in chosen[num_prompts:]]
    return [
        Prompt(index=index, content=text, num_tokens=None, output_len=output_len, turn=turn)
        for index, (turn, text) in enumerate(pairs)
    ]


def _check_lengths(options: ServeOptions, served: ServedModel) -> None:
    """Refuse what cannot fit before anything is sent."""
    trace, limit = options.traffic.trace, served.max_model_len
    longest = options.lengths.most if trace is None else trace.size(1).max_len
    if options.multi_turn is not None:
        longest *= options.multi_turn.num_turns or 1
    if limit is not None and longest > limit:
        cure = "--random-input-len or --random-output-len" if trace is None else "--length-scale"
        raise ConfigError(
            f"the longest prompt and answer make {longest} tokens; the context of "
            f"{served.name} is {limit}: lower {cure}"
        )


async def _known_ids(client: Client, options: ServeOptions, served: ServedModel) -> Sequence[int]:
    """Ids that the model has: all of them, or those of a sample text."""
    vocab_size = options.vocab_size or served.vocab_size
    if vocab_size is not None and options.endpoint != CHAT_ENDPOINT:
        return range(vocab_size)
    try:
        return await sample_ids(client)
    except ServerError as error:
        raise ServerError(
            f"no token ids to make random prompts from: the server neither tells its vocabulary's "
            f"size nor tokenizes ({error}); give --vocab-size, or use --dataset-name text",
            status=error.status,
        ) from error
