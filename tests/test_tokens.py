"""Token ids, templates, padded tensors, and the plans of training and prediction batches."""

import dataclasses
import re
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

from conftest import SPECIAL, WORDS, make_pieces, make_texts, make_tokenizer

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


def tokens_of(texts, tokenizer, cfg, *further):
    """Tokens of texts, or of rows of several texts, without a template."""
    columns = {f"text{number}": column for number, column in enumerate([texts, *further])}
    return ku._tokenize(columns, tokenizer, dataclasses.replace(cfg, text_columns=list(columns), template=""))


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
    return pd.DataFrame({"excerpt": ["the cat", "a dog"], "level": ["A", "B"], "word": ["red", "blue"]})


def template_rows(frame, tokenizer, template, **settings):
    """Rows of ids of a frame whose tokens are added first, as training does."""
    cfg = ku.Config(template=template, **settings)
    ku._TextReader(tokenizer, cfg).add_tokens(frame)
    return rows_of(ku._tokenize(frame, tokenizer, cfg))


@pytest.mark.parametrize(
    "template, words",
    [
        ("big hat {excerpt}", "big hat the cat"),
        ("{excerpt} big hat", "the cat big hat"),
        ("{word} hat {word} {excerpt}", "red hat red the cat"),
        ("{excerpt} on {excerpt}", "the cat on the cat"),
        ("{word}{excerpt}", "red the cat"),
        ("  {excerpt}  on   the {word} ", "the cat on the red"),
        ("{excerpt}", "the cat"),
    ],
)
def test_a_template_says_what_stands_where_in_a_row(template, words, tokenizer):
    assert template_rows(levels(), tokenizer, template)[0] == [BOS, *ids_of(words), EOS]


def test_each_column_of_a_template_is_that_of_its_name_whatever_the_name(tokenizer):
    names = ["full text", "a[0]", "q: 1!", "x.y"]
    frame = pd.DataFrame([WORDS[:4]], columns=names)
    rows = template_rows(frame, tokenizer, "".join(f"{{{n}}}" for n in reversed(names)), text_columns=names)
    assert rows == [[BOS, *reversed(ALL_IDS[:4]), EOS]]


def test_braces_that_hold_no_name_and_braces_in_the_data_are_text(tokenizer):
    frame = pd.DataFrame({"excerpt": ["the {word} cat"], "word": ["red"]})
    cfg = ku.Config(template="{} } {{excerpt}} {")
    assert [pieces[1] for pieces in cfg.segments] == ["excerpt"]
    (row,) = rows_of(ku._tokenize(frame, tokenizer, cfg))
    assert [i for i in row if i != UNK] == [BOS, *ids_of("the cat"), EOS]


def test_brackets_of_a_template_become_tokens_and_those_around_a_column_one_for_each_of_its_values(tokenizer):
    n = len(tokenizer)
    frame = pd.concat([levels(), levels()])
    rows = template_rows(frame, tokenizer, "[{level}] [TEXT]{excerpt}[END]")
    added = {word: tokenizer.convert_tokens_to_ids(word) for word in ("[A]", "[B]", "[END]", "[TEXT]")}
    assert list(added.values()) == [n, n + 1, n + 2, n + 3] and len(tokenizer) == n + 4
    for row, level, text in zip(rows, "[A] [B]".split() * 2, ["the cat", "a dog"] * 2, strict=True):
        assert row == [BOS, added[level], added["[TEXT]"], *ids_of(text), added["[END]"], EOS]


def test_what_stands_in_the_data_makes_no_token_and_is_none(tokenizer):
    frame = pd.DataFrame({"excerpt": ["the [TEXT] cat [12] <s> </s>"] * 2, "level": ["[A]", "[12]"]})
    n = len(tokenizer)
    rows = template_rows(frame, tokenizer, "[TEXT] {level} {excerpt}")
    assert len(tokenizer) == n + 1
    for row in rows:
        assert row[:2] == [BOS, n] and row[-1] == EOS
        assert {BOS, EOS, n}.isdisjoint(row[2:-1])


