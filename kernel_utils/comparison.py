"""Comparison of runs, for compare.ipynb.

Runs of one configuration differ in `seed` alone, or hold different folds of one seed. Configurations are compared by
their out-of-fold predictions for the same rows. Equal seeds are no pairing: such runs share no more than others do.
Shapes: S seeds, R resamples, A configurations.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

import kernel_utils as ku

INCIDENTAL = (ku.FREE - {"backbone", "pseudo_dir"}) | {"seed", "checkpoint", "batch_tokens"}
NEEDED = ("task", "target_columns", "epochs", "evals_per_epoch", "eval_steps")  # what comparing asks of the settings
KINDS = ("last", "best")  # checkpoints
LEVEL = 0.05  # chance that one of the comparisons with a baseline calls two equal configurations different


@dataclasses.dataclass(frozen=True)
class CompareConfig(ku.Settings):
    """The settings of compare.ipynb."""

    runs_dir: str = ku.option("runs", "folder whose finished runs are compared, those of its sub-folders included")
    baseline: str = ku.option("", "configuration to compare with; empty means the one that is closest to the defaults")
    output_dir: str = ku.option("comparison", "folder of the tables and figures")


class ComparisonError(ku.KitError):
    """Runs whose scores do not stand for the same thing."""

    title = "the runs cannot be compared:"


class Arm(NamedTuple):
    """A configuration and what its runs predicted for the rows of a study."""

    name: str
    seeds: list
    records: list  # of all its runs
    predictions: dict  # last and best -> (S, N, K)


class Study(NamedTuple):
    """Configurations that can be compared, the baseline first: the same rows, folds, targets and evaluations."""

    metric: str
    folds: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) numbers; rows of one group are resampled together
    test_to_train: float  # rows of a fold by those that its models were trained on
    target: np.ndarray  # (N, K), or (N,) class numbers
    arms: list


def read_records(folder):
    """Records of the finished runs in `folder` and below, each with its run folder as `folder`. Runs that did not
    finish are named and left out; ComparisonError where none did."""
    runs = sorted(path.parent for path in Path(folder).expanduser().rglob("record.json"))
    finished = [run for run in runs if ku.is_complete(run)]
    if unfinished := [run.name for run in runs if run not in finished]:
        print(f"left out, since they did not finish: {ku.listing(unfinished)}")
    if not finished:
        raise ComparisonError(f"runs_dir {str(folder)!r} has no finished run, which is a folder with record.json")
    return [ku.read_record(run) | {"folder": run} for run in finished]


def effective(record):
    """What makes the configuration of a run: its settings, with what was left open as it was resolved."""
    settings = ku.as_recorded(ku.Config().to_dict()) | record["settings"] | record["resolved"]
    settings["precision"] = record["precision"]
    return {name: value for name, value in settings.items() if name not in INCIDENTAL}


def pair(name, value):
    """A setting as text such as `llrd=0.95`; numbers are written in one way, whoever wrote them."""
    with contextlib.suppress(TypeError, ValueError):
        value = f"{float(value):.12g}" if not isinstance(value, bool) else value
    return f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"


def pairs(settings, names):
    return " ".join(pair(name, settings.get(name)) for name in names)


def choose_baseline(configurations, varied, baseline):
    """The one of some configurations, lists of records, that has the settings of `baseline`, such as `head=cls llrd=1`;
    of several the one with most of its `varied` settings at their defaults. ConfigError where that is not one."""
    wanted = {pair(*part.partition("=")[::2]) for part in baseline.split()}
    default, changes, known = ku.as_recorded(ku.Config().to_dict()), {}, {}
    for i, runs in enumerate(configurations):
        settings = effective(runs[0])
        own = [pair(*item) for item in settings.items()]
        known |= dict.fromkeys(own)
        if wanted <= set(own) or baseline == pairs(settings, varied):
            changes[i] = sum(runs[0]["settings"].get(key, default.get(key)) != default.get(key) for key in varied)
    chosen = [i for i, count in changes.items() if count == min(changes.values())]
    if len(chosen) != 1:
        lacking = [f"{part}{ku.nearest(part, known)}" for part in sorted(wanted - set(known))]
        found = "several configurations fit" if chosen else f"no configuration has {ku.listing(lacking or [baseline])}"
        names = [pairs(effective(configurations[i][0]), varied) for i in chosen or range(len(configurations))]
        raise ku.ConfigError(f"baseline {baseline!r}: {found}; set it to what is one of: {'; '.join(names)}")
    return configurations[chosen[0]]


def group_records(records, baseline):
    """{name of a configuration: its records}, the baseline first. The name of the baseline has all settings that vary,
    that of another those in which it differs from the baseline."""
    grouped = {}
    for record in records:
        grouped.setdefault(json.dumps(effective(record), sort_keys=True), []).append(record)
    if len(grouped) == 1:
        raise ComparisonError(f"all {len(records)} runs have one configuration: there is nothing to compare it with")
    configurations = list(grouped.values())
    settings = [effective(runs[0]) for runs in configurations]
    names = dict.fromkeys(name for own in settings for name in own)
    varied = [name for name in names if any(own.get(name) != settings[0].get(name) for own in settings)]
    first = choose_baseline(configurations, varied, baseline)
    base = effective(first[0])
    named = {pairs(base, varied): first}
    for runs, own in zip(configurations, settings, strict=True):
        if runs is not first:
            named[pairs(own, [name for name in varied if own.get(name) != base.get(name)])] = runs
    return named


def compared_config(record):
    """The settings of a run that comparing needs. ConfigError where its metric is not registered."""
    return ku.Config.from_dict(
        {name: record["settings"][name] for name in NEEDED} | {"metric": record["oof"]["metric"]}
    )


def evaluations(records):
    """{fold: how often it was evaluated} of the runs of one seed: of so many scores `best` is the best."""
    cfg = compared_config(records[0])
    folds = [fold for record in records for fold in record["folds"]]
    steps = {fold["fold"]: fold["steps"] - fold.get("pseudo_steps", 0) for fold in folds}
    return {fold: len(ku.evaluation_steps(n // cfg.epochs, cfg)) for fold, n in steps.items()}


@contextlib.contextmanager
def named_errors(path):
    """A file that is missing or broken is a ComparisonError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ComparisonError(f"{path}: {type(error).__name__}: {error}") from None


