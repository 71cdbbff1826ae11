"""Models that ship with curvax, each a problem for the command line: its `make_problem`.

`gpt` is a small byte-level GPT with trained weights and a batch; `llama` is the Llama decoder in
plain JAX, with random weights; `smollm2` is a real language model of that architecture, whose
weights come with a package of their own.
"""
