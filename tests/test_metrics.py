"""What stands beside a score, where a metric has no value, and metrics that read the rows."""

import json
import math
import warnings

import comparison
import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest

from conftest import make_texts, trained


def save(folder, n=40, **columns):
    """A competition of made texts with these columns of targets."""
    folder.mkdir()
    frame = pd.DataFrame({"id": [f"{i:03d}" for i in range(n)], "excerpt": make_texts(n)} | columns)
    frame.to_csv(folder / "train.csv", index=False)
    frame[["id", "excerpt"]].head(6).to_csv(folder / "test.csv", index=False)
    return folder


def run(tiny, folder, **settings):
    """(run folder, record) of a quick run; neither its record nor its log has NaN or Infinity."""
    cfg = tiny(data_dir=folder, **settings)
    train, _, _ = ku.read_competition(cfg)
    path = ku.RunFolder(ku.train(ku.make_folds(train, cfg), cfg))

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    for line in path.log.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    return path, json.loads(path.record.read_text(), parse_constant=refuse)


@pytest.mark.plots
def test_a_metric_without_a_value_on_a_fold_chooses_no_checkpoint_there_and_is_null(tiny, tmp_path, capsys):
    target = [0] * 20 + [1, 0] * 10
    folder = save(tmp_path / "data", target=target, fold=[0] * 20 + [1, 2] * 5 + [2, 1] * 5)
    path, record = run(tiny, folder, task="binary", keep="best", evals_per_epoch=2, epochs=2)
    first, *others = record["folds"]
    assert first["best"] == first["last"] == {"score": None, "step": first["steps"]}
    assert all(fold["best"]["score"] is not None for fold in others)
    assert record["oof"]["undefined_folds"] == [0]
    scores = [fold["last"]["score"] for fold in others]
    assert record["oof"]["last_fold_mean"] == pytest.approx(np.mean(scores))
    out = capsys.readouterr().out
    assert "auc has no value on this fold: its last weights are kept" in out
    assert "without a value and left out of mean and sd over folds: fold 0" in out
    assert ku._Run.load(path.path).record["oof"]["last"] is not None


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_with_a_constant_has_no_value_and_no_warning(name):
    score, numbers = ku.METRICS[name], np.arange(6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(score(numbers[:, None], np.ones((6, 1)))) and math.isnan(
            score(np.ones((6, 1)), numbers[:, None])
        )
        both = np.stack([numbers, np.ones(6)], axis=1)
        assert score(both, np.stack([numbers, numbers], axis=1)) == pytest.approx(1)


def test_columns_without_a_value_are_left_out_and_named(tiny, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = save(tmp_path / "data", a=rng.normal(size=40), b=[1.0] * 40, c=rng.normal(size=40))
    _, record = run(tiny, folder, target_columns="a,b,c", metric="spearman", n_folds=2, lr=1e-2)
    scores = record["oof"]["by_output"]["scores"]
    assert scores["b"] is None and record["oof"]["last"] == pytest.approx((scores["a"] + scores["c"]) / 2)
    out = capsys.readouterr().out
    assert "without a value on this fold and left out: b" in out and "without a value and left out: b" in out


def data_of(targets, folds=None):
    n_outputs = targets.max() + 1 if targets.ndim == 1 else targets.shape[1]
    folds = np.zeros(len(targets), int) if folds is None else folds
    return ku._TrainingData(None, targets, folds, None, None, n_outputs, np.arange(len(targets)))


RNG = np.random.default_rng(0)
SKEWED = RNG.exponential(size=(50, 1))
RARE = (RNG.random((50, 3)) < 0.1).astype(float)
GRADES = np.repeat([0, 1, 2], [10, 25, 15])


@pytest.mark.parametrize(
    ("metric", "targets", "expected"),
    [
        ("rmse", SKEWED, SKEWED.std()),
        ("mae", SKEWED, abs(SKEWED - np.median(SKEWED)).mean()),
        ("accuracy", GRADES, 0.5),
        ("f1_macro", GRADES, 2 * 25 / (25 + 50) / 3),
        ("logloss", GRADES, -sum(p * math.log(p) for p in (0.2, 0.5, 0.3))),
        ("map3", GRADES, 0.5 + 0.3 / 2 + 0.2 / 3),
        ("auc", RARE, 0.5),
        ("accuracy", RARE, 1 - RARE.mean()),
        ("f1_macro", RARE, np.mean([2 * p / (1 + p) for p in RARE.mean(0)])),  # all labels for all
        ("qwk", np.rint(3 * SKEWED), 0.0),
        ("spearman", SKEWED, math.nan),
    ],
)
def test_the_chance_level_is_the_score_of_the_best_constant(metric, targets, expected):
    rows = np.arange(50)
    assert data_of(targets).chance(metric, rows, rows) == pytest.approx(expected, nan_ok=True)


def test_the_constant_of_a_fold_comes_from_its_training_rows():
    targets, folds = np.array([[0.0], [0], [6], [6]]), np.array([0, 0, 1, 1])
    assert data_of(targets, folds).chance("rmse", np.array([0, 1]), np.array([2, 3])) == 6


def test_scores_stand_beside_that_of_a_constant_and_further_metrics_are_shown(tiny, competition, capsys):
    path, record = run(tiny, competition, metrics="mae,spearman")
    oof, table = record["oof"], pd.read_csv(path.oof)
    error = table["target"] - table["prediction"]
    assert oof["chance"] == pytest.approx(table["target"].std(ddof=0)) and oof["metrics"]["spearman"]["chance"] is None
    assert oof["metrics"]["mae"]["score"] == pytest.approx(error.abs().mean())
    out = capsys.readouterr().out
    assert f"last: rmse {oof['last']:.4f} (constant: {oof['chance']:.4f})" in out
    assert f"  mae {oof['metrics']['mae']['score']:.4f} (constant: " in out
    bundle = ku.load_bundle(path.path)
    assert bundle.cfg.metrics == []


def test_scores_of_classes_are_recorded_and_the_worst_are_printed_first(tiny, tmp_path, capsys):
    labels = [f"c{i % 10}" for i in range(60)]
    path, record = run(tiny, save(tmp_path / "data", 60, target=labels), task="multiclass")
    table = pd.read_csv(path.oof)
    guess = table[[f"prediction_c{k}" for k in range(10)]].to_numpy().argmax(1)
    truth = table["target"].str[1:].astype(int).to_numpy()
    for k in range(10):
        n_right, n_all = ((guess == k) & (truth == k)).sum(), (guess == k).sum() + (truth == k).sum()
        assert record["oof"]["by_output"]["scores"][f"c{k}"] == pytest.approx(2 * n_right / n_all)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "F1 of each, the worst first" in line]
    scores = [float(part.split()[-1]) for part in line.split("first: ")[1].split(";")[0].split(", ")]
    assert scores == sorted(scores) and len(scores) == 8 and line.endswith("2 more are in the record")


@pytest.mark.parametrize(
    ("head_lr", "said"), [(0.0, "all predictions are the same"), (1e-9, "no better than a constant")]
)
def test_a_fold_that_learns_nothing_says_so_in_its_first_line(head_lr, said, tiny, competition, monkeypatch, capsys):
    if not head_lr:
        monkeypatch.setattr(ku.OptimizerStep, "predict", lambda self, rows, precision="": np.full((len(rows), 1), 0.5))
    run(tiny, competition, head_lr=head_lr, lr=1e-9)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fold ") and " last, " in line]
    assert len(lines) == 2 and all(said in line for line in lines)


def test_a_metric_may_take_the_rows_that_it_scores(tiny, tmp_path, own_metrics, forked_module):
    @ku.metric("by_writer", "higher", ("regression",), takes=("frame",))
    def by_writer(target, prediction, frame):
        table = pd.DataFrame({"writer": frame["writer"].to_numpy(), "t": target[:, 0], "p": prediction[:, 0]})
        assert (frame["target"].to_numpy() == target[:, 0]).all()
        return table.groupby("writer")[["t", "p"]].apply(lambda g: g["t"].corr(g["p"], method="spearman")).mean()

    rng = np.random.default_rng(0)
    folder = save(tmp_path / "data", target=rng.normal(size=40), writer=[f"w{i % 4}" for i in range(40)])
    settings = dict(metric="by_writer", metrics="by_writer,mae", lr=1e-2)
    path, record = run(tiny, folder, **settings, run_name="one")
    table = pd.read_csv(path.oof)
    writers = pd.read_csv(folder / "train.csv")["writer"].to_numpy()
    groups = [table[writers == writer] for writer in sorted(set(writers))]
    expected = np.mean([g["target"].corr(g["prediction"], method="spearman") for g in groups])
    assert record["oof"]["last"] == pytest.approx(expected) == record["oof"]["metrics"]["by_writer"]["score"]
    _, other = run(tiny, folder, **settings, run_name="two", head="cls")
    assert other["oof"]["by_output"]["metric"] == "rmse"
    with pytest.raises(
        ku.KitError, match=r"metric .*by_writer takes frame, which only a training has: runs that it scores"
    ):
        comparison.align_runs(comparison.read_records(tmp_path / "runs"))


def test_processes_side_by_side_have_the_rows_of_the_frame(tmp_path):
    frame = pd.DataFrame({"writer": ["b", "a"], "n": [1.0, 2.0]})
    tokens = ku.Tokens([np.array([1, 2]), np.array([3])], None, 0)
    tokenizer = ["a", "b"]
    data = ku._TrainingData(tokens, np.ones((2, 1)), np.array([0, 1]), tmp_path, tokenizer, 1, np.array(["x", "y"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ku, "_is_cls_last", lambda tokenizer: False)
        for own in (None, frame):
            data._replace(frame=own).save(tmp_path)
            got = ku._TrainingData.load(tmp_path, tokenizer).frame
            assert got is None if own is None else got.equals(frame)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(better="up"), "metric gap: better must be lower or higher, got 'up'"),
        (dict(better="lower", takes=("rows",)), "takes must be a tuple of frame"),
        (dict(better="lower", takes="frame"), "takes must be a tuple of frame"),
    ],
)
def test_a_metric_with_arguments_that_there_are_not_is_refused_when_it_is_registered(arguments, words, own_metrics):
    with pytest.raises(ku.ConfigError, match=words):
        ku.metric("gap", tasks=("regression",), **arguments)(lambda target, prediction: 0.0)
    assert "gap" not in ku.METRICS


