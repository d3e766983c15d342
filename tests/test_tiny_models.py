from __future__ import annotations

import pytest
import torch

import tiny_models


@pytest.mark.parametrize("name", sorted(tiny_models.BUILDERS))
def test_every_tiny_model_runs_is_seeded_and_small(name):
    model = tiny_models.build(name)
    given = tiny_models.inputs(model)
    out = tiny_models.outputs(model, given)
    assert out.shape[0] == 3
    assert torch.isfinite(out).all()
    assert not model.training
    again = tiny_models.outputs(tiny_models.build(name), given)
    assert torch.equal(out, again)
    other = tiny_models.outputs(tiny_models.build(name, seed=1), given)
    assert not torch.allclose(out, other)
    assert sum(p.numel() for p in model.parameters()) < 120_000


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny_models.build("llama")
    assert torch.equal(torch.rand(1), expected)
