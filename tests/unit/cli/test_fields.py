"""The words of a configuration on the command line."""

import pytest

from lorakit.cli.fields import at_most_one_file, one_file, split_words
from lorakit.errors import RequestError


def test_a_path_with_an_equals_sign_is_a_file_if_it_is_there(tmp_path):
    path = tmp_path / "lr=0.1" / "config.yaml"
    path.parent.mkdir()
    words = [str(path), "lr=1e-4"]
    assert split_words(words) == ([], words)
    path.write_text("model: m\n")
    assert split_words(words) == ([str(path)], ["lr=1e-4"])
    assert one_file(words, verb="sweep") == (str(path), ["lr=1e-4"])


@pytest.mark.parametrize("words", [[], ["a.yaml", "b.yaml"]])
def test_not_one_config_names_the_verb(words):
    with pytest.raises(RequestError, match="one config is needed") as caught:
        one_file(words, verb="sweep")
    assert "lorakit sweep --fields" in str(caught.value)
    with pytest.raises(RequestError, match="one config is needed"):
        at_most_one_file(words, verb="train")


def test_overrides_alone_are_enough_only_for_some():
    assert at_most_one_file(["a=1"], verb="train") == (None, ["a=1"])
    with pytest.raises(RequestError, match="one config"):
        one_file(["a=1"], verb="compare")
