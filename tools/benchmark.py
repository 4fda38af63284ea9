"""Speed of training and prediction: the kit against a plain padded loop and the Trainer of transformers.

    python tools/benchmark.py -o results/benchmark_gpu.json

One process, the same weights, rows, optimiser batch, dtype, dropout, clipping and constant learning rate for all:

    kit           kernel_utils as it is; kit-eager without CUDA graphs, kit-compile with torch.compile
    padded        the article's loop: rows padded to the maximum length, autocast, AdamW, loss.item() after each step
    dynamic       the Trainer as it comes: random batches, padded to the longest of their rows
    tuned         the Trainer with rows grouped by length, fused AdamW, and no filter of losses that are not numbers

First all must predict the same for eight rows, and again after three steps with the same batches; else nothing is
measured. Then the contenders train in turn, a block of steps each, over the same rows in every round, another one
first each time. A block has a few steps that are not timed: `first step` is the very first of a contender, with what
comes before it. Rates are medians over the rounds and count real tokens, never padding; ratios are those of a round,
contender's seconds by the kit's, as median, smallest and largest. `share of matmul` is the work that real tokens need
(FLOPs by the usual formula) by what a large matrix product reached at best between the rounds of the same run.

Two loads: `narrow` lengths like those of the CLEAR corpus, padded to 320, and `mixed`, log-normal around 150 from 16 to
512, padded to 512. With `--data` they are real texts, and pieces of them; else random token ids.

The tuned Trainer's rows are grouped by its own function, 50 batches at a time as in a run of 200 batches or more. A
round of fewer steps takes every so many of 50 such batches, so that it pads as little as a long run, and the others
take the same rows. Peak memory is that of each contender alone in a process of its own: on a GPU what PyTorch's
allocator had, on a CPU the growth of the process since its model was loaded.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault(
    "CUDA_VISIBLE_DEVICES", "0"
)  # the Trainer would split its batches over several GPUs

import numpy as np
import tokenizers
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.trainer_pt_utils import get_length_grouped_indices

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel_utils"))
import kernel_utils as ku

LABELS = {
    "kit": "kernel_utils",
    "kit-eager": "kernel_utils, no CUDA graphs",
    "kit-compile": "kernel_utils, compiled",
    "padded": "plain loop, padded to the maximum",
    "dynamic": "Trainer, dynamic padding",
    "tuned": "Trainer, tuned",
    "sorted": "plain loop, sorted by length",
}
DEBERTA = dict(
    relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True
)
DEBERTA |= dict(
    pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, layer_norm_eps=1e-7
)
SIZES = {  # width, layers, heads, inner width, vocabulary
    "minilm": (transformers.BertConfig, (384, 6, 12, 1536, 30522), {}),
    "bert-base": (transformers.BertConfig, (768, 12, 12, 3072, 30522), {}),
    "deberta-v3-base": (transformers.DebertaV2Config, (768, 12, 12, 3072, 128100), DEBERTA),
    "tiny": (transformers.BertConfig, (32, 2, 2, 64, 100), {}),
}
LENGTHS = {"narrow": 320, "mixed": 512}  # load -> tokens that rows are cut and, by some, padded to
CPU = dict(
    size="minilm",
    contenders="kit,padded,dynamic,tuned",
    batch_size=16,
    steps=7,
    warm=1,
    start=0,
    rows=96,
)
CPU |= dict(
    infer_batch_size=16, memory_steps=3, workers=0, matmul=1024, copied=2**26, split_rows=200
)
GPU = dict(
    size="bert-base,deberta-v3-base", contenders="kit,kit-eager,kit-compile,padded,dynamic,tuned"
)
GPU |= dict(batch_size=32, steps=200, warm=5, start=60, rows=4096, infer_batch_size=64)
GPU |= dict(memory_steps=20, workers=4, matmul=8192, copied=2**29, split_rows=0)
QUICK = dict(
    size="tiny",
    batch_size=4,
    steps=2,
    warm=1,
    start=0,
    rows=8,
    infer_batch_size=4,
    memory_steps=0,
    workers=0,
)
QUICK |= dict(rounds=2, matmul=64, copied=2**16, split_rows=20)
PARITY_ROWS, PARITY_STEPS, SYNC_STEPS = 8, 3, 20
OUTPUT_TOLERANCES = {
    "fp32": 1e-4,
    "fp16": 0.02,
    "bf16": 0.1,
}  # between predictions of the same weights
TRAINED_TOLERANCES = {
    "fp32": 0.02,
    "bf16": 0.5,
}  # after a few steps, by the largest change they made
GROUPED = (
    50  # batches that the Trainer's sampler sorts by length together, where there are 200 or more
)
LOG_STEPS = 50  # the kit copies its losses from the device after so many steps


# ---------------------------------------------------------------------------------------
# Rows


def mixed_lengths(n, rng):
    """Tokens of `n` rows: log-normal around 150, 16 to 512."""
    return rng.lognormal(np.log(150), 0.7, n).round().clip(16, LENGTHS["mixed"]).astype(int)


def narrow_lengths(n, rng):
    """Tokens of `n` rows as in the CLEAR corpus: 225 on average, standard deviation 24."""
    return rng.normal(225, 24, n).round().clip(150, LENGTHS["narrow"]).astype(int)


def in_groups(count):
    """Batches of which so many are taken: those of whole groups."""
    return GROUPED * math.ceil(count / GROUPED)


def repeated(n, count, rng):
    """`n` of the numbers below `count`, none a second time before all had a turn."""
    return np.concatenate([rng.permutation(count) for _ in range(n // count + 1)])[:n]


def make_tokens(load, n, rng, texts, vocabulary):
    """`n` rows of a load: those of `texts` (Tokens) or pieces of them, or random ids where there are none."""
    if texts is not None and load == "narrow":
        ids = [
            texts.ids[texts.offsets[row] : texts.offsets[row + 1]]
            for row in repeated(n, len(texts), rng)
        ]
    else:
        lengths = (mixed_lengths if load == "mixed" else narrow_lengths)(n, rng)
        pool = texts.ids if texts is not None else rng.integers(vocabulary // 2, vocabulary, 10**6)
        starts = rng.integers(0, len(pool) - lengths)
        ids = [pool[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    if texts is None or texts.types is None:
        return ku.Tokens(ids, None, texts.pad_id if texts else 0)
    return ku.Tokens(ids, [np.zeros(len(row), int) for row in ids], texts.pad_id)


def plain_tokenizer():
    """Enough of a tokenizer for rows that are token ids already."""
    model = tokenizers.models.WordLevel(
        {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# ---------------------------------------------------------------------------------------
# Backbones and their work


def size_config(size):
    kind, (width, layers, heads, inner, vocabulary), more = SIZES[size]
    sizes = dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    return kind(**sizes, vocab_size=vocabulary, max_position_embeddings=512, pad_token_id=0, **more)


def find_or_make(size, temporary, data):
    """Folder of a backbone, and where its weights are from. Rows of `data` are tokenized as MiniLM does it, unless the
    backbone has a tokenizer of its own."""
    if size not in SIZES:
        return ku._find_backbone(size), "its own"
    if size == "minilm":
        with contextlib.suppress(ku.KitError):
            return ku._find_backbone(ku.Config().backbone), "its own"
    folder = Path(temporary) / size
    torch.manual_seed(0)
    with ku._quiet_transformers():
        transformers.AutoModel.from_config(size_config(size)).save_pretrained(folder)
    real = data and size != "tiny"
    tokenizer = (
        ku._load_tokenizer(ku._find_backbone(ku.Config().backbone)) if real else plain_tokenizer()
    )
    tokenizer.save_pretrained(folder)
    return folder, "random"


class Work:
    """The matrix products that a backbone needs for a text: weights N, layers L, width d, relative positions R."""

    def __init__(self, backbone):
        config = backbone.config
        layers = ku.transformer_layers(backbone)
        weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
        self.weights = weights * config.num_hidden_layers // len(layers)
        self.layers, self.width, self.positions = config.num_hidden_layers, config.hidden_size, 0
        if getattr(config, "relative_attention", False):
            buckets = getattr(config, "position_buckets", 0)
            limit = getattr(config, "max_relative_positions", 0)
            spans = (
                buckets if buckets > 0 else limit if limit > 0 else config.max_position_embeddings
            )
            self.positions = 2 * spans

    def flops(self, lengths):
        """FLOPs to train on texts of so many tokens once; prediction takes a third."""
        s = np.asarray(lengths, dtype=float)
        attention = 12 * self.layers * self.width
        return float((s * (6 * self.weights + attention * (s + self.positions))).sum())


# ---------------------------------------------------------------------------------------
# What the contenders share


class Window:
    """Clock of a block of steps: `first` are the seconds until it opens, `seconds` those until it closes."""

    def __init__(self, device, count_syncs=False):
        self.device, self.count_syncs, self.syncs = device, count_syncs, None
        self.began = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def open(self):
        self.opened = self.now()
        self.first = self.opened - self.began
        if self.count_syncs:
            self.catching = warnings.catch_warnings(record=True)
            self.caught = self.catching.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def close(self):
        if self.count_syncs:
            torch.cuda.set_sync_debug_mode("default")
            self.catching.__exit__(None, None, None)
            self.syncs = sum("synchroniz" in str(warning.message) for warning in self.caught)
        self.seconds = self.now() - self.opened


class Regressor(nn.Module):
    """What the kit trains, with transformers alone: backbone, mean of the tokens, linear output, squared error."""

    def __init__(self, backbone, output):
        super().__init__()
        self.backbone, self.output = backbone, output

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):
            mask = attention_mask.unsqueeze(-1)  # (B, T, 1)
            logits = self.output((states.float() * mask).sum(1) / mask.sum(1))[:, 0]  # (B,)
            return {"logits": logits} | (
                {} if labels is None else {"loss": F.mse_loss(logits, labels)}
            )


class Lab:
    """Rows of a load, settings, and the model that the contenders other than the kit share."""

    def __init__(self, asked, folder, load):
        self.asked, self.load, self.length, self.device = (
            asked,
            load,
            LENGTHS[load],
            ku._pick_device(),
        )
        cfg = ku.Config(
            backbone=str(folder),
            max_length=self.length,
            epochs=1,
            batch_size=asked.batch_size,
            schedule="constant",
            warmup_ratio=0.0,
            backbone_dropout=asked.dropout,
            precision=asked.precision,
        )
        config = transformers.AutoConfig.from_pretrained(folder)
        cfg = cfg.resolved(config)
        self.cfg = dataclasses.replace(
            cfg, head_lr=cfg.lr
        )  # one rate for all, as the Trainer has it
        self.dtype = ku._pick_dtype(cfg.precision, self.device)
        self.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[
            self.dtype
        ]
        tokenizer = ku._load_tokenizer(folder)
        texts = None
        if asked.data:
            frame, _, _ = ku.read_competition(dataclasses.replace(cfg, data_dir=asked.data))
            texts = ku._tokenize(frame[cfg.text_column], tokenizer, cfg)
        rng = np.random.default_rng(asked.seed)
        n = asked.batch_size * sum(map(in_groups, self.blocks()))
        # one more batch stays out of the training, as each fold needs rows to validate
        self.tokens = make_tokens(load, n + asked.batch_size, rng, texts, config.vocab_size)
        targets = rng.standard_normal((len(self.tokens), 1)).astype(np.float32)
        folds = (np.arange(len(self.tokens)) < n).astype(int)
        self.left = rng.permutation(n)
        self.data = ku._TrainingData(
            self.tokens, targets, folds, folder, tokenizer, 1, np.arange(len(self.tokens))
        )
        self.model = self.load_model()
        self.initial = {
            name: weight.cpu().clone() for name, weight in self.model.state_dict().items()
        }
        self.work = Work(self.model.backbone)

    def blocks(self):
        """Batches of every block that is dealt."""
        asked = self.asked
        syncs = [asked.warm, SYNC_STEPS] if self.device.type == "cuda" else []
        return [PARITY_STEPS, asked.start, *(asked.rounds * [asked.warm, asked.steps]), *syncs]

    def deal(self, count):
        """Rows of the next `count` batches, as the batches that the Trainer makes when it groups them by length: of as
        many groups as that takes, every so many."""
        many, size = in_groups(count), self.asked.batch_size
        rows, self.left = np.split(self.left, [many * size])
        generator = torch.Generator().manual_seed(self.asked.seed)
        order = get_length_grouped_indices(
            self.tokens.lengths[rows].tolist(), size, GROUPED, generator
        )
        batches = np.split(rows[order], many)
        return [batches[int(place * many / count)] for place in np.arange(count) + 0.5]

    def load_model(self):
        config = transformers.AutoConfig.from_pretrained(self.data.folder)
        ku._set_dropout(config, self.asked.dropout)
        with ku._quiet_transformers():
            load = transformers.AutoModel.from_pretrained
            backbone = load(
                self.data.folder, config=config, dtype=torch.float32, local_files_only=True
            )
        if isinstance(getattr(backbone, "pooler", None), nn.Module):
            backbone.pooler = None  # nobody reads it
        torch.manual_seed(0)
        return Regressor(backbone, nn.Linear(config.hidden_size, 1)).to(self.device)

    def reset(self):
        self.model.load_state_dict(self.initial)

    def padded(self, rows, length=None):
        """The rows as padded tensors (B, T) on the device, T being `length` or that of the longest row."""
        tokens = self.tokens
        mask = np.arange(length or tokens.lengths[rows].max()) < tokens.lengths[rows][:, None]
        ids = np.full(mask.shape, tokens.pad_id)
        ids[mask] = np.concatenate(
            [tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]] for row in rows]
        )
        arrays = {"input_ids": ids, "attention_mask": mask.astype(int)}
        if tokens.types is not None:
            arrays["token_type_ids"] = np.zeros_like(ids)
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    @torch.inference_mode()
    def predict(self, rows, batch_size, pad, precision=None):
        """Predictions (B,) of the model that is no kit's: longest first, or in order and padded to the maximum."""
        dtype = ku._pick_dtype(precision or self.precision, self.device)
        self.model.eval()
        order = (
            np.arange(len(rows)) if pad else np.argsort(-self.tokens.lengths[rows], kind="stable")
        )
        parts = []
        for start in range(0, len(rows), batch_size):
            inputs = self.padded(
                rows[order[start : start + batch_size]], self.length if pad else None
            )
            with ku._autocast(self.device, dtype):
                parts.append(self.model(**inputs)["logits"])
        ordered = np.empty(len(rows))
        ordered[order] = torch.cat(parts).cpu().numpy()
        return ordered


