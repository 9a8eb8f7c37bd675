"""The package itself: lazy, and in nobody's way."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import otdrg
import pytest

ROOT = Path(otdrg.__file__).parent
SHIPPED = (
    "findings_otdrg",
    "sections_otdrg",
    "files_otdrg",
    "configuration_otdrg",
    "sinkhorn_otdrg",
    "weight_files_otdrg",
    "weights_otdrg",
    "outputs_otdrg",
    "prompt_otdrg",
    "generation_otdrg",
    "heatmaps_otdrg",
    "guidance_otdrg",
    "utility_otdrg",
    "bank_otdrg",
    "consensus_otdrg",
    "chat_templates_otdrg",
    "vision_otdrg",
    "predictor_otdrg",
    "modeling_otdrg",
    "image_processing_otdrg",
    "processing_otdrg",
    "pipeline_otdrg",
)
HEAVY = ("torch", "transformers", "datasets", "numpy")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert run(f"import sys, otdrg; print([m for m in {HEAVY} if m in sys.modules], otdrg.__version__)").startswith(
        f"[] {otdrg.__version__}"
    )


def test_help_is_given_without_torch():
    code = (
        "import sys\n"
        "from otdrg.cli import main\n"
        "try:\n"
        "    status = main(['--help'])\n"
        "except SystemExit as exit:\n"
        "    status = exit.code\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], status)\n"
    )
    shown = run(code).splitlines()
    assert shown[-1] in ("[] 0", "[] None")
    assert "otdrg" in "\n".join(shown[:-1])


def test_preparing_studies_needs_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys\n"
        "from otdrg.cli import main\n"
        f"command = 'prepare phantom --train 1 --validation 0 --test 0 --image-size 32 --output {tmp_path}/built'\n"
        "status = main(command.split())\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], status)\n"
    )
    assert run(code).splitlines()[-1] == "[] 0"


def test_every_public_name_is_there():
    for name in otdrg.__all__:
        assert getattr(otdrg, name) is not None, name
    assert set(dir(otdrg)) >= set(otdrg.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="module 'otdrg' has no attribute 'nothing'"):
        otdrg.nothing  # noqa: B018


def test_public_names_are_those_of_their_modules():
    for name in SHIPPED:
        module = importlib.import_module(f"otdrg.{name}")
        for public in module.__all__:
            assert hasattr(module, public), public


def test_no_module_at_the_root_bears_the_name_of_a_library():
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")} - {
        "__init__"
    }
    libraries = {"datasets", "evaluate", "data", "transformers", "torch", "timm", "peft", "accelerate", "tokenizers"}
    assert not ours & libraries
    assert not ours & set(sys.stdlib_module_names)
    for name in ours - {"__init__", "__main__"}:
        spec = importlib.util.find_spec(name)
        assert spec is None or Path(spec.origin or ROOT).is_relative_to(ROOT), name


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_only_what_remote_code_may(name):
    """Each other, relatively; and libraries that are there wherever transformers runs, or behind a check."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    always = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
    guarded = {id(node) for check in ast.walk(tree) if isinstance(check, ast.If) for node in ast.walk(check)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module in SHIPPED
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            allowed = top in always | set(sys.stdlib_module_names) or (top in ("peft", "timm") and id(node) in guarded)
            assert allowed, f"{name}.py imports {module}"
