"""Chats: the problem, the pictures and the answer in a list of turns.

One reader serves every layout in use: `{"role", "content"}` and `{"from", "value"}`, a content of text or of parts, a
list or its JSON text. A system turn is left out, because `prompt.system` sets the system prompt of every row.

Next: images.py, pictures and their markers.
"""

from typing import Any, NamedTuple

from nanolmmr1.data.images import KEYS, MARKER, find
from nanolmmr1.data.readers import BadRow, parsed, shown

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
         "bot": "assistant", "chatgpt": "assistant", "system": "system", "developer": "system"}


class Chat(NamedTuple):
    """What a row needs of a chat."""

    problem: str  # the user's text, with a MARKER at each picture part
    text: str  # the same without these markers
    pictures: list[Any]  # of the parts that carry one, for images.locate
    answer: str  # the last turn of the assistant, or ""
    has_system: bool


def turns(value: Any) -> list[dict[str, Any]] | None:
    """The turns of a chat value: a list, an object with one turn, or the JSON text of either. None: no chat."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        value = parsed(value)
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list) or not found:
        return None
    is_chat = all(isinstance(turn, dict) and isinstance(turn.get("role") or turn.get("from"), str)
                  and ("content" in turn or "value" in turn) for turn in found)
    return found if is_chat else None


def read(chat: list[dict[str, Any]]) -> Chat:
    """The problem, pictures and answer of a chat. User turns that follow each other are joined by a line break.

    Raises:
        BadRow: the user speaks again after an answer, or a turn or part is of an unknown kind.
    """
    asked, answer, answered, has_system = list[tuple[str, str, list[Any]]](), "", False, False
    for turn in chat:
        speaker = str(turn.get("role") or turn.get("from"))
        role = ROLES.get(speaker.lower())
        content = _content(turn["value"] if turn.get("content") is None and "value" in turn else turn.get("content"))
        if role is None:
            raise BadRow("turn of an unknown role", f"the chat has a turn by {shown(speaker, 50)!r}; only turns of "
                         "user, assistant and system are read")
        if role == "system":
            has_system = True
        elif role == "assistant":
            answer, answered = content[1], bool(asked)
        elif answered:
            raise BadRow("conversation of several turns", "the user speaks again after an answer, and a row is one "
                         "problem with one answer; cut the chat after its first answer")
        else:
            asked.append(content)
    return Chat("\n".join(marked for marked, _, _ in asked if marked), "\n".join(text for _, text, _ in asked if text),
                [item for _, _, pictures in asked for item in pictures], answer, has_system)


def _content(content: Any) -> tuple[str, str, list[Any]]:
    """A turn's text with and without markers for its picture parts, and the pictures."""
    marked, plain, pictures = "", "", []
    for part in content if isinstance(content, list) else [content] if content else []:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise BadRow("unknown part of a chat", f"a part of the chat is {shown(repr(part), 80)}: text, or an object "
                         "with a type, is needed")
        filled = {str(name): value for name, value in part.items() if value and name != "type"}
        kind = str(part.get("type") or next(iter(filled), "text")).lower()
        if "text" in kind:
            text = filled.get("text", filled.get("content", ""))
            if not isinstance(text, str):
                raise BadRow("unknown part of a chat", f"a text part of the chat holds {shown(repr(text), 80)}")
            marked, plain = marked + text, plain + text
        elif "image" in kind:
            beside = str(filled.get("text", "")) if "type" not in part else ""  # {"image": PATH, "text": TEXT}
            marked, plain = marked + MARKER + beside, plain + beside
            pictures += find({name: filled[name] for name in KEYS if name in filled})[:1]
        else:
            raise BadRow(f"has {'a video' if 'video' in kind else 'audio' if 'audio' in kind else 'an unknown part'}",
                         f"the chat has a part of type {shown(kind, 50)!r}; only text and images are read")
    return marked, plain, pictures
