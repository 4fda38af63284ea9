"""Comparing runs: what is refused, what the tests of difference find, and what the figures show."""

import itertools
import json
import math

import comparison
import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics

# ---------------------------------------------------------------------------------------
# Simulated studies


def make_study(target, predictions, metric="rmse", folds=None, groups=None):
    """A study of 5 folds of predictions (S, N, K) by name; the best are the mean of two seeds."""
    n = len(target)
    record = {"seconds": {"total": 1.0}, "rows_per_second": 1.0, "peak_memory_bytes": 2**30}
    configurations = [
        comparison.Configuration(name, {i: [record] for i in range(len(p))}, {"last": p, "best": (p + p[::-1]) / 2})
        for name, p in predictions.items()
    ]
    folds = np.arange(n) % 5 if folds is None else folds
    return comparison.Comparison(
        metric, folds, np.arange(n) if groups is None else groups, 0.25, target, configurations
    )


def simulated(rng, n_rows=600, n_seeds=3, worse=0.0, seed_noise=0.0, n_groups=0):
    """Two configurations of linear learners, 5 folds: each fold of each seed adds a random smooth function, and
    each seed scales its errors by 1 + `seed_noise` x N(0, 1). The second has errors larger by the share `worse`. Each
    configuration has an advantage of its own in each group, 0 on average."""
    inputs = rng.normal(size=(n_rows, 10))
    target = inputs @ rng.normal(size=10) * 0.2 + 0.5 * rng.normal(size=n_rows)
    folds = rng.permutation(n_rows) % 5
    learnt = np.empty(n_rows)
    for fold in range(5):
        train = folds != fold
        learnt[~train] = inputs[~train] @ np.linalg.lstsq(inputs[train], target[train], rcond=None)[0]
    predictions, groups = {}, rng.integers(n_groups, size=n_rows) if n_groups else None
    for name, share in (("a", 0.0), ("b", worse)):
        errors = np.empty((n_seeds, n_rows))
        for seed, fold in itertools.product(range(n_seeds), range(5)):
            rows = folds == fold
            wave = np.sin(0.4 * inputs[rows] @ rng.normal(size=10) + rng.uniform(0, 6)) * rng.uniform(0.05, 0.25)
            errors[seed, rows] = learnt[rows] - target[rows] + wave
        errors *= (1 + seed_noise * rng.normal(size=(n_seeds, 1))) * (1 + share)
        if n_groups:
            errors *= (1 + 0.2 * rng.normal(size=n_groups))[groups]
        predictions[name] = (target + errors)[:, :, None]
    return make_study(target[:, None], predictions, "mae", folds, groups)


def found(n, n_resamples, **settings):
    """Shares of `n` simulated comparisons that the bootstrap and the corrected t call different at 5 %."""
    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        study = simulated(rng, **settings)
        (difference,) = comparison._two_way_bootstrap(study, "last", n_resamples, 0)
        found.append(
            (difference.p < 0.05, comparison._fold_evidence(study, study.configurations[1], "last")["p of t"] < 0.05)
        )
    return np.mean(found, axis=0)


def test_seeds_of_one_configuration_are_rarely_called_different_and_a_true_difference_more_often_than_by_t():
    by_bootstrap, _ = found(40, 200)
    assert by_bootstrap <= 0.05
    by_bootstrap, by_t = found(40, 200, worse=0.04, n_rows=800)
    assert by_bootstrap > by_t + 0.2


def test_three_groups_are_rarely_evidence_for_a_difference_that_they_do_not_share():
    assert found(40, 200, n_groups=3)[0] <= 0.1


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings",
    [{}, dict(n_seeds=2), dict(seed_noise=0.05), dict(seed_noise=0.2), dict(n_seeds=5, seed_noise=0.02)],
    ids=str,
)
def test_of_200_comparisons_of_one_configuration_at_most_5_percent_find_a_difference(settings):
    assert found(200, 300, **settings)[0] <= 0.05


@pytest.mark.nightly
@pytest.mark.parametrize("n_groups", [3, 6, 12])
def test_a_few_groups_are_no_evidence_for_a_difference_that_they_do_not_share(n_groups):
    assert found(200, 300, n_groups=n_groups)[0] <= 0.08  # 200 draws of 5 % are up to 8 %


@pytest.mark.nightly
def test_of_200_comparisons_with_a_true_difference_of_3_percent_more_find_it_than_by_t_alone():
    by_bootstrap, by_t = found(200, 300, worse=0.03, n_rows=1000)
    assert by_bootstrap > 0.5 and by_bootstrap > 2 * by_t


