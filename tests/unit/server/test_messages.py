from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.config import SpeculationConfig
from llmserve.engine.request import FinishReason, Pooling, Request, RequestOutput
from llmserve.errors import EngineError
from llmserve.runners.protocol import TokenLogprobs
from llmserve.sampling import SamplingParams
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.messages import (
    MAX_FRAME_BYTES,
    Abort,
    AddRequest,
    Command,
    Failed,
    Finish,
    Fork,
    Load,
    LoaderCommand,
    command_decoder,
    encode_frame,
    event_decoder,
    loader_command_decoder,
)
from support.engines import make_config

REQUEST = Request(
    request_id="r",
    prompt_token_ids=[1, 2, 3],
    sampling_params=SamplingParams(
        logit_bias={5: -1.5}, stop=("a", "b"), stop_token_ids=(7,), seed=2**63 - 1, n=2
    ),
    seed=2**63 - 1,
    priority=-2,
    tenant="0123456789abcdef",
    cache_salt="0123456789abcdef/salt",
    adapter="tuned",
    pooling=Pooling.MEAN,
    block_keys=[2**63, 1],
    deadline=12.5,
    output_token_ids=[[4], []],
    ended_choices=[1],
    num_cached_tokens=16,
)
SETTINGS = EngineSettings(
    model="m",
    runner="fake",
    adapters={"a": "b"},
    policy="fair",
    tenant_weights={"t": 2.0},
    speculation=SpeculationConfig(method="ngram", num_draft_tokens=3),
    max_batched_tokens=None,
)
COMMANDS: list[Command] = [
    AddRequest(REQUEST),
    Abort("r"),
    Finish("r", 1),
]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_commands_survive_any_cut_of_their_bytes(cuts: list[int]) -> None:
    data = b"".join(map(encode_frame, COMMANDS))
    decoder = command_decoder()
    received: list[Command] = []
    start = 0
    for length in cuts:
        received += decoder.feed(data[start : start + length])
        start += length
    received += decoder.feed(data[start:])
    assert received == COMMANDS


def test_what_the_loader_is_told_survives() -> None:
    commands: list[LoaderCommand] = [Load(SETTINGS), Fork(3, make_config())]
    assert list(loader_command_decoder().feed(b"".join(map(encode_frame, commands)))) == commands


def test_outputs_keep_infinite_logprobs_and_reasons() -> None:
    output = RequestOutput(
        request_id="r",
        choice_index=0,
        token_ids=[3],
        logprobs=[TokenLogprobs(-0.5, ((3, -0.5), (4, float("-inf"))))],
        finish_reason=FinishReason.LENGTH,
    )
    from llmserve.engine.engine import EngineStats
    from llmserve.server.messages import Outputs

    names = EngineStats.__dataclass_fields__
    stats = EngineStats(**{**dict.fromkeys(names, 1), "accepted_per_position": [1]})
    event = Outputs([output], stats, 0.25)
    assert list(event_decoder().feed(encode_frame(event))) == [event]


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(Failed("x")),  # an event is no command
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x02\x80\x80",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
    ],
)
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(EngineError):
        list(command_decoder().feed(data))


def test_a_request_that_breaks_its_own_rules_is_refused() -> None:
    data = encode_frame(AddRequest(REQUEST)).replace(b"\xa5top_p\xcb?\xf0", b"\xa5top_p\xcb@\xf0")
    with pytest.raises(EngineError, match="top_p"):
        list(command_decoder().feed(data))
