"""Linear algebra and Fourier transforms of a matrix (4, 5)."""

import numpy as np  # noqa: F401
import torch
import torch.nn.functional as F
from torch import nn  # noqa: F401


def spd(x):
    return x @ x.mT + torch.eye(4, dtype=x.dtype)


ALGEBRA = {
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x * x),
    "einsum_ell": lambda x: torch.einsum("...i,...i->...", x, x),
    "einsum_tr": lambda x: torch.einsum("ii->i", x[:, :4]),
    "einsum_list": lambda x: torch.einsum("ij,jk", [x, x.t()]),
    "einsum_3": lambda x: torch.einsum("ij,jk,kl->il", x, x.t(), x),
    "einsum_sub": lambda x: torch.einsum(x, [0, 1], x, [0, 2], [1, 2]),
    "einsum_one": lambda x: torch.einsum("ij->ji", x),
    "baddbmm": lambda x: torch.baddbmm(
        x.view(2, 2, 5)[:, :, :2], x.view(2, 2, 5), x.view(2, 5, 2), beta=0.5, alpha=2
    ),
    "baddbmm0": lambda x: torch.baddbmm(
        torch.empty(2, 2, 2), x.view(2, 2, 5), x.view(2, 5, 2), beta=0, alpha=2
    ),
    "bmm": lambda x: torch.bmm(x.view(2, 2, 5), x.view(2, 5, 2)),
    "addmm": lambda x: torch.addmm(x[:4, :4], x, x.t(), beta=2, alpha=0.3),
    "addmv": lambda x: torch.addmv(x[:, 0], x, x[0], alpha=2),
    "addbmm": lambda x: torch.addbmm(x[:2, :2], x.view(2, 2, 5), x.view(2, 5, 2), beta=3),
    "mm": lambda x: torch.mm(x, x.t()),
    "mv": lambda x: torch.mv(x, x[0]),
    "matmul_b": lambda x: x.view(2, 2, 5) @ x.t(),
    "matmul_1d": lambda x: x[0] @ x.t(),
    "matmul_b1": lambda x: torch.matmul(x.view(2, 2, 5), x[0]),
    "matmul_bb": lambda x: x.view(2, 1, 2, 5) @ x.view(1, 2, 5, 2),
    "chain": lambda x: (
        torch.chain_matmul(x, x.t(), x) if False else torch.linalg.multi_dot([x, x.t(), x])
    ),
    "inv": lambda x: torch.linalg.inv(spd(x)),
    "inverse": lambda x: spd(x).inverse(),
    "det": lambda x: torch.det(spd(x)),
    "logdet": lambda x: torch.logdet(spd(x)),
    "slogdet": lambda x: torch.linalg.slogdet(spd(x))[1],
    "slogdet_old": lambda x: torch.slogdet(spd(x)).logabsdet,
    "solve": lambda x: torch.linalg.solve(spd(x), x),
    "solve_v": lambda x: torch.linalg.solve(spd(x), x[:, 0]),
    "solve_sq": lambda x: torch.linalg.solve(spd(x), x[:, :4]),
    "solve_b": lambda x: torch.linalg.solve(torch.stack([spd(x), spd(x) * 2]), torch.stack([x, x])),
    "cholesky": lambda x: torch.linalg.cholesky(spd(x)),
    "cholesky_up": lambda x: torch.linalg.cholesky(spd(x), upper=True),
    "chol_old": lambda x: torch.cholesky(spd(x)) if False else torch.linalg.cholesky_ex(spd(x)).L,
    "cholesky_solve": lambda x: torch.cholesky_solve(x, torch.linalg.cholesky(spd(x))),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(spd(x))),
    "tri_solve": lambda x: torch.linalg.solve_triangular(
        torch.linalg.cholesky(spd(x)), x, upper=False
    ),
    "tri_solve_right": lambda x: torch.linalg.solve_triangular(
        torch.linalg.cholesky(spd(x)), x.mT, upper=False, left=False
    ),
    "eigh": lambda x: torch.linalg.eigh(spd(x))[0],
    "eigvalsh": lambda x: torch.linalg.eigvalsh(spd(x)),
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "svd": lambda x: torch.linalg.svd(x, full_matrices=False)[1],
    "svd_vh": lambda x: torch.linalg.svd(x, full_matrices=False)[2].square(),
    "qr": lambda x: torch.linalg.qr(x.mT)[1].abs(),
    "pinv": lambda x: torch.linalg.pinv(x),
    "matrix_exp": lambda x: torch.matrix_exp(x[:, :4]),
    "matrix_power": lambda x: torch.linalg.matrix_power(x[:, :4], 3),
    "trace": lambda x: torch.trace(x[:, :4]),
    "kron": lambda x: torch.kron(x, x),
    "householder": lambda x: torch.linalg.householder_product(
        x.mT.tril(-1) + torch.eye(5, 4), x[:, 0]
    ),
    "cond": lambda x: torch.linalg.cond(spd(x)),
    "vecdot": lambda x: torch.linalg.vecdot(x, x),
    "outer": lambda x: x[:, None] * x[None],
    "inner": lambda x: torch.inner(x, x),
    "bilinear": lambda x: F.bilinear(x, x, x.new_ones(2, 5, 5)),
    "linear": lambda x: F.linear(x, x, x[:, 0]),
    "linear_1d": lambda x: F.linear(x[0], x),
    "solve_ex": lambda x: torch.linalg.solve_ex(spd(x), x)[0],
    "inv_ex": lambda x: torch.linalg.inv_ex(spd(x))[0],
}

