"""The Python that the README shows works as it stands there."""

import re
import types
from pathlib import Path

import kernel_utils as ku
import numpy as np
import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
TABLES = {"heads": ku.HEADS, "losses": ku.LOSSES, "metrics": ku.METRICS}
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Run the README's Python blocks; what they register is gone after the test."""
    monkeypatch.chdir(tmp_path)
    tables = {name: dict(table) for name, table in TABLES.items()}
    scope = {"ku": ku, "__name__": "__main__"}
    for block in BLOCKS:
        exec(block, scope)
    yield
    for name, table in TABLES.items():
        table.clear()
        table.update(tables[name])


def test_the_head_of_the_readme_can_be_set_and_is_the_median_of_the_real_tokens(examples):
    encoder = types.SimpleNamespace(hidden_size=3, num_hidden_states=2, cls_is_last=False, num_outputs=1)
    head = ku.HEADS[ku.Config(head="median").head](encoder, ku.Config())
    assert head.out_features == 3
    tokens = [[1.0, 5.0, 0.0], [2.0, 4.0, 7.0], [3.0, 9.0, 1.0], [99.0, 99.0, 99.0]]
    state = torch.tensor([tokens])
    features = head((state, state), torch.tensor([[1, 1, 1, 0]]))
    torch.testing.assert_close(features, torch.tensor([[2.0, 5.0, 1.0]]))


def test_the_loss_of_the_readme_can_be_set(examples):
    loss = ku.LOSSES[ku.Config(loss="log_cosh").loss](ku.Config(), 1)
    values = loss(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.0]]))
    torch.testing.assert_close(values, torch.tensor([0.43378083, 0.0]))


def test_the_metric_of_the_readme_can_be_set(examples):
    metric = ku.METRICS[ku.Config(metric="largest_error").metric]
    assert metric(np.array([[0.0], [1.0]]), np.array([[0.5], [-1.0]])) == 2.0


def test_the_readme_lists_every_head_loss_metric_and_the_settings_it_names():
    for table in TABLES.values():
        assert [name for name in table if f"`{name}`" not in README] == []
    section = README.split("## Settings people change")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    fields = {field.name for field in ku.dataclasses.fields(ku.Config)}
    assert named and named <= fields | {"recipe"}


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 250