def read_oof(records):
    """(N, ...) table of what the runs of one seed, with different folds, predicted, by id. Labels stay text."""
    text, frames = {"id": str, "group": str} | ({"target": str} if records[0]["classes"] else {}), []
    for record in records:
        with named_errors(path := record["folder"] / "oof.csv"):
            frames.append(pd.read_csv(path, dtype=text, keep_default_na=False).set_index("id"))
    return pd.concat(frames)


def setting_problems(record, first, other="the baseline"):
    """How a run differs from the first, one of `other`, in what makes scores comparable."""
    facts = [{"metric": r["oof"]["metric"], "outputs": r["outputs"], "classes": r["classes"]} for r in (record, first)]
    ours, theirs = facts
    return [
        f"{record['folder']} has {key} {ours[key]}, {other} {theirs[key]}" for key in ours if ours[key] != theirs[key]
    ]


def row_problems(name, oof, reference, other="the baseline"):
    """How the rows, folds, groups and targets of a seed differ from those of `other`, the reference."""
    if repeated := sorted(oof["fold"][oof.index.duplicated()].unique()):
        return [f"{name} has fold {ku.listing(repeated)} more than once; move or delete a run"]
    if len(apart := oof.index.symmetric_difference(reference.index)):
        ours, theirs = (f"{len(o)} rows, folds {ku.listing(sorted(o['fold'].unique()))}" for o in (oof, reference))
        return [f"{name} has {ours}, {other} {theirs}; {len(apart)} rows such as id {apart[0]!r} are in one only"]
    problems, oof = [], oof.loc[reference.index]
    for column in [c for c in dict.fromkeys([*reference, *oof]) if not c.startswith("prediction")]:
        got, expected = (o.get(column, pd.Series("none", reference.index)) for o in (oof, reference))
        if (differ := got != expected).any():
            row = differ.idxmax()
            example = f"{got[row]} against {expected[row]} at id {row!r}"
            problems.append(f"{name} has another {column} than {other} in {differ.sum()} rows, such as {example}")
    return problems


