"""Slides in DICOM, as a scanner writes them: a file a level, and one of the label, all of one series."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE_PX = 256


def write_instance(
    path: Path, image: np.ndarray, *, series: str, mpp: tuple[float, float], kind: str = "VOLUME", wsi: bool = True
) -> None:
    """One file: ``image`` in tiles of 256 px, uncompressed; ``mpp`` is um/px along x and y."""
    high, wide = (-(-side // TILE_PX) * TILE_PX for side in image.shape[:2])
    padded = np.full((high, wide, 3), 255, np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    tiles = padded.reshape(high // TILE_PX, TILE_PX, wide // TILE_PX, TILE_PX, 3).swapaxes(1, 2)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage if wsi else CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.FrameOfReferenceUID = "SM", series, generate_uid()
    data.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.Rows, data.Columns, data.NumberOfFrames = TILE_PX, TILE_PX, tiles.shape[0] * tiles.shape[1]
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = image.shape[:2]
    data.DimensionOrganizationType, data.TotalPixelMatrixFocalPlanes = "TILED_FULL", 1
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [mpp[1] / 1000, mpp[0] / 1000]  # mm, rows first
    shared.PixelMeasuresSequence = Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    data.PixelData = np.ascontiguousarray(tiles).tobytes()
    data.save_as(path, enforce_file_format=True)


def write_slide(
    folder: Path, image: np.ndarray, *, mpp: tuple[float, float] = (0.25, 0.25), levels: int = 3, stem: str = "level"
) -> str:
    """A slide of ``levels`` files and its label in a folder; returns the UID of its series."""
    folder.mkdir(parents=True, exist_ok=True)
    series = str(generate_uid())
    for level in range(levels):
        sides = image.shape[1] >> level, image.shape[0] >> level
        scaled = cv2.resize(image, sides, interpolation=cv2.INTER_AREA)
        # The finest level comes last by name, as nothing tells that it should come first.
        name = folder / f"{stem}_{levels - level}.dcm"
        write_instance(name, scaled, series=series, mpp=(mpp[0] * 2**level, mpp[1] * 2**level))
    write_instance(folder / f"{stem}_0.dcm", image[:256, :256], series=series, mpp=mpp, kind="LABEL")
    return series