def test_a_token_that_the_tokenizer_has_is_that_token_where_the_template_names_it(tokenizer):
    n = len(tokenizer)
    rows = template_rows(levels(), tokenizer, "{excerpt}</s>{word}<s>")
    assert rows[0] == [BOS, *ids_of("the cat"), EOS, *ids_of("red"), BOS, EOS] and len(tokenizer) == n


def test_a_value_that_training_never_saw_is_read_as_text(tokenizer):
    cfg = ku.Config(template="[{word}] {excerpt}")
    reader = ku._TextReader(tokenizer, cfg)
    reader.add_tokens(levels())
    other = levels().assign(word=["red", "hat"])
    assert reader.new_tokens(other) == ["[hat]"]
    known, new = rows_of(ku._tokenize(other, tokenizer, cfg))
    assert known == [BOS, tokenizer.convert_tokens_to_ids("[red]"), *ids_of("the cat"), EOS]
    assert new == [BOS, UNK, *ids_of("hat"), UNK, *ids_of("a dog"), EOS]


def test_a_value_that_spells_a_special_token_is_text(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    (row,) = template_rows(levels()[:1].assign(word="MASK"), tokenizer, "[{word}] {excerpt}")
    assert tokenizer.mask_token_id not in row


def test_new_tokens_get_their_ids_in_alphabetical_order_and_are_special(tokenizer):
    words, n = [f"[{letter}]" for letter in "zyxwvutsrqponmlkjihgfedcba"], len(tokenizer)
    template_rows(levels(), tokenizer, " ".join([*words, "{excerpt}"]))
    assert tokenizer.convert_tokens_to_ids(sorted(words)) == list(range(n, n + 26))
    assert all(tokenizer.added_tokens_decoder[i].special for i in range(n, n + 26))


def test_tokens_that_the_tokenizer_has_are_not_added_again(tokenizer):
    reader = ku._TextReader(tokenizer, ku.Config(template="[{level}] {excerpt}"))
    assert reader.add_tokens(levels()) == ["[A]", "[B]"]
    n = len(tokenizer)
    assert reader.add_tokens(levels()) == [] and len(tokenizer) == n


def test_the_same_new_tokens_get_the_same_ids_whatever_the_row_order():
    ids = []
    for frame in (levels(), levels().iloc[::-1]):
        tokenizer = make_tokenizer()
        template_rows(frame, tokenizer, "[{level}] {excerpt}")
        ids.append(tokenizer.convert_tokens_to_ids(["[A]", "[B]"]))
    assert ids[0] == ids[1]


def test_a_column_of_too_many_values_in_brackets_is_refused_with_their_number(tokenizer):
    frame = pd.DataFrame({"excerpt": "a", "key": [str(i) for i in range(1001)]})
    with pytest.raises(ku.ConfigError, match="1001 new tokens, such as"):
        template_rows(frame, tokenizer, "[{key}] {excerpt}")


def test_new_tokens_outlive_saving_the_tokenizer(tokenizer, tmp_path):
    frame = levels().assign(excerpt=["the\ncat", "a dog [A]"])
    template, settings = "[{level}] {excerpt}", dict(keep_newlines=True)
    expected = template_rows(frame, tokenizer, template, **settings)
    assert tokenizer.convert_tokens_to_ids("[NEWLINE]") in expected[0]
    tokenizer.save_pretrained(tmp_path)
    cfg = ku.Config(template=template, **settings)
    assert rows_of(ku._tokenize(frame, ku._load_tokenizer(tmp_path), cfg)) == expected


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(template="{word} {excerpts}"), "template must hold {excerpt}"),
        (dict(template="no place"), "template must hold {excerpt}"),
        (dict(template="[{excerpt}]"), "template must hold {excerpt}, not in brackets"),
        (dict(template="{excerpt} {b}", text_columns="a,b"), "template must hold {a}"),
        (dict(template="{excerpt} {target}"), "template must not hold target"),
        (dict(truncation="head,tail"), "truncation has 2 values; the texts are excerpt"),
        (dict(truncation="head,tail", text_columns="a,b,c"), "the texts are a, b, c"),
        (dict(truncation="head,tail,tail", template="[{a} {b}] {excerpt}"), "the texts are [a b], excerpt"),
        (dict(truncation="head,middle", text_columns="a,b"), "truncation must be one of head, tail, head_tail"),
    ],
)
def test_a_template_or_truncation_that_does_not_fit_is_an_error_that_says_what_does(settings, problem):
    with pytest.raises(ku.ConfigError, match=re.escape(problem)):
        ku.Config(**settings)