def group_problems(name, record, oof):
    """Before 0.5.0 an oof.csv had no groups, without which rows would count as independent."""
    if "group" in record["settings"]["fold_kind"] and "group" not in oof:
        return [f"{name} kept groups in one fold, and its oof.csv does not say which: train it anew"]
    return []


def seed_problems(name, records, oof, first, reference):
    """How the runs of a seed differ from those of the first seed of the baseline."""
    problems = row_problems(name, oof, reference) + group_problems(name, records[0], oof)
    ours, theirs = evaluations(records), evaluations(first)
    if unequal := [fold for fold in ours if ours[fold] != theirs.get(fold, ours[fold])]:
        counts = f"{ours[unequal[0]]} times in fold {unequal[0]}, the baseline {theirs[unequal[0]]} times"
        problems.append(f"{name} was evaluated {counts}: of more evaluations the best is better by chance")
    return problems


def mixture(records):
    """What differs between the machines and versions of the runs, in words: scores and seconds may carry it."""
    facts = [{key: record[key] for key in ("device", "threads")} | record["versions"] for record in records]
    values = {key: sorted({str(fact.get(key)) for fact in facts}) for key in facts[0]}
    return [f"the runs differ in {key}: {ku.listing(some)}" for key, some in values.items() if len(some) > 1]


def encode_oof(oof, cfg, classes):
    """Of an out-of-fold table: targets (N, K) or class numbers (N,), folds (N,), and groups (N,) as numbers."""
    targets = oof.rename(columns={ku.suffixed("target", name, cfg.targets): name for name in cfg.targets})
    groups = np.unique(oof.get("group", oof.index), return_inverse=True)[1]
    if groups.max() == 0:
        raise ComparisonError(f"all {len(oof)} rows are in one group: there is nothing to resample")
    return ku.encode_targets(targets, cfg, classes), oof["fold"].to_numpy(), groups


def align_runs(records, baseline=""):
    """The `Study` of records from `read_records`; `baseline` is text such as `head=cls`, see `choose_baseline`.

    Raises ConfigError where that is none or several, and ComparisonError where runs differ from the baseline in
    metric, outputs, rows, folds, groups, targets or number of evaluations, or share a seed and a fold.
    """
    configurations = group_records(records, baseline)
    seeds = {}  # (configuration, seed) -> records
    for name, runs in configurations.items():
        for record in sorted(runs, key=lambda record: record["settings"]["seed"]):
            seeds.setdefault((name, record["settings"]["seed"]), []).append(record)
    first = next(iter(seeds.values()))
    problems = [problem for record in records for problem in setting_problems(record, first[0])]
    if problems:
        raise ComparisonError(problems)
    oofs = {key: read_oof(runs) for key, runs in seeds.items()}
    reference = next(iter(oofs.values()))
    for (name, seed), oof in oofs.items():
        runs = seeds[name, seed]
        title = f"{name}, seed {seed} ({ku.listing(record['folder'] for record in runs)})"
        problems += seed_problems(title, runs, oof, first, reference)
    if problems:
        raise ComparisonError(problems)

    cfg, outputs, arms = compared_config(first[0]), first[0]["outputs"], []
    for name, runs in configurations.items():
        frames = {seed: oofs[arm, seed].loc[reference.index] for arm, seed in oofs if arm == name}
        predictions = {
            kind: np.stack(
                [f[[ku.suffixed(f"prediction_{kind}", o, outputs) for o in outputs]] for f in frames.values()]
            )
            for kind in KINDS
        }
        arms.append(Arm(name, list(frames), runs, predictions))
    target, folds, groups = encode_oof(reference, cfg, first[0]["classes"])
    sizes = reference["fold"].value_counts()
    test_to_train = float((sizes / (first[0]["rows"] - sizes)).mean())
    study = Study(cfg.metric, folds, groups, test_to_train, target, arms)
    check_scores(study)
    n_seeds = ku.listing(sorted({len(arm.seeds) for arm in arms}))
    print(f"{len(arms)} configurations, {len(target)} rows, {len(sizes)} folds, {n_seeds} seeds")
    print("\n".join([f"baseline: {arms[0].name}", *mixture(records)]))
    return study


