"""Convert rows of other tools to the fields that `readers.py` reads.

    RLHF-V            text = JSON of question, chosen, rejected
    RLAIF-V           image_path instead of image
    datasets          image = {"path"}: the file's name without its bytes
    TRL and others    images = [one]; prompt, chosen, rejected or messages as chats: lists of
                      {"role": "user" or "assistant", "content": text, or parts with type and text}
"""

import contextlib
from collections.abc import Iterator

from formats.files import brief, parse_json, understood
from formats.rows import DataError
from formats.tokenizer import IMAGE

SPEAKERS = {"user": "human", "assistant": "gpt"}


@contextlib.contextmanager
def wrong_types(name: str) -> Iterator[None]:
    """Turn the errors that a row's values of wrong types cause into a DataError."""
    try:
        with understood(name):
            yield
    except ValueError as error:
        raise DataError(str(error)) from None


def plain(name: str, row: dict) -> dict:
    """Return a row with the fields of the public data sets."""
    row = {key: value for key, value in row.items() if value is not None}  # as absent
    if str(row.get("text")).lstrip().startswith("{") and not row.get("question"):
        try:
            row |= parse_json(row["text"].encode())
        except ValueError as error:
            raise DataError(f"{name}: text is not valid JSON ({error})") from None
    if row.get("images") and not row.get("image"):
        if not isinstance(row["images"], list) or len(row["images"]) > 1:
            raise DataError(f"{name}: images should be a list of one image")
        row["image"] = row["images"][0]
    row["image"] = row.get("image") or row.get("image_path")
    if isinstance(row["image"], dict):
        row["image"] = row["image"].get("path")
    if row.get("messages") and not row.get("conversations"):
        row["conversations"] = chat_turns(name, row["messages"])
    if isinstance(row.get("prompt"), list) and not row.get("question"):
        turns = chat_turns(name, row["prompt"])
        speakers = [turn["from"] for turn in turns]
        if speakers != ["human", *["gpt", "human"] * (len(turns) // 2)]:
            raise DataError(f"{name}: prompt should alternate between user and assistant, and end "
                            "with the user's question")
        *before, row["question"] = (turn["value"].replace(IMAGE, "").strip() for turn in turns)
        row["history"] = list(map(list, zip(before[0::2], before[1::2])))
    for key in ("chosen", "rejected"):
        if isinstance(row.get(key), list):
            *earlier, last = chat_turns(name, row[key]) or [{"from": None}]
            if last["from"] != "gpt" or earlier and spoken(earlier) != asked(name, row):
                raise DataError(f"{name}: {key} should be one answer of the assistant, alone or "
                                "after the messages of the prompt")
            row[key] = last["value"]
    return row


def asked(name: str, row: dict) -> list[tuple[str, str]]:
    """Return what was said before the answers of a row, as `spoken` does."""
    if isinstance(row.get("prompt"), list):
        return spoken(chat_turns(name, row["prompt"]))
    return spoken([{"from": "human", "value": row.get("question") or row.get("prompt") or ""}])


def spoken(turns: list[dict]) -> list[tuple[str, str]]:
    """Return (speaker, text) of each turn, without `<image>`."""
    return [(turn["from"], turn["value"].replace(IMAGE, "").strip()) for turn in turns]


def chat_turns(name: str, messages: list) -> list[dict]:
    """Return a chat as LLaVA's conversations: {"from": "human" or "gpt", "value": text}."""
    turns = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in SPEAKERS:
            raise DataError(f"{name}: a message of role {brief(role)}, not 'user' or 'assistant'")
        if isinstance(content, list):
            content = "".join(
                IMAGE if part["type"] == "image" else part["text"] for part in content)
        turns.append({"from": SPEAKERS[role], "value": content})
    return turns