# ---------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize(("metric", "n"), [("rmse", 3000), ("spearman", 1500)])  # the fast way and the general one
def test_with_one_seed_the_interval_is_scipys_percentile_interval_over_rows(metric, n):
    rng = np.random.default_rng(0)
    target = rng.normal(size=(150, 1))
    a, b = (target + rng.normal(scale=s, size=(150, 1)) for s in (0.8, 0.9))
    score = ku.METRICS[metric]
    study = make_study(target, {"a": a[None], "b": b[None]}, metric)
    (ours,) = comparison._two_way_bootstrap(study, "last", n, 0)
    theirs = scipy.stats.bootstrap(
        (np.arange(150),),
        lambda rows: score(target[rows], b[rows]) - score(target[rows], a[rows]),
        vectorized=False,
        n_resamples=n,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert ours.difference == pytest.approx(score(target, b) - score(target, a), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.06 * (theirs.high - theirs.low))


def test_without_row_noise_the_interval_and_p_are_those_of_welchs_t_test_over_seeds():
    seeds = {"a": [0.50, 0.53, 0.51, 0.55], "b": [0.58, 0.54, 0.61]}  # rmse of a seed, equal in every row
    predictions = {name: np.tile(np.array(scores)[:, None, None], (1, 50, 1)) for name, scores in seeds.items()}
    (ours,) = comparison._two_way_bootstrap(make_study(np.zeros((50, 1)), predictions), "last", 20000, 0)
    theirs = scipy.stats.ttest_ind(seeds["b"], seeds["a"], equal_var=False)
    interval = theirs.confidence_interval()
    assert ours.difference == pytest.approx(np.mean(seeds["b"]) - np.mean(seeds["a"]))
    assert ours.p == pytest.approx(theirs.pvalue, rel=0.05)
    assert (ours.low, ours.high) == pytest.approx(tuple(interval), abs=0.1 * (interval.high - interval.low))


def test_a_true_difference_of_the_detectable_size_is_found_in_about_four_of_five_comparisons():
    rng = np.random.default_rng(0)
    equal = [comparison._two_way_bootstrap(simulated(rng, n_rows=200), "last", 200, 0)[0] for _ in range(100)]
    effect = np.median([d.detectable for d in equal])
    found = [d.difference + effect > d.difference - d.low for d in equal]  # the interval moved by it excludes 0
    assert 0.75 < np.mean(found) < 0.97


def test_among_ten_configurations_a_difference_must_be_larger_to_be_found():
    study = simulated(np.random.default_rng(0))
    base, other = study.configurations
    others = [other._replace(name=str(i)) for i in range(10)]
    many = study._replace(configurations=[base, *others])
    one, ten = (comparison._two_way_bootstrap(s, "last", 2000, 0)[0].detectable for s in (study, many))
    assert 1.25 < ten / one < 1.6  # by z (2.807 + 0.842) / (1.960 + 0.842), more with few seeds


def drawn_rows(n, rng):
    return np.repeat(np.arange(n), np.bincount(rng.integers(n, size=n), minlength=n))


@pytest.mark.parametrize("name, metric", [pair for pair in ku.METRICS.items() if pair[1].per_row and pair[0] != "map3"])
@pytest.mark.parametrize("n_outputs", [1, 3])
def test_the_fast_scores_of_resamples_are_the_metrics_of_the_drawn_rows(name, metric, n_outputs):
    rng = np.random.default_rng(0)
    target, predictions = rng.normal(size=(30, n_outputs)), rng.uniform(size=(2, 30, n_outputs))
    target = target if "regression" in metric.tasks else (target > 0).astype(float)
    fast = comparison.resampled_scores(name, target, predictions, np.arange(30), 5, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    for scores in fast:
        rows = drawn_rows(30, rng)
        np.testing.assert_allclose(scores, [metric(target[rows], p[rows]) for p in predictions], rtol=1e-12)


def test_class_numbers_are_resampled_with_their_probabilities():
    rng = np.random.default_rng(0)
    target, predictions = rng.integers(3, size=40), rng.dirichlet(np.ones(3), size=(2, 40))
    for name in ("accuracy", "logloss"):
        scores = comparison.resampled_scores(name, target, predictions, np.arange(40), 4, np.random.default_rng(7))
        rng = np.random.default_rng(7)
        for row in scores:
            rows = drawn_rows(40, rng)
            expected = [
                np.mean(p[rows].argmax(1) == target[rows])
                if name == "accuracy"
                else sklearn.metrics.log_loss(target[rows], p[rows], labels=[0, 1, 2])
                for p in predictions
            ]
            np.testing.assert_allclose(row, expected)


def test_rows_of_a_group_are_drawn_together():
    groups = np.repeat([0, 1], [80, 20])
    target, prediction = np.zeros((100, 1)), groups[:, None].astype(float)
    scores = comparison.resampled_scores("mae", target, prediction[None], groups, 50, np.random.default_rng(0))
    assert set(scores[:, 0]) == {0.0, 0.2, 1.0}


def test_a_metric_without_a_value_on_many_resamples_is_an_error():
    target, prediction = np.array([[1.0]] + [[0.0]] * 19), np.linspace(0, 1, 20)[None, :, None]
    with pytest.raises(comparison.ComparisonError, match=r"auc has no value on \d+ of 50 resamples of 20 rows"):
        comparison.resampled_scores("auc", target, prediction, np.arange(20), 50, np.random.default_rng(0))


def test_the_corrected_t_is_the_plain_one_with_the_variance_enlarged_by_test_to_train_rows():
    differences = np.random.default_rng(0).normal(0.1, 0.1, size=(2, 3))  # 2 folds of 5 were trained
    plain = scipy.stats.ttest_1samp(differences.ravel(), 0).statistic
    t = plain * math.sqrt((1 / 6) / (1 / 6 + 1 / 4))
    assert comparison.corrected_t(differences, 1 / 4) == pytest.approx(2 * scipy.stats.t.sf(abs(t), 5), rel=1e-12)


def test_folds_that_were_not_trained_count_as_training_rows_of_the_t_test(tmp_path):
    for path in grid(tmp_path, {"cls": 0.1, "max": 0.2}).rglob("record.json"):
        path.write_text(path.read_text().replace('"rows": 20', '"rows": 50'))  # 2 of 5 folds of 10 rows
    study = align(tmp_path, "head=cls")
    frames = [[pd.read_csv(tmp_path / f"{head}-{seed}" / "oof.csv") for seed in range(3)] for head in ("max", "cls")]
    errors = [[(f["target"] - f["prediction_last"]).pow(2).groupby(f["fold"]).mean() for f in arm] for arm in frames]
    differences = np.sqrt(errors[0]) - np.sqrt(errors[1])  # (S, F)
    evidence = comparison._fold_evidence(study, study.configurations[1], "last")
    assert evidence["p of t"] == pytest.approx(comparison.corrected_t(differences.T, 10 / 40))
    pairs = [a < b for a, b in itertools.product(np.sqrt(errors[0]), np.sqrt(errors[1]))]
    assert evidence["cells won"] == pytest.approx(np.mean(pairs))


def test_holms_p_values_are_those_of_the_step_down_by_hand():
    adjusted = comparison._holm(np.array([0.04, 0.01, math.nan, 0.03, 0.5]))
    np.testing.assert_allclose(adjusted, [0.09, 0.04, math.nan, 0.09, 0.5])


# ---------------------------------------------------------------------------------------
# Run folders


def write_run(folder, seed=0, folds=(0, 1), error=0.1, settings=None, resolved=None, scores=None, **columns):
    """A finished run of 20 rows in 2 folds, without weights; `scores` are those of each fold's evaluations."""
    rng = np.random.default_rng([seed, int(1000 * error)])
    target = np.linspace(-1, 1, 20)
    oof = pd.DataFrame({"id": [f"{i:02d}" for i in range(20)], "fold": np.arange(20) % 2, "target": target})
    oof["prediction"] = oof["prediction_last"] = target + error * rng.normal(size=20)
    oof["prediction_best"] = target + 0.9 * error * rng.normal(size=20)
    oof = oof.assign(**columns)[oof["fold"].isin(folds)]
    folder.mkdir(parents=True)
    oof.to_csv(folder / "oof.csv", index=False)
    record = {
        "status": "complete",
        "settings": json.loads(json.dumps(ku.Config(seed=seed, **(settings or {})).to_dict())),
        "resolved": {"loss": "mse", "metric": "rmse", "lr": 1e-4, "backbone_dropout": 0.0} | (resolved or {}),
        "rows": 20,
        "classes": [],
        "outputs": ["target"],
        "versions": ku._versions(),
        "device": "a CPU",
        "threads": 1,
        "precision": "float32",
        "folds": [{"fold": fold, "rows": 10, "steps": 6} for fold in folds],
        "oof": {"metric": "rmse", "better": "lower", "last": error, "best": error},
        "seconds": {"total": 10.0},
        "rows_per_second": 5.0,
        "peak_memory_bytes": 2**30,
    }
    (folder / "record.json").write_text(json.dumps(record))
    scores = scores or {fold: [0.5, 0.4, 0.3] for fold in folds}
    lines = [
        {"fold": fold, "step": 2 * i, "epoch": i, "rmse": score, "best": True}
        for fold in folds
        for i, score in enumerate(scores[fold], 1)
    ]
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def grid(folder, errors, seeds=(0, 1, 2)):
    """Runs of every head in `errors` and every seed."""
    for head, error in errors.items():
        for seed in seeds:
            write_run(folder / f"{head}-{seed}", seed, error=error, settings=dict(head=head))
    return folder


def align(folder, baseline=""):
    return comparison.align_runs(comparison.read_records(folder), baseline)


def compare(folder, baseline="", n_resamples=300):
    table = comparison.compare_runs(align(folder, baseline), n_resamples)
    return table.set_index(["checkpoint", "configuration"])


def test_the_table_has_a_verdict_for_each_configuration_and_checkpoint_the_baseline_first(tmp_path):
    table = compare(grid(tmp_path, {"max": 0.1, "cls": 0.11, "gem": 0.9}), "head=cls")
    names = ["head=cls", "head=gem", "head=max"]
    assert list(table.index) == [(kind, name) for kind in ("last", "best") for name in names]
    last = table.loc["last"]
    assert last["verdict"]["head=cls"] == "baseline" and last["verdict"]["head=gem"] == "worse"
    assert last["verdict"]["head=max"].startswith("not distinguishable (smallest detectable difference 0.0")
    assert compare(tmp_path, "head=gem").loc["last"]["verdict"]["head=cls"] == "better"
    frames = [pd.read_csv(tmp_path / f"gem-{seed}" / "oof.csv") for seed in range(3)]
    rmse = [math.sqrt(((f["target"] - f["prediction_last"]) ** 2).mean()) for f in frames]
    assert last["rmse"]["head=gem"] == pytest.approx(np.mean(rmse), rel=1e-12)
    assert last["sd over seeds"]["head=gem"] == pytest.approx(np.std(rmse, ddof=1), rel=1e-9)
    best = [math.sqrt(((f["target"] - f["prediction_best"]) ** 2).mean()) for f in frames]
    assert table.loc["best"]["rmse"]["head=gem"] == pytest.approx(np.mean(best), rel=1e-12)
    for kind in ("last", "best"):
        scores = table.loc[kind]["rmse"]
        assert table.loc[kind]["difference"]["head=gem"] == pytest.approx(scores["head=gem"] - scores["head=cls"])
        assert table.loc[kind]["low"]["head=gem"] < table.loc[kind]["difference"]["head=gem"]
    frame = comparison.run_scores(align(tmp_path, "head=cls")).set_index(["configuration", "seed"])
    assert list(frame["rmse last"]["head=gem"]) == pytest.approx(rmse)
    half = [math.sqrt(((f["target"] - f["prediction_best"]) ** 2)[f["fold"] == 1].mean()) for f in frames]
    assert list(frame["best fold 1"]["head=gem"]) == pytest.approx(half)
    assert (frame["lr"] == 1e-4).all() and (frame["seconds"] == 10).all()


def test_where_more_is_better_the_larger_score_is(tmp_path):
    grid(tmp_path, {"cls": 0.1, "gem": 0.9})
    for path in tmp_path.rglob("record.json"):
        path.write_text(path.read_text().replace('"rmse", "better": "lower"', '"pearson", "better": "higher"'))
        log = path.with_name("log.jsonl")
        log.write_text(log.read_text().replace("rmse", "pearson"))
    table = compare(tmp_path, "head=cls").loc["last"]
    assert table["difference"]["head=gem"] < 0 and table["verdict"]["head=gem"] == "worse"
    assert table["cells won"]["head=gem"] == 0


@pytest.mark.parametrize("seeds", [{"cls": (0,), "gem": (0,)}, {"cls": (0, 1, 2), "gem": (5,)}], ids=str)
def test_one_seed_never_names_a_winner(tmp_path, seeds):
    for head, error in {"cls": 0.01, "gem": 5.0}.items():
        grid(tmp_path, {head: error}, seeds[head])
    row = compare(tmp_path, "head=cls").loc["last", "head=gem"]
    assert row["verdict"] == "not distinguishable (one seed names no winner)" and math.isnan(row["p of Holm"])


def test_more_configurations_need_more_evidence(tmp_path):
    few = compare(grid(tmp_path / "few", {"cls": 0.1, "max": 0.14}), "head=cls").loc["last", "head=max"]
    heads = ["mean", "gem", "conv1d", "lstm", "gru", "concat", "attention"]
    grid(tmp_path / "many", {"cls": 0.1, "max": 0.14} | {head: 0.1 + i / 1000 for i, head in enumerate(heads)})
    many = compare(tmp_path / "many", "head=cls").loc["last", "head=max"]
    assert few["difference"] == many["difference"] and few["p of Holm"] == few["p"]
    assert many["p of Holm"] == pytest.approx(8 * many["p"])  # the smallest of 8


@pytest.mark.parametrize("difference, better, word", [(-1, "lower", "better"), (1, "lower", "worse")])
def test_the_verdict_stands_on_the_adjusted_p(difference, better, word):
    row = {"difference": difference, "detectable": 0.5, "p": 0.01}
    assert comparison._verdict(row | {"p of Holm": 0.049}, better) == word
    text = "not distinguishable (smallest detectable difference 0.5)"
    assert comparison._verdict(row | {"p of Holm": 0.051}, better) == text


def test_identical_predictions_are_not_distinguishable(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", 0, settings=dict(head="cls"))
        write_run(tmp_path / f"b{seed}", 0, settings=dict(head="max"))
    for path in tmp_path.rglob("*1/record.json"):
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    row = compare(tmp_path, "head=cls").loc["last", "head=max"]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)
    assert row["verdict"].startswith("not distinguishable (smallest")


def test_folds_of_one_seed_in_several_runs_count_as_one_run(tmp_path):
    whole, split = grid(tmp_path / "whole", {"cls": 0.1, "max": 0.5}), tmp_path / "split"
    for head, error in {"cls": 0.1, "max": 0.5}.items():
        for seed, fold in itertools.product(range(3), range(2)):
            settings = dict(head=head, run_folds=str(fold))
            write_run(split / f"{head}-{seed}-{fold}", seed, (fold,), error, settings)
    tables = [compare(folder, "head=cls") for folder in (whole, split)]
    pd.testing.assert_frame_equal(*(table.drop(columns=["seconds"]) for table in tables))
    assert (tables[1]["seconds"] == 2 * tables[0]["seconds"]).all()


def test_a_run_that_did_not_finish_is_left_out_and_named(tmp_path, capsys):
    grid(tmp_path, {"cls": 0.1, "max": 0.5})
    half = write_run(tmp_path / "half", 7, settings=dict(head="max")) / "record.json"
    half.write_text(half.read_text().replace("complete", "running"))
    assert list(compare(tmp_path, "head=cls")["seeds"]) == [3] * 4
    assert "did not finish: half\n" in capsys.readouterr().out


def test_optimism_is_what_the_choice_of_the_other_folds_would_have_lost(tmp_path):
    scores = {0: [0.5, 0.2, 0.6], 1: [0.7, 0.6, 0.4]}  # fold 0 would choose the 2nd, fold 1 the 3rd
    for head in ("cls", "max"):
        write_run(tmp_path / head, settings=dict(head=head), scores=scores)
    study = align(tmp_path, "head=cls")
    assert study.optimism(study.configurations[0]) == pytest.approx(((0.6 - 0.2) + (0.6 - 0.4)) / 2)
    higher = study._replace(metric="pearson")
    for record in study.configurations[0].records:
        record["oof"]["metric"] = "pearson"
        log = record["folder"] / "log.jsonl"
        log.write_text(log.read_text().replace("rmse", "pearson"))
    # fold 0 would choose the 3rd, fold 1 the 1st
    assert higher.optimism(study.configurations[0]) == pytest.approx(((0.6 - 0.5) + (0.7 - 0.4)) / 2)


def test_groups_of_the_folds_reach_the_bootstrap(tiny, tmp_path):
    records = []
    for head in ("cls", "mean"):
        cfg = tiny(head=head, run_name=head, fold_kind="group", group_column="author")
        train, _, _ = ku.read_competition(ku.Config(data_dir=cfg.data_dir))
        author = pd.Series([f"author {i // 4}" for i in range(40)])
        ku.train(ku.make_folds(train.assign(author=author), cfg), cfg)
    records = comparison.read_records(tmp_path / "runs")
    oof = pd.read_csv(records[0]["folder"] / "oof.csv", dtype={"id": str})
    assert list(oof["group"]) == list(author)
    study = comparison.align_runs(records, "head=cls")
    assert len(set(zip(study.groups, author, strict=True))) == len(set(study.groups)) == 10
    score = study.scores(study.configurations[1], "last")[0]
    assert score == pytest.approx(records[1]["oof"]["last"], rel=1e-6) and study.configurations[1].name == "head=mean"


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_the_scores_are_those_of_the_record_in_every_task(task, competition, tiny, tmp_path):
    labels = {
        "binary": dict(target=["no", "yes"] * 20),
        "multiclass": dict(target=["007", "1", "NA", "b"] * 10),
        "multilabel": dict(x=[0, 1] * 20, y=[0, 0, 1, 1] * 10),
        "regression": dict(x=np.linspace(0, 1, 40), y=np.linspace(1, 3, 40) ** 2),
    }[task]
    names = ",".join(labels)
    frame = pd.read_csv(competition / "train.csv", dtype=str).assign(**labels)
    frame.to_csv(competition / "train.csv", index=False)
    (competition / "sample_submission.csv").unlink()
    for head in ("cls", "mean"):
        cfg = tiny(head=head, task=task, target_columns=names, fold_kind="plain", run_name=head)
        train, _, _ = ku.read_competition(cfg)
        ku.train(ku.make_folds(train, cfg), cfg)
    study = align(tmp_path / "runs", "head=mean")
    for arm in study.configurations:
        for kind in ("last", "best"):
            assert study.scores(arm, kind)[0] == pytest.approx(arm.records[0]["oof"][kind], abs=1e-6)


# ---------------------------------------------------------------------------------------
# What is refused


def other_run(tmp_path, **changes):
    """A study of `cls` beside one run of `max` with changes."""
    grid(tmp_path, {"cls": 0.1})
    settings = dict(head="max") | changes.pop("settings", {})
    return write_run(tmp_path / "other", settings=settings, **changes)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(folds=(1,)), r"head=max, seed 0 \(.*other\) has 10 rows, folds 1, the baseline 20 rows, folds 0, 1;"),
        (dict(id=[f"{i:02d}" for i in range(1, 21)]), r"has 20 rows, .* 2 rows such as id '00' are in one only"),
        (
            dict(fold=1 - np.arange(20) % 2),
            r"another fold than the baseline in 20 rows, such as 1 against 0 at id '00'",
        ),
        (dict(target=np.linspace(-1, 2, 20)), r"another target than the baseline in 19 rows, such as .* at id '01'"),
        (
            dict(settings=dict(evals_per_epoch=2)),
            r"evaluated 6 times in fold 0, the baseline 3 times: of more",
        ),
        (dict(settings=dict(eval_steps=1)), "was evaluated 6 times in fold 0"),
        (dict(group="g"), "has another group than the baseline in 20 rows, such as g against none"),
        (dict(settings=dict(fold_kind="group", group_column="g")), "its oof.csv does not say which"),
    ],
    ids=[
        "missing fold",
        "other ids",
        "other folds",
        "other targets",
        "more evaluations",
        "eval_steps",
        "groups",
        "no groups",
    ],
)
def test_runs_that_do_not_stand_for_the_same_are_refused_by_name(tmp_path, changes, expected):
    other_run(tmp_path, **changes)
    with pytest.raises(comparison.ComparisonError, match=expected):
        align(tmp_path, "head=cls")


