"""Push a trained model: assemble its files in a folder, then upload this folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..configuration_otdrg import resolve_backbone
from ..files_otdrg import read_json, write_json
from ..inference.digests import model_digest
from ..inference.loading import load_published, published_folder
from ..inference.model_files import read_processor
from ..inference.vllm import save_language_model, served_name
from ..studies.publish import hub_errors, make_repo
from ..weight_files_otdrg import check_weights, read_stated, record_sha256, sha256
from .card import build_card
from .run_files import read_run
from .space_files import space_files

PACKAGE = Path(__file__).resolve().parents[1]
#: What an Inference Endpoint runs and installs.
_ENDPOINT = ("handler.py", "requirements.txt")
#: Files of the repository's previous version that are deleted unless they are uploaded again: old weights and code
#: would be loaded, and transformers follows adapter_config.json to another model.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*_otdrg.py", "language_model/*", "adapter_config.json"]
#: Parameters between the backbones.
_BETWEEN = ("image_projector.", "label_projector.", "label_encoder.", "finding_predictor.", "prior_embedding.")


def assemble_full(
    run: str,
    repo_id: str,
    folder: Path,
    evaluations: Sequence[Path] = (),
    license: str | None = None,
    serving: bool = False,
    dtype: str | None = None,
) -> str | None:
    """Write a complete model for the Hub: weights with merged LoRA, code, processor, card, metrics and licence.

    The model is loaded, so that a model that does not load is not published.

    Args:
        run: folder of a run or a model.
        repo_id: the repository, "org/name".
        folder: an empty folder to write to.
        evaluations, license: as in [`build_card`].
        serving: also write the LLM as a plain causal LM (`language_model`) and the modules between the backbones
            (`projector.safetensors`), for engines that serve LLMs; see `get_prompt_embeddings`.
        dtype: name of the torch type of the stored weights; the model's by default.

    Returns:
        With `serving`, the name under which this package finds the LLM in a server.

    Raises:
        ValueError: there is no model, or a file of the run has the wrong content.
        OSError: the model cannot be loaded.
    """
    model, processor = load_published(run, device="cpu")
    digest = model_digest(model, processor)
    model.merge_lora()
    if dtype is not None:
        model.to(getattr(torch, dtype))
    for field in ("vision_backbone", "text_backbone"):
        # A local path is useless on other machines.
        if not _may_be_on_hub(getattr(model.config, field)):
            setattr(model.config, field, None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if serving:
        save_language_model(model, processor, folder / "language_model")
        between = {name: weight for name, weight in model.state_dict().items() if name.startswith(_BETWEEN)}
        save_file(between, folder / "projector.safetensors", {"format": "pt"})
        record_sha256(folder)
    _describe(run, repo_id, folder, "full", evaluations, license, digest)
    return served_name(model) if serving else None


def assemble_adapter(
    run: str,
    repo_id: str,
    folder: Path,
    backbones: Mapping[str, str],
    evaluations: Sequence[Path] = (),
    license: str | None = None,
) -> None:
    """Write an adapter for the Hub; other arguments and errors as in [`assemble_full`].

    The model is not loaded, because its backbones need not be on this machine; the SHA-256 of its weights is checked.

    Args:
        backbones: Hub ids of "vision" and "text", in place of those in its configuration, which may be local folders.

    Raises:
        ValueError: also for a run without an adapter, and for a backbone that is not on the Hub.
        OSError: the weights are damaged, or the processor cannot be loaded.
    """
    if Path(run).is_dir() and published_folder(run).name == "reward":
        raise ValueError(
            f"{run}: the model of stage reward has no adapter of its backbones: leave out --adapter to push the "
            "complete model"
        )
    source = Path(run) / "adapter" if (Path(run) / "adapter").is_dir() else Path(run)
    config = read_stated(source)[0]
    if config.get("weights") != "adapter":
        raise ValueError(
            f"{run}: no adapter here or in its folder 'adapter', which is written when the report stage trains "
            "pretrained backbones with text=lora or frozen; leave out --adapter to push the complete model"
        )
    for part in ("vision", "text"):
        reference = backbones.get(part, config[f"{part}_backbone"])
        _check_reference(source, part, reference, config["backbone_sha256"][part])
        if reference != config[f"{part}_backbone"]:
            config[f"{part}_backbone"], config["backbone_revisions"][part] = reference, None
    # Named one by one: the folder may hold private files, such as the reports of an evaluation.
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
    """Check that a backbone's reference has the form of a Hub id and the same file format as in training."""
    option = f"--{part}-backbone"
    if not _may_be_on_hub(reference):
        raise ValueError(
            f"{source} is an adapter of the {part} backbone {reference}, which is not on the Hub: "
            f"{option} ORG/NAME names a repository with the same weights"
        )
    gguf = next((name for name in files if name.endswith(".gguf")), None)
    if resolve_backbone(reference)[1].get("gguf_file") != gguf:
        raise ValueError(
            f"{source} is an adapter of the {part} backbone as {gguf or 'safetensors'}, not of {reference}: expected "
            f"{option} {f'ORG/NAME/{gguf}' if gguf else 'ORG/NAME'}"
        )


