"""Comparison of finished runs, for compare.ipynb: which differences between them are real.

A configuration is what runs share that differ in `seed` alone, or hold different folds of one
seed. Configurations are compared by their out-of-fold predictions for the same rows. Equal seeds
are no pairing: such runs share no more than others do.

    import comparison
    runs = comparison.align_runs(comparison.read_records("runs"), baseline="head=cls")
    table = comparison.compare_runs(runs)

Shapes: N rows, K outputs, S seeds, F folds, R resamples, P predictions of all rows, M values that
a metric takes of each row, E evaluations.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

import kernel_utils as ku

__all__ = [
    "BLUE",
    "CHECKPOINTS",
    "GREY",
    "LABEL_WIDTH",
    "RED",
    "CompareConfig",
    "Comparison",
    "ComparisonError",
    "Configuration",
    "align_runs",
    "compare_runs",
    "compared_config",
    "corrected_t",
    "encode_oof",
    "group_problems",
    "plot_cost",
    "plot_differences",
    "plot_folds",
    "plot_learning",
    "read_oof",
    "read_records",
    "resampled_scores",
    "row_problems",
    "run_scores",
    "setting_problems",
    "small_sample_factor",
]

# Settings in which runs of one configuration may differ
_INCIDENTAL = {*ku.Config.names("place"), "data_dir", "recipe", "seed", "keep", "batch_tokens"}
# what comparing asks of the settings
_NEEDED = ("task", "target_columns", "group_column", "epochs", "evals_per_epoch", "eval_steps")
CHECKPOINTS = ("last", "best")
# and of a record
_SETTINGS = dict(seed=float, keep=re.compile("last|best"), fold_kind=str, target_columns=[str, ...])
_FOLD = {"fold": int, "steps": int, "pseudo_steps?": int}
_RECORD = dict(settings=dict.fromkeys(_NEEDED, object) | _SETTINGS, resolved={"lr": float})
_RECORD |= dict(classes=[str], outputs=[str, ...], rows=int, folds=[_FOLD, ...])
_RECORD |= dict(device=str, threads=int, precision=str, versions={str: str})
_RECORD |= dict(seconds={"total": float}, rows_per_second=float, peak_memory_bytes=int)
_RECORD |= dict(oof={"metric": str, "last": ku._SCORE, "best": ku._SCORE})
_LEVEL = 0.05  # chance that any comparison with a baseline calls two equal configurations different


@dataclasses.dataclass
class CompareConfig(ku.Settings):
    """The settings of compare.ipynb."""

    runs_dir: str = ku.option(
        "runs", "folder whose finished runs are compared, those of its sub-folders included"
    )
    baseline: str = ku.option(
        "", "configuration to compare with; empty means the one that is closest to the defaults"
    )
    output_dir: str = ku.option("comparison", "folder of the tables and figures")


class ComparisonError(ku.KitError):
    """Runs whose scores do not stand for the same thing."""

    title = "the runs cannot be compared:"


class Configuration(NamedTuple):
    """A configuration and what its runs predicted for the rows of a comparison."""

    name: str
    runs: dict  # seed -> records of its runs, which hold different folds
    predictions: dict  # last and best -> (S, N, K)

    @property
    def records(self):
        return list(itertools.chain(*self.runs.values()))

    def curves(self, seed, metric_name):
        """Shares of the training done (E,) and scores (F, E) at evaluations that all folds have."""
        logs = []
        for record in self.runs[seed]:
            logs += ku.RunFolder(record["folder"]).read_log()
        log = pd.DataFrame(logs, columns=["fold", "step", metric_name]).dropna()
        by_fold = log.groupby("fold")
        log["number"] = by_fold.cumcount()
        log["share"] = log["step"] / by_fold["step"].transform("max")
        log = log.pivot(index="fold", columns="number", values=["share", metric_name])
        shares = log["share"].dropna(axis=1).mean()
        return shares.to_numpy(), log[metric_name].dropna(axis=1).to_numpy()


class Comparison(NamedTuple):
    """Configurations, the baseline first, of the same rows, folds, targets and evaluations."""

    metric: str
    folds: np.ndarray  # (N,)
    groups: np.ndarray  # (N,) numbers; rows of one group are resampled together
    test_to_train: float  # rows of a fold by those that its models were trained on
    target: np.ndarray  # as `Config.encode_targets` gives it
    configurations: list

    @property
    def baseline(self):
        return self.configurations[0]

    @property
    def lower_is_better(self):
        return ku.METRICS[self.metric].better == "lower"

    def is_better(self, scores, base):
        return scores < base if self.lower_is_better else scores > base

    def scores(self, configuration, checkpoint):
        """(S,) scores over all rows."""
        score = ku.METRICS[self.metric]
        predictions = configuration.predictions[checkpoint]
        return np.array([score(self.target, p) for p in predictions])

    def fold_scores(self, configuration, checkpoint):
        """(S, F) scores of each fold."""
        score = ku.METRICS[self.metric]
        scores = []
        folds = [self.folds == fold for fold in np.unique(self.folds)]
        for predictions in configuration.predictions[checkpoint]:
            scores.append([score(self.target[rows], predictions[rows]) for rows in folds])
        return np.array(scores)

    def check_scores(self):
        """ComparisonError where a seed has no score: constant predictions have no correlation."""
        for configuration in self.configurations:
            for checkpoint in CHECKPOINTS:
                is_undefined = ~np.isfinite(self.scores(configuration, checkpoint))
                if is_undefined.any():
                    seeds = ku._comma_join(np.array(list(configuration.runs))[is_undefined])
                    problem = f"the {checkpoint} predictions have no {self.metric}"
                    raise ComparisonError(f"{configuration.name}, seed {seeds}: {problem}")

    def optimism(self, configuration):
        """How much better `best` looks for being chosen on the rows it is scored on.

        The mean over seeds and folds of its distance to the score at the evaluation that the other
        folds of the seed would choose. NaN with one fold.
        """
        distances = []
        for seed in configuration.runs:
            _, scores = configuration.curves(seed, self.metric)
            losses = scores if self.lower_is_better else -scores
            if len(losses) == 1:
                continue
            for fold in range(len(losses)):
                chosen_by_others = np.delete(losses, fold, 0).mean(0).argmin()
                distances.append(losses[fold, chosen_by_others] - losses[fold].min())
        return float(np.mean(distances)) if distances else math.nan


def read_records(folder):
    """Records of the finished runs in `folder` and below, each with its run folder as `folder`.

    Runs that did not finish are named and left out; ComparisonError where none did, or the
    record of one is damaged.
    """
    runs = sorted(path.parent for path in Path(folder).expanduser().rglob("record.json"))
    problems = [problem for run in runs for problem in ku._link_problems(run)]
    if problems:
        raise ComparisonError(problems)
    finished = [run for run in runs if ku.RunFolder(run).is_complete()]
    unfinished = [run.name for run in runs if run not in finished]
    if unfinished:
        print(f"left out, since they did not finish: {ku._comma_join(unfinished)}")
    if not finished:
        where = f"runs_dir {str(folder)!r}"
        raise ComparisonError(f"{where} has no finished run, which is a folder with record.json")
    records, problems = [], []
    for run in finished:
        record = ku.RunFolder(run).read_record()
        error = ku._schema_error(record, _RECORD)
        problems += [f"{run / 'record.json'}: {error}"] if error else []
        records.append(record | {"folder": run})
    if problems:
        raise ComparisonError([*problems, "move them out of runs_dir"])
    return records


# ---------------------------------------------------------------------------------------
# Configurations and the baseline


def _default_settings():
    return json.loads(json.dumps(ku.Config().to_dict()))


def _effective_settings(record):
    """The settings that make a configuration, with what was left open as it was resolved."""
    settings = _default_settings() | record["settings"] | record["resolved"]
    settings["precision"] = record["precision"]
    return {name: value for name, value in settings.items() if name not in _INCIDENTAL}


def _setting_text(name, value):
    """A setting as text such as `llrd=0.95`; numbers are written in one way."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            value = f"{float(value):.12g}"
    return f"{name}={value}"


