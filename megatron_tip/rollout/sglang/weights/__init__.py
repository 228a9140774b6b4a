"""The transfer of the student's weights to the servers that generate: buckets and transports."""
