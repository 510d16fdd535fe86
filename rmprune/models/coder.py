"""The frozen path of PNNH: an autoencoder that carries half of a block's information.

Zhang et al. 2024, "Peeking Behind the Curtains of Residual Learning" (arXiv 2402.08645): what a
residual connection does for a deep network can be done by a path inside its plain layers, which
squeezes x into half of the hidden channels and restores it behind the activation. It is learned
before the training, on random inputs like those that it will see (eq. 10), and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmprune.errors import UsageError

Pretext = Literal["none", "untrained", "normal", "uniform", "rectified normal", "identity"]

INITIAL_STD = 0.01
STEPS = 500
POSITIONS = 256  # per step: inputs of a pointwise coder, or those of a few images
IMAGE_SIZE = 8  # pixels, of images for kernels that see neighbours
MOMENTUM = 0.9
SAMPLES: Mapping[str, Callable[[tuple[int, ...]], Tensor]] = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "rectified normal": lambda shape: torch.randn(shape).relu_(),
}


class Coder(nn.Module):
    """``decoder(activation(encoder(x)))``, frozen, without biases.

    With a ReLU, ``coder(a · x) = a · coder(x)`` for a > 0: one that has learned inputs of unit
    variance serves inputs of any.

    Args:
        encoder: A convolution, or a linear layer for tokens, without bias; of odd kernels and
            with equal padding, so that the shape is kept.
        decoder: The same, from the encoder's outputs to its inputs. None ties it to a
            convolution: the transposed kernels.
        activation: Between them.
    """

    def __init__(
        self,
        encoder: nn.Conv2d | nn.Linear,
        decoder: nn.Conv2d | nn.Linear | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.activation = nn.ReLU() if activation is None else activation
        self.decoder = decoder
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INITIAL_STD)
        self.requires_grad_(False)

    @classmethod
    def of_images(
        cls, channels: int, hidden: int, kernel_size: int = 1, tied: bool = False
    ) -> Coder:
        """For ``(N, channels, H, W)``.

        Args:
            channels: Of the images.
            hidden: Channels between encoder and decoder.
            kernel_size: Odd.
            tied: Whether the decoder has the encoder's kernels, transposed.
        """
        padding = kernel_size // 2
        encoder = nn.Conv2d(channels, hidden, kernel_size, padding=padding, bias=False)
        if tied:
            return cls(encoder)
        return cls(encoder, nn.Conv2d(hidden, channels, kernel_size, padding=padding, bias=False))

    @classmethod
    def of_tokens(cls, channels: int, hidden: int, activation: nn.Module) -> Coder:
        """For ``(…, channels)``."""
        encoder = nn.Linear(channels, hidden, bias=False)
        return cls(encoder, nn.Linear(hidden, channels, bias=False), activation)

    def forward(self, x: Tensor) -> Tensor:
        """Restore x, as far as the hidden channels allow; the shape is kept."""
        hidden = self.activation(self.encoder(x))
        if self.decoder is not None:
            restored: Tensor = self.decoder(hidden)
            return restored
        weight = self.encoder.weight.transpose(0, 1).flip(2, 3)
        return F.conv2d(hidden, weight, padding=weight.shape[-1] // 2)


def pretrain_coders(model: nn.Module, pretext: Pretext = "rectified normal") -> None:
    """Prepare all coders of a model for its training; a model without any stays as it is.

    Random numbers come from torch's generator, as those of any initialisation.

    Args:
        model: On the CPU, or on the meta device, where there is nothing to learn.
        pretext: The inputs that the coders learn to restore: ``"normal"``, ``"uniform"`` in
            [0, 1) or ``"rectified normal"`` ones. ``"identity"``: they copy the first channels,
            as many as they have hidden ones, and drop the others. ``"untrained"``: they stay
            random; ``"none"``: they put out 0.

    Raises:
        UsageError: There is no such pretext task.
    """
    if pretext not in get_args(Pretext):
        raise UsageError(f"unknown pretext task {pretext!r}; known: {', '.join(get_args(Pretext))}")
    for module in model.modules():
        if isinstance(module, Coder) and not module.encoder.weight.is_meta:
            if pretext == "none":
                _fill(module, nn.init.zeros_)
            elif pretext == "identity":
                _fill(module, _copying_)
            elif pretext != "untrained":
                _learn(module, SAMPLES[pretext])


def _fill(coder: Coder, fill: Callable[[Tensor], Tensor]) -> None:
    for parameter in coder.parameters():
        fill(parameter)


def _copying_(weight: Tensor) -> Tensor:
    """Copy the first inputs at the kernel's centre."""
    return nn.init.eye_(weight) if weight.ndim == 2 else nn.init.dirac_(weight)


@torch.enable_grad()
def _learn(coder: Coder, sample: Callable[[tuple[int, ...]], Tensor]) -> None:
    """Minimise the mean of (x - coder(x))² by SGD (eq. 10), at a learning rate that falls to 0."""
    channels, kernel = coder.encoder.weight.shape[1], coder.encoder.weight.shape[2:]
    size = IMAGE_SIZE if max(kernel, default=1) > 1 else 1
    shape = (POSITIONS // size**2, channels, *(size for _ in kernel))
    coder.requires_grad_(True)
    rate = 1 / math.prod(kernel)  # an output adds up as many positions, and SGD diverges sooner
    optimizer = torch.optim.SGD(coder.parameters(), lr=rate, momentum=MOMENTUM)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / STEPS)
        x = sample(shape).to(coder.encoder.weight)
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(coder(x), x))
        optimizer.step()
    optimizer.zero_grad()
    coder.requires_grad_(False)
