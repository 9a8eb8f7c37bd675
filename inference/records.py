"""The records of `otdrg generate`: reports of listed studies, batch by batch; unreadable studies are skipped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..image_processing_otdrg import without_credentials
from ..runtime.interruptions import fault_of_study, is_out_of_memory
from ..runtime.shared_work import fixed_blocks
from .collation import prior_names
from .heatmaps import draw_heatmaps
from .listing import ListedStudy

if TYPE_CHECKING:
    from PIL import Image

#: Most characters of a picture's name that are from the id of the study.
_LONGEST_NAME = 60
#: What a dataset can have of a prior.
_PRIORS = ("prior_images", "prior_report")

Skip = Callable[[ListedStudy, Exception], None]
#: Studies with their views and the pipeline's arguments of their priors.
Batch = list[tuple[ListedStudy, "list[Image.Image]", dict[str, Any]]]


def study_blocks(studies: list[ListedStudy], batch_size: int) -> list[list[int]]:
    """Positions of the studies whose reports are written in one batch: neighbours with the same given findings."""
    blocks = []
    for _, steered in groupby(range(len(studies)), key=lambda place: studies[place].findings):
        places = list(steered)
        blocks += [[places[place] for place in block] for block in fixed_blocks(len(places), batch_size)]
    return blocks


def study_records(
    pipe, studies: list[ListedStudy], arguments: dict[str, Any], skip: Skip, heatmap: Path | None = None
) -> list[dict[str, Any]]:
    """Write the reports of studies, in one batch.

    Args:
        pipe: the pipeline.
        studies: a block of [`study_blocks`].
        arguments: arguments of `generate`.
        skip: called with a study that cannot be used and the error.
        heatmap: folder for a picture of each transport plan.

    Returns:
        For each study what was asked (`id`, ...), its `report`, and the rest of the pipeline's output.
    """
    batch = list(_readable(pipe.processor, studies, skip))
    return _records_or_skip(pipe, batch, heatmap, arguments, skip) if batch else []


def _readable(processor, studies: list[ListedStudy], skip: Skip) -> Iterator[tuple[ListedStudy, list, dict[str, Any]]]:
    for study in studies:
        try:
            views = study.read_views(processor.max_image_pixels)
            prior = study.read_prior(processor.max_image_pixels, prior_names(processor, _PRIORS))
            # An indication may contain a placeholder of the prompt, and the model may read no priors.
            if "prior_images" in prior:
                processor.encode_priors([prior["prior_images"][:1]])
            processor.encode_text([len(views)], indication=study.indication, prior_report=prior.get("prior_report"))
        except Exception as error:  # decoders raise any exception for a damaged file
            skip(study, error)
        else:
            yield study, views, prior


def _records_or_skip(
    pipe, batch: Batch, heatmap: Path | None, arguments: dict[str, Any], skip: Skip
) -> list[dict[str, Any]]:
    """The records of a batch. If it fails, its studies are tried one by one, and those that fail are skipped."""
    try:
        return list(_records(pipe, batch, heatmap, arguments))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fault_of_study(error)
        if len(batch) == 1:
            skip(batch[0][0], error)
            return []
        return [record for item in batch for record in _records_or_skip(pipe, [item], heatmap, arguments, skip)]


def _records(pipe, batch: Batch, heatmap: Path | None, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    outputs = pipe(
        [{"images": views, "indication": study.indication, **prior} for study, views, prior in batch],
        batch_size=len(batch),
        findings=batch[0][0].findings or None,
        return_heatmaps=heatmap is not None,
        # A model without conditioning states has nothing to contradict.
        return_contradictions=pipe.model.config.dle,
        **arguments,
    )
    for (study, views, _), (output, *_) in zip(batch, outputs, strict=True):
        report, heatmaps = output.pop("generated_text"), output.pop("heatmaps", None)
        record = {**study.asked(), "report": report, **output}
        if heatmaps is not None:
            heatmap.mkdir(parents=True, exist_ok=True)
            path = heatmap / _picture_name(study)
            draw_heatmaps(views, heatmaps, record["findings"], path, report=report)
            record["heatmap"] = str(path)
        yield record


def _picture_name(study: ListedStudy) -> str:
    """A unique file name: the id of the study if it is a valid name, else a similar name with a digest."""
    like = study.id
    if study.images is not None and study.id == " + ".join(map(without_credentials, study.images)):
        like = "_".join(Path(image).stem for image in study.images)
    name = re.sub(r"[^\w.-]+", "_", like)[:_LONGEST_NAME].lstrip(".")
    if name == study.id:
        return f"{name}.png"
    return f"{name}_{hashlib.blake2b(study.id.encode(), digest_size=4).hexdigest()}.png"


__all__ = ["study_blocks", "study_records"]
