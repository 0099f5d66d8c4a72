#!/usr/bin/env python3
"""Checks data preparation against other programs; scripts/check-data describes the checks.

usage: scripts/data/check.py MOERUN [CHECK ...]
"""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

MOERUN = str(Path(sys.argv[1]).resolve())
SCRIPTS = Path(__file__).parent
failures = []


def report(name: str, passed: bool, detail: str = "") -> None:
    print(f"{'ok  ' if passed else 'FAIL'} {name}{': ' + detail if detail else ''}", flush=True)
    if not passed:
        failures.append(name)


def texts() -> list[str]:
    """Returns Python sources, and texts that are hard to split or to decode."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]:
        found.append(path.read_text(encoding="utf-8", errors="ignore"))
    hard = [
        "größer 模型 🙂 e\u0301 \u200d العربية ไทย",
        "a\r\nb\r\n\r\n  c\td ",
        "don't I'LL we've 12345678 3.14 x==y",
        "\n\n\nstart and end \n\n\n",
        "<|endoftext|> </s> <s> <|im_end|>",
        "x" * 5000,
        "ab " * 4000,
        "nul \0 and bell \a",
    ]
    return [text for text in found + hard if text.strip()]


def prepare(output: Path, *arguments: object) -> subprocess.CompletedProcess:
    fixed = [MOERUN, "data", "prepare", "-o", str(output), "--validation-fraction", "0"]
    command = [*fixed, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def documents(prefix: Path) -> list[list[int]]:
    """Reads a pair as Megatron-LM does."""
    index = prefix.with_name(prefix.name + ".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0" and int.from_bytes(index[9:17], "little") == 1
    dtype = {8: numpy.uint16, 4: numpy.int32}[index[17]]
    count = int.from_bytes(index[18:26], "little")
    lengths = numpy.frombuffer(index, numpy.int32, count, 34)
    pointers = numpy.frombuffer(index, numpy.int64, count, 34 + 4 * count)
    tokens = numpy.fromfile(prefix.with_name(prefix.name + ".bin"), dtype)
    starts = pointers // tokens.itemsize
    return [tokens[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)]


def write_lines(path: Path, rows: list[str]) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in rows]
    path.write_text("".join(lines), encoding="utf-8")


def trained(work: Path) -> Path:
    """Returns a small tokenizer."""
    lines = work / "lines.jsonl"
    write_lines(lines, texts())
    made = prepare(work / "trained", lines, "--vocab-size", 2000)
    assert made.returncode == 0, made.stderr
    return work / "trained" / "tokenizer.json"


def long_document() -> str:
    """Returns a document of 5 MiB, which is tokenized in parts."""
    block = "\n".join(texts())
    return (block * (5 * 2**20 // len(block.encode()) + 1))[: 5 * 2**20]


def beginning(folder: Path, library: Tokenizer) -> str | None:
    """Returns the token that begins documents by the rules of transformers.

    It is the first one that the library itself adds to a text, if the configuration calls it the
    bos_token and it does not end documents.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def text(name: str) -> str | None:
        token = config.get(name)
        return token["content"] if isinstance(token, dict) else token

    if config.get("add_bos_token") is False or ("bos_token" in config and not text("bos_token")):
        return None
    if config.get("add_bos_token"):
        return text("bos_token") if text("bos_token") != text("eos_token") else None
    with_added = library.encode("a", add_special_tokens=True).tokens
    without = library.encode("a", add_special_tokens=False).tokens
    added = with_added[: len(with_added) - len(without)]
    if not added or with_added[len(added) :] != without or added[0] == text("eos_token"):
        return None
    known = ["<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>"]
    return added[0] if added[0] in [text("bos_token"), *known] else None


