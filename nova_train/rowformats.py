"""Rows as they are found -> rows as they are trained on: TRL's types, each of text or of messages.

    sft         messages | prompt + completion
    preference  prompt + chosen + rejected | chosen + rejected (the prompt is what both begin with);
                chosen_score, rejected_score optional (aliases score_chosen, score_rejected); null = not scored
    prompt      prompt, and any further columns for reward functions

Read as these types on import:

    ShareGPT    conversations: [{from, value}, ..], system optional; for preferences with chosen and rejected turns
    alpaca      instruction, input, output, and optional system and history -> messages, or a prompt
    two outputs input or instruction, output_1, output_2, label (1 or 2: the better one) -> a preference
    transcripts chosen and rejected as text "\\n\\nHuman: .. \\n\\nAssistant: .." -> a preference of messages

Any other columns go through `dataset_columns` (`rename_columns`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeGuard

from nova_train.datafiles import DataError, Row, shown

Kind = Literal["sft", "preference", "prompt", "rows"]

EXPECTED = {
    "sft": "messages, or prompt and completion",
    "preference": "chosen and rejected, with or without prompt",
    "prompt": "prompt",
}
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_HEADING = re.compile(r"\n\n(Human|Assistant):")
_SLOT = re.compile(r"\{([^{}]+)\}")


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Apply `dataset_columns`: {our name: their column, or a text with {column} in braces}.

    `user` and `system` make a conversation of one turn: {user: question, completion: answer} gives prompt =
    [user: question] and completion = [assistant: answer]. What is named here goes before columns that the row has
    besides. A row that lacks one of the columns is left as it is.
    """
    needed = [name for text in columns.values() for name in (_SLOT.findall(text) or [text])]
    if any(name not in row for name in needed):
        return row
    slots = dict.fromkeys(slot for text in columns.values() for slot in _SLOT.findall(text))
    if empty := [slot for slot in slots if row[slot] is None]:
        raise DataError(f"{row.place}: field {empty[0]!r}: expected a value for dataset_columns, got null")
    values: dict[str, Any] = {
        ours: _SLOT.sub(lambda slot: str(row[slot[1]]), text) if _SLOT.search(text) else row[text]
        for ours, text in columns.items()
    }
    if "user" in values:
        turns = [{"role": role, "content": values.pop(role)} for role in ("system", "user") if role in values]
        values["prompt"] = turns
        for key in ("completion", "chosen", "rejected"):
            if key in values:
                values[key] = _reply(values[key])
    for key in ("source", "category"):
        if key in values:
            values[key] = str(values[key])
    hidden = {"messages", "conversations"} if "prompt" in values else set()
    return row.with_columns({**{key: value for key, value in row.items() if key not in hidden}, **values})


def canonical_row(row: Row, kind: Kind) -> Row:
    """The row as `kind` wants it; further columns are kept.

    Raises:
        DataError: a column that is missing or of the wrong type, by place and field.
    """
    if kind == "rows":
        return row
    convert = {"sft": _sft, "preference": _preference, "prompt": _prompt}[kind]
    return row.with_columns({**row, **convert(row)})


def _sft(row: Row) -> dict[str, Any]:
    if row.get("messages") is not None:
        messages = _messages(row, "messages")
    elif "prompt" in row and "completion" in row:
        prompt, completion = _text_or_messages(row, "prompt"), _text_or_messages(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            _wrong(row, "completion", f"of the same form as prompt ({_form(prompt)})", row["completion"])
        if isinstance(completion, str):
            return {"prompt": prompt, "completion": completion}
        _need_answer(row, "completion", completion)
        return {"prompt": prompt, "completion": completion}
    elif row.get("conversations") is not None:
        messages = _sharegpt(row)
    elif "instruction" in row and "output" in row:
        messages = [*_alpaca(row), {"role": "assistant", "content": _text(row, "output")}]
    else:
        _missing(row, "sft")
    _need_answer(row, "messages", messages)
    return {"messages": messages}


def _prompt(row: Row) -> dict[str, Any]:
    if row.get("prompt") is not None:
        prompt = _text_or_messages(row, "prompt")
    elif "instruction" in row:
        prompt = _alpaca(row)
    else:
        _missing(row, "prompt")
    if not prompt:
        _wrong(row, "prompt", "a prompt", prompt)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{row.place}: field 'prompt' ends with an assistant turn; a prompt ends with the user's (or a tool's)"
        )
    return {"prompt": prompt}


def _preference(row: Row) -> dict[str, Any]:
    if "chosen" in row and "rejected" in row:
        columns = _chosen_rejected(row)
    elif "output_1" in row and "output_2" in row:
        columns = _two_outputs(row)
    else:
        _missing(row, "preference")
    for name in ("chosen", "rejected"):
        score = row[f"{name}_score"] if row.get(f"{name}_score") is not None else row.get(f"score_{name}")
        columns[f"{name}_score"] = _score(row, f"{name}_score", score)
    return columns


