"""From a frozen student to one integer artifact, to ONNX, and the proof that every executor agrees."""
