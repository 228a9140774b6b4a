"""Process launch, process groups, and communication between ranks."""