def _settings_text(settings, names):
    return " ".join(_setting_text(name, settings.get(name)) for name in names)


def _choose_baseline(by_name, varied, baseline):
    """The name of the configuration in {name: records} that `baseline` such as `head=cls` names.

    Of several the one with most of its `varied` settings at their defaults. Where that is not one,
    the first is taken aloud if `baseline` is empty; else ConfigError.
    """
    default = _default_settings()
    wanted = set()
    for part in baseline.split():
        name, _, value = part.partition("=")
        wanted.add(_setting_text(name, value))
    n_changed = {}  # name of a configuration that fits -> its settings that are no defaults
    known = {}  # keys: every setting of every configuration, in order
    for name, runs in by_name.items():
        texts = [_setting_text(*item) for item in _effective_settings(runs[0]).items()]
        known |= dict.fromkeys(texts)
        if name == baseline or wanted <= set(texts):
            own = default | runs[0]["settings"]
            n_changed[name] = sum(own.get(setting) != default.get(setting) for setting in varied)
    names = [name for name, count in n_changed.items() if count == min(n_changed.values())]
    if len(names) == 1:
        return names[0]
    if names and not baseline:
        others = f"the first of {len(names)} that are as close to the defaults"
        print(f"baseline {names[0]}, {others}: the setting baseline names another")
        return names[0]
    problem = "several configurations fit"
    if not names:
        unknown = [f"{part}{ku._did_you_mean(part, known)}" for part in sorted(wanted - set(known))]
        problem = f"no configuration has {ku._comma_join(unknown or [baseline])}"
        names = by_name
    remedy = f"set it to what is one of: {'; '.join(names)}"
    raise ku.ConfigError(f"baseline {baseline!r}: {problem}; {remedy}")


