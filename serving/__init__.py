"""`otdrg serve`: an HTTP server with OpenAI's chat completions API."""