# ---------------------------------------------------------------------------------------
# Contenders in training
#
# `run(warm, batches, window)` makes an optimiser step with each batch of `warm`, opens the window, makes those with
# `batches` and closes it. `arrange` makes the contender's own batches of a block's rows, which come grouped by length.
# `outputs` predicts.


class Kit:
    """The kit's engine, called as its training loop calls it."""

    def __init__(self, lab, **settings):
        self.lab, self.cfg, self.step = lab, dataclasses.replace(lab.cfg, **settings), 0
        self.engine = ku.OptimizerStep(lab.data, self.cfg)
        self.engine.setup_fold(0, lambda text: None)
        self.engine.model.output.load_state_dict(lab.model.output.state_dict())

    def arrange(self, batches, rng):
        """As its epochs have them. Batches with more tokens than the engine has planned for are drawn again."""
        rows, engine = np.concatenate(batches), self.engine
        lengths = self.lab.tokens.lengths
        while True:
            cfg = dataclasses.replace(self.cfg, seed=int(rng.integers(2**32)))
            mine = [
                rows[batch]
                for batch in ku._epoch_batches(lengths[rows], 0, cfg, engine.length_bucket)
            ]
            if not engine.has_static_shapes or max(lengths[batch].sum() for batch in mine) <= max(
                engine.capture_sizes
            ):
                return mine

    def slots(self, batch):
        """Token slots of a batch, padding included."""
        total, engine = int(self.lab.tokens.lengths[batch].sum()), self.engine
        if not engine.is_packed:
            return len(batch) * int(self.lab.tokens.lengths[batch].max())
        return (
            next(n for n in engine.capture_sizes if n >= total)
            if engine.has_static_shapes
            else total
        )

    def make(self, batches):
        kept = []
        for rows in batches:
            kept.append(self.engine(self.step, rows).values)
            self.step += 1
            if len(kept) == LOG_STEPS:
                torch.stack(kept).tolist()
                kept = []

    def run(self, warm, batches, window):
        self.engine.model.train()
        self.make(warm)
        window.open()
        self.make(batches)
        window.close()

    def outputs(self, rows, precision):
        cfg = dataclasses.replace(self.cfg, precision=precision)
        return ku.predict(self.engine.model, self.lab.tokens, cfg, rows)[:, 0]


