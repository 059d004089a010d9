"""Adapters to other libraries, one module each; only these modules import them."""
