"""Every entry of HEADS meets the same contract; each pooling equals its formula in NumPy."""

import contextlib
import math

import kernel_utils as ku
import numpy as np
import pytest
import torch
from torch.nn import functional as F

WIDTH, N_STATES, LENGTHS = 12, 5, [7, 1, 4, 9]


def make_head(name, cls_is_last=False, **settings):
    torch.manual_seed(0)
    return ku.HEADS[name](ku.EncoderInfo(WIDTH, N_STATES, cls_is_last), ku.Config(head=name, **settings)).eval()


def make_states(seed=0):
    """Random states (4, 9, WIDTH) of every layer, with large values where there is padding, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    states = [torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, generator=generator) for _ in range(N_STATES)]
    return tuple(state.masked_fill(~mask[..., None], 50.0) for state in states), mask.long()


def row(states, i):
    """The tokens of row i in each state, without padding, as arrays."""
    return [state[i, : LENGTHS[i]].numpy() for state in states]


@pytest.mark.parametrize("cls_last", [False, True])
@pytest.mark.parametrize("name", ku.HEADS)
def test_padding_never_changes_the_features(name, cls_last):
    head, (states, mask) = make_head(name, cls_last), make_states()
    together = head(states, mask)
    for i, n in enumerate(LENGTHS):
        alone = head(tuple(state[i : i + 1, :n] for state in states), mask[i : i + 1, :n])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    padded = head(tuple(F.pad(state, (0, 0, 0, 100), value=-50.0) for state in states), F.pad(mask, (0, 100)))
    torch.testing.assert_close(together, padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ku.HEADS)
def test_features_have_the_size_that_the_head_states(name):
    head, (states, mask) = make_head(name), make_states()
    assert head(states, mask).shape == (len(LENGTHS), head.out_features)


@pytest.mark.parametrize("name", ku.HEADS)
def test_every_parameter_of_a_head_gets_a_gradient(name):
    head, (states, mask) = make_head(name).train(), make_states()
    states = tuple(state.requires_grad_() for state in states)
    (head(states, mask) * torch.randn(head.out_features)).sum().backward()
    silent = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("name", ku.HEADS)
def test_features_are_finite_under_bf16_autocast_and_on_negative_states(name):
    head, (states, mask) = make_head(name), make_states()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(states, mask).isfinite().all()
    assert head(tuple(-state.abs() for state in states), mask).isfinite().all()


@pytest.mark.parametrize("name", ku.HEADS)
def test_a_saved_head_loads_to_the_same_features(name, tmp_path):
    head, (states, mask) = make_head(name), make_states()
    ku.save_model(head, str(tmp_path / "head.safetensors"))
    torch.manual_seed(1)
    other = ku.HEADS[name](ku.EncoderInfo(WIDTH, N_STATES), ku.Config(head=name)).eval()
    ku.load_model(other, str(tmp_path / "head.safetensors"))
    assert torch.equal(head(states, mask), other(states, mask))


def layer_norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


FORMULAS = {
    "cls": lambda s: s[-1][0],
    "mean": lambda s: s[-1].mean(0),
    "max": lambda s: s[-1].max(0),
    "meanmax": lambda s: np.concatenate([s[-1].mean(0), s[-1].max(0)]),
    "gem": lambda s: np.mean(np.maximum(s[-1], 1e-6) ** 3, axis=0) ** (1 / 3),
    "concat": lambda s: np.concatenate([layer_norm(state[0]) for state in s[-4:]]),
    "weighted": lambda s: np.mean([layer_norm(state[0]) for state in s], axis=0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_fresh_head_equals_its_formula(name):
    head, (states, mask) = make_head(name), make_states()
    expected = np.stack([FORMULAS[name](row(states, i)) for i in range(len(LENGTHS))])
    np.testing.assert_allclose(head(states, mask).detach().numpy(), expected, atol=1e-5)


def test_cls_takes_the_last_real_token_where_the_classification_token_is_last():
    head, (states, mask) = make_head("cls", cls_is_last=True), make_states()
    expected = np.stack([row(states, i)[-1][-1] for i in range(len(LENGTHS))])
    np.testing.assert_array_equal(head(states, mask).numpy(), expected)


def test_weighted_averages_layers_by_softmax_of_its_weights_times_the_factor():
    head, (states, mask) = make_head("weighted", weighted_pool="mean"), make_states()
    weights = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5])
    head.weights.data, head.factor.data = weights, torch.tensor([1.7])
    share = np.exp(weights.numpy()) / np.exp(weights.numpy()).sum()
    expected = [
        1.7 * sum(w * layer_norm(s.mean(0)) for w, s in zip(share, row(states, i), strict=True))
        for i in range(len(LENGTHS))
    ]
    np.testing.assert_allclose(head(states, mask).detach().numpy(), np.stack(expected), atol=1e-5)


def test_attention_weights_tokens_by_softmax_of_its_scores():
    head, (states, mask) = make_head("attention"), make_states()
    w1, b1, w2 = (p.detach().numpy() for p in head.parameters())
    expected = []
    for i in range(len(LENGTHS)):
        tokens = row(states, i)[-1]
        scores = (np.tanh(tokens @ w1.T + b1) @ w2.T)[:, 0]
        share = np.exp(scores) / np.exp(scores).sum()
        expected.append(share @ tokens)
    np.testing.assert_allclose(head(states, mask).detach().numpy(), np.stack(expected), atol=1e-5)


@pytest.mark.parametrize(("kernels", "channels"), [((2, 2), (256, 1)), ((3,), (8,)), ((5, 2, 3), (6, 4, 2))])
def test_conv1d_slides_its_kernels_over_the_tokens_with_zeros_around_them(kernels, channels):
    head, (states, mask) = make_head("conv1d", conv_kernels=kernels, conv_channels=channels), make_states()
    expected = []
    for i in range(len(LENGTHS)):
        x = row(states, i)[-1]
        for n, conv in enumerate(head.convs):
            weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
            k = weight.shape[2]
            x = np.pad(np.maximum(x, 0) if n else x, (((k - 1) // 2, k // 2), (0, 0)))
            x = np.stack([np.einsum("kc,ock->o", x[t : t + k], weight) + bias for t in range(len(x) - k + 1)])
        expected.append(x.max(0))
    np.testing.assert_allclose(head(states, mask).detach().numpy(), np.stack(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer", "directions"),
    [("lstm", torch.nn.LSTM, 1), ("bilstm", torch.nn.LSTM, 2), ("gru", torch.nn.GRU, 1)],
)
def test_recurrent_heads_return_the_final_states_over_the_real_tokens(name, layer, directions):
    head, (states, mask) = make_head(name, rnn_size=6), make_states()
    assert type(head.rnn) is layer and head.out_features == 6 * directions
    for i, n in enumerate(LENGTHS):
        outputs, _ = head.rnn(states[-1][i : i + 1, :n])  # without packing: nothing to pack
        expected = outputs[0, -1, :6] if directions == 1 else torch.cat([outputs[0, -1, :6], outputs[0, 0, 6:]])
        torch.testing.assert_close(head(states, mask)[i], expected, atol=1e-6, rtol=0)


def test_a_class_of_three_heads_is_a_part_like_others():
    assert list(ku.HEADS) == "cls mean max meanmax conv1d lstm bilstm gru concat weighted attention gem".split()
    assert ku.register(ku.HEADS, "gru")(ku.RecurrentHead) is ku.RecurrentHead  # a cell that runs again
    with pytest.raises(ValueError, match=r"'lstm' is taken by kernel_utils\.RecurrentHead"):
        ku.register(ku.HEADS, "lstm")(ku.MeanHead)
    assert "pack_padded_sequence" in ku._source_of(ku.HEADS["bilstm"])


def test_conv1d_gives_its_last_channels_for_each_output():
    cfg = ku.Config(head="conv1d", conv_channels=(6, 2))
    assert ku.HEADS["conv1d"](ku.EncoderInfo(WIDTH, N_STATES, num_outputs=5), cfg).out_features == 10


def test_concat_of_more_layers_than_there_are_is_refused():
    with pytest.raises(ku.ConfigError, match="concat_layers must be at most the backbone's 4 layers, got 5"):
        make_head("concat", concat_layers=5)


class OwnHead(torch.nn.Module):
    """A masked mean, until a test gives it another `forward`."""

    def __init__(self, encoder, cfg):
        super().__init__()
        self.out_features = encoder.hidden_size
        self.lstm = torch.nn.LSTM(encoder.hidden_size, encoder.hidden_size, batch_first=True)
        self.norm = torch.nn.BatchNorm1d(encoder.hidden_size)
        self.view, self.other_view = map(torch.nn.Parameter, torch.ones(2, encoder.hidden_size))
        self.scale = torch.rand(1)

    def forward(self, states, mask):
        return ku.masked_mean(states[-1], mask)


def trial_of(forward, build, monkeypatch):
    monkeypatch.setitem(ku.HEADS, "own", type("OwnHead", (OwnHead,), {"forward": forward}))
    model, tokens = build("bert", head="own", loss="mse")
    return ku._ModelTrial(model, tokens, ku.Config(head="own", loss="mse"), torch.float32)


@pytest.mark.parametrize("head", ku.HEADS)
def test_every_head_passes_the_trial_of_a_new_model(head, build):
    model, tokens = build("bert", head=head)
    ku._ModelTrial(model, tokens, ku.Config(head=head), torch.float32).check_head()


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, states, mask: self.norm(ku.masked_mean(states[-1], mask)),
        lambda self, states, mask: ku.masked_mean(torch.stack(list(states)).mean(0), mask),
        lambda self, states, mask: states[-1][torch.arange(len(mask)), mask.sum(1) - 1],
    ],
)
def test_a_head_of_ones_own_that_masks_passes_the_trial(forward, build, monkeypatch):
    trial_of(forward, build, monkeypatch).check_head()


@pytest.mark.parametrize(
    ("forward", "cause"),
    [
        (lambda self, states, mask: states[-1].mean(1), "padding; leave out where attention_mask is 0"),
        (lambda self, states, mask: states[-1].amax(1), "padding"),
        (lambda self, states, mask: states[-1].amin(1), "padding"),
        (lambda self, states, mask: states[-1][:, -1], "padding"),
        (lambda self, states, mask: (states[-1] * states[-1].softmax(1)).sum(1), "padding"),
        (lambda self, states, mask: ku.masked_mean(states[-1] - states[-1].mean(1, True), mask), "padding"),
        (lambda self, states, mask: (states[-1] * mask[..., None]).sum(1) / mask.shape[1], "padding"),
        (lambda self, states, mask: self.lstm(states[-1])[1][0][0], "padding"),
        (lambda self, states, mask: ku.masked_mean(states[-1], mask).softmax(0), "the other texts of its batch"),
    ],
)
def test_a_head_of_ones_own_in_which_padding_or_another_text_shows_is_refused(forward, cause, build, monkeypatch):
    trial = trial_of(forward, build, monkeypatch)
    with pytest.raises(ku.KitError, match=rf"head own \(OwnHead\): the features of a text move by .* with {cause}"):
        trial.check_head()


@pytest.mark.parametrize(
    ("forward", "got"),
    [
        (lambda self, states, mask: states[-1], r"shape \(2, 8, 32\)"),
        (lambda self, states, mask: states[-1].mean((0, 1)), r"shape \(32,\)"),
        (lambda self, states, mask: torch.cat(2 * [states[-1][:, 0]], 1), r"shape \(2, 64\)"),
        (lambda self, states, mask: (states[-1][:, 0], mask), "tuple"),
        (lambda self, states, mask: states[-1][:, 0] * math.nan, "NaN or infinity"),
        (lambda self, states, mask: states[-1][:, 0].half(), "torch.float16"),
    ],
)
def test_a_head_of_ones_own_that_gives_no_features_is_refused_with_what_it_gave(forward, got, build, monkeypatch):
    expected = rf"head own \(OwnHead\) must give .* shape \(B, D\), here \(2, 32\); it gave {got}"
    with pytest.raises(ku.KitError, match=expected):
        trial_of(forward, build, monkeypatch)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda head: delattr(head, "out_features"), "must set self.out_features, the number D of its features"),
        (lambda head: setattr(head, "out_features", "32"), "must set self.out_features.*got '32'"),
        (lambda head: setattr(head, "lazy", torch.nn.LazyLinear(2)), "lazy.weight has no shape yet"),
    ],
)
def test_a_head_of_ones_own_that_lacks_what_a_model_is_built_with_is_refused(spoil, problem, build, monkeypatch):
    class Spoilt(OwnHead):
        def __init__(self, encoder, cfg):
            super().__init__(encoder, cfg)
            spoil(self)

    monkeypatch.setitem(ku.HEADS, "own", Spoilt)
    with pytest.raises(ku.KitError, match=rf"head own \(Spoilt\):? {problem}"):
        build("bert", head="own")


def grow(self, states, mask):
    if not hasattr(self, "grown"):
        self.grown = torch.nn.Parameter(torch.ones(32))
    return self.grown * ku.masked_mean(states[-1], mask)


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (lambda self, states, mask: self.scale * states[-1][:, 0], "gives other features, .* not saved are head.scale"),
        (grow, 'cannot be saved and loaded: .*Unexpected key.*"head.grown"'),
        (OwnHead.forward, None),  # two of its parameters are views of one tensor
    ],
)
def test_a_head_of_ones_own_that_does_not_come_back_as_saved_is_refused(
    forward, problem, build, monkeypatch, tmp_path, tokenizer
):
    trial = trial_of(forward, build, monkeypatch)
    with pytest.raises(ku.KitError, match=problem) if problem else contextlib.nullcontext():
        trial.check_saving(tmp_path, 1, tokenizer)
