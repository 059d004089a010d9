"""The dynamic program behind plan_segments: partial plans, layer by layer, without those that can never win.

From every layer i, each segment i .. j - 1 with each action is tried. It fits if

    kept so far + what it needs in forward, and in backward  <=  budget

A partial plan is a label (time, bytes kept, ...) at layer j; one that is no better in any of them than another label
there is dropped, since labels decide everything that comes later. The result equals brute force. Only beyond MAX_LABELS
labels at one layer their bytes are rounded up to a grid of the budget, which keeps the plan safe, if no longer optimal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nova_kernels.checkpoint.cost import FSDP, Action, Chain, Host, SegmentCost, segment_cost, simulate

MAX_LABELS = 2048  # partial plans at one layer that are compared exactly
GRID = 1024  # steps of the budget beyond that

Plan = tuple[tuple[int, ...], tuple[Action, ...]]  # bounds and actions

MOST = 1 << 60  # FLOPs or bytes in a label, so that sums stay within 64 bits

# Columns of a table of labels, int64 [labels, 8]; the first five are compared, less is better in each.
TIME, KEPT = range(2)  # FLOPs (in units, if there are very many); bytes
FLIGHT, HOST, COPIES = range(2, 5)  # bytes of an offloaded boundary on its way back; offloaded; minus autocast's copies
START, ACTION, PREVIOUS = range(5, 8)  # of the last segment: its first layer, its action, the label in front of it


@dataclass(frozen=True, slots=True)
class _Step:
    """One segment with one action, from any label in front of it."""

    stop: int
    action: int
    cost: SegmentCost


class Program:
    """All plans of one chain."""

    def __init__(self, chain: Chain, actions: Sequence[Action], fsdp: FSDP | None, host: Host | None) -> None:
        self._chain = chain
        self._actions = actions
        self._fsdp = fsdp
        self._host = host
        self._limit = None if host is None else host.host_bytes
        # A longer segment may need less: at its end other gradients wait, are summed, and other layers are whole.
        self._slack = max(layer.boundary for layer in chain.layers)
        if fsdp is not None:
            self._slack += max(layer.summed for layer in chain.layers)
            self._slack += (1 + fsdp.prefetch) * max(layer.weights for layer in chain.layers)
        waits = sum(self._host_waits(layer.boundary) for layer in chain.layers)
        self._unit = max(1, (2 * chain.flops + waits) // MOST)  # FLOPs of one step in time
        self._steps: dict[tuple[int, int], list[_Step]] = {}

    def fastest(self, budget: int) -> Plan | None:
        """The plan with the least time whose peak is at most the budget; None if there is none."""
        everything: Plan = ((0, len(self._chain.layers)), ("keep",))
        if "keep" in self._actions and self._peak(everything) <= budget:
            return everything  # nothing is computed twice
        return self._best(budget - self._chain.fixed, timed=True)

    def leanest(self) -> tuple[int, Plan]:
        """The lowest peak there is, and the fastest plan at it."""
        # Far fewer segments fit below the peak of a plain plan than below everything.
        plain = min(map(self._peak, self._plain_plans())) - self._chain.fixed
        plan = self._best(plain, timed=False) or self._best(MOST, timed=False)
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

    def _host_waits(self, num_bytes: int) -> int:
        return (self._host or Host()).exposed_flops(num_bytes, 0) if "offload" in self._actions else 0

    def _plain_plans(self) -> Iterator[Plan]:
        """Equal segments that all do the same; some may need more host memory than there is."""
        num_layers = len(self._chain.layers)
        for action in self._actions:
            for size in (1, 2, 4, 8, num_layers):
                bounds = (*range(0, num_layers, size), num_layers)
                yield bounds, (action,) * (len(bounds) - 1)

    def _best(self, budget: int, *, timed: bool) -> Plan | None:
        if self._chain.embedding > budget:
            return None
        num_layers = len(self._chain.layers)
        ending: list[list[np.ndarray]] = [[] for _ in range(num_layers + 1)]
        ending[0] = [np.zeros((1, 8), np.int64)]
        fronts: list[np.ndarray] = []
        for start in range(num_layers):
            labels = _undominated(ending[start], budget)
            fronts.append(labels)
            if len(labels):
                room = budget - int(labels[:, KEPT].min()) - self._chain.after_loss
                for step in self._fitting(start, room):
                    ending[step.stop].append(self._extended(labels, start, step, budget, timed=timed))
        labels = _undominated(ending[-1], budget)
        under_autocast = labels[:, COPIES] + self._chain.under_autocast
        loss = self._chain.held + np.maximum(self._chain.loss, under_autocast)
        labels = labels[labels[:, KEPT] + loss <= budget]
        return self._path(labels[0], fronts) if len(labels) else None

    def _extended(self, labels: np.ndarray, start: int, step: _Step, budget: int, *, timed: bool) -> np.ndarray:
        """The labels behind a segment, from those in front of it that have room for it."""
        cost, kept = step.cost, labels[:, KEPT]
        backward = labels[:, FLIGHT] + cost.backward + self._chain.after_loss
        fits = kept + np.maximum(labels[:, COPIES] + cost.forward, backward) <= budget
        if self._limit is not None:
            fits &= labels[:, HOST] + cost.host_bytes <= self._limit
        (chosen,) = np.nonzero(fits)
        longer = labels[chosen]
        longer[:, TIME] += cost.time_flops // self._unit if timed else 0
        longer[:, KEPT] += cost.kept
        longer[:, COPIES] -= cost.copies
        if self._actions[step.action] != "keep":  # it starts no copy, and lets one that is under way go on
            longer[:, FLIGHT] = cost.in_flight
        longer[:, HOST] += cost.host_bytes if self._limit is not None else 0
        longer[:, START], longer[:, ACTION], longer[:, PREVIOUS] = start, step.action, chosen
        return longer

    def _fitting(self, start: int, room: int) -> Iterator[_Step]:
        """Segments from here that may fit into the room; no longer one can, once all actions need far too much."""
        for stop in range(start + 1, len(self._chain.layers) + 1):
            steps = self._steps_between(start, stop)
            for step in steps:
                if step.cost.backward <= room:
                    yield step
            longer = [step.cost.backward - self._slack for step in steps if self._actions[step.action] != "keep"]
            if not longer or min(longer) > room:
                return

    def _steps_between(self, start: int, stop: int) -> list[_Step]:
        """One step for each action; layers are kept one by one, and a single one is nested only if it must be."""
        if (start, stop) not in self._steps:
            single = stop == start + 1
            self._steps[start, stop] = [
                _Step(stop, index, segment_cost(self._chain, start, stop, action, fsdp=self._fsdp, host=self._host))
                for index, action in enumerate(self._actions)
                if not (action == "keep" and not single)
                and not (action == "nested" and single and "segment" in self._actions)
            ]
        return self._steps[start, stop]

    def _path(self, label: np.ndarray, fronts: list[np.ndarray]) -> Plan:
        """Bounds and actions that led to a label; neighbours that are kept become one segment."""
        bounds, actions = [len(fronts)], list[Action]()
        while bounds[-1] > 0:
            start, action = int(label[START]), self._actions[label[ACTION]]
            if action == "keep" and actions[-1:] == ["keep"]:
                bounds[-1] = start
            else:
                actions.append(action)
                bounds.append(start)
            label = fronts[start][label[PREVIOUS]]
        return tuple(bounds[::-1]), tuple(actions[::-1])


def _undominated(parts: list[np.ndarray], budget: int) -> np.ndarray:
    """The labels that may still win, in order of time and then bytes kept."""
    labels = np.concatenate(parts) if parts else np.zeros((0, 8), np.int64)
    front = _front(labels)
    if len(front) > MAX_LABELS:
        step = max(1, budget // GRID)
        front[:, KEPT] = -(-front[:, KEPT] // step) * step
        front = _front(front)
    return front


def _front(labels: np.ndarray) -> np.ndarray:
    """Without the labels that another one with as much or less in flight and on the host is never worse than."""
    if len(labels) < 2:
        return labels
    labels = labels[np.lexsort(labels[:, COPIES::-1].T)]
    kept, staying = labels[:, KEPT], np.zeros(len(labels), bool)
    if (labels[:, FLIGHT:START] == labels[0, FLIGHT:START]).all():
        return labels[np.concatenate([[True], kept[1:] < np.minimum.accumulate(kept)[:-1]])]
    classes, which = np.unique(labels[:, FLIGHT:START], axis=0, return_inverse=True)
    for index, one in enumerate(classes):
        rivals = (classes <= one).all(axis=1)[which.ravel()]
        least = np.minimum.accumulate(np.where(rivals, kept, np.iinfo(np.int64).max))
        before = np.concatenate([[np.iinfo(np.int64).max], least[:-1]])
        staying |= (which.ravel() == index) & (kept < before)
    return labels[staying]
