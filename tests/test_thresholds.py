"""Thresholds that make whole numbers of predictions: fitted, scored nested, and used in the submission."""

import itertools
import json
import math

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


def fit(target, prediction, levels=(1, 2, 3, 4)):
    return ku._Thresholds(levels).fit(target, prediction).points


def cut(points, prediction, levels=(1, 2, 3, 4)):
    return ku._Thresholds(levels, points).apply(prediction)


def cuts_of(target, metric="qwk", **settings):
    cfg = ku.Config(metric=metric, target_columns=[f"t{k}" for k in range(target.shape[1])], **settings)
    return ku._Cuts.of(cfg, target)


def test_kappa_is_that_of_scikit_learn():
    target, prediction, _ = simulated(80, 0)
    labels = np.rint(prediction)
    expected = sklearn.metrics.cohen_kappa_score(target.astype(int), labels.astype(int), weights="quadratic")
    assert ku._quadratic_kappa(target, labels) == pytest.approx(expected, abs=1e-12)
    assert ku.METRICS["qwk"](target[:, None], prediction[:, None]) == pytest.approx(expected, abs=1e-12)
    assert ku._quadratic_kappa(target, target) == 1


def test_targets_of_one_level_have_no_kappa_whatever_is_predicted():
    for labels in (np.ones(4), np.array([1.0, 2, 1, 2])):
        assert math.isnan(ku._quadratic_kappa(np.ones(4), labels))
    both = np.array([[1.0, 1], [2, 1], [3, 1]])
    assert ku.METRICS["qwk"](both, both) == 1


def test_kappa_of_evenly_spaced_levels_is_that_of_scikit_learn_and_of_others_weighs_their_distance():
    target, labels = np.array([1.0, 1.5, 2, 2.5, 4, 1]), np.array([1.0, 2, 2, 1, 3.5, 1.5])
    places = [(2 * values).astype(int) for values in (target, labels)]
    expected = sklearn.metrics.cohen_kappa_score(*places, labels=np.arange(2, 9), weights="quadratic")
    assert ku._quadratic_kappa(target, labels) == pytest.approx(expected, abs=1e-12)
    target, near, far = np.array([1.0, 2, 4, 4]), np.array([1.0, 1, 4, 4]), np.array([1.0, 2, 4, 2])
    assert ku._quadratic_kappa(target, near) > ku._quadratic_kappa(target, far)


@pytest.mark.parametrize(
    ("levels", "prediction", "nearest"),
    [([1, 1.5, 2], [1.2, 1.3, 9], [1, 1.5, 2]), ([1, 2, 4], [2.9, 3.1, -5], [2, 4, 1])],
)
def test_predictions_are_rounded_to_the_nearest_level_that_occurs(levels, prediction, nearest):
    target = np.array([*levels, levels[0]], float)
    cuts = cuts_of(target[:, None])
    assert cuts.levels == [levels]
    assert cuts.apply(cuts.halfway(), np.array(prediction)[:, None])[:, 0].tolist() == nearest
    # and so the metric does
    guesses = np.array([*prediction, prediction[0]])
    expected = ku._quadratic_kappa(target, np.array([*nearest, nearest[0]], float))
    assert ku.METRICS["qwk"](target[:, None], guesses[:, None]) == pytest.approx(expected)


def test_targets_of_many_values_are_no_grades():
    with pytest.raises(ku.DataError, match="metric qwk takes grades, at most 50 of them; t0 has 51 different values"):
        cuts_of(np.arange(51.0)[:, None])


def test_kappa_counts_a_level_that_no_row_has():
    target, labels = np.array([1.0, 2, 2, 5, 5, 1]), np.array([1.0, 2, 5, 5, 2, 2])
    expected = sklearn.metrics.cohen_kappa_score(
        target.astype(int), labels.astype(int), labels=np.arange(1, 6), weights="quadratic"
    )
    assert ku.METRICS["qwk"](target[:, None], labels[:, None]) == pytest.approx(expected, abs=1e-12)


def test_a_prediction_that_reaches_a_threshold_belongs_above_it():
    assert cut([1.5, 2.5], np.array([1.4999, 1.5, 2.4, 2.5, 9, -9]), (1, 2, 3)).tolist() == [1, 2, 2, 3, 3, 1]


def test_fitted_thresholds_are_about_as_good_as_the_best_of_a_fine_grid():
    target, prediction, _ = simulated(150, 1)
    thresholds = fit(target, prediction)
    assert len(thresholds) == 3 and (np.diff(thresholds) >= 0).all()
    grid = np.quantile(prediction, np.linspace(0.02, 0.98, 40))
    best = max(ku._quadratic_kappa(target, cut(points, prediction)) for points in itertools.combinations(grid, 3))
    got, rounded = (
        ku._quadratic_kappa(target, labels) for labels in (cut(thresholds, prediction), np.rint(prediction))
    )
    assert got > best - 0.005 and got > rounded + 0.05


def test_thresholds_without_predictions_between_them_stay_sorted():
    thresholds = fit(np.array([1.0, 1, 5, 5]), np.array([2.0, 2, 3, 3]), range(1, 6))
    assert (np.diff(thresholds) >= 0).all()
    assert cut(thresholds, np.array([2.0, 3]), range(1, 6)).tolist() == [1, 5]
    far = fit(np.array([1.0, 2, 3]), np.array([7.0, 8, 9]), (1, 2, 3))
    assert cut(far, np.array([7.0, 8, 9]), (1, 2, 3)).tolist() == [1, 2, 3]


