"""How log-probabilities and cross-entropy are computed from hidden states elsewhere, each way behind one function.

    means     hidden [N, H], weight [V, H], layer -> [mean cross-entropy of the targets]
    tokens    the same -> [log-probabilities [N]]; ours and plain PyTorch compute the entropy besides, the others do not
    with_kl   the same -> [log-probabilities [N], KL [N] over the reference's top K]

Plain PyTorch holds [N, V], in float32 throughout or with the product in the model's dtype, as Hugging Face models give
their logits. `checkpointed` is what one writes by hand: chunks of rows, each under torch.utils.checkpoint. The
cross-entropy of Liger-Kernel runs on CUDA only; its chunked losses are plain PyTorch and run anywhere. Its GRPO loss
has a k3 estimate where ours has the KL; with the policy's own log-probabilities for the reference's that adds work and
no gradient, so that gradients can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.lm_inputs import Layer
from benchmarks.topk_kl_peers import gathered
from benchmarks.ways import Way
from nova_kernels import BackendUnavailableError

CHUNKS = 8
SEQUENCES = 8

Results = list[Tensor]
Logits = Callable[[Tensor, Tensor], Tensor]


def float32(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().t()


def native(hidden: Tensor, weight: Tensor) -> Tensor:
    """Rounded to the model's dtype, then float32."""
    return (hidden @ weight.t()).float()


def mean(logits: Logits, hidden: Tensor, weight: Tensor, given: Layer) -> Results:
    return [F.cross_entropy(logits(hidden, weight), given.targets)]


def token_terms(logits: Logits, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy [n]."""
    logps = logits(hidden, weight).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(dim=-1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


def tokens(logits: Logits, hidden: Tensor, weight: Tensor, given: Layer) -> Results:
    return [token_terms(logits, hidden, weight, given.targets)[0]]


def with_kl(logits: Logits, hidden: Tensor, weight: Tensor, given: Layer) -> Results:
    z = logits(hidden, weight)
    return [token_terms(lambda *_: z, hidden, weight, given.targets)[0], gathered(z, given.ref)]


def checkpointed(run: Callable[..., Results], logits: Logits, hidden: Tensor, weight: Tensor, given: Layer) -> Results:
    """Chunks of rows, each computed again in the backward."""
    step = max(1, -(-len(hidden) // CHUNKS))
    parts = [slice(start, start + step) for start in range(0, len(hidden), step)]
    chunks = [
        checkpoint(run, logits, hidden[part], weight, rows_of(given, part), use_reentrant=False) for part in parts
    ]
    if run is mean:
        sizes = [len(hidden[part]) / len(hidden) for part in parts]
        return [torch.stack([loss * size for (loss,), size in zip(chunks, sizes, strict=True)]).sum()]
    return [torch.cat(column) for column in zip(*chunks, strict=True)]


def rows_of(given: Layer, part: slice) -> Layer:
    return Layer(given.hidden, given.weight, given.targets[part], given.upstream[part], given.ref[part], 0.0)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, given: Layer, **options: Any) -> Results:
    if options["impl"] == "cce" and not hidden.is_cuda:
        raise BackendUnavailableError("its Triton kernels run on CUDA")
    from cut_cross_entropy import linear_cross_entropy

    return [linear_cross_entropy(hidden, weight, given.targets, **options)]


def cut_tokens(hidden: Tensor, weight: Tensor, given: Layer, **options: Any) -> Results:
    """Log-probabilities as negative losses, not reduced."""
    return [-cut_cross_entropy(hidden, weight, given, reduction="none", **options)[0]]


def liger_cross_entropy(hidden: Tensor, weight: Tensor, given: Layer, **options: Any) -> Results:
    if not hidden.is_cuda:
        raise BackendUnavailableError("its Triton kernels run on CUDA")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return [liger_fused_linear_cross_entropy(hidden, weight, given.targets, **options)]


def liger_tokens(hidden: Tensor, weight: Tensor, given: Layer) -> Results:
    """The log-probabilities below its GRPO and PPO losses."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return [LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, given.targets[None])[0]]


def liger_grpo(hidden: Tensor, weight: Tensor, given: Layer, logprobs: Tensor) -> Results:
    """Advantages of -N times the upstream: the gradient is then that of sum_n upstream_n logprobs_n."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = (SEQUENCES, len(hidden) // SEQUENCES)
    targets, upstream, own = (x.reshape(shape) for x in (given.targets, given.upstream, logprobs))
    loss = LigerFusedLinearGRPOLoss(beta=0.04, compiled=False, use_ref_model=True, loss_type="dapo")
    found = loss(
        hidden.reshape(*shape, -1),
        weight,
        targets,
        torch.ones_like(upstream),
        -upstream[:, 0] * len(hidden),
        ref_per_token_logps=own,
    )
    return [found[0]]


def plain(run: Callable[..., Results], name: str = "PyTorch") -> tuple[Way, ...]:
    """The ways of PyTorch alone."""
    rounded = partial(run, native)
    return (
        Way(f"{name}, float32 logits", partial(run, float32), tolerance=1e-3),
        Way(f"{name}, 16-bit logits", rounded, tolerance=0.5, sixteen_bit=True),
        Way(f"{name}, compiled", rounded, main_only=True, tolerance=0.5, compiled=True),
        Way(f"{name}, checkpointed chunks", partial(checkpointed, run, native), tolerance=0.5, main_only=True),
    )


LIGER, CCE = "liger-kernel", "cut-cross-entropy"
MEANS = (
    *plain(mean),
    Way("Liger-Kernel", liger_cross_entropy, LIGER, tolerance=0.2),
    Way(
        "Liger-Kernel, dW in float32",
        partial(liger_cross_entropy, accum_dtype=torch.float32),
        LIGER,
        tolerance=0.2,
        main_only=True,
    ),
    Way("cut-cross-entropy", partial(cut_cross_entropy, impl="cce"), CCE, tolerance=0.5),
    Way(
        "cut-cross-entropy, unfiltered",
        partial(cut_cross_entropy, impl="cce", filter_eps=None),
        CCE,
        tolerance=0.5,
        main_only=True,
    ),
    Way(
        "cut-cross-entropy, torch_compile",
        partial(cut_cross_entropy, impl="torch_compile"),
        CCE,
        tolerance=0.5,
        main_only=True,
    ),
)
TOKENS = (
    *plain(tokens),
    Way("cut-cross-entropy, not reduced", partial(cut_tokens, impl="cce"), CCE, tolerance=0.5),
    Way("cut-cross-entropy, torch_compile, not reduced", partial(cut_tokens, impl="torch_compile"), CCE, tolerance=0.5),
    Way("Liger-Kernel, chunked log-probabilities", liger_tokens, LIGER, tolerance=0.2),
)
GRPO = Way("Liger-Kernel, GRPO loss with k3", liger_grpo, LIGER, tolerance=0.2, main_only=True)
WITH_KL = plain(with_kl)
