"""Speed of training and prediction: the kit against a padded loop and the Trainer of transformers.

    python tools/dev/benchmark.py -o results/benchmark_gpu.json

One process, the same weights, rows, optimiser batch, dtype, clipping and constant learning rate for
all, and no dropout:

    kit      kernel_utils as it is; kit-graphs and kit-eager with and without CUDA graphs,
             kit-compile with torch.compile, kit-hf with Hugging Face's attention on padded rows
    padded   the article's loop: rows padded to the maximum length, loss.item() after each step
    dynamic  the Trainer as it comes: random batches, padded to the longest of their rows
    tuned    the Trainer with rows grouped by length, fused AdamW, no filter of losses that are NaN

First all must predict the same for eight rows, and again after three steps with the same batches;
else nothing is measured. Then the contenders train in turn, a block of steps each after a few that
are not timed, over the same rows in every round, another one first each time. Rates are medians
over the rounds and count real tokens, never padding; ratios are those of a round, contender's
seconds by the kit's, as median, smallest and largest. The share of matmul is the FLOPs that the
real tokens need (`training_flops`) by those that one large matrix product does in the same time,
measured in the same run. One-time cost is what the steps before the first round took beyond their
usual time: starting up, capture, compilation. Peak memory is that of each contender alone: on a GPU
what PyTorch's allocator had beside what the others keep, on a CPU the growth of a process of its
own since its model was loaded.

Rows are pieces of the texts of `--data`, else of the sample, in two loads: `narrow` lengths like
those of the CLEAR corpus, padded to 320, and `mixed`, log-normal around 150 from 16 to 512, padded
to 512. The tuned Trainer's rows are grouped by its own function, 50 batches at a time as in a run
of 200 batches or more. A round of fewer steps takes every so many of 50 such batches, so that it
pads as little as a long run, and the others take the same rows.
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # or the Trainer would split its batches

import numpy as np
import tokenizers
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.trainer_pt_utils import get_length_grouped_indices

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

LABELS = {
    "kit": "kernel_utils",
    "kit-graphs": "kernel_utils, CUDA graphs",
    "kit-eager": "kernel_utils, no CUDA graphs",
    "kit-compile": "kernel_utils, compiled",
    "kit-hf": "kernel_utils, padded, HF attention",
    "padded": "plain loop, padded to the maximum",
    "dynamic": "Trainer, dynamic padding",
    "tuned": "Trainer, tuned",
    "sorted": "plain loop, sorted by length",
}
DEBERTA = dict(
    relative_attention=True,
    position_buckets=256,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
    position_biased_input=False,
    type_vocab_size=0,
    layer_norm_eps=1e-7,
)
SIZES = {  # hidden size, layers, heads, intermediate size, vocabulary
    "minilm": (transformers.BertConfig, (384, 6, 12, 1536, 30522), {}),
    "bert-base": (transformers.BertConfig, (768, 12, 12, 3072, 30522), {}),
    "deberta-v3-base": (transformers.DebertaV2Config, (768, 12, 12, 3072, 128100), DEBERTA),
    "tiny": (transformers.BertConfig, (32, 2, 2, 64, 30522), {}),
    "tiny-deberta": (transformers.DebertaV2Config, (32, 2, 2, 64, 30522), DEBERTA),
}
LENGTHS = {"narrow": 320, "mixed": 512}  # load -> tokens that rows are cut and, by some, padded to
PARITY_ROWS, PARITY_STEPS = 8, 3
OUTPUT_TOLERANCES = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.1}  # between predictions
TRAINED_TOLERANCES = {"fp32": 0.02, "bf16": 0.5}  # after steps, by the largest change they made
GROUPED = 50  # batches that the Trainer's sampler sorts by length together
LOG_STEPS = 50  # the kit copies its losses from the device after so many steps


@dataclasses.dataclass
class Options:
    """What is measured; the defaults are those of a CPU."""

    size: str = "minilm"
    loads: str = "narrow,mixed"
    contenders: str = "kit,padded,dynamic,tuned"
    data: str = ""
    precision: str = "auto"
    rounds: int = 3
    steps: int = 7
    batch_size: int = 16
    rows: int = 96  # to predict
    memory_steps: int = 3  # on a CPU
    matmul: int = 1024  # rows of the matrices whose product is timed
    warm: int = 1  # steps of a block before those that are timed
    start: int = 0  # steps before the first round, for graphs and compilation
    workers: int = 0  # loader processes of the Trainer


GPU = dict(
    size="bert-base,deberta-v3-base",
    contenders="kit,kit-eager,kit-compile,padded,dynamic,tuned",
    steps=200,
    batch_size=32,
    rows=4096,
    matmul=8192,
    warm=5,
    start=60,
    workers=4,
)
QUICK = dict(size="tiny", rounds=2, steps=2, batch_size=4, rows=8, memory_steps=0)
QUICK |= dict(warm=1, start=0, workers=0, matmul=64)


# ---------------------------------------------------------------------------------------
# Rows


def mixed_lengths(n, rng):
    """Tokens of `n` rows: log-normal around 150, 16 to 512."""
    return rng.lognormal(np.log(150), 0.7, n).round().clip(16, LENGTHS["mixed"]).astype(int)


def narrow_lengths(n, rng):
    """Tokens of `n` rows as in the CLEAR corpus: 225 on average, standard deviation 24."""
    return rng.normal(225, 24, n).round().clip(150, LENGTHS["narrow"]).astype(int)


def make_tokens(load, n, rng, texts):
    """`n` rows of a load, pieces of texts (Tokens)."""
    lengths = mixed_lengths(n, rng) if load == "mixed" else narrow_lengths(n, rng)
    starts = rng.integers(0, len(texts.ids) - lengths)
    pairs = zip(starts, lengths, strict=True)
    ids = [texts.ids[start : start + length] for start, length in pairs]
    types = None if texts.types is None else [np.zeros(len(row), int) for row in ids]
    return ku.Tokens(ids, types, texts.pad_id)


def row_ids(tokens, row):
    return tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]


# ---------------------------------------------------------------------------------------
# Backbones


def size_config(size):
    kind, (hidden_size, layers, heads, intermediate_size, vocabulary), more = SIZES[size]
    return kind(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        pad_token_id=0,
        **more,
    )


def find_or_make(size, temporary, data):
    """Folder of a backbone, and where its weights are from. MiniLM's tokenizer serves for all that
    are made; where there is no MiniLM, one is trained on the texts of `data`."""
    if size not in SIZES:
        return ku._find_backbone(size), "its own"
    try:
        default = ku._find_backbone(ku.Config().backbone)
    except ku.ConfigError:
        tokenizer = train_tokenizer(data)
    else:
        if size == "minilm":
            return default, "its own"
        tokenizer = ku._load_tokenizer(default)
    folder = Path(temporary) / size
    torch.manual_seed(0)
    with ku._quiet_transformers():
        transformers.AutoModel.from_config(size_config(size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, "random"


def train_tokenizer(data):
    """A tokenizer as BERT's, of the pieces that the texts of a competition have."""
    train, _, _ = ku.read_competition(ku.Config(data_dir=data))
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(train["excerpt"], vocab_size=8000, show_progress=False)
    return transformers.BertTokenizerFast(tokenizer_object=tokenizer)


