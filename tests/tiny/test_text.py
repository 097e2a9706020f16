"""Prompts become the ids of the training captions; anything else a user types is survived and explained."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from rectiflow.errors import NodeInputError
from rectiflow.tiny.clip import TinyCLIP, TinyTextEncoder
from rectiflow.tiny.text import COLOURS, STYLES, Vocabulary
from rectiflow.tiny.weights import load_weights


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load()


@pytest.fixture(scope="module")
def clip(vocabulary) -> TinyCLIP:
    weights = load_weights()
    return TinyCLIP(TinyTextEncoder(weights.text_embedding, weights.style_embedding), vocabulary)


# Ids counted by hand in vocabulary.json: noto 2, twemoji 1, on 3, white 4, blue 6, green 7, apple 44, cat 10, jack o lantern 87 88 89.
@pytest.mark.parametrize(
    ("text", "ids", "style"),
    [
        ("noto cat on blue", (2, 10, 3, 6, 0, 0, 0, 0), 1),
        ("twemoji jack o lantern on white", (1, 87, 88, 89, 3, 4, 0, 0), 0),
        ("noto drum with drumsticks on black", (2, 116, 117, 118, 3, 9, 0, 0), 1),
        ("noto green apple on red", (2, 7, 44, 3, 5, 0, 0, 0), 1),
        ("noto green apple on green", (2, 7, 44, 3, 7, 0, 0, 0), 1),
        ("", (0,) * 8, 2),
        ("   \n\t", (0,) * 8, 2),
    ],
)
def test_captions_become_the_trained_ids(vocabulary, text, ids, style):
    prompt = vocabulary.parse(text)
    assert (prompt.ids, prompt.style, prompt.unknown) == (ids, style, ())


@pytest.mark.parametrize(
    "text",
    [
        "cat on blue noto",
        "on blue cat noto",
        "Noto CAT On Blue!",
        "(noto:1.2) a (cat:0.8), on the blue",
        "noto blue cat",
        "noto cat on blue blue",
        "ｎｏｔｏ cat on blue",
    ],
)
def test_order_case_articles_and_emphasis_do_not_matter(vocabulary, text):
    assert vocabulary.parse(text).text == "noto cat on blue"
    assert vocabulary.complaint(vocabulary.parse(text)) == ""


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("fox", "noto fox on white"), ("twemoji fox", "twemoji fox on white"), ("fox on red", "noto fox on red")],
)
def test_a_thing_alone_gets_a_style_and_a_background(vocabulary, text, canonical):
    assert vocabulary.parse(text).text == canonical


@pytest.mark.parametrize(("text", "canonical"), [("twemoji", "twemoji"), ("on black", "on black"), ("red", "on red")])
def test_without_a_thing_nothing_is_added(vocabulary, text, canonical):
    assert vocabulary.parse(text).text == canonical


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("ice cream", "noto icecream on white"), ("hot dog", "noto hotdog on white"), ("jack-o-lantern", "noto jack o lantern on white")],
)
def test_compounds_written_apart_or_hyphenated(vocabulary, text, canonical):
    assert vocabulary.parse(text).text == canonical


def test_every_listed_thing_is_read_whole_in_every_style_and_colour(vocabulary):
    seen = set()
    for thing in vocabulary.things:
        for style in STYLES:
            for colour in COLOURS:
                prompt = vocabulary.parse(f"{style} {thing} on {colour}")
                assert prompt.text == f"{style} {thing} on {colour}"
                assert not prompt.unknown and not prompt.surplus
                seen.add(prompt.ids)
    assert len(seen) == len(vocabulary.things) * len(STYLES) * len(COLOURS)
    assert len(vocabulary.things) == 125


def test_unknown_words_are_left_out_and_the_nearest_are_named(clip, caplog):
    with caplog.at_level(logging.WARNING):
        tokens = clip.tokenize("noto kat and zzzzqq on blue")
    assert [token for token, _ in tokens["tiny"][0]] == [2, 3, 6, 0, 0, 0, 0, 0]
    message = caplog.text
    assert "'kat' is unknown (nearest: cat" in message
    assert "'zzzzqq' is unknown and nothing is near it" in message
    assert "read as 'noto on blue'" in message


@pytest.mark.parametrize("text", ["cat on purple", "cat on a purple", "on purple noto cat"])
def test_an_unknown_background_is_answered_with_the_backgrounds(vocabulary, text):
    prompt = vocabulary.parse(text)
    assert prompt.text == "noto cat on white"
    assert "'purple' is no background (there are white, red, blue" in vocabulary.complaint(prompt)


def test_a_fifth_word_and_a_second_colour_are_reported(vocabulary):
    prompt = vocabulary.parse("cat dog fox bear panda on blue on red")
    assert prompt.text == "noto cat dog fox bear on blue"
    assert prompt.surplus == ("panda", "red")
    assert "'panda', 'red' left out" in vocabulary.complaint(prompt)


def test_any_text_gives_eight_known_ids(vocabulary):
    """Fuzz: characters of every kind, and word salads out of the vocabulary itself."""
    source = random.Random(7)
    words = list(vocabulary.tokens) + ["<pad>", ":", "(", "1.5)", "\x00", "é", "猫", "🐱", "a" * 3000]
    for round_number in range(1500):
        if round_number % 2:
            planes = ((0, 128), (0, 0xD800), (0xE000, 0x110000))  # ASCII, the basic plane below the surrogates, everything above
            text = "".join(chr(source.randrange(*source.choice(planes))) for _ in range(40))
        else:
            text = " ".join(source.choice(words) for _ in range(source.randrange(30)))
        prompt = vocabulary.parse(text)
        assert len(prompt.ids) == 8
        assert all(0 <= token < len(vocabulary.tokens) for token in prompt.ids)
        assert prompt.style == next((token - 1 for token in prompt.ids if token in (1, 2)), 2)
        assert vocabulary.parse(prompt.text).ids == prompt.ids  # the canonical text reads as itself


def test_conditioning_is_the_tables_rows(clip):
    weights = load_weights()
    ((context, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize("noto cat on blue"), add_dict={"guidance": 1.0})
    torch.testing.assert_close(context, weights.text_embedding[torch.tensor([[2, 10, 3, 6, 0, 0, 0, 0]])], atol=0, rtol=0)
    torch.testing.assert_close(extra["pooled_output"], weights.style_embedding[1:2], atol=0, rtol=0)
    assert extra["guidance"] == 1.0
    ((_, empty),) = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    torch.testing.assert_close(empty["pooled_output"], weights.style_embedding[2:3], atol=0, rtol=0)


def test_the_forms_of_an_encoding_agree(clip):
    tokens = clip.tokenize("twemoji rocket on black")
    context, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    named = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    assert torch.equal(context, clip.encode_from_tokens(tokens)) and torch.equal(context, named["cond"])
    assert torch.equal(pooled, named["pooled_output"])
    triples = clip.tokenize("twemoji rocket on black", return_word_ids=True)
    assert [entry[2] for entry in triples["tiny"][0]] == [1, 2, 3, 4, 0, 0, 0, 0]
    assert torch.equal(clip.encode_from_tokens(triples), context)


def test_a_clone_is_independent(clip):
    copy = clip.clone()
    copy.clip_layer(-2)
    copy.set_tokenizer_option("min_length", 1)
    assert clip.layer_idx is None and clip.tokenizer_options == {}
    assert copy.cond_stage_model is clip.cond_stage_model


def test_tokens_of_another_encoder_are_refused(clip):
    with pytest.raises(NodeInputError, match="tiny"):
        clip.encode_from_tokens({"t5xxl": [[(1, 1.0)]]})
