"""What stands in an exported folder in place of four modules of the checkout.

These need pydantic, peft or a compiler; an exported folder needs transformers and torch alone.
"""
