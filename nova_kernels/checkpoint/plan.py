"""Which layers keep their activations, and which compute them again.

`plan_segments` finds the fastest plan under a byte budget, or the one with the lowest peak, by the dynamic program of
program.py over the costs of cost.py. While a segment runs backward, what the segments before it keep is alive and what
came after it is gone: so segments come out long first and short last, and kept layers last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from nova_kernels.checkpoint.cost import ACTIONS, FSDP, Action, Chain, Cost, Host, simulate
from nova_kernels.checkpoint.profile import Profile
from nova_kernels.checkpoint.program import Program


class InfeasibleBudgetError(ValueError):
    """No plan stays under the budget; `.nearest` is the one with the lowest peak."""

    def __init__(self, message: str, nearest: SegmentPlan) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """Segments of a stack of layers, what each does, and what that costs."""

    bounds: tuple[int, ...]  # segment j holds the layers bounds[j] .. bounds[j + 1] - 1
    actions: tuple[Action, ...]  # one per segment: keep, segment, nested or offload
    fsdp: FSDP | None = None  # how the layers are sharded
    chain: Chain = field(repr=False)  # the costs it was made for
    cost: Cost = field(repr=False)

    @classmethod
    def of(
        cls,
        profile: Chain | Profile,
        sizes: Sequence[int],
        actions: Action | Sequence[Action] = "segment",
        *,
        tokens: int | None = None,
        fsdp: FSDP | None = None,
        host: Host | None = None,
    ) -> SegmentPlan:
        """A plan that you name: layers per segment, and one action for all or one for each.

        Raises:
            ValueError: sizes that do not sum to the layers, or actions that do not fit them.
        """
        chain = _chain(profile, tokens)
        bounds = tuple(sum(sizes[:index]) for index in range(len(sizes) + 1))
        each: tuple[Action, ...] = (actions,) * len(sizes) if isinstance(actions, str) else tuple(actions)
        cost = simulate(chain, bounds, each, fsdp=fsdp, host=host)
        return cls(bounds=bounds, actions=each, fsdp=fsdp, chain=chain, cost=cost)

    @property
    def sizes(self) -> list[int]:
        """Layers per segment."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    @property
    def num_layers(self) -> int:
        return self.bounds[-1]

    @property
    def predicted_peak_bytes(self) -> int:
        """Most bytes alive at once between forward and backward, without weights and what is as lasting as they are."""
        return self.cost.peak_bytes

    @property
    def predicted_recompute(self) -> float:
        """Work done again, in forward passes through the layers: 1.0 is every layer once more."""
        return self.cost.recompute_flops / self.chain.flops

    @property
    def reshard(self) -> bool:
        """Whether FSDP2 shards layers again within a recomputation."""
        return self.fsdp is not None and self.fsdp.reshard

    @property
    def all_gathers(self) -> tuple[int, int]:
        """How often FSDP2 gathers a layer, in forward and in backward."""
        again = sum(size - 1 for size, action in self._segments() if action != "keep") if self.reshard else 0
        return self.num_layers, self.num_layers + again

    @property
    def unsharded_layers(self) -> int:
        """Most layers that FSDP2 has gathered at once in backward; 0 where nothing is sharded."""
        if self.fsdp is None:
            return 0
        longest = max((size for size, action in self._segments() if action != "keep"), default=1)
        ahead = 1 + self.fsdp.prefetch
        return max(min(1 + ahead, longest), ahead) if self.reshard else max(longest, ahead)

    def _segments(self) -> Iterator[tuple[int, Action]]:
        return zip(self.sizes, self.actions, strict=True)

    def table(self) -> str:
        """The plan as text: a line for each run of equal segments, then the peak and the work done again."""
        rows = [("layers", "segments", "action", "kept", "needed in backward")]
        segments = zip(pairwise(self.bounds), self.actions, self.cost.segments, strict=True)
        for (size, action), run in groupby(segments, key=lambda s: (s[0][1] - s[0][0], s[1])):
            members = list(run)
            first, last = members[0][0][0], members[-1][0][1] - 1
            kept = sum(cost.kept for _, _, cost in members)
            needed = max(cost.backward for _, _, cost in members)
            layers = f"{first}" if first == last else f"{first}-{last}"
            rows.append((layers, f"{len(members)} x {size}", action, format_bytes(kept), format_bytes(needed)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"peak {format_bytes(self.predicted_peak_bytes)}, in the {self.cost.peak_at}")
        lines.append(f"computed again: {self.predicted_recompute:.1%} of one forward pass through the layers")
        if self.fsdp is not None:
            forward, backward = self.all_gathers
            lines.append(f"gathers: {forward} forward, {backward} backward; {self.unsharded_layers} layers at once")
        if self.cost.host_bytes:
            lines.append(f"in host memory: {format_bytes(self.cost.host_bytes)}")
        return "\n".join(lines)


def plan_segments(
    profile: Chain | Profile,
    *,
    tokens: int | None = None,
    budget_bytes: int | None = None,
    allow: Collection[Action] | None = None,
    fsdp: FSDP | None = None,
    host: Host | None = None,
) -> SegmentPlan:
    """The plan that does the least work twice while its peak stays under a budget.

    Args:
        profile: of `profile_layers`, or a Chain of costs.
        tokens: packed tokens of one forward pass; None is the number of the profile's sample.
        budget_bytes: for all that lives between forward and backward: activations, their gradients, head and loss, and
            unsharded layers under FSDP2; not for weights, gradients and optimiser states, which stay. None asks for
            the lowest peak there is, and the least work at it.
        allow: actions that may be used; None is all of them, on a CPU all but "offload", since the host's memory is
            the device's there.
        fsdp: the layers are sharded by FSDP2.
        host: speed and size of the road to host memory.

    Returns:
        The plan; of equally fast ones the one that keeps the fewest bytes.

    Raises:
        InfeasibleBudgetError: the budget lies below the lowest peak; `.nearest` is the plan that has it.
        ValueError: no action or an unknown one allowed, or a budget that is not positive.
    """
    chain = _chain(profile, tokens)
    allowed = _allowed(profile, allow)
    if budget_bytes is not None:
        if not isinstance(budget_bytes, int | float) or not 0 < budget_bytes < math.inf:
            raise ValueError(f"plan_segments: budget_bytes must be positive, got {budget_bytes!r}; None = lowest peak")
        budget_bytes = int(budget_bytes)
    program = Program(chain, allowed, fsdp, host)
    found = None if budget_bytes is None else program.fastest(budget_bytes)
    floor = 0
    if found is None:
        floor, found = program.leanest()
    bounds, actions = found
    plan = SegmentPlan(
        bounds=bounds,
        actions=actions,
        fsdp=fsdp,
        chain=chain,
        cost=simulate(chain, bounds, actions, fsdp=fsdp, host=host),
    )
    if budget_bytes is not None and floor > budget_bytes:
        at = "" if chain.num_tokens is None else f" at {chain.num_tokens:,} tokens"
        raise InfeasibleBudgetError(
            f"plan_segments: budget_bytes={budget_bytes:,} ({format_bytes(budget_bytes)}) is below the lowest peak of "
            f"{plan.num_layers} layers{at} with {', '.join(allowed)}: {floor:,} ({format_bytes(floor)}), in the "
            f"{plan.cost.peak_at}; give that much, fewer tokens, or take the plan in .nearest of this error",
            plan,
        )
    return plan


def format_bytes(num_bytes: int) -> str:
    """Bytes with a unit that leaves one to four digits before the point."""
    power = min((max(num_bytes, 1).bit_length() - 1) // 10, 4)
    return f"{num_bytes / 2 ** (10 * power):,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _chain(profile: Chain | Profile, tokens: int | None) -> Chain:
    if not isinstance(profile, Chain):
        return profile.at(tokens)
    if tokens is not None and tokens != profile.num_tokens:
        raise ValueError(f"a Chain holds for {profile.num_tokens} tokens, not for {tokens}; give the Profile instead")
    return profile


def _allowed(profile: Chain | Profile, allow: Collection[Action] | None) -> list[Action]:
    if allow is None:
        on_cpu = not isinstance(profile, Chain) and profile.device == "cpu"
        return [action for action in ACTIONS if not (on_cpu and action == "offload")]
    if isinstance(allow, str):
        raise TypeError(f"plan_segments: allow must be a collection of actions, got the text {allow!r}")
    allow = set(allow)
    if unknown := sorted(allow - set(ACTIONS)):
        raise ValueError(f"plan_segments: unknown action {unknown[0]!r} in allow; expected some of {list(ACTIONS)}")
    if not allow:
        raise ValueError(f"plan_segments: allow is empty; expected some of {list(ACTIONS)}")
    return [action for action in ACTIONS if action in allow]
