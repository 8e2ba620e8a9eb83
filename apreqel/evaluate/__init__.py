"""Whole files, measured as llama.cpp runs them."""
