"""Answers are what the model alone would give: one by one, in any batch, at any temperature."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nova_kernels.checkpoint import checkpoint_segments
from nova_kernels.integrations.transformers import use_varlen_attention
from nova_train.rollout import Completion, draw_tokens, generate, sampling_seed

VOCABULARY = 40
ENDS = [2, 5, 11]
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = [[3, 4, 6], [7], [9, 8, 7, 6, 5, 4, 3, 12, 13], [3, 4, 6], [30, 31], [1, 1, 1, 1, 1, 20]]


def qwen2() -> Any:
    return Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_key_value_heads=1, intermediate_size=24, initializer_range=0.4)
    ).double()


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4)
    ).double()


def mistral() -> Any:
    """A window shorter than prompt and answer together."""
    config = MistralConfig(
        **SMALL, num_key_value_heads=2, intermediate_size=24, sliding_window=5, initializer_range=0.4
    )
    return MistralForCausalLM(config).double()


def answers(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any) -> list[Completion]:
    settings: dict[str, Any] = {
        "seeds": [sampling_seed(0, number) for number in range(len(prompts))],
        "end_ids": ENDS,
        "pad_id": 0,
        "max_new_tokens": 8,
        "temperature": 1.0,
    }
    return generate(model, prompts, **(settings | options))


@pytest.mark.parametrize("build", [qwen2, gpt2, mistral])
def test_greedy_is_generate_one_by_one(build: Any) -> None:
    model = build().eval()
    found = answers(model, temperature=0.0)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=ENDS,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert completion.ids == alone
        assert completion.finished == (alone[-1] in ENDS)
    assert {completion.finished for completion in found} == {True, False}, "the case must hold both kinds"


@pytest.mark.parametrize("build", [qwen2, gpt2, mistral])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_answers_do_not_depend_on_the_batch(build: Any, top_p: float) -> None:
    model = build()
    prompts = PROMPTS * 3
    seeds = [sampling_seed(1, number) for number in range(len(prompts))]
    together = answers(model, prompts, seeds=seeds, top_p=top_p)
    for batch_size in (1, 4, 7):
        assert answers(model, prompts, seeds=seeds, top_p=top_p, batch_size=batch_size) == together
    backwards = answers(model, prompts[::-1], seeds=seeds[::-1], top_p=top_p)
    assert backwards[::-1] == together
    assert len({tuple(c.ids) for c in together}) > len(PROMPTS), "equal prompts with other seeds must differ"


def test_temperature_per_prompt() -> None:
    model = qwen2()
    mixed = answers(model, temperature=[0.0, 1.0, 0.5, 1.0, 0.0, 0.5])
    for temperature, rows in ((0.0, (0, 4)), (1.0, (1, 3)), (0.5, (2, 5))):
        alone = answers(model, temperature=temperature)
        assert [mixed[row] for row in rows] == [alone[row] for row in rows]


def test_answers_end_at_the_first_end() -> None:
    found = answers(qwen2(), PROMPTS * 5)
    for completion in found:
        assert not set(completion.ids[:-1]) & set(ENDS)
        assert completion.finished == (completion.ids[-1] in ENDS)
        assert completion.finished or len(completion.ids) == 8
    assert {completion.finished for completion in found} == {True, False}


def test_a_shorter_limit_gives_the_beginning() -> None:
    model = qwen2()
    long, short = answers(model), answers(model, max_new_tokens=3)
    assert [c.ids for c in short] == [c.ids[:3] for c in long]


def test_answers_follow_the_model() -> None:
    """First tokens of many seeds have the model's own probabilities."""
    model = qwen2()
    count, temperature = 4000, 0.8
    found = answers(
        model,
        [PROMPTS[0]] * count,
        seeds=[sampling_seed(7, number) for number in range(count)],
        max_new_tokens=1,
        temperature=temperature,
        batch_size=count,
    )
    share = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=VOCABULARY) / count
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature, dim=-1)
    assert (((share - p) / (p * (1 - p) / count + 1e-6).sqrt()).abs() < 4.5).all()


