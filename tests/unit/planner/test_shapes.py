import pytest

from lorakit.errors import ModelError
from lorakit.models.empty import empty_from_config
from lorakit.planner.shapes import SHAPES, planned_config

# As their makers publish them: the numbers of the checkpoints, tied weights once.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "phi-4": 14_659_507_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_shape_has_the_published_number_of_parameters(name):
    model = empty_from_config(planned_config(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_every_shape_is_checked_and_gpt3_is_as_in_its_paper():
    assert set(SHAPES) == {*PUBLISHED, "gpt3-175b"}
    model = empty_from_config(planned_config("gpt3-175b"))
    num_params = sum(p.numel() for p in model.parameters())
    # 96 blocks of 12 d^2 + 13 d, 50,257 tokens and 2,048 positions of width 12,288, a norm.
    width = 12_288
    block = 12 * width**2 + 13 * width
    assert num_params == 96 * block + (50_257 + 2_048 + 2) * width
    assert num_params == pytest.approx(175e9, rel=0.005)


def test_a_directory_comes_before_a_shape_of_the_same_name(tmp_path, monkeypatch, tiny):
    tiny("llama").save_pretrained(tmp_path / "llama-3-8b")
    monkeypatch.chdir(tmp_path)
    assert planned_config("llama-3-8b").hidden_size == 32
    with pytest.raises(ModelError):
        planned_config("llama-3-9b")
