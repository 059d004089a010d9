from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tiny
from nova_train import augment
from nova_train.augment import PASSettings, PromptAugmenter, append_complement, count_words, cut_to_words, pas_prompt
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.datasets import DataError, read_rows
from nova_train.rollout import Completion
from nova_train.stages import pas
from nova_train.stages.augment import AugmentConfig, augmented_lines

REPORT_PROMPT = """\
## Background
You are an expert in enhancing user prompts, proficient in providing detailed supplements.
When identifying areas in user prompts needing further elaboration, you offer precise additions to help the user \
understand the core intent of their question more deeply. Focus on providing general methods and strategies, not \
specific details.
Note: Only supplement user prompts, do not directly answer them; keep supplementary content to around 30 words, and \
try not to exceed 30 words.

## Task
<User prompt>
Why {is} the sea salty?
<Complementary information>"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_model(tmp_path_factory.mktemp("pas"))
    PASSettings(max_words=4, max_completion_length=6).save(folder)
    return folder


def answer_with(monkeypatch: pytest.MonkeyPatch, folder: Path, answers: dict[str, str]) -> list[str]:
    """Replace generation: the answer whose key is in the PAS prompt. Returns the PAS prompts that came."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat, seen = Chat(tokenizer), []

    def generate(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        texts = [chat.decode(ids) for ids in prompts]
        seen.extend(texts)
        found = [next(answer for key, answer in answers.items() if key in text) for text in texts]
        return [
            Completion([*tokenizer(text, add_special_tokens=False)["input_ids"], chat.end_of_turn_id], finished=True)
            for text in found
        ]

    monkeypatch.setattr(augment, "generate", generate)
    return seen


def test_the_prompt_is_the_reports() -> None:
    assert pas_prompt("Why {is} the sea salty?", PASSettings()) == REPORT_PROMPT


def test_search_keywords_enter_as_constraints() -> None:
    text = pas_prompt("Sea?", PASSettings(max_words=20), ["salt", "rivers"])
    assert "around 20 words, and try not to exceed 20 words. Keep the supplementary content within the scope" in text
    assert text.endswith("<User prompt>\nSea?\n<Search keywords>\nsalt, rivers\n<Complementary information>")


def test_a_short_prompt_has_no_background() -> None:
    settings = PASSettings(prompt_style="short")
    assert pas_prompt("Sea?", settings) == "<User prompt>\nSea?\n<Complementary information>"


def test_a_conversation_keeps_its_roles() -> None:
    talk = [
        {"role": "user", "content": "Sea?"},
        {"role": "assistant", "content": "Salty."},
        {"role": "user", "content": "Why?"},
    ]
    settings = PASSettings(prompt_style="short")
    assert "\nuser: Sea?\nassistant: Salty.\nuser: Why?\n" in pas_prompt(talk, settings)
    assert pas_prompt(talk[:1], settings) == pas_prompt("Sea?", settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("one, two - three!", 3), ("请简要说明。", 5), ("用 JSON 回答", 4), ("ひらがな", 4), ("...", 0)],
)
def test_words_are_counted_in_any_script(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "max_words", "cut"),
    [
        ("one two three", 3, "one two three"),
        ("  one two three  ", 2, "one two"),
        ("One two. Three four five", 4, "One two."),
        ("One. Two three four five", 4, "One. Two three four"),
        ("Use 3.5 or more, please", 2, "Use 3.5"),
        ("请说明。再举例子吧", 4, "请说明。"),
        ("请说明再举例子吧", 4, "请说明再"),
        ("", 3, ""),
    ],
)
def test_complements_are_cut_at_a_sentence_or_a_word(text: str, max_words: int, cut: str) -> None:
    assert cut_to_words(text, max_words) == cut


