"""What a model needs on every GPU under each checkpointing plan, and on how many GPUs it fits, from its shape alone.

    nova-train plan-memory --model llama-3-70b --tokens 32768
    nova-train plan-memory --model path/to/config.json --tokens 16384 --gpus 32 --kernels measured
    nova-train plan-memory --model qwen2-72b --tokens 131072 --sequence_parallel_size 8
    nova-train plan-memory --fleet
    nova-train plan-memory --scale

No weights are loaded and nothing is computed: `kernels: eager` and `fused` count by formula what autograd keeps;
`measured` runs the model on the meta device, which holds no data, and counts. States are sharded over all GPUs (FSDP2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nova_kernels.checkpoint import (
    ACTIONS,
    FSDP,
    Action,
    InfeasibleBudgetError,
    SegmentPlan,
    format_bytes,
    plan_segments,
)
from nova_train.config import ConfigError, unknown_name
from nova_train.fleet import MODEL_SHAPES, Card, Kernels, MemoryNeed, equal_segments, memory_need, sharded
from nova_train.scale import scale_lines
from nova_train.subject import Counting, Subject, by_formula, subject_of
from nova_train.values import parse_bytes

GIB = 2**30
GB = 10**9
FASTEST = "fastest that fits"
WIDTH = 136  # characters of the widest table; they are Markdown and are not folded


class Setting(NamedTuple):
    """One column of the fleet's table."""

    model: str
    tokens: int  # per GPU
    kernels: Kernels
    logit_bytes: float

    def __str__(self) -> str:
        return f"{self.model.split('-')[0]} {self.kernels}{' + logits' if self.logit_bytes else ''}"


FLEET = (
    Setting("llama-3-70b", 16384, "eager", 0),
    Setting("llama-3-70b", 16384, "eager", 8),
    Setting("llama-3-70b", 16384, "fused", 0),
    Setting("qwen2-72b", 16384, "eager", 0),
    Setting("qwen2-72b", 16384, "eager", 8),
    Setting("qwen2-72b", 16384, "fused", 0),
    Setting("llama-3-70b", 32768, "eager", 0),
    Setting("llama-3-70b", 32768, "fused", 0),
    Setting("qwen2-72b", 32768, "eager", 0),
    Setting("qwen2-72b", 32768, "fused", 0),
)
EQUAL_SEGMENTS = (1, 2, 3, 4, 6, 8)
FLEET_SEGMENTS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 20, 40, 80)

