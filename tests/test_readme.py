"""The Python that the README shows works as it stands there."""

import json
import re
import runpy
import types

import kernel_utils as ku
import numpy as np
import pytest
import torch

from conftest import ROOT, with_this_module

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = {"heads": ku.HEADS, "losses": ku.LOSSES, "metrics": ku.METRICS}
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def tables():
    """What is registered in a test is gone after it."""
    before = {name: dict(table) for name, table in TABLES.items()}
    yield
    for name, table in TABLES.items():
        table.clear()
        table.update(before[name])


@pytest.fixture
def examples(tables, tmp_path, monkeypatch):
    """Run the README's Python blocks."""
    monkeypatch.chdir(tmp_path)
    scope = {"ku": ku, "__name__": "__main__"}
    for block in BLOCKS:
        exec(block, scope)


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


def test_the_examples_train_as_they_are_in_cells_above_from_notebook(
    tables, competition, backbone_folder, tmp_path, monkeypatch
):
    notebook = json.loads((ROOT / "notebooks/train.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    place = next(i for i, cell in enumerate(cells) if "ku.Config.from_notebook" in cell)
    settings = dict(head="median", loss="log_cosh", metric="largest_error", n_folds=2, epochs=1, max_length=32)
    settings |= dict(
        data_dir=str(competition), backbone=str(backbone_folder("tiny")), output_dir=str(tmp_path / "runs")
    )
    parameters = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    cells[place:place] = [f"# Parameters\n{parameters}", *BLOCKS]
    script = tmp_path / "train.py"
    script.write_text(with_this_module("".join(f"# %%\n{cell}\n" for cell in cells)), encoding="utf-8")
    monkeypatch.chdir(ROOT)  # of a clone, where the notebook finds the module
    monkeypatch.setattr("IPython.display.Image", lambda path: None)  # tests draw no figures
    runpy.run_path(str(script), run_name="__main__")
    (run,) = (tmp_path / "runs").iterdir()
    record = ku.RunFolder(run).read_record()
    assert record["status"] == "complete" and record["oof"]["metric"] == "largest_error"
    assert (run / "submission.csv").is_file()


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