@given(st.text("ab .,!。词\n", max_size=40), st.integers(1, 8))
def test_a_cut_is_a_beginning_within_the_limit(text: str, max_words: int) -> None:
    cut = cut_to_words(text, max_words)
    assert text.strip().startswith(cut)
    assert count_words(cut) <= max_words
    assert count_words(cut) >= min(count_words(text), (max_words + 1) // 2)


def test_an_empty_complement_leaves_the_prompt_alone() -> None:
    talk = [{"role": "user", "content": "Sea?"}]
    assert append_complement("Sea?", "") == "Sea?"
    assert append_complement(talk, "") == talk
    assert append_complement("Sea?", "Be brief.") == "Sea?\nBe brief."
    assert append_complement(talk, "Be brief.") == [{"role": "user", "content": "Sea?\nBe brief."}]
    assert talk == [{"role": "user", "content": "Sea?"}]


def test_augmenting_cuts_and_falls_back(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    seen = answer_with(monkeypatch, model_folder, {"first": "a b c d e f", "second": "", "third": " g "})
    augmenter = PromptAugmenter.load(model_folder)
    talk = [{"role": "user", "content": "third"}]
    assert augmenter.augment(["first", "second"]) == ["first\na b c d", "second"]
    assert augmenter.augment([talk], [["salt"]]) == [[{"role": "user", "content": "third\ng"}]]
    assert [("<Search keywords>\nsalt\n" in text) for text in seen] == [False, False, True]
    assert augmenter.augment([]) == []


def test_complements_do_not_depend_on_the_batch(model_folder: Path) -> None:
    prompts = ["add 12 and 5", "sort", "which day comes after Monday? " * 4]
    alone = PromptAugmenter.load(model_folder, batch_size=1).complement(prompts)
    assert PromptAugmenter.load(model_folder).complement(prompts) == alone
    assert all(count_words(text) <= 4 for text in alone)


def test_keywords_go_with_prompts(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="one keyword list per prompt, got 1 for 2"):
        PromptAugmenter.load(model_folder).complement(["a", "b"], [["x"]])


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a model trained by `nova-train pas`, found no pas.json"):
        PromptAugmenter.load(tmp_path)


def test_only_the_complement_is_trained(tmp_path: Path, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = read_rows([str(tiny.pas_file(tmp_path / "pas.jsonl", 4))], kind="rows")
    for row, talk in zip(rows, pas.conversations(rows, PASSettings(), "error"), strict=True):
        (sample,) = pas.sft_samples([talk], Chat(tokenizer), None)
        trained = tokenizer.decode(sample["input_ids"][sample["labels"] != -100])
        assert trained == f"{row['complement']}<|im_end|>"
        asked = pas_prompt(row["prompt"], PASSettings(), row["keywords"])
        assert asked in tokenizer.decode(sample["input_ids"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"complement": "x"}, "rows.jsonl:1: expected the columns prompt"),
        ({"prompt": "a"}, "rows.jsonl:1: field 'complement': expected text, got None"),
        ({"prompt": "a", "complement": " "}, "rows.jsonl:1: field 'complement': expected text"),
        ({"prompt": "a", "complement": "x", "keywords": "salt"}, "rows.jsonl:1: field 'keywords': expected a list"),
        ({"prompt": "a", "complement": "x", "keywords": [1]}, "rows.jsonl:1: field 'keywords': expected a list"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [row, {"prompt": "a", "complement": "x"}])
    rows = read_rows([str(path)], kind="rows")
    with pytest.raises(DataError, match=message):
        pas.conversations(rows, PASSettings(), "error")
    assert len(pas.conversations(rows, PASSettings(), "skip")) == 1


def test_long_complements_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "complement": "x y z"}] * 2)
    pas.conversations(read_rows([str(path)], kind="rows"), PASSettings(max_words=2), "error")
    assert "2 of 2 complements are longer than max_words (2)" in caplog.text


def config(tmp_path: Path, **values: Any) -> pas.PASConfig:
    base: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": str(tiny.save_model(tmp_path / "model")),
        "dataset_name": [str(tiny.pas_file(tmp_path / "pas.jsonl"))],
        "max_length": 512,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "max_completion_length": 5,
        "max_words": 3,
        "disable_progress": True,
    }
    return pas.PASConfig(**{**base, **values})


def test_a_trained_model_augments(tmp_path: Path) -> None:
    folder = pas.run(config(tmp_path, prompt_style="short"))
    augmenter = PromptAugmenter.load(folder)
    assert augmenter.settings == PASSettings(prompt_style="short", max_words=3, max_completion_length=5)
    (augmented,) = augmenter.augment(["add 12 and 5"])
    assert augmented.startswith("add 12 and 5")
    assert pas.run(config(tmp_path, prompt_style="short")) == folder


@pytest.mark.parametrize("key", ["max_words", "max_completion_length"])
def test_lengths_must_be_positive(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} must be positive, got 0"):
        config(tmp_path, **{key: 0})


def lines(folder: Path, stdin: Sequence[str] = (), **values: Any) -> list[str]:
    return list(augmented_lines(AugmentConfig(model_name_or_path=str(folder), **values), stdin))


def test_the_command_answers_prompts_or_lines(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    seen = answer_with(monkeypatch, model_folder, {"first": "a b", "second": "c"})
    assert lines(model_folder, ["unread"], prompts=["first"], keywords=["salt"]) == ["first\na b"]
    assert "<Search keywords>\nsalt\n" in seen[0]
    assert lines(model_folder, ["first\n", "\n", "second\n"], batch_size=1) == ["first\na b", "second\nc"]


def test_the_command_speaks_json(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    seen = answer_with(monkeypatch, model_folder, {"first": "a", "second": "b"})
    talk = [{"role": "user", "content": "second"}]
    asked = [json.dumps({"prompt": "first", "keywords": ["salt"]}), json.dumps({"prompt": talk})]
    first, second = (json.loads(line) for line in lines(model_folder, asked, json=True))
    assert first == {"prompt": "first", "complement": "a", "augmented": "first\na"}
    assert second["augmented"] == [{"role": "user", "content": "second\nb"}]
    assert ["salt" in text for text in seen] == [True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "standard input, line 2: not valid JSON"),
        ("[1]", r"line 2: expected an object with 'prompt' \(text or messages\), got '\[1\]'"),
        ('{"prompt": []}', "line 2: expected an object with 'prompt'"),
        ('{"prompt": "a", "keywords": "b"}', "line 2: keywords must be a list of texts, got 'b'"),
    ],
)
def test_a_bad_line_is_named(model_folder: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lines(model_folder, ["", line], json=True)
