"""Small fixtures made on disk: backbones of many architectures, a tokenizer and a competition."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked processes could wait for its threads

import contextlib
import random
import re
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import kernel_utils as ku
import numpy as np
import pandas as pd
import pretraining
import pytest
import tokenizers
import torch
import tqdm
import transformers

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # faster for models this small
ku._prepare_process()  # tests build models and steps outside of a run too
is_bf16_cpu, ku._is_bf16_cpu = ku._is_bf16_cpu, lambda: False  # runs are compared, on whatever CPU the tests run


@pytest.fixture(autouse=True)
def one_thread():
    """Runs are compared to the last bit, and libraries set other numbers of threads."""
    torch.set_num_threads(1)


def new_files():
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--ignored"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return {line for line in lines if line[:2] in ("??", "!!") and "cache" not in line}


@pytest.fixture(scope="session", autouse=True)
def untouched_checkout():
    """No test writes into the clone, whatever folder the tests start from."""
    before = new_files()
    yield
    made = new_files() - before
    assert not made, f"files that came into the clone while the tests ran: {sorted(made)}"


TIME_TAKERS = {  # mark -> the functions that only tests with this mark call: most of the time of a tiny run
    "plots": [(ku, "_plot_curves"), (ku, "_plot_oof"), (pretraining, "_plot_pretraining")],
    "disk": [(ku, "_fsync")],
}


@pytest.fixture(scope="session", autouse=True)
def time_takers():
    """What the functions were before; it is in force while other fixtures of the session train as well."""
    real = {place: getattr(*place) for places in TIME_TAKERS.values() for place in places}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in real:
            patch.setattr(module, name, lambda path, *rest: None)
        yield real


@pytest.fixture(autouse=True)
def time_takers_of_marked_tests(request, time_takers, monkeypatch):
    for mark, places in TIME_TAKERS.items():
        if request.node.get_closest_marker(mark):
            for module, name in places:
                monkeypatch.setattr(module, name, time_takers[module, name])


def pytest_configure(config):
    """Tests run on the CPU, also where there is a GPU, unless those that need one are asked for (-m gpu)."""
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several would train folds in processes of their own
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextlib.contextmanager
def little_gpu_memory(n_bytes):
    """The GPU has only so many more bytes for this process than it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


LONGEST = "resume kaggle sweep training packing pretrain hostile compare backbones processes pseudo blend".split()


def pytest_collection_modifyitems(items):
    """Files that take longest first, so that with -n no worker is left alone with one of them."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


WORDS = "the a cat dog sat ran on in under big small red blue mat hat tree river slowly quickly why because".split()
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]  # pad id 0
SMALL = dict(vocab_size=len(WORDS) + len(SPECIAL) + 2, pad_token_id=0)
BERT_LIKE = dict(
    SMALL,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=160,
)

TINY = ("BertConfig", dict(BERT_LIKE, num_hidden_layers=2))  # for runs, whose time is that of their layers

# architecture -> (config class, its sizes); every model has 4 layers and width 32
ARCHITECTURES = {
    "bert": ("BertConfig", BERT_LIKE),
    "roberta": ("RobertaConfig", dict(BERT_LIKE, type_vocab_size=1)),
    "distilbert": (
        "DistilBertConfig",
        dict(SMALL, dim=32, n_layers=4, n_heads=4, hidden_dim=48, max_position_embeddings=160),
    ),
    "albert": ("AlbertConfig", dict(BERT_LIKE, embedding_size=16)),
    "electra": ("ElectraConfig", dict(BERT_LIKE, embedding_size=16)),
    "deberta": ("DebertaConfig", dict(BERT_LIKE, relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "deberta-v2": (
        "DebertaV2Config",
        dict(
            BERT_LIKE,
            relative_attention=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
    ),
    "mpnet": ("MPNetConfig", BERT_LIKE),
    "xlnet": ("XLNetConfig", dict(SMALL, d_model=32, n_layer=4, n_head=4, d_inner=48)),
    "longformer": ("LongformerConfig", dict(BERT_LIKE, attention_window=16)),
    "modernbert": (
        "ModernBertConfig",
        dict(
            BERT_LIKE,
            global_attn_every_n_layers=2,
            local_attention=16,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
            reference_compile=False,
        ),
    ),
    "t5": ("T5Config", dict(SMALL, d_model=32, num_layers=4, num_heads=4, d_ff=48, d_kv=8)),
    "bart": (
        "BartConfig",
        dict(
            SMALL,
            d_model=32,
            encoder_layers=4,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=160,
            bos_token_id=2,
        ),
    ),
    "gpt2": ("GPT2Config", dict(SMALL, n_embd=32, n_layer=4, n_head=4, n_positions=160, bos_token_id=2)),
    "llama": ("LlamaConfig", dict(BERT_LIKE, num_key_value_heads=2, bos_token_id=2, eos_token_id=3)),
}


def make_tokenizer(cls_first=True):
    """Whole words, with <s> before and </s> after a text; without `cls_first` only </s> after it, as T5 has it."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    before, names = ("<s> ", {"cls_token": "<s>"}) if cls_first else ("", {})
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{before}$A </s>",
        pair=f"{before}$A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", sep_token="</s>", **names
    )