def test_more_epochs_can_be_compared_where_the_number_of_evaluations_is_the_same(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"three{seed}", seed, settings=dict(epochs=3))
        write_run(tmp_path / f"one{seed}", seed, settings=dict(epochs=1, evals_per_epoch=3))
    assert align(tmp_path).configurations[1].name == "epochs=1 evals_per_epoch=3"


def test_what_the_message_offers_as_a_baseline_can_be_set(tmp_path):
    for i, settings in enumerate(
        [dict(lr=1.23456789e-5), dict(lr=0.001), dict(template="a: b {excerpt}"), dict(conv_kernels=(3, 3))]
    ):
        write_run(tmp_path / str(i), settings=settings, resolved={"lr": settings.get("lr", 1e-4)})
    path = write_run(tmp_path / "4") / "record.json"
    path.write_text(path.read_text().replace('"mean"', '"mine"').replace("float32", "bfloat16"))
    with pytest.raises(ku.ConfigError) as error:
        align(tmp_path, "head=gem")
    names = str(error.value).partition("one of: ")[2].split("; ")
    assert len(names) == 5
    for name in names:
        assert align(tmp_path, name).configurations[0].name == name


def test_a_setting_that_an_older_record_lacks_still_makes_another_configuration(tmp_path):
    for i, value in enumerate([None, 1, 2]):
        path = write_run(tmp_path / str(i), settings=dict(head="max" if i else "cls")) / "record.json"
        record = json.loads(path.read_text())
        record["settings"] |= {} if value is None else {"new": value}
        path.write_text(json.dumps(record))
    assert [c.name for c in align(tmp_path, "head=cls").configurations] == [
        "head=cls new=None",
        "head=max new=1",
        "head=max new=2",
    ]


