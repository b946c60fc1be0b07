"""How outputs of detection heads become detections, in ops that ONNX has."""