def save_backbone(kind, folder):
    """A random model of an architecture, or `tiny`, saved with a tokenizer: loading it back is what users do."""
    config_class, sizes = TINY if kind == "tiny" else ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes)
    model = transformers.T5EncoderModel(config) if kind == "t5" else transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer(cls_first=kind not in ("t5", "gpt2", "llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """Function: name of an architecture, or `tiny` -> folder of a saved model of it."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_backbone(kind, tmp_path_factory.mktemp("bert" if kind == "tiny" else kind))
        return made[kind]

    return folder


# For pre-training: as many tokens, with a mask token
PIECES = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(word for word in WORDS if not word.endswith("ly"))]
PIECES += ["slow", "quick", "##ly"]  # two words of two tokens each


def make_pieces(mask=True):
    """A tokenizer that divides `slowly` and `quickly` into two tokens, with a mask token or without."""
    model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = dict(pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>", eos_token="</s>")
    names |= {"mask_token": "<mask>"} if mask else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def maskable(tmp_path_factory):
    """Function: name of an architecture -> folder of a tiny model whose tokenizer has a mask token."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_backbone(kind, tmp_path_factory.mktemp(f"maskable-{kind}"))
            make_pieces().save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def own_metrics():
    """The metrics that a test registers are gone after it."""
    before = dict(ku.METRICS)
    yield
    ku.METRICS.clear()
    ku.METRICS.update(before)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make_texts(n, seed=0):
    """Texts of 3 to 30 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(n)]


@pytest.fixture
def build(backbone_folder):
    """Function: architecture and settings -> (model in eval mode, tokens of six texts of 5 to 32 tokens)."""

    def make(kind, **settings):
        folder = backbone_folder(kind)
        cfg = ku.Config(max_length=40, backbone=str(folder), **(dict(backbone_dropout=0.0) | settings))
        tokenizer = ku._load_tokenizer(folder)
        torch.manual_seed(0)
        model = ku.TextModel.build(cfg, folder, ku.LOSSES["mse"](cfg, 1), tokenizer, torch.zeros(1, 1))
        return model.eval(), ku._tokenize({"excerpt": make_texts(6)}, tokenizer, cfg)

    return make


def padded_mask(inputs):
    """Where texts stand in [rows, longest text], of the inputs of a model with packed or with padded rows."""
    return inputs["pack"].attention_mask if "pack" in inputs else inputs["attention_mask"]


def train_frame(n=40, seed=0):
    """A table in the CommonLit layout whose target is the share of a word, so that it can be learnt."""
    texts = make_texts(n, seed)
    target = [round(text.split().count("cat") / len(text.split()) * 10 - 1, 4) for text in texts]
    ids = [f"{i:03d}" for i in range(n)]
    return pd.DataFrame({"id": ids, "excerpt": texts, "target": target, "standard_error": 0.5})


def engine_of(cfg, frame=None):
    """An engine over 24 rows in two folds, or over `frame`."""
    frame = train_frame(24).assign(fold=[0, 1] * 12) if frame is None else frame
    cfg = cfg.resolved(ku._BackboneLoader(cfg.backbone, cfg).config)
    tokenizer = ku._load_tokenizer(cfg.backbone)
    tokens = ku._tokenize(frame, tokenizer, cfg)
    targets = cfg.encode_targets(frame, None)
    folds, ids = frame["fold"].to_numpy(), frame["id"].to_numpy()
    columns = cfg.error_column, cfg.weight_column
    amounts = [np.array(frame[column], dtype=np.float64) if column else None for column in columns]
    data = ku._TrainingData(tokens, targets, folds, ku.Path(cfg.backbone), tokenizer, targets.shape[1], ids, *amounts)
    return ku.OptimizerStep(data, cfg)


def weights(engine):
    return torch.cat([p.detach().flatten().cpu() for p in engine.model.parameters()])


def save_competition(folder):
    """Write train.csv (40 rows), test.csv (10 rows) and sample_submission.csv."""
    folder.mkdir()
    train_frame().to_csv(folder / "train.csv", index=False)
    test = train_frame(10, seed=1)[["id", "excerpt"]]
    test.to_csv(folder / "test.csv", index=False)
    test.assign(target=0.0)[["id", "target"]].iloc[::-1].to_csv(folder / "sample_submission.csv", index=False)
    return folder


@pytest.fixture
def competition(tmp_path):
    """Folder with train.csv (40 rows), test.csv (10 rows) and sample_submission.csv."""
    return save_competition(tmp_path / "competition")


QUIET = dict(say=lambda text: None)  # for functions that tell what they do


class Killed(BaseException):
    """Ends a run as abruptly as an exception can; no code of ours catches it."""


def kill():
    raise Killed


def tiny_config(competition, backbone, output_dir, **settings):
    """Config of a quick run on a made competition."""
    base = dict(data_dir=competition, backbone=backbone, output_dir=output_dir)
    return ku.Config.from_dict(base | dict(n_folds=2, epochs=1, batch_size=8, max_length=32) | settings)


@pytest.fixture
def tiny(competition, backbone_folder, tmp_path):
    """Function: settings -> Config of a quick run on the made competition with a tiny BERT."""

    def config(**settings):
        return tiny_config(competition, backbone_folder("tiny"), tmp_path / "runs", **settings)

    return config


def trained(cfg):
    """Train as train.ipynb does, the submission included; the run folder."""
    train, test, sample = ku.read_competition(cfg)
    folder = ku.train(ku.make_folds(train, cfg), cfg)
    ku.predict_test(folder, test, sample)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory, backbone_folder):
    """Folder of two finished runs, `one` and `two`, on `competition` beside it; copy what you change."""
    folder = tmp_path_factory.mktemp("finished")
    save_competition(folder / "competition")
    for name, settings in (("one", dict(head="conv1d")), ("two", dict(seed=1))):
        trained(
            tiny_config(folder / "competition", backbone_folder("tiny"), folder / "runs", run_name=name, **settings)
        )
    return folder / "runs"


