"""Flat-shaded coloured solids seen from cameras around them: a small set of views that needs no files."""

import math
from typing import NamedTuple

import numpy as np

FIELD_OF_VIEW = math.radians(49)
"""Across, as in the renders of Objaverse that Zero-1-to-3 was trained on."""
LIGHT = np.array([0.4, -0.3, 0.85])
"""Where the light comes from, which stays with the solid."""
SHAPES = (
    np.concatenate([np.eye(3), -np.eye(3)]),
    np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / math.sqrt(3),
    np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3),
)
"""Normals of the faces of a cube, an octahedron and a tetrahedron."""


class Solid(NamedTuple):
    """A convex solid: all x with normals @ x <= offsets, faces (K, 3) and (K,), and its colours (K, 3) in [0, 1]."""

    normals: np.ndarray
    offsets: np.ndarray
    colours: np.ndarray


def draw_solid(seed: int) -> Solid:
    """One of SHAPES, its sizes and colours by the seed alone, no wider than about 1."""
    generator = np.random.default_rng(seed)
    normals = SHAPES[generator.integers(len(SHAPES))]
    offsets = generator.uniform(0.2, 0.35, len(normals))
    return Solid(normals, offsets, generator.uniform(0, 1, normals.shape))


def draw_camera(generator: np.random.Generator) -> np.ndarray:
    """A camera anywhere around the origin but straight above or below, 1.5 to 2.2 away, as `look_from` has it."""
    polar, azimuth = math.acos(generator.uniform(-0.9, 0.9)), generator.uniform(0, 2 * math.pi)
    return look_from(polar, azimuth, generator.uniform(1.5, 2.2))


def look_from(polar: float, azimuth: float, radius: float) -> np.ndarray:
    """The world-to-camera matrix (3, 4) of a camera there that looks at the origin: x right, y up, z backwards."""
    sin, cos = math.sin(polar), math.cos(polar)
    back = np.array([sin * math.cos(azimuth), sin * math.sin(azimuth), cos])
    right = np.array([-math.sin(azimuth), math.cos(azimuth), 0.0])
    rotation = np.stack([right, np.cross(back, right), back])
    return np.concatenate([rotation, -(rotation @ (radius * back))[:, None]], 1)


def render(solid: Solid, camera: np.ndarray, side: int, samples: int = 2) -> np.ndarray:
    """The solid on white, as uint8 (3, side, side), from `samples` x `samples` rays a pixel."""
    rotation, centre = camera[:, :3], -camera[:, :3].T @ camera[:, 3]
    at = ((np.arange(side * samples) + 0.5) / (side * samples) * 2 - 1) * math.tan(FIELD_OF_VIEW / 2)
    across, down = np.meshgrid(at, at)
    rays = np.stack([across, -down, -np.ones_like(at + down)], -1) @ rotation
    facing, distance = rays @ solid.normals.T, solid.offsets - solid.normals @ centre
    with np.errstate(divide="ignore", invalid="ignore"):
        where = distance / facing
    enters = np.where(facing < 0, where, -np.inf)  # a ray is inside from its last entrance to its first exit
    leaves = np.where(facing > 0, where, np.inf).min(-1)
    face = enters.argmax(-1)
    hit = (enters.max(-1) < leaves) & (enters.max(-1) > 0)
    shade = 0.55 + 0.45 * (solid.normals @ LIGHT).clip(0, 1)
    picture = np.where(hit[..., None], (solid.colours * shade[:, None])[face], 1.0)
    picture = picture.reshape(side, samples, side, samples, 3).mean((1, 3))
    return (picture * 255).round().astype(np.uint8).transpose(2, 0, 1)