def _group_records(records, baseline):
    """{name of a configuration: its records}, the baseline first.

    The name of the baseline has all settings that vary, that of another those in which it
    differs from the baseline.
    """
    groups = {}  # settings, as text -> records
    for record in records:
        key = json.dumps(_effective_settings(record), sort_keys=True)
        groups.setdefault(key, []).append(record)
    if len(groups) == 1:
        problem = f"all {len(records)} runs have one configuration"
        raise ComparisonError(f"{problem}: there is nothing to compare it with")
    first, *others = [_effective_settings(runs[0]) for runs in groups.values()]
    names = dict.fromkeys(itertools.chain(first, *others))
    varied = [n for n in names if any(own.get(n) != first.get(n) for own in others)]
    by_name = {}
    for runs in groups.values():
        by_name[_settings_text(_effective_settings(runs[0]), varied)] = runs
    baseline = _choose_baseline(by_name, varied, baseline)
    base_runs = by_name.pop(baseline)
    base, grouped = _effective_settings(base_runs[0]), {baseline: base_runs}
    for runs in by_name.values():
        own = _effective_settings(runs[0])
        differing = [name for name in varied if own.get(name) != base.get(name)]
        grouped[_settings_text(own, differing)] = runs
    return grouped


# ---------------------------------------------------------------------------------------
# Aligned runs


def compared_config(record):
    """The settings of a run that comparing needs. ConfigError where its metric is unknown."""
    settings = {name: record["settings"][name] for name in _NEEDED}
    return ku.Config.from_dict(settings | {"metric": record["oof"]["metric"]})