def training_flops(backbone, lengths):
    """FLOPs that texts of so many tokens need in training; prediction takes a third.

    A token is multiplied with each matrix of the layers: 2 FLOPs a weight forward, twice that
    backward. In each layer's attention, with two states of the model's width of every token of its
    text, and in DeBERTa with a row of the position table for every bucket and kind of score.
    """
    config, layers = backbone.config, ku.transformer_layers(backbone)
    per_layer = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
    per_layer /= len(layers)  # ALBERT's one layer stands for all
    lengths = np.asarray(lengths)
    states = 2 * lengths
    if getattr(config, "relative_attention", False):
        span = config.position_buckets if config.position_buckets > 0 else 512
        states = states + 2 * span * len(config.pos_att_type)
    per_token = 6 * config.num_hidden_layers * (per_layer + states * config.hidden_size)
    return float((lengths * per_token).sum())


# ---------------------------------------------------------------------------------------
# What the contenders share


class GpuMemory:
    """Bytes that one contender has on the GPU, now and at most, while others keep theirs."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self.before = torch.cuda.memory_allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_):
        self.peak = max(self.peak, self.now + torch.cuda.max_memory_allocated() - self.before)
        gc.collect()
        self.now += torch.cuda.memory_allocated() - self.before


class Window:
    """Clock of the timed steps of a block."""

    def __init__(self, device):
        self.device = device

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def open(self):
        self.opened = self.now()

    def close(self):
        self.seconds = self.now() - self.opened


class Regressor(nn.Module):
    """What the kit trains, with transformers alone: mean of the tokens, linear output, MSE."""

    def __init__(self, backbone, output):
        super().__init__()
        self.backbone, self.output = backbone, output

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask)
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.backbone(**inputs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            mask = attention_mask.unsqueeze(-1)  # (B, T, 1)
            pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
            logits = self.output(pooled)[:, 0]  # (B,)
            if labels is None:
                return {"logits": logits}
            return {"logits": logits, "loss": F.mse_loss(logits, labels)}


class Lab:
    """Rows of a load, settings, and the model that the contenders other than the kit share."""

    def __init__(self, options, folder, load):
        self.options, self.load, self.length = options, load, LENGTHS[load]
        self.device = ku._pick_device()
        config = transformers.AutoConfig.from_pretrained(folder)
        cfg = ku.Config(
            data_dir=options.data,
            backbone=str(folder),
            max_length=self.length,
            epochs=1,
            batch_size=options.batch_size,
            schedule="constant",
            warmup_ratio=0.0,
            backbone_dropout=0.0,
            precision=options.precision,
        ).resolved(config)
        self.cfg = dataclasses.replace(cfg, head_lr=cfg.lr)  # one rate for all, as the Trainer has
        self.dtype = ku._pick_dtype(cfg.precision, self.device)
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        self.precision = names[self.dtype]
        tokenizer, rng = ku._load_tokenizer(folder), np.random.default_rng(0)
        frame, _, _ = ku.read_competition(cfg)
        texts = ku._tokenize(frame, tokenizer, cfg)
        n = options.batch_size * sum(map(in_groups, self.blocks()))
        n_all = n + options.batch_size  # one batch stays out of the training, as each fold needs
        self.tokens = make_tokens(load, n_all, rng, texts)
        targets = rng.standard_normal((n_all, 1)).astype(np.float32)
        folds, order = (np.arange(n_all) < n).astype(int), np.arange(n_all)
        self.left = rng.permutation(n)
        self.data = ku._TrainingData(self.tokens, targets, folds, folder, tokenizer, 1, order)
        self.model = self.load_model()
        self.model_bytes = sum(p.nbytes for p in self.model.parameters())
        state = self.model.state_dict()
        self.initial = {name: weight.cpu().clone() for name, weight in state.items()}

    def blocks(self):
        """Batches of every block that is dealt."""
        options = self.options
        return [PARITY_STEPS, options.start, *(options.rounds * [options.warm, options.steps])]

    def deal(self, count):
        """Rows of the next `count` batches, as the batches that the Trainer makes when it groups
        them by length: of as many groups as that takes, every so many."""
        many, size = in_groups(count), self.options.batch_size
        rows, self.left = np.split(self.left, [many * size])
        generator = torch.Generator().manual_seed(0)
        lengths = self.tokens.lengths[rows].tolist()
        order = get_length_grouped_indices(lengths, size, GROUPED, generator)
        batches = np.split(rows[order], many)
        return [batches[int(place * many / count)] for place in np.arange(count) + 0.5]

    def load_model(self):
        folder = self.data.folder
        config = transformers.AutoConfig.from_pretrained(folder)
        ku._set_dropout(config, 0.0)
        how = dict(config=config, dtype=torch.float32, local_files_only=True)
        with ku._quiet_transformers():
            backbone = transformers.AutoModel.from_pretrained(folder, **how)
        if isinstance(getattr(backbone, "pooler", None), nn.Module):
            backbone.pooler = None  # nobody reads it
        torch.manual_seed(0)
        return Regressor(backbone, nn.Linear(config.hidden_size, 1)).to(self.device)

    def reset(self):
        self.model.load_state_dict(self.initial)

    def padded(self, rows, length=None):
        """The rows as tensors (B, T) on the device, T being `length` or that of the longest row."""
        tokens, lengths = self.tokens, self.tokens.lengths[rows]
        mask = np.arange(length or lengths.max()) < lengths[:, None]
        ids = np.full(mask.shape, tokens.pad_id)
        ids[mask] = np.concatenate([row_ids(tokens, row) for row in rows])
        arrays = {"input_ids": ids, "attention_mask": mask.astype(int)}
        if tokens.types is not None:
            arrays["token_type_ids"] = np.zeros_like(ids)
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    @torch.inference_mode()
    def predict(self, rows, batch_size, pad, precision):
        """Predictions (B,) of the shared model: longest first, or in order and padded to the
        maximum."""
        dtype = ku._pick_dtype(precision, self.device)
        self.model.eval()
        order = np.argsort(-self.tokens.lengths[rows], kind="stable")
        if pad:
            order = np.arange(len(rows))
        parts = []
        for start in range(0, len(rows), batch_size):
            batch = rows[order[start : start + batch_size]]
            inputs = self.padded(batch, self.length if pad else None)
            with ku._autocast(self.device, dtype):
                parts.append(self.model(**inputs)["logits"])
        ordered = np.empty(len(rows))
        ordered[order] = torch.cat(parts).cpu().numpy()
        return ordered


def matmul_rate(lab):
    """FLOP/s of the product of two large square matrices in the precision of the training."""
    size, seconds = lab.options.matmul, []
    a, b = (torch.randn(size, size, device=lab.device).to(lab.dtype) for _ in range(2))
    for _ in range(12):
        window = Window(lab.device)
        window.open()
        a @ b
        window.close()
        seconds.append(window.seconds)
    return 2 * size**3 / float(np.median(seconds[2:]))


def in_groups(count):
    """Batches of which `count` are taken: those of whole groups."""
    return GROUPED * math.ceil(count / GROUPED)


# ---------------------------------------------------------------------------------------
# Contenders in training
#
# `run(warm, batches, window)` makes an optimiser step with each batch of `warm`, opens the window,
# makes those with `batches` and closes it. `arrange` makes the contender's own batches of a block's
# rows, which come grouped by length. `outputs` predicts.


class Kit:
    """The kit's engine, called as its training loop calls it."""

    def __init__(self, lab, **settings):
        self.lab, self.cfg, self.step = lab, dataclasses.replace(lab.cfg, **settings), 0
        self.engine = ku.OptimizerStep(lab.data, self.cfg)
        self.engine.setup_fold(0, lambda text: None)
        self.engine.model.output.load_state_dict(lab.model.output.state_dict())

    def arrange(self, batches, rng):
        """As its epochs have them. Batches with more tokens than graphs take are drawn again."""
        rows, engine = np.concatenate(batches), self.engine
        lengths = self.lab.tokens.lengths
        while True:
            cfg = dataclasses.replace(self.cfg, seed=int(rng.integers(2**32)))
            plan = ku._epoch_batches(lengths[rows], 0, cfg, engine.length_bucket)
            batches = [rows[batch] for batch in plan]
            largest = max(lengths[batch].sum() for batch in batches)
            if not engine.has_static_shapes or largest <= max(engine.capture_sizes):
                return batches

    def make_steps(self, batches):
        losses = []
        for rows in batches:
            losses.append(self.engine(self.step, rows).values)
            self.step += 1
            if len(losses) == LOG_STEPS:
                torch.stack(losses).tolist()
                losses = []

    def run(self, warm, batches, window):
        self.engine.model.train()
        self.make_steps(warm)
        window.open()
        self.make_steps(batches)
        window.close()

    def outputs(self, rows, precision):
        cfg = dataclasses.replace(self.cfg, precision=precision)
        return ku.predict(self.engine.model, self.lab.tokens, cfg, rows)[:, 0]

    def setup(self):
        """What the engine does after all, and why not more."""
        engine = self.engine
        return {
            "is_packed": bool(engine.is_packed),
            "is_compiled": bool(engine.is_compiled),
            "is_captured": bool(engine.is_captured),
            "micro_batch_size": engine.micro_batch_size,
            "fallbacks": engine.fallbacks,
        }


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

    def run(self, warm, batches, window):
        lab, cfg, model = self.lab, self.lab.cfg, self.lab.model.train()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr)
        scaler = torch.amp.GradScaler(lab.device.type, enabled=lab.dtype == torch.float16)
        targets, losses = torch.from_numpy(lab.data.targets[:, 0]), []
        for number, rows in enumerate([*warm, *batches]):
            if number == len(warm):
                window.open()
            inputs = lab.padded(rows, lab.length)
            with ku._autocast(lab.device, lab.dtype):
                loss = model(**inputs, labels=targets[rows].to(lab.device))["loss"]
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
        row = self.rows[index]
        ids, label = row_ids(self.tokens, row).tolist(), self.targets[row, 0].item()
        item = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        if self.tokens.types is not None:
            item["token_type_ids"] = [0] * len(ids)
        return item


