"""Pre-training of a backbone on the texts of a competition, for pretrain.ipynb.

Masked-language modelling (BERT, arXiv:1810.04805) on the texts of the task before it is trained, TAPT of Gururangan
et al., arXiv:2004.10964. What comes out is a backbone like any other.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors.torch import save_model
from torch import nn
from torch.nn import functional as F

import kernel_utils as ku

PRETRAIN_RECORD = "pretrain.json"


@dataclasses.dataclass(frozen=True)
class PretrainConfig(ku.Settings):
    """The settings of pretrain.ipynb. A name that `Config` has too means the same here."""

    data_dir: str = ku.option("", "folder with train.csv; empty means the attached competition, else the sample")
    text_column: str = ku.option("excerpt", "column with the text")
    pair_column: str = ku.option("", "column with a second text, here a text of its own; empty means none")
    max_rows: int = ku.option(0, "pre-train on this many texts, drawn by seed; 0 means all", low=0)
    held_out: float = ku.option(0.05, "share of the texts that only measure the loss", low=0.001, high=0.5)
    backbone: str = ku.option(ku.DEFAULT_BACKBONE, "encoder: a folder, an attached Kaggle input, or a hub name")
    max_length: int = ku.option(256, "tokens of a window, special tokens included; longer texts are split", low=8)
    mask_share: float = ku.option(0.15, "share of the words of a window that are to be predicted", low=0.01, high=0.9)
    whole_words: bool = ku.option(True, "mask all tokens of a word together, else single tokens")
    epochs: int = ku.option(5, "passes over the texts, each with other words masked", low=1)
    batch_size: int = ku.option(16, "windows of an optimiser step", low=1)
    micro_batch_size: int = ku.option(0, "windows of a forward pass, gradients accumulate; 0 means batch_size", low=0)
    lr: float = ku.option(5e-5, "peak learning rate of the backbone, and of a head that the checkpoint has", low=1e-9)
    head_lr: float = ku.option(1e-3, "peak learning rate of a head that is new", low=0)
    weight_decay: float = ku.option(0.01, "AdamW weight decay; never on biases and norms", low=0)
    warmup: float = ku.option(0.1, "share of the steps in which the rates rise", low=0, high=1)
    precision: str = ku.option("auto", "auto, fp32, bf16 or fp16; auto means fp32 on a CPU", ku.PRECISIONS)
    seed: int = ku.option(0, "seed of everything", low=0, high=2**32 - 1)
    output_dir: str = ku.option("runs", "folder of the run folders")
    run_name: str = ku.option("", "name of the run folder; empty means made from backbone and seed")
    resume: bool = ku.option(True, "go on with an unfinished run of the same name and settings, exactly where it was")
    resume_from: str = ku.option(
        "", "a run folder to copy and go on with, such as the attached output of a killed kernel"
    )
    checkpoint_minutes: float = ku.option(10.0, "minutes between checkpoints, made at evaluations too; 0: none", low=0)
    max_minutes: float = ku.option(0.0, "minutes after which to save and stop, to go on later; 0 means no limit", low=0)

    def conflicts(self):
        return ku.run_conflicts(self)

    def training(self):
        """A `Config` with these settings, where it has them, for what pre-training shares with training."""
        names = {field.name for field in dataclasses.fields(ku.Config)}
        return ku.Config(**{name: value for name, value in self.to_dict().items() if name in names})


def read_texts(cfg):
    """(texts, counts) of train.csv and test.csv: each text once, without empty ones, drawn by seed where `max_rows` is
    set. Of the files nothing but the text columns is used; raises DataError as `read_competition` does."""
    data_dir, texts, counts, problems = ku.find_data(cfg.data_dir, "train.csv"), [], {}, []
    for path in filter(ku.is_there, (data_dir / "train.csv", data_dir / "test.csv")):
        frame = ku.read_table(path, ku.text_columns(cfg))
        for column in ku.text_columns(cfg):
            numeric = np.isfinite(ku.to_numbers(frame[column]))
            if numeric.mean() > 0.5:
                problems += ku.bad_rows(path, frame, column, column, numeric, "texts, not numbers")
            texts += list(frame[column].str.strip())
        counts[path.name] = len(texts) - sum(counts.values())
    if problems:
        raise ku.DataError(problems)
    unique = list(dict.fromkeys(filter(None, texts)))
    counts |= {"empty": texts.count(""), "repeated": sum(map(bool, texts)) - len(unique)}
    if cfg.max_rows:
        unique = [unique[i] for i in np.flatnonzero(ku.id_order(unique, cfg.seed) < cfg.max_rows)]
    return unique, counts


class Corpus(NamedTuple):
    """Texts in N windows, and what is needed to mask them."""

    tokens: ku.Tokens
    words: np.ndarray  # of each token, the number of its word in its text; -1 for one that is never masked
    texts: np.ndarray  # (N,) number of the text of each window
    mask_id: int
    ordinary: np.ndarray  # ids that a random replacement may be: not special, known to the backbone


def number_words(encoded, tokenizer, cfg):
    """Of each token of each text the number of its word, by the tokenizer's own division into words; of the token
    itself where `whole_words` is off or the tokenizer divides texts into none, which is said."""
    tokens = [np.arange(len(ids)) for ids in encoded["input_ids"]]
    if not cfg.whole_words:
        return tokens
    if tokenizer.is_fast:
        found = [encoded.word_ids(i) for i in range(len(tokens))]
        words = [np.array([-1 if word is None else word for word in row], dtype=int) for row in found]
        if sum(len(np.unique(row)) for row in words) > len(words):
            return words
    print(f"{type(tokenizer).__name__} does not divide texts into words: single tokens are masked")
    return tokens


def make_corpus(texts, tokenizer, n_embeddings, cfg):
    """The `Corpus` of texts. One that is longer than `max_length` becomes windows of about equal length, each with the
    tokenizer's special tokens, so that no part of it is lost; one without a token that may be masked is left out."""
    (before, after), special = (ids for ids, _ in ku.template(tokenizer, pair=False)[0]), tokenizer.all_special_ids
    room = cfg.max_length - len(before) - len(after)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    divided = number_words(encoded, tokenizer, cfg)
    rows, words, numbers = [], [], []
    for number, (ids, marks) in enumerate(zip(encoded["input_ids"], divided, strict=True)):
        ids, marks = np.array(ids, np.int32), np.where(np.isin(ids, special), -1, marks)
        for part in np.array_split(np.arange(len(ids)), math.ceil(len(ids) / room) or 1):
            if (marks[part] >= 0).any():
                rows.append(np.array([*before, *ids[part], *after], np.int32))
                words.append(np.pad(marks[part], (len(before), len(after)), constant_values=-1))
                numbers.append(number)
    ordinary = np.setdiff1d(list(tokenizer.get_vocab().values()), special)
    tokens = ku.Tokens(rows, None, tokenizer.pad_token_id or 0)
    words = np.concatenate(words) if words else np.empty(0, int)
    return Corpus(tokens, words, np.array(numbers), tokenizer.mask_token_id, ordinary[ordinary < n_embeddings])


