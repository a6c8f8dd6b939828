"""Text to tokens and back, as published language models do: byte-level BPE of a GGUF file, and WordPiece.

What the `tokenizers` library computes; here its parts are put together from what a checkpoint's file says.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zoo.weights.errors import WeightsFileError
from zoo.weights.gguf_file import open_gguf

_SPECIAL = 3  # GGUF's token type of control tokens
_PRE_TOKENIZERS = ("smollm", "gpt-2")  # tokenizer.ggml.pre that are known here


class ByteLevelTokenizer:
    """GPT-2's byte-level BPE: any text to tokens and back without loss, if the vocabulary has all 256 bytes.

    Bytes that it lacks are left out, as by the library that published models use. SmolLM2's lacks 21, which occur in
    six control characters and in the first characters of some planes beyond those of living scripts.

    Attributes:
      tokens: by id.
      end: id of the token that ends a turn or text, or None.
      template: Jinja source of the chat's layout, or None.

    Raises:
      ValueError: a token occurs twice or does not exist, or a merge does not make a token of two others.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str],
        special: Sequence[int] = (),
        *,
        split_digits: bool = False,
        end: int | None = None,
        template: str | None = None,
    ) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ModuleNotFoundError("tokenizing needs the tokenizers package: pip install 'zoo[gguf]'") from None
        self.tokens, self.end, self.template = list(tokens), end, template
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if len(vocabulary) < len(self.tokens):
            raise ValueError(f"{len(self.tokens) - len(vocabulary)} of {len(self.tokens)} tokens occur twice")
        for index in (*special, *(() if end is None else (end,))):
            if not 0 <= index < len(self.tokens):
                raise ValueError(f"token {index} does not exist: there are {len(self.tokens)}")
        pairs = []
        for merge in merges:
            left, space, right = merge.partition(" ")
            if not (space and left in vocabulary and right in vocabulary and left + right in vocabulary):
                raise ValueError(f"merge {merge!r} is not two tokens with a space between that make a third")
            pairs.append((left, right))
        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [tokenizers.pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*digits, byte_level])
        self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
        added = [tokenizers.AddedToken(self.tokens[index], special=True, normalized=False) for index in special]
        self._tokenizer.add_special_tokens(added)

    @classmethod
    def from_gguf(cls, path: str | pathlib.Path) -> ByteLevelTokenizer:
        """The tokenizer that a GGUF file carries.

        Raises:
          WeightsFileError: the file is damaged, or its tokenizer of a kind that is not known here.
        """
        metadata, _ = open_gguf(path)
        kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
            raise WeightsFileError(
                f"{path} has a tokenizer {kind!r} ({pre!r}); read are byte-level ones, {', '.join(_PRE_TOKENIZERS)}"
            )
        tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
        kinds = np.asarray(metadata.get("tokenizer.ggml.token_type"))
        end, template = metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.chat_template")
        try:
            if not (isinstance(tokens, list) and isinstance(merges, list) and kinds.shape == (len(tokens),)):
                raise ValueError("tokens and merges must be lists of strings, token_type as long as the tokens")
            if not isinstance(end, int | None) or not isinstance(template, str | None):
                raise ValueError(
                    f"eos_token_id must be an integer and chat_template a string, got {end!r}, {template!r}"
                )
            special = np.flatnonzero(kinds == _SPECIAL).tolist()
            return cls(tokens, merges, special, split_digits=pre == "smollm", end=end, template=template)
        except ValueError as error:
            raise WeightsFileError(f"{path} has a damaged tokenizer: {error}") from None

    @staticmethod
    def byte_alphabet() -> list[str]:
        """The 256 characters that stand for bytes: the smallest vocabulary that takes any text."""
        import tokenizers

        return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; names of special tokens in it become these tokens. None is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special ones included; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """The text piece by piece as ids come; a piece never ends within a character."""
        waiting: list[int] = []
        for index in ids:
            waiting.append(index)
            text = self.decode(waiting)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text
                waiting = []
        if waiting:
            yield self.decode(waiting)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The layout of a conversation, as the checkpoint's own template writes it.

        Args:
          messages: with "role" ("system", "user", "assistant") and "content".
          add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
          ValueError: there is no template, a message lacks its two entries, or the template refuses them.
        """
        if self.template is None:
            raise ValueError("this tokenizer has no chat template")
        for message in messages:
            if not {"role", "content"} <= message.keys():
                raise ValueError(f"a message has a role and a content, got {dict(message)!r}")
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            template = environment.from_string(self.template)
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None


class WordPieceTokenizer:
    """BERT's lower-casing WordPiece, from a `tokenizer.json` of the tokenizers library."""

    def __init__(self, path: str | pathlib.Path) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ModuleNotFoundError("tokenizing needs the tokenizers package: pip install 'zoo[gguf]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for damaged files
            raise WeightsFileError(f"{path} is damaged, or no tokenizer.json: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, texts: Sequence[str], *, max_length: int = 256) -> dict[str, Any]:
        """A batch padded on the right.

        Args:
          texts: one or more.
          max_length: tokens of a text, [CLS] and [SEP] included; what is more is cut off.

        Returns:
          "tokens" int32 and "valid" bool, (batch, longest).
        """
        if not texts or max_length < 3:
            raise ValueError(f"there must be a text and max_length at least 3, got {len(texts)} and {max_length}")
        rows = []
        for encoding in self._tokenizer.encode_batch(list(texts)):
            ids = encoding.ids
            rows.append(ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]])
        longest = max(map(len, rows))
        tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
        return {"tokens": tokens, "valid": np.arange(longest) < np.array([len(row) for row in rows])[:, None]}
