"""Blending of runs, for blend.ipynb.

Weights of finished runs, fitted on what they predicted out of fold. A member is a run; seeds of one configuration are
members of their own. One weight a member, for all its outputs. Shapes: M members, R resamples.
"""

import dataclasses
import math
import shlex
import textwrap
from typing import NamedTuple

import comparison
import numpy as np
import pandas as pd
import scipy.optimize
import sklearn.linear_model

import kernel_utils as ku

BLENDS = {}  # name of a way to fit -> function(predictions (M, N, K), target, metric name) -> (weights (M,), intercept)
CLASS_BLENDS = ("mean", "best", "hill")  # those whose weights are shares: probabilities stay probabilities
HILL_ROUNDS = 50  # weights are multiples of 1/50 at the finest
RIDGE_ALPHAS = np.geomspace(1e-2, 1e5, 15)  # of targets with variance 1


def best_of(metric_name, scores):
    """Position of the best score, the first of equal ones. ComparisonError where none is a number."""
    scores = np.array(scores) if ku.METRICS[metric_name].better == "lower" else -np.array(scores)
    if np.isnan(scores).all():
        raise comparison.ComparisonError(f"none of {len(scores)} predictions has a {metric_name}")
    return int(np.nanargmin(scores))


@ku.register(BLENDS, "mean")
def equal_weights(predictions, target, metric_name):
    """Every member alike."""
    return np.full(len(predictions), 1 / len(predictions)), 0.0


@ku.register(BLENDS, "best")
def best_member(predictions, target, metric_name):
    """The member with the best score, alone."""
    chosen = best_of(metric_name, [ku.METRICS[metric_name](target, p) for p in predictions])
    return np.eye(len(predictions))[chosen], 0.0


def centred(predictions, target):
    """Cells (N * K, M) of the members and (N * K,) of the target, less the mean of each output, in standard deviations
    of the target: what a regression without intercept takes."""
    rows, goal = predictions - predictions.mean(1, keepdims=True), target - target.mean(0)
    return rows.reshape(len(rows), -1).T / goal.std(), goal.ravel() / goal.std()


def with_intercept(weights, predictions, target):
    """The weights, and the intercept (K,) that gives the blend the mean of the target."""
    return weights, target.mean(0) - np.tensordot(weights, predictions.mean(1), 1)


@ku.register(BLENDS, "nnls")
def least_squares(predictions, target, metric_name):
    """Least squares with weights of 0 or more and an intercept. The weights need not add up to 1: members that
    exaggerate are shrunk to the mean."""
    return with_intercept(scipy.optimize.nnls(*centred(predictions, target))[0], predictions, target)


@ku.register(BLENDS, "hill")
def hill_climbing(predictions, target, metric_name):
    """Greedy selection with replacement, on the metric itself: each round adds the member that makes the mean of those
    chosen best, and the best round counts. Caruana et al. 2004, "Ensemble selection from libraries of models"."""
    score, counts, total = ku.METRICS[metric_name], np.zeros(len(predictions)), np.zeros_like(predictions[0])
    weights, best = None, math.nan
    for size in range(1, HILL_ROUNDS + 1):
        scores = [score(target, (total + p) / size) for p in predictions]
        chosen = best_of(metric_name, scores)
        counts[chosen] += 1
        total += predictions[chosen]
        if ku.improves(metric_name, scores[chosen], best):
            weights, best = counts / size, scores[chosen]
    return weights, 0.0


@ku.register(BLENDS, "ridge")
def ridge(predictions, target, metric_name):
    """Ridge regression with an intercept, drawn to equal weights and not to 0: of what the mean of the members leaves
    over. Weights may be negative; leave-one-out errors choose the penalty."""
    x, y = centred(predictions, target)
    rest = sklearn.linear_model.RidgeCV(RIDGE_ALPHAS, fit_intercept=False).fit(x, y - x.mean(1))
    return with_intercept(1 / len(predictions) + rest.coef_, predictions, target)


