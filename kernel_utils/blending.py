"""Blending of finished runs, for blend.ipynb: weights, what they are worth, and blend.json.

Weights are fitted on what the runs predicted out of fold. A member is a run; seeds of one
configuration are members of their own. A member has one weight for all its outputs.

    import blending, comparison
    inputs = blending.align_members(comparison.read_records("runs"))
    results = blending.fit_blends(inputs)
    blending.write_blend(inputs, results[0], folder)

Shapes: M members, N rows, K outputs, R resamples.
"""

import dataclasses
import math
import os
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import comparison
import numpy as np
import pandas as pd
import scipy.optimize
import sklearn.linear_model
from comparison import ComparisonError

import kernel_utils as ku

__all__ = [
    "BLENDS",
    "BlendConfig",
    "BlendInputs",
    "BlendResult",
    "align_members",
    "compare_blends",
    "fit_blends",
    "member_scores",
    "plot_blend",
    "write_blend",
]

# name of a method -> function(predictions (M, N, K), target, metric) -> (weights (M,), intercept)
BLENDS = {}
_CLASS_BLENDS = ("mean", "best", "hill")  # weights are shares: probabilities stay probabilities
_HILL_ROUNDS = 50  # weights are multiples of 1/50 at the finest
_RIDGE_ALPHAS = np.geomspace(1e-2, 1e5, 15)  # of targets with variance 1


# ---------------------------------------------------------------------------------------
# Methods


def _best_of(metric_name, scores):
    """Position of the best score, the first of equal ones. ComparisonError where all are NaN."""
    losses = np.array(scores)
    if ku.METRICS[metric_name].better != "lower":
        losses = -losses
    if np.isnan(losses).all():
        raise ComparisonError(f"none of {len(scores)} predictions has a {metric_name}")
    return int(np.nanargmin(losses))


@ku.register(BLENDS, "mean")
def _equal_weights(predictions, target, metric_name):
    """Every member alike."""
    return np.full(len(predictions), 1 / len(predictions)), 0.0


@ku.register(BLENDS, "best")
def _best_member(predictions, target, metric_name):
    """The member with the best score, alone."""
    chosen = _best_of(metric_name, [ku.METRICS[metric_name](target, p) for p in predictions])
    return np.eye(len(predictions))[chosen], 0.0


def _standardize(predictions, target):
    """Cells (N * K, M) of the members and (N * K,) of the target, for a fit without intercept.

    Less the mean of each output, in standard deviations of the target.
    """
    centred = predictions - predictions.mean(1, keepdims=True)
    goal = target - target.mean(0)
    return centred.reshape(len(centred), -1).T / goal.std(), goal.ravel() / goal.std()


def _with_intercept(weights, predictions, target):
    """The weights, and the intercept (K,) that gives the blend the mean of the target."""
    return weights, target.mean(0) - np.tensordot(weights, predictions.mean(1), 1)


@ku.register(BLENDS, "nnls")
def _least_squares(predictions, target, metric_name):
    """Least squares with weights of 0 or more and an intercept.

    The weights need not add up to 1: members that exaggerate are shrunk to the mean.
    """
    weights, _ = scipy.optimize.nnls(*_standardize(predictions, target))
    return _with_intercept(weights, predictions, target)


@ku.register(BLENDS, "hill")
def _hill_climbing(predictions, target, metric_name):
    """Greedy selection with replacement, on the metric itself.

    Each round adds the member that makes the mean of those chosen best, and the best round
    counts. Caruana et al. 2004, "Ensemble selection from libraries of models".
    """
    score = ku.METRICS[metric_name]
    counts = np.zeros(len(predictions))
    total = np.zeros_like(predictions[0])
    weights, best = None, math.nan
    for size in range(1, _HILL_ROUNDS + 1):
        scores = [score(target, (total + p) / size) for p in predictions]
        chosen = _best_of(metric_name, scores)
        counts[chosen] += 1
        total += predictions[chosen]
        if score.is_better(scores[chosen], best):
            weights, best = counts / size, scores[chosen]
    return weights, 0.0


@ku.register(BLENDS, "ridge")
def _ridge(predictions, target, metric_name):
    """Ridge regression of what the mean of the members leaves over, with an intercept.

    So it is drawn to equal weights and not to 0. Weights may be negative; leave-one-out errors
    choose the penalty.
    """
    x, y = _standardize(predictions, target)
    model = sklearn.linear_model.RidgeCV(_RIDGE_ALPHAS, fit_intercept=False)
    model.fit(x, y - x.mean(1))
    return _with_intercept(1 / len(predictions) + model.coef_, predictions, target)


