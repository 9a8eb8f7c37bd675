"""What a Hugging Face Inference Endpoint runs; `otdrg push` uploads both files with a model."""