def seed_scores(study, arm, kind):
    """(S,) scores over all rows and (S, F) scores of each fold."""
    score, folds = ku.METRICS[study.metric], np.unique(study.folds)
    every = np.array([score(study.target, p) for p in arm.predictions[kind]])
    parts = [[score(study.target[study.folds == f], p[study.folds == f]) for f in folds] for p in arm.predictions[kind]]
    return every, np.array(parts)


def check_scores(study):
    """Raise ComparisonError where a seed has no score, as a correlation has none with constant predictions."""
    for arm, kind in itertools.product(study.arms, KINDS):
        scores, _ = seed_scores(study, arm, kind)
        if len(bad := np.flatnonzero(~np.isfinite(scores))):
            seeds = ku.listing(arm.seeds[i] for i in bad)
            raise ComparisonError(f"{arm.name}, seed {seeds}: the {kind} predictions have no {study.metric}")


def resampled_scores(metric_name, target, predictions, groups, n_resamples, rng):
    """(R, P) scores of P predictions (P, N, K) over rows drawn with replacement, whole groups at once: the same rows
    for each prediction."""
    score, n_groups = ku.METRICS[metric_name], groups.max() + 1
    values = None
    if score.per_row:
        values = np.stack([score.per_row(target, p) for p in predictions], axis=1).astype(np.float64)  # (N, P, M)
    scores = np.empty((n_resamples, len(predictions)))
    every = range(n_resamples) if score.per_row else ku.progress(range(n_resamples), f"resamples of {metric_name}")
    for i in every:
        times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)[groups]  # (N,)
        if score.per_row:
            scores[i] = score.outer(np.tensordot(times, values, 1) / times.sum())
        else:
            rows = np.repeat(np.arange(len(times)), times)
            scores[i] = [score(target[rows], p[rows]) for p in predictions]
    defined = np.isfinite(scores).all(1)
    if defined.mean() < 0.9:
        raise ComparisonError(
            f"{metric_name} has no value on {(~defined).sum()} of {n_resamples} resamples of {len(groups)} rows"
        )
    return scores[defined]


def corrected_t(differences, test_to_train):
    """p of the corrected resampled t-test (Nadeau & Bengio 2003; Bouckaert & Frank 2004) of differences (F, S).

    Models of different folds share training rows, so the variance is enlarged by `test_to_train`.
    """
    n = differences.size
    variance = differences.var(ddof=1) * (1 / n + test_to_train)
    return 2 * scipy.stats.t.sf(abs(differences.mean()) / math.sqrt(variance), n - 1) if variance > 0 else math.nan


def holm(p_values):
    """p-values adjusted for their number (Holm 1979); NaN is no test."""
    adjusted, largest = np.full(len(p_values), math.nan), 0.0
    order = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]
    for rank, i in enumerate(order):
        adjusted[i] = largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
    return adjusted