def test_the_columns_of_the_input_are_the_texts_and_then_those_that_the_template_adds():
    cfg = ku.Config(template="[{genre} {year}] {b} {note} {a} {b}", text_columns="a,b")
    assert cfg.input_columns == ["a", "b", "genre", "year", "note"]


# ---------------------------------------------------------------------------------------
# Several texts and the room they share


@pytest.mark.parametrize(
    "pair, ids, token_types",
    [
        ("<s> $A </s> $B:1 </s>:1", [BOS, 4, EOS, 5, EOS, 6, EOS], [0, 0, 0, 1, 1, 1, 1]),
        ("<s> $A </s> </s> $B </s>", [BOS, 4, EOS, EOS, 5, EOS, EOS, 6, EOS], [0] * 9),
        ("$A </s> $B:1 </s>:1 <s>:2", [4, EOS, 5, EOS, 6, EOS, BOS], [0, 0, 1, 1, 1, 1, 2]),
        ("$A $B </s>", [4, 5, 6, EOS], [0, 0, 0, 0]),
    ],
)
def test_further_texts_are_set_off_and_typed_as_the_second_of_a_pair(pair, ids, token_types):
    tokens = tokens_of(["the"], tokenizer_with("$A", pair), ku.Config(), ["a"], ["cat"])
    assert rows_of(tokens) == [ids] and types_of(tokens) == [token_types]


def test_empty_texts_among_several_keep_their_separators(tokenizer):
    rows = rows_of(tokens_of(["the", "", ""], tokenizer, ku.Config(), ["", "a", ""], ["cat", "", ""]))
    assert rows == [[BOS, 4, EOS, EOS, 6, EOS], [BOS, EOS, 5, EOS, EOS], [BOS, EOS, EOS, EOS]]


def fair_rooms(lengths, room):
    """What is left where the longest text loses a token, of equally long ones the last, until all fit."""
    rooms = list(lengths)
    while sum(rooms) > room:
        longest = max(rooms)
        rooms[len(rooms) - 1 - rooms[::-1].index(longest)] -= 1
    return rooms


def test_long_texts_share_the_room_and_short_ones_leave_theirs_to_them():
    rng = np.random.default_rng(0)
    for n_texts in range(1, 7):
        for _ in range(100):
            lengths = rng.integers(0, 30, n_texts).tolist()
            room = int(rng.integers(n_texts, 60))
            assert ku._share_room(lengths, room) == fair_rooms(lengths, room)


@pytest.mark.parametrize("max_length", [11, 14, 15])
def test_each_of_several_long_texts_is_cut_in_its_own_way_to_its_share(max_length, tokenizer):
    cfg = ku.Config(max_length=max_length, truncation="head,tail,head_tail", text_columns="text0,text1,text2")
    (row,) = rows_of(tokens_of([ALL_WORDS], tokenizer, cfg, [ALL_WORDS], [ALL_WORDS]))
    first, second, third = fair_rooms([len(WORDS)] * 3, max_length - 4)
    head = third // 4
    last = [*ALL_IDS[:head], *ALL_IDS[head - third :]]
    assert row == [BOS, *ALL_IDS[:first], EOS, *ALL_IDS[-second:], EOS, *last, EOS]


