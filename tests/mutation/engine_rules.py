"""Breaks one rule of the engine at a time, and asks the tests whether they notice.

    make mutants            or: python tests/mutation/engine_rules.py [NAME ...]

Each mutant is an edit of one place. It is made in a copy of the tree, so that nothing of the
checkout changes; the tests named beside it must fail there. An edit whose text is not found is an
error: the list would be out of date. Exit code 0: every mutant was caught.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("llmserve", "tests", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One rule, broken."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]
    """Any of these may catch it; the first that fails does."""


ENGINE_TESTS = ("tests/unit/engine", "tests/property/test_engine.py")

MUTANTS = (
    Mutant(
        "reference count: a shared block is freed by its first holder",
        "llmserve/engine/block_pool.py",
        "        self._ref_counts[block_id] += 1\n",
        "        self._ref_counts[block_id] = 1\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "block hash: a block's name forgets what came before it",
        "llmserve/engine/block_keys.py",
        "hashlib.sha256(parent + tokens.tobytes())",
        "hashlib.sha256(self._root + tokens.tobytes())",
        ENGINE_TESTS,
    ),
    Mutant(
        "block hash: the salt is left out",
        "llmserve/engine/block_keys.py",
        '(fingerprint, request.adapter or "", request.cache_salt, private)',
        '(fingerprint, request.adapter or "", private)',
        ENGINE_TESTS,
    ),
    Mutant(
        "RNG key: the choice is left out",
        "llmserve/engine/sequence.py",
        "choice_index=self.choice_index,",
        "choice_index=0,",
        ENGINE_TESTS,
    ),
    Mutant(
        "RNG key: the position counts the output alone",
        "llmserve/runners/protocol.py",
        'token being 0."""\n        return len(self.token_ids)\n',
        'token being 0."""\n        return len(self.token_ids) - self.num_prompt_tokens\n',
        (
            "tests/unit/engine",
            "tests/unit/runners/test_sampler.py",
            "tests/property/test_engine.py",
        ),
    ),
    Mutant(
        "mask: end ids may be drawn before min_tokens",
        "llmserve/runners/protocol.py",
        "return self.end_token_ids if num_generated < self.params.min_tokens else ()",
        "return ()",
        ("tests/unit/engine", "tests/unit/runners/test_sampler.py"),
    ),
    Mutant(
        "mask: a query sees one key more than its window",
        "llmserve/runners/torch_attention.py",
        "                is_hidden |= positions <= queries - window\n",
        "                is_hidden |= positions < queries - window\n",
        ("tests/unit/runners/test_torch_attention.py",),
    ),
    Mutant(
        "preemption order: the oldest goes first",
        "llmserve/engine/scheduler.py",
        "            self._preempt(step, running.sequences[-1])\n",
        "            self._preempt(step, running.sequences[0])\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "preemption: what was computed counts as if it were still in the cache",
        "llmserve/engine/scheduler.py",
        "            num_computed=hit.num_tokens,\n",
        "            num_computed=max(hit.num_tokens, sequence.num_sealed_blocks),\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "stop string: nothing is held back",
        "llmserve/text/stop_strings.py",
        "        shown = len(pending) - automaton.depth[state]\n",
        "        shown = len(pending)\n",
        ("tests/unit/text/test_stop_strings.py", "tests/unit/test_output.py"),
    ),
    Mutant(
        "window release: a block goes one token too early",
        "llmserve/engine/kv_cache.py",
        "        return max(0, position - self.window + 1) // self._block_size\n",
        "        return max(0, position - self.window + 2) // self._block_size\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "budget: a step may have one token more",
        "llmserve/engine/scheduler.py",
        "self.config.max_batched_tokens - len(step.decodes)\n",
        "self.config.max_batched_tokens - len(step.decodes) + 1\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "budget: many decodes leave prompts a block alone",
        "llmserve/engine/scheduler.py",
        "float(max(left, self._least_prefill()))",
        "float(left)",
        ENGINE_TESTS,
    ),
    Mutant(
        "budget: who waits does not count",
        "llmserve/engine/scheduler.py",
        "len(self.running) + len(self.policy)",
        "len(self.running)",
        ENGINE_TESTS,
    ),
    Mutant(
        "decodes: a row that begins a block gets none",
        "llmserve/engine/scheduler.py",
        "(lengths % self.config.block_size < 2)",
        "(lengths % self.config.block_size < 1)",
        ENGINE_TESTS,
    ),
    Mutant(
        "decodes: who has read its prompt is not found among them",
        "llmserve/engine/running.py",
        "            self.is_decoding[row] = True\n            self._split = None\n",
        "            self.is_decoding[row] = True\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "copy on write: the tail is written where others read it",
        "llmserve/engine/kv_cache.py",
        "                group.copy_tail(row)\n",
        "                pass\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "drafts: a guess is accepted whatever the model draws",
        "llmserve/engine/advance.py",
        "            if token_id != chunk.draft_ids[place]:\n",
        "            if False and token_id != chunk.draft_ids[place]:\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "failure: the blocks of a step that raised stay sealed",
        "llmserve/engine/engine.py",
        "        self._scheduler.kv.distrust_step()\n",
        "",
        ENGINE_TESTS,
    ),
    Mutant(
        "not finite: what a poisoned sequence computed stays sealed",
        "llmserve/engine/advance.py",
        "        self._scheduler.kv.distrust(sequence)\n",
        "",
        ENGINE_TESTS,
    ),
    Mutant(
        "ahead: the token of the step under way is not counted",
        "llmserve/engine/scheduler.py",
        "lengths = self.running.num_computed[rows] + 2",
        "lengths = self.running.num_computed[rows] + 1",
        ENGINE_TESTS,
    ),
    Mutant(
        "ahead: a sequence goes on beyond its length",
        "llmserve/engine/scheduler.py",
        "self.running.num_computed[rows] + 2 < self.running.max_len[rows]",
        "self.running.num_computed[rows] + 1 < self.running.max_len[rows]",
        ENGINE_TESTS,
    ),
    Mutant(
        "ahead: a penalty is not waited for",
        "llmserve/engine/scheduler.py",
        "if not all(under_way.decodes[n].is_foreseeable for n in live):\n",
        "if not live:\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "ahead: who waits does not count",
        "llmserve/engine/scheduler.py",
        "if len(self.policy) and not (self.running.is_full and goes_on.all()):\n",
        "if not live:\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "ahead: full blocks are never offered",
        "llmserve/engine/engine.py",
        "            self._scheduler.seal_ahead(self._in_flight[-1])\n",
        "            pass\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "rounds: who could be let in waits for all of them",
        "llmserve/engine/scheduler.py",
        "not step.chunks and (running.is_full or not len(self.policy))",
        "not step.chunks",
        ENGINE_TESTS,
    ),
    Mutant(
        "rounds: on beyond a sequence's length",
        "llmserve/engine/scheduler.py",
        "(running.max_len[rows] - lengths).min()",
        "(running.max_len[rows] - lengths).max()",
        ENGINE_TESTS,
    ),
    Mutant(
        "rounds: what follows an end is given out",
        "llmserve/engine/advance.py",
        "            if sequence.end_after(token_id) is not None:\n                break\n"
        "        self._scheduler.running.settle(sequence)\n",
        "        self._scheduler.running.settle(sequence)\n",
        ENGINE_TESTS,
    ),
    Mutant(
        "rounds: the blocks that they fill are nobody's",
        "llmserve/engine/scheduler.py",
        "        self._seal(sequence, len(sequence.token_ids) - 1)\n\n    def settle_drafts",
        "        pass\n\n    def settle_drafts",
        ENGINE_TESTS,
    ),
    Mutant(
        "rounds: more sequences get as many as fewer did",
        "llmserve/engine/rounds.py",
        "self._known is None or num_sequences > self._known[0]",
        "self._known is None",
        ENGINE_TESTS,
    ),
    Mutant(
        "rounds: a tenant pays for one",
        "llmserve/engine/scheduler.py",
        "DECODE_WEIGHT * step.num_rounds",
        "DECODE_WEIGHT",
        ENGINE_TESTS,
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Try the mutants whose names hold one of the given words, or all."""
    parser = argparse.ArgumentParser(description="Break the engine's rules in turn.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants named like this")
    words = parser.parse_args(argv).words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    survivors = [mutant.name for mutant in chosen if not _is_caught(mutant)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught")
    return 1 if survivors or not chosen else 0


def _is_caught(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, tree / name)
        _edit(tree / mutant.path, mutant)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *mutant.tests,
        ]
        # The copy's modules, not those of the checkout that is installed.
        done = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    is_caught = done.returncode == 1 and bool(failed)
    by = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else "nothing"
    print(f"{'caught' if is_caught else 'SURVIVED':9} {mutant.name}\n          by {by}", flush=True)
    return is_caught


def _edit(path: Path, mutant: Mutant) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise SystemExit(
            f"{mutant.path} holds {mutant.before!r} {text.count(mutant.before)} times, not once: "
            f"bring the mutant {mutant.name!r} up to date"
        )
    path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
