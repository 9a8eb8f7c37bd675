"""What a server keeps of an uploaded view, and the limits of what it accepts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..processing_otdrg import OTDRGProcessor

#: Longest indication in characters; it becomes part of the prompt.
MAX_INDICATION = 500


def model_input(processor: OTDRGProcessor, view: Image.Image) -> Image.Image:
    """Resize a view as the model's image processor does, which gives the same report as the full view.

    A full picture takes up to 256 MB, and many may wait for the model.
    """
    pixels = processor.image_processor(view, do_rescale=False, do_normalize=False, return_tensors="np")
    return Image.fromarray(np.moveaxis(pixels["pixel_values"][0], 0, -1).astype(np.uint8))


__all__ = ["MAX_INDICATION", "model_input"]
