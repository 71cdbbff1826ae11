"""Hugging Face transformers, step by step: a small Llama on bytes of Python's own documentation.

Needs `pip install torch==2.13.0`, then `pip install 'curvax[huggingface]'`.
"""

# %% A model of transformers, trained for a moment. A real one is loaded by its folder or `.gguf`
# file: `cx.adapters.huggingface.causal_lm("path/to/model")`.
import pydoc_data.topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
text = pydoc_data.topics.topics["assert"].encode()
tokens = torch.tensor(list(text[: 16 * 64])).reshape(16, 64)

config = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
module = LlamaForCausalLM(config)
optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    module(tokens, labels=tokens).loss.backward()
    optimizer.step()

# %% Convert it. Nothing but the model is asked for: the loss is that of the next token, and hidden
# states and head go to a fused cross entropy, which has no array of tokens × vocabulary.
import curvax as cx  # noqa: E402

model = cx.adapters.huggingface.causal_lm(module.eval())
print(model)
print(model.verify(hvp=True))

# %% A tied head is one parameter, under the name of the embedding; filters find it by both.
print(model.name_map["lm_head.weight"])

# %% Batches are tokens, or what a tokenizer returns; padding does not count.
mask = torch.ones_like(tokens)
mask[8:, 40:] = 0
op = cx.hessian(model, {"input_ids": tokens, "attention_mask": mask}, microbatch_size=8)
print(f"loss {float(op.loss):.4f} over {op.num_microbatches} microbatches")
print(cx.eigsh(op, k=3, tol=1e-2, seed=0))

# %% Layer by layer, in one call.
layers = {f"layer {i}": cx.match_names(f"model.layers.{i}.*") for i in range(2)}
print(cx.trace(cx.ggn(model, tokens).blocks(layers), num_matvecs=30, seed=0))
