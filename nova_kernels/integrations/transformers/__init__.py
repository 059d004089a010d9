"""Packed rows in unmodified Hugging Face models.

    with use_varlen_attention(model):
        model(input_ids=batch.input_ids, **batch.attention_kwargs())

    use_varlen_attention   every sequence of the row attends to itself alone, through nova_kernels.attention
    use_ulysses            the same for a row that the ranks of a group hold in parts, through nova_kernels.ulysses
    check_packing          whether the way a model is called lets sequences see each other

The model's own attention keeps packed sequences apart only if no cache and no mask reach it, although use_cache is on
by default, even in training: `check_packing` measures whether the way a model is called leaks.
"""

from nova_kernels.integrations.transformers.attach import VarlenAttentionHandle, use_ulysses, use_varlen_attention
from nova_kernels.integrations.transformers.interface import IMPLEMENTATION
from nova_kernels.integrations.transformers.packing_check import check_packing

__all__ = ["IMPLEMENTATION", "VarlenAttentionHandle", "check_packing", "use_ulysses", "use_varlen_attention"]
