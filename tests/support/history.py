"""What clients saw of the requests they sent, held against what the server counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

ROUTE = "/v1/completions"
LEFT = 499
"""What the server counts where a client left before its reply began."""


class History:
    """One entry for each completion that was sent: its status, and how its choice ended.

    Both are None where the client left before it knew. Threads may add at the same time.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[int | None, str | None]] = []

    def add(self, status: int | None, reason: str | None = None) -> None:
        """Note a request that is over for its client."""
        self._seen.append((status, reason))

    def __len__(self) -> int:
        return len(self._seen)

    def disagreements(self, counted: Mapping[str, float]) -> list[str]:
        """What the numbers of `/metrics`, grown since this began, say otherwise.

        Who left early may have been served, refused, or neither; everybody else is counted as the
        client saw it, and a choice ends once for each request that was taken.
        """
        statuses, ends = self._counted(counted)
        return [
            *_outside("status", Counter(status for status, _ in self._seen), statuses),
            *_outside("end", self._ends(), ends),
            *_once(len(self), statuses, ends),
        ]

    def _ends(self) -> Counter[str | None]:
        """Of the requests that were taken or may have been."""
        return Counter(reason for status, reason in self._seen if status in (None, 200))

    def _counted(self, counted: Mapping[str, float]) -> tuple[Counter[str], Counter[str]]:
        statuses: Counter[str] = Counter()
        ends: Counter[str] = Counter()
        for name, value in counted.items():
            if name.startswith("llmserve_http_requests_total{") and f'handler="{ROUTE}"' in name:
                statuses[_label(name, "status")] += int(value)
            if name.startswith("llmserve_request_success_total{"):
                ends[_label(name, "finished_reason")] += int(value)
        return statuses, ends


def _label(name: str, label: str) -> str:
    return name.partition(f'{label}="')[2].partition('"')[0]


def _outside(what: str, seen: Mapping[object, int], counted: Mapping[str, int]) -> list[str]:
    """Counts that the clients who do not know cannot explain."""
    unknown = seen.get(None, 0)
    known = {str(key): count for key, count in seen.items() if key is not None}
    always = {str(LEFT), "abort"}  # what only those who left can come to
    possible = {"200", "429", "length"} | always
    complaints = []
    for key in sorted(known.keys() | counted.keys()):
        least = known.get(key, 0)
        most = least + (unknown if key in possible else 0)
        if not least <= counted.get(key, 0) <= most:
            complaints.append(
                f"{what} {key}: counted {counted.get(key, 0)}, seen {least} to {most}"
            )
    return complaints


def _once(num_sent: int, statuses: Counter[str], ends: Counter[str]) -> list[str]:
    complaints = []
    if statuses.total() != num_sent:
        complaints.append(f"{num_sent} requests sent, {statuses.total()} replies counted")
    least = statuses["200"]
    if not least <= ends.total() <= least + statuses[str(LEFT)]:
        complaints.append(f"{least} requests taken, {ends.total()} ends counted")
    return complaints
