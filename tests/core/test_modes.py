"""Modes are put back module by module."""

from torch import nn

from transformer_problems.core.modes import evaluating


def test_each_module_is_afterwards_in_the_mode_that_it_was_in() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, False, True, True]
