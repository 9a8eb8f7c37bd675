"""Processor of OTDRG: views and a prompt become tensors, token ids become text.

Long, because it checks every argument before a view is read: a wrong one gives one clear line.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs, Unpack
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

if find_spec("transformers.image_processing_backends") is not None:
    from transformers import ViTImageProcessor
else:
    # Earlier versions have a slow and a fast one whose pixels differ slightly, and reload a folder as the fast one.
    from transformers.models.vit.image_processing_vit_fast import ViTImageProcessorFast as ViTImageProcessor

from .chat_templates_otdrg import check_chat_template
from .configuration_otdrg import (
    DEFAULT_PROMPT,
    FINDING_TEXT_TOKEN,
    FINDING_TOKEN,
    HUB_KEYWORDS,
    IMAGE_TOKEN,
    INDICATION_BUCKETS,
    OTDRGConfig,
    check_values,
    find_file,
    place_of,
    resolve_backbone,
)
from .files_otdrg import describe
from .findings_otdrg import FINDING_DISPLAY_NAMES, FINDING_STATES, FINDINGS, check_finding_states, parse_findings
from .image_processing_otdrg import read_view

_PLACEHOLDERS = (IMAGE_TOKEN, FINDING_TOKEN, FINDING_TEXT_TOKEN)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Put before an LLM's own chat template: turns messages of images and texts into strings with image placeholders.
_FLATTEN_MESSAGES = """\
{%- set flat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set flat.text = message['content'] -%}
{%- else -%}
{%- set flat.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set flat.text = flat.text + '<image>' -%}
{%- elif part['type'] == 'text' -%}
{%- set flat.text = flat.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# Some templates add a system turn about the LLM itself if there is none: an empty system turn prevents this.
_EMPTY_SYSTEM_TURN = """\
{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': ''}] + messages -%}
{%- endif -%}
"""

_PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['content'] + (eos_token if message['role'] == 'assistant' else '\\n') }}"
    "{% endfor %}"
)


#: A word tokenizer has the words that occur at least this often in training reports, and at most this many.
_LEAST_WORD_COUNT, _MOST_WORDS = 2, 30_000

#: Arguments of tokenizers that the processor supports, and those that `apply_chat_template` adds.
_TEXT_ARGUMENTS = {"padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of"}
_CHAT_ARGUMENTS = {"return_dict", "sanitize_control_tokens"}


class OTDRGProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {  # noqa: RUF012
        "text_kwargs": {"padding": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class OTDRGProcessor(ProcessorMixin):
    r"""
    Converts studies into the model's inputs.

    Args:
        image_processor (`ViTImageProcessor`): resizes and normalises one view.
        tokenizer (`PreTrainedTokenizerFast`): the LLM's, with the placeholders.
        chat_template (`str`, *optional*): Jinja template of a conversation with images.
        image_tokens (`int`, defaults to 49): image tokens of one view.
        view_fusion (`str`, defaults to `"mean"`): as in [`OTDRGConfig`].
        dle, fiot (`bool`, default to `True`): whether prompts hold the label text and the label tokens.
        finding_text (`str`, defaults to `"mentioned"`): as in [`OTDRGConfig`].
        prompt (`str`): instruction after the image.
        indication_reader (`str`, defaults to `"report"`): as in [`OTDRGConfig`].
        priors (`str`, defaults to `"none"`), max_prior_tokens (`int`, defaults to 128): as in [`OTDRGConfig`].
        max_image_pixels (`int`, defaults to 64 million): larger images are refused before they are decoded.
        return_view_mask (`bool`, defaults to `True`): whether the output has `view_mask`. Without it the model takes
            views of zeros only, with which studies are padded, for missing ones. TRL's GRPO needs this.

    Raises:
        ValueError: the tokenizer lacks a placeholder.
    """

    valid_processor_kwargs = OTDRGProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_tokens: int = 49,
        view_fusion: str = "mean",
        dle: bool = True,
        fiot: bool = True,
        finding_text: str = "mentioned",
        prompt: str = DEFAULT_PROMPT,
        indication_reader: str = "report",
        priors: str = "none",
        max_prior_tokens: int = 128,
        max_image_pixels: int = 64_000_000,
        return_view_mask: bool = True,
        **kwargs,
    ):
        fields = {
            "image_tokens": image_tokens,
            "view_fusion": view_fusion,
            "dle": dle,
            "fiot": fiot,
            "finding_text": finding_text,
            "prompt": prompt,
            "indication_reader": indication_reader,
            "priors": priors,
            "max_prior_tokens": max_prior_tokens,
        }
        check_values("OTDRGProcessor", fields)
        for size in dict(getattr(image_processor, "size", None) or {}).values():
            check_values("OTDRGProcessor", {"image_size": size})
        if any(token in prompt for token in _PLACEHOLDERS):
            raise ValueError(f"OTDRGProcessor.prompt={prompt!r}: expected a string without {', '.join(_PLACEHOLDERS)}")
        if not isinstance(max_image_pixels, int) or max_image_pixels < 1:
            raise ValueError(f"OTDRGProcessor.max_image_pixels={max_image_pixels!r}: expected a positive integer")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for name, value in fields.items():
            setattr(self, name, value)
        self.max_image_pixels = max_image_pixels
        self.return_view_mask = return_view_mask
        self.image_token = IMAGE_TOKEN
        for token in _PLACEHOLDERS:
            if token not in tokenizer.get_added_vocab():
                raise ValueError(f"the tokenizer has no {token!r}: call OTDRGConfig.bind_tokenizer(tokenizer) first")
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> OTDRGProcessor:
        """A processor from a folder or a Hub id, as in `ProcessorMixin`.

        Raises:
            OSError: there is none.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (OSError, ValueError) as error:
            hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
            place, file = place_of(pretrained_model_name_or_path, hub), "processor_config.json"
            if not _is_there(pretrained_model_name_or_path, file, hub):
                raise OSError(f"{place} has no {file}: expected a processor") from error
            raise

    @classmethod
    def from_backbones(cls, vision: str, text: str, config: OTDRGConfig) -> OTDRGProcessor:
        """A processor for a model on pretrained backbones; `config` is bound to the tokenizer.

        Args:
            vision (`str`): the vision encoder's Hub id or folder, for its image normalisation.
            text (`str`): Hub id, folder or GGUF file with the LLM's tokenizer.
            config (`OTDRGConfig`): the model's.

        Raises:
            OSError: the tokenizer or the image processor cannot be loaded.
            ValueError: the tokenizer has several chat templates and no default.
        """
        name, kwargs = resolve_backbone(text)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        except (OSError, ValueError) as error:
            raise OSError(
                f"text backbone {text!r} has no tokenizer that loads: expected a Hub id, a folder or a .gguf file "
                f"({str(error).splitlines()[0]})"
            ) from error
        mean, std = _normalisation(vision)
        return cls.from_config(config, tokenizer, mean, std)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        config: OTDRGConfig,
        vocab_size: int = 1024,
        tokenizer: str = "bpe",
        vision: str | None = None,
    ) -> OTDRGProcessor:
        """A processor with a tokenizer trained on `texts`, for an LLM from scratch.

        `config` is bound to the tokenizer and its LLM's vocabulary set to the tokenizer's size.

        Args:
            texts (`Sequence[str]`): the training reports, and the indications if the LLM reads them.
            config (`OTDRGConfig`): the model's.
            vocab_size (`int`): of a BPE tokenizer.
            tokenizer (`str`): `"bpe"`, byte-level, or `"words"`: every word between spaces that occurs at least twice
                is a token, any other is `<unk>`. Decoding joins words by single spaces, as cleaned reports have them.
            vision (`str`, *optional*): a pretrained vision encoder's Hub id or folder, for its image normalisation.

