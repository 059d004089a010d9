"""The dynamic program behind plan_segments: partial plans, layer by layer, without those that can never win.

From every layer i, each segment i .. j - 1 with each action is tried. It fits if

    kept so far + what it needs in forward, and in backward  <=  budget

A partial plan is a label (time, bytes kept, ...) at layer j; one that is no better in any of them than another label
there is dropped, since labels decide everything that comes later. The result equals brute force. Only beyond MAX_LABELS
labels at one layer their bytes are rounded up to a grid of the budget, which keeps the plan safe, if no longer optimal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nova_kernels.checkpoint.cost import FSDP, Action, Chain, Host, SegmentCost, segment_cost, simulate

MAX_LABELS = 1024  # partial plans at one layer that are compared exactly
GRID = 1024  # steps of the budget beyond that

Plan = tuple[tuple[int, ...], tuple[Action, ...]]  # bounds and actions


class _Label(NamedTuple):
    """A partial plan up to a layer. The first fields are compared, in this order."""

    time: int  # FLOPs done again, and waits in FLOPs
    kept: int  # bytes left alive
    in_flight: int  # of an offloaded boundary before, which come on top once
    host: int  # bytes offloaded, where they are limited
    stop: int
    action: Action | None
    previous: _Label | None


class Program:
    """All plans of one chain."""

    def __init__(self, chain: Chain, actions: Sequence[Action], fsdp: FSDP | None, host: Host | None) -> None:
        self._chain = chain
        self._actions = actions
        self._fsdp = fsdp
        self._host = host
        self._limit = None if host is None else host.host_bytes
        self._largest = max(layer.boundary for layer in chain.layers)
        self._costs: dict[tuple[int, int], list[tuple[Action, SegmentCost]]] = {}

    def fastest(self, budget: int) -> Plan | None:
        """The plan with the least time whose peak is at most the budget; None if there is none."""
        return self._best(budget - self._chain.fixed, timed=True)

    def leanest(self) -> tuple[int, Plan]:
        """The lowest peak there is, and the fastest plan at it."""
        # Far fewer segments fit below the peak of a plain plan than below everything.
        plain = min(map(self._peak, self._plain_plans())) - self._chain.fixed
        plan = self._best(plain, timed=False) or self._best(self._above_everything(), timed=False)
        if plan is None:
            raise ValueError(
                f"plan_segments: no plan with {', '.join(self._actions)} stays within host_bytes={self._limit:,}; "
                "give more, or allow another action"
            )
        low, high = 0, self._peak(plan)
        while low < high:
            middle = (low + high) // 2
            found = self._best(middle - self._chain.fixed, timed=False)
            if found is None:
                low = middle + 1
            else:
                plan, high = found, min(middle, self._peak(found))
        return high, self.fastest(high) or plan

    def _peak(self, plan: Plan) -> int:
        return simulate(self._chain, *plan, fsdp=self._fsdp, host=self._host).peak_bytes

    def _plain_plans(self) -> Iterator[Plan]:
        """Equal segments that all do the same; some may need more host memory than there is."""
        num_layers = len(self._chain.layers)
        for action in self._actions:
            for size in (1, 2, 4, 8, num_layers):
                bounds = (*range(0, num_layers, size), num_layers)
                yield bounds, (action,) * (len(bounds) - 1)

    def _above_everything(self) -> int:
        layers = self._chain.layers
        each = sum(2 * l.boundary + l.saved + l.forward + l.recompute + l.backward + 4 * l.weights for l in layers)
        return each + self._chain.loss + self._chain.after_loss + self._chain.embedding + self._chain.fixed

    def _best(self, budget: int, *, timed: bool) -> Plan | None:
        num_layers, after = len(self._chain.layers), self._chain.after_loss
        if self._chain.embedding > budget:
            return None
        ending: list[list[_Label]] = [[] for _ in range(num_layers + 1)]
        ending[0] = [_Label(0, 0, 0, 0, 0, None, None)]
        for start in range(num_layers):
            labels = _undominated(ending[start], budget)
            if not labels:
                continue
            room = budget - min(label.kept for label in labels)
            for stop, action, cost in self._segments(start, room):
                waits = cost.time_flops if timed else 0
                hosted = cost.host_bytes if self._limit is not None else 0
                for label in labels:
                    needed = label.kept + max(cost.forward, label.in_flight + cost.backward + after)
                    if needed > budget or label.host + hosted > (self._limit or 0):
                        continue
                    flight = label.in_flight if action == "keep" else cost.in_flight
                    kept, host = label.kept + cost.kept, label.host + hosted
                    longer = _Label(label.time + waits, kept, flight, host, stop, action, label)
                    ending[stop].append(longer)
        done = [label for label in ending[-1] if label.kept + self._chain.loss <= budget]
        return _path(min(done, key=lambda label: label[:4])) if done else None

    def _segments(self, start: int, room: int) -> Iterator[tuple[int, Action, SegmentCost]]:
        """Segments from here that may fit into the room; no longer one can, once all actions need far too much."""
        for stop in range(start + 1, len(self._chain.layers) + 1):
            costs = self._segment_costs(start, stop)
            for action, cost in costs:
                if max(cost.forward, cost.backward) <= room:
                    yield stop, action, cost
            longer = [max(c.forward, c.backward - self._largest) for action, c in costs if action != "keep"]
            if not longer or min(longer) > room:
                return

    def _segment_costs(self, start: int, stop: int) -> list[tuple[Action, SegmentCost]]:
        """Cost by action; layers are kept one by one, and a single one is nested only where it cannot be a segment."""
        known = self._costs.get((start, stop))
        if known is None:
            single = stop == start + 1
            known = [
                (action, segment_cost(self._chain, start, stop, action, fsdp=self._fsdp, host=self._host))
                for action in self._actions
                if not (action == "keep" and not single)
                and not (action == "nested" and single and "segment" in self._actions)
            ]
            self._costs[start, stop] = known
        return known


def _undominated(labels: list[_Label], budget: int) -> list[_Label]:
    """The labels that may still win, best time first."""
    front = _front(labels)
    if len(front) > MAX_LABELS:
        step = max(1, budget // GRID)
        front = _front([label._replace(kept=-(-label.kept // step) * step) for label in front])
    return front


def _front(labels: list[_Label]) -> list[_Label]:
    least: dict[tuple[int, int], int] = {}  # (in flight, on the host) -> fewest bytes kept so far
    front = []
    for label in sorted(labels, key=lambda label: label[:4]):
        flight, host = label.in_flight, label.host
        if any(kept <= label.kept and f <= flight and h <= host for (f, h), kept in least.items()):
            continue
        least[flight, host] = label.kept
        front.append(label)
    return front


def _path(label: _Label) -> Plan:
    """Bounds and actions that led to a label; neighbours that are kept become one segment."""
    bounds, actions = [label.stop], list[Action]()
    step: _Label | None = label
    while step is not None and step.previous is not None and step.action is not None:
        if not (step.action == "keep" and actions and actions[-1] == "keep"):
            actions.append(step.action)
            bounds.append(step.previous.stop)
        else:
            bounds[-1] = step.previous.stop
        step = step.previous
    return tuple(bounds[::-1]), tuple(actions[::-1])
