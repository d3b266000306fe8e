"""The tokenizer that a GGUF file describes, rebuilt with the `tokenizers` library."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# How a text is cut into words before byte-pair encoding merges within each, by the value of
# `tokenizer.ggml.pre`. These are the models' own regular expressions.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4O = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _SPACES,
    )
)
_QWEN2 = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        _SPACES,
    )
)
WORDS = {"gpt-2": _GPT2, "qwen2": _QWEN2, "gpt-4o": _GPT4O}

_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


class Tokenizer:
    """Text to token ids and back.

    Args:
      metadata: of a GGUF file with a byte-level BPE vocabulary (`tokenizer.ggml.model` = "gpt2").

    Attributes:
      stop_tokens: ids of the tokens that end a text.

    Raises:
      ValueError: the vocabulary is of another kind; the message names it.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        # Here, since a model without a vocabulary needs no tokenizer.
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        self._metadata = metadata
        kind, pre = self._key("model", "none"), self._key("pre", "gpt-2")
        if kind != "gpt2":
            raise ValueError(f"tokenizer.ggml.model is {kind!r}; this example reads 'gpt2' alone.")
        if pre not in WORDS:
            raise ValueError(f"tokenizer.ggml.pre is {pre!r}, not one of {', '.join(WORDS)}.")
        self._tokens = self._key("tokens")
        self._library = Library(
            models.BPE(
                vocab={token: i for i, token in enumerate(self._tokens)},
                merges=[tuple(merge.split(" ", 1)) for merge in self._key("merges")],
            )
        )
        self._library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._library.decoder = decoders.ByteLevel()
        kinds = self._key("token_type", ())
        self._library.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(self._tokens, kinds, strict=False)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        self.stop_tokens = sorted(
            {self._key(name) for name in names if self._key(name) is not None}
        )

    def _key(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Names of control tokens in it, like "<|im_end|>", become those."""
        ids = self._library.encode(text).ids
        bos = self._key("bos_token_id")
        wanted = self._key("add_bos_token", False) and bos is not None
        return [bos, *ids] if wanted and ids[:1] != [bos] else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without control tokens."""
        return self._library.decode(list(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text piece by piece; a character that several tokens make comes in one piece."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        seen, length = [], 0
        for i in ids:
            seen.append(int(i))
            piece = stream.step(self._library, seen[-1])
            if piece is not None:
                length += len(piece)
                yield piece
        # What the stream holds back: the beginning of a character that never came.
        yield self.decode(seen)[length:]

    def chat(self, message: str) -> str:
        """A user's message in the form that the model was trained on, by the file's template."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self._metadata.get("tokenizer.chat_template")
        if template is None:
            raise ValueError("The file has no tokenizer.chat_template.")
        bos, eos = self._key("bos_token_id"), self._key("eos_token_id")
        return (
            ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            .from_string(template)
            .render(
                messages=[{"role": "user", "content": message}],
                add_generation_prompt=True,
                bos_token="" if bos is None else self._tokens[bos],
                eos_token="" if eos is None else self._tokens[eos],
                strftime_now=time.strftime,
            )
        )
