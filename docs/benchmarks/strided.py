"""The model ``strided:CNN`` that rows of ``fashion_mnist-cnn.jsonl.gz`` name, importable from where this file is.

It is the model ``strided-cnn`` of ``cronos-flax compare``. The old name stays because a comparison resumes only with
the settings that its rows have.
"""

from cronos_flax.compare.models import MODELS

CNN = MODELS["strided-cnn"]