class Difference(NamedTuple):
    """A configuration against the baseline, by `two_way_bootstrap`."""

    difference: float
    low: float  # 95 % interval
    high: float
    p: float
    detectable: float  # true difference that is found in about four of five such studies


def widened(n):
    """Draws of n with replacement vary too little: by how much to stretch their deviations."""
    return math.sqrt(n / (n - 1)) if n > 1 else 0.0


def two_way_bootstrap(study, kind, n_resamples, seed):
    """The `Difference` of each configuration but the baseline: of the mean over seeds of the score over all rows.

    Rows, or groups, and the seeds of each side are drawn with replacement at once (two-way bootstrap), their deviations
    `widened`. Where a variance rests on few seeds or groups, t takes the place of the normal distribution behind
    interval and p, with the degrees of freedom of Welch and Satterthwaite. A side with one seed has no variance of
    seeds: its interval is over rows alone, and p is NaN. The detectable difference allows for the number of
    configurations as Bonferroni does, and so for a little more than Holm.
    """
    rng, sides = np.random.default_rng(seed), []
    cuts = np.cumsum([len(arm.seeds) for arm in study.arms])[:-1]
    every = np.concatenate([arm.predictions[kind] for arm in study.arms])  # (P, N, K)
    point = np.array([ku.METRICS[study.metric](study.target, p) for p in every])
    rows = resampled_scores(study.metric, study.target, every, study.groups, n_resamples, rng)  # (R, P)
    n_groups = study.groups.max() + 1
    for scores, boot in zip(np.split(point, cuts), np.split(rows, cuts, axis=1), strict=True):
        n, by_rows = len(scores), boot.mean(1)
        by_seeds = np.take_along_axis(boot, rng.integers(n, size=boot.shape), 1).mean(1) - by_rows
        by_rows = widened(n_groups) * (by_rows - scores.mean())
        sides.append((scores.mean(), by_rows, widened(n) * by_seeds, scores.var(ddof=1) / n if n > 1 else 0.0, n - 1))
    (base, rows0, seeds0, variance0, freedom0), differences = sides[0], []
    for mean, by_rows, by_seeds, variance, freedom in sides[1:]:
        value, spread = mean - base, by_rows - rows0 + by_seeds - seeds0
        error, one_seed = spread.std(), min(freedom, freedom0) == 0
        parts = [((by_rows - rows0).var(), n_groups - 1), (variance, freedom), (variance0, freedom0)]
        uncertain = sum(part**2 / degrees for part, degrees in parts if part)
        t, normal = scipy.stats.t(error**4 / uncertain) if uncertain else scipy.stats.norm(), scipy.stats.norm()
        low, high = value + t.ppf(0.975) / normal.ppf(0.975) * np.quantile(spread, [0.025, 0.975])
        p = math.nan if one_seed else 2 * t.sf(abs(value) / error) if error else 1.0
        level = LEVEL / len(sides[1:])
        differences.append(Difference(value, low, high, p, (t.ppf(1 - level / 2) + t.ppf(0.8)) * error))
    return differences


def seed_curves(arm, seed, metric_name):
    """Evaluations of a seed that all its folds have: shares of the training done (E,) and scores (F, E)."""
    logs = []
    for record in arm.records:
        if record["settings"]["seed"] == seed:
            with named_errors(path := record["folder"] / "log.jsonl"):
                logs.append(pd.read_json(path, lines=True).dropna(subset=metric_name))
    log = pd.concat(logs)
    log["number"] = log.groupby("fold").cumcount()
    log["share"] = log["step"] / log.groupby("fold")["step"].transform("max")
    scores, shares = (
        log.pivot(index="fold", columns="number", values=v).dropna(axis=1) for v in (metric_name, "share")
    )
    return shares.mean().to_numpy(), scores.to_numpy()


