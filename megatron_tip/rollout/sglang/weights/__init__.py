"""The student's weights on their way to the servers that generate: buckets, and the ways that they take."""