def test_uneven_folds_with_eval_steps_are_compared_evaluation_by_evaluation(tmp_path):
    for head, seed, fold in itertools.product(("cls", "max"), (0, 1), (0, 1)):
        scores = {0: [0.5, 0.2, 0.6], 1: [0.7, 0.6, 0.4, 0.1, 0.2]}
        settings = dict(head=head, run_folds=str(fold), eval_steps=2)
        run = write_run(tmp_path / f"{head}{seed}{fold}", seed, (fold,), settings=settings, scores=scores)
        path = run / "record.json"
        path.write_text(path.read_text().replace('"steps": 6', f'"steps": {6 + 3 * fold}'))
    study = align(tmp_path, "head=cls")
    assert study.optimism(study.configurations[0]) == pytest.approx(((0.6 - 0.2) + (0.6 - 0.4)) / 2)
    share, scores = study.configurations[1].curves(1, "rmse")
    np.testing.assert_allclose(share, np.mean([[1 / 3, 2 / 3, 1], [1 / 5, 2 / 5, 3 / 5]], axis=0))
    np.testing.assert_allclose(scores, [[0.5, 0.2, 0.6], [0.7, 0.6, 0.4]])


def test_one_group_alone_is_refused(tmp_path):
    for head in ("cls", "max"):
        write_run(tmp_path / head, settings=dict(head=head, fold_kind="group", group_column="g"), group="g")
    with pytest.raises(comparison.ComparisonError, match="all 20 rows are in one group"):
        align(tmp_path, "head=cls")


