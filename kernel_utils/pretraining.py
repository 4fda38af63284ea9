"""Pre-training of a backbone on the texts of a competition, for pretrain.ipynb.

Masked-language modelling (BERT, arXiv:1810.04805) on the texts of the task before it is trained,
TAPT of Gururangan et al., arXiv:2004.10964. What comes out is a backbone like any other.

    import pretraining
    folder = pretraining.pretrain(pretraining.PretrainConfig(epochs=10))

Shapes: N windows, B windows of a batch, T tokens, M masked tokens, H width of the backbone, V words
of the vocabulary.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors.torch import save_model
from torch import nn
from torch.nn import functional as F

import kernel_utils as ku

__all__ = ["PRETRAIN_RECORD", "PretrainConfig", "pretrain"]

PRETRAIN_RECORD = "pretrain.json"


@dataclasses.dataclass
class PretrainConfig(ku.Settings):
    """The settings of pretrain.ipynb. A name that `Config` has too means the same here."""

    data_dir: str = ku.option(
        "",
        "folder with train.csv; empty means the attached competition, else the sample",
    )
    text_columns: str = ku.option(
        "excerpt",
        "column with the text, or several, here texts of their own",
        kind="names",
    )
    train_file: str = ku.option("", "name of the training table; empty: train.csv and its like")
    test_file: str = ku.option("", "name of the test table; empty: test.csv and its like")
    numeric_texts: bool = ku.option(False, "every text column may hold numbers")
    max_rows: int = ku.option(0, "pre-train on this many texts, drawn by seed; 0 means all", low=0)
    held_out: float = ku.option(
        0.05,
        "share of the texts that only measure the loss",
        low=0.001,
        high=0.5,
    )
    backbone: str = ku.option(
        ku.DEFAULT_BACKBONE,
        "encoder: a folder, an attached Kaggle input, or a hub name",
    )
    max_length: int = ku.option(
        256,
        "tokens of a window, special tokens included; longer texts are split",
        low=8,
    )
    mask_share: float = ku.option(
        0.15,
        "share of the words of a window that are to be predicted",
        low=0.01,
        high=0.9,
    )
    whole_words: bool = ku.option(True, "mask all tokens of a word together, else single tokens")
    epochs: int = ku.option(5, "passes over the texts, each with other words masked", low=1)
    batch_size: int = ku.option(16, "windows of an optimiser step", low=1)
    micro_batch_size: int = ku.option(
        0,
        "windows of a forward pass, gradients accumulate; 0 means batch_size",
        low=0,
    )
    lr: float = ku.option(
        5e-5,
        "peak learning rate of the backbone, and of a head that the checkpoint has",
        low=1e-9,
    )
    head_lr: float = ku.option(1e-3, "peak learning rate of a head that is new", low=0)
    weight_decay: float = ku.option(0.01, "AdamW weight decay; never on biases and norms", low=0)
    warmup_ratio: float = ku.option(
        0.1, "share of the steps in which the rates rise", low=0, high=1
    )
    precision: str = ku.option(
        "auto",
        "auto, fp32, bf16 or fp16; auto means fp32 on a CPU",
        ku._PRECISIONS,
    )
    seed: int = ku.option(0, "seed of everything", low=0, high=2**32 - 1)
    output_dir: str = ku.option("runs", "folder of the run folders")
    run_name: str = ku.option(
        "", "folder of the run; empty: by data, backbone and seed", kind="name"
    )
    resume: bool = ku.option(
        True,
        "go on with an unfinished run of the same name and settings, exactly where it was",
    )
    resume_from: str = ku.option(
        "",
        "a run folder to copy and go on with, such as the attached output of a killed kernel",
    )
    checkpoint_minutes: float = ku.option(
        10.0,
        "minutes between checkpoints, made at evaluations too; 0: none",
        low=0,
    )
    max_minutes: float = ku.option(
        0.0,
        "minutes after which to save and stop, to go on later; 0 means no limit",
        low=0,
    )

    def conflicts(self):
        if self.resume_from and not self.resume:
            return ["resume_from does nothing while resume is False"]
        return []

    def training(self):
        """A `Config` with these settings, for what pre-training shares with training."""
        names = {field.name for field in dataclasses.fields(ku.Config)}
        return ku.Config(**{name: value for name, value in self.to_dict().items() if name in names})


# ---------------------------------------------------------------------------------------
# Texts and masks


def _read_texts(cfg):
    """(texts, counts) of the training and test tables: each text once, without empty ones.

    `max_rows` of them are drawn by seed. Of the files nothing but the text columns is used;
    raises DataError as `read_competition` does.
    """
    settings = cfg.training()
    folder = ku._find_data_dir(settings, "train")
    texts, counts, problems = [], {}, []
    for path in filter(None, map(folder.find, ("train", "test"))):
        table = ku._Table.read_rows(path, settings)
        table.check_not_numbers(settings)
        for column in cfg.text_columns:
            texts += list(table.frame[column].str.strip())
        problems += table.problems
        counts[path.name] = len(texts) - sum(counts.values())
    if problems:
        raise ku.DataError(problems)
    filled = [text for text in texts if text]
    unique = list(dict.fromkeys(filled))
    counts["empty"] = len(texts) - len(filled)
    counts["repeated"] = len(filled) - len(unique)
    if cfg.max_rows:
        drawn = np.flatnonzero(ku._id_order(unique, cfg.seed) < cfg.max_rows)
        unique = [unique[i] for i in drawn]
    return unique, counts


class _Corpus(NamedTuple):
    """Texts in N windows, and what is needed to mask them."""

    tokens: ku.Tokens
    words: np.ndarray  # of each token the number of its word in its text; -1: never masked
    texts: np.ndarray  # (N,) number of the text of each window
    mask_id: int
    ordinary_ids: np.ndarray  # what a random replacement may be: not special, in the backbone


def _number_words(encoded, tokenizer, cfg):
    """Of each token of each text the number of its word, by the tokenizer's division into words.

    The number of the token itself where `whole_words` is off or the tokenizer divides texts into
    none, which is said.
    """
    tokens = [np.arange(len(ids)) for ids in encoded["input_ids"]]
    if not cfg.whole_words:
        return tokens
    if tokenizer.is_fast:
        words = []
        for i in range(len(tokens)):
            numbers = [-1 if word is None else word for word in encoded.word_ids(i)]
            words.append(np.array(numbers, dtype=int))
        if sum(len(np.unique(row)) for row in words) > len(words):
            return words
    print(f"{type(tokenizer).__name__} does not divide texts into words: single tokens are masked")
    return tokens


def _make_corpus(texts, tokenizer, n_embeddings, cfg):
    """The `_Corpus` of texts.

    A text that is longer than `max_length` becomes windows of about equal length, each with the
    tokenizer's special tokens, so that no part of it is lost. A window without a token that may
    be masked is left out.
    """
    before, after = ku._SpecialSegments.of(tokenizer).ids
    special = tokenizer.all_special_ids
    room = cfg.max_length - len(before) - len(after)
    reader = ku._TextReader(tokenizer, cfg.training())
    special_tokens = reader.special_tokens()
    encoded = reader.call(texts)
    words_of_texts = _number_words(encoded, tokenizer, cfg)
    windows, words, text_numbers = [], [np.empty(0, int)], []
    for number, ids in enumerate(encoded["input_ids"]):
        parts = reader.spell_out(ids, special_tokens)
        ids = np.array(list(itertools.chain(*parts)), np.int32)
        word_numbers = np.repeat(words_of_texts[number], list(map(len, parts)))
        word_numbers[np.isin(ids, special)] = -1
        n_windows = math.ceil(len(ids) / room) or 1
        for part in np.array_split(np.arange(len(ids)), n_windows):
            if (word_numbers[part] < 0).all():
                continue
            windows.append(np.array([*before, *ids[part], *after], np.int32))
            padding = (len(before), len(after))
            words.append(np.pad(word_numbers[part], padding, constant_values=-1))
            text_numbers.append(number)
    ordinary_ids = np.setdiff1d(list(tokenizer.get_vocab().values()), special)
    return _Corpus(
        tokens=ku.Tokens(windows, None, tokenizer.pad_token_id or 0),
        words=np.concatenate(words),
        texts=np.array(text_numbers),
        mask_id=tokenizer.mask_token_id,
        ordinary_ids=ordinary_ids[ordinary_ids < n_embeddings],
    )


def _mask_window(corpus, row, epoch, cfg):
    """(positions (M,), new ids (M,)) of the tokens of window `row` to be predicted in an epoch.

    `mask_share` of its words are drawn, one at least, with all of their tokens; of these 80 %
    become the mask token, 10 % a random token and 10 % stay (arXiv:1810.04805). The draw depends
    on seed, epoch and row alone.
    """
    rng = np.random.default_rng([cfg.seed, epoch, row])
    span = slice(corpus.tokens.offsets[row], corpus.tokens.offsets[row + 1])
    ids, words = corpus.tokens.ids[span], corpus.words[span]
    candidates = np.unique(words[words >= 0])
    n_masked = max(1, round(cfg.mask_share * len(candidates)))
    chosen = rng.choice(candidates, n_masked, replace=False)
    positions = np.flatnonzero(np.isin(words, chosen))
    fate = rng.random(len(positions))
    random_ids = rng.choice(corpus.ordinary_ids, len(positions))
    new_ids = np.where(fate < 0.9, random_ids, ids[positions])
    return positions, np.where(fate < 0.8, corpus.mask_id, new_ids)


def _masked_batch(corpus, rows, masks, device):
    """What `_MaskedModel` takes of the windows `rows`, with `masks` of `_mask_window`.

    Padded tensors (B, T) with the masks done, places (M,) of the tokens to be predicted, row * T +
    position, and their true ids (M,).
    """
    inputs = corpus.tokens.batch(rows, device)
    width = corpus.tokens.lengths[rows].max()
    places = np.concatenate([i * width + positions for i, (positions, _) in enumerate(masks)])
    places = ku._to_device(places, device)
    new_ids = np.concatenate([new for _, new in masks]).astype(np.int64)
    flat = inputs["input_ids"].view(-1)
    true_ids = flat[places]
    flat[places] = ku._to_device(new_ids, device)
    return inputs, places, true_ids


# ---------------------------------------------------------------------------------------
# Model


class _MaskedModel(nn.Module):
    """A masked-language model whose head sees only the tokens that are to be predicted."""

    def __init__(self, language_model):
        super().__init__()
        self.language_model, self.places = language_model, None
        self.backbone.register_forward_hook(self.pick)

    @property
    def backbone(self):
        return self.language_model.base_model

    def pick(self, module, inputs, output):
        """Leave of the backbone's states (B, T, H) those at `places`, as (1, M, H)."""
        output["last_hidden_state"] = output.last_hidden_state.flatten(0, 1)[self.places][None]
        return output

    def forward(self, inputs, places, true_ids):
        """Cross-entropy summed over the M tokens at `places`."""
        self.places = places
        logits = self.language_model(**inputs).logits[0]  # (M, V)
        return F.cross_entropy(logits.float(), true_ids, reduction="sum")


