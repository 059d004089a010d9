"""KL of each row from the policy's kept logits [n, K]: the step that every path ends in, a block of rows at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nova_kernels.lm_head import chunk_elements, chunks, softcap_slope
from nova_kernels.lm_head.arithmetic import joined
from nova_kernels.topk_kl import reference, triton


class KeptKL(NamedTuple):
    """Of each row; None where it was not asked for, by_lse also where the tail is no bucket."""

    kl: Tensor  # [n]
    log_mass: Tensor | None  # [n], log-sum-exp of the kept logits over the temperature
    by_kept: Tensor | None  # [n, K], by the logits before softcap and temperature
    by_lse: Tensor | None  # [n], by the policy's log-sum-exp


def kept_kl(
    kept: Tensor,
    values: Tensor,
    temperature: float,
    direction: str,
    *,
    softcap: float | None,
    lse: tuple[Tensor, Tensor] | None,
    log_mass: bool,
    gradient: bool,
    in_triton: bool,
) -> KeptKL:
    """KL between the policy's raw logits `kept` [n, K] and the reference's `values` [n, K].

    Slots with a value of -inf count nowhere. `lse`: both log-sum-exps [n] at the temperature, if the tail is a bucket.
    """

    def block(part: slice) -> KeptKL:
        policy, ref = kept[part], values[part].to(kept.dtype)
        if in_triton and lse is None:
            kl, by_kept = triton.kl_terms(policy, ref, temperature, direction, gradient=gradient)
            by_lse, scaled = None, policy.masked_fill(ref == -torch.inf, -torch.inf).div_(temperature)
        else:
            # Whether a slot is unused is cheap to know on the CPU; elsewhere the answer would have to be waited for.
            padded = kept.device.type != "cpu" or bool((ref == -torch.inf).any())
            scaled = policy.masked_fill(ref == -torch.inf, -torch.inf) if padded else policy
            if temperature != 1.0:
                scaled, ref = scaled / temperature, ref / temperature
            tails = (None, None) if lse is None else (lse[0][part], lse[1][part].to(kept.dtype))
            kl, by_kept, by_lse = reference.kl_terms(scaled, ref, direction, *tails, padded=padded, gradient=gradient)
            if by_kept is not None and temperature != 1.0:
                by_kept.div_(temperature)
        if by_kept is not None and softcap is not None:
            by_kept.mul_(softcap_slope(policy, softcap))
        return KeptKL(kl, scaled.logsumexp(dim=-1) if log_mass else None, by_kept, by_lse)

    rows = max(1, chunk_elements(kept.device) // kept.shape[1])
    found = [block(part) for part in (chunks(len(kept), rows) if len(kept) else [slice(0, 0)])]
    return found[0] if len(found) == 1 else KeptKL(*(joined(parts) for parts in zip(*found, strict=True)))
