"""Segmented activation checkpointing: keep the input of every segment of layers, compute the rest again in backward.

    checkpoint_segments   attaches segments to a stack of layers that stays as it is, and returns a handle
    uniform_segments      equal segments by the rule k = sqrt(L / n)

With L layers, k per segment, and n = activations of one layer in units of its input, about L / k + k n units are
alive at the worst moment instead of L n, for one more forward pass. Limits: docs/kernels/checkpoint.md.
"""

from nova_kernels.checkpoint.segments import CheckpointHandle, checkpoint_segments, uniform_segments

__all__ = ["CheckpointHandle", "checkpoint_segments", "uniform_segments"]