def optimism(study, arm):
    """How much better `best` looks for being chosen on the rows it is scored on: the mean over seeds and folds of its
    distance to the score at the evaluation that the other folds of the seed would choose. NaN with one fold."""
    distances = []
    for seed in arm.seeds:
        _, scores = seed_curves(arm, seed, study.metric)
        if ku.METRICS[study.metric].better == "higher":
            scores = -scores
        for fold in range(len(scores) if len(scores) > 1 else 0):
            others = np.delete(scores, fold, 0).mean(0).argmin()
            distances.append(scores[fold, others] - scores[fold].min())
    return float(np.mean(distances)) if distances else math.nan


def describe_arm(study, arm, kind):
    """What the comparison says of a configuration by itself."""
    scores, _ = seed_scores(study, arm, kind)
    return {
        "configuration": arm.name,
        "checkpoint": kind,
        "seeds": len(scores),
        "folds": len(np.unique(study.folds)),
        "rows": len(study.folds),
        study.metric: scores.mean(),
        "sd over seeds": scores.std(ddof=1) if len(scores) > 1 else math.nan,
        "optimism": optimism(study, arm) if kind == "best" else math.nan,
        "seconds": sum(record["seconds"]["total"] for record in arm.records) / len(scores),
        "rows/s": np.mean([record["rows_per_second"] for record in arm.records]),
        "peak GB": max(record["peak_memory_bytes"] for record in arm.records) / 2**30,
    }


def fold_evidence(study, arm, kind):
    """p of `corrected_t` over folds x seeds, the seeds paired in their order, and the share of all folds and pairs of
    seeds in which a configuration beats the baseline."""
    folds, base = (seed_scores(study, side, kind)[1] for side in (arm, study.arms[0]))  # (S, F)
    n, every = min(len(folds), len(base)), folds[:, None] - base[None]  # (S, S of the baseline, F)
    won = every < 0 if ku.METRICS[study.metric].better == "lower" else every > 0
    cells = (folds[:n] - base[:n]).T
    p = corrected_t(cells, study.test_to_train) if min(cells.shape) > 1 else math.nan
    return {"p of t": p, "cells won": won.mean()}


def verdict(row, better):
    """What a row of the comparison says, in words."""
    if math.isnan(row["difference"]):
        return "baseline"
    if math.isnan(row["p"]):
        return "not distinguishable (one seed names no winner)"
    if row["p of Holm"] < LEVEL:
        return "better" if (row["difference"] < 0) == (better == "lower") else "worse"
    return f"not distinguishable (smallest detectable difference {row['detectable']:.4g})"


def compare_runs(study, n_resamples=2000, seed=0):
    """Table of a `Study`: for the last and the best checkpoint a row for each configuration, the baseline first.

    Columns: the metric, mean over seeds of the score over all rows, and its standard deviation over seeds; difference
    to the baseline, its 95 % interval low and high, p and smallest detectable difference, see `two_way_bootstrap`;
    p of Holm, adjusted for the number of configurations, on which the verdict stands; p of t, the second opinion of
    `corrected_t`; cells won, of folds x pairs of seeds; how much of `best` is `optimism`; seconds of a seed, training
    rows/s, peak GB.
    """
    kinds = []
    for kind in KINDS:
        table = pd.DataFrame([describe_arm(study, arm, kind) for arm in study.arms])
        differences = pd.DataFrame(two_way_bootstrap(study, kind, n_resamples, seed))
        evidence = pd.DataFrame([fold_evidence(study, arm, kind) for arm in study.arms[1:]])
        against = pd.concat([differences, evidence], axis=1).set_index(table.index[1:])
        table = table.join(against.assign(**{"p of Holm": holm(against["p"].to_numpy())}))
        table["verdict"] = [verdict(row, ku.METRICS[study.metric].better) for _, row in table.iterrows()]
        kinds.append(table)
    return pd.concat(kinds, ignore_index=True)