def _load_masked_model(folder, cfg):
    """(`_MaskedModel`, whether its head is new) of a backbone, in float32.

    A head that the checkpoint lacks starts at random, tied to the word embeddings where the
    architecture ties them. Raises KitError for an architecture without one, and for weights of
    the backbone that are missing.
    """
    loader = ku._BackboneLoader(folder, cfg)
    config = loader.config
    has_head = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if not has_head or getattr(config, "is_encoder_decoder", False):
        name = type(config).__name__.removesuffix("Config")
        problem = f"{folder}: {name} has no head that predicts masked words"
        others = "Decoders (GPT-2, Llama), encoder-decoders (T5, BART) and XLNet"
        remedy = "train on it as it is, or take BERT, RoBERTa, DeBERTa, ..."
        raise ku.KitError(f"{problem}. {others} are not pre-trained here: {remedy}")
    model, info = loader.load_weights(transformers.AutoModelForMaskedLM)
    missing = info["missing_keys"]
    for key, weight in model.named_parameters():
        # transformers 5.0 leaves the bias of Longformer's head as memory was
        if key in missing and key.endswith("bias"):
            weight.data.zero_()
    of_backbone = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    model = _MaskedModel(model)
    loader.check_weights(model.language_model, of_backbone, info)
    if missing:
        _print_new_head(model, sorted(missing))
    return model, bool(missing)


