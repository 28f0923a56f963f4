"""The options of conversations of several turns."""

from __future__ import annotations

import argparse

__all__ = ["add_conversation_arguments"]


def add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    """How requests follow each other in conversations."""
    group = parser.add_argument_group("conversations")
    group.add_argument(
        "--multi-turn",
        action="store_true",
        help="turn after turn, with the server's replies as history; --num-prompts counts "
        "conversations, --max-concurrency those that go on at a time",
    )
    group.add_argument(
        "--num-turns",
        metavar="N",
        type=int,
        help="most turns of a conversation (default: all; 3 for random prompts)",
    )
    group.add_argument(
        "--think-time",
        metavar="S",
        type=float,
        default=0.0,
        help="mean seconds between a reply and the next turn, exponential (default: 0)",
    )
