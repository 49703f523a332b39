"""Reports: one JSON document, rendered as text, Markdown and HTML."""