def test_literals_are_never_cut_and_every_segment_keeps_a_share(tokenizer):
    frame = pd.DataFrame({"excerpt": [ALL_WORDS, "red"], "word": [ALL_WORDS] * 2})
    rows = template_rows(frame, tokenizer, "on the {word} and so {excerpt}", max_length=14)
    words, so = ALL_IDS, [UNK, UNK]
    assert rows[0] == [BOS, *ids_of("on the"), *words[:4], *so, *words[:4], EOS]
    assert rows[1] == [BOS, *ids_of("on the"), *words[:7], *so, *ids_of("red"), EOS]


@pytest.mark.parametrize("template", ["", "[{a}] x {b} {c} [Y] {excerpt} {b}"])
@pytest.mark.parametrize("max_length", [8, 9, 64])
def test_no_row_is_too_long_whatever_column_holds_ten_thousand_words(template, max_length, tokenizer):
    long, columns = "the cat " * 5000, ["a", "b", "c", "excerpt"]
    rows = [dict.fromkeys(columns, "cat"), dict.fromkeys(columns, long), dict.fromkeys(columns, "")]
    rows += [dict.fromkeys(columns, "cat") | {name: long} for name in columns]
    cfg = ku.Config(template=template, text_columns=columns[::-1] if not template else "excerpt", max_length=max_length)
    ku._TextReader(tokenizer, cfg).add_tokens(pd.DataFrame(rows[:1]))
    if max_length == 8:
        with pytest.raises(ku.ConfigError, match=r"max_length 8: . tokens around . texts leave no room"):
            ku._tokenize(pd.DataFrame(rows), tokenizer, cfg)
        return
    lengths = ku._tokenize(pd.DataFrame(rows), tokenizer, cfg).lengths
    assert lengths.max() == max_length and lengths.min() > 0
    assert (lengths[3:] == max_length).all()


def test_lengths_are_told_before_the_cut(tokenizer):
    texts = ["the " * n for n in range(1, 102)]
    tokens = tokens_of(texts, tokenizer, ku.Config(max_length=53))
    assert tokens.full_lengths.tolist() == list(range(3, 104)) and tokens.lengths.max() == 53
    line = tokens.describe_lengths()
    assert line == "53 tokens a text (median), 95% have at most 98; 49.5% are cut to max_length"


# ---------------------------------------------------------------------------------------
# Special tokens and line breaks in texts


def spelled(kind):
    """A tokenizer that knows the characters of its special tokens, with a token to be added to its left."""
    if kind == "characters":  # a slow one
        return transformers.ByT5Tokenizer()
    tokenizer = subword_tokenizer(kind)
    tokenizer.add_special_tokens({"mask_token": tokenizers.AddedToken("<mask>", lstrip=True)})
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "marks", "pieces", "characters"])
def test_special_tokens_that_are_written_in_a_text_stay_text(kind):
    tokenizer = make_pieces() if kind == "pieces" else spelled(kind)
    tokenizer.add_tokens(["[NEW]"], special_tokens=True)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    text = "a cat <mask> sat</s> <pad> on [NEW]<s><s> mat"
    (row,) = rows_of(tokens_of([text], tokenizer, ku.Config()))
    (plain,) = rows_of(tokens_of(["a cat sat on mat"], tokenizer, ku.Config()))
    around = [i for i in plain if i in special]
    assert [i for i in row if i in special] == around and len(row) > len(plain)
    (same,) = rows_of(tokens_of(["a cat sat on mat"], tokenizer, ku.Config()))
    assert same == plain == tokenizer("a cat sat on mat")["input_ids"]