def _chosen_rejected(row: Row) -> dict[str, Any]:
    chosen, rejected = _text_or_messages(row, "chosen"), _text_or_messages(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        _wrong(row, "rejected", f"of the same form as chosen ({_form(chosen)})", row["rejected"])
    prompt: Any = None
    if row.get("prompt") is not None:
        prompt = _text_or_messages(row, "prompt")
    elif row.get("conversations") is not None:
        prompt = _sharegpt(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None and _HEADING.match(chosen) and _HEADING.match(rejected):
            chosen, rejected = _transcript(chosen), _transcript(rejected)
        elif prompt is not None and not isinstance(prompt, str):
            chosen, rejected = _reply(chosen), _reply(rejected)
    elif isinstance(prompt, str) and not isinstance(chosen, str):
        # Some sets repeat the prompt beside whole conversations.
        prompt = [{"role": "user", "content": prompt}] if chosen[0]["role"] == "assistant" else None
    elif prompt is not None and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        prompt = None
    answers: dict[str, str | list[dict[str, str]]] = {"chosen": chosen, "rejected": rejected}
    for name, answer in answers.items():
        if not isinstance(answer, str) and answer[-1]["role"] != "assistant":
            raise DataError(f"{row.place}: field {name!r} must end with an assistant turn, got {answer[-1]['role']!r}")
    return {"prompt": prompt, **answers}


def _two_outputs(row: Row) -> dict[str, Any]:
    field = next((name for name in ("prompt", "instruction", "input") if row.get(name)), "input")
    label = row.get("label")
    if isinstance(label, bool) or label not in (1, 2):
        _wrong(row, "label", "1 or 2 (the better output)", label)
    texts = {number: _text(row, f"output_{number}") for number in (1, 2)}
    return {
        "prompt": [{"role": "user", "content": _text(row, field)}],
        "chosen": _reply(texts[int(label)]),
        "rejected": _reply(texts[3 - int(label)]),
    }


def _transcript(text: str) -> list[dict[str, str]]:
    """Text with headings -> messages; surrounding blanks of each turn belong to the layout."""
    pieces = _HEADING.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _alpaca(row: Row) -> list[dict[str, str]]:
    turns: list[dict[str, str]] = []
    if row.get("system"):
        turns.append({"role": "system", "content": _text(row, "system")})
    history = row.get("history") or []
    for turn in history if isinstance(history, Sequence) and not isinstance(history, str) else [history]:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2 or not all(map(is_text, turn)):
            _wrong(row, "history", "a list of [question, answer]", history)
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n{_text(row, 'input')}"
    return [*turns, {"role": "user", "content": question}]


def _sharegpt(row: Row) -> list[dict[str, str]]:
    messages = _messages(row, "conversations")
    if row.get("system"):
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    return messages


def _messages(row: Row, field: str) -> list[dict[str, str]]:
    """A list of messages, or one message, with role/content or from/value."""
    value = row[field]
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        _wrong(row, field, "a list of messages [{role, content}, ..]", value)
    return [_message(row, f"{field}[{number}]", item) for number, item in enumerate(items)]


def _message(row: Row, field: str, item: object) -> dict[str, str]:
    if not isinstance(item, Mapping):
        _wrong(row, field, "a message {role, content}", item)
    if item.get("tool_calls"):
        raise DataError(
            f"{row.place}: field '{field}.tool_calls' cannot be trained on; write the calls into content as text"
        )
    if "role" not in item and "from" in item:
        speaker = item["from"]
        role, content, key = _SPEAKERS.get(str(speaker)), item.get("value"), "value"
        if role is None:
            _wrong(row, f"{field}.from", f"one of {', '.join(_SPEAKERS)}", speaker)
    else:
        role, content, key = item.get("role"), item.get("content"), "content"
        if not isinstance(role, str) or not re.fullmatch(r"\w+", role):
            _wrong(row, f"{field}.role", "a role: system, user, assistant or tool", role)
    if isinstance(content, list):
        content = _joined_parts(row, f"{field}.{key}", content)
    if not is_text(content):
        _wrong(row, f"{field}.{key}", "text", content)
    return {"role": role, "content": content}


def _joined_parts(row: Row, field: str, parts: list[object]) -> str:
    """Content given as typed parts, all of them text."""
    texts = []
    for number, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            _wrong(row, f"{field}[{number}]", "a part of type text", part)
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            _wrong(row, f"{field}[{number}]", "a part of type text", part)
        texts.append(text)
    return "".join(texts)


def _text_or_messages(row: Row, field: str) -> str | list[dict[str, str]]:
    if isinstance(row[field], (list, tuple, Mapping)):
        return _messages(row, field)
    if not is_text(row[field]):
        _wrong(row, field, "text or a list of messages", row[field])
    text: str = row[field]
    return text


def _text(row: Row, field: str) -> str:
    if not is_text(row.get(field)):
        _wrong(row, field, "text", row.get(field))
    text: str = row[field]
    return text


def is_text(value: object) -> TypeGuard[str]:
    """A string that can be written as UTF-8 (JSON may hold half of a surrogate pair)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _score(row: Row, field: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _wrong(row, field, "a finite number or null", value)
    return float(value)


def _reply(content: Any) -> Any:
    return [{"role": "assistant", "content": content}] if isinstance(content, str) else content


def _form(value: str | list[dict[str, str]]) -> str:
    return "text" if isinstance(value, str) else "messages"


def _need_answer(row: Row, field: str, messages: Sequence[Mapping[str, str]]) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{row.place}: field {field!r}: no trained token: expected an assistant turn, got the roles {roles}; "
            "remove the row or set on_bad_row: skip"
        )


def _wrong(row: Row, field: str, expected: str, value: object) -> NoReturn:
    raise DataError(f"{row.place}: field {field!r}: expected {expected}, got {shown(value)}")


def _missing(row: Row, kind: str) -> NoReturn:
    columns = ", ".join(name for name in row if name not in ("source", "category"))
    raise DataError(
        f"{row.place}: expected the columns {EXPECTED[kind]}, got {columns or 'none'}; "
        "name them with dataset_columns, such as {user: question, completion: answer}"
    )