def mask_window(corpus, row, epoch, cfg):
    """(positions (M,), new ids (M,)) of the tokens of window `row` that are to be predicted in an epoch.

    `mask_share` of its words are drawn, one at least, with all of their tokens; of these 80 % become the mask token,
    10 % a random token and 10 % stay (arXiv:1810.04805). The draw depends on seed, epoch and row alone.
    """
    span = slice(corpus.tokens.offsets[row], corpus.tokens.offsets[row + 1])
    ids, words, rng = corpus.tokens.ids[span], corpus.words[span], np.random.default_rng([cfg.seed, epoch, row])
    names = np.unique(words[words >= 0])
    chosen = rng.choice(names, max(1, round(cfg.mask_share * len(names))), replace=False)
    positions = np.flatnonzero(np.isin(words, chosen))
    fate, random_ids = rng.random(len(positions)), rng.choice(corpus.ordinary, len(positions))
    new = np.where(fate < 0.8, corpus.mask_id, np.where(fate < 0.9, random_ids, ids[positions]))
    return positions, new


def masked_batch(corpus, rows, masks, device):
    """What `MaskedModel` takes: the windows `rows` as padded tensors (B, T) with their `masks` of `mask_window` done,
    places (M,) of the tokens to be predicted, row * T + position, and their true ids (M,)."""
    inputs, width = corpus.tokens.batch(rows, device), corpus.tokens.lengths[rows].max()
    places = ku.send(np.concatenate([i * width + positions for i, (positions, _) in enumerate(masks)]), device)
    flat = inputs["input_ids"].view(-1)
    true = flat[places]
    flat[places] = ku.send(np.concatenate([new for _, new in masks]).astype(np.int64), device)
    return inputs, places, true


