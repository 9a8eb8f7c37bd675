"""A trained model over many studies: loading, encoding with the feature cache, generating, retrieval, heatmaps."""
