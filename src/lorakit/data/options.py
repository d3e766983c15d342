"""How rows become token ids and labels: the options of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.errors import ConfigError, unknown_name

SFT_ROLES = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "system",
)
# Of other tasks; a config checks that its task has the role.
PREFERENCE_ROLES = (*(role for role in SFT_ROLES if role != "text"), "chosen", "rejected", "label")
ROLES = tuple(dict.fromkeys((*SFT_ROLES, "text_pair", "label", *PREFERENCE_ROLES)))


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class SftOptions:
    """How rows become examples.

    Raises:
        ConfigError: a value out of range, or a column for a role that does not exist.
    """

    columns: Mapping[str, str] = field(
        default_factory=dict[str, str],
        metadata=_help(
            "which of your columns plays which role, as in {prompt: question, completion: answer}; "
            f"roles: {', '.join(SFT_ROLES)}; for task classify text, text_pair, label; "
            "for preferences also chosen, rejected, label"
        ),
    )
    template: Literal["auto", "chat", "none"] = field(
        default="auto",
        metadata=_help(
            "chat: render turns with the tokenizer's chat template; none: prompt and completion "
            "as they are; auto: chat where the tokenizer has a template and the rows are not text"
        ),
    )
    chat_template: str | None = field(
        default=None,
        metadata=_help(
            "a chat template of your own, in place of the tokenizer's: a Jinja file, or the "
            "template itself"
        ),
    )
    template_options: Mapping[str, str | int | bool] = field(
        default_factory=dict[str, "str | int | bool"],
        metadata=_help("variables of the chat template, as in {enable_thinking: false}"),
    )
    system: str | None = field(
        default=None, metadata=_help("system prompt for rows that have none; chat template only")
    )
    completion_only: bool = field(
        default=True, metadata=_help("learn the answers only; false: every token of a row")
    )
    last_turn_only: bool = field(
        default=False, metadata=_help("of several answers in a row, learn the last only")
    )
    add_eos: bool = field(
        default=True,
        metadata=_help("end an answer with EOS where the template writes no end marker"),
    )
    max_length: int | None = field(
        default=None, metadata=_help("longest row in tokens; null: no limit")
    )
    on_too_long: Literal["cut", "drop", "error"] = field(
        default="cut",
        metadata=_help(
            "a row beyond max_length: cut its end (its EOS is then not learned), drop it, or stop"
        ),
    )

    def __post_init__(self) -> None:
        _check_choice("template", self.template, ("auto", "chat", "none"))
        # What is recorded is the template, not where it lay.
        object.__setattr__(self, "chat_template", _template_text(self.chat_template))
        if self.chat_template is not None and self.template == "none":
            raise ConfigError(
                "a chat template beside template: none",
                where="chat_template",
                remedy="leave one of them out",
            )
        _check_choice("on_too_long", self.on_too_long, ("cut", "drop", "error"))
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                "max_length is out of range",
                where="max_length",
                expected="at least 2 tokens, or null for no limit",
                found=str(self.max_length),
            )
        for role in self.columns:
            if role not in ROLES:
                raise unknown_name(
                    ConfigError,
                    f"unknown role {role!r}",
                    role,
                    ROLES,
                    where="columns",
                    otherwise="role: your column",
                )

    def column(self, role: str) -> str:
        """The name of the column that plays this role."""
        return self.columns.get(role, role)


def _template_text(given: str | None) -> str | None:
    """The template itself where a file of it is named."""
    if given is None or "{%" in given or "{{" in given:
        return given
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "the chat template cannot be read",
            where=f"chat_template: {given}",
            expected="a Jinja file, or the template itself",
            found=str(error),
        ) from error
    if "{%" not in text and "{{" not in text:
        raise ConfigError(
            "this is not a chat template",
            where=f"chat_template: {given}",
            expected="Jinja: a loop over messages",
            found=repr(text[:60]),
        )
    return text


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"unknown value of {name}",
            where=name,
            expected=", ".join(choices),
            found=repr(value),
        )