class WindowCallback(transformers.TrainerCallback):
    """Opens and closes at ends of steps, so that a window has as many fetches as steps."""

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

    def arguments(self, folder, steps):
        lab, cfg, tuning = self.lab, self.lab.cfg, {}
        if self.tuned:
            tuning = dict(optim="adamw_torch_fused", logging_nan_inf_filter=False)
            tuning |= dict(train_sampling_strategy="group_by_length")
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
            dataloader_num_workers=lab.options.workers,
            dataloader_pin_memory=lab.device.type == "cuda",
            report_to=[],
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **tuning,
        )

    def run(self, warm, batches, window):
        lab, order = self.lab, [*warm, *batches]
        with tempfile.TemporaryDirectory() as folder, ku._quiet_transformers():
            trainer = OrderedTrainer(
                Regressor(lab.model.backbone, lab.model.output),  # which accelerate may wrap
                self.arguments(folder, len(order)),
                data_collator=transformers.DataCollatorWithPadding(lab.data.tokenizer),
                train_dataset=Rows(lab, np.concatenate(order)),
                callbacks=[WindowCallback(window, len(warm), len(order))],
            )
            trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
            trainer.train()


CONTENDERS = {
    "kit": Kit,
    "kit-graphs": functools.partial(Kit, cuda_graphs="on"),
    "kit-eager": functools.partial(Kit, cuda_graphs="off"),
    "kit-compile": functools.partial(Kit, compile=True),
    "kit-hf": functools.partial(Kit, attention="eager", cuda_graphs="off"),
    "padded": PaddedLoop,
    "dynamic": HfTrainer,
    "tuned": functools.partial(HfTrainer, tuned=True),
}


