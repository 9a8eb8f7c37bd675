"""The Space of a model: `otdrg push` inserts the model's id and uploads this file with the package."""

import atexit
import os
from contextlib import ExitStack, suppress

from otdrg.hub_card.space.temporary import upload_folder

# Gradio reads these variables on import.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
if "GRADIO_TEMP_DIR" not in os.environ:
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    os.environ["GRADIO_TEMP_DIR"] = str(until_the_end.enter_context(upload_folder()))

with suppress(ImportError):
    # On ZeroGPU, before anything imports torch.
    import spaces  # noqa: F401

from otdrg.hub_card.space.interface import build_demo
from otdrg.hub_card.space.serving import serve
from otdrg.inference.loading import load_pipeline

#: A private model needs the Space's secret HF_TOKEN.
MODEL = os.environ.get("OTDRG_MODEL", "org/otdrg")

pipe = load_pipeline(MODEL)
demo = build_demo(pipe, MODEL)

if __name__ == "__main__":
    serve(demo)
