"""Models of Hugging Face transformers (the extra `huggingface`).

Language models hand hidden states and head to `losses.LinearCrossEntropy`, so that no array of
tokens × vocabulary exists.
"""

from curvax.adapters.frameworks import import_framework

import_framework("torch", "huggingface")
import_framework("transformers", "huggingface")

from curvax.adapters.huggingface.classifiers import (  # noqa: E402
    image_classification,
    sequence_classification,
)
from curvax.adapters.huggingface.encoders import encoder  # noqa: E402
from curvax.adapters.huggingface.language import causal_lm, masked_lm  # noqa: E402
from curvax.adapters.huggingface.seq2seq import seq2seq_lm  # noqa: E402

__all__ = [
    "causal_lm",
    "encoder",
    "image_classification",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
]