@dataclasses.dataclass
class BlendConfig(ku.Settings):
    """The settings of blend.ipynb."""

    runs_dir: str = ku.option(
        "runs",
        "folder whose finished runs are blended, those of its sub-folders included",
    )
    runs: str = ku.option("", "names of the runs to blend, with commas; empty means all")
    method: str = ku.option(
        "auto",
        "auto mean best nnls hill ridge; auto: the best by its nested score",
        ("auto", *BLENDS),
    )
    output_dir: str = ku.option("blend", "folder of blend.json and the figure")


# ---------------------------------------------------------------------------------------
# Members


class BlendInputs(NamedTuple):
    """Members of the same rows, folds and targets, and what each predicted out of fold."""

    task: str
    metric: str
    records: dict  # name of a run -> its record
    folds: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) numbers; rows of one group are resampled together
    target: np.ndarray  # as `Config.encode_targets` gives it
    predictions: np.ndarray  # (M, N, K), of the weights that each run kept
    cuts: ku._Cuts | None = None


def _choose_records(records, runs):
    """{name: record} of the runs named in the setting `runs`, or of all."""
    by_name = {}
    for record in records:
        by_name.setdefault(record["folder"].name, []).append(record)
    wanted = [name.strip() for name in runs.split(",")] if runs else list(by_name)
    problems = []
    for name in sorted(set(wanted) - set(by_name)):
        hint = ku._did_you_mean(name, by_name)
        problems.append(f"runs: no finished run is called {name!r}{hint}")
    if problems:
        raise ku.ConfigError(problems)
    for name in wanted:
        if len(by_name[name]) > 1:
            folders = ku._comma_join(record["folder"] for record in by_name[name])
            problems.append(f"one name, and a bundle needs two: {folders}; rename one")
    if problems:
        raise ComparisonError(problems)
    return {name: by_name[name][0] for name in dict.fromkeys(wanted)}


def _kept_predictions(record, oof):
    """What the weights that a run kept predicted out of fold, (N, K)."""
    outputs = record["outputs"]
    columns = ku._column_names("prediction", outputs)
    return oof[columns].to_numpy(np.float64)


def _score_problems(record, predictions, target, metric_name):
    """Where an oof.csv does not give the score that its record tells."""
    expected = record["oof"][record["settings"]["keep"]]
    expected = math.nan if expected is None else expected
    got = ku.METRICS[metric_name](target, predictions)
    if abs(got - expected) <= 1e-5 * max(1, abs(expected)):  # not so for NaN
        return []
    scores = f"oof.csv has a {metric_name} of {got:.6g}, record.json of {expected:.6g}"
    return [f"{record['folder']}: {scores}"]


def align_members(records, runs=""):
    """The `BlendInputs` among records from `read_records` that the setting `runs` names.

    Raises ConfigError for names that are none, and ComparisonError where runs differ from the
    first in metric, outputs, rows, folds, groups or targets, or an oof.csv does not give the
    score that its record tells.
    """
    chosen = _choose_records(records, runs)
    first, *others = chosen
    if not others:
        raise ComparisonError(f"run {first} is alone: there is nothing to blend it with")
    problems = []
    for name in others:
        problems += comparison.setting_problems(chosen[name], chosen[first], first)
    if problems:
        raise ComparisonError(problems)
    oofs = {name: comparison.read_oof([record]) for name, record in chosen.items()}
    reference = oofs[first]
    for name, oof in oofs.items():
        problems += comparison.row_problems(name, oof, reference, first)
        problems += comparison.group_problems(name, chosen[name], oof)
    if problems:
        raise ComparisonError(problems)
    cfg = comparison.compared_config(chosen[first])
    target, folds, groups = comparison.encode_oof(reference, cfg, chosen[first]["classes"])
    n_folds = len(np.unique(folds))
    if n_folds < 2:
        remedy = "weights are scored on a fold that they were not fitted on"
        raise ComparisonError(f"the runs have one fold: {remedy}")
    predictions = []
    for name, record in chosen.items():
        predictions.append(_kept_predictions(record, oofs[name].loc[reference.index]))
        problems += _score_problems(record, predictions[-1], target, cfg.metric)
    if problems:
        raise ComparisonError(problems)
    sizes = f"{len(chosen)} members, {len(folds)} rows, {n_folds} folds"
    print(f"{sizes}, scored by {cfg.metric}")
    flattered = [n for n, record in chosen.items() if record["settings"]["keep"] == "best"]
    if flattered:
        reason = "since they kept the checkpoint that is best on these rows"
        print(f"flattered, {reason}: {ku._comma_join(flattered)}")
    cuts = ku._Cuts.of(cfg, target)
    members = np.stack(predictions)
    return BlendInputs(cfg.task, cfg.metric, chosen, folds, groups, target, members, cuts)


