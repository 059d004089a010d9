"""Merging the weights of models that continued from one another.

    merge_state                            saved models -> one saved model, streamed, with checks and provenance
    linear, task_arithmetic, model_stock   the formulas, on lists of tensors

    linear            sum_i w_i theta_i
    task_arithmetic   theta_0 + lam sum_i w_i (theta_i - theta_0)
    model_stock       theta_0 + t mean_i (theta_i - theta_0),   t = N cos / (1 + (N - 1) cos)

Limits and the choices behind them: docs/kernels/merging.md.
"""

from nova_kernels.merging.reference import linear, model_stock, task_arithmetic
from nova_kernels.merging.stream import MergeReport, merge_state

__all__ = ["MergeReport", "linear", "merge_state", "model_stock", "task_arithmetic"]
