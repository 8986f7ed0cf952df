"""TensorRT: export of an artifact to ONNX with custom nodes, the plugins behind them, build, run and checks."""
