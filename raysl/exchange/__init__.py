"""Export encoders to other formats and import them, checking each file before it appears."""
