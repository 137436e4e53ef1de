"""An OpenAI-compatible server that understands edits. Needs the extra `serve`."""