@dataclasses.dataclass(frozen=True)
class BlendConfig(ku.Settings):
    """The settings of blend.ipynb."""

    runs_dir: str = ku.option("runs", "folder whose finished runs are blended, those of its sub-folders included")
    runs: str = ku.option("", "names of the runs to blend, with commas; empty means all")
    method: str = ku.option(
        "auto", "auto mean best nnls hill ridge; auto: the best by its nested score", ("auto", *BLENDS)
    )
    output_dir: str = ku.option("blend", "folder of blend.json and the figure")


class Members(NamedTuple):
    """Runs that can be blended: the same rows, folds and targets, and what each predicted out of fold."""

    task: str
    metric: str
    records: dict  # name of a run -> its record
    folds: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) numbers; rows of one group are resampled together
    target: np.ndarray  # (N, K), or (N,) class numbers
    predictions: np.ndarray  # (M, N, K), of the weights that each run kept


class Blended(NamedTuple):
    """Weights of members and what they are worth, by `fit_blend`."""

    method: str
    weights: np.ndarray  # (M,)
    intercept: np.ndarray  # (K,)
    predictions: np.ndarray  # (N, K), nested: each fold blended, and cut for qwk, by what was fitted on the others
    nested: float  # score of these predictions
    optimistic: float  # score of the weights on the rows that they were fitted on
    cuts: dict  # of `threshold_scores` where the metric is qwk in regression, else empty


def choose_records(records, runs):
    """{name: record} of the runs named in the setting `runs`, or of all."""
    named = {}
    for record in records:
        named.setdefault(record["folder"].name, []).append(record)
    wanted = [name.strip() for name in runs.split(",")] if runs else list(named)
    if problems := [
        f"runs: no finished run is called {name!r}{ku.nearest(name, named)}" for name in set(wanted) - {*named}
    ]:
        raise ku.ConfigError(sorted(problems))
    same = [ku.listing(record["folder"] for record in named[name]) for name in wanted if len(named[name]) > 1]
    if same:
        raise comparison.ComparisonError(
            [f"one name, and a bundle needs two: {folders}; rename one" for folders in same]
        )
    return {name: named[name][0] for name in dict.fromkeys(wanted)}


def kept_predictions(record, oof):
    """What the weights that a run kept predicted out of fold, (N, K)."""
    return oof[[ku.suffixed("prediction", name, record["outputs"]) for name in record["outputs"]]].to_numpy(np.float64)


def align_members(records, runs=""):
    """The `Members` among records from `read_records` that the setting `runs` names.

    Raises ConfigError for names that are none, and ComparisonError where runs differ from the first in metric, outputs,
    rows, folds, groups or targets, or an oof.csv does not give the score that its record tells.
    """
    chosen = choose_records(records, runs)
    first, *others = chosen
    if not others:
        raise comparison.ComparisonError(f"run {first} is alone: there is nothing to blend it with")
    if problems := [p for name in others for p in comparison.setting_problems(chosen[name], chosen[first], first)]:
        raise comparison.ComparisonError(problems)
    oofs = {name: comparison.read_oof([record]) for name, record in chosen.items()}
    for name, oof in oofs.items():
        problems += comparison.row_problems(name, oof, oofs[first], first) + comparison.group_problems(
            name, chosen[name], oof
        )
    if problems:
        raise comparison.ComparisonError(problems)
    cfg = comparison.compared_config(chosen[first])
    target, folds, groups = comparison.encode_oof(oofs[first], cfg, chosen[first]["classes"])
    if len(np.unique(folds)) < 2:
        raise comparison.ComparisonError(
            "the runs have one fold: weights are scored on a fold that they were not fitted on"
        )
    aligned = [kept_predictions(record, oofs[name].loc[oofs[first].index]) for name, record in chosen.items()]
    for record, predictions in zip(chosen.values(), aligned, strict=True):
        told, got = record["oof"][record["settings"]["checkpoint"]], ku.METRICS[cfg.metric](target, predictions)
        if not abs(got - told) <= 1e-5 * max(1, abs(told)):  # NaN too
            problems.append(f"{record['folder']}: oof.csv has a {cfg.metric} of {got:.6g}, record.json of {told:.6g}")
    if problems:
        raise comparison.ComparisonError(problems)
    print(f"{len(chosen)} members, {len(folds)} rows, {len(np.unique(folds))} folds, scored by {cfg.metric}")
    if flattered := [name for name, record in chosen.items() if record["settings"]["checkpoint"] == "best"]:
        print(f"flattered, since they kept the checkpoint that is best on these rows: {ku.listing(flattered)}")
    return Members(cfg.task, cfg.metric, chosen, folds, groups, target, np.stack(aligned))