class Forked(subprocess.Popen):
    """A process that calls a function and exits with what that returns. It is a copy of this one: one that Python
    starts anew takes seconds to import the libraries. Patches of this process hold there too."""

    def __init__(self, function, env=None, pass_fds=(), **options):
        super().__init__(
            ["a fork"], preexec_fn=lambda: self.live(function, env, pass_fds), pass_fds=pass_fds, **options
        )

    def live(self, function, env, pass_fds):
        for fd in set(range(3, 1024)) - set(pass_fds):
            with contextlib.suppress(OSError):
                os.close(fd)  # one of them is what the parent waits for
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, 1, closefd=False) for fd, mode in enumerate("rww"))
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.tqdm.set_lock(threading.RLock())  # another process may have been killed with the shared one
        if env is not None:
            os.environ.clear(), os.environ.update(env)
        code = 1
        try:
            code = function()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code or 0)


@pytest.fixture
def forked_module(monkeypatch):
    """Processes that run the module are forks of this one."""
    start = subprocess.Popen

    def popen(command, *rest, **options):
        if ku.__file__ not in map(str, command):
            return start(command, *rest, **options)
        return Forked(lambda: ku.main(command[-2:]), **options)

    monkeypatch.setattr(subprocess, "Popen", popen)


def flip(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def with_this_module(script):
    """The script of a notebook, which takes the module of this process and makes no second one."""
    script = script.replace('types.ModuleType("kernel_utils")', 'sys.modules["kernel_utils"]')
    return re.sub("(?m)^exec.*$", "", script)


def papermill(notebook, out, *parameters, cwd=ROOT, env=None):
    """Run a notebook with `-p` parameters; the finished process and the executed notebook."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(ROOT / "notebooks" / notebook), str(out)]
    for name, value in parameters:
        command += ["-p", name, str(value)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("KAGGLE")}
    done = subprocess.run(command, cwd=cwd, env=clean | (env or {}), capture_output=True, text=True)
    import nbformat  # a machine with a GPU may lack it

    return done, nbformat.read(out, 4)


def printed(executed):
    return "".join(o.get("text", "") for c in executed.cells for o in c.get("outputs", []) if o.get("name") == "stdout")
