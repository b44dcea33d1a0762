#!/usr/bin/env python3
"""Compares what the worker computes with what llama.cpp computes: log-probabilities, position by position, and token ids.

    test-harness/bench/agree.py --vocabulary SmolLM2.gguf --model SmolLM2.gguf --model gemma3.gguf

- Each --model reads a sample text, and the distributions at all its positions are compared.
- Random models of each family, in each format that the worker reads, do the same with random tokens. Their tokenizer is that
  of --vocabulary.
- The tokenizer of each --model, and of each further file of --tokenizer, reads texts with known pitfalls and random ones.

Both engines round the inputs of products with quantised weights to bytes, each in its own way, so the distributions differ a
little. A third computation shows how little is right. It is called exact: llama.cpp with the same weights, keys and values as
32-bit floats. (Only gemma3's GELU is still looked up in a table of half-precision floats.) A row fails if the worker is much
farther from exact than llama.cpp is, or if its bits change when it computes one position at a time, as it does for an answer.

Needs `pip install numpy gguf llama-cpp-python`. LLAMA_CPP_LIB_PATH names the folder of another libllama.so than that package's.
Exit codes: 0 all agree, 1 something differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Callable

sys.dont_write_bytecode = True

try:
    import gguf
    import numpy as np

    import random_model
    import reference
    import texts
except ImportError as missing:
    sys.exit(f"error: {missing}\nhint: pip install numpy gguf llama-cpp-python")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VECTORS = ROOT / "bin/llorch-candled/tests/data/tokenizer-vectors.json"
# Least probability with which a token counts for the largest difference.
LIKELY = 1e-3
# A mean divergence up to NEGLIGIBLE never fails. A larger one fails above TIMES that of llama.cpp.
NEGLIGIBLE, TIMES = 1e-4, 3.0
# Rows of log-probabilities in memory at once: a row of Gemma's has 2 MB.
ROWS = 32
# Differing texts that the table shows.
SHOWN = 5


@dataclass
class Difference:
    """Distance of one computation from another."""

    # Mean and largest Kullback-Leibler divergence, in nats.
    mean_kl: float
    max_kl: float
    # Share of positions at which the likeliest token is the same.
    top_1: float
    # Largest difference of a log-probability, of tokens that have at least the probability LIKELY.
    max_difference: float


@dataclass
class Row:
    """Agreement with one model."""

    model: str
    format: str
    positions: int
    # The worker's distance from llama.cpp, and that of both from exact.
    ours: Difference
    ours_exact: Difference
    peer_exact: Difference
    # True if the worker's bits do not change when it computes one position at a time.
    same_bits: bool

    def agrees(self):
        limit = max(NEGLIGIBLE, TIMES * self.peer_exact.mean_kl)
        # Written so that NaN disagrees.
        return self.same_bits and self.ours_exact.mean_kl <= limit


@dataclass
class Tokens:
    """Agreement of token ids."""

    tokenizer: str
    texts: int
    # Text, llama.cpp's ids and the worker's ids, for each text whose ids differ.
    different: list

    def agrees(self):
        return not self.different


@dataclass
class Refusal:
    """A model that one of the engines refuses."""

    model: str
    reason: str

    def agrees(self):
        return False


class WorkerError(Exception):
    """The worker refuses a model."""


class Worker:
    """The example `probe`, which computes as the worker does."""

    def __init__(self, threads, tier, cache):
        print("building the worker's example", file=sys.stderr, flush=True)
        self.program = build()
        self.options = [f"threads={threads}", f"cache={cache}"] + ([f"tier={tier}"] if tier else [])

    def logits(self, path, ids, rows):
        """Returns the logits after each id, computed `rows` rows at a time."""
        with tempfile.TemporaryFile() as output:
            self.run(["logits", path, f"rows={rows}", *self.options], ids, output)
            output.seek(0)
            return np.fromfile(output, dtype="<f4").reshape(len(ids), -1)

    def tokens(self, path, given):
        """Returns the ids of each text."""
        with tempfile.TemporaryFile() as output:
            self.run(["tokens", path], given, output)
            output.seek(0)
            return json.load(output)

    def run(self, arguments, given, output):
        command = [self.program, *map(str, arguments)]
        done = subprocess.run(command, input=json.dumps(given).encode(), stdout=output, stderr=subprocess.PIPE)
        if done.returncode:
            raise WorkerError("the worker: " + done.stderr.decode().strip().removeprefix("error: "))


def build():
    command = ["cargo", "build", "--release", "--locked", "-p", "llorch-candled", "--example", "probe"]
    done = subprocess.run([*command, "--message-format=json-render-diagnostics"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("error: could not build the worker's example")
    messages = map(json.loads, done.stdout.splitlines())
    return next(message["executable"] for message in messages if message.get("executable"))


def log_probabilities(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def distance(reference_logits, logits):
    """Returns how far `logits` are from those of the reference."""
    divergences, same, largest = [], 0, 0.0
    for start in range(0, len(logits), ROWS):
        p, q = (log_probabilities(rows[start : start + ROWS]) for rows in (reference_logits, logits))
        divergences.extend((np.exp(p) * (p - q)).sum(axis=1))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        likely = p >= np.log(LIKELY)
        largest = max(largest, float(np.abs(p - q)[likely].max(initial=0.0)))
    return Difference(float(np.mean(divergences)), float(np.max(divergences)), same / len(logits), largest)


@dataclass
class Session:
    """State shared by the comparisons."""

    worker: Worker
    # Folder for generated models.
    folder: Path
    threads: int
    # Prints a line of the table.
    show: Callable[[str], None]

    def model(self, name, form, path, ids):
        """Compares one model file."""
        plain = self.folder / "exact.gguf"
        try:
            reference.quantise(path, plain, "F32")
            exact = reference.logits(plain, ids, self.threads, exact=True)
            peer = reference.logits(path, ids, self.threads)
            ours = self.worker.logits(path, ids, rows=64)
            singly = self.worker.logits(path, ids, rows=1)
        except (WorkerError, reference.ReferenceError) as error:
            return self.refusal(f"{name}, {form}", error)
        finally:
            plain.unlink(missing_ok=True)
        distances = distance(peer, ours), distance(exact, ours), distance(exact, peer)
        row = Row(name, form, len(ids), *distances, same_bits=np.array_equal(ours, singly))
        self.show(line(row))
        return row

    def refusal(self, name, error):
        self.show(f"{name}: {error}")
        return Refusal(name, str(error))

    def real(self, path, positions):
        """Compares a model file with the sample text."""
        ids = reference.prompt(path, (HERE / "sample.txt").read_text())
        return self.model(Path(path).stem, file_format(path), path, ids[:positions])

    def family(self, name, formats, vocabulary, positions):
        """Compares a random model of the family in every format."""
        source = self.folder / "source.gguf"
        tokens = random_model.write(source, name, vocabulary)
        ids = np.random.default_rng(7).integers(0, tokens, positions).tolist()
        for form in formats:
            path = self.folder / f"{form}.gguf"
            reference.quantise(source, path, form)
            yield self.model(f"random {name}", form, path, ids)
            path.unlink()
        source.unlink()

    def tokens(self, path, given):
        """Compares the ids of texts."""
        name = Path(path).stem
        try:
            theirs = reference.tokens(path, given)
            ours = self.worker.tokens(self.with_tensor(path), given)
        except (WorkerError, reference.ReferenceError) as error:
            return self.refusal(f"token ids of {name}", error)
        different = [each for each in zip(given, theirs, ours) if each[1] != each[2]]
        result = Tokens(name, len(given), different)
        self.show(f"token ids of {name}: {len(given) - len(different)} of {len(given)} texts agree")
        for text, their, our in different[:SHOWN]:
            self.show(f"  {text!r}\n    llama.cpp {their}\n    ours      {our}")
        return result

    def with_tensor(self, path):
        """Returns a small file with the tokenizer of `path`. It has one tensor, because the worker reads no file without tensors."""
        copy = self.folder / "tokenizer.gguf"
        architecture = gguf.GGUFReader(path).fields["general.architecture"].contents()
        writer = gguf.GGUFWriter(copy, architecture)
        random_model.copy_tokenizer(writer, path)
        writer.add_tensor("token_embd.weight", np.zeros((1, 32), dtype=np.float32))
        random_model.finish(writer)
        return copy


def file_format(path):
    entry = gguf.GGUFReader(path).fields.get("general.file_type")
    return gguf.LlamaFileType(int(entry.contents())).name.removeprefix("MOSTLY_") if entry else "-"


HEAD = f"""\
{'':39}  {'ours to llama.cpp':^34}  {'mean KL to exact':^18}  {'one by':6}
{'model':<26} {'format':<7} {'rows':>4}  {'mean KL':>8} {'max KL':>8} {'top 1':>6} {'max |Δ|':>9}  {'ours':>8} {'llama.cpp':>9}  {'one':6}"""


def line(row):
    ours = row.ours
    return (
        f"{row.model:<26.26} {row.format:<7} {row.positions:>4}  {ours.mean_kl:>8.1e} {ours.max_kl:>8.1e} {ours.top_1:>6.1%}"
        f" {ours.max_difference:>9.3f}  {row.ours_exact.mean_kl:>8.1e} {row.peer_exact.mean_kl:>9.1e}"
        f"  {'same' if row.same_bits else 'differs':<7} {'' if row.agrees() else 'FAILS'}".rstrip()
    )


def known_texts():
    """Returns the texts of the tests' vectors."""
    lists = [value for value in json.loads(VECTORS.read_text()).values() if isinstance(value, list)]
    return list(dict.fromkeys(vector["text"] for vectors in lists for vector in vectors))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="GGUF", help="a real model")
    add("--vocabulary", metavar="GGUF", help="file with the tokenizer of random models; without it no random models are compared")
    add("--tokenizer", action="append", default=[], metavar="GGUF", help="another file whose tokenizer is compared")
    add("--families", type=some_of(random_model.FAMILIES), default=list(random_model.FAMILIES), help="families of random models [default: all]")
    add("--formats", type=some_of(reference.FORMATS), default=list(reference.FORMATS), help="formats of random models [default: all]")
    add("--positions", type=int, default=640, help="positions of a real model [default: 640]")
    add("--random-positions", type=int, default=256, help="positions of a random model [default: 256]")
    add("--texts", type=int, default=3000, help="random texts for each tokenizer [default: 3000]")
    add("--seed", type=int, default=1, help="seed of the random texts [default: 1]")
    add("--cache", choices=["f16", "q8_0"], default="f16", help="form of the worker's cache [default: f16]")
    add("--tier", help="instructions that the worker uses: portable, avx2, ... [default: the best]")
    add("--threads", type=int, default=os.cpu_count(), help="[default: all processors]")
    add("--format", choices=["table", "json"], default="table", help="JSON: an object with `models`, `tokenizers` and `refused`")
    return parser.parse_args()