def run_scores(study):
    """Table with a row for each configuration and seed: its scores over all rows and of each fold, and what it took."""
    rows, names = [], np.unique(study.folds)
    for arm in study.arms:
        scores = {kind: seed_scores(study, arm, kind) for kind in KINDS}
        for i, seed in enumerate(arm.seeds):
            runs = [record for record in arm.records if record["settings"]["seed"] == seed]
            row = {
                "configuration": arm.name,
                "seed": seed,
                "rows": len(study.folds),
                "epochs": runs[0]["settings"]["epochs"],
            }
            row |= {f"{study.metric} {kind}": scores[kind][0][i] for kind in KINDS}
            row |= {f"{kind} fold {f}": scores[kind][1][i, k] for kind in KINDS for k, f in enumerate(names)}
            row["lr"] = runs[0]["resolved"]["lr"]
            row["seconds"] = sum(record["seconds"]["total"] for record in runs)
            row["device"] = ku.listing({f"{r['device']}, {r['threads']} threads, {r['precision']}": 0 for r in runs})
            rows.append(row)
    return pd.DataFrame(rows)


# Colours that colour-blind readers tell apart (Okabe & Ito)
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"
LABEL = 26  # characters of a line of a configuration's name
VERDICT_COLORS = {"better": BLUE, "worse": RED, "not distinguishable": GREY}


def label_right(axis, limits, heights, texts):
    """Texts at heights to the right of the axes, whose limits are set too."""
    right = axis.twinx()
    for side in (axis, right):
        side.set_ylim(limits)
    right.set_yticks(heights, texts, fontsize="small")
    right.tick_params(length=0)


def plot_differences(study, table, folder):
    """Difference of each configuration to the baseline with its 95 % interval, as differences.png: filled and above
    for the last checkpoint, hollow and below for the best."""
    rows = table[table["difference"].notna()]
    last = rows[rows["checkpoint"] == "last"].sort_values(
        "difference", ascending=ku.METRICS[study.metric].better != "lower"
    )
    names = list(last["configuration"])
    figure = ku.new_figure(10, 1.8 + 0.6 * len(names))
    axis = figure.subplots()
    for _, row in rows.iterrows():
        is_last, word = row["checkpoint"] == "last", row["verdict"].partition(" (")[0]
        color, height = VERDICT_COLORS[word], names.index(row["configuration"]) + (0.14 if is_last else -0.14)
        axis.plot([row["low"], row["high"]], [height] * 2, color=color, linewidth=2 if is_last else 1)
        face = color if is_last else "white"
        axis.plot(row["difference"], height, marker="o" if is_last else "D", color=color, markerfacecolor=face)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), [textwrap.fill(name, LABEL) for name in names])
    words = last["verdict"].str.partition(" (")[0]
    texts = [f"{difference:+.4g} {word}" for difference, word in zip(last["difference"], words, strict=True)]
    label_right(axis, (-0.6, len(names) - 0.4), range(len(names)), texts)
    side = "left" if ku.METRICS[study.metric].better == "lower" else "right"
    title = f"difference in out-of-fold {study.metric} ({side} is better), 95 % interval, to {study.arms[0].name}"
    axis.set_xlabel(textwrap.fill(title, 70))
    for marker, label, face in (("o", "last checkpoint", "black"), ("D", "best checkpoint", "white")):
        axis.plot([], [], marker=marker, color="black", markerfacecolor=face, linestyle="none", label=label)
    figure.legend(loc="outside upper left", ncols=2, fontsize="small", frameon=False)
    ku.save_figure(figure, folder / "differences.png")


def panels(study, ylabel, title):
    """A figure with a panel for each configuration but the baseline, and [(arm, its axis)]."""
    arms = study.arms[1:]
    columns = min(4, len(arms))
    height = math.ceil(len(arms) / columns)
    lines = [textwrap.wrap(arm.name, LABEL) for arm in arms]
    figure = ku.new_figure(1 + 2.4 * columns, 1 + (2.2 + 0.15 * max(map(len, lines))) * height)
    axes = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    for axis, words in zip(axes.flat, lines, strict=False):
        axis.set_title("\n".join(words), fontsize="small")
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(arms) :]:
        axis.remove()
    figure.supylabel(ylabel, fontsize="medium")
    figure.suptitle(textwrap.fill(title, 8 + 30 * columns), fontsize="medium")
    return figure, list(zip(arms, axes.flat, strict=False))


