"""The frontal view of a phantom: anatomy and findings.

Longer than three screens because the anatomy and the 13 findings share one geometry.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .phantom_canvas import Canvas, PhantomView, curve, ramp, smooth
from .phantom_wording import FindingDetail

_RIB_SPACING = 0.165


class Frontal(PhantomView):
    """Draws one frontal view."""

    def __init__(self, canvas: Canvas, stream: Callable[[str], np.random.Generator], *findings):
        super().__init__(canvas, stream, *findings)
        rng = stream("frontal anatomy")
        self.half_width = rng.uniform(0.70, 0.80)
        self.apex = rng.normal(-0.76, 0.025)
        self.right_dome = rng.normal(0.50, 0.04)
        self.centre = rng.normal(0, 0.012)
        self.side_x = canvas.x - np.float32(self.centre)
        self.left = canvas.x > self.centre  # the patient's left is on the viewer's right
        self.out = np.abs(self.side_x)
        # Each lung narrows towards its apex around the line |x| = 0.34.
        waist = 0.34
        up = np.clip((np.float32(0.45) - canvas.y) * np.float32(1 / (0.45 - self.apex)), 0, 1)
        self.narrowing = np.sqrt(1 - up**2.4)
        self.wall = waist + (self.half_width - waist) * self.narrowing
        inner = waist - (waist - 0.04) * self.narrowing
        arch = ((self.out - 0.36) * np.float32(1 / 0.44)) ** 2
        self.dome = self.right_dome + np.where(self.left, np.float32(0.06), np.float32(0)) + np.float32(0.24) * arch
        self.above = self.dome - canvas.y
        edge = np.minimum(np.minimum(self.wall - self.out, self.out - inner), self.above)
        self.lung = ramp(edge - 0.0125, 0.025)

    def draw(self) -> dict[str, np.ndarray]:
        """Draw the view, and return the mask (size, size) of each present finding."""
        silhouette = self._silhouette()
        self._bones()
        # A finding is fainter where it overlaps the heart.
        self.visible = self.lung * (1 - np.float32(0.55) * silhouette)
        self._markings(silhouette)
        for finding, draw in (
            ("lung_opacity", self._opacity),
            ("consolidation", self._consolidation),
            ("pneumonia", self._pneumonia),
            ("atelectasis", self._atelectasis),
            ("lung_lesion", self._lesion),
            ("pleural_other", self._thickening),
            ("pleural_effusion", self._effusion),
            ("support_devices", self._device),
        ):
            self.add(finding, draw)
        return self.masks

    def _silhouette(self) -> np.ndarray:
        """Draw soft tissue, and return the outline of heart and mediastinum."""
        rng, canvas, y = self.stream("frontal silhouette"), self.canvas, self.canvas.y
        shoulder = 0.22 + 1.1 * smooth(y + 0.83, 0.36)
        flank = self.half_width + 0.13 + 0.5 * smooth(-0.2 - y, 0.4)
        body = ramp(np.minimum(shoulder, flank) - self.out, 0.05)
        body *= np.float32(rng.uniform(0.66, 0.74)) + 0.22 * ramp(-self.above, 0.1)

        # Mediastinum: a column with the aortic knob on the patient's left.
        strength = self.strengths["enlarged_cardiomediastinum"]
        widening = 0.16 * strength * np.exp(-(((y + 0.28) * np.float32(1 / 0.3)) ** 4)) if strength else 0.0
        half = rng.uniform(0.115, 0.145) + 0.03 * np.clip(y + 0.1, 0, 1)
        knob = rng.uniform(0.035, 0.06)
        half = half + np.where(self.left, knob, 0) * np.exp(-(((y + 0.3) * np.float32(1 / 0.1)) ** 2))
        column = ramp(half + widening - self.out, 0.03)
        if strength:
            self.masks["enlarged_cardiomediastinum"] = (column > 0) & (widening > 0.002)

        # Heart: the cardiothoracic ratio is 0.40 to 0.47 if normal, 0.52 if unclear, above 0.57 if enlarged.
        strength, detail = self.strengths["cardiomegaly"], self.details["cardiomegaly"]
        ratio = rng.uniform(0.40, 0.47)
        if strength:
            bounds = (0.57, 0.61) if detail.size == "small" else (0.66, 0.71)
            ratio = self.stream("cardiomegaly").uniform(*bounds) if strength == 1 else 0.52
        width = ratio * self.half_width
        heart_y = self.right_dome - 0.5 * width + 0.02
        ventricles = canvas.ellipse(self.centre + 0.36 * width, heart_y, width, 0.76 * width, tilt=0.42)
        outflow = canvas.ellipse(self.centre + 0.14 * width, heart_y - 0.50 * width, 0.66 * width, 0.66 * width)
        heart = ramp(np.maximum(ventricles, outflow), 0.035)
        if strength:
            self.masks["cardiomegaly"] = (heart > 0) & (self.above > -0.0125)
        silhouette = np.maximum(column, heart)

        canvas.add(body * (1 - np.float32(0.74) * self.lung * (1 - silhouette)) + np.float32(0.10) * silhouette * body)
        # Trachea and main bronchi are full of air, and so is the stomach under the left dome.
        airway = np.abs(self.out - np.clip((y + 0.24) * np.float32(0.9), 0, 0.16))
        canvas.add(-0.22 * ramp(0.033 - airway, 0.03) * ramp(-0.06 - y, 0.1) * ramp(y + 1.0, 0.1) * body)
        bubble_size = rng.uniform(0.05, 0.11)
        bubble = canvas.ellipse(0.36, self.right_dome + 0.17 + 0.6 * bubble_size, 1.6 * bubble_size, bubble_size)
        canvas.add(-0.25 * ramp(bubble, 0.05) * (1 - self.lung))
        return silhouette

    def _bones(self) -> None:
        rng, y, out = self.stream("frontal bones"), self.canvas.y, self.out
        vertebrae = 0.11 + 0.035 * np.cos(y * np.float32(2 * np.pi / 0.14))
        bone = vertebrae * ramp(0.075 - out, 0.03)
        cage = ramp(self.wall + 0.06 - out, 0.04) * ramp(0.26 + self.above, 0.3) * ramp(out - 0.06, 0.06)
        cage *= self.narrowing > 0
        start = self.apex + rng.uniform(0.02, 0.05)
        u = out * np.float32(1 / self.half_width)
        posterior = (y - np.float32(start) + 0.07 * u - 0.34 * u * u) * np.float32(1 / _RIB_SPACING)
        anterior = (y - np.float32(start) - 0.30 - 0.34 * (1 - u)) * np.float32(1 / (_RIB_SPACING * 1.1))
        strength = rng.uniform(0.08, 0.13)
        bone += strength * cage * _bars(posterior, 0.20)
        bone += 0.55 * strength * cage * ramp(out - 0.34, 0.2) * _bars(anterior, 0.24)
        # Clavicles.
        line = np.abs(y - np.float32(self.apex) - 0.19 + 0.20 * out - 0.10 * out * out)
        bone += 0.16 * ramp(0.022 - line, 0.02) * ramp(out - 0.07, 0.04) * ramp(0.72 - out, 0.1)
        self.canvas.add(bone)
        self.add("fracture", lambda rng, detail: self._fracture(rng, detail, u, start))

    def _fracture(self, rng: np.random.Generator, detail: FindingDetail, u: np.ndarray, start: float) -> np.ndarray:
        """A posterior rib broken in two: a dark gap, the outer end dropped, both ends thick with callus."""
        y = self.canvas.y
        rib, broken = rng.integers(2, 6), rng.uniform(0.56, 0.66)
        centre = start - 0.07 * u + 0.34 * u * u + _RIB_SPACING * (rib + 0.5)
        side = ramp(self.side_x * (1 if detail.side == "left" else -1), 0.01)
        outer = ramp(u - broken - 0.02, 0.02) * ramp(broken + 0.30 - u, 0.02)
        inner = ramp(broken - 0.03 - u, 0.02) * ramp(u - broken + 0.22, 0.02)
        gap = ramp(0.025 - np.abs(u - broken + 0.005), 0.02)
        drop = 0.075 - 0.12 * np.clip(u - broken, 0, 1)
        change = 0.42 * outer * ramp(0.036 - np.abs(y - centre - drop), 0.02)
        change += 0.36 * inner * ramp(0.036 - np.abs(y - centre), 0.02)
        change -= 0.14 * gap * ramp(0.045 - np.abs(y - centre), 0.02)
        change -= 0.10 * outer * ramp(0.026 - np.abs(y - centre + 0.01), 0.02)
        return side * change

    def _markings(self, silhouette: np.ndarray) -> None:
        """Vessels from the hila; edema thickens and blurs them, and a pneumothorax has none."""
        rng, canvas, y = self.stream("frontal vessels"), self.canvas, self.canvas.y
        hilum_x, hilum_y = rng.uniform(0.15, 0.18), rng.uniform(-0.02, 0.04)
        across, down = self.out - np.float32(hilum_x), y - np.float32(hilum_y)
        far = np.sqrt(across * across + down * down)
        spokes = np.maximum(rng.standard_normal(512), 0).astype(np.float32)
        spokes = (spokes + np.roll(spokes, 1) + np.roll(spokes, -1)) / 2
        turn = np.arctan2(down, across) * np.float32(40) + np.float32(4) * canvas.texture(9, rng)
        turn += np.where(self.left, np.float32(256), np.float32(100))
        vessels = spokes[turn.astype(np.int32) % 512] * np.exp(-far * np.float32(3.2)) * np.float32(0.22)
        vessels += 0.13 * np.exp(-(far * far) * np.float32(1 / (2 * 0.07**2)))
        vessels += (0.016 * canvas.texture(24, rng)).astype(np.float32)
        vessels *= self.lung * (1 - silhouette)
        canvas.add(vessels)
        if self.strengths["edema"]:
            amount = 0.6 if self.details["edema"].size == "small" else 1.0
            haze = np.exp(-(((across - 0.10) * np.float32(1 / 0.19)) ** 2) - (down * np.float32(1 / 0.34)) ** 2)
            haze *= (0.34 + 0.08 * canvas.texture(16, self.stream("edema"))).astype(np.float32)
            change = (haze + np.float32(0.9) * vessels) * self.visible
            self.masks["edema"] = canvas.add(np.float32(amount * self.strengths["edema"]) * change)
        self.add("pneumothorax", lambda rng, detail: self._pneumothorax(detail, vessels))

    def _pneumothorax(self, detail: FindingDetail, vessels: np.ndarray) -> np.ndarray:
        """A thin pleural line, and between it and the chest wall air without vessels."""
        y = self.canvas.y
        depth = (0.17 if detail.size == "small" else 0.34) * ramp(0.32 - y, 0.5)
        shrunken = np.clip((np.float32(0.45) - y) / (0.45 - self.apex - 0.55 * depth), 0, 1)
        pleura = 0.34 + (self.half_width - 0.34) * np.sqrt(1 - shrunken**2.4) - depth * 0.75
        beyond = self.out - pleura
        here = self.lung * self._on(detail.side) * ramp(depth - 0.02, 0.04)
        air = ramp(beyond, 0.012) * here
        line = ramp(0.010 - np.abs(beyond), 0.012) * here
        return 0.26 * line - air * (vessels + np.float32(0.13))

    def _on(self, side: str) -> np.ndarray:
        return self.left if side == "left" else ~self.left

    def _place(self, rng: np.random.Generator, detail: FindingDetail) -> tuple[float, float]:
        """A point in the zone of the lung, clear of the heart."""
        out = rng.uniform(0.36, 0.44) if detail.zone == "upper" else rng.uniform(0.46, 0.52)
        y = rng.uniform(-0.36, -0.22) if detail.zone == "upper" else rng.uniform(0.16, 0.28)
        return self.centre + (out if detail.side == "left" else -out), y

    def _opacity(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """Ground glass: large, faint, without an edge."""
        return 0.24 * self.canvas.blob(*self._place(rng, detail), 0.15, 0.17) * self.visible

    def _consolidation(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """A dense part of a lobe, flat along the fissure, with air-filled bronchi dark in it."""
        x, y = self._place(rng, detail)
        down = self.canvas.y - np.float32(y)
        fissure = 0.11 - down if detail.zone == "upper" else down + 0.11
        lobe = self.canvas.ellipse(x, y, rng.uniform(0.27, 0.32), 0.25) + np.float32(0.02) * self.canvas.texture(
            14, rng
        )
        block = np.minimum(ramp(lobe, 0.09), ramp(fissure, 0.02)) * self.visible
        towards = self.centre + 0.3 * (x - self.centre)
        bronchi = self.canvas.lines(
            [[(towards, y), (x + (x - towards), y + turn)] for turn in (-0.13, 0.0, 0.13)], 0.02
        )
        return block * (0.52 - 0.22 * bronchi)

    def _pneumonia(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """A cluster of fluffy patches."""
        x, y = self._place(rng, detail)
        return 0.46 * self.canvas.patches(x, y, rng) * self.visible

    def _atelectasis(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """Plates of collapsed lung: two or three short bands above the dome."""
        side = 1 if detail.side == "left" else -1
        y = self.right_dome + (0.0 if detail.side == "left" else -0.06)
        bands = []
        for step in range(3):
            start, slant = rng.uniform(0.30, 0.36), rng.uniform(-0.03, 0.05)
            height = y - 0.03 - 0.085 * step
            bands.append([(self.centre + side * start, height), (self.centre + side * (start + 0.30), height - slant)])
        fading = self.canvas.blob(self.centre + side * 0.48, y - 0.11, 0.15, 0.4)
        return 0.55 * self.canvas.lines(bands, 0.030) * fading * self.visible

    def _lesion(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """A round nodule or mass with a sharp edge."""
        radius = rng.uniform(0.068, 0.080) if detail.size == "small" else rng.uniform(0.12, 0.14)
        x, y = self._place(rng, detail)
        return 0.50 * ramp(self.canvas.ellipse(x, y, radius, radius * rng.uniform(0.9, 1.1)), 0.02) * self.visible

    def _thickening(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """A bright, wavy strip along the chest wall."""
        y = self.canvas.y
        thickness = 0.065 + 0.02 * np.sin(y * np.float32(rng.uniform(14, 20)))
        strip = ramp(thickness - (self.wall - self.out), 0.015) * ramp(0.34 - np.abs(y + 0.05), 0.06)
        return 0.55 * strip * self.visible * self._on(detail.side)

    def _effusion(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """Fluid that hides the costophrenic angle and climbs the chest wall: a meniscus."""
        bottom = self.right_dome + (0.30 if detail.side == "left" else 0.24)
        u = self.out * np.float32(1 / self.half_width)
        if detail.size == "small":
            surface = bottom - rng.uniform(0.36, 0.42) * (0.25 + 0.75 * u**3)
        else:
            surface = bottom - rng.uniform(0.78, 0.90) * (0.62 + 0.38 * u**3)
        # Fluid and heart are equally dense: where they overlap, the heart's outline is lost.
        hidden = np.clip(2 * self.visible - self.lung, 0, 1)
        return 0.58 * ramp(self.canvas.y - surface, 0.03) * hidden * self._on(detail.side)

    def _device(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        canvas = self.canvas
        if detail.device == "tube":
            tip = rng.uniform(-0.30, -0.24)
            metal = 0.55 * canvas.lines(
                [[(self.centre + s, -1.2), (self.centre + s, tip)] for s in (-0.02, 0.02)], 0.016
            )
        elif detail.device == "catheter":
            path = curve([(-0.98, -0.66), (-0.5, -0.66), (-0.10, -0.62), (-0.11, rng.uniform(-0.02, 0.08))])
            metal = 0.6 * canvas.lines([path], 0.026)
        else:
            x, y = rng.uniform(0.50, 0.58), rng.uniform(-0.50, -0.42)
            box = ramp(canvas.ellipse(x, y, 0.12, 0.095), 0.015)
            lead = curve([(x - 0.10, y), (0.02, -0.62), (-0.20, -0.12), (0.16, 0.36)])
            metal = np.maximum(0.9 * box, 0.65 * canvas.lines([lead], 0.024))
        return metal


def _bars(phase: np.ndarray, half: float) -> np.ndarray:
    """1 in the middle of each period of `phase` (for phases of 0 and more), `half` a period to each side."""
    bars = ramp(half - np.abs(phase - np.floor(phase) - 0.5), 0.14)
    return bars * (phase > 0)
