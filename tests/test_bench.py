"""The speed of prediction against a plain loop: the command that the README's figures come from."""

import subprocess
import sys

import kernel_utils as ku
import pandas as pd
import pytest

from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

SAMPLE = ROOT / "notebooks" / "sample"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the default backbone on the sample."""
    folder = tmp_path_factory.mktemp("bench")
    cfg = ku.Config(data_dir=str(SAMPLE), output_dir=str(folder), max_rows=20, n_folds=2, run_folds="0", epochs=1)
    train, _, _ = ku.read_competition(cfg)
    return ku.train(ku.make_folds(train, cfg), cfg)


def bench(run, *arguments):
    command = [sys.executable, ROOT / "tools" / "bench_infer.py", run, "--data", SAMPLE, "--rows", "8", "--rounds", "2"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_the_table_has_a_row_for_each_load_with_both_speeds_and_the_ratios_of_the_rounds(run, tmp_path):
    done = bench(run, "-o", tmp_path / "results" / "speed.csv")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "results" / "speed.csv")
    assert list(table["texts"]) == ["test.csv", "test.csv", "mixed lengths"] and list(table["padded to"]) == [
        256,
        512,
        512,
    ]
    assert (table["rows"] == 8).all() and table["tokens a row"].between(20, 500).all()
    ratios = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if ", ratio " in line]
    assert list(table["smallest"]) == [min(pair) for pair in zip(ratios[::2], ratios[1::2], strict=True)]


def test_a_run_that_the_plain_loop_cannot_predict_is_refused(runs):
    done = bench(runs / "one")
    assert done.returncode == 1 and "the plain loop is for regression" in done.stderr
