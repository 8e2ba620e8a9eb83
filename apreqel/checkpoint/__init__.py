"""Hugging Face checkpoints, local or on the hub: made a GGUF by llama.cpp's own converter."""
