"""The canvas of a phantom: coordinates, soft edges, blobs, lines, noise, and X-ray exposure.

Coordinates are from -1 to 1, x to the viewer's right and y downwards, in the patient's frame; the canvas is slightly
shifted, rotated and scaled. Shapes add attenuation, which exposure converts to gray levels at the end. Arrays are
float32 of shape (size, size).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .phantom_wording import FindingDetail

#: The mask of a finding is where it changes the attenuation by more than this.
VISIBLE = 0.02

# Freeing one large block makes glibc keep freed memory of the size of these arrays, which saves a quarter of the time.
np.empty(16_000_000, np.uint8)


def ramp(distance: np.ndarray, softness: float) -> np.ndarray:
    """0 outside and 1 inside of a signed distance, with a linear edge of width `softness`."""
    edge = distance * np.float32(1 / softness)
    edge += np.float32(0.5)
    return np.clip(edge, 0, 1, out=edge)


def smooth(distance: np.ndarray, softness: float) -> np.ndarray:
    """As `ramp`, with a smooth edge."""
    edge = ramp(distance, softness)
    return edge * edge * (3 - 2 * edge)


def curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A smooth path (cubic Bézier) from the first of four points to the last."""
    t = np.linspace(0, 1, 24)[:, None]
    a, b, c, d = np.asarray(points)
    return [tuple(p) for p in (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d]


class Canvas:
    """Grids of patient coordinates `x` and `y`, and the attenuation drawn so far.

    Args:
        size: height and width in pixels.
        rng: generator of the position of the canvas and of its noise.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self.size = size
        angle, self._scale = rng.normal(0, 0.02), rng.uniform(0.96, 1.06)
        self._cos, self._sin = np.cos(angle), np.sin(angle)
        self._shift = rng.normal(0, 0.025, 2)
        axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
        across, down = (axis - self._shift[0])[None, :], (axis - self._shift[1])[:, None]
        self.x = ((self._cos * across + self._sin * down) * self._scale).astype(np.float32)
        self.y = ((self._cos * down - self._sin * across) * self._scale).astype(np.float32)
        self.attenuation = np.zeros((size, size), np.float32)
        self._rng = rng

    def pixels(self, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """Pixel coordinates (n, 2), column then row, of points in the patient's frame."""
        x, y = np.asarray(points, np.float64).T / self._scale
        across, down = self._cos * x - self._sin * y + self._shift[0], self._sin * x + self._cos * y + self._shift[1]
        return (np.stack([across, down], axis=1) + 1) * (self.size / 2) - 0.5

    def blob(self, x: float, y: float, width: float, height: float | None = None) -> np.ndarray:
        """A Gaussian of height 1 and these standard deviations."""
        far = ((self.x - np.float32(x)) * np.float32(1 / width)) ** 2
        far += ((self.y - np.float32(y)) * np.float32(1 / (height or width))) ** 2
        far *= np.float32(-0.5)
        return np.exp(far, out=far)

    def ellipse(self, x: float, y: float, width: float, height: float, tilt: float = 0.0) -> np.ndarray:
        """Signed distance (approximate, positive inside) to an ellipse with these semi-axes, tilted clockwise."""
        u, v = self.x - np.float32(x), self.y - np.float32(y)
        if tilt:
            cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
            u, v = cos * u + sin * v, cos * v - sin * u
        u *= np.float32(1 / width)
        v *= np.float32(1 / height)
        u *= u
        v *= v
        u += v
        distance = 1 - np.sqrt(u, out=u)
        distance *= np.float32(min(width, height))
        return distance

    def patches(self, x: float, y: float, rng: np.random.Generator) -> np.ndarray:
        """A cluster of fluffy patches of height 1 about a point."""
        cluster = np.zeros_like(self.x)
        for across, down in rng.normal(0, 0.08, (8, 2)).clip(-0.14, 0.14):
            cluster += self.blob(x + across, y + down, rng.uniform(0.03, 0.05))
        return np.minimum(cluster, 1, out=cluster)

    def lines(self, paths: Sequence[Sequence[tuple[float, float]]], width: float) -> np.ndarray:
        """Antialiased lines of height 1 through the points of each path."""
        sharp = 2  # drawn twice as large and averaged
        sheet = Image.new("L", (self.size * sharp, self.size * sharp))
        pen = ImageDraw.Draw(sheet)
        thickness = max(1, round(width / 2 * self.size * sharp / self._scale))
        for path in paths:
            points = [tuple((point + 0.5) * sharp) for point in self.pixels(path)]
            pen.line(points, fill=255, width=thickness, joint="curve")
        return np.asarray(sheet.reduce(sharp), np.float32) / 255

    def texture(self, cells: int, rng: np.random.Generator) -> np.ndarray:
        """Smooth noise with mean 0, deviation of about 1, and `cells` grains across the canvas."""
        grains = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        return np.asarray(grains.resize((self.size, self.size), Image.Resampling.BICUBIC))

    def add(self, change: np.ndarray) -> np.ndarray:
        """Add to the attenuation, and return the mask of the visible change."""
        self.attenuation += change
        return np.abs(change) > VISIBLE

    def expose(self) -> Image.Image:
        """The 8-bit grayscale radiograph: film curve, exposure, scatter and quantum noise."""
        rng = self._rng
        gain, base = rng.uniform(1.45, 1.75), rng.uniform(0.0, 0.03)
        noise = rng.standard_normal((self.size, self.size), dtype=np.float32)
        noise *= np.float32(rng.uniform(0.008, 0.022))
        scatter = self.texture(5, rng)
        density = self.attenuation + np.float32(0.015) * scatter
        gray = np.float32(base) + (1 - np.exp(np.float32(-gain) * density)) + noise
        return Image.fromarray((np.clip(gray, 0, 1) * 255).astype(np.uint8))


class PhantomView:
    """Draws one view of a phantom.

    Args:
        canvas: an empty canvas.
        stream: returns a generator for a name, so that findings do not influence each other.
        strengths: visibility of each finding: 1 positive, less than 1 unclear, 0 absent.
        details: side, zone, size and device of each finding.

    Attributes:
        masks: (size, size) mask of each present and visible finding drawn so far.
    """

    prefix = ""  # of the names of the generators of findings

    def __init__(
        self,
        canvas: Canvas,
        stream: Callable[[str], np.random.Generator],
        strengths: Mapping[str, float],
        details: Mapping[str, FindingDetail],
    ):
        self.canvas, self.stream, self.strengths, self.details = canvas, stream, strengths, details
        self.masks: dict[str, np.ndarray] = {}

    def add(self, finding: str, draw: Callable[[np.random.Generator, FindingDetail], np.ndarray]) -> None:
        """Draw a finding if it is present."""
        if self.strengths[finding]:
            change = draw(self.stream(self.prefix + finding), self.details[finding])
            self.masks[finding] = self.canvas.add(np.float32(self.strengths[finding]) * change)