        Raises:
            OSError: the image processor of `vision` cannot be loaded.
            ValueError: another `tokenizer`.
        """
        label_texts = [
            f" {FINDING_DISPLAY_NAMES[name].lower()}: {state};" for name in FINDINGS for state in FINDING_STATES
        ]
        if tokenizer == "words":
            trained = _word_tokenizer([*texts, *[*label_texts, config.prompt] * _LEAST_WORD_COUNT])
        elif tokenizer == "bpe":
            trained = _byte_tokenizer([*texts, *label_texts, config.prompt], vocab_size)
        else:
            raise ValueError(f"tokenizer={tokenizer!r}: expected 'bpe' or 'words'")
        config.text_config.vocab_size = 0
        return cls.from_config(
            config, trained, *((IMAGENET_MEAN, IMAGENET_STD) if vision is None else _normalisation(vision))
        )

    @classmethod
    def from_config(
        cls, config: OTDRGConfig, tokenizer, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    ) -> OTDRGProcessor:
        """A processor for `config` around `tokenizer`, to which `config` is bound."""
        config.bind_tokenizer(tokenizer)
        image_processor = ViTImageProcessor(
            size={"height": config.image_size, "width": config.image_size},
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        processor = cls(
            image_processor,
            tokenizer,
            chat_template=_chat_template(tokenizer),
            image_tokens=config.image_tokens,
            view_fusion=config.view_fusion,
            dle=config.dle,
            fiot=config.fiot,
            finding_text=config.finding_text,
            prompt=config.prompt,
            indication_reader=config.indication_reader,
            priors=config.priors,
            max_prior_tokens=config.max_prior_tokens,
        )
        config.prompt_token_ids = tokenizer.encode(
            processor._expand(processor.default_prompt(), 1), add_special_tokens=False
        )
        return processor

    # -- call -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        report: str | list[str] | None = None,
        indication: str | list[str | None] | None = None,
        finding_states=None,
        max_report_tokens: int | None = None,
        prior_images=None,
        prior_report: str | list[str | None] | None = None,
        **kwargs: Unpack[OTDRGProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: studies. A view is a path, a URL, a PIL image, an array (H, W) or (H, W, C), or a DICOM file;
                `[a, b]` is two studies of one view, `[[a, b]]` one study of two.
            text (`str` or `list[str]`, *optional*): prompts in place of the default one, each with one `<image>` (or
                one for each view) in the place of the study; without any, an `<image>` is put before the text. Texts
                alone, such as reports that follow a prompt, are converted to tokens only.
            report (`str` or `list[str]`, *optional*): training targets. With them, padding is on the right, otherwise
                on the left.
            indication (`str` or `list[str]`, *optional*): reason for the study, put before the instruction and, as
                `indication_reader` says, given to the label predictor; None or blank where there is none.
            finding_states (*optional*): states that condition the report: ids (B, 14), -1 where they are to be
                predicted, or a dictionary `{"edema": "positive"}` a study.
            max_report_tokens (`int`, *optional*): longer reports are cut to this many tokens.
            prior_images (*optional*): the views of an earlier study of each study's patient, for a model that reads
                them (`priors`): a view, a list of views, or None for a study without one.
            prior_report (`str` or `list[str]`, *optional*): the report of that study, put before the indication and cut
                to `max_prior_tokens`; None or blank where there is none.
            kwargs: of `ProcessingKwargs`, flat or in `text_kwargs`, `images_kwargs` and `common_kwargs`. Those of the
                text are `padding`, `padding_side`, `truncation`, `max_length`, `pad_to_multiple_of` and
                `return_tensors` (`"pt"` by default, `"np"`, or None for lists); those of the images are the image
                processor's, such as `do_rescale`. `add_special_tokens` has no effect: the chat template adds them.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` (B, L), `pixel_values` (B, V, 3, H, W), `view_mask`
            (B, V), and, where asked for, `labels` (B, L), `finding_states` (B, 14) and `indication_ids` (B, W). If any
            study has prior views, `prior_pixel_values` (B, V', 3, H, W) and `prior_view_mask` (B, V').

        Raises:
            ValueError: no image, an image that cannot be read, arguments whose lengths differ, priors that the model
                does not read, or an argument that is not known.
        """
        if kwargs.pop("videos", None) is not None or kwargs.pop("audio", None) is not None:
            raise ValueError("videos and audio were given: expected images of radiographs")
        self._check_names(kwargs)
        # The method that transformers' own processors call; there is no public one.
        merged = self._merge_kwargs(
            OTDRGProcessorKwargs,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **{name: value for name, value in kwargs.items() if name not in _CHAT_ARGUMENTS},
        )
        text_kwargs = {name: merged["text_kwargs"][name] for name in _TEXT_ARGUMENTS & merged["text_kwargs"].keys()}
        # The tokenizer's own padding side is ignored: prompts and reports need different ones.
        text_kwargs["padding_side"] = {**kwargs, **kwargs.get("text_kwargs", {})}.get("padding_side")
        return_tensors = merged["text_kwargs"].get("return_tensors")
        return_tensors = getattr(return_tensors, "value", return_tensors)
        if return_tensors not in ("pt", "np", None):
            raise ValueError(f"return_tensors={return_tensors!r}: expected 'pt', 'np' or None")
        texts = _prompt_texts(text)
        study = (images, report, indication, finding_states, prior_images, prior_report)
        no_study = all(given is None for given in study)
        if texts and no_study and not any(self.image_token in one for one in texts):
            rows = self._tokens(texts, [None] * len(texts), None, **text_kwargs)
            return BatchFeature({name: _converted(name, value, return_tensors) for name, value in rows.items()})
        studies = self._studies(images, texts)
        views = list(map(len, studies))
        priors = self._prior_studies(prior_images, len(views))
        counts = list(map(len, priors))
        rows = self._encode_rows(
            views, text, report, indication, max_report_tokens, counts, prior_report, **text_kwargs
        )
        features = {**rows, **self.encode_images(studies, **merged["images_kwargs"])}
        features |= self.encode_priors(priors, **merged["images_kwargs"])
        if not self.return_view_mask:
            features = {name: value for name, value in features.items() if name not in ("view_mask", "prior_view_mask")}
        features |= self.encode_indications(_given("indication", indication, len(views)))
        if finding_states is not None:
            features["finding_states"] = self._states(finding_states, len(views))
        return BatchFeature({name: _converted(name, value, return_tensors) for name, value in features.items()})

