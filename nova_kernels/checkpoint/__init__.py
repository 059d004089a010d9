"""Segmented activation checkpointing: keep the input of every segment of layers, compute the rest again in backward.

    profile_layers        what layers keep, need and compute, measured once, for any number of tokens
    plan_segments         the plan that does the least work twice under a byte budget, or has the lowest peak
    checkpoint_segments   attaches a plan to a stack of layers that stays as it is, and returns a handle
    uniform_segments      equal segments by the rule k = sqrt(L / n)
    layers_of             the stack of layers in a model, as all of these find it
    StorageTracker        bytes that are alive, exactly; what predictions are checked against

With L layers, k per segment, and n = activations of one layer in units of its input, about L / k + k n units are
alive at the worst moment instead of L n, for one more forward pass. Plans do better than equal segments:
docs/kernels/checkpoint.md.
"""

from nova_kernels.checkpoint.cost import ACTIONS, FSDP, Action, Chain, Cost, Host, LayerCost, simulate
from nova_kernels.checkpoint.plan import InfeasibleBudgetError, SegmentPlan, format_bytes, plan_segments
from nova_kernels.checkpoint.profile import Profile, profile_layers
from nova_kernels.checkpoint.segments import CheckpointHandle, checkpoint_segments, uniform_segments
from nova_kernels.checkpoint.stack import layers_of
from nova_kernels.checkpoint.tracker import StorageTracker

__all__ = [
    "ACTIONS",
    "FSDP",
    "Action",
    "Chain",
    "CheckpointHandle",
    "Cost",
    "Host",
    "InfeasibleBudgetError",
    "LayerCost",
    "Profile",
    "SegmentPlan",
    "StorageTracker",
    "checkpoint_segments",
    "format_bytes",
    "layers_of",
    "plan_segments",
    "profile_layers",
    "simulate",
    "uniform_segments",
]
