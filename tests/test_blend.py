"""Blending runs: how weights are fitted, what they are scored by, and that inference blends by them and no others."""

import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import blending
import bundle
import comparison
import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import sklearn.metrics

from conftest import papermill, printed, train_frame, trained

NAMES = ["--id", "me/blended", "--title", "Blended bundle"]


def simulated(n_rows=200, spreads=(0.5, 0.6, 0.9), n_outputs=1, seed=0):
    """Targets (N, K) and predictions (M, N, K) with a shared error and one of their own of the spreads given."""
    rng = np.random.default_rng(seed)
    target = 1 + rng.normal(size=(n_rows, n_outputs))
    shared = 0.4 * rng.normal(size=target.shape)
    own = [target + shared + spread * rng.normal(size=target.shape) for spread in spreads]
    return target, np.stack(own)


def make_members(target, predictions, metric="rmse", task="regression", folds=None):
    """`BlendInputs` of simulated predictions, 5 folds unless given, with records that tell the checkpoint."""
    n, records = len(target), {f"run{i}": {"settings": {"keep": "last"}} for i in range(len(predictions))}
    folds = np.arange(n) % 5 if folds is None else folds
    cuts = None if target.ndim == 1 else ku._Cuts.of(ku.Config(task=task, metric=metric), target)
    return blending.BlendInputs(task, metric, records, folds, np.arange(n), target, predictions, cuts)


def rmse_of(weights, intercept, predictions, target):
    return np.sqrt(((np.einsum("m,mnk->nk", weights, predictions) + intercept - target) ** 2).mean())


# ---------------------------------------------------------------------------------------
# The methods


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_nnls_finds_the_least_squares_of_all_weights_that_are_not_negative(n_outputs):
    target, predictions = simulated(n_outputs=n_outputs)
    misled = np.random.default_rng(1).normal(size=target.shape) - target  # only a negative weight could use it
    predictions = np.concatenate([predictions, misled[None]])
    weights, intercept = blending.BLENDS["nnls"](predictions, target, "rmse")
    assert (weights >= 0).all() and weights[3] == 0 and np.shape(intercept) == (n_outputs,)

    def loss(free):
        return rmse_of(free[:4], free[4:], predictions, target) ** 2

    start, bounds = np.full(4 + n_outputs, 0.25), [(0, None)] * 4 + [(None, None)] * n_outputs
    found = scipy.optimize.minimize(loss, start, bounds=bounds, options=dict(ftol=1e-15, gtol=1e-10)).x
    assert weights == pytest.approx(found[:4], abs=1e-4) and intercept == pytest.approx(found[4:], abs=1e-4)


def test_hill_climbing_adds_the_member_that_makes_the_mean_best_and_keeps_the_best_round():
    target, predictions = simulated(n_rows=60)
    chosen, rounds = [], []
    for _ in range(blending._HILL_ROUNDS):
        trials = [predictions[[*chosen, i]].mean(0) for i in range(3)]
        errors = [np.abs(trial - target).mean() for trial in trials]
        chosen.append(int(np.argmin(errors)))
        rounds.append(min(errors))
    kept = chosen[: int(np.argmin(rounds)) + 1]
    weights, intercept = blending.BLENDS["hill"](predictions, target, "mae")
    assert weights == pytest.approx(np.bincount(kept, minlength=3) / len(kept)) and intercept == 0


def test_hill_climbing_takes_the_highest_of_a_metric_that_is_better_higher():
    target, predictions = simulated()
    weights, _ = blending.BLENDS["hill"](np.stack([predictions[2], -target, predictions[0]]), target, "pearson")
    assert weights[1] == 0 and weights[2] > weights[0] and weights.sum() == pytest.approx(1)


def test_ridge_is_that_of_the_normal_equations_with_the_penalty_of_the_least_leave_one_out_error():
    target, predictions = simulated(n_rows=40)
    scale = target.std()
    x = (predictions[:, :, 0] - predictions[:, :, 0].mean(1, keepdims=True)).T / scale
    rest = (target[:, 0] - target.mean()) / scale - x.mean(1)

    def solved(rows, alpha):
        return np.linalg.solve(x[rows].T @ x[rows] + alpha * np.eye(3), x[rows].T @ rest[rows])

    every = np.arange(40)
    left_out = [
        sum((rest[i] - x[i] @ solved(every[every != i], alpha)) ** 2 for i in every) for alpha in blending._RIDGE_ALPHAS
    ]
    expected = 1 / 3 + solved(every, blending._RIDGE_ALPHAS[int(np.argmin(left_out))])
    weights, intercept = blending.BLENDS["ridge"](predictions, target, "rmse")
    assert weights == pytest.approx(expected, abs=1e-9)
    assert np.einsum("m,mnk->nk", weights, predictions).mean() + intercept == pytest.approx(target.mean())


