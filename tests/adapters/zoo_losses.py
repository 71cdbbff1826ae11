"""torch's losses: name -> the loss, its targets for outputs (6, 3), and a last activation."""

import torch
import torch.nn.functional as F
from torch import nn


def labels():
    return torch.tensor([0, 2, 1, 2, 0, 1])


def values():
    return torch.randn(6, 3)


def shares():
    return torch.randn(6, 3).softmax(-1)


def chances():
    return torch.rand(6, 3)


def flags():
    return (torch.rand(6, 3) > 0.5).to(torch.get_default_dtype())


def signs():
    return torch.sign(torch.randn(6, 3))


def counts():
    return torch.randint(0, 5, (6, 3)).to(torch.get_default_dtype())


def sets():
    return torch.tensor([[0, 2, -1]] * 3 + [[1, -1, 0]] * 3)


def log_softmax():
    return nn.LogSoftmax(-1)


def weights(x):
    return torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)


def contrast(a, b):
    return F.cross_entropy(F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T, torch.arange(6))


def cosine(a, b):
    return F.cosine_embedding_loss(a, b, torch.tensor([1.0, -1, 1, 1, -1, 1]), margin=-0.2)


def apart(a, b):
    return 1 - F.cosine_similarity(a, b)


LOSSES = {
    "l1": (nn.L1Loss(), values, nn.Identity),
    "mse": (nn.MSELoss(), values, nn.Identity),
    "huber": (nn.HuberLoss(delta=0.3), values, nn.Identity),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.3), values, nn.Identity),
    "smooth-l1-0": (nn.SmoothL1Loss(beta=0.0), values, nn.Identity),
    "cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), labels, nn.Identity),
    "cross-entropy-weighted": (
        lambda o, t: F.cross_entropy(o, t, weights(o), label_smoothing=0.1),
        labels,
        nn.Identity,
    ),
    "cross-entropy-shares": (
        lambda o, t: F.cross_entropy(o, t, weights(o), label_smoothing=0.1),
        shares,
        nn.Identity,
    ),
    "nll": (lambda o, t: F.nll_loss(o, t, weights(o), ignore_index=0), labels, log_softmax),
    "bce": (nn.BCELoss(), chances, nn.Sigmoid),
    "bce-logits": (
        lambda o, t: F.binary_cross_entropy_with_logits(o, t, pos_weight=weights(o)),
        chances,
        nn.Identity,
    ),
    "soft-margin": (nn.SoftMarginLoss(), signs, nn.Identity),
    "multilabel-soft": (nn.MultiLabelSoftMarginLoss(), flags, nn.Identity),
    "multilabel-margin": (nn.MultiLabelMarginLoss(), sets, nn.Identity),
    "multi-margin": (nn.MultiMarginLoss(p=2, margin=0.5), labels, nn.Identity),
    "hinge-embedding": (nn.HingeEmbeddingLoss(margin=0.4), signs, nn.Identity),
    "kl": (nn.KLDivLoss(reduction="batchmean"), shares, log_softmax),
    "kl-log": (
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        lambda: shares().log(),
        log_softmax,
    ),
    "poisson": (nn.PoissonNLLLoss(full=True), counts, nn.Identity),
    "gaussian": (
        lambda o, t: F.gaussian_nll_loss(o, t, F.softplus(o) + 0.1, full=True),
        values,
        nn.Identity,
    ),
    "cosine": (cosine, values, nn.Identity),
    "ranking": (
        lambda o, t: F.margin_ranking_loss(o[:, 0], o[:, 1], t[:, 0], margin=0.1),
        signs,
        nn.Identity,
    ),
    "triplet": (lambda o, t: F.triplet_margin_loss(o, o.flip(0), t), values, nn.Identity),
    "triplet-swapped": (
        lambda o, t: F.triplet_margin_loss(o, t, o.roll(1, 0), p=1, swap=True),
        values,
        nn.Identity,
    ),
    "triplet-distance": (
        lambda o, t: F.triplet_margin_with_distance_loss(
            o, t, o.roll(1, 0), distance_function=apart
        ),
        values,
        nn.Identity,
    ),
    "contrastive": (contrast, values, nn.Identity),
}