def test_predictions_without_a_score_are_refused_by_configuration_and_seed(tmp_path):
    grid(tmp_path, {"cls": 0.1, "max": 0.1})
    for path in tmp_path.rglob("record.json"):
        path.write_text(path.read_text().replace('"rmse", "better"', '"pearson", "better"'))
    oof = pd.read_csv(tmp_path / "max-1" / "oof.csv", dtype={"id": str})
    oof.assign(prediction_best=0.5).to_csv(tmp_path / "max-1" / "oof.csv", index=False)
    with pytest.raises(comparison.ComparisonError, match="head=max, seed 1: the best predictions have no pearson"):
        align(tmp_path, "head=cls")


@pytest.mark.parametrize("name", ["oof.csv", "log.jsonl"])
@pytest.mark.parametrize("broken", [True, False], ids=["broken", "missing"])
def test_a_broken_file_of_a_run_is_named(tmp_path, name, broken):
    path = other_run(tmp_path) / name
    path.unlink()
    if broken:
        path.write_text('{"fold": 0, "st')
    with pytest.raises(ku.KitError, match=rf"other/{name}( cannot be read: \w+Error| has no column|: not a JSON file)"):
        compare(tmp_path, "head=cls")


def test_another_metric_is_refused(tmp_path):
    path = other_run(tmp_path) / "record.json"
    path.write_text(path.read_text().replace('"rmse", "better"', '"mae", "better"'))
    with pytest.raises(comparison.ComparisonError, match="other has metric mae, the baseline rmse"):
        align(tmp_path, "head=cls")