def test_best_is_the_single_member_with_the_best_score_and_mean_counts_all_alike():
    target, predictions = simulated()
    assert blending.BLENDS["best"](predictions[::-1], target, "rmse")[0].tolist() == [0, 0, 1]
    assert blending.BLENDS["mean"](predictions, target, "rmse")[0] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("method", blending.BLENDS)
def test_weights_do_not_depend_on_the_units_of_the_target(method):
    target, predictions = simulated()
    weights, intercept = blending.BLENDS[method](predictions, target, "rmse")
    moved, shift = blending.BLENDS[method](1000 * predictions, 1000 * target, "rmse")
    assert moved == pytest.approx(weights) and shift == pytest.approx(1000 * intercept)


# ---------------------------------------------------------------------------------------
# The scores


@pytest.mark.parametrize("method", blending.BLENDS)
def test_a_fold_is_blended_with_weights_that_do_not_know_its_targets(method):
    target, predictions = simulated()
    members = make_members(target, predictions)
    nested = blending._fit_blend(members, method).predictions
    for fold in (0, 3):
        own = members.folds == fold
        moved = np.where(own[:, None], target[::-1] * 5, target)
        assert np.array_equal(blending._fit_blend(members._replace(target=moved), method).predictions[own], nested[own])
        weights, intercept = blending.BLENDS[method](predictions[:, ~own], target[~own], "rmse")
        assert nested[own] == pytest.approx(np.einsum("m,mnk->nk", weights, predictions[:, own]) + intercept)


@pytest.mark.parametrize("method", ["nnls", "hill", "ridge"])
def test_with_many_members_and_few_rows_the_nested_score_does_not_flatter_and_the_in_sample_score_does(method):
    gaps = []
    for seed in range(12):
        target, predictions = simulated(n_rows=2060, spreads=[1.0] * 20, seed=seed)
        blended = blending._fit_blend(make_members(target[:60], predictions[:, :60]), method)
        fresh = rmse_of(blended.weights, blended.intercept, predictions[:, 60:], target[60:])
        gaps.append((blended.in_sample - fresh, blended.nested - fresh))
    in_sample, nested = np.mean(gaps, axis=0)
    assert in_sample < -0.02 and nested > -0.01


def test_blending_what_errs_apart_is_told_from_the_best_member_and_what_errs_alike_is_not():
    for spreads, differs in (((0.5, 0.5, 0.5), True), ((0.05, 0.4, 0.4), False)):
        target, predictions = simulated(n_rows=600, spreads=spreads)
        members = make_members(target, predictions)
        table = blending.compare_blends(members, blending.fit_blends(members))
        low, high = table.loc["mean", ["low", "high"]]
        assert (high < 0) == differs and low < table.loc["mean", "difference"] < high
        assert table.loc["best", ["difference", "low", "high"]].tolist() == [0, 0, 0]
        assert table.loc["mean", "nested"] == pytest.approx(rmse_of(np.full(3, 1 / 3), 0, predictions, target))


def test_auto_takes_the_best_nested_score_and_a_method_by_name_comes_first():
    target, predictions = simulated()
    blends = blending.fit_blends(make_members(target, predictions))
    assert blends[0].nested == min(blended.nested for blended in blends)
    assert sorted(blended.method for blended in blends) == sorted(blending.BLENDS)
    assert blending.fit_blends(make_members(target, predictions), "best")[0].method == "best"


def test_probabilities_are_blended_by_shares_alone():
    rng = np.random.default_rng(0)
    target, raw = rng.integers(3, size=90), rng.dirichlet(np.ones(3), size=(2, 90))
    members = make_members(target, raw, "logloss", "multiclass")
    for blended in blending.fit_blends(members):
        assert blended.method in blending._CLASS_BLENDS and blended.predictions.sum(1) == pytest.approx(1)
    with pytest.raises(ku.ConfigError, match=r"method nnls is for regression; for task multiclass .* mean, best, hill"):
        blending.fit_blends(members, "nnls")


def test_the_errors_of_a_multiclass_task_are_those_of_zeros_and_ones():
    members = make_members(np.array([1, 0]), np.array([[[0.2, 0.8], [0.6, 0.4]]]), "logloss", "multiclass")
    assert blending._residuals(members) == pytest.approx(np.array([[-0.2, 0.2, 0.4, -0.4]]))


# ---------------------------------------------------------------------------------------
# Members


