"""Load a trained model and write the report of a study, with `pipeline` and with model and processor.

python examples/inference.py runs/quickstart/model frontal.png lateral.png
"""

from __future__ import annotations

import argparse

from transformers import AutoModel, AutoProcessor, pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model, or its name on the Hub")
    parser.add_argument("views", nargs="+", help="images of one study: PNG, JPEG, DICOM ...")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="length limit of the report (default: 100)")
    options = parser.parse_args()
    study = [options.views]  # a list of studies; this study is a list of views

    # 1. The pipeline reads files and returns text, with the predicted state of each finding.
    pipe = pipeline("image-to-text", model=options.model, trust_remote_code=True)
    ((result,),) = pipe(study, max_new_tokens=options.max_new_tokens)
    print(f"report: {result['generated_text']}")
    for name, finding in result["findings"].items():
        print(f"  {name:<28} {finding['state']:<12} {finding['probability']:.2f}")

    # 2. Model and processor give full control.
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    inputs = processor(images=study)
    tokens = model.generate(**inputs, max_new_tokens=options.max_new_tokens)
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
    print(f"report: {processor.batch_decode(new_tokens, skip_special_tokens=True)[0]}")


if __name__ == "__main__":
    main()