def _may_be_on_hub(reference: str | None) -> bool:
    """Whether a reference has the form of a Hub id, or of a GGUF file there, and is not a local path."""
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
    for name in _ENDPOINT:
        shutil.copy(PACKAGE / "hub_card" / "endpoint" / name, folder / name)


def pin_backbones(folder: Path) -> None:
    """Check the backbones of an assembled adapter against the Hub, and store their commits in its configuration.

    Without a commit in the configuration, the newest is taken.

    Raises:
        ValueError: the weights there are not those the adapter was trained on.
        OSError: the Hub cannot be reached, or has no such repository.
    """
    hub, path = HfApi(), folder / "config.json"
    config = read_json(path)
    for part, expected in config["backbone_sha256"].items():
        reference = config[f"{part}_backbone"]
        repo_id, _ = resolve_backbone(reference)
        with hub_errors(f"the {part} backbone {reference} was not found on {hub.endpoint}"):
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
    """Upload an assembled folder and return its address; files that are already there are not sent again.

    Args:
        folder: written by [`assemble_full`] or [`assemble_adapter`].
        repo_id: "org/name"; created if missing.
        private: whether a new repository is private; otherwise it has its owner's default.
        revision: branch, created if missing; by default `main`.
        message: commit message.

    Raises:
        ValueError: `private`, but the repository exists and is public.
        OSError: the Hub refuses, or cannot be reached.
    """
    hub = HfApi()
    with hub_errors(f"{repo_id} was not pushed to {hub.endpoint}", "push it again to continue with the missing files"):
        repo_id = _create_repo(hub, repo_id, "model", private)
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=_REPLACED,
        )
    return f"{hub.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def upload_space(model_id: str, space_id: str, private: bool) -> str:
    """Upload the demo of a model that is on the Hub, and return its address; errors as in [`upload_model`]."""
    hub = HfApi()
    with hub_errors(f"{space_id} was not pushed to {hub.endpoint}"):
        space_id = _create_repo(hub, space_id, "space", private, space_sdk="gradio")
        files = [CommitOperationAdd(path, content) for path, content in space_files(model_id).items()]
        hub.create_commit(space_id, files, repo_type="space", commit_message=f"Demo of {model_id}")
    return f"{hub.endpoint}/spaces/{space_id}"


def _create_repo(hub: HfApi, repo_id: str, repo_type: str, private: bool, **more) -> str:
    # None, not False: organisations may make new repositories private by default.
    repo_id, is_private = make_repo(hub, repo_id, repo_type, private or None, **more)
    if private and not is_private:
        raise ValueError(f"{repo_id} is public: leave out --private, or choose another name")
    return repo_id
