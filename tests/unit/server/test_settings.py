from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.errors import ConfigError
from llmserve.limits import Limits
from llmserve.server.auth import Access, Caller, Key, KeyRing, RouteScope
from llmserve.server.cli_serve import parse_limits
from llmserve.server.engine_launch import API_KEY_VARIABLE
from llmserve.server.engine_options import parse_size
from llmserve.server.engine_settings import EngineSettings
from llmserve.server.settings import ModelSettings, ServerSettings, is_loopback, load_keys

MODELS = (ModelSettings(engine=EngineSettings(model="m", runner="fake")),)
KEYS = KeyRing([Key.of("long-enough-key", {RouteScope.USER})])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_loopback_needs_no_keys_and_checks_the_host_header(host: str) -> None:
    settings = ServerSettings(models=MODELS, host=host)
    assert is_loopback(host)
    assert host in settings.host_names


@pytest.mark.parametrize("host", ["::", "10.1.2.3", "example.org", "128.0.0.1", ""])
def test_other_addresses_need_keys_or_consent(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        ServerSettings(models=MODELS, host=host)
    assert ServerSettings(models=MODELS, host=host, keys=KEYS).host_names == ()
    ServerSettings(models=MODELS, host=host, allow_unauthenticated=True)


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_is_bounded(port: int) -> None:
    with pytest.raises(ConfigError, match="port"):
        ServerSettings(models=MODELS, port=port)


def access(ring: KeyRing, path: str, *headers: tuple[bytes, bytes]) -> Access:
    return caller(ring, path, *headers).access


def caller(ring: KeyRing, path: str, *headers: tuple[bytes, bytes]) -> Caller:
    return ring.check({"type": "http", "path": path, "headers": list(headers)})


def test_keys_come_from_files_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, admins = tmp_path / "users", tmp_path / "admins"
    users.write_text("# people\nuser-key-one\n\n  user-key-two  \n")
    admins.write_text("admin-key-one\n")
    monkeypatch.setenv(API_KEY_VARIABLE, "environment-key")
    ring = load_keys(user_file=users, metrics_file=None, admin_file=admins)
    for secret in (b"user-key-one", b"user-key-two", b"environment-key"):
        header = (b"authorization", b"Bearer " + secret)
        assert access(ring, "/v1/models", header) is Access.GRANTED
        assert access(ring, "/limits", header) is Access.FORBIDDEN
    assert access(ring, "/limits", (b"x-api-key", b"admin-key-one")) is Access.GRANTED
    assert access(ring, "/v1/models", (b"x-api-key", b"# people")) is Access.UNKNOWN
    assert access(ring, "/v1/models") is Access.UNKNOWN
    assert access(ring, "/health") is Access.GRANTED


def test_no_keys_at_all_let_everybody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    ring = load_keys(user_file=None, metrics_file=None, admin_file=None)
    assert ring.is_empty
    assert access(ring, "/limits") is Access.GRANTED


def test_a_key_names_its_tenant_and_not_itself(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("user-key-one name=ann\nuser-key-two   name=b.o-b_2\nuser-key-three\n")
    ring = load_keys(user_file=users, metrics_file=None, admin_file=users)
    tenants = [
        caller(ring, "/v1/models", (b"x-api-key", secret)).tenant
        for secret in (b"user-key-one", b"user-key-two", b"user-key-three")
    ]
    assert len(set(tenants)) == 3
    assert all(len(tenant) == 16 and "key" not in tenant for tenant in tenants)
    assert [ring.tenant_named("ann"), ring.tenant_named("b.o-b_2")] == tenants[:2]
    with pytest.raises(ConfigError, match=r"'eve'; named keys: ann, b\.o-b_2"):
        ring.tenant_named("eve")
    assert caller(ring, "/health").tenant == ""
    assert caller(KeyRing(), "/v1/models").tenant == ""
    assert caller(ring, "/v1/models", (b"x-api-key", b"stranger")).tenant == ""


def test_a_name_is_for_one_key(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text("user-key-one name=ann\nuser-key-two name=ann\n")
    with pytest.raises(ConfigError, match="two keys have the name 'ann'"):
        load_keys(user_file=users, metrics_file=None, admin_file=None)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    original = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return original(a, b)

    monkeypatch.setattr("llmserve.server.auth.hmac.compare_digest", spy)
    ring = KeyRing([Key.of(f"some-key-{index}", {RouteScope.USER}) for index in range(5)])
    assert access(ring, "/v1/models", (b"x-api-key", b"some-key-0")) is Access.GRANTED
    assert len(compared) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no keys"),
        (b"# only a comment\n", "holds no keys"),
        (b"short\n", "fewer than 8"),
        (b"two words here\n", "a space"),
        (b"long-enough name=\n", "a space"),
        (b"long-enough name=two words\n", "a space"),
        (b"long-enough # words\n", "a space"),
        (b"long-enough\tname=x\n", "outside ASCII"),
        ("schlüssel-lang\n".encode(), "outside ASCII"),
        (b"\xff\xfe\n", "not text"),
    ],
)
def test_unusable_key_files_are_refused_without_quoting_keys(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_keys(user_file=path, metrics_file=None, admin_file=None)
    assert "words" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(user_file=tmp_path / "none", metrics_file=None, admin_file=None)


def test_an_empty_environment_key_is_refused_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    with pytest.raises(ConfigError, match=API_KEY_VARIABLE):
        load_keys(user_file=None, metrics_file=None, admin_file=None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("256M", 256 << 20), ("1g", 1 << 30), ("2GiB", 2 << 30), ("5KB", 5 << 10)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "M", "1T", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


def test_limits_are_changed_by_name() -> None:
    limits = parse_limits(["drain_s=2.5", "max_choices=4"])
    assert (limits.drain_s, limits.max_choices) == (2.5, 4)
    assert limits.max_prompts == Limits().max_prompts


@pytest.mark.parametrize(
    "assignment", ["drain_s", "drain_s=", "drain_s=x", "max_choices=1.5", "nothing=1", "drain_s=0"]
)
def test_other_assignments_are_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="limit"):
        parse_limits([assignment])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_prefix_cache": False}, "leave out --no-enable-prefix-caching"),
        ({"record": "log"}, "--record cannot be replayed"),
        ({"runner": "torch"}, "needs the native runner: the torch runner cannot"),
        ({"runner": "onnx"}, "needs the native runner: the onnx runner cannot"),
    ],
)
def test_engines_that_could_not_hand_over_are_refused(
    changes: dict[str, object], message: str
) -> None:
    engine = EngineSettings(**{"model": "m", "runner": "native", **changes})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        ModelSettings(engine=engine, num_prefill_engines=1)
    ModelSettings(engine=engine)


@pytest.mark.parametrize("count", [-1, 65])
def test_number_of_engines_that_only_read_is_bounded(count: int) -> None:
    with pytest.raises(ConfigError, match=f"--prefill-engines must be from 0 to 64, got {count}"):
        ModelSettings(engine=MODELS[0].engine, num_prefill_engines=count)
