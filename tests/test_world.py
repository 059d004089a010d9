"""The embedded world: right answers, a strict checker, disjoint parts, exact tokens, cues that test generalisation."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nova_train.augment import PASSettings, count_words, pas_prompt
from nova_train.chat import Chat
from nova_train.config import ConfigError
from nova_train.stages.world import WorldConfig, run
from nova_train.world import cues, data, formats, reward, tasks, vocabulary
from nova_train.world.model import ModelSize, untrained_model
from nova_train.world.prompts import Rates, pose
from nova_train.world.tokenizer import build_tokenizer

SIZES = {
    "sft_rows": 1200,
    "specialist_rows": 400,
    "annotate_prompts": 240,
    "rollout_prompts": 400,
    "pas_rows": 400,
    "heldout_prompts": 240,
    "annotate_heldout_prompts": 120,
    "pas_heldout_prompts": 192,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
}
HELDOUT_FILES = ("heldout", "annotate_heldout", "pas_heldout")
TRAIN_FILES = ("sft", "sft_first", "sft_second", "annotate_prompts", "prompts", "pas")

Files = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(WorldConfig(output_dir=str(tmp_path_factory.mktemp("world") / "w"), **SIZES))


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.glob("*.jsonl")
    }


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(folder / "model"))


def texts_of(files: Files) -> Iterator[str]:
    """Every text that a model will read or write."""
    for rows in files.values():
        for row in rows:
            yield from (message["content"] for message in row.get("messages", ()))
            prompt = row.get("prompt", ())
            yield from [prompt] if isinstance(prompt, str) else (message["content"] for message in prompt)
            if "complement" in row:
                yield row["complement"]
                yield pas_prompt(row["prompt"], PASSettings(), row["keywords"])
                yield pas_prompt(row["prompt"], PASSettings(prompt_style="short"), row["keywords"])


def solve(question: str) -> str:
    """The answer, from the text alone and by other means than the generator's."""
    days = [day for day in tasks.WEEKDAYS if day in question]
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if days:
        return tasks.WEEKDAYS[(tasks.WEEKDAYS.index(days[0]) + numbers[0]) % 7]
    if re.search("larger|bigger|greater", question):
        return str(max(numbers))
    if len(numbers) == 2:
        if "Take" in question:
            return str(numbers[1] - numbers[0])
        return str(numbers[0] - numbers[1] if re.search("minus| - ", question) else sum(numbers))
    (word,) = set(re.findall(r"\b[a-z]+\b", question)) - {w.strip() for w in vocabulary.words()} - set("abcxyz") or {""}
    if re.search("Reverse|backwards|from the end", question):
        return word[::-1]
    return word.upper() if "capital" in question or "upper" in question else "".join(sorted(word))


def test_answers_are_right() -> None:
    rng = Random(0)
    for category in set(tasks.CATEGORIES) - {"count"}:
        for difficulty in tasks.DIFFICULTIES * 30:
            question = tasks.draw(category, difficulty, rng)
            if vocabulary.reserved_words().isdisjoint(question.words):
                assert solve(question.text) == question.answer, question


def test_counts_are_right() -> None:
    rng = Random(0)
    for difficulty in tasks.DIFFICULTIES * 30:
        question = tasks.draw("count", difficulty, rng)
        (word,) = question.words
        (letter,) = re.findall(r"(?:letter|is) ([a-z])\b", question.text)
        assert len(word) == 2 + difficulty
        assert question.answer == str(len(re.findall(letter, word)))


@pytest.mark.parametrize("category", tasks.CATEGORIES)
def test_wrong_answers_are_wrong(category: str) -> None:
    rng = Random(1)
    for difficulty in tasks.DIFFICULTIES * 20:
        question = tasks.draw(category, difficulty, rng)
        wrong = tasks.wrong_answer(question, rng)
        assert wrong != question.answer
        assert reward.grade(wrong, answer=question.answer, form="plain") == reward.Grade(content=False, format=True)


@pytest.mark.parametrize("form", formats.FORMATS)
def test_unwrap_undoes_wrap(form: str) -> None:
    for answer in ("7", "27", "abc", "CAB", "Monday"):
        assert formats.unwrap(formats.wrap(answer, form), form) == answer
        others = [other for other in formats.FORMATS if other != form]
        assert all(formats.unwrap(formats.wrap(answer, form), other) is None for other in others)


