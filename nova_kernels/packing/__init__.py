"""Packing: many short samples in one row, without padding and without leaks between them.

    plan_packs       lengths -> which samples share a row, with a proof of how good the plan is
    StreamingPacker  the same for samples that arrive one by one; PackStream carries the samples along
    balance_ranks    a plan -> packs of equal work for every data-parallel rank
    PackSampler      both, as a DataLoader's batch_sampler with an exact length and a position to resume from
    pack_samples     samples -> one row [1, T] with the boundaries that attention and position ids need
    PackCollator     the same, as a collate_fn with the keys of Hugging Face models

Plans are pure functions of (lengths, capacity, options, seed, epoch): every rank computes the same one. A sample that
does not fit is an error unless the caller decides otherwise; nothing is lost silently. Backends: C++ ("native") and
plain Python ("reference"), with the same results. Equations, measurements, examples: docs/kernels/packing.md.
"""

from nova_kernels.packing.balance import RankPlan, balance_ranks
from nova_kernels.packing.batch import IGNORE_INDEX, PackedBatch, pack_samples
from nova_kernels.packing.collator import PackCollator
from nova_kernels.packing.columns import Ragged
from nova_kernels.packing.plan import PackPlan, plan_packs
from nova_kernels.packing.sampler import PackSampler
from nova_kernels.packing.stream import PackStream, StreamingPacker

__all__ = [
    "IGNORE_INDEX",
    "PackCollator",
    "PackPlan",
    "PackSampler",
    "PackStream",
    "PackedBatch",
    "Ragged",
    "RankPlan",
    "StreamingPacker",
    "balance_ranks",
    "pack_samples",
    "plan_packs",
]
