"""What published data sets look like, read as samples."""
