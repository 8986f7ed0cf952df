"""Operations of head-wise sparse attention: one folder each, with its definition (reference.py) and its fast paths."""