def blended_rows(weights, intercept, predictions):
    """(M, N, K) predictions as one, (N, K)."""
    return np.tensordot(weights, predictions, 1) + intercept


def fit_blend(members, method):
    """The `Blended` of members by a method of BLENDS."""
    metric_name, target, predictions = members.metric, members.target, members.predictions
    fit, nested = BLENDS[method], np.empty_like(predictions[0])
    for fold in ku.progress(np.unique(members.folds), f"blend by {method}"):
        own = members.folds == fold
        nested[own] = blended_rows(*fit(predictions[:, ~own], target[~own], metric_name), predictions[:, own])
    weights, intercept = fit(predictions, target, metric_name)
    optimistic = ku.METRICS[metric_name](target, blended := blended_rows(weights, intercept, predictions))
    cuts = {}
    if (members.task, metric_name) == ("regression", "qwk"):
        whole = np.rint(target)
        cuts = ku.threshold_scores(whole, blended, members.folds)
        nested, optimistic = ku.nested_levels(whole, nested, members.folds), cuts["fitted"]
    intercept = np.broadcast_to(intercept, predictions.shape[2:])
    return Blended(method, weights, intercept, nested, ku.METRICS[metric_name](target, nested), optimistic, cuts)


def fit_blends(members, method="auto"):
    """The `Blended` by every method that the task allows, the chosen one first: that of `method`, or for `auto` the one
    with the best nested score, of equal ones the one that stands first in BLENDS. ConfigError for a method that would
    not leave probabilities as such."""
    methods = list(BLENDS) if members.task == "regression" else CLASS_BLENDS
    if method not in ("auto", *methods):
        raise ku.ConfigError(
            f"method {method} is for regression; for task {members.task} there are {ku.listing(methods)}"
        )
    blends = [fit_blend(members, name) for name in methods]
    best = best_of(members.metric, [blended.nested for blended in blends])
    chosen = blends[best if method == "auto" else methods.index(method)]
    return [chosen, *(blended for blended in blends if blended is not chosen)]


def compare_blends(members, blends, n_resamples=2000, seed=0):
    """Table of the methods: nested and optimistic score, members with a weight, and the difference of the nested score
    to that of the best member alone, with its 95 % interval `low` to `high` by a bootstrap over rows or groups."""
    table = pd.DataFrame([{"method": b.method, "nested": b.nested, "optimistic": b.optimistic} for b in blends])
    table["members"] = [np.count_nonzero(b.weights) for b in blends]
    nested, rng = np.stack([b.predictions for b in blends]), np.random.default_rng(seed)
    scores = comparison.resampled_scores(
        members.metric, members.target, nested, members.groups, n_resamples, rng
    )  # (R, methods)
    single = [b.method for b in blends].index("best")
    table["difference"] = table["nested"] - table["nested"][single]
    spread = scores - scores[:, [single]] - table["difference"].to_numpy()
    spread = comparison.widened(members.groups.max() + 1) * spread
    for name, share in (("low", 0.025), ("high", 0.975)):
        table[name] = table["difference"] + np.quantile(spread, share, axis=0)
    return table.set_index("method")


