"""A tiny model of every architecture of transformers: right, or refused with a remedy.

`CURVAX_ARCHITECTURES=file` appends what is measured to a file of JSON lines, of which
`python tests/adapters/architectures.py file > docs/architectures.md` makes the table.
"""

import importlib.util
import json
import os
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("torchax") is None:  # its import fails before it is prepared
    pytest.skip("torchax is not installed", allow_module_level=True)


from tests.adapters import architectures as sweep  # noqa: E402

from curvax.adapters import huggingface  # noqa: E402
from curvax.adapters.verification import VerificationError  # noqa: E402

pytestmark = pytest.mark.frameworks

DEFAULT = {
    ("causal_lm", "phi3"),
    ("masked_lm", "roberta"),
    ("sequence_classification", "gpt2"),
    ("image_classification", "mobilenet_v2"),
    ("seq2seq_lm", "marian"),
}


def cases():
    for kind in sweep.HEADS:
        for name in sweep.architectures(kind):
            if name not in sweep.UNTRIED:
                marks = () if (kind, name) in DEFAULT else pytest.mark.slow
                yield pytest.param(kind, name, id=f"{kind}-{name}", marks=marks)


def kept(**result):
    path = os.environ.get("CURVAX_ARCHITECTURES")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(result) + "\n")


@pytest.mark.parametrize("kind,name", list(cases()))
def test_right_or_refused(kind, name):
    module = sweep.tiny(kind, name)
    batch = sweep.batch_for(kind, module)
    with torch.no_grad():
        own = float(module(**batch).loss)
    try:
        with warnings.catch_warnings():
            # Of logits computed whole, and of double backwards of torch that are wrong.
            warnings.simplefilter("ignore", UserWarning)
            model = getattr(huggingface, kind)(module, example=batch)
            found = model.verify(hvp=True)
    except (TypeError, VerificationError) as error:
        kept(kind=kind, name=name, refused=str(error))
        assert "double_backward" in str(error) and (kind, name) in sweep.REFUSED, error
        return
    loss = model.loss(model.forward(model.params, model.convert(batch)), model.convert(batch))
    ours = float(loss[0] if isinstance(loss, tuple) else loss)
    figures = {
        "loss": abs(ours - own) / abs(own),
        "gradient": found.gradient,
        "product": found.hvp,
    }
    kept(kind=kind, name=name, form=type(model.loss).__name__, **figures)
    assert max(figures.values()) <= 1e-5, figures
    assert (kind, name) not in sweep.REFUSED
