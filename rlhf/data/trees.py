"""Reader of message trees (OASST): one message a row, each naming its parent; the rows of a tree stand together."""

from collections.abc import Iterator

from rlhf.data.examples import Example, Unusable, dense_ranks, number
from rlhf.data.messages import as_messages

ROLES_OF_TREE = {"prompter": "user", "assistant": "assistant"}
Nodes = dict[str, dict]


def is_message_tree(row: dict) -> bool:
    return all(name in row for name in ("message_id", "parent_id", "message_tree_id", "text", "role"))


def read_message_tree(rows: list[dict]) -> Iterator[Example | Unusable]:
    """OASST message trees: every user turn with its answers, ranked from 0 (the best); a deleted message hides what follows it."""
    nodes = {row["message_id"]: row for row in rows if isinstance(row.get("message_id"), str)}
    answers: dict[str, list[tuple[int, dict]]] = {}
    for at, row in enumerate(rows):
        why = _lost(row, nodes)
        if why is not None:
            yield Unusable(why, at)
        elif row.get("parent_id") is not None and ROLES_OF_TREE[row["role"]] == "assistant":
            answers.setdefault(row["parent_id"], []).append((at, row))
    for at, row in enumerate(rows):
        if _lost(row, nodes) is None and ROLES_OF_TREE[row["role"]] == "user":
            yield from _user_turn(at, row, nodes, answers.get(str(row.get("message_id")), []))


def _lost(row: dict, nodes: Nodes) -> str | None:
    """Why a message of a tree cannot be used: something on its way up to the root is deleted, missing or of an unknown role."""
    seen = set()
    while True:
        if row.get("deleted"):
            return "deleted message"
        if not isinstance(row.get("role"), str) or row["role"] not in ROLES_OF_TREE:
            return "unknown role"
        parent = row.get("parent_id")
        if parent is None:
            return None
        if not isinstance(parent, str) or parent not in nodes or parent in seen:
            return "parent message missing"
        seen.add(parent)
        row = nodes[parent]


def _user_turn(at: int, row: dict, nodes: Nodes, replies: list[tuple[int, dict]]) -> Iterator[Example | Unusable]:
    """The example of one user turn. People rank only what has a rival: a lone answer needs no rank, another one is left out without."""
    path = [row]
    while path[0].get("parent_id") is not None:
        path.insert(0, nodes[path[0]["parent_id"]])
    ranked = replies if len(replies) == 1 else [reply for reply in replies if reply[1].get("rank") is not None]
    yield from (Unusable("answer without a rank", place) for place, reply in replies if (place, reply) not in ranked)
    try:
        prompt = as_messages([{"role": turn["role"], "content": turn.get("text")} for turn in path])
        ranks = dense_ranks([-number(reply.get("rank") or 0, "rank is not a number") for _, reply in ranked])
    except Unusable as why:
        yield Unusable(why.reason, at)
        return
    yield Example(prompt=prompt, completions=[reply.get("text") for _, reply in ranked], ranks=ranks, at=at)
