"""The input side: sources of captioned images, tokenizers, and the deterministic loader."""
