"""English for conditions, column lists and amounts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lorakit.demo.domains import Column, Value

# Comparison -> how it is said of a number, and how of a year or a date.
_OF_NUMBERS = {
    ">": ("above {}", "greater than {}", "over {}", "more than {}"),
    "<": ("below {}", "less than {}", "under {}", "smaller than {}"),
    ">=": ("at least {}", "{} or more"),
    "<=": ("at most {}", "{} or less"),
    "=": ("{}", "equal to {}", "exactly {}"),
}
_OF_TIMES = {
    ">": ("after {}", "later than {}"),
    "<": ("before {}", "earlier than {}"),
    ">=": ("{} or later", "no earlier than {}"),
    "<=": ("{} or earlier", "no later than {}"),
    "=": ("{}", "exactly {}"),
}
_ORDERS = {
    # kind of column -> (ascending, descending)
    "number": (
        ("from lowest to highest {}", "by {} in ascending order", "by {}, lowest first"),
        ("from highest to lowest {}", "by {} in descending order", "by {}, highest first"),
    ),
    "time": (
        ("from earliest to latest {}", "by {} in ascending order", "by {}, earliest first"),
        ("from latest to earliest {}", "by {} in descending order", "by {}, latest first"),
    ),
    "text": (
        ("alphabetically by {}", "by {} from A to Z", "in alphabetical order of {}"),
        ("by {} from Z to A", "in reverse alphabetical order of {}"),
    ),
}


def plural(phrase: str) -> str:
    """The plural of a column's phrase: "city" -> "cities"."""
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    if phrase.endswith(("s", "x", "ch", "sh")):
        return phrase if phrase == "species" else phrase + "es"
    return phrase + "s"


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def joined(phrases: Sequence[str]) -> str:
    """The columns with articles: "the title and the year", "the title, the year and the price"."""
    *head, last = [f"the {p}" for p in phrases]
    return f"{', '.join(head)} and {last}" if head else last


def literal(value: Value) -> str:
    """The value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def comparison(column: Column, operator: str, value: Value, rng: random.Random) -> str:
    """What a condition says about its column: "is above 300", without the column's phrase."""
    if column.is_text:
        shown = f"'{value}'" if rng.random() < 0.5 else f"{value}"
        return f"is not {shown}" if operator == "!=" else f"is {shown}"
    wordings = (_OF_TIMES if column.kind in ("year", "date") else _OF_NUMBERS)[operator]
    return "is " + rng.choice(wordings).format(value)


def ordering(column: Column, descending: bool, rng: random.Random) -> str:
    """How an order by this column is said: "by price, highest first"."""
    kind = "text" if column.is_text else "number" if column.is_number else "time"
    return rng.choice(_ORDERS[kind][descending]).format(column.phrase)


def extreme(column: Column, highest: bool) -> str:
    """The superlative for one end of this column: "highest", "earliest"."""
    if column.is_number:
        return "highest" if highest else "lowest"
    return "latest" if highest else "earliest"