def test_a_metric_that_is_not_registered_is_refused(tmp_path):
    grid(tmp_path, {"cls": 0.1, "max": 0.1})
    for path in tmp_path.rglob("record.json"):
        path.write_text(path.read_text().replace('"rmse", "better"', '"rmsle", "better"'))
    with pytest.raises(ku.ConfigError, match=r"metric must be one of .*did you mean rmse"):
        align(tmp_path, "head=cls")


def test_a_fold_that_was_trained_twice_is_refused(tmp_path):
    grid(tmp_path, {"cls": 0.1, "max": 0.1})
    write_run(tmp_path / "again", 2, (1,), settings=dict(head="max", run_folds="1"))
    with pytest.raises(
        comparison.ComparisonError, match=r"head=max, seed 2 \(.*again, .*max-2\) has fold 1 more than once"
    ):
        align(tmp_path, "head=cls")


def test_one_configuration_alone_is_refused(tmp_path):
    with pytest.raises(comparison.ComparisonError, match="all 3 runs have one configuration"):
        align(grid(tmp_path, {"cls": 0.1}))


def test_a_folder_without_finished_runs_is_refused(tmp_path):
    with pytest.raises(comparison.ComparisonError, match="has no finished run"):
        comparison.read_records(tmp_path / "no such folder")


