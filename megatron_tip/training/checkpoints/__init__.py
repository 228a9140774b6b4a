"""What a run continues from: its state on the disk, who writes it, and how a run is set back to it."""
