"""Features of made pictures whose true distances are known: what a statistic's interval should cover."""

import math

import torch
from torch import Tensor


class World:
    """Features (N, 64) of pictures under shared conditions: mixed 5-dimensional Gaussians whose true KID is known."""

    width = 64

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.means = self.normal(3, self.width)
        self.mix = self.normal(5, self.width)
        # Standard features: what the statistic does with the sample's mean and scale is then known.
        self.means -= self.means.mean(0)
        variance = self.means.square().mean() + self.mix.square().sum(0).mean() + 0.04
        self.means, self.mix, self.noise = (x / variance.sqrt() for x in (self.means, self.mix, 0.2))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def conditions(self, count: int) -> tuple[Tensor, Tensor]:
        return torch.randint(3, (count,), generator=self.generator), self.normal(count, 5)

    def draw(self, conditions: tuple[Tensor, Tensor], shift: float = 0, scale: float = 1) -> Tensor:
        """Features under the conditions, half of the variation the sample's own."""
        kind, common = conditions
        z = (common + self.normal(len(kind), 5)) / math.sqrt(2)
        return self.means[kind] + shift + scale * z @ self.mix + self.noise * self.normal(len(kind), self.width)

    def moments(self, shift: float = 0, scale: float = 1) -> list[Tensor]:
        """E x, E x x^T, E x x x of `draw`."""
        covariance = scale**2 * self.mix.T @ self.mix + self.noise**2 * torch.eye(self.width, dtype=torch.float64)
        found = []
        for mean in self.means + shift:
            outer = torch.einsum("i,jk->ijk", mean, covariance)
            third = torch.einsum("i,j,k->ijk", mean, mean, mean)
            third = third + outer + outer.permute(1, 0, 2) + outer.permute(1, 2, 0)
            found.append([mean, covariance + mean.outer(mean), third])
        return [torch.stack(moment).mean(0) for moment in zip(*found, strict=True)]

    def kid(self, **drawn: float) -> float:
        """The true squared MMD of `draw(**drawn)` to `draw()`: (x.y / D + 1)^3 expanded into moments."""
        terms = zip((3, 3, 1), self.moments(**drawn), self.moments(), (1, 2, 3), strict=True)
        return sum(c * (p - q).square().sum().item() / self.width**power for c, p, q, power in terms)

    def mmd(self, shift: float = 0, scale: float = 1) -> float:
        """The true squared MMD of `draw(shift, scale)` to `draw()`: a Gaussian kernel's mean over Gaussian gaps."""
        eye = torch.eye(self.width, dtype=torch.float64)

        def mean(shifts: tuple[float, float], scales: tuple[float, float]) -> float:
            gaps = (self.means + shifts[0])[:, None] - (self.means + shifts[1])
            total = (scales[0] ** 2 + scales[1] ** 2) * self.mix.T @ self.mix + 2 * self.noise**2 * eye
            exponent = torch.einsum("abi,ij,abj->ab", gaps, (self.width * eye + total).inverse(), gaps)
            return (-(exponent / 2)).exp().mean().item() / math.sqrt(torch.det(eye + total / self.width).item())

        within = mean((shift, shift), (scale, scale)) + mean((0, 0), (1, 1))
        return within - 2 * mean((shift, 0), (scale, 1))
