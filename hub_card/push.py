"""A trained model on the Hub: what is uploaded is put together in a folder, and uploaded as it lies there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..configuration_otdrg import resolve_backbone
from ..files_otdrg import read_json, write_json
from ..inference.features import model_digest
from ..inference.loading import load_published
from ..inference.model_files import read_processor
from ..studies.publish import hub_errors, make_repo
from ..weight_files_otdrg import check_weights, read_stated, record_sha256, sha256
from .card import build_card
from .run_files import read_run
from .space_files import space_files

PACKAGE = Path(__file__).resolve().parents[1]
#: What is deleted of the repository's former version unless it is uploaded anew: weights and code that stay are loaded,
#: and of the last transformers would follow to another model.
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*_otdrg.py", "language_model/*", "adapter_config.json")
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
    for field in ("vision_backbone", "text_backbone"):
        # A path of this machine means nothing to those who get the model.
        if not _may_be_on_hub(getattr(model.config, field)):
            setattr(model.config, field, None)
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
        record_sha256(folder)
    _describe(run, repo_id, folder, "full", evaluations, license, digest)


def assemble_adapter(
    run: str,
    repo_id: str,
    folder: Path,
    backbones: Mapping[str, str],
    evaluations: Sequence[Path] = (),
    license: str | None = None,
) -> None:
    """Write what is published of a model as an adapter; other arguments and errors as of [`assemble_full`].

    The model is not loaded for it, because its backbones need not be on this machine; the SHA-256 of its own weights is
    looked at.

    Args:
        backbones: Hub ids of "vision" and "text" in place of those the adapter was trained with, which may be folders.

    Raises:
        ValueError: also for a run without an adapter, and for a backbone that is not on the Hub.
        OSError: the adapter's weights are damaged, or its processor cannot be loaded.
    """
    source = Path(run) / "adapter" if (Path(run) / "adapter").is_dir() else Path(run)
    config = read_stated(source)[0]
    if config.get("weights") != "adapter":
        raise ValueError(
            f"{run}: no adapter here or in its folder 'adapter': runs whose report stage trains pretrained backbones "
            "with text=lora or frozen leave one; without --adapter the model is pushed as a whole"
        )
    for part in ("vision", "text"):
        reference = backbones.get(part, config[f"{part}_backbone"])
        _check_reference(source, part, reference, config["backbone_sha256"][part])
        if reference != config[f"{part}_backbone"]:
            config[f"{part}_backbone"], config["backbone_revisions"][part] = reference, None
    # By name: whatever else came to lie in the folder, such as an evaluation's reports, is not for others.
    weights = check_weights(source, config.get("weights_sha256"))
    for name in (*weights, SAFE_WEIGHTS_INDEX_NAME, "generation_config.json"):
        if (source / name).is_file() and (name != SAFE_WEIGHTS_INDEX_NAME or len(weights) > 1):
            shutil.copy(source / name, folder)
    read_processor(source).save_pretrained(folder)
    for code in PACKAGE.glob("*_otdrg.py"):
        shutil.copy(code, folder)
    write_json(folder / "config.json", config, sort_keys=True)
    record_sha256(folder)
    references = [resolve_backbone(config[f"{part}_backbone"])[0] for part in ("vision", "text")]
    _describe(run, repo_id, folder, "adapter", evaluations, license, None, references)


def _check_reference(source: Path, part: str, reference: str, files: Mapping[str, str]) -> None:
    """A backbone's reference is one that others can load the files by that an adapter was trained on."""
    if not _may_be_on_hub(reference):
        raise ValueError(
            f"{source} is an adapter of the {part} backbone {reference}, which nobody else has: "
            f"--{part}-backbone ORG/NAME says where on the Hub the same weights are"
        )
    gguf = next((name for name in files if name.endswith(".gguf")), None)
    if resolve_backbone(reference)[1].get("gguf_file") != gguf:
        raise ValueError(
            f"{source} is an adapter of the {part} backbone in {gguf or 'safetensors'}, not of {reference}: "
            f"--{part}-backbone {f'ORG/NAME/{gguf}' if gguf else 'ORG/NAME'} says where on the Hub it is"
        )


def _may_be_on_hub(reference: str | None) -> bool:
    """Whether a backbone's reference has the form of a Hub id, or of a GGUF file there, and is nothing on this disk."""
    if reference is None or Path(reference).exists():
        return False
    try:
        validate_repo_id(resolve_backbone(reference)[0])
    except HFValidationError:
        return False
    return True


def _describe(run, repo_id, folder, form, evaluations, license, digest, base_models=()) -> None:
    card = build_card(Path(run), repo_id, evaluations, form, base_models, license, digest)
    card.save(folder / "README.md")
    write_json(folder / "metrics.json", read_run(Path(run), evaluations).metrics())
    shutil.copy(PACKAGE / "LICENSE", folder / "LICENSE")


def pin_backbones(folder: Path) -> None:
    """Hold the backbones of an assembled adapter against those on the Hub, and refer to their commits, which are the
    newest unless it was trained on others.

    Raises:
        ValueError: other weights are there than it was trained on.
        OSError: the Hub cannot be reached, or has no such repository.
    """
    hub, path = HfApi(), folder / "config.json"
    config = read_json(path)
    for part, expected in config["backbone_sha256"].items():
        reference = config[f"{part}_backbone"]
        repo_id, _ = resolve_backbone(reference)
        with hub_errors(f"the {part} backbone {reference} could not be looked up on {hub.endpoint}"):
            revision = hub.model_info(repo_id, revision=config["backbone_revisions"][part]).sha
            found = {
                file.path: file.lfs.sha256
                if file.lfs
                else sha256(hub.hf_hub_download(repo_id, file.path, revision=revision))
                for file in hub.get_paths_info(repo_id, list(expected), revision=revision)
            }
        if found != expected:
            raise ValueError(
                f"{reference} does not hold the {part} backbone that this is an adapter of: the SHA-256 of its weights "
                f"is {found}, expected {expected}"
            )
        config["backbone_revisions"][part] = revision
    write_json(path, config, sort_keys=True)


def upload_model(folder: Path, repo_id: str, private: bool, revision: str | None, message: str) -> str:
    """Upload an assembled folder; what of it is there already, also of an upload that broke, is not sent again.

    Args:
        folder: as [`assemble_full`] or [`assemble_adapter`] wrote it.
        repo_id: "org/name"; it is made where it is not there.
        private: whether only its owners may see it; otherwise a new one is as public as its owner's are.
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
        f"{repo_id} was not pushed to {hub.endpoint}", "pushing it again goes on with what has not arrived yet"
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
    # None rather than False: an organisation may make what is new private by default.
    repo_id, is_private = make_repo(hub, repo_id, repo_type, private or None, **more)
    if private and not is_private:
        raise ValueError(f"{repo_id} is public: leave out --private, or push to another name")
    return repo_id


__all__ = ["assemble_adapter", "assemble_full", "pin_backbones", "upload_model", "upload_space"]
