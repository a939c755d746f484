"""Which modules a training monitor takes for the layers, and how it lists what it saw of them."""

import torch
from torch import nn, optim

from transformer_problems.models.decoder import Decoder
from transformer_problems.solutions.attention.self_attention import SelfAttention
from transformer_problems.solutions.training.monitor import TrainingMonitor


def test_layers_are_the_longest_stack() -> None:
    def found(model: nn.Module, **keywords: object) -> tuple[str, ...]:
        with TrainingMonitor(model, optim.SGD(model.parameters()), **keywords) as monitor:
            return monitor.layers

    model = Decoder(5, 8, 3, lambda: SelfAttention(8, 2))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
    assert found(model) == ("body.blocks.0", "body.blocks.1", "body.blocks.2")
    assert found(encoder) == ("layers.0", "layers.1", "layers.2")
    assert found(model, layers=[model.body.norm, model.body]) == ("body.norm", "body")
    both = nn.ModuleDict({"short": nn.ModuleList([nn.Linear(2, 2)]), "long": nn.Sequential(*encoder.layers)})
    assert found(both) == ("long.0", "long.1", "long.2")
    mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    assert found(mixed) == ("3.0",)
    experts = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2) for _ in range(8)]) for _ in range(2)])
    assert found(experts) == ("0", "1")
    assert found(nn.ModuleList([experts])) == ("0.0", "0.1")


def test_the_report_is_an_aligned_table_of_the_last_sample_and_the_alarms() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    monitor = TrainingMonitor(model, optimizer, every=2)
    assert monitor.report() == "no step sampled yet"
    with monitor:
        for _ in range(3):
            model(torch.ones(1, 3, 4)).square().mean().backward()
            optimizer.step()
    title, head, *rows, blank, alarm = str(monitor).splitlines()
    assert title == "step 2, every 2 steps"
    assert head.split("  ")[0] == "layer" and head.endswith("token similarity")
    assert [row.split()[0] for row in rows] == ["0", "1"] and [row.split()[3] for row in rows] == ["-", "-"]
    assert {len(line) for line in rows} == {len(head)} and blank == ""
    assert alarm.startswith("rank collapse at step 0 in 1, seen in 2 samples: ")  # its three tokens are the same
