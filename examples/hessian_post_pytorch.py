"""The PyTorch example of the post "Hessian analysis with JAX", with its imports changed.

What the post defines as its core module, and its extraction of parameters and its loss, come from
`curvax.compat`; the rest is the post's. Needs `pip install torch==2.13.0` and `pip install curvax`.
"""

# %% The model, and its training.
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.optim as optim

from curvax.compat import (
    EigshArgs,
    HessianAnalyzer,
    extract_pytorch_model_parameters,
    generate_MSE_loss_func,
)

X_np = np.array([[1.0, 2.0], [3.0, 4.0]])
Y_np = np.array([5.0, 6.0])
X = torch.tensor(X_np, dtype=torch.float32)
Y = torch.tensor(Y_np, dtype=torch.float32).unsqueeze(1)


class IdentityMLP(nn.Module):
    """Two linear layers."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 2, bias=True)
        self.fc2 = nn.Linear(2, 1, bias=True)

    def forward(self, x):
        return self.fc2(self.fc1(x))


torch.manual_seed(0)
model = IdentityMLP()
criterion = nn.MSELoss()
optimizer = optim.SGD(model.parameters(), lr=0.01)
for epoch in range(10):
    optimizer.zero_grad()
    loss = criterion(model(X), Y)
    loss.backward()
    optimizer.step()
    print(f"Epoch {epoch + 1}, Loss: {loss.item():.4f}")

# %% The mediating objects.
params = extract_pytorch_model_parameters(model)
X_jnp, Y_jnp = jnp.array(X.numpy()), jnp.array(Y.numpy())


def forward_copy_torch(params, x):
    """The model, on one sample."""
    w1, b1 = jnp.array(params["fc1.weight"]), jnp.array(params["fc1.bias"])
    w2, b2 = jnp.array(params["fc2.weight"]), jnp.array(params["fc2.bias"])
    x = jnp.dot(w1, x) + b1
    return jnp.dot(w2, x) + b2


MSE_loss_copy = generate_MSE_loss_func(params, X_jnp, Y_jnp, forward_copy_torch)

# %% The spectrum.
ha = HessianAnalyzer(params, X_jnp, Y_jnp, forward_copy_torch, MSE_loss_copy, dtype=jnp.float32)
eigsh_args = EigshArgs(k=6, sigma=None, which="LM", v0=None, tol=0.001, return_eigenvectors=True)
eigvals, eigvecs = ha.get_spectrum(eigsh_args)
print(eigvals)
print(eigvecs.shape)
