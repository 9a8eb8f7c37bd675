"""Build a model from your own vision encoder and LLM, compute a training loss, and save it.

python examples/own_backbones.py --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse

from otdrg import OTDRGForReportGeneration, OTDRGProcessor
from otdrg.studies.phantom import make_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision", default="facebook/dinov2-small", help="Hub id, folder or timm/ name")
    parser.add_argument("--text", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, folder or GGUF file")
    parser.add_argument("--output", default="own_model", help="folder for the model (default: own_model)")
    options = parser.parse_args()

    # Any further argument is a field of OTDRGConfig.
    model = OTDRGForReportGeneration.from_backbones(vision=options.vision, text=options.text, image_tokens=49)
    processor = OTDRGProcessor.from_backbones(vision=options.vision, text=options.text, config=model.config)

    phantom = make_phantom(seed=0, index=0)
    batch = processor(images=[phantom.images], report=[phantom.report], finding_states=[phantom.states])
    # The text of the finding states, whose length differs between studies, is inserted before `forward`.
    output = model(**model.expand_finding_text(**batch), finding_labels=batch["finding_states"])
    print(f"loss {output.loss:.3f}: report {output.report_loss:.3f}, transport {output.ot_loss:.3f}")
    print(f"transport plan: {tuple(output.transport_plan.shape)} (study, image token, finding)")

    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"saved in {options.output}: train the parts you need, then load it with AutoModel.from_pretrained")


if __name__ == "__main__":
    main()