def check_formats(work: Path) -> None:
    """Compares the tokens of one corpus in many files with those of JSON lines."""
    rows = texts()
    tokenizer = trained(work)
    lines = work / "lines.jsonl"
    data = lines.read_bytes()
    middle = data.index(b"\n", len(data) // 2) + 1
    files = {}

    def add(name: str, *options: str) -> Path:
        files[name] = options
        return work / name

    add("two-members.jsonl.gz").write_bytes(
        gzip.compress(data[:middle]) + gzip.compress(data[middle:])
    )
    add("lines.jsonl.zst").write_bytes(zstandard.compress(data))
    add("lines.jsonl.bz2").write_bytes(bz2.compress(data))
    add("lines.jsonl.xz").write_bytes(lzma.compress(data))
    column = pyarrow.array(rows)
    for name, array in {
        "string": column,
        "large-string": column.cast(pyarrow.large_string()),
        "dictionary": column.dictionary_encode(),
    }.items():
        for codec in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]:
            path = add(f"{name}-{codec}.parquet")
            table = pyarrow.table({"id": range(len(rows)), "text": array})
            pyarrow.parquet.write_table(table, path, compression=codec, row_group_size=17)
    nested = pyarrow.table({"meta": pyarrow.StructArray.from_arrays([column], names=["text"])})
    pyarrow.parquet.write_table(nested, add("nested.parquet", "--text-key", "meta.text"))
    wanted = documents(work / "trained" / "train")
    for name, options in files.items():
        made = prepare(work / f"out-{name}", work / name, "--tokenizer", tokenizer, *options)
        same = made.returncode == 0 and documents(work / f"out-{name}" / "train") == wanted
        report(f"formats {name}", same, made.stderr.strip()[-300:] if not same else "")
    check_datasets(work, rows, tokenizer, wanted)


def check_datasets(work: Path, rows: list[str], tokenizer: Path, wanted: list) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"text": rows})
    folder = work / "hub" / "data"
    folder.mkdir(parents=True)
    half = len(rows) // 2
    halves = [saved.select(range(half)), saved.select(range(half, len(rows)))]
    for number, part in enumerate(halves):
        part.to_parquet(str(folder / f"train-{number:05}-of-00002.parquet"))
    made = prepare(work / "out-hub", work / "hub", "--tokenizer", tokenizer)
    same = made.returncode == 0 and documents(work / "out-hub" / "train") == wanted
    report("formats folder of datasets", same, made.stderr.strip()[-300:] if not same else "")
    saved.save_to_disk(str(work / "arrow"))
    made = prepare(work / "out-arrow", work / "arrow", "--tokenizer", tokenizer)
    refused = made.returncode != 0 and "to_parquet" in made.stderr
    report("formats Arrow stream is refused with a fix", refused, made.stderr.strip()[-200:])


def check_tokenizers(work: Path) -> None:
    """Compares the ids of every document with those of the tokenizers library."""
    lines = work / "lines.jsonl"
    rows = [*texts(), long_document()]
    write_lines(lines, rows)
    made = subprocess.run(
        [sys.executable, SCRIPTS / "make_tokenizers.py"], capture_output=True, text=True, check=True
    )
    for folder in map(Path, made.stdout.split()):
        name = f"tokenizers {folder.name}"
        output = work / f"out-{folder.name}"
        made = prepare(output, lines, "--tokenizer", folder)
        if made.returncode != 0:
            report(name, False, made.stderr.strip()[-300:])
            continue
        info = json.loads((output / "dataset.json").read_text())
        library = Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.no_truncation()
        library.no_padding()
        expected = beginning(folder, library)
        found = info["bos"]["text"] if info.get("bos") else None
        report(f"{name}: beginning", expected == found, f"{found}, expected {expected}")
        library.encode_special_tokens = True
        bos = [library.token_to_id(expected)] if expected else []
        ours = documents(output / "train")
        wrong = [
            number
            for number, row in enumerate(rows)
            if ours[number]
            != [*bos, *library.encode(row, add_special_tokens=False).ids, info["eos"]["id"]]
        ]
        detail = f"documents {wrong[:5]} differ" if wrong else info["encoder"]
        report(name, len(ours) == len(rows) and not wrong, detail)


