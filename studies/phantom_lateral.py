"""The lateral view of a phantom, simpler than the frontal view: the patient faces the viewer's left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .phantom_canvas import Canvas, PhantomView, curve, ramp
from .phantom_wording import FindingDetail


class Lateral(PhantomView):
    """Draws one lateral view. It does not show rib fractures."""

    prefix = "lateral "

    def __init__(self, canvas: Canvas, stream: Callable[[str], np.random.Generator], *findings):
        super().__init__(canvas, stream, *findings)
        rng, x, y = stream("lateral anatomy"), canvas.x, canvas.y
        self.depth = rng.uniform(0.52, 0.60)
        self.dome_y = rng.normal(0.42, 0.03)
        fall = np.clip((y + 0.80) * np.float32(1 / 0.75), 0, 1)
        widening = np.sqrt(1 - (1 - fall) ** 2)
        self.front = 0.08 - (self.depth + 0.08) * widening
        self.back = 0.20 + (self.depth - 0.20) * widening
        self.dome = self.dome_y + np.where(x > -0.15, np.float32(0.62), np.float32(0.2)) * (x + np.float32(0.15)) ** 2
        self.lung = ramp(np.minimum(np.minimum(x - self.front, self.back - x), self.dome - y), 0.03)
        self.lung *= y > -0.80

    def draw(self) -> dict[str, np.ndarray]:
        """Draw the view, and return the mask (size, size) of each present and visible finding."""
        heart = self._anatomy()
        self.visible = self.lung * (1 - np.float32(0.5) * heart)
        for finding, draw in (
            ("edema", self._edema),
            ("lung_opacity", self._opacity),
            ("consolidation", self._consolidation),
            ("pneumonia", self._pneumonia),
            ("atelectasis", self._atelectasis),
            ("lung_lesion", self._lesion),
            ("pneumothorax", self._pneumothorax),
            ("pleural_other", self._thickening),
            ("pleural_effusion", self._effusion),
            ("support_devices", self._device),
        ):
            self.add(finding, draw)
        return self.masks

    def _anatomy(self) -> np.ndarray:
        rng, canvas, x, y = self.stream("lateral tissue"), self.canvas, self.canvas.x, self.canvas.y
        body = ramp(np.minimum(x - self.front + 0.14, self.back + 0.26 - x), 0.05)
        body *= np.float32(rng.uniform(0.70, 0.78)) + 0.20 * ramp(y - self.dome, 0.1)
        strength, detail = self.strengths["cardiomegaly"], self.details["cardiomegaly"]
        width = rng.uniform(0.22, 0.25)
        if strength:
            bounds = (0.32, 0.35) if detail.size == "small" else (0.40, 0.44)
            width = self.stream("cardiomegaly").uniform(*bounds) if strength == 1 else 0.28
        heart_x = -0.46 * self.depth + 0.6 * (width - 0.22)
        heart = ramp(canvas.ellipse(heart_x, self.dome_y - 0.80 * width, 0.90 * width, 1.45 * width, tilt=0.7), 0.05)
        if strength:
            self.masks["cardiomegaly"] = (heart > 0) & (self.lung > 0.02)
        widening = self.strengths["enlarged_cardiomediastinum"]
        great_vessels = ramp(canvas.ellipse(-0.10, -0.28, 0.13, 0.30, tilt=0.15), 0.12)
        canvas.add(body * (1 - np.float32(0.66) * self.lung * (1 - heart)) + np.float32(0.06) * heart * self.lung)
        canvas.add(np.float32(0.14) * great_vessels * self.lung * (1 - heart))
        if widening:
            wide = ramp(canvas.ellipse(-0.16, -0.34, 0.28, 0.32, tilt=0.15), 0.08)
            self.masks["enlarged_cardiomediastinum"] = canvas.add(0.30 * np.float32(widening) * wide * self.lung)
        # Spine along the back, sternum along the front, ribs across, trachea down the middle.
        spine_x = np.abs(x - self.back + 0.02 - 0.10 * y)
        blocks = 0.14 + 0.10 * ramp(np.cos(y * np.float32(2 * np.pi / 0.15)) + 0.4, 0.8)
        bone = blocks * ramp(0.085 - spine_x, 0.03)
        bone += 0.22 * ramp(0.022 - np.abs(x - self.front + 0.04), 0.02) * ramp(0.42 - np.abs(y + 0.1), 0.1)
        phase = (y + np.float32(0.45) * x) * np.float32(1 / 0.17) + np.float32(rng.uniform(0, 1))
        bars = ramp(0.16 - np.abs(phase - np.floor(phase) - 0.5), 0.16)
        bone += 0.07 * bars * ramp(self.lung - 0.4, 0.5)
        canvas.add(bone)
        windpipe = np.abs(x - 0.06 - 0.16 * (y + 0.6))
        canvas.add(-0.20 * ramp(0.04 - windpipe, 0.03) * ramp(-0.08 - y, 0.1) * ramp(y + 1.0, 0.1) * body)
        hilum = 0.10 * canvas.blob(0.08, 0.02, 0.08) + (0.018 * canvas.texture(22, rng)).astype(np.float32)
        canvas.add(hilum * self.lung * (1 - heart))
        return heart

    def _place(self, rng: np.random.Generator, detail: FindingDetail) -> tuple[float, float]:
        y = rng.uniform(-0.34, -0.24) if detail.zone == "upper" else rng.uniform(0.16, 0.26)
        return rng.uniform(0.16, 0.24), y

    def _edema(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        amount = 0.6 if detail.size == "small" else 1.0
        grain = (0.30 + 0.08 * self.canvas.texture(16, rng)).astype(np.float32)
        return amount * self.canvas.blob(0.06, 0.02, 0.22, 0.26) * grain * self.visible

    def _opacity(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        return 0.22 * self.canvas.blob(*self._place(rng, detail), 0.14, 0.15) * self.visible

    def _consolidation(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        x, y = self._place(rng, detail)
        down = self.canvas.y - np.float32(y)
        fissure = 0.10 - down if detail.zone == "upper" else down + 0.10
        lobe = self.canvas.ellipse(x, y, 0.26, 0.22) + np.float32(0.02) * self.canvas.texture(14, rng)
        return 0.42 * np.minimum(ramp(lobe, 0.09), ramp(fissure, 0.02)) * self.visible

    def _pneumonia(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        x, y = self._place(rng, detail)
        return 0.40 * self.canvas.patches(x, y, rng) * self.visible

    def _atelectasis(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        bands = []
        for step in range(3):
            y = self.dome_y - 0.05 - 0.085 * step
            bands.append([(0.02, y), (0.34, y + rng.uniform(0.0, 0.06))])
        fading = self.canvas.blob(0.18, self.dome_y - 0.13, 0.15, 0.4)
        return 0.50 * self.canvas.lines(bands, 0.030) * fading * self.visible

    def _lesion(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        radius = rng.uniform(0.068, 0.080) if detail.size == "small" else rng.uniform(0.12, 0.14)
        return 0.44 * ramp(self.canvas.ellipse(*self._place(rng, detail), radius, radius), 0.02) * self.visible

    def _pneumothorax(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """Air at the sternum and the apex, bounded by a thin line."""
        depth = (0.10 if detail.size == "small" else 0.20) * ramp(0.25 - self.canvas.y, 0.4)
        beyond = self.front + depth - self.canvas.x
        here = self.visible * ramp(depth - 0.02, 0.04)
        return here * (0.24 * ramp(0.010 - np.abs(beyond), 0.012) - 0.12 * ramp(beyond, 0.012))

    def _thickening(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        y = self.canvas.y
        thickness = 0.06 + 0.02 * np.sin(y * np.float32(rng.uniform(14, 20)))
        strip = ramp(thickness - (self.canvas.x - self.front), 0.015) * ramp(0.30 - np.abs(y + 0.10), 0.06)
        return 0.40 * strip * self.visible

    def _effusion(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        """Fluid in the deep angle at the back, climbing the chest wall."""
        reach = rng.uniform(0.34, 0.40) if detail.size == "small" else rng.uniform(0.64, 0.74)
        u = np.clip((self.canvas.x + 0.2) * np.float32(1 / (self.depth + 0.2)), 0, 1)
        surface = 0.66 - reach * (0.35 + 0.65 * u**3)
        return 0.50 * ramp(self.canvas.y - surface, 0.03) * self.visible

    def _device(self, rng: np.random.Generator, detail: FindingDetail) -> np.ndarray:
        lines, y = self.canvas.lines, rng.uniform(-0.30, -0.24)
        if detail.device == "tube":
            return 0.45 * lines([[(0.0 + s, -1.2), (0.11 + s, y)] for s in (-0.02, 0.02)], 0.016)
        # Both enter through the wall of the upper chest; a pacemaker lies in it.
        wall = -0.75 * self.depth - 0.09
        if detail.device == "catheter":
            path = curve([(wall + 0.04, -0.50), (-0.26, -0.80), (-0.02, -0.66), (-0.06, 0.06)])
            return 0.5 * lines([path], 0.026)
        box = ramp(self.canvas.ellipse(wall, -0.45, 0.05, 0.12, tilt=0.15), 0.015)
        lead = lines([curve([(wall, -0.55), (-0.05, -0.80), (-0.02, -0.05), (-0.28, 0.26)])], 0.024)
        return np.maximum(0.8 * box, 0.55 * lead)