# ---------------------------------------------------------------------------------------
# The order of classes


def labels_of(labels, **settings):
    return ku.Config(**settings).class_labels(pd.DataFrame({"target": labels}))


def test_classes_stand_in_class_order_and_the_positive_label_last():
    words = ["high", "low", "mid", "low"]
    assert labels_of(words, task="multiclass", class_order="low,mid,high", metric="qwk") == ["low", "mid", "high"]
    assert labels_of(["10", "2.5", "1"], task="multiclass", metric="qwk") == ["1", "2.5", "10"]
    assert labels_of(["cat", "not cat"], task="binary", positive_label="cat") == ["not cat", "cat"]
    assert labels_of(["1", "0"], task="binary", positive_label="0") == ["1", "0"]
    assert labels_of(["1", "0"], task="binary") == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        ("low mid high", dict(metric="qwk"), "metric qwk needs an order of the labels high, low, mid: set class_order"),
        ("low mid high", dict(metrics="qwk"), "metric qwk needs an order"),
        ("low mid high", dict(class_order="low,high"), "in one of them only: mid"),
        ("low mid", dict(class_order="low,mid,high"), "in one of them only: high"),
        ("yes no", dict(task="binary", positive_label="Yes"), "positive_label 'Yes' .did you mean yes.., got no, yes"),
    ],
)
def test_labels_that_do_not_fit_the_settings_are_named(labels, settings, words):
    with pytest.raises(ku.DataError, match=words):
        labels_of(labels.split(), **(dict(task="multiclass") | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(metrics="rmse,mea"), "metrics must be among .*; got 'mea' .did you mean mae"),
        (dict(metrics="auc"), "metrics: auc is for binary, multiclass, multilabel; task is regression"),
        (dict(class_order="a,b"), "class_order is for task multiclass"),
        (dict(task="multiclass", class_order="a,b,a"), "class_order has a label twice: a, b, a"),
        (dict(positive_label="a"), "positive_label is for task binary"),
        (dict(submission_form="labels"), "submission_form is for labels and their probabilities"),
    ],
)
def test_settings_of_labels_that_do_not_fit_the_task_are_refused(settings, words):
    with pytest.raises(ku.ConfigError, match=words):
        ku.Config(**settings)


def test_names_with_a_dollar_are_drawn_as_they_are(tmp_path):
    figure = ku._new_figure(3, 3)
    axis = figure.subplots()
    axis.set_xticks([0, 1], ["$5 to $9", "$x^$"])
    axis.plot([0, 1], [0, 1], label="$^$")
    axis.legend()
    figure.suptitle("a $\\frac name$")
    ku._save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------
# Kaggle


def test_on_kaggle_the_submission_lies_in_the_working_folder_too(tiny, competition, tmp_path, monkeypatch, capsys):
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    (tmp_path / "kaggle" / "working").mkdir()
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path / "kaggle"))
    folder = trained(tiny())
    copy = tmp_path / "kaggle" / "working" / "submission.csv"
    assert copy.read_bytes() == ku.RunFolder(folder).submission.read_bytes()
    assert f"wrote {copy}, where Kaggle looks for it" in capsys.readouterr().out
