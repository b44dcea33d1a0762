"""llama.cpp as a reference, through its Python package `llama_cpp`.

`LLAMA_CPP_LIB_PATH` names the folder of a `libllama.so` to use instead of the package's own.
"""

import ctypes
from contextlib import contextmanager

import numpy as np
import llama_cpp as llama

# Numbers of the formats in `llama_ftype`. All matrices of a file have the same one.
FORMATS = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
}
BATCH = 512
F32_CACHE, NO_FLASH_ATTENTION = 0, 0


@llama.llama_log_callback
def silent(level, text, data):
    pass


llama.llama_log_set(silent, None)
llama.llama_backend_init()


class ReferenceError(Exception):
    """llama.cpp can't fulfil a request."""


def quantise(source, target, form):
    """Writes the model with all matrices in another format."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = FORMATS[form]
    parameters.pure = True
    parameters.allow_requantize = True
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise ReferenceError(f"llama.cpp could not write {source} as {form}")


@contextmanager
def loaded(path, vocabulary_only=False):
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = vocabulary_only
    model = llama.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise ReferenceError(f"llama.cpp could not load {path}")
    try:
        yield model
    finally:
        llama.llama_model_free(model)


def tokens(path, texts):
    """Returns the ids of each text, with names of special tokens parsed, and without further tokens."""
    with loaded(path, vocabulary_only=True) as model:
        vocabulary = llama.llama_model_get_vocab(model)
        return [text_ids(vocabulary, text.encode()) for text in texts]


def prompt(path, text):
    """Returns the ids of a text, after the token for the beginning of a sequence if the vocabulary has one."""
    [ids] = tokens(path, [text])
    with loaded(path, vocabulary_only=True) as model:
        bos = llama.llama_vocab_bos(llama.llama_model_get_vocab(model))
    return ids if bos < 0 else [bos, *ids]


def text_ids(vocabulary, text):
    room = len(text) + 16
    ids = (llama.llama_token * room)()
    count = llama.llama_tokenize(vocabulary, text, len(text), ids, room, False, True)
    if count < 0:
        raise ReferenceError(f"llama.cpp needs {-count} tokens for {len(text)} bytes")
    return ids[:count]


def logits(path, ids, threads, exact=False):
    """Returns the logits after each id, as an array of 32-bit floats.

    `exact` keeps keys and values as 32-bit floats; with a file of 32-bit floats, nothing is then rounded to fewer bits.
    """
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = len(ids)
    parameters.n_batch = parameters.n_ubatch = BATCH
    parameters.n_threads = parameters.n_threads_batch = threads
    if exact:
        parameters.type_k = parameters.type_v = F32_CACHE
        parameters.flash_attn_type = NO_FLASH_ATTENTION
    with loaded(path) as model:
        context = llama.llama_init_from_model(model, parameters)
        if not context:
            raise ReferenceError(f"llama.cpp could not create a context for {path}")
        try:
            width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
            parts = [part(context, ids, start, width) for start in range(0, len(ids), BATCH)]
        finally:
            llama.llama_free(context)
    return np.concatenate(parts)


def part(context, ids, start, width):
    ids = ids[start : start + BATCH]
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index] = token
        batch.pos[index] = start + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = True
    failed = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    if failed:
        raise ReferenceError(f"llama.cpp could not compute a batch (code {failed})")
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), width)).copy()