def _print_new_head(model, missing):
    output = model.language_model.get_output_embeddings()
    embeddings = model.backbone.get_input_embeddings()
    is_tied = output is not None and output.weight is embeddings.weight
    tied = "tied" if is_tied else "not tied"
    print(
        "of the head that predicts masked words the checkpoint lacks",
        f"{len(missing)} tensors, such as {missing[0]}: they start at random and learn at head_lr;",
        f"its output is {tied} to the word embeddings",
    )


# ---------------------------------------------------------------------------------------
# Training


@dataclasses.dataclass
class _PretrainState:
    """Where pre-training stands, a part of a checkpoint beside model, optimiser and the rest."""

    step: int = 0
    losses: list = dataclasses.field(default_factory=list)  # of each step
    held_out: list = dataclasses.field(default_factory=list)  # [step, loss] of each evaluation
    seconds: float = 0.0
    state_schema: ClassVar[dict] = dict(
        step=int, losses=[float], held_out=[[float, 2]], seconds=float
    )

    def state_dict(self):
        return dataclasses.asdict(self)

    def load_state_dict(self, state):
        vars(self).update(state)


class _Pretraining:
    """Optimiser steps and evaluations of a masked-language model on a corpus."""

    def __init__(self, corpus, model, new_head, cfg):
        self.corpus, self.cfg = corpus, cfg
        self.training_cfg = cfg.training()
        self.device = ku._pick_device()
        self.dtype = ku._pick_dtype(cfg.precision, self.device)
        self.split()
        self.model = model.to(self.device).train()
        head_lr = cfg.head_lr if new_head else cfg.lr
        grouped_by = dataclasses.replace(self.training_cfg, head_lr=head_lr)
        groups = ku.parameter_groups(model, grouped_by)
        print(ku._format_groups(groups))
        self.rates = ku._learning_rates(groups, self.total, self.training_cfg)
        self.optimizer = ku._make_optimizer(groups, self.training_cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.state = _PretrainState()
        self.pending = []  # losses since the last `flush`, still on the device
        self.parts = {  # of a checkpoint
            "model": model,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "state": self.state,
            "random": ku._RandomStates(),
        }

    def split(self):
        """Draw the texts whose windows are held out; count the steps on the others."""
        cfg, corpus = self.cfg, self.corpus
        texts = np.random.default_rng(cfg.seed).permutation(np.unique(corpus.texts))
        n_held_out = max(1, round(cfg.held_out * len(texts)))
        is_held_out = np.isin(corpus.texts, texts[:n_held_out])
        self.train_rows = np.flatnonzero(~is_held_out)
        self.rows = np.flatnonzero(is_held_out)
        self.per_epoch = math.ceil(len(self.train_rows) / cfg.batch_size)
        self.total = self.per_epoch * cfg.epochs

    def batches(self):
        """Rows of the optimiser steps that are left."""
        lengths = self.corpus.tokens.lengths[self.train_rows]
        batches = ku._epoch_batches(lengths, 0, self.training_cfg, length_bucket=4)
        for batch in itertools.islice(batches, self.state.step, None):
            yield self.train_rows[batch]

    def loss(self, rows, masks):
        with ku._autocast(self.device, self.dtype):
            return self.model(*_masked_batch(self.corpus, rows, masks, self.device))

    def step(self, rows):
        """An optimiser step on the mean loss of all masked tokens of the windows `rows`."""
        epoch = 1 + self.state.step // self.per_epoch
        size = self.cfg.micro_batch_size or self.cfg.batch_size
        masks = [_mask_window(self.corpus, row, epoch, self.cfg) for row in rows]
        n_masked = sum(len(positions) for positions, _ in masks)
        mean = torch.zeros((), device=self.device)
        rates = self.rates[self.state.step]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate)
        for start in range(0, len(rows), size):
            micro = slice(start, start + size)
            loss = self.loss(rows[micro], masks[micro]) / n_masked
            self.scaler.scale(loss).backward()
            mean += loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training_cfg.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.pending.append(mean)

    def flush(self):
        """Copy the losses since the last time from the device; NumericError where not finite."""
        losses = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        for step, loss in enumerate(losses, self.state.step - len(losses) + 1):
            self.check(step, loss)
        self.state.losses += losses

    def check(self, step, loss):
        if math.isfinite(loss):
            return
        advice = "lower lr or head_lr"
        if self.dtype != torch.float32:
            advice += ", or set precision fp32"
        raise ku.NumericError(f"pre-training, step {step}: the loss is {loss}: {advice}")

    def is_evaluation_due(self):
        """Whether the held-out loss is yet to be measured: at the beginning, after each epoch."""
        epoch, rest = divmod(self.state.step, self.per_epoch)
        return rest == 0 and len(self.state.held_out) == epoch

    @torch.no_grad()
    def evaluate(self):
        """Note the mean loss of the masked tokens of the held-out windows; as text.

        Their masks are always the same.
        """
        total = count = 0
        self.model.eval()
        for batch in ku._plan_prediction_batches(self.corpus.tokens.lengths[self.rows], 8192):
            rows = self.rows[batch]
            masks = [_mask_window(self.corpus, row, 0, self.cfg) for row in rows]
            total += self.loss(rows, masks).item()
            count += sum(len(positions) for positions, _ in masks)
        self.model.train()
        loss = total / count
        self.check(self.state.step, loss)
        self.state.held_out.append([self.state.step, loss])
        return f"held-out loss {loss:.4f}, perplexity {torch.tensor(loss).exp():.4g}"


