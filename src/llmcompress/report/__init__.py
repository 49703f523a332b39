"""One comparison, rendered: a terminal's table, Markdown, a notebook's table, and one HTML page."""