class MaskedModel(nn.Module):
    """A masked-language model whose head, as wide as the vocabulary, sees only the tokens that are to be predicted."""

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

    def forward(self, inputs, places, true):
        """Cross-entropy summed over the M tokens at `places`."""
        self.places = places
        logits = self.language_model(**inputs).logits[0]  # (M, V)
        return F.cross_entropy(logits.float(), true, reduction="sum")


def load_masked_model(folder, cfg):
    """(`MaskedModel`, whether its head is new) of a backbone, in float32.

    A head that the checkpoint lacks starts at random, tied to the word embeddings where the architecture ties them.
    Raises KitError for an architecture without one, and for weights of the backbone that are missing.
    """
    config, _ = ku.load_config(folder, cfg)
    name = type(config).__name__.removesuffix("Config")
    if type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ku.KitError(
            f"{folder}: {name} has no head that predicts masked words. Decoders (GPT-2, Llama), encoder-decoders (T5, "
            "BART) and XLNet are not pre-trained here: train on it as it is, or take BERT, RoBERTa, DeBERTa, ..."
        )
    model, info = ku.load_weights(transformers.AutoModelForMaskedLM, folder, config, cfg)
    for key, weight in model.named_parameters():
        if key in info["missing_keys"] and key.endswith("bias"):  # transformers 5.0 leaves Longformer's as memory was
            weight.data.zero_()
    model = MaskedModel(model)
    inside = f"{model.language_model.base_model_prefix}."
    ku.check_weights(
        folder, model.language_model, [key for key in info["missing_keys"] if key.startswith(inside)], info
    )
    if new := sorted(info["missing_keys"]):
        output = model.language_model.get_output_embeddings()
        tied = output is not None and output.weight is model.backbone.get_input_embeddings().weight
        print(
            f"of the head that predicts masked words the checkpoint lacks {len(new)} tensors, such as {new[0]}: they "
            f"start at random and learn at head_lr; its output is {'' if tied else 'not '}tied to the word embeddings"
        )
    return model, bool(new)


@dataclasses.dataclass
class PretrainState:
    """Where pre-training stands, beside its model, optimiser and random states: a part of a checkpoint."""

    step: int = 0
    losses: list = dataclasses.field(default_factory=list)  # of each step
    held_out: list = dataclasses.field(default_factory=list)  # [step, loss] of each evaluation
    seconds: float = 0.0

    def state_dict(self):
        return dataclasses.asdict(self)

    def load_state_dict(self, state):
        vars(self).update(state)


