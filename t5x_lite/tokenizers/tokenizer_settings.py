# SPDX-License-Identifier: Apache-2.0
"""Settings of the tokenizer in a Hugging Face folder, from its .json files, every field checked."""

from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.config.checked import MOST_SENTINELS
from t5x_lite.utils import bounded_files
from t5x_lite.utils.bounded_files import UnreadableFileError

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
ENCODER_DECODERS = ("t5", "mt5", "umt5", "byt5", "t5gemma", "t5gemma2")
BART_LIKE = ("bart", "mbart", "m2m_100", "marian", "pegasus")
TOKEN_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


class TokenizerSettings(NamedTuple):
    """The .json files of a folder; {} stands for a file that is missing.

    Fields are checked when they are read: a value of another type is a ValueError.

    Attributes:
      folder: the folder.
      tokenizer: tokenizer_config.json, and what special_tokens_map.json adds to it.
      model: config.json.
      generation: generation_config.json.
      targets: the tokenizer of targets is meant, where it is another one.
    """

    folder: Path
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    generation: dict[str, Any]
    targets: bool = False

    def wrong(self, name: str, value: Any, wanted: str) -> ValueError:
        """The error for a field.

        Args:
          name: name of the field.
          value: its value.
          wanted: description of the values that it can have.
        """
        return ValueError(f"{self.folder}: {name} is {value!r:.80}, not {wanted}")

    @property
    def kind(self) -> str:
        """The tokenizer's class, without Fast."""
        named = self.tokenizer.get("tokenizer_class") or self.model.get("tokenizer_class") or ""
        if not isinstance(named, str):
            raise self.wrong("tokenizer_class", named, "a name")
        return named.removesuffix("Fast")

    @property
    def encodes(self) -> bool:
        """True if the model is an encoder-decoder."""
        value = self.model.get("is_encoder_decoder")
        return (
            self.model.get("model_type") in (*ENCODER_DECODERS, *BART_LIKE)
            if value is None
            else bool(value)
        )

    @property
    def ids(self) -> int | None:
        """Number of ids of the model."""
        return self.check_count(
            "vocab_size", self.model.get("vocab_size") or self.text.get("vocab_size")
        )

    @property
    def text(self) -> dict[str, Any]:
        """The part of config.json for the text decoder, where there are several parts."""
        part = self.model.get("text_config") or self.model.get("decoder") or {}
        if not isinstance(part, dict):
            raise self.wrong("a part of config.json", part, "an object")
        return part

    def extra_ids(self, default: int) -> int:
        """Number of sentinels that the tokenizer adds."""
        count = self.check_count("extra_ids", self.tokenizer.get("extra_ids", default))
        if count is None or count > MOST_SENTINELS:
            most = f"a number of sentinels, at most {MOST_SENTINELS:,}"
            raise self.wrong("extra_ids", count, most)
        return count

    def check_count(self, name: str, value: Any) -> Any:
        if value is None or (type(value) is int and 0 <= value < 10**7):
            return value
        raise self.wrong(name, value, "a number of ids")

    def name(self, role: str) -> str | None:
        """The tokenizer's name of its bos_token, eos_token ..."""
        return self.content(role, self.tokenizer.get(role))

    def content(self, role: str, token: Any) -> str | None:
        """A token's name: as it stands, or in the object that describes the token."""
        name = token.get("content") if isinstance(token, dict) else token
        if (name is None and token is None) or isinstance(name, str):
            return name
        raise self.wrong(role, token, "the name of a token")

    def token(self, role: str) -> int | None:
        """A field such as bos_token_id."""
        tokens = self.tokens(role)
        if len(tokens) > 1:
            raise self.wrong(role, tokens, "one id")
        return tokens[0] if tokens else None

    def tokens(self, role: str) -> list[int]:
        """A field that may have several ids, such as eos_token_id."""
        for values in (self.generation, self.model, self.text):
            tokens = values.get(role)
            if tokens is not None:
                tokens = tokens if isinstance(tokens, list) else [tokens]
                if not all(type(token) is int and token >= -1 for token in tokens):
                    raise self.wrong(role, tokens, "an id, or several")
                return [token for token in tokens if token >= 0]  # early Llamas have -1 for none
        return []

    def extra_tokens(self) -> list[str]:
        """Special tokens beside bos, eos and so on."""
        named = self.tokenizer.get("additional_special_tokens")
        named = named or self.tokenizer.get("extra_special_tokens") or []
        if not isinstance(named, dict | list):
            raise self.wrong("additional_special_tokens", named, "a list of tokens")
        named = named.values() if isinstance(named, dict) else named
        names = [self.content("additional_special_tokens", token) for token in named]
        return [name for name in names if name is not None]

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens that the files add to the tokenizer's own: content and flags, by id."""
        plain = read_optional_json(self.folder / "added_tokens.json")
        for token in plain.values():
            self.check_count("the id of an added token", -1 if token is None else token)
        listed = {token: {"content": name, "special": False} for name, token in plain.items()}
        added = self.tokenizer.get("added_tokens_decoder") or {}
        if not isinstance(added, dict) or not all(token.isdecimal() for token in added):
            raise self.wrong("added_tokens_decoder", added, "tokens by id")
        listed |= {int(token): each for token, each in added.items()}
        checked = {}
        for token, each in sorted(listed.items()):
            self.check_count("the id of an added token", token)
            each = each if isinstance(each, dict) else {"content": each}
            if not isinstance(each.get("content"), str):
                raise self.wrong("an added token", each, "the name of a token")
            flags = {flag: bool(each[flag]) for flag in TOKEN_FLAGS if flag in each}
            checked[token] = {"content": self.content("an added token", each), **flags}
        return checked


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings of a folder; special_tokens_map.json fills in for tokenizer_config.json.

    Raises:
      ValueError: it is not a folder, or a file in it is not a JSON object.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder with a Hugging Face tokenizer")
    special = read_optional_json(folder / "special_tokens_map.json")
    tokenizer = read_optional_json(folder / "tokenizer_config.json")
    tokenizer = {name: value for name, value in tokenizer.items() if value is not None}
    return TokenizerSettings(
        folder,
        tokenizer=special | tokenizer,
        model=read_optional_json(folder / "config.json"),
        generation=read_optional_json(folder / "generation_config.json"),
    )


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if the file is missing.

    Raises:
      ValueError: it is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        content = bounded_files.read_json(path)
    except UnreadableFileError as error:
        raise ValueError(f"{error}: download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return content
