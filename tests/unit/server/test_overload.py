"""R10: far more requests than there is room for: each ends once, with its answer or with 429."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from llmserve.limits import Limits
from support.servers import LocalServer, Reply, call, local_server

NUM_REQUESTS = 400
NUM_RUNNING = 4
NUM_WAITING = 16
BODY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


async def flood(server: LocalServer) -> list[Reply]:
    """All at once; every third in a stream."""

    async def ask(index: int) -> Reply:
        body = {**BODY, "prompt": [index % 300, 5], "stream": index % 3 == 0}
        return await call(server.app, "POST", "/v1/completions", json.dumps(body).encode())

    return await asyncio.gather(*map(ask, range(NUM_REQUESTS)))


def text_of(reply: Reply) -> str:
    if reply.headers["content-type"].startswith("application/json"):
        text: str = reply.json()["choices"][0]["text"]
        return text
    return "".join(event["choices"][0]["text"] for event in reply.events())


def test_r10_overload(model_folder: Path) -> None:
    limits = Limits(max_waiting_requests=NUM_WAITING)
    engine = {"max_num_seqs": NUM_RUNNING}
    with local_server(model_folder, limits=limits, engine=engine, step_s=0.002) as server:
        replies = server.run(flood(server))
        assert {int(reply.status) for reply in replies} == {200, 429}
        answered = [index for index, reply in enumerate(replies) if reply.status == 200]
        assert len(answered) >= NUM_RUNNING + NUM_WAITING
        for reply in replies:
            if reply.status == 429:
                assert 1 <= int(reply.headers["retry-after"]) <= 60
        for index in answered[:20]:
            alone = server.post("/v1/completions", {**BODY, "prompt": [index % 300, 5]})
            assert text_of(replies[index]) == text_of(alone)
        server.wait_idle()
        counted = server.get("/metrics").body.decode()
        ended = 'llmserve_request_success_total{finished_reason="length",model_name="tiny"}'
        total = len(answered) + len(answered[:20])
        assert f"{ended} {float(total)}" in counted
