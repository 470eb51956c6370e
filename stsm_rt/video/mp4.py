"""An MP4 file that plays at any moment while it grows, and is an ordinary one when it is complete.

While it grows it is a fragmented MP4 (ISO/IEC 14496-12, 8.8): each piece of video is appended as a ``moof`` box, which
says where the frames lie, and an ``mdat`` box with the frames. Whatever ends the writer, all pieces but the last play.
To complete the file, one ``moov`` box with the whole index is appended, and the header of a small box at the front is
overwritten so that it becomes an ``mdat`` box over everything in between: then it is an ordinary MP4, whose duration
and frame count every player knows and in which it can seek. The pieces are complete MP4 files with one video track,
as any encoder writes them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from stsm_rt.video.result_files import GrowingFile

_MOVIE_CLOCK = 1000  # ticks per second of the times in mvhd and tkhd
_UNIT_MATRIX = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_KEY, _NO_KEY = 0x02000000, 0x01010000  # 8.8.3.1: depends on no other sample; depends on others and is no sync sample
_BASE_IS_MOOF, _HAS_DURATION = 0x020000, 0x000008  # flags of tfhd
_HAS_OFFSET, _HAS_SIZES, _HAS_FLAGS = 0x000001, 0x000200, 0x000400  # flags of trun


class DamagedPieceError(ValueError):
    """A piece that is no complete MP4 file of the expected kind."""


class _Piece(NamedTuple):
    """What is in a complete MP4 file: its frames, in the order in which they lie there."""

    frames: memoryview
    sizes: list[int]  # of the frames in bytes
    keys: list[int]  # numbers, from 1, of the frames that depend on no other
    clock: int  # ticks per second
    ticks: int  # per frame
    size: tuple[int, int]  # width and height in pixels
    description: bytes  # the stsd box: the codec and its header


class GrowingMp4:
    """Makes one MP4 file of pieces of video that follow each other.

    Attributes:
        frame_count: Frames in the file.
    """

    def __init__(self, file: GrowingFile) -> None:
        """Begin the file; the first piece says what kind of video it is.

        Args:
            file: Empty. It is not closed.

        Raises:
            OSError: If it cannot be written.
        """
        self.frame_count = 0
        self._file = file
        self._first: _Piece | None = None
        self._complete = False
        # Four bytes for each frame, eight for each key frame, sixteen for each piece: 15 MB for a day of 30 frames/s.
        self._sizes = array("I")
        self._keys = array("Q")
        self._chunks = array("Q")  # where the frames of each piece begin
        self._counts = array("Q")  # how many they are
        brands = b"isom" + struct.pack(">I", 512) + b"isomiso2iso5mp41"
        file.append(_box(b"ftyp", brands))
        self._cover = file.length
        file.append(_box(b"free", bytes(8)))

    @property
    def complete_length(self) -> int:
        """Bytes that it has when it is completed now, or a few hundred fewer."""
        index = 4 * len(self._sizes) + 4 * len(self._keys) + 20 * len(self._chunks) + 1000
        return self._file.length + index

    def append(self, data: bytes, frame_count: int) -> None:
        """Append a piece.

        Args:
            data: A complete MP4 file with one video track of a constant frame rate.
            frame_count: How many frames it must have.

        Raises:
            DamagedPieceError: If it has not, or is of another kind than those before.
            OSError: If the file cannot be written; it then ends with the piece before.
        """
        piece = _read(data)
        if len(piece.sizes) != frame_count:
            raise DamagedPieceError(f"{len(piece.sizes)} of {frame_count} frames are there")
        first = self._first or piece
        if (piece.clock, piece.ticks, piece.size) != (first.clock, first.ticks, first.size):
            raise DamagedPieceError("it is of another kind than those before")
        header = b"" if self._first else self._movie(piece, fragmented=True)
        fragment = self._fragment(piece)
        place = self._file.length + len(header)
        frames_header = struct.pack(">I4s", len(piece.frames) + 8, b"mdat")
        # A file that ends within a moof box does not play at all, so it is one of no meaning until all is there.
        self._file.append(header, fragment[:4], b"free", fragment[8:], frames_header, piece.frames)
        self._file.overwrite(place + 4, b"moof")
        begin = place + len(fragment) + 8
        self._first = first
        self._keys.extend(self.frame_count + key for key in piece.keys)
        self._sizes.extend(piece.sizes)
        self._chunks.append(begin)
        self._counts.append(frame_count)
        self.frame_count += frame_count

    def complete(self) -> None:
        """Turn the file into an ordinary MP4, which takes no more pieces; may be called twice.

        Raises:
            OSError: If there is no room for the index: then it stays as it is, and plays.
        """
        if self._first is None or self._complete:
            return
        end = self._file.length
        index = self._movie(self._first, fragmented=False)
        self._file.append(index[:4], b"free", index[8:])
        self._file.overwrite(end + 4, b"moov")  # of two, players take the first
        self._file.overwrite(self._cover, struct.pack(">I4sQ", 1, b"mdat", end - self._cover))
        self._complete = True

    def _fragment(self, piece: _Piece) -> bytes:
        keys = set(piece.keys)
        rows = [(size, _KEY if number in keys else _NO_KEY) for number, size in enumerate(piece.sizes, 1)]
        flags = _HAS_OFFSET | _HAS_SIZES | _HAS_FLAGS
        length = 8 + 16 + 8 + 20 + 20 + 20 + 8 * len(rows)  # moof, mfhd, traf, tfhd, tfdt, trun and its rows
        run = struct.pack(">Ii", len(rows), length + 8) + b"".join(struct.pack(">II", *row) for row in rows)
        track = (
            _full_box(b"tfhd", 0, _BASE_IS_MOOF | _HAS_DURATION, struct.pack(">II", 1, piece.ticks))
            + _full_box(b"tfdt", 1, 0, struct.pack(">Q", self.frame_count * piece.ticks))
            + _full_box(b"trun", 0, flags, run)
        )
        box = _box(b"moof", _full_box(b"mfhd", 0, 0, struct.pack(">I", len(self._chunks) + 1)) + _box(b"traf", track))
        assert len(box) == length
        return box

    def _movie(self, kind: _Piece, *, fragmented: bool) -> bytes:
        """Make the moov box: of no frame, with fragments to follow, or of all."""
        media = 0 if fragmented else self.frame_count * kind.ticks
        duration = media * _MOVIE_CLOCK // kind.clock
        width, height = kind.size
        movie = struct.pack(">QQIQIH10x", 0, 0, _MOVIE_CLOCK, duration, 0x10000, 0x100) + _UNIT_MATRIX
        movie += struct.pack(">24xI", 2)
        track = struct.pack(">QQIIQ8x4H", 0, 0, 1, 0, duration, 0, 0, 0, 0) + _UNIT_MATRIX
        track += struct.pack(">II", width << 16, height << 16)
        clock = struct.pack(">QQIQHH", 0, 0, kind.clock, media, 0x55C4, 0)  # no language
        here = _full_box(b"dref", 0, 0, struct.pack(">I", 1) + _full_box(b"url ", 0, 1, b""))
        information = (
            _full_box(b"vmhd", 0, 1, bytes(8))
            + _box(b"dinf", here)
            + _box(b"stbl", kind.description + (self._no_table() if fragmented else self._table(kind)))
        )
        handler = _full_box(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"vide") + b"VideoHandler\0")
        contents = _full_box(b"mdhd", 1, 0, clock) + handler + _box(b"minf", information)
        boxes = _full_box(b"mvhd", 1, 0, movie)
        boxes += _box(b"trak", _full_box(b"tkhd", 1, 3, track) + _box(b"mdia", contents))
        if fragmented:
            boxes += _box(b"mvex", _full_box(b"trex", 0, 0, struct.pack(">5I", 1, 1, 0, 0, 0)))
        return _box(b"moov", boxes)

    def _no_table(self) -> bytes:
        empty = struct.pack(">I", 0)
        tables = b"".join(_full_box(name, 0, 0, empty) for name in (b"stts", b"stsc", b"stco"))
        return tables + _full_box(b"stsz", 0, 0, bytes(8))

    def _table(self, kind: _Piece) -> bytes:
        times = struct.pack(">III", 1, self.frame_count, kind.ticks)
        runs: list[tuple[int, int, int]] = []  # of pieces with as many frames
        for number, count in enumerate(self._counts, 1):
            if not runs or runs[-1][1] != count:
                runs.append((number, count, 1))
        chunks = b"".join(struct.pack(">III", *run) for run in runs)
        return (
            _full_box(b"stts", 0, 0, times)
            + _full_box(b"stss", 0, 0, struct.pack(">I", len(self._keys)) + _big_endian(array("I", self._keys)))
            + _full_box(b"stsc", 0, 0, struct.pack(">I", len(runs)) + chunks)
            + _full_box(b"stsz", 0, 0, struct.pack(">II", 0, self.frame_count) + _big_endian(self._sizes))
            + _full_box(b"co64", 0, 0, struct.pack(">I", len(self._chunks)) + _big_endian(self._chunks))
        )


def _read(data: bytes) -> _Piece:
    """Find the frames of a complete MP4 file."""
    try:
        top = dict(_boxes(memoryview(data)))
        track = _find(top[b"moov"], b"trak")
        media = _find(track, b"mdia")
        tables = dict(_boxes(_find(_find(media, b"minf"), b"stbl")))
        (clock,) = struct.unpack_from(">I", _find(media, b"mdhd"), 12)
        width, height = struct.unpack_from(">II", _find(track, b"tkhd"), 76)
        (runs,) = struct.unpack_from(">I", tables[b"stts"], 4)
        ticks = {struct.unpack_from(">II", tables[b"stts"], 8 + 8 * i)[1] for i in range(runs)}
        same, count = struct.unpack_from(">II", tables[b"stsz"], 4)
        sizes = [same] * count if same else list(struct.unpack_from(f">{count}I", tables[b"stsz"], 12))
        keys = list(range(1, count + 1))
        if b"stss" in tables:
            keys = list(struct.unpack_from(f">{struct.unpack_from('>I', tables[b'stss'], 4)[0]}I", tables[b"stss"], 8))
    except (KeyError, struct.error) as error:
        raise DamagedPieceError("its index is not there") from error
    frames = top.get(b"mdat", memoryview(b""))
    if sum(sizes) != len(frames) or len(ticks) != 1 or b"ctts" in tables:
        raise DamagedPieceError("its frames do not lie in order, or some are missing")
    description = bytes(tables[b"stsd"])
    return _Piece(frames, sizes, keys, clock, ticks.pop(), (width >> 16, height >> 16), _box(b"stsd", description))


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Iterate over the boxes that lie in a row, as (type, content)."""
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, position + 8)
            header = 16
        if length < header or position + length > len(data):
            raise DamagedPieceError("it is cut off")
        yield kind, data[position + header : position + length]
        position += length


def _find(data: memoryview, kind: bytes) -> memoryview:
    return dict(_boxes(data))[kind]


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, kind) + content


def _full_box(kind: bytes, version: int, flags: int, content: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags) + content)


def _big_endian(numbers: array[int]) -> bytes:
    copy = array(numbers.typecode, numbers)
    if struct.pack("=H", 1) != struct.pack(">H", 1):
        copy.byteswap()
    return copy.tobytes()
