"""Indirect object identification and Colored Objects."""

import numpy as np
import pytest

from experiments.circuit_reuse import tiny_tokenizer
from zoo.data import colored_objects, ioi


def test_sentences_are_read_back():
    for prompt in ioi.generate(200, seed=3):
        again = ioi.parse(prompt.text)
        assert again.text == prompt.text and again.answers == prompt.answers and again.order == prompt.order
    orders = [prompt.order for prompt in ioi.generate(10)]
    assert orders.count("ABBA") == 5 and {p.order for p in ioi.generate(5, kind="BABA")} == {"BABA"}


def test_positions_are_those_of_the_names():
    tokenizer = tiny_tokenizer()
    for prompt in ioi.generate(20, tokenizer):
        ids, places = tokenizer.encode(prompt.text), prompt.token_positions(tokenizer)
        assert [tokenizer.decode([ids[places[role]]]) for role in ("IO", "S1", "S2")] == [
            f" {prompt.io}", *[f" {prompt.subject}"] * 2
        ] or prompt.text.startswith((prompt.io, prompt.subject))  # fmt: skip
        assert places["END"] == len(ids) - 1


@pytest.mark.parametrize("change", ioi.FLIPS)
def test_flips_replace_one_mention(change):
    rng = np.random.default_rng(0)
    for prompt in ioi.generate(20):
        flipped = ioi.flip(prompt, change, rng=rng)
        differing = [a != b for a, b in zip(prompt.names, flipped.names, strict=True)]
        first = ("S1", "IO") if prompt.order == "BABA" else ("IO", "S1")
        assert differing == [mention == change[0] for mention in (*first, "S2")]
        assert flipped.answers == prompt.answers
        assert (flipped.names[differing.index(True)] == prompt.io) == (change[1] == "IO")


def test_questions_are_read_back():
    for count in (2, 3, 5):
        for prompt in colored_objects.generate(50, shots=count - 2, things=count, seed=1):
            assert colored_objects.parse(prompt.text) == prompt
    example = colored_objects.Example("desk", "I see", ("cup", "pen"), ("orange", "red"), 1)
    assert example.question == "Q: On the desk, I see an orange cup and a red pen. What color is the pen?\nA:"
    assert (example.label, example.wrong) == (" Red", (" Orange",))


def test_pairs_differ_in_one_thing():
    rng = np.random.default_rng(0)
    for prompt in colored_objects.generate(20):
        other = colored_objects.min_pairs(prompt, "object", rng=rng)
        assert other.label in prompt.test.wrong and other.test.objects == prompt.test.objects
        color = colored_objects.min_pairs(prompt, "color", rng=rng)
        assert color.label != prompt.label and color.test.wrong == prompt.test.wrong
        absent = colored_objects.min_pairs(prompt, "invalid", rng=rng)
        assert colored_objects.parse(absent.text).test.invalid_obj == absent.test.invalid_obj is not None


def test_colours_are_found_among_the_tokens():
    tokenizer = tiny_tokenizer()
    prompt = colored_objects.generate(1)[0]
    ids, marks = tokenizer.encode(prompt.text), prompt.color_positions(tokenizer)
    assert len(marks) == 7 and marks[3] == (prompt.shots[0].label, marks[3][1])
    assert tokenizer.decode([ids[marks[3][1]]]) == prompt.shots[0].label  # " Red" is one token
    assert [color for color, _ in marks[4:]] == [f" {color.capitalize()}" for color in prompt.test.colors]
    for color, place in marks:
        assert tokenizer.decode(ids[: place + 1]).lower().endswith(color.lower())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ioi.generate(0), "count must be positive"),
        (lambda: ioi.generate(1, kind="ABAB"), "kind 'ABAB'"),
        (lambda: ioi.generate(1, names=["Amy"]), "there are 1"),
        (lambda: ioi.parse("Then, Amy and Bob went home."), "no template"),
        (
            lambda: ioi.parse("After the lunch, Amy and Bob went to the store. Tom gave a ring to"),
            "one of two different",
        ),
        (lambda: ioi.flip(ioi.generate(1)[0], ("S2", "S1")), "change must be one of"),
        (lambda: ioi.flip(ioi.generate(1)[0], ("IO", "RAND")), "needs rng"),
        (lambda: colored_objects.generate(1, things=9), r"things in 2 \.\. 8"),
        (lambda: colored_objects.parse("What?"), "not a prompt"),
        (lambda: colored_objects.Example("desk", "I see", ("cup", "cup"), ("red", "blue"), 0), "at least two"),
        (lambda: colored_objects.Example("desk", "I see", ("cup", "pen"), ("red", "blue"), 2), r"in 0 \.\. 1"),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_wrong_answer_in_a_solved_example_is_an_error():
    prompt = colored_objects.generate(1)[0]
    text = prompt.text.replace(f"{prompt.shots[0].label}\n", f"{prompt.shots[0].wrong[0]}\n")
    with pytest.raises(ValueError, match="the text says"):
        colored_objects.parse(text)
