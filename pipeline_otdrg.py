"""Pipeline of OTDRG: `pipeline("image-to-text", model=..., trust_remote_code=True)`."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, GenerationMixin, Pipeline

from .bank_otdrg import ReportBank
from .consensus_otdrg import Candidate, ConsensusDecoder, consensus_settings, is_complete, with_length
from .findings_otdrg import CONDITIONING_STATES, FINDINGS, NOT_GIVEN
from .processing_otdrg import read_view
from .sections_otdrg import split_sections

logger = logging.getLogger(__name__)

#: Arguments of `generate` that choose how one report is searched, which consensus decoding does itself.
SEARCH = (
    "num_beams",
    "do_sample",
    "num_return_sequences",
    "streamer",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_GENERATION_FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
#: Arguments of `generate` that the pipeline has not: it makes the inputs, and state guidance replaces negative prompts.
_NOT_OFFERED = {"self", "inputs", "kwargs", "negative_prompt_ids", "negative_prompt_attention_mask"}
_GENERATE_ARGUMENTS = {
    *_GENERATION_FIELDS,
    *(inspect.signature(GenerationMixin.generate).parameters.keys() - _NOT_OFFERED),
    *("tokenizer", "assistant_tokenizer"),  # among its `kwargs`
}


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
    pipe("frontal.png", candidates=32, bank="bank", return_candidates=5)
    ```

    A study is one view (path, URL, PIL image, array, DICOM), a list of views inside a list of studies, or a mapping
    with `images` (or `image`) and, if wanted, `indication`, such as a row of a dataset. One study gives a list of
    dictionaries, several (a list, a generator, a dataset) give one such list each. The dictionaries hold

    - `generated_text` (`str`): the report;
    - `findings_section` and `impression` (`str`), if the model writes both sections (`config.report_sections`): their
      texts; if headings are missing or misplaced, all of the report is the findings;
    - `complete` (`bool`): whether the report ended by itself, and was not cut off at the maximum length;
    - `findings` (`dict`): for each of the 14, the `state` that conditioned the LLM and the probability that the
      predictor gives to this state (None for `"not_given"`);
    - `heatmaps` (`dict`, with `return_heatmaps=True`): for each of the 14, an array (views, rows, columns) of the
      transport plan over the grid of image tokens, as a multiple of the uniform plan's mass;
    - `contradictions` (`list`, with `return_contradictions=True`): findings whose state in the report differs from the
      one that conditioned the LLM (No Finding is not compared), as `{"finding", "given", "said", "kind"}` with both
      states. The kind is `"contradicted"` (both mention it, in different states), `"omitted"` (the report does not
      mention it) or `"added"` (only the report mentions it). The report is read by the labeler `rules` of the package
      `otdrg`, which must be installed for this;
    - `retrieved` (`bool`, with `bank`): whether the report stands word for word in the report bank;
    - `candidates` (`list`, with `return_candidates=N`): the N best candidates, the report first, as `{"report",
      "score", "sampled", "retrieved"}`.

    Call arguments: `findings`, states that steer the report (beside a positive one, No Finding is unmentioned unless it
    is given); `indication`, the reason for the study; `return_heatmaps`; `return_contradictions`; every argument of
    `generate` (`max_new_tokens`, `num_beams`, `num_return_sequences`, ...), also in `generate_kwargs` or in a
    `generation_config`. Reports have up to 256 tokens if neither the call nor the model sets a length.

    Consensus decoding chooses the report among many ([`ConsensusDecoder`]): `candidates`, how many are sampled (by
    default those of the model's generation config; 1 writes one report by `generate`); `bank`, the folder of a report
    bank (`otdrg bank`) or a [`ReportBank`]; `consensus`, other [`ConsensusSettings`] by name, or a [`ConsensusDecoder`]
    in place of all three. Agreement with the finding states needs the package `otdrg`.

    Raises:
        ValueError: an unknown argument or an impossible value, arguments that exclude each other, or a view or a study
            that cannot be read.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self,
        findings=None,
        indication=None,
        return_heatmaps=None,
        return_contradictions=None,
        candidates=None,
        bank=None,
        consensus=None,
        return_candidates=None,
        generate_kwargs=None,
        **kwargs,
    ):
        generate_kwargs = {**(generate_kwargs or {}), **kwargs}
        for key in generate_kwargs:
            if key not in _GENERATE_ARGUMENTS:
                raise ValueError(
                    f"unknown pipeline argument {key!r}: expected findings, indication, return_heatmaps, "
                    "return_contradictions, candidates, bank, consensus, return_candidates or an argument of generate"
                )
        config = generate_kwargs.pop("generation_config", None)
        if config is not None:
            fields = self._config_fields(config)
            stored = fields.pop("consensus", None)
            consensus = stored if consensus is None else consensus
            generate_kwargs = {**fields, **generate_kwargs}
        forward = {}
        if findings is not None:
            forward["findings"] = findings
        if return_heatmaps is not None:
            forward["return_heatmaps"] = return_heatmaps
        forward |= generate_kwargs
        is_count = isinstance(return_candidates, int) and not isinstance(return_candidates, bool)
        if return_candidates is not None and not (is_count and return_candidates >= 0):
            raise ValueError(f"return_candidates={return_candidates!r}: expected a number of candidates")
        given = {"candidates": candidates, "bank": bank, "consensus": consensus, "return_candidates": return_candidates}
        forward |= {name: value for name, value in given.items() if value is not None}
        postprocess = {}
        if return_contradictions is not None:
            # Loaded before generation, so that a missing package is an immediate error.
            postprocess["self_check"] = self._self_check() if return_contradictions else None
        return ({} if indication is None else {"indication": indication}), forward, postprocess

    def _config_fields(self, config: GenerationConfig) -> dict[str, Any]:
        """The fields that a generation config sets; of a copy of the model's, which has its `consensus`, the others."""
        names = _GENERATION_FIELDS | {"consensus"}
        fields = {name: value for name, value in vars(config).items() if name in names and value is not None}
        if "consensus" not in fields:
            return fields
        own = vars(self.model.generation_config)
        return {name: value for name, value in fields.items() if value != own.get(name)}

    def _decoder(self, candidates, bank, consensus, search: list[str]) -> ConsensusDecoder | None:
        """The decoder that a call asks for, the same as long as it asks for the same; None for `generate`."""
        # By their methods: a ConsensusDecoder or a ReportBank of the package has other classes than published code.
        if hasattr(consensus, "decode"):
            given = {**dict.fromkeys(search, True), "candidates": candidates, "bank": bank}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} was given beside a ConsensusDecoder: expected one of them")
            if self._last_decoder is None or self._last_decoder[1] is not consensus:
                if consensus.bank is not None:
                    consensus.bank.check(self.model, self.processor)
                self._last_decoder = (), consensus
            return consensus
        asked = candidates is not None or bank is not None or bool(consensus)
        settings = consensus_settings(self.model.generation_config, candidates, bank, consensus)
        if settings is None or (search and not asked):
            return None
        if search:
            raise ValueError(f"{search[0]} was given beside candidates or a bank: expected one of them")
        key = (settings.to_dict(), bank, bool((consensus or {}).get("agreement_weight")))
        if self._last_decoder is None or self._last_decoder[0] != key:
            if isinstance(bank, (str, os.PathLike)):
                bank = ReportBank.load(bank)
            if bank is not None:
                bank.check(self.model, self.processor)
            label = None
            if settings.agreement_weight != 0:
                label = _label(required=key[2])
                if label is None:
                    settings = replace(settings, agreement_weight=0.0)
            self._last_decoder = key, ConsensusDecoder(settings, bank, label)
        return self._last_decoder[1]

    #: The last settings and bank, and their decoder: a bank is read once.
    _last_decoder: tuple[tuple, ConsensusDecoder] | None = None

    def _self_check(self):
        """`otdrg.metrics.faithfulness.self_check`, which does not ship with the weights."""
        if not self.model.config.dle:
            raise ValueError(
                "return_contradictions=True, but OTDRGConfig.dle=False: this model does not use finding states"
            )
        found = _of_package("otdrg.metrics.faithfulness")
        if found is None:
            raise ImportError(
                "return_contradictions=True reads reports with the package otdrg, which is not installed: "
                "pip install a clone of its repository"
            )
        return found.self_check

    def __call__(self, inputs, **kwargs):
        """Reports of one study or of several; see the class."""
        if hasattr(inputs, "column_names") and hasattr(inputs, "features"):
            unread = [name for name in ("prior_images", "prior_report") if name in (inputs.column_names or ())]
            # Datasets have these columns, whether or not a model reads them.
            unread = [name for name in unread if self.processor.priors not in (name.removeprefix("prior_"), "both")]
            inputs = inputs.remove_columns(unread) if unread else inputs
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
        study = inputs if isinstance(inputs, Mapping) else {"images": inputs}
        images = study.get("images", study.get("image"))
        if images is None:
            found = ", ".join(repr(name) for name, value in study.items() if value is not None) or "nothing"
            raise ValueError(f"a study has {found}: expected 'images' or 'image'")
        views = list(images) if isinstance(images, (list, tuple)) else [images]
        if not views:
            raise ValueError("no image: a study has no view, expected at least one")
        priors = study.get("prior_images")
        priors = list(priors) if isinstance(priors, (list, tuple)) else [] if priors is None else [priors]
        indication, prior_report = study.get("indication") or indication, study.get("prior_report")
        for name, text in (("indication", indication), ("prior_report", prior_report)):
            if not (text is None or isinstance(text, str)):
                raise ValueError(
                    f"{name} is a {type(text).__name__}: expected the text of one study; several studies are "
                    f"[{{'images': ..., '{name}': ...}}, {{'images': ..., '{name}': ...}}]"
                )
        most = self.processor.max_image_pixels
        return {
            "views": [read_view(view, most) for view in views],
            "indication": indication,
            "prior_views": [read_view(view, most) for view in priors],
            "prior_report": prior_report,
        }

    def _forward(
        self,
        model_inputs,
        findings=None,
        return_heatmaps=False,
        candidates=None,
        bank=None,
        consensus=None,
        return_candidates=0,
        **generate_kwargs,
    ):
        search = [name for name in SEARCH if generate_kwargs.get(name) is not None]
        decoder = self._decoder(candidates, bank, consensus, search)
        if return_candidates and decoder is None:
            raise ValueError(f"return_candidates={return_candidates}: expected candidates or a bank beside it")
        # A single study is its views, a batch a list of these: the processor pads views, the base class cannot.
        batched = not isinstance(model_inputs["views"][0], Image.Image)
        studies = model_inputs["views"] if batched else [model_inputs["views"]]
        indications = model_inputs["indication"] if batched else [model_inputs["indication"]]
        priors = {"prior_images": model_inputs["prior_views"], "prior_report": model_inputs["prior_report"]}
        priors = {name: value if batched else [value] for name, value in priors.items()}
        inputs = self.processor(images=studies, indication=indications, finding_states=findings, **priors)
        inputs = inputs.to(self.device)
        given_states = inputs.get("finding_states")
        study = self.model.read_study(
            inputs["pixel_values"],
            inputs["view_mask"],
            finding_states=given_states,
            indication_ids=inputs.get("indication_ids"),
            prior_pixel_values=inputs.get("prior_pixel_values"),
            prior_view_mask=inputs.get("prior_view_mask"),
        )
        states = study.finding_states
        prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        chosen: list[dict[str, Any]] = [{} for _ in studies]
        if decoder is not None:
            if given_states is not None and not self.model.config.dle:
                raise ValueError(
                    "findings were given, but OTDRGConfig.dle=False: this model does not use finding states"
                )
            ranked = decoder.decode(self.model, self.processor, prompt, study, generate_kwargs, indications)
            reports, complete = [row[0].report for row in ranked], [row[0].complete for row in ranked]
            chosen = [_consensus_record(row, return_candidates) for row in ranked]
        else:
            reports, complete = self._search(prompt, study, given_states, generate_kwargs)
        each = len(reports) // len(studies)
        probabilities = self.model.finding_probabilities(study.finding_logits)
        probabilities = torch.nn.functional.pad(probabilities, (0, 1)).gather(2, states[..., None])[..., 0]
        outputs = {
            "reports": [reports[row * each : (row + 1) * each] for row in range(len(studies))],
            "complete": [complete[row * each : (row + 1) * each] for row in range(len(studies))],
            "states": states.tolist(),
            "probabilities": probabilities.tolist(),
            "heatmaps": self._heatmaps(study) if return_heatmaps else [None] * len(studies),
            "consensus": chosen,
        }
        return outputs if batched else {key: value[0] for key, value in outputs.items()}

    def _search(self, prompt, study, given_states, arguments: dict) -> tuple[list[str], list[bool]]:
        """Reports by `generate`, and whether each is complete."""
        config = self.model.generation_config
        sequences = self.model.generate(
            **prompt,
            **study.encoded_views,
            finding_states=study.finding_states if self.model.config.dle else given_states,
            **with_length({**arguments, "return_dict_in_generate": False}, config),
        )
        written = sequences[:, prompt["input_ids"].shape[1] :]
        complete = is_complete(written, arguments.get("eos_token_id", config.eos_token_id))
        return self.processor.batch_decode(written, skip_special_tokens=True), complete

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
            {"generated_text": report.strip(), "complete": complete, "findings": findings, **model_outputs["consensus"]}
            for report, complete in zip(model_outputs["reports"], model_outputs["complete"], strict=True)
        ]
        if self.model.config.report_sections:
            records = [{**record, **_sections(record["generated_text"])} for record in records]
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


