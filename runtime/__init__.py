"""From an artifact to tokens: loading, cache, sparse attention, generation."""
