"""The build reads pyproject.toml; compiled parts are declared here."""

from setuptools import setup

setup()
