"""Training data from a model's answers: judged, filtered, and built for the fusion of modes (report, 4.1 and 4.3)."""