class Other:
    """A contender that trains the model of the lab."""

    def __init__(self, lab):
        self.lab = lab

    def arrange(self, batches, rng):
        return np.split(rng.permutation(np.concatenate(batches)), len(batches))

    def outputs(self, rows, precision):
        return self.lab.predict(rows, len(rows), False, precision)


class PaddedLoop(Other):
    """A first notebook's loop."""

    def slots(self, batch):
        return len(batch) * self.lab.length

    def run(self, warm, batches, window):
        lab, cfg, model = self.lab, self.lab.cfg, self.lab.model.train()
        parts = [
            [p for p in model.parameters() if (p.ndim > 1) == decayed] for decayed in (True, False)
        ]
        groups = [
            dict(params=parts[0], weight_decay=cfg.weight_decay),
            dict(params=parts[1], weight_decay=0.0),
        ]
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr)
        scaler = torch.amp.GradScaler(lab.device.type, enabled=lab.dtype == torch.float16)
        targets, losses = torch.from_numpy(lab.data.targets[:, 0]), []
        for number, rows in enumerate([*warm, *batches]):
            if number == len(warm):
                window.open()
            inputs = lab.padded(rows, lab.length) | {"labels": targets[rows].to(lab.device)}
            with ku._autocast(lab.device, lab.dtype):
                loss = model(**inputs)["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        window.close()


class Rows(torch.utils.data.Dataset):
    """Rows as a tokenizer and the Trainer have them: dictionaries of lists."""

    def __init__(self, lab, rows):
        self.tokens, self.targets, self.rows = lab.tokens, lab.data.targets, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        tokens, row = self.tokens, self.rows[index]
        ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        types = {} if tokens.types is None else {"token_type_ids": [0] * len(ids)}
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": self.targets[row, 0].item(),
        } | types