def check_datatrove(work: Path) -> None:
    """Compares token files with those of datatrove."""
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer, MegatronDocumentTokenizer

    tokenizer = trained(work)
    rows = texts()
    # datatrove takes special tokens in text as such.
    lines = work / "lines.jsonl"
    made = prepare(work / "ours", lines, "--tokenizer", tokenizer, "--special-tokens")
    assert made.returncode == 0, made.stderr
    step = MegatronDocumentTokenizer(
        output_folder=str(work / "theirs"),
        tokenizer_name_or_path=str(tokenizer),
        eos_token="<|endoftext|>",
        save_filename="theirs",
    )
    named = [Document(text=text, id=str(number)) for number, text in enumerate(rows)]
    step.run(named, rank=0, world_size=1)
    for ending in ["bin", "idx"]:
        theirs = next((work / "theirs").glob(f"*.{ending}")).read_bytes()
        ours = (work / "ours" / f"train.{ending}").read_bytes()
        report(f"datatrove .{ending}", ours == theirs, f"{len(ours)} and {len(theirs)} bytes")
    step = DocumentTokenizer(
        output_folder=str(work / "arrays"),
        local_working_dir=str(work / "local"),
        tokenizer_name_or_path=str(tokenizer),
        eos_token="<|endoftext|>",
        save_filename="arrays",
        shuffle_documents=False,
    )
    step.run(named, rank=0, world_size=1)
    array = next((work / "arrays").glob("*.ds"))
    ours = (work / "ours" / "train.bin").read_bytes()
    report("datatrove .ds", array.read_bytes() == ours, f"{array.stat().st_size} bytes")
    ends = numpy.fromfile(f"{array}.index", numpy.uint64)
    lengths = [len(document) for document in documents(work / "ours" / "train")]
    report("datatrove .ds.index", ends.tolist() == numpy.cumsum(lengths).tolist())


def check_vocabulary(work: Path) -> None:
    """Compares ids above 65,535, which take four bytes, with those of the library."""
    rows = [f"word{number} and word{number + 7}" for number in range(0, 70_000, 70)]
    vocab = {"?": 0, "</s>": 1, "and": 2}
    for number in range(70_010):
        vocab[f"word{number}"] = len(vocab)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(work / "tokenizer.json"))
    write_lines(work / "lines.jsonl", rows)
    made = prepare(work / "out", work / "lines.jsonl", "--tokenizer", work / "tokenizer.json")
    if made.returncode != 0:
        report("vocabulary", False, made.stderr.strip()[-300:])
        return
    wanted = [[*tokenizer.encode(row).ids, 1] for row in rows]
    found = documents(work / "out" / "train")
    info = json.loads((work / "out" / "dataset.json").read_text())
    report("vocabulary above 65,536", found == wanted and info["dtype"] == "int32", info["dtype"])


def peak(output: Path, *arguments: object) -> float:
    """Returns the largest resident memory of a preparation, in MB."""
    fixed = [MOERUN, "data", "prepare", "-o", str(output), "--validation-fraction", "0"]
    process = subprocess.Popen([*fixed, *map(str, arguments)], stdout=subprocess.DEVNULL)
    largest = 0
    # Not ru_maxrss, which includes this program's memory before exec.
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        largest = max([largest, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.02)
    assert process.returncode == 0, arguments
    return largest * 1024 / 1e6


def check_memory(work: Path) -> None:
    """Compares the memory for 200 MB and 2 GB, and for a document of 200 MB."""
    tokenizer = trained(work)
    source = "\n".join(texts())[:1_000_000]
    rows = [source[start : start + 4000] for start in range(0, len(source), 4000)]
    peaks = {}
    for name, repeats in [("200 MB", 200), ("2 GB", 2000)]:
        path = work / "corpus.jsonl"
        with path.open("w", encoding="utf-8") as out:
            block = "".join(json.dumps({"text": row}) + "\n" for row in rows)
            for _ in range(repeats):
                out.write(block)
        peaks[name] = peak(work / f"out-{repeats}", path, "--tokenizer", tokenizer)
    path.unlink()
    path = work / "one.txt"
    with path.open("w", encoding="utf-8") as out:
        for _ in range(200):
            out.write(source)
    peaks["one document of 200 MB"] = peak(work / "out-one", path, "--tokenizer", tokenizer)
    for name, value in peaks.items():
        report(f"memory {name}", value <= 512, f"{value:.0f} MB")
    ratio = peaks["2 GB"] / peaks["200 MB"]
    report("memory does not grow", 0.9 <= ratio <= 1.1, f"{ratio:.3f} times that of 200 MB")


CHECKS = {
    "formats": check_formats,
    "tokenizers": check_tokenizers,
    "datatrove": check_datatrove,
    "vocabulary": check_vocabulary,
    "memory": check_memory,
}

for chosen in sys.argv[2:] or CHECKS:
    with tempfile.TemporaryDirectory() as folder:
        CHECKS[chosen](Path(folder))
print(f"{len(failures)} checks failed" if failures else "all checks passed")
sys.exit(1 if failures else 0)