# ---------------------------------------------------------------------------------------
# Blends


class BlendResult(NamedTuple):
    """Weights of members and what they are worth."""

    method: str
    weights: np.ndarray  # (M,)
    intercept: np.ndarray  # (K,)
    # (N, K), nested: each fold is blended, and cut to labels, by what was fitted on the others
    predictions: np.ndarray
    nested: float  # score of these predictions
    in_sample: float  # score of the weights on the rows that they were fitted on
    cuts: dict  # of `_Cuts.describe` where the metric scores grades or labels, else empty


def _blend_rows(weights, intercept, predictions):
    """(M, N, K) predictions as one, (N, K)."""
    return np.tensordot(weights, predictions, 1) + intercept


def _fit_blend(inputs, method):
    """The `BlendResult` of members by a method of BLENDS."""
    metric_name, target, predictions = inputs.metric, inputs.target, inputs.predictions
    fit, score = BLENDS[method], ku.METRICS[metric_name]
    nested = np.empty_like(predictions[0])
    for fold in ku._progress(np.unique(inputs.folds), f"blend by {method}"):
        own = inputs.folds == fold
        weights, intercept = fit(predictions[:, ~own], target[~own], metric_name)
        nested[own] = _blend_rows(weights, intercept, predictions[:, own])
    weights, intercept = fit(predictions, target, metric_name)
    blended = _blend_rows(weights, intercept, predictions)
    in_sample, cuts = score(target, blended), {}
    if inputs.cuts:
        cuts = inputs.cuts.describe(target, nested, inputs.folds)
        if cuts["is_fitted"]:
            nested = inputs.cuts.apply_nested(target, nested, inputs.folds)
            cuts["thresholds"] = inputs.cuts.fit(target, blended)
        in_sample = score(target, inputs.cuts.apply(cuts["thresholds"], blended))
    return BlendResult(
        method=method,
        weights=weights,
        intercept=np.broadcast_to(intercept, predictions.shape[2:]),
        predictions=nested,
        nested=score(target, nested),
        in_sample=in_sample,
        cuts=cuts,
    )


def fit_blends(inputs, method="auto"):
    """The `BlendResult` by every method that the task allows, the chosen one first.

    That is the one by `method`, or for `auto` the one with the best nested score, of equal ones
    the one that stands first in BLENDS. ConfigError for a method that would not leave
    probabilities as such.
    """
    methods = list(BLENDS) if inputs.task == "regression" else _CLASS_BLENDS
    if method not in ("auto", *methods):
        remedy = f"for task {inputs.task} there are {ku._comma_join(methods)}"
        raise ku.ConfigError(f"method {method} is for regression; {remedy}")
    results = [_fit_blend(inputs, name) for name in methods]
    if method == "auto":
        chosen = results[_best_of(inputs.metric, [result.nested for result in results])]
    else:
        chosen = results[methods.index(method)]
    return [chosen, *(result for result in results if result is not chosen)]


def compare_blends(inputs, results, n_resamples=2000, seed=0):
    """Table of the methods: nested and in-sample score, members with a weight, difference.

    The difference is that of the nested score to the best member alone, with its 95 % interval
    `low` to `high` by a bootstrap over rows or groups.
    """
    names = ["method", "nested", "in_sample"]
    table = pd.DataFrame([{name: getattr(r, name) for name in names} for r in results])
    table["members"] = [np.count_nonzero(result.weights) for result in results]
    scores = comparison.resampled_scores(
        inputs.metric,
        inputs.target,
        np.stack([result.predictions for result in results]),
        inputs.groups,
        n_resamples,
        np.random.default_rng(seed),
    )  # (R, methods)
    single = [result.method for result in results].index("best")
    table["difference"] = table["nested"] - table["nested"][single]
    spread = scores - scores[:, [single]] - table["difference"].to_numpy()
    spread = comparison.small_sample_factor(inputs.groups.max() + 1) * spread
    table["low"] = table["difference"] + np.quantile(spread, 0.025, axis=0)
    table["high"] = table["difference"] + np.quantile(spread, 0.975, axis=0)
    return table.set_index("method")