class Clock(transformers.TrainerCallback):
    """Opens and closes the window at ends of steps, so that it has as many fetches of batches as steps."""

    def __init__(self, window, opens, closes):
        self.window, self.opens, self.closes = window, opens, closes

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.opens:
            self.window.open()
        elif state.global_step == self.closes:
            self.window.close()


class OrderedTrainer(transformers.Trainer):
    """The Trainer, with the order of rows that its sampler has been asked for before."""

    def _get_train_sampler(self, *args, **more):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class HfTrainer(Other):
    """The Trainer's own train() over the rows of a block."""

    def __init__(self, lab, tuned=False):
        super().__init__(lab)
        self.tuned = tuned

    def arrange(self, batches, rng):
        return batches if self.tuned else super().arrange(batches, rng)

    def slots(self, batch):
        return len(batch) * int(self.lab.tokens.lengths[batch].max())

    def arguments(self, folder, steps):
        lab, cfg = self.lab, self.lab.cfg
        tuning = dict(optim="adamw_torch_fused", logging_nan_inf_filter=False)
        names = inspect.signature(transformers.TrainingArguments).parameters
        grouping = "train_sampling_strategy" in names  # transformers 5.0 calls it group_by_length
        tuning |= (
            {"train_sampling_strategy": "group_by_length"}
            if grouping
            else {"group_by_length": True}
        )
        return transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=cfg.batch_size,
            learning_rate=cfg.lr,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            lr_scheduler_type="constant",
            bf16=lab.dtype == torch.bfloat16,
            fp16=lab.dtype == torch.float16,
            use_cpu=lab.device.type == "cpu",
            dataloader_num_workers=lab.asked.workers,
            dataloader_pin_memory=lab.device.type == "cuda",
            report_to=[],
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **(tuning if self.tuned else {}),
        )

    def run(self, warm, batches, window):
        lab, order = self.lab, [*warm, *batches]
        with tempfile.TemporaryDirectory() as folder, ku._quiet_transformers():
            trainer = OrderedTrainer(
                Regressor(lab.model.backbone, lab.model.output),  # which accelerate may wrap
                self.arguments(folder, len(order)),
                data_collator=transformers.DataCollatorWithPadding(lab.data.tokenizer),
                train_dataset=Rows(lab, np.concatenate(order)),
                callbacks=[Clock(window, len(warm), len(order))],
            )
            trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
            trainer.train()


CONTENDERS = {
    "kit": Kit,
    "kit-eager": functools.partial(Kit, cuda_graphs=False),
    "kit-compile": functools.partial(Kit, compile=True),
    "padded": PaddedLoop,
    "dynamic": HfTrainer,
    "tuned": functools.partial(HfTrainer, tuned=True),
}


# ---------------------------------------------------------------------------------------
# Measurements


class ParityError(ku.KitError):
    """Contenders that do not compute the same."""

    title = "the contenders do not compute the same, nothing is measured:"


def matmul_flops(size, dtype, device, repeats=10):
    """FLOP/s of the product of two square matrices."""
    a, b, seconds = *(torch.randn(size, size, device=device).to(dtype) for _ in range(2)), []
    for _ in range(repeats + 2):
        window = Window(device)
        window.open()
        a @ b
        window.close()
        seconds.append(window.seconds)
    return 2 * size**3 / float(np.median(seconds[2:]))


def copy_bytes(count, device, repeats=10):
    """Bytes a second, read and written, of copying so many float32 numbers on the device."""
    source, seconds = torch.zeros(count, device=device), []
    target = torch.ones_like(source)
    for _ in range(repeats + 2):
        window = Window(device)
        window.open()
        target.copy_(source)
        window.close()
        seconds.append(window.seconds)
    return 8 * count / float(np.median(seconds[2:]))


def largest_gap(lab, contenders, precision, rows):
    """Predictions of each contender, and for each the largest difference from the kit's."""
    outputs = {name: contender.outputs(rows, precision) for name, contender in contenders.items()}
    first = next(iter(outputs.values()))
    return outputs, {name: float(np.abs(values - first).max()) for name, values in outputs.items()}


