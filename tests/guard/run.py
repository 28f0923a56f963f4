"""Fails when the checkout costs more than a base commit: `make bench-guard BASE=COMMIT`.

Decode and prefill, the sampler, the scheduler, the tokenizer both ways and the server's streaming
are run in both trees (cases.py); a case that became more than 5 % dearer, for sure, fails. Costs
are instructions where valgrind is there, else times in turn (`--by`). Exit code: 0 nothing lost, 1
something lost, 2 the comparison cannot be made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from guard.cases import CASES  # noqa: E402
from guard.counting import (  # noqa: E402
    can_count_instructions,
    count_instructions,
    prepare,
    time_cases,
)
from guard.judge import LIMIT, judge, table  # noqa: E402
from guard.trees import ROOT, GuardError, base_tree, check_kernels, resolve  # noqa: E402

ROUNDS = {"instructions": 2, "time": 9}
UNITS = {"instructions": "M instructions", "time": "ms"}


def main() -> int:
    """Compare; the exit code."""
    args = _arguments()
    started_s = time.monotonic()
    try:
        is_lost = compare(resolve(args.base), args.by, args.rounds or ROUNDS[args.by])
    except GuardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{time.monotonic() - started_s:.0f} s")
    return int(is_lost)


def compare(commit: str, by: str, rounds: int) -> bool:
    """Print the table; whether something was lost. Raises `GuardError`."""
    check_kernels()
    trees = [base_tree(commit), ROOT]
    with tempfile.TemporaryDirectory(prefix="llmserve-guard-") as temporary:
        work = Path(temporary)
        program = [str(HERE / "cases.py"), str(work)]
        prepare(program, ROOT)
        if by == "instructions":
            base, tree = count_instructions(program, trees, work, rounds=rounds)
        else:
            base, tree = time_cases(program, trees, rounds=rounds)
    if missing := {case.__name__ for case in CASES} - tree.keys():
        raise GuardError(f"the checkout does not run {', '.join(sorted(missing))}: mend cases.py")
    tree = {case.__name__: tree[case.__name__] for case in CASES}  # in their order
    verdicts = judge(base, tree)
    print(f"the checkout against {commit[:12]}, {rounds} rounds")
    print("\n".join(table(verdicts, UNITS[by])))
    for case in tree.keys() - base.keys():
        print(f"{case}: not in the base, nothing to compare with")
    lost = [verdict.case for verdict in verdicts if verdict.is_lost]
    print(f"lost more than {LIMIT - 1:.0%}: {', '.join(lost) or 'nothing'}")
    return bool(lost)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", default="HEAD", metavar="COMMIT", help="(default: HEAD)")
    parser.add_argument(
        "--by",
        choices=tuple(ROUNDS),
        default="instructions" if can_count_instructions() else "time",
        help="what a case costs (default here: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="runs of each tree, 2 or more (default: 2; time 9)"
    )
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds must be 2 or more, got {args.rounds}")
    if args.by == "instructions" and not can_count_instructions():
        parser.error("--by instructions needs valgrind and a compiler (Debian: valgrind, gcc)")
    return args


if __name__ == "__main__":
    sys.exit(main())