# ---------------------------------------------------------------------------------------
# Parity


class ParityError(ku.KitError):
    """Contenders that do not compute the same."""

    title = "the contenders do not compute the same, nothing is measured:"


def gaps_to_first(outputs):
    """name -> largest difference of its values from those of the first name."""
    first = next(iter(outputs.values()))
    return {name: float(np.abs(values - first).max()) for name, values in outputs.items()}


def check_gaps(what, gaps, allowed):
    bad = {name: gap for name, gap in gaps.items() if not gap <= allowed}
    if bad:
        problems = [f"{what}: {name} differs by {gap:.1e}" for name, gap in bad.items()]
        raise ParityError([*problems, f"{allowed:.1e} is allowed"])


def check_outputs(lab, contenders):
    """Largest differences from the first one's predictions with the same weights, by precision."""
    parity, rows = {}, np.arange(PARITY_ROWS)
    for precision in dict.fromkeys(("fp32", lab.precision)):
        lab.reset()
        outputs = {name: side.outputs(rows, precision) for name, side in contenders.items()}
        gaps = gaps_to_first(outputs)
        check_gaps(f"predictions in {precision}", gaps, OUTPUT_TOLERANCES[precision])
        parity[precision] = gaps
    return parity


def check_first_steps(lab, contenders, batches, run):
    """Train all on the same batches. Returns the gaps of their predictions after it, by the largest
    change."""
    rows, after = np.arange(PARITY_ROWS), {}
    lab.reset()
    before = lab.predict(rows, len(rows), False, "fp32")
    for name, contender in contenders.items():
        lab.reset()
        run(name, batches)
        after[name] = contender.outputs(rows, "fp32")
    largest_change = np.abs(next(iter(after.values())) - before).max()
    gaps = {name: float(gap / largest_change) for name, gap in gaps_to_first(after).items()}
    if lab.precision in TRAINED_TOLERANCES:  # loss scaling may skip first steps
        check_gaps(f"after {len(batches)} steps", gaps, TRAINED_TOLERANCES[lab.precision])
    return gaps


