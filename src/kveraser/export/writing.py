"""Writing a GGUF file to the end.

Knows: the `gguf` package. Does not know what is in the file.
"""

from __future__ import annotations

from gguf import GGUFWriter


def write_out(writer: GGUFWriter) -> None:
    """Write all that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
