"""What a passport says of the rows that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# As transformers names it beside a tokenizer.
TEMPLATE_NAME = "chat_template.jinja"


def trained_data(passport: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `data` of the config in a passport; empty where there is none."""
    config = passport.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    return data if isinstance(data, Mapping) else {}