class Pretraining:
    """Optimiser steps and evaluations of a masked-language model on a corpus."""

    def __init__(self, corpus, model, new_head, cfg):
        self.corpus, self.cfg, self.device = corpus, cfg, ku.pick_device()
        self.dtype, shared = ku.pick_dtype(cfg.precision, self.device), cfg.training()
        texts = np.random.default_rng(cfg.seed).permutation(np.unique(corpus.texts))
        held_out = np.isin(corpus.texts, texts[: max(1, round(cfg.held_out * len(texts)))])
        self.train_rows, self.rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self.per_epoch = math.ceil(len(self.train_rows) / cfg.batch_size)
        self.total = self.per_epoch * cfg.epochs
        self.model = model.to(self.device).train()
        groups = ku.parameter_groups(model, shared if new_head else dataclasses.replace(shared, head_lr=cfg.lr))
        print(ku.group_table(groups))
        self.rates, self.shared = ku.rate_table(groups, self.total, shared), shared
        self.optimizer = ku.make_optimizer(groups, shared)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.state, self.pending = PretrainState(), []  # losses since the last `flush`, still on the device
        self.parts = dict(model=model, optimizer=self.optimizer, scaler=self.scaler, state=self.state)
        self.parts |= dict(random=ku.RandomStates())

    def batches(self):
        """Rows of the optimiser steps that are left."""
        batches = ku.epoch_batches(self.corpus.tokens.lengths[self.train_rows], 0, self.shared, bucket_batches=4)
        return (self.train_rows[batch] for batch in itertools.islice(batches, self.state.step, None))

    def loss(self, rows, masks):
        with ku.autocast(self.device, self.dtype):
            return self.model(*masked_batch(self.corpus, rows, masks, self.device))

    def step(self, rows):
        """An optimiser step on the mean loss of all masked tokens of the windows `rows`."""
        epoch, size = 1 + self.state.step // self.per_epoch, self.cfg.micro_batch_size or self.cfg.batch_size
        masks = [mask_window(self.corpus, row, epoch, self.cfg) for row in rows]
        count, mean = sum(len(positions) for positions, _ in masks), torch.zeros((), device=self.device)
        for group, rate in zip(self.optimizer.param_groups, self.rates[self.state.step], strict=True):
            group["lr"] = float(rate)
        for start in range(0, len(rows), size):
            share = self.loss(rows[start : start + size], masks[start : start + size]) / count
            self.scaler.scale(share).backward()
            mean += share.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.shared.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.pending.append(mean)

    def flush(self):
        """Copy the losses since the last time from the device; NumericError at one that is not finite."""
        losses, self.pending = torch.stack(self.pending).tolist() if self.pending else [], []
        for step, loss in enumerate(losses, self.state.step - len(losses) + 1):
            self.check(step, loss)
        self.state.losses += losses

    def check(self, step, loss):
        if not math.isfinite(loss):
            advice = "lower lr or head_lr" + ("" if self.dtype == torch.float32 else ", or set precision fp32")
            raise ku.NumericError(f"pre-training, step {step}: the loss is {loss}: {advice}")

    @torch.no_grad()
    def evaluate(self):
        """Note the mean loss of the masked tokens of the held-out windows, whose masks are always the same; as text."""
        total = count = 0
        self.model.eval()
        for batch in ku.plan_prediction(self.corpus.tokens.lengths[self.rows], 8192):
            masks = [mask_window(self.corpus, row, 0, self.cfg) for row in self.rows[batch]]
            total += self.loss(self.rows[batch], masks).item()
            count += sum(len(positions) for positions, _ in masks)
        self.model.train()
        self.check(self.state.step, loss := total / count)
        self.state.held_out.append([self.state.step, loss])
        return f"held-out loss {loss:.4f}, perplexity {torch.tensor(loss).exp():.4g}"