def check_gaps(what, gaps, allowed):
    if bad := [
        f"{what}: {name} differs by {gap:.1e}" for name, gap in gaps.items() if not gap <= allowed
    ]:
        raise ParityError([*bad, f"{allowed:.1e} is allowed"])


def check_outputs(lab, contenders):
    """Largest differences from the kit's predictions with the same weights, in float32 and in the precision used."""
    found, rows = {}, np.arange(PARITY_ROWS)
    for precision in dict.fromkeys(("fp32", lab.precision)):
        lab.reset()
        _, found[precision] = largest_gap(lab, contenders, precision, rows)
        check_gaps(f"predictions in {precision}", found[precision], OUTPUT_TOLERANCES[precision])
    return found


def first_steps(lab, contenders, batches):
    """Train all on the same batches. Returns the gaps of their predictions after it, by the largest change, and the
    windows of all."""
    rows, windows, gaps, kit = np.arange(PARITY_ROWS), {}, {}, None
    lab.reset()
    before = lab.predict(rows, len(rows), False, "fp32")
    for name, contender in contenders.items():
        lab.reset()
        windows[name] = Window(lab.device)
        contender.run(batches[:1], batches[1:], windows[name])
        after = contender.outputs(rows, "fp32")
        kit = after if kit is None else kit
        gaps[name] = float(np.abs(after - kit).max() / np.abs(kit - before).max())
    if (
        not lab.asked.dropout and lab.precision in TRAINED_TOLERANCES
    ):  # loss scaling may skip first steps
        check_gaps(f"after {len(batches)} steps", gaps, TRAINED_TOLERANCES[lab.precision])
    return gaps, windows


def rotated(names, number):
    number %= len(names)
    return [*names[number:], *names[:number]]


def spread(values):
    return {
        "median": float(np.median(values)),
        "smallest": float(min(values)),
        "largest": float(max(values)),
    }


def new_rounds():
    """What is the same for all contenders in each round."""
    return {
        name: [] for name in ("rows", "tokens", "flops", "first", "load_average", "matmul_flops")
    }


def note_round(rounds, lengths, flops, first):
    """Write down the rows of a round, who goes first, and what else the machine does."""
    values = dict(rows=len(lengths), tokens=int(lengths.sum()), flops=flops, first=first)
    for name, value in (values | dict(load_average=os.getloadavg()[0])).items():
        rounds[name].append(value)


def train_in_turn(lab, contenders, asked):
    """The rounds of training: rows, tokens and FLOPs of each, seconds and slots of each contender in each."""
    rounds, results = new_rounds(), {name: {"seconds": [], "slots": []} for name in contenders}
    rounds["steps"] = asked.steps
    for number in range(asked.rounds):
        warm, batches = lab.deal(asked.warm), lab.deal(asked.steps)
        lengths, order = (
            lab.tokens.lengths[np.concatenate(batches)],
            rotated(list(contenders), number),
        )
        note_round(rounds, lengths, lab.work.flops(lengths), order[0])
        for name in order:
            rng = np.random.default_rng([asked.seed, number])
            mine = contenders[name].arrange(batches, rng)
            ready = contenders[name].arrange(warm, rng)
            if not np.array_equal(np.sort(np.concatenate(mine)), np.sort(np.concatenate(batches))):
                raise AssertionError(f"{name} has other rows than the round")
            gc.collect()
            window = Window(lab.device)
            contenders[name].run(ready, mine, window)
            results[name]["seconds"].append(window.seconds)
            results[name]["slots"].append(sum(contenders[name].slots(batch) for batch in mine))
        rounds["matmul_flops"].append(matmul_flops(asked.matmul, lab.dtype, lab.device))
        told = ", ".join(f"{name} {results[name]['seconds'][-1]:.2f} s" for name in contenders)
        print(f"{lab.load}, training, round {number + 1}: {told}", flush=True)
    return rounds, results


def predict_in_turn(lab, kit, asked):
    """The same for prediction; all have the weights of the kit."""
    lab.model.load_state_dict(kit.engine.model.state_dict())
    rows = np.arange(min(asked.rows, len(lab.tokens)))
    lengths, size = lab.tokens.lengths[rows], asked.infer_batch_size
    sides = {
        "kit": lambda: kit.outputs(rows, lab.precision),
        "sorted": lambda: lab.predict(rows, size, pad=False),
        "padded": lambda: lab.predict(rows, size, pad=True),
    }
    predictions = {name: side() for name, side in sides.items()}  # warms up
    gaps = {
        name: float(np.abs(values - predictions["kit"]).max())
        for name, values in predictions.items()
    }
    check_gaps("predictions", gaps, 10 * OUTPUT_TOLERANCES[lab.precision])  # of many more rows
    rounds, results = new_rounds(), {name: {"seconds": []} for name in sides}
    for number in range(asked.rounds):
        order = rotated(list(sides), number)
        note_round(rounds, lengths, lab.work.flops(lengths) / 3, order[0])
        for name in order:
            window = Window(lab.device)
            window.open()
            sides[name]()
            window.close()
            results[name]["seconds"].append(window.seconds)
        rounds["matmul_flops"].append(matmul_flops(asked.matmul, lab.dtype, lab.device))
        told = ", ".join(f"{name} {results[name]['seconds'][-1]:.2f} s" for name in sides)
        print(f"{lab.load}, prediction, round {number + 1}: {told}", flush=True)
    return {"rounds": rounds, "contenders": results, "gaps": gaps}


