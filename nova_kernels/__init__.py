"""Kernels and memory engines for aligning large language models; plain functions for any trainer.

Adapters to other libraries are under nova_kernels.integrations, which alone imports them.
"""

from nova_kernels.attention import varlen_attention
from nova_kernels.backend import BackendUnavailableError
from nova_kernels.checkpoint import SegmentPlan, checkpoint_segments, plan_segments, profile_layers, uniform_segments
from nova_kernels.logprob import LogprobTerms, linear_cross_entropy, linear_logprobs
from nova_kernels.merging import MergeReport, linear, merge_state, model_stock, task_arithmetic
from nova_kernels.modules import LinearCrossEntropyLoss, LinearTopKKLDivLoss, TopKKLDivLoss
from nova_kernels.packing import (
    PackCollator,
    PackedBatch,
    PackPlan,
    PackSampler,
    StreamingPacker,
    balance_ranks,
    pack_samples,
    plan_packs,
)
from nova_kernels.topk_kl import (
    TopK,
    TopKReferenceCache,
    linear_topk_kl_div,
    linear_topk_select,
    topk_kl_div,
    topk_kl_div_from_logits,
    topk_kl_metrics,
    topk_select,
)

__all__ = [
    "BackendUnavailableError",
    "LinearCrossEntropyLoss",
    "LinearTopKKLDivLoss",
    "LogprobTerms",
    "MergeReport",
    "PackCollator",
    "PackPlan",
    "PackSampler",
    "PackedBatch",
    "SegmentPlan",
    "StreamingPacker",
    "TopK",
    "TopKKLDivLoss",
    "TopKReferenceCache",
    "balance_ranks",
    "checkpoint_segments",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_topk_kl_div",
    "linear_topk_select",
    "merge_state",
    "model_stock",
    "pack_samples",
    "plan_packs",
    "plan_segments",
    "profile_layers",
    "task_arithmetic",
    "topk_kl_div",
    "topk_kl_div_from_logits",
    "topk_kl_metrics",
    "topk_select",
    "uniform_segments",
    "varlen_attention",
]