def plot_folds(study, folder):
    """Score of each fold from the baseline to a configuration, as folds.png: solid and blue where it is better."""
    figure, parts = panels(
        study, f"{study.metric} of each fold", f"last checkpoint, mean over seeds; baseline: {study.arms[0].name}"
    )
    base = seed_scores(study, study.arms[0], "last")[1].mean(0)
    for arm, axis in parts:
        scores = seed_scores(study, arm, "last")[1].mean(0)
        better = scores < base if ku.METRICS[study.metric].better == "lower" else scores > base
        for pair, won in zip(np.stack([base, scores], axis=1), better, strict=True):
            color, style = (BLUE, "-") if won else (RED, "--")
            axis.plot([0, 1], pair, color=color, linestyle=style, marker="o", markersize=3)
        axis.set_xticks([0, 1], ["baseline", "this"])
        axis.set_xlim(-0.3, 1.3)
        axis.set_xlabel(f"{better.sum()} of {len(better)} folds better", fontsize="small")
    ku.save_figure(figure, folder / "folds.png")


def plot_learning(study, folder):
    """Validation score over the training, mean over folds and seeds with the range over seeds, as learning.png."""
    figure, parts = panels(
        study, f"validation {study.metric}", f"mean over folds, band: range over seeds; dashed: {study.arms[0].name}"
    )
    for arm, axis in parts:
        for side, color, style in ((study.arms[0], GREY, "--"), (arm, BLUE, "-")):
            curves = [seed_curves(side, seed, study.metric) for seed in side.seeds]
            share, scores = curves[0][0], np.stack([scores.mean(0) for _, scores in curves])
            axis.plot(share, scores.mean(0), color=color, linestyle=style, marker=".")
            axis.fill_between(share, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
        axis.set_xlabel("share of the training", fontsize="small")
    ku.save_figure(figure, folder / "learning.png")


def spread_apart(heights, distance):
    """Heights moved as little upwards as it takes for neighbours to be `distance` apart."""
    moved, previous = np.empty(len(heights)), -math.inf
    for i in np.argsort(heights, kind="stable"):
        moved[i] = previous = max(heights[i], previous + distance)
    return moved


def plot_cost(study, table, folder):
    """Score of the last checkpoint against the seconds of one seed, as cost.png; the square is the baseline."""
    rows = table[table["checkpoint"] == "last"]
    seconds, mean, spread = rows["seconds"], rows[study.metric], rows["sd over seeds"].fillna(0)
    figure = ku.new_figure(10, max(4, 1 + 0.35 * len(rows)))
    axis = figure.subplots()
    axis.errorbar(seconds, mean, spread, fmt="o", color=BLUE, ecolor=GREY)
    axis.plot(seconds.iloc[0], mean.iloc[0], marker="s", markersize=8, color="black", zorder=3)
    bottom, top = axis.get_ylim()
    step = 1.2 * (top - bottom) / max(12, len(rows))
    heights = spread_apart(mean.to_numpy(), step)
    label_right(axis, (bottom, max(top, heights.max() + step)), heights, rows["configuration"])
    line, at = dict(arrowstyle="-", color=GREY, linewidth=0.5), axis.get_yaxis_transform()
    for x, y, height in zip(seconds, mean, heights, strict=True):
        axis.annotate("", (x, y), (1, height), textcoords=at, arrowprops=line)
    axis.set(xlabel="seconds of one seed, all folds", ylabel=f"out-of-fold {study.metric}, mean and sd over seeds")
    ku.save_figure(figure, folder / "cost.png")
