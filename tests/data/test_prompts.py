import numpy as np
import pytest

from zoo.data import prompts


def test_answers_are_learned_and_whole_texts_where_asked():
    batch = prompts.rows(["Task<AB> [C]", "Sequence<AB> []"], 20, "Sequence")
    assert batch["weights"].sum(1).tolist() == [4, 15]
    assert prompts.decode(batch["tokens"][0]) == "Task<AB> [C]"
    with pytest.raises(ValueError, match="longer than 5"):
        prompts.rows(["Task<AB> [C]"], 5)


def test_answers_are_read_from_brackets():
    assert prompts.answer("Task<AB> [1.00,2.00] [3]") == "1.00,2.00"
    assert prompts.answer("Task<AB> [1.00") is None
    np.testing.assert_array_equal(prompts.parse_numbers("T<> [0.50,-1.00]", 2), [0.5, -1])
    assert prompts.parse_numbers("T<> [0.50,x]", 2) is None and prompts.parse_numbers("T<> [0.50]", 2) is None


def test_prompts_are_ascii():
    with pytest.raises(ValueError, match="ASCII"):
        prompts.encode("µ")
