#!/usr/bin/env python3
"""Runs Megatron-LM's tools/preprocess_data.py, as `moerun bench data --baseline` calls it.

usage: scripts/peers/megatron_preprocess.py INPUT OUTPUT TOKENIZER THREADS

MEGATRON_LM names a checkout of github.com/NVIDIA/Megatron-LM. Needs torch and transformers. INPUT
has JSON lines with the field `text`; OUTPUT is the prefix of the files that it writes.
"""

import os
import runpy
import shutil
import sys
import tempfile
import typing
from pathlib import Path

import typing_extensions

# The checkout imports what the standard library has since Python 3.12.
if not hasattr(typing, "override"):
    typing.override = typing_extensions.override

END = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'

source, output, tokenizer, threads = sys.argv[1:]
checkout = Path(os.environ["MEGATRON_LM"])
with tempfile.TemporaryDirectory() as folder:
    shutil.copy(tokenizer, Path(folder) / "tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text(END, encoding="utf-8")
    sys.argv = ["preprocess_data.py", "--input", source, "--output-prefix", output]
    sys.argv += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    sys.argv += ["--workers", threads, "--append-eod", "--log-interval", "1000000"]
    sys.path.insert(0, str(checkout))
    runpy.run_path(str(checkout / "tools" / "preprocess_data.py"), run_name="__main__")