@pytest.fixture
def copies(runs, tmp_path):
    """Copies of the runs `one` and `two` that may be spoilt, in a folder of their own."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def members_of(folder, runs=""):
    return blending.align_members(comparison.read_records(folder), runs)


def test_members_are_runs_with_what_they_predicted_out_of_fold_in_the_order_of_rows(runs):
    members = members_of(runs)
    tables = [pd.read_csv(runs / name / "oof.csv", dtype={"id": str}).set_index("id") for name in members.records]
    expected = [table["prediction"].loc[tables[0].index] for table in tables]
    assert list(members.records) == ["one", "two"] and members.predictions.shape == (2, 40, 1)
    assert members.predictions[:, :, 0] == pytest.approx(np.array(expected))
    assert list(members_of(runs, "two, one").records) == ["two", "one"]


def test_names_that_are_none_and_a_run_alone_are_refused(runs):
    with pytest.raises(ku.ConfigError, match=r"runs: no finished run is called 'tow' \(did you mean two\?\)"):
        members_of(runs, "one,tow")
    with pytest.raises(comparison.ComparisonError, match="run two is alone"):
        members_of(runs, "two")


def test_two_runs_of_one_name_are_refused_if_they_are_asked_for(copies):
    shutil.copytree(copies / "one", copies / "more" / "one")
    shutil.copytree(copies / "two", copies / "three")
    assert list(members_of(copies, "two,three").records) == ["two", "three"]
    with pytest.raises(comparison.ComparisonError, match=r"one name, and a bundle needs two: .*one, .*one; rename one"):
        members_of(copies)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.assign(fold=1 - table["fold"].astype(int)), "another fold than one in 40 rows"),
        (lambda table: table.assign(target="0.5"), "another target than one in 39 rows"),
        (lambda table: table.iloc[1:], "39 rows, folds 0, 1, one 40 rows.*1 rows such as id '.*' are in one only"),
        (lambda table: table.assign(prediction="0"), r"oof\.csv has a rmse of .*, record\.json of"),
    ],
    ids=["fold", "target", "row", "prediction"],
)
def test_a_run_of_other_rows_folds_targets_or_scores_is_refused_by_name(change, message, copies):
    path = copies / "two" / "oof.csv"
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)
    with pytest.raises(comparison.ComparisonError, match=message) as caught:
        members_of(copies)
    assert "two" in str(caught.value)


def test_a_run_that_kept_groups_together_and_does_not_say_which_is_refused(copies):
    path = copies / "two" / "record.json"
    record = json.loads(path.read_text())
    record["settings"]["fold_kind"] = "group"
    path.write_text(json.dumps(record))
    with pytest.raises(
        comparison.ComparisonError, match=r"two kept groups in one fold, and its oof\.csv does not say which"
    ):
        members_of(copies)


def test_members_that_kept_their_best_checkpoint_are_named_as_flattered(copies, capsys):
    path = copies / "two" / "record.json"
    record = json.loads(path.read_text())
    record["settings"]["keep"] = "best"  # of one evaluation, which is the last too
    path.write_text(json.dumps(record))
    members = members_of(copies)
    assert "flattered, since they kept the checkpoint that is best on these rows: two\n" in capsys.readouterr().out
    assert blending.member_scores(members, []).loc["two", "checkpoint"] == "best"


def test_of_other_metrics_nothing_is_blended(copies):
    path = copies / "two" / "record.json"
    record = json.loads(path.read_text())
    record["oof"]["metric"] = "mae"
    path.write_text(json.dumps(record))
    with pytest.raises(comparison.ComparisonError, match="two has metric mae, one rmse"):
        members_of(copies)


# ---------------------------------------------------------------------------------------
# From weights to a submission


def blend_of(runs, folder, method="nnls", **replaced):
    members = members_of(runs)
    folder.mkdir(parents=True, exist_ok=True)
    return blending.write_blend(members, blending.fit_blends(members, method)[0]._replace(**replaced), folder)


def bundle_tool(*arguments):
    """What tools/bundle.py exits with: None, or a message."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["bundle.py", *map(str, arguments)])
        bundle.main()
        sys.exit()
    return end.value.code