def add_rates(part, peak):
    """Medians over the rounds for each contender, computed from the seconds; `peak` are FLOP/s of a matrix product."""
    rounds = part["rounds"]
    kit = np.array(part["contenders"]["kit"]["seconds"])
    for result in part["contenders"].values():
        seconds = np.array(result["seconds"])
        result["ratio"] = spread(seconds / kit)  # of the kit's speed to this one's
        result["tokens_per_second"] = spread(rounds["tokens"] / seconds)
        result["rows_per_second"] = spread(rounds["rows"] / seconds)
        result["share_of_matmul"] = float(np.median(rounds["flops"] / seconds)) / peak
        if "slots" in result:
            result["seconds_per_step"] = float(np.median(seconds)) / rounds["steps"]
            result["padding_share"] = 1 - sum(rounds["tokens"]) / sum(result["slots"])
    return part


def count_syncs(lab, contenders, asked):
    """Times a step that each contender waits for the GPU; None without one."""
    if lab.device.type != "cuda":
        return dict.fromkeys(contenders)
    warm, batches, found = lab.deal(asked.warm), lab.deal(SYNC_STEPS), {}
    for name, contender in contenders.items():
        rng, window = np.random.default_rng(0), Window(lab.device, count_syncs=True)
        contender.run(contender.arrange(warm, rng), contender.arrange(batches, rng), window)
        found[name] = window.syncs / len(batches)
    return found


def own_memory(peak=False):
    """Bytes that this process, or its GPU's allocator, has now or had at most. The peak that getrusage knows would be
    that of the parent, where it was larger."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.is_file():
        return ku._peak_memory()
    values = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(values["VmHWM" if peak else "VmRSS"].split()[0])


def measure_alone(asked, folder, load, name):
    """Peak memory of a contender in this process, and what there was before its first step."""
    lab = Lab(asked, folder, load)
    contender = CONTENDERS[name](lab)
    if isinstance(contender, Kit):
        lab.model = None
    before = own_memory()
    if lab.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batches = contender.arrange(lab.deal(asked.memory_steps), np.random.default_rng(0))
    contender.run(batches[:1], batches[1:], Window(lab.device))
    return {"before_bytes": before, "peak_bytes": own_memory(peak=True)}


def measure_memory(asked, folder, load, names):
    """`measure_alone` for each contender, in a process of its own."""
    found = {}
    for name in names if asked.memory_steps else ():
        options = asked.words(alone=name, loads=load, size=str(folder))
        done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True)
        if done.returncode:
            raise ku.KitError([f"{name} alone fails:", *done.stderr.splitlines()[-5:]])
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_load(asked, folder, load, names):
    """All figures of a backbone and a load but peak memory."""
    lab = Lab(asked, folder, load)
    contenders = {name: CONTENDERS[name](lab) for name in names}
    kit = contenders["kit"]
    parity = check_outputs(lab, contenders)
    rng, kits = (
        np.random.default_rng(asked.seed),
        [each for each in contenders.values() if isinstance(each, Kit)],
    )
    planner = max(
        kits, key=lambda each: each.engine.has_static_shapes
    )  # whose batches all kits can take
    trained, windows = first_steps(lab, contenders, planner.arrange(lab.deal(PARITY_STEPS), rng))
    start = {name: window.first + window.seconds for name, window in windows.items()}
    if asked.start:
        batches = planner.arrange(lab.deal(asked.start), rng)
        for name, contender in contenders.items():
            window = Window(lab.device)
            contender.run(batches[:1], batches[1:], window)
            start[name] += window.first + window.seconds
    rounds, results = train_in_turn(lab, contenders, asked)
    syncs = count_syncs(lab, contenders, asked)
    prediction = predict_in_turn(lab, kit, asked)
    peak = max(
        rounds["matmul_flops"] + prediction["rounds"]["matmul_flops"]
    )  # others may have disturbed the rest
    training = add_rates({"rounds": rounds, "contenders": results}, peak)
    for name, result in results.items():
        steady = (PARITY_STEPS + asked.start) * result["seconds_per_step"]
        result["first_step_seconds"] = windows[name].first
        result["start_seconds"] = max(
            0.0, start[name] - steady
        )  # until it is steady, beyond what its steps take then
        result["syncs_per_step"], result["memory"] = syncs[name], None
    used = lab.tokens.lengths
    work = {name: getattr(lab.work, name) for name in ("weights", "layers", "width", "positions")}
    return {
        "load": load,
        "padded_to": lab.length,
        "texts": "real" if asked.data else "random ids",
        "row_tokens": spread(used) | {"mean": float(used.mean())},
        "work": work | {"training_flops_per_token": lab.work.flops(used) / int(used.sum())},
        "precision": lab.precision,
        "packed": bool(kit.engine.is_packed),
        "attention": lab.model.backbone.config._attn_implementation,
        "parity": parity | {"after_first_steps": trained},
        "training": training,
        "prediction": add_rates(prediction, peak),
        "matmul_flops": peak,
    }


def usable(names, asked, folder):
    """The contenders that differ: kits with and without graphs or compilation are one where rows are padded."""
    wanted = dict.fromkeys(["kit", *names])
    if not {"kit-eager", "kit-compile"} & set(wanted):
        return list(wanted)
    lab = Lab(dataclasses.replace(asked, steps=1, rounds=1, start=0), folder, "narrow")
    if Kit(lab).engine.is_packed:
        return list(wanted)
    print("rows are padded for this backbone: kit-eager and kit-compile are left out")
    return [name for name in wanted if name not in ("kit-eager", "kit-compile")]


def time_split(asked, folder):
    """Seconds of the parts of a whole run of one fold: one epoch over real texts."""
    if not asked.data:
        return None
    with tempfile.TemporaryDirectory() as runs:
        cfg = ku.Config(
            data_dir=asked.data,
            backbone=str(folder),
            output_dir=runs,
            batch_size=asked.batch_size,
            max_rows=asked.split_rows,
            run_folds="0",
            epochs=1,
            precision=asked.precision,
            checkpoint_minutes=0,
        )
        train, _, _ = ku.read_competition(cfg)
        record = ku._read_record(ku.train(ku.make_folds(train, cfg), cfg))
    rows = record["oof"]["rows"]
    return {
        "seconds": record["seconds"],
        "validation_rows": rows,
        "rows": asked.split_rows or len(train),
    }


# ---------------------------------------------------------------------------------------
# Table and plot


def number(value, digits):
    return "" if value is None else f"{value:,.{digits}f}"


def ratio_text(ratio):
    return f"{ratio['median']:.2f} ({ratio['smallest']:.2f} to {ratio['largest']:.2f})"


def megabytes(memory, on_gpu):
    if memory is None:
        return ""
    return f"{(memory['peak_bytes'] - (0 if on_gpu else memory['before_bytes'])) / 2**20:,.0f}"


def shared_cells(name, result):
    """What both tables say of a contender: its label, rates, ratio and share of the matrix product."""
    rates = [
        number(result["tokens_per_second"]["median"], 0),
        number(result["rows_per_second"]["median"], 1),
    ]
    ratio = "" if name == "kit" else ratio_text(result["ratio"])
    return [LABELS[name], *rates, ratio, f"{result['share_of_matmul']:.1%}"]


def tables(report):
    """The figures as two tables in Markdown."""
    gpu = report["device"]["type"] == "cuda"
    memory = "peak memory, MB" if gpu else "memory beside the model, MB"
    rates, waits = (
        "tokens/s | rows/s | kit's speed by it | share of matmul",
        " | waits a step" if gpu else "",
    )
    lines = [
        f"| backbone | lengths | training | {rates} | padding | {memory} | first step, s{waits} |"
    ]
    lines.append("|---" * (11 if gpu else 10) + "|")
    for model, load in measured(report):
        for name, result in load["training"]["contenders"].items():
            cells = [model["size"], load["load"], *shared_cells(name, result)]
            cells += [f"{result['padding_share']:.0%}", megabytes(result["memory"], gpu)]
            cells += [number(result["first_step_seconds"], 1)] + (
                [number(result["syncs_per_step"], 1)] if gpu else []
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| backbone | lengths | prediction | {rates} |", "|---" * 7 + "|"]
    for model, load in measured(report):
        for name, result in load["prediction"]["contenders"].items():
            cells = [model["size"], load["load"], *shared_cells(name, result)]
            lines.append(f"| {' | '.join(cells)} |")
    for model in report["models"]:
        if split := model["time_split"]:
            parts = ", ".join(f"{part} {spent:.1f}" for part, spent in split["seconds"].items())
            lines += [
                "",
                f"{model['size']}, a whole run of fold 0, one epoch, {split['rows']} rows, in seconds: {parts}",
            ]
    return "\n".join(lines)


def measured(report):
    return [(model, load) for model in report["models"] for load in model["loads"]]


def plot(report, path):
    """Real tokens a second of every contender, with the kit's factor over it."""
    columns = max(len(model["loads"]) for model in report["models"])
    kinds = ("training", "prediction")
    figure = ku._new_figure(6 * columns, 2.6 * len(kinds) * len(report["models"]))
    axes = figure.subplots(len(kinds) * len(report["models"]), columns, squeeze=False)
    for (row, (model, kind)), column in itertools.product(
        enumerate(itertools.product(report["models"], kinds)), range(columns)
    ):
        axis = axes[row, column]
        if column < len(model["loads"]):
            draw(axis, model["loads"][column], kind, model["size"])
        else:
            axis.set_axis_off()
    dtype = report["models"][0]["loads"][0]["precision"]
    device = report["device"]
    figure.suptitle(
        f"{device['name']}, {dtype}, threads: {device['threads']}"
        if device["type"] == "cpu"
        else device["name"]
    )
    ku._save_figure(figure, path)


