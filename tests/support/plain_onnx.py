"""Graphs written to ONNX files of fixed sizes, without metadata and checks."""

from mmgfp.export.onnx_file import write_onnx
from mmgfp.export.options import ExportOptions


def write_plain_onnx(graph, image, path):
    write_onnx(path, graph, image, ExportOptions(), {})
