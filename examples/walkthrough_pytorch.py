"""PyTorch, step by step: a CNN with batch normalisation on handwritten digits.

Needs `pip install torch==2.13.0`, then `pip install 'curvax[torch]' scikit-learn`.
"""

# %% Train a model in torch, as ever.
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
y = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=200)

module = nn.Sequential(
    nn.Conv2d(1, 8, 3),
    nn.BatchNorm2d(8),
    nn.SiLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Dropout(0.1),
    nn.Linear(72, 10),
)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
for _ in range(5):
    for inputs, targets in loader:
        optimizer.zero_grad()
        criterion(module(inputs), targets).backward()
        optimizer.step()

# %% Turn it into a model of JAX. With dropout or batch statistics the loss is no fixed function of
# the parameters, so they must be off. The loader is taken as it is.
import curvax as cx  # noqa: E402

module.eval()
model = cx.adapters.torch.from_module(module, loss=criterion, example=(x[:50], y[:50]))
print(model)

# %% Is it the same model? Outputs and loss were compared above; here a Hessian-vector product, with
# torch's own double backward.
print(model.verify(hvp=True))

# %% The outermost eigenvalues of the Hessian over all batches, each with its measured residual.
hessian = cx.hessian(model, loader)
pairs = cx.eigsh(hessian, k=(4, 2), which="BE", seed=0)
print(pairs)

# %% The Gauss-Newton matrix, of one layer: parameters have the names that they have in torch.
head = cx.ggn(model, loader, where=cx.match_names("6.*"))
print(head)
print(cx.trace(head, num_matvecs=60, seed=0))

# %% An eigenvector goes back into torch by its names.
direction = {name: torch.from_dlpack(leaf[0]).clone() for name, leaf in pairs.eigenvectors.items()}
print({name: tuple(tensor.shape) for name, tensor in direction.items()})


# %% What cannot be converted, as a module that asks for the values of its tensors, torch multiplies
# by itself; and any product that torch can compute is an operator.
class Branching(nn.Module):
    """A linear layer, and a branch on its outputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images):
        z = self.linear(images.flatten(1))
        return z if z.sum() > 0 else z.tanh()


by_torch = cx.adapters.torch.double_backward(Branching(), criterion, loader)
print(cx.eigsh(by_torch, k=2, seed=0))

matrix = torch.diag(torch.arange(1.0, 101.0))
print(cx.eigsh(cx.adapters.torch.from_matvec(lambda v: matrix @ v, 100), k=2, seed=0))