# Plans with the lowest peak: the actions they may use, and whether layers are sharded again within a recomputation.
LEANEST: dict[str, tuple[tuple[Action, ...], bool]] = {
    "long segments first": (("segment",), False),
    "nested": (("segment", "nested"), False),
    "nested, sharded again": (("segment", "nested"), True),
    "offloaded boundaries": (("segment", "offload"), False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMemoryConfig:
    """Keys of `nova-train plan-memory`."""

    model: str | None = None  # llama-3-70b, qwen2-72b, a folder or config.json, or a Hugging Face name
    tokens: int = 16384  # packed tokens of a row, which is what one forward pass takes; one document
    sequence_parallel_size: int = 1  # GPUs that share every row
    gpus: int | None = None  # None: for each plan the smallest number on which it fits
    kernels: Counting = "fused"  # what layers save: HF modules, fused kernels, or a count
    logit_bytes: float = 0.0  # per logit at the loss: 0 fused or reward head, 8 fp32 and gradient, 12 one more copy
    # Layers per segment of the equal plans; None: those of 1, 2, 3, 4, 6, 8 that the model has layers for.
    segments: list[int] | None = None
    # Bytes or a text like 60GiB: all that training may occupy on one GPU. None: card_gb without slack_gb.
    memory_budget: int | str | None = None
    allow: list[Action] = field(default_factory=lambda: list(ACTIONS))  # actions of the fastest plan on `gpus`
    card_gb: float = 80.0  # memory of one GPU in 10^9 bytes
    slack_gb: float = 4.0  # of that, for context, workspaces and fragmentation
    bytes_per_parameter: float = 16.0  # bf16 weight and gradient, fp32 master weight and two moments
    fleet: bool = False  # the table of two 70B models at 16K and 32K tokens instead
    scale: bool = False  # the tables of a 7B and a 72B model at 16K to 128K tokens, alone and shared, instead

    def __post_init__(self) -> None:
        if isinstance(self.segments, int):
            object.__setattr__(self, "segments", [self.segments])
        for key in ("tokens", "sequence_parallel_size", "gpus", "card_gb", "bytes_per_parameter"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ConfigError(f"{key} must be positive, got {value}")
        for key in ("logit_bytes", "slack_gb"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} must be at least 0, got {getattr(self, key)}")
        if self.slack_gb >= self.card_gb:
            raise ConfigError(f"slack_gb {self.slack_gb} leaves nothing of card_gb {self.card_gb}")
        room = round((self.card_gb - self.slack_gb) * GB)
        if self.memory_budget is not None and parse_bytes(self.memory_budget, "memory_budget") > room:
            raise ConfigError(
                f"memory_budget {self.memory_budget} is more than the {format_bytes(room)} that card_gb {self.card_gb} "
                f"less slack_gb {self.slack_gb} leaves; give less, or a larger card_gb"
            )
        if bad := [size for size in self.segments or [] if size < 1]:
            raise ConfigError(f"segments: expected at least 1 layer per segment, got {bad[0]}")
        if unknown := [action for action in self.allow if action not in ACTIONS]:
            raise ConfigError(f"allow: {unknown_name('action', unknown[0], list(ACTIONS))}")
        if not self.allow:
            raise ConfigError(f"allow is empty; expected some of {', '.join(ACTIONS)}")
        if self.gpus is not None and self.gpus % self.sequence_parallel_size:
            raise ConfigError(
                f"gpus {self.gpus} is no multiple of sequence_parallel_size {self.sequence_parallel_size}"
            )
        if (self.model is not None) + self.fleet + self.scale != 1:
            given = (
                "they have models of their own: give one of the three" if self.model else "give model, fleet or scale"
            )
            raise ConfigError(f"model={self.model!r}, fleet={self.fleet} and scale={self.scale}: {given}")

    @property
    def card(self) -> Card:
        """The GPU; of a memory_budget nothing is set aside, so the slack comes on top of it."""
        slack, budget = round(self.slack_gb * GB), self.memory_budget
        return Card(
            memory_bytes=round(self.card_gb * GB) if budget is None else parse_bytes(budget, "memory_budget") + slack,
            slack_bytes=slack,
            bytes_per_parameter=self.bytes_per_parameter,
        )

    def subject(self) -> Subject:
        """The model, its layers counted by formula or on the meta device; errors as in `subject_of`."""
        assert self.model is not None, "the config asks for a model or the fleet"
        return subject_of(self.model, self.tokens, self.kernels, self.logit_bytes, sp=self.sequence_parallel_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """One plan and what it needs."""

    name: str
    plan: SegmentPlan
    need: MemoryNeed


def run(config: PlanMemoryConfig, *, console: Console | None = None) -> None:
    """Print the table of one model, of the fleet, or those of docs/scale.md."""
    console = Console(width=max(Console().width, WIDTH)) if console is None else console
    if config.fleet:
        for tokens in sorted({setting.tokens for setting in FLEET}):
            console.print(Text(f"{tokens:,} tokens per GPU: GiB of activations and logits / GPUs needed\n"))
            console.print(fleet_table(config, tokens), Text())
        return
    if config.scale:
        console.print(Text("\n".join(scale_lines(config.card))))
        return
    subject = config.subject()
    rows = list(plan_rows(subject, config))
    console.print(Text("\n".join([*heading(subject, config), ""])))
    console.print(model_table(rows, config), Text())
    console.print(Text(conclusion(rows, config)))


def plan_rows(subject: Subject, config: PlanMemoryConfig) -> Iterator[PlanRow]:
    """Every plan that is shown: all kept, equal segments, the leanest of each kind, the fastest that fits on `gpus`.

    Raises:
        ConfigError: segments of more layers than there are; a memory_budget below the lowest peak there is.
    """
    num_layers = len(subject.chain.layers)
    yield _row("all kept", subject, SegmentPlan.of(subject.chain, [num_layers], "keep"))
    sizes = [size for size in EQUAL_SEGMENTS if size <= num_layers] if config.segments is None else config.segments
    for size in sorted(set(sizes)):
        if size > num_layers:
            raise ConfigError(
                f"segments: {size} layers per segment, but {subject.name} has {num_layers}; give at most {num_layers}"
            )
        name = f"{size} per segment" if size > 1 else "each layer"
        yield _row(name, subject, SegmentPlan.of(subject.chain, equal_segments(num_layers, size)))
    yield from leanest_rows(subject, alone=config.gpus == 1)
    yield from _fastest(subject, config)


def leanest_rows(subject: Subject, *, alone: bool = False) -> Iterator[PlanRow]:
    """The plan with the lowest peak for each choice of actions in LEANEST; one GPU alone has nothing to shard again."""
    for name, (allow, reshard) in LEANEST.items():
        if alone and not reshard:
            yield _row(name, subject, plan_segments(subject.chain, allow=allow))
        elif not alone:
            fsdp = FSDP(reshard=reshard)
            yield _row(name, subject, plan_segments(sharded(subject.chain), allow=allow, fsdp=fsdp), fsdp)


def _fastest(subject: Subject, config: PlanMemoryConfig) -> Iterator[PlanRow]:
    """The plan with the least work that fits on `gpus`; none where no plan fits on such cards."""
    if config.gpus is None:
        return
    bare = MemoryNeed(activations=0, logits=0, gathered=0, parameters=subject.parameters)
    states, slack = bare.states(config.gpus, config.card), config.card.slack_bytes
    left = config.card.memory_bytes - slack - states
    chain, fsdp = (subject.chain, None) if config.gpus == 1 else (sharded(subject.chain), FSDP())
    try:
        plan = plan_segments(chain, budget_bytes=max(left, 1), allow=config.allow, fsdp=fsdp)
    except InfeasibleBudgetError as error:
        if config.memory_budget is None:
            return
        peak = error.nearest.predicted_peak_bytes
        raise ConfigError(
            f"memory_budget {config.memory_budget}: on {_gpus(config.gpus)} states take {format_bytes(states)} of each "
            f"and the leanest plan of {', '.join(config.allow)} {format_bytes(peak)} more at {config.tokens:,} tokens; "
            f"give at least {states + peak} bytes, more GPUs or fewer tokens"
        ) from error
    yield _row(FASTEST, subject, plan)


def _row(name: str, subject: Subject, plan: SegmentPlan, fsdp: FSDP | None = None) -> PlanRow:
    need = memory_need(
        subject.chain, plan.bounds, plan.actions, parameters=subject.parameters, fsdp=fsdp, sp=subject.sp
    )
    return PlanRow(name=name, plan=plan, need=need)


def fits(row: PlanRow, config: PlanMemoryConfig) -> bool:
    """Whether a plan fits on `config.gpus` cards."""
    assert config.gpus is not None, "asked only where a number of GPUs is given"
    return row.need.total(config.gpus, config.card) <= config.card.memory_bytes


def heading(subject: Subject, config: PlanMemoryConfig) -> Iterator[str]:
    """What the table is about, and what it assumes."""
    first = subject.chain.layers[0]
    n = first.saved / first.boundary + first.saves_input
    yield f"{subject.name}: {subject.parameters / 1e9:.2f}B parameters, {len(subject.chain.layers)} layers"
    shared = f"in a row that {subject.sp} GPUs share" if subject.sp > 1 else "per GPU"
    yield f"{config.tokens:,} tokens {shared}; one layer saves n = {n:.2f} times its input ({config.kernels})"
    alone = config.gpus == 1
    if config.memory_budget is None:
        room = (
            f"cards of {config.card_gb:g} GB = {config.card.memory_bytes / GIB:.1f} GiB, {config.slack_gb:g} GB slack"
        )
    else:
        room = f"memory_budget {config.memory_budget} per GPU, and {config.slack_gb:g} GB slack"
    states = f"{config.bytes_per_parameter:g} bytes per parameter" + (", sharded" if not alone else "")
    yield f"{room}; {states}; {config.logit_bytes:g} bytes per logit"
    if alone:
        yield "GiB, calculated, not run; the sum is on one GPU, with the slack"
        return
    yield "GiB per GPU, calculated, not run; states and sum (with the slack) at the number of GPUs " + (
        "that is the least for each plan" if config.gpus is None else f"asked for, {config.gpus}"
    )


def conclusion(rows: list[PlanRow], config: PlanMemoryConfig) -> str:
    """The plan to take: the fastest that fits if it was asked for, else the one on the fewest GPUs."""
    leanest = min(rows, key=lambda row: row.need.total(2, config.card))
    least = leanest.need.minimum_gpus(config.card)
    if config.gpus is None and least is None:
        limit = "card_gb" if config.memory_budget is None else "memory_budget"
        return f"none of these fits on any number of GPUs; give fewer tokens, or a larger {limit}"
    if config.gpus is not None and not any(fits(row, config) for row in rows):
        where = "no number of GPUs" if least is None else _gpus(least)
        return f"none of these fits on {_gpus(config.gpus)}; {leanest.name!r} would on {where}"
    best = rows[-1] if rows[-1].name == FASTEST else leanest
    return f"{best.name}:\n{best.plan.table()}"


def model_table(rows: list[PlanRow], config: PlanMemoryConfig) -> Table:
    """One row per plan; activations, logits, gathered layers, states and the slack of the card add up to the sum.

    One GPU alone gathers nothing, and how many it would take is not what is asked: it has no such columns.
    """
    alone = config.gpus == 1
    columns = ["activations", "logits", *([] if alone else ["gathered"]), "states", "sum", "again"]
    columns += [*([] if alone else ["GPUs"]), *([] if config.gpus is None else ["fits"]), "segments"]
    table = _table("plan", *columns)
    for row in rows:
        need, card = row.need, config.card
        least = need.minimum_gpus(card)
        gpus = config.gpus or least
        # Without a number of GPUs there is nothing to divide the states by.
        states, total = ("-", "-") if gpus is None else (_gib(need.states(gpus, card)), _gib(need.total(gpus, card)))
        cells = {
            "activations": _gib(need.activations),
            "logits": _gib(need.logits),
            "gathered": _gib(0 if gpus == 1 else need.gathered),
            "states": states,
            "sum": total,
            "again": f"{row.plan.predicted_recompute:.0%}",
            "GPUs": _number(least),
            "fits": "yes" if config.gpus is not None and fits(row, config) else "no",
            "segments": segments_text(row.plan),
        }
        table.add_row(row.name, *(cells[column] for column in columns))
    return table


def segments_text(plan: SegmentPlan) -> str:
    """The segments in order, runs of equal ones together: `25 x 2, 30 x 1`; many runs are cut short."""
    words = {"keep": "kept", "segment": "", "nested": "nested", "offload": "offloaded"}
    runs = []
    for (size, action), run_ in groupby(zip(plan.sizes, plan.actions, strict=True)):
        count = len(list(run_))
        text = f"{size * count}" if action == "keep" else f"{count} x {size}"
        runs.append(f"{text} {words[action]}".strip())
    return ", ".join(runs) if len(runs) <= 3 else f"{runs[0]}, ... {runs[-1]}"


def fleet_table(config: PlanMemoryConfig, tokens: int) -> Table:
    """The published settings at one number of tokens: equal segments, then the leanest plan of each kind.

    A rest that is no full segment comes first here: this is the order for which U (ceil(L / k) - 1 + k n + 8) holds.
    """
    settings = [setting for setting in FLEET if setting.tokens == tokens]
    table = _table("plan", *map(str, settings))
    subjects = [by_formula(MODEL_SHAPES[each.model], tokens, each.kernels, each.logit_bytes) for each in settings]
    for size in FLEET_SEGMENTS:
        equal = [SegmentPlan.of(s.chain, equal_segments(len(s.chain.layers), size)[::-1]) for s in subjects]
        rows = [_row("", subject, plan) for subject, plan in zip(subjects, equal, strict=True)]
        table.add_row(f"k = {size}", *(_cell(row, config) for row in rows))
    for leanest in zip(*map(leanest_rows, subjects), strict=True):
        table.add_row(leanest[0].name, *(_cell(row, config) for row in leanest))
    return table


def _cell(row: PlanRow, config: PlanMemoryConfig) -> str:
    used = (row.need.activations + row.need.logits) / GIB
    return f"{used:.{1 if used < 99.95 else 0}f} / {_number(row.need.minimum_gpus(config.card))}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"


def _number(gpus: int | None) -> str:
    return "-" if gpus is None else f"{gpus:,}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="left" if name == "segments" else "right", no_wrap=True)
    return table
