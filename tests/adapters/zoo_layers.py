"""Layers of torch behind a linear one: name -> the layer, and the shape of its input."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

LINE, IMAGE, VOLUME, ROWS = (2, 3, 9), (2, 3, 7, 8), (1, 3, 5, 6, 5), (6, 4)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def sized(mode, size, **options):
    return lambda: Applied(lambda x: F.interpolate(x, size=size, mode=mode, **options))


def fold(x):
    columns = F.unfold(x, (2, 3), stride=(2, 1), padding=(1, 0))
    return F.fold(columns, (7, 8), (2, 3), stride=(2, 1), padding=(1, 0))


def unpool(x):
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(7, 8))


def sample(**options):
    def function(x):
        grid = torch.tanh(0.5 * x[:, :2]).permute(0, 2, 3, 1)
        return F.grid_sample(x, grid, **options)

    return lambda: Applied(function)


def by_shape(shape, layers):
    return {name: (layer, shape) for name, layer in layers.items()}


ACTIVATIONS = {
    name: getattr(nn, name)
    for name in (
        *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh"),
        *("LeakyReLU", "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "RReLU", "SELU", "SiLU"),
        *("Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
    )
}

LAYERS = {
    **by_shape(ROWS, {name.lower(): act for name, act in ACTIVATIONS.items()}),
    **by_shape(
        ROWS,
        {
            "gelu-tanh": lambda: nn.GELU("tanh"),
            "threshold": lambda: nn.Threshold(0.1, 3.0, inplace=True),
            "softmin": lambda: nn.Softmin(-1),
            "prelu-channels": lambda: nn.PReLU(4),
            "bilinear": lambda: Applied(lambda x: F.bilinear(x, x.flip(0), x.new_ones(2, 4, 4))),
            "spectral": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
            "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
            "cayley": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
            "matrix-exp": lambda: parametrizations.orthogonal(
                nn.Linear(4, 4), orthogonal_map="matrix_exp"
            ),
            "cdist": lambda: Applied(lambda x: torch.cdist(x, x.detach() + 1)),
            "cdist-3": lambda: Applied(lambda x: torch.cdist(x, x.detach() + 1, p=3.0)),
            "cdist-inf": lambda: Applied(lambda x: torch.cdist(x, x.detach() + 1, p=float("inf"))),
            "pdist": lambda: Applied(F.pdist),
            "rms-norm": lambda: nn.RMSNorm(4, eps=0.1),
        },
    ),
    **by_shape(
        LINE,
        {
            "conv1d-same": lambda: nn.Conv1d(3, 4, 4, padding="same"),
            "conv1d-reflect": lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"),
            "conv1d-circular": lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"),
            "conv1d-replicate": lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="replicate"),
            "max1d-dilated": lambda: nn.MaxPool1d(2, dilation=3),
            "max1d-ceil": lambda: nn.MaxPool1d(2, ceil_mode=True),
            "avg1d-ceil": lambda: nn.AvgPool1d(4, 3, 1, ceil_mode=True, count_include_pad=False),
            "adaptive-avg1d": lambda: nn.AdaptiveAvgPool1d(4),
            "adaptive-max1d": lambda: nn.AdaptiveMaxPool1d(4),
            "linear1d": sized("linear", 13, align_corners=True),
            "instance-norm": lambda: nn.InstanceNorm1d(3, affine=True),
            "response-norm": lambda: nn.LocalResponseNorm(2),
            "lp-pool": lambda: nn.LPPool1d(2, 3),
        },
    ),
    **by_shape(
        IMAGE,
        {
            "conv-rect": lambda: nn.Conv2d(3, 4, (3, 2), (2, 1), (1, 0), (1, 2)),
            "conv-depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1),
            "conv-transposed": lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, dilation=(1, 2)),
            "conv-transposed-groups": lambda: nn.Sequential(
                nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1, (1, 0), groups=2)
            ),
            "max": lambda: nn.MaxPool2d(3, 2, 1),
            "max-ceil": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            "max-dilated": lambda: nn.MaxPool2d((2, 3), (1, 2), (1, 0), (1, 2)),
            "max-unpool": lambda: Applied(unpool),
            "avg-ceil": lambda: nn.AvgPool2d((4, 3), (3, 2), (1, 1), ceil_mode=True),
            "avg-ceil-inside": lambda: nn.AvgPool2d(3, 2, 1, True, False),
            "avg-divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
            "adaptive-avg": lambda: nn.AdaptiveAvgPool2d((3, 5)),
            "adaptive-max": lambda: nn.AdaptiveMaxPool2d((3, 5)),
            "batch-norm": lambda: nn.BatchNorm2d(3),
            "batch-norm-own": lambda: nn.BatchNorm2d(3, track_running_stats=False),
            "group-norm": lambda: nn.GroupNorm(3, 3, eps=0.1),
            "layer-norm": lambda: nn.LayerNorm((7, 8), bias=False),
            "pad-reflect": lambda: nn.ReflectionPad2d((2, 1, 0, 3)),
            "pad-replicate": lambda: nn.ReplicationPad2d((2, -1, 0, 3)),
            "pad-circular": lambda: nn.CircularPad2d((2, 1, 0, 3)),
            "pad-constant": lambda: nn.ConstantPad2d((1, -2, 3, 0), 1.5),
            "nearest": lambda: nn.Upsample(scale_factor=1.5),
            "nearest-exact": sized("nearest-exact", (10, 5)),
            "bilinear-down": sized("bilinear", (4, 12)),
            "bilinear-factor": lambda: nn.Upsample(scale_factor=1.3, mode="bilinear"),
            "bicubic": sized("bicubic", (10, 5)),
            "bicubic-aligned": sized("bicubic", (4, 12), align_corners=True),
            "area": sized("area", (4, 5)),
            "unfold": lambda: nn.Unfold((2, 3), dilation=2, padding=1),
            "fold": lambda: Applied(fold),
            "grid": sample(align_corners=False),
            "grid-border": sample(align_corners=True, padding_mode="border"),
            "grid-reflection": sample(align_corners=False, padding_mode="reflection"),
            "channel-shuffle": lambda: nn.ChannelShuffle(3),
        },
    ),
    **by_shape(
        VOLUME,
        {
            "conv3d": lambda: nn.Conv3d(3, 2, 2, stride=(1, 2, 1), padding=1),
            "conv3d-transposed": lambda: nn.ConvTranspose3d(3, 2, 2, stride=2),
            "max3d": lambda: nn.MaxPool3d((2, 3, 2), 2, (1, 1, 0), ceil_mode=True),
            "avg3d": lambda: nn.AvgPool3d(3, 2, 1, ceil_mode=True),
            "adaptive-max3d": lambda: nn.AdaptiveMaxPool3d(2),
            "trilinear": sized("trilinear", (4, 7, 3)),
            "pad-replicate3d": lambda: nn.ReplicationPad3d((1, 2, 1, 0, 2, 1)),
        },
    ),
}
