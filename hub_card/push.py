"""A trained model on the Hub: what is uploaded is put together in a folder, and uploaded as it lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import save_file

from ..configuration_otdrg import OTDRGConfig
from ..studies.publish import hub_errors, make_repo
from ..training.features import model_digest
from ..training.published import load_published
from ..weights_otdrg import record_sha256, sha256
from .card import build_card
from .run_files import published_metrics
from .space_files import space_files

PACKAGE = Path(__file__).resolve().parents[1]
#: What is deleted of the repository's former version unless it is uploaded anew: weights and code that stay are loaded.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*_otdrg.py", "language_model/*")
#: What lies between the backbones.
_JOINING = ("image_projector.", "label_projector.", "label_encoder.", "finding_predictor.")


def assemble_full(
    run: str,
    repo_id: str,
    folder: Path,
    evaluations: Sequence[Path] = (),
    license: str | None = None,
    serving: bool = False,
) -> None:
    """Write what is published of a model as a whole: weights, LoRA merged, code, processor, card, metrics and licence.

    The model is loaded for it, so that one that does not load is not published.

    Args:
        run: folder of a run or a model.
        repo_id: where it will be, "org/name".
        folder: an empty one.
        evaluations, license: as of [`build_card`].
        serving: whether the LLM is written as a plain causal LM, too, into `language_model`, and what lies between the
            backbones into `projector.safetensors`: an engine that serves LLMs loads the first, and is given
            `get_prompt_embeddings`.

    Raises:
        ValueError: no model there, or a fault in the run's files.
        OSError: the model cannot be loaded.
    """
    model, processor = load_published(run)
    digest = model_digest(model, processor)
    model.merge_lora()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if serving:
        llm = model.language_model
        llm.generation_config.update(eos_token_id=model.generation_config.eos_token_id)
        # Placeholders stand for features in the prompt, and are no words to be written.
        llm.generation_config.update(suppress_tokens=model.config.placeholder_token_ids)
        llm.save_pretrained(folder / "language_model")
        processor.tokenizer.save_pretrained(folder / "language_model")
        joining = {name: weight for name, weight in model.state_dict().items() if name.startswith(_JOINING)}
        save_file(joining, folder / "projector.safetensors", {"format": "pt"})
    _describe(run, repo_id, folder, "full", evaluations, license, digest)


def assemble_adapter(
    run: str,
    repo_id: str,
    folder: Path,
    backbones: Mapping[str, str],
    evaluations: Sequence[Path] = (),
    license: str | None = None,
) -> None:
    """Write what is published of a model as an adapter; arguments and errors as of [`assemble_full`].

    Args:
        backbones: Hub ids of "vision" and "text" in place of those the adapter was trained with, which may be folders.

    Raises:
        ValueError: also for a run without an adapter, and for a backbone that is not on the Hub.
    """
    source = Path(run) / "adapter" if (Path(run) / "adapter").is_dir() else Path(run)
    if not (source / "config.json").is_file() or OTDRGConfig.from_pretrained(source).weights != "adapter":
        raise ValueError(
            f"{run}: no adapter here or in its folder 'adapter': runs whose report stage trains pretrained backbones "
            "with text=lora or frozen leave one; without --adapter the model is pushed as a whole"
        )
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for code in PACKAGE.glob("*_otdrg.py"):
        shutil.copy(code, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in ("vision", "text"):
        field = f"{part}_backbone"
        config[field] = backbones.get(part, config[field])
        if Path(config[field]).exists():
            raise ValueError(
                f"{source} is an adapter of the {part} backbone {config[field]}, which nobody else has: "
                f"--{part}-backbone ORG/NAME says where on the Hub the same weights are"
            )
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    record_sha256(folder)
    references = [config["vision_backbone"], config["text_backbone"]]
    _describe(run, repo_id, folder, "adapter", evaluations, license, None, references)


def _describe(run, repo_id, folder, form, evaluations, license, digest, base_models=()) -> None:
    card = build_card(Path(run), repo_id, evaluations, form, base_models, license, digest)
    card.save(folder / "README.md")
    metrics = published_metrics(Path(run), evaluations)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(PACKAGE / "LICENSE", folder / "LICENSE")


def pin_backbones(folder: Path) -> None:
    """Hold the backbones of an assembled adapter against those on the Hub, and refer to their commits.

    Raises:
        ValueError: other weights are there than it was trained on.
        OSError: the Hub cannot be reached, or has no such repository.
    """
    hub, path = HfApi(), folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["backbone_revisions"] = {}
    for part, expected in config["backbone_sha256"].items():
        reference = config[f"{part}_backbone"]
        with hub_errors(f"the {part} backbone {reference} was not found on {hub.endpoint}"):
            revision = hub.model_info(reference).sha
            found = {
                file.path: file.lfs.sha256 if file.lfs else sha256(hub.hf_hub_download(reference, file.path))
                for file in hub.get_paths_info(reference, list(expected), revision=revision)
            }
        if found != expected:
            raise ValueError(
                f"{reference} does not hold the {part} backbone that this is an adapter of: the SHA-256 of its weights "
                f"is {found}, expected {expected}"
            )
        config["backbone_revisions"][part] = revision
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def upload_model(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Upload an assembled folder; what of it is there already, also of an upload that broke, is not sent again.

    Args:
        folder: as [`assemble_full`] or [`assemble_adapter`] wrote it.
        repo_id: "org/name"; it is made where it is not there.
        private: whether only its owners may see it.
        revision: branch, which is made where it is not there; `main` without it.
        message: of the commit.

    Returns:
        Its address.

    Raises:
        ValueError: the repository is there, and public where it should be private.
        OSError: the Hub refuses, or cannot be reached.
    """
    hub = HfApi()
    with hub_errors(
        f"{repo_id} was not pushed to {hub.endpoint}", "the same command goes on with what has not arrived yet"
    ):
        repo_id = _made(hub, repo_id, "model", private)
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(_REPLACED),
        )
    return f"{hub.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def upload_space(model_id: str, space_id: str, private: bool) -> str:
    """Upload the demo of a model that is on the Hub; returns its address.

    Args:
        model_id: of the model.
        space_id: "org/name"; it is made where it is not there.
        private: whether only its owners may see it.

    Raises:
        ValueError, OSError: as of [`upload_model`].
    """
    hub = HfApi()
    with hub_errors(f"{space_id} was not pushed to {hub.endpoint}"):
        space_id = _made(hub, space_id, "space", private, space_sdk="gradio")
        files = [CommitOperationAdd(path, content) for path, content in space_files(model_id).items()]
        hub.create_commit(space_id, files, repo_type="space", commit_message=f"Demo of {model_id}")
    return f"{hub.endpoint}/spaces/{space_id}"


def _made(hub: HfApi, repo_id: str, repo_type: str, private: bool, **more) -> str:
    repo_id, is_private = make_repo(hub, repo_id, repo_type, private, **more)
    if private and not is_private:
        raise ValueError(f"{repo_id} is public: leave out --private, or push to another name")
    return repo_id


__all__ = ["assemble_adapter", "assemble_full", "pin_backbones", "upload_model", "upload_space"]