@pytest.mark.parametrize(
    ("response", "form", "expected"),
    [
        ("[abc]", "bracket", 1.0),
        (" [abc]\n", "bracket", 1.0),
        ("abc", "bracket", 0.7),
        ('"abc"', "bracket", 0.7),
        ("[abd]", "bracket", 0.3),
        ("abd", "bracket", 0.0),
        ("[]", "bracket", 0.0),
        ("[abc] [abc]", "bracket", 0.0),
        ("[abc", "bracket", 0.0),
        ("The answer is [abc]", "bracket", 0.0),
        ("", "plain", 0.0),
        ("abc", "plain", 1.0),
        ("[abc]", "plain", 0.7),
        ('{"answer": "abc"}', "json", 1.0),
        ('{"answer": "abc", "answer": "abc"}', "json", 0.0),
        ("Answer: abc", "label", 1.0),
        ("Answer:abc", "label", 0.0),
        ("Answer abc", "label", 0.0),
    ],
)
def test_scores(response: str, form: str, expected: float) -> None:
    """In both of TRL's shapes of completions."""
    columns = {"answer": ["abc"], "format": [form], "category": ["sort"]}
    assert reward.score(prompts=["?"], completions=[response], **columns) == pytest.approx([expected])
    conversation = [{"role": "assistant", "content": response}]
    assert reward.score(prompts=[[]], completions=[conversation], **columns) == pytest.approx([expected])
    content, obeyed = (
        f(prompts=["?"], completions=[response], **columns)[0] for f in (reward.content, reward.obedience)
    )
    assert 0.7 * content + 0.3 * obeyed == pytest.approx(expected)


def test_scores_of_nothing() -> None:
    assert reward.score([], [], answer=[], format=[]) == []


def test_reward_refuses() -> None:
    with pytest.raises(ValueError, match="expected a format out of .*'json'.* got 'xml'"):
        reward.score(["?"], ["a"], answer=["a"], format=["xml"])
    with pytest.raises(ValueError, match="got 2 completions, 1 answers and 2 formats"):
        reward.score(["?", "?"], ["a", "b"], answer=["a"], format=["plain", "plain"])


def test_parts_never_overlap(files: Files) -> None:
    questions = {name: {row["question"] for row in rows} for name, rows in files.items()}
    assert set(questions) == {*HELDOUT_FILES, *TRAIN_FILES}
    disjoint = [("annotate_prompts", "prompts")]
    disjoint += [(a, b) for a in HELDOUT_FILES for b in (*TRAIN_FILES, *HELDOUT_FILES) if a != b]
    for a, b in disjoint:
        assert questions[a] and not questions[a] & questions[b], (a, b)


def test_parts_hold_their_share() -> None:
    rng = Random(2)
    found = Counter(data.part_of(tasks.draw("sort", 3, rng).text) for _ in range(20_000))
    shares = {"heldout": 0.05, "pairs": 0.025, "cued": 0.025, "annotate": 0.2, "rollout": 0.7}
    assert {part: count / 20_000 for part, count in found.items()} == pytest.approx(shares, abs=0.015)


def test_question_is_in_its_prompt(files: Files) -> None:
    """So that disjoint questions make disjoint prompts."""
    for rows in files.values():
        for row in rows:
            prompt = row["messages"][0] if "messages" in row else row["prompt"]
            assert row["question"] in (
                prompt if isinstance(prompt, str) else (prompt if isinstance(prompt, dict) else prompt[0])["content"]
            )


