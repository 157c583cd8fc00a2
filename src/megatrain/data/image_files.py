"""Images of rows, opened when a step needs them: files in the data's folder, or bytes. Nothing here trusts them."""

import base64
import binascii
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import BadRowError, kind_of
from megatrain.errors import ConfigError

# others of Pillow's formats run programs of their own (EPS), or hold no photographs
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MOST_PIXELS = 1 << 26  # of an image: a small file can say that it is huge, and decoding takes 3 bytes each


_LONGEST_NAME = 300


@dataclass(frozen=True)
class ImageReference:
    """An image that has not been decoded: a file, or what would be in one."""

    name: str
    path: Path | None = None
    content: bytes | None = None


def reference_to(value: Any, folder: Path | None) -> ImageReference:
    """What a row has for an image: a path, a data: URI, bytes, a mapping with one of them, as `datasets` has it, or an
    image that `datasets` has opened. Raises BadRowError; also for a path that leads out of `folder`."""
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        value = value["bytes"]
    elif isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return ImageReference("an image", content=value)
    if hasattr(value, "save") and hasattr(value, "convert"):
        packed = io.BytesIO()
        value.convert("RGB").save(packed, "PNG")
        return ImageReference("an image", content=packed.getvalue())
    if not isinstance(value, str):
        raise BadRowError(f"has {kind_of(value)} for an image; expected a path or the bytes of a file")
    scheme, _, rest = value.partition(":")
    if scheme == "data":
        return ImageReference("an image", content=_of_data_uri(rest))
    if scheme in ("http", "https"):
        raise BadRowError(f"names image {_shown(value)}, and nothing is fetched; download it and give its path")
    if folder is None:
        raise BadRowError(f"names image {_shown(value)}, and it is not known in which folder; give images_folder")
    try:
        path = Path(os.path.realpath(folder / value.removeprefix("file://")))
    except ValueError:  # NUL, half of a surrogate pair
        raise BadRowError(f"names image {_shown(value)}, which is no path") from None
    if Path(os.path.realpath(folder)) not in path.parents:
        raise BadRowError(
            f"names image {_shown(value)}, which is outside of the data's folder, {str(folder)!r}; images_folder of "
            "the source names another"
        )
    return ImageReference(f"image {_shown(value)}", path=path)


def _of_data_uri(rest: str) -> bytes:
    """What follows 'data:', with or without the kind of image: what it is shows when it is opened."""
    kind, comma, packed = rest.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise BadRowError("has a data: URI that is not in base64 for an image")
    try:
        return base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        raise BadRowError("has a data: URI with wrong base64 for an image") from None


def _shown(value: str) -> str:
    return repr(value if len(value) <= _LONGEST_NAME else f"{value[:_LONGEST_NAME]}...")


def open_image(reference: ImageReference) -> Any:
    """The decoded image in RGB, upright. Raises BadRowError where it cannot be had."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    source: Any = reference.path if reference.content is None else io.BytesIO(reference.content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            with Image.open(source, formats=_FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise BadRowError(f"has {reference.name}, which is none of {', '.join(_FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadRowError(f"has {reference.name} of more than {MOST_PIXELS:,} pixels") from None
    except OSError as error:  # a file that is missing, or ends too early
        raise BadRowError(f"has {reference.name}, which cannot be read: {error.strerror or error}") from None
    except (SyntaxError, ValueError, MemoryError, OverflowError, EOFError) as error:  # whatever decoders stumble over
        raise BadRowError(f"has {reference.name}, which is damaged: {error}") from None


def content_sha256(reference: ImageReference) -> str:
    """Of the packed image. Raises ConfigError where it cannot be read any more."""
    try:
        content = reference.content if reference.path is None else reference.path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{reference.name} cannot be read any more: {error.strerror}") from None
    return hashlib.sha256(content or b"").hexdigest()


def require_pillow(key: str) -> None:
    """Raise ConfigError, naming `key`, where there is no Pillow."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConfigError(f"{key}: images need Pillow; pip install 'megatrain[images]'") from None
