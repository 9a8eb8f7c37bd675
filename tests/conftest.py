"""What the tests of the model files share: a model small enough to build in a moment, and synthetic radiographs."""

import os

# Before anything imports the libraries that read them. One thread a test process: the tensors here are tiny.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Set in many containers: all modules would be compiled again in each process, which takes up to 7 seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import gc
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import settings
from PIL import Image

# For processes.py, which forked processes import.
sys.path.append(str(Path(__file__).parent))

from processes import Process

sys.dont_write_bytecode = False  # read from the environment before

# Tests that need more examples say so; a test's first example often pays for an import.
settings.register_profile("otdrg", max_examples=40, deadline=None)
settings.load_profile("otdrg")


def no_curves(*_):
    """In place of `draw_curves`."""


#: What trains or starts processes: files that take 10 seconds to a minute.
LONG = (
    "training/",
    "hub_card/",
    "commands/",
    "evaluation/",
    "experiments/",
    "studies/test_build.py",
    "test_documentation.py",
    "test_remote_code.py",
    "test_quickstart.py",
    "test_weights.py",
    "test_modeling.py",
    "labelers/test_chexbert.py",
)


def pytest_configure(config):
    """Give the files to processes in the order below; xdist would begin with those that have the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Start with the long files, so that at the end no process waits for the other."""
    items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{name}" for name in LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import the test modules without garbage collection, and exclude all that they import from later collections.

    Each training run collects garbage several times, which takes half a second with the objects of the libraries.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup():
    """Before each test: one thread, and no `curves.png`.

    A training run that a test before this one started took a thread for each core. Threads of two test processes wait
    for each other, which makes all that follows several times slower. Curves take 40 % of the time of a tiny run; only
    `trained_run` has them.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    callbacks = sys.modules.get("otdrg.training.callbacks")
    if callbacks is not None and callbacks.draw_curves is not no_curves:
        no_curves.original = callbacks.draw_curves
        callbacks.draw_curves = no_curves


# Makes packages look as if they were not installed, before anything is imported. A fifth of importing the libraries
# would be garbage collection.
HIDE = """
import gc
import sys

gc.disable()

class Hidden:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def hide(*names):
    sys.meta_path[:] = [Hidden(finder, names) for finder in sys.meta_path]
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{name} can still be imported")
"""

REPORTS = (
    "The heart is normal in size. The lungs are clear. There is no pleural effusion or pneumothorax.",
    "The cardiac silhouette is enlarged. Small bilateral pleural effusions are present.",
    "Right lower lobe consolidation is suspicious for pneumonia. No pneumothorax.",
    "A left chest tube is in place. There is a tiny apical pneumothorax.",
)


def make_config(**overrides):
    """The `tiny` preset made tinier, with the paper's kind of encoder: a Swin, 56-pixel views, 4 image tokens."""
    from otdrg import OTDRGConfig

    fields = {
        "image_size": 56,
        "image_tokens": 4,
        "vision_config": {
            "architecture": "swin_tiny_patch4_window7_224",
            "model_args": {
                "img_size": 56,
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 4],
                "window_size": 7,
                "drop_path_rate": 0.0,
            },
            "initializer_range": 0.2,
        },
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        },
    }
    return OTDRGConfig.from_preset("tiny", **{**fields, **overrides})


def make_model(seed=0, **overrides):
    """A model with random weights, in evaluation mode, and its processor."""
    import torch
    from otdrg import OTDRGForReportGeneration, OTDRGProcessor

    config = make_config(**overrides)
    processor = OTDRGProcessor.from_texts(REPORTS, config=config, vocab_size=400)
    torch.manual_seed(seed)
    model = OTDRGForReportGeneration(config).eval()
    with torch.no_grad():
        # Random features all but agree; larger ones let images and states show in what is written.
        for name, parameter in model.finding_predictor.named_parameters():
            # Queries start large already: sharper attention would show the rounding of batches.
            parameter.mul_(0.25 if name.startswith("queries") else 3)
    return model, processor


def make_view(seed, size=64):
    """A gray view (size, size), uint8: noise over a slope, no two seeds alike."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 100, size)[:, None] * random.uniform(0.2, 1) + np.linspace(0, 60, size)[None]
    return (slope + random.integers(0, 90, (size, size))).astype(np.uint8)


@pytest.fixture(scope="session")
def reports():
    return list(REPORTS)


@pytest.fixture(scope="session")
def build_config():
    return make_config


@pytest.fixture(scope="session")
def build_model():
    return make_model


@pytest.fixture(scope="session")
def _tiny():
    return make_model()


@pytest.fixture(scope="session")
def model(_tiny):
    """Shared: do not change it; `build_model` makes one of your own."""
    return _tiny[0]


@pytest.fixture(scope="session")
def processor(_tiny):
    """Shared: do not change it."""
    return _tiny[1]


@pytest.fixture(scope="session")
def plain_tokenizer(processor):
    """The processor's tokenizer as an LLM has it, without our placeholders. Shared: do not change it."""
    import json

    tokenizer = processor.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    markers = ("<image>", "<finding>", "<finding_text>")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in markers]
    return type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


