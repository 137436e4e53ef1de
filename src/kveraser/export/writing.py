"""Writing a GGUF file to the end.

Knows: the `gguf` package. Does not know what is in the file.
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter

from kveraser.errors import OptionError


def check_file(target: Path) -> None:
    """Raise `OptionError` where a file cannot be written, since there is a folder."""
    if target.is_dir():
        raise OptionError(f"{target} is a folder; give the name of the file to write, such as {target / 'model.gguf'}")


def write_out(writer: GGUFWriter) -> None:
    """Write all that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