def _count_evaluations(records):
    """{fold: how often it was evaluated} of the runs of one seed: `best` is the best of so many."""
    cfg = compared_config(records[0])
    counts = {}
    for record in records:
        for fold in record["folds"]:
            steps = fold["steps"] - fold.get("pseudo_steps", 0)
            counts[fold["fold"]] = len(cfg.evaluation_steps(steps // cfg.epochs))
    return counts


def read_oof(records):
    """(N, ...) table by id of what the runs of one seed, with different folds, predicted."""
    tables = [ku.RunFolder(record["folder"]).read_oof(record) for record in records]
    return pd.concat(tables).set_index("id")


def setting_problems(record, first, other="the baseline"):
    """How a run differs from the first, one of `other`, in what makes scores comparable."""
    problems = []
    for name in ("metric", "outputs", "classes"):
        ours = (record | record["oof"])[name]
        theirs = (first | first["oof"])[name]
        if ours != theirs:
            problem = f"{record['folder']} has {name} {ours}, {other} {theirs}"
            problems.append(f"{problem}: move one of them out of runs_dir")
    return problems


def row_problems(name, oof, reference, other="the baseline"):
    """How rows, folds, groups and targets of a seed differ from those of `other`, the reference."""
    repeated = sorted(oof["fold"][oof.index.duplicated()].unique())
    if repeated:
        return [f"{name} has fold {ku._comma_join(repeated)} more than once; move or delete a run"]
    apart = oof.index.symmetric_difference(reference.index)
    if len(apart):
        sizes = f"{name} has {_size_text(oof)}, {other} {_size_text(reference)}"
        remedy = "take runs of the same rows"
        if set(oof["fold"]) != set(reference["fold"]):
            remedy = "train the folds that one lacks, with its run_name and run_folds empty"
        problem = f"{len(apart)} rows such as id {apart[0]!r} are in one only"
        return [f"{sizes}; {problem}: {remedy}, or move one of them out of runs_dir"]
    oof = oof.loc[reference.index]
    none = pd.Series("none", reference.index)
    problems = []
    for column in dict.fromkeys([*reference, *oof]):
        if column.startswith("prediction"):
            continue
        ours, theirs = oof.get(column, none), reference.get(column, none)
        rows = reference.index[ours != theirs]
        if len(rows):
            row = rows[0]
            example = f"{ours[row]} against {theirs[row]} at id {row!r}"
            problem = f"{name} has another {column} than {other} in {len(rows)} rows"
            problems.append(f"{problem}, such as {example}")
    return problems


def _size_text(oof):
    return f"{len(oof)} rows, folds {ku._comma_join(sorted(oof['fold'].unique()))}"


def group_problems(name, record, oof):
    """Before 0.5.0 an oof.csv had no groups, without which rows would count as independent."""
    if "group" in record["settings"]["fold_kind"] and "group" not in oof:
        problem = f"{name} kept groups in one fold, and its oof.csv does not say which"
        return [f"{problem}: train it anew"]
    return []


def _seed_problems(name, records, oof, first, reference):
    """How the runs of a seed differ from those of the first seed of the baseline."""
    problems = row_problems(name, oof, reference) + group_problems(name, records[0], oof)
    base = _count_evaluations(first)
    for fold, count in _count_evaluations(records).items():
        if base.get(fold, count) != count:
            counts = f"{count} times in fold {fold}, the baseline {base[fold]} times"
            reason = "of more evaluations the best is better by chance"
            return [*problems, f"{name} was evaluated {counts}: {reason}"]
    return problems


def _print_differing_machines(records):
    """How machines and versions of the runs differ: scores and seconds may carry it."""
    for name in ("device", "threads", *records[0]["versions"]):
        values = {str((record | record["versions"]).get(name)) for record in records}
        if len(values) > 1:
            print(f"the runs differ in {name}: {ku._comma_join(sorted(values))}")


def encode_oof(oof, cfg, classes):
    """Targets as `Config.encode_targets` gives them, folds (N,) and groups (N,) of a table."""
    names = dict(
        zip(ku._column_names("target", cfg.target_columns), cfg.target_columns, strict=True)
    )
    target = cfg.encode_targets(oof.rename(columns=names), classes)
    groups = np.unique(oof.get("group", oof.index), return_inverse=True)[1]
    if groups.max() == 0:
        raise ComparisonError(f"all {len(oof)} rows are in one group: there is nothing to resample")
    return target, oof["fold"].to_numpy(), groups


def align_runs(records, baseline=""):
    """The `Comparison` of records from `read_records`; `baseline` is text such as `head=cls`.

    Raises ConfigError where that names none or several, and ComparisonError where runs differ
    from the baseline in metric, outputs, rows, folds, groups, targets or number of evaluations,
    or share a seed and a fold.
    """
    configurations = []
    for name, runs in _group_records(records, baseline).items():
        by_seed = {}
        for record in sorted(runs, key=lambda record: record["settings"]["seed"]):
            by_seed.setdefault(record["settings"]["seed"], []).append(record)
        configurations.append(Configuration(name, by_seed, {}))
    first = next(iter(configurations[0].runs.values()))  # the first seed of the baseline
    problems = []
    for record in records:
        problems += setting_problems(record, first[0])
    if problems:
        raise ComparisonError(problems)
    reference = read_oof(first)
    tables = {}  # configuration -> table of each seed
    for name, by_seed, _ in configurations:
        tables[name] = []
        for seed, runs in by_seed.items():
            oof = read_oof(runs)
            folders = ku._comma_join(record["folder"] for record in runs)
            title = f"{name}, seed {seed} ({folders})"
            problems += _seed_problems(title, runs, oof, first, reference)
            tables[name].append(oof)
    if problems:
        raise ComparisonError(problems)

    outputs = first[0]["outputs"]
    for name, _, predictions in configurations:
        for checkpoint in CHECKPOINTS:
            columns = ku._column_names(f"prediction_{checkpoint}", outputs)
            own = [oof.loc[reference.index, columns] for oof in tables[name]]
            predictions[checkpoint] = np.stack(own)  # (S, N, K)
    cfg = compared_config(first[0])
    target, folds, groups = encode_oof(reference, cfg, first[0]["classes"])
    fold_sizes = reference["fold"].value_counts()
    test_to_train = float((fold_sizes / (first[0]["rows"] - fold_sizes)).mean())
    comparison = Comparison(cfg.metric, folds, groups, test_to_train, target, configurations)
    comparison.check_scores()
    n_seeds = ku._comma_join(sorted({len(c.runs) for c in configurations}))
    sizes = f"{len(target)} rows, {len(fold_sizes)} folds, {n_seeds} seeds"
    print(f"{len(configurations)} configurations, {sizes}")
    print(f"baseline: {configurations[0].name}")
    _print_differing_machines(records)
    return comparison


# ---------------------------------------------------------------------------------------
# Statistics


def resampled_scores(metric_name, target, predictions, groups, n_resamples, rng):
    """(R, P) scores of P predictions (P, N, K) over rows drawn with replacement.

    Whole groups are drawn at once, and the same rows for each prediction.
    """
    score = ku.METRICS[metric_name]
    scores = np.empty((n_resamples, len(predictions)))
    resamples = range(n_resamples)
    n_groups = groups.max() + 1
    if score.per_row:
        values = np.stack([score.per_row(target, p) for p in predictions], axis=1)  # (N, P, M)
        values = values.astype(np.float64)
    else:
        resamples = ku._progress(resamples, f"resamples of {metric_name}")
    for i in resamples:
        drawn = rng.integers(n_groups, size=n_groups)
        times = np.bincount(drawn, minlength=n_groups)[groups]  # (N,) how often a row is drawn
        if score.per_row:
            scores[i] = score.reduce(np.tensordot(times, values, 1) / times.sum())
        else:
            rows = np.repeat(np.arange(len(times)), times)
            scores[i] = [score(target[rows], p[rows]) for p in predictions]
    defined = np.isfinite(scores).all(1)
    if defined.mean() < 0.9:
        share = f"{(~defined).sum()} of {n_resamples} resamples of {len(groups)} rows"
        raise ComparisonError(f"{metric_name} has no value on {share}")
    return scores[defined]


def corrected_t(differences, test_to_train):
    """p of the corrected resampled t-test of differences (F, S).

    Models of different folds share training rows, so the variance is enlarged by `test_to_train`
    (Nadeau & Bengio 2003; Bouckaert & Frank 2004).
    """
    n = differences.size
    variance = differences.var(ddof=1) * (1 / n + test_to_train)
    if not variance > 0:
        return math.nan
    return 2 * scipy.stats.t.sf(abs(differences.mean()) / math.sqrt(variance), n - 1)


def _holm(p_values):
    """p-values adjusted for their number (Holm 1979); NaN is no test."""
    adjusted = np.full(len(p_values), math.nan)
    order = [i for i in np.argsort(p_values) if not math.isnan(p_values[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


class _Difference(NamedTuple):
    """A configuration against the baseline, by `_two_way_bootstrap`."""

    difference: float
    low: float  # 95 % interval
    high: float
    p: float
    detectable: float  # true difference that is found in about four of five such comparisons


def small_sample_factor(n):
    """By how much to stretch deviations of draws of n with replacement, which vary too little."""
    return math.sqrt(n / (n - 1)) if n > 1 else 0.0


class _Side(NamedTuple):
    """One configuration of a difference: its score, the mean over seeds, and what moves it."""

    score: float
    row_draws: np.ndarray  # (R,) deviations of the score over other rows
    seed_draws: np.ndarray  # (R,) deviations over other seeds of the same rows
    seed_variance: float  # of the score, over seeds; 0 with one seed
    dof: int  # degrees of freedom of `seed_variance`

    @classmethod
    def draw(cls, scores, resamples, n_groups, rng):
        """From S seeds: their scores (S,) over all rows and (R, S) over drawn rows."""
        n_seeds = len(scores)
        row_means = resamples.mean(1)
        drawn_seeds = rng.integers(n_seeds, size=resamples.shape)
        seed_draws = np.take_along_axis(resamples, drawn_seeds, 1).mean(1) - row_means
        return cls(
            score=scores.mean(),
            row_draws=small_sample_factor(n_groups) * (row_means - scores.mean()),
            seed_draws=small_sample_factor(n_seeds) * seed_draws,
            seed_variance=scores.var(ddof=1) / n_seeds if n_seeds > 1 else 0.0,
            dof=n_seeds - 1,
        )

    def compare(self, base, n_groups, level):
        """The `_Difference` to the baseline at a level of significance.

        Quantiles are those of Student's t with the degrees of freedom of Welch and Satterthwaite,
        or of the normal distribution where no part of the variance is estimated.
        """
        difference = self.score - base.score
        row_spread = self.row_draws - base.row_draws
        spread = row_spread + self.seed_draws - base.seed_draws
        error, normal = spread.std(), scipy.stats.norm()
        uncertainty = row_spread.var() ** 2 / (n_groups - 1)
        for side in (self, base):
            if side.seed_variance:
                uncertainty += side.seed_variance**2 / side.dof
        t = scipy.stats.t(error**4 / uncertainty) if uncertainty else normal
        p = 2 * t.sf(abs(difference) / error) if error else 1.0
        if self.dof == 0 or base.dof == 0:  # the variance of one seed is unknown
            p = math.nan
        stretch = t.ppf(0.975) / normal.ppf(0.975)
        low, high = difference + stretch * np.quantile(spread, [0.025, 0.975])
        detectable = (t.ppf(1 - level / 2) + t.ppf(0.8)) * error
        return _Difference(difference, low, high, p, detectable)


def _two_way_bootstrap(comparison, checkpoint, n_resamples, seed):
    """The `_Difference` of each configuration but the baseline, in the score over all rows.

    Rows, or groups, and the seeds of each side are drawn with replacement at once, their
    deviations stretched by `small_sample_factor`. Where a variance rests on few seeds or groups,
    t takes the place of the normal distribution. A side with one seed has no variance of seeds:
    its interval is over rows alone, and p is NaN. The detectable difference allows for the number
    of configurations as Bonferroni does, and so for a little more than Holm.
    """
    rng = np.random.default_rng(seed)
    n_groups = comparison.groups.max() + 1
    predictions = [c.predictions[checkpoint] for c in comparison.configurations]
    drawn = resampled_scores(
        comparison.metric,
        comparison.target,
        np.concatenate(predictions),  # (P, N, K)
        comparison.groups,
        n_resamples,
        rng,
    )  # (R, P)
    sides, start = [], 0
    for configuration in comparison.configurations:
        scores = comparison.scores(configuration, checkpoint)
        resamples = drawn[:, start : start + len(scores)]
        sides.append(_Side.draw(scores, resamples, n_groups, rng))
        start += len(scores)
    base, *others = sides
    return [side.compare(base, n_groups, _LEVEL / len(others)) for side in others]


# ---------------------------------------------------------------------------------------
# Tables


def _describe_configuration(comparison, configuration, checkpoint):
    """What the table says of a configuration by itself."""
    scores = comparison.scores(configuration, checkpoint)
    records = configuration.records
    return {
        "configuration": configuration.name,
        "checkpoint": checkpoint,
        "seeds": len(scores),
        "folds": len(np.unique(comparison.folds)),
        "rows": len(comparison.folds),
        comparison.metric: scores.mean(),
        "sd over seeds": scores.std(ddof=1) if len(scores) > 1 else math.nan,
        "optimism": comparison.optimism(configuration) if checkpoint == "best" else math.nan,
        "seconds": _total_seconds(records) / len(scores),
        "rows/s": np.mean([record["rows_per_second"] for record in records]),
        "peak GB": max(record["peak_memory_bytes"] for record in records) / 2**30,
    }


def _fold_evidence(comparison, configuration, checkpoint):
    """What the folds say against the baseline.

    p of `corrected_t` over folds x seeds, the seeds paired in their order, and the share of all
    folds and pairs of seeds in which the configuration wins.
    """
    folds = comparison.fold_scores(configuration, checkpoint)  # (S, F)
    base = comparison.fold_scores(comparison.baseline, checkpoint)
    won = comparison.is_better(folds[:, None], base[None])  # (S, S of the baseline, F)
    n = min(len(folds), len(base))
    paired = (folds[:n] - base[:n]).T  # (F, n)
    p = math.nan
    if min(paired.shape) > 1:
        p = corrected_t(paired, comparison.test_to_train)
    return {"p of t": p, "cells won": won.mean()}


def _verdict(row, better):
    """What a row of the comparison says, in words."""
    if math.isnan(row["difference"]):
        return "baseline"
    if math.isnan(row["p"]):
        return "not distinguishable (one seed names no winner)"
    if row["p of Holm"] < _LEVEL:
        is_lower = row["difference"] < 0
        return "better" if is_lower == (better == "lower") else "worse"
    return f"not distinguishable (smallest detectable difference {row['detectable']:.4g})"


def compare_runs(comparison, n_resamples=2000, seed=0):
    """Table with a row for each checkpoint and configuration, the baseline first.

    Columns: the metric, mean over seeds of the score over all rows, and its standard deviation
    over seeds; difference to the baseline, its 95 % interval low and high, p and smallest
    detectable difference, by a bootstrap over rows and seeds; p of Holm, adjusted for the number
    of configurations, on which the verdict stands; p of t, the second opinion of `corrected_t`;
    cells won, of folds x pairs of seeds; optimism, how much of `best` is owed to the choice;
    seconds of a seed, training rows/s, peak GB.
    """
    better, tables = ku.METRICS[comparison.metric].better, []
    configurations = comparison.configurations
    for checkpoint in CHECKPOINTS:
        own = [_describe_configuration(comparison, c, checkpoint) for c in configurations]
        evidence = [_fold_evidence(comparison, c, checkpoint) for c in configurations[1:]]
        against = pd.DataFrame(_two_way_bootstrap(comparison, checkpoint, n_resamples, seed))
        against = against.join(pd.DataFrame(evidence))
        against["p of Holm"] = _holm(against["p"].to_numpy())
        against.index += 1  # the baseline has row 0
        table = pd.DataFrame(own).join(against)
        table["verdict"] = [_verdict(row, better) for _, row in table.iterrows()]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def run_scores(comparison):
    """Table with a row for each configuration and seed: its scores, of each fold too, and cost."""
    tables, metric = [], comparison.metric
    folds = np.unique(comparison.folds)
    for configuration in comparison.configurations:
        runs = configuration.runs.values()
        table = pd.DataFrame({"configuration": configuration.name, "seed": [*configuration.runs]})
        table["rows"] = len(comparison.folds)
        table["epochs"] = [records[0]["settings"]["epochs"] for records in runs]
        for checkpoint in CHECKPOINTS:
            table[f"{metric} {checkpoint}"] = comparison.scores(configuration, checkpoint)
        for checkpoint in CHECKPOINTS:
            names = [f"{checkpoint} fold {fold}" for fold in folds]
            table[names] = comparison.fold_scores(configuration, checkpoint)
        table["lr"] = [records[0]["resolved"]["lr"] for records in runs]
        table["seconds"] = [_total_seconds(records) for records in runs]
        table["device"] = [ku._comma_join(dict.fromkeys(map(_device_text, r))) for r in runs]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _total_seconds(records):
    return sum(record["seconds"]["total"] for record in records)


def _device_text(record):
    return f"{record['device']}, {record['threads']} threads, {record['precision']}"


# ---------------------------------------------------------------------------------------
# Figures

# Colours that colour-blind readers tell apart (Okabe & Ito)
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"
LABEL_WIDTH = 26  # characters of a line of a configuration's name
_VERDICT_COLORS = {"better": BLUE, "worse": RED, "not distinguishable": GREY}


# Filled and above for the last checkpoint, hollow and below for the best
_CHECKPOINT_STYLES = {
    "last": dict(marker="o", linewidth=2),
    "best": dict(marker="D", linewidth=1, markerfacecolor="white"),
}
_CHECKPOINT_OFFSETS = {"last": 0.14, "best": -0.14}


def _label_right(axis, limits, heights, texts):
    """Texts at heights to the right of the axes, whose limits are set too."""
    right = axis.twinx()
    for side in (axis, right):
        side.set_ylim(limits)
    right.set_yticks(heights, texts, fontsize="small")
    right.tick_params(length=0)


def plot_differences(comparison, table, folder):
    """Difference of each configuration to the baseline with its interval, as differences.png."""
    rows = table[table["difference"].notna()]
    rows = rows.assign(word=rows["verdict"].str.partition(" (")[0])
    last = rows[rows["checkpoint"] == "last"]
    last = last.sort_values("difference", ascending=not comparison.lower_is_better)
    names = list(last["configuration"])
    figure = ku._new_figure(10, 1.8 + 0.6 * len(names))
    axis = figure.subplots()
    for _, row in rows.iterrows():
        style = _CHECKPOINT_STYLES[row["checkpoint"]] | dict(color=_VERDICT_COLORS[row["word"]])
        height = names.index(row["configuration"]) + _CHECKPOINT_OFFSETS[row["checkpoint"]]
        interval = [row["low"], row["difference"], row["high"]]
        axis.plot(interval, [height] * 3, markevery=[1], **style)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), [textwrap.fill(name, LABEL_WIDTH) for name in names])
    texts = [f"{row['difference']:+.4g} {row['word']}" for _, row in last.iterrows()]
    _label_right(axis, (-0.6, len(names) - 0.4), range(len(names)), texts)
    side = "left" if comparison.lower_is_better else "right"
    title = f"difference in out-of-fold {comparison.metric} ({side} is better), 95 % interval"
    axis.set_xlabel(textwrap.fill(f"{title}, to {comparison.baseline.name}", 70))
    for checkpoint, style in _CHECKPOINT_STYLES.items():
        style = dict(markerfacecolor="black", color="black") | style | dict(linestyle="none")
        axis.plot([], [], label=f"{checkpoint} checkpoint", **style)
    figure.legend(loc="outside upper left", ncols=2, fontsize="small", frameon=False)
    ku._save_figure(figure, folder / "differences.png")


def _make_panels(comparison, ylabel, title):
    """A figure with a panel for each configuration but the baseline; [(configuration, axis)]."""
    others = comparison.configurations[1:]
    n_columns = min(4, len(others))
    n_rows = math.ceil(len(others) / n_columns)
    titles = [textwrap.wrap(configuration.name, LABEL_WIDTH) for configuration in others]
    row_height = 2.2 + 0.15 * max(map(len, titles))
    figure = ku._new_figure(1 + 2.4 * n_columns, 1 + row_height * n_rows)
    axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axis, lines in zip(axes.flat, titles, strict=False):
        axis.set_title("\n".join(lines), fontsize="small")
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(others) :]:
        axis.remove()
    figure.supylabel(ylabel, fontsize="medium")
    figure.suptitle(textwrap.fill(title, 8 + 30 * n_columns), fontsize="medium")
    return figure, list(zip(others, axes.flat, strict=False))


def plot_folds(comparison, folder):
    """Score of each fold from the baseline to a configuration, as folds.png; blue is better."""
    title = f"last checkpoint, mean over seeds; baseline: {comparison.baseline.name}"
    figure, panels = _make_panels(comparison, f"{comparison.metric} of each fold", title)
    base = comparison.fold_scores(comparison.baseline, "last").mean(0)
    for configuration, axis in panels:
        scores = comparison.fold_scores(configuration, "last").mean(0)
        better = comparison.is_better(scores, base)
        ends = np.stack([base, scores])  # (2, F): a line a fold
        axis.plot([0, 1], ends[:, better], "o-", color=BLUE, markersize=3)
        axis.plot([0, 1], ends[:, ~better], "o--", color=RED, markersize=3)
        axis.set_xticks([0, 1], ["baseline", "this"])
        axis.set_xlim(-0.3, 1.3)
        axis.set_xlabel(f"{better.sum()} of {len(better)} folds better", fontsize="small")
    ku._save_figure(figure, folder / "folds.png")


def plot_learning(comparison, folder):
    """Validation score over the training, mean over folds and seeds, as learning.png.

    The band is the range over seeds.
    """
    title = f"mean over folds, band: range over seeds; dashed: {comparison.baseline.name}"
    figure, panels = _make_panels(comparison, f"validation {comparison.metric}", title)
    for configuration, axis in panels:
        _draw_curves(comparison, comparison.baseline, axis, GREY, ".--")
        _draw_curves(comparison, configuration, axis, BLUE, ".-")
        axis.set_xlabel("share of the training", fontsize="small")
    ku._save_figure(figure, folder / "learning.png")


def _draw_curves(comparison, configuration, axis, color, style):
    scores = []  # (S, E)
    for seed in configuration.runs:
        shares, own = configuration.curves(seed, comparison.metric)
        scores.append(own.mean(0))
    axis.plot(shares, np.mean(scores, 0), style, color=color)
    low, high = np.min(scores, 0), np.max(scores, 0)
    axis.fill_between(shares, low, high, color=color, alpha=0.2, linewidth=0)


def _spread_apart(heights, distance):
    """Heights moved as little upwards as it takes for neighbours to be `distance` apart."""
    moved = np.empty(len(heights))
    previous = -math.inf
    for i in np.argsort(heights, kind="stable"):
        previous = max(heights[i], previous + distance)
        moved[i] = previous
    return moved


def plot_cost(comparison, table, folder):
    """Score of the last checkpoint by the seconds of a seed, as cost.png; square: baseline."""
    metric = comparison.metric
    rows = table[table["checkpoint"] == "last"]
    seconds, mean = rows["seconds"], rows[metric]
    spread = rows["sd over seeds"].fillna(0)
    figure = ku._new_figure(10, max(4, 1 + 0.35 * len(rows)))
    axis = figure.subplots()
    axis.errorbar(seconds, mean, spread, fmt="o", color=BLUE, ecolor=GREY)
    square = dict(marker="s", markersize=8, color="black", zorder=3)
    axis.plot(seconds.iloc[0], mean.iloc[0], **square)
    bottom, top = axis.get_ylim()
    step = 1.2 * (top - bottom) / max(12, len(rows))
    heights = _spread_apart(mean.to_numpy(), step)
    limits = (bottom, max(top, heights.max() + step))
    _label_right(axis, limits, heights, rows["configuration"])
    line = dict(arrowstyle="-", color=GREY, linewidth=0.5)
    right_edge = axis.get_yaxis_transform()
    for x, y, height in zip(seconds, mean, heights, strict=True):
        axis.annotate("", (x, y), (1, height), textcoords=right_edge, arrowprops=line)
    axis.set_xlabel("seconds of one seed, all folds")
    axis.set_ylabel(f"out-of-fold {metric}, mean and sd over seeds")
    ku._save_figure(figure, folder / "cost.png")
