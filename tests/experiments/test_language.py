"""The language model's experiment and the chat, with the real checkpoint and a tiny network."""

import pytest

from experiments import chat, lm_backbone
from zoo import reports


def test_a_run_leaves_its_record(tmp_path):
    lm_backbone.run(lm_backbone.PRESETS["smoke"], tmp_path)
    result = reports.load_result(tmp_path / "result.json")
    assert result.preset == "smoke" and [claim.verdict for claim in result.claims] == ["not tested"] * 2
    assert (tmp_path / "figures" / "logit_lens.png").stat().st_size > 0


def test_chat_answers(capsys, tmp_path):
    config = chat.Config(prompt="What is the capital of France?", max_tokens=16)
    messages = chat.run(config, tmp_path)
    assert messages[-1] == {"role": "assistant", "content": "The capital of France is Paris."}
    assert "The capital of France is Paris.\n" in capsys.readouterr().out


def test_wrong_configs_say_so(tmp_path):
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        chat.Config(max_tokens=0)
    with pytest.raises(ValueError, match=r"top_p must be in"):
        chat.Config(top_p=2.0)
    with pytest.raises(FileNotFoundError, match=r"no mohicans_1\.txt in"):
        lm_backbone.run(lm_backbone.Config(data_dir=tmp_path), tmp_path)
    with pytest.raises(ValueError, match="must be positive"):
        lm_backbone.Config(repetitions=0)