def some_of(known):
    """Returns a parser of lists of names."""

    def parse(text):
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"`{unknown[0]}` is unknown: use some of {', '.join(known)}")
        return names

    return parse


def compare(session, args):
    """Makes all comparisons."""
    results = [session.real(path, args.positions) for path in args.model]
    if args.vocabulary:
        for name in args.families:
            results += session.family(name, args.formats, args.vocabulary, args.random_positions)
    for path in [*args.model, *args.tokenizer]:
        given = known_texts() + texts.random_texts(args.texts, texts.special_names(path), args.seed)
        results.append(session.tokens(path, texts.composed(path, given)))
    return results


def main():
    args = parse_arguments()
    if not (args.model or args.vocabulary or args.tokenizer):
        sys.exit("error: nothing to compare\nhint: name files with --model, --vocabulary or --tokenizer")
    as_json = args.format == "json"
    show = partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    worker = Worker(args.threads, args.tier, args.cache)
    show(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = compare(Session(worker, Path(folder), args.threads, show), args)
        except (reference.ReferenceError, WorkerError, OSError) as error:
            sys.exit(f"error: {error}")
    if as_json:
        kinds = {"models": Row, "tokenizers": Tokens, "refused": Refusal}
        print(json.dumps({key: [asdict(each) for each in results if isinstance(each, kind)] for key, kind in kinds.items()}, indent=1))
    sys.exit(0 if all(result.agrees() for result in results) else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