def test_a_bundle_predicts_the_weighted_sum_of_its_runs_whatever_they_are_called_and_the_intercept(
    runs, copies, tmp_path, capsys, forked_module
):
    names = ("head=conv1d+seed=0", "Head=conv1d+seed=0 (2)")
    for old, new in zip(("one", "two"), names, strict=True):
        (copies / old).rename(copies / new)
    first, second = (copies / name for name in names)
    content = blend_of(copies, tmp_path / "blend", weights=np.array([0.5, 0.75]), intercept=np.array([0.125]))
    assert content["members"][names[0]]["weight"] == 0.75 and content["rows"] == 40
    blend, target = tmp_path / "blend" / "blend.json", tmp_path / "dist"
    command = capsys.readouterr().out.partition("pack it: python ")[2].partition("-o DIR")[0]
    assert bundle_tool(*shlex.split(command)[1:], "-o", target, *NAMES) is None
    assert (target / "blend.json").read_bytes() == blend.read_bytes()
    assert all(re.fullmatch(r"(head|Head)-[\w.-]+|[a-z_-]+\.(json|py)", path.name) for path in target.iterdir())
    test = pd.read_csv(runs.parent / "competition" / "test.csv", dtype=str)
    alone = [ku.predict_bundle(ku.Bundle.open(folder), test) for folder in (first, second)]
    bundled = ku.load_bundle(target)
    assert f"0.75 {names[0]}" in capsys.readouterr().out
    got = ku.predict_bundle(bundled, test)
    assert got == pytest.approx(0.75 * alone[0] + 0.5 * alone[1] + 0.125, abs=1e-6)
    assert not bundle_tool("--check", target)
    shared = ku.predict_bundle(bundled, test, processes=2)
    assert shared == pytest.approx(got, abs=1e-6)
    assert bundle_tool(first, second, "-o", tmp_path / "mean", *NAMES) is None
    mean = ku.predict_bundle(ku.Bundle.open(tmp_path / "mean"), test)
    assert mean == pytest.approx((alone[0] + alone[1]) / 2, abs=1e-6)


def test_weights_are_refused_for_other_runs_than_they_were_fitted_on(copies, tmp_path):
    blend_of(copies, tmp_path / "blend", weights=np.array([0.75, 0.5]), intercept=np.array([0.0]))
    path = tmp_path / "blend" / "blend.json"
    records = {name: copies / name / "record.json" for name in ("one", "two")}
    assert ku._Blend.read(path, records).weights == {"one": 0.75, "two": 0.5}
    with pytest.raises(ku.BundleError, match="run two is missing"):
        ku._Blend.read(path, {"one": records["one"]})
    with pytest.raises(ku.BundleError, match="run three is none of its members, one, two"):
        ku._Blend.read(path, records | {"three": records["one"]})
    record = json.loads(records["two"].read_text())
    records["two"].write_text(json.dumps(record))  # another layout, as after another training
    with pytest.raises(ku.BundleError, match=r"run two is another one: SHA-256 of its record\.json, expected"):
        ku._Blend.read(path, records)
    error = bundle_tool(copies / "one", copies / "two", "--blend", path, "-o", tmp_path / "dist", *NAMES)
    assert "run two is another one" in error and not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("members"),
        lambda content: content["members"]["one"].update(weight=[1]),
        lambda content: content["members"]["one"].update(weight=True),
        lambda content: content["members"]["one"].update(weight=float("nan")),
        lambda content: content.update(intercept=3),
        lambda content: content.update(members=["one", "two"]),
    ],
)
def test_a_spoilt_blend_file_is_one_error_that_names_it(spoil, runs, tmp_path):
    content = blend_of(runs, tmp_path, weights=np.array([0.75, 0.5]), intercept=np.array([0.0]))
    spoil(content)
    (tmp_path / "blend.json").write_text(json.dumps(content))
    with pytest.raises(ku.BundleError, match=re.escape(str(tmp_path / "blend.json"))):
        ku._Blend.read(tmp_path / "blend.json", {name: runs / name / "record.json" for name in ("one", "two")})


def test_a_blend_for_other_outputs_than_those_of_the_runs_is_refused_and_so_is_one_for_a_starter(
    runs, tmp_path, capsys
):
    blend_of(runs, tmp_path, weights=np.array([0.75, 0.5]), intercept=np.array([0.0, 0.0]))
    error = bundle_tool(runs / "one", runs / "two", "--blend", tmp_path / "blend.json", "-o", tmp_path / "dist", *NAMES)
    assert "expected 1 values of intercept, got 2" in error
    assert bundle_tool("--starter", "--blend", tmp_path / "blend.json", "-o", tmp_path / "dist", *NAMES) == 2
    assert "--blend goes with runs" in capsys.readouterr().err and not (tmp_path / "dist").exists()


def test_members_without_weight_stay_out_of_the_file_and_none_at_all_is_an_error(runs, tmp_path, capsys):
    content = blend_of(runs, tmp_path, weights=np.array([0.0, 1.0]), intercept=np.array([0.0]))
    assert list(content["members"]) == ["two"]
    printed = capsys.readouterr().out
    assert f"tools/bundle.py {runs / 'two'} --blend {tmp_path / 'blend.json'} " in printed
    with pytest.raises(comparison.ComparisonError, match="nnls gives no member a weight"):
        blend_of(runs, tmp_path, weights=np.array([0.0, 0.0]))