def run_pretraining(training, checkpoints, watch):
    """Pre-train to the end, or until the watch stops it; why it did, or ''."""
    state = training.state
    if checkpoints.load(training.parts):
        print(f"goes on after step {state.step} of {training.total}")
    began = time.perf_counter() - state.seconds
    watch.save_seconds = 12 * ku.n_parameters(training.model) / 3e8  # a guess, until the first is measured

    def save():
        mark, state.seconds = time.perf_counter(), time.perf_counter() - began
        checkpoints.save(state.step, training.parts)
        watch.note_save(time.perf_counter() - mark)

    if not state.held_out:
        print(f"before the first step: {training.evaluate()}")
    stopped, mark = "", time.perf_counter()
    bar = ku.progress(training.batches(), "pre-training", training.total, state.step)
    for rows in bar:
        if stopped := watch.stop(len(training.rows)):
            training.flush()
            if watch.every:
                save()
            break
        training.step(rows)
        evaluated = state.step % training.per_epoch == 0
        due = watch.due(evaluated)
        if evaluated or due or len(training.pending) == ku.LOG_STEPS or not watch.step_seconds:
            steps = len(training.pending)
            training.flush()
            watch.step_seconds = (time.perf_counter() - mark) / steps
            mark = time.perf_counter()
        if evaluated:
            bar.write(f"epoch {state.step // training.per_epoch}: {training.evaluate()}{watch.told()}")
            watch.row_seconds = (time.perf_counter() - mark) / len(training.rows)
        if due:
            save()
        if evaluated or due:
            mark = time.perf_counter()
    state.seconds = time.perf_counter() - began
    return stopped


