"""Token ids, the prefix, padded tensors, and the plans of training and prediction batches."""

import dataclasses
import types
from collections import Counter

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from torch import nn

from conftest import SPECIAL, WORDS, make_texts, make_tokenizer

PAD, UNK, BOS, EOS = range(4)
CPU = torch.device("cpu")
FIRST = len(SPECIAL)
ALL_WORDS = " ".join(WORDS)
ALL_IDS = list(range(FIRST, FIRST + len(WORDS)))


def ids_of(text):
    return [FIRST + WORDS.index(word) for word in text.split()]


def rows_of(tokens):
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def types_of(tokens):
    return [tokens.types[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def tokens_of(texts, tokenizer, cfg, pairs=None):
    """Tokens of texts, or of pairs of texts, without a prefix."""
    columns = {"excerpt": texts, "second": pairs}
    names = ["excerpt"] if pairs is None else ["excerpt", "second"]
    return ku._tokenize(columns, tokenizer, dataclasses.replace(cfg, text_columns=names, prefix=""))


def tokenizer_with(single, pair="$A $B:1", typed=True):
    """The whole-word tokenizer with another template around a text and a pair."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    if typed:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_a_text_gets_the_special_tokens_of_its_tokenizer(tokenizer):
    rows = rows_of(tokens_of(["the cat sat", "a dog"], tokenizer, ku.Config()))
    assert rows == [[BOS, 4, 6, 8, EOS], [BOS, 5, 7, EOS]]


@pytest.mark.parametrize(
    "single, expected",
    [
        ("<s> $A </s>", [BOS, 4, 6, EOS]),
        ("$A </s>", [4, 6, EOS]),
        ("<s> $A", [BOS, 4, 6]),
        ("$A </s> <s>", [4, 6, EOS, BOS]),
        ("<s> <s> $A </s> </s>", [BOS, BOS, 4, 6, EOS, EOS]),
        ("$A", [4, 6]),
    ],
)
def test_the_template_is_that_of_the_tokenizer(single, expected):
    assert rows_of(tokens_of(["the cat"], tokenizer_with(single), ku.Config())) == [expected]


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "$A </s> <s>"])
@pytest.mark.parametrize("max_length", [8, 9])
def test_a_cut_text_keeps_the_whole_template(single, max_length):
    (row,) = rows_of(tokens_of([ALL_WORDS], tokenizer_with(single), ku.Config(max_length=max_length)))
    words = max_length - single.count("s>")
    expected = {"$A": ALL_IDS[:words], "<s>": [BOS], "</s>": [EOS]}
    assert row == [i for part in single.split() for i in expected[part]]
    assert len(row) == max_length


@pytest.mark.parametrize(
    "truncation, max_length, head, tail",
    [
        ("head", 8, 6, 0),
        ("head", 9, 7, 0),
        ("tail", 8, 0, 6),
        ("tail", 9, 0, 7),
        ("head_tail", 8, 1, 5),
        ("head_tail", 9, 1, 6),
        ("head_tail", 10, 2, 6),
        ("head_tail", 11, 2, 7),
        ("head_tail", 14, 3, 9),
        ("head_tail", 15, 3, 10),
    ],
)
def test_a_long_text_keeps_its_head_its_tail_or_a_quarter_of_head_and_the_rest_of_tail(
    tokenizer, truncation, max_length, head, tail
):
    (row,) = rows_of(tokens_of([ALL_WORDS], tokenizer, ku.Config(max_length=max_length, truncation=truncation)))
    kept = [FIRST + i for i in range(head)] + [FIRST + len(WORDS) - tail + i for i in range(tail)]
    assert row == [BOS, *kept, EOS]


@pytest.mark.parametrize("truncation", ["head", "tail", "head_tail"])
@pytest.mark.parametrize("max_length", [8, 9])
def test_a_text_that_just_fits_is_not_cut(tokenizer, truncation, max_length):
    text = " ".join(WORDS[: max_length - 2])
    rows = rows_of(tokens_of([text], tokenizer, ku.Config(max_length=max_length, truncation=truncation)))
    assert rows == [[BOS, *ids_of(text), EOS]]


def test_an_empty_text_keeps_its_special_tokens(tokenizer):
    assert rows_of(tokens_of(["", "the cat"], tokenizer, ku.Config())) == [[BOS, EOS], [BOS, 4, 6, EOS]]


def test_an_empty_text_with_only_an_end_token_is_that_token():
    assert rows_of(tokens_of([""], make_tokenizer(cls_first=False), ku.Config())) == [[EOS]]


def test_an_empty_text_without_special_tokens_becomes_one_end_token():
    tokens = tokens_of(["", "the cat"], tokenizer_with("$A"), ku.Config())
    assert rows_of(tokens) == [[EOS], [4, 6]] and types_of(tokens) == [[0], [0, 0]]


@pytest.mark.parametrize(
    "pair, expected_ids, expected_types",
    [
        ("<s> $A </s> $B:1 </s>:1", [BOS, 4, 6, EOS, 5, EOS], [0, 0, 0, 0, 1, 1]),
        ("<s> $A </s> </s> $B </s>", [BOS, 4, 6, EOS, EOS, 5, EOS], [0, 0, 0, 0, 0, 0, 0]),
        ("$A </s> $B:1 </s>:1 <s>:2", [4, 6, EOS, 5, EOS, BOS], [0, 0, 0, 1, 1, 2]),
        ("$A $B </s>", [4, 6, 5, EOS], [0, 0, 0, 0]),
    ],
)
def test_a_pair_gets_the_template_and_types_of_its_tokenizer(pair, expected_ids, expected_types):
    tokens = tokens_of(["the cat"], tokenizer_with("$A", pair), ku.Config(), ["a"])
    assert rows_of(tokens) == [expected_ids] and types_of(tokens) == [expected_types]


def test_there_are_no_types_where_the_tokenizer_gives_none(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert tokens_of(["the cat"], tokenizer, ku.Config(), ["a"]).types is None


def test_a_pair_may_have_empty_sides(tokenizer):
    rows = rows_of(tokens_of(["", "the", ""], tokenizer, ku.Config(), ["a", "", ""]))
    assert rows == [[BOS, EOS, 5, EOS], [BOS, 4, EOS, EOS], [BOS, EOS, EOS]]


@pytest.mark.parametrize("max_length", [10, 11])
@pytest.mark.parametrize("first, second", [(20, 2), (2, 20), (20, 20), (4, 20), (20, 4), (4, 4), (4, 5), (0, 20)])
def test_of_a_long_pair_the_longer_text_is_cut_first(tokenizer, max_length, first, second):
    left, right = first, second
    while left + right > max_length - 3:
        left, right = (left - 1, right) if left > right else (left, right - 1)
    cfg = ku.Config(max_length=max_length)
    rows = rows_of(tokens_of([" ".join(WORDS[:first])], tokenizer, cfg, [" ".join(WORDS[:second])]))
    assert rows == [[BOS, *ALL_IDS[:left], EOS, *ALL_IDS[:right], EOS]]


def test_each_text_of_a_long_pair_is_cut_as_set(tokenizer):
    rows = rows_of(tokens_of([ALL_WORDS], tokenizer, ku.Config(max_length=11, truncation="tail"), [ALL_WORDS]))
    assert rows == [[BOS, *ALL_IDS[-4:], EOS, *ALL_IDS[-4:], EOS]]


@pytest.mark.parametrize("left_out", ["tokenizer.json", "all"])
def test_a_folder_without_a_vocabulary_is_an_error_that_names_it(tokenizer, tmp_path, left_out):
    if left_out == "tokenizer.json":
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        assert (tmp_path / "tokenizer_config.json").is_file()
    with pytest.raises(ku.KitError) as error:
        ku._load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "tokenizer.json" in str(error.value)


def test_a_tokenizer_saved_in_a_folder_is_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    rows = rows_of(tokens_of(["the cat"], ku._load_tokenizer(tmp_path), ku.Config()))
    assert rows == [[BOS, 4, 6, EOS]]


def test_texts_that_the_tokenizer_mostly_does_not_know_are_an_error_with_the_share(tokenizer):
    tokens = tokens_of(["der hund lief schnell weg", "und der hut war rot"], tokenizer, ku.Config())
    with pytest.raises(ku.KitError, match=r"100% of the tokens are unknown"):
        tokens.check_vocabulary(tokenizer)


def test_texts_with_some_unknown_words_are_no_error(tokenizer):
    tokens = tokens_of(["der hund sat on the mat"], tokenizer, ku.Config())
    assert rows_of(tokens) == [[BOS, UNK, UNK, *ids_of("sat on the mat"), EOS]]
    tokens.check_vocabulary(tokenizer)


def levels():
    return pd.DataFrame({"excerpt": ["the cat", "a dog"], "level": ["[A]", "[B]"], "word": ["red", "blue"]})


def test_a_prefix_is_put_before_each_text(tokenizer):
    rows = rows_of(ku._tokenize(levels(), tokenizer, ku.Config(prefix="big hat ")))
    assert rows == [[BOS, *ids_of("big hat the cat"), EOS], [BOS, *ids_of("big hat a dog"), EOS]]


def test_braces_in_a_prefix_insert_columns(tokenizer):
    rows = rows_of(ku._tokenize(levels(), tokenizer, ku.Config(prefix="{word} hat {word} ")))
    assert rows == [[BOS, *ids_of("red hat red the cat"), EOS], [BOS, *ids_of("blue hat blue a dog"), EOS]]


def test_each_column_of_a_prefix_stands_in_its_place(tokenizer):
    frame = levels().assign(place=["tree", "river"])
    rows = rows_of(ku._tokenize(frame, tokenizer, ku.Config(prefix="{word} hat {place} mat ")))
    assert rows[0] == [BOS, *ids_of("red hat tree mat the cat"), EOS]
    assert rows[1] == [BOS, *ids_of("blue hat river mat a dog"), EOS]


def test_a_prefix_is_put_before_the_first_text_of_a_pair_only(tokenizer):
    cfg = ku.Config(prefix="big ", text_columns="excerpt,word")
    rows = rows_of(ku._tokenize(levels(), tokenizer, cfg))
    assert rows[0] == [BOS, *ids_of("big the cat"), EOS, *ids_of("red"), EOS]


@pytest.mark.parametrize("truncation, kept", [("head", ALL_IDS[:5]), ("tail", ALL_IDS[-5:])])
def test_a_prefix_is_never_cut_and_the_text_takes_what_is_left(tokenizer, truncation, kept):
    frame = pd.DataFrame({"excerpt": [ALL_WORDS]})
    cfg = ku.Config(prefix="big hat mat ", max_length=10, truncation=truncation)
    assert rows_of(ku._tokenize(frame, tokenizer, cfg)) == [[BOS, *ids_of("big hat mat"), *kept, EOS]]


def test_two_long_texts_of_a_pair_share_what_the_prefix_leaves(tokenizer):
    frame = pd.DataFrame({"excerpt": [ALL_WORDS], "other": [ALL_WORDS]})
    cfg = ku.Config(prefix="big hat ", max_length=13, text_columns="excerpt,other")
    rows = rows_of(ku._tokenize(frame, tokenizer, cfg))
    assert rows == [[BOS, *ids_of("big hat"), *ALL_IDS[:4], EOS, *ALL_IDS[:4], EOS]]


def test_a_short_first_text_is_kept_after_a_long_prefix(tokenizer):
    frame = pd.DataFrame({"excerpt": ["red cat dog"], "other": [ALL_WORDS]})
    cfg = ku.Config(prefix="big hat mat big hat mat ", max_length=15, text_columns="excerpt,other")
    rows = rows_of(ku._tokenize(frame, tokenizer, cfg))
    assert rows == [[BOS, *ids_of("big hat mat big hat mat red cat dog"), EOS, *ALL_IDS[:3], EOS]]


def test_a_prefix_that_leaves_no_room_for_a_text_is_refused_with_its_length(tokenizer):
    cfg = ku.Config(prefix="big hat mat red cat dog ", max_length=8)
    with pytest.raises(ku.ConfigError, match=r"max_length 8.*6 tokens"):
        ku._tokenize(levels(), tokenizer, cfg)


def test_without_a_prefix_the_texts_are_as_they_are(tokenizer):
    rows = rows_of(ku._tokenize(levels(), tokenizer, ku.Config()))
    assert rows == [[BOS, *ids_of("the cat"), EOS], [BOS, *ids_of("a dog"), EOS]]


def test_new_words_in_brackets_become_one_token_each_after_the_old_ones(tokenizer):
    cfg, n = ku.Config(prefix="{level} [LEVEL] "), len(tokenizer)
    new = ku._add_prefix_tokens(tokenizer, levels(), cfg)
    assert sorted(new) == ["[A]", "[B]", "[LEVEL]"] and len(tokenizer) == n + 3
    added = {word: tokenizer.convert_tokens_to_ids(word) for word in new}
    assert set(added.values()) == {n, n + 1, n + 2}
    rows = rows_of(ku._tokenize(levels(), tokenizer, cfg))
    assert rows[0] == [BOS, added["[A]"], added["[LEVEL]"], *ids_of("the cat"), EOS]
    assert rows[1] == [BOS, added["[B]"], added["[LEVEL]"], *ids_of("a dog"), EOS]


def test_new_words_get_their_ids_in_alphabetical_order_and_are_special(tokenizer):
    words, n = [f"[{letter}]" for letter in "zyxwvutsrqponmlkjihgfedcba"], len(tokenizer)
    ku._add_prefix_tokens(tokenizer, levels(), ku.Config(prefix=" ".join(words)))
    assert tokenizer.convert_tokens_to_ids(sorted(words)) == list(range(n, n + 26))
    assert all(tokenizer.added_tokens_decoder[i].special for i in range(n, n + 26))


def test_words_that_the_tokenizer_has_are_not_added_again(tokenizer):
    cfg = ku.Config(prefix="{level} ")
    ku._add_prefix_tokens(tokenizer, levels(), cfg)
    n = len(tokenizer)
    assert ku._add_prefix_tokens(tokenizer, levels(), cfg) == [] and len(tokenizer) == n


def test_a_prefix_without_brackets_adds_nothing(tokenizer):
    n = len(tokenizer)
    assert ku._add_prefix_tokens(tokenizer, levels(), ku.Config(prefix="big {word} ")) == [] and len(tokenizer) == n


def test_the_same_new_words_get_the_same_ids_whatever_the_row_order():
    cfg, ids = ku.Config(prefix="{level} "), []
    for frame in (levels(), levels().iloc[::-1]):
        tokenizer = make_tokenizer()
        ku._add_prefix_tokens(tokenizer, frame, cfg)
        ids.append(tokenizer.convert_tokens_to_ids(["[A]", "[B]"]))
    assert ids[0] == ids[1]


def test_a_column_of_too_many_new_words_is_refused_with_their_number(tokenizer):
    frame = pd.DataFrame({"excerpt": "a", "key": [f"[{i}]" for i in range(1001)]})
    with pytest.raises(ku.ConfigError, match="1001 new tokens"):
        ku._add_prefix_tokens(tokenizer, frame, ku.Config(prefix="{key} "))


def test_new_words_outlive_saving_the_tokenizer(tokenizer, tmp_path):
    cfg = ku.Config(prefix="{level} ")
    ku._add_prefix_tokens(tokenizer, levels(), cfg)
    expected = rows_of(ku._tokenize(levels(), tokenizer, cfg))
    tokenizer.save_pretrained(tmp_path)
    assert rows_of(ku._tokenize(levels(), ku._load_tokenizer(tmp_path), cfg)) == expected


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_embeddings_grow_by_the_new_words_and_keep_the_old_rows(backbone_folder, kind):
    folder = backbone_folder(kind)
    cfg = ku.Config(prefix=" ".join(f"[{i}]" for i in range(10)) + " ", max_length=32)
    tokenizer = ku._load_tokenizer(folder)
    ku._add_prefix_tokens(tokenizer, levels(), cfg)
    loss, targets = ku.LOSSES["mse"](cfg, 1), torch.zeros(2, 1)
    model = ku.TextModel.build(cfg, folder, loss, tokenizer, targets, lambda text: None)
    old = ku._BackboneLoader(folder, cfg).load().get_input_embeddings().weight
    grown = model.backbone.get_input_embeddings().weight
    assert len(old) < len(tokenizer) == len(grown) == len(WORDS) + len(SPECIAL) + 10
    assert torch.equal(grown[: len(old)], old)
    tokens = ku._tokenize(levels(), tokenizer, cfg)
    assert tokens.ids.max() == len(grown) - 1
    assert np.isfinite(ku.predict(model, tokens, cfg)).all()


def test_a_batch_is_padded_on_the_right_to_its_longest_row_and_masked():
    tokens = ku.Tokens([[5, 6, 7], [8], [9, 9, 9, 9, 9], [4, 3]], None, pad_id=11)
    batch = tokens.batch(np.array([3, 0, 1]), CPU)
    assert batch["input_ids"].tolist() == [[4, 3, 11], [5, 6, 7], [8, 11, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_batch_is_padded_with_the_pad_token_of_the_tokenizer(tokenizer):
    tokenizer.pad_token = "because"
    batch = tokens_of(["the", "the cat"], tokenizer, ku.Config()).batch([0, 1], CPU)
    assert batch["input_ids"].tolist() == [[BOS, 4, EOS, FIRST + WORDS.index("because")], [BOS, 4, 6, EOS]]


def test_a_batch_has_types_where_the_tokens_have_them_and_0_on_padding():
    tokens = ku.Tokens([[5, 6, 7], [8, 9]], [[0, 1, 1], [0, 1]], pad_id=11)
    batch = tokens.batch([1, 0], CPU)
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 1]]


def test_a_batch_is_made_of_whole_numbers_that_embeddings_take():
    batch = ku.Tokens([[5, 6], [8]], [[0, 1], [0]], pad_id=0).batch([0, 1], CPU)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_tokens_know_their_number_and_lengths():
    tokens = ku.Tokens([[5, 6, 7], [8], [9, 9]], None, pad_id=0)
    assert len(tokens) == 3 and tokens.lengths.tolist() == [3, 1, 2]


def some_lengths(n, seed=0):
    return np.random.default_rng(seed).integers(1, 300, n)


def slots(lengths, batches):
    return sum(len(batch) * max(lengths[batch]) for batch in batches)


SIZES = [(64, 16, 1), (64, 16, 4), (103, 16, 4), (103, 16, 1), (103, 16, 100), (5, 16, 4), (16, 16, 4), (17, 16, 4)]


@pytest.mark.parametrize("n, size, bucket", SIZES)
def test_a_training_plan_has_each_row_once_in_batches_of_one_size_but_one(n, size, bucket):
    batches = ku._plan_batches(some_lengths(n), size, np.random.default_rng(1), bucket)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    short = [n % size] if n % size else []
    assert sorted(map(len, batches)) == short + [size] * (n // size)


@pytest.mark.parametrize("bucket", [1, 4])
def test_a_training_plan_follows_its_random_generator(bucket):
    plans = [ku._plan_batches(some_lengths(64), 8, np.random.default_rng(seed), bucket) for seed in (1, 1, 2)]
    rows = [[batch.tolist() for batch in plan] for plan in plans]
    assert rows[0] == rows[1] != rows[2]
    assert {frozenset(batch) for batch in rows[0]} != {frozenset(batch) for batch in rows[2]}


def test_length_aware_batches_pad_far_less_than_random_ones():
    lengths, wasted = some_lengths(1024), {}
    for bucket in (1, 8, 64):
        batches = ku._plan_batches(lengths, 16, np.random.default_rng(0), bucket)
        wasted[bucket] = slots(lengths, batches) - lengths.sum()
    assert wasted[8] < 0.3 * wasted[1] and wasted[64] < 0.05 * wasted[1]


def test_rows_of_a_batch_are_of_neighbouring_lengths_within_their_bucket():
    lengths = np.random.default_rng(0).permutation(64)
    batches = ku._plan_batches(lengths, 8, np.random.default_rng(0), 100)
    assert sorted(sorted(lengths[batch].tolist()) for batch in batches) == np.arange(64).reshape(8, 8).tolist()


def test_batches_come_in_random_order_of_length():
    lengths = np.arange(32)
    places = set()
    for seed in range(100):
        batches = ku._plan_batches(lengths, 8, np.random.default_rng(seed), 4)
        places.add(next(i for i, batch in enumerate(batches) if 31 in batch))
    assert places == {0, 1, 2, 3}


def test_every_row_may_be_in_the_short_batch():
    seen = Counter()
    for seed in range(200):
        batches = ku._plan_batches(np.arange(10), 4, np.random.default_rng(seed), 4)
        seen.update(next(batch for batch in batches if len(batch) == 2).tolist())
    assert set(seen) == set(range(10)) and max(seen.values()) < 80


@pytest.mark.parametrize("budget", [8, 300, 1000, 10**6])
def test_a_prediction_plan_has_each_row_once_and_keeps_the_budget(budget):
    lengths = some_lengths(200)
    batches = ku._plan_prediction_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * max(lengths[batch]) <= budget for batch in batches)


def test_a_prediction_plan_begins_with_the_longest_texts_and_fills_its_batches():
    batches = ku._plan_prediction_batches([3, 10, 5, 4, 5], 10)
    assert [batch.tolist() for batch in batches] == [[1], [2, 4], [3, 0]]


class SumOfIds(nn.Module):
    """Predicts the sum of the ids of a text, and remembers the shapes it was given."""

    def __init__(self):
        super().__init__()
        self.weight, self.shapes = nn.Parameter(torch.ones(1)), []
        self.loss = types.SimpleNamespace(predict=lambda raw: raw)

    def can_pack(self, tokens, dtype):
        return False

    def forward(self, input_ids, attention_mask):
        self.shapes.append(input_ids.shape)
        return (input_ids * attention_mask).sum(1, keepdim=True) * self.weight


def random_tokens(n):
    rng = np.random.default_rng(3)
    rows = [rng.integers(4, 20, size).tolist() for size in rng.integers(1, 30, n)]
    return rows, ku.Tokens(rows, None, pad_id=7)


@pytest.mark.parametrize("batch_tokens", [8, 64, 8192])
def test_predictions_come_in_the_order_of_the_rows(batch_tokens):
    rows, tokens = random_tokens(50)
    predictions = ku.predict(SumOfIds(), tokens, ku.Config(batch_tokens=batch_tokens))
    assert predictions.tolist() == [[sum(row)] for row in rows]


def test_predictions_of_some_rows_come_in_the_order_asked():
    rows, tokens = random_tokens(50)
    asked = [31, 2, 49, 2, 0]
    predictions = ku.predict(SumOfIds(), tokens, ku.Config(batch_tokens=64), rows=asked)
    assert predictions.tolist() == [[sum(rows[i])] for i in asked]


def test_prediction_batches_keep_the_budget_of_the_settings():
    _, tokens = random_tokens(50)
    model = SumOfIds()
    ku.predict(model, tokens, ku.Config(batch_tokens=64))
    assert sum(b for b, _ in model.shapes) == 50 and max(b * t for b, t in model.shapes) <= 64


def subword_tokenizer(kind):
    """A tokenizer of the RoBERTa kind (bytes) or the DeBERTa-v3 and XLNet kinds (word-start marks), trained here."""
    words, special = make_texts(200), ["<pad>", "<unk>", "<s>", "</s>"]
    if kind == "bytes":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
        model.train_from_iterator(words, trainer)
        model.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    else:
        model = tokenizers.Tokenizer(tokenizers.models.Unigram())
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        model.train_from_iterator(words, trainer)
        template = {
            "marks": ("<s> $A </s>", "<s> $A </s> $B </s>"),
            "marks, end": ("$A </s> <s>", "$A </s> $B </s> <s>"),
        }
        single, pair = template[kind]
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    names = dict(pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>", eos_token="</s>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


@pytest.mark.parametrize("kind", ["bytes", "marks", "marks, end"])
def test_short_texts_and_pairs_get_the_ids_that_the_tokenizer_itself_gives(kind):
    tokenizer, first, second = subword_tokenizer(kind), ["the cat sat", "a dog"], ["on the mat", "ran slowly"]
    alone = tokens_of(first, tokenizer, ku.Config())
    assert rows_of(alone) == [tokenizer(text)["input_ids"] for text in first]
    both = tokens_of(first, tokenizer, ku.Config(), second)
    assert rows_of(both) == [tokenizer(a, b)["input_ids"] for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("kind", ["bytes", "marks", "marks, end"])
def test_the_space_after_a_prefix_token_is_no_token(kind):
    tokenizer = subword_tokenizer(kind)
    frame = pd.DataFrame({"excerpt": ["the cat sat"]})
    cfg = ku.Config(prefix="[new] ")
    ku._add_prefix_tokens(tokenizer, frame, cfg)
    plain = rows_of(tokens_of(["the cat sat"], tokenizer, cfg))[0]
    (row,) = rows_of(ku._tokenize(frame, tokenizer, cfg))
    assert [i for i in row if i != tokenizer.convert_tokens_to_ids("[new]")] == plain and len(row) == len(plain) + 1


@pytest.mark.parametrize("file", ["spm.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"])
@pytest.mark.parametrize("lacking", [["sentencepiece"], ["google.protobuf"], ["sentencepiece", "google.protobuf"]])
def test_a_sentencepiece_vocabulary_asks_for_the_packages_that_read_it(file, lacking, tmp_path, monkeypatch):
    (tmp_path / file).write_bytes(b"a vocabulary")
    monkeypatch.setattr(ku, "_has_module", lambda name: name not in lacking)
    packages = " ".join(lacking).replace("google.", "")
    with pytest.raises(
        ku.KitError, match=rf"has {file} and no tokenizer.json: pip install {packages}, or add"
    ) as error:
        ku._load_tokenizer(tmp_path)
    assert "tiktoken" not in str(error.value)
