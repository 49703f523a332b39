"""The contract that every strategy keeps, public for plug-ins, and the tiny models it runs over.

A plug-in's test is three lines:

    @pytest.mark.parametrize("family", FAMILIES)
    def test_contract(family):
        check_compression(MyPruning(), family)
"""

from .contract import check_compression, check_declaration, check_refusal, check_reloads, save_expected
from .families import FAMILIES, IMAGE_FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

__all__ = [
    "FAMILIES",
    "IMAGE_FAMILIES",
    "check_compression",
    "check_declaration",
    "check_refusal",
    "check_reloads",
    "save_expected",
    "tiny_data",
    "tiny_inputs",
    "tiny_model",
    "tiny_tokenizer",
]