def test_nested_thresholds_are_fitted_on_the_other_folds_and_flatter_less():
    gaps = []
    for seed in range(12):
        target, prediction, folds = simulated(120, seed)
        cuts = cuts_of(target[:, None])
        scores = cuts.describe(target[:, None], prediction[:, None], folds)
        labels = np.empty(120)
        for fold in range(5):
            points = fit(target[folds != fold], prediction[folds != fold])
            labels[folds == fold] = cut(points, prediction[folds == fold])
        whole = target.astype(int), labels.astype(int)
        assert scores["nested"] == pytest.approx(sklearn.metrics.cohen_kappa_score(*whole, weights="quadratic"))
        fresh, guesses, _ = simulated(5000, 1000 + seed)
        there = ku._quadratic_kappa(fresh, cut(fit(target, prediction), guesses))
        gaps.append((scores["fitted"] - there, scores["nested"] - there))
    fitted, nested = np.mean(gaps, 0)
    assert fitted > 0.015 and -0.03 < nested < 0.005


def test_thresholds_are_used_only_where_nested_they_beat_rounding():
    target, shrunk, folds = simulated(400, 1)
    cuts, target = cuts_of(target[:, None]), target[:, None]
    scores = cuts.describe(target, shrunk[:, None], folds)
    assert scores["nested"] > scores["rounded"] and scores["is_fitted"]
    assert scores["thresholds"] == cuts.fit(target, shrunk[:, None]) != cuts.halfway()
    noise = np.random.default_rng(0).normal(2.5, 1, (400, 1))
    for prediction, fold in ((target + 0.2, folds), (noise, folds), (shrunk[:, None], np.zeros(400, int))):
        scores = cuts.describe(target, prediction, fold)
        assert scores["thresholds"] == cuts.halfway() and not scores["is_fitted"]
    assert scores["nested"] is None  # with one fold


@pytest.fixture
def rare():
    """3 % positives of 1200 rows, probabilities that order them well and never reach a half, folds."""
    rng = np.random.default_rng(0)
    target = (np.arange(1200) % 33 == 0).astype(float)
    return target[:, None], (0.05 + 0.2 * target + 0.05 * rng.random(1200))[:, None], rng.permutation(1200) % 4


def test_labels_of_a_rare_class_are_cut_at_a_threshold_that_nested_beats_a_half(rare):
    target, prediction, folds = rare
    scores = cuts_of(target, "f1_macro", task="binary").describe(target, prediction, folds)
    assert scores["rounded"] == pytest.approx(0.4924, abs=1e-3) and scores["nested"] > 0.97
    assert scores["is_fitted"] and scores["levels"] == [[0, 1]] and 0.1 < scores["thresholds"][0][0] <= 0.26
    for metric in ("auc", "logloss"):
        assert cuts_of(target, metric, task="binary") is None


def test_labels_of_a_multilabel_task_share_a_threshold_and_lower_may_be_better(rare, own_metrics):
    target, prediction, folds = (np.hstack([part, part[::-1]]) if part.ndim == 2 else part for part in rare)

    @ku.metric("wrong", "lower", ("multilabel",), labels=True)
    def wrong(target, prediction):
        return (target != (prediction >= 0.5)).mean()

    scores = cuts_of(target, "wrong", task="multilabel").describe(target, prediction, folds)
    assert scores["rounded"] == pytest.approx(37 / 1200) and scores["nested"] < 0.005 and scores["is_fitted"]
    assert scores["thresholds"][0] == scores["thresholds"][1]


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
    assert scores["levels"] == [[1, 2, 3, 4]] and scores["is_fitted"] == (scores["nested"] > scores["last"])
    points = fit(target, prediction) if scores["is_fitted"] else [1.5, 2.5, 3.5]
    assert scores["thresholds"][0] == pytest.approx(points)
    assert scores["nested"] <= scores["fitted"] and scores["fitted"] >= scores["last"] == scores["rounded"]
    submission = pd.read_csv(graded / name / "submission.csv", dtype=str)
    assert set(submission["target"]) <= set("1234") and len(set(submission["target"])) > 1
    assert "qwk by thresholds: " in ku._summary(name, record)
    bundle = ku.Bundle.open(graded / name)
    test = pd.read_csv(graded / "competition" / "test.csv", dtype=str)
    expected = cut(scores["thresholds"][0], ku.predict_bundle(bundle, test)[:, 0])
    assert submission["target"].astype(int).tolist() == expected.tolist()


def test_corals_weights_come_back_and_its_rows_round_to_whole_levels(graded):
    bundle = ku.Bundle.open(graded / "coral")
    ku.check_golden(bundle)
    oof = pd.read_csv(graded / "coral" / "oof.csv")["prediction"]
    assert oof.between(1, 4).all() and oof.std() > 0.3


def test_runs_are_cut_at_the_mean_of_their_thresholds_and_must_have_the_same_levels(graded, capsys):
    runs = [ku._Run.load(graded / name) for name in ("squared", "coral")]
    predictions = np.linspace(1, 4, 31)[:, None]
    points = np.mean([run.record["oof"]["thresholds"][0] for run in runs], 0)
    bundle = ku.Bundle(graded, runs)
    got = bundle.to_levels(predictions)
    assert got[:, 0].tolist() == [1 + (points <= p).sum() for p in predictions[:, 0]]
    assert "levels 1 to 4, cut at" in capsys.readouterr().out
    other = json.loads(json.dumps(runs[1].record))
    other["oof"]["levels"] = [[0, 4]]
    with pytest.raises(ku.BundleError, match=r"thresholds between other levels: .*4.0\]\], \[\[0, 4\]\]"):
        ku.dataclasses.replace(bundle, runs=[runs[0], runs[1]._replace(record=other)]).to_levels(predictions)


def test_predictions_of_other_metrics_stay_as_they_are(runs):
    predictions = np.array([[1.2], [3.4]])
    assert ku.Bundle.open(runs / "one").to_levels(predictions) is predictions