    def _check_names(self, kwargs: dict) -> None:
        """Raise `ValueError` for an unknown argument, and for a tokenizer's argument that is not supported here."""
        own = getattr(self.image_processor, "valid_kwargs", ImagesKwargs)
        image_arguments = {*ImagesKwargs.__annotations__, *own.__annotations__}
        for name, value in {**kwargs, **kwargs.get("text_kwargs", {})}.items():
            if name in {"text_kwargs", "images_kwargs", "common_kwargs"} | _TEXT_ARGUMENTS | image_arguments:
                continue
            if name not in _CHAT_ARGUMENTS | {"add_special_tokens", "return_tensors"} and (
                name not in {*TextKwargs.__annotations__, *ProcessingKwargs.__annotations__} or value
            ):
                raise ValueError(
                    f"unknown argument {name!r}: expected one of those in the documentation of OTDRGProcessor.__call__"
                )

    def encode_text(
        self,
        views: Sequence[int],
        text: str | list[str] | None = None,
        report: str | list[str] | None = None,
        indication: str | list[str | None] | None = None,
        max_report_tokens: int | None = None,
        finding_states=None,
        prior_views: Sequence[int] | None = None,
        prior_report: str | list[str | None] | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """A batch without its pixels, for studies whose views are encoded already.

        Args:
            views (`Sequence[int]`): number of views of each study.
            text, report, indication, max_report_tokens, finding_states, prior_report: as in [`__call__`].
            prior_views (`Sequence[int]`, *optional*): number of prior views of each study.
            kwargs: `padding`, `padding_side`, `truncation`, `max_length` and `pad_to_multiple_of`.

        Returns:
            `input_ids` and `attention_mask` (B, L) and, where asked for, `labels` (B, L), `finding_states` (B, 14) and
            `indication_ids` (B, W).

        Raises:
            ValueError: arguments whose lengths differ, or prompts that do not fit the studies.
        """
        rows = self._encode_rows(
            views, text, report, indication, max_report_tokens, prior_views, prior_report, **kwargs
        )
        features = {name: _converted(name, value, "pt") for name, value in rows.items()}
        features |= self.encode_indications(_given("indication", indication, len(views)))
        if finding_states is not None:
            features["finding_states"] = self._states(finding_states, len(views))
        return features

    def encode_indications(self, indications: Sequence[str | None]) -> dict[str, torch.Tensor]:
        """`indication_ids` (B, W): the words and pairs of words of indications as buckets of a hash, padded with -1.

        Empty if `indication_reader` is `"report"`, or if no study has an indication.

        Raises:
            ValueError: an indication is neither text nor None.
        """
        indications = _given("indication", indications, len(indications))
        if self.indication_reader == "report" or not any(indications):
            return {}
        rows = [torch.tensor(_buckets(indication or ""), dtype=torch.long) for indication in indications]
        return {"indication_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)}

    def _encode_rows(
        self, views, text, report, indication, max_report_tokens, prior_views, prior_report, **kwargs
    ) -> dict[str, list[list[int]]]:
        texts = _prompt_texts(text)
        if texts is not None and len(texts) != len(views):
            raise ValueError(f"text has {len(texts)} prompts for {len(views)} studies: expected one each")
        prior_views = [0] * len(views) if prior_views is None else prior_views
        asked = (_given("indication", indication, len(views)), _given("prior_report", prior_report, len(views)))
        prompts = self._prompts(views, texts, *asked, prior_views)
        return self._tokens(prompts, _one_each("report", report, len(views)), max_report_tokens, **kwargs)

    def encode_images(self, images, **kwargs) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, V, 3, H, W) and `view_mask` (B, V) of studies, given as in [`__call__`].

        Args:
            images: the studies.
            kwargs: the image processor's, such as `do_rescale`.

        Raises:
            ValueError: no image, or one that cannot be read.
        """
        pixel_values, view_mask = self._read_views(self._studies(images, None), **kwargs)
        return {"pixel_values": pixel_values, "view_mask": view_mask}

    def encode_priors(self, prior_images, **kwargs) -> dict[str, torch.Tensor]:
        """`prior_pixel_values` (B, V', 3, H, W) and `prior_view_mask` (B, V') of the prior studies of B studies.

        Empty if no study has one. Arguments and errors are those of [`encode_images`], but for studies without a view.
        """
        priors = self._prior_studies(prior_images, len(prior_images))
        if not any(priors):
            return {}
        pixel_values, view_mask = self._read_views(priors, **kwargs)
        return {"prior_pixel_values": pixel_values, "prior_view_mask": view_mask}

    def _read_views(self, studies: Sequence[list], **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels (B, V, 3, H, W) of studies, of which one has a view, and their mask (B, V)."""
        views = [read_view(view, self.max_image_pixels) for study in studies for view in study]
        pixels = self.image_processor(views, **{**kwargs, "return_tensors": "pt"})["pixel_values"]
        view_mask = torch.zeros(len(studies), max(map(len, studies)), dtype=torch.bool)
        for row, study in enumerate(studies):
            view_mask[row, : len(study)] = True
        pixel_values = pixels.new_zeros(*view_mask.shape, *pixels.shape[1:])
        pixel_values[view_mask] = pixels
        return pixel_values, view_mask

    def _studies(self, images, texts: list[str] | None) -> list[list]:
        if images is None or (isinstance(images, (list, tuple)) and len(images) == 0):
            raise ValueError("no image: expected at least one view")
        if not isinstance(images, (list, tuple)):
            images = [images]
        counts = [prompt.count(self.image_token) for prompt in texts or ()]
        if counts and len(images) != len(counts) and sum(counts) == len(images):
            # A flat list of the images of conversations with several images each.
            remaining = iter(images)
            images = [[next(remaining) for _ in range(count)] for count in counts]
        studies = [list(study) if isinstance(study, (list, tuple)) else [study] for study in images]
        for position, study in enumerate(studies):
            if not study:
                raise ValueError(f"no image: study {position} has no view, expected at least one")
        return studies

    def _prior_studies(self, prior_images, studies: int) -> list[list]:
        """The prior views of each study, [] where there are none."""
        if prior_images is None:
            return [[] for _ in range(studies)]
        if not isinstance(prior_images, (list, tuple)):
            prior_images = [prior_images]
        if len(prior_images) != studies:
            raise ValueError(
                f"prior_images has {len(prior_images)} entries for {studies} studies: expected one each, a list of "
                "views or None"
            )
        priors = [
            list(views) if isinstance(views, (list, tuple)) else [] if views is None else [views]
            for views in prior_images
        ]
        if any(priors) and self.priors not in ("images", "both"):
            raise ValueError(f"prior_images were given: expected none, this model does not read them ({self._reads})")
        return priors

    @property
    def _reads(self) -> str:
        return f"OTDRGProcessor.priors={self.priors!r}"

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """A conversation in the chat template, as in `ProcessorMixin`.

        Raises:
            ValueError: the template takes too long or too much memory, which is checked at its first use.
        """
        template = self.chat_template if chat_template is None else chat_template
        if isinstance(template, str):
            check_chat_template(template, partial(super().apply_chat_template, add_generation_prompt=True))
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def default_prompt(self, indication: str | None = None, prior_report: str | None = None) -> str:
        """The prompt of one study in the LLM's chat template, with one `<image>` in the place of the study."""
        instruction = self.prompt
        if indication and indication.strip():
            instruction = f"Indication: {indication.strip()}\n{instruction}"
        if prior_report and prior_report.strip():
            instruction = f"Prior report: {self._cut_prior(prior_report)}\n{instruction}"
        content = [{"type": "image"}, {"type": "text", "text": f"\n{instruction}"}]
        return self.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _cut_prior(self, report: str) -> str:
        """A prior report in one line, cut to `max_prior_tokens`."""
        report = " ".join(report.split())
        ids = self.tokenizer.encode(report, add_special_tokens=False)
        return report if len(ids) <= self.max_prior_tokens else self.tokenizer.decode(ids[: self.max_prior_tokens])

    def _prompts(
        self,
        views: Sequence[int],
        texts: list[str] | None,
        indications: list,
        prior_reports: list,
        prior_views: Sequence[int],
    ) -> list[str]:
        if any(prior_reports) and self.priors not in ("report", "both"):
            raise ValueError(f"prior_report was given: expected none, this model does not read it ({self._reads})")
        if texts is None:
            if self.indication_reader == "predictor":
                indications = [None] * len(indications)
            prompts = list(map(self.default_prompt, indications, prior_reports))
        else:
            if any(prior_reports):
                raise ValueError("text and prior_report were both given: the report belongs to the default prompt")
            if self.indication_reader != "predictor" and any(indication is not None for indication in indications):
                raise ValueError("text and indication were both given: the indication belongs to the default prompt")
            prompts = [text if self.image_token in text else f"{self.image_token}\n{text}" for text in texts]
        return [self._expand(*study) for study in zip(prompts, views, prior_views, strict=True)]

    def _expand(self, prompt: str, views: int, prior_views: int = 0) -> str:
        """Replace the first `<image>` of a prompt by the placeholders of a study, followed by those of its prior."""
        places = prompt.count(self.image_token)
        if places not in (1, views):
            raise ValueError(f"a prompt has {places} {self.image_token} for {views} views: expected 1 or {views}")
        images = views + prior_views if self.view_fusion == "concat" else 1 + min(prior_views, 1)
        study = self.image_token * (self.image_tokens * images)
        if self.dle:
            study += FINDING_TOKEN * len(FINDINGS) if self.fiot else ""
            study += FINDING_TEXT_TOKEN if self.finding_text != "none" else ""
        head, _, tail = prompt.partition(self.image_token)
        return head + study + tail.replace(self.image_token, "")

    def _tokens(
        self,
        prompts: list[str],
        reports: list,
        max_report_tokens: int | None,
        padding: bool | str = True,
        padding_side: str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, list[list[int]]]:
        tokenizer = self.tokenizer
        training = reports[0] is not None
        if any((report is not None) != training for report in reports):
            raise ValueError("report is given for some studies and not for others: expected one each, or none")
        rows, targets = [], []
        for prompt, report in zip(prompts, reports, strict=True):
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            target = []
            if report is not None:
                target = tokenizer.encode(report, add_special_tokens=False)[:max_report_tokens]
                target.append(tokenizer.eos_token_id)
            rows.append(ids + target)
            targets.append([-100] * len(ids) + target)
        strategy = getattr(padding, "value", padding)
        truncates = getattr(truncation, "value", truncation) not in (None, False, "do_not_truncate")
        if max_length is None:
            if truncates or strategy == "max_length":
                raise ValueError("max_length=None: expected a number of tokens with padding='max_length' or truncation")
        elif truncates:
            rows, targets = self._truncated(rows, targets, max_length)
        # Padding is masked by length: many LLMs pad with the end-of-text token.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        side = padding_side or ("right" if training else "left")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r}: expected 'left' or 'right'")
        lengths = list(map(len, rows))
        if strategy not in (False, "do_not_pad"):
            longest = max(*lengths, max_length or 0) if strategy == "max_length" else max(lengths)
            multiple = pad_to_multiple_of or 1
            lengths = [-(-longest // multiple) * multiple] * len(rows)

        def padded(values: list[list[int]], value: int) -> list[list[int]]:
            sides = [[value] * (length - len(row)) for length, row in zip(lengths, values, strict=True)]
            return [more + row if side == "left" else row + more for row, more in zip(values, sides, strict=True)]

        features = {"input_ids": padded(rows, pad), "attention_mask": padded([[1] * len(row) for row in rows], 0)}
        return {**features, "labels": padded(targets, -100)} if training else features

    def _truncated(self, rows, targets, max_length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Rows and their targets, cut to `max_length` tokens on the tokenizer's `truncation_side`."""
        cut = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
        for row in rows:
            for token in _PLACEHOLDERS:
                lost = row.count(token_id := self.tokenizer.convert_tokens_to_ids(token)) - row[cut].count(token_id)
                if lost:
                    raise ValueError(
                        f"max_length={max_length} cuts {lost} {token} off a prompt: expected the study to fit, such as "
                        f"{len(row)} for the whole"
                    )
        return [row[cut] for row in rows], [target[cut] for target in targets]

    @staticmethod
    def _states(finding_states, studies: int) -> torch.Tensor:
        if isinstance(finding_states, Mapping):
            finding_states = [finding_states] * studies
        if isinstance(finding_states, (list, tuple)) and any(isinstance(row, Mapping) for row in finding_states):
            rows = torch.full((len(finding_states), len(FINDINGS)), -1)
            for row, findings in enumerate(finding_states):
                if not isinstance(findings, Mapping):
                    raise ValueError(
                        f"finding_states of study {row} is {findings!r}: expected a dictionary as of other studies, "
                        "{} to predict all"
                    )
                for finding, state in parse_findings(findings).items():
                    rows[row, finding] = state
        elif isinstance(finding_states, torch.Tensor):
            rows = finding_states.cpu()  # numpy reads neither those of an accelerator nor bfloat16
        else:
            rows = np.asarray(finding_states)
            if rows.dtype.kind not in "iuf":
                raise ValueError(
                    f"finding_states is {finding_states!r}: expected ids ({studies}, {len(FINDINGS)}), or a dictionary "
                    "for each study"
                )
            rows = torch.as_tensor(rows)
        check_finding_states(rows, studies)
        return rows.long()

    def save_pretrained(self, save_directory, **kwargs):
        saved = super().save_pretrained(save_directory, **kwargs)
        # `auto_map` is only for the saved files: a loaded processor does not have it.
        self.__dict__.pop("auto_map", None)
        return saved

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values", "view_mask"]
        return names if self.return_view_mask else names[:-1]


def _is_there(source: str | os.PathLike, file: str, hub: dict) -> bool:
    try:
        return find_file(source, file, **hub) is not None
    except (OSError, ValueError):
        return True  # the error of the Hub is shown instead


def _buckets(indication: str) -> list[int]:
    """The buckets of an indication's words and of its pairs of neighbouring words, without repetitions."""
    words = re.findall(r"[^\W\d_]+", indication.lower())
    pairs = map(" ".join, pairwise(words))
    return sorted({zlib.crc32(text.encode()) % INDICATION_BUCKETS for text in (*words, *pairs)})


def _one_each(name: str, values, studies: int) -> list:
    if values is None or isinstance(values, str):
        values = [values] * studies if values is None or studies == 1 else [values]
    if not hasattr(values, "__len__"):
        raise ValueError(f"{name} is {values!r}: expected text, or one text for each study")
    if len(values) != studies:
        raise ValueError(f"{name} has {len(values)} entries for {studies} studies: expected one each")
    for position, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} of study {position} is {value!r}: expected text, or None where there is none")
        if re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{name} has half of a pair of surrogates: expected Unicode text")
        for token in _PLACEHOLDERS:
            if token in value:
                raise ValueError(f"{name} holds {token!r}, the placeholder of the study in a prompt: remove it")
    return list(values)


def _given(name: str, values, studies: int) -> list[str | None]:
    """As [`_one_each`], with None in place of blank texts."""
    return [text if text and text.strip() else None for text in _one_each(name, values, studies)]


def _prompt_texts(text) -> list[str] | None:
    texts = [text] if isinstance(text, str) else text
    for position, one in enumerate(texts or ()):
        if not isinstance(one, str):
            raise ValueError(f"text of study {position} is {one!r}: expected a prompt")
    return texts


def _converted(name: str, value, return_tensors: str | None):
    """A feature, given as a tensor or a list of rows, in the requested form."""
    if return_tensors is None:
        if isinstance(value, torch.Tensor):
            return list(value) if value.is_floating_point() else value.tolist()
        return value
    if not isinstance(value, torch.Tensor):
        lengths = sorted(set(map(len, value)))
        if len(lengths) > 1:
            raise ValueError(
                f"{name} has rows of {lengths[0]} to {lengths[-1]} tokens: expected padding=True with "
                f"return_tensors={return_tensors!r}"
            )
        value = torch.tensor(value)
    return value if return_tensors == "pt" else value.numpy()


def _byte_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = import_module("tokenizers").ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _word_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizers = import_module("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=_MOST_WORDS,
        min_frequency=_LEAST_WORD_COUNT,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _chat_template(tokenizer) -> str:
    """The tokenizer's chat template, of several the default, extended to messages with images; else a plain one.

    Raises:
        ValueError: it has several and no default, or one that takes too long or too much memory.
    """
    if not tokenizer.chat_template:
        return _FLATTEN_MESSAGES + _PLAIN_TEMPLATE
    own = tokenizer.get_chat_template()
    template = _FLATTEN_MESSAGES + _EMPTY_SYSTEM_TURN + own
    try:
        check_chat_template(template, tokenizer.apply_chat_template)
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    except Exception as error:
        # A template that does not support system turns raises an error; it does not need the empty one.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        return _FLATTEN_MESSAGES + own
    return template


def _normalisation(vision: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the vision encoder's training images; ImageNet's if it has no image processor.

    Raises:
        OSError: its image processor is damaged, or the Hub cannot be reached.
    """
    try:
        image_processor = AutoImageProcessor.from_pretrained(vision)
    except Exception as error:  # damaged files make transformers raise errors of any type
        try:
            is_missing = isinstance(error, (OSError, ValueError)) and _has_no_image_processor(vision)
        except (OSError, ValueError):
            is_missing = False  # the Hub cannot be reached
        if is_missing:
            return IMAGENET_MEAN, IMAGENET_STD
        raise OSError(
            f"vision backbone {vision!r}: its image processor, which states mean and standard deviation, could not be "
            f"loaded ({describe(error)})"
        ) from error
    stated = getattr(image_processor, "data_config", None) or vars(image_processor)
    return (
        stated.get("image_mean", stated.get("mean")) or IMAGENET_MEAN,
        stated.get("image_std", stated.get("std")) or IMAGENET_STD,
    )


def _has_no_image_processor(vision: str) -> bool:
    """Whether a folder or repository has no file of an image processor; False if the Hub could not be asked."""
    names = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
    if any(find_file(vision, name) is not None for name in names):
        return False
    # Of a file that a repository does not have, the cache knows that; None is a file that nobody could ask for.
    return os.path.isdir(vision) or all(try_to_load_from_cache(vision, name) is not None for name in names)


OTDRGProcessor.register_for_auto_class()
if __name__ == "otdrg.processing_otdrg":  # the installed package, not a copy that came with weights
    AutoProcessor.register(OTDRGConfig, OTDRGProcessor, exist_ok=True)

__all__ = ["OTDRGProcessor", "read_view"]
