"""tools/table.py: finished runs as a table."""

import json
import sys

import pandas as pd
import pytest
import table


def write_record(folder, score, status="complete", metric="rmse"):
    folder.mkdir(parents=True)
    better = "lower" if metric == "rmse" else "higher"
    oof = {"metric": metric, "better": better, "last": score, "best": score - 0.01, "last_fold_sd": None, "rows": 20}
    record = {
        "status": status,
        "settings": {"head": folder.name, "seed": 3, "epochs": 2},
        "oof": oof,
        "folds": [{}],
        "rows": 40,
        "seconds": {"total": 12.4},
        "rows_per_second": 5.25,
        "peak_memory_bytes": 2**30,
        "device": "CPU",
        "threads": 2,
        "precision": "float32",
    }
    (folder / "record.json").write_text(json.dumps(record))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["table.py", *map(str, arguments)])
    table.main()


@pytest.mark.parametrize(("metric", "order"), [("rmse", ["good", "bad"]), ("auc", ["bad", "good"])])
def test_finished_runs_are_listed_best_first_on_screen_and_in_the_file(metric, order, tmp_path, monkeypatch, capsys):
    write_record(tmp_path / "bad", 0.9, metric=metric)
    write_record(tmp_path / "good", 0.4, metric=metric)
    write_record(tmp_path / "broken", 0.1, status="running", metric=metric)
    run(monkeypatch, tmp_path, "-o", tmp_path / "new" / "table.csv")
    frame = pd.read_csv(tmp_path / "new" / "table.csv")
    assert list(frame["run"]) == order and list(frame["seconds"]) == [12, 12]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["run", "---", *order]


def test_no_finished_run_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no complete run under"):
        run(monkeypatch, tmp_path)


def test_runs_with_different_metrics_are_not_put_into_one_table(tmp_path, monkeypatch):
    write_record(tmp_path / "a", 0.9)
    write_record(tmp_path / "b", 0.4, metric="auc")
    with pytest.raises(SystemExit, match="the runs have different metrics: auc, rmse"):
        run(monkeypatch, tmp_path)
