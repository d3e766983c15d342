"""One thread for every test of the trainer: results do not depend on the machine's cores."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """tests/conftest.py's, for all."""