# ---------------------------------------------------------------------------------------
# Measurements


def take_turns(lab, what, names, job):
    """Seconds of `job(name, number)` for every name in every round, another one first each time."""
    seconds, firsts = {name: [] for name in names}, []
    for number in range(lab.options.rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        firsts.append(order[0])
        for name in order:
            seconds[name].append(job(name, number))
        spent = ", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names)
        print(f"{lab.load}, {what}, round {number + 1}: {spent}", flush=True)
    return seconds, firsts


class Race:
    """Contenders that train in turn. Ratios and gaps are to the first, one of the kit's."""

    def __init__(self, lab, names):
        self.lab = lab
        self.memory = {name: GpuMemory() for name in names}
        self.early_steps = 0  # before the first round
        self.early_seconds = dict.fromkeys(names, 0.0)
        self.contenders = {}
        for name in names:
            with self.memory[name]:
                self.contenders[name] = CONTENDERS[name](lab)
        kits = [side for side in self.contenders.values() if isinstance(side, Kit)]
        self.planner = max(kits, key=lambda kit: kit.engine.has_static_shapes)

    def run(self):
        """Check that all compute the same, warm up, train in turn; all figures."""
        lab, rng = self.lab, np.random.default_rng(0)
        parity = check_outputs(lab, self.contenders)
        batches = self.planner.arrange(lab.deal(PARITY_STEPS), rng)  # which all kits can take
        parity["after_first_steps"] = check_first_steps(
            lab, self.contenders, batches, self.make_early_steps
        )
        self.early_steps = PARITY_STEPS + lab.options.start
        if lab.options.start:
            batches = self.planner.arrange(lab.deal(lab.options.start), rng)
            for name in self.contenders:
                self.make_early_steps(name, batches)
        summary = self.make_rounds()
        for name, result in summary["contenders"].items():
            usual = float(np.median(result["seconds"])) / lab.options.steps
            one_time = self.early_seconds[name] - self.early_steps * usual
            result["one_time_seconds"] = max(0.0, one_time)
            result["memory"] = self.peak_memory(name)
            if isinstance(self.contenders[name], Kit):
                result["setup"] = self.contenders[name].setup()
        return summary | {"parity": parity}

    def make_early_steps(self, name, batches):
        window = Window(self.lab.device)
        with self.memory[name]:
            window.open()
            self.contenders[name].run(batches[:1], batches[1:], Window(self.lab.device))
            window.close()
        self.early_seconds[name] += window.seconds

    def make_rounds(self):
        lab, options = self.lab, self.lab.options
        blocks = [(lab.deal(options.warm), lab.deal(options.steps)) for _ in range(options.rounds)]
        rows = [np.concatenate(batches) for _, batches in blocks]

        def train(name, number):
            contender, rng = self.contenders[name], np.random.default_rng(number)
            warm, batches = (contender.arrange(block, rng) for block in blocks[number])
            is_same = np.array_equal(np.sort(np.concatenate(batches)), np.sort(rows[number]))
            assert is_same, f"{name} has other rows than the round"
            window = Window(lab.device)
            with self.memory[name]:
                contender.run(warm, batches, window)
            return window.seconds

        seconds, firsts = take_turns(lab, "training", list(self.contenders), train)
        return summarise(lab, seconds, firsts, rows)

    def peak_memory(self, name):
        """On a GPU; a CPU needs a process for each contender."""
        if self.lab.device.type == "cpu":
            return None
        is_kit = isinstance(self.contenders[name], Kit)
        shared = 0 if is_kit else self.lab.model_bytes
        return {"peak_bytes": self.memory[name].peak + shared}


def predict_in_turn(lab, kit):
    """The same for prediction; all have the weights of the kit."""
    options = lab.options
    lab.model.load_state_dict(kit.engine.model.state_dict())
    rows, size = np.arange(min(options.rows, len(lab.tokens))), 2 * options.batch_size
    sides = {
        "kit": lambda: kit.outputs(rows, lab.precision),
        "sorted": lambda: lab.predict(rows, size, False, lab.precision),
        "padded": lambda: lab.predict(rows, size, True, lab.precision),
    }
    gaps = gaps_to_first({name: side() for name, side in sides.items()})  # warms up
    check_gaps("predictions", gaps, 10 * OUTPUT_TOLERANCES[lab.precision])  # of many more rows

    def predict(name, number):
        window = Window(lab.device)
        window.open()
        sides[name]()
        window.close()
        return window.seconds

    seconds, firsts = take_turns(lab, "prediction", list(sides), predict)
    return summarise(lab, seconds, firsts, [rows] * options.rounds, part=1 / 3) | {"gaps": gaps}


def spread(values):
    smallest, largest = float(min(values)), float(max(values))
    return {"median": float(np.median(values)), "smallest": smallest, "largest": largest}


def summarise(lab, seconds, firsts, rows, part=1):
    """Raw seconds of the rounds, and their rates and ratios. `part` is the work by that of a
    training pass."""
    lengths = [lab.tokens.lengths[of_round] for of_round in rows]
    n_rows = [len(of_round) for of_round in rows]
    n_tokens = [int(of_round.sum()) for of_round in lengths]
    backbone = lab.model.backbone
    flops = np.array([part * training_flops(backbone, of_round) for of_round in lengths])
    peak = matmul_rate(lab)
    results, first = {}, np.array(next(iter(seconds.values())))
    for name, spent in seconds.items():
        results[name] = {
            "seconds": spent,
            "ratio": spread(np.array(spent) / first),  # of the first one's speed to this one's
            "tokens_per_second": spread(np.array(n_tokens) / spent),
            "rows_per_second": spread(np.array(n_rows) / spent),
            "share_of_matmul": float(np.median(flops / spent)) / peak,
        }
    rounds = {"rows": n_rows, "tokens": n_tokens, "flops": flops.tolist(), "first": firsts}
    return {"rounds": rounds, "matmul_flops": peak, "contenders": results}


def own_memory(name):
    """Bytes of this process: VmRSS, or at most: VmHWM. The peak that getrusage knows would be that
    of the parent, where it was larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return 1024 * int(values[name].split()[0])


def measure_alone(options, folder, load, name):
    """Peak memory of a contender in this process, and what there was before its first step."""
    lab = Lab(options, folder, load)
    contender = CONTENDERS[name](lab)
    if isinstance(contender, Kit):
        lab.model = None
    before = own_memory("VmRSS")
    rng = np.random.default_rng(0)
    batches = contender.arrange(lab.deal(options.memory_steps), rng)
    contender.run(batches[:1], batches[1:], Window(lab.device))
    return {"before_bytes": before, "peak_bytes": own_memory("VmHWM")}


def measure_memory(options, folder, load, name):
    """`measure_alone` in a process of its own; None where no steps are asked for."""
    if not options.memory_steps:
        return None
    call = json.dumps([dataclasses.asdict(options), str(folder), load, name])
    command = [sys.executable, __file__, "--alone", call]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ku.KitError([f"{name} alone fails:", *done.stderr.splitlines()[-5:]])
    return json.loads(done.stdout.splitlines()[-1])


def measure_load(options, folder, load, names):
    """All figures of a backbone and a load."""
    lab = Lab(options, folder, load)
    race = Race(lab, names)
    training = race.run()
    prediction = predict_in_turn(lab, race.contenders["kit"])
    if lab.device.type == "cpu":
        for name, result in training["contenders"].items():
            result["memory"] = measure_memory(options, folder, load, name)
    return {
        "load": load,
        "padded_to": lab.length,
        "row_tokens": spread(lab.tokens.lengths),
        "precision": lab.precision,
        "attention": lab.model.backbone.config._attn_implementation,
        "parity": training.pop("parity"),
        "training": training,
        "prediction": prediction,
    }


# ---------------------------------------------------------------------------------------
# Table and plot


def memory_cell(memory, is_gpu):
    if memory is None:
        return ""
    before = 0 if is_gpu else memory["before_bytes"]
    return f"{(memory['peak_bytes'] - before) / 2**20:,.0f}"


def table(report):
    """The figures in Markdown."""
    is_gpu = report["device"]["type"] == "cuda"
    memory = "peak memory, MB" if is_gpu else "memory beside the model, MB"
    head = ["backbone", "lengths", "what", "by", "tokens/s", "rows/s", "kit's speed by it"]
    head += ["share of matmul", memory, "one-time cost, s"]
    lines = [head, ["---"] * len(head)]
    for size, kind, load in panels(report):
        for name, result in load[kind]["contenders"].items():
            tokens, rows = result["tokens_per_second"], result["rows_per_second"]
            ratio = result["ratio"]
            spread_text = f"({ratio['smallest']:.2f} to {ratio['largest']:.2f})"
            cells = [size, load["load"], kind, LABELS[name]]
            cells += [f"{tokens['median']:,.0f}", f"{rows['median']:,.1f}"]
            cells += ["" if name == "kit" else f"{ratio['median']:.2f} {spread_text}"]
            cells += [f"{result['share_of_matmul']:.1%}", memory_cell(result.get("memory"), is_gpu)]
            one_time = result.get("one_time_seconds")
            lines.append([*cells, "" if one_time is None else f"{one_time:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def panels(report):
    """(backbone, training or prediction, load) of all that was measured."""
    for model in report["models"]:
        for kind in ("training", "prediction"):
            for load in model["loads"]:
                yield model["size"], kind, load


def plot(report, path):
    """Real tokens a second of every contender, with the kit's factor over it."""
    all_panels = list(panels(report))
    columns = max(len(model["loads"]) for model in report["models"])
    rows = math.ceil(len(all_panels) / columns)
    figure = ku._new_figure(6 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (size, kind, load) in zip(axes, all_panels, strict=False):
        draw(axis, load[kind]["contenders"])
        axis.set_title(f"{size}, {kind}, {load['load']} lengths", fontsize=10)
    device = report["device"]
    threads = f", threads: {device['threads']}" if device["type"] == "cpu" else ""
    figure.suptitle(f"{device['name']}, {report['precision']}{threads}")
    ku._save_figure(figure, path)


def draw(axis, results):
    for place, (name, result) in enumerate(results.items()):
        rate = result["tokens_per_second"]
        median, largest = rate["median"], rate["largest"]
        error = [[median - rate["smallest"]], [largest - median]]
        color = "C0" if name.startswith("kit") else "0.7"
        axis.barh(place, median, xerr=error, color=color, ecolor="0.3", capsize=2)
        factor = "" if name == "kit" else f"  (kit {result['ratio']['median']:.2f}x)"
        beside = dict(textcoords="offset points", va="center", fontsize=9)
        axis.annotate(f"{median:,.0f}{factor}", (largest, place), (6, 0), **beside)
    axis.set_yticks(range(len(results)), [LABELS[name] for name in results])
    axis.invert_yaxis()
    largest = max(result["tokens_per_second"]["largest"] for result in results.values())
    axis.set_xlim(0, 1.5 * largest)
    axis.set_xlabel("real tokens/s")
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------
# Command line


def split_names(text, allowed, option):
    names = [name.strip() for name in text.split(",") if name.strip()]
    bad = [name for name in names if name not in allowed]
    if bad:
        raise ku.KitError(f"{option} takes {', '.join(allowed)}; got {', '.join(bad)}")
    return names


def parse(arguments):
    """(file of -o or None, options)."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    texts = {
        "size": f"with commas: {', '.join(SIZES)}, folders (random weights, but for MiniLM)",
        "loads": f"with commas: {', '.join(LENGTHS)}",
        "contenders": f"with commas: {', '.join(CONTENDERS)}; the kit is always there",
        "data": "folder with train.csv; the sample where there is none",
        "precision": "auto, fp32, bf16 or fp16; auto: bf16, on a T4 fp16, on a CPU fp32",
        "rounds": "how often each has its turn; 3",
        "steps": "timed optimiser steps of a turn; 200, on a CPU 7",
        "batch_size": "rows of an optimiser step; 32, on a CPU 16",
        "memory_steps": "steps in which memory is measured on a CPU; 3; 0: not at all",
    }
    parser.add_argument("-o", "--output", type=Path, help="JSON file; a plot is put beside it")
    for name, text in texts.items():
        kind = type(getattr(Options, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    quick = "a tiny random backbone and few steps: to try the tool out"
    parser.add_argument("--quick", action="store_true", help=quick)
    args = parser.parse_args(arguments)
    given = {name: getattr(args, name) for name in texts if getattr(args, name) is not None}
    preset = GPU if torch.cuda.is_available() else {}
    options = Options(**(preset | (QUICK if args.quick else {}) | given))
    if min(options.rounds, options.steps, options.batch_size) < 1:
        parser.error("--rounds, --steps, --batch-size: at least 1")
    return args.output, options


def benchmark(options, command, save):
    """All figures, saved after each load, so that an end in between leaves what there is."""
    contenders = split_names(options.contenders, CONTENDERS, "--contenders")
    names = list(dict.fromkeys(["kit", *contenders]))
    loads = split_names(options.loads, LENGTHS, "--loads")
    device = ku._pick_device()
    dtype = ku._pick_dtype(options.precision, device)
    threads, accelerate = torch.get_num_threads(), importlib.metadata.version("accelerate")
    report = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": ku._versions() | {"accelerate": accelerate},
        "device": {"type": device.type, "name": ku._device_name(), "threads": threads},
        "precision": str(dtype).removeprefix("torch."),
        "settings": dataclasses.asdict(options) | {"data": Path(options.data).name},
        "models": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        for size in filter(None, options.size.split(",")):
            folder, weights = find_or_make(size, temporary, options.data)
            model = {"size": Path(size).name, "weights": weights, "loads": []}
            report["models"].append(model)
            for load in loads:
                model["loads"].append(measure_load(options, folder, load, names))
                save(report)
                gc.collect()
                torch.cuda.empty_cache()  # does nothing without a GPU
    return report


def save(output, report):
    """Write the JSON file, if one is asked for, and the plot."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot(report, output.with_suffix(".png"))


def main(arguments=None):
    gc.freeze()  # the modules, so that what collects garbage between the turns is quick
    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    if importlib.util.find_spec("accelerate") is None:
        sys.exit("the Trainer needs the package accelerate: pip install accelerate==1.15.0")
    if words[:1] == ["--alone"]:  # a process of `measure_memory`
        options, folder, load, name = json.loads(words[1])
        print(json.dumps(measure_alone(Options(**options), Path(folder), load, name)))
        return
    ku._prepare_process()  # the same for both sides
    output, options = parse(words)
    shown = [f"path/to/{Path(word).name}" if word == options.data else word for word in words]
    command = shlex.join(["python", "tools/dev/benchmark.py", *shown])
    try:
        report = benchmark(options, command, functools.partial(save, output))
    except ku.KitError as error:
        sys.exit(str(error))
    print(table(report))


if __name__ == "__main__":
    main()
