"""The phrasings that each kind of question is asked in, with gaps for words of the schema."""

from __future__ import annotations

PHRASINGS: dict[str, tuple[str, ...]] = {
    "lookup": (
        "What is {what} of the {one} '{name}'?",
        "Show {what} of the {one} whose {title} is '{name}'.",
        "Tell me {what} of {name}, {a_one}.",
        "For the {one} called '{name}', give {what}.",
        "I need {what} of the {one} {name}.",
    ),
    "select": (
        "Show {what} of the {many} {cond}.",
        "List {what} of all {many} {cond}.",
        "Give me {what} of every {one} {cond}.",
        "For the {many} {cond}, what is {what}?",
        "Find {what} of {many} {cond}.",
        "I want to see {what} of each {one} {cond}.",
    ),
    "distinct": (
        "What are the different {columns} of the {many}?",
        "List the distinct {columns} of {many}.",
        "Which different {columns} do the {many} have?",
        "Show every {column} that occurs among the {many}, each only once.",
        "List the {columns} of the {many} without duplicates.",
    ),
    "count": (
        "How many {many} are there {cond}?",
        "Count the {many} {cond}.",
        "What is the number of {many} {cond}?",
        "Give the total number of {many} {cond}.",
    ),
    "count_distinct": (
        "How many different {columns} do the {many} have?",
        "Count the distinct {columns} of the {many}.",
        "What is the number of different {columns} among the {many}?",
        "How many distinct {columns} are there among {many}?",
    ),
    "aggregate": (
        "What is the {aggregate} {column} of {many}{cond}?",
        "Give the {aggregate} {column} of all {many}{cond}.",
        "Find the {aggregate} {column} among the {many}{cond}.",
        "Compute the {aggregate} {column} over {many}{cond}.",
    ),
    "order": (
        "List {what} of all {many}{cond}, sorted {order}.",
        "Show {what} of the {many}{cond}, ordered {order}.",
        "Give me {what} of every {one}{cond}, arranged {order}.",
        "Sort the {many}{cond} {order} and show {what}.",
    ),
    "top": (
        "Show {what} of the {limit} {many} with the {extreme} {column}.",
        "List {what} of the {limit} {many} that have the {extreme} {column}.",
        "Which {limit} {many} have the {extreme} {column}? Give {what}.",
        "Of the {limit} {many} with the {extreme} {column}, show {what}.",
    ),
    "superlative": (
        "Which {one} has the {extreme} {column}? Give {what}.",
        "What is {what} of the {one} with the {extreme} {column}?",
        "Show {what} of the {one} that has the {extreme} {column}.",
        "Find the {one} with the {extreme} {column} and give {what}.",
    ),
    "group_count": (
        "How many {many} are there for each {group}? Show the {group} and the count.",
        "For each {group}, show the {group} and the number of {many}.",
        "Count the {many} per {group}, giving the {group} and the count.",
        "Give every {group} together with its number of {many}.",
    ),
    "group_aggregate": (
        "What is the {aggregate} {column} of {many} for each {group}? Show the {group} first.",
        "For each {group}, show the {group} and the {aggregate} {column} of the {many}.",
        "Give the {group} and the {aggregate} {column} of {many} per {group}.",
        "Show every {group} together with the {aggregate} {column} of its {many}.",
    ),
    "having": (
        "Which {groups} have {bound} {many}?",
        "List each {group} with {bound} {many}.",
        "Show the {groups} that occur in {bound} {many}.",
        "Find every {group} that has {bound} {many}.",
    ),
    "join_lookup": (
        "What is {what} of the {parent} of the {one} '{name}'?",
        "Show {what} of the {parent} that the {one} '{name}' belongs to.",
        "For the {one} called '{name}', give {what} of its {parent}.",
        "Tell me {what} of the {parent} of {name}, {a_one}.",
    ),
    "join_select": (
        "Show {what} of the {many} with {a_parent} {cond}.",
        "List {what} of all {many} that belong to {a_parent} {cond}.",
        "Find {what} of every {one} with {a_parent} {cond}.",
        "For the {many} of {parents} {cond}, give {what}.",
    ),
    "join_both": (
        "For each {one} {cond}, show its {child_column} and {what} of its {parent}.",
        "List the {child_column} of the {many} {cond}, together with {what} of their {parent}.",
        "Show the {child_column} and the {parent}'s {parent_column} for all {many} {cond}.",
        "Give the {child_column} of every {one} {cond} along with {what} of its {parent}.",
    ),
    "join_count": (
        "How many {many} have {a_parent} {cond}?",
        "Count the {many} with {a_parent} {cond}.",
        "What is the number of {many} that belong to {a_parent} {cond}?",
        "Give the number of {many} of {parents} {cond}.",
    ),
    "join_aggregate": (
        "What is the {aggregate} {column} of {many} with {a_parent} {cond}?",
        "Give the {aggregate} {column} of the {many} that belong to {a_parent} {cond}.",
        "Find the {aggregate} {column} of all {many} of {parents} {cond}.",
        "Compute the {aggregate} {column} over {many} with {a_parent} {cond}.",
    ),
    "children_per_parent": (
        "How many {many} belong to each {parent} that has {many}? Show {what} and the count.",
        "For each {parent} with {many}, show {what} and the number of {many}.",
        "Count the {many} of each {parent} that has any, giving {what} and the count.",
        "Show {what} of every {parent} that has {many}, with its number of {many}.",
    ),
    "aggregate_per_parent": (
        "For each {parent} with {many}, show {what} and the {aggregate} {column} of its {many}.",
        "What is the {aggregate} {column} of {many} per {parent}? Start with the {parent} {title}.",
        "Give {what} of every {parent} with {many}, and the {aggregate} {column} of those.",
        "Group the {many} by {parent}; show {what} of the {parent} and the {aggregate} {column}.",
    ),
    "most_children": (
        "Which {parent} has the most {many}? Give {what}.",
        "Show {what} of the {parent} with the most {many}.",
        "What is {what} of the {parent} that has the highest number of {many}?",
        "Find the {parent} with the largest number of {many} and give {what}.",
    ),
    "above_average": (
        "Show {what} of the {many} whose {column} is {side} average.",
        "Which {many} have {a_column} {side} the average {column}? Give {what}.",
        "List {what} of all {many} with {a_column} {side} the average of all {many}.",
        "Find the {many} with {side}-average {column} and give {what}.",
    ),
    "without_children": (
        "Which {parents} have no {many}? Give {what}.",
        "Show {what} of the {parents} without any {many}.",
        "List {what} of every {parent} that does not have any {many}.",
        "Find the {parents} that have no {many} and give {what}.",
    ),
}
"""Intent -> the phrasings it is asked in."""