def member_scores(inputs, results):
    """Table of the members, the best first: score, checkpoint kept, weight by each method."""
    score, records = ku.METRICS[inputs.metric], inputs.records
    table = pd.DataFrame({"member": list(records)})
    table[inputs.metric] = [score(inputs.target, p) for p in inputs.predictions]
    table["checkpoint"] = [record["settings"]["keep"] for record in records.values()]
    for result in results:
        table[result.method] = result.weights
    ascending = score.better == "lower"
    table = table.sort_values(inputs.metric, ascending=ascending, kind="stable")
    return table.set_index("member")


def _residuals(inputs):
    """Target less prediction of every member, (M, N * K); of classes, with targets of 0 and 1."""
    n_members, _, n_outputs = inputs.predictions.shape
    target = inputs.target
    if target.ndim == 1:
        target = np.eye(n_outputs)[target]
    target = target.reshape(-1, n_outputs)  # soft ones are (N, 1, C)
    return (target - inputs.predictions).reshape(n_members, -1)


def plot_blend(inputs, result, folder):
    """Correlation of the errors of members, the best first, and their weights, as blend.png.

    Members whose errors are alike add little to each other.
    """
    scores = member_scores(inputs, [result])
    order = [list(inputs.records).index(name) for name in scores.index]
    correlation = np.corrcoef(_residuals(inputs)[order])
    n = len(order)
    figure = ku._new_figure(7 + 0.5 * n, 2.2 + 0.42 * n)
    left, right = figure.subplots(1, 2, width_ratios=(n + 2, 6))

    lowest = min(0, correlation.min())
    image = left.imshow(correlation, vmin=lowest, vmax=1, cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=left, shrink=0.8)
    labels = []
    for name, score in scores[inputs.metric].items():
        labels.append(textwrap.fill(f"{name}  {score:.4g}", 2 * comparison.LABEL_WIDTH))
    left.set_yticks(range(n), labels, fontsize="small")
    left.set_xticks(range(n), range(1, n + 1))
    centred = dict(ha="center", va="center", fontsize="x-small")
    for (i, j), value in np.ndenumerate(correlation):
        color = "white" if value > 0.6 else "black"
        left.text(j, i, f"{value:.2f}".removeprefix("0"), color=color, **centred)
    left.set_title(f"correlation of errors; members by {inputs.metric}", fontsize="medium")

    weights = scores[result.method]
    colors = [comparison.BLUE if weight > 0 else comparison.RED for weight in weights]
    right.barh(range(n), weights, color=colors)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_ylim(n - 0.5, -0.5)
    right.set_yticks([])
    for i, weight in enumerate(weights):
        right.text(max(weight, 0), i, f" {weight:.3g}", va="center", fontsize="small")
    right.margins(x=0.25)
    right.set_title(f"weights by {result.method}", fontsize="medium")
    ku._save_figure(figure, folder / "blend.png")


def write_blend(inputs, result, folder):
    """Write blend.json, by which tools/bundle.py packs and infer.ipynb blends; what was written.

    It has the members whose weight is not 0, with the SHA-256 of their record.json.
    """
    scores = member_scores(inputs, [result])
    members = {}
    for name, record in inputs.records.items():
        weight = float(scores[result.method][name])
        if weight:
            members[name] = {
                "weight": weight,
                "record_sha256": ku._file_sha256(record["folder"] / "record.json"),
                inputs.metric: float(scores[inputs.metric][name]),
                "checkpoint": record["settings"]["keep"],
            }
    if not members:
        reason = "none knows more than the mean of the target"
        raise ComparisonError(f"{result.method} gives no member a weight: {reason}")
    content = {
        "method": result.method,
        "metric": inputs.metric,
        "nested": result.nested,
        "in_sample": result.in_sample,
        "rows": len(inputs.folds),
        "members": members,
        "intercept": result.intercept.tolist(),
        "cuts": {n: result.cuts[n] for n in ("thresholds", "levels") if n in result.cuts},
        "versions": ku._versions(),
    }
    path = folder / ku._BLEND_FILE
    ku._write_json(path, content)
    weights = {name: member["weight"] for name, member in members.items()}
    description = ku._Blend(result.method, weights, content["intercept"], content["cuts"])
    print(f"wrote {path}: {result.method}, {description}")
    folders = [str(inputs.records[name]["folder"]) for name in members]
    arguments = shlex.join([*folders, "--blend", str(path)])
    tool = Path(__file__).parents[1] / "tools" / "bundle.py"
    tool = shlex.quote(os.path.relpath(tool)) if tool.is_file() else "tools/bundle.py"
    print(f"pack it: python {tool} {arguments} -o DIR --id OWNER/SLUG --title TITLE")
    return content
