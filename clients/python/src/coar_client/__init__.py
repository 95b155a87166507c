"""A typed client of the coar image generation server.

    from coar_client import Coar

    client = Coar()
    client.concepts.add("rex", ["1.jpg", "2.jpg", "3.jpg"], class_="cat", wait=True)
    for image in client.generate("a photo of <rex> cat on the beach", n=2):
        image.save(f"rex-{image.index}.png")

`AsyncCoar` has the same calls, to be awaited.
"""

from ._version import __version__
from .aio import AsyncCoar
from .client import Coar
from .errors import *
from .errors import __all__ as _errors
from .events import *
from .events import __all__ as _events
from .images import *
from .images import __all__ as _images
from .objects import *
from .objects import __all__ as _objects
from .options import *
from .options import __all__ as _options

__all__ = ["AsyncCoar", "Coar", "__version__"]
__all__ += _errors + _events + _images + _objects + _options