def test_with_qwk_the_blend_has_thresholds_of_its_own_by_which_whole_numbers_are_cut(tmp_path, backbone_folder):
    (tmp_path / "competition").mkdir()
    frame = train_frame(60).assign(target=lambda t: np.ceil(4 * t["target"].rank(pct=True)).astype(int))
    frame.to_csv(tmp_path / "competition" / "train.csv", index=False)
    base = dict(data_dir=tmp_path / "competition", backbone=backbone_folder("tiny"), output_dir=tmp_path / "runs")
    base |= dict(metric="qwk", n_folds=3, epochs=2, batch_size=8, max_length=32, lr=1e-2)
    for seed in (0, 1):
        trained(ku.Config.from_dict(base | dict(seed=seed, run_name=f"seed{seed}")))
    members = members_of(tmp_path / "runs")
    blended = blending.fit_blends(members, "mean")[0]
    cuts = blending.write_blend(members, blended, tmp_path)["cuts"]
    target, rows = members.target[:, 0].astype(int), members.predictions.mean(0)[:, 0]
    scores = members.cuts.describe(target[:, None], rows[:, None], members.folds)
    assert cuts["levels"] == [[1, 2, 3, 4]] and cuts["thresholds"][0] == pytest.approx(scores["thresholds"][0])
    labels = ku._Thresholds((1, 2, 3, 4), cuts["thresholds"][0]).apply(rows)
    kappa = sklearn.metrics.cohen_kappa_score(target, labels.astype(int), weights="quadratic")
    nested = scores["nested"] if scores["is_fitted"] else scores["rounded"]
    assert blended.in_sample == pytest.approx(kappa) and blended.nested == pytest.approx(nested)
    folders = [tmp_path / "runs" / f"seed{seed}" for seed in (0, 1)]
    assert bundle_tool(*folders, "--blend", tmp_path / "blend.json", "-o", tmp_path / "dist", *NAMES) is None
    assert ku.Bundle.open(tmp_path / "dist").to_levels(rows[:, None])[:, 0].tolist() == labels.tolist()


def test_with_qwk_methods_are_scored_by_whole_numbers_cut_as_the_submission_is():
    target, predictions = simulated(n_rows=300)
    grades = np.clip(np.rint(1.5 + target), 0, 4)
    members = make_members(grades, 1.5 + 0.3 * predictions, "qwk")  # shrunk: rounding gives few levels
    for blended in blending.fit_blends(members):
        labels = np.empty(300)
        for fold in range(5):
            own = members.folds == fold
            weights, intercept = blending.BLENDS[blended.method](members.predictions[:, ~own], grades[~own], "qwk")
            raw = blending._blend_rows(weights, intercept, members.predictions)[:, 0]
            inner = np.empty(300)
            for other in range(5):
                rows = members.folds == other
                weights, intercept = blending.BLENDS[blended.method](
                    members.predictions[:, ~rows], grades[~rows], "qwk"
                )
                inner[rows] = blending._blend_rows(weights, intercept, members.predictions[:, rows])[:, 0]
            labels[own] = ku._Thresholds(range(5)).fit(grades[~own, 0], inner[~own]).apply(raw[own])
        assert blended.nested == pytest.approx(ku._quadratic_kappa(grades[:, 0], labels))
        assert blended.nested > ku.METRICS["qwk"](
            grades, blending._blend_rows(blended.weights, blended.intercept, members.predictions)
        )


@pytest.mark.slow
def test_the_notebook_shows_scores_weights_and_errors_and_leaves_the_file_for_the_bundle(runs, tmp_path):
    parameters = [("runs_dir", runs), ("output_dir", tmp_path / "blend"), ("method", "hill")]
    done, executed = papermill("blend.ipynb", tmp_path / "out.ipynb", *parameters)
    assert done.returncode == 0, done.stderr
    assert "2 members, 40 rows, 2 folds, scored by rmse" in printed(executed)
    assert (tmp_path / "blend" / "blend.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "blend" / "blend.json").read_text())
    assert content["method"] == "hill" and sum(m["weight"] for m in content["members"].values()) == pytest.approx(1)
    shown = "".join(o["data"].get("text/html", "") for c in executed.cells for o in c.get("outputs", []) if "data" in o)
    for word in ("nested", "in_sample", *itertools.chain(blending.BLENDS, ("one", "two"))):
        assert word in shown