def member_scores(members, blends):
    """Table of the members, the best first: the score of each, the checkpoint it kept, its weight by each method."""
    score = ku.METRICS[members.metric]
    table = pd.DataFrame({"member": list(members.records)})
    table[members.metric] = [score(members.target, predictions) for predictions in members.predictions]
    table["checkpoint"] = [record["settings"]["checkpoint"] for record in members.records.values()]
    for blended in blends:
        table[blended.method] = blended.weights
    return table.sort_values(members.metric, ascending=score.better == "lower", kind="stable").set_index("member")


def residuals(members):
    """Target less prediction of every member, (M, N * K); of a multiclass task with targets of 0 and 1."""
    target = members.target
    target = np.eye(members.predictions.shape[2])[target] if target.ndim == 1 else target
    return (target - members.predictions).reshape(len(members.predictions), -1)


def plot_blend(members, blended, folder):
    """Correlation of the errors of members, the best first, and their weights, as blend.png. Members whose errors are
    alike add little to each other."""
    scores = member_scores(members, [blended])
    order = [list(members.records).index(name) for name in scores.index]
    shared, n = np.corrcoef(residuals(members)[order]), len(order)
    figure = ku.new_figure(7 + 0.5 * n, 2.2 + 0.42 * n)
    left, right = figure.subplots(1, 2, width_ratios=(n + 2, 6))
    image = left.imshow(shared, vmin=min(0, shared.min()), vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=left, shrink=0.8)
    names = [f"{name}  {score:.4g}" for name, score in scores[members.metric].items()]
    left.set_yticks(range(n), [textwrap.fill(name, 2 * comparison.LABEL) for name in names], fontsize="small")
    left.set_xticks(range(n), range(1, n + 1))
    for (i, j), value in np.ndenumerate(shared):
        left.text(
            j,
            i,
            f"{value:.2f}".removeprefix("0"),
            ha="center",
            va="center",
            fontsize="x-small",
            color="white" if value > 0.6 else "black",
        )
    left.set_title(f"correlation of errors; members by {members.metric}", fontsize="medium")
    weights = scores[blended.method]
    right.barh(range(n), weights, color=[comparison.BLUE if weight > 0 else comparison.RED for weight in weights])
    right.axvline(0, color="black", linewidth=0.8)
    right.set_ylim(n - 0.5, -0.5)
    right.set_yticks([])
    for i, weight in enumerate(weights):
        right.text(max(weight, 0), i, f" {weight:.3g}", va="center", fontsize="small")
    right.margins(x=0.25)
    right.set_title(f"weights by {blended.method}", fontsize="medium")
    ku.save_figure(figure, folder / "blend.png")


def write_blend(members, blended, folder):
    """Write blend.json, which tools/bundle.py packs and infer.ipynb blends by: members whose weight is not 0, with the
    SHA-256 of their record.json. Returns what was written."""
    told = member_scores(members, [blended])
    kept = {
        name: {
            "weight": float(told[blended.method][name]),
            "record_sha256": ku.file_sha256(record["folder"] / "record.json"),
            members.metric: float(told[members.metric][name]),
            "checkpoint": record["settings"]["checkpoint"],
        }
        for name, record in members.records.items()
        if told[blended.method][name]
    }
    if not kept:
        raise comparison.ComparisonError(
            f"{blended.method} gives no member a weight: none knows more than the mean of the target"
        )
    content = {
        "method": blended.method,
        "metric": members.metric,
        "nested": blended.nested,
        "optimistic": blended.optimistic,
        "rows": len(members.folds),
        "members": kept,
        "intercept": blended.intercept.tolist(),
        "cuts": {name: blended.cuts[name] for name in ("thresholds", "levels") if name in blended.cuts},
        "versions": ku.versions(),
    }
    ku.write_json(folder / ku.BLEND, content)
    weights = {name: member["weight"] for name, member in kept.items()}
    print(f"wrote {folder / ku.BLEND}: {blended.method}, {ku.describe_blend(weights, content['intercept'])}")
    paths = shlex.join(
        str(path) for path in (*(members.records[n]["folder"] for n in kept), "--blend", folder / ku.BLEND)
    )
    print(f"pack it: python tools/bundle.py {paths} -o DIR --id OWNER/SLUG --title TITLE")
    return content