FOURIER = {
    "rfft": lambda x: torch.fft.rfft(x).abs(),
    "fft": lambda x: torch.fft.fft(x, dim=0).real,
    "irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1), n=5, dim=-1) * x,
    "irfft_filter": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.arange(3.0), n=5),
    "fft2": lambda x: torch.fft.fft2(x).abs().square(),
    "rfft2": lambda x: torch.fft.irfft2(
        torch.fft.rfft2(x, norm="ortho") * 2, s=(4, 5), norm="ortho"
    ),
    "rfftn": lambda x: torch.fft.irfftn(torch.fft.rfftn(x), s=(4, 5)),
    "irfft2_odd": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(4, 5)),
    "ifft": lambda x: torch.fft.ifft(torch.complex(x, x * x)).imag,
    "fftshift": lambda x: torch.fft.fftshift(x),
    "hfft": lambda x: torch.fft.hfft(torch.complex(x, x * x)),
    "stft": lambda x: (
        torch.stft(x, 4, hop_length=2, return_complex=True, window=torch.ones(4)).abs().square()
    ),
    "abs": lambda x: torch.complex(x, x * x).abs(),
    "angle": lambda x: torch.complex(x, x * x).angle(),
    "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
    "view_as_complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 5, 2)) * (1 + 2j)
    ),
    "conj": lambda x: torch.view_as_real(torch.complex(x, x * x).conj() * torch.complex(x, x)),
    "mul_j": lambda x: (x * 1j + x * x).abs(),
    "cexp": lambda x: torch.exp(1j * x).real,
    "rotary": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(4, -1, 1).repeat(1, 1, 2))
        * torch.polar(torch.ones(5), torch.arange(5.0))
    ).flatten(1),
    "cmatmul": lambda x: (torch.complex(x, x * x) @ torch.complex(x, x).T).real,
    "norm_ortho": lambda x: torch.fft.rfft(x, norm="ortho").imag,
    "norm_fwd": lambda x: torch.fft.irfft(torch.fft.rfft(x, norm="forward"), n=5, norm="forward"),
    "fft_n": lambda x: torch.fft.rfft(x, n=8).abs(),
    "real_set": lambda x: torch.complex(x, x).real * x,
    "sgn": lambda x: torch.complex(x, x * x).sgn().real,
    "creciprocal": lambda x: (1 / torch.complex(x, x * x + 1)).real,
}
