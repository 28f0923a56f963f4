"""A Ray Serve application: one server on each of several machines, behind one door.

    serve run llmserve.server.ray_app:build serve="run/model --threads 4" replicas=2 cpus=4

`serve` is what would stand after `llmserve serve`. Ray places the replicas, starts lost ones again
and sends a request to the less busy of two; `cluster_front.py` asks another replica when one is
lost. Ray's own HTTP server listens, and Ray carries requests and replies between its processes:
its ports are for a network of its own.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NoReturn

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from starlette.types import Message

from llmserve.errors import ConfigError

from .cli_serve import add_arguments, parse_limits, server_settings
from .cluster_front import ClusterFront
from .cluster_replica import ClusterReplica, ClusterRequest
from .log_format import start_log
from .settings import ServerSettings

__all__ = ["MODEL_DEPLOYMENT", "build"]

MODEL_DEPLOYMENT = "llmserve"
FRONT_DEPLOYMENT = "llmserve-front"

FLUSH_S = 5.0
"""Time beside `drain_s` until Ray ends a replica that is to go."""

MOST = 4096
"""Of whatever is counted."""

_NAMES = ("serve", "replicas", "cpus", "gpus", "fronts")
_NOT_HERE = ("host", "port", "http_parser", "record", "swap_root", "swap_probe", "show_limits")


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve run` and for the `args` of a Serve configuration.

    Args:
        args: `serve`, the model and options as `llmserve serve` takes them; `replicas`, servers
            (1); `cpus` and `gpus`, what Ray reserves for each of them (1 and 0); `fronts`,
            processes at the door (1).

    Raises:
        ConfigError: an argument is missing, unknown or out of range.
    """
    if unknown := args.keys() - set(_NAMES):
        raise ConfigError(f"unknown argument {min(unknown)!r}; known: {', '.join(_NAMES)}")
    if not args.get("serve"):
        raise ConfigError('no model was given: serve="MODEL [options of llmserve serve]"')
    command = shlex.split(str(args["serve"]))
    limits = parse_limits(_parse(command).limit)
    most = limits.max_connections
    servers = serve.deployment(
        _Replica,
        name=MODEL_DEPLOYMENT,
        num_replicas=int(_number(args, "replicas", 1, least=1)),
        ray_actor_options={
            "num_cpus": _number(args, "cpus", 1, least=0),
            "num_gpus": _number(args, "gpus", 0, least=0),
        },
        max_ongoing_requests=most,  # what is too much, each server says itself
        graceful_shutdown_timeout_s=limits.drain_s + FLUSH_S,
        health_check_period_s=1.0,
    )
    front = serve.deployment(
        serve.ingress(_front_builder(command))(),
        name=FRONT_DEPLOYMENT,
        num_replicas=int(_number(args, "fronts", 1, least=1)),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=most,
        graceful_shutdown_timeout_s=limits.drain_s + FLUSH_S,
    )
    return front.bind(servers.bind(command))


class _Replica:
    """One server, in a process of Ray's."""

    async def __init__(self, command: list[str]) -> None:  # type: ignore[misc] # Ray awaits it
        self._server = await ClusterReplica.start(_settings(command))

    def check_health(self) -> None:
        """From Ray, every second: an error has the replica replaced."""
        self._server.check_health()

    async def answer(self, request: ClusterRequest) -> AsyncGenerator[list[Message]]:
        """See `ClusterReplica.answer`."""
        async with aclosing(self._server.answer(request)) as answer:
            async for messages in answer:
                yield messages


def _front_builder(command: list[str]) -> Any:
    """What Ray calls in the front's process for its application."""

    def build_front() -> ClusterFront:
        settings = _settings(command)
        app_name = serve.get_replica_context().app_name
        handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name)
        answering = handle.options(stream=True, method_name="answer")

        async def ask(request: ClusterRequest) -> AsyncGenerator[list[Message]]:
            response = answering.remote(request)
            try:
                async for messages in response:
                    yield messages
            finally:
                response.cancel()  # does nothing to one that has ended

        lost = (RayActorError, ReplicaUnavailableError)
        return ClusterFront(ask, keys=settings.keys, limits=settings.limits, lost=lost)

    return build_front


def _settings(command: list[str]) -> ServerSettings:
    """A server's settings; key files and the variable are those of the machine it runs on."""
    args = _parse(command)
    limits = parse_limits(args.limit)
    start_log(args.log_format)
    logging.getLogger("llmserve").setLevel(args.log_level.upper())
    # Whoever listens, Ray decides: to us every caller comes from elsewhere, by whatever name.
    args.host = "0.0.0.0"  # noqa: S104
    return server_settings(args, limits)


def _parse(command: list[str]) -> argparse.Namespace:
    """The options, of which those that cannot hold here are refused."""
    parser = _Parser(prog="llmserve serve", add_help=False)
    add_arguments(parser)
    args = parser.parse_args(command)
    for name in _NOT_HERE:
        if getattr(args, name) != parser.get_default(name):
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning in a Ray application")
    if not args.model:
        raise ConfigError('no model was given: serve="MODEL [options of llmserve serve]"')
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"serve: {message}")


def _number(args: dict[str, Any], name: str, default: float, *, least: float) -> float:
    try:
        value = float(args.get(name, default))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} takes a number, got {args[name]!r}") from None
    if not least <= value <= MOST:
        raise ConfigError(f"{name} must be from {least:g} to {MOST}, got {value:g}")
    return value
