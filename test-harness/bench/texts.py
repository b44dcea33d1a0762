"""Texts for comparing tokenizers: random ones, and names of special tokens."""

import random
import unicodedata

import gguf

# Kinds of characters; random texts contain runs of each.
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "etaoin shrdlu",
    "0123456789",
    " ",
    " \t\n\r",
    "\n",
    "\u00a0\u2003\u2009\u200a\u2028\u2029\u202f\u3000\u0085\u000b\u000c\u1680\u205f",
    ".,;:!?'\"()[]{}<>-_/\\|@#$%^&*+=~`",
    "'",
    "…–—‘’“”«»„¿¡§¶†‡•·",
    "àáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿßœšžłđ",
    "ÀÉÎÕÜÇÑŠŽİıǅŉſ",
    "\u0301\u0308\u0327\u0323\u034f\u20dd\u0483",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "שלוםعربيةفارسی",
    "हिन्दीবাংলাதமிழ்ไทยລາວ",
    "漢字仮名交じり文中文字符测试",
    "ひらがなカタカナﾊﾝｶｸ",
    "한국어조선말",
    "각",
    "😀👍🏽👩\u200d💻🇩🇪❤\ufe0f🦀",
    "①②½¾²³ⅧⅩ٠١٢٣४५६零一二",
    "∑∫√≠≤∞→⇒∀∃∈",
    "\u0000\u0001\u0007\u001b\u007f\u00ad\ufeff\u200b\u200e\u202e\ufffd",
    "\ue000\uf8ff\U000f0000\U0010ffff\U0001d49c\U0001f9ec",
]


def random_texts(count, specials, seed):
    """Returns texts made of runs of all kinds of characters, words, contractions and names of special tokens."""
    chance = random.Random(seed)
    words = ["the", " and", "don't", "I'LL", "we've", "they're", " function", "(void)", "http://", "  ", "\n\n", "1,000.50", *specials]

    def run():
        kind = chance.random()
        if kind < 0.25:
            return chance.choice(words)
        if kind < 0.30:
            return chr(chance.choice([chance.randrange(0x20, 0xD800), chance.randrange(0xE000, 0x110000)]))
        if kind < 0.35:
            return chance.choice(chance.choice(ALPHABETS)) * chance.randrange(1, 40)
        return "".join(chance.choices(chance.choice(ALPHABETS), k=chance.randrange(1, 9)))

    return ["".join(run() for _ in range(chance.randrange(1, 14))) for _ in range(count)]


def special_names(path):
    """Returns the names of the first and the last few control and user-defined tokens, and beginnings of these names."""
    fields = gguf.GGUFReader(path).fields
    texts, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    names = []
    for kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
        of_kind = [text for text, its in zip(texts, kinds) if its == kind]
        names += of_kind[:12] + of_kind[-4:]
    return names + [name[:-1] for name in names[:4]]


def composed(path, given):
    """Returns the texts, with composed characters (NFC) for tokenizers of Qwen: Qwen's own library and the worker compose them
    first, llama.cpp does not."""
    pre = gguf.GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if pre and pre.contents() == "qwen2":
        return [unicodedata.normalize("NFC", text) for text in given]
    return given
