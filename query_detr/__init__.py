"""Query-based object detection: Conditional DETR, DAB-DETR, DN-DETR and Group DETR as one model.

A small model, untrained, on a drawn scene; `query-detr train shapes_demo` trains one:

>>> from query_detr import QueryDETR, ShapesDataset, predict, recipes
>>> model = QueryDETR(recipes["shapes_demo"].model)
>>> found = predict(model, ShapesDataset(1)[0][0], threshold=0.0)

The names below are loaded when they are first asked for, so `import query_detr` costs nothing.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .criterion import Criterion
    from .data.coco import CocoDetection
    from .data.shapes import ShapesDataset
    from .matcher import match
    from .model import ModelConfig, QueryDETR
    from .run.evaluate import evaluate
    from .run.recipes import Recipe, recipe_named, recipes
    from .use.predict import predict

__all__ = [
    "CocoDetection",
    "Criterion",
    "ModelConfig",
    "QueryDETR",
    "Recipe",
    "ShapesDataset",
    "evaluate",
    "match",
    "predict",
    "recipe_named",
    "recipes",
]
_MODULES = {
    "CocoDetection": ".data.coco",
    "Criterion": ".criterion",
    "ModelConfig": ".model",
    "QueryDETR": ".model",
    "Recipe": ".run.recipes",
    "ShapesDataset": ".data.shapes",
    "evaluate": ".run.evaluate",
    "match": ".matcher",
    "predict": ".use.predict",
    "recipe_named": ".run.recipes",
    "recipes": ".run.recipes",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module 'query_detr' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