def _run_pretraining(training, checkpoints, budget):
    """Pre-train to the end, or until the budget stops it; why it did, or None."""
    state = training.state
    if checkpoints.load(training.parts):
        print(f"goes on after step {state.step} of {training.total}")
    began = time.perf_counter() - state.seconds

    def save():
        mark = time.perf_counter()
        state.seconds = mark - began
        checkpoints.save(state.step, training.parts)
        budget.on_save()
        budget.note_save(time.perf_counter() - mark)

    if training.is_evaluation_due():  # before the first step, or a checkpoint is made before it
        print(f"after step {state.step}: {training.evaluate()}")
    stop_reason, mark = None, time.perf_counter()
    bar = ku._progress(training.batches(), "pre-training", training.total, state.step)
    for rows in bar:
        stop_reason = budget.stop_reason(len(training.rows))
        if stop_reason:
            training.flush()
            if budget.checkpoint_seconds:
                save()
            break
        training.step(rows)
        should_evaluate = training.is_evaluation_due()
        should_save = budget.should_save(should_evaluate)
        n_pending = len(training.pending)
        if should_evaluate or should_save or n_pending == ku._LOG_STEPS or not budget.step_seconds:
            training.flush()
            budget.step_seconds = (time.perf_counter() - mark) / n_pending
            mark = time.perf_counter()
        if should_save:
            save()
            mark = time.perf_counter()
        if should_evaluate:
            epoch = state.step // training.per_epoch
            bar.write(f"epoch {epoch}: {training.evaluate()}{budget.remaining_text()}")
            budget.row_seconds = (time.perf_counter() - mark) / len(training.rows)
            mark = time.perf_counter()
    state.seconds = time.perf_counter() - began
    return stop_reason


