"""The work per token according to a GGUF file: bytes read and products computed."""

import math
import struct
from dataclasses import dataclass

MAGIC, VERSION = b"GGUF", 3
# `struct` formats of numbers, by the id of their type; 8 is a text, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
# Bytes per element of a cache of half-precision floats.
CACHE_ELEMENT = 2
# Of this many consecutive layers of gemma3, one sees all positions.
GEMMA3_PERIOD = 6


class ModelFileError(Exception):
    """The file can't be read as a model."""


@dataclass
class Tensor:
    """A tensor of the file."""

    name: str
    dimensions: list
    size: int

    def elements(self):
        return math.prod(self.dimensions)

    def is_matrix(self):
        return len(self.dimensions) == 2


class ModelFile:
    """Header of a GGUF file."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.read(file)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ModelFileError(f"{path}: the header is damaged ({error})") from error

    def read(self, file):
        magic, version, tensors, values = struct.unpack("<4sIQQ", file.read(24))
        if magic != MAGIC or version != VERSION:
            raise ModelFileError(f"{file.name}: not a GGUF file of version {VERSION}")
        self.values = dict(entry(file) for _ in range(values))
        places = [place(file) for _ in range(tensors)]
        alignment = self.values.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
        self.size = file.seek(0, 2)
        # A tensor ends where the next one begins, except for padding.
        ends = sorted(offset for _, _, offset in places)[1:] + [self.size - start]
        sizes = dict(zip(sorted(offset for _, _, offset in places), ends))
        self.tensors = [Tensor(name, dimensions, sizes[offset] - offset) for name, dimensions, offset in places]

    def number(self, key, default=None):
        """Returns a header value of the model's architecture, or `default` if the header has none."""
        return self.values.get(f"{self.values['general.architecture']}.{key}", default)

    def context(self):
        return self.number("context_length")

    def cache_bytes_per_token(self):
        """Returns the bytes of keys and values of all layers."""
        return sum(self.layer_cache_bytes() for _ in range(self.number("block_count")))

    def layer_cache_bytes(self):
        heads = self.number("attention.head_count")
        width = self.number("attention.key_length", self.number("embedding_length") // heads)
        return 2 * self.number("attention.head_count_kv", heads) * width * CACHE_ELEMENT

    def decode_bytes(self, position):
        """Returns the bytes that the token at this position reads: all matrices but the embedding's, unless that is also
        the output matrix, and the keys and values that each layer sees."""
        names = {tensor.name for tensor in self.tensors}
        skipped = {"token_embd.weight"} if "output.weight" in names else set()
        weights = sum(tensor.size for tensor in self.tensors if tensor.is_matrix() and tensor.name not in skipped)
        layers = self.number("block_count")
        return weights + sum(self.seen(layer, position + 1) for layer in range(layers)) * self.layer_cache_bytes()

    def seen(self, layer, positions):
        """Returns how many of the first `positions` positions the last one sees."""
        window = self.number("attention.sliding_window")
        is_near = self.values["general.architecture"] == "gemma3" and (layer + 1) % GEMMA3_PERIOD
        return min(positions, window) if is_near else positions

    def prefill_products(self):
        """Returns the number of products of a prompt's token with the matrices of the layers."""
        return sum(tensor.elements() for tensor in self.tensors if tensor.is_matrix() and tensor.name.startswith("blk."))


def entry(file):
    key = text(file)
    return key, value(file, scalar(file, "I"))


def scalar(file, kind):
    kind = "<" + kind
    return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]


def text(file):
    return file.read(scalar(file, "Q")).decode()


def value(file, kind):
    """Reads a value. Skips arrays, because no caller needs one."""
    if kind == TEXT:
        return text(file)
    if kind != ARRAY:
        return scalar(file, NUMBERS[kind])
    kind, count = scalar(file, "I"), scalar(file, "Q")
    if kind in NUMBERS:
        file.seek(count * struct.calcsize("<" + NUMBERS[kind]), 1)
        return None
    for _ in range(count):
        value(file, kind)
    return None


def place(file):
    """Reads the name, the dimensions and the offset of a tensor."""
    name = text(file)
    dimensions = [scalar(file, "Q") for _ in range(scalar(file, "I"))]
    scalar(file, "I")
    return name, dimensions, scalar(file, "Q")
