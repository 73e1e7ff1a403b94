"""What samples are worth: detections, verdicts, means with intervals."""