def plot_pretraining(run, state):
    """Loss of each step, its running mean and the held-out loss of each evaluation, as curves.png."""
    figure = ku.new_figure(8, 4)
    axis, steps = figure.subplots(), range(1, len(state.losses) + 1)
    smooth = pd.Series(state.losses).ewm(span=max(5, len(state.losses) // 10)).mean()
    axis.plot(steps, state.losses, color="C0", alpha=0.2, linewidth=0.8)
    axis.plot(steps, smooth, color="C0", label="training, running mean")
    axis.plot(*zip(*state.held_out, strict=True), color="C1", marker=".", label="held out, the same words masked")
    axis.set(xlabel="optimiser step", ylabel="loss of a masked token (nats)")
    axis.legend(fontsize="small")
    (_, first), (_, last) = state.held_out[0], state.held_out[-1]
    figure.suptitle(f"{run.name}: held-out loss {first:.3f} before, {last:.3f} after", fontsize="medium")
    ku.save_figure(figure, run / "curves.png")


def save_pretrained(model, tokenizer, run):
    """The backbone alone, without its head, as transformers lays it out; the weights last."""
    with ku.writing(run):
        tokenizer.save_pretrained(run)
    config = model.backbone.config
    config.architectures = [type(model.backbone).__name__]
    ku.write_atomic(run / "config.json", config.to_json_file)
    ku.write_atomic(run / "model.safetensors", lambda path: save_model(model.backbone, path, metadata={"format": "pt"}))


def describe_pretraining(training):
    """What pretrain.json says of a pre-training as far as it has come."""
    state = training.state
    losses = {"before": state.held_out[0][1], "after": state.held_out[-1][1], "steps_and_losses": state.held_out}
    texts = len(np.unique(training.corpus.texts[training.rows]))
    told = {"steps": state.step, "of_steps": training.total, "seconds": state.seconds}
    return told | {"held_out": {"texts": texts, "windows": len(training.rows)} | losses}


def pretrain_in(run, training, tokenizer, record, watch):
    """What `pretrain` does in a run folder that is its own."""
    path, checkpoints, status = run / PRETRAIN_RECORD, ku.Checkpoints(run, 0), ""
    if path.is_file():
        old = ku.read_json(path)
        status = old["status"]
        record = record | {"sessions": old["sessions"] + record["sessions"]}
    if status == "complete":
        print(f"{run} is complete, nothing is trained")
    else:
        ku.write_json(path, record)
        try:
            with watch:
                stopped = run_pretraining(training, checkpoints, watch)
        except torch.OutOfMemoryError as error:
            full = str(error).strip().splitlines()[0]
            raise ku.KitError(
                f"out of memory on {ku.device_name()}: lower micro_batch_size or max_length ({full})"
            ) from None
        record = record | describe_pretraining(training)
        if stopped:
            why = f"{stopped}: step {record['steps']} of {record['of_steps']}"
            ku.write_json(path, record | {"status": "stopped", "stopped": why})
            place = "from there" if watch.every else "from the beginning (checkpoint_minutes is 0)"
            raise ku.Stopped([why, f"the same command goes on {place}"])
        plot_pretraining(run, training.state)
        save_pretrained(training.model, tokenizer, run)
        ku.write_json(path, record | {"status": "complete"})
        print(f"{run}: {record['steps']} steps in {record['seconds']:.0f} s; set backbone to this folder")
    checkpoints.prune(0)
    with ku.writing(run):
        with contextlib.suppress(OSError):
            checkpoints.folder.rmdir()
        (run / ".lock").unlink(missing_ok=True)


def pretrain(cfg):
    """Pre-train a backbone on the texts of a competition by masked-language modelling; the run folder, which is a
    backbone: `output_dir/run_name` with config.json, model.safetensors, the tokenizer, pretrain.json and curves.png.

    An unfinished run of the same name and content goes on where it was (`resume`), on a CPU with as many threads to the
    same bytes. No target is read. Raises Stopped where `max_minutes`, SIGTERM or Ctrl-C ended it early, and KitError
    for a backbone that cannot be pre-trained so.
    """
    watch, folder = ku.Watch(cfg), ku.find_backbone(cfg.backbone)
    ku.check_config(folder / "config.json", ku.HARMLESS)
    tokenizer, (texts, counts) = ku.load_tokenizer(folder), read_texts(cfg)
    ku.seed_everything(cfg.seed)
    print(f"backbone {cfg.backbone} from {folder}")
    model, new_head = load_masked_model(folder, cfg.training())
    n_embeddings = model.backbone.get_input_embeddings().num_embeddings
    if tokenizer.mask_token_id is None or tokenizer.mask_token_id >= n_embeddings:
        raise ku.KitError(
            f"{folder}: the tokenizer has no mask token that the backbone knows, so no words can be masked"
        )
    ku.check_length(model.backbone, cfg)
    corpus = make_corpus(texts, tokenizer, n_embeddings, cfg)
    if len(np.unique(corpus.texts)) < 2:
        raise ku.DataError(f"train.csv and test.csv: expected two texts or more that the tokenizer knows, got {counts}")
    ku.check_ids(corpus.tokens, [], model.backbone.config, folder)
    ku.check_vocabulary(corpus.tokens, tokenizer)
    counts |= {"used": len(np.unique(corpus.texts))}
    print(
        f"texts: {', '.join(f'{name} {number}' for name, number in counts.items())}, in {len(corpus.tokens)} windows "
        f"of {corpus.tokens.lengths.mean():.0f} tokens on average"
    )
    training = Pretraining(corpus, model, new_head, cfg)
    place, weights = ku.describe_machine(cfg), {path.name: ku.file_sha256(path) for path in ku.weight_files(folder)}
    made = {"the texts": ku.digest(texts), "the token ids": ku.digest(corpus.tokens.ids, corpus.tokens.lengths)}
    made |= {"the backbone": ku.digest(folder / "config.json", list(weights.values()))}
    record = {"status": "running", "settings": cfg.to_dict(), "resolved": {}, "backbone": str(folder)}
    record |= {"weights": weights, **ku.pretraining_of(folder), "texts": counts, "windows": len(corpus.tokens), **place}
    record |= {"sessions": [place], "head": "new" if new_head else "of the checkpoint"}
    record |= {
        "fingerprint": made
        | {"the code (kernel_utils.py, pretraining.py)": ku.digest(Path(ku.__file__), Path(__file__))}
    }
    run = ku.find_run_folder(cfg, record, f"{ku.short_name(cfg.backbone)}-pretrained-seed{cfg.seed}", PRETRAIN_RECORD)
    with ku.locked(run):
        pretrain_in(run, training, tokenizer, record, watch)
    return run