@pytest.mark.parametrize(
    "baseline, expected",
    [
        ("head=clas", r"no configuration has head=clas \(did you mean head=cls\?\); set it to .*: head=cls; head=max$"),
        ("heda=cls", r"no configuration has heda=cls \(did you mean head=cls\?\)"),
        ("cls", "no configuration has cls="),
        ("seed=0", "no configuration has seed=0"),
        ("head=cls llrd=0.5", "no configuration has llrd=0.5"),
        ("llrd=1", "several configurations fit; set it to what is one of: head=cls; head=max"),
    ],
)
def test_a_baseline_that_is_not_one_configuration_is_refused(tmp_path, baseline, expected):
    with pytest.raises(ku.ConfigError, match=expected):
        align(grid(tmp_path, {"cls": 0.1, "max": 0.1}), baseline)


def test_of_configurations_as_close_to_the_defaults_the_first_is_the_baseline_and_that_is_said(tmp_path, capsys):
    study = align(grid(tmp_path, {"max": 0.1, "cls": 0.1}))
    assert study.configurations[0].name in ("head=cls", "head=max")
    said = f"baseline {study.configurations[0].name}, the first of 2 that are as close to the defaults"
    assert said in capsys.readouterr().out


def test_the_baseline_is_the_configuration_that_leaves_most_at_the_defaults(tmp_path):
    variants = [dict(), dict(llrd=0.95), dict(reinit_layers=1), dict(backbone_dropout=0.1)]
    for i, settings in enumerate(variants):
        resolved = {"backbone_dropout": settings.get("backbone_dropout", 0.0)}
        write_run(tmp_path / str(i), settings=dict(head="cls") | settings, resolved=resolved)
    study = align(tmp_path)
    names = ["backbone_dropout=0 reinit_layers=0 llrd=1", "llrd=0.95", "reinit_layers=1", "backbone_dropout=0.1"]
    assert [c.name for c in study.configurations] == names
    other = align(tmp_path, "llrd=0.95")
    assert [c.name for c in other.configurations[:2]] == ["backbone_dropout=0 reinit_layers=0 llrd=0.95", "llrd=1"]


