from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from llmserve.engine.config import SpeculationConfig
from llmserve.limits import Limits
from llmserve.text.tokenizer import Tokenizer
from support.models import MAX_SEQ_LEN
from support.servers import LocalServer, call, local_server


def samples(server: LocalServer) -> dict[tuple[str, str], float]:
    """Name and labels → value."""
    text = server.get("/metrics").body.decode()
    return {
        (sample.name, _labels(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _labels(labels: Mapping[str, str]) -> str:
    """All but the model's, which is the same throughout."""
    return ",".join(f"{k}={v}" for k, v in sorted(labels.items()) if k != "model_name")


def test_metrics_count_what_was_done(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        before = samples(server)
        server.complete(prompt=[5, 6, 7], max_tokens=10, n=2)
        server.complete(prompt=[5], max_tokens=4, stream=True)
        server.post("/v1/completions", b"[]")
        server.wait_idle()
        after = samples(server)

        def grown(name: str, labels: str = "") -> float:
            return after[name, labels] - before.get((name, labels), 0.0)

        assert grown("llmserve_prompt_tokens_total") == 4
        assert grown("llmserve_generation_tokens_total") == 24
        assert grown("llmserve_request_success_total", "finished_reason=length") == 3
        assert grown("llmserve_time_to_first_token_seconds_count") == 3
        assert grown("llmserve_inter_token_latency_seconds_count") == 24 - 3
        assert grown("llmserve_e2e_request_latency_seconds_count") == 2
        assert grown("llmserve_request_queue_time_seconds_count") == 3
        labels = "handler=/v1/completions,method=POST,status="
        assert grown("llmserve_http_requests_total", labels + "200") == 2
        assert grown("llmserve_http_requests_total", labels + "400") == 1
        assert after["llmserve_num_requests_running", ""] == 0
        assert after["llmserve_kv_cache_usage_perc", ""] == 0
        assert after["llmserve_engine_steps_total", ""] > 0


def test_metrics_tell_of_the_prefix_cache_and_the_pools(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        assert samples(server)["llmserve_prefix_cache_hits_total", ""] == 0
        reply = [server.complete(prompt=[5, 6] * 30, max_tokens=2).json() for _ in range(2)][1]
        found = samples(server)
        hits = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert found["llmserve_prefix_cache_queries_total", ""] == 120
        assert found["llmserve_prefix_cache_hits_total", ""] == hits > 0
        assert found["llmserve_kv_cache_blocks", ""] == sum(server.engine.config.num_blocks)
        assert not any("spec_decode" in name for name, _ in found)


def test_the_fullest_pool_is_the_usage(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        server.complete(prompt=[5] * 20, max_tokens=1)
        stats = server.engine.stats
        assert stats is not None
        server.engine.stats = replace(stats, cache_usage=0.75)
        assert samples(server)["llmserve_kv_cache_usage_perc", ""] == 0.75


def test_metrics_tell_of_guesses(model_folder: Path) -> None:
    speculation = SpeculationConfig(method="ngram", num_draft_tokens=3, is_always_on=True)
    engine = {"speculation": speculation}
    with local_server(model_folder, script=lambda _: 70, engine=engine) as server:
        name = "llmserve_spec_decode_num_accepted_tokens_per_pos_total"
        places = [(name, f"position={place}") for place in range(3)]
        before = samples(server)
        assert [before[place] for place in places] == [0, 0, 0]
        server.complete(prompt=[5], max_tokens=60)
        found = samples(server)
        assert {key for key in found if "spec" in key[0]} == {
            key for key in before if "spec" in key[0]
        }
        stats = server.engine.stats
        assert stats is not None
        name = "llmserve_spec_decode_num_{}_total"
        assert found[name.format("drafts"), ""] == stats.num_drafts > 5
        assert found[name.format("draft_tokens"), ""] == stats.num_draft_tokens
        assert found[name.format("accepted_tokens"), ""] == stats.num_accepted_tokens > 5
        by_place = [found[place] for place in places]
        assert by_place == stats.accepted_per_position
        assert sum(by_place) == stats.num_accepted_tokens


def test_histogram_buckets_are_cumulative(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        server.complete(prompt=[5], max_tokens=10)
        found = samples(server)
        name = "llmserve_inter_token_latency_seconds"
        buckets = [
            (float(labels.removeprefix("le=")), value)
            for (sample, labels), value in found.items()
            if sample == f"{name}_bucket"
        ]
        counts = [count for _, count in sorted(buckets)]
        assert counts == sorted(counts)
        assert counts[-1] == found[f"{name}_count", ""] == 9


def test_series_do_not_grow_with_what_clients_send(server: LocalServer) -> None:
    def send(index: int) -> None:
        server.complete(prompt="x", model=f"model-{index}")
        server.get(f"/no/such/route/{index}")
        server.get(f"/v1/models/other-{index}")
        server.run(call(server.app, f"ODD{index}", "/health"))

    samples(server)
    send(0)
    before = samples(server).keys()
    for index in range(1, 20):
        send(index)
    assert samples(server).keys() == before


def test_probes_answer_and_limits_are_the_ones_in_force(server: LocalServer) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ok"}
    assert server.get("/limits").json() == asdict(Limits())


def test_health_is_the_engine_s_word(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        server.engine.trouble = "the engine has work and has made no step for 9 s"
        for path in ("/health", "/ready"):
            reply = server.get(path)
            assert reply.status == 503
            assert "no step for 9 s" in reply.json()["error"]["message"]
        server.engine.trouble = None
        assert server.get("/health").status == 200


def test_readiness_ends_when_the_server_drains(model_folder: Path) -> None:
    with local_server(model_folder) as server:
        server.state.is_draining = True
        assert server.get("/ready").status == 503
        assert server.get("/health").status == 200
        refused = server.complete(prompt="x", max_tokens=1)
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"


def test_tokenize_and_detokenize_are_each_others_inverse(
    server: LocalServer, model_folder: Path
) -> None:
    tokenizer = Tokenizer.load(model_folder)
    text = "Once upon a 🙂"
    reply = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert reply["tokens"] == tokenizer.encode(text)
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == MAX_SEQ_LEN
    bare = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert server.post("/detokenize", {"tokens": bare["tokens"]}).json() == {"prompt": text}


def test_tokenize_reads_conversations(server: LocalServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert text == "<user>hi\n<assistant>"
    short = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()
    assert short["count"] < len(ids)


def test_tokenize_takes_one_kind_of_input(server: LocalServer) -> None:
    assert server.post("/tokenize", {}).status == 400
    both = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    assert server.post("/tokenize", both).status == 400
    assert server.post("/detokenize", {"tokens": [10**6]}).status == 400


def test_openapi_describes_every_post_route(server: LocalServer) -> None:
    document = server.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"]["properties"]
    assert "$ref" not in str(document["paths"]["/v1/chat/completions"]["post"]["requestBody"])
    assert server.get("/docs").status == 404


def test_names_of_vllm_with_its_labels(model_folder: Path) -> None:
    with local_server(model_folder, metrics_prefix="vllm") as server:
        server.complete(prompt=[5] * 20, max_tokens=3)
        server.wait_idle()
        text = server.get("/metrics").body.decode()
    label = '{engine="0",model_name="tiny"}'
    for line in (
        f"vllm:prompt_tokens_total{label} 20.0",
        f"vllm:generation_tokens_total{label} 3.0",
        f"vllm:num_requests_running{label} 0.0",
        f"vllm:time_to_first_token_seconds_count{label} 1.0",
        f"vllm:request_prompt_tokens_sum{label} 20.0",
        f"vllm:iteration_tokens_total_sum{label} 22.0",
    ):
        assert line in text
    assert 'vllm:request_success_total{engine="0",finished_reason="length"' in text
    assert "llmserve_" not in text


def test_every_name_of_the_board_is_served(server: LocalServer) -> None:
    text = server.get("/metrics").body.decode()
    board = (Path(__file__).parents[3] / "docs" / "grafana.json").read_text(encoding="utf-8")
    names = set(re.findall(r"llmserve_\w+", board))
    assert len(names) > 12
    for name in names:
        assert re.search(rf"^{name}(\{{| )", text, re.MULTILINE), name
    panels = json.loads(board)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
