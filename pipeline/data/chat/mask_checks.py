"""What may be wrong with the mask of a row, whatever made it: the checks that every row passes before it is trained on,
and that `alma inspect masks` reports.

That the tokens which carry loss are an answer's is proved where they are found (pipeline/data/chat/template.py). These
checks do not know how they were found.
"""

from collections.abc import Collection


def mask_problem(ids: list[int], trained: list[bool], end_ids: Collection[int], bos_id: int | None) -> str | None:
    """What is wrong with a complete row, or None. `trained`: which tokens carry loss. `end_ids`: tokens that end a turn
    of the assistant. `bos_id`: the tokenizer's beginning of text."""
    if not any(trained):
        return "none of its tokens carries loss"
    if all(trained):
        return "all of its tokens carry loss: there is no prompt that it answers"
    if bos_id is not None and ids[:2] == [bos_id, bos_id]:
        return "the chat template writes the beginning of text twice"
    if ids[len(ids) - 1 - trained[::-1].index(True)] not in end_ids:
        return "the token that ends its last answer carries no loss: the model would not learn to end its turn"
    return None