def test_a_setting_left_open_and_the_same_said_are_one_configuration(tmp_path):
    write_run(tmp_path / "a", 0, settings=dict(head="cls"))
    write_run(tmp_path / "b", 1, settings=dict(head="cls", lr=1e-4, backbone_dropout=0.0))
    write_run(tmp_path / "c", 0, settings=dict(head="max"))
    assert [list(c.runs) for c in align(tmp_path, "head=cls").configurations] == [[0, 1], [0]]


def test_runs_of_different_devices_or_versions_are_named(tmp_path, capsys):
    path = other_run(tmp_path) / "record.json"
    path.write_text(path.read_text().replace("a CPU", "a GPU"))
    align(tmp_path, "head=cls")
    assert "the runs differ in device: a CPU, a GPU\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def drawn(monkeypatch):
    """File name -> figure, as it was written."""
    figures, save = {}, ku._save_figure

    def keep(figure, path):
        save(figure, path)
        figures[path.name] = figure

    monkeypatch.setattr(ku, "_save_figure", keep)
    return figures


def texts(figure):
    """Boxes of all texts that a figure shows, in pixels."""
    from matplotlib.text import Text

    beyond = set()  # ticks that lie outside of the limits are not drawn
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    return {t: t.get_window_extent() for t in shown}


def test_no_label_of_the_figures_covers_another_or_leaves_the_figure(tmp_path, drawn):
    values = [(0.98, 0, 0.0), (0.95, 0, 0.1), (0.9, 1, 0.0), (1.0, 2, 0.1), (1.0, 3, 0.0)]
    for head, error in {"cls": 0.1, "conv1d": 0.1001, "attention": 0.3}.items():
        for i, (llrd, reinit, dropout) in enumerate(values):
            settings = dict(head=head, llrd=llrd, reinit_layers=reinit, backbone_dropout=dropout)
            for seed in (0, 1):
                resolved = {"backbone_dropout": dropout}
                write_run(tmp_path / f"{head}{i}{seed}", seed, (0, 1), error, settings, resolved)
    study = align(tmp_path, "head=cls llrd=0.98")
    table = comparison.compare_runs(study, 50)
    comparison.plot_differences(study, table, tmp_path)
    comparison.plot_cost(study, table, tmp_path)
    comparison.plot_folds(study, tmp_path)
    comparison.plot_learning(study, tmp_path)
    assert len(drawn) == 4
    for name, figure in drawn.items():
        boxes = texts(figure)
        width, height = figure.canvas.get_width_height()
        for text, box in boxes.items():
            assert box.x0 >= -1 and box.x1 <= width + 1, (name, text.get_text())
            assert box.y0 >= -1 and box.y1 <= height + 1, (name, text.get_text())
        for (one, a), (two, b) in itertools.combinations(boxes.items(), 2):
            apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
            assert apart, (name, one.get_text(), two.get_text())


def test_better_and_worse_differ_in_more_than_colour(tmp_path, drawn):
    study = align(grid(tmp_path, {"cls": 0.3, "max": 0.05, "gem": 0.9}), "head=cls")
    comparison.plot_folds(study, tmp_path)
    comparison.plot_differences(study, comparison.compare_runs(study, 100), tmp_path)
    for axis in drawn["folds.png"].axes:
        for line in axis.lines:
            base, score = line.get_ydata()
            assert line.get_linestyle() == ("-" if score < base else "--")
            assert line.get_color() == (comparison.BLUE if score < base else comparison.RED)
    left, right = drawn["differences.png"].axes
    assert [label.get_text().split()[-1] for label in right.get_yticklabels()] == ["worse", "better"]
    assert "(left is better)" in left.get_xlabel()
    comparison.plot_differences(study._replace(metric="pearson"), comparison.compare_runs(study, 100), tmp_path)
    assert "(right is better)" in drawn["differences.png"].axes[0].get_xlabel()
