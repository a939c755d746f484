"""The lab: measures problems and solutions side by side."""
