"""Numbers in sentences for people."""


def many(number: int, noun: str, form: str = "") -> str:
    """`1 source`, `2 sources`; `form` "," writes 12,000. Nouns with another plural come as `process/processes`."""
    one, _, several = noun.partition("/")
    return f"{number:{form}} {one if number == 1 else several or one + 's'}"