@pytest.mark.parametrize("text, token", [("a cat <unk> sat", "<unk>"), ("<mask> a cat", "<mask>")])
def test_a_special_token_in_a_text_is_the_pieces_of_its_characters(text, token):
    tokenizer = spelled("bytes")
    (row,) = rows_of(tokens_of([text], tokenizer, ku.Config()))
    assert tokenizer.convert_tokens_to_ids(token) not in row
    plain = tokens_of([text.replace("<", "").replace(">", "")], tokenizer, ku.Config())  # it knows neither of the two
    assert [row] == rows_of(plain)


def test_encoding_texts_leaves_the_tokenizer_as_it_was():
    tokenizer = spelled("bytes")
    before = tokenizer("a cat <mask> sat</s>")["input_ids"]
    tokens_of(["a cat <mask>"], tokenizer, ku.Config())
    assert tokenizer("a cat <mask> sat</s>")["input_ids"] == before


def test_texts_with_special_tokens_and_with_line_breaks_are_counted(tokenizer):
    frame = pd.DataFrame({"excerpt": ["a </s> <s>", "the\ncat", "a\r\ndog <s>", "red"]})
    notes = list(ku._TextReader(tokenizer, ku.Config()).notes(frame))
    assert len(notes) == 2 and notes[0].startswith("2 texts hold special tokens")
    assert notes[1].startswith("2 texts hold line breaks") and "keep_newlines" in notes[1]
    kept = ku._TextReader(tokenizer, ku.Config(keep_newlines=True)).notes(frame)
    assert len(list(kept)) == 1 and not list(ku._TextReader(tokenizer, ku.Config()).notes(frame[3:]))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028", "\x85"])
def test_a_line_break_that_is_kept_is_one_token_of_its_own(end, tokenizer):
    frame = pd.DataFrame({"excerpt": [f"the cat{end}{end}sat [NEWLINE]{end}", end]})
    n = len(tokenizer)
    rows = template_rows(frame, tokenizer, "{excerpt}", keep_newlines=True)
    assert tokenizer.convert_tokens_to_ids("[NEWLINE]") == n and len(tokenizer) == n + 1
    assert [i for i in rows[0] if i != UNK] == [BOS, *ids_of("the cat"), n, n, *ids_of("sat"), n, EOS]
    assert rows[1] == [BOS, n, EOS]


def test_a_tokenizer_that_keeps_line_breaks_gets_no_token_for_them():
    tokenizer = subword_tokenizer("bytes")
    n = len(tokenizer)
    frame = pd.DataFrame({"excerpt": ["the cat\r\nsat", "the cat\nsat"]})
    rows = template_rows(frame, tokenizer, "{excerpt}", keep_newlines=True)
    assert len(tokenizer) == n and rows[0] == rows[1] == tokenizer("the cat\nsat")["input_ids"]
    assert not list(ku._TextReader(tokenizer, ku.Config()).notes(frame))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_embeddings_grow_by_the_new_words_and_keep_the_old_rows(backbone_folder, kind):
    folder = backbone_folder(kind)
    cfg = ku.Config(template=" ".join([f"[{i}]" for i in range(10)] + ["{excerpt}"]), max_length=32)
    tokenizer = ku._load_tokenizer(folder)
    ku._TextReader(tokenizer, cfg).add_tokens(levels())
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
        self.predict = lambda logits: logits
        self.pool_windows = lambda logits, n_windows: logits

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
@pytest.mark.parametrize("template", ["[new] {excerpt}", "{excerpt} [new]", "[new]{excerpt}"])
def test_the_spaces_around_a_text_of_a_template_are_no_tokens(template, kind):
    tokenizer = subword_tokenizer(kind)
    frame = pd.DataFrame({"excerpt": ["the cat sat"]})
    plain = rows_of(tokens_of(["the cat sat"], tokenizer, ku.Config()))[0]
    (row,) = template_rows(frame, tokenizer, template)
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
