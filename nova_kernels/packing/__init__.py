"""Packing: many short samples in one row, without padding and without leaks between them.

    plan_packs     lengths -> which samples share a row, with a proof of how good the plan is
    pack_samples   samples -> one row [1, T] with the boundaries that attention and position ids need

The plan is a pure function of (lengths, capacity, options); a sample that does not fit is an error unless the
caller decides otherwise. Equations and limits: docs/kernels/packing.md.
"""

from nova_kernels.packing.batch import IGNORE_INDEX, PackedBatch, pack_samples
from nova_kernels.packing.plan import PackPlan, plan_packs

__all__ = ["IGNORE_INDEX", "PackPlan", "PackedBatch", "pack_samples", "plan_packs"]
