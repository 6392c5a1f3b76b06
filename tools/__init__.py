"""Command-line utilities, run from a clone: python -m tools.NAME"""
