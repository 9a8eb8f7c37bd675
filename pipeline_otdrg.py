"""Pipeline of OTDRG: `pipeline("image-to-text", model=..., trust_remote_code=True)`."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, Pipeline

from .findings_otdrg import CONDITIONING_STATES, FINDINGS, NOT_GIVEN
from .processing_otdrg import read_view


class _Studies(torch.utils.data.Dataset):
    """A `datasets.Dataset` as a torch dataset, which pipelines iterate over."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        return self.rows[position]


class ReportGenerationPipeline(Pipeline):
    """
    Writes the reports of studies of chest radiographs.

    ```python
    pipe = pipeline("image-to-text", model="org/otdrg", trust_remote_code=True)
    pipe("frontal.png")[0]["generated_text"]
    pipe([["frontal.png", "lateral.png"], "other.png"], batch_size=8)
    pipe("frontal.png", findings={"edema": "positive"}, return_heatmaps=True)
    ```

    A study is one view (path, URL, PIL image, array, DICOM), a list of views inside a list of studies, or a mapping
    with `images` (or `image`) and, if wanted, `indication`, such as a row of a dataset. One study gives a list of
    dictionaries, several (a list, a generator, a dataset) give one such list each. The dictionaries hold

    - `generated_text` (`str`): the report;
    - `complete` (`bool`): whether the report ended by itself, and was not cut off at the maximum length;
    - `findings` (`dict`): for each of the 14, the `state` that conditioned the LLM and the probability that the
      predictor gives to this state (None for `"not_given"`);
    - `heatmaps` (`dict`, with `return_heatmaps=True`): for each of the 14, an array (views, rows, columns) of the
      transport plan over the grid of image tokens, as a multiple of the uniform plan's mass;
    - `contradictions` (`list`, with `return_contradictions=True`): findings whose state in the report differs from the
      one that conditioned the LLM (No Finding is not compared), as `{"finding", "given", "said", "kind"}` with both
      states. The kind is `"contradicted"` (both mention it, in different states), `"omitted"` (the report does not
      mention it) or `"added"` (only the report mentions it). The report is read by the labeler `rules` of the package
      `otdrg`, which must be installed for this.

    Call arguments: `findings`, states that steer the report (beside a positive one, No Finding is unmentioned unless it
    is given); `indication`, the reason for the study; `return_heatmaps`; `return_contradictions`; every argument of
    `generate` (`max_new_tokens`, `num_beams`, `num_return_sequences`, ...), also in `generate_kwargs`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    #: Maximum length of a report in tokens if neither the caller nor the model's generation configuration sets one.
    default_max_new_tokens = 256

    def _sanitize_parameters(
        self,
        findings=None,
        indication=None,
        return_heatmaps=None,
        return_contradictions=None,
        generate_kwargs=None,
        timeout=None,
        **kwargs,
    ):
        generate_kwargs = dict(generate_kwargs or {})
        known = {*vars(GenerationConfig()), "generation_config", "streamer", "stopping_criteria", "logits_processor"}
        for key, value in kwargs.items():
            if key not in known:
                raise ValueError(
                    f"unknown pipeline argument {key!r}: expected findings, indication, return_heatmaps, "
                    "return_contradictions or an argument of generate"
                )
            generate_kwargs[key] = value
        forward = {}
        if findings is not None:
            forward["findings"] = findings
        if return_heatmaps is not None:
            forward["return_heatmaps"] = return_heatmaps
        forward |= generate_kwargs
        postprocess = {}
        if return_contradictions is not None:
            # Loaded before generation, so that a missing package is an immediate error.
            postprocess["self_check"] = self._self_check() if return_contradictions else None
        return ({} if indication is None else {"indication": indication}), forward, postprocess

    def _self_check(self):
        """`otdrg.metrics.faithfulness.self_check`, which does not ship with the weights."""
        if not self.model.config.dle:
            raise ValueError(
                "return_contradictions=True, but OTDRGConfig.dle=False: this model does not use finding states"
            )
        try:
            return import_module("otdrg.metrics.faithfulness").self_check
        except ModuleNotFoundError as error:
            # A folder named otdrg next to the script is imported as a package without metrics.
            if error.name is None or error.name.partition(".")[0] != "otdrg":
                raise
            raise ImportError(
                "return_contradictions=True reads reports with the package otdrg, which is not installed: "
                "pip install a clone of its repository"
            ) from error

    def __call__(self, inputs, **kwargs):
        """Reports of one study or of several; see the class."""
        if hasattr(inputs, "column_names") and hasattr(inputs, "features"):
            inputs = _Studies(inputs) if hasattr(inputs, "__len__") else (row for row in inputs)
        elif isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                raise ValueError("no image: the list of studies is empty")
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Write model and processor with their code; the base class would leave the processor out.

        Args:
            save_directory (`str`): the folder.
            kwargs: those of both `save_pretrained`.
        """
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def preprocess(self, inputs, indication=None):
        if isinstance(inputs, dict):
            indication = inputs.get("indication") or indication
            images = inputs.get("images", inputs.get("image"))
            if images is None:
                raise ValueError(
                    f"a study has {', '.join(map(repr, inputs)) or 'nothing'}: expected 'images' or 'image'"
                )
        else:
            images = inputs
        views = list(images) if isinstance(images, (list, tuple)) else [images]
        if not views:
            raise ValueError("no image: a study has no view, expected at least one")
        return {"views": [read_view(view, self.processor.max_image_pixels) for view in views], "indication": indication}

    def _forward(self, model_inputs, findings=None, return_heatmaps=False, **generate_kwargs):
        # A single study is its views, a batch a list of these: the processor pads views, the base class cannot.
        batched = not isinstance(model_inputs["views"][0], Image.Image)
        studies = model_inputs["views"] if batched else [model_inputs["views"]]
        indications = model_inputs["indication"] if batched else [model_inputs["indication"]]
        inputs = self.processor(images=studies, indication=indications, finding_states=findings).to(self.device)
        given_states = inputs.get("finding_states")
        study = self.model.read_study(
            inputs["pixel_values"],
            inputs["view_mask"],
            finding_states=given_states,
            indication_ids=inputs.get("indication_ids"),
        )
        states = study.finding_states
        sequences = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            view_features=study.view_features,
            view_mask=study.view_mask,
            finding_states=states if self.model.config.dle else given_states,
            **self._generate_arguments(generate_kwargs),
        )
        written = sequences[:, inputs["input_ids"].shape[1] :]
        reports = self.processor.batch_decode(written, skip_special_tokens=True)
        complete = self._complete(written, generate_kwargs)
        each = len(reports) // len(studies)
        probabilities = self.model.finding_probabilities(study.finding_logits)
        probabilities = torch.nn.functional.pad(probabilities, (0, 1)).gather(2, states[..., None])[..., 0]
        outputs = {
            "reports": [reports[row * each : (row + 1) * each] for row in range(len(studies))],
            "complete": [complete[row * each : (row + 1) * each] for row in range(len(studies))],
            "states": states.tolist(),
            "probabilities": probabilities.tolist(),
            "heatmaps": self._heatmaps(study) if return_heatmaps else [None] * len(studies),
        }
        return outputs if batched else {key: value[0] for key, value in outputs.items()}

    def _generate_arguments(self, arguments: dict) -> dict:
        arguments = {**arguments, "return_dict_in_generate": False}
        length_is_given = arguments.keys() & {"max_new_tokens", "max_length", "generation_config"}
        if not length_is_given and self.model.generation_config.max_new_tokens is None:
            arguments["max_new_tokens"] = self.default_max_new_tokens
        return arguments

    def _complete(self, written: torch.Tensor, arguments: dict) -> list[bool]:
        """For each sequence of new tokens, whether it contains an end-of-text token."""
        config = arguments.get("generation_config") or self.model.generation_config
        end = arguments.get("eos_token_id", config.eos_token_id)
        if end is None:
            return [True] * len(written)
        return torch.isin(written, torch.tensor(end, device=written.device)).any(dim=1).tolist()

    def _heatmaps(self, study) -> list[np.ndarray]:
        """For each study the plan as a multiple of the uniform one, (views, 14, rows, columns)."""
        if not self.model.has_heatmaps:
            raise ValueError("return_heatmaps=True, but OTDRGConfig.fiot=False: this model has no transport plan")
        lift = self.model.transport_lift(study.view_features, study.view_mask, study.finding_states).float().cpu()
        return [lift[row, study.view_mask[row].cpu()].numpy() for row in range(len(lift))]

    def postprocess(self, model_outputs, self_check=None) -> list[dict]:
        findings = {
            name: {
                "state": CONDITIONING_STATES[state],
                "probability": None if state == NOT_GIVEN else probability,
            }
            for name, state, probability in zip(
                FINDINGS, model_outputs["states"], model_outputs["probabilities"], strict=True
            )
        }
        records = [
            {"generated_text": report.strip(), "complete": complete, "findings": findings}
            for report, complete in zip(model_outputs["reports"], model_outputs["complete"], strict=True)
        ]
        if model_outputs["heatmaps"] is not None:
            # Unbatching adds a leading axis of size 1 to an array.
            lift = model_outputs["heatmaps"]
            lift = lift.reshape(-1, *lift.shape[-3:])
            heatmaps = {name: lift[:, row] for row, name in enumerate(FINDINGS)}
            records = [{**record, "heatmaps": heatmaps} for record in records]
        if self_check is not None:
            reports = [record["generated_text"] for record in records]
            found = self_check(reports, [model_outputs["states"]] * len(reports))
            records = [{**record, "contradictions": each} for record, each in zip(records, found, strict=True)]
        return records


__all__ = ["ReportGenerationPipeline"]
