"""Recipe files: steps in YAML, read with line numbers in every error, written, and described to editors."""

from .reading import parse_recipe, read_recipe
from .writing import write_recipe

__all__ = ["parse_recipe", "read_recipe", "write_recipe"]
