# SPDX-License-Identifier: Apache-2.0
"""What the .json files of a Hugging Face folder say of its tokenizer, every field checked."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from t5x_lite.data.special_tokens import MOST_SENTINELS

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
ENCODER_DECODERS = ("t5", "mt5", "umt5", "byt5", "t5gemma", "t5gemma2")
MARKS = ("lstrip", "rstrip", "normalized", "single_word", "special")


class Settings(NamedTuple):
    """tokenizer_config.json with special_tokens_map.json, config.json and generation_config.json.

    {} stands for a file that is missing. Fields that are not what they should be are a ValueError
    where they are asked for.
    """

    folder: Path
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    generation: dict[str, Any]

    def wrong(self, name: str, value: Any, wanted: str) -> ValueError:
        """What is wrong with a field."""
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
        """Whether the model is an encoder-decoder."""
        told = self.model.get("is_encoder_decoder")
        return self.model.get("model_type") in ENCODER_DECODERS if told is None else bool(told)

    @property
    def ids(self) -> int | None:
        """How many ids the model has."""
        return self.count("vocab_size", self.model.get("vocab_size") or self.text.get("vocab_size"))

    @property
    def text(self) -> dict[str, Any]:
        """What config.json says of the part that writes text, where it has several."""
        part = self.model.get("text_config") or self.model.get("decoder") or {}
        if not isinstance(part, dict):
            raise self.wrong("a part of config.json", part, "an object")
        return part

    def extra_ids(self, default: int) -> int:
        """How many sentinels the tokenizer adds."""
        found = self.count("extra_ids", self.tokenizer.get("extra_ids", default))
        if found is None or found >= MOST_SENTINELS:
            raise self.wrong("extra_ids", found, f"a number of sentinels below {MOST_SENTINELS:,}")
        return found

    def count(self, name: str, value: Any) -> Any:
        if value is None or (type(value) is int and 0 <= value < 10**7):
            return value
        raise self.wrong(name, value, "a number of ids")

    def name(self, role: str) -> str | None:
        """What the tokenizer calls its bos_token, eos_token ..."""
        return self.content(role, self.tokenizer.get(role))

    def content(self, role: str, token: Any) -> str | None:
        """A token's name: as it stands, or in the object that describes the token."""
        told = token.get("content") if isinstance(token, dict) else token
        if (told is None and token is None) or isinstance(told, str):
            return told
        raise self.wrong(role, token, "the name of a token")

    def token(self, role: str) -> int | None:
        """A field such as bos_token_id."""
        found = self.tokens(role)
        if len(found) > 1:
            raise self.wrong(role, found, "one id")
        return found[0] if found else None

    def tokens(self, role: str) -> list[int]:
        """A field that may have several ids, such as eos_token_id."""
        for told in (self.generation, self.model, self.text):
            found = told.get(role)
            if found is not None:
                found = found if isinstance(found, list) else [found]
                if not all(type(token) is int and token >= -1 for token in found):
                    raise self.wrong(role, found, "an id, or several")
                return [token for token in found if token >= 0]  # early Llamas say -1 for none
        return []

    def extra_tokens(self) -> list[str]:
        """Special tokens beside bos, eos and so on."""
        told = self.tokenizer
        named = told.get("additional_special_tokens") or told.get("extra_special_tokens") or []
        if not isinstance(named, dict | list):
            raise self.wrong("additional_special_tokens", named, "a list of tokens")
        named = named.values() if isinstance(named, dict) else named
        found = [self.content("additional_special_tokens", token) for token in named]
        return [name for name in found if name is not None]

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens that the files add to the tokenizer's own: content and marks, by id."""
        plain = read_json(self.folder / "added_tokens.json")
        for token in plain.values():
            self.count("the id of an added token", -1 if token is None else token)
        found = {token: {"content": name, "special": False} for name, token in plain.items()}
        told = self.tokenizer.get("added_tokens_decoder") or {}
        if not isinstance(told, dict) or not all(token.isdecimal() for token in told):
            raise self.wrong("added_tokens_decoder", told, "tokens by id")
        found |= {int(token): each for token, each in told.items()}
        made = {}
        for token, each in sorted(found.items()):
            self.count("the id of an added token", token)
            each = each if isinstance(each, dict) else {"content": each}
            if not isinstance(each.get("content"), str):
                raise self.wrong("an added token", each, "the name of a token")
            marks = {mark: bool(each[mark]) for mark in MARKS if mark in each}
            made[token] = {"content": self.content("an added token", each), **marks}
        return made


def read_settings(folder: Path) -> Settings:
    """The settings of a folder; special_tokens_map.json fills what tokenizer_config.json lacks.

    Raises ValueError if it is no folder, or a file in it is no JSON object.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder with a Hugging Face tokenizer")
    known = read_json(folder / "special_tokens_map.json")
    told = {k: v for k, v in read_json(folder / "tokenizer_config.json").items() if v is not None}
    config = read_json(folder / "config.json")
    return Settings(folder, known | told, config, read_json(folder / "generation_config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} if there is none.

    Raises ValueError if it is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object: download it again")
    return found
