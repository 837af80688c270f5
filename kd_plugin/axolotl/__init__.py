"""Axolotl as a host: ``plugins: [kd_plugin.axolotl.KDPlugin]``, and what it does under the key ``kd_plugin``.

The trainers are Axolotl's own with the mixins of :mod:`kd_plugin.transformers` before them. The settings can be read
where Axolotl is not installed.
"""

from typing import Any

from kd_plugin.axolotl.settings import AxolotlSettings

__all__ = ["AxolotlSettings", "KDArgs", "KDPlugin"]


def __getattr__(name: str) -> Any:
    """Import what stands on Axolotl when it is asked for, as Axolotl does by its name."""
    if name in __all__:
        from kd_plugin.axolotl import plugin

        return getattr(plugin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