def draw(axis, load, kind, size):
    results = load[kind]["contenders"]
    names, rates = list(results), [result["tokens_per_second"] for result in results.values()]
    middle = np.array([rate["median"] for rate in rates])
    errors = [
        middle - [rate["smallest"] for rate in rates],
        [rate["largest"] for rate in rates] - middle,
    ]
    colors = ["C0" if name.startswith("kit") else "0.7" for name in names]
    axis.barh(range(len(names)), middle, xerr=errors, color=colors, ecolor="0.3", capsize=2)
    for place, (name, rate) in enumerate(zip(names, rates, strict=True)):
        factor = "" if name == "kit" else f"  (kit {results[name]['ratio']['median']:.2f}x)"
        axis.annotate(
            f"{rate['median']:,.0f}{factor}",
            (rate["largest"], place),
            (6, 0),
            va="center",
            **OFFSET,
        )
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * max(rate["largest"] for rate in rates))
    axis.set_xlabel("real tokens/s")
    axis.set_title(f"{size}, {kind}, {load['load']} lengths", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


OFFSET = dict(textcoords="offset points", fontsize=9)


# ---------------------------------------------------------------------------------------
# Command line


@dataclasses.dataclass
class Asked:
    """The options, with what is left out filled in by the device."""

    size: str
    loads: str
    contenders: str
    data: str
    precision: str
    dropout: float
    threads: int
    seed: int
    rounds: int
    steps: int
    warm: int
    start: int
    batch_size: int
    rows: int
    infer_batch_size: int
    memory_steps: int
    workers: int
    matmul: int
    copied: int
    split_rows: int
    alone: str

    def words(self, **changed):
        """The same options, some changed, for another process."""
        values = {
            name: value
            for name, value in vars(dataclasses.replace(self, **changed)).items()
            if value != ""
        }
        return [
            word
            for name, value in values.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]


def listed(text, allowed, what):
    names = [name.strip() for name in text.split(",") if name.strip()]
    if bad := [name for name in names if name not in allowed]:
        raise ku.KitError(f"{what} takes {', '.join(allowed)}; got {', '.join(bad)}")
    return names


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        help="write the figures to this JSON file, and a plot beside it",
    )
    add(
        "--size",
        help=f"with commas: {', '.join(SIZES)} (random weights, but for MiniLM where it is installed), folders",
    )
    add("--loads", default=",".join(LENGTHS), help="with commas: narrow, mixed")
    add("--contenders", help=f"with commas: {', '.join(CONTENDERS)}; the kit is always there")
    add("--data", default="", help="folder with train.csv, for real texts; else random token ids")
    add(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="auto: bf16, on a T4 fp16, on a CPU fp32",
    )
    add(
        "--dropout",
        type=float,
        default=0.0,
        help="of the backbone, for all; the kit's default in regression is 0",
    )
    add("--threads", type=int, default=0, help="of PyTorch on a CPU; 0: as many as it takes")
    add("--seed", type=int, default=0)
    add("--rounds", type=int, help="how often each has its turn; 3")
    add("--steps", type=int, help="timed optimiser steps of a turn; 200, on a CPU 7")
    add("--warm", type=int, help="steps of a turn before them; 5, on a CPU 1")
    add(
        "--start",
        type=int,
        help="more steps before the first round, for graphs and compilation; 60, on a CPU 0",
    )
    add("--batch-size", type=int, help="rows of an optimiser step; 32, on a CPU 16")
    add("--rows", type=int, help="rows to predict; 4096, on a CPU 96")
    add(
        "--infer-batch-size",
        type=int,
        help="rows of a batch of the plain loops in prediction; 64, on a CPU 16",
    )
    add(
        "--memory-steps",
        type=int,
        help="steps in which memory is measured; 20, on a CPU 3; 0: not at all",
    )
    add("--workers", type=int, help="loader processes of the Trainer; 4, on a CPU 0")
    add(
        "--matmul",
        type=int,
        help="rows of the matrices whose product is timed; 8192, on a CPU 1024",
    )
    add("--copied", type=int, help="numbers in the copy that is timed")
    add("--split-rows", type=int, help="rows of the whole run, with --data; 0: all; on a CPU 200")
    add(
        "--quick",
        action="store_true",
        help="a tiny random backbone and few steps: to try the tool out",
    )
    add("--alone", default="", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    output, quick = given.pop("output"), given.pop("quick")
    defaults = (
        {"rounds": 3} | (GPU if torch.cuda.is_available() else CPU) | (QUICK if quick else {})
    )
    asked = Asked(
        **{name: defaults[name] if value is None else value for name, value in given.items()}
    )
    if low := [
        f"--{name}" for name in ("rounds", "steps", "warm", "rows") if getattr(asked, name) < 1
    ]:
        parser.error(f"{', '.join(low)}: at least 1")
    return output, asked


def versions():
    import accelerate

    return ku._versions() | {"accelerate": accelerate.__version__}


def benchmark(asked, command, save):
    """All figures. They are saved after each load, so that an end in between leaves what there is."""
    names, loads = (
        listed(asked.contenders, CONTENDERS, "--contenders"),
        listed(asked.loads, LENGTHS, "--loads"),
    )
    device, dtype = ku._pick_device(), ku._pick_dtype(asked.precision, ku._pick_device())
    report = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "device": {
            "type": device.type,
            "name": ku._device_name(),
            "threads": torch.get_num_threads(),
        },
        "precision": ku._precision_name(asked.precision),
        "settings": dataclasses.asdict(asked)
        | {"data": Path(asked.data).name},  # no path of a machine
        "load_average": {"before": os.getloadavg()},
        "matmul": {"size": asked.matmul, "flops": matmul_flops(asked.matmul, dtype, device)},
        "copy": {"bytes": 4 * asked.copied, "bytes_per_second": copy_bytes(asked.copied, device)},
        "models": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        for size in filter(None, asked.size.split(",")):
            folder, weights = find_or_make(size, temporary, asked.data)
            used = usable(names, asked, folder)
            model = {"size": Path(size).name, "weights": weights, "loads": [], "time_split": None}
            report["models"].append(model)
            for load in loads:
                model["loads"].append(measure_load(asked, folder, load, used))
                save(report)
                gc.collect()
                torch.cuda.empty_cache()  # does nothing without a GPU
            for load in model["loads"]:
                for name, memory in measure_memory(asked, folder, load["load"], used).items():
                    load["training"]["contenders"][name]["memory"] = memory
            model["time_split"] = time_split(asked, folder)
            save(report)
    return report


def save(output, report):
    """Write the JSON file, if one is asked for, and the plot."""
    report["load_average"]["after"] = os.getloadavg()
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot(report, output.with_suffix(".png"))


def main(arguments=None):
    output, asked = parse(arguments)
    if importlib.util.find_spec("accelerate") is None:
        sys.exit("the Trainer needs the package accelerate: pip install accelerate==1.15.0")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    ku._prepare_process()  # the same for both sides
    try:
        if asked.alone:
            print(json.dumps(measure_alone(asked, Path(asked.size), asked.loads, asked.alone)))
            return
        words = sys.argv[1:] if arguments is None else map(str, arguments)
        words = [f"path/to/{Path(word).name}" if word == asked.data else word for word in words]
        command = shlex.join(["python", "tools/benchmark.py", *words])
        report = benchmark(asked, command, functools.partial(save, output))
    except ku.KitError as error:
        sys.exit(str(error))
    print(tables(report))


if __name__ == "__main__":
    main()
