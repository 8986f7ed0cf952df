"""From a checkpoint to an artifact: calibration, indexer, distillation, packaging."""
