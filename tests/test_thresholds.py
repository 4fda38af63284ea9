"""Thresholds that make whole numbers of predictions: fitted, scored nested, and used in the submission."""

import itertools
import json

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from conftest import train_frame, trained


def simulated(n, seed, low=1, high=4):
    """Whole targets, predictions that are shrunk to their mean, and folds."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=n)
    target = np.clip(np.rint(2.2 + 0.9 * quality), low, high)
    return target, 2.0 + 0.4 * (quality + 0.5 * rng.normal(size=n)), rng.permutation(n) % 5


def test_kappa_is_that_of_scikit_learn():
    target, prediction, _ = simulated(80, 0)
    labels = np.rint(prediction)
    expected = sklearn.metrics.cohen_kappa_score(target.astype(int), labels.astype(int), weights="quadratic")
    assert ku._quadratic_kappa(target, labels) == pytest.approx(expected, abs=1e-12)
    assert ku.METRICS["qwk"](target[:, None], prediction[:, None]) == pytest.approx(expected, abs=1e-12)
    assert ku._quadratic_kappa(target, target) == 1 and ku._quadratic_kappa(np.ones(4), np.ones(4)) == 0


def test_kappa_counts_a_level_that_no_row_has():
    target, labels = np.array([1.0, 2, 2, 5, 5, 1]), np.array([1.0, 2, 5, 5, 2, 2])
    expected = sklearn.metrics.cohen_kappa_score(
        target.astype(int), labels.astype(int), labels=np.arange(1, 6), weights="quadratic"
    )
    assert ku.METRICS["qwk"](target[:, None], labels[:, None]) == pytest.approx(expected, abs=1e-12)


def test_a_prediction_that_reaches_a_threshold_belongs_above_it():
    assert ku._apply_thresholds([1.5, 2.5], np.array([1.4999, 1.5, 2.4, 2.5, 9, -9]), 1).tolist() == [1, 2, 2, 3, 3, 1]


def test_fitted_thresholds_are_about_as_good_as_the_best_of_a_fine_grid():
    target, prediction, _ = simulated(150, 1)
    thresholds = ku._fit_thresholds(target, prediction, (1, 4))
    assert len(thresholds) == 3 and (np.diff(thresholds) >= 0).all()
    grid = np.quantile(prediction, np.linspace(0.02, 0.98, 40))
    best = max(
        ku._quadratic_kappa(target, ku._apply_thresholds(points, prediction, 1))
        for points in itertools.combinations(grid, 3)
    )
    got, rounded = (
        ku._quadratic_kappa(target, labels)
        for labels in (ku._apply_thresholds(thresholds, prediction, 1), np.rint(prediction))
    )
    assert got > best - 0.005 and got > rounded + 0.05


def test_thresholds_without_predictions_between_them_stay_sorted():
    thresholds = ku._fit_thresholds(np.array([1.0, 1, 5, 5]), np.array([2.0, 2, 3, 3]), (1, 5))
    assert (np.diff(thresholds) >= 0).all()
    assert ku._apply_thresholds(thresholds, np.array([2.0, 3]), 1).tolist() == [1, 5]
    far = ku._fit_thresholds(np.array([1.0, 2, 3]), np.array([7.0, 8, 9]), (1, 3))
    assert ku._apply_thresholds(far, np.array([7.0, 8, 9]), 1).tolist() == [1, 2, 3]


def test_nested_thresholds_are_fitted_on_the_other_folds_and_flatter_less():
    gaps = []
    for seed in range(12):
        target, prediction, folds = simulated(120, seed)
        scores = ku._threshold_scores(target[:, None], prediction[:, None], folds)
        labels = np.empty(120)
        for fold in range(5):
            points = ku._fit_thresholds(target[folds != fold], prediction[folds != fold], (1, 4))
            labels[folds == fold] = ku._apply_thresholds(points, prediction[folds == fold], 1)
        whole = target.astype(int), labels.astype(int)
        assert scores["nested"] == pytest.approx(sklearn.metrics.cohen_kappa_score(*whole, weights="quadratic"))
        fresh, guesses, _ = simulated(5000, 1000 + seed)
        there = ku._quadratic_kappa(fresh, ku._apply_thresholds(scores["thresholds"][0], guesses, 1))
        gaps.append((scores["fitted"] - there, scores["nested"] - there))
    fitted, nested = np.mean(gaps, 0)
    assert fitted > 0.015 and -0.03 < nested < 0.005


def test_with_one_fold_there_is_no_nested_score():
    target, prediction, _ = simulated(50, 0)
    assert ku._threshold_scores(target[:, None], prediction[:, None], np.zeros(50, int))["nested"] is None


@pytest.fixture(scope="module")
def graded(tmp_path_factory, backbone_folder):
    """Folder of two runs on whole targets from 1 to 4, one with coral and one with squared error."""
    folder = tmp_path_factory.mktemp("graded")
    (folder / "competition").mkdir()
    frame = train_frame(60).assign(target=lambda t: np.ceil(4 * t["target"].rank(pct=True)).astype(int))
    frame.to_csv(folder / "competition" / "train.csv", index=False)
    frame[["id", "excerpt"]].head(12).to_csv(folder / "competition" / "test.csv", index=False)
    frame[["id"]].head(12).assign(target=0).to_csv(folder / "competition" / "sample_submission.csv", index=False)
    base = dict(data_dir=folder / "competition", backbone=backbone_folder("tiny"), output_dir=folder, metric="qwk")
    base |= dict(n_folds=3, epochs=6, batch_size=8, max_length=32, lr=1e-2, error_column="")
    for name, more in (("squared", {}), ("coral", dict(loss="coral", levels=(1, 4)))):
        trained(ku.Config.from_dict(base | more | dict(run_name=name)))
    return folder


@pytest.mark.parametrize("name", ["squared", "coral"])
def test_the_record_has_thresholds_and_both_scores_and_the_submission_their_levels(name, graded, capsys):
    record = ku.RunFolder(graded / name).read_record()
    scores, oof = record["oof"], pd.read_csv(graded / name / "oof.csv")
    target, prediction = oof["target"].to_numpy(float), oof["prediction"].to_numpy()
    assert scores["levels"] == [[1, 4]] and len(scores["thresholds"][0]) == 3
    assert scores["thresholds"][0] == pytest.approx(ku._fit_thresholds(target, prediction, (1, 4)))
    assert scores["nested"] <= scores["fitted"] and scores["fitted"] >= scores["last"]
    submission = pd.read_csv(graded / name / "submission.csv", dtype=str)
    assert set(submission["target"]) <= set("1234") and len(set(submission["target"])) > 1
    assert "qwk with thresholds fitted on other folds" in ku._summary(name, record)
    bundle = ku._open_bundle(graded / name)
    test = pd.read_csv(graded / "competition" / "test.csv", dtype=str)
    expected = ku._apply_thresholds(scores["thresholds"][0], ku.predict_bundle(bundle, test)[:, 0], 1)
    assert submission["target"].astype(int).tolist() == expected.tolist()


def test_corals_weights_come_back_and_its_rows_round_to_whole_levels(graded):
    bundle = ku._open_bundle(graded / "coral")
    ku.check_golden(bundle)
    oof = pd.read_csv(graded / "coral" / "oof.csv")["prediction"]
    assert oof.between(1, 4).all() and oof.std() > 0.3


def test_runs_are_cut_at_the_mean_of_their_thresholds_and_must_have_the_same_levels(graded, capsys):
    runs = [ku._load_run(graded / name) for name in ("squared", "coral")]
    predictions = np.linspace(1, 4, 31)[:, None]
    points = np.mean([run.record["oof"]["thresholds"][0] for run in runs], 0)
    bundle = ku.Bundle(graded, runs, {})
    got = ku._to_levels(predictions, bundle)
    assert got[:, 0].tolist() == [1 + (points <= p).sum() for p in predictions[:, 0]]
    assert "levels 1 to 4, cut at" in capsys.readouterr().out
    other = json.loads(json.dumps(runs[1].record))
    other["oof"]["levels"] = [[0, 4]]
    with pytest.raises(ku.BundleError, match=r"thresholds between other levels: \[\[1, 4\]\], \[\[0, 4\]\]"):
        ku._to_levels(predictions, bundle._replace(runs=[runs[0], runs[1]._replace(record=other)]))


def test_predictions_of_other_metrics_stay_as_they_are(runs):
    predictions = np.array([[1.2], [3.4]])
    assert ku._to_levels(predictions, ku._open_bundle(runs / "one")) is predictions