# ---------------------------------------------------------------------------------------
# What comes out


def _plot_pretraining(run, state):
    """Loss of each step, its running mean and each held-out loss, as curves.png."""
    figure = ku._new_figure(8, 4)
    axis, steps = figure.subplots(), range(1, len(state.losses) + 1)
    smooth = pd.Series(state.losses).ewm(span=max(5, len(state.losses) // 10)).mean()
    axis.plot(steps, state.losses, color="C0", alpha=0.2, linewidth=0.8)
    axis.plot(steps, smooth, color="C0", label="training, running mean")
    evaluated_steps, held_out = zip(*state.held_out, strict=True)
    label = "held out, the same words masked"
    axis.plot(evaluated_steps, held_out, color="C1", marker=".", label=label)
    axis.set(xlabel="optimiser step", ylabel="loss of a masked token (nats)")
    axis.legend(fontsize="small")
    losses = f"held-out loss {held_out[0]:.3f} before, {held_out[-1]:.3f} after"
    figure.suptitle(f"{run.name}: {losses}", fontsize="medium")
    ku._save_figure(figure, run / "curves.png")


def _save_pretrained(model, tokenizer, run):
    """The backbone alone, without its head, as transformers lays it out; the weights last."""
    with ku._SealedFolder(run / "tokenizer").in_temporary() as temporary:
        tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():
            path.replace(run / path.name)
    config = model.backbone.config
    config.architectures = [type(model.backbone).__name__]
    ku._write_atomic(run / "config.json", config.to_json_file)

    def save_weights(path):
        save_model(model.backbone, path, metadata={"format": "pt"})

    ku._write_atomic(run / "model.safetensors", save_weights)


def _describe_pretraining(training):
    """What pretrain.json says of a pre-training as far as it has come."""
    state = training.state
    return {
        "steps": state.step,
        "of_steps": training.total,
        "seconds": state.seconds,
        "held_out": {
            "texts": len(np.unique(training.corpus.texts[training.rows])),
            "windows": len(training.rows),
            "before": state.held_out[0][1],
            "after": state.held_out[-1][1],
            "steps_and_losses": state.held_out,
        },
    }


def _train_in(run, training, tokenizer, record, budget):
    """Pre-train in a run folder that is not complete; Stopped where the budget ended it early."""
    path, folder, checkpoints = run / PRETRAIN_RECORD, ku.RunFolder(run), ku._Checkpoints(run, 0)

    def write_unfinished():
        """Write a record that is true if the process dies before it writes another; its reason."""
        saved = f"saved up to step {checkpoints.newest_step()} of {training.total}"
        why = f"{budget.reason or ku._CUT_OFF}: {saved}"
        ku._write_json(path, {"status": "stopped", "stopped": why} | record)
        return why

    folder.remove_stop(budget.began_at)  # it was meant for an earlier session
    budget.stop_file, budget.on_save = folder.stop, write_unfinished
    write_unfinished()
    try:
        with budget:
            stop_reason = _run_pretraining(training, checkpoints, budget)
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "lower micro_batch_size or max_length"
        raise ku.KitError(f"out of memory on {ku._device_name()}: {remedy} ({reason})") from None
    record = record | _describe_pretraining(training)
    if stop_reason:
        why = write_unfinished()
        folder.remove_stop()
        raise ku.Stopped([why, "the same command goes on with what is saved"])
    _plot_pretraining(run, training.state)
    _save_pretrained(training.model, tokenizer, run)
    ku._write_json(path, {"status": "complete"} | record)
    cost = f"{record['steps']} steps in {record['seconds']:.0f} s"
    print(f"{run}: {cost}; set backbone to this folder")


def _pretrain_in(run, training, tokenizer, record, budget):
    """What `pretrain` does in a run folder that is its own."""
    path, is_complete = run / PRETRAIN_RECORD, False
    if path.is_file():
        old = ku._read_json(path, ku._BEGUN_RUN)
        is_complete = old["status"] == "complete"
        record = record | {"sessions": old["sessions"] + record["sessions"]}
    if is_complete:
        print(f"{run} is complete, nothing is trained")
    else:
        _train_in(run, training, tokenizer, record, budget)
    ku.RunFolder(run).remove_stop()
    checkpoints = ku._Checkpoints(run, 0)
    checkpoints.prune(0)
    with ku._wrap_write_errors(run):
        with contextlib.suppress(OSError):
            checkpoints.folder.rmdir()
        (run / ".lock").unlink(missing_ok=True)


def _fingerprint(texts, corpus, config_path, weights):
    """{what makes the result: its digest}; an unfinished run goes on only where all are equal.

    The code is the core and this file: a change in another sibling changes nothing.
    """
    return {
        "the texts": ku._digest(texts),
        "the token ids": ku._digest(corpus.tokens.ids, corpus.tokens.lengths),
        "the backbone": ku._digest(config_path, list(weights.values())),
        "the code (kernel_utils.py, pretraining.py)": ku._digest(Path(ku.__file__), Path(__file__)),
    }


def pretrain(cfg):
    """Pre-train a backbone on the texts of a competition; the run folder, which is a backbone.

    That is `output_dir/run_name` with config.json, model.safetensors, the tokenizer,
    pretrain.json and curves.png. An unfinished run of the same name and content goes on where it
    was (`resume`), on a CPU with as many threads to the same bytes. No target is read. Raises
    Stopped where `max_minutes`, SIGTERM, Ctrl-C or a file STOP in the folder ended it early, and
    KitError for a backbone that cannot be pre-trained so.
    """
    ku._prepare_process()
    budget, folder = ku.TimeBudget(cfg), ku._find_backbone(cfg.backbone)
    config_path = folder / "config.json"
    ku._check_no_foreign_code(config_path, ku._HARMLESS_KEYS)
    tokenizer = ku._load_tokenizer(folder)
    texts, counts = _read_texts(cfg)
    ku._seed_everything(cfg.seed)
    print(f"backbone {cfg.backbone} from {folder}")
    model, new_head = _load_masked_model(folder, cfg.training())
    n_embeddings = model.backbone.get_input_embeddings().num_embeddings
    if tokenizer.mask_token_id is None or tokenizer.mask_token_id >= n_embeddings:
        problem = "the tokenizer has no mask token that the backbone knows"
        raise ku.KitError(f"{folder}: {problem}, so no words can be masked")
    ku._check_max_length(model.backbone, cfg)
    corpus = _make_corpus(texts, tokenizer, n_embeddings, cfg)
    n_used = len(np.unique(corpus.texts))
    if n_used < 2:
        expected = "expected two texts or more that the tokenizer knows"
        raise ku.DataError(f"train.csv and test.csv: {expected}, got {counts}")
    corpus.tokens.check_embeddings([], model.backbone.config, folder)
    corpus.tokens.check_vocabulary(tokenizer)
    counts["used"] = n_used
    numbers = ", ".join(f"{name} {number}" for name, number in counts.items())
    length = f"{corpus.tokens.lengths.mean():.0f} tokens on average"
    print(f"texts: {numbers}, in {len(corpus.tokens)} windows of {length}")
    training = _Pretraining(corpus, model, new_head, cfg)
    machine = ku._describe_environment(cfg)
    weights = {path.name: ku._file_sha256(path) for path in ku._weight_files(folder)}
    record = {
        "settings": cfg.to_dict(),
        "resolved": {},
        "backbone": str(folder),
        "weights": weights,
        **ku._pretraining_of(folder),
        "texts": counts,
        "windows": len(corpus.tokens),
        **machine,
        "sessions": [machine],
        "head": "new" if new_head else "of the checkpoint",
        "fingerprint": _fingerprint(texts, corpus, config_path, weights),
    }
    name = ku._default_name(cfg.training(), "pretrained")
    run = ku._RunFinder(cfg, record, PRETRAIN_RECORD).find(name)
    with ku._locked(run):
        _pretrain_in(run, training, tokenizer, record, budget)
    return run
