"""The notebooks as they are committed, the sample, and pretrain.ipynb. test_kaggle.py runs train.ipynb and infer.ipynb,
test_sweep.py compare.ipynb, test_blend.py blend.ipynb."""

import ast
import dataclasses
import json

import kernel_utils as ku
import nbformat
import pandas as pd
import pytest

from conftest import ROOT, papermill, printed, tiny_config, trained

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_are_thin_and_clean(path):
    notebook = nbformat.read(path, 4)
    assert notebook.metadata.kernelspec.name == "python3" and "papermill" not in notebook.metadata
    assert [cell.metadata.get("tags") for cell in notebook.cells].count(["parameters"]) == 1
    for previous, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type != "code":
            continue
        assert previous is not None and previous.cell_type == "markdown", "every code cell has a sentence above it"
        assert not cell.outputs and cell.execution_count is None
        kinds = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source)))


def test_all_notebooks_run_the_bytes_that_they_have_compared_and_import_nothing_of_ours():
    sources = ["\n".join(cell.source for cell in nbformat.read(path, 4).cells) for path in NOTEBOOKS]
    lines = [set(source[source.index("code, manifest =") :].splitlines()[:12]) for source in sources]
    assert len(set.intersection(*lines)) >= 8  # from reading the module to running it
    loading = [line for source in sources for line in source.splitlines() if line.startswith("exec(")]
    names = {node.id for line in loading for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Name)}
    assert not names & {field.name for field in dataclasses.fields(ku.Config)}  # such as compile, a variable there
    assert not any(
        word in source for source in sources for word in ("import kernel_utils", "import blending", "sys.path.insert")
    )


@pytest.mark.slow
def test_pretrain_leaves_a_backbone_that_train_takes(competition, maskable, tmp_path, capsys):
    own = [("data_dir", competition), ("backbone", maskable("bert")), ("max_length", 32), ("epochs", 2)]
    own += [("output_dir", tmp_path), ("run_name", "pretrained")]
    done, executed = papermill("pretrain.ipynb", tmp_path / "pretrain.ipynb", *own)
    assert done.returncode == 0, done.stderr
    assert "epoch 2: held-out loss" in printed(executed)
    assert [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    run = trained(tiny_config(competition, tmp_path / "pretrained", tmp_path / "runs", run_name="r"))
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "complete" and record["pretrained"]["settings"]["epochs"] == 2
    assert "not used of the checkpoint" not in capsys.readouterr().out


def test_the_sample_has_the_layout_and_spread_of_the_competition():
    train, test, sample = (
        pd.read_csv(ROOT / "notebooks" / "sample" / name, dtype={"id": str})
        for name in ("train.csv", "test.csv", "sample_submission.csv")
    )
    assert list(train.columns) == ["id", "excerpt", "target", "standard_error"]
    assert list(test.columns) == ["id", "excerpt"] and list(sample["id"]) == list(test["id"])
    assert len(train) >= 160 and len(test) >= 40
    texts = pd.concat([train["excerpt"], test["excerpt"]])
    assert texts.is_unique and pd.concat([train["id"], test["id"]]).is_unique
    assert texts.str.split().str.len().between(40, 90).all()
    assert train["target"].between(-3.5, 1.7).all() and train["target"].std() > 1
    assert (train["standard_error"] > 0).all()


def test_no_two_passages_of_the_sample_share_a_run_of_seven_words():
    frames = [pd.read_csv(ROOT / "notebooks" / "sample" / name) for name in ("train.csv", "test.csv")]
    seen = {}
    for text in pd.concat(frames)["excerpt"]:
        words = text.lower().split()
        for run in {tuple(words[i : i + 7]) for i in range(len(words) - 6)}:
            assert run not in seen, f"{' '.join(run)!r} stands in two passages"
            seen[run] = text