def _sections(report: str) -> dict[str, str]:
    """What a record says of the sections of its report; `findings` are the states."""
    sections = split_sections(report)
    return {"findings_section": sections.findings, "impression": sections.impression}


def _consensus_record(ranked: list[Candidate], count: int) -> dict[str, Any]:
    """What a record says of its report among the candidates, with the best `count` of them."""
    chosen: dict[str, Any] = {} if ranked[0].retrieved is None else {"retrieved": ranked[0].retrieved}
    if count:
        names = ("report", "score", "sampled", *chosen)
        chosen["candidates"] = [{name: getattr(one, name) for name in names} for one in ranked[:count]]
    return chosen


def _label(required: bool):
    """Reads states with the labeler `rules` of the package; None without it, unless `required`."""
    found = _of_package("otdrg.labelers.as_typed")
    if found is not None:
        labeler = found.labeler_of("rules", {})
        return lambda reports: found.label_quietly(labeler, reports)
    if required:
        raise ImportError(
            "consensus: agreement_weight above 0 reads reports with the package otdrg, which is not installed: pip "
            "install a clone of its repository, or agreement_weight 0"
        )
    logger.warning("the package otdrg is not installed: candidates are chosen without agreement with the findings")
    return None


def _of_package(name: str):
    """A module of the package `otdrg`, which does not ship with the weights; None if it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        # A folder named otdrg next to the script is imported as a package without modules.
        if error.name is None or error.name.partition(".")[0] != "otdrg":
            raise
        return None


__all__ = ["ReportGenerationPipeline"]
