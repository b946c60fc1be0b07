"""What a user may choose about an exported file."""

from __future__ import annotations

from dataclasses import dataclass

from mmgfp.utils.errors import ConfigError

#: Name of the only input.
INPUT = 'image'
#: Axes that may be left free.
AXES = ('batch', 'size')


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        nms: Whether detections leave the file, rather than raw outputs; for
            classifiers, probabilities rather than logits.
        preprocess: Whether the file resizes, pads and normalises images itself.
        dynamic: Axes left free: 'batch', 'size'.
        opset: Version of ONNX's operators.
        dynamo: Whether `torch.export` finds the graph of an ONNX file.
        fp16: Whether weights are stored, and in ONNX multiplied, in half precision.
        calibrate: Images to calibrate 8-bit files on; 0 writes no such files.
    """

    nms: bool = False
    preprocess: bool = False
    dynamic: tuple[str, ...] = ()
    opset: int = 17
    dynamo: bool = False
    fp16: bool = False
    calibrate: int = 0

    def __post_init__(self) -> None:
        unknown = [axis for axis in self.dynamic if axis not in AXES]
        if unknown:
            raise ConfigError(
                '--dynamic', ' or '.join(AXES), ', '.join(unknown), 'name one of these'
            )
        if self.preprocess and self.dynamic:
            raise ConfigError(
                '--dynamic',
                'left out with --preprocess',
                'both',
                'such a file takes one image of any size and resizes it to one size',
            )
        least = 18 if self.dynamo else 11
        if self.opset < least:
            why = 'with --dynamo' if self.dynamo else 'for these options'
            raise ConfigError(
                '--opset', f'at least {least} {why}', str(self.opset), 'raise it'
            )

    @staticmethod
    def default_opset(dynamo: bool) -> int:
        """Return the opset that an exporter writes best."""
        return 18 if dynamo else 17

    def free_axes(self) -> dict[int, str]:
        """Return the free axes of the input by position, with their names."""
        if self.preprocess:
            return {1: 'height', 2: 'width'}
        axes = {0: 'batch'} if 'batch' in self.dynamic else {}
        return axes | ({2: 'height', 3: 'width'} if 'size' in self.dynamic else {})

    @property
    def outputs(self) -> str:
        """Kind of outputs that the file gives, as its metadata say."""
        return 'end-to-end' if self.nms else 'raw'
