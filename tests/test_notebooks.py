"""The notebooks as people run them: papermill, a made Kaggle root, an exported script, any folder of the clone."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from conftest import ROOT, papermill, printed

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def tiny_parameters(competition, backbone, output_dir):
    return [
        ("data_dir", competition),
        ("backbone", backbone),
        ("output_dir", output_dir),
        ("n_folds", 2),
        ("epochs", 1),
        ("max_length", 32),
    ]


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


@pytest.mark.slow
def test_train_then_infer_write_the_same_submission(competition, backbone_folder, tmp_path):
    parameters = tiny_parameters(competition, backbone_folder("tiny"), tmp_path / "runs")
    done, executed = papermill(
        "train.ipynb", tmp_path / "train.ipynb", *parameters, ("head", "conv1d"), ("run_name", "r")
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "r" / "record.json").read_text())
    assert record["status"] == "complete" and record["settings"]["head"] == "conv1d"
    images = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 2 and "out-of-fold over 40 rows, 2 folds" in printed(executed)
    done, _ = papermill(
        "infer.ipynb",
        tmp_path / "infer.ipynb",
        ("data_dir", competition),
        ("bundle_dir", tmp_path / "runs" / "r"),
        ("output_dir", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    trained, inferred = (
        pd.read_csv(p / "submission.csv", dtype={"id": str}) for p in (tmp_path / "runs" / "r", tmp_path)
    )
    pd.testing.assert_frame_equal(trained, inferred)
    assert list(trained["id"]) == list(pd.read_csv(competition / "sample_submission.csv", dtype={"id": str})["id"])


@pytest.mark.slow
def test_pretrain_leaves_a_backbone_that_train_takes(competition, maskable, tmp_path):
    pretrained, runs = tmp_path / "pretrained", tmp_path / "runs"
    own = [("data_dir", competition), ("backbone", maskable("bert")), ("max_length", 32), ("epochs", 2)]
    own += [("output_dir", tmp_path), ("run_name", "pretrained")]
    done, executed = papermill("pretrain.ipynb", tmp_path / "pretrain.ipynb", *own)
    assert done.returncode == 0, done.stderr
    assert "epoch 2: held-out loss" in printed(executed)
    assert [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    parameters = [*tiny_parameters(competition, pretrained, runs), ("run_name", "r")]
    done, executed = papermill("train.ipynb", tmp_path / "train.ipynb", *parameters)
    assert done.returncode == 0, done.stderr
    record = json.loads((runs / "r" / "record.json").read_text())
    assert record["status"] == "complete" and record["pretrained"]["settings"]["epochs"] == 2
    assert "not used of the checkpoint" not in printed(executed)


@pytest.mark.slow
def test_a_misspelt_setting_and_a_bad_value_stop_papermill_with_one_message(tmp_path):
    parameters = [("heda", "conv1d"), ("head", "conv1"), ("epochs", "2.5")]
    done, executed = papermill("train.ipynb", tmp_path / "out.ipynb", *parameters)
    assert done.returncode != 0
    errors = [o for c in executed.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert [error.ename for error in errors] == ["ConfigError"]
    message = "\n".join(errors[0].traceback)
    for part in (
        "there is no setting 'heda' (did you mean head?)",
        "head must be one of cls, mean, max",
        "got 'conv1' (did you mean conv1d?)",
        "epochs must be a whole number, got 2.5",
    ):
        assert part in message and part in done.stderr
    assert "Traceback" not in message


@pytest.mark.slow
def test_the_exported_script_trains_from_a_folder_inside_the_clone(competition, backbone_folder, tmp_path):
    clone = tmp_path / "clone"
    for folder in ("kernel_utils", "notebooks"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    inside = clone / "notebooks" / "mine"
    inside.mkdir()
    notebook = nbformat.read(clone / "notebooks" / "train.ipynb", 4)
    cell = next(cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    own = {
        name: repr(str(v) if isinstance(v, Path) else v)
        for name, v in tiny_parameters(competition, backbone_folder("tiny"), "out")
    }
    kept = [line for line in cell.source.splitlines() if line.split(":")[0] not in own]
    cell.source = "\n".join([*kept, *(f"{name} = {value}" for name, value in own.items())])
    nbformat.write(notebook, inside / "mine.ipynb")
    export = [sys.executable, "-m", "nbconvert", "--to", "script", "mine.ipynb"]
    subprocess.run(export, cwd=inside, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "mine.py"], cwd=inside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (inside / "out").iterdir()
    assert json.loads((run / "record.json").read_text())["settings"]["n_folds"] == 2


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