@pytest.fixture(scope="session")
def build_backbones(plain_tokenizer):
    """Writes folders of a DINOv2 and a LLaMA, which have not seen our placeholders."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config, LlamaConfig

    def build(root, tied=True, bias=False, seed=1):
        torch.manual_seed(seed)
        layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
        vision = Dinov2Config(hidden_size=32, image_size=56, patch_size=14, **layers)
        AutoModel.from_config(vision).save_pretrained(root / "vision")
        ids = {f"{name}_token_id": getattr(plain_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        size = {"vocab_size": len(plain_tokenizer), "hidden_size": 64, "intermediate_size": 128, **ids}
        text = LlamaConfig(tie_word_embeddings=tied, attention_bias=bias, **size, **layers)
        AutoModelForCausalLM.from_config(text).save_pretrained(root / "text")
        plain_tokenizer.save_pretrained(root / "text")
        return {"vision": str(root / "vision"), "text": str(root / "text")}

    return build


@pytest.fixture(scope="session")
def build_on_backbones():
    """A model whose adapters, projections and predictor have moved, as after the stages; its backbones have not."""
    import torch
    from otdrg import OTDRGForReportGeneration, OTDRGProcessor

    def build(backbones, **fields):
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
        fields = {"lora": lora, "image_size": 56, "image_tokens": 4, **fields}
        for part, reference in backbones.items():
            fields.setdefault(f"{part}_backbone", reference)
        model = OTDRGForReportGeneration.from_backbones(**backbones, **fields)
        processor = OTDRGProcessor.from_backbones(**backbones, config=model.config)
        model.add_lora()
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or not name.startswith(("vision_tower", "language_model")):
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval(), processor

    return build


@pytest.fixture(scope="session")
def tiny_config(model):
    """Shared: do not change it; `build_config` makes one of your own."""
    return model.config


@pytest.fixture(scope="session")
def view():
    return make_view


@pytest.fixture(scope="session")
def views():
    """Six gray views (64, 64), uint8."""
    return [make_view(seed) for seed in range(6)]


@pytest.fixture
def dicom(tmp_path):
    """Writes a DICOM file around `pixels` (uint16 or int16; None leaves them out) and returns its path."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def write(pixels, interpretation="MONOCHROME2", name="view.dcm", **fields):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.Modality = "DX"
        if pixels is not None:
            dataset.Rows, dataset.Columns = pixels.shape[-2:]
            dataset.SamplesPerPixel = 1
            dataset.PhotometricInterpretation = interpretation
            dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
            dataset.HighBit = dataset.BitsStored - 1
            dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
            dataset.PixelData = pixels.tobytes()
        for field, value in fields.items():
            setattr(dataset, field, value)
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def hide():
    """What a script begins with that calls `hide("otdrg")`, so that the package looks as if it were not installed."""
    return HIDE


@pytest.fixture(scope="session")
def make_hub_server():
    """The class of the servers of hub_server.py."""
    import sys
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    if "hub_server" not in sys.modules:
        spec = spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
        sys.modules["hub_server"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["hub_server"])
    return sys.modules["hub_server"].HubServer


@pytest.fixture
def hub_server(make_hub_server):
    """A Hub of the test's own on this machine, described in hub_server.py; processes reach it by its `environment`."""
    server = make_hub_server()
    yield server
    server.stop()


TINY_RECIPE = {
    "cpu_threads": 1,
    "studies": {
        "source": "phantom",
        "options": {"train": 16, "validation": 5, "test": 0, "image_size": 112, "views": ["frontal"]},
    },
    "model": {
        "vocab_size": 400,
        "overrides": {
            "image_tokens": 9,
            "ot_epsilon": 0.05,
            "vision_config": {
                "architecture": "swin_tiny_patch4_window7_224",
                "model_args": {
                    "img_size": 112,
                    "patch_size": 8,
                    "embed_dim": 8,
                    "depths": [1, 1],
                    "num_heads": [1, 2],
                    "window_size": 7,
                },
                "initializer_range": 0.2,
            },
            # Wide initial weights and a head of its own, so that what an untrained LLM writes depends on its prompt.
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "initializer_range": 0.3,
                "tie_word_embeddings": False,
            },
            "lora": {"r": 2, "lora_alpha": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        },
    },
    "predictor": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1},
    "report": {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "ot_weight_warmup": 0.5,
        "ot_epsilon_start": 0.2,
        "generation": {"num_beams": 1, "max_new_tokens": 12},
        "evaluation": {"split": "none"},
    },
}


@pytest.fixture(scope="session")
def start_process():
    """Starts `python -c CODE …` or `python -m MODULE …`, given without `python`; see processes.py."""
    return Process


def start_processes(arguments, processes=2, **variables):
    """Starts Python once for each process, as torchrun would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        Process(
            arguments,
            env={
                **os.environ,
                **variables,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(processes)
    ]


def launch_processes(arguments, processes=2, **variables):
    """What each of the processes printed, which must succeed."""
    running = start_processes(arguments, processes, **variables)
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), outputs
    return [out for out, _ in outputs]


@pytest.fixture(scope="session")
def start_together():
    """A function that starts Python with its arguments in two or more processes, and gives them."""
    return start_processes


@pytest.fixture(scope="session")
def launch():
    """A function that runs Python with its arguments in two processes and gives what each of them printed."""
    return launch_processes


@pytest.fixture(scope="session")
def tiny_dinov2():
    """`vision_config` of a DINOv2 with stochastic depth, whose weights have other names in files than in memory."""
    return {
        "model_type": "dinov2",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "drop_path_rate": 0.1,
    }


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """Path of a recipe that runs both stages in about a second."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    run = {"output_dir": str(path.parent / "run"), **TINY_RECIPE}
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained_run(tiny_recipe):
    """Folder of a finished run of `tiny_recipe`."""
    from otdrg.train_hf import main
    from otdrg.training import callbacks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "draw_curves", getattr(no_curves, "original", callbacks.draw_curves))
        assert main([str(tiny_recipe)]) == 0
    return tiny_recipe.parent / "run"


@pytest.fixture(scope="session")
def run_folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def paths(views, tmp_path):
    """Three views, the name of one with spaces in it."""
    names = [str(tmp_path / name) for name in ("0.png", "a view.png", "2.png")]
    for name, view in zip(names, views, strict=False):
        Image.fromarray(view).save(name)
    return names