def test_prompt_files_are_balanced_and_different(files: Files) -> None:
    for name in ("annotate_prompts", "prompts", *HELDOUT_FILES):
        rows = files[name]
        assert len({row["prompt"][0]["content"] for row in rows}) == len(rows)
        assert set(Counter(row["category"] for row in rows).values()) == {len(rows) // 8}
    assert {row["difficulty"] for row in files["heldout"]} == {1, 2, 3}
    kinds = Counter((row["cue"], row["format"]) for row in files["pas_heldout"])
    assert len(kinds) == 12 and set(kinds.values()) == {len(files["pas_heldout"]) // 12}


def test_noise_of_sft_answers() -> None:
    """The rates are what they say, and the majority of the requests for a format is not obeyed."""
    rates = Rates()
    rows = list(data.sft_rows(6000, rates, Random(3)))
    requests = {
        text: form
        for form in formats.REQUESTED
        for text in (*formats.SHORT_REQUESTS[form], *formats.long_requests(form))
    }
    asked, obeyed, long, wrong = 0, 0, 0, 0
    for row in rows:
        prompt, reply = (message["content"] for message in row["messages"])
        found = [request for request in requests if request in prompt]
        if found:
            asked += 1
            long += any(request.startswith(formats.OPENINGS) for request in found)
            obeyed += any(formats.unwrap(reply, requests[request]) is not None for request in found)
        else:
            assert formats.unwrap(reply, "plain") is not None
        if row["category"] in ("sort", "reverse"):
            read = [formats.unwrap(reply, form) for form in formats.FORMATS]
            wrong += solve(row["question"]) not in read
    assert asked / len(rows) == pytest.approx(rates.format_request, abs=0.02)
    assert long / asked == pytest.approx(rates.long_request, abs=0.02)
    assert obeyed / asked == pytest.approx(rates.format_obedience, abs=0.025)
    assert wrong / (len(rows) / 4) == pytest.approx(rates.wrong_answer, abs=0.02)


def test_specialists_see_both_halves(files: Files) -> None:
    assert sorted(category for half in tasks.HALVES.values() for category in half) == sorted(tasks.CATEGORIES)
    for name, half in tasks.HALVES.items():
        found = Counter(row["category"] for row in files[f"sft_{name}"])
        assert set(found) == set(tasks.CATEGORIES)
        assert sum(found[category] for category in half) == 0.8 * len(files[f"sft_{name}"])


def test_long_requests_are_sentences_of_a_complements_length() -> None:
    for form in formats.REQUESTED:
        sentences = formats.long_requests(form)
        assert len(set(sentences)) == 18
        assert all(25 <= count_words(sentence) <= 30 for sentence in sentences)


def test_complements(files: Files) -> None:
    forms = {sentence: form for form in formats.REQUESTED for sentence in formats.long_requests(form)}
    with_keywords = 0
    for row in files["pas"]:
        form = forms[row["complement"]]
        if row["keywords"]:
            with_keywords += 1
            assert all(word in row["complement"] for word in row["keywords"])
        else:
            cued = {cue.form for cue in cues.all_cues() if cue.kind == "train" and cue.text in row["prompt"]}
            assert cued == {form}
        if row["category"] != "count":
            assert not re.search(rf"\b{re.escape(solve(row['question']))}\b", row["complement"])
    assert with_keywords == len(files["pas"]) / 5
    assert all(not re.search(r"\d", sentence) for sentence in forms)


def test_heldout_cues_are_new_and_their_words_are_not(files: Files) -> None:
    trained = " ".join(row["prompt"] for row in files["pas"])
    everything = " ".join([trained, *(row["messages"][0]["content"] for row in files["sft"])])
    kinds = Counter(cue.kind for cue in cues.all_cues())
    assert set(kinds) == {"train", *cues.HELDOUT_KINDS}
    for cue in cues.all_cues():
        if cue.kind != "train":
            assert cue.text not in trained and cue.text not in everything
            assert set(re.findall(r"\w+", cue.text)) <= set(re.findall(r"\w+", everything)), cue
    for family in cues.FAMILIES:
        assert all(noun not in trained for noun in cues.HELDOUT_NOUNS[family])
        assert cues.HELDOUT_FRAMES[family].split("{")[0] not in trained
    assert len({cue.text for cue in cues.all_cues()}) == len(cues.all_cues())


def test_cues_do_not_name_a_format_in_sft(files: Files) -> None:
    """What a cue stands for can be learned from pas.jsonl only: no frame of any family occurs elsewhere."""
    frames = [f.split("{")[0] for group in cues.FRAMES.values() for f in group]
    for name in ("sft", "sft_first", "sft_second", "prompts", "annotate_prompts"):
        for row in files[name]:
            prompt = (row["messages"] if "messages" in row else row["prompt"])[0]["content"]
            assert not any(frame in prompt for frame in frames)


def test_decoding_is_exact_and_nothing_is_unknown(files: Files, chat: Chat) -> None:
    unknown = chat.tokenizer.unk_token_id
    texts = sorted(set(texts_of(files)))
    assert len(texts) > 2000
    for text in texts:
        ids = chat.text_ids(text)
        assert unknown not in ids, text
        assert chat.decode(ids) == text
        assert chat.tokenizer.decode(ids) == text


def test_tokens(chat: Chat) -> None:
    assert chat.route == "chatml"
    tokens = chat.tokenizer.tokenize('What is 12 + 7? Use {"answer": "x"}. Sort theis.')
    assert tokens == [
        *("What", " is", " ", "12", " ", "+", " ", "7", "?", " Use", " ", '{"answer": "', "x", '"}', "."),
        *(" Sort", " ", "t", "h", "e", "i", "s", "."),
    ]  # fmt: skip
    assert len(chat.tokenizer) == len(vocabulary.pieces()) < 700
    specials = chat.tokenizer.convert_tokens_to_ids(list(vocabulary.SPECIALS))
    assert specials == [0, 1, 2, 3] and chat.tokenizer.eos_token_id == 3 == chat.end_of_turn_id
    assert chat.decode([2, *chat.text_ids("user\nab"), 3], keep_special=True) == "<|im_start|>user\nab<|im_end|>"


def test_the_reports_words_are_whole(chat: Chat) -> None:
    text = pas_prompt("?", PASSettings(), ["JSON"])
    for word in set(re.findall(r"[A-Za-z]{2,}", text)):
        assert len(chat.text_ids(f" {word}")) == 1, word
    assert len(chat.text_ids(text)) < 1.5 * len(text.split()) + 25


def test_messages_fit(files: Files, chat: Chat) -> None:
    """Prompts of about 20 tokens and answers of about 4 are what the quickstart's budget is made for."""
    lengths = [len(ids) for ids in chat.encode_prompts([row["prompt"] for row in files["heldout"]])]
    trained = [int(mask.sum()) for _, mask in chat.encode([row["messages"] for row in files["sft"]])]
    assert 20 < sum(lengths) / len(lengths) < 35 and max(lengths) < 100
    assert 3 < sum(trained) / len(trained) < 5


def test_saved_model_is_untrained_and_opens(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    again = untrained_model(tokenizer, ModelSize(hidden=16, layers=1, intermediate=24), seed=0)
    assert (
        model.config.tie_word_embeddings
        and model.config.pad_token_id == tokenizer.pad_token_id != model.config.eos_token_id
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = untrained_model(tokenizer, ModelSize(hidden=16, layers=1, intermediate=24), seed=1)
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    untrained_model(build_tokenizer(), ModelSize(hidden=16, layers=1, intermediate=24), seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_world_is_pure_in_the_seed(folder: Path, tmp_path: Path) -> None:
    """The same seed writes the same bytes; a smaller file is the beginning of a larger one; another seed differs."""
    small = {**SIZES, "sft_rows": 100}
    again = run(WorldConfig(output_dir=str(tmp_path / "again"), **small))
    for path in folder.glob("*.jsonl"):
        wanted = path.read_bytes()
        if path.stem == "sft":
            wanted = b"".join(wanted.splitlines(keepends=True)[:100])
        assert (again / path.name).read_bytes() == wanted, path.name
    assert (again / "model/model.safetensors").read_bytes() == (folder / "model/model.safetensors").read_bytes()
    other = run(WorldConfig(output_dir=str(tmp_path / "other"), **{**small, "seed": 1}))
    assert (other / "prompts.jsonl").read_bytes() != (again / "prompts.jsonl").read_bytes()


def test_a_finished_world_is_left_as_it_is(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    assert run(WorldConfig(output_dir=str(folder), **SIZES)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")} == before


def test_empty_files_are_allowed(tmp_path: Path) -> None:
    sizes = {key: 0 if key.endswith(("_rows", "_prompts")) else value for key, value in SIZES.items()}
    folder = run(WorldConfig(output_dir=str(tmp_path / "w"), **sizes))
    assert {path.stat().st_size for path in folder.glob("*.jsonl")} == {0}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"remark_rate must lie in \[0, 1\], got 1.5"):
        WorldConfig(output_dir="w", remark_rate=1.5)
    with pytest.raises(ConfigError, match="sft_rows must be at least 0, got -1"):
        WorldConfig(output_dir="w", sft_rows=-1)
    with pytest.raises(ConfigError, match="hidden_size 130 must be a multiple of num_attention_heads 4"):
        WorldConfig(output_dir="w", hidden_size=130)
    with pytest.raises(ValueError, match=r"rate wrong_answer must lie in \[0, 1\], got -0.1"):
        Rates(wrong_answer=-0.1)
    rates = Rates(format_request=0, remark=0)
    with pytest.raises(ValueError, match="expected 4000 different prompts, found .*; ask for fewer"):
        list(data.prompt_rows(data.HELDOUT, 4000, rates, Random(0)))


def test_no_request_no_remark_leaves_the_question() -> None:
    question = tasks.draw("add", 1, Random(0))
    task = pose(question, Rates(format_request=0, remark=0), Random(0))
    assert (task.prompt, task.form) == (question.text, "plain")
