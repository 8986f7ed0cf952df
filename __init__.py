"""rtpurbo turns a full-attention Hugging Face LLM into a head-wise sparse one that serves million-token contexts."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "load"]

if TYPE_CHECKING:
    from rtpurbo.converter.convert import convert
    from rtpurbo.runtime.loader import load


def __getattr__(name: str) -> Any:
    """Import `convert` and `load` on first use, so that `import rtpurbo` stays light."""
    if name == "convert":
        from rtpurbo.converter.convert import convert

        return convert
    if name == "load":
        from rtpurbo.runtime.loader import load

        return load
    raise AttributeError(f"module 'rtpurbo' has no attribute {name!r}")