def test_draw_inverts_the_distribution() -> None:
    """Uniform numbers on a fine grid hit each token in proportion to its probability, in the order of the ids."""
    logits = torch.tensor([[0.3, -1.0, float("-inf"), 2.0, 0.0]], dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw_tokens(logits.expand(1000, -1), grid, torch.full((1000,), 0.7, dtype=torch.float64))
    expected = torch.softmax(logits[0] / 0.7, dim=-1) * 1000
    assert ((torch.bincount(tokens, minlength=5) - expected).abs() <= 1).all()
    assert (tokens.diff() >= 0).all()


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    """The two ends of [0, 1), in precisions and sizes where rounding could push past the last token."""
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    for size in (3, 40, 1001):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits = torch.randn(2, size).to(dtype)
            logits[:, 0] = logits[:, -1] = float("-inf")
            for top_p in (1.0, 0.5):
                tokens = draw_tokens(logits, ends, torch.ones(2, dtype=torch.float64), top_p)
                assert ((tokens > 0) & (tokens < size - 1)).all()


def test_nucleus_is_the_smallest_set() -> None:
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=torch.float64).log().expand(1000, -1)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ones = torch.ones(1000, dtype=torch.float64)
    for top_p, kept in ((0.4, {0}), (0.6, {0, 2}), (0.8, {0, 2, 3}), (0.95, {0, 1, 2, 3})):
        tokens = draw_tokens(logits, grid, ones, top_p)
        assert set(tokens.tolist()) == kept
    share = (draw_tokens(logits, grid, ones, 0.6) == 0).double().mean()
    assert abs(float(share) - 0.5 / 0.75) < 1e-2


def test_seeds_are_stable_and_distinct() -> None:
    assert sampling_seed(0, "a", 1) == 5860237048174252930
    places = [(0, "a", 1), (0, "a1"), (1, "a", 1), (0, "a", 2), (0, "a", "1"), (0, 1, "a"), (0,)]
    assert len({sampling_seed(*place) for place in places}) == len(places)
    assert all(0 <= sampling_seed(*place) < 2**63 for place in places)


def test_model_is_put_back() -> None:
    model = qwen2().train()
    before = torch.get_rng_state()
    answers(model)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at new token 1"):
        answers(model)
    assert model.training


def test_trained_models_generate_with_their_own_attention() -> None:
    """Varlen attention takes no KV cache and checkpointed segments none either: both step aside."""
    model = qwen2().train()
    expected = answers(model)
    model._varlen_attention = use_varlen_attention(model)
    checkpoint_segments(model, 1)
    assert answers(model) == expected
    assert model.config._attn_implementation != "sdpa", "varlen attention is attached again"


def test_own_attention_is_asked_for() -> None:
    entered = []

    class Handle:
        @contextmanager
        def suspended(self) -> Any:
            entered.append(True)
            yield

    model = qwen2()
    model._varlen_attention = Handle()
    answers(model)
    assert entered == [True]


def test_no_prompts() -> None:
    assert answers(qwen2(), []) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": [1, 2]}, "expected one of seeds per prompt, 6 in all, got 2"),
        ({"temperature": [1.0]}, "expected one of temperatures per prompt, 6 in all, got 1"),
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or positive, got -0.5"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prompts": [[1], []], "seeds": [0, 0]}, "prompt 1 has no tokens"),
    ],
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        answers(qwen2(), **options)


def test_positions_are_counted() -> None:
    with pytest.raises(ValueError, match="prompt 2 has 9 tokens; with 24 new ones that is more than the model's 32"):
        answers(gpt2(), max_new_tokens=24)
    assert len(answers(gpt2(), max_new_tokens=23)) == len(PROMPTS)


def test_recurrent_models_are_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM has no KV cache that can be padded"):
        answers(model)
